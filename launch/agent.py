"""The agent of one node: torchrun, but it ends with the run's own exit code.

    python launch/agent.py TORCHRUN_OPTIONS -- PRESET_OR_FILE [--section.field VALUE ...]

torchrun turns every failure into 1, while schedulers need the code to know whether to start the job again. It runs in
this process, not in a child: SLURM signals only what it has started, Kubernetes only the first process of a container.

`MAX_CRASHES=N` in the environment ends a crash loop: after N starts in a row that crashed or hung at one and the same
checkpoint the next start is refused with code 2, until `crashes.jsonl` in the run's directory is removed. A start is
noted there before it begins, and struck off if it did not crash: one whose agent was killed counts too. Where torch or
megagrow cannot be imported the code is 2 as well: the next start would meet the same.
"""

import json
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

SIGNALLED = 128  # plus the signal's number, as in a shell: stopped before it could save, which is no crash
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def stop_early(number: int, _: FrameType | None) -> NoReturn:
    """Until there are ranks, which torchrun passes signals to: the kernel drops those that the first process of a
    container does not listen to, and the pod would wait for nodes that never come."""
    sys.exit(SIGNALLED + number)


if __name__ == "__main__":
    for each in SIGNALS:
        signal.signal(each, stop_early)

try:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import main as torchrun

    from megagrow.command_line import DRY_RUN, parse
    from megagrow.config import Config
    from megagrow.data.files import write_atomically
    from megagrow.errors import ConfigError, DataError, HangError, MegagrowError, Preempted
    from megagrow.metrics import EXIT_FILE, clear_exit, read_exit, write_exit
    from megagrow.train.saving import root_of
except ImportError as error:
    print(f"megagrow: exit code 2: {sys.executable} lacks what a run needs: {error}", file=sys.stderr, flush=True)
    sys.exit(2)

CRASH = 1  # no exit.json, or an error that the run did not foresee
TOLD = range(ConfigError.exit_code, Preempted.exit_code + 1)  # codes that only the run itself gives
CRASHES_FILE = "crashes.jsonl"
EXIT_SECONDS = 3.0  # after which exit.json, written on another node, is seen here if it is there


def main(arguments: list[str]) -> int:
    """Runs torchrun and returns the run's exit code (docs/design.md, section 8), 1 for a crash."""
    split = arguments.index("--")
    options, command = arguments[:split], arguments[split + 1 :]
    if DRY_RUN in command:
        return dry_run([*options, "-m", "megagrow", *command])
    try:
        config = parse(command)
        directory = Path(config.run.dir)
        if is_first_node():  # for all: others may come when this start is noted already, or refused
            refuse_crash_loop(directory, config)
            clear_exit(directory)
    except MegagrowError as error:
        note_refusal(command, error)
        return tell(error.exit_code, str(error))
    start = note_start(directory, config) if is_first_node() else None
    code, reason = run([*options, "-m", "megagrow", *command], directory)
    note_end(directory, start, code)
    return tell(code, reason)


def is_first_node() -> bool:
    """Whether this is the agent that sees to the run's directory."""
    return os.environ.get("NODE_RANK", "0") == "0"


def run(arguments: list[str], directory: Path) -> tuple[int, str]:
    """torchrun in this process; the exit code and its reason."""
    before = stamp_of_exit(directory)  # one that is left would be taken for this run's if it never starts
    try:
        torchrun(arguments)
        return 0, "done"
    except SystemExit as stopped:  # by `stop_early`
        return int(stopped.code or 0), "stopped before the ranks had started"
    except (ChildFailedError, RendezvousError, SignalException) as error:
        failure = error
    finally:
        ignore_signals()
    with suppress(DataError):
        if told := wait_for_exit(directory, before):
            return told["code"], told["reason"]
    return code_of(failure), f"no exit.json: {failure}"


def ignore_signals() -> None:
    """From torchrun's end on: whoever ends the other nodes' agents must not hide how this one ended."""
    for number in SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_DFL, signal.SIG_IGN):
            signal.signal(number, signal.SIG_IGN)


def dry_run(arguments: list[str]) -> int:
    """torchrun in this process, for a run that only shows its plan: it leaves nothing, and no exit.json is its own."""
    try:
        torchrun(arguments)
        return 0
    except (ChildFailedError, RendezvousError, SignalException) as failure:
        return code_of(failure)


def stamp_of_exit(directory: Path) -> tuple[int, int] | None:
    """What tells one exit.json from the next, which replaces it."""
    with suppress(OSError):
        found = (directory / EXIT_FILE).stat()
        return found.st_ino, found.st_mtime_ns
    return None


def wait_for_exit(directory: Path, before: tuple[int, int] | None) -> dict[str, Any] | None:
    """exit.json, unless it is still the one of `before`.

    Network file systems may show it a little late, and sooner when the directory is listed.
    """
    deadline = time.monotonic() + EXIT_SECONDS
    while True:
        with suppress(OSError):
            os.listdir(directory)
        told = read_exit(directory) if stamp_of_exit(directory) != before else None
        if told or time.monotonic() > deadline:
            return told
        time.sleep(0.2)


def code_of(failure: Exception) -> int:
    """What is known where the run left no exit.json; without a directory, for example, it cannot."""
    if isinstance(failure, SignalException):
        return SIGNALLED + failure.sigval
    ranks = failure.failures.values() if isinstance(failure, ChildFailedError) else ()
    return next((rank.exitcode for rank in ranks if rank.exitcode in TOLD), CRASH)


def tell(code: int, reason: str) -> int:
    """Prints how it ended, unless all is well; returns the code."""
    if code:
        print(f"megagrow: exit code {code}: {reason}", file=sys.stderr, flush=True)
    return code


def refuse_crash_loop(directory: Path, config: Config) -> None:
    """Raises ConfigError if the last MAX_CRASHES starts all ended where the next one would begin."""
    given = os.environ.get("MAX_CRASHES", "0")
    if not given.isdecimal():
        raise ConfigError(f"MAX_CRASHES={given} must be a whole number; 0 counts no crashes")
    if limit := int(given):
        last, here = crashes(directory)[-limit:], newest_checkpoint(config)
        if len(last) == limit and all(crash["checkpoint"] == here for crash in last):
            where = f"at {here}" if here else "before the first checkpoint"
            raise ConfigError(
                f"{directory / CRASHES_FILE}: the last {limit} starts crashed or hung {where}, "
                f"MAX_CRASHES={limit} allows no more; look at the log, then remove the file"
            )


def note_refusal(command: list[str], error: MegagrowError) -> None:
    """Writes exit.json for a run that is not started: a scheduler that ends the other agents sees their codes, too."""
    given = (value for option, value in pairwise([*command, ""]) if option == "--run.dir")
    *_, name = ["", *given, *(each.partition("=")[2] for each in command if each.startswith("--run.dir="))]
    if name and Path(name).is_dir():
        with suppress(MegagrowError, OSError):
            write_exit(Path(name), error.exit_code, str(error), 0, 0, socket.gethostname())


def note_start(directory: Path, config: Config) -> dict[str, Any] | None:
    """Adds a line to crashes.jsonl, the checkpoint that this start begins from."""
    if "MAX_CRASHES" not in os.environ:
        return None
    now, host = datetime.now(UTC).isoformat(timespec="microseconds"), socket.gethostname()
    start = {"date": now, "host": host, "code": None, "checkpoint": newest_checkpoint(config)}
    with suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        write_crashes(directory, [*crashes(directory), start])
    return start


def note_end(directory: Path, start: dict[str, Any] | None, code: int) -> None:
    """Gives the line of this start its code, or removes it when that is no crash."""
    if start is not None:
        others = [crash for crash in crashes(directory) if crash != start]
        crashed = code in (CRASH, HangError.exit_code)
        write_crashes(directory, [*others, start | {"code": code}] if crashed else others)


def crashes(directory: Path) -> list[dict[str, Any]]:
    """The lines of crashes.jsonl, without those that cannot be read."""
    found = []
    with suppress(OSError):
        for line in (directory / CRASHES_FILE).read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                crash = json.loads(line)
                found += [crash] if isinstance(crash, dict) and "checkpoint" in crash else []
    return found


def write_crashes(directory: Path, lines: list[dict[str, Any]]) -> None:
    """Replaces crashes.jsonl; a full or broken file system must not end a run or hide its code."""
    with suppress(MegagrowError, OSError):
        if lines:
            write_atomically(directory / CRASHES_FILE, "".join(json.dumps(line) + "\n" for line in lines).encode())
        else:
            (directory / CRASHES_FILE).unlink(missing_ok=True)


def newest_checkpoint(config: Config) -> str:
    """The name of the newest checkpoint of a run, "" if there is none."""
    with suppress(OSError, ValueError, KeyError):
        return json.loads((root_of(config) / "latest").read_bytes())["step"]
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
