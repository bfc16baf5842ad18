"""Runs a file of tools/ as the command line does, in this process: it has imported torch, which takes seconds."""

import runpy
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"


def run_tool(name: str, *arguments: object) -> int:
    """Runs tools/NAME.py; returns its exit code."""
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(SystemExit) as ended:
        monkeypatch.setattr(sys, "argv", [str(TOOLS / f"{name}.py"), *map(str, arguments)])
        monkeypatch.syspath_prepend(str(TOOLS))
        runpy.run_path(sys.argv[0], run_name="__main__")
    return int(ended.value.code or 0)
