"""Scoring a corpus: right, resumable, and the same however the work is shared."""

import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megagrow.config import ModelConfig
from megagrow.data import indexed
from megagrow.data.indexed import IndexedWriter
from megagrow.errors import ConfigError, DataError
from megagrow.parallel.context import restarted_positions
from megagrow.parallel.mesh import Mesh
from megagrow.salt import score as score_module
from megagrow.salt import sharded
from megagrow.salt.records import MANIFEST_FILE
from megagrow.salt.score import ScoreSettings, score_corpus
from megagrow.salt.score_files import SCORES_FILE, Scores, read_scores
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

SEQ_LENGTH = 8
NUM_SAMPLES = 23
TOP_K = 5
SETTINGS = ScoreSettings(top_k=TOP_K, dtype=torch.float32, batch_size=4, shard_size=4, skip_source_check=True)
DOUBLE = replace(SETTINGS, dtype=torch.float64)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return random_corpus(tmp_path / "corpus", NUM_SAMPLES, SEQ_LENGTH)


def score(
    prefix: Path,
    output: Path,
    settings: ScoreSettings = SETTINGS,
    model: ModelConfig = SMALL,
    tensor: int = 1,
    pipeline: int = 1,
    flops: float | None = None,
) -> None:
    """Scores in the ranks that are running."""
    mesh = mesh_of(tensor, pipeline) if torch.distributed.is_initialized() else Mesh.single()
    score_corpus(make_source(model), opened(prefix, SEQ_LENGTH), output, mesh, settings, flops)


def read(prefix: Path, output: Path) -> Scores:
    return read_scores(output, opened(prefix, SEQ_LENGTH))


@pytest.mark.parametrize("model", [SMALL, TIED], ids=["untied", "tied"])
def test_scores_follow_from_the_logits(tmp_path: Path, corpus: Path, model: ModelConfig) -> None:
    """Every score against softmax, sort and median_low, sample by sample."""
    score(corpus, tmp_path / "scores", DOUBLE, model, flops=7e9)
    scores = read(corpus, tmp_path / "scores")
    small, dataset = make_model(model), opened(corpus, SEQ_LENGTH)
    medians = set()
    for i in range(NUM_SAMPLES):
        tokens = torch.from_numpy(dataset.sample(i))
        logits, labels = small.logits(tokens[None, :-1])[0], tokens[1:]
        nll = F.cross_entropy(logits, labels, reduction="none")
        order = logits.argsort(-1, descending=True)
        known = ((order == labels[:, None]).int().argmax(-1) < TOP_K).tolist()
        inside = [x for x, k in zip(nll.tolist(), known, strict=True) if k]
        zeroed = [x if k else 0.0 for x, k in zip(nll.tolist(), known, strict=True)]
        expected = {
            "median_in_top_k": statistics.median_low(inside) if inside else 0.0,
            "median_zero": statistics.median_low(zeroed),
            "mean_nll": nll.mean().item(),
            "in_top_k_fraction": sum(known) / SEQ_LENGTH,
        }
        medians.add(expected["median_in_top_k"])
        for name, value in expected.items():
            assert scores.values[name][i] == pytest.approx(value, rel=1e-6), (name, i)
    assert len(medians) > NUM_SAMPLES // 2, "the samples should differ"
    assert (scores.num_tokens == SEQ_LENGTH).all()
    assert scores.cost.flops == 7e9
    assert scores.cost.tokens == NUM_SAMPLES * SEQ_LENGTH
    assert scores.cost.seconds > 0
    assert scores.identity.model == "seed 0" and scores.identity.top_k == TOP_K
    assert sorted(path.name for path in (tmp_path / "scores").iterdir()) == [
        MANIFEST_FILE,
        SCORES_FILE,
    ]


@pytest.mark.parametrize("shard_size", [1, 6, 1000])
def test_the_size_of_shards_leaves_the_files_as_they_are(tmp_path: Path, corpus: Path, shard_size: int) -> None:
    score(corpus, tmp_path / "scores")
    score(corpus, tmp_path / "other", replace(SETTINGS, shard_size=shard_size))
    assert files(tmp_path / "other") == files(tmp_path / "scores")


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_the_size_of_batches_hardly_matters(tmp_path: Path, corpus: Path, batch_size: int) -> None:
    """A BLAS may sum in another order when a product has more rows, so only float64 is exact."""
    score(corpus, tmp_path / "scores", DOUBLE)
    score(corpus, tmp_path / "double", replace(DOUBLE, batch_size=batch_size))
    score(corpus, tmp_path / "single", replace(SETTINGS, batch_size=batch_size))
    assert files(tmp_path / "double") == files(tmp_path / "scores")
    double, single = (read(corpus, tmp_path / name).values for name in ("double", "single"))
    for name in double:
        np.testing.assert_allclose(single[name], double[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("world", "pipeline"), [(2, 1), (3, 1), (4, 2)])
def test_any_number_of_ranks_writes_the_same_files(tmp_path: Path, corpus: Path, world: int, pipeline: int) -> None:
    score(corpus, tmp_path / "scores")
    run_ranks(score, world, corpus, tmp_path / "other", pipeline=pipeline)  # in float32
    assert files(tmp_path / "other") == files(tmp_path / "scores")


@pytest.mark.parametrize("model", [SMALL, TIED], ids=["untied", "tied"])
def test_tensor_parallel_scores_agree(tmp_path: Path, corpus: Path, model: ModelConfig) -> None:
    """2 x 2 ranks; sums over hidden units come in another order, so float64, then equal files."""
    score(corpus, tmp_path / "scores", DOUBLE, model)
    run_ranks(score, 4, corpus, tmp_path / "other", DOUBLE, model, tensor=2)
    assert files(tmp_path / "other") == files(tmp_path / "scores")


@pytest.mark.parametrize("seq_length", [7, 8])
def test_tensor_parallel_scores_agree_on_four_ranks(tmp_path: Path, seq_length: int) -> None:
    """Two key/value heads on four ranks; odd and even lengths."""
    model = replace(SMALL, ffn_size=12)
    prefix = random_corpus(tmp_path / "corpus", 9, seq_length)

    run_ranks(score_to, 1, prefix, tmp_path / "one", model, seq_length, 1)
    run_ranks(score_to, 4, prefix, tmp_path / "four", model, seq_length, 4)
    assert files(tmp_path / "four") == files(tmp_path / "one")


def score_to(prefix: Path, output: Path, model: ModelConfig, seq_length: int, tensor: int) -> None:
    score_corpus(make_source(model), opened(prefix, seq_length), output, mesh_of(tensor), DOUBLE)


def test_the_end_of_a_document_is_a_token_like_others(tmp_path: Path) -> None:
    """Packed samples have no padding, attention crosses documents, and the tail belongs to no sample."""
    tokens = torch.randint(SMALL.vocab_size, (3 * SEQ_LENGTH + 5,), generator=torch.Generator().manual_seed(2)).tolist()
    one = write_corpus(tmp_path / "one", tokens)
    with IndexedWriter(tmp_path / "many", "<u2") as writer:
        for start, end in ((0, 3), (3, 3), (3, 8), (8, 20), (20, len(tokens))):
            writer.add_document(tokens[start:end])
    for prefix in (one, tmp_path / "many"):
        score(prefix, tmp_path / f"{prefix.name}-scores", DOUBLE)
    many_scores, one_scores = ((tmp_path / f"{name}-scores" / SCORES_FILE).read_bytes() for name in ("many", "one"))
    assert many_scores == one_scores
    assert read(one, tmp_path / "one-scores").num_tokens.tolist() == [SEQ_LENGTH] * 3


@pytest.mark.parametrize("flags", [(True, False), (False, True), (True, True)], ids=str)
def test_documents_are_seen_as_in_training(tmp_path: Path, flags: tuple[bool, bool]) -> None:
    """Attention inside of documents, positions from each one's beginning: the losses of a model that is told so."""
    dataset, model = opened(write_documents(tmp_path / "corpus", (5, 7, 3, 20, 6)), SEQ_LENGTH), make_model(TIED)
    ids = range(dataset.num_samples)
    tokens, documents = torch.from_numpy(dataset.batch(ids)), torch.from_numpy(dataset.documents(ids))
    told = {
        "documents": documents if flags[0] else None,
        "positions": restarted_positions(documents) if flags[1] else None,
    }
    settings = replace(DOUBLE, mask_documents=flags[0], reset_positions=flags[1])
    score_corpus(make_source(TIED), dataset, tmp_path / "scores", Mesh.single(), settings)
    logits = model(tokens[:, :-1], **told) @ model.head_VH.T
    expected = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(-1)
    scores = read_scores(tmp_path / "scores", dataset)
    assert scores.values["mean_nll"] == pytest.approx(expected.float().numpy(), rel=1e-6)
    crossing = F.cross_entropy(model.logits(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none").mean(-1)
    assert (crossing - expected).abs().max() > 0.01, "documents should matter"
    with pytest.raises(DataError, match="(mask_documents|reset_positions) is True, this scoring has False"):
        score_corpus(make_source(TIED), dataset, tmp_path / "scores", Mesh.single(), DOUBLE)


def score_and_die(prefix: Path, output: Path, after: int) -> None:
    with killed_before_rename(after):
        score(prefix, output)


@pytest.mark.parametrize("after", [0, 3, 6, 7], ids=["at_once", "shards", "scores", "manifest"])
def test_a_killed_scoring_goes_on_where_it_was(
    tmp_path: Path, corpus: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One identity, six shards, scores and manifest are renamed; killed before rename `after` +
    1.
    """
    score(corpus, tmp_path / "scores")
    with pytest.raises(RankError, match="ended with code -9"):
        run_ranks(score_and_die, 1, corpus, tmp_path / "killed", after)
    with pytest.raises(DataError, match=r"manifest.json: no such file"):
        read(corpus, tmp_path / "killed")
    finished = {path.name for path in (tmp_path / "killed").glob("shards/*.safetensors")}
    assert len(finished) == min(max(after - 1, 0), 6)

    done_again = []
    score_shard = score_module._score_shard
    monkeypatch.setattr(
        score_module,
        "_score_shard",
        lambda *args: done_again.append(args[3]) or score_shard(*args),
    )
    score(corpus, tmp_path / "killed")
    assert done_again == list(range(len(finished), 6))
    assert files(tmp_path / "killed") == files(tmp_path / "scores")
    assert not (tmp_path / "killed" / "shards").exists()


def test_an_interrupted_scoring_goes_on_with_other_ranks(tmp_path: Path, corpus: Path) -> None:
    score(corpus, tmp_path / "scores")
    with pytest.raises(RankError):
        run_ranks(score_and_die, 2, corpus, tmp_path / "killed", 2)
    run_ranks(score, 3, corpus, tmp_path / "killed")
    assert files(tmp_path / "killed") == files(tmp_path / "scores")


def test_seconds_add_up_over_interruptions(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(RankError):
        run_ranks(score_and_die, 1, corpus, tmp_path / "scores", 4)
    before = sum(float(shard_seconds(path)) for path in (tmp_path / "scores").glob("shards/*.safetensors"))
    score(corpus, tmp_path / "scores")
    assert read(corpus, tmp_path / "scores").cost.seconds > before > 0


def shard_seconds(path: Path) -> float:
    arrays = score_module.ShardFolder(path.parents[1])
    return arrays.read(int(path.stem), 4)[1]


def test_finished_scores_are_left_alone(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score(corpus, tmp_path / "scores")
    before = times(tmp_path / "scores")
    monkeypatch.setattr(sharded, "load_model", None)
    score(corpus, tmp_path / "scores", replace(SETTINGS, batch_size=3))
    assert before == times(tmp_path / "scores")


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("change", ["top_k", "dtype", "model", "corpus"])
def test_other_scores_are_never_overwritten(tmp_path: Path, corpus: Path, change: str, finished: bool) -> None:
    output = tmp_path / "scores"
    if finished:
        score(corpus, output)
    else:
        with pytest.raises(RankError):
            run_ranks(score_and_die, 1, corpus, output, 3)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    settings = {"top_k": replace(SETTINGS, top_k=3), "dtype": DOUBLE}.get(change, SETTINGS)
    source = make_source(SMALL, seed=1 if change == "model" else 0)
    if change == "corpus":
        corpus = random_corpus(tmp_path / "longer", NUM_SAMPLES + 1, SEQ_LENGTH)
    field = "corpus_sha256" if change == "corpus" else change
    with pytest.raises(DataError, match=rf"\.json: {field} is .*; choose another --output, or re") as e:
        score_corpus(source, opened(corpus, SEQ_LENGTH), output, Mesh.single(), settings)
    assert "\n" not in str(e.value)
    assert before == {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}


def test_shards_of_another_size_are_refused(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(RankError):
        run_ranks(score_and_die, 1, corpus, tmp_path / "scores", 3)
    with pytest.raises(DataError, match="shard_size is 4, this scoring has 8 .*earlier batch size"):
        score(corpus, tmp_path / "scores", replace(SETTINGS, batch_size=8))


def test_shards_without_an_identity_are_refused(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(RankError):
        run_ranks(score_and_die, 1, corpus, tmp_path / "scores", 3)
    (tmp_path / "scores" / "shards" / "identity.json").unlink()
    with pytest.raises(DataError, match=r"identity.json: no such file beside the shards"):
        score(corpus, tmp_path / "scores")


def test_other_peoples_files_beside_the_shards_survive(tmp_path: Path, corpus: Path) -> None:
    mine = tmp_path / "scores" / "shards" / "part-0.bin"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    score(corpus, tmp_path / "scores")
    score(corpus, tmp_path / "scores")
    assert [path.name for path in mine.parent.iterdir()] == [mine.name]
    assert mine.read_text() == "mine"


def test_a_refused_model_leaves_the_folder_free(tmp_path: Path, corpus: Path) -> None:
    """So that the corrected command is not refused for what the wrong one began."""
    with pytest.raises(DataError, match="do not fit this data"):
        score(corpus, tmp_path / "scores", replace(SETTINGS, skip_source_check=False))
    assert not (tmp_path / "scores").exists()


def test_a_model_that_does_not_fit_the_data_is_refused(tmp_path: Path, corpus: Path) -> None:
    """Random tokens and a random model: worse than chance."""
    with pytest.raises(DataError, match="has loss .* on the data, chance is 3.367"):
        score(corpus, tmp_path / "scores", replace(SETTINGS, skip_source_check=False))
    assert not (tmp_path / "scores" / MANIFEST_FILE).exists()


def test_losses_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """Token 7 stands in sample 5 alone, as an input."""
    tokens = [1] * (NUM_SAMPLES * SEQ_LENGTH + 1)
    tokens[5 * SEQ_LENGTH + 2] = 7
    prefix = write_corpus(tmp_path / "corpus", tokens)
    state = dict(make_model(SMALL).named_parameters())
    state["embedding.tokens"][7] = torch.nan
    source = source_of(state, SMALL, "damaged")
    with pytest.raises(DataError, match="sample 5 has a loss that is not finite under small: its"):
        score_corpus(source, opened(prefix, SEQ_LENGTH), tmp_path / "scores", Mesh.single(), SETTINGS)


def test_samples_longer_than_the_position_table_are_refused(tmp_path: Path) -> None:
    prefix = random_corpus(tmp_path / "corpus", 3, 17)
    with pytest.raises(ConfigError, match="seq_length=17 exceeds max_seq_length=16 of small"):
        score_corpus(make_source(TIED), opened(prefix, 17), tmp_path / "scores", Mesh.single(), SETTINGS)
    assert not (tmp_path / "scores").exists()


def test_a_tensor_axis_that_does_not_divide_the_model_is_refused(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(ConfigError, match="tensor=3 does not divide num_heads=4 of small; use 1, 2"):
        run_ranks(score, 3, corpus, tmp_path / "scores", tensor=3)


@pytest.mark.parametrize("name", ["top_k", "batch_size", "shard_size"])
def test_sizes_must_be_positive(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=0 must be positive"):
        replace(SETTINGS, **{name: 0})


def test_progress_reaches_the_number_of_samples(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(RankError):
        run_ranks(score_and_die, 1, corpus, tmp_path / "scores", 3)
    recorder = Recorder("scoring")
    score_corpus(
        make_source(SMALL),
        opened(corpus, SEQ_LENGTH),
        tmp_path / "scores",
        Mesh.single(),
        SETTINGS,
        progress=recorder,
    )
    assert recorder.steps == [12, 16, 20, 23]
    assert all(np.isfinite(recorder.speeds)) and min(recorder.speeds) > 0
    assert "small: loss" in recorder.messages[0]


def score_with_one_reader(prefix: Path, output: Path) -> None:
    """Only the first rank can hash."""
    if dist.get_rank() == 0:
        score(prefix, output)
        return
    with mock.patch.object(indexed, "hashlib", None):
        score(prefix, output)


def test_one_rank_reads_the_corpus_for_its_fingerprint(tmp_path: Path, corpus: Path) -> None:
    """Each would read all of it, before the first sample is scored."""
    run_ranks(score_with_one_reader, 2, corpus, tmp_path / "scores")
    assert read(corpus, tmp_path / "scores").identity.corpus_sha256 == opened(corpus, SEQ_LENGTH).indexed.fingerprint()


def progress_here(prefix: Path, output: Path) -> list[int]:
    recorder, mesh = Recorder("scoring"), mesh_of()
    score_corpus(
        make_source(SMALL),
        opened(prefix, SEQ_LENGTH),
        output,
        mesh,
        SETTINGS,
        progress=recorder if mesh.is_main else None,
    )
    return recorder.steps


def test_progress_counts_what_the_other_ranks_do(tmp_path: Path, corpus: Path) -> None:
    """Six shards on four ranks: the first two have two each, which end together."""
    first, *others = run_ranks(progress_here, 4, corpus, tmp_path / "scores")
    assert first == [11, 23]
    assert others == [[], [], []]


def test_a_cpu_keeps_its_memory_while_it_scores(tmp_path: Path, corpus: Path) -> None:
    with mock.patch.object(sharded, "keep_freed_memory") as keep:
        score(corpus, tmp_path / "scores")
    keep.assert_called_once_with()


def test_waiting_for_all_reads_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL only queues it: nobody would have waited for anybody."""
    read: list[str] = []
    monkeypatch.setattr(sharded, "sum_over", lambda *_: SimpleNamespace(item=lambda: read.append("item")))
    sharded.wait_for_all(Mesh.single())
    assert read == ["item"]
