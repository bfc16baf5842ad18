"""Running the files of launch/ with programs that only record what they were called with."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"

# Writes its name, arguments and environment to $CALLS/NAME-TIME.json, then runs the lines that a test gave it.
RECORDER = """#!{python} -S
import json, os, sys, time
name = os.path.basename(sys.argv[0])
with open(f"{calls}/{{time.time_ns()}}-{{name}}.json", "w") as file:
    json.dump({{"name": name, "arguments": sys.argv[1:], "environment": dict(os.environ)}}, file)
{then}
"""


class Programs:
    """A folder of recording programs that come first on PATH."""

    def __init__(self, folder: Path) -> None:
        self.bin, self._calls = folder / "bin", folder / "calls"
        self.bin.mkdir()
        self._calls.mkdir()

    def add(self, name: str, then: str = "") -> Path:
        """A program of this name; `then` is Python that it runs after it has recorded its call."""
        path = self.bin / name
        path.write_text(RECORDER.format(python=sys.executable, calls=self._calls, then=then))
        path.chmod(0o755)
        return path

    def calls(self, name: str) -> list[dict]:
        """The calls of a program, in their order: `arguments` and `environment`."""
        calls = [json.loads(path.read_text()) for path in sorted(self._calls.iterdir())]
        return [call for call in calls if call["name"] == name]

    def run(self, *command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a command that finds these programs."""
        return subprocess.run(
            command, cwd=cwd, env=self.environment(**environment), capture_output=True, text=True, timeout=120
        )

    def environment(self, **more: str) -> dict[str, str]:
        """This process' environment without what another launcher has set."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "PET_", "SKYPILOT", "TORCH"))}
        return {**kept, "PATH": f"{self.bin}:{os.environ['PATH']}", "PYTHON": sys.executable, **more}


def torchrun_options(arguments: list[str]) -> dict[str, str]:
    """What an agent was called with before `--`: options by name, a flag's value is empty."""
    options: dict[str, str] = {}
    name = ""
    for argument in arguments[1 : arguments.index("--")]:
        if argument.startswith("--"):
            name, options[argument] = argument, ""
        else:
            options[name] = argument
    return options


def command_of(arguments: list[str]) -> list[str]:
    """What an agent was called with after `--`: the arguments of megagrow."""
    return arguments[arguments.index("--") + 1 :]
