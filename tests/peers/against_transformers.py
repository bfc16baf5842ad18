"""Decoder families against transformers, on random small models: the same weights give the same logits both ways.

Sizes, biases, ties, activations, windows and the kind of rotation are drawn by seed; every kind of scaled rotation
comes up in every family that rotates. Sequences are longer than the contexts from before the scaling.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from megagrow.checkpoint.convert import convert
from megagrow.checkpoint.hf import HFReader, write_hf_folder
from megagrow.checkpoint.hf_families import FAMILIES
from megagrow.checkpoint.source import load_model, open_source
from megagrow.model.transformer import Transformer
from megagrow.parallel.mesh import Mesh
from tests.checkpoint.hf_folders import CLASSES, ROPE_SCALINGS, logits_of, tensors_of

LARGEST_DIFFERENCE = 1e-5
CONTEXT, NUM_TOKENS = 64, 60
ROTATIONS: list[dict[str, Any]] = [{"rope_type": "default"}, *ROPE_SCALINGS.values()]
# Entries that change on the way: windows that reach the whole context, a size that was left out, other names of the
# same activation, dropout.
WITHOUT_EFFECT = {"_name_or_path", "use_sliding_window", "sliding_window", "layer_types", "max_window_layers"}
WITHOUT_EFFECT |= {"activation_function", "hidden_act", "attn_pdrop", "embd_pdrop", "resid_pdrop", "n_inner"}
DECODERS = [name for name, family in FAMILIES.items() if family.architecture.endswith(("CausalLM", "LMHeadModel"))]
CASES = [(family, seed) for family in DECODERS for seed in range(2 * len(ROTATIONS))]


def random_fields(family: str, seed: int) -> dict[str, Any]:
    """Entries of a config.json of the family."""
    rng = random.Random(f"{family} {seed}")
    heads, head_dim = rng.choice([2, 4, 6]), rng.choice([8, 16])
    fields = {"vocab_size": rng.randrange(51, 131, 2), "tie_word_embeddings": rng.random() < 0.5}
    if family == "gpt2":
        return fields | {
            "n_embd": heads * head_dim,
            "n_layer": rng.randint(1, 3),
            "n_head": heads,
            "n_inner": rng.choice([None, rng.randrange(20, 80)]),
            "n_positions": CONTEXT,
            "layer_norm_epsilon": rng.choice([1e-5, 1e-3]),
            "activation_function": rng.choice(["gelu_new", "gelu_pytorch_tanh"]),
        }
    fields |= {
        "hidden_size": heads * head_dim,
        "intermediate_size": rng.randrange(20, 80),
        "num_hidden_layers": rng.randint(1, 3),
        "num_attention_heads": heads,
        "max_position_embeddings": CONTEXT,
        "rope_parameters": {**ROTATIONS[seed % len(ROTATIONS)], "rope_theta": rng.choice([100.0, 1e4, 5e5])},
    }
    if family == "gpt_neox":
        fields["rope_parameters"]["partial_rotary_factor"] = rng.choice([0.25, 0.5, 1.0])
        return fields | {
            "layer_norm_eps": rng.choice([1e-5, 1e-3]),
            "use_parallel_residual": rng.random() < 0.5,
            "attention_bias": rng.random() < 0.7,
            "hidden_act": rng.choice(["gelu", "gelu_new", "gelu_fast"]),
        }
    fields |= {
        "num_key_value_heads": rng.choice([n for n in (1, 2, heads) if heads % n == 0]),
        "rms_norm_eps": rng.choice([1e-6, 1e-3]),
    }
    if family != "qwen2":
        fields["head_dim"] = rng.choice([head_dim, 10])
    if family == "llama":
        fields |= {"attention_bias": rng.random() < 0.5, "mlp_bias": rng.random() < 0.5}
    if family == "mistral":
        fields["sliding_window"] = rng.choice([None, CONTEXT])
    if family.startswith("qwen") and rng.random() < 0.5:
        fields |= {"use_sliding_window": True, "sliding_window": CONTEXT, "max_window_layers": 1}
    return fields


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Matrices keep the size of what they multiply; no gain is 1, no bias 0."""
    for name, parameter in model.named_parameters():
        is_gain = "norm" in name.split(".")[-2] or name.split(".")[-2].startswith("ln_")
        values = torch.randn(parameter.shape) / (parameter.shape[-1] ** 0.5 if parameter.ndim == 2 else 5)
        parameter.copy_(values + (is_gain and name.endswith("weight")))


def random_folder(folder: Path, family: str, seed: int) -> Path:
    """A model of transformers all of whose parameters are random, as transformers saves it."""
    config_class, model_class, _ = CLASSES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**random_fields(family, seed)))
    randomize(model)
    model.save_pretrained(folder, max_shard_size=20_000 if seed % 2 else "5GB")
    return folder


def random_ids(vocab_size: int, seed: int) -> Tensor:
    return torch.randint(vocab_size, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(seed))


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=LARGEST_DIFFERENCE, rtol=0)


@pytest.mark.parametrize(("family", "seed"), CASES)
def test_logits_of_their_folder(tmp_path: Path, family: str, seed: int) -> None:
    folder = random_folder(tmp_path / "theirs", family, seed)
    source = open_source(folder)
    ids_BS = random_ids(source.model.vocab_size, seed)
    assert_close(load_model(source, Mesh.single()).logits(ids_BS), logits_of(folder, ids_BS))


@pytest.mark.parametrize(("family", "seed"), CASES)
def test_logits_of_our_export(tmp_path: Path, family: str, seed: int) -> None:
    """Nothing missing, unexpected or of another shape in there, and nothing of our own configuration lost."""
    model = HFReader(random_folder(tmp_path / "theirs", family, seed)).model
    transformer, ids_BS = Transformer(model), random_ids(model.vocab_size, seed)
    randomize(transformer)
    with torch.no_grad():
        ours = transformer.logits(ids_BS)
    write_hf_folder(tmp_path / "ours", model, dict(transformer.named_parameters()).__getitem__)
    assert_close(ours, logits_of(tmp_path / "ours", ids_BS))
    assert HFReader(tmp_path / "ours").model == model


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_their_folder_after_both_conversions(tmp_path: Path, family: str, dtype: str) -> None:
    """Bit-equal tensors under the same names, and a config.json that means the same to transformers."""
    folder = random_folder(tmp_path / "theirs", family, 4)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    convert(folder, tmp_path / "own", "megagrow")
    convert(tmp_path / "own", tmp_path / "back", "hf")
    before, after = tensors_of(folder), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before)
    old, new = (transformers.AutoConfig.from_pretrained(path).to_dict() for path in (folder, tmp_path / "back"))
    assert {key for key, value in old.items() if new[key] != value} <= WITHOUT_EFFECT
