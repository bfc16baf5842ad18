"""What a run tells: metrics.jsonl, a progress bar or plain lines, and exit.json when it ends."""

import importlib
import json
import math
import os
import sys
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

from megagrow.config import Config
from megagrow.config_file import to_dict
from megagrow.data.files import os_errors_as_data_errors, write_atomically
from megagrow.errors import ConfigError, DataError, one_line, shown
from megagrow.json_file import parse_object

KEYS = (  # of a line of metrics.jsonl, always present, null where there is nothing to say
    "step",
    "phase",
    "tokens",
    "loss",
    "ce",
    "kd",
    "teacher_entropy",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "mfu",
    "flops_total",
    "seconds_total",
    "checkpoint_seconds",
    "validation_loss",
    "skipped",
)
METRICS_FILE = "metrics.jsonl"
EXIT_FILE = "exit.json"


class Metrics:
    """Writes one JSON object per logged step to `metrics.jsonl`; if asked, to TensorBoard and W&B.

    Each step stands once: what an interrupted run wrote after the checkpoint that it resumes from
    is dropped, because those steps are run again.

    Args:
        run_dir: the run's directory; made if need be.
        config: read for run.tensorboard and run.wandb.
        resume_step: the last step that is kept; None: the run starts anew.
        enabled: False on the ranks that only take part.

    Raises:
        ConfigError: TensorBoard or W&B is asked for and not installed.
        DataError: the existing file is damaged before its last line, or cannot be written.
    """

    def __init__(self, run_dir: Path, config: Config, resume_step: int | None = None, enabled: bool = True) -> None:
        self.path = run_dir / METRICS_FILE
        self.enabled = enabled
        self.last_step = -1
        self._writers: list[Any] = []
        if not enabled:
            return
        if config.run.tensorboard:
            self._writers.append(_TensorBoard(run_dir, resume_step))
        if config.run.wandb:
            self._writers.append(_WandB(run_dir, config))
        self.rewind(resume_step)

    def rewind(self, step: int | None) -> None:
        """Drops the lines after `step` (None: all of them) by one atomic replacement of the file."""
        if not self.enabled:
            return
        lines = [] if step is None else [line for line in read_metrics(self.path) if line["step"] <= step]
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in lines).encode())
        self.last_step = lines[-1]["step"] if lines else -1

    def log(self, *, step: int, phase: str, **values: Any) -> None:
        """Appends one line; `values` are the other KEYS, and whatever else is worth keeping.

        A number that is not finite is written as null and named under "non_finite", so that each
        line is strict JSON.
        """
        if not self.enabled:
            return
        assert step > self.last_step, f"step {step} is logged after step {self.last_step}"
        line = _strict({**dict.fromkeys(KEYS), "step": step, "phase": phase, **values})
        with os_errors_as_data_errors(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        self.last_step = step
        numbers = {k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"}
        for writer in self._writers:
            writer.log(step, numbers)

    def close(self) -> None:
        """Ends TensorBoard and W&B; the file needs no closing."""
        for writer in self._writers:
            writer.close()
        self._writers = []


READ_AS_NUMBERS = ("tokens", "loss", "validation_loss", "flops_total", "seconds_total")  # by reports


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl: none of a missing file, no last line torn by a crash.

    Raises:
        DataError: the file is damaged elsewhere, or its steps do not increase.
    """
    if not path.exists():
        return []
    with os_errors_as_data_errors(path):
        content = path.read_bytes()
    *whole, _torn = content.split(b"\n")
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(whole, 1):
        line = parse_object(text, f"{path}: line {number}", DataError, "restore or remove the line")
        if type(line.get("step")) is not int:
            raise DataError(f"{path}: line {number} is not an object with a step; restore or remove the line")
        for name in READ_AS_NUMBERS:
            value = line.get(name)
            if not isinstance(value, int | float | None) or isinstance(value, bool):
                raise DataError(f"{path}: line {number} has {name}={shown(value)}, which is no number; correct it")
        if lines and line["step"] <= lines[-1]["step"]:
            raise DataError(
                f"{path}: line {number} has step {line['step']} after step {lines[-1]['step']}; "
                "remove one of the two lines"
            )
        lines.append(line)
    return lines


def _strict(line: dict[str, Any]) -> dict[str, Any]:
    bad = [key for key, value in line.items() if isinstance(value, float) and not math.isfinite(value)]
    return {**line, **dict.fromkeys(bad), "non_finite": bad} if bad else line


class _TensorBoard:
    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        try:
            module = importlib.import_module("torch.utils.tensorboard")
        except ImportError:
            raise ConfigError(
                "run.tensorboard is set but tensorboard is not installed; "
                "pip install 'megagrow[tensorboard]' or leave the option out"
            ) from None
        purge_step = 0 if resume_step is None else resume_step + 1
        self.writer = module.SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _WandB:
    """W&B: online where WANDB_API_KEY or WANDB_MODE says so, else into the run directory."""

    def __init__(self, run_dir: Path, config: Config) -> None:
        try:
            wandb = importlib.import_module("wandb")
        except ImportError:
            raise ConfigError(
                f"run.wandb={config.run.wandb} is set but wandb is not installed; "
                "pip install 'megagrow[wandb]' or leave the option out"
            ) from None
        options = {
            "project": config.run.wandb,
            "name": run_dir.name,
            "dir": str(run_dir),
            "config": to_dict(config),
            "settings": wandb.Settings(init_timeout=30, silent=True),
        }
        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        try:
            self.run = wandb.init(mode=mode, **options)
        except wandb.errors.Error as error:
            print(
                f"W&B cannot be reached ({one_line(error)}); its data go to {run_dir / 'wandb'}",
                file=sys.stderr,
            )
            self.run = wandb.init(mode="offline", **options)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=step)

    def close(self) -> None:
        self.run.finish()


class Progress:
    """The state of the run on standard error: a bar on a terminal, else now and then a plain line.

    Args:
        total_steps: steps of the whole run.
        enabled: False on all ranks but one; nothing is shown there.
        stream: where to write; standard error when None.
        plain_interval: seconds between plain lines.
    """

    def __init__(
        self,
        total_steps: int,
        enabled: bool = True,
        stream: TextIO | None = None,
        plain_interval: float = 10.0,
    ) -> None:
        self.total_steps, self.enabled, self.plain_interval = total_steps, enabled, plain_interval
        self.stream = stream or sys.stderr
        self._history: deque[tuple[float, int]] = deque(maxlen=50)
        self._phase = ""
        self._printed = -math.inf
        self._bar: RichProgress | None = None
        self._task = TaskID(0)
        if enabled and self.stream.isatty() and os.environ.get("TERM") != "dumb":
            self._bar = _bar(self.stream)
            self._task = self._bar.add_task("", total=total_steps, visible=False, status="")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def update(
        self,
        step: int,
        *,
        phase: str,
        loss: float | None,
        lr: float | None = None,
        grad_norm: float | None = None,
        tokens_per_second: float | None = None,
        mfu: float | None = None,
        total_steps: int | None = None,
    ) -> None:
        """Shows that `step` is done, of `total_steps` where a phase has steps of its own."""
        if not self.enabled:
            return
        total = total_steps or self.total_steps
        now = time.monotonic()
        changed = phase != self._phase or (bool(self._history) and step <= self._history[-1][1])
        if changed:
            self._history.clear()
        self._phase = phase
        self._history.append((now, step))
        left = self._time_left(step, total)
        shown: dict[str, float | str | None] = {"loss {:.4f}": loss, "lr {:.2e}": lr, "grad norm {:.3g}": grad_norm}
        shown |= {
            "{:,.0f} tok/s": tokens_per_second,
            "mfu {:.1%}": mfu,
            "{} left": None if left is None else duration(left),
        }
        status = "  ".join(text.format(value) for text, value in shown.items() if value is not None)
        if self._bar is not None:
            self._bar.start()
            self._bar.update(
                self._task,
                description=phase,
                completed=step,
                total=total,
                status=status,
                visible=True,
            )
        elif changed or step == total or now - self._printed >= self.plain_interval:
            self._printed = now
            print(f"{phase} step {step}/{total}  {status}", file=self.stream, flush=True)

    def message(self, text: str) -> None:
        """Prints a line above the bar, or plainly; nothing on ranks that are not enabled."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands and gives the terminal back."""
        if self._bar is not None:
            self._bar.stop()

    def _time_left(self, step: int, total: int) -> float | None:
        (start, first), (end, last) = self._history[0], self._history[-1]
        return (end - start) / (last - first) * (total - step) if last > first else None


def _bar(stream: TextIO) -> RichProgress:
    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[status]}", markup=False),
        console=Console(file=stream),
        redirect_stdout=sys.stdout.isatty(),  # what goes into a pipe stays out of the bar's stream
    )


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def write_exit(run_dir: Path, code: int, reason: str, step: int, rank: int, host: str) -> None:
    """Writes why the run ended: launchers read it, as torchrun turns every error code into 1."""
    content = {"code": code, "reason": reason, "step": step, "rank": rank, "host": host}
    write_atomically(run_dir / EXIT_FILE, (json.dumps(content) + "\n").encode())


def clear_exit(run_dir: Path) -> None:
    """Removes the file at the start of a run: a run without one has crashed, or still runs."""
    with os_errors_as_data_errors(run_dir / EXIT_FILE):
        (run_dir / EXIT_FILE).unlink(missing_ok=True)


def read_exit(run_dir: Path) -> dict[str, Any] | None:
    """What `write_exit` wrote; None when the run has not ended or crashed.

    Raises:
        DataError: the file is malformed.
    """
    path = run_dir / EXIT_FILE
    if not path.exists():
        return None
    with os_errors_as_data_errors(path):
        raw = path.read_bytes()
    remedy = "remove the file and start the run again"
    content = parse_object(raw, path, DataError, remedy)
    if type(content.get("code")) is not int:
        raise DataError(f"{path}: not an object with an exit code; {remedy}")
    return content
