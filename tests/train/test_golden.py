"""Golden curves: the losses of three tiny runs, as they were when these numbers were written.

If you did not mean to change what a run computes, a failure here is a bug. If you did, say so in your note, and write
the new numbers with `python -m tests.train.test_golden` (PYTHONPATH=.:kernels).
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from megagrow.config import Config, GrowthConfig, SaltConfig
from megagrow.train import run
from tests.models import as_gpt2
from tests.train.runs import LARGE, SMALL, make_config, make_corpus, metrics

GOLDEN = Path(__file__).with_name("golden.json")
GPT2 = as_gpt2(SMALL)


def make_runs(folder: Path) -> dict[str, Config]:
    """The runs by name, each needing those before it."""
    corpus = make_corpus(folder / "corpus")
    maps: Any = {"ligo_variant": "tied", "ligo_steps": 3, "ligo_lr": 3e-3}
    growth = GrowthConfig(method="ligo", source=SMALL, at_step=4, optimizer="reset", rewarmup_steps=2, **maps)
    llama = make_config(corpus, folder / "llama", steps=30)
    return {
        "llama": llama,
        "gpt2": make_config(corpus, folder / "gpt2", steps=10, model=GPT2),
        "grown_salt": make_config(
            corpus,
            folder / "grown_salt",
            steps=10,
            model=LARGE,
            growth=growth,
            salt=SaltConfig(teacher=str(folder / "llama"), steps=3),
        ),
    }


def losses(folder: Path) -> dict[str, list[float]]:
    """The training losses of every run."""
    found = {}
    for name, config in make_runs(folder).items():
        assert run(config) == 0
        found[name] = [line["loss"] for line in metrics(Path(config.run.dir))]
    return found


def test_losses_are_those_that_were_written_down(tmp_path: Path) -> None:
    expected, found = json.loads(GOLDEN.read_text()), losses(tmp_path)
    assert found.keys() == expected.keys()
    for name, curve in found.items():
        # Bits depend on the processor's instructions; 1e-5 is far below what any change of the numerics moves.
        assert curve == pytest.approx(expected[name], rel=1e-5), name


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        GOLDEN.write_text(json.dumps(losses(Path(scratch)), indent=1) + "\n")
