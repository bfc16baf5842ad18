"""The agent of one node: torchrun, but it ends with the run's own exit code.

    python launch/agent.py TORCHRUN_OPTIONS -- PRESET_OR_FILE [--section.field VALUE ...]

torchrun turns every failure into 1, while schedulers need the code to know whether to start the job again. It runs in
this process, not in a child: SLURM signals only what it has started, Kubernetes only the first process of a container.

`MAX_CRASHES=N` in the environment ends a crash loop: after N starts in a row that crashed or hung at one and the same
checkpoint the next start is refused with code 2, until `crashes.jsonl` in the run's directory is removed.
"""

import json
import os
import socket
import sys
from contextlib import suppress
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import main as torchrun

from megagrow.command_line import parse
from megagrow.errors import ConfigError, DataError, HangError, MegagrowError, Preempted
from megagrow.metrics import clear_exit, read_exit, write_exit

CRASH = 1  # no exit.json, or an error that the run did not foresee
TOLD = range(ConfigError.exit_code, Preempted.exit_code + 1)  # codes that only the run itself gives
SIGNALLED = 128  # plus the signal's number, as in a shell: stopped before it could save, which is no crash
CRASHES_FILE = "crashes.jsonl"


def main(arguments: list[str]) -> int:
    """Runs torchrun and returns the run's exit code (DESIGN section 8), 1 for a crash."""
    split = arguments.index("--")
    options, command = arguments[:split], arguments[split + 1 :]
    try:
        directory = Path(parse(command).run.dir)
        refuse_crash_loop(directory)
        clear_exit(directory)  # one that is left from before would be taken for this run's if it never starts
    except MegagrowError as error:
        note_refusal(command, error)
        return tell(error.exit_code, str(error))
    start = newest_checkpoint(directory)
    code, reason = run([*options, "-m", "megagrow", *command], directory)
    if code in (CRASH, HangError.exit_code):
        note_crash(directory, code, start)
    return tell(code, reason)


def run(arguments: list[str], directory: Path) -> tuple[int, str]:
    """torchrun in this process; the exit code and its reason."""
    try:
        torchrun(arguments)
        return 0, "done"
    except (ChildFailedError, RendezvousError, SignalException) as error:
        failure = error
    with suppress(DataError):
        if told := read_exit(directory):
            return told["code"], told["reason"]
    return code_of(failure), f"no exit.json: {failure}"


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


def refuse_crash_loop(directory: Path) -> None:
    """Raises ConfigError if the last MAX_CRASHES starts all ended where the next one would begin."""
    limit, path = int(os.environ.get("MAX_CRASHES", "0")), directory / CRASHES_FILE
    if limit and path.exists():
        last = [json.loads(line) for line in path.read_text().splitlines()][-limit:]
        here = newest_checkpoint(directory)
        if len(last) == limit and all(crash["checkpoint"] == here for crash in last):
            where = f"at {here}" if here else "before the first checkpoint"
            raise ConfigError(
                f"{path}: the last {limit} starts crashed or hung {where}, MAX_CRASHES={limit} allows no more; "
                "look at the log, then remove the file"
            )


def note_refusal(command: list[str], error: MegagrowError) -> None:
    """Writes exit.json for a run that is not started: a scheduler that ends the other agents sees their codes, too."""
    *_, name = ["", *(value for option, value in pairwise(command) if option == "--run.dir")]
    if name and Path(name).is_dir():
        with suppress(MegagrowError, OSError):
            write_exit(Path(name), error.exit_code, str(error), 0, 0, socket.gethostname())


def note_crash(directory: Path, code: int, start: str) -> None:
    """Adds a line to crashes.jsonl, the checkpoint that this start began from; the first node does it for all."""
    if "MAX_CRASHES" in os.environ and os.environ.get("NODE_RANK", "0") == "0":
        now, host = datetime.now(UTC).isoformat(timespec="seconds"), socket.gethostname()
        directory.mkdir(parents=True, exist_ok=True)
        with open(directory / CRASHES_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps({"date": now, "host": host, "code": code, "checkpoint": start}) + "\n")


def newest_checkpoint(directory: Path) -> str:
    """The name of the newest checkpoint of a run, "" if there is none."""
    with suppress(OSError, ValueError, KeyError):
        return json.loads((directory / "checkpoints" / "latest").read_text())["step"]
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
