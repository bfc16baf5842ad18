"""Own checkpoint <-> Hugging Face folder, and the proof that both compute the same logits."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megagrow.checkpoint import hf, store
from megagrow.checkpoint.hf_tokenizer import token_ids_with, tokenizer_note
from megagrow.checkpoint.remote import remote
from megagrow.checkpoint.shards import Deferred
from megagrow.checkpoint.source import Source, load_model, open_source
from megagrow.checkpoint.staged import StagedFolder, cannot_be_written, check_free
from megagrow.config import Config, DataConfig, ModelConfig
from megagrow.config_file import to_dict
from megagrow.data.tokenizer import ByteTokenizer, load_tokenizer
from megagrow.errors import CheckpointError
from megagrow.parallel.mesh import Mesh
from megagrow.roles import parameter_shapes

Format = Literal["hf", "megagrow"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FOLDER = "tokenizer"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
PIECE = 1 << 22  # numbers that are looked at together
COMPARED_TOKENS = (2, 512)  # samples, tokens per sample
ALLOWED_SHARE = 1e-3  # of the largest logit: far above rounding in float32, far below a lost tensor


@dataclass(frozen=True)
class Comparison:
    """How far the logits of two folders lie apart, on random tokens, in float32."""

    largest_difference: float
    largest_logit: float
    num_tokens: int
    libraries: tuple[str, str]  # that computed the logits of the first and of the second folder


def convert(
    source: Source | Path,
    target: Path,
    to: Format,
    dtype: torch.dtype | None = None,
    tell: Callable[[str], None] = lambda _: None,
    tokenizer: Path | None = None,
) -> bool:
    """Writes the model at `source` to the new folder `target`, one tensor after the other.

    Args:
        source: own checkpoint (saved in any layout), run directory or Hugging Face folder; already opened where more is
            to be done with it: the newest checkpoint of a run may be another one in a minute.
        target: must not exist or be empty. An own checkpoint becomes `target/step-0`, with the
            tokenizer beside it in `target/tokenizer`.
        dtype: of all tensors; None: each keeps that in which it is stored.
        tell: takes what the user has to know: tensors and moments of the source that are left out.
        tokenizer: that comes along; None: the model's, if it is found.

    Returns:
        Whether a tokenizer came along.

    Raises:
        CheckpointError: the source is unusable, or the target is taken or cannot be written.
        ConfigError: the model cannot be expressed in the target's format.
    """
    check_free(target)
    opened = _opened(source)
    if opened.note:
        tell(opened.note)
    if to == "megagrow" and opened.optimizer is not None:
        tell(f"{opened.path}: the moments of Adam are left behind; training starts with fresh ones")
    own = tokenizer_of(opened)
    tokenizer = tokenizer or own
    token_ids = token_ids_with(opened, own, tokenizer)
    if to == "hf" and (note := tokenizer_note(opened.model.family, tokenizer)):
        tell(note)
    fetch = opened.fetch if dtype is None else _rounding(opened.fetch, dtype)
    if to == "hf":
        hf.write_hf_folder(target, opened.model, fetch, tokenizer, dtype, token_ids=token_ids)
    else:
        _write_own(target, opened, fetch, tokenizer, dtype, token_ids)
    return tokenizer is not None


def compare(first: Source | Path, second: Source | Path, dtype: torch.dtype | None = None) -> Comparison:
    """Runs both models on the same random tokens.

    transformers computes a Hugging Face folder where it is installed (one of the two, so that
    megagrow is always part of the comparison); megagrow computes the rest.

    Args:
        dtype: to which the weights of both are rounded before they are used; None: as stored.
    """
    sources = _opened(first), _opened(second)
    model = sources[0].model
    shape = (COMPARED_TOKENS[0], min(COMPARED_TOKENS[1], model.max_seq_length))
    ids_BS, types_BS = _random_tokens(model, shape), _random_types(model, shape)
    libraries = ["megagrow", "megagrow"]
    foreign = [index for index, source in enumerate(sources) if hf.is_hf_folder(source.path)]
    if foreign and importlib.util.find_spec("transformers") is not None:
        libraries[foreign[-1]] = "transformers"
    logits = [
        _LOGITS[library](source, ids_BS, types_BS, dtype or torch.float32)
        for library, source in zip(libraries, sources, strict=True)
    ]
    return Comparison(
        (logits[0] - logits[1]).abs().max().item(),
        logits[0].abs().max().item(),
        ids_BS.numel(),
        (libraries[0], libraries[1]),
    )


def check_equal(comparison: Comparison) -> None:
    """Raises CheckpointError when two folders are not the same model, rounding apart."""
    limit = ALLOWED_SHARE * comparison.largest_logit
    if not comparison.largest_difference <= limit:
        raise CheckpointError(
            f"the logits differ by {comparison.largest_difference:.3g}, more than {limit:.3g} "
            f"({ALLOWED_SHARE} of the largest): do not use the converted folder"
        )


def tokenizer_of(source: Source) -> Path | None:
    """The tokenizer of a model: what it names, else the one beside it, if either is there on this machine."""
    named = [Path(source.tokenizer)] if source.tokenizer else []
    beside = [source.path.parent / TOKENIZER_FOLDER] if remote(source.path) is None else []
    for place in named + beside:
        is_folder_of_one = any((place / name).is_file() for name in TOKENIZER_FILES)
        if str(place) == ByteTokenizer.name or place.is_file() or is_folder_of_one:
            return place
    return None


def _rounding(fetch: Callable[[str], Tensor], dtype: torch.dtype) -> Callable[[str], Tensor]:
    """Fetches parameters in another dtype; CheckpointError where finite numbers are too large for it."""

    def fetch_rounded(name: str) -> Tensor:
        stored = fetch(name)
        largest = _largest_finite(stored)
        if largest > torch.finfo(dtype).max:
            raise CheckpointError(
                f"{name} holds {largest:.4g}, more than {str(dtype).removeprefix('torch.')} can: "
                "use --dtype bfloat16 or float32"
            )
        return stored.to(dtype)

    return fetch_rounded


def _largest_finite(tensor: Tensor) -> float:
    """The largest magnitude, some numbers at a time; those that are not finite stay what they are in any dtype."""
    pieces = tensor.flatten().split(PIECE)
    return max((piece[piece.isfinite()].abs().max().item() for piece in pieces if piece.isfinite().any()), default=0.0)


def _opened(source: Source | Path) -> Source:
    return source if isinstance(source, Source) else open_source(source)


def _write_own(
    target: Path,
    source: Source,
    fetch: Callable[[str], Tensor],
    tokenizer_source: Path | None,
    dtype: torch.dtype | None,
    token_ids: dict[str, Any] | None,
) -> None:
    tensors = {
        f"model.{name}": Deferred(shape, dtype or source.dtype_of(name), partial(fetch, name))
        for name, shape in parameter_shapes(source.model).items()
    }
    staged = StagedFolder(target)
    try:
        staged.start()
        tokenizer = ""
        if tokenizer_source is not None:
            load_tokenizer(tokenizer_source).save(staged.temporary / TOKENIZER_FOLDER)
            tokenizer = str((target / TOKENIZER_FOLDER).absolute())
        store.save(
            staged.temporary,
            0,
            tensors,
            {"model": to_dict(source.model), "ledger": source.ledger},
            config=to_dict(Config(model=source.model, data=DataConfig(tokenizer=tokenizer))),
            provenance={
                "converted_from": {"path": str(source.path), "identity": source.identity},
                "token_ids": token_ids,
            },
        )
        staged.publish()
    except OSError as error:
        raise cannot_be_written(target, error) from error
    finally:
        staged.discard()


def _random_tokens(model: ModelConfig, shape: tuple[int, int]) -> Tensor:
    """Without padding tokens where the table of positions has a row for them: transformers would not count these."""
    generator = torch.Generator().manual_seed(0)
    if model.position_offset == 0:
        return torch.randint(model.vocab_size, shape, generator=generator)
    ids_BS = torch.randint(model.vocab_size - 1, shape, generator=generator)
    return ids_BS + (ids_BS >= model.position_offset - 1)


def _random_types(model: ModelConfig, shape: tuple[int, int]) -> Tensor | None:
    """Types of tokens where there are several."""
    if model.num_token_types < 2:
        return None
    return torch.randint(model.num_token_types, shape, generator=torch.Generator().manual_seed(1))


def _own_logits(source: Source, ids_BS: Tensor, types_BS: Tensor | None, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        return load_model(source, Mesh.single(), dtype).float().logits(ids_BS, types_BS)


def _transformers_logits(source: Source, ids_BS: Tensor, types_BS: Tensor | None, dtype: torch.dtype) -> Tensor:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    auto = transformers.AutoModelForCausalLM if source.model.is_causal else transformers.AutoModelForMaskedLM
    model = auto.from_pretrained(source.path, dtype=dtype, local_files_only=True, use_safetensors=True)
    with torch.no_grad():
        types = {} if types_BS is None else {"token_type_ids": types_BS}
        logits: Tensor = model.float().eval()(ids_BS, **types).logits
    return logits


_LOGITS = {"megagrow": _own_logits, "transformers": _transformers_logits}
