"""The picture of a comparison: validation loss against all-in compute and time, every arm over its seeds."""

import io
from collections.abc import Sequence
from typing import Any

from megagrow.compare.results import Results
from megagrow.compare.suite import NEVER_GROWN, SMALL
from megagrow.report.curves import decimal_scale, matplotlib_parts, time_unit
from megagrow.report.run import Run
from megagrow.report.savings import loss_at_cost, scratch_front

_COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#0072B2")  # of Okabe & Ito, for all eyes
_MARKERS = "D^vPXs*hdp<>8H"
_SCRATCH = "#5A5A5A"


def draw(results: Results) -> bytes:
    """Two panels as a PNG: ends of runs with their spread over seeds, and the baseline between its budgets.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figures, canvases = matplotlib_parts()
    figure = figures.Figure(figsize=(12, 6.4), dpi=130, layout="constrained")
    canvas = canvases.FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    factor, prefix = decimal_scale(_largest(results, "flops"))
    _draw_panel(left, results, "flops", factor)
    left.set_xlabel(f"all-in compute ({prefix}FLOP)", fontsize=12)
    factor, unit = time_unit(_largest(results, "seconds"))
    _draw_panel(right, results, "seconds", factor)
    right.set_xlabel(f"all-in time ({unit})", fontsize=12)
    left.set_ylabel("validation loss (nats per token)", fontsize=12)
    entries = dict(zip(*reversed(left.get_legend_handles_labels()), strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4, frameon=False)
    file = io.BytesIO()
    canvas.print_png(file)
    return file.getvalue()


def _largest(results: Results, measure: str) -> float:
    return max((cost for each in results.outcomes if (cost := _cost(each.run, measure))), default=1.0)


def _cost(run: Run | None, measure: str) -> float | None:
    return run.cost("all_in", measure) if run else None


def _draw_panel(panel: Any, results: Results, measure: str, factor: float) -> None:
    for seed in sorted({each.seed for each in results.outcomes}):
        _draw_baseline(panel, results.scratch(seed), measure, factor)
    arms = [name for name in results.names if name in results.experiment.arms]
    for place, arm in enumerate(arms):
        _draw_arm(panel, results, arm, measure, factor, place)
    black = {"color": "black", "marker": "o"}
    _draw_ends(panel, results, SMALL, measure, factor, {**black, "label": "the small model"})
    never = {**black, "markerfacecolor": "white", "label": "the small model, never grown"}
    _draw_ends(panel, results, NEVER_GROWN, measure, factor, never)
    panel.margins(0.08)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def _draw_baseline(panel: Any, scratch: list[Run], measure: str, factor: float) -> None:
    """What savings are read from: the baseline between the ends of finished runs."""
    front = scratch_front(scratch, "all_in", measure)
    if not front:
        return
    look = {"color": _SCRATCH, "zorder": 2}
    panel.plot([cost / factor for cost, _ in front], [loss for _, loss in front], "o", markersize=6, **look)
    low, high = front[0][0], front[-1][0]
    costs = [low * (high / low) ** (i / 60) for i in range(60)] + [high]
    losses = [loss_at_cost(front, cost) for cost in costs]
    label = "scratch, interpolated between finished runs; one line per seed"
    panel.plot([cost / factor for cost in costs], losses, linewidth=1.2, label=label, **look)


def _draw_arm(panel: Any, results: Results, arm: str, measure: str, factor: float, place: int) -> None:
    """The way of every seed, thin, and where it ends."""
    look = {"color": _COLOURS[place % len(_COLOURS)], "marker": _MARKERS[place % len(_MARKERS)]}
    highest = _highest(results)
    for outcome in results.of_arm(arm):
        points = _points(outcome.run, measure)
        shown = [(cost / factor, loss) for cost, loss in points if loss <= highest]
        if shown:
            panel.plot(*zip(*shown, strict=True), color=look["color"], linewidth=0.6, alpha=0.5, zorder=1)
    _draw_ends(panel, results, arm, measure, factor, {**look, "label": arm})


def _draw_ends(panel: Any, results: Results, arm: str, measure: str, factor: float, look: dict[str, Any]) -> None:
    ends = [
        (cost, each.run.final_loss) for each in results.of_arm(arm) if (cost := _cost(each.run, measure)) and each.run
    ]
    known = [(cost / factor, loss) for cost, loss in ends if loss is not None]
    if not known:
        return
    (x, *_), (y, low, high) = _mean_and_reach([cost for cost, _ in known]), _mean_and_reach([loss for _, loss in known])
    errors = {"yerr": [[low], [high]], "capsize": 3, "markersize": 9, "markeredgecolor": "black", "zorder": 4}
    panel.errorbar([x], [y], linestyle="", **errors, **look)


def _mean_and_reach(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean, and how far the least and the greatest lie from it."""
    mean = sum(values) / len(values)
    return mean, mean - min(values), max(values) - mean


def _points(run: Run | None, measure: str) -> list[tuple[float, float]]:
    """(all-in cost, validation loss) of every evaluation."""
    if run is None:
        return []
    start = run.ledger.inherited_cost()[measure] or 0.0
    found = [(line.get(f"{measure}_total"), line["validation_loss"]) for line in run.lines]
    return [(start + cost, loss) for cost, loss in found if cost is not None and loss is not None]


def _highest(results: Results) -> float:
    """Losses above are left out: those of the first steps, many times higher than all that is compared."""
    losses = [each.run.final_loss for each in results.outcomes if each.run and each.run.final_loss is not None]
    return max(losses, default=0.0) + 0.25 * (max(losses, default=0.0) - min(losses, default=0.0))
