"""The streaming writer, read back by the format's own library."""

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from megagrow.checkpoint.safetensors_file import SafetensorsFile

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def shapes_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_what_is_written_is_read_by_the_library(tmp_path) -> None:
    """Odd sizes of mixed dtypes put tensors at addresses that their dtype does not divide."""
    shapes = [(3,), (), (5, 7), (1, 3, 1), (7, 5)]
    tensors = {f"größe {dtype} {shape}": torch.randn(shape).to(dtype) for dtype in DTYPES for shape in shapes}
    tensors["turned"] = torch.randn(4, 3).T
    file = SafetensorsFile(tmp_path / "a.safetensors", shapes_of(tensors))
    for name in reversed(tensors):
        file.add(name, tensors[name])
    file.close()
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name
    with safe_open(tmp_path / "a.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_a_file_without_its_last_tensor_is_no_safetensors_file(tmp_path) -> None:
    file = SafetensorsFile(tmp_path / "a.safetensors", {"a": (2,), "b": (2,)})
    file.add("a", torch.ones(2))
    file.close()
    with pytest.raises(SafetensorError):
        load_file(tmp_path / "a.safetensors")


def test_another_file_is_never_written_over(tmp_path) -> None:
    (tmp_path / "a.safetensors").write_text("precious")
    with pytest.raises(FileExistsError):
        SafetensorsFile(tmp_path / "a.safetensors", {"a": (2,)})


def test_a_tensor_must_have_the_announced_shape(tmp_path) -> None:
    file = SafetensorsFile(tmp_path / "a.safetensors", {"a": (2,)})
    with pytest.raises(AssertionError, match="announced"):
        file.add("a", torch.ones(3))
    file.close()
