"""Jobs one after another in a process that may crash or hang: what is done stays, and the next process takes the rest.

An illegal access on a GPU spoils everything that its process does afterwards, and a kernel may never return.
"""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_train import reason
from kernel_measure import ON_GPU

BROKEN = 3  # the exit code of a process whose GPU answers no more

Row = dict[str, Any]
Perform = Callable[[str], Row]


class Jobs:
    """Names of jobs still to be done, rows of those done, and facts about the machine, in a file.

    Attributes:
        content: `jobs`, `rows`, `facts`, `current` (the job that is being done), `until` (when no job is started any
            more) and options of the caller's.
    """

    def __init__(self, path: Path, content: dict[str, Any] | None = None) -> None:
        self.path = path
        self.content: dict[str, Any] = content if content is not None else json.loads(path.read_text())

    def write(self) -> None:
        """At once, or not at all: another process reads it."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.content))
        part.replace(self.path)

    def done(self, row: Row) -> None:
        self.content["jobs"].remove(row["name"])
        self.content["rows"].append(row)
        self.content["current"] = None
        self.write()

    def perform(self, perform: Perform) -> None:
        """In the process that may crash: one job after the other, as long as there is time."""
        while self.content["jobs"] and time.time() < self.content["until"]:
            self.content["current"] = self.content["jobs"][0]
            self.write()
            began = time.perf_counter()
            row = perform(self.content["current"])
            self.done(row | {"wall_seconds": round(time.perf_counter() - began, 1)})  # compiling included
            if is_broken(row):
                os._exit(BROKEN)  # torch's own end of the process would ask the GPU


def is_broken(row: Row) -> bool:
    """Whether a failure told of in the row spoils what follows in its process."""
    failures = [each["failed"] for each in (row, *row.get("providers", {}).values()) if "failed" in each]
    return any(sign in failure for failure in failures for sign in ("CUDA error", "Triton Error", "illegal"))


def one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"[:300]


def supervise(
    command: list[str], content: dict[str, Any], changed: Callable[[dict[str, Any]], None], longest: float
) -> dict[str, Any]:
    """Starts processes until every job has its row.

    Args:
        command: what a process is started by; the path of the file of jobs is added.
        content: of `Jobs`.
        changed: is called with the content whenever a row has come.
        longest: seconds after which a job is given up, the start of its process included.

    Returns:
        The content; each job that has no figures has a row that says why.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, errors = Path(folder) / "jobs.json", Path(folder) / "errors.txt"
        jobs = Jobs(path, content | {"rows": [], "facts": content.get("facts", {}), "current": None})
        jobs.write()
        while jobs.content["jobs"]:
            with errors.open("w") as stream:
                child = subprocess.Popen([*command, str(path)], stdout=stream, stderr=stream, env=environment())
                late = _wait(child, path, changed, longest)
            jobs = Jobs(path)
            if child.returncode == 0:
                why, affected = "the time was up", list(jobs.content["jobs"])
            elif child.returncode == BROKEN:
                why, affected = "", []
            else:
                why = late or f"{reason(errors.read_text())} (exit code {child.returncode})".strip()
                current = jobs.content["current"]
                affected = [current] if current else list(jobs.content["jobs"])  # none has begun: none will
            for name in affected:
                jobs.done({"name": name, "failed": why})
            changed(jobs.content)
        return jobs.content


def _wait(child: subprocess.Popen, path: Path, changed: Callable[[dict[str, Any]], None], longest: float) -> str | None:
    """Until it has ended, or has been ended since a job takes too long, which is then said."""
    num_rows, since = -1, time.monotonic()
    while child.poll() is None:
        time.sleep(0.1)
        content = Jobs(path).content
        if len(content["rows"]) != num_rows:
            if num_rows >= 0:
                changed(content)
            num_rows, since = len(content["rows"]), time.monotonic()
        if time.monotonic() - since > longest:
            child.kill()
            child.wait()
            return f"not done in {longest:.0f} s"
    return None


def warm_up(command: list[str], names: list[str], num_processes: int, seconds: float) -> None:
    """Has several processes run everything once, so that what is compiled is in the caches; they may fail."""
    shares = [names[i::num_processes] for i in range(num_processes)]
    children = [
        subprocess.Popen([*command, *share], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
        for share in shares
        if share
    ]
    until = time.monotonic() + seconds
    for child in children:
        try:
            child.wait(max(until - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def environment() -> dict[str, str]:
    """Of the processes: one folder for what Triton compiles, by whomever, and Triton's interpreter without a GPU."""
    cache = Path(tempfile.gettempdir()) / f"megagrow_triton_{os.getuid()}"
    own = (
        {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TRITON_CACHE_DIR": str(cache)} if ON_GPU else {"TRITON_INTERPRET": "1"}
    )
    return own | dict(os.environ)
