"""The picture of a comparison: validation loss against all-in FLOPs and against time, every arm where its costs begin."""

import importlib
import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from megagrow.errors import ConfigError
from megagrow.report.run import Json, Run
from megagrow.report.savings import loss_at_cost, pareto_front

_COLOURS = {
    "small": "#0072B2",
    "scratch": "#5A5A5A",
}  # Okabe & Ito's palette: told apart by colour-blind readers too
_GROWN_COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = {"small": "s", "scratch": "o"}
_GROWN_MARKERS = ("D", "^", "v", "P", "X")
_STYLES = {"small": (0, (5, 2)), "scratch": (0, (1, 1.2)), "grown": "-"}


@dataclass(frozen=True)
class Growth:
    """One growth of a run: what the run itself had spent by then, and the losses around it."""

    flops: float
    seconds: float
    loss_before: float | None
    loss_after: float
    method: str = ""


@dataclass(frozen=True)
class Curve:
    """One run's validation losses (nats per token) against its own cost, and the cost of what it builds on (None: unknown)."""

    name: str
    kind: Literal["small", "scratch", "grown"]
    flops: list[float]
    seconds: list[float]
    losses: list[float]
    finished: bool
    inherited_flops: float | None = 0.0
    inherited_seconds: float | None = 0.0
    growths: list[Growth] = field(default_factory=list)


@dataclass(frozen=True)
class _Axis:
    title: str
    unit: str
    factor: float
    costs: Callable[[Curve], list[float]]
    inherited: Callable[[Curve], float | None]
    moment: Callable[[Growth], float]


def draw(curves: list[Curve]) -> bytes:
    """Two panels as a PNG.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figure_module, canvas_module = _matplotlib()
    figure = figure_module.Figure(figsize=(12, 6.2), dpi=130, layout="constrained")
    canvas = canvas_module.FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for panel, axis in ((left, _flops_axis(curves)), (right, _seconds_axis(curves))):
        _draw_panel(panel, axis, curves)
    left.set_ylabel("validation loss (nats per token)")
    left.set_ylim(*_loss_range(curves))
    handles, labels = left.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=10
        )
    file = io.BytesIO()
    canvas.print_png(file)
    return file.getvalue()


def quantity(value: float | None, unit: str = "") -> str:
    """A number with a decimal prefix, e.g. "1.23 PFLOP", "4.56 M"; "unknown" for None."""
    if value is None:
        return "unknown"
    factor, prefix = scale(value)
    return f"{value / factor:.3g} {prefix}{unit}".rstrip()


def scale(value: float) -> tuple[float, str]:
    """The decimal prefix that makes `value` readable, and its factor."""
    prefixes = (
        (1e24, "Y"),
        (1e21, "Z"),
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
    )
    return next(((f, p) for f, p in prefixes if abs(value) >= f), (1.0, ""))


def _matplotlib() -> tuple[Any, Any]:
    try:
        return importlib.import_module("matplotlib.figure"), importlib.import_module(
            "matplotlib.backends.backend_agg"
        )
    except ImportError:
        raise ConfigError(
            "curves.png needs matplotlib, which is not installed; pip install 'megagrow[plot]'"
        ) from None


def _flops_axis(curves: list[Curve]) -> _Axis:
    largest = max((x + (c.inherited_flops or 0.0) for c in curves for x in c.flops), default=0.0)
    factor, prefix = scale(largest)
    return _Axis(
        "all-in compute",
        f"{prefix}FLOP",
        factor,
        lambda c: c.flops,
        lambda c: c.inherited_flops,
        lambda g: g.flops,
    )


def _seconds_axis(curves: list[Curve]) -> _Axis:
    largest = max(
        (x + (c.inherited_seconds or 0.0) for c in curves for x in c.seconds), default=0.0
    )
    units = ((86_400.0, "days"), (3600.0, "hours"), (60.0, "minutes"))
    factor, unit = next(((f, u) for f, u in units if largest > 2 * f), (1.0, "seconds"))
    return _Axis(
        "all-in time",
        unit,
        factor,
        lambda c: c.seconds,
        lambda c: c.inherited_seconds,
        lambda g: g.seconds,
    )


def _draw_panel(panel: Any, axis: _Axis, curves: list[Curve]) -> None:
    labels: set[str] = set()
    grown = [curve.name for curve in curves if curve.kind == "grown"]
    for curve in curves:
        index = grown.index(curve.name) if curve.kind == "grown" else 0
        colour = _COLOURS.get(curve.kind, _GROWN_COLOURS[index % len(_GROWN_COLOURS)])
        marker = _MARKERS.get(curve.kind, _GROWN_MARKERS[index % len(_GROWN_MARKERS)])
        _draw_run(panel, axis, curve, colour, marker, labels)
    _draw_front(
        panel, [_end(curve, axis) for curve in curves if curve.kind == "scratch" and curve.finished]
    )
    panel.plot(
        [],
        [],
        "o",
        markersize=11,
        color="none",
        markeredgecolor="black",
        label="end of a finished run",
    )
    panel.set_xlabel(f"{axis.title} ({axis.unit})", fontsize=12)
    panel.set_xlim(left=0)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def _draw_run(
    panel: Any, axis: _Axis, curve: Curve, colour: str, marker: str, labels: set[str]
) -> None:
    start = (axis.inherited(curve) or 0.0) / axis.factor
    moments = [
        (start + axis.moment(growth) / axis.factor, growth.loss_after) for growth in curve.growths
    ]
    costs = [start + cost / axis.factor for cost in axis.costs(curve)]
    points = sorted([*moments, *zip(costs, curve.losses, strict=True)], key=lambda point: point[0])
    if not points:
        return
    look = {"color": colour, "marker": marker, "zorder": 5 if curve.kind == "grown" else 3}
    label = _once(_label(curve, axis), labels)
    line = {"linestyle": _STYLES[curve.kind], "linewidth": 1.8, "markersize": 4.5}
    panel.plot(
        *zip(*points, strict=True), label=label, markevery=max(len(points) // 12, 1), **line, **look
    )
    if curve.finished:
        x, y = _end(curve, axis)
        panel.plot(x, y, markersize=11, markeredgecolor="black", linestyle="", **look)
        panel.annotate(
            curve.name,
            (x, y),
            (0, 10),
            textcoords="offset points",
            fontsize=9,
            ha="center",
            color=colour,
        )
    if start > 0:
        text = _once("inherited cost: small model, scoring", labels)
        panel.plot(
            [0, start],
            [points[0][1]] * 2,
            color=colour,
            linestyle=(0, (1, 3)),
            linewidth=1.4,
            label=text,
        )
        panel.plot([0], [points[0][1]], "|", color=colour, markersize=9, clip_on=False)
    for growth, (x, y) in zip(curve.growths, moments, strict=True):
        method = f" ({growth.method})" if growth.method else ""
        text = _once(f"grown{method}; arrow: from the loss before", labels)
        panel.plot(
            x,
            y,
            "*",
            color=colour,
            markersize=17,
            markeredgecolor="black",
            zorder=6,
            linestyle="",
            label=text,
        )
        if growth.loss_before is not None:
            arrow = {"arrowstyle": "->", "color": colour, "linewidth": 1.4, "shrinkB": 7}
            panel.annotate(
                "", xy=(x, y), xytext=(x, growth.loss_before), arrowprops=arrow, zorder=4
            )


def _draw_front(panel: Any, ends: list[tuple[float, float]]) -> None:
    """The loss that the report interpolates: linear in log cost, without the runs that a cheaper one equals."""
    front = pareto_front(ends)
    if len(front) < 2:
        return
    low, high = front[0][0], front[-1][0]
    costs = [low + (high - low) * i / 100 for i in range(100)] + [high]
    losses = [loss_at_cost(front, cost) for cost in costs]
    label = "scratch, interpolated between finished runs"
    panel.plot(
        costs, losses, color=_COLOURS["scratch"], linewidth=1.2, alpha=0.8, zorder=2, label=label
    )


def _end(curve: Curve, axis: _Axis) -> tuple[float, float]:
    return (axis.inherited(curve) or 0.0) / axis.factor + axis.costs(curve)[
        -1
    ] / axis.factor, curve.losses[-1]


def _label(curve: Curve, axis: _Axis) -> str:
    name = "scratch, one curve per budget" if curve.kind == "scratch" else curve.name
    unknown = " (cost of its source unknown)" if axis.inherited(curve) is None else ""
    return f"{name}{unknown}" + ("" if curve.finished else " (unfinished)")


def _once(label: str, seen: set[str]) -> str | None:
    """The label, or None when a legend entry already has it."""
    if label in seen:
        return None
    seen.add(label)
    return label


def _loss_range(curves: list[Curve]) -> tuple[float, float]:
    """Shows the ends and the growth at full height; the first steps, many times higher, leave at the top."""
    losses = [loss for curve in curves for loss in curve.losses if math.isfinite(loss)]
    if not losses:
        return 0.0, 1.0
    telling = [curve.losses[-1] for curve in curves if curve.finished]
    telling += [
        loss
        for c in curves
        for g in c.growths
        for loss in (g.loss_before, g.loss_after)
        if loss is not None
    ]
    low, high = min(losses), max(telling or losses)
    room = max(high - low, 0.05)
    return low - 0.08 * room, high + 0.25 * room


def curve(run: Run) -> Curve:
    """The run's validation losses against what it and all that it builds on had cost by then."""
    inherited = run.ledger.inherited_cost()
    points = [line for line in run.lines if line.get("validation_loss") is not None]
    events = [event for event in run.ledger.events if event["event"] == "growth"]
    return Curve(
        name=run.name,
        kind="scratch" if run.is_scratch else "grown" if run.is_grown else "small",
        flops=[line.get("flops_total") or 0.0 for line in points],
        seconds=[line.get("seconds_total") or 0.0 for line in points],
        losses=[line["validation_loss"] for line in points],
        finished=not run.unfinished,
        inherited_flops=inherited["flops"],
        inherited_seconds=inherited["seconds"],
        growths=[
            _growth_moment(run, event) for event in events if event.get("loss_after") is not None
        ],
    )


def _growth_moment(run: Run, event: Json) -> Growth:
    """Where growing stands on the axes: what the steps before it and the operator had cost."""
    before = [line for line in run.lines if line["step"] <= event["step"]]
    flops, seconds = (
        (before[-1].get(k) or 0.0) if before else 0.0 for k in ("flops_total", "seconds_total")
    )
    if not before:
        learned = [p for p in run.ledger.phases if p.phase in ("ligo", "growth")]
        flops, seconds = (sum(getattr(p, k) or 0.0 for p in learned) for k in ("flops", "seconds"))
    return Growth(
        flops, seconds, event.get("loss_before"), event["loss_after"], event.get("method", "")
    )
