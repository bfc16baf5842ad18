"""Compares with the real thing; `make peers` installs what that needs."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest


def pytest_pycollect_makemodule() -> None:
    """Before the first file is imported: a suite that compares with nothing must not pass."""
    lines = (Path(__file__).parent / "requirements.txt").read_text().splitlines()
    missing = [line for line in lines if not line.startswith("#") and not _is_installed(*line.split("=="))]
    if missing:
        raise pytest.Collector.CollectError(f"not installed: {', '.join(missing)}; `make peers` does it")


def _is_installed(name: str, wanted: str) -> bool:
    try:
        return version(name) == wanted
    except PackageNotFoundError:
        return False
