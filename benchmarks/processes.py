"""Processes that a benchmark measures in: how they are started, and the memory that they hold."""

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

MIB = 2**20
WORD = "measured"


def launch(script: str, *arguments: str, ranks: int = 1, threads: int = 2, **environment: str) -> list[dict[str, Any]]:
    """Runs a script in fresh processes.

    Args:
        script: its path.
        arguments: what its command line says.
        ranks: processes; more than one are started by torchrun.
        threads: of each.
        environment: variables beside those of this process.

    Returns:
        What they `tell`, in no order; ends this process with the end of their errors if they fail.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads), **environment}
    command = [sys.executable, *launcher, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    if done.returncode:
        raise SystemExit(f"{Path(script).name} {' '.join(arguments)} failed:\n{done.stderr[-4000:]}")
    return [json.loads(line[line.index("{") :]) for line in done.stdout.splitlines() if f"{WORD} {{" in line]


def tell(found: dict[str, Any]) -> None:
    """Says what this process has measured to the one that has launched it."""
    print(WORD, json.dumps(found), flush=True)


def status(name: str) -> int:
    """A figure of /proc/self/status in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def settle() -> int:
    """Collects, trims, and lets the peak start anew; returns the bytes of anonymous pages that are left."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    forget_peak()
    return status("RssAnon")


def forget_peak() -> None:
    """VmHWM starts anew."""
    Path("/proc/self/clear_refs").write_text("5")


def anonymous_peak() -> int:
    """The most bytes of anonymous pages at a time since `settle`."""
    return status("VmHWM") - status("RssFile") - status("RssShmem")
