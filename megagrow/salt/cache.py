"""The small model writes down what it says of every token, so that it need not be there when others learn from it.

Two kinds: the k likeliest tokens with the mass of all others (exact as far as they go, see parallel/cached_loss.py), or
N draws (unbiased; sparse logit sampling, Anshumann et al., 2025, arXiv 2503.16870).

Targets are kept by sample, so they serve any batch size, seed, mesh and blend.
"""

# Shape suffix legend: B = samples of a batch, S = sequence, T = B·S tokens, H = hidden, K = entries of a position.

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megagrow.checkpoint.source import Source, share_identity
from megagrow.config import require
from megagrow.data.dataset import PackedDataset
from megagrow.errors import DataError
from megagrow.model.transformer import Transformer
from megagrow.parallel.mesh import Mesh
from megagrow.parallel.top_tokens import drawn_tokens, top_tokens
from megagrow.salt.cache_format import Entries, Kind, compress, encode, to_codes
from megagrow.salt.cache_manifest import CacheIdentity
from megagrow.salt.cache_shards import CacheShards, samples_sha256
from megagrow.salt.records import corpus_fields, share_fingerprint
from megagrow.salt.sharded import Progress, ReadSettings, check_reader, checked_model, read_samples
from megagrow.salt.teacher_cache import is_complete
from megagrow.torch_ops import mix

UNIFORM_BITS = 32


@dataclass(frozen=True)
class CacheSettings(ReadSettings):
    """What is kept of the teacher, and how it reads.

    Attributes:
        top_k: tokens of each position; 0: they are drawn.
        sampled: draws of each position; exactly one of the two is set.
        temperature: by which the teacher's logits are divided.
    """

    top_k: int = 0
    sampled: int = 0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            min(self.top_k, self.sampled) == 0 < max(self.top_k, self.sampled),
            f"top_k={self.top_k}, sampled={self.sampled}: exactly one of them must be positive",
        )
        require(self.sampled <= 2**16, f"sampled={self.sampled} must be at most {2**16}")
        require(0 < self.temperature < 1e6, f"temperature={self.temperature} must be positive and below a million")

    @property
    def kind(self) -> Kind:
        return "top_k" if self.top_k else "sampled"


def cache_teacher(
    source: Source,
    dataset: PackedDataset,
    output: Path | str,
    mesh: Mesh,
    settings: CacheSettings,
    samples: NDArray[np.int64] | None = None,
    flops: float | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes the teacher's targets for samples of `dataset` into the folder `output`; all ranks call it.

    A finished cache of the same corpus, model and settings is left as it is, an unfinished one is continued.

    Args:
        source: the teacher.
        dataset: packed training samples.
        output: folder of `manifest.json` and `shards`, made if need be.
        mesh: its tensor axis shards the model; the other axes share the samples.
        settings: see `CacheSettings`.
        samples: ascending ids; None: all samples.
        flops: what the teacher's passes take, for the manifest; None: not counted.
        progress: where to report, given on one rank.

    Returns:
        `output`, once the cache is complete.

    Raises:
        ConfigError: the model is an encoder or cannot be laid out on the mesh, the samples are longer than its position
            table, or there are fewer tokens than entries.
        DataError: the model does not fit the data (see `check_source`) or gives logits that are not finite, or `output`
            holds something else.
    """
    output = Path(output)
    check_reader(source, dataset, mesh, "cache")
    require(
        settings.top_k <= source.model.vocab_size,
        f"top_k={settings.top_k} exceeds vocab_size={source.model.vocab_size} of {source.path}; use at most as many",
    )
    share_fingerprint(dataset, mesh)
    share_identity(source, mesh)
    identity = identity_of(source, dataset, settings, samples)
    shards = CacheShards(output, identity, samples, settings.batch_size, settings.shard_size, mesh)

    def work(pending: list[int]) -> None:
        model = checked_model(source, dataset, mesh, settings, progress)
        shards.begin()
        _cache_shards(model, dataset, shards, pending, settings, progress)

    shards.carry_out(
        lambda: is_complete(output, identity), work, lambda: shards.complete(flops, source.ledger), shards.clean_up
    )
    return output


def identity_of(
    source: Source, dataset: PackedDataset, settings: CacheSettings, samples: NDArray[np.int64] | None
) -> CacheIdentity:
    """The identity of such a cache; reads the token files once."""
    return CacheIdentity(
        model=source.identity,
        vocab_size=source.model.vocab_size,
        kind=settings.kind,
        num_entries=settings.top_k or settings.sampled,
        temperature=settings.temperature,
        samples_sha256=samples_sha256(samples),
        **settings.identity,
        **corpus_fields(dataset),
    )


def _cache_shards(
    model: Transformer,
    dataset: PackedDataset,
    shards: CacheShards,
    pending: list[int],
    settings: CacheSettings,
    progress: Progress | None,
) -> None:
    report = shards.reporter(progress, pending, "caching", dataset.seq_length)
    for shard in shards.mine(pending):
        start = time.monotonic()
        blocks = _cache_shard(model, dataset, shards, shard, settings, report)
        if shards.mesh.tp.is_first:
            shards.write(shard, blocks, (time.monotonic() - start) / shards.num_workers)


def _cache_shard(
    model: Transformer,
    dataset: PackedDataset,
    shards: CacheShards,
    shard: int,
    settings: CacheSettings,
    report: Callable[[int], None],
) -> list[bytes]:
    """The compressed targets of each sample of a shard; on the first tensor rank only."""
    shape, compression, blocks = shards.identity.shape, shards.compression, []
    for places in shards.batches(shard):
        ids = shards.ids(places)
        batch = sample_entries(model, dataset, ids, settings)
        if shards.mesh.tp.is_first:
            blocks += [compress(encode(entries, shape), compression) for entries in batch]
        report(len(ids))
    return blocks


def sample_entries(
    model: Transformer, dataset: PackedDataset, ids: NDArray[np.int64], settings: CacheSettings
) -> list[Entries]:
    """What the teacher says of each of these samples.

    Raises:
        DataError: its logits are not finite.
    """
    device = model.head_VH.device
    inputs_BS, _, told = read_samples(dataset, ids, settings, device)
    with torch.no_grad():
        hidden_TH = model(inputs_BS, **told).flatten(0, 1)
    given = model.config.vocab_size, model.tp.axis
    if settings.kind == "top_k":
        found = top_tokens(
            hidden_TH, model.head_VH, settings.top_k, settings.temperature, *given, head_bias=model.head_bias_V
        )
        ids_TK, logs_TK, rest_T = found[0], -found[1], -found[2]
    else:
        uniform_T = uniform_numbers(ids, dataset.seq_length, device).flatten()
        ids_TK, rest_T = drawn_tokens(
            hidden_TH,
            model.head_VH,
            settings.sampled,
            settings.temperature,
            uniform_T,
            *given,
            head_bias=model.head_bias_V,
        )
        logs_TK = rest_T[:, None]
    ids_BSK, logs_BSK = (x.unflatten(0, inputs_BS.shape).cpu().numpy() for x in (ids_TK, logs_TK))
    rest_BS = rest_T.view_as(inputs_BS).cpu().numpy()
    _check_finite(logs_BSK, dataset, ids)
    is_top = settings.kind == "top_k"
    return [
        Entries(ids_BSK[i], to_codes(logs_BSK[i]) if is_top else None, to_codes(rest_BS[i])) for i in range(len(ids))
    ]


def uniform_numbers(ids: NDArray[np.int64], seq_length: int, device: torch.device) -> Tensor:
    """Numbers [B, S] in (0, 1) for the positions of samples, float64; they depend on sample and position only."""
    keys_BS = mix(mix(torch.from_numpy(ids))[:, None] + torch.arange(seq_length))
    return ((keys_BS & 2**UNIFORM_BITS - 1).double() + 0.5).div(2.0**UNIFORM_BITS).to(device)


def _check_finite(logs_BSK: NDArray[np.floating], dataset: PackedDataset, ids: NDArray[np.int64]) -> None:
    is_bad_B = np.isnan(logs_BSK).any((1, 2))
    if is_bad_B.any():
        raise DataError(
            f"{dataset.prefix}: sample {ids[is_bad_B.argmax()]} gets logits that are not finite from the teacher: its "
            "weights are damaged or overflow in this dtype; use another checkpoint or a wider dtype"
        )
