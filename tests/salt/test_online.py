"""The online selection: what the teacher picks from a buffer, whoever shares the work, and where it goes on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megagrow.checkpoint.source import load_model
from megagrow.config import Config, DataConfig, ModelConfig, ParallelConfig, SaltConfig
from megagrow.data.loader import Stream, shuffled
from megagrow.errors import DataError
from megagrow.model.transformer import Transformer
from megagrow.parallel.mesh import Mesh, make_mesh
from megagrow.salt import online
from megagrow.salt.online import OnlineStream, score_candidates
from megagrow.salt.score import ScoreSettings, score_corpus
from megagrow.salt.score_files import read_scores
from megagrow.salt.teacher import Teacher
from tests.ranks import run_ranks
from tests.salt.samples import (
    SMALL,
    TIED,
    make_model,
    make_source,
    opened,
    random_corpus,
    source_of,
    write_corpus,
    write_documents,
)

SEQ_LENGTH, NUM_SAMPLES, BATCH, TOP_K = 8, 50, 4, 5
CANDIDATES, KEPT = 12, 8
SALT = SaltConfig(teacher="small", steps=3, online_buffer=3, keep_fraction=0.6, top_k=TOP_K, score="median_in_top_k")
CONFIG = Config(salt=SALT)
DOCUMENTS = DataConfig(mask_documents=True, reset_positions=True)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return random_corpus(tmp_path / "corpus", NUM_SAMPLES, SEQ_LENGTH)


def stream_of(prefix: Path, with_documents: bool = False) -> Stream:
    return Stream([shuffled(opened(prefix, SEQ_LENGTH), seed=3)], with_documents=with_documents)


def scores_by_hand(which_M: Any, ids_M: Any, is_new: bool) -> np.ndarray:
    """Samples with even ids are better, and of those the higher ids."""
    return np.where(ids_M % 2 == 0, 100.0 + ids_M, 0.0)


def make_online(prefix: Path, cursors: dict[str, int], score: Callable[..., Any] = scores_by_hand) -> OnlineStream:
    return OnlineStream(stream_of(prefix), CANDIDATES, KEPT, cursors, score)


def drawn(stream: OnlineStream, cursors: dict[str, int], steps: int, rank: int = 0, world: int = 1) -> list[list[int]]:
    """The sample ids of so many batches, as a run draws them."""
    batches = []
    for _ in range(steps):
        batches.append(stream.batch(cursors["selected"], BATCH, rank, world).ids.tolist())
        cursors["selected"] += BATCH
    return batches


def test_the_best_of_every_buffer_come_in_their_order(corpus: Path) -> None:
    """Three buffers of twelve candidates, eight of each kept."""
    cursors = {"all": 0, "selected": 0}
    found = drawn(make_online(corpus, cursors), cursors, steps=6)
    order = stream_of(corpus).samples(0, 3 * CANDIDATES)[1]
    for number in range(3):
        candidates = order[number * CANDIDATES : (number + 1) * CANDIDATES].tolist()
        best = sorted(candidates, key=lambda i: -scores_by_hand(0, np.array(i), True))[:KEPT]
        assert found[2 * number] + found[2 * number + 1] == [i for i in candidates if i in best]
    assert cursors == {"all": 3 * CANDIDATES, "selected": 3 * KEPT}


def test_it_reads_the_samples_that_it_names(corpus: Path) -> None:
    cursors = {"all": 5, "selected": 0}
    batch = make_online(corpus, cursors).batch(0, BATCH)
    assert np.array_equal(batch.tokens.numpy(), opened(corpus, SEQ_LENGTH).batch(batch.ids))
    assert cursors["all"] == 5 + CANDIDATES


def test_candidates_may_come_from_a_blend(tmp_path: Path, corpus: Path) -> None:
    """Of two datasets with samples of equal numbers."""
    other, cursors = random_corpus(tmp_path / "other", NUM_SAMPLES, SEQ_LENGTH, vocab=3), {"all": 0, "selected": 0}
    datasets = [opened(prefix, SEQ_LENGTH) for prefix in (corpus, other)]
    blend = Stream([shuffled(dataset, seed=3) for dataset in datasets])

    def score(which_M: Any, ids_M: Any, is_new: bool) -> np.ndarray:
        return which_M * 10.0 + (np.arange(len(ids_M)) < 4)

    batches = [OnlineStream(blend, CANDIDATES, KEPT, cursors, score).batch(0, KEPT) for _ in range(2)]
    for batch in batches:  # all six of the other one, and the first two of this one
        assert sorted(batch.which.tolist()) == [0, 0, 1, 1, 1, 1, 1, 1]
        expected = [datasets[which].sample(i) for which, i in zip(batch.which, batch.ids, strict=True)]
        assert np.array_equal(batch.tokens.numpy(), expected)
    taken = [list(zip(batch.which.tolist(), batch.ids.tolist(), strict=True)) for batch in batches]
    assert len(set(sum(taken, []))) == 2 * KEPT, "candidates come once"


@pytest.mark.parametrize("steps", range(1, 6))
def test_it_goes_on_from_its_cursors_alone(corpus: Path, steps: int) -> None:
    """A new object after any step gives what the old one would have, and says that a buffer is scored again."""
    whole_cursors, cursors, new = {"all": 7, "selected": 0}, {"all": 7, "selected": 0}, []
    whole = drawn(make_online(corpus, whole_cursors), whole_cursors, 6)
    found = drawn(make_online(corpus, cursors), cursors, steps)

    def score(which_M: Any, ids_M: Any, is_new: bool) -> np.ndarray:
        new.append(is_new)
        return scores_by_hand(which_M, ids_M, is_new)

    found += drawn(make_online(corpus, cursors, score), cursors, 6 - steps)
    assert found == whole and cursors == whole_cursors
    assert new[0] == (steps % 2 == 0)


@pytest.mark.parametrize("world", [2, 4])
def test_data_ranks_share_a_batch(corpus: Path, world: int) -> None:
    """Each with a stream and cursors of its own."""
    (whole, *parts) = (
        drawn(make_online(corpus, cursors), cursors, 4, rank, size)
        for rank, size in [(0, 1), *((rank, world) for rank in range(world))]
        for cursors in [{"all": 0, "selected": 0}]
    )
    assert [sum(batches, []) for batches in zip(*parts, strict=True)] == whole


def test_another_size_of_buffer_begins_a_new_one(corpus: Path) -> None:
    """Whoever changes it in the midst of a buffer loses what was left of that, and no more."""
    cursors = {"all": 0, "selected": 0}
    drawn(make_online(corpus, cursors), cursors, 1)
    larger = OnlineStream(stream_of(corpus), 2 * CANDIDATES, KEPT, cursors, scores_by_hand)
    assert len(drawn(larger, cursors, 3)[0]) == BATCH
    assert cursors["all"] == CANDIDATES + 2 * 2 * CANDIDATES


def scores_here(
    prefix: Path, model: ModelConfig, data: DataConfig | None = None, **layout: Any
) -> tuple[np.ndarray, int]:
    """The scores of 21 samples on the ranks that are running, in float64, and passes of this rank."""
    mesh = make_mesh(ParallelConfig(**layout)) if torch.distributed.is_initialized() else Mesh.single()
    teacher = load_model(make_source(model), mesh.without_pipeline(), torch.float64)
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    teacher.register_forward_hook(count)
    stream, config = stream_of(prefix, data is not None), replace(CONFIG, data=data or CONFIG.data)
    return score_candidates(teacher, stream, *stream.samples(3, 21), config, mesh), passes


@pytest.mark.parametrize("model", [SMALL, TIED], ids=["untied", "tied"])
def test_scores_are_those_of_score_corpus(tmp_path: Path, corpus: Path, model: ModelConfig) -> None:
    """In float64, in which the size of a batch does not show."""
    settings = ScoreSettings(top_k=TOP_K, dtype=torch.float64, skip_source_check=True)
    dataset = opened(corpus, SEQ_LENGTH)
    score_corpus(make_source(model), dataset, tmp_path / "scores", Mesh.single(), settings)
    expected = read_scores(tmp_path / "scores", dataset).values["median_in_top_k"]
    ids = stream_of(corpus).samples(3, 21)[1]
    assert np.array_equal(scores_here(corpus, model)[0], expected[ids])


def test_documents_are_seen_as_in_training(tmp_path: Path) -> None:
    """As by a pass over the corpus that is told so, where the teacher sees whole sequences and where it sees parts."""
    corpus = write_documents(tmp_path / "corpus", [5, 7, 3, 20, 6] * 10)
    flags = {"mask_documents": True, "reset_positions": True}
    settings = ScoreSettings(top_k=TOP_K, dtype=torch.float64, skip_source_check=True, **flags)
    dataset = opened(corpus, SEQ_LENGTH)
    score_corpus(make_source(TIED), dataset, tmp_path / "scores", Mesh.single(), settings)
    expected = read_scores(tmp_path / "scores", dataset).values["median_in_top_k"][stream_of(corpus).samples(3, 21)[1]]
    assert np.array_equal(scores_here(corpus, TIED, DOCUMENTS)[0], expected)
    assert not np.allclose(scores_here(corpus, TIED)[0], expected, atol=1e-3), "documents should matter"
    for values, _ in run_ranks(scores_here, 2, corpus, TIED, DOCUMENTS, context=2):
        assert np.allclose(values, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("world", "layout", "passes"),
    [
        (2, {}, [2, 1]),
        (2, {"pipeline": 2}, [2, 1]),
        (3, {}, [1, 1, 1]),
        (2, {"tensor": 2}, [3, 3]),
        (2, {"context": 2}, [3, 3]),
        (4, {"tensor": 2, "sequence_parallel": True}, [2, 2, 1, 1]),
    ],
    ids=str,
)
def test_ranks_share_the_candidates(corpus: Path, world: int, layout: dict[str, Any], passes: list[int]) -> None:
    """Three pieces of at most eight; scores are the same on every rank, and to the bit where no product is cut."""
    expected, _ = scores_here(corpus, SMALL)
    found = run_ranks(scores_here, world, corpus, SMALL, **layout)
    assert [count for _, count in found] == passes
    for values, _ in found:
        assert np.array_equal(values, found[0][0])
        assert np.allclose(values, expected, rtol=0, atol=1e-6)
        if not layout or "pipeline" in layout:
            assert np.array_equal(values, expected)


def test_pieces_begin_at_fixed_candidates_in_any_layout(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So float32 scores have the same bits however many ranks share them; a different cut could change the last one."""
    seen: list[int] = []

    def score(model: Transformer, tokens: torch.Tensor, told: Any, top_k: int) -> dict[str, np.ndarray]:
        seen.append(len(tokens))
        return {name: np.zeros(len(tokens), np.float32) for name in (SALT.score, "mean_nll")}

    monkeypatch.setattr(online, "score_samples", score)
    stream = stream_of(corpus)
    score_candidates(make_model(SMALL), stream, *stream.samples(0, 21), CONFIG, Mesh.single())
    assert seen == [8, 8, 5]


def damaged_here(prefix: Path, score: Any) -> None:
    """Scores with a teacher that knows nothing of what comes after one token."""
    mesh = make_mesh(ParallelConfig())
    state = dict(make_model(SMALL).named_parameters())
    state["embedding.tokens"][7] = torch.nan
    teacher = load_model(source_of(state, SMALL, "damaged"), mesh.without_pipeline(), torch.float64)
    stream = stream_of(prefix)
    config = Config(salt=SaltConfig(score=score))
    score_candidates(teacher, stream, *stream.samples(0, 9), config, mesh)


@pytest.mark.parametrize("score", ["mean_nll", "median_zero", "median_in_top_k"])
def test_losses_that_are_not_finite_are_refused_on_every_rank(tmp_path: Path, score: str) -> None:
    """A single one, the last of a sample, of which a median would say nothing."""
    ids = stream_of(random_corpus(tmp_path / "corpus", NUM_SAMPLES, SEQ_LENGTH)).samples(0, 9)[1]
    tokens = [1] * (NUM_SAMPLES * SEQ_LENGTH + 1)
    tokens[(int(ids[4]) + 1) * SEQ_LENGTH - 1] = 7
    prefix = write_corpus(tmp_path / "damaging", tokens)
    with pytest.raises(DataError, match=f"sample {ids[4]} has a loss that is not finite under salt.teacher"):
        run_ranks(damaged_here, 2, prefix, score)


def test_a_teacher_that_scores_keeps_its_head() -> None:
    """On every pipeline rank; others drop it (test_teacher.py)."""
    teacher = Teacher(make_source(SMALL), Mesh.single(), SALT, SMALL)
    teacher.attach(None)
    assert isinstance(teacher.model, Transformer) and teacher.model.head.weight is not None
