"""Runs every test of this suite where Triton interprets kernels, theirs too."""

import warnings
from inspect import signature

import pytest

from tests.kernels import interpreter

PROCESS = pytest.StashKey()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    stash = pyfuncitem.config.stash
    if PROCESS not in stash:
        stash[PROCESS] = interpreter.start(_install)
    arguments = {name: pyfuncitem.funcargs[name] for name in signature(pyfuncitem.obj).parameters}
    stash[PROCESS].submit(interpreter.run, pyfuncitem.module.__name__, pyfuncitem.originalname, arguments).result()
    return True


def _install() -> None:
    from tests.peers.kernels import lenient

    lenient.install()
    # torch 2.13's compiler looks at the gradient of whatever it is given.
    warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if PROCESS in terminalreporter.config.stash:
        for line in terminalreporter.config.stash[PROCESS].submit(_table).result():
            terminalreporter.write_line(line)


def _table() -> list[str]:
    from tests.peers.kernels.agreement import FIGURES

    head = f"{'largest errors, in eps of the largest element of a row':70}{'ours':>12}{'theirs':>12}{'apart':>12}"
    return [head, *(f"{each.name:70}{each.ours:12.3g}{each.theirs:12.3g}{each.apart:12.3g}" for each in FIGURES)]


def pytest_unconfigure(config: pytest.Config) -> None:
    if PROCESS in config.stash:
        config.stash[PROCESS].shutdown()
