"""Memory that converting a Llama of a billion parameters takes, to an own checkpoint and back, and what comes out.

    python benchmarks/convert_memory.py     # a few minutes, 9 GB of TMPDIR; benchmarks/results/convert_memory.json

A random folder in bf16, in several files, is converted by tools/convert_checkpoint.py, without the comparison of
logits, each way in a process of its own; then one with the same weights in a single file, as it is and rounded
(--dtype), which a reader that keeps its file mapped would have in memory as a whole.

What is measured is the process' largest resident size, `VmHWM` of /proc/self/status when it ends: all of its pages in
memory at one time, those of mapped files, libraries and Python included, as the kernel counts them. Every tensor that
comes back is compared bit by bit with the one that went in.
"""

import importlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from results_file import Row, write
from safetensors import safe_open

from megagrow.checkpoint.hf import write_hf_folder
from megagrow.config import ModelConfig, RopeScaling
from megagrow.roles import num_parameters, parameter_shapes

TOOL = Path(__file__).resolve().parents[1] / "tools" / "convert_checkpoint.py"
MIB = 2**20
SHARE, CONSTANT = 1.5, 2**30  # of the largest tensor, and what comes on top
COPIES = {"rounded": 1}  # of a tensor more: one as it is stored, and one in the other dtype of the same size
SHARD_BYTES, ONE_FILE = 600 * 10**6, 10**15
ROUNDED = "float16"
WAYS = {
    "there": "Hugging Face folder to own checkpoint",
    "back": "own checkpoint to folder",
    "single": "folder of one file to own checkpoint",
    "rounded": f"folder of one file to own checkpoint in {ROUNDED}",
}
LLAMA_1B = ModelConfig(  # the shape of Llama 3.2 1B, with an output matrix of its own
    vocab_size=128_256,
    hidden_size=2048,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    ffn_size=8192,
    max_seq_length=131_072,
    rope_theta=5e5,
    rope_scaling=RopeScaling("llama3", 32.0, 8192),
)


def make_folder(folder: Path, model: ModelConfig, shard_bytes: int = SHARD_BYTES) -> None:
    """A Hugging Face folder of random weights in bf16."""
    shapes, generator = parameter_shapes(model), torch.Generator().manual_seed(0)

    def random(name: str) -> torch.Tensor:
        return torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02, generator=generator)

    write_hf_folder(folder, model, random, shard_bytes=shard_bytes)


def convert(source: Path, target: Path, to: str, *options: str) -> dict[str, float]:
    """Runs the tool in a process of its own; returns its peak in bytes, and seconds."""
    arguments = [str(source), str(target), "--to", to, "--no-verify", *options]
    command = [sys.executable, __file__, "--in-this-process", *arguments]
    began = time.perf_counter()
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {"peak": json.loads(printed.splitlines()[-1]), "seconds": time.perf_counter() - began}


def convert_here(arguments: list[str]) -> None:
    """The tool, and in the last line the peak of this process."""
    sys.argv = [str(TOOL), *arguments]
    sys.path.insert(0, str(TOOL.parent))
    try:
        importlib.import_module("_command").run(importlib.import_module(TOOL.stem).main)
    except SystemExit as ended:
        if ended.code:
            raise
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(lines["VmHWM"].split()[0]) * 1024)


def differing_tensors(before: Path, after: Path) -> list[str]:
    """Names of the tensors that are not the same, bit by bit, in both folders."""
    old, new = (
        {key: path for path in folder.glob("*.safetensors") for key in _keys(path)} for folder in (before, after)
    )
    return [name for name in sorted(old.keys() | new.keys()) if not _same_bits(name, old.get(name), new.get(name))]


def _keys(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _same_bits(name: str, one: Path | None, other: Path | None) -> bool:
    if one is None or other is None:
        return False
    with safe_open(one, framework="pt") as first, safe_open(other, framework="pt") as second:
        old, new = first.get_tensor(name), second.get_tensor(name)
        same_kind = (old.dtype, old.shape) == (new.dtype, new.shape)
        return same_kind and torch.equal(old.view(torch.uint8), new.view(torch.uint8))


def largest_tensor(model: ModelConfig) -> int:
    """Bytes of the largest parameter in bf16."""
    return 2 * max(torch.Size(shape).numel() for shape in parameter_shapes(model).values())


def measure(model: ModelConfig, folder: Path, shard_bytes: int = SHARD_BYTES) -> dict[str, Any]:
    """Converts there and back in `folder`, then from a single file."""
    before, own, after, single, rounded = (folder / name for name in ("before", "own", "after", "single", "rounded"))
    make_folder(before, model, shard_bytes)
    found = {
        "files": len(list(before.glob("*.safetensors"))),
        "there": convert(before, own, "megagrow"),
        "back": convert(own, after, "hf"),
        "differing": differing_tensors(before, after),
    }
    for path in (before, own, after):  # the disk need not hold them beside the others
        shutil.rmtree(path)
    make_folder(single, model, ONE_FILE)
    return found | {
        "single": convert(single, own, "megagrow"),
        "rounded": convert(single, rounded, "megagrow", "--dtype", ROUNDED),
    }


def rows_of(model: ModelConfig, found: dict[str, Any]) -> list[Row]:
    """The figures, and whether they keep to their bounds."""
    largest = largest_tensor(model)
    rows = [
        Row("parameters", num_parameters(model), "1"),
        Row("files of the folder", found["files"], "1"),
        Row("largest tensor", largest / MIB, "MiB"),
    ]
    for way, name in WAYS.items():
        peak, share = found[way]["peak"], SHARE + COPIES.get(way, 0)
        limit = share * largest + CONSTANT
        bound = f"<= {limit / MIB:.0f} MiB, {share} x the largest tensor + 1 GiB"
        rows.append(Row(f"{name}: peak resident size", peak / MIB, "MiB", bound, peak <= limit))
        rows.append(Row(f"{name}: time", found[way]["seconds"], "s"))
    different = len(found["differing"])
    rows.append(Row("tensors that differ after both", different, "1", "0", different == 0))
    return rows


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        rows = rows_of(LLAMA_1B, measure(LLAMA_1B, Path(folder)))
    print(f"written to {write('convert_memory', rows)}")
    return 0 if all(row.holds is not False for row in rows) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in-this-process"]:
        convert_here(sys.argv[2:])
    else:
        sys.exit(main())
