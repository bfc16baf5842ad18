"""A corpus and a trained small model, made once for all tests of megagrow/train; tests must not write to them."""

from pathlib import Path

import pytest

from megagrow.train import run
from tests.train.runs import make_config, make_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files of bytes."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a small model that has learned enough to fit its data."""
    directory = tmp_path_factory.mktemp("trained")
    assert run(make_config(corpus, directory, steps=40)) == 0
    return directory


@pytest.fixture(scope="session")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of six plain steps in one go, with the checkpoints of every second one."""
    directory = tmp_path_factory.mktemp("whole")
    assert run(make_config(corpus, directory)) == 0
    return directory
