"""What ledgers say of each phase against torch's own counter, with attention as plain matrix products.

The counter sees nothing of fused attention on a CPU, so that it is written out here; it counts all pairs of positions,
as the convention of ledgers does.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megagrow import cpu_ops, flops
from megagrow.checkpoint.source import CHECK_SAMPLES, open_source
from megagrow.config import Config, GrowthConfig, InitConfig, ModelConfig, OptimConfig, SaltConfig, TrainConfig
from megagrow.data.dataset import PackedDataset
from megagrow.ledger import Ledger
from megagrow.parallel.mesh import Mesh
from megagrow.salt import ScoreSettings, read_scores, score_corpus
from megagrow.train import growing, run
from megagrow.train.salt_stage import SaltStage
from megagrow.train.trainer import Trainer
from tests.models import as_gpt2
from tests.train.runs import make_config

LENGTH, BATCH = 32, 8
SMALL = ModelConfig(vocab_size=256, hidden_size=32, num_layers=2, num_heads=4, ffn_size=80, max_seq_length=LENGTH)
LARGE = replace(SMALL, hidden_size=64, num_layers=4, num_heads=8, num_kv_heads=8, ffn_size=160)
AGREES = 0.02


def plain_attention(q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
    """Causal attention over all pairs, the later ones masked."""
    times = q_BNSD.shape[1] // k_BKTD.shape[1]
    k_BNTD, v_BNTD = (x.repeat_interleave(times, 1) for x in (k_BKTD, v_BKTD))
    scores_BNST = q_BNSD @ k_BNTD.transpose(2, 3) * q_BNSD.shape[3] ** -0.5
    later = torch.ones(scores_BNST.shape[-2:], dtype=torch.bool).triu(1)
    return scores_BNST.masked_fill(later, -torch.inf).softmax(-1) @ v_BNTD


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """FLOPs by phase, as torch counts them while a run is under way."""
    found: Counter[str] = Counter()

    def watch(owner: Any, name: str, phase: Callable[..., str]) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            now = phase(*args)
            with FlopCounterMode(display=False) as counter:
                result = original(*args, **kwargs)
            found[now] += counter.get_total_flops()
            return result

        monkeypatch.setattr(owner, name, watched)

    monkeypatch.setattr(cpu_ops, "causal_attention", plain_attention)
    watch(Trainer, "_learn", lambda self, salt: self.state.phase.replace("main", "salt" if salt else "train"))
    watch(Trainer, "_validate", lambda self, learner: "evaluation")
    watch(SaltStage, "teach", lambda *_: "teacher")
    watch(SaltStage, "_score", lambda *_: "scoring")
    watch(growing, "begin", lambda *_: "growth")
    return found


def settings(corpus: Path, directory: Path, **sections: Any) -> Config:
    """Three steps of the large model on longer samples than other tests have."""
    config = make_config(corpus, directory, 3, model=LARGE)
    data = replace(config.data, seq_length=LENGTH)
    train = TrainConfig(steps=3, global_batch_size=BATCH, eval_interval=2, eval_batches=2)
    return replace(config, data=data, train=train, optim=OptimConfig(lr=1e-3, warmup_steps=1), **sections)


def spent(directory: Path) -> dict[str, float]:
    """FLOPs by phase, as the ledger says."""
    found: Counter[str] = Counter()
    for phase in Ledger.load(directory / "ledger.json").phases:
        assert phase.flops is not None
        found[phase.phase] += int(phase.flops)
    return dict(found)


@pytest.fixture(scope="module")
def small(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The run directory of a small model."""
    directory = tmp_path_factory.mktemp("small")
    config = settings(corpus, directory)
    optim = OptimConfig(lr=1e-2, warmup_steps=5)
    assert run(replace(config, model=SMALL, train=replace(config.train, steps=40, eval_interval=0), optim=optim)) == 0
    return str(directory)


@pytest.mark.parametrize("model", [LARGE, replace(LARGE, num_kv_heads=2), as_gpt2(LARGE)], ids=["llama", "gqa", "gpt2"])
def test_training_and_evaluation(model: ModelConfig, corpus: Path, tmp_path: Path, counted: Counter[str]) -> None:
    config = settings(corpus, tmp_path)
    assert run(replace(config, model=model)) == 0
    assert spent(tmp_path) == pytest.approx(dict(counted), rel=AGREES)
    assert set(counted) == {"train", "evaluation"}


@pytest.mark.parametrize("variant", ["tied", "target_layer"])
def test_learning_maps(variant: Any, small: str, corpus: Path, tmp_path: Path, counted: Counter[str]) -> None:
    growth = GrowthConfig("ligo", ligo_variant=variant, ligo_steps=2)
    assert run(settings(corpus, tmp_path, growth=growth, init=InitConfig(small))) == 0
    assert set(counted) == {"ligo", "growth", "train", "evaluation"}
    assert spent(tmp_path) == pytest.approx(dict(counted), rel=AGREES)


def test_learning_maps_from_a_teacher_too(small: str, corpus: Path, tmp_path: Path, counted: Counter[str]) -> None:
    sections = {"growth": GrowthConfig("ligo", ligo_steps=2), "salt": SaltConfig(small, map_weight=0.5)}
    assert run(settings(corpus, tmp_path, init=InitConfig(small), **sections)) == 0
    del counted["teacher"]  # its body's; what is counted in a step holds it, and its head's
    found = spent(tmp_path)
    found["ligo"] += found.pop("teacher")
    assert set(counted) == {"ligo", "growth", "train", "evaluation"}
    assert found == pytest.approx(dict(counted), rel=AGREES)


def test_stage_one(small: str, corpus: Path, tmp_path: Path, counted: Counter[str]) -> None:
    """The teacher works inside a step, its body before the student and its head with the student's."""
    assert run(settings(corpus, tmp_path, salt=SaltConfig(small, steps=2))) == 0
    found, body = spent(tmp_path), counted.pop("teacher")
    assert set(counted) == {"salt", "train", "evaluation"}
    head = 2 * 2 * BATCH * LENGTH * SMALL.vocab_size * SMALL.hidden_size
    assert found["teacher"] == pytest.approx(body + head, rel=AGREES)
    counted["salt"] -= body + head
    del found["teacher"]
    assert found == pytest.approx(dict(counted), rel=AGREES)


def test_scoring_on_the_way(small: str, corpus: Path, tmp_path: Path, counted: Counter[str]) -> None:
    """At weight 0 the teacher picks the data and says nothing about them."""
    salt = SaltConfig(small, steps=2, weight=0.0, online_buffer=4)
    assert run(settings(corpus, tmp_path, salt=salt)) == 0
    counted["salt"] -= counted["scoring"] + counted.pop("teacher")
    assert set(counted) == {"salt", "scoring", "train", "evaluation"}
    assert spent(tmp_path) == pytest.approx(dict(counted), rel=AGREES)


def test_scoring_a_corpus(small: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_ops, "causal_attention", plain_attention)
    source, dataset = open_source(small), PackedDataset(corpus / "train", LENGTH)
    tokens, check = (flops.forward_flops(SMALL, n * LENGTH, LENGTH) for n in (dataset.num_samples, CHECK_SAMPLES))
    with FlopCounterMode(display=False) as counter:
        score_corpus(source, dataset, tmp_path, Mesh.single(), ScoreSettings(), tokens)
    cost = read_scores(tmp_path, dataset).cost
    assert cost.flops == pytest.approx(counter.get_total_flops() - check, rel=AGREES)
