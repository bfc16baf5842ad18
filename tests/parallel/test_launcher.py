"""Tests megagrow/parallel/launcher.py: a launcher that is killed takes its ranks along."""

import os
import subprocess
import sys
import time
from pathlib import Path

RANK = """
import time
from megagrow.parallel.launcher import end_with_launcher
end_with_launcher()
print("ready", flush=True)
time.sleep(60)
"""
# Starts its rank as torchrun does: in a new session, which a signal to the launcher's process group does not reach.
LAUNCHER = """
import subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True)
print(rank.pid, flush=True)
rank.wait()
"""


def is_running(pid: int) -> bool:
    """Whether the process is there and is not merely waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_rank_does_not_outlive_its_launcher() -> None:
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "test", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", LAUNCHER, RANK]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as launcher:
        assert launcher.stdout is not None
        first, second = (launcher.stdout.readline().strip() for _ in range(2))
        pid = int(first if second == "ready" else second)
        assert is_running(pid)
        launcher.kill()
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(pid)
