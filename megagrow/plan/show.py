"""Plans and suggestions as tables."""

from collections.abc import Iterable, Iterator

from rich.table import Table

from megagrow.config import Config
from megagrow.parallel.stages import Stage
from megagrow.plan.layout import AxisName, Layout
from megagrow.plan.memory import RankMemory
from megagrow.plan.phases import Phase
from megagrow.plan.plan import Plan, mesh_sizes
from megagrow.plan.speed import Machine
from megagrow.plan.suggest import Suggestion
from megagrow.plan.targets import Target
from megagrow.roles import num_parameters

GIB = 2**30
UNITS = {"GiB": GIB, "MiB": 2**20}
COLUMNS = {  # of the memory table, with what they sum up
    "parameters": ("parameters", "gathered parameters", "source"),
    "gradients": ("gradients", "gathered gradients"),
    "moments": ("moments", "maps"),
    "activations": ("activations", "working"),
    "loss": ("loss",),
    "buffers": ("pipeline buffers", "batch", "targets"),
}
ASSUMED = (
    "Time rests on assumptions: computing at {efficiency:.0%} of {peak:.0f} TFLOP/s; a rank sends {inside:.0f} GB/s "
    "inside a node of {ranks} ranks and {between:.0f} GB/s between nodes; sums over tensor and context ranks and "
    "sends between stages stand in the way of computing, sharding's traffic hides behind it without a pipeline; "
    "latencies, the update and slow hosts are left out. Memory is that of live tensors; a GPU counts as full at "
    "{usable:.0%} of its {memory:.0f} GiB."
)


def plan_tables(plan: Plan) -> Iterator[Table | str]:
    """What to print about a plan, in order."""
    yield _facts(plan)
    unit = "GiB" if plan.fullest.total >= GIB else "MiB"
    for phase in plan.phases:
        yield _memory(phase, unit)
    yield _costs(plan)
    yield _communication(plan)
    yield from (f"note: {note}" for note in plan.notes)
    yield assumptions(plan.machine)
    if told := overflow(plan):
        yield told


def overflow(plan: Plan) -> str:
    """One line where the fullest rank needs more than a GPU has to give; else nothing."""
    machine, held = plan.machine, plan.fullest
    if held.total <= machine.usable * machine.memory:
        return ""
    when = next(phase.title for phase in plan.phases if held in phase.memory)
    return (
        f"warning: does not fit: pipeline rank {held.rank} needs {held.total / GIB:.1f} GiB ({when}), and tensors can "
        f"have {machine.usable * machine.memory / GIB:.1f} GiB of a GPU; --suggest names layouts that fit"
    )


def suggestion_table(found: list[Suggestion], world_size: int, count: int) -> Table:
    """The first `count` suggestions."""
    table = Table(title=f"layouts for {world_size} ranks, the fastest variant of each mesh first")
    for name in ("tensor", "context", "pipeline", "data", "copies", "microbatch"):
        table.add_column(name, justify="right")
    table.add_column("schedule")
    table.add_column("recompute")
    for name in ("GiB", "s / step", "computing", "exposed", "bubble", "MFU", "tokens/s/GPU"):
        table.add_column(name, justify="right")
    for suggestion in found[:count]:
        table.add_row(*_suggestion(suggestion, world_size))
    return table


def target_table(found: list[Target], world_size: int) -> Table:
    """What a small model can grow into, and what training that takes."""
    table = Table(title=f"what it can grow into, on {world_size} ranks")
    for name in ("layers x hidden", "heads", "parameters", "depth", "width"):
        table.add_column(name, justify="right")
    table.add_column("method")
    for name in ("lr", "steps", "FLOPs"):
        table.add_column(name, justify="right")
    table.add_column("layout (tensor x context x pipeline)")
    for name in ("GiB", "days"):
        table.add_column(name, justify="right")
    for target in found:
        table.add_row(*_target(target))
    return table


def _target(target: Target) -> list[str]:
    model, train, fits = target.config.model, target.config.train, target.suggestion
    parallel = target.config.parallel
    heads = f"{model.num_heads}/{model.num_kv_heads}"
    facts = [f"{model.num_layers} x {model.hidden_size}", heads, f"{num_parameters(model):.3g}"]
    grows = [f"x {float(factor):.3g}" for factor in (target.depth, target.width)]
    costs = [f"{target.config.optim.lr:.2g}", f"{train.steps:,}", f"{target.flops:.3g}"]
    if fits is None or target.seconds is None:
        return [*facts, *grows, target.way.method, *costs, f"none: {target.problem}", "", ""]
    mesh = f"{parallel.tensor} x {parallel.context} x {parallel.pipeline}, {train.recompute} recompute"
    days = f"{target.seconds / 86_400:.3g}"
    return [*facts, *grows, target.way.method, *costs, mesh, f"{fits.memory / GIB:.1f}", days]


def target_notes(found: list[Target], lr: float) -> Iterator[str]:
    """What the table rests on: the evidence for each method, the rate, the warm-up, the small model's length."""
    for way in dict.fromkeys(target.way for target in found):
        yield f"{way.method}: {way.saving} of the FLOPs; {way.rests_on}"
    yield (
        f"lr: optim.lr={lr:g} is taken for the small model's and divided by the growth in width, which muP does for "
        "matrices; depth leaves it. At toy scale this was best, or a division by its square root: try both. "
        "Moments begin anew, so optim.warmup_steps warms the grown model up. tools/probe_growth.py tries methods from "
        "the real checkpoint"
    )
    first = found[0]
    if not first.is_stacked_decoder:  # for which the rule was found
        return
    rule = f"one for the first target is trained on {first.source_tokens:.2g} tokens by G_stack's rule"
    if first.source_tokens > first.tokens:
        rule = f"G_stack's rule for its length does not reach down to runs of {first.tokens:.2g} tokens"
    yield f"small model: {rule}. What its own training takes of the saving, its ledger knows, or --init.source-flops"


def options(suggestion: Suggestion, config: Config) -> str:
    """The command-line options that turn the layout of the run's configuration into a suggestion's."""
    parallel, train = suggestion.config.parallel, suggestion.config.train
    given = {
        "parallel.tensor": parallel.tensor,
        "parallel.sequence_parallel": str(parallel.sequence_parallel).lower(),
        "parallel.context": parallel.context,
        "parallel.pipeline": parallel.pipeline,
        "parallel.schedule": parallel.schedule,
        "parallel.stages_per_rank": parallel.stages_per_rank,
        "parallel.replicate": parallel.replicate,
        "train.microbatch_size": train.microbatch_size,
        "train.recompute": train.recompute,
    }
    if config.parallel.layers_per_stage:  # a split of other stages
        given["parallel.layers_per_stage"] = '"[]"'
    return " ".join(f"--{name} {value}" for name, value in given.items())


def assumptions(machine: Machine) -> str:
    """What the times rest on."""
    return ASSUMED.format(
        efficiency=machine.efficiency,
        peak=machine.peak_flops / 1e12,
        inside=machine.inside / 1e9,
        between=machine.between / 1e9,
        ranks=machine.ranks_per_node,
        usable=machine.usable,
        memory=machine.memory / GIB,
    )


def _suggestion(found: Suggestion, world_size: int) -> list[str]:
    layout, time = Layout(found.config, world_size), found.time
    stages = found.config.parallel.local_stages
    schedule = "" if layout.pipeline == 1 else found.config.parallel.schedule
    return [
        *map(str, (layout.tensor, layout.context, layout.pipeline, layout.data, layout.replicate, layout.microbatch)),
        f"{schedule} x {stages}" if stages > 1 else schedule,
        found.config.train.recompute,
        f"{found.memory / GIB:.1f}",
        *(f"{seconds:.3g}" for seconds in (time.step, time.computing, time.exposed, time.bubble)),
        f"{time.mfu:.1%}",
        f"{layout.step_tokens / time.step / world_size:,.0f}",
    ]


def _facts(plan: Plan) -> Table:
    layout, table = plan.layout, Table(title=f"{plan.layout.world_size} ranks", show_header=False)
    model, train = layout.model, layout.config.train
    shape = f"{model.num_layers} x {model.hidden_size}, {model.num_heads} heads ({model.num_kv_heads} key/value)"
    table.add_row(
        "model", f"{num_parameters(model):,} parameters: {model.family} {shape}, vocabulary {model.vocab_size:,}"
    )
    table.add_row("mesh", ", ".join(f"{name} {size}" for name, size in mesh_sizes(layout).items()))
    parts = f"{layout.num_microbatches} microbatches of {layout.microbatch} per data rank"
    samples = f"{train.global_batch_size} samples, {layout.step_tokens:,} tokens"
    table.add_row("batch", f"{samples}; {parts}; {train.precision}")
    if layout.pipeline > 1:
        idle = f"the busiest rank idles {plan.walk.bubble:.1%} of a step, ranks in the mean {plan.walk.idle:.1%}"
        table.add_row("schedule", f"{layout.config.parallel.schedule}: {idle}")
    table.add_row("fullest", f"{plan.fullest.total / GIB:.3g} GiB, pipeline rank {plan.fullest.rank}")
    time = plan.time
    table.add_row("time", f"{time.step:.3g} s per step, {time.exposed:.3g} s of it communication; MFU {time.mfu:.1%}")
    return table


def _memory(phase: Phase, unit: str) -> Table:
    table = Table(title=f"{phase.title}: {unit} at the fullest moment of each pipeline rank")
    table.add_column("rank", justify="right")
    table.add_column("layers")
    for name in ("parameters stored", *COLUMNS, "other", "total", "on the host"):
        table.add_column(name, justify="right")
    table.add_column("fullest moment (microbatches in flight)")
    for held in phase.memory:
        table.add_row(*_memory_row(held, UNITS[unit]))
    return table


def _memory_row(held: RankMemory, unit: int) -> list[str]:
    sums = [sum(held.parts[part] for part in parts) for parts in COLUMNS.values()]
    in_flight = f" ({' + '.join(map(str, held.in_flight))})" if held.in_flight else ""
    return [
        str(held.rank),
        ", ".join(_layers(stage) for stage in held.stages),
        f"{held.parameters:,}",
        *(f"{num_bytes / unit:.2f}" for num_bytes in (*sums, held.total - sum(sums), held.total)),
        f"{held.host.total() / unit:.2f}" if held.host else "",
        held.moment + in_flight,
    ]


def _layers(stage: Stage) -> str:
    """`embedding 0-4`, `5-9`, `75-79 head`."""
    ends = f"{stage.layers[0]}-{stage.layers[-1]}" if stage.layers else ""
    return " ".join(part for part in ("embedding" * stage.is_first, ends, "head" * stage.is_last) if part)


def _costs(plan: Plan) -> Table:
    table = Table(title="FLOPs, attention over all pairs | halved for the causal mask")
    for name in ("phase", "steps", "per step", "in all"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for phase in plan.phases:
        table.add_row(
            phase.title, str(phase.steps or ""), _pair(phase.flops.values()), _pair(phase.total_flops.values())
        )
    totals = zip(*(phase.total_flops.values() for phase in plan.phases), strict=True)
    table.add_row("run", "", "", _pair(map(sum, totals)))
    return table


def _pair(values: Iterable[float]) -> str:
    return " | ".join(f"{value:.3e}" for value in values)


def _communication(plan: Plan) -> Table:
    table = Table(title="GB that a rank sends per step, on the pipeline rank that sends most")
    table.add_column("axis")
    table.add_column("what")
    for name in ("GB", "GB/s assumed"):
        table.add_column(name, justify="right")
    most: dict[tuple[AxisName, str], float] = {}
    for entry in (entry for entries in plan.traffic for entry in entries):
        most[entry.axis, entry.what] = max(entry.sent, most.get((entry.axis, entry.what), 0.0))
    for (axis, what), sent in sorted(most.items(), key=lambda item: item[0][0]):
        table.add_row(axis, what, f"{sent / 1e9:.3g}", f"{plan.machine.bandwidth(plan.layout, axis) / 1e9:.0f}")
    return table
