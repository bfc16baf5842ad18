"""The built wheel in an empty environment: exactly the two packages, all of their files."""

import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"megagrow": ROOT / "megagrow", "megagrow_kernels": ROOT / "kernels/megagrow_kernels"}
NOT_SOURCE = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")


def test_readme_names_what_a_prepared_environment_lacks() -> None:
    """Where torch and Triton are, the other dependencies by name and then `--no-deps .`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[<>=;\s]", dependency)[0] for dependency in project["dependencies"]} - {"torch", "triton"}
    readme = (ROOT / "README.md").read_text()
    (line,) = [line for line in readme.splitlines() if line.startswith("pip install fsspec")]
    assert set(line.split()[2:]) == names
    assert f"\n{line}\npip install --no-deps .\n" in readme
    extras = set(project["optional-dependencies"]) - {"test", "dev"}
    assert all(f"`{extra}`" in readme for extra in extras)


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with nothing in it but the wheel, built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCE)
    offline = ["--no-deps", "--no-index"]
    pip("wheel", folder / "source", "--no-build-isolation", *offline, "--wheel-dir", folder)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "environment", with_pip=False)
    python = folder / "environment/bin/python"
    pip("--python", python, "install", *offline, "--no-compile", wheel)
    return folder / "environment"


@pytest.fixture
def installed(environment: Path) -> Path:
    (folder,) = environment.glob("lib/python*/site-packages")
    return folder


def test_exactly_the_two_packages_are_installed(installed: Path) -> None:
    names = {path.name for path in installed.iterdir()}
    (metadata,) = (name for name in names if name.endswith(".dist-info"))
    assert names - {metadata} == set(PACKAGES)
    assert metadata.startswith("megagrow-")
    assert (installed / metadata / "licenses/LICENSE").is_file()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_source_file_is_installed(installed: Path, package: str) -> None:
    def files(folder: Path) -> set[str]:
        found = {str(path.relative_to(folder)) for path in folder.rglob("*.py*")}
        return {name for name in found if "__pycache__" not in name}

    assert files(installed / package) == files(PACKAGES[package])


def test_types_are_announced(installed: Path) -> None:
    assert (installed / "megagrow/py.typed").is_file()


def test_the_installed_package_is_found_and_nothing_else_of_ours(environment: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.util as u, megagrow\n"
        "names = ['megagrow_kernels', 'kernels', 'tests', 'tools', 'launch', 'benchmarks']\n"
        "print(megagrow.__version__, *[name for name in names if u.find_spec(name)])\n"
    )
    command = [environment / "bin/python", "-I", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.split() == ["0.1.0", "megagrow_kernels"]
