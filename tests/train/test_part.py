"""A rank's share of a model, filled from a source."""

import weakref

import pytest
import torch

from megagrow.config import Config, ModelConfig
from megagrow.model import transformer
from megagrow.parallel import heartbeat
from megagrow.parallel.mesh import Mesh
from megagrow.roles import parameter_shapes
from megagrow.train.part import build_part, load_part

MODEL = ModelConfig(vocab_size=61, hidden_size=16, num_layers=3, num_heads=4, ffn_size=24)


def test_a_source_is_read_tensor_by_tensor() -> None:
    """No tensor of it is kept once the shard is filled."""
    part = build_part(MODEL, Config(model=MODEL), Mesh.single())
    shapes, read = parameter_shapes(MODEL), {}

    def fetch(name: str) -> torch.Tensor:
        assert all(earlier() is None for earlier in read.values()), name
        tensor = torch.full(shapes[name], float(len(read)))
        read[name] = weakref.ref(tensor)
        return tensor

    load_part(part, fetch)
    assert list(read) == list(part.parameters)
    assert all(torch.all(parameter == i) for i, parameter in enumerate(part.parameters.values()))


def test_initial_values_are_marked_one_by_one_and_cut_before_they_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that minutes of drawing are no hang, and a GPU (here: the meta device) never holds more than its own piece."""
    part, sources = build_part(MODEL, Config(model=MODEL), Mesh.single()), list[str]()
    monkeypatch.setattr(transformer, "fill", lambda _, whole: sources.append(whole.device.type))
    elsewhere = {name: torch.nn.Parameter(p.to("meta")) for name, p in part.parameters.items()}
    before = heartbeat.here.count
    transformer.initialize(elsewhere, MODEL, seed=1)
    assert sources == ["cpu"] * len(part.parameters)
    assert heartbeat.here.count - before == len(part.parameters)
