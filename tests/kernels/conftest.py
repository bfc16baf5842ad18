"""Sends every test marked `interpreted` to the process that interprets kernels."""

from inspect import signature

import pytest

from tests.kernels import interpreter

PROCESS = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreted: runs where Triton interprets kernels")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if pyfuncitem.get_closest_marker("interpreted") is None:
        return None
    stash = pyfuncitem.config.stash
    if PROCESS not in stash:
        stash[PROCESS] = interpreter.start()
    arguments = {name: pyfuncitem.funcargs[name] for name in signature(pyfuncitem.obj).parameters}
    stash[PROCESS].submit(interpreter.run, pyfuncitem.module.__name__, pyfuncitem.originalname, arguments).result()
    return True


def pytest_unconfigure(config: pytest.Config) -> None:
    if PROCESS in config.stash:
        config.stash[PROCESS].shutdown()
