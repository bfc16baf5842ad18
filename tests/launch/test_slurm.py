"""Tests launch/slurm.sbatch: which exit codes bring the job back, and what the agents are started with."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launch.scripts import LAUNCH, ROOT, Programs, command_of, torchrun_options

JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "node[07-08]",
    "SLURM_CPUS_ON_NODE": "96",
}
HOSTS = "if sys.argv[1] == 'show': print('node07'); print('node08')"


def end_with(directory: Path, code: int | None, status: int) -> str:
    """What srun does in the tests: the run writes exit.json (None: it does not), srun ends with `status`."""
    content = f'{{"code": {code}, "reason": "told: \\\\"code\\\\": 3", "step": 4, "rank": 0, "host": "h"}}\\n'
    write = f"open('{directory}/exit.json', 'w').write('{content}')" if code is not None else "pass"
    return f"assert not os.path.exists('{directory}/exit.json')\n{write}\nsys.exit({status})"


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    programs = Programs(tmp_path)
    programs.add("scontrol", HOSTS)
    return programs


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A run's directory with the exit.json of an earlier start, which was a success."""
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "exit.json").write_text('{"code": 0, "reason": "done", "step": 1, "rank": 0, "host": "h"}\n')
    return directory


def submit(programs: Programs, directory: Path) -> subprocess.CompletedProcess[str]:
    return programs.run("bash", str(LAUNCH / "slurm.sbatch"), "llama_125m", "--run.dir", str(directory), **JOB)


def requeued(programs: Programs) -> bool:
    changes = [call["arguments"] for call in programs.calls("scontrol") if call["arguments"][0] != "show"]
    assert changes in ([], [["requeue", "4711"]])
    return bool(changes)


@pytest.mark.parametrize(
    ("written", "status", "code", "back"),
    [
        (0, 0, 0, False),
        *((code, code, code, False) for code in (2, 3, 4, 5)),
        *((code, code, code, True) for code in (6, 7)),
        (1, 1, 1, True),
        (None, 1, 1, True),  # a crash
        (None, 143, 143, True),  # the agents were killed
        (None, 2, 2, False),  # the agents could not read the command
        (3, 143, 3, False),  # an agent has told, srun has killed another one
        (7, 137, 7, True),
    ],
)
def test_the_code_decides_whether_the_job_comes_back(programs, directory, written, status, code, back) -> None:
    programs.add("srun", end_with(directory, written, status))
    done = submit(programs, directory)
    assert requeued(programs) == back, done.stdout + done.stderr
    assert done.returncode == code
    assert len(programs.calls("srun")) == 1


def test_a_run_that_never_starts_does_not_count_as_finished(programs, directory) -> None:
    programs.add("srun", "sys.exit(1)")
    assert submit(programs, directory).returncode == 1
    assert requeued(programs)
    assert not (directory / "exit.json").exists()


@pytest.mark.parametrize("arguments", [(), ("--run.dir",), ("--run.dir=",)])
def test_without_a_directory_nothing_is_started(programs, arguments) -> None:
    programs.add("srun")
    done = programs.run("bash", str(LAUNCH / "slurm.sbatch"), "llama_125m", *arguments, **JOB)
    assert done.returncode == 2 and "--run.dir" in done.stderr
    assert programs.calls("srun") == [] and not requeued(programs)


def test_the_directory_may_stand_behind_an_equals_sign(programs, directory) -> None:
    programs.add("srun", end_with(directory, 5, 5))
    done = programs.run(
        "bash", str(LAUNCH / "slurm.sbatch"), "llama_125m", f"--run.dir={directory}", "--train.steps=7", **JOB
    )
    assert done.returncode == 5 and f"{directory} ended with code 5" in done.stdout


def test_a_refused_requeue_is_told(programs, directory) -> None:
    programs.add("scontrol", f"{HOSTS}\nelse: sys.exit(1)")
    programs.add("srun", end_with(directory, 7, 7))
    done = submit(programs, directory)
    assert done.returncode == 7 and "sbatch with the same arguments resumes" in done.stderr


def test_a_cancelled_job_does_not_come_back(programs, directory) -> None:
    programs.add("srun", f"os.kill(os.getppid(), {int(signal.SIGTERM)})\n" + end_with(directory, 7, 7))
    done = submit(programs, directory)
    assert "cancelled" in done.stdout and not requeued(programs)
    assert done.returncode == 7


def test_srun_starts_one_agent_on_each_node_with_the_same_command(programs, directory) -> None:
    programs.add("srun", "os.execvp('bash', ['bash', *sys.argv[3:]])")
    agent = programs.add("agent")
    for node in ("0", "1"):
        environment = {**JOB, "SLURM_NODEID": node, "SLURM_RESTART_COUNT": "3", "PYTHON": str(agent)}
        environment |= {"NODE_RANK": "0", "LOCAL_ADDR": "10.0.0.9"}  # left in the shell that has submitted it
        script, arguments = (
            str(LAUNCH / "slurm.sbatch"),
            ["grow_llama_125m", "--run.dir", str(directory), "--train.steps", "7"],
        )
        programs.run("bash", script, *arguments, **environment)
    (srun, _), (first, second) = programs.calls("srun"), programs.calls("agent")
    assert srun["arguments"][:3] == ["--kill-on-bad-exit=1", "--cpus-per-task=96", "launch/multinode.sh"]
    for call, is_host in ((first, "true"), (second, "false")):
        options = torchrun_options(call["arguments"])
        assert options["--nnodes"] == "2" and options["--nproc-per-node"] == "auto"
        assert options["--rdzv-endpoint"] == "node07:24711" and options["--rdzv-id"] == "4711.3"
        assert f"is_host={is_host}" in options["--rdzv-conf"]
        assert command_of(call["arguments"]) == arguments
        assert call["environment"]["MAX_CRASHES"] == "3"
        assert "--local-addr" not in options
    assert (first["environment"]["NODE_RANK"], second["environment"]["NODE_RANK"]) == ("0", "1")


def test_the_step_is_the_agent_itself_and_gets_the_signal(programs, directory) -> None:
    """SLURM signals the process that srun started, not its children: it must have become the agent."""
    ready = directory / "ready"
    agent = programs.add("agent", f"open('{ready}', 'w').close()\ntime.sleep(10)")
    environment = programs.environment(**JOB, NNODES="2", SLURM_NODEID="0", MASTER_ADDR="localhost", PYTHON=str(agent))
    command = [str(LAUNCH / "multinode.sh"), "llama_125m", "--run.dir", str(directory)]
    with subprocess.Popen(command, cwd=ROOT, env=environment) as step:
        while step.poll() is None and not ready.exists():
            time.sleep(0.02)
        assert str(agent) in Path(f"/proc/{step.pid}/cmdline").read_text().split("\0")
        os.kill(step.pid, signal.SIGUSR1)
    assert step.returncode == -signal.SIGUSR1


def test_slurm_is_asked_to_signal_the_steps_in_time_and_to_allow_requeueing() -> None:
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    asked = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    assert (
        "requeue" in asked
        and "dependency=singleton" in asked
        and "open-mode=append" in asked
        and "ntasks-per-node=1" in asked
    )
    (when,) = [value.removeprefix("signal=USR1@") for value in asked if value.startswith("signal=USR1@")]
    assert int(when) >= 120
    assert lines.index("set -euo pipefail") > max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
