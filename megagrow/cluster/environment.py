"""What has to be the same on all hosts, and is not: versions, code, configuration, network variables."""

import hashlib
import importlib.util
import os
import platform
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megagrow.cluster.report import Row, place
from megagrow.config import Config
from megagrow.config_file import dump
from megagrow.errors import ConfigError

NETWORK = "network variables"
MUST_AGREE = ("torch", "NCCL", "code", "configuration")
SHOULD_AGREE = ("Python", "CUDA", "driver", "device", "GPUs", NETWORK)
NETWORK_VARIABLES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "UCX_", "FI_")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def own_facts(config: Config) -> dict[str, str]:
    """What this rank runs with, by name."""
    num_gpus = torch.cuda.device_count()
    own_gpu = int(os.environ.get("LOCAL_RANK", "0")) % max(num_gpus, 1)  # the current one is chosen with the mesh
    variables = sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith(NETWORK_VARIABLES))
    return {
        "torch": torch.__version__,
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if num_gpus and dist.is_nccl_available() else "none",
        "code": _hash_of_code(),
        "configuration": _hash(dump(config)),
        "Python": platform.python_version(),
        "CUDA": torch.version.cuda or torch.version.hip or "none",
        "driver": NVIDIA_DRIVER.read_text().splitlines()[0] if NVIDIA_DRIVER.exists() else "none",
        "device": torch.cuda.get_device_name(own_gpu) if num_gpus else f"{platform.machine()} CPU",
        "GPUs": str(num_gpus),
        NETWORK: "\n".join(variables),
    }


def compare(facts: Sequence[dict[str, str]], hosts: Sequence[str]) -> list[Row]:
    """One row for the hosts and one for each fact; ranks that differ from most are named.

    Args:
        facts: from `own_facts`, by rank.
        hosts: the host of every rank.
    """
    per_host = Counter(hosts)
    backend = dist.get_backend() if dist.is_initialized() else "none"
    counts = ", ".join(map(str, sorted(set(per_host.values()))))
    found = f"{len(per_host)}, ranks on each: {counts}; back end {backend}"
    rows = [Row("environment", "hosts", found, figures={"hosts": len(per_host), "ranks": len(hosts)})]
    rows += [_agreement(name, [fact[name] for fact in facts], hosts, True) for name in MUST_AGREE]
    return rows + [_agreement(name, [fact[name] for fact in facts], hosts, False) for name in SHOULD_AGREE]


def _agreement(name: str, values: Sequence[str], hosts: Sequence[str], is_needed: bool) -> Row:
    usual = Counter(values).most_common(1)[0][0]
    others = [rank for rank, value in enumerate(values) if value != usual]
    if name == NETWORK:
        found = _settings(usual, [values[rank] for rank in others])
    else:
        found = usual + "".join(f"; {value} on others" for value in sorted({values[rank] for rank in others})[:2])
    return Row(
        check="environment",
        what=name,
        found=found,
        where=place(others, hosts) if others else "",
        bound="the same on all ranks",
        holds=not others,
        remedy="make these hosts like the others",
        error=ConfigError if is_needed else None,
    )


def _settings(usual: str, others: Sequence[str]) -> str:
    """How many variables most ranks have, and the names of those that are not the same on the others."""
    ours = set(usual.splitlines())
    names = sorted({line.split("=")[0] for other in others for line in ours ^ set(other.splitlines())})
    return f"{len(ours)} set" + (f"; {', '.join(names)} not the same on others" if names else "")


def _hash_of_code() -> str:
    """Of the source files that are imported here: two hosts can hold different commits."""
    specs = [importlib.util.find_spec(name) for name in ("megagrow", "megagrow_kernels")]
    folders = [Path(place) for spec in specs if spec for place in spec.submodule_search_locations or ()]
    files = sorted((path.relative_to(folder), path) for folder in folders for path in folder.rglob("*.py"))
    return _hash(*(f"{name}\n{path.read_text()}" for name, path in files))


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]
