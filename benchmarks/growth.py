"""Growth in place on four ranks over gloo: memory and time beside their bounds, the plan, and the usual way.

    python benchmarks/growth.py            # a quarter of an hour, 12 GB; writes benchmarks/results/growth.json
    python benchmarks/growth.py grow       # only that; or learn, or the name of a case

A growth runs three times, in processes of its own, a learning step three times in one; figures are medians, memory is
the highest. Memory is the peak of a rank's anonymous pages (VmHWM less what is mapped from files) from where the models
are built, after a collection and a trim: FSDP2 modules die only in a collection. Every large allocation is a mapping of
its own, so that what is freed is given back. Weights and both moments count.

Time is that of the slowest rank, beside copying the target's bytes into new memory on all ranks at once and, where
something is sent, sending by gloo and nothing else what a rank needs of the source and does not have. The usual way
gathers full state dicts on the first rank, grows them there, and sends every whole tensor to all ranks.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import processes
import torch
import torch.distributed as dist
from processes import MIB, anonymous_peak, settle, tell
from results_file import Row, write
from torch import Tensor

from megagrow.config import Config, DataConfig, GrowthConfig, ModelConfig, ParallelConfig, TrainConfig
from megagrow.evaluate import make_batch
from megagrow.growth.exchange import Exchange
from megagrow.growth.grow import grow_whole
from megagrow.growth.methods import make_recipe
from megagrow.growth.moments import QUANTITIES
from megagrow.optim import Optimizer, StepGuard
from megagrow.parallel.mesh import Mesh, init_distributed, leave_distributed, make_mesh
from megagrow.parallel.shards import fill, full, local
from megagrow.plan.layout import Layout
from megagrow.plan.memory import step_memory
from megagrow.plan.phases import phases
from megagrow.roles import parameter_names, parameter_shapes, split_name
from megagrow.train.growing import grow_copies, map_learner
from megagrow.train.learner import ModelLearner
from megagrow.train.part import Part, build_part, initialize_part

RANKS, RUNS = 4, 3
LAYER_SHARE, COPY_TIMES, SEND_TIMES, STEP_TIMES, PLAN_SHARE = 1.5, 3.0, 1.5, 2.0, 0.10


def gpt2(layers: int, hidden: int, heads: int, **changes: Any) -> ModelConfig:
    return ModelConfig(
        family="gpt2",
        vocab_size=50_257,
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        ffn_size=4 * hidden,
        max_seq_length=1024,
        norm="layer_norm",
        positions="learned",
        activation="gelu",
        attention_bias="all",
        mlp_bias=True,
        tied_embeddings=True,
        **changes,
    )


SMALL, LARGE = gpt2(12, 768, 12), gpt2(24, 1024, 16)
HALF = gpt2(24, 512, 8)  # of LARGE's width: whole copies of every unit
TENSOR, DATA = ParallelConfig(pipeline=2, tensor=2), ParallelConfig(pipeline=2)


@dataclass(frozen=True)
class Case:
    """One growth.

    Attributes:
        method, policy: of the weights and of the moments.
        source, target: the models.
        parallel: the layout.
        is_local: whether it moves nothing between ranks.
        usual: whether the usual way is measured too.
        samples, length: of a training step.
        variant: of LiGO's maps.
    """

    method: str
    policy: str
    source: ModelConfig
    target: ModelConfig
    parallel: ParallelConfig
    is_local: bool = False
    usual: bool = False
    samples: int = 8
    length: int = 512
    variant: str = "full_rank"

    @property
    def config(self) -> Config:
        growth = GrowthConfig(
            method=self.method,
            source=self.source,
            at_step=1,
            optimizer=self.policy,
            ligo_variant=self.variant,
        )
        return Config(
            model=self.target,
            data=DataConfig(seq_length=self.length),
            parallel=self.parallel,
            train=TrainConfig(global_batch_size=self.samples, microbatch_size=1),
            growth=growth,
        )


# Clones of 768 units and a rest keep LayerNorm's function with another eps, see growth/width.py.
EXACT = replace(LARGE, norm_eps=SMALL.norm_eps * 768 / 1024)
GROWTHS = {
    "117M to 345M, clone+stack, tensor 2": Case("clone+stack", "asymmetric", SMALL, EXACT, TENSOR, usual=True),
    "117M to 345M, clone+stack, data 2": Case("clone+stack", "asymmetric", SMALL, EXACT, DATA),
    "117M to 345M, rms_random+stack, tensor 2": Case("rms_random+stack", "zero_pad", SMALL, LARGE, TENSOR),
    "103M to 355M, clone of the width, tensor 2": Case("clone", "exact", HALF, LARGE, TENSOR, is_local=True),
}
# Generating the weights and taking gradients to the maps costs the same whatever the batch: tied, by FLOPs as much as
# training on 2,100 tokens in the large pair, on 860 in the small one, whose time informs: its batch is 1,024.
LEARNING = {
    "26M to 64M, ligo of tied maps, tensor 2": Case(
        "ligo", "reset", gpt2(6, 384, 6), gpt2(12, 512, 8), TENSOR, samples=4, length=256, variant="tied"
    ),
    "117M to 345M, ligo of tied maps, tensor 2": Case("ligo", "reset", SMALL, LARGE, TENSOR, variant="tied"),
    "117M to 345M, ligo, tensor 2": Case("ligo", "reset", SMALL, LARGE, TENSOR),
}


def measured(run: Callable[[], Any]) -> tuple[Any, int, list[float]]:
    """What it returns, the peak of anonymous pages meanwhile, and the seconds of the slowest rank: by the clock, and of
    its processor, which other work on the machine does not change."""
    settle()
    dist.barrier()
    began = time.perf_counter(), time.process_time()
    result = run()
    seconds = torch.tensor([time.perf_counter() - began[0], time.process_time() - began[1]])
    peak = anonymous_peak()
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return result, peak, seconds.tolist()


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(local(tensor).nbytes for tensor in tensors.values())


def largest_layer(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that the largest layer has on this rank, with moments."""
    sizes: dict[int, int] = {}
    for name, tensor in tensors.items():
        layer, _ = split_name(name)
        if layer is not None:
            sizes[layer] = sizes.get(layer, 0) + 3 * local(tensor).nbytes
    return max(sizes.values())


def new_learner(model: ModelConfig, config: Config, mesh: Mesh) -> ModelLearner:
    """A model with weights and moments that are not zero."""
    part = build_part(model, config, mesh)
    initialize_part(part, seed=0)
    optimizer = Optimizer(part.parameters, config.optim)
    for tensors in optimizer.moments().values():
        for tensor in tensors.values():
            local(tensor).uniform_()
    return ModelLearner(part, optimizer, config)


def copy_all(tensors: Mapping[str, Tensor]) -> None:
    """Copies this rank's pieces into new memory, one after the other."""
    for tensor in tensors.values():
        torch.empty_like(local(tensor)).copy_(local(tensor))


def send_all(exchange: Exchange, mesh: Mesh) -> None:
    """Moves as many bytes as weights and moments take, in one message for each pair of ranks."""
    total: dict[tuple[int, int], int] = {}
    for sender, receiver, size in exchange.moves():
        total[sender, receiver] = total.get((sender, receiver), 0) + size
    me, operations = mesh.world.rank, []
    for (sender, receiver), size in sorted(total.items()):
        if me in (sender, receiver) and sender != receiver:
            kind, peer = (dist.isend, receiver) if me == sender else (dist.irecv, sender)
            operations.append(dist.P2POp(kind, torch.zeros(size), peer))
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()


def grow_usually(small: ModelLearner, config: Config, mesh: Mesh) -> ModelLearner:
    """By full state dicts on the first rank."""
    recipe = make_recipe(config.growth.method, small.part.config, config.model)
    kinds = {"value": small.part.parameters} | {QUANTITIES[m]: t for m, t in small.optimizer.moments().items()}
    grown: dict[str, dict[str, Tensor]] = {}
    for quantity, tensors in kinds.items():
        source = _gathered(tensors, parameter_shapes(small.part.config), mesh)
        names = parameter_names(config.model) if mesh.is_main else []
        grown[quantity] = {name: grow_whole(recipe, source.__getitem__, name, quantity) for name in names}
    part = build_part(config.model, config, mesh)
    optimizer = Optimizer(part.parameters, config.optim)
    targets = {"value": part.parameters} | {QUANTITIES[m]: t for m, t in optimizer.moments().items()}
    for quantity, tensors in targets.items():
        for name, shape in parameter_shapes(config.model).items():
            whole = grown[quantity][name] if mesh.is_main else torch.empty(shape)
            dist.broadcast(whole, 0)
            if name in tensors:
                fill(tensors[name], whole)
    return ModelLearner(part, optimizer, config)


def _gathered(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], mesh: Mesh) -> dict[str, Tensor]:
    """Whole tensors on the first rank."""
    found = {}
    for name, shape in shapes.items():
        owner = torch.tensor(mesh.world.rank if name in tensors else mesh.world.size)
        dist.all_reduce(owner, op=dist.ReduceOp.MIN)
        whole = full(tensors[name]) if name in tensors else torch.empty(shape)
        if int(owner):
            dist.broadcast(whole, int(owner))
        if mesh.is_main:
            found[name] = whole
    return found


def grow(case: Case, mesh: Mesh, usually: bool) -> dict[str, Any]:
    config, start = case.config, settle()
    small = new_learner(case.source, config, mesh)
    source = {**small.part.tensors(), **small.optimizer.tensors()}
    found: dict[str, Any] = {"source": num_bytes(source), "source_measured": settle() - start}
    del source
    run = grow_usually if usually else grow_copies
    grown, peak, found["seconds"] = measured(lambda: run(small, config, mesh))
    target = {**grown.part.tensors(), **grown.optimizer.tensors()}
    found |= {"peak": peak - start, "target": num_bytes(target), "layer": largest_layer(grown.part.parameters)}
    if not usually:
        recipe = make_recipe(case.method, case.source, case.target)
        exchange = Exchange(recipe, small.part.parameters, grown.part.parameters, mesh)
        found["sent"] = 4 * sum(size for sender, to, size in exchange.moves() if sender != to)
        _, _, found["copy_seconds"] = measured(lambda: copy_all(target))
        _, _, found["send_seconds"] = measured(lambda: send_all(exchange, mesh))
    return found


def learn(case: Case, mesh: Mesh, plainly: bool) -> dict[str, Any]:
    """Steps of learning maps, or plain steps of the target: their highest peak, and their median time."""
    config, start = case.config, settle()
    size, length = config.train.global_batch_size, config.data.seq_length
    tokens = torch.randint(case.target.vocab_size, (size // mesh.dp.size, length + 1))
    if plainly:
        learner: Any = new_learner(case.target, config, mesh)
    else:
        small: Part = build_part(case.source, config, mesh)
        initialize_part(small, seed=0)
        learner = map_learner(small, config)
        learner.generate()
    steps = []
    for _ in range(RUNS):
        _, peak, seconds = measured(lambda: learner.step(make_batch(tokens, size, mesh), 1e-4, StepGuard()))
        steps.append({"peak": peak - start, "seconds": seconds})
    return over_runs(steps)


def work(name: str, kind: str) -> None:
    """One rank."""
    torch.set_num_threads(1)
    init_distributed()
    case = (GROWTHS | LEARNING)[name]
    mesh = make_mesh(case.parallel)
    dist.barrier()
    found = learn(case, mesh, kind == "plain") if kind in ("learn", "plain") else grow(case, mesh, kind == "usual")
    tell({"rank": mesh.world.rank, "pipeline": mesh.pp.rank, **found})
    leave_distributed()


def launch(name: str, kind: str, num_runs: int = RUNS) -> list[dict[str, Any]]:
    """What the ranks found in several runs."""
    allocator = {"MALLOC_MMAP_THRESHOLD_": str(4 * MIB), "MALLOC_ARENA_MAX": "1"}
    runs = [processes.launch(__file__, name, kind, ranks=RANKS, threads=1, **allocator) for _ in range(num_runs)]
    by_rank = zip(*(sorted(found, key=lambda each: each["rank"]) for found in runs), strict=True)
    return [over_runs(found) for found in by_rank]


def over_runs(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of one rank's runs the median of every figure, of a list entry by entry, but the highest peak."""
    together: dict[str, Any] = {}
    for key, first in found[0].items():
        values = [each[key] for each in found]
        if isinstance(first, list):
            together[key] = [statistics.median(entries) for entries in zip(*values, strict=True)]
        else:
            together[key] = max(values) if key == "peak" else statistics.median(values)
    return together


def growth_rows(name: str, case: Case) -> list[Row]:
    """The figures of a growth, on the rank that is nearest to its bound or beyond it."""
    found = launch(name, "grow")
    planned = {held.rank: held.total for held in phases(Layout(case.config, RANKS), "cpu")[0][1].memory}
    fullest = max(found, key=lambda each: each["peak"] / memory_bound(each))
    bound, peak = memory_bound(fullest), fullest["peak"]
    off = planned[fullest["pipeline"]] / peak - 1
    rows = [
        Row(f"{name}: source shard", fullest["source"] / MIB, "MiB"),
        Row(f"{name}: target shard", fullest["target"] / MIB, "MiB"),
        Row(f"{name}: largest target layer's shard", fullest["layer"] / MIB, "MiB"),
        Row(f"{name}: peak", peak / MIB, "MiB", f"<= {bound / MIB:.0f}, both and 1.5 layers", peak <= bound),
        Row(f"{name}: planned / measured - 1", off, "", f"within {PLAN_SHARE:.0%}", abs(off) <= PLAN_SHARE),
        Row(f"{name}: time", fullest["seconds"][0], "s"),
        Row(f"{name}: sent between ranks", fullest["sent"] / MIB, "MiB"),
    ]
    rows += time_rows(name, case.is_local, *(fullest[key] for key in ("seconds", "copy_seconds", "send_seconds")))
    if case.usual:
        usual = launch(name, "usual")
        rows += [
            Row(f"{name}, the usual way: peak of the first rank", usual_peak(usual) / MIB, "MiB"),
            Row(f"{name}, the usual way: time", usual[0]["seconds"][0], "s"),
        ]
    return rows


def time_rows(name: str, is_local: bool, took: list[float], copy: list[float], send: list[float]) -> Iterator[Row]:
    """By the clock, and by the processor's time, which informs."""
    for i, kind in enumerate(("time", "processor time")):
        beside, bound = (copy[i], COPY_TIMES) if is_local else (send[i], SEND_TIMES)
        what, times = "copying the target" if is_local else "sending", took[i] / beside
        yield Row(f"{name}: {kind} / {what}", times, "x", *((f"<= {bound:g}", times <= bound) if i == 0 else ()))
        if not is_local:
            yield Row(f"{name}: {kind} / sending and copying the target", took[i] / (send[i] + copy[i]), "x")


def usual_peak(found: list[dict[str, Any]]) -> int:
    return max(each["peak"] for each in found)


def memory_bound(found: Mapping[str, Any]) -> float:
    return found["source"] + found["target"] + LAYER_SHARE * found["layer"]


def learning_rows(name: str, case: Case) -> list[Row]:
    """A step of learning beside a plain one, on the rank that is nearest to it."""
    learned, plain = ({each["pipeline"]: each for each in launch(name, kind, 1)} for kind in ("learn", "plain"))
    planned = {held.rank: held.total for held in phases(Layout(case.config, RANKS), "cpu")[0][1].memory}
    plan_of_step = {held.rank: held.total for held in step_memory(Layout(case.config, RANKS), "cpu")}
    rank = max(learned, key=lambda rank: learned[rank]["peak"] / plain[rank]["peak"])
    peaks = learned[rank]["peak"], plain[rank]["peak"]
    times = learned[rank]["seconds"][0] / plain[rank]["seconds"][0]
    bound = (f"<= {STEP_TIMES:g}", times <= STEP_TIMES) if case.target == LARGE else ()
    rows = [
        Row(f"{name}: peak of a learning step", peaks[0] / MIB, "MiB", "< a plain step's", peaks[0] < peaks[1]),
        Row(f"{name}: peak of a plain step", peaks[1] / MIB, "MiB"),
        Row(f"{name}: learning step / plain step", times, "x", *bound),
    ]
    for what, plan, peak in (("learning", planned[rank], peaks[0]), ("plain", plan_of_step[rank], peaks[1])):
        # Informs: the plan is one of live tensors, see plan_memory.py; the peak is that of a process with libraries.
        rows.append(Row(f"{name}: planned / measured - 1 of a {what} step", plan / peak - 1, ""))
    return rows


def main(wanted: list[str]) -> int:
    rows: list[Row] = []
    for kind, cases, rows_of in (("grow", GROWTHS, growth_rows), ("learn", LEARNING, learning_rows)):
        for name, case in cases.items():
            if not wanted or kind in wanted or name in wanted:
                rows += rows_of(name, case)
                print(f"written to {write('growth', rows)}", flush=True)  # after each: they take minutes
    return 0 if all(row.holds is not False for row in rows) else 1


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[2] in ("grow", "usual", "learn", "plain"):
        work(*sys.argv[1:])
    else:
        sys.exit(main(sys.argv[1:]))
