"""Tests ../megagrow/metrics.py: files that stay right through interruptions, and what is shown where."""

import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from megagrow.config import Config, RunConfig
from megagrow.errors import ConfigError, DataError
from megagrow.metrics import KEYS, Metrics, Progress, clear_exit, duration, read_exit, read_metrics, write_exit


def log_steps(metrics: Metrics, first: int, last: int) -> None:
    for step in range(first, last + 1):
        metrics.log(step=step, phase="train", loss=10.0 / max(step, 1), tokens=100 * step)


def steps(run_dir: Path) -> list[int]:
    return [line["step"] for line in read_metrics(run_dir / "metrics.jsonl")]


def test_a_line_has_every_key_in_order_and_null_for_the_rest(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, Config())
    metrics.log(step=1, phase="salt", loss=2.5, kd=0.1, skipped=False, extra="kept")
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert tuple(line) == (*KEYS, "extra")
    assert (line["loss"], line["kd"], line["skipped"], line["mfu"]) == (2.5, 0.1, False, None)


@pytest.mark.parametrize("torn", ["", '{"step": 8, "pha', '{"step": 8}'])
def test_steps_after_the_checkpoint_are_dropped_and_run_again(torn: str, tmp_path: Path) -> None:
    log_steps(Metrics(tmp_path, Config()), 1, 7)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + torn)
    unbroken = path.read_text().splitlines()[:7]
    resumed = Metrics(tmp_path, Config(), resume_step=5)
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    log_steps(resumed, 6, 7)
    assert path.read_text().splitlines() == unbroken


def test_a_new_run_begins_an_empty_file(tmp_path: Path) -> None:
    log_steps(Metrics(tmp_path, Config()), 0, 3)
    log_steps(Metrics(tmp_path, Config(), resume_step=None), 0, 1)
    assert steps(tmp_path) == [0, 1]


def test_a_roll_back_drops_what_it_takes_back(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, Config())
    log_steps(metrics, 1, 6)
    metrics.rewind(4)
    log_steps(metrics, 5, 5)
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


def test_damage_before_the_last_line_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(DataError, match="line 2: not valid JSON"):
        Metrics(tmp_path, Config(), resume_step=3)
    path.write_text('{"step": 1}\n{"step": 1}\n')
    with pytest.raises(DataError, match="line 2 has step 1 after step 1"):
        read_metrics(path)


def test_every_line_is_strict_json_when_the_loss_is_not_finite(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, Config())
    metrics.log(step=1, phase="train", loss=float("nan"), grad_norm=float("inf"), lr=0.1)
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (line["loss"], line["grad_norm"], line["lr"]) == (None, None, 0.1)
    assert line["non_finite"] == ["loss", "grad_norm"]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "run", Config(run=RunConfig(tensorboard=True)), enabled=False)
    log_steps(metrics, 1, 2)
    metrics.rewind(1)
    metrics.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics(tmp_path, Config(run=RunConfig(tensorboard=True)))
    log_steps(metrics, 1, 3)
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 10.0), (2, 5.0), (3, pytest.approx(10 / 3))]


@pytest.mark.parametrize(
    ("config", "module", "extra"),
    [
        (RunConfig(tensorboard=True), "torch.utils.tensorboard", r"megagrow\[tensorboard\]"),
        (RunConfig(wandb="project"), "wandb", r"megagrow\[wandb\]"),
    ],
)
def test_a_writer_that_is_not_installed_names_its_extra(
    config: RunConfig, module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=extra):
        Metrics(tmp_path, Config(run=config))


class FakeWandB(types.ModuleType):
    """As much of W&B as is used; `reachable` decides whether going online works."""

    class Error(Exception):
        """wandb.errors.Error"""

    def __init__(self, reachable: bool) -> None:
        super().__init__("wandb")
        self.errors = types.SimpleNamespace(Error=self.Error)
        self.reachable, self.modes, self.logged = reachable, [], []

    def Settings(self, **values: Any) -> dict[str, Any]:
        return values

    def init(self, mode: str, **options: Any) -> "FakeWandB":
        self.modes.append(mode)
        if mode == "online" and not self.reachable:
            raise self.Error("no\nroute")
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.logged.append((step, numbers["loss"]))

    def finish(self) -> None:
        self.logged.append("finished")


@pytest.mark.parametrize(
    ("key", "reachable", "modes"),
    [("", True, ["offline"]), ("secret", True, ["online"]), ("secret", False, ["online", "offline"])],
)
def test_wandb_without_a_network_does_not_stop_a_run(
    key: str, reachable: bool, modes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = FakeWandB(reachable)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", key)
    metrics = Metrics(tmp_path, Config(run=RunConfig(wandb="project")))
    log_steps(metrics, 1, 2)
    metrics.close()
    assert wandb.modes == modes
    assert wandb.logged == [(1, 10.0), (2, 5.0), "finished"]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def show(stream: io.StringIO, **options: Any) -> str:
    with Progress(3, stream=stream, **options) as progress:
        for step in (1, 2, 3):
            progress.update(step, phase="train", loss=4.5, lr=1e-3, grad_norm=0.5, tokens_per_second=12_345.6, mfu=0.4)
        progress.message("saved [bold]step-3[/bold]")
    return stream.getvalue()


def test_without_a_terminal_there_are_plain_lines() -> None:
    shown = show(io.StringIO(), plain_interval=0.0)
    assert "\x1b" not in shown
    assert "\r" not in shown
    first, *_, last = shown.splitlines()
    assert first == "train step 1/3  loss 4.5000  lr 1.00e-03  grad norm 0.5  12,346 tok/s  mfu 40.0%"
    assert last == "saved [bold]step-3[/bold]"


def test_plain_lines_are_few_but_the_first_and_the_last_step_stand() -> None:
    stream = io.StringIO()
    with Progress(1000, stream=stream, plain_interval=3600.0) as progress:
        for step in range(1, 1001):
            progress.update(step, phase="train", loss=None)
    assert [line.split()[2] for line in stream.getvalue().splitlines()] == ["1/1000", "1000/1000"]


def test_a_phase_with_steps_of_its_own_is_shown_with_them() -> None:
    stream = io.StringIO()
    with Progress(100, stream=stream, plain_interval=3600.0) as progress:
        progress.update(7, phase="small", loss=1.0)
        progress.update(1, phase="ligo", loss=1.0, total_steps=20)
        progress.update(8, phase="salt", loss=1.0)
    assert [line.split("  ")[0] for line in stream.getvalue().splitlines()] == [
        "small step 7/100",
        "ligo step 1/20",
        "salt step 8/100",
    ]


def test_time_left_is_what_the_last_steps_took(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 102.0, 104.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    stream = io.StringIO()
    progress = Progress(63, stream=stream, plain_interval=0.0)
    for step in (1, 2, 3):
        progress.update(step, phase="train", loss=1.0)
    assert stream.getvalue().splitlines()[-1].endswith("2:00 left")


def test_a_terminal_gets_a_bar_and_messages_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    shown = show(Terminal())
    assert "\x1b[" in shown
    assert "3/3" in shown
    assert "loss 4.5000" in shown
    assert "saved [bold]step-3[/bold]" in shown


def test_other_ranks_show_nothing() -> None:
    assert show(Terminal(), enabled=False) == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (7325, "2:02:05")])
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_exit_json_says_why_a_run_ended_until_it_begins_again(tmp_path: Path) -> None:
    assert read_exit(tmp_path) is None
    write_exit(tmp_path, 5, "loss nan", step=3, rank=1, host="node7")
    assert read_exit(tmp_path) == {"code": 5, "reason": "loss nan", "step": 3, "rank": 1, "host": "node7"}
    clear_exit(tmp_path)
    assert read_exit(tmp_path) is None
    clear_exit(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", '{"code": "0"}'])
def test_a_damaged_exit_json_is_reported(content: str, tmp_path: Path) -> None:
    (tmp_path / "exit.json").write_text(content)
    with pytest.raises(DataError, match=r"exit\.json"):
        read_exit(tmp_path)
