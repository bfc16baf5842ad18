"""Scoring a corpus beside Hugging Face transformers: the same weights and samples, in bf16. `salt.py` is the way in.

Ours is `score_corpus`, which tools/score_corpus.py calls, and its seconds are those of its manifest. The reference is a
forward pass of transformers' Llama, log-softmax in float32 and top-k, with SDPA, and the same under torch.compile as a
whole; it ends with the same figures of each sample. Both read one folder of weights and one of tokens, in batches of as
many samples, after a corpus of one batch that does not count. Arms alternate, each in processes of its own.

The output matrix is the embedding, and every second token repeats the one before it, so that half of the labels are
among the likeliest tokens of a model that nobody has trained.
"""

import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from processes import launch, tell
from results_file import Row
from torch import Tensor
from train_step import LOSSES_AGREE, MODEL

from megagrow.checkpoint.hf import write_hf_folder
from megagrow.checkpoint.source import open_source
from megagrow.data.dataset import PackedDataset
from megagrow.data.indexed import IndexedWriter
from megagrow.model.transformer import initial_value
from megagrow.parallel.mesh import Mesh
from megagrow.roles import TIED_EMBEDDING, role_of, shape_of
from megagrow.salt import ScoreSettings, read_scores, score_corpus

SAMPLES, BATCH, TOP_K, ROUNDS = 32, 4, 10, 3
DTYPE = torch.bfloat16
LENGTH = MODEL.max_seq_length
FASTER, SHARES_AGREE = 1.3, 0.01
REFERENCES = {"SDPA": False, "SDPA, compiled": True}
OURS = {"ours": False, "ours, compiled": True}
WARM_UP, CORPUS = "warm-up", "corpus"
Found = dict[str, Any]


def make_inputs(folder: Path) -> None:
    """The folder of weights, and two corpora."""
    write_hf_folder(folder / "model", MODEL, weight, dtype=DTYPE)
    for name, samples in ((WARM_UP, BATCH), (CORPUS, SAMPLES)):
        with IndexedWriter(folder / name, np.uint16) as writer:
            writer.add_document(tokens(samples * LENGTH + 1))
            writer.close()


def weight(name: str) -> Tensor:
    """An initial value; the output matrix has the embedding's."""
    like = TIED_EMBEDDING if name == "head.weight" else name
    return initial_value(like, shape_of(role_of(like), MODEL), MODEL, seed=0)


def tokens(count: int) -> np.ndarray:
    """Random ones, every second of which comes twice."""
    drawn = np.random.default_rng(0).integers(MODEL.vocab_size, size=-(-count // 2))
    return drawn.repeat(2)[:count]


def score_ours(folder: Path, arm: str) -> Found:
    """Scores the warm-up, then the corpus."""
    source = open_source(folder / "model")
    how: dict[str, Any] = {"dtype": DTYPE, "batch_size": BATCH, "compile": OURS[arm]}
    settings = ScoreSettings(top_k=TOP_K, skip_source_check=True, **how)
    with tempfile.TemporaryDirectory() as output:
        for name in (WARM_UP, CORPUS):
            dataset = PackedDataset(folder / name, LENGTH, MODEL.vocab_size)
            score_corpus(source, dataset, Path(output) / name, Mesh.single(), settings)
        scores = read_scores(Path(output) / CORPUS, dataset)
    values = {name: x.tolist() for name, x in scores.values.items()}
    return {"seconds": scores.cost.seconds, **values}


@torch.no_grad()
def score_reference(folder: Path, arm: str) -> Found:
    """The same by transformers."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=DTYPE, attn_implementation="sdpa")
    token_scores = partial(reference_scores, model.eval())
    run = torch.compile(token_scores) if REFERENCES[arm] else token_scores
    for name in (WARM_UP, CORPUS):
        dataset, parts = PackedDataset(folder / name, LENGTH, MODEL.vocab_size), []
        began = time.perf_counter()
        for start in range(0, dataset.num_samples, BATCH):
            tokens_BS1 = torch.from_numpy(dataset.batch(range(start, start + BATCH)))
            parts.append(sample_values(*run(tokens_BS1[:, :-1].contiguous(), tokens_BS1[:, 1:].contiguous())))
        seconds = time.perf_counter() - began
    return {"seconds": seconds, **{key: torch.cat([part[key] for part in parts]).tolist() for key in parts[0]}}


def reference_scores(model: Any, inputs_BS: Tensor, labels_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihoods of the labels, and which of them are in the top k."""
    logits_BSV, labels_BS1 = model(input_ids=inputs_BS, use_cache=False).logits, labels_BS[..., None]
    nll_BS = -logits_BSV.log_softmax(-1, dtype=torch.float32).gather(-1, labels_BS1)[..., 0]
    return nll_BS, (logits_BSV.topk(TOP_K).indices == labels_BS1).any(-1)


def sample_values(nll_BS: Tensor, inside_BS: Tensor) -> dict[str, Tensor]:
    """The figures of each sample by the names of ours."""
    zeroed_BS, fraction_B = nll_BS.where(inside_BS, 0.0), inside_BS.double().mean(-1)
    median_B = nll_BS.where(inside_BS, torch.nan).nanmedian(-1).values.nan_to_num(0.0)
    values = {"median_in_top_k": median_B, "median_zero": zeroed_BS.median(-1).values}
    return values | {"mean_nll": nll_BS.mean(-1), "in_top_k_fraction": fraction_B}


def measure() -> dict[str, list[Found]]:
    """What every arm finds, in rounds."""
    found: dict[str, list[Found]] = {arm: [] for arm in (*REFERENCES, *OURS)}
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder))
        for _ in range(ROUNDS):
            for arm, runs in found.items():
                runs += launch(__file__, folder, arm)
    return found


def rows_of(found: dict[str, list[Found]]) -> list[Row]:
    """Tokens per second of every arm, ours against the fastest reference, and how far apart the scores are."""
    speed = {arm: SAMPLES * LENGTH / statistics.median(run["seconds"] for run in runs) for arm, runs in found.items()}
    rows = [Row(f"scoring, {arm}: tokens per second, bf16", value, "token/s") for arm, value in speed.items()]
    best, ours = max(REFERENCES, key=lambda arm: speed[arm]), max(OURS, key=lambda arm: speed[arm])
    times = speed[ours] / speed[best]
    rows.append(Row(f"scoring, {ours} to transformers, {best}", times, "x", f">= {FASTER}", times >= FASTER))
    for name, bound, unit in (
        ("mean_nll", LOSSES_AGREE["bf16"], "nats"),
        ("median_in_top_k", None, "nats"),
        ("in_top_k_fraction", SHARES_AGREE, ""),
    ):
        apart = max(abs(a - b) for a, b in zip(found[ours][0][name], found[best][0][name], strict=True))
        judged = () if bound is None else (f"<= {bound}", apart <= bound)
        rows.append(Row(f"scoring, {name} of a sample, {ours} and {best} at most apart", apart, unit, *judged))
    return rows


if __name__ == "__main__":
    torch.set_num_threads(2)
    score = score_reference if sys.argv[2] in REFERENCES else score_ours
    tell(score(Path(sys.argv[1]), sys.argv[2]))
