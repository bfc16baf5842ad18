"""Reads the runs, compares them, writes the three files."""

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path

import torch

from megagrow.data.files import write_atomically
from megagrow.errors import ConfigError
from megagrow.report.curves import draw, quantity
from megagrow.report.markdown import to_markdown
from megagrow.report.run import Json, Run, check_comparable, load_run
from megagrow.report.savings import compare, known_costs, no_savings
from megagrow.report.selection import selection_of
from megagrow.roles import num_parameters

PRIMARY_ARM = "grown_salt"
MIN_BUDGETS = 3


def build_report(run_dirs: list[Path], output: Path) -> Json:
    """Reads the run directories and writes report.json, report.md and curves.png below `output`.

    Returns:
        The content of report.json.

    Raises:
        ConfigError: no runs, two of one name, or matplotlib is not installed.
        DataError: a directory holds no run, or runs differ in what their losses depend on.
        CheckpointError: a ledger is damaged.
    """
    runs = [load_run(path) for path in run_dirs]
    if not runs:
        raise ConfigError("no run directories are given; name at least one")
    for name in (run.name for run in runs):
        if sum(run.name == name for run in runs) > 1:
            raise ConfigError(f"two run directories are called {name}; arms are told apart by this name, rename one")
    check_comparable(runs)
    picture = draw(runs)
    report = summarize(runs, output)
    write_atomically(output / "curves.png", picture)
    write_atomically(output / "report.md", to_markdown(report).encode())
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    write_atomically(output / "report.json", text.encode())
    return report


def summarize(runs: list[Run], output: Path) -> Json:
    """The content of report.json; paths in it are relative to `output`."""
    scratch = sorted(
        (run for run in runs if run.is_scratch and not run.unfinished),
        key=lambda run: run.cost("all_in", "flops") or 0.0,
    )
    arms = {run.name: arm(run, output) for run in runs if not run.is_scratch}
    if scratch:
        arms["scratch"] = {"run": scratch[-1].name, **arm(scratch[-1], output)}
    comparisons = {run.name: compare(run, scratch) for run in runs if run.is_grown}
    primary = PRIMARY_ARM if PRIMARY_ARM in comparisons else next(iter(comparisons), None)
    grown = next((run for run in runs if run.name == primary), None)
    comparison = comparisons.get(primary or "") or {"savings": no_savings("no run has grown")}
    event = (grown.growth if grown else None) or {}
    data = (grown or runs[0]).config.data
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "flops_convention": (grown or runs[0]).ledger.convention,
        "corpus": {
            "train": data.train,
            "validation": data.validation,
            "seq_length": data.seq_length,
        },
        "arms": arms,
        "scratch_budgets": [{"name": run.name, **arm(run, output)} for run in scratch],
        "unfinished": {run.name: run.unfinished for run in runs if run.unfinished},
        "grown_arm": primary,
        "savings": comparison["savings"],
        "comparison_at_equal_all_in_flops": comparison.get("at_equal_all_in_flops"),
        "loss_before_growth": event.get("loss_before"),
        "loss_after_growth": event.get("loss_after"),
        "growth": event or None,
        "comparisons": comparisons,
        "selections": {run.name: picked for run in runs if (picked := selection_of(run)) is not None},
        "caveats": caveats(runs, scratch, grown),
    }


def arm(run: Run, output: Path) -> Json:
    """One arm's size, loss and costs: by the papers' convention, and all-in under "all_in"."""
    totals = run.ledger.totals()
    return {
        "path": os.path.relpath(run.path, output),
        "params": num_parameters(run.config.model),
        "steps": run.lines[-1]["step"] if run.lines else 0,
        "finished": not run.unfinished,
        "final_validation_loss": run.final_loss,
        **totals["papers_convention"],
        "all_in": totals["all_in"],
    }


def caveats(runs: list[Run], scratch: list[Run], grown: Run | None) -> list[str]:
    """What a reader must know before believing the numbers."""
    found = ["One seed per arm: differences as small as those between seeds mean nothing."]
    if len(scratch) < MIN_BUDGETS:
        found.append(f"{len(scratch)} scratch budgets are finished; interpolation should rest on {MIN_BUDGETS}.")
    spent = grown.cost("all_in", "flops") if grown else None
    if spent and scratch and spent > max(known_costs(scratch, "all_in", "flops"), default=0.0):
        found.append("No scratch run was given as many FLOPs as the grown arm spent all-in.")
    hosts = {str(run.exit["host"]) for run in runs if run.exit and run.exit.get("host")}
    if len(hosts) > 1:
        found.append(
            f"The runs were made on several machines ({', '.join(sorted(hosts))}): their seconds may not compare."
        )
    largest = max(num_parameters(run.config.model) for run in runs)
    if largest < 1e8:
        found.append(f"Small scale ({quantity(largest)} parameters): larger models need their own measurement.")
    found.append("Seconds run from the first step on, with saving, without start-up and evaluation.")
    found.append("What a crash lost since the last checkpoint is in no total.")
    found.append("Seconds assume that every run had the machine to itself.")
    return found


def machine() -> Json:
    """The machine that makes the report: processor, cores, accelerator, torch."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the code that runs; "unknown" outside of its repository."""
    here = Path(__file__)
    for command in (["ls-files", "--error-unmatch", here.name], ["rev-parse", "HEAD"]):
        try:
            done = subprocess.run(["git", *command], cwd=here.parent, capture_output=True, text=True, check=False)
        except OSError:
            return "unknown"
        if done.returncode != 0:
            return "unknown"
    return done.stdout.strip()
