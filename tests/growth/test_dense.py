"""Learned maps by the kernels of dense products: the same boxes and gradients as without, whatever the box."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megagrow import ops, torch_growth_ops
from megagrow.growth import dense
from megagrow.growth.ligo import Ligo
from megagrow.growth.ligo_maps import Variant
from megagrow.growth.operator import grow_box, write_box
from megagrow.roles import layer_name, parameter_shapes, role_of, split_name
from tests.growth.models import make, tensors_of
from tests.growth.test_ligo import PAIRS, make_ligo
from tests.growth.test_operator import random_box

BOXES = 4  # of each parameter, beside the whole


@contextmanager
def kernels_serve() -> Iterator[Counter[str]]:
    """As on a GPU, with the kernels' twins in their place; counts the calls of each."""
    calls: Counter[str] = Counter()

    def counted(name: str) -> Any:
        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return getattr(torch_growth_ops, name)(*arguments)

        return call

    doors = {"serves": lambda name, _: name == "dense_map"}
    doors |= {name: counted(name) for name in ("dense_map", "dense_map_", "dense_blocks_")}
    with mock.patch.multiple(ops, **doors):
        yield calls


def empty_box(box: tuple[slice, ...]) -> Tensor:
    return torch.full([part.stop - part.start for part in box], torch.nan, dtype=torch.double)


def cases(ligo: Ligo) -> Iterator[tuple[str, Tensor, tuple[slice, ...]]]:
    """Parameters, what they are grown from, and boxes of them."""
    generator, small = torch.Generator().manual_seed(1), tensors_of(make(ligo.start.source))
    for name, shape in parameter_shapes(ligo.start.target).items():
        layer, leaf = split_name(name)
        source = small[name if layer is None else layer_name(layer % ligo.start.source.num_layers, leaf)]
        for box in (tuple(slice(0, size) for size in shape), *(random_box(shape, generator) for _ in range(BOXES))):
            yield name, source, box


def boxes_and_gradients(ligo: Ligo) -> list[tuple[str, Tensor, Tensor]]:
    """Every box as it is written, and as it is grown with a gradient to the maps that it uses."""
    found = []
    for name, source, box in cases(ligo):
        written = empty_box(box)
        with torch.no_grad():
            write_box(ligo.recipe(), name, source, box, written)
        for parameter in ligo.parameters().values():
            parameter.grad = torch.zeros_like(parameter)
        grown = grow_box(ligo.recipe(), name, source, box)
        if grown.requires_grad:
            grown.backward(torch.arange(grown.numel(), dtype=torch.double).view_as(grown).cos())
        torch.testing.assert_close(written, grown.detach(), rtol=1e-12, atol=1e-14)
        gradients = [p.grad.flatten() for p in ligo.parameters().values() if p.grad is not None]
        found.append((name, grown.detach(), torch.cat(gradients)))
    return found


@pytest.mark.parametrize("variant", ["tied", "target_layer", "full_rank"])
@pytest.mark.parametrize("pair", ["gqa", "gpt2", "everything", "uneven", "ffn-only", "bert"])
def test_boxes_and_gradients_are_the_same(pair: str, variant: Variant) -> None:
    expected = boxes_and_gradients(make_ligo(*PAIRS[pair], variant))
    with kernels_serve() as calls:
        found = boxes_and_gradients(make_ligo(*PAIRS[pair], variant))
    for (name, *tensors), (_, *wanted) in zip(found, expected, strict=True):
        for tensor, other in zip(tensors, wanted, strict=True):
            torch.testing.assert_close(tensor, other, rtol=1e-12, atol=1e-13, msg=name)
    assert bool(calls["dense_map"] and calls["dense_map_"]) == (variant == "tied")
    assert bool(calls["dense_blocks_"]) == (variant == "target_layer")


def test_every_grown_matrix_goes_through_a_kernel_unless_its_parts_are_fused_by_head() -> None:
    """Rows of key and value lie apart unevenly; gate and up are every other row."""
    source, target = PAIRS["everything"]
    for variant in ("tied", "target_layer"):
        ligo = make_ligo(source, target, variant)
        for name, source_tensor, box in cases(ligo):
            with kernels_serve() as calls:
                write_box(ligo.recipe(), name, source_tensor, box, empty_box(box))
            fused_by_head = "key" in role_of(name).parts
            assert bool(calls) == (len(box) == 2 and (variant == "tied" or not fused_by_head)), (variant, name)


def test_a_part_in_the_place_of_another_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = boxes_and_gradients(make_ligo(*PAIRS["everything"], "tied"))
    parts_of = dense._parts
    monkeypatch.setattr(dense, "_parts", lambda rows, source: parts_of(rows, source)[::-1])
    with kernels_serve(), pytest.raises(AssertionError):
        for (name, box, _), (_, wanted, _) in zip(
            boxes_and_gradients(make_ligo(*PAIRS["everything"], "tied")), expected, strict=True
        ):
            torch.testing.assert_close(box, wanted, msg=name)
