"""A teacher that is not there: what it said of the training samples, looked up by their ids."""

# Shape suffix legend: B = this data rank's samples, S = this context rank's tokens, K = entries of a position.

import shlex
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megagrow.config import Config, SaltConfig, require
from megagrow.data.dataset import PackedDataset, Samples
from megagrow.errors import ConfigError, DataError
from megagrow.model.transformer import Teacher as StageTeacher
from megagrow.model.transformer import Transformer
from megagrow.parallel.context import cut
from megagrow.parallel.mesh import Mesh
from megagrow.salt.records import corpus_fields
from megagrow.salt.teacher import check_vocabulary, loss_options, weigh
from megagrow.salt.teacher_cache import TeacherCache

SHARED_FIELDS = ("model", "dtype", "vocab_size", "kind", "num_entries")  # of the caches of one run


class CachedTeacher:
    """The caches of a run's datasets.

    Args:
        config: the run's; its salt.cache names the folders.
        datasets: the training data, in the order of the blend.

    Attributes:
        caches: by dataset.

    Raises:
        ConfigError: the caches do not fit the run: another tokenizer's vocabulary, or one with more rows than the
            model's, another temperature or treatment of documents.
        DataError: a cache is missing or damaged, or no cache is that of a dataset.
    """

    def __init__(self, config: Config, datasets: Sequence[Samples]) -> None:
        self.salt = config.salt
        opened = [TeacherCache(folder) for folder in cache_folders(config.salt)]
        self.caches = [_cache_of(dataset, opened) for dataset in datasets]
        require(
            len(opened) == len(datasets),
            f"salt.cache names {len(opened)} folders for {len(datasets)} datasets; name one for each",
        )
        for cache in self.caches:
            _check_fits(cache, config)
            _check_like(cache, self.caches[0])

    @property
    def is_sample(self) -> bool:
        """Whether the targets are drawn."""
        return self.caches[0].identity.kind == "sampled"

    @property
    def is_partial(self) -> bool:
        """Whether a cache lacks samples of its dataset."""
        return any(cache.num_cached < cache.identity.num_samples for cache in self.caches)

    def check_coverage(self, which: NDArray[np.int64], ids: NDArray[np.int64]) -> None:
        """Raises DataError unless the caches hold these samples, given by dataset and id."""
        for number, cache in enumerate(self.caches):
            wanted = np.unique(ids[which == number])
            missing = cache.missing(wanted)
            if len(missing):
                raise DataError(
                    f"{cache.folder}: {len(missing):,} of the {len(wanted):,} samples that stage 1 draws from this "
                    f"corpus ({len(missing) / len(wanted):.1%}) are not in the cache, the first is {missing[0]}; cache "
                    "all of them (no --samples), or a larger share with --seed as data.seed"
                )

    def targets(self, which: NDArray[np.int64], ids: NDArray[np.int64], mesh: Mesh) -> dict[str, Tensor]:
        """What the loss takes of samples given by dataset and id: this context rank's positions of each.

        Returns:
            `target_ids` [B, S, K] int32 and `target_masses` [B, S, K + 1] float32; nothing on pipeline ranks that
            compute no loss.

        Raises:
            DataError: a sample is not in the cache, or damaged.
        """
        if mesh.pp.rank != mesh.loss_rank:
            return {}
        shape = self.caches[0].identity.shape
        ids_BSK = np.empty((len(ids), shape.seq_length, shape.num_entries), np.int32)
        masses_BSK1 = np.empty((len(ids), shape.seq_length, shape.num_entries + 1), np.float32)
        for number in np.unique(which):
            mine = which == number
            ids_BSK[mine], masses_BSK1[mine] = self.caches[number].targets(ids[mine])
        given = {"target_ids": ids_BSK, "target_masses": masses_BSK1}
        return {
            name: cut(torch.from_numpy(x), mesh.cp).contiguous().to(mesh.device, non_blocking=True)
            for name, x in given.items()
        }

    def attach(self, last_stage: Transformer | None) -> None:
        """Tells the last stage how targets are mixed in."""
        if last_stage is not None:
            num_common = self.caches[0].identity.vocab_size
            last_stage.teacher = StageTeacher(None, loss_options(self.salt), num_common, self.is_sample)

    def weigh(self, last_stage: Transformer | None, weight: float) -> None:
        """Sets ω for the coming steps, where the loss is computed."""
        weigh(last_stage, weight)

    def free(self, last_stage: Transformer | None) -> None:
        """The loss is plain again, and what was kept of the files is dropped."""
        if last_stage is not None:
            last_stage.teacher = None
        for cache in self.caches:
            cache.forget()


def cache_folders(salt: SaltConfig) -> list[str]:
    """The folders that `salt.cache` names; ConfigError when they cannot be told apart."""
    try:
        return shlex.split(salt.cache)
    except ValueError as error:
        raise ConfigError(f"salt.cache={salt.cache!r} cannot be split into folders: {error}") from None


def _cache_of(dataset: Samples, caches: Sequence[TeacherCache]) -> TeacherCache:
    assert isinstance(dataset, PackedDataset), "data.order=megatron is refused with salt.cache"
    corpus = corpus_fields(dataset)["corpus_sha256"]
    fitting = [cache for cache in caches if cache.identity.corpus_sha256 == corpus]
    if not fitting and len(caches) > 1:
        names = ", ".join(str(cache.folder) for cache in caches)
        raise DataError(f"{dataset.prefix}: none of the caches {names} is of this corpus; cache it")
    cache = (fitting or caches)[0]
    cache.check_dataset(dataset)
    return cache


def _check_fits(cache: TeacherCache, config: Config) -> None:
    """The targets must be those that the configuration asks for."""
    found, size = cache.identity, config.model.vocab_size
    check_vocabulary(found.vocab_size, size, f"{cache.folder}: its teacher")
    require(
        found.vocab_size <= size,
        f"{cache.folder}: its teacher has vocab_size={found.vocab_size}, the model only {size}: what the cache says of "
        "the other rows cannot be taken out of it; give the model as many rows, or use salt.teacher",
    )
    wanted = {
        "temperature": ("salt.temperature", config.salt.temperature),
        "mask_documents": ("data.mask_documents", config.data.mask_documents),
        "reset_positions": ("data.reset_positions", config.data.reset_positions),
    }
    for name, (field, value) in wanted.items():
        own = getattr(found, name)
        require(
            own == value,
            f"{cache.folder}: was made with {name}={own}, {field}={value}: its targets are of the former; set {field} "
            "to it, or make another cache",
        )


def _check_like(cache: TeacherCache, first: TeacherCache) -> None:
    for name in SHARED_FIELDS:
        ours, theirs = getattr(cache.identity, name), getattr(first.identity, name)
        require(
            ours == theirs,
            f"{cache.folder}: has {name}={ours}, {first.folder} {name}={theirs}: the caches of one run are of one "
            "teacher and kind; make them alike",
        )
