"""Saving, finding and loading in one process."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megagrow import checkpoint
from megagrow.checkpoint import directory, store
from megagrow.checkpoint.saver import Saver
from megagrow.checkpoint.shards import Deferred
from megagrow.errors import CheckpointError
from megagrow.plan.measure import peak_memory
from tests.checkpoint.samples import (
    assert_holds_step,
    empty_tensors,
    save_step,
    tensors_at,
)


def names_in(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def flip_last_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """NaN equals NaN and -0 differs from 0."""
    return tensor.flatten().view(torch.uint8)


def test_every_dtype_and_shape_comes_back_exactly(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "f64": torch.randn(3, 4, generator=generator, dtype=torch.float64),
        "f32": torch.randn(2, 3, 4, generator=generator),
        "f16": torch.randn(5, generator=generator).half(),
        "bf16": torch.randn(5, generator=generator).bfloat16(),
        "i64": torch.tensor(2**62 + 1),
        "u8": torch.randint(0, 256, (16,), generator=generator, dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "transposed": torch.randn(4, 6, generator=generator).T,
        "view": torch.randn(100, generator=generator)[10:20],
    }
    path = checkpoint.save(tmp_path, 0, tensors, {}, config={}, provenance={})
    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    checkpoint.load(path, loaded)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(bytes_of(loaded[name]), bytes_of(tensor)), name


def test_tensors_are_fetched_and_freed_one_by_one(tmp_path: Path) -> None:
    """Not all at once; what they are fetched from stays as it was."""
    given = {f"w{i}": torch.full((256, 1024), float(i), dtype=torch.bfloat16) for i in range(12)}
    asked: list[str] = []

    def fetch(name: str) -> torch.Tensor:
        asked.append(name)
        return given[name]

    deferred = {name: Deferred(tuple(t.shape), t.dtype, partial(fetch, name)) for name, t in given.items()}
    saved: list[Path] = []
    peak = peak_memory(lambda: saved.append(checkpoint.save(tmp_path, 0, deferred, {}, config={}, provenance={})))
    assert asked == list(given)
    assert 0 < peak < 3 * given["w0"].nbytes
    loaded = {name: torch.zeros_like(tensor) for name, tensor in given.items()}
    checkpoint.load(saved[0], loaded)
    assert all(
        torch.equal(loaded[name], tensor) and tensor[0, 0] == i for i, (name, tensor) in enumerate(given.items())
    )


def test_a_tensor_that_cannot_be_fetched_fails_the_save(tmp_path: Path) -> None:
    save_step(tmp_path, 0)

    def fetch() -> torch.Tensor:
        raise CheckpointError("weights.bin: damaged; restore the file")

    tensors = tensors_at(1) | {"late": Deferred((2, 3), torch.float32, fetch)}
    with pytest.raises(CheckpointError, match=r"cannot save step 1 in .*: weights.bin: damaged; restore the file$"):
        checkpoint.save(tmp_path, 1, tensors, {}, config={}, provenance={})
    assert names_in(tmp_path) == {"step-0", "latest"}


def test_a_view_stores_its_own_elements_only(tmp_path: Path) -> None:
    tensors = {"view": torch.zeros(1 << 20)[:4]}
    path = checkpoint.save(tmp_path, 0, tensors, {}, config={}, provenance={})
    assert (path / "__0_0.distcp").stat().st_size < 4096


def test_tensors_are_filled_in_place(tmp_path: Path) -> None:
    path = save_step(tmp_path, 7)
    parameter = torch.nn.Parameter(torch.zeros(11, 3))
    rows = torch.zeros(2, 5, dtype=torch.bfloat16)
    count = torch.zeros((), dtype=torch.int64)
    addresses = parameter.data_ptr(), rows.data_ptr()
    checkpoint.load(path, {"embedding": parameter, "norm": rows[1], "count": count})
    assert (parameter.data_ptr(), rows.data_ptr()) == addresses
    assert parameter.requires_grad
    assert parameter.eq(7).all()
    assert rows.tolist() == [[0] * 5, [7] * 5]


def test_state_config_and_provenance_come_back(tmp_path: Path) -> None:
    state = {
        "loss": 0.1 + 0.2,
        "window": [1e-300, -0.0],
        "name": "é",
        "none": None,
        "yes": True,
    }
    path = checkpoint.save(tmp_path, 3, tensors_at(3), state, config={"a": {"b": (1, 2)}}, provenance={"commit": "abc"})
    assert checkpoint.load(path, empty_tensors()) == state
    manifest = checkpoint.read_manifest(path)
    assert manifest.config == {"a": {"b": [1, 2]}}
    assert manifest.provenance == {"commit": "abc"}
    assert manifest.step == 3
    assert manifest.layout == {"world_size": 1, "axes": {}}
    assert manifest.tensors["norm"].dtype == "bfloat16"
    assert manifest.tensors["norm"].shape == (5,)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"rng": torch.zeros(1)}, r"state\.rng is a Tensor"),
        ({"seen": {"a": [0, {1, 2}]}}, r"state\.seen\.a\[1\] is a set"),
        ({"seen": {3: "three"}}, r"state\.seen has the key 3"),
        ({"best": float("inf")}, r"state\.best is inf"),
        ({"name": "half \ud800"}, r"state\.name holds half a surrogate pair"),
        ({"half \ud800": 1}, r"state has a key that holds half a surrogate pair"),
    ],
)
def test_what_json_would_change_is_refused(tmp_path: Path, state: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(tmp_path / "root", 1, {}, state, config={}, provenance={})
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("tensor", [torch.zeros(2, dtype=torch.complex64), torch.zeros(0, 4)])
def test_a_tensor_that_cannot_be_stored_is_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match="tensor 'odd'"):
        checkpoint.save(tmp_path / "root", 1, {"odd": tensor}, {}, config={}, provenance={})
    assert not (tmp_path / "root").exists()


def test_torch_itself_reads_the_checkpoint(tmp_path: Path) -> None:
    tensors = empty_tensors()
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(tensors, checkpoint_id=str(save_step(tmp_path, 4)), no_dist=True)
    assert all(torch.equal(tensors[name], value) for name, value in tensors_at(4).items())


def test_read_full_gives_the_named_tensors(tmp_path: Path) -> None:
    path = save_step(tmp_path, 4)
    tensors = checkpoint.read_full(path, ["norm", "count"])
    assert list(tensors) == ["norm", "count"]
    assert all(torch.equal(tensors[name], tensors_at(4)[name]) for name in tensors)
    with pytest.raises(CheckpointError, match="no tensor 'head'"):
        checkpoint.read_full(path, ["norm", "head"])


def test_a_misfit_names_tensors_and_remedy(tmp_path: Path) -> None:
    path = save_step(tmp_path, 4)
    model = {
        "embedding": torch.zeros(12, 3),
        "count": torch.zeros((), dtype=torch.int32),
        **{f"layers.{i}": torch.zeros(1) for i in range(5)},
    }
    with pytest.raises(CheckpointError) as raised:
        checkpoint.load(path, model)
    message = str(raised.value)
    assert "\n" not in message
    assert "2 of another shape or dtype" in message
    assert "embedding: float32[11, 3], not float32[12, 3]" in message
    assert "count: int64[], not int32[]" in message
    assert "5 missing (layers.0, layers.1, layers.2 and 2 more)" in message
    assert "1 unexpected (norm)" in message
    assert "inspect_checkpoint" in message
    assert all(tensor.eq(0).all() for tensor in model.values())


def test_lenient_loading_takes_what_both_have_but_never_a_misfit(tmp_path: Path) -> None:
    path = save_step(tmp_path, 4)
    model = {"norm": torch.zeros(5, dtype=torch.bfloat16), "head": torch.ones(2)}
    checkpoint.load(path, model, strict=False)
    assert model["norm"].eq(4).all()
    assert model["head"].eq(1).all()
    with pytest.raises(CheckpointError, match="1 of another shape or dtype"):
        checkpoint.load(path, {"norm": torch.zeros(5)}, strict=False)


def test_a_step_is_never_written_twice(tmp_path: Path) -> None:
    path = save_step(tmp_path, 4)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(CheckpointError, match="step-4 exists and is intact"):
        checkpoint.save(tmp_path, 4, tensors_at(5), {}, config={}, provenance={})
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert names_in(tmp_path) == {"step-4", "latest"}


def test_a_damaged_checkpoint_of_the_step_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_step(tmp_path, 3)
    flip_last_byte(save_step(tmp_path, 4) / "__0_0.distcp")
    assert_holds_step(save_step(tmp_path, 4), 4)
    assert "step-4/__0_0.distcp" in caplog.text
    aside = [name for name in names_in(tmp_path) if name.startswith("step-4.damaged-")]
    assert len(aside) == 1
    assert [path.name for path in checkpoint.candidates(tmp_path)] == ["step-4", "step-3"]


def test_latest_does_not_disown_the_successor_of_a_damaged_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Death between the rename and `latest`, whose digest would still be that of the damaged one."""
    flip_last_byte(save_step(tmp_path, 4) / "__0_0.distcp")

    def die(*paths: Path) -> None:
        raise OSError(5, "dead")

    monkeypatch.setattr(directory.os, "replace", die)
    with pytest.raises(CheckpointError, match="dead"):
        checkpoint.save(tmp_path, 4, tensors_at(5), {}, config={}, provenance={})
    assert checkpoint.candidates(tmp_path) == [tmp_path / "step-4"]


def test_candidates_are_newest_first_and_complete(tmp_path: Path) -> None:
    assert checkpoint.candidates(tmp_path / "nowhere") == []
    assert checkpoint.candidates(tmp_path) == []
    for step in (5, 100, 20):
        save_step(tmp_path, step)
    (tmp_path / "step-200.tmp-0123abcd").mkdir()
    (tmp_path / "step-300.trash-0123abcd").mkdir()
    (tmp_path / "step-x").mkdir()
    found = checkpoint.candidates(tmp_path)
    assert [path.name for path in found] == ["step-100", "step-20", "step-5"]
    assert checkpoint.candidates(found[1]) == [found[1]]


def test_only_the_manifests_down_to_the_newest_good_one_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large job each is tens of megabytes."""
    for step in (1, 2, 3, 4):
        save_step(tmp_path, step)
    flip_last_byte(tmp_path / "step-4" / "manifest.json")
    seen, read = [], directory.read_checked_manifest
    monkeypatch.setattr(directory, "read_checked_manifest", lambda path: seen.append(path.name) or read(path))
    assert checkpoint.newest(tmp_path) == tmp_path / "step-3"
    assert checkpoint.newest(tmp_path, {"step-3"}) == tmp_path / "step-2"
    assert seen == ["step-4", "step-3", "step-4", "step-2"]
    assert checkpoint.newest(tmp_path / "nowhere") is None


def test_a_bad_manifest_is_named_and_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2, 3):
        save_step(tmp_path, step)
    flip_last_byte(tmp_path / "step-3" / "manifest.json")
    (tmp_path / "step-2" / "manifest.json").unlink()
    assert [path.name for path in checkpoint.candidates(tmp_path)] == ["step-1"]
    assert "step-3/manifest.json" in caplog.text
    assert "step-2 is no complete checkpoint" in caplog.text


def test_only_bad_manifests_are_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    flip_last_byte(save_step(tmp_path, 3) / "manifest.json")
    with pytest.raises(CheckpointError, match=r"no usable checkpoint .*step-3/manifest\.json"):
        checkpoint.candidates(tmp_path)


def test_keep_last_deletes_the_oldest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_step(tmp_path, step)
    save_step(tmp_path, 4, keep_last=2)
    assert names_in(tmp_path) == {"step-4", "step-3", "latest"}
    assert_holds_step(tmp_path / "step-3", 3)


def test_every_nth_checkpoint_stays_for_ever(tmp_path: Path) -> None:
    for step in range(2, 22, 2):
        save_step(tmp_path, step, keep_last=2, keep_every=6)
    assert names_in(tmp_path) == {"step-20", "step-18", "step-12", "step-6", "latest"}
    save_step(tmp_path, 23, keep_last=1)
    assert names_in(tmp_path) == {"step-23", "latest"}, "0 keeps none besides"


def test_keep_last_never_deletes_what_was_just_saved(tmp_path: Path) -> None:
    flip_last_byte(save_step(tmp_path, 10) / "__0_0.distcp")
    save_step(tmp_path, 5)
    save_step(tmp_path, 7, keep_last=1)
    assert names_in(tmp_path) == {"step-10", "step-7", "latest"}


def test_damaged_checkpoints_do_not_count_among_those_that_are_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save_step(tmp_path, step)
    flip_last_byte(tmp_path / "step-30" / "__0_0.distcp")
    flip_last_byte(tmp_path / "step-20" / "manifest.json")
    saver = Saver(asynchronous=False, keep_last=2)
    saver.passed_over.add("step-30")
    for step, left in ((35, {10, 20, 30, 35}), (40, {35, 40})):
        saver.save(tmp_path, step, lambda step=step: store.snapshot(tensors_at(step), {}, {}, {}))
        assert names_in(tmp_path) == {*(f"step-{number}" for number in left), "latest"}


def test_a_damaged_step_counts_again_once_it_is_saved_again(tmp_path: Path) -> None:
    for step in (10, 20):
        save_step(tmp_path, step)
    flip_last_byte(tmp_path / "step-20" / "__0_0.distcp")
    saver = Saver(asynchronous=False, keep_last=2)
    saver.passed_over.add("step-20")
    for step in (20, 30):
        saver.save(tmp_path, step, lambda step=step: store.snapshot(tensors_at(step), {}, {}, {}))
    assert {path.name for path in checkpoint.candidates(tmp_path)} == {"step-30", "step-20"}


def test_what_cannot_be_deleted_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save_step(tmp_path, 1)

    def refuse(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr("megagrow.checkpoint.directory._delete", refuse)
    with caplog.at_level(logging.WARNING):
        assert_holds_step(save_step(tmp_path, 2, keep_last=1), 2)
    assert "cannot delete the old checkpoint" in caplog.text
    assert [path.name for path in checkpoint.candidates(tmp_path)] == ["step-2"]


def test_leftovers_of_dead_saves_go_with_the_next_save(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    for name in ("step-2.tmp-0123abcd", "step-0.trash-0123abcd", "step-9.damaged-0123abcd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / "latest.tmp-0123abcd").touch()
    (tmp_path / "notes.tmp-mine").touch()
    save_step(tmp_path, 3)
    assert names_in(tmp_path) == {
        *("step-1", "step-3", "latest"),
        *("step-9.damaged-0123abcd", "notes.tmp-mine"),
    }
