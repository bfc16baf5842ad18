"""A vocabulary that grows, on data with tokens which the small model does not know."""

import dataclasses
import inspect
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from megagrow.checkpoint.source import open_source
from megagrow.config import Config, GrowthConfig, InitConfig, SaltConfig
from megagrow.data.blend import BlendStart
from megagrow.data.indexed import IndexedWriter
from megagrow.data.mlm import Masking
from megagrow.errors import ConfigError
from megagrow.parallel.mesh import Mesh
from megagrow.train import run
from megagrow.train.map_learning import MapLearning, learn_maps
from megagrow.train.streams import blend_weights, open_stream, open_training_data
from megagrow.train.vocabulary import masking_for
from tests.ranks import run_ranks
from tests.train.runs import LARGE, SMALL, make_config, metrics, run_on_ranks

NEW = 258
WIDER = dataclasses.replace(LARGE, vocab_size=NEW + 1)
AT_ONCE = GrowthConfig("clone", optimizer="asymmetric")
LATER = dataclasses.replace(AT_ONCE, at_step=3)


def make_corpus(folder: Path, new_at: dict[str, int | None], token: int = NEW) -> Path:
    """Bytes as in the corpus of all runs here, but for one new token of each file, or many where there is no place."""
    folder.mkdir()
    for split, module in (("train", random), ("validation", inspect)):
        tokens = np.frombuffer(inspect.getsource(module).encode()[:40_000], np.uint8).astype(np.uint16)
        place = new_at.get(split, -1)
        tokens[slice(None, None, 8) if place is None else slice(place, place + 1) if place >= 0 else slice(0)] = token
        with IndexedWriter(folder / split, np.uint16) as writer:
            writer.add_document(tokens)
            writer.close()
    return folder


def growing(corpus: Path, directory: Path, growth: GrowthConfig, source: Path | None = None) -> Config:
    plain = make_config(corpus, directory, init=InitConfig(str(source) if source else ""))
    return dataclasses.replace(plain, model=WIDER, growth=growth)


def met_by(config: Config, step: int) -> int:
    """The place in the file of a token that step `step` of a run reads."""
    plain = dataclasses.replace(config, model=SMALL, growth=GrowthConfig(), init=InitConfig(), salt=SaltConfig())
    datasets = open_training_data(plain)
    stream = open_stream(datasets, BlendStart(blend_weights(plain, datasets)), plain)
    sample = int(stream.batch(4 * step, 4).ids[1])
    return sample * plain.data.seq_length + 5


@pytest.mark.parametrize("method", ["clone", "ligo"])
@pytest.mark.parametrize("place", [5, None])
def test_growth_at_start_up_on_data_with_new_tokens(
    method: str, place: int | None, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The source is tried on what it knows, and the held-out loss is measured from growth on."""
    corpus = make_corpus(tmp_path / "corpus", {"train": place, "validation": 5})
    growth = AT_ONCE if method == "clone" else GrowthConfig("ligo", optimizer="reset", ligo_steps=2)
    assert run(growing(corpus, tmp_path / "run", growth, trained)) == 0
    said = capfd.readouterr().err
    assert ("not tried on the data" if place is None else "loss 2.") in said
    assert "before" not in said and " after" in said
    assert metrics(tmp_path / "run")[-1]["validation_loss"] < 6


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("own", [True, False])
def test_a_new_token_before_growth_is_refused_before_training(
    ranks: int, own: bool, corpus: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of two tensor ranks neither has a row for it: without the check their loss would be finite, and wrong."""
    growth = dataclasses.replace(LATER, source=SMALL) if own else LATER
    config = growing(corpus, tmp_path / "run", growth, None if own else trained)
    late = make_corpus(tmp_path / "late", {"train": met_by(config, step=2)})
    config = growing(late, tmp_path / "run", growth, None if own else trained)
    assert (run_ranks(run_on_ranks, 2, config, 2) if ranks == 2 else [run(config)]) == [3] * ranks
    assert not (tmp_path / "run/metrics.jsonl").exists() or not metrics(tmp_path / "run")
    if ranks == 1:
        said = capfd.readouterr().err
        assert f"holds token {NEW}, the model's vocab_size is 256" in said
        assert (f"set growth.source.vocab_size={NEW + 1}" if own else "set growth.at_step=0") in said


def test_a_token_that_no_model_knows_is_not_what_growth_adds(
    corpus: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """To let the small model know all tokens would not help."""
    config = growing(corpus, tmp_path / "run", LATER, trained)
    late = make_corpus(tmp_path / "late", {"train": met_by(config, step=2)}, token=NEW + 1)
    assert run(growing(late, tmp_path / "run", LATER, trained)) == 3
    said = capfd.readouterr().err
    assert "looking through the 12 samples up to the last growth" in said
    assert f"holds token {NEW + 1}, the model's vocab_size is 256; preprocess" in said and "growth.at_step" not in said


def test_a_new_token_after_growth_is_welcome(corpus: Path, trained: Path, tmp_path: Path) -> None:
    """Held-out data with new tokens are measured after growth alone."""
    config = growing(corpus, tmp_path / "run", LATER, trained)
    late = make_corpus(tmp_path / "late", {"train": met_by(config, step=3), "validation": None})
    assert run(growing(late, tmp_path / "run", LATER, trained)) == 0
    assert [line["step"] for line in metrics(tmp_path / "run") if line["validation_loss"] is not None] == [6]


@pytest.mark.parametrize("step", [4, 5])
def test_a_small_model_that_teaches_has_to_know_the_tokens_of_stage_1(
    step: int, trained: Path, corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Growth after step 3, stage 1 in steps 3 and 4, of 6."""
    salt = SaltConfig(teacher="grown", steps=2)
    config = dataclasses.replace(growing(corpus, tmp_path / "run", LATER, trained), salt=salt)
    late = make_corpus(tmp_path / "late", {"train": met_by(config, step)})
    config = dataclasses.replace(growing(late, tmp_path / "run", LATER, trained), salt=salt)
    assert run(config) == (3 if step == 4 else 0)
    if step == 4:
        assert "set growth.at_step=0 and another salt.teacher" in capfd.readouterr().err
        assert not (tmp_path / "run/metrics.jsonl").exists() or not metrics(tmp_path / "run")


def test_maps_learn_on_data_with_new_tokens(trained: Path, tmp_path: Path) -> None:
    for name, place in (("one", 5), ("many", None)):
        corpus, losses = make_corpus(tmp_path / name, {"train": place}), []
        how = MapLearning(str(corpus / "train"), GrowthConfig(ligo_steps=2), seq_length=16, batch_size=4)
        learn_maps(open_source(trained), WIDER, how, Mesh.single(), lambda _, loss, losses=losses: losses.append(loss))
        assert len(losses) == 2 and max(losses) < 6


def test_random_and_mask_tokens_are_those_that_the_model_knows() -> None:
    masking = Masking(mask_id=200, special_ids=(200,), vocab_size=NEW + 1, seed=1)
    assert masking_for(masking, WIDER) == masking
    limited = masking_for(masking, SMALL)
    assert limited is not None
    seen, _ = limited(torch.zeros(64, 512, dtype=torch.long), torch.arange(64))
    assert seen.max() < SMALL.vocab_size and seen.unique().numel() > 200
    with pytest.raises(ConfigError, match=f"mask token {NEW} is beyond the vocabulary of 256.*data.mask_token"):
        masking_for(dataclasses.replace(masking, mask_id=NEW), SMALL)
