"""Tests the files of launch/: each is well formed, gives its reasons, and starts the same command."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from megagrow import errors
from megagrow.command_line import parse
from tests.launch.scripts import LAUNCH, Programs, command_of, torchrun_options

SCRIPTS = sorted(path for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
FINAL = [
    error.exit_code for error in (errors.ConfigError, errors.DataError, errors.CheckpointError, errors.NonFiniteError)
]
AGAIN = [1, errors.HangError.exit_code, errors.Preempted.exit_code]


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    programs = Programs(tmp_path)
    programs.add("python")
    return programs


def documents(name: str) -> dict[str, Any]:
    """The documents of a YAML file by kind; a file without kinds has one, named ""."""
    return {each.get("kind", ""): each for each in yaml.safe_load_all((LAUNCH / name).read_text())}


def agent_of(programs: Programs) -> list[str]:
    """The arguments of the only agent that was started."""
    (call,) = programs.calls("python")
    assert Path(call["arguments"][0]) == LAUNCH / "agent.py"
    return call["arguments"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_it(script: Path) -> None:
    checked = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert checked.returncode == 0 and checked.stderr == ""


def test_torchrun_starts_the_command_on_one_node(programs: Programs) -> None:
    done = programs.run(str(LAUNCH / "torchrun.sh"), "llama_125m", "--run.dir", "a dir", PYTHON="python")
    assert done.returncode == 0, done.stderr
    arguments = agent_of(programs)
    assert torchrun_options(arguments) == {"--standalone": "", "--nproc-per-node": "auto"}
    assert command_of(arguments) == ["llama_125m", "--run.dir", "a dir"]


@pytest.mark.parametrize("missing", ["NNODES", "NODE_RANK", "MASTER_ADDR"])
def test_multinode_names_what_it_misses(programs: Programs, missing: str) -> None:
    given = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "node0", "PYTHON": "python"}
    del given[missing]
    done = programs.run(str(LAUNCH / "multinode.sh"), "llama_125m", "--run.dir", "dir", **given)
    assert done.returncode != 0 and f"set {missing}" in done.stderr
    assert programs.calls("python") == []


def test_kubernetes_restarts_by_the_exit_code() -> None:
    runtime = documents("kubernetes.yaml")["TrainingRuntime"]
    assert runtime["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    jobset = runtime["spec"]["template"]["spec"]
    assert "torch" in runtime["spec"]["mlPolicy"] and jobset["failurePolicy"]["maxRestarts"] > 0
    (rule,) = jobset["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    (job,) = jobset["replicatedJobs"]
    assert job["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    spec = job["template"]["spec"]
    (stop,) = spec["podFailurePolicy"]["rules"]
    assert stop["action"] == "FailJob" and stop["onExitCodes"]["operator"] == "In"
    assert stop["onExitCodes"]["values"] == FINAL and not set(FINAL) & set(AGAIN)
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and spec["backoffLimit"] == 0
    (container,) = pod["containers"]
    assert container["name"] == stop["onExitCodes"]["containerName"] == job["name"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert pod["terminationGracePeriodSeconds"] >= 120


def test_kubernetes_starts_the_command_on_each_node(programs: Programs) -> None:
    """What Kubeflow's torch policy puts into the environment of a pod is all that the script needs."""
    job = documents("kubernetes.yaml")["TrainJob"]
    assert job["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    runtime = documents("kubernetes.yaml")["TrainingRuntime"]["metadata"]["name"]
    reference = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": runtime}
    trainer = job["spec"]["trainer"]
    assert job["spec"]["runtimeRef"] == reference and trainer["image"] and trainer["numNodes"] > 1
    environment = {variable["name"]: variable["value"] for variable in trainer["env"]}
    assert not any(name.startswith("PET_") for name in environment), "Kubeflow reserves these"
    pod = {
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "8",
        "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": "megagrow-node-0-0.megagrow",
        "PET_MASTER_PORT": "29400",
    }
    done = programs.run(*trainer["command"], *trainer["args"], **pod, **environment, PYTHON="python")
    assert done.returncode == 0, done.stderr
    arguments = agent_of(programs)
    options = torchrun_options(arguments)
    assert options["--nnodes"] == "2" and options["--nproc-per-node"] == "8"
    assert options["--rdzv-endpoint"] == "megagrow-node-0-0.megagrow:29400" and options["--rdzv-backend"] == "c10d"
    assert "is_host=false" in options["--rdzv-conf"]
    assert parse(command_of(arguments)).run.dir.startswith("/runs/")
    (call,) = programs.calls("python")
    assert call["environment"]["NODE_RANK"] == "1" and int(call["environment"]["MAX_CRASHES"]) > 0


def test_skypilot_restarts_by_the_exit_code_and_starts_the_command(programs: Programs) -> None:
    task = documents("skypilot.yaml")[""]
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": AGAIN}
    assert task["num_nodes"] > 1 and task["workdir"] == "."
    node = {
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    }
    done = programs.run("bash", "-c", task["run"], **node, **task["envs"], PYTHON="python")
    assert done.returncode == 0, done.stderr
    arguments = agent_of(programs)
    options = torchrun_options(arguments)
    assert options["--nnodes"] == "2" and options["--nproc-per-node"] == "8"
    assert options["--rdzv-endpoint"] == "10.0.0.4:29400" and options["--local-addr"] == "10.0.0.5"
    (mounted,) = task["volumes"]
    assert parse(command_of(arguments)).run.dir.startswith(mounted)
    (call,) = programs.calls("python")
    assert int(call["environment"]["MAX_CRASHES"]) > 0


def test_every_variable_has_its_reason_above_it() -> None:
    blocks = (LAUNCH / "env.sh").read_text().split("\n\n")
    exporting = [block for block in blocks if re.search(r"^(# )?export ", block, re.MULTILINE)]
    assert len(exporting) > 5
    for block in exporting:
        assert block.startswith("# ") and not block.startswith("# export"), block


def test_the_environment_keeps_what_is_set_and_sets_the_rest(programs: Programs) -> None:
    text = (LAUNCH / "env.sh").read_text()
    names = set(re.findall(r"^export (\w+)=", text, re.MULTILINE)) - {"PYTHONPATH"}
    script = f"set -eu; source {LAUNCH}/env.sh; env"
    for given in ({}, dict.fromkeys(names, "mine")):
        clean = {name: value for name, value in programs.environment().items() if name not in names}
        printed = subprocess.run(["bash", "-c", script], env={**clean, **given}, capture_output=True, text=True)
        assert printed.returncode == 0, printed.stderr
        found = dict(line.split("=", 1) for line in printed.stdout.splitlines() if "=" in line)
        assert names <= found.keys() and all(found[name] == value for name, value in given.items())
