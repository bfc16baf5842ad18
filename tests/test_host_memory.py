"""What the C library does with freed memory, in a process of its own."""

import subprocess
import sys

PROGRAM = """
import torch
from megagrow.host_memory import keep_freed_memory

def held():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) // 1024

def used_and_freed():
    before = held()
    blocks = [torch.ones(8 * 2**18) for _ in range(20)]  # 8 MiB each
    del blocks
    return held() - before

print(used_and_freed())
keep_freed_memory()
print(used_and_freed())
"""


def test_freed_memory_is_kept_once_asked_for() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before < 40 and after > 140  # MiB of 160
