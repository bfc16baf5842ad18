"""What holds for every test: one thread, fixed seeds, strict torch, no network, no rank left."""

import gc
import os
from pathlib import Path

ENVIRON = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
    "CUDA_VISIBLE_DEVICES": "",  # the ranks are gloo ranks; kernels run interpreted
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
os.environ.update(ENVIRON)  # before torch is imported: it reads the number of threads once

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from tests import ranks  # noqa: E402

torch.set_num_threads(1)

HERE = Path(__file__).parent

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("fixed")


# These take longest. They start first, so that no process is left alone with one of them at the end.
LONG_FILES = [
    "train/test_liveness.py",
    "test_benchmarks.py",
    "kernels/test_ops.py",
    "parallel/test_parity.py",
    "plan/test_activations.py",
    "fuzz/test_fuzz.py",
    "train/test_growths.py",
    "train/test_run.py",
    "parallel/test_bug_classes.py",
    "train/test_run_layouts.py",
    "kernels/test_aot.py",
    "train/test_two_nodes.py",
    "kernels/test_layouts.py",
    "train/test_resume.py",
    "launch/test_agent.py",
    "test_check_cluster.py",
    "train/test_stage_one.py",
    "plan/test_memory.py",
    "train/test_frozen_compiled.py",
    "compare/test_comparison.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files come first; all else stays as it was."""
    places = {HERE / name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish() -> None:
    """Garbage collections, one of which begins every run, need not go through what has been imported: 0.4 s each."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    ranks.fresh_state()


def pytest_sessionfinish() -> None:
    ranks.shutdown()
