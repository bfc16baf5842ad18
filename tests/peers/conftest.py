"""Runs every test of this suite where Triton interprets kernels, theirs too; `make peers` installs what it needs."""

import warnings
from importlib.metadata import PackageNotFoundError, version
from inspect import signature
from pathlib import Path

import pytest

from tests.kernels import interpreter

PROCESS = pytest.StashKey()


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


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    stash = pyfuncitem.config.stash
    if PROCESS not in stash:
        stash[PROCESS] = interpreter.start(_install)
    arguments = {name: pyfuncitem.funcargs[name] for name in signature(pyfuncitem.obj).parameters}
    stash[PROCESS].submit(interpreter.run, pyfuncitem.module.__name__, pyfuncitem.originalname, arguments).result()
    return True


def _install() -> None:
    from tests.peers import lenient

    lenient.install()
    # torch 2.13's compiler looks at the gradient of whatever it is given.
    warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if PROCESS in terminalreporter.config.stash:
        for line in terminalreporter.config.stash[PROCESS].submit(_table).result():
            terminalreporter.write_line(line)


def _table() -> list[str]:
    from tests.peers.agreement import FIGURES

    head = f"{'largest errors, in eps of the largest element of a row':70}{'ours':>12}{'theirs':>12}{'apart':>12}"
    return [head, *(f"{each.name:70}{each.ours:12.3g}{each.theirs:12.3g}{each.apart:12.3g}" for each in FIGURES)]


def pytest_unconfigure(config: pytest.Config) -> None:
    if PROCESS in config.stash:
        config.stash[PROCESS].shutdown()
