"""Runs on blends: one that changes, Megatron's order with a split, and what a resumed run may not change."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megagrow.config import Config, SaltConfig
from megagrow.data.indexed import IndexedDataset, IndexedWriter
from megagrow.train import run
from tests.train.runs import make_config, metrics
from tests.train.test_run import assert_same_run, cut_back


@pytest.fixture(scope="module")
def blend(corpus: Path) -> str:
    """Three datasets of unlike text; a dataset of many documents, as Megatron's splits need."""
    tokens = IndexedDataset(corpus / "train").tokens
    for number, part in enumerate(np.array_split(tokens, 3)):
        with IndexedWriter(corpus / f"part{number}", np.uint16) as writer:
            for document in np.array_split(part, 50):
                writer.add_document(document)
    return f"0.7 {corpus}/part0 0.3 {corpus}/part1"


def with_data(config: Config, **fields: Any) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **fields))


def saved_blend(directory: Path, step: int) -> dict[str, Any]:
    manifest = json.loads((directory / f"checkpoints/step-{step}/manifest.json").read_text())
    return manifest["state"]["blend"]


def test_a_blend_changes_when_the_user_says_so(
    corpus: Path, blend: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = with_data(make_config(corpus, tmp_path, steps=4), train=blend)
    assert run(before) == 0
    longer = dataclasses.replace(before, train=dataclasses.replace(before.train, steps=8))
    after = with_data(longer, train=f"1 {corpus}/part1 1 {corpus}/part2")
    assert run(after) == 4
    assert "set --data.change-blend true to go on with other data" in capfd.readouterr().err
    assert run(with_data(after, change_blend=True)) == 0
    shown = capfd.readouterr()
    assert f"data.train was {blend} when step-4 was saved and is 1 {corpus}/part1 1" in shown.err + shown.out
    assert f"goes on: {corpus}/part0 at 11, {corpus}/part1 at 5, {corpus}/part2 at 0 (new)" in shown.err + shown.out
    state = saved_blend(tmp_path, 8)
    assert state["start"] == 16 and state["firsts"] == {f"{corpus}/part0": 11, f"{corpus}/part1": 5}
    cut_back(tmp_path, 6)
    assert run(with_data(after, change_blend=True)) == 0
    assert saved_blend(tmp_path, 8) == state


def test_a_run_in_megatrons_order_resumes_and_keeps_its_size(
    corpus: Path, blend: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fields = {"train": blend, "order": "megatron", "split": "9,1", "validation": ""}
    whole = with_data(make_config(corpus, tmp_path / "whole"), **fields)
    assert run(whole) == 0
    assert metrics(tmp_path / "whole")[-1]["validation_loss"] > 0
    again = with_data(make_config(corpus, tmp_path / "again"), **fields)
    assert run(again) == 0
    cut_back(tmp_path / "again", 4)
    assert run(again) == 0
    assert_same_run(tmp_path / "again", tmp_path / "whole")
    longer = dataclasses.replace(again, train=dataclasses.replace(again.train, steps=9))
    capfd.readouterr()
    assert run(longer) == 4
    assert "was made for 24 samples there, for 36 now" in capfd.readouterr().err


def rewrite(prefix: Path, documents: list[np.ndarray[Any, Any]]) -> None:
    with IndexedWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add_document(document)


@pytest.mark.parametrize("change", ["longer", "as_long"])
@pytest.mark.parametrize(
    "data",
    [
        {"train": "{}/x"},
        {"train": "{0}/x {0}/part1"},
        {"train": "0.5 {0}/x 0.5 {0}/part1"},
        {"train": "0.5 {0}/x 0.5 {0}/part1", "order": "megatron"},
    ],
    ids=["single", "by_size", "by_weight", "megatron"],
)
def test_a_dataset_that_has_changed_is_noticed(
    corpus: Path, blend: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], data: dict[str, Any], change: str
) -> None:
    whole = IndexedDataset(corpus / "part0")
    documents = [np.asarray(whole.document(i)) for i in range(whole.num_documents)]
    for name in ("x", "part1"):
        rewrite(tmp_path / name, documents)
    fields = {**data, "train": data["train"].format(tmp_path)}
    config = with_data(make_config(corpus, tmp_path / "run", steps=2), **fields, num_samples=16 * ("order" in data))
    assert run(config) == 0
    rewrite(tmp_path / "x", documents * 2 if change == "longer" else [*documents[:-1], documents[-1] ^ 1])
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=4))
    tries = [longer]
    if "order" not in data:
        tries.append(with_data(longer, change_blend=True))
        tries.append(with_data(longer, train=f"1 {tmp_path}/x 2 {tmp_path}/part1", change_blend=True))
    for again in tries:
        capfd.readouterr()
        assert run(again) == 4
        shown = capfd.readouterr().err
        assert f"{tmp_path}/x: is not the dataset that the run was saved with" in shown
        assert "put it back" in shown and "part1:" not in shown
    rewrite(tmp_path / "x", documents)
    assert run(longer) == 0


def test_a_dataset_that_has_left_the_blend_may_not_come_back_as_another(
    corpus: Path, blend: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    part = np.asarray(IndexedDataset(corpus / "part0").tokens)
    for name in ("x", "y"):
        rewrite(tmp_path / name, [part])
    config = with_data(make_config(corpus, tmp_path / "run", steps=2), train=f"1 {tmp_path}/x 1 {tmp_path}/y")
    assert run(config) == 0
    for steps, train, code in ((4, f"{tmp_path}/y", 0), (6, f"1 {tmp_path}/x 1 {tmp_path}/y", 4)):
        rewrite(tmp_path / "x", [part[::-1]])
        longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
        assert run(with_data(longer, train=train, change_blend=True)) == code
    assert f"{tmp_path}/x: is not the dataset" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({"split": "9,1"}, 2, "data.split and data.num_samples belong to data.order=megatron"),
        ({"order": "megatron", "split": "9,1"}, 2, "leave one of them out"),
        ({"order": "megatron", "split": "0,1", "validation": ""}, 2, "leaves nothing for training"),
        ({"order": "megatron", "change_blend": True}, 2, "data.change_blend needs data.order=megagrow"),
        ({"train": "0.7 a b"}, 3, "0.7.idx: no such file"),
        ({"validation": "1 a"}, 2, "held-out datasets weigh by their size"),
    ],
    ids=str,
)
def test_what_does_not_go_together(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], fields: dict[str, Any], code: int, message: str
) -> None:
    assert run(with_data(make_config(corpus, tmp_path), **fields)) == code
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("order", "message"),
    [("megatron", "data.order=megatron shuffles documents"), ("megagrow", "merge its datasets")],
)
def test_scores_select_from_one_dataset_in_its_own_order(
    corpus: Path, blend: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], order: Any, message: str
) -> None:
    config = with_data(make_config(corpus, tmp_path), train=blend, order=order)
    assert run(dataclasses.replace(config, salt=SaltConfig(scores="scores", steps=2))) == 2
    assert message in capfd.readouterr().err
