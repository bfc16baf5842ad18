"""What holds for every test: one thread, fixed seeds, strict torch, no network, no rank left."""

import gc
import os

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

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("fixed")


def pytest_collection_finish() -> None:
    """Garbage collections, one of which begins every run, need not go through what has been imported: 0.4 s each."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    ranks.fresh_state()


def pytest_sessionfinish() -> None:
    ranks.shutdown()
