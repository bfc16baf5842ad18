"""Does learning LiGO's maps pay? Every variant against sparse methods, at equal all-in FLOPs, on the built-in corpus.

    python benchmarks/ligo.py               # three seeds of every arm, two at a time: an hour and more on two cores
    python benchmarks/ligo.py --quick       # one seed, few steps, no results: shows that it works (two minutes)
    python benchmarks/ligo.py --pair depth --arms stack tied --equal-steps

Byte level. A seed's source is trained once, in WSD's stable phase; each arm grows it at once and trains to the end of
a decayed schedule. Steps that learn maps are paid for by shorter training, unless --equal-steps. Results go to
benchmarks/results/ligo.json: final validation loss in nats per byte, all-in FLOPs (source included) from the ledger.
"""

import argparse
import multiprocessing
import statistics
import tempfile
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
PAIRS = {  # source and target: layers, hidden size, size of the FFN; heads of 32
    "width": ((4, 64, 176), (4, 128, 352)),
    "depth": ((3, 128, 352), (6, 128, 352)),
    "both": ((3, 64, 176), (6, 128, 352)),
}


@dataclass(frozen=True)
class Plan:
    """How long everything takes."""

    source_steps: int = 400
    steps: int = 400  # of the grown model, if no maps are learned
    ligo_steps: int = 30
    limit_bytes: int = 8_000_000
    equal_steps: bool = False


def arms(pair: str) -> dict[str, GrowthConfig]:
    """Sparse methods, and each variant of LiGO with each learning rate."""
    sparse = ("stack", "interleave") if pair == "depth" else ("rms_random", "zero_pad", "clone", "direct_copy")
    found = {name: GrowthConfig(method=name, optimizer="reset") for name in sparse}
    starts = [("tied", "stack"), ("tied", "authors")]
    if pair != "depth":
        found["clone, noise"] = GrowthConfig(method="clone", optimizer="reset", breaker="noise")
        starts = [("tied", "clone"), ("source_layer", "clone"), ("target_layer", "authors"), ("target_layer", "clone")]
        starts += [("full_rank", "rms_random"), ("full_rank", "zero_pad")]
    for variant, init in starts:
        for lr in (1e-3, 3e-3, 1e-2):
            maps: Any = {"ligo_variant": variant, "ligo_init": init, "ligo_lr": lr}
            found[f"{variant} from {init}, lr {lr:g}"] = GrowthConfig(method="ligo", optimizer="reset", **maps)
    return found


def model(size: tuple[int, int, int]) -> ModelConfig:
    layers, hidden, ffn = size
    return llama_model(layers, hidden, 32, ffn, ByteTokenizer.vocab_size, LENGTH)


def config(folder: Path, name: str, seed: int, of: ModelConfig, steps: int, lr: float) -> Config:
    return Config(
        model=of,
        data=DataConfig(str(folder / "train"), str(folder / "validation"), seq_length=LENGTH, seed=seed),
        train=TrainConfig(steps=steps, global_batch_size=BATCH, eval_interval=0, eval_batches=32, seed=seed, threads=1),
        optim=OptimConfig(lr=lr, warmup_steps=20, decay_fraction=0.4),
        checkpoint=CheckpointConfig(interval=0),
        run=RunConfig(dir=str(folder / f"{name}-{seed}")),
    )


def train_source(folder: Path, seed: int, pair: str, plan: Plan) -> None:
    source = config(folder, "source", seed, model(PAIRS[pair][0]), plan.source_steps, 4e-3)
    assert run(replace(source, optim=replace(source.optim, schedule="constant"))) == 0


def measure(folder: Path, seed: int, pair: str, name: str, plan: Plan) -> dict[str, Any]:
    growth = replace(arms(pair)[name], ligo_steps=plan.ligo_steps)
    small, large = (model(size) for size in PAIRS[pair])
    if "zero_pad" in (growth.method, growth.ligo_init if growth.method == "ligo" else ""):
        large = replace(large, norm_eps=small.norm_eps * small.hidden_size / large.hidden_size)
    steps, tokens = plan.steps, BATCH * LENGTH
    if growth.method == "ligo" and not plan.equal_steps:
        learning = flops.ligo_step_flops(small, large, tokens, LENGTH, variant=growth.ligo_variant)
        steps -= round(plan.ligo_steps * learning / flops.training_flops(large, tokens, LENGTH))
    grown = config(folder, name.replace(" ", "-"), seed, large, steps, 2e-3)
    grown = replace(grown, init=InitConfig(from_=str(folder / f"source-{seed}")), growth=growth)
    assert run(grown) == 0
    ended = load_run(Path(grown.run.dir))
    losses = {"loss": ended.final_loss, **{key: (ended.growth or {})[key] for key in ("loss_initial", "loss_after")}}
    return {"arm": name, "seed": seed, "steps": steps, "all_in_flops": ended.cost("all_in", "flops"), **losses}


def show(rows: list[dict[str, Any]]) -> None:
    """Arms from the best to the worst, as means over seeds: final loss, with grown and with initial maps, FLOPs."""
    keys, names = ("loss", "loss_after", "loss_initial", "all_in_flops"), {row["arm"] for row in rows}
    means = {name: [statistics.fmean(row[key] for row in rows if row["arm"] == name) for key in keys] for name in names}
    for name, (loss, after, initial, spent) in sorted(means.items(), key=lambda arm: arm[1]):
        print(f"{name:44}{loss:8.4f}{after:8.3f}{initial:8.3f}{spent:10.3e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=PAIRS, default="width")
    parser.add_argument("--arms", nargs="*", default=[""], help="beginnings of their names; all of them without")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--equal-steps", action="store_true", help="learning steps come on top")
    options = parser.parse_args()
    plan = replace(Plan(20, 20, 3, 1_000_000) if options.quick else Plan(), equal_steps=options.equal_steps)
    seeds = options.seeds[:1] if options.quick else options.seeds
    names = [name for name in arms(options.pair) if name.startswith(tuple(options.arms))]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for split, files in zip(("train", "validation"), split_by_file(documents(plan.limit_bytes)), strict=True):
            write_texts((f.text for f in files), ByteTokenizer(), folder / split, split=split, source="built-in corpus")
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            for done in [pool.submit(train_source, folder, seed, options.pair, plan) for seed in seeds]:
                done.result()
            runs = [pool.submit(measure, folder, seed, options.pair, name, plan) for seed in seeds for name in names]
            rows = [done.result() for done in runs]
    show(rows)
    if not options.quick:
        results_file.save("ligo" if options.pair == "width" else f"ligo_{options.pair}", rows, plan=asdict(plan))


if __name__ == "__main__":
    main()
