"""Runs that learn from what a teacher left behind: the same as with the teacher, whatever the layout."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megagrow.checkpoint.source import open_source
from megagrow.config import CheckpointConfig, Config, InitConfig, OptimConfig, ParallelConfig, SaltConfig
from megagrow.data.dataset import PackedDataset
from megagrow.data.indexed import IndexedDataset, IndexedWriter
from megagrow.data.loader import epoch_permutation
from megagrow.ledger import Ledger
from megagrow.parallel.mesh import Mesh, make_mesh
from megagrow.salt import CacheSettings, TeacherCache, cache_teacher, samples_to_cache
from megagrow.salt.score_files import DTYPES, Cost, identity_of, write_scores
from megagrow.train import run
from tests.ranks import run_ranks
from tests.train.runs import LARGE, SMALL, final_loss, make_config, metrics, run_on_ranks
from tests.train.test_run import assert_same_run, cut_back, grown, ledger, poison, weights

SEQ_LENGTH, SEED, STEPS = 16, 1234, 3
ALL = CacheSettings(top_k=SMALL.vocab_size, batch_size=8)


def cache(corpus: Path, trained: Path, output: Path, settings: CacheSettings = ALL, samples: str = "0.02") -> Path:
    """Writes in the ranks that are running; a share of the samples is the first that runs of SEED draw."""
    mesh = make_mesh(ParallelConfig()) if torch.distributed.is_initialized() else Mesh.single()
    dataset = PackedDataset(corpus, SEQ_LENGTH)
    ids = samples_to_cache(samples, dataset.num_samples, SEED)
    return cache_teacher(open_source(trained), dataset, output, mesh, settings, ids, flops=5e9)


@pytest.fixture(scope="module")
def whole(corpus: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All tokens of each position, for the samples that a run draws first."""
    return cache(corpus / "train", trained, tmp_path_factory.mktemp("whole") / "cache")


@pytest.fixture(scope="module")
def few(corpus: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight tokens of each position."""
    return cache(corpus / "train", trained, tmp_path_factory.mktemp("few") / "cache", CacheSettings(top_k=8))


def cached(config: Config, folder: Path | str, **fields: Any) -> Config:
    return dataclasses.replace(config, salt=SaltConfig(cache=str(folder), steps=STEPS, weight=0.5, **fields))


def test_all_tokens_teach_as_the_teacher_does(corpus: Path, trained: Path, whole: Path, tmp_path: Path) -> None:
    """Up to the rounding of the stored probabilities, 2.5e-4 of each."""
    online = dataclasses.replace(
        make_config(corpus, tmp_path / "online"), salt=SaltConfig(teacher=str(trained), steps=STEPS, weight=0.5)
    )
    assert run(online) == 0 and run(cached(make_config(corpus, tmp_path / "cached"), whole)) == 0
    for ours, theirs in zip(metrics(tmp_path / "cached"), metrics(tmp_path / "online"), strict=True):
        assert ours["phase"] == theirs["phase"] and (ours["kd"] is None) == (theirs["kd"] is None)
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-4)
        assert ours["kd"] == pytest.approx(theirs["kd"], abs=5e-4) if ours["kd"] is not None else ours["step"] > STEPS
    assert final_loss(tmp_path / "cached") == pytest.approx(final_loss(tmp_path / "online"), abs=1e-4)


def test_the_ledger_inherits_what_cache_and_teacher_cost(
    corpus: Path, trained: Path, few: Path, tmp_path: Path
) -> None:
    assert run(cached(make_config(corpus, tmp_path), few)) == 0
    found, cost = ledger(tmp_path), TeacherCache(few).cost
    inherited = {item["label"].split()[0]: item["ledger"]["phases"][0] for item in found["inherited"]}
    assert inherited["cache"]["flops"] == 5e9 and inherited["cache"]["seconds"] == cost.seconds > 0
    spent = {**ledger(trained)["phases"][0], "seconds": inherited["teacher"]["seconds"]}  # its last save came later
    assert inherited["teacher"] == spent
    assert Ledger.load(tmp_path / "ledger.json").totals()["all_in"]["flops"] > 5e9
    (teacher,) = [phase for phase in found["phases"] if phase["phase"] == "teacher"]
    assert (teacher["steps"], teacher["flops"]) == (STEPS, 0.0)


@pytest.mark.parametrize(("given", "init", "flops"), [(7e9, "", 7e9), (-1.0, "", None), (7e9, "source", None)])
def test_the_user_may_say_what_the_teacher_cost(
    corpus: Path, trained: Path, few: Path, tmp_path: Path, given: float, init: str, flops: float | None
) -> None:
    """Of one whose ledger nobody kept, and unless that is said of the model that the run starts from."""
    folder = shutil.copytree(few, tmp_path / "cache")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "training": None}))
    init_config = InitConfig(from_=str(trained) if init else "", source_flops=given)
    assert run(cached(make_config(corpus, tmp_path / "run", init=init_config), folder)) == 0
    (teacher,) = [item for item in ledger(tmp_path / "run")["inherited"] if item["label"] == "teacher"]
    assert teacher["ledger"]["phases"][0]["flops"] == flops


@pytest.mark.parametrize("step", [2, 3, 4])
def test_resuming_around_the_stage_switch(corpus: Path, few: Path, tmp_path: Path, step: int) -> None:
    every = CheckpointConfig(interval=1, keep_last=0)
    assert run(cached(make_config(corpus, tmp_path / "whole", checkpoint=every), few)) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    cut_back(tmp_path / "broken", step)
    assert run(cached(make_config(corpus, tmp_path / "broken", checkpoint=every), few)) == 0
    assert_same_run(tmp_path / "broken", tmp_path / "whole")


def test_all_terms_of_the_loss_stand_beside_a_cache(corpus: Path, trained: Path, whole: Path, tmp_path: Path) -> None:
    """Smoothing, z-loss, the cross-entropy to the teacher, and a vocabulary that is padded otherwise, as with one."""
    model = dataclasses.replace(SMALL, vocab_size=272)
    plain = make_config(corpus, tmp_path / "cached", model=model)
    plain = dataclasses.replace(plain, train=dataclasses.replace(plain.train, label_smoothing=0.1, z_loss=1e-2))
    assert run(cached(plain, whole, divergence="cross_entropy")) == 0
    salt = SaltConfig(teacher=str(trained), steps=STEPS, weight=0.5, divergence="cross_entropy")
    elsewhere = dataclasses.replace(plain.run, dir=str(tmp_path / "online"))
    assert run(dataclasses.replace(plain, salt=salt, run=elsewhere)) == 0
    for ours, theirs in zip(metrics(tmp_path / "cached"), metrics(tmp_path / "online"), strict=True):
        for name in ("loss", "ce", "kd", "teacher_entropy"):
            assert ours[name] == (None if theirs[name] is None else pytest.approx(theirs[name], abs=2e-3)), name
    first = metrics(tmp_path / "cached")[0]
    assert first["loss"] > (first["ce"] + first["kd"]) / 2 + 1e-3, "smoothing and z-loss are in it"


def test_weight_zero_is_a_plain_run(corpus: Path, few: Path, tmp_path: Path) -> None:
    """Bit for bit, with all that can stand beside it."""
    plain = make_config(corpus, tmp_path / "plain")
    plain = dataclasses.replace(plain, train=dataclasses.replace(plain.train, label_smoothing=0.1, z_loss=1e-2))
    taught = dataclasses.replace(plain, run=dataclasses.replace(plain.run, dir=str(tmp_path / "taught")))
    assert (
        run(plain) == 0
        and run(dataclasses.replace(taught, salt=SaltConfig(cache=str(few), steps=STEPS, weight=0.0))) == 0
    )
    for ours, theirs in zip(metrics(tmp_path / "taught"), metrics(tmp_path / "plain"), strict=True):
        assert all(ours[name] == theirs[name] for name in ("loss", "ce", "grad_norm", "validation_loss"))
    ours, theirs = weights(tmp_path / "taught"), weights(tmp_path / "plain")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_batch_and_data_degree_find_the_same_targets(corpus: Path, trained: Path, tmp_path: Path) -> None:
    """Written on two data ranks in batches of 8; learned from by two ranks of 8 samples, and by one of 16."""
    run_ranks(cache, 2, corpus / "train", trained, tmp_path / "cache", CacheSettings(top_k=8, batch_size=8), "0.1")
    again = cache(corpus / "train", trained, tmp_path / "again", CacheSettings(top_k=8, batch_size=8), "0.1")
    ids = samples_to_cache("0.1", PackedDataset(corpus / "train", SEQ_LENGTH).num_samples, SEED)
    assert ids is not None
    for ours, theirs in zip(
        TeacherCache(tmp_path / "cache").targets(ids), TeacherCache(again).targets(ids), strict=True
    ):
        assert np.array_equal(ours, theirs)

    def config(name: str) -> Config:
        plain = make_config(corpus, tmp_path / name)
        plain = dataclasses.replace(plain, train=dataclasses.replace(plain.train, global_batch_size=16))
        return cached(plain, tmp_path / "cache")

    assert run_ranks(run_on_ranks, 2, config("two")) == [0, 0]
    assert run(config("one")) == 0
    for ours, theirs in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
        assert ours["kd"] == pytest.approx(theirs["kd"], abs=1e-6)


LAYOUTS: list[tuple[str, int, int, dict[str, Any]]] = [
    ("top_k", 2, 2, {"schedule": "DualPipeV", "sequence_parallel": True}),
    ("sampled", 1, 2, {"schedule": "Interleaved1F1B"}),
    ("top_k", 2, 1, {"context": 2, "sequence_parallel": True}),
    ("sampled", 1, 1, {"context": 2}),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(map(str, [*layout[:3], *layout[3]])))
def test_every_layout_equals_one_process(
    corpus: Path, trained: Path, few: Path, tmp_path: Path, layout: tuple[str, int, int, dict[str, Any]]
) -> None:
    """Four ranks; each looks up its own samples, and its own positions of them."""
    kind, tensor, pipeline, more = layout
    if kind == "sampled":
        few = cache(corpus / "train", trained, tmp_path / "drawn", CacheSettings(sampled=6))
    assert run(cached(make_config(corpus, tmp_path / "one"), few)) == 0
    many = cached(make_config(corpus, tmp_path / "many"), few)
    assert run_ranks(run_on_ranks, 4, many, tensor, pipeline, **more) == [0] * 4
    for ours, theirs in zip(metrics(tmp_path / "many"), metrics(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-5)
        assert ours["kd"] == pytest.approx(theirs["kd"], abs=2e-5)


def test_a_growing_model_looks_up_what_it_draws_after_growing(
    corpus: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Three small steps, then three of stage 1: samples 12 to 24 of the order are needed, and no others."""
    dataset = PackedDataset(corpus / "train", SEQ_LENGTH)
    order = samples_of_order(dataset)
    settings = CacheSettings(top_k=8)
    for name, needed in (("right", order[12:24]), ("wrong", order[11:23])):
        given = open_source(trained), dataset, tmp_path / name, Mesh.single(), settings
        cache_teacher(*given, np.sort(needed))
    config = cached(grown(make_config(corpus, tmp_path / "run"), "clone"), tmp_path / "right")
    assert config.model == LARGE and run(config) == 0
    assert [line["phase"] for line in metrics(tmp_path / "run")] == ["small"] * 3 + ["salt"] * 3
    capfd.readouterr()
    assert run(cached(grown(make_config(corpus, tmp_path / "other"), "clone"), tmp_path / "wrong")) == 3
    error = capfd.readouterr().err
    assert (
        f"1 of the 12 samples that stage 1 draws from this corpus (8.3%) are not in the cache, the first is {order[23]}"
        in error
    )


def test_only_what_is_drawn_before_the_end_of_the_run_is_looked_for(
    corpus: Path, trained: Path, tmp_path: Path
) -> None:
    """Stage 1 of eight steps, of which the run has six, and one when it goes on from its fifth."""
    dataset = PackedDataset(corpus / "train", SEQ_LENGTH)
    given = open_source(trained), dataset, tmp_path / "cache", Mesh.single(), CacheSettings(top_k=8)
    cache_teacher(*given, np.sort(samples_of_order(dataset)[:24]))
    every = CheckpointConfig(interval=1, keep_last=0)
    config = make_config(corpus, tmp_path / "run", checkpoint=every)
    config = dataclasses.replace(config, salt=SaltConfig(cache=str(tmp_path / "cache"), steps=8, weight=0.5))
    assert run(config) == 0
    assert [line["phase"] for line in metrics(tmp_path / "run")] == ["salt"] * 6
    cut_back(tmp_path / "run", 5)
    assert run(config) == 0


def test_a_roll_back_looks_for_what_is_drawn_instead(
    corpus: Path,
    trained: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Step 2 is bad, and its samples are skipped: stage 1 draws those of a fourth step too, which are not there."""
    poison(monkeypatch, {1})
    dataset = PackedDataset(corpus / "train", SEQ_LENGTH)
    given = open_source(trained), dataset, tmp_path / "cache", Mesh.single(), CacheSettings(top_k=8)
    cache_teacher(*given, np.sort(samples_of_order(dataset)[:12]))
    optim, every = OptimConfig(lr=1e-2, warmup_steps=2, max_bad_steps=1), CheckpointConfig(interval=1)
    config = make_config(corpus, tmp_path / "run", optim=optim, checkpoint=every)
    assert run(cached(config, tmp_path / "cache")) == 3
    assert "4 of the 8 samples that stage 1 draws from this corpus (50.0%)" in capfd.readouterr().err
    assert [line["skipped"] for line in metrics(tmp_path / "run")] == [False, True], "before another step is taken"


def samples_of_order(dataset: PackedDataset) -> np.ndarray:
    return epoch_permutation(dataset.num_samples, SEED, 0)


def test_selected_samples_are_looked_up_by_their_ids(corpus: Path, trained: Path, tmp_path: Path) -> None:
    """A cache of exactly the selection; its targets are those of the teacher on the same samples."""
    dataset, generator = PackedDataset(corpus / "train", SEQ_LENGTH), np.random.default_rng(1)
    arrays = {name: generator.random(dataset.num_samples).astype(dtype) for name, dtype in DTYPES.items()}
    write_scores(tmp_path / "scores", arrays, identity_of(dataset, "model", 10, "float32"), Cost(1.0, 1.0, 1))
    selection = {"scores": str(tmp_path / "scores"), "keep_fraction": 0.01, "score": "mean_nll"}
    best = np.sort(np.argsort(-arrays["mean_nll"], kind="stable")[: round(0.01 * dataset.num_samples)])
    cache_teacher(open_source(trained), dataset, tmp_path / "cache", Mesh.single(), ALL, best)
    online = SaltConfig(teacher=str(trained), steps=STEPS, weight=0.5, **selection)
    assert run(dataclasses.replace(make_config(corpus, tmp_path / "online"), salt=online)) == 0
    assert run(cached(make_config(corpus, tmp_path / "cached"), tmp_path / "cache", **selection)) == 0
    for ours, theirs in zip(metrics(tmp_path / "cached")[:STEPS], metrics(tmp_path / "online"), strict=False):
        assert ours["kd"] == pytest.approx(theirs["kd"], abs=5e-4)


def test_a_blend_has_a_cache_for_each_dataset(
    corpus: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In any order; as the teacher does, and refused where one is missing."""
    tokens = IndexedDataset(corpus / "train").tokens
    for number, part in enumerate(np.array_split(tokens, 2)):
        with IndexedWriter(tmp_path / f"part{number}", np.uint16) as writer:
            writer.add_document(part)
        cache(tmp_path / f"part{number}", trained, tmp_path / f"cache{number}", samples="0.03")
    plain = make_config(corpus, tmp_path / "cached")
    data = dataclasses.replace(plain.data, train=f"0.3 {tmp_path}/part0 0.7 {tmp_path}/part1")
    plain = dataclasses.replace(plain, data=data)
    both = f"{tmp_path}/cache1 {tmp_path}/cache0"
    assert run(cached(plain, both)) == 0
    online = dataclasses.replace(plain, run=dataclasses.replace(plain.run, dir=str(tmp_path / "online")))
    assert run(dataclasses.replace(online, salt=SaltConfig(teacher=str(trained), steps=STEPS, weight=0.5))) == 0
    for ours, theirs in zip(metrics(tmp_path / "cached")[:STEPS], metrics(tmp_path / "online"), strict=False):
        assert ours["kd"] == pytest.approx(theirs["kd"], abs=5e-4)
    capfd.readouterr()
    plain = dataclasses.replace(plain, run=dataclasses.replace(plain.run, dir=str(tmp_path / "refused")))
    assert run(cached(plain, f"{tmp_path}/cache1 {tmp_path}/cache1")) == 3
    assert "part0: none of the caches" in capfd.readouterr().err
    assert run(cached(plain, f"{both} {tmp_path}/cache0")) == 2
    assert "names 3 folders for 2 datasets" in capfd.readouterr().err


WRONG: list[tuple[dict[str, Any], dict[str, Any], int, str]] = [
    ({"temperature": 2.0}, {}, 2, "was made with temperature=1.0, salt.temperature=2.0"),
    ({}, {"mask_documents": True}, 2, "was made with mask_documents=False, data.mask_documents=True"),
    ({}, {"reset_positions": True}, 2, "was made with reset_positions=False, data.reset_positions=True"),
    ({}, {"seq_length": 8}, 3, "seq_length is 16, that of"),
    ({}, {"seed": 7}, 3, "of the 12 samples that stage 1 draws from this corpus"),
]


@pytest.mark.parametrize(("salt", "data", "code", "message"), WRONG, ids=[message[:40] for *_, message in WRONG])
def test_a_cache_of_something_else_is_refused_before_training(
    corpus: Path,
    few: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    salt: dict[str, Any],
    data: dict[str, Any],
    code: int,
    message: str,
) -> None:
    config = cached(make_config(corpus, tmp_path / "run"), few, **salt)
    assert run(dataclasses.replace(config, data=dataclasses.replace(config.data, **data))) == code
    error = capfd.readouterr().err.strip()
    assert message in error and error.count("\n") == 0
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_another_vocabulary_is_refused(
    corpus: Path, few: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for size, words in (
        (300, "its teacher has vocab_size=256, the model vocab_size=300: distillation compares the same tokens"),
        (250, "its teacher has vocab_size=256, the model only 250: what the cache says of the other rows cannot"),
    ):
        model = dataclasses.replace(SMALL, vocab_size=size)
        assert run(cached(make_config(corpus, tmp_path / str(size), model=model), few)) == 2
        assert words in capfd.readouterr().err


def test_a_changed_cache_is_refused_on_resuming(
    corpus: Path, few: Path, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(cached(make_config(corpus, tmp_path), few)) == 0
    cut_back(tmp_path, 2)
    assert run(cached(make_config(corpus, tmp_path), whole)) == 4
    assert "salt.cache has changed since this run began" in capfd.readouterr().err


def test_damage_shows_when_the_sample_is_drawn(
    corpus: Path, few: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(few, tmp_path / "cache")
    (shard,) = (tmp_path / "cache" / "shards").glob("*.bin")
    content = shard.read_bytes()
    shard.write_bytes(content[:2000] + bytes(len(content) - 2000))
    assert run(cached(make_config(corpus, tmp_path / "run"), tmp_path / "cache")) == 3
    assert "are damaged; remove the folder and run tools/cache_teacher.py again" in capfd.readouterr().err
