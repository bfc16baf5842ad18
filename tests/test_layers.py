"""The order of imports and the sizes of files: read from the syntax, nothing is run."""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ["megagrow", "kernels", "tools", "benchmarks", "launch"]
FOLDERS = [*SHIPPED, "tests"]

# A file imports only what stands above it here; growth and salt do not even know each other.
ORDER = [
    "errors",
    "json_file",
    "rules",
    "earlier_growth",
    "salt_config",
    "config",
    "timeline",
    "salt_checks",
    "checks",
    "yaml_text",
    "config_file",
    "presets",
    "command_line",
    "roles",
    "host_memory",
    "cpu_ops",
    "product_ops",
    "attention_ops",
    "torch_ops",
    "torch_vocab_ops",
    "torch_growth_ops",
    "serving",
    "growth_ops",
    "ops",
    "parallel",
    "model",
    "data",
    "new_part",
    "adamw",
    "optim",
    "checkpoint",
    "growth",
    "salt",
    "flops",
    "ledger",
    "metrics",
    "profiling",
    "generate",
    "evaluate",
    "report",
    "train",
    "plan",
    "cluster",
    "compare",
    "__main__",
]
STRANGERS = [("growth", "salt"), ("salt", "growth")]
KERNELS_MAY_IMPORT = sys.stdlib_module_names | {"torch", "triton", "megagrow_kernels"}
TOOLS = {"_command", "_learning", "_planning", "_reading"}
TOOLS_MAY_IMPORT = sys.stdlib_module_names | TOOLS | {"megagrow", "rich", "torch", "tyro", "yaml"}
MAIN_LINES, TOOL_LINES = 80, 100


@dataclass(frozen=True)
class Source:
    """One file: its path under the root, as text and as a tree."""

    path: Path
    text: str
    tree: ast.Module

    @property
    def num_lines(self) -> int:
        return len(self.text.splitlines())


@dataclass(frozen=True)
class Import:
    """`module` is absolute and ends in the imported name, if there is one: it may be a module."""

    line: int
    module: str


def sources(root: Path, *folders: str) -> Iterator[Source]:
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            text = path.read_text()
            yield Source(path.relative_to(root), text, ast.parse(text))


def imports_of(source: Source) -> Iterator[Import]:
    """All imports, those inside functions and those through importlib included."""
    for node in ast.walk(source.tree):
        match node:
            case ast.Import():
                yield from (Import(node.lineno, name.name) for name in node.names)
            case ast.ImportFrom():
                base = _absolute(source.path, node.level, node.module)
                yield from (Import(node.lineno, f"{base}.{name.name}") for name in node.names)
            case ast.Call(args=[ast.Constant(value=str(module)), *_]):
                called = ast.unparse(node.func).split(".")[-1]
                if called in ("import_module", "__import__"):
                    yield Import(node.lineno, module)


def _absolute(path: Path, level: int, module: str | None) -> str:
    inside = path.relative_to("kernels") if path.parts[0] == "kernels" else path
    above = inside.parts[: len(inside.parts) - level] if level else ()
    return ".".join([*above, *([module] if module else [])])


def order_errors(root: Path) -> Iterator[str]:
    for source in sources(root, "megagrow"):
        layer = Path(source.path.parts[1]).stem
        if layer != "__init__" and layer not in ORDER:
            yield f"megagrow/{source.path.parts[1]} is not in the order: give it a place in ORDER"
            continue
        found = {(each.line, *each.module.split(".")[:2]) for each in imports_of(source)}
        for line, *names in sorted(found):
            reason = _order_error(layer, names[-1]) if names[0] == "megagrow" else None
            if reason:
                yield f"{source.path}:{line} {reason}"


def _order_error(layer: str, imported: str) -> str | None:
    if imported not in ORDER:
        return None  # a name of megagrow/__init__.py; a file without a place is reported by itself
    if layer == "__init__":
        return f"imports {imported}: megagrow/__init__.py imports nothing of megagrow"
    if (layer, imported) in STRANGERS:
        return f"imports {imported}: {layer} and {imported} never import each other"
    if ORDER.index(imported) > ORDER.index(layer):
        return f"imports {imported}: {imported} stands below {layer} in the order"
    return None


def outside_errors(root: Path) -> Iterator[str]:
    """What kernels and tools may not import, and the name that belongs to another package."""
    for source in sources(root, *FOLDERS):
        folder = source.path.parts[0]
        found = {(each.line, each.module.split(".")[0]) for each in imports_of(source)}
        for line, top in sorted(found):
            where = f"{source.path}:{line} imports {top}"
            if top == "kernels":
                yield f"{where}: that name belongs to another package, ours is megagrow_kernels"
            elif folder == "kernels" and top not in KERNELS_MAY_IMPORT:
                yield f"{where}: kernels import torch and triton only"
            elif folder == "tools" and top not in TOOLS_MAY_IMPORT:
                yield f"{where}: tools import megagrow only"


def size_errors(root: Path) -> Iterator[str]:
    for source in sources(root, "megagrow", "tools"):
        is_tool = source.path.parts[0] == "tools"
        limit = TOOL_LINES if is_tool else MAIN_LINES
        if (is_tool or source.path.name == "__main__.py") and source.num_lines >= limit:
            yield f"{source.path} has {source.num_lines} lines: it stays under {limit}"


CHECKS = [order_errors, outside_errors, size_errors]


@pytest.mark.parametrize("check", CHECKS)
def test_the_project_keeps_its_rules(check) -> None:
    errors = list(check(ROOT))
    assert not errors, "\n" + "\n".join(errors)


def test_the_readme_and_the_packages_name_their_files() -> None:
    tree = (ROOT / "README.md").read_text()
    assert not [name for name in ORDER if not re.search(rf"^ .*\b{name}(\.py|/)", tree, re.MULTILINE)]
    for package in ("growth", "plan", "train"):
        folder = ROOT / "megagrow" / package
        named = set(re.findall(r"\b\w+\.py", ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""))
        assert named == {path.name for path in folder.glob("*.py")} - {"__init__.py"}, package


def test_the_walk_sees_the_project() -> None:
    seen = {str(source.path) for source in sources(ROOT, *FOLDERS)}
    assert {"megagrow/errors.py", "kernels/megagrow_kernels/__init__.py", "tests/ranks.py"} <= seen


BAD_ORDER = [
    ("import megagrow.train", "train stands below config in the order"),
    ("from megagrow import errors, train", "train stands below config in the order"),
    ("from megagrow.train import run", "train stands below config in the order"),
    ("from .train import run", "train stands below config in the order"),
    ("from . import train", "train stands below config in the order"),
    ("def f():\n    from megagrow.train import run", "train stands below config in the order"),
    ("if TYPE_CHECKING:\n    import megagrow.train as t", "train stands below config in the order"),
    ("importlib.import_module('megagrow.train')", "train stands below config in the order"),
    ("import os, megagrow.parallel.mesh", "parallel stands below config in the order"),
]
GOOD_ORDER = [
    "from megagrow.errors import ConfigError",
    "from . import errors, __version__",
    "import megagrow, os.path, train",
    "text = 'import megagrow.train'",
]


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(("code", "message"), BAD_ORDER)
def test_a_downward_import_is_caught(tmp_path: Path, code: str, message: str) -> None:
    (error,) = order_errors(write(tmp_path, {"megagrow/config.py": code}))
    assert error.startswith("megagrow/config.py:")
    assert error.endswith(f" imports {message.split()[0]}: {message}")


@pytest.mark.parametrize("code", GOOD_ORDER)
def test_what_stands_above_may_be_imported(tmp_path: Path, code: str) -> None:
    assert list(order_errors(write(tmp_path, {"megagrow/config.py": code}))) == []


@pytest.mark.parametrize(
    ("path", "code", "message"),
    [
        ("megagrow/growth/a.py", "from ..salt import b", "growth and salt never import each other"),
        ("megagrow/salt/a.py", "from ..growth.b import c", "salt and growth never import each"),
        ("megagrow/data/a.py", "from .. import train", "train stands below data in the order"),
        ("megagrow/data/x/a.py", "from ... import train", "train stands below data in the order"),
        ("megagrow/__init__.py", "from .config import C", "imports nothing of megagrow"),
        ("megagrow/x.py", "", "megagrow/x.py is not in the order"),
        ("megagrow/misc/a.py", "", "megagrow/misc is not in the order"),
    ],
)
def test_packages_keep_the_order_too(tmp_path: Path, path: str, code: str, message: str) -> None:
    (error,) = order_errors(write(tmp_path, {path: code}))
    assert message in error


def test_a_package_may_import_itself_and_what_is_above(tmp_path: Path) -> None:
    code = "from . import maps\nfrom .maps import Map\nfrom ..parallel import mesh"
    assert list(order_errors(write(tmp_path, {"megagrow/growth/grow.py": code}))) == []


@pytest.mark.parametrize(
    ("path", "code", "message"),
    [
        ("kernels/megagrow_kernels/a.py", "import megagrow.ops", "torch and triton only"),
        ("kernels/megagrow_kernels/a.py", "import numpy as np", "torch and triton only"),
        ("tools/a.py", "from tests.ranks import run_ranks", "tools import megagrow only"),
        ("tools/a.py", "import megagrow_kernels", "tools import megagrow only"),
        ("megagrow/ops.py", "import kernels", "belongs to another package"),
        ("tests/test_a.py", "def f():\n    from kernels import get_kernel", "another package"),
    ],
)
def test_a_foreign_import_is_caught(tmp_path: Path, path: str, code: str, message: str) -> None:
    (error,) = outside_errors(write(tmp_path, {path: code}))
    assert message in error


def test_what_kernels_and_tools_need_is_allowed(tmp_path: Path) -> None:
    kernel = "import math, torch, triton.language as tl\nfrom . import b\nimport megagrow_kernels.c"
    tool = "import json\nimport tyro\nfrom megagrow.report import write_report"
    files = {"kernels/megagrow_kernels/a.py": kernel, "tools/a.py": tool}
    assert list(outside_errors(write(tmp_path, files))) == []


def test_long_entry_files_are_caught(tmp_path: Path) -> None:
    files = {
        "megagrow/__main__.py": "pass\n" * 80,
        "megagrow/train.py": "pass\n" * 400,
        "tools/long.py": "pass\n" * 100,
        "tools/short.py": "pass\n" * 99,
    }
    assert list(size_errors(write(tmp_path, files))) == [
        "megagrow/__main__.py has 80 lines: it stays under 80",
        "tools/long.py has 100 lines: it stays under 100",
    ]
