"""Writing a teacher's targets: right, resumable, and the same however the work is shared."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megagrow.config import ModelConfig
from megagrow.data.loader import epoch_permutation
from megagrow.errors import ConfigError, DataError
from megagrow.parallel.context import restarted_positions
from megagrow.parallel.mesh import Mesh
from megagrow.salt import cache as cache_module
from megagrow.salt import sharded
from megagrow.salt.cache import CacheSettings, cache_teacher
from megagrow.salt.cache_format import CODE_ERROR
from megagrow.salt.cache_shards import samples_to_cache
from megagrow.salt.records import MANIFEST_FILE
from megagrow.salt.teacher_cache import TeacherCache
from tests.ranks import RankError, run_ranks
from tests.salt.samples import (
    SMALL,
    TIED,
    make_model,
    make_source,
    mesh_of,
    opened,
    random_corpus,
    source_of,
    write_corpus,
    write_documents,
)
from tests.salt.work import Recorder, files, killed_before_rename, times

SEQ_LENGTH, NUM_SAMPLES, TOP_K = 8, 23, 5
SETTINGS = CacheSettings(top_k=TOP_K, temperature=0.5, batch_size=4, shard_size=4, skip_source_check=True)
DOUBLE = replace(SETTINGS, dtype=torch.float64)
DRAWN = replace(DOUBLE, top_k=0, sampled=6)
KINDS = [pytest.param(DOUBLE, id="top_k"), pytest.param(DRAWN, id="sampled")]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return random_corpus(tmp_path / "corpus", NUM_SAMPLES, SEQ_LENGTH)


def cache(
    prefix: Path,
    output: Path,
    settings: CacheSettings = SETTINGS,
    model: ModelConfig = SMALL,
    tensor: int = 1,
    pipeline: int = 1,
    samples: list[int] | None = None,
    flops: float | None = None,
) -> None:
    """Writes in the ranks that are running."""
    mesh = mesh_of(tensor, pipeline) if torch.distributed.is_initialized() else Mesh.single()
    ids = None if samples is None else np.array(samples)
    cache_teacher(make_source(model), opened(prefix, SEQ_LENGTH), output, mesh, settings, ids, flops)


def soft_probabilities(corpus: Path, model: ModelConfig, temperature: float) -> torch.Tensor:
    """[N, S, V] of all samples, dense."""
    tokens = torch.from_numpy(opened(corpus, SEQ_LENGTH).batch(range(NUM_SAMPLES)))
    return (make_model(model).logits(tokens[:, :-1]) / temperature).softmax(-1)


@pytest.mark.parametrize("model", [SMALL, TIED], ids=["untied", "tied"])
def test_targets_follow_from_the_logits(tmp_path: Path, corpus: Path, model: ModelConfig) -> None:
    """Every id and mass against softmax and sort, in any order of samples."""
    cache(corpus, tmp_path / "cache", DOUBLE, model, flops=7e9)
    opened_cache, order = TeacherCache(tmp_path / "cache"), np.random.default_rng(0).permutation(NUM_SAMPLES)
    ids, masses = opened_cache.targets(order)
    p = soft_probabilities(corpus, model, 0.5)[order]
    sorted_p, sorted_ids = p.sort(dim=-1, descending=True, stable=True)
    assert np.array_equal(ids, sorted_ids[..., :TOP_K])
    expected = torch.cat([sorted_p[..., :TOP_K], sorted_p[..., TOP_K:].sum(-1, keepdim=True)], -1).numpy()
    assert (np.abs(masses - expected) <= 2 * CODE_ERROR * expected + 1e-7).all()
    assert masses.dtype == np.float32
    np.testing.assert_allclose(masses.sum(-1), 1.0, atol=1e-6)
    identity, cost = opened_cache.identity, opened_cache.cost
    assert (identity.model, identity.kind, identity.num_entries) == ("seed 0", "top_k", TOP_K)
    assert (cost.flops, cost.tokens) == (7e9, NUM_SAMPLES * SEQ_LENGTH) and cost.seconds > 0
    assert {name.split("/")[0] for name in files(tmp_path / "cache")} == {MANIFEST_FILE, "shards"}
    assert all(name.endswith(".bin") for name in files(tmp_path / "cache") if name != MANIFEST_FILE)


def test_draws_come_as_often_as_their_probability_says(tmp_path: Path, corpus: Path) -> None:
    """Within one draw everywhere, and near it on average over all positions; with the entropy."""
    cache(corpus, tmp_path / "cache", DRAWN)
    ids, masses = TeacherCache(tmp_path / "cache").targets(range(NUM_SAMPLES))
    p = soft_probabilities(corpus, SMALL, 0.5)
    places, weights = torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(masses[..., :-1]).double()
    shares = torch.zeros_like(p).scatter_add(-1, places, weights)
    assert ((shares - p).abs() < (1 + 1e-6) / 6).all()
    deviation = (shares - p).flatten(0, 1)
    assert (deviation.mean(0).abs() <= 5 * deviation.std(0) / len(deviation) ** 0.5 + 1e-9).all()
    entropy = -torch.special.xlogy(p, p).sum(-1).numpy()
    assert np.abs(masses[..., -1] - entropy).max() <= CODE_ERROR + 1e-6


@pytest.mark.parametrize("settings", KINDS)
def test_the_size_of_batches_leaves_the_targets_as_they_are(
    tmp_path: Path, corpus: Path, settings: CacheSettings
) -> None:
    cache(corpus, tmp_path / "cache", settings)
    expected = TeacherCache(tmp_path / "cache").targets(range(NUM_SAMPLES))
    for batch_size, shard_size in ((1, 4), (5, 7), (64, 64)):
        other = tmp_path / f"{batch_size}"
        cache(corpus, other, replace(settings, batch_size=batch_size, shard_size=shard_size))
        found = TeacherCache(other).targets(range(NUM_SAMPLES))
        assert all(np.array_equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
        assert TeacherCache(other).identity == TeacherCache(tmp_path / "cache").identity


@pytest.mark.parametrize(("world", "pipeline"), [(2, 1), (4, 2)])
def test_any_number_of_ranks_writes_the_same_files(tmp_path: Path, corpus: Path, world: int, pipeline: int) -> None:
    cache(corpus, tmp_path / "cache")
    run_ranks(cache, world, corpus, tmp_path / "other", pipeline=pipeline)  # in float32
    assert files(tmp_path / "other") == files(tmp_path / "cache")


@pytest.mark.parametrize("settings", KINDS)
def test_tensor_parallel_targets_agree(tmp_path: Path, corpus: Path, settings: CacheSettings) -> None:
    """2 x 2 ranks; sums over hidden units come in another order, so float64, then equal files."""
    cache(corpus, tmp_path / "cache", settings)
    run_ranks(cache, 4, corpus, tmp_path / "other", settings, tensor=2)
    assert files(tmp_path / "other") == files(tmp_path / "cache")


def cache_and_die(prefix: Path, output: Path, after: int) -> None:
    with killed_before_rename(after):
        cache(prefix, output)


@pytest.mark.parametrize("after", [0, 6, 13], ids=["at_once", "between shard and seconds", "manifest"])
def test_killed_work_goes_on_where_it_was(
    tmp_path: Path, corpus: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One identity, six shards with their seconds, and the manifest are renamed; killed before rename `after` + 1."""
    cache(corpus, tmp_path / "cache")
    with pytest.raises(RankError, match="ended with code -9"):
        run_ranks(cache_and_die, 1, corpus, tmp_path / "killed", after)
    with pytest.raises(DataError, match=r"manifest.json: no such file"):
        TeacherCache(tmp_path / "killed")
    finished = len(list((tmp_path / "killed").glob("shards/*.bin")))
    assert finished == max(after - 1, 0) // 2

    done_again = []
    cache_shard = cache_module._cache_shard
    monkeypatch.setattr(cache_module, "_cache_shard", lambda *args: done_again.append(args[3]) or cache_shard(*args))
    cache(corpus, tmp_path / "killed")
    assert done_again == list(range(finished, 6))
    assert files(tmp_path / "killed") == files(tmp_path / "cache")


def die_with_zlib(prefix: Path, output: Path, after: int) -> None:
    with mock.patch("megagrow.salt.cache_shards.best_compression", lambda: "zlib"):
        cache_and_die(prefix, output, after)


def test_interrupted_work_goes_on_with_other_ranks_and_the_same_compression(tmp_path: Path, corpus: Path) -> None:
    with mock.patch("megagrow.salt.cache_shards.best_compression", lambda: "zlib"):
        cache(corpus, tmp_path / "cache")
    with pytest.raises(RankError):
        run_ranks(die_with_zlib, 1, corpus, tmp_path / "killed", 5)
    run_ranks(cache, 3, corpus, tmp_path / "killed")
    assert files(tmp_path / "killed") == files(tmp_path / "cache")


def test_a_finished_cache_is_left_alone(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache(corpus, tmp_path / "cache")
    before = times(tmp_path / "cache")
    monkeypatch.setattr(sharded, "load_model", None)
    cache(corpus, tmp_path / "cache", replace(SETTINGS, batch_size=3))
    assert before == times(tmp_path / "cache")


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("num_entries", {"top_k": 3}),
        ("kind", {"top_k": 0, "sampled": 5}),
        ("temperature", {"temperature": 2.0}),
        ("dtype", {"dtype": torch.float64}),
        ("mask_documents", {"mask_documents": True}),
        ("samples_sha256", {}),
        ("corpus_sha256", {}),
        ("model", {}),
    ],
)
def test_another_cache_is_never_overwritten(tmp_path: Path, corpus: Path, field: str, change: dict[str, Any]) -> None:
    """Finished or not."""
    cache(corpus, tmp_path / "finished")
    shutil.copytree(tmp_path / "finished", tmp_path / "begun")
    (tmp_path / "begun" / MANIFEST_FILE).unlink()
    identity = asdict(TeacherCache(tmp_path / "finished").identity)
    record = {"identity": identity, "shard_size": 4, "compression": "zlib"}
    (tmp_path / "begun" / "shards" / "identity.json").write_text(json.dumps(record))
    before = files(tmp_path)
    source = make_source(SMALL, seed=1 if field == "model" else 0)
    prefix = random_corpus(tmp_path / "longer", NUM_SAMPLES + 1, SEQ_LENGTH) if field == "corpus_sha256" else corpus
    samples = np.arange(3) if field == "samples_sha256" else None
    settings = replace(SETTINGS, **change)
    for name in ("finished", "begun"):
        with pytest.raises(DataError, match=rf"\.json: {field} is .*; choose another --output, or re") as e:
            cache_teacher(source, opened(prefix, SEQ_LENGTH), tmp_path / name, Mesh.single(), settings, samples)
        assert "\n" not in str(e.value)
    assert {name: content for name, content in files(tmp_path).items() if "longer" not in name} == before


def test_a_part_of_the_samples(tmp_path: Path, corpus: Path) -> None:
    """The same targets as in a whole cache, under the same ids; what is not there is told."""
    chosen = [0, 3, 4, 9, 10, 11, 12, 22]
    cache(corpus, tmp_path / "whole")
    cache(corpus, tmp_path / "part", samples=chosen)
    whole, part = TeacherCache(tmp_path / "whole"), TeacherCache(tmp_path / "part")
    assert (part.num_cached, part.cost.tokens) == (8, 8 * SEQ_LENGTH)
    for ours, theirs in zip(part.targets([22, 3, 10]), whole.targets([22, 3, 10]), strict=True):
        assert np.array_equal(ours, theirs)
    assert part.missing(np.arange(13)).tolist() == [1, 2, 5, 6, 7, 8]
    assert part.missing(np.array([-1, 23, 100])).tolist() == [-1, 23, 100]
    assert whole.missing(np.array([-1, 0, 22, 23])).tolist() == [-1, 23]
    with pytest.raises(DataError, match="part: sample 5 is not in the cache"):
        part.targets([3, 5])


def test_documents_are_seen_as_in_training(tmp_path: Path) -> None:
    """Attention inside of documents, positions from each one's beginning: other targets, those of a masked model."""
    dataset, model = opened(write_documents(tmp_path / "corpus", (5, 7, 3, 20, 6)), SEQ_LENGTH), make_model(TIED)
    ids = range(dataset.num_samples)
    inputs, documents = torch.from_numpy(dataset.batch(ids))[:, :-1], torch.from_numpy(dataset.documents(ids))
    settings = replace(DOUBLE, top_k=29, temperature=1.0, mask_documents=True, reset_positions=True)
    cache_teacher(make_source(TIED), dataset, tmp_path / "cache", Mesh.single(), settings)
    found_ids, masses = TeacherCache(tmp_path / "cache").targets(list(ids))
    positions = restarted_positions(documents)
    p = (model(inputs, documents=documents, positions=positions) @ model.head_VH.T).softmax(-1)
    expected = p.gather(-1, torch.from_numpy(found_ids.astype(np.int64))).numpy()
    assert np.abs(masses[..., :-1] - expected).max() <= 2 * CODE_ERROR
    assert (model.logits(inputs).softmax(-1) - p).abs().max() > 0.01, "documents should matter"


@pytest.mark.parametrize(
    ("given", "expected"),
    [("", None), ("2:5", [2, 3, 4]), ("0:10", None), ("1.0", None), ("0.31", [0, 4, 5, 7])],
)
def test_samples_are_named_by_ids_or_by_a_share(given: str, expected: list[int] | None) -> None:
    """A share is what runs of this seed draw first."""
    found = samples_to_cache(given, 10, seed=5)
    assert (None if found is None else found.tolist()) == (
        sorted(epoch_permutation(10, 5, 0)[:4].tolist()) if given == "0.31" else expected
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("5:2", "must lie in 0:10"),
        ("0:11", "must lie in 0:10"),
        ("-1:3", "must lie in 0:10"),
        ("1:2:3", "must be ids A:B or a share"),
        ("some", "must be ids A:B or a share"),
        ("0", "a share must be above 0"),
        ("1.5", "a share must be above 0"),
        ("nan", "a share must be above 0"),
    ],
)
def test_samples_that_do_not_exist_are_refused(given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"samples={given}.* {message}|{message}"):
        samples_to_cache(given, 10, seed=5)


def test_logits_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """Token 7 stands in sample 5 alone, as an input."""
    tokens = [1] * (NUM_SAMPLES * SEQ_LENGTH + 1)
    tokens[5 * SEQ_LENGTH + 2] = 7
    prefix = write_corpus(tmp_path / "corpus", tokens)
    state = dict(make_model(SMALL).named_parameters())
    state["embedding.tokens"][7] = torch.nan
    source = source_of(state, SMALL, "damaged")
    for settings in (SETTINGS, replace(SETTINGS, top_k=0, sampled=3)):
        with pytest.raises(DataError, match="sample 5 gets logits that are not finite from the teacher: its"):
            cache_teacher(source, opened(prefix, SEQ_LENGTH), tmp_path / settings.kind, Mesh.single(), settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 0}, "top_k=0, sampled=0: exactly one"),
        ({"sampled": 3}, "top_k=5, sampled=3: exactly one"),
        ({"top_k": -1}, "exactly one"),
        ({"top_k": 0, "sampled": 2**16 + 1}, "sampled=65537 must be at most"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"temperature": float("nan")}, "temperature=nan must be positive"),
        ({"batch_size": 0}, "batch_size=0 must be positive"),
        ({"shard_size": 0}, "shard_size=0 must be positive"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SETTINGS, **change)


def test_more_entries_than_tokens_are_refused(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(ConfigError, match="top_k=30 exceeds vocab_size=29 of small"):
        cache(corpus, tmp_path / "cache", replace(SETTINGS, top_k=30))
    assert not (tmp_path / "cache").exists()


def test_a_refused_model_leaves_the_folder_free(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(DataError, match="do not fit this data"):
        cache(corpus, tmp_path / "cache", replace(SETTINGS, skip_source_check=False))
    assert not (tmp_path / "cache").exists()


def test_progress_reaches_the_number_of_samples(tmp_path: Path, corpus: Path) -> None:
    recorder = Recorder("caching")
    dataset = opened(corpus, SEQ_LENGTH)
    cache_teacher(make_source(SMALL), dataset, tmp_path / "c", Mesh.single(), SETTINGS, progress=recorder)
    assert recorder.steps == [4, 8, 12, 16, 20, 23]
    assert "small: loss" in recorder.messages[0]
