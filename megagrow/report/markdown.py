"""The report for people."""

from megagrow.metrics import duration
from megagrow.report.curves import quantity
from megagrow.report.run import Json
from megagrow.report.selection_text import selection_words


def to_markdown(report: Json) -> str:
    """The report for people: who won by how much, what it cost, and how far to believe it."""
    sections = [
        "# Growing against training from scratch",
        _headline(report),
        "![Validation loss against all-in FLOPs and time](curves.png)",
        "## Arms",
        _arms_table(report),
        f"## Savings of {report['grown_arm'] or 'growing'} at equal validation loss",
        _savings_words(report),
        "## Growth",
        _growth_words(report),
        selection_words(report["selections"]),
        "## How far to believe it",
        "\n".join(f"- {caveat}" for caveat in report["caveats"]),
        "\n".join(f"- {name} is left out of all comparisons: {why}." for name, why in report["unfinished"].items()),
        _footer(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _headline(report: Json) -> str:
    comparison = report["comparison_at_equal_all_in_flops"]
    if comparison is None:
        return "None of these runs has grown, so there is nothing to compare."
    return f"**{comparison['sentence'][0].upper()}{comparison['sentence'][1:]}.**"


def _arms_table(report: Json) -> str:
    columns = ["run", "parameters", "steps", "final validation loss (nats/token)", "compute"]
    columns += ["all-in compute", "tokens", "time", "all-in time"]
    rows = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    named = {name: a for name, a in report["arms"].items() if name != "scratch"}
    named |= {budget["name"]: budget for budget in report["scratch_budgets"]}
    for name, a in named.items():
        loss = a["final_validation_loss"]
        cells = [f"[{name}]({a['path']})", quantity(a["params"]), f"{a['steps']:,}"]
        cells += [f"{loss:.4f}" if loss is not None else "not finished"]
        cells += [quantity(entry["flops"], "FLOP") for entry in (a, a["all_in"])]
        cells += [quantity(a["tokens"]), _time(a["seconds"]), _time(a["all_in"]["seconds"])]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _savings_words(report: Json) -> str:
    titles = {
        "papers_convention": "By the papers' convention (the small model and scoring cost nothing)",
        "all_in": "All-in (small model, scoring, operator, teacher and training all counted)",
    }
    lines = []
    for convention, title in titles.items():
        entry = report["savings"][convention]
        words = "; ".join(_saving(entry, measure) for measure in _UNITS)
        reasons = dict.fromkeys(reason for reason in entry["reason"].values() if reason)
        lines.append(f"- {title}: {words}" + "".join(f" ({reason})" for reason in reasons) + ".")
    return "\n".join(lines)


def _saving(entry: Json, measure: str) -> str:
    value, bound, unit = entry[measure], entry["bound"][measure], _UNITS[measure]
    if value is not None:
        return f"**{_fewer(value)} {unit}**"
    if bound is None:
        return f"{unit} unknown"
    ((side, limit),) = bound.items()
    side = "at least" if (side == "at_least") == (limit >= 0) else "at most"
    return f"{side} {_fewer(limit)} {unit}"


_UNITS = {"flops": "FLOPs", "seconds": "seconds"}


def _fewer(saving: float) -> str:
    return f"{saving:.1%} fewer" if saving >= 0 else f"{-saving:.1%} more"


def _growth_words(report: Json) -> str:
    event = report["growth"]
    if event is None:
        return "No growth is recorded."
    steps = [
        ("before growing", "loss_before"),
        ("as it began", "loss_initial"),
        ("after", "loss_after"),
    ]
    losses = [f"{event[key]:.4f} {what}" for what, key in steps if event.get(key) is not None]
    method, all_losses = event.get("method", "unknown"), ", ".join(losses) or "unknown"
    return f"Method {method}, at step {event['step']}; loss {all_losses}."


def _footer(report: Json) -> str:
    host, corpus = report["machine"], report["corpus"]
    return (
        f"Corpus {corpus['train'] or 'unknown'}, held out {corpus['validation'] or 'unknown'}; "
        f"attention's FLOPs counted by the convention `{report['flops_convention']}`. "
        f"Made {report['date']} from commit {report['commit']} on {host['cpu']}, "
        f"{host['cores']} cores, torch {host['torch']}. All numbers are in report.json."
    )


def _time(seconds: float | None) -> str:
    return "unknown" if seconds is None else duration(seconds)
