"""A trained model from outside the run, whatever its format: own checkpoint, run directory, or Hugging Face folder.

Growth, teachers, scoring, evaluation and conversion all read models through `open_source`.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast, get_args

import torch
from torch import Tensor

from megagrow.checkpoint import hf, store
from megagrow.checkpoint.remote import as_path, remote
from megagrow.checkpoint.shards import DTYPES
from megagrow.config import ModelConfig, Policy, TrainConfig
from megagrow.config_file import from_dict
from megagrow.data.dataset import Samples
from megagrow.errors import CheckpointError, ConfigError, DataError, shown
from megagrow.model import Transformer
from megagrow.optim import Multipliers
from megagrow.parallel import heartbeat
from megagrow.parallel.collectives import broadcast_json, sum_over
from megagrow.parallel.context import cut
from megagrow.parallel.mesh import Mesh
from megagrow.parallel.shards import fill, shard_parameters
from megagrow.roles import parameter_names

CHECK_SAMPLES = 8
MULTIPLIERS = {field.name for field in fields(Multipliers)}
POLICIES = get_args(Policy)
HASH_BYTES = 64 << 20  # read at a time
UNFIT_SHARE = 0.9  # of ln(vocabulary size): what a model that learned nothing of this data scores


@dataclass(frozen=True)
class Source:
    """A model on disk.

    Attributes:
        path: the folder that holds it.
        model: its configuration.
        fetch: reads one whole parameter by its megagrow name, in the stored dtype.
        dtype_of: the stored dtype of a parameter, by its megagrow name.
        identify: computes `identity`.
        ledger: what its training cost, or None when unknown.
        tokenizer: the tokenizer that it was trained with ("" when unknown).
        read: reads any stored tensor by its name in the checkpoint (own checkpoints; Adam's moments are there).
        optimizer: Adam's step and multipliers, when the moments are stored too.
        has_just_grown: whether a tool grew it and nothing has trained it since, so that its moments wait to go on.
        dropped: parameters on disk that the model does without.
        window: tokens that its attention is bounded to where it comes from, and not here; None: nowhere.
        token_ids: its special tokens by the names that a Hugging Face config.json has for them; None: it states none.
        token_ids_of: the tokenizer that they belong to, where a run has named another one since; "" else.
    """

    path: Path
    model: ModelConfig
    fetch: Callable[[str], Tensor]
    dtype_of: Callable[[str], torch.dtype]
    identify: Callable[[], str]
    ledger: dict[str, Any] | None
    tokenizer: str
    read: Callable[[str], Tensor]
    optimizer: dict[str, Any] | None = None
    has_just_grown: bool = False
    dropped: tuple[str, ...] = ()
    window: int | None = None
    token_ids: dict[str, Any] | None = None
    token_ids_of: str = ""

    @cached_property
    def identity(self) -> str:
        """Hash that names these weights: of a Hugging Face folder all is read once, and only where it is asked for."""
        return self.identify()

    @property
    def note(self) -> str:
        """One line that names what was dropped, and a window that is not kept; "" when there is neither."""
        said = []
        if self.dropped:
            said.append(f"dropped, as the model's logits do not depend on it: {', '.join(self.dropped)}")
        if self.window is not None:
            said.append(
                f"attention reaches beyond the sliding window of {self.window} tokens, so use no longer sequences"
            )
        return f"{self.path}: {'; '.join(said)}" if said else ""


def open_source(path: Path | str) -> Source:
    """Opens an own checkpoint (`step-N`), a run directory (its newest checkpoint) or a Hugging Face folder.

    Own checkpoints may be remote (a URL for fsspec).

    Raises:
        CheckpointError: nothing usable is there.
    """
    path = as_path(path)
    try:
        is_there = path.is_dir()
    except OSError as error:  # a store that does not answer
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if not is_there:
        raise CheckpointError(f"{path}: no such folder; give a checkpoint, a run directory or a Hugging Face folder")
    if remote(path) is None and hf.is_hf_folder(path):
        return _open_hf(path)
    found = store.newest(path) or store.newest(path / "checkpoints")
    if found is None:
        raise CheckpointError(
            f"{path}: neither a checkpoint (manifest.json) nor a Hugging Face folder (config.json with safetensors); "
            "give the folder of one"
        )
    return _open_own(found)


def load_model(
    source: Source, mesh: Mesh, dtype: torch.dtype | None = None, train: TrainConfig | None = None
) -> Transformer:
    """The whole model on every pipeline and data rank, sharded over the tensor axis only, for inference.

    Args:
        source: where the weights come from.
        mesh: its tensor axis shards the model, and its context axis the sequences; each of its groups holds the whole.
        dtype: of the parameters; None: float32.
        train: how it computes; None: by the defaults.
    """
    with torch.device("meta"):
        model = Transformer(source.model, mesh, train=train)
    shard_parameters(model, source.model, mesh)
    model.to(dtype or torch.float32).to_empty(device=mesh.device)
    for name, parameter in model.named_parameters():
        fill(parameter, source.fetch(name))
        heartbeat.progress()
    return model.requires_grad_(False).eval()


def share_identity(source: Source, mesh: Mesh) -> None:
    """The first rank hashes the files for all, who would each read the whole model; a collective."""
    own = source.identity if mesh.is_main else ""
    source.__dict__["identity"] = broadcast_json(own, mesh.world, mesh.device)


def check_source(
    model: Transformer, dataset: Samples, mesh: Mesh, name: str, skip: bool = False, has_grown: bool = False
) -> float:
    """The mean loss of a source on a few samples of the data, refused when the two do not belong together.

    Args:
        model: from `load_model`.
        dataset: the data that the source is to be used on; its first samples are read.
        mesh: the model's mesh.
        name: what the source is, for the message.
        skip: return the loss without refusing.
        has_grown: the data may hold tokens that only a larger model knows; samples with such tokens are left out.

    Returns:
        Loss in nats per token; not a number where all samples are left out.

    Raises:
        DataError: the loss is at least 0.9·ln(vocabulary size), as that of a model which never saw such data.
    """
    vocab_size = model.config.vocab_size
    tokens_BT = known_samples(dataset, vocab_size, has_grown, name).to(mesh.device)
    if not len(tokens_BT):
        return math.nan
    inputs_BS, labels_BS = cut(tokens_BT[:, :-1], model.cp), cut(tokens_BT[:, 1:], model.cp)
    nll_T, _ = model.token_scores(inputs_BS, labels_BS)
    loss = sum_over(nll_T.double().sum(), model.cp).item() / (labels_BS.numel() * model.cp.size)
    return judge_fit(loss, vocab_size, name, skip)


def check_tokens(dataset: Samples, vocab_size: int, name: str) -> Tensor:
    """The samples [8, S + 1] that a source is tried on; DataError if they hold tokens that it does not know."""
    tokens_BS = torch.as_tensor(dataset.batch(range(min(CHECK_SAMPLES, dataset.num_samples))))
    if int(tokens_BS.max()) >= vocab_size:
        raise DataError(
            f"{name} has a vocabulary of {vocab_size}, but the data holds token {int(tokens_BS.max())}; "
            "tokenize the data with the source's tokenizer"
        )
    return tokens_BS


def known_samples(dataset: Samples, vocab_size: int, grows: bool, name: str) -> Tensor:
    """Those of the samples [N, S + 1] that a source is tried on; where its vocabulary `grows`, without those that hold
    tokens which only the grown model knows, so that there may be none; otherwise such tokens are a DataError.
    """
    if not grows:
        return check_tokens(dataset, vocab_size, name)
    tokens_BS = torch.as_tensor(dataset.batch(range(min(CHECK_SAMPLES, dataset.num_samples))))
    return tokens_BS[(tokens_BS < vocab_size).all(1)]


def judge_fit(loss: float, vocab_size: int, name: str, skip: bool) -> float:
    """The loss, or DataError when it is that of a model which never saw such data."""
    limit = UNFIT_SHARE * math.log(vocab_size)
    if not (loss < limit or skip):
        raise DataError(
            f"{name} has loss {loss:.3f} on the data, chance is {math.log(vocab_size):.3f} and the limit {limit:.3f}: "
            "its tokenizer or weights do not fit this data; use data made with its tokenizer, "
            "or --init.skip-source-check true (--skip-source-check of tools) to go on all the same"
        )
    return loss


def check_fits(source: Source, dataset: Samples, mesh: Mesh, skip: bool = False) -> float:
    """`check_source` for a model that is not in memory: loads it, checks it, frees it."""
    return check_source(load_model(source, mesh.tensor_only()), dataset, mesh, str(source.path), skip)


def _open_hf(path: Path) -> Source:
    reader = hf.HFReader(path)
    dropped = tuple(reader.dropped)
    return Source(
        path,
        reader.model,
        reader.fetch,
        reader.dtype_of,
        lambda: _identity_of([*reader.files, path / "config.json"]),
        None,
        str(path),
        reader.fetch,
        dropped=dropped,
        window=reader.window,
        token_ids=reader.token_ids or None,
    )


def _open_own(path: Path) -> Source:
    manifest = store.read_manifest(path)
    where = f"{path}/manifest.json"
    model = stored_model(manifest.state.get("model"), where)

    def read(name: str) -> Tensor:
        return store.read_full(path, [name], manifest)[name]

    def fetch(name: str) -> Tensor:
        return read(f"model.{name}")

    def dtype_of(name: str) -> torch.dtype:
        return DTYPES[manifest.tensors[f"model.{name}"].dtype]

    data = manifest.config.get("data")
    tokenizers = data.get("tokenizer") if isinstance(data, dict) else "", manifest.provenance.get("tokenizer")
    named = [each for each in tokenizers if isinstance(each, str) and each]  # by the run, and by what it began from
    has_moments = f"optim.exp_avg.{parameter_names(model)[0]}" in manifest.tensors
    optimizer = stored_optimizer(manifest.state.get("optimizer"), where) if has_moments else None
    ledger = manifest.state.get("ledger")
    has_just_grown = bool(manifest.provenance.get("grew_from")) and "train_step" not in manifest.state
    return Source(
        path,
        model,
        fetch,
        dtype_of,
        lambda: manifest.sha256,
        ledger,
        named[0] if named else "",
        read,
        optimizer,
        has_just_grown,
        token_ids=_stored_token_ids(manifest.provenance.get("token_ids"), where),
        token_ids_of=named[1] if len(named) == 2 else "",
    )


def _stored_token_ids(data: Any, where: str) -> dict[str, Any] | None:
    if not hf.are_token_ids(data):
        raise CheckpointError(
            f"{where}: provenance.token_ids is {shown(data)}, must be token ids by name; restore the file"
        )
    return cast(dict[str, Any] | None, data)


def stored_model(data: Any, where: str) -> ModelConfig:
    """The model in a run's state, as its manifest holds it.

    Raises:
        CheckpointError: names the field of `state.model` that breaks a rule.
    """
    return _stored_model(data, where, "state.model")


def _stored_model(data: Any, where: str, name: str) -> ModelConfig:
    try:
        return cast(ModelConfig, from_dict(data, ModelConfig, where, name))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def stored_optimizer(data: Any, where: str) -> dict[str, Any]:
    """The optimizer in a run's state, as its manifest holds it: `step`, `multipliers` by parameter, maybe `new_part`.

    Raises:
        CheckpointError: it is something else.
    """
    step, multipliers = (data.get(name) for name in ("step", "multipliers")) if isinstance(data, dict) else (None, None)
    holds = (
        type(step) is int
        and 0 <= step < 2**63
        and isinstance(multipliers, dict)
        and all(isinstance(m, dict) and set(m) <= MULTIPLIERS for m in multipliers.values())
        and all(type(x) in (int, float) and 0 <= x < 1e30 for m in multipliers.values() for x in m.values())
    )
    if not holds:
        raise CheckpointError(
            f"{where}: state.optimizer is {shown(data)}, must be a step and multipliers by parameter "
            f"({', '.join(sorted(MULTIPLIERS))}); use an older checkpoint"
        )
    if "new_part" in data:
        _check_new_part(data["new_part"], data["step"], where)
    return cast(dict[str, Any], data)


def _check_new_part(data: Any, step: int, where: str) -> None:
    """Raises CheckpointError unless this is what `NewPart.state` gives for an optimizer at that step."""
    rules = {
        "since": lambda x: type(x) is int and 0 <= x <= step,
        "starts_at_zero": lambda x: type(x) is bool,
        "steps": lambda x: type(x) is int and 0 <= x < 2**63,
        "factor": lambda x: type(x) in (int, float) and 0 <= x < 1e30,
        "method": lambda x: isinstance(x, str),
        "seed": lambda x: type(x) is int and abs(x) < 2**63,
        "policy": lambda x: x in POLICIES,
        "source": lambda x: isinstance(x, dict),
    }
    if not isinstance(data, dict) or set(data) != set(rules):
        raise CheckpointError(
            f"{where}: state.optimizer.new_part must hold {', '.join(rules)}; use an older checkpoint"
        )
    odd = next((name for name, holds in rules.items() if not holds(data[name])), None)
    if odd is not None:
        raise CheckpointError(f"{where}: state.optimizer.new_part.{odd} is {shown(data[odd])}; use an older checkpoint")
    _stored_model(data["source"], where, "state.optimizer.new_part.source")


def _identity_of(files: list[Path]) -> str:
    """Hash of the files' hashes; CheckpointError where one cannot be read."""
    digest = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as stream:
                digest.update(_file_digest(stream))
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror or type(error).__name__}") from error
    return digest.hexdigest()


def _file_digest(stream: BinaryIO) -> bytes:
    digest = hashlib.sha256()
    while chunk := stream.read(HASH_BYTES):
        digest.update(chunk)
        heartbeat.progress()
    return digest.digest()
