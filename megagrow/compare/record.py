"""Ended runs on record: one file for a suite on a corpus, a line for a run, kept with the project.

Run directories may go; what a report says of a run stays. A line is written, and on disk, as soon as its run has ended,
and a run that stands there is not carried out again. Runs are known by what decides them (`settings_of`), not by name
or place.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megagrow.config import CheckpointConfig, Config, RunConfig
from megagrow.data.files import os_errors_as_data_errors
from megagrow.errors import DataError
from megagrow.json_file import parse_object
from megagrow.ledger import Ledger
from megagrow.report.run import Json, Run

GENERATION = 2  # raised when the same settings come to give other runs: by a changed default, or by the trainer itself
_REMEDY = "restore the file, or delete the line to run it again"


class RecordedRun(Run):
    """A run as comparisons charge it: by the papers' convention nobody pays for a small model that was given.

    Stages of a run's own are no such model: the authors of MSLT and G_stack count them.
    """

    def cost(self, convention: str, measure: str) -> float | None:
        """One of the totals."""
        if convention == "papers_convention":
            return self.ledger.own(without=("scoring",))[measure]
        return super().cost(convention, measure)


@dataclass(frozen=True)
class Line:
    """One run that has ended.

    Attributes:
        key: `key_of` its settings.
        name: of arm, rates and seed.
        steps: at its end, those that learn maps included.
        loss: held-out, at its end; None: it has diverged.
        reason: why it ended otherwise than by its schedule.
        ledger: `Ledger.to_dict`.
        curve: [step, loss, FLOPs, seconds] of each evaluation; of runs that only tune, none.
        scores: of each downstream task; None: it was asked none.
        settings: what the key is made from.
        machine: that it ran on.
        parallel: runs that shared the machine.
        commit, date: of the code, and when it ended.
    """

    key: str
    name: str
    steps: int
    loss: float | None
    reason: str
    ledger: Json
    curve: list[list[float]]
    scores: dict[str, float] | None
    settings: Json
    machine: str
    parallel: int
    commit: str
    date: str

    def run(self, config: Config) -> RecordedRun | None:
        """The run as reports take it; None: it has diverged.

        Args:
            config: of the job that has this key.
        """
        if self.loss is None:
            return None
        points: list[list[Any]] = [*self.curve, [self.steps, self.loss, None, None]]
        names = "step", "validation_loss", "flops_total", "seconds_total"
        lines = [dict(zip(names, point, strict=True)) for point in points]
        ended = {"code": 0, "reason": self.reason, "step": self.steps}
        return RecordedRun(self.name, Path(config.run.dir), config, lines, Ledger.from_dict(self.ledger), ended)


class Record:
    """The lines of a file, which need not be there yet.

    Suites with one target have scratch runs in common: a run that a file beside it has need not be run again.

    Raises:
        DataError: a line is damaged, or two say different things of one run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = _read(path)
        others = (other for other in sorted(path.parent.glob("*.jsonl")) if other != path)
        self._others = {other: _read(other) for other in others}

    def find(self, key: str) -> Line | None:
        """The line of a run, if it has ended.

        Raises:
            DataError: it is not in this file, and two others say different things of it.
        """
        if key in self._lines:
            return self._lines[key]
        found = {other: lines[key] for other, lines in self._others.items() if key in lines}
        if len({line.loss for line in found.values()}) > 1:
            said = " and ".join(f"{line.loss} ({other})" for other, line in found.items())
            raise DataError(f"{next(iter(found.values())).name} ends at {said}; delete all lines of it but one")
        return next(iter(found.values()), None)

    def adopt(self, key: str) -> Line | None:
        """The same; a line that another file has is copied from there."""
        line = self.find(key)
        if line is not None:
            self.add(line)
        return line

    def add(self, line: Line) -> None:
        """Appends a line, unless one of that run is there; it is on disk when this returns."""
        if line.key in self._lines:
            return
        text = json.dumps(asdict(line), allow_nan=False, separators=(",", ":")) + "\n"
        with os_errors_as_data_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # another comparison may share the file
                file.truncate(sum(map(len, _whole_lines(self.path))))
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
        self._lines[line.key] = line


def settings_of(config: Config, corpus: str, questions: int, small: str) -> Json:
    """What decides a run, as plain data: its texts and its small model by hash, not where they lie.

    Settings at their defaults are left out, so that one that is new leaves old runs what they are.

    Args:
        config: of the run.
        corpus: hash of its texts.
        questions: of each downstream task.
        small: key of the small model.
    """
    placed = replace(
        config,
        data=replace(config.data, train=corpus, validation=corpus, tokenizer=corpus),
        init=replace(config.init, from_=small if config.init.from_ else ""),
        salt=replace(config.salt, teacher=small if config.salt.teacher else ""),
        checkpoint=CheckpointConfig(),
        run=RunConfig(),
    )
    found: Json = _changed(placed)
    return {"generation": GENERATION, "questions": questions, **found}


def key_of(settings: Json) -> str:
    """What a run is known by."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def _changed(value: Any) -> Any:
    """A configuration as plain data, without what has its default."""
    if isinstance(value, tuple):
        return [_changed(each) for each in value]
    if not dataclasses.is_dataclass(value):
        return value
    pairs = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
    return {field.name.rstrip("_"): _changed(own) for field, own in pairs if own != _default(field)}


def _default(field: "dataclasses.Field[Any]") -> Any:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def _whole_lines(path: Path) -> list[bytes]:
    """The lines of a file without the last one where a crash has torn it."""
    if not path.is_file():
        return []
    with os_errors_as_data_errors(path):
        return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def _read(path: Path) -> dict[str, Line]:
    """Key -> line."""
    lines: dict[str, Line] = {}
    for number, raw in enumerate(_whole_lines(path), 1):
        line = _parsed(raw, f"{path}: line {number}")
        known = lines.setdefault(line.key, line)
        if known.loss != line.loss:
            raise DataError(f"{path}: two lines of {line.name} end at {known.loss} and {line.loss}; delete one")
    return lines


def _parsed(raw: bytes, where: str) -> Line:
    fields = parse_object(raw, where, DataError, _REMEDY)
    if set(fields) != {field.name for field in dataclasses.fields(Line)}:
        raise DataError(f"{where}: is no run of a comparison; {_REMEDY}")
    return Line(**fields)
