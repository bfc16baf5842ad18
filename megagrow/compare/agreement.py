"""Whether a comparison that is run again gives the table that is on record."""

from collections.abc import Iterator

from megagrow.compare.results import Results
from megagrow.report.run import Json
from megagrow.report.savings import CONVENTIONS


def disagreements(recorded: Results, again: Results) -> list[str]:
    """Means that lie outside of the least and the greatest on record, one line for each; seconds are not compared.

    Args:
        recorded: all of whose runs are there.
        again: the same settings and seeds.
    """
    found = []
    for arm in recorded.names:
        then, now = (dict(_figures(each.summary(arm))) if arm in each.names else {} for each in (recorded, again))
        for figure, known in then.items():
            mean = (now.get(figure) or {}).get("value")
            if mean is None or not known["min"] <= mean <= known["max"]:
                found.append(f"{arm}: {figure} is {_shown(mean)}, not {known['min']:.4f} to {known['max']:.4f}")
    return found


def _figures(summary: Json) -> Iterator[tuple[str, Json]]:
    """Of an arm: its loss and the FLOPs that it saves, where they are known."""
    yield "loss", summary["loss"]
    for convention in CONVENTIONS if "savings" in summary else ():
        saved = summary["savings"][convention]["flops"]
        if saved["value"] is not None:
            yield f"FLOPs saved ({convention})", saved


def _shown(mean: float | None) -> str:
    return "unknown" if mean is None else f"{mean:.4f}"
