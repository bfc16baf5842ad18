"""Sends every test marked `interpreted` to the process that interprets kernels.

When all tests are run, of every such test a fifth of its cases is; `make kernels` (`pytest tests/kernels`) runs all.
"""

from inspect import signature
from pathlib import Path

import pytest

from tests.kernels import interpreter

PROCESS = pytest.StashKey()
SHARE = 5


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreted: runs where Triton interprets kernels")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    if all(here in item.path.parents for item in items):
        return
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("interpreted"):
            cases.setdefault(item.nodeid.split("[")[0], []).append(item)
    left_out = {item for of_one in cases.values() for i, item in enumerate(of_one) if i % SHARE}
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))


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
