"""Two torchrun agents on one machine ("nodes") give what one agent gives with as many ranks, bit for bit."""

import dataclasses
import json
import socket
import subprocess
from pathlib import Path

import pytest

from megagrow.checkpoint.convert import convert
from megagrow.config import ParallelConfig
from megagrow.config_file import dump
from tests.launch.scripts import LAUNCH, Programs
from tests.train.runs import make_config, metrics

RANKS = 4  # data 2 x tensor 2


@pytest.fixture(scope="module")
def folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run's configuration."""
    folder = tmp_path_factory.mktemp("nodes")
    config = dataclasses.replace(make_config(corpus, folder), parallel=ParallelConfig(tensor=2))
    (folder / "config.json").write_text(dump(config))
    return folder


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    return Programs(tmp_path_factory.mktemp("programs"))


@pytest.fixture(scope="module")
def one(folder: Path, programs: Programs) -> Path:
    """The directory of the run on one node."""
    command = [str(LAUNCH / "torchrun.sh"), str(folder / "config.json"), "--run.dir", str(folder / "one")]
    environment = programs.environment(NPROC_PER_NODE=str(RANKS))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return folder / "one"


@pytest.fixture(scope="module")
def two(folder: Path, programs: Programs) -> Path:
    """The directory of the run on two nodes with half of the ranks each."""
    command = [str(LAUNCH / "multinode.sh"), str(folder / "config.json"), "--run.dir", str(folder / "two")]
    meeting = {"NNODES": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "LOCAL_ADDR": "127.0.0.1"}
    agents = []
    for node in ("0", "1"):
        environment = programs.environment(**meeting, NODE_RANK=node, NPROC_PER_NODE=str(RANKS // 2))
        agents.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        errors = [agent.communicate(timeout=250)[1] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], errors
    return folder / "two"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def manifests(run: Path) -> list[dict]:
    """The manifests of a run's checkpoints; where a tensor's bytes lie, and their hash, is under `items`."""
    return [json.loads(path.read_text()) for path in sorted(run.glob("checkpoints/step-*/manifest.json"))]


def test_losses_are_equal(one: Path, two: Path) -> None:
    assert len(metrics(one)) == 6
    assert metrics(two) == metrics(one)


def test_checkpoints_hold_the_same_bytes_of_every_tensor(one: Path, two: Path) -> None:
    ours, theirs = manifests(two), manifests(one)
    assert [each["step"] for each in theirs] == [2, 4, 6]
    for found, expected in zip(ours, theirs, strict=True):
        assert expected["layout"]["world_size"] == RANKS and expected["layout"]["axes"]["tp"] == 2
        assert len({item["sha256"] for item in expected["items"]}) > len(expected["tensors"]) / 2
        for part in ("step", "layout", "tensors", "items"):
            assert found[part] == expected[part], part


def test_exported_weights_are_the_same_file(one: Path, two: Path) -> None:
    for run in (one, two):
        convert(run, run / "hf", "hf")
    exported = [(run / "hf" / "model.safetensors").read_bytes() for run in (one, two)]
    assert len(exported[0]) > 10_000 and exported[0] == exported[1]
