"""Writes what a comparison found: report.json, report.md, savings.csv and curves.png."""

import csv
import datetime
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megagrow.compare.controls import CONTROLS, tuned_as
from megagrow.compare.picture import draw
from megagrow.compare.questions import TASKS
from megagrow.compare.recipes import RECIPES
from megagrow.compare.results import Outcome, Results
from megagrow.compare.suite import NEVER_GROWN, SMALL
from megagrow.compare.suites import SUITES
from megagrow.compare.table import to_markdown
from megagrow.config import ModelConfig
from megagrow.data.files import write_atomically
from megagrow.report.curves import quantity
from megagrow.report.run import Json
from megagrow.report.savings import CONVENTIONS, MEASURES
from megagrow.roles import num_parameters
from megagrow.timeline import step_tokens


def write_report(results: Results, output: Path) -> Json:
    """Writes the four files into `output` and returns the content of report.json.

    Args:
        results: of the comparison, finished or not.
        output: a folder.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    picture = draw(results)
    report = content(results)
    write_atomically(output / "curves.png", picture)
    write_atomically(output / "savings.csv", to_csv(report).encode())
    write_atomically(output / "report.md", to_markdown(report).encode())
    write_atomically(output / "report.json", (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
    return report


def content(results: Results) -> Json:
    """What report.json holds."""
    experiment = results.experiment
    suite, sweep = experiment.suite, experiment.sweep
    everyone = [SMALL, *suite.scratch_arms, *experiment.controls, *experiment.arms]
    starved = [each for each in results.outcomes if results.is_starved(each)]
    summaries = {name: results.summary(name) for name in results.names}
    baseline = [summary for name, summary in summaries.items() if name in suite.scratch_arms]
    return {
        "suite": suite.name,
        "size": suite.size,
        "about": (SUITES[suite.name].__doc__ or "").strip(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commits": _distinct(results, "commit"),
        "machines": _distinct(results, "machine"),
        "dates": _distinct(results, "date"),
        "corpus": experiment.corpus.facts(),
        "models": {"source": _model(suite.source), "target": _model(suite.target)},
        "budget_flops": suite.budget,
        "step_tokens": step_tokens(suite.base),
        "eval_tokens": suite.base.train.eval_batches * step_tokens(suite.base),
        "is_causal": suite.target.is_causal,
        "num_questions": experiment.num_questions,
        "seeds": list(suite.seeds),
        "winner_seeds": list(suite.winner_seeds),
        "winner": results.winner,
        "small": summaries.get(SMALL),
        "scratch": baseline,
        "controls": [summary for name, summary in summaries.items() if name in experiment.controls],
        "arms": [summary for name, summary in summaries.items() if name in experiment.arms],
        "about_arms": {name: RECIPES[name].about for name in suite.arms},
        "about_controls": {name: CONTROLS[name].about for name in experiment.controls},
        "refused": experiment.refused,
        "diverged": [_named(each) + f": {each.line.reason}" for each in results.diverged() if each.line]
        + [f"{arm}, at every learning rate" for arm in sweep.diverging([NEVER_GROWN, *experiment.arms])]
        + [f"the small model of {_named(each)}" for each in starved],
        "not_finished": [_named(each) for each in results.outcomes if each.line is None and each not in starved]
        + [arm for arm in everyone if not experiment.knows(arm) and tuned_as(arm) not in sweep.diverging(everyone)],
        "rows": [results.row(each) for each in results.outcomes if each.run is not None],
        "sweep": {"fixed": sweep.fixed, "rows": [vars(row) for row in sweep.rows]},
        "caveats": list(_caveats(results)),
    }


def to_csv(report: Json) -> str:
    """One line for each reported run."""
    columns = ["suite", "size", "corpus", "key", "arm", "seed", "lr", "map_lr", "steps", "loss"]
    columns += [f"{measure}_{convention}" for convention in CONVENTIONS for measure in MEASURES]
    savings = [(c, m) for c in CONVENTIONS for m in MEASURES]
    columns += [f"saving_{measure}_{convention}" for convention, measure in savings]
    columns += [
        "nats_at_equal_flops",
        "loss_before",
        "loss_initial",
        "loss_after",
        "steps_to_recover",
        *TASKS,
        "reason",
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    known = {"suite": report["suite"], "size": report["size"], "corpus": report["corpus"]["sha256"]}
    for row in report["rows"]:
        line = known | {name: row[name] for name in columns if name in row}
        line |= {f"{m}_{c}": row["costs"][c][m] for c in CONVENTIONS for m in MEASURES}
        line |= row["scores"] or {}
        if "savings" in row:
            line |= {f"saving_{m}_{c}": row["savings"][c][m]["value"] for c, m in savings}
            line["reason"] = "; ".join(
                dict.fromkeys(filter(None, (row["savings"][c][m]["reason"] for c, m in savings)))
            )
        writer.writerow(line)
    return text.getvalue()


def _model(model: ModelConfig) -> Json:
    sizes = {"family": model.family, "layers": model.num_layers, "hidden": model.hidden_size, "ffn": model.ffn_size}
    return {**sizes, "heads": model.num_heads, "vocabulary": model.vocab_size, "parameters": num_parameters(model)}


def _named(outcome: Outcome) -> str:
    return f"{outcome.arm}, seed {outcome.seed}"


def _distinct(results: Results, name: str) -> list[Any]:
    """What lines of reported runs say under a name, each once."""
    return sorted({getattr(each.line, name) for each in results.outcomes if each.line})


def _caveats(results: Results) -> Iterator[str]:
    """What a reader must know before believing the numbers."""
    experiment = results.experiment
    suite, sweep = experiment.suite, experiment.sweep
    seeds = len(suite.seeds)
    more = f" ({seeds + len(suite.winner_seeds)} of the best arm and of scratch)" if suite.winner_seeds else ""
    yield f"{seeds} seed{'s' if seeds > 1 else ''} per arm{more}: differences within the spread mean nothing."
    parameters = num_parameters(suite.target)
    if parameters < 1e8:
        yield f"Small scale ({quantity(parameters)} parameters): larger models need their own measurement."
    if sweep.fixed is not None:
        yield f"Nothing was tuned: every arm ran at a learning rate of {sweep.fixed:g}."
    tuned = [SMALL, *suite.scratch_arms, NEVER_GROWN, *experiment.arms]
    for end in ("lowest", "highest"):
        arms = [name for name in tuned if sweep.at_end(name) == end]
        if arms:
            yield f"The best learning rate is the {end} that was tried; one beyond may be better: {', '.join(arms)}."
    maps = [name for name in experiment.arms if sweep.maps_at_end(name)]
    if maps:
        yield f"The best rate of the maps is the lowest that was tried; one below may be better: {', '.join(maps)}."
    largest = max([*suite.scratch_arms.values(), *suite.small_arms.values()]) * step_tokens(suite.base)
    epochs = largest / int(experiment.corpus.facts()["train_tokens"])
    if epochs > 1:
        yield f"The longest run reads the corpus {epochs:.1f} times."
    if not suite.target.is_causal:
        yield "Encoders are asked no questions: they have no likelihood of a text."
    yield f"Controls other than {NEVER_GROWN} are not tuned: each has the rates of what it is about."
    chords = [str(seed) for seed in suite.seeds if 0 < len(results.front(seed)) < 3]
    if chords:
        yield (
            f"Fewer than three scratch runs count on seeds {', '.join(chords)}, as others are missing or ended above a "
            "cheaper one: savings there are read from a chord, which overstates them."
        )
    yield "Seconds run from the first step on, with saving, without start-up and evaluation."
    parallel = _distinct(results, "parallel")
    if parallel and parallel != [1]:
        beside = " or ".join(map(str, parallel))
        yield f"{beside} runs shared the machine at a time, so seconds are those of a busy machine."
    if len(_distinct(results, "machine")) > 1:
        yield "Runs were on several kinds of machine: losses are compared across them, seconds are not."
