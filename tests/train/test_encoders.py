"""Runs of encoders: exact resuming, the same training in every layout, growth; and what they are refused."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megagrow.checkpoint.source import open_source
from megagrow.config import Config, DataConfig, GrowthConfig, InitConfig, SaltConfig, TrainConfig
from megagrow.data.dataset import PackedDataset
from megagrow.data.mlm import Masking, make_masking
from megagrow.data.tokenizer import ByteTokenizer
from megagrow.errors import ConfigError
from megagrow.evaluate import make_masked_batch, mean_loss
from megagrow.generate import generate
from megagrow.model import Transformer
from megagrow.parallel.mesh import Mesh, make_mesh
from megagrow.parallel.pipeline import Batch
from megagrow.salt.score import ScoreSettings, score_corpus
from megagrow.salt.teacher import check_teacher
from megagrow.train import run, trainer
from megagrow.train.map_learning import MapLearning, learn_maps
from megagrow.train.part import build_part, initialize_part, load_part
from tests.models import as_bert, as_roberta
from tests.ranks import run_ranks
from tests.train.runs import LARGE, SMALL, final_loss, make_config, metrics, run_on_ranks
from tests.train.test_run import assert_same_run, cut_back, ledger

MASK = 256
BERT = as_bert(SMALL, vocab_size=257)
ROBERTA = as_roberta(SMALL, vocab_size=257)
LARGE_BERT = as_bert(LARGE, vocab_size=257)
MASKING = Masking(MASK, (MASK, 3), 256, seed=5)


def encoder_config(corpus: Path, directory: Path, steps: int = 6, **sections: Any) -> Config:
    config = make_config(corpus, directory, steps, **{"model": BERT, **sections})
    return dataclasses.replace(config, data=dataclasses.replace(config.data, mask_token=MASK))


def train_section(**changes: Any) -> TrainConfig:
    return TrainConfig(steps=6, global_batch_size=4, eval_interval=3, eval_batches=2, **changes)


def grown(config: Config, method: str) -> Config:
    policy = "reset" if method == "ligo" else "exact"
    growth = GrowthConfig(method=method, source=BERT, at_step=3, optimizer=policy, ligo_steps=3, rewarmup_steps=2)
    return dataclasses.replace(config, growth=growth)


def test_an_encoder_learns(corpus: Path, tmp_path: Path) -> None:
    config = encoder_config(corpus, tmp_path, steps=60)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, global_batch_size=16))
    assert run(config) == 0
    lines = metrics(tmp_path)
    assert lines[0]["loss"] == pytest.approx(5.55, abs=0.5)  # ln 257
    assert final_loss(tmp_path) < 0.75 * lines[0]["loss"]


def test_resuming_gives_the_unbroken_run_bit_for_bit(corpus: Path, tmp_path: Path) -> None:
    train = train_section(dropout=0.2, microbatch_size=2)
    assert run(encoder_config(corpus, tmp_path / "whole", train=train)) == 0
    config = encoder_config(corpus, tmp_path / "broken", train=train)
    assert run(config) == 0
    for step in (2, 4):
        cut_back(tmp_path / "broken", step)
        assert run(config) == 0
        assert_same_run(tmp_path / "broken", tmp_path / "whole")


def test_every_visit_of_a_run_has_a_number_of_its_own(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a sample is masked anew each time that it comes, and a resumed run goes on with the next number."""
    visits: list[int] = []

    def watched(tokens: torch.Tensor, visits_B: torch.Tensor, *args: Any) -> Batch:
        visits.extend(visits_B.tolist())
        return make_masked_batch(tokens, visits_B, *args)

    monkeypatch.setattr(trainer, "make_masked_batch", watched)
    config = encoder_config(corpus, tmp_path)
    assert run(config) == 0
    cut_back(tmp_path, 4)
    assert run(config) == 0
    assert visits == [*range(6 * 4), *range(4 * 4, 6 * 4)]


@pytest.mark.parametrize(
    ("ranks", "tensor", "pipeline", "layout"),
    [(2, 1, 1, {}), (4, 2, 2, {"sequence_parallel": True}), (4, 1, 1, {"context": 2}), (2, 1, 2, {})],
)
def test_every_layout_trains_the_same(
    corpus: Path, tmp_path: Path, ranks: int, tensor: int, pipeline: int, layout: dict[str, Any]
) -> None:
    """Masks, their number in the denominator, and the evaluation: a rank's share of them differs from step to step."""
    assert run(encoder_config(corpus, tmp_path / "one", model=ROBERTA)) == 0
    config = encoder_config(corpus, tmp_path / "many", model=ROBERTA, train=train_section(microbatch_size=1))
    assert run_ranks(run_on_ranks, ranks, config, tensor, pipeline, **layout) == [0] * ranks
    for ours, theirs in zip(metrics(tmp_path / "many"), metrics(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5), ours["step"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-5), ours["step"]
    assert final_loss(tmp_path / "many") == pytest.approx(final_loss(tmp_path / "one"), rel=2e-5)


@pytest.mark.parametrize("pipeline", [1, 2])
def test_growth_keeps_what_an_encoder_computes(corpus: Path, tmp_path: Path, pipeline: int) -> None:
    wide = dataclasses.replace(LARGE_BERT, num_layers=BERT.num_layers)
    config = grown(encoder_config(corpus, tmp_path, model=wide), "clone")
    assert run_ranks(run_on_ranks, pipeline, config, pipeline=pipeline) == [0] * pipeline
    (event,) = ledger(tmp_path)["events"]
    assert event["loss_after"] == pytest.approx(event["loss_before"], abs=1e-5)


@pytest.mark.parametrize("pipeline", [1, 2])
def test_learned_maps_grow_an_encoder(corpus: Path, tmp_path: Path, pipeline: int) -> None:
    """What they learn shows from the second step on, against maps that stay as they begin, and lowers the loss."""
    losses = {}
    for lr in (0.0, 0.03):
        config = grown(encoder_config(corpus, tmp_path / str(lr), model=LARGE_BERT), "ligo")
        config = dataclasses.replace(config, growth=dataclasses.replace(config.growth, ligo_lr=lr, ligo_steps=6))
        assert run_ranks(run_on_ranks, pipeline, config, pipeline=pipeline) == [0] * pipeline
        lines = metrics(tmp_path / str(lr))
        assert [line["phase"] for line in lines] == ["small"] * 3 + ["ligo"] * 6 + ["train"] * 3
        losses[lr] = [line["loss"] for line in lines]
    assert losses[0.03][:4] == losses[0.0][:4]
    assert all(learned != kept for learned, kept in zip(losses[0.03][4:], losses[0.0][4:], strict=True)), losses
    assert sum(losses[0.03][6:9]) < sum(losses[0.0][6:9]) - 0.3, losses


@pytest.mark.parametrize("variant", ["tied", "target_layer"])
def test_maps_of_an_encoder_are_learned_outside_of_a_run(corpus: Path, tmp_path: Path, variant: Any) -> None:
    assert run(encoder_config(corpus, tmp_path, steps=20)) == 0
    losses: dict[float, list[float]] = {0.0: [], 0.03: []}
    for lr, found in losses.items():
        growth = GrowthConfig(ligo_variant=variant, ligo_noise=1.0, ligo_steps=12, ligo_lr=lr)
        how = MapLearning(str(corpus / "train"), growth, seq_length=16, batch_size=8, mask_token=MASK)
        tell = partial(lambda found, step, loss: found.append(loss), found)
        ligo = learn_maps(open_source(tmp_path), LARGE_BERT, how, Mesh.single(), tell)
        assert ("width.transform" in ligo.parameters()) == (variant == "target_layer")
    assert losses[0.03][0] == losses[0.0][0]
    assert sum(losses[0.03][-4:]) < sum(losses[0.0][-4:]) - 0.2, losses


def test_without_a_mask_token_no_maps_of_an_encoder_are_learned(corpus: Path, tmp_path: Path) -> None:
    assert run(encoder_config(corpus, tmp_path, steps=1)) == 0
    with pytest.raises(ConfigError, match="data.mask_token"):
        how = MapLearning(str(corpus / "train"), seq_length=16)
        learn_maps(open_source(tmp_path), LARGE_BERT, how, Mesh.single(), print)


def test_a_source_is_tried_on_masked_samples(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = encoder_config(corpus, tmp_path / "small", steps=60)
    assert run(dataclasses.replace(config, train=dataclasses.replace(config.train, global_batch_size=16))) == 0
    source, config = open_source(tmp_path / "small"), encoder_config(corpus, tmp_path / "next", steps=2)
    part = build_part(BERT, config, Mesh.single())
    load_part(part, source.fetch)
    tokens = torch.from_numpy(PackedDataset(config.data.train, 16).batch(range(8)))
    losses = [
        mean_loss(part.engine, tokens, 4, Mesh.single(), masking=m) for m in (make_masking(config.data, BERT), None)
    ]
    capfd.readouterr()
    assert run(dataclasses.replace(config, init=InitConfig(from_=str(tmp_path / "small")))) == 0
    printed = capfd.readouterr().err
    assert f"loss {losses[0]:.3f} on the data" in printed and f"{losses[1]:.3f}" not in printed


def masked_batches(tokens: torch.Tensor, parallel: Any) -> Batch:
    mesh = make_mesh(parallel)
    share = len(tokens) // mesh.dp.size
    mine = slice(mesh.dp.rank * share, (mesh.dp.rank + 1) * share)
    return make_masked_batch(tokens[mine], torch.arange(len(tokens))[mine], MASKING, mesh)


def test_every_chosen_token_weighs_one_over_all_of_them() -> None:
    tokens = torch.randint(256, (8, 17), generator=torch.Generator().manual_seed(0))
    _, chosen = MASKING(tokens[:, :-1], torch.arange(8))
    config = make_config(Path(), Path()).parallel
    found = run_ranks(masked_batches, 4, tokens, dataclasses.replace(config, context=2))
    counts = [int((batch.weights > 0).sum()) for batch in found]
    assert sum(counts) == int(chosen.sum()) and len(set(counts)) > 1
    for batch in found:
        assert batch.weights[batch.weights > 0].unique().tolist() == pytest.approx([1 / int(chosen.sum())])
    one = make_masked_batch(tokens, torch.arange(8), MASKING, Mesh.single())
    assert torch.equal(one.weights > 0, chosen)
    assert torch.equal(one.labels, tokens[:, :-1])


def test_nothing_chosen_is_no_loss() -> None:
    batch = make_masked_batch(torch.full((2, 9), 3), torch.arange(2), MASKING, Mesh.single())
    assert torch.equal(batch.weights, torch.zeros(2, 8))
    assert torch.equal(batch.ids, batch.labels)


def test_the_validation_loss_depends_on_neither_batch_size_nor_seed() -> None:
    tokens = torch.randint(256, (7, 17), generator=torch.Generator().manual_seed(0))
    losses = []
    for batch_size, seed in ((4, 5), (2, 5), (7, 5), (4, 6)):
        config = Config(model=BERT, data=DataConfig(seq_length=16), train=TrainConfig(global_batch_size=batch_size))
        part = build_part(BERT, config, Mesh.single())
        initialize_part(part, seed=1)
        masking = dataclasses.replace(MASKING, seed=seed)
        losses.append(mean_loss(part.engine, tokens, batch_size, Mesh.single(), masking=masking))
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


def test_without_a_mask_token_there_is_one_line(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(make_config(corpus, tmp_path, model=BERT)) == 2
    assert "data.mask_token" in capfd.readouterr().err
    assert json.loads((tmp_path / "exit.json").read_text())["code"] == 2


def test_distillation_is_refused(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = encoder_config(corpus, tmp_path, salt=SaltConfig(teacher="anything", steps=2))
    assert run(config) == 2
    assert "model is an encoder" in capfd.readouterr().err


def test_encoders_neither_teach_nor_score(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the teacher is an encoder"):
        check_teacher(BERT, SMALL, 16)
    assert run(encoder_config(corpus, tmp_path / "run", steps=1)) == 0
    source = open_source(tmp_path / "run")
    dataset = PackedDataset(corpus / "train", 16)
    with pytest.raises(ConfigError, match="is an encoder .* to score samples"):
        score_corpus(source, dataset, tmp_path / "scores", Mesh.single(), ScoreSettings())
    assert not (tmp_path / "scores").exists()


def test_generation_is_refused() -> None:
    with pytest.raises(ConfigError, match="is an encoder .* to generate text"):
        generate(Transformer(BERT), ByteTokenizer(), "x", 3)
