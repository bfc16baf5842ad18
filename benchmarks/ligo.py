"""Does learning LiGO's maps pay? Every variant against sparse methods, at equal all-in FLOPs, on the built-in corpus.

    python benchmarks/ligo.py                # every arm of one pair, two runs at a time: half an hour on two cores
    python benchmarks/ligo.py --pair both    # width and depth
    python benchmarks/ligo.py --quick        # two tries, one seed, few steps, no results: shows that it works

Byte level. A seed's source is trained once, in WSD's stable phase; each arm grows it at once and trains to the end of
a decayed schedule. Steps that learn maps are paid for by shorter training, and `scratch` trains for as much longer as
the source took, so all arms of a pair end at the same all-in FLOPs.

Every arm has as many tries, five, on seed 0 only: three learning rates, then two more about the best of them; LiGO
spends these two on the rate of its maps. What ended lowest runs on seeds that nothing was chosen on. Results go to
benchmarks/results/ligo.json, or ligo_PAIR.json: final validation loss in nats per byte, all-in FLOPs from the ledger.
"""

import argparse
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import results_file

from megagrow import flops
from megagrow.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    GrowthConfig,
    InitConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from megagrow.data.builtin import documents, split_by_file
from megagrow.data.preprocess import write_texts
from megagrow.data.tokenizer import ByteTokenizer
from megagrow.presets import llama_model
from megagrow.report.run import load_run
from megagrow.train import run

LENGTH, BATCH = 128, 8
SCRATCH = "scratch"
PAIRS = {  # source and target: layers, hidden size, size of the FFN; heads of 32
    "width": ((4, 64, 176), (4, 128, 352)),
    "depth": ((3, 128, 352), (6, 128, 352)),
    "both": ((3, 64, 176), (6, 128, 352)),
}
SPARSE = {
    "width": ("rms_random", "zero_pad", "clone", "direct_copy", "net2net"),
    "depth": ("stack", "interleave"),
    "both": ("rms_random+stack", "zero_pad+stack", "clone+stack", "direct_copy+stack", "rms_random+interleave"),
}
LIGO: dict[str, tuple[tuple[str, ...], ...]] = {  # variant, initial maps, and whether they learn for fewer steps
    "width": (
        ("tied", "clone"),
        ("tied", "authors"),
        ("source_layer", "clone"),
        ("target_layer", "clone"),
        ("target_layer", "authors"),
        ("full_rank", "rms_random"),
        ("full_rank", "zero_pad"),
        ("full_rank", "rms_random", "briefly"),
    ),
    "depth": (("tied", "stack"), ("tied", "stack", "briefly")),  # all variants are one there, and all starts
    "both": (
        ("tied", "clone"),
        ("target_layer", "authors"),
        ("full_rank", "rms_random"),
        ("full_rank", "zero_pad"),
        ("full_rank", "rms_random", "briefly"),
    ),
}
LRS, MAP_LRS, STEP = (1e-3, 2e-3, 4e-3), (1e-3, 1e-2), 2**0.5  # STEP: from a rate to the next ones tried
MAP_LR = 3e-3  # until the last two tries


@dataclass(frozen=True)
class Plan:
    """How long everything takes."""

    source_steps: int = 400
    steps: int = 400  # of the grown model, if no maps are learned
    ligo_steps: int = 30
    brief_steps: int = 8
    limit_bytes: int = 8_000_000


@dataclass(frozen=True)
class Try:
    """An arm with its learning rates."""

    arm: str
    growth: GrowthConfig | None
    lr: float

    def around(self) -> list["Try"]:
        """The two that are tried when this has been the best of LRS."""
        if self.growth is None or self.growth.method != "ligo":
            return [replace(self, lr=self.lr / STEP), replace(self, lr=self.lr * STEP)]
        return [replace(self, growth=replace(self.growth, ligo_lr=lr)) for lr in MAP_LRS]


@dataclass(frozen=True)
class Bench:
    """One pair in one folder."""

    folder: Path
    pair: str
    plan: Plan

    @property
    def models(self) -> tuple[ModelConfig, ModelConfig]:
        small, large = (llama_model(n, h, 32, f, ByteTokenizer.vocab_size, LENGTH) for n, h, f in PAIRS[self.pair])
        return small, large

    def arms(self) -> dict[str, GrowthConfig | None]:
        found: dict[str, GrowthConfig | None] = {SCRATCH: None}
        for name in SPARSE[self.pair]:
            found[name] = GrowthConfig(method=name, optimizer="reset")
        for variant, init, *briefly in LIGO[self.pair]:
            steps = self.plan.brief_steps if briefly else self.plan.ligo_steps
            maps: Any = {"ligo_variant": variant, "ligo_init": init, "ligo_steps": steps, "ligo_lr": MAP_LR}
            found[", ".join((f"{variant} from {init}", *briefly))] = GrowthConfig("ligo", optimizer="reset", **maps)
        return found

    def config(self, name: str, seed: int, of: ModelConfig, steps: int, lr: float) -> Config:
        return Config(
            model=of,
            data=DataConfig(str(self.folder / "train"), str(self.folder / "validation"), seq_length=LENGTH, seed=seed),
            train=TrainConfig(
                steps=steps, global_batch_size=BATCH, eval_interval=0, eval_batches=32, seed=seed, threads=1
            ),
            optim=OptimConfig(lr=lr, warmup_steps=20, decay_fraction=0.4),
            checkpoint=CheckpointConfig(interval=0),
            run=RunConfig(dir=str(self.folder / f"{name}-{seed}")),
        )

    def train_source(self, seed: int) -> None:
        source = self.config("source", seed, self.models[0], self.plan.source_steps, 4e-3)
        assert run(replace(source, optim=replace(source.optim, schedule="constant"))) == 0

    def steps(self, growth: GrowthConfig | None) -> int:
        """Of the large model, so that every arm ends at the same all-in FLOPs."""
        (small, large), tokens = self.models, BATCH * LENGTH
        step = flops.training_flops(large, tokens, LENGTH)
        if growth is None:
            return self.plan.steps + round(self.plan.source_steps * flops.training_flops(small, tokens, LENGTH) / step)
        if growth.method == "ligo":
            learning = flops.ligo_step_flops(small, large, tokens, LENGTH, variant=growth.ligo_variant)
            return self.plan.steps - round(growth.ligo_steps * learning / step)
        return self.plan.steps

    def measure(self, chosen: Try, seed: int) -> dict[str, Any]:
        """One run of the large model."""
        (small, large), growth = self.models, chosen.growth
        if growth and "zero_pad" in (growth.maps_start if growth.method == "ligo" else growth.method):
            large = replace(large, norm_eps=small.norm_eps * small.hidden_size / large.hidden_size)
        ligo_lr = growth.ligo_lr if growth and growth.method == "ligo" else None
        name = f"{chosen.arm}-{chosen.lr:.2g}-{ligo_lr}".replace(" ", "-")
        config = self.config(name, seed, large, self.steps(growth), chosen.lr)
        if growth:
            config = replace(config, init=InitConfig(from_=str(self.folder / f"source-{seed}")), growth=growth)
        assert run(config) == 0
        ended = load_run(Path(config.run.dir))
        settings = {"arm": chosen.arm, "seed": seed, "lr": chosen.lr, "ligo_lr": ligo_lr, "steps": config.train.steps}
        grown = {key: (ended.growth or {}).get(key) for key in ("loss_initial", "loss_after")}
        return {**settings, "all_in_flops": ended.cost("all_in", "flops"), "loss": ended.final_loss, **grown}


Rows = list[dict[str, Any]]
Measure = Callable[[Iterable[tuple[Try, int]]], Rows]


def choose(arms: dict[str, GrowthConfig | None], measure: Measure) -> tuple[list[Try], Rows]:
    """The settings of each arm that end lowest on seed 0, and all that were tried."""
    first = [[Try(name, growth, lr) for lr in LRS] for name, growth in arms.items()]
    rows = measure((each, 0) for tries in first for each in tries)
    best = [_lowest(tries, rows) for tries in first]
    second = [each.around() for each in best]
    rows += measure((each, 0) for tries in second for each in tries)
    return [_lowest([*a, *b], rows) for a, b in zip(first, second, strict=True)], rows


def _lowest(tries: list[Try], rows: Rows) -> Try:
    def loss(each: Try) -> float:
        ligo_lr = each.growth.ligo_lr if each.growth and each.growth.method == "ligo" else None
        wanted = each.arm, each.lr, ligo_lr
        return next((row["loss"] for row in rows if (row["arm"], row["lr"], row["ligo_lr"]) == wanted), float("inf"))

    return min(tries, key=loss)


def show(rows: Rows) -> None:
    """Arms from the best to the worst: mean final loss and its spread over seeds, loss before and after learning maps,
    FLOPs, settings."""
    by_arm = {row["arm"]: [each for each in rows if each["arm"] == row["arm"]] for row in rows}
    print(f"{'arm':36}{'loss':>8}{'sd':>8}{'grown':>8}{'initial':>8}{'FLOPs':>11}{'lr':>9}{'map lr':>8}")
    for name, own in sorted(by_arm.items(), key=lambda arm: statistics.fmean(row["loss"] for row in arm[1])):
        loss, spent = (statistics.fmean(row[key] for row in own) for key in ("loss", "all_in_flops"))
        spread = statistics.stdev(row["loss"] for row in own) if len(own) > 1 else 0.0
        grown = "".join(
            f"{statistics.fmean(row[key] for row in own):8.3f}" if own[0][key] is not None else " " * 8
            for key in ("loss_after", "loss_initial")
        )
        print(f"{name:36}{loss:8.4f}{spread:8.4f}{grown}{spent:11.3e}{own[0]['lr']:9.2g}{own[0]['ligo_lr'] or '':>8}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=PAIRS, default="width")
    parser.add_argument("--arms", nargs="*", default=[""], help="beginnings of their names; all of them without")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3], help="what is reported; not 0")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    plan = Plan(20, 20, 3, 1, 1_000_000) if options.quick else Plan()
    seeds = options.seeds[:1] if options.quick else options.seeds
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch), options.pair, plan)
        arms = {name: growth for name, growth in bench.arms().items() if name.startswith(tuple(options.arms))}
        for split, files in zip(("train", "validation"), split_by_file(documents(plan.limit_bytes)), strict=True):
            texts = (file.text for file in files)
            write_texts(texts, ByteTokenizer(), bench.folder / split, split=split, source="built-in corpus")
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            for _ in pool.map(bench.train_source, [0, *seeds]):
                pass

            def measure(runs: Iterable[tuple[Try, int]]) -> Rows:
                return [done.result() for done in [pool.submit(bench.measure, *each) for each in runs]]

            chosen, tried = choose(arms, measure)
            rows = measure((each, seed) for each in chosen for seed in seeds)
    show(rows)
    if not options.quick:
        name = "ligo" if options.pair == "width" else f"ligo_{options.pair}"
        results_file.save(name, rows, plan=asdict(plan), tries=tried)


if __name__ == "__main__":
    main()
