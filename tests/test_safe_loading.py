"""No load that could run code from a file: read from the syntax of all that is shipped, nothing is run.

Tests are left out: the one that shows a refused file to be harmful has to load it.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import pytest

from tests.test_layers import ROOT, SHIPPED, Source, imports_of, sources, write

# Modules that turn bytes into objects or code; nothing here needs one, so that none may be imported.
MODULES = {
    "_pickle",
    "cPickle",
    "cloudpickle",
    "code",
    "dill",
    "joblib",
    "jsonpickle",
    "marshal",
    "pickle",
    "runpy",
    "shelve",
}
NAMES = {
    "__builtins__",
    "builtins.eval",
    "builtins.exec",
    "eval",
    "exec",
    "importlib.machinery.SourceFileLoader",
    "importlib.util.spec_from_file_location",
    "pandas.read_pickle",
    "pydoc.locate",
    *(f"torch.distributed.checkpoint.{module}FileSystemReader" for module in ("", "filesystem.")),
    *(f"torch.distributed.checkpoint.{module}load_state_dict" for module in ("", "state_dict_loader.")),
    "torch.distributed.checkpoint.format_utils",
    "torch.hub",
    "torch.jit.load",
    "torch.package",
    "torch.serialization.add_safe_globals",
    "torch.serialization.safe_globals",
    "yaml.add_constructor",
    "yaml.add_multi_constructor",
    *(f"yaml.{kind}_load" for kind in ("full", "unsafe")),
    *(f"yaml.{kind}_load_all" for kind in ("full", "unsafe")),
    *(f"yaml.{kind}Loader" for kind in ("", "Full", "Unsafe", "C", "CFull", "CUnsafe")),
    "yaml.load",
    "yaml.load_all",
}
TORCH_LOAD = {"torch.load", "torch.serialization.load"}
CHECKPOINT_LOAD = {
    f"torch.distributed.checkpoint.{module}{name}"
    for module in ("", "state_dict_loader.")
    for name in ("load", "async_load")
}
NUMPY_LOAD = {"numpy.load", "numpy.lib.npyio.load", "numpy.lib.format.read_array"}
LOADS = TORCH_LOAD | NUMPY_LOAD | CHECKPOINT_LOAD
STARS = {"builtins", "numpy", "torch", "torch.distributed.checkpoint", "torch.serialization", "yaml"}
NEVER_TRUE = {"allow_pickle", "trust_remote_code"}
END = "it can run code"


def load_errors(root: Path) -> Iterator[str]:
    """Every import, name and call that can run code from a file: unpickling, yaml objects, eval, remote code."""
    for source in sources(root, *SHIPPED):
        names = dict(_local_names(source.tree))
        called = {id(node.func) for node in ast.walk(source.tree) if isinstance(node, ast.Call)}
        found = [*_import_errors(source), *_reference_errors(source.tree, names, called)]
        found += _call_errors(source.tree, names)
        found += _setting_errors(source.tree)
        yield from sorted({f"{source.path}:{line} {reason}: {END}" for line, reason in found})


def _import_errors(source: Source) -> Iterator[tuple[int, str]]:
    for each in imports_of(source):
        module, _, name = each.module.rpartition(".")
        if each.module.split(".")[0] in MODULES:
            yield each.line, f"imports {each.module}"
        elif each.module in NAMES | LOADS or module in NAMES:
            yield each.line, f"imports {each.module} by its own name"
        elif name == "*" and module in STARS:
            yield each.line, f"imports everything from {module}"


def _reference_errors(tree: ast.Module, names: dict[str, str], called: set[int]) -> Iterator[tuple[int, str]]:
    """Names that stand for such a load, called or handed on; those of `from … import` were told where they are.

    A reader of checkpoints may be the base of a class that has its own way to read metadata, instead of unpickling it.
    """
    readers = {id(base) for node in ast.walk(tree) if _reads_metadata(node) for base in node.bases}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Name | ast.Attribute | ast.Call):
            continue
        path = _dotted(node, names)
        if id(node) in readers:
            continue
        if path in NAMES and not (isinstance(node, ast.Name) and node.id in names):
            yield node.lineno, f"uses {path}"
        elif path in LOADS and id(node) not in called:
            yield node.lineno, f"hands {path} on"


def _reads_metadata(node: ast.AST) -> TypeGuard[ast.ClassDef]:
    if not isinstance(node, ast.ClassDef):
        return False
    return any(isinstance(item, ast.FunctionDef) and item.name == "read_metadata" for item in node.body)


def _call_errors(tree: ast.Module, names: dict[str, str]) -> Iterator[tuple[int, str]]:
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        path = _dotted(node.func, names)
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if path in TORCH_LOAD and not _is(given.get("weights_only"), True):
            yield node.lineno, f"calls {path} without weights_only=True"
        if path in NUMPY_LOAD and (len(node.args) > 2 or None in given):
            yield node.lineno, f"calls {path} with arguments that may allow pickles"
        if path in CHECKPOINT_LOAD and ("storage_reader" not in given or _is(given["storage_reader"], None)):
            yield node.lineno, f"calls {path} without a storage_reader of its own"
        if "use_safetensors" in given and not _is(given["use_safetensors"], True):
            yield node.lineno, "passes use_safetensors"
        for name in sorted(NEVER_TRUE & given.keys()):
            if not _is(given[name], False):
                yield node.lineno, f"passes {name}"


def _setting_errors(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """What could be passed on as `**options`: a key of a dictionary, or set in one."""
    for node in ast.walk(tree):
        pairs: list[tuple[ast.expr | None, ast.expr | None]] = []
        match node:
            case ast.Dict(keys=keys, values=values):
                pairs = list(zip(keys, values, strict=True))
            case ast.Assign(targets=[ast.Subscript(slice=key)], value=value):
                pairs = [(key, value)]
        for key, value in pairs:
            if isinstance(key, ast.Constant) and key.value in NEVER_TRUE and not _is(value, False):
                yield key.lineno, f"sets {key.value}"
            if isinstance(key, ast.Constant) and key.value == "weights_only" and not _is(value, True):
                yield key.lineno, "sets weights_only"


def _local_names(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """What a name of the file stands for: imports under another name, and plain assignments of such names."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {name.asname: name.name for name in node.names if name.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
    yield from names.items()
    modules = {name.split(".")[0] for name in NAMES | LOADS}
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Name(id=module)) if (
                names.get(module, module) in modules and names.get(module, module) not in NAMES
            ):
                yield name, names.get(module, module)


def _dotted(node: ast.expr, names: dict[str, str]) -> str:
    match node:
        case ast.Name(id=name):
            return names.get(name, name)
        case ast.Attribute(value=value, attr=attr):
            return f"{_dotted(value, names)}.{attr}"
        case ast.Call(func=ast.Name(id="getattr"), args=[value, ast.Constant(value=str(attr)), *_]):
            return f"{_dotted(value, names)}.{attr}"
        case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(module))]):
            return module
    return "<expression>"


def _is(value: ast.expr | None, wanted: bool) -> bool:
    return isinstance(value, ast.Constant) and value.value is wanted


def test_nothing_that_is_shipped_loads_what_can_run_code() -> None:
    errors = list(load_errors(ROOT))
    assert not errors, "\n" + "\n".join(errors)


def test_what_is_shipped_is_looked_at() -> None:
    seen = {source.path.parts[0] for source in sources(ROOT, *SHIPPED)}
    assert seen == {"megagrow", "kernels", "tools", "benchmarks", "launch"}


HARMFUL = [
    "import pickle",
    "import pickle as p",
    "from pickle import load",
    "from pickle import Unpickler as U",
    "from pickle import *",
    "def f():\n    import pickle",
    "import importlib\nimportlib.import_module('pickle')",
    "__import__('_pickle')",
    "import marshal",
    "import shelve",
    "import dill",
    "import cloudpickle, os",
    "import joblib",
    "import runpy",
    "from multiprocessing import *\nimport pickle",
    "import torch\ntorch.load(f)",
    "import torch\ntorch.load(f, weights_only=False)",
    "import torch\ntorch.load(f, weights_only=flag)",
    "import torch\ntorch.load(f, None, None, True)",
    "import torch\ntorch.load(f, **options)",
    "import torch as t\nt.load(f)",
    "import torch\nt = torch\nt.load(f)",
    "import torch\ngetattr(torch, 'load')(f)",
    "import torch\nmap(torch.load, files)",
    "import torch\nread = torch.load",
    "from torch import load",
    "from torch import *",
    "from torch.serialization import load as read",
    "import torch\ntorch.serialization.load(f)",
    "import torch.serialization as s\ns.load(f)",
    "import importlib\nimportlib.import_module('torch').load(f)",
    "import torch\ntorch.hub.load(f)",
    "import torch\ntorch.jit.load(f)",
    "from torch.package import PackageImporter",
    "import torch\ntorch.package.PackageImporter(f)",
    "import torch.distributed.checkpoint as dcp\ndcp.FileSystemReader(f)",
    "import torch.distributed.checkpoint as dcp\nclass Reader(dcp.FileSystemReader): pass",
    "import torch.distributed.checkpoint as dcp\ndcp.load(state, checkpoint_id=path)",
    "import torch.distributed.checkpoint as dcp\ndcp.load(state, storage_reader=None)",
    "import torch.distributed.checkpoint as dcp\ndcp.async_load(state, checkpoint_id=path)",
    "import torch.distributed.checkpoint as dcp\ndcp.load_state_dict(state, reader)",
    "import torch.distributed.checkpoint as dcp\nread = dcp.load",
    "from torch.distributed.checkpoint import load",
    "from torch.distributed.checkpoint import *",
    "from torch.distributed.checkpoint.format_utils import dcp_to_torch_save",
    "from torch.serialization import *",
    "import torch\ntorch.serialization.add_safe_globals([f])",
    "import torch\ntorch.serialization.safe_globals([f])",
    "import yaml\nyaml.add_constructor(tag, f)",
    "AutoModel.from_pretrained(f, use_safetensors=False)",
    "import yaml\nyaml.load(f, Loader=loader)",
    "import yaml\nyaml.load_all(f, loader)",
    "import yaml\nyaml.unsafe_load(f)",
    "import yaml\nyaml.full_load(f)",
    "import yaml as y\ny.full_load_all(f)",
    "from yaml import unsafe_load",
    "from yaml import UnsafeLoader",
    "import yaml\nkind = yaml.Loader",
    "import numpy as np\nnp.load(f, allow_pickle=True)",
    "import numpy as np\nnp.load(f, None, True)",
    "import numpy as np\nnp.load(f, **options)",
    "import numpy\nnumpy.load(f, allow_pickle=flag)",
    "import numpy as np\nread = np.load",
    "from numpy import load",
    "import pandas as pd\npd.read_pickle(f)",
    "AutoModel.from_pretrained(f, trust_remote_code=True)",
    "AutoModel.from_pretrained(f, trust_remote_code=flag)",
    "options = {'trust_remote_code': True}",
    "options['trust_remote_code'] = True",
    "options = dict(trust_remote_code=True)",
    "options = {'allow_pickle': True}",
    "options = {'weights_only': False}",
    "eval('1')",
    "exec(text)",
    "run = eval",
    "map(exec, texts)",
    "import builtins\nbuiltins.exec(text)",
    "import builtins\ngetattr(builtins, 'eval')(text)",
    "from builtins import exec as run",
    "import pydoc\npydoc.locate(name)",
    "import importlib.util\nimportlib.util.spec_from_file_location(name, path)",
]
HARMLESS = [
    "import torch\ntorch.load(f, weights_only=True)",
    "import torch\ntorch.load(f, map_location='cpu', weights_only=True)",
    "import yaml\nyaml.safe_load(f)",
    "import numpy as np\nnp.load(f)",
    "import numpy as np\nnp.load(f, allow_pickle=False)",
    "import safetensors.numpy\nsafetensors.numpy.load(b)",
    "import json\njson.load(f)",
    "AutoTokenizer.from_pretrained(f, trust_remote_code=False)",
    "options = {'trust_remote_code': False, 'weights_only': True}",
    "model.eval()\nself.teacher.model.eval()",
    "engine.load(f)\nstore.load(f)",
    "'pickle.load(f) and eval(x)'",
    "import torch.distributed.checkpoint as dcp\nclass Reader(dcp.StorageReader): pass",
    "import torch.distributed.checkpoint as dcp\ndcp.load(state, storage_reader=reader)",
    "AutoModel.from_pretrained(f, use_safetensors=True)",
    "import torch.distributed.checkpoint as dcp\nclass R(dcp.FileSystemReader):\n    def read_metadata(self): pass",
]


@pytest.mark.parametrize("folder", SHIPPED)
def test_every_folder_is_checked(tmp_path: Path, folder: str) -> None:
    (error,) = load_errors(write(tmp_path, {f"{folder}/deep/inside/a.py": "import pickle"}))
    assert error == f"{folder}/deep/inside/a.py:1 imports pickle: {END}"


@pytest.mark.parametrize("code", HARMFUL)
def test_a_load_that_can_run_code_is_caught(tmp_path: Path, code: str) -> None:
    (error,) = load_errors(write(tmp_path, {"megagrow/data/a.py": code}))
    assert error.startswith(f"megagrow/data/a.py:{len(code.splitlines())} ") and error.endswith(END)


@pytest.mark.parametrize("code", HARMLESS)
def test_a_safe_load_passes(tmp_path: Path, code: str) -> None:
    assert list(load_errors(write(tmp_path, {"megagrow/data/a.py": code}))) == []
