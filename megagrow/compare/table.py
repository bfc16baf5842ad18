"""The report of a comparison for people."""

from collections.abc import Iterator
from typing import Any

from megagrow.compare.questions import TASKS
from megagrow.compare.suite import NEVER_GROWN, SCRATCH
from megagrow.metrics import duration
from megagrow.report.curves import quantity
from megagrow.report.run import Json
from megagrow.report.savings import CONVENTIONS, MEASURES

_HEADS = {
    ("papers_convention", "flops"): "FLOPs saved, papers' convention",
    ("all_in", "flops"): "FLOPs saved, all-in",
    ("papers_convention", "seconds"): "seconds saved, papers' convention",
    ("all_in", "seconds"): "seconds saved, all-in",
}

_CONVENTIONS = (
    "Mean of the seeds, in brackets the least and the greatest. By the papers' convention a small model that is given "
    "and scoring cost nothing, while smaller stages of a run's own (mslt, bootstrap, progressive) count; all-in all "
    "counts. Each seed is compared with the scratch runs of its own, interpolated between the ends of finished runs."
)


_RECOVERED = (
    "Steps to recover count those that learn maps; from there on all evaluations find the small model's loss, or less."
)
_CHANCE = "Tasks have {:,} questions each; by chance a quarter of multiple choice is right, and none of cloze."


def to_markdown(report: Json) -> str:
    """Who won by how much, what it cost, how it was tuned, and how far to believe it."""
    sections = [
        f"# {report['suite']}, {report['size']}: {report['about']}",
        _headline(report),
        _setting(report),
        "![Validation loss against all-in FLOPs and seconds](curves.png)",
        "## Savings at equal validation loss",
        _savings(report),
        _CONVENTIONS,
        "## Losses",
        _losses(report),
        _held_out(report),
        "## Growth and downstream tasks",
        _growth(report),
        _RECOVERED,
        _CHANCE.format(report["num_questions"]) if report["num_questions"] else "",
        "## Arms",
        _arms(report),
        "## Learning rates",
        _sweep(report),
        "## How far to believe it",
        "\n".join(f"- {caveat}" for caveat in report["caveats"]),
        _footer(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _headline(report: Json) -> str:
    """The arm that was best on the tuning seed, and what it saves on those that are reported."""
    if not report["arms"]:
        return "No arm is finished yet."
    lowest = report["arms"][0]["arm"]
    best = next((arm for arm in report["arms"] if arm["arm"] == report["winner"]), None)
    if best is None:
        return f"Lowest loss: {lowest}. It was chosen on the seeds of its figures, which flatters it."
    seeds = ", ".join(map(str, best["seeds"]))
    said = [f"{_saved(best['savings'][c]['flops'])} by {_WORDS[c]}" for c in CONVENTIONS]
    also = "" if lowest == best["arm"] else f" The lowest mean loss of those seeds is that of {lowest}."
    return (
        f"**Best on the tuning seed: {best['arm']}. FLOPs that it saves at equal loss, on seeds {seeds}: "
        f"{', '.join(said)}.**{also}{_never_grown(report, best)}"
    )


def _never_grown(report: Json, best: Json) -> str:
    """What the small model comes to on the whole budget, beside the best arm and the large model from scratch."""
    losses = {each["arm"]: each["loss"]["value"] for each in [*report["controls"], *report["scratch"]]}
    if NEVER_GROWN not in losses:
        return ""
    scratch = losses.get(f"{SCRATCH}-1")
    beside = f", the large one from scratch at {scratch:.4f}" if scratch else ""
    return (
        f" On the same budget the small model, never grown, ends at {losses[NEVER_GROWN]:.4f}, {best['arm']} at "
        f"{best['loss']['value']:.4f}{beside}."
    )


_WORDS = {"papers_convention": "the papers' convention", "all_in": "the all-in one"}


def _setting(report: Json) -> str:
    small, large = (report["models"][name] for name in ("source", "target"))
    shape = "{family} {layers}x{hidden}"
    return (
        f"From {shape.format(**small)} ({quantity(small['parameters'])} parameters) to {shape.format(**large)} "
        f"({quantity(large['parameters'])}). Every arm may spend {quantity(report['budget_flops'], 'FLOP')} all-in; "
        f"{report['step_tokens']:,} tokens to a step."
    )


def _savings(report: Json) -> str:
    rows = [
        [arm["arm"], *(_saved(arm["savings"][c][m]) for c, m in _HEADS), _spread(arm["nats_at_equal_flops"], "{:+.4f}")]
        for arm in _arms_and_controls(report)
    ]
    reasons = dict.fromkeys(
        f"- {arm['arm']}: {arm['savings'][c][m]['reason']}."
        for arm in _arms_and_controls(report)
        for c in CONVENTIONS
        for m in MEASURES
        if arm["savings"][c][m]["reason"]
    )
    table = _table(["arm", *_HEADS.values(), "nats below scratch at equal all-in FLOPs"], rows)
    return "\n\n".join([table, "\n".join(reasons)] if reasons else [table])


def _losses(report: Json) -> str:
    rows = []
    for arm in _everyone(report):
        costs = arm["costs"]
        flops = [quantity(_mean(costs[c]["flops"]), "FLOP") for c in CONVENTIONS]
        seconds = [_time(_mean(costs[c]["seconds"])) for c in CONVENTIONS]
        ended = len(arm["seeds"])
        count = f"{ended} of {ended + len(arm['diverged'])}" if arm["diverged"] else str(ended)
        rows.append([arm["arm"], count, f"{arm['steps']:,}", _spread(arm["loss"], "{:.4f}"), *flops, *seconds])
    heads = ["compute", "all-in compute", "time", "all-in time"]
    return _table(["arm", "seeds", "steps", "validation loss (nats per token)", *heads], rows)


def _held_out(report: Json) -> str:
    of = "" if report["is_causal"] else "the masked among "
    return f"Of {of}the same {report['eval_tokens']:,} held-out tokens in all runs and seeds."


def _growth(report: Json) -> str:
    rows = []
    for arm in _everyone(report):
        losses = [_spread(arm[name], "{:.3f}") for name in ("loss_before", "loss_initial", "loss_after")]
        scores = [_spread(arm["scores"][task], "{:.1%}") for task in TASKS]
        rows.append([arm["arm"], *losses, _spread(arm["steps_to_recover"], "{:.0f}"), *scores])
    heads = ["loss of the small model", "as growth begins", "right after growth", "steps to recover"]
    return _table(["arm", *heads, "cloze", "multiple choice"], rows)


def _arms(report: Json) -> str:
    arms = [f"- `{name}`: {text}" + _not_here(report, name) for name, text in report["about_arms"].items()]
    controls = [f"- `{name}`, a control: {text}" for name, text in report["about_controls"].items()]
    return "\n".join([*arms, *controls])


def _not_here(report: Json, name: str) -> str:
    return f" **Not possible here**: {report['refused'][name]}." if name in report["refused"] else ""


def _arms_and_controls(report: Json) -> list[Json]:
    return [*report["arms"], *report["controls"]]


def _everyone(report: Json) -> list[Json]:
    return [*filter(None, [report["small"]]), *report["scratch"], *_arms_and_controls(report)]


def _sweep(report: Json) -> str:
    return "\n\n".join(_sweep_parts(report))


def _sweep_parts(report: Json) -> Iterator[str]:
    sweep = report["sweep"]
    if sweep["fixed"] is not None:
        yield f"None was tuned: all runs are at {sweep['fixed']:g}."
        return
    yield "Tuned on this corpus, on a seed that is not reported; every arm had as many tries."
    rows = [
        [row["arm"], f"{row['lr']:.3g}", _number(row["map_lr"], "{:.3g}"), _number(row["loss"], "{:.4f}", "diverged")]
        for row in sweep["rows"]
    ]
    yield _table(["arm", "learning rate", "of the maps", "validation loss"], rows)


def _footer(report: Json) -> str:
    corpus, dates = report["corpus"], report["dates"]
    tokens = [quantity(corpus[f"{split}_tokens"]) for split in ("train", "validation")]
    lists = [f"{name}: {'; '.join(report[key])}." for name, key in _LISTS.items() if report[key]]
    ran = f"Runs of {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}." if dates else ""
    return " ".join(
        [
            f"Corpus {corpus['sha256'][:12]} ({corpus['kind']}): {tokens[0]} tokens to train on, {tokens[1]} held out.",
            *filter(None, [ran]),
            *lists,
            "Each run is a line of savings.csv.",
        ]
    )


_LISTS = {"Machines": "machines", "Commits": "commits", "Diverged": "diverged", "Not finished": "not_finished"}


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in [heads, *rows]]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(heads) - 1), *lines[1:]])


def _saved(saving: Json) -> str:
    """A saving over seeds: mean and spread, or the bound that is known."""
    if saving["value"] is not None:
        return _spread(saving, "{:.1%}")
    if saving["bound"] is None:
        return "unknown"
    ((side, limit),) = saving["bound"].items()
    return f"{'≥' if side == 'at_least' else '≤'} {limit:.1%}"


def _spread(value: Json | None, form: str) -> str:
    if value is None:
        return "–"
    mean, low, high = (form.format(value[name]) for name in ("value", "min", "max"))
    return mean if low == high else f"{mean} ({low} … {high})"


def _mean(value: Json | None) -> Any:
    return None if value is None else value["value"]


def _number(value: float | None, form: str, missing: str = "") -> str:
    return missing if value is None else form.format(value)


def _time(seconds: float | None) -> str:
    return "unknown" if seconds is None else duration(seconds)
