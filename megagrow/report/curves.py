"""The picture of a comparison: validation loss against all-in compute and against all-in time."""

import importlib
import io
import math
from dataclasses import dataclass
from typing import Any

from megagrow.errors import ConfigError
from megagrow.report.run import Json, Run
from megagrow.report.savings import loss_at_cost, pareto_front

Point = tuple[float, float]  # (cost, loss)

_SMALL, _SCRATCH = ("#0072B2", "s"), ("#5A5A5A", "o")  # colours of Okabe & Ito, for all eyes
_GROWN = (("#D55E00", "D"), ("#009E73", "^"), ("#CC79A7", "v"), ("#E69F00", "P"), ("#56B4E9", "X"))
_DASHED, _DOTTED, _SPARSE = (0, (5, 2)), (0, (1, 1.2)), (0, (1, 3))
_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
_SECONDS = ((86_400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


@dataclass(frozen=True)
class _Trace:
    """One run on one panel; costs are all-in, so that a grown run begins where its source ended.

    Attributes:
        start: what the run inherited.
        unknown: whether a part of that cost is unknown (and then left out of the picture).
        growths: (cost, loss before or None, loss after) of every growth.
    """

    run: Run
    colour: str
    marker: str
    style: Any
    start: float
    unknown: bool
    points: list[Point]
    growths: list[tuple[float, float | None, float]]


def draw(runs: list[Run]) -> bytes:
    """Two panels with one curve per run, as a PNG.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figures, canvases = matplotlib_parts()
    figure = figures.Figure(figsize=(12, 6.4), dpi=130, layout="constrained")
    canvas = canvases.FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    factor, prefix = decimal_scale(_largest(runs, "flops"))
    _draw_panel(left, [_trace(run, runs, "flops", factor) for run in runs])
    left.set_xlabel(f"all-in compute ({prefix}FLOP)", fontsize=12)
    factor, unit = time_unit(_largest(runs, "seconds"))
    _draw_panel(right, [_trace(run, runs, "seconds", factor) for run in runs])
    right.set_xlabel(f"all-in time ({unit})", fontsize=12)
    left.set_ylabel("validation loss (nats per token)", fontsize=12)
    left.set_ylim(*_loss_range(runs))
    entries = dict(zip(*reversed(left.get_legend_handles_labels()), strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=3, frameon=False)
    file = io.BytesIO()
    canvas.print_png(file)
    return file.getvalue()


def quantity(value: float | None, unit: str = "") -> str:
    """A number with a decimal prefix, e.g. "1.23 PFLOP", "4.56 M"; "unknown" for None."""
    if value is None:
        return "unknown"
    rounded = float(f"{value:.3g}")  # first, or 999.9 G would be 1e+03 G
    factor, prefix = decimal_scale(rounded)
    return f"{rounded / factor:.3g} {prefix}{unit}".rstrip()


def decimal_scale(value: float) -> tuple[float, str]:
    """The factor and the decimal prefix that make `value` readable."""
    power = min(max(math.floor(math.log10(value) / 3), 0), len(_PREFIXES) - 1) if value > 0 else 0
    return 1e3**power, _PREFIXES[power]


def time_unit(longest: float) -> tuple[float, str]:
    """The unit, in seconds and by name, that makes times up to `longest` readable."""
    return next(((factor, unit) for factor, unit in _SECONDS if longest > 2 * factor), _SECONDS[-1])


def matplotlib_parts() -> tuple[Any, Any]:
    """The modules of figures and of what draws them into memory.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        names = ("matplotlib.figure", "matplotlib.backends.backend_agg")
        figures, canvases = (importlib.import_module(name) for name in names)
    except ImportError:
        raise ConfigError("curves.png needs matplotlib, which is not installed; pip install 'megagrow[plot]'") from None
    return figures, canvases


def _trace(run: Run, runs: list[Run], measure: str, factor: float) -> _Trace:
    inherited = run.ledger.inherited_cost()[measure]
    start, total = inherited or 0.0, f"{measure}_total"
    grown = [(start + (e.get(total) or 0.0), e.get("loss_before"), e["loss_after"]) for e in _growths(run)]
    points = [(start + (line.get(total) or 0.0), line["validation_loss"]) for line in _evaluated(run)]
    points += [(cost, after) for cost, _, after in grown] + _initial_points(run, measure, start)
    colour, marker = _SMALL
    if run.is_scratch:
        colour, marker = _SCRATCH
    elif run.is_grown:
        names = [other.name for other in runs if other.is_grown]
        colour, marker = _GROWN[names.index(run.name) % len(_GROWN)]
    return _Trace(
        run,
        colour,
        marker,
        style=_DOTTED if run.is_scratch else "-" if run.is_grown else _DASHED,
        start=start / factor,
        unknown=inherited is None,
        points=sorted(((x / factor, y) for x, y in points), key=lambda point: point[0]),
        growths=[(x / factor, before, after) for x, before, after in grown],
    )


def _initial_points(run: Run, measure: str, start: float) -> list[Point]:
    """Where learned maps began; what they cost lies between there and the growth."""
    learned = sum(getattr(phase, measure) or 0.0 for phase in run.ledger.phases if phase.phase == "ligo")
    event = run.growth
    if not learned or event is None or event.get("loss_initial") is None:
        return []
    return [(start + (event.get(f"{measure}_total") or 0.0) - learned, event["loss_initial"])]


def _evaluated(run: Run) -> list[Json]:
    return [line for line in run.lines if line.get("validation_loss") is not None]


def _growths(run: Run) -> list[Json]:
    events = [event for event in run.ledger.events if event["event"] == "growth"]
    return [event for event in events if event.get("loss_after") is not None]


def _largest(runs: list[Run], measure: str) -> float:
    traces = [_trace(run, runs, measure, 1.0) for run in runs]
    return max((x for trace in traces for x, _ in trace.points), default=0.0)


def _draw_panel(panel: Any, traces: list[_Trace]) -> None:
    for trace in traces:
        if trace.points:
            _draw_run(panel, trace)
    for trace in traces:
        if trace.growths:
            _draw_growth(panel, trace)
    _draw_front(panel, [t.points[-1] for t in traces if t.run.is_scratch and not t.run.unfinished])
    end = {"color": "none", "marker": "o", "markersize": 11, "markeredgecolor": "black"}
    panel.plot([], [], label="end of a finished run", **end)
    panel.margins(x=0.08)
    panel.set_xlim(left=0)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def _draw_run(panel: Any, trace: _Trace) -> None:
    run, (x, y) = trace.run, trace.points[-1]
    label = "scratch, one curve per budget" if run.is_scratch else run.name
    label += " (cost of its source unknown)" if trace.unknown else ""
    label += " (unfinished)" if run.unfinished else ""
    look = {"color": trace.colour, "marker": trace.marker, "zorder": 5 if run.is_grown else 3}
    line = {"linestyle": trace.style, "linewidth": 1.8, "markersize": 4.5}
    every = max(len(trace.points) // 12, 1)
    panel.plot(*zip(*trace.points, strict=True), label=label, markevery=every, **line, **look)
    if not run.unfinished:
        panel.plot(x, y, markersize=11, markeredgecolor="black", linestyle="", **look)
        place = {"textcoords": "offset points", "ha": "center", "va": "top", "zorder": 4, "fontsize": 9}
        paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6}
        panel.annotate(run.name, (x, y), (0, -9), color=trace.colour, bbox=paper, **place)


def _draw_growth(panel: Any, trace: _Trace) -> None:
    first, _, level = trace.growths[0]
    colour = trace.colour
    if trace.start > 0:
        line = {"color": colour, "linewidth": 1.6, "marker": "|"}
        inherited = "inherited: small model, scoring"
        panel.plot([0, trace.start], [level] * 2, linestyle=_SPARSE, label=inherited, **line)
        panel.plot([trace.start, first], [level] * 2, label="cost of growing", **line)
    star = {"color": colour, "marker": "*", "markersize": 17, "markeredgecolor": "black"}
    for x, before, after in trace.growths:
        label = "growth; arrow: from the loss before it"
        panel.plot(x, after, linestyle="", zorder=6, label=label, **star)
        if before is not None:
            arrow = {"arrowstyle": "->", "color": colour, "linewidth": 1.4, "shrinkB": 7}
            panel.annotate("", xy=(x, after), xytext=(x, before), arrowprops=arrow, zorder=4)


def _draw_front(panel: Any, ends: list[Point]) -> None:
    """What the report interpolates, without runs that a cheaper one equals."""
    front = pareto_front(ends)
    if len(front) < 2:
        return
    low, high = front[0][0], front[-1][0]
    costs = [low + (high - low) * i / 100 for i in range(100)] + [high]
    losses = [loss_at_cost(front, cost) for cost in costs]
    label = "scratch, interpolated between finished runs"
    panel.plot(costs, losses, color=_SCRATCH[0], linewidth=1.2, zorder=2, label=label)


def _loss_range(runs: list[Run]) -> tuple[float, float]:
    """Ends and growth at full height; the first steps, many times higher, leave at the top."""
    losses = [line["validation_loss"] for run in runs for line in _evaluated(run)]
    if not losses:
        return 0.0, 1.0
    telling = [run.final_loss for run in runs]
    telling += [e.get(k) for run in runs for e in _growths(run) for k in ("loss_before", "loss_after")]
    high = max((loss for loss in telling if loss is not None), default=max(losses))
    room = max(high - min(losses), 0.05)
    return min(losses) - 0.12 * room, high + 0.25 * room
