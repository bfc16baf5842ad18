"""Does SALT pay? Teaching, selecting, both and neither, at equal FLOPs, at toy scale on the built-in corpus.

    python benchmarks/toy_salt.py              # half an hour on two cores; run again, it goes on where it was
    python benchmarks/toy_salt.py --seeds 4 5  # other seeds
    python benchmarks/toy_salt.py --quick      # each arm once, few steps, no results: shows that it works

A seed's teacher, a third of the student, is trained first and scores the corpus; each arm then trains the student from
the same random weights, two runs at a time, one thread each. All arms end at the same all-in FLOPs: who needs the
teacher has shorter runs by what its training, its passes and its scores have cost. The second baseline is shorter, too,
by the teacher's training alone: it ends where the others do if the teacher is a gift, as the paper takes it.

Every arm has three tries, on seed 0 only: the baseline three learning rates, of which all arms then have the best, the
others three settings of their own. What ended lowest runs on seeds that nothing was chosen on. Results go to
benchmarks/results/toy_salt.json: loss of the whole validation split in nats per token.
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import results_file

from megagrow import flops
from megagrow.checkpoint.source import open_source
from megagrow.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    InitConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SaltConfig,
    TrainConfig,
)
from megagrow.data.builtin import SPLITS, build_corpus
from megagrow.data.dataset import PackedDataset
from megagrow.parallel.mesh import Mesh
from megagrow.presets import llama_model
from megagrow.report.run import Run, load_run
from megagrow.salt import ScoreSettings, score_corpus
from megagrow.train import run

VOCAB, LENGTH, BATCH = 2048, 128, 8
STUDENT = llama_model(6, 128, 32, 352, VOCAB, LENGTH)
TEACHER = llama_model(3, 96, 32, 256, VOCAB, LENGTH)
TEACHER_LR = 4e-3  # the quickstart's sweep for this model
LRS = (1e-3, 2e-3, 4e-3)
SHARE, WEIGHT, KEEP = 36 / 208, 0.5, 0.5  # the paper's share; weight and what is kept are open there: our defaults
MORE_WEIGHT, OTHER_KEEP = 0.75, 0.25
TEACHER_ORDER = 1000  # added to the seed of the teacher's data: it does not see them in the student's order


@dataclass(frozen=True)
class Plan:
    """How long everything takes."""

    steps: int = 600  # of the baseline
    teacher_steps: int = 300
    limit_bytes: int = 2_000_000  # of the corpus, which the longest run sees about once


@dataclass(frozen=True)
class Arm:
    """A way to train the student, with its settings.

    Attributes:
        name: of the arm, whatever the settings.
        share: of its steps that stage 1 takes.
        weight: of the teacher in stage 1; 0: nobody teaches.
        keep: share of the samples that stage 1 draws from; 1: all.
        is_given: the teacher's training counts, though the arm makes no use of it.
        lr: peak learning rate.
    """

    name: str
    share: float = 0.0
    weight: float = 0.0
    keep: float = 1.0
    is_given: bool = False
    lr: float = LRS[1]

    def tries(self) -> list["Arm"]:
        """Itself, and with two other settings."""
        if self.share == 0:
            return [replace(self, lr=lr) for lr in LRS]
        if self.share == 1:
            return [self, replace(self, weight=MORE_WEIGHT), replace(self, weight=1 - MORE_WEIGHT)]
        own = {"keep": OTHER_KEEP} if self.keep < 1 else {"weight": MORE_WEIGHT}
        return [self, replace(self, share=2 * self.share), replace(self, **own)]

    @property
    def label(self) -> str:
        """Names its runs."""
        settings = f"{self.lr:.2g}-{self.share:.2g}-{self.weight:g}-{self.keep:g}"
        return f"{self.name}-{settings}".replace(" ", "-")


BASELINE, SHORT = "baseline", "baseline, teacher given"
ARMS = [
    Arm(BASELINE),
    Arm(SHORT, is_given=True),
    Arm("KD throughout", 1.0, WEIGHT),
    Arm("SALT", SHARE, WEIGHT),
    Arm("SALT and selection", SHARE, WEIGHT, KEEP),
    Arm("selection", SHARE, keep=KEEP),
]

Rows = list[dict[str, Any]]
Measure = Callable[[list[tuple[Arm, int]]], Rows]


@dataclass(frozen=True)
class Bench:
    """All runs in one folder, in which finished ones are found again."""

    folder: Path
    plan: Plan
    num_samples: int  # of the corpus
    num_held_out: int

    def config(self, name: str, seed: int, of: ModelConfig, steps: int, lr: float) -> Config:
        data = self.folder / "data"
        return Config(
            model=of,
            data=DataConfig(str(data / "train"), str(data / "validation"), seq_length=LENGTH, seed=seed),
            train=TrainConfig(
                steps=steps,
                global_batch_size=BATCH,
                eval_interval=0,
                eval_batches=self.num_held_out // BATCH,
                seed=seed,
                threads=1,
            ),
            optim=OptimConfig(lr=lr, warmup_steps=20, decay_fraction=0.4),
            checkpoint=CheckpointConfig(interval=200, keep_last=1),
            init=InitConfig(skip_source_check=True),  # the teacher was trained on this data
            run=RunConfig(dir=str(self.folder / f"{name}-{seed}"), timeout=86_400),  # a shared machine may halt us
        )

    def teacher(self, seed: int) -> Config:
        config = self.config("teacher", seed, TEACHER, self.plan.teacher_steps, TEACHER_LR)
        return replace(config, data=replace(config.data, seed=seed + TEACHER_ORDER))

    def student(self, arm: Arm, seed: int) -> Config:
        steps = self.steps(arm)
        config = self.config(arm.label, seed, STUDENT, steps, arm.lr)
        salt = SaltConfig(
            teacher=self.teacher(seed).run.dir if arm.weight else "",
            steps=round(arm.share * steps),
            weight=arm.weight,
            scores=self.scores(seed) if arm.keep < 1 else "",
            keep_fraction=arm.keep,
        )
        return replace(config, salt=salt) if arm.share else config

    def scores(self, seed: int) -> str:
        return str(self.folder / f"scores-{seed}")

    def steps(self, arm: Arm) -> int:
        """Of the student, so that every arm ends at the same all-in FLOPs; the second baseline without a part."""
        tokens = BATCH * LENGTH
        step, teaching = flops.training_flops(STUDENT, tokens, LENGTH), flops.forward_flops(TEACHER, tokens, LENGTH)
        left, selects = self.plan.steps * step, arm.keep < 1
        if arm.weight or selects or arm.is_given:
            left -= self.plan.teacher_steps * flops.training_flops(TEACHER, tokens, LENGTH)
        if selects:
            left -= self.scoring_flops
        return round(left / (step + (arm.share * teaching if arm.weight else 0.0)))

    @property
    def scoring_flops(self) -> float:
        return flops.forward_flops(TEACHER, self.num_samples * LENGTH, LENGTH)

    def prepare(self, seed: int) -> dict[str, Any]:
        """A seed's teacher and its scores."""
        ended = carried_out(self.teacher(seed))
        dataset = PackedDataset(self.folder / "data/train", LENGTH, VOCAB)
        source, settings = open_source(ended.path), ScoreSettings(skip_source_check=True)
        score_corpus(source, dataset, self.scores(seed), Mesh.single(), settings, self.scoring_flops)
        spent = {"flops": ended.cost("all_in", "flops"), "scoring_flops": self.scoring_flops}
        return {"seed": seed, "lr": TEACHER_LR, "loss": ended.final_loss, **spent}

    def measure(self, arm: Arm, seed: int) -> dict[str, Any]:
        """One run of the student."""
        config = self.student(arm, seed)
        ended = carried_out(config)
        if arm.keep < 1:  # scores name their scorer, but not what its training has cost
            teacher = load_run(Path(self.teacher(seed).run.dir))
            ended.ledger.inherit("scorer", open_source(teacher.path).identity, teacher.ledger)
        spent = {f"{name}_flops": ended.cost(name, "flops") for name in ("all_in", "papers_convention")}
        settings = {**asdict(arm), "steps": config.train.steps, "stage_one_steps": config.salt.steps}
        return {"seed": seed, **settings, **spent, "loss": ended.final_loss}


def carried_out(config: Config) -> Run:
    """The run, from wherever an earlier call has left it."""
    path = Path(config.run.dir)
    found = load_run(path) if (path / "config.json").is_file() else None
    if found is not None and found.config != config:
        sys.exit(f"{path} is a run of other settings; remove it, or use another --folder")
    if found is None or found.unfinished:
        assert run(config) == 0
        found = load_run(path)
    return found


def choose(measure: Measure) -> tuple[list[Arm], Rows]:
    """The settings of each arm that end lowest on seed 0, and all that were tried."""
    rates = ARMS[0].tries()
    rows = measure([(each, 0) for each in rates])
    lr = lowest(rates, rows)[BASELINE].lr
    tries = [replace(each, lr=lr) for arm in ARMS if arm.share for each in arm.tries()]
    tried = measure([(each, 0) for each in tries])
    best = lowest(tries, tried)
    return [best.get(arm.name, replace(arm, lr=lr)) for arm in ARMS], rows + tried


def lowest(tries: list[Arm], rows: Rows) -> dict[str, Arm]:
    """By name of the arm the try that ended lowest; of equal ones the first."""
    losses = dict(zip(tries, (row["loss"] for row in rows), strict=True))
    names = dict.fromkeys(each.name for each in tries)
    return {name: min((each for each in tries if each.name == name), key=losses.__getitem__) for name in names}


def summary(rows: Rows) -> Rows:
    """Of each arm the loss over seeds, how far it is below each baseline, seed by seed, and FLOPs."""
    found = []
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        below = {f"below {other}": _spread(_below(own, rows, other)) for other in (BASELINE, SHORT)}
        spent = {key: statistics.fmean(row[key] for row in own) for key in ("all_in_flops", "papers_convention_flops")}
        found.append({"name": name, "loss": _spread([row["loss"] for row in own]), **below, **spent})
    return found


def _below(own: Rows, rows: Rows, other: str) -> list[float]:
    losses = {row["seed"]: row["loss"] for row in rows if row["name"] == other}
    return [losses[row["seed"]] - row["loss"] for row in own]


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "low": min(values), "high": max(values)}


def show(rows: Rows) -> None:
    """Loss, how far it is below both baselines, each as mean (lowest to highest seed); FLOPs; settings."""
    settings = {row["name"]: row for row in rows}
    columns = ("loss", f"below {BASELINE}", f"below {SHORT}")
    print(f"{'arm':25}" + "".join(f"{name:>34}" for name in columns) + f"{'all-in':>11}{'papers':>11}  settings")
    for row in summary(rows):
        figures = "".join(f"{x['mean']:12.4f} ({x['low']:7.4f} to {x['high']:7.4f})" for x in (row[c] for c in columns))
        spent = f"{row['all_in_flops']:11.3e}{row['papers_convention_flops']:11.3e}"
        names = ("lr", "share", "weight", "keep", "steps")
        print(f"{row['name']:25}{figures}{spent}  " + ", ".join(f"{n} {settings[row['name']][n]:.3g}" for n in names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3], help="what is reported; not 0")
    parser.add_argument("--folder", type=Path, default=Path("runs/toy_salt"), help="of the runs, where it goes on")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    plan = Plan(60, 20, 400_000) if options.quick else Plan()
    with tempfile.TemporaryDirectory() if options.quick else nullcontext(options.folder) as folder:
        bench = make_bench(Path(folder).resolve(), plan)
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:

            def measure(runs: list[tuple[Arm, int]]) -> Rows:
                return [done.result() for done in [pool.submit(bench.measure, *each) for each in runs]]

            if options.quick:
                list(pool.map(bench.prepare, [1]))
                show(measure([(arm, 1) for arm in ARMS]))
                return
            teachers = list(pool.map(bench.prepare, [0, *options.seeds]))
            chosen, tried = choose(measure)
            rows = measure([(each, seed) for each in chosen for seed in options.seeds])
    show(rows)
    results_file.save(
        "toy_salt",
        rows,
        plan=asdict(plan),
        samples=bench.num_samples,
        teachers=teachers,
        summary=summary(rows),
        tries=tried,
    )


def make_bench(folder: Path, plan: Plan) -> Bench:
    """The corpus is made, or found again."""
    build_corpus(folder / "data", VOCAB, plan.limit_bytes)
    sizes = (PackedDataset(folder / "data" / split, LENGTH).num_samples for split in SPLITS)
    return Bench(folder, plan, *sizes)


if __name__ == "__main__":
    main()
