"""Checkpoints whose manifest is wrong although its digests are right, whose digests are wrong, and whose state is."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from megagrow import checkpoint
from megagrow.checkpoint.source import open_source
from megagrow.config import Config, ModelConfig, RopeScaling
from megagrow.config_file import to_dict
from megagrow.data.blend import BlendStart, DatasetIdentity
from megagrow.ledger import Inherited, Ledger, Phase
from megagrow.optim import StepGuard
from megagrow.train.saving import read_state
from megagrow.train.state import RunState
from tests.checkpoint.samples import save_step, tensors_at
from tests.fuzz.configurations import accepts_of
from tests.fuzz.fields import Field, texts_with, unparsable
from tests.fuzz.literals import INTEGERS, is_count, is_digest, is_number, is_object, rejecting

DATA = "__0_0.distcp"
FITTING_DTYPES = ("bfloat16", "float16", "int16", "int8", "uint8", "bool")  # of `norm`: its bytes are enough
DIGESTS = st.text("0123456789abcdef", min_size=64, max_size=64)
SCALED = dataclasses.replace(
    ModelConfig(), num_kv_heads=2, rope_scaling=RopeScaling(kind="yarn", factor=2.0, original_max_positions=512)
)


def fields(folder: Path) -> Iterator[Field]:
    path = save_step(folder / "tables", 2)
    yield from _manifest_fields(path)
    yield from _digest_fields(path)
    yield from _state_fields(folder / "states")


def _manifest_fields(path: Path) -> Iterator[Field]:
    file, read = path / "manifest.json", lambda: checkpoint.read_manifest(path)
    record = json.loads(file.read_bytes())
    item = record["items"][0]

    def is_one_of(*values: Any) -> Callable[[Any], bool]:
        return lambda value: any(type(value) is type(one) and value == one for one in values)

    rules: dict[tuple[str | int, ...], tuple[Callable[[Any], bool], str]] = {
        ("format_version",): (is_one_of(2), "format_version"),
        ("step",): (is_count, "step"),
        ("layout",): (is_object, "layout"),
        ("config",): (is_object, "config"),
        ("provenance",): (is_object, "provenance"),
        ("state",): (is_object, "state"),
        ("tensors",): (lambda value: False, "tensors|items"),
        ("files",): (lambda value: False, "files|items"),
        ("items",): (lambda value: False, "items|tensors|files"),
        ("tensors", "norm"): (lambda value: False, "norm|items"),
        ("tensors", "norm", "dtype"): (lambda value: value in FITTING_DTYPES, "dtype|items"),
        ("tensors", "norm", "shape"): (is_one_of([5]), "shape|items|norm"),
        ("files", DATA): (lambda value: False, f"{DATA}|items"),
        ("files", DATA, "num_bytes"): (is_one_of(record["files"][DATA]["num_bytes"]), "num_bytes|items|files"),
        ("files", DATA, "sha256"): (lambda value: value is None or is_digest(value), "sha256"),
        ("files", ".metadata", "num_bytes"): (is_count, "num_bytes"),
        ("files", ".metadata", "sha256"): (is_digest, "sha256|files"),
        ("items", 0, "tensor"): (is_one_of(item["tensor"]), "tensor|items"),
        ("items", 0, "offsets"): (is_one_of(item["offsets"]), "offsets|items|tensors"),
        ("items", 0, "sizes"): (is_one_of(item["sizes"]), "sizes|items|tensors"),
        ("items", 0, "file"): (is_one_of(item["file"]), "file|items"),
        ("items", 0, "start"): (is_one_of(item["start"]), "start|items|files"),
        ("items", 0, "num_bytes"): (is_one_of(item["num_bytes"]), "num_bytes|items|files"),
        ("items", 0, "sha256"): (is_digest, "sha256"),
    }
    write = _signed(path)
    for place, (accepts, says) in rules.items():
        name = ".".join("N" if isinstance(key, int) else key for key in place)
        likely = (INTEGERS, st.lists(st.integers(-2, 2**64), max_size=3), st.text(max_size=5))
        texts = texts_with(record, place, rejecting(accepts, *likely), required=place != ("files", DATA, "sha256"))
        yield Field("manifest.json", name, file, texts, read, says, write)
    plain = re.compile(r"[A-Za-z0-9_.-]{1,255}")
    names = st.text(max_size=20).filter(lambda name: not plain.fullmatch(name)) | st.sampled_from(
        ["../x", "/etc/passwd", "a/b", "..", ".", "", "a" * 300, "a\\b", "\x00"]
    )
    renamed = names.map(lambda name: _rename(record, DATA, name)).map(lambda changed: json.dumps(changed).encode())
    yield Field("manifest.json", "files (names)", file, renamed, read, "files|items", write)
    yield Field("manifest.json", "(whole file)", file, unparsable(file.read_bytes()), read, "JSON", write)


def _digest_fields(path: Path) -> Iterator[Field]:
    manifest, digest, latest = path / "manifest.json", path / "manifest.sha256", path.parent / "latest"
    right, raw = digest.read_bytes(), manifest.read_bytes()

    def write_digest(content: bytes) -> None:
        manifest.write_bytes(raw)
        latest.unlink(missing_ok=True)
        digest.write_bytes(content)

    near = st.integers(0, len(right) - 1).flatmap(
        lambda i: st.binary(max_size=3).map(lambda b: right[:i] + b + right[i + 1 :])
    )
    wrong = (st.binary(max_size=90) | near).filter(lambda content: content != right)
    read = lambda: checkpoint.read_manifest(path)  # noqa: E731
    yield Field("manifest.sha256", "digest", manifest, wrong, read, "digest", write_digest)

    def write_latest(content: bytes) -> None:
        write_digest(right)
        latest.write_bytes(content)

    pointers = DIGESTS.map(lambda other: json.dumps({"step": "step-2", "manifest_sha256": other}).encode())
    yield Field("latest", "manifest_sha256", manifest, pointers, read, "latest", write_latest)


def _state_fields(folder: Path) -> Iterator[Field]:
    """The state of a run in training, with the model and the ledger in it, and the configuration beside it."""
    ledger = Ledger(phases=[Phase("train", "model", 3, 4, 5.0, 6.0)], events=[{"event": "growth", "step": 1}])
    ledger = dataclasses.replace(ledger, inherited=[Inherited("source", "x", Ledger())])
    state = RunState(
        SCALED,
        "main",
        grown_at=2,
        cursors={"all": 7, "selected": 0},
        blend=BlendStart({"a": 1.0, "b": 3.0}, 5, {"a": 2, "b": 3}, dict.fromkeys("ab", DatasetIdentity(9, "0" * 64))),
        guard=StepGuard([1.5], 1),
        pending_event={"reason": "step", "loss_before": 2.0, "loss_initial": None},
        losses=[1.5],
        tokenizer="small",
        token_ids={"eos_token_id": [2, 3]},
        ledger=ledger,
        optimizer={"step": 3, "multipliers": {"head.weight": {"lr": 1.0, "eps": 2.0, "weight_decay": 1.0}}},
    )
    path = checkpoint.save(
        folder, 2, tensors_at(2), state.to_dict(), config=to_dict(Config(model=SCALED)), provenance={"grew_from": []}
    )
    record = json.loads((path / "manifest.json").read_bytes())
    config = Config(model=SCALED)
    read_state(checkpoint.read_manifest(path), path, config, print)
    for place, accepts in {**_state_rules(), **_ledger_rules(("ledger",))}.items():
        of_one = place[:2] in (("blend", "weights"), ("blend", "firsts")) and len(place) > 2  # of its datasets
        is_new = place[0] in ("tokenizer", "token_ids")  # which older checkpoints lack
        texts = texts_with(record, ("state", *place), rejecting(accepts), required=not (of_one or is_new))
        name = ".".join("N" if isinstance(key, int) else key for key in ("state", *place))
        says = str(place[-1] if isinstance(place[-1], str) else place[-2])
        says = place[0] if place[0] in ("optimizer", "blend", "pending_event") else says
        says = "cursors|blend" if place[0] == "cursors" else says
        file = path / "manifest.json"
        yield Field(
            "manifest.json",
            name,
            file,
            texts,
            lambda: read_state(checkpoint.read_manifest(path), path, config, print),
            says,
            _signed(path),
        )
    for name, accepts in accepts_of("model.").items():
        if name != "model.rope_scaling":
            keys = name.split(".")[1:]
            texts = texts_with(record, ("state", "model", *keys), rejecting(accepts), required=False)
            file, says = path / "manifest.json", keys[-1]
            yield Field("manifest.json", f"state.{name}", file, texts, lambda: open_source(path), says, _signed(path))


def is_size(value: Any) -> bool:
    return is_number(value) and abs(value) < 1e30


def _are_token_ids(value: Any) -> bool:
    return all(type(each) is int and -1 <= each < 2**31 for each in (value if isinstance(value, list) else [value]))


def _state_rules() -> dict[tuple[str | int, ...], Callable[[Any], bool]]:
    counts = ("step", "train_step", "ligo_step", "tokens", "growths", "layers_before")
    return {
        **{(name,): is_count for name in counts},
        ("model",): lambda value: value == {},  # fields left out have their defaults
        ("phase",): lambda value: value in ("small", "ligo", "main"),
        ("losses",): lambda value: isinstance(value, list) and all(map(is_size, value)),
        ("grown_at",): lambda value: value is None or is_count(value),
        ("teacher_loss",): lambda value: value is None or is_number(value),
        ("stage_one_end",): lambda value: value is None or is_count(value),
        ("tokenizer",): lambda value: isinstance(value, str),
        ("token_ids",): lambda value: value is None or value == {},
        ("token_ids", "eos_token_id"): _are_token_ids,
        ("cursors",): lambda value: False,
        ("cursors", "all"): lambda value: is_count(value) and value >= 5,  # where the blend starts
        ("cursors", "selected"): is_count,
        ("guard",): lambda value: False,
        ("guard", "losses"): lambda value: isinstance(value, list) and all(map(is_size, value)),
        ("guard", "bad_steps"): is_count,
        ("ledger",): lambda value: False,
        ("rolled_back_at",): lambda value: is_count(value) or (type(value) is int and value == -1),
        ("optimizer",): lambda value: False,
        ("optimizer", "step"): is_count,
        # Those that a parameter leaves out are 1.
        ("optimizer", "multipliers"): lambda value: is_object(value) and all(m == {} for m in value.values()),
        ("blend",): lambda value: value is None,
        ("blend", "weights"): lambda value: (
            is_object(value)
            and value != {}
            and {*value} <= {"a", "b"}
            and all(is_size(x) and x > 0 for x in value.values())
        ),
        ("blend", "weights", "a"): lambda value: is_size(value) and value > 0,
        ("blend", "start"): lambda value: is_count(value) and value <= 7,
        ("blend", "firsts"): lambda value: (
            is_object(value) and {*value} <= {"a", "b"} and all(map(is_count, value.values()))
        ),
        ("blend", "firsts", "a"): is_count,
        ("blend", "datasets"): lambda value: False,
        ("blend", "datasets", "a"): lambda value: False,
        ("blend", "datasets", "a", "num_samples"): is_count,
        ("blend", "datasets", "a", "sketch"): is_digest,
        ("pending_event",): lambda value: value is None,
        ("pending_event", "reason"): lambda value: value in ("start", "step", "tokens", "plateau"),
        ("pending_event", "loss_before"): lambda value: value is None or is_number(value),
        ("pending_event", "loss_initial"): lambda value: value is None or is_number(value),
    }


def _ledger_rules(path: tuple[str | int, ...]) -> dict[tuple[str | int, ...], Callable[[Any], bool]]:
    def is_cost(value: Any) -> bool:
        return value is None or (is_number(value) and 0 <= value < 1e60)

    return {
        (*path, "convention"): lambda value: isinstance(value, str),
        (*path, "phases"): lambda value: value == [],
        (*path, "inherited"): lambda value: value == [],
        (*path, "events"): lambda value: isinstance(value, list),
        (*path, "phases", 0, "phase"): lambda value: (
            value in ("small", "scoring", "ligo", "growth", "teacher", "salt", "train", "evaluation")
        ),
        (*path, "phases", 0, "model"): lambda value: isinstance(value, str),
        (*path, "phases", 0, "steps"): lambda value: type(value) is int and 0 <= value < 1e60,
        (*path, "phases", 0, "tokens"): lambda value: is_cost(value) and not isinstance(value, float),
        (*path, "phases", 0, "flops"): is_cost,
        (*path, "phases", 0, "seconds"): is_cost,
        (*path, "inherited", 0, "label"): lambda value: isinstance(value, str),
        (*path, "inherited", 0, "identity"): lambda value: isinstance(value, str),
        (*path, "inherited", 0, "ledger"): lambda value: False,
        (*path, "events", 0, "event"): lambda value: isinstance(value, str),
        (*path, "events", 0, "step"): is_count,
    }


def _signed(path: Path) -> Callable[[bytes], None]:
    """Writes a manifest with the digest that belongs to it."""

    def write(content: bytes) -> None:
        (path.parent / "latest").unlink(missing_ok=True)
        (path / "manifest.json").write_bytes(content)
        (path / "manifest.sha256").write_bytes(f"{hashlib.sha256(content).hexdigest()}  manifest.json\n".encode())

    return write


def _rename(record: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    files = {new if name == old else name: entry for name, entry in record["files"].items()}
    return {**record, "files": files, "items": [{**item, "file": new} for item in record["items"]]}
