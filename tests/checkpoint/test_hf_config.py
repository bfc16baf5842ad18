"""config.json <-> ModelConfig: what is read, what is refused and how, what is written."""

import json
from dataclasses import asdict, replace

import pytest
import torch
import transformers

from megagrow.checkpoint.hf import check_exportable, hf_config_from_model, model_config_from_hf
from megagrow.config import ModelConfig
from megagrow.errors import CheckpointError, ConfigError
from tests.checkpoint.hf_folders import CLASSES, GPT2, LLAMA, OWN_GPT2, OWN_LLAMA, OWN_QWEN3

LLAMA_JSON = {"model_type": "llama", **LLAMA}
GPT2_JSON = {"model_type": "gpt2", **GPT2}


def test_every_field_of_llama_is_read() -> None:
    model = model_config_from_hf(
        LLAMA_JSON
        | {
            "head_dim": 10,
            "rms_norm_eps": 1e-3,
            "rope_theta": 500000,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
        }
    )
    assert model == ModelConfig(
        family="llama",
        vocab_size=61,
        hidden_size=24,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=10,
        ffn_size=40,
        max_seq_length=32,
        norm="rms_norm",
        norm_eps=1e-3,
        positions="rope",
        rope_theta=5e5,
        activation="swiglu",
        attention_bias="all",
        mlp_bias=True,
        tied_embeddings=True,
    )
    assert type(model.rope_theta) is float


def test_every_field_of_gpt2_is_read() -> None:
    model = model_config_from_hf(GPT2_JSON | {"n_inner": 50, "layer_norm_epsilon": 1e-4, "tie_word_embeddings": True})
    assert model == OWN_GPT2


@pytest.mark.parametrize("family", CLASSES)
def test_absent_keys_mean_what_they_mean_to_transformers(family: str) -> None:
    config_class, _, fields = CLASSES[family]
    optional = {"num_key_value_heads", "max_position_embeddings", "n_positions"}
    if family == "qwen3":
        optional.remove("num_key_value_heads")  # absent it would be 32, null as many as query heads
    required = {key: value for key, value in fields.items() if key not in optional}
    complete = json.loads(config_class(**required).to_json_string(use_diff=False))
    assert model_config_from_hf({"model_type": family, **required}) == model_config_from_hf(complete)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000}},
        {"rope_scaling": {"type": "default", "rope_theta": 5e5}, "rope_theta": 5e5},
        {"rope_scaling": None, "rope_parameters": {"rope_theta": 5e5}, "rope_theta": 5e5},
    ],
)
def test_the_rotary_base_is_found_wherever_a_version_puts_it(rope: dict) -> None:
    assert model_config_from_hf(LLAMA_JSON | rope).rope_theta == 5e5
    assert transformers.LlamaConfig(**LLAMA, **rope).rope_parameters["rope_theta"] == 5e5


REFUSED = [
    (
        "llama",
        {"model_type": "mamba"},
        "model_type='mamba' is not supported; use one of llama, qwen3, gpt2",
    ),
    ("llama", {"model_type": ["llama"]}, "model_type=['llama'] is not supported"),
    (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_scaling={'type': 'linear'",
    ),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters={"),
    ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "unscaled rotary positions"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("llama", {"rope_parameters": {"full_attention": {}}}, "full_attention"),
    ("llama", {"rope_scaling": "linear"}, "rope_scaling='linear' must be an object"),
    (
        "llama",
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
        "rope_parameters.rope_theta=1000000.0, rope_theta=10000.0 contradict",
    ),
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
    ("llama", {"attention_bias": 1}, "attention_bias=1 must be true or false"),
    ("llama", {"sliding_window": 4096}, "sliding_window=4096 is not supported"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
    ("llama", {"hidden_size": "24"}, "hidden_size='24' must be a positive whole number"),
    ("llama", {"hidden_size": 24.5}, "hidden_size=24.5 must be a positive whole number"),
    ("llama", {"hidden_size": True}, "hidden_size=True must be a positive whole number"),
    ("llama", {"hidden_size": 10**400}, "must be a positive whole number"),
    ("llama", {"hidden_size": None}, "hidden_size is missing"),
    ("llama", {"num_key_value_heads": 0}, "num_key_value_heads=0 must be"),
    ("llama", {"num_key_value_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
    ("llama", {"head_dim": 5}, "head_dim=5 is odd"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be a positive number"),
    ("llama", {"rms_norm_eps": -1e-5}, "rms_norm_eps=-1e-05"),
    ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' must be true or false"),
    ("gpt2", {"activation_function": "gelu"}, "activation_function='gelu' is not supported"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn=True"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
    ("gpt2", {"pruned_heads": {"0": [1]}}, "pruned_heads="),
    ("gpt2", {"n_head": 5}, "num_heads=5 does not divide hidden_size=24"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED)
def test_what_would_be_lost_is_refused(family: str, changes: dict, message: str) -> None:
    entries = {"llama": LLAMA_JSON, "gpt2": GPT2_JSON}[family]
    model_config_from_hf(entries)
    with pytest.raises(CheckpointError) as caught:
        model_config_from_hf(entries | changes)
    assert message in str(caught.value)
    assert str(caught.value).startswith("config.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "{", '"model_type"', "\x00", "{" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_a_file_that_is_no_config_is_named(tmp_path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=str(tmp_path / "config.json")):
        model_config_from_hf(tmp_path)


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read \(No such file"):
        model_config_from_hf(tmp_path / "config.json")


EXPORTED = [
    OWN_LLAMA,
    replace(OWN_LLAMA, attention_bias="all", mlp_bias=True, tied_embeddings=True, num_kv_heads=4),
    OWN_QWEN3,
    OWN_GPT2,
    replace(OWN_GPT2, tied_embeddings=False),
]


@pytest.mark.parametrize("model", EXPORTED)
def test_what_is_written_reads_back(model: ModelConfig, tmp_path) -> None:
    entries = hf_config_from_model(model, dtype=torch.bfloat16, token_ids={"eos_token_id": 7})
    (tmp_path / "config.json").write_text(json.dumps(entries))
    assert model_config_from_hf(tmp_path) == model


@pytest.mark.parametrize("model", EXPORTED)
def test_what_is_written_is_complete_for_transformers(model: ModelConfig) -> None:
    """No entry that transformers writes is left to its defaults, and each is taken as it stands."""
    entries = hf_config_from_model(model, dtype=torch.bfloat16, token_ids={"eos_token_id": 7})
    read = CLASSES[model.family][0].from_dict(entries)
    assert (read.dtype, read.bos_token_id, read.eos_token_id) == (torch.bfloat16, None, 7)
    written = json.loads(read.to_json_string(use_diff=False))
    of_all_models = json.loads(transformers.PretrainedConfig().to_json_string(use_diff=False))
    of_family = {key for key in written.keys() - of_all_models if not key.startswith("summary_")}
    assert of_family <= entries.keys()
    assert {k: v for k, v in entries.items() if k != "rope_theta"}.items() <= written.items()


def test_both_generations_of_transformers_find_the_rotary_base() -> None:
    entries = hf_config_from_model(OWN_LLAMA)
    assert entries["rope_theta"] == entries["rope_parameters"]["rope_theta"] == 5e5


NOT_EXPORTED = [
    (OWN_LLAMA, {"norm": "layer_norm"}, "model.norm=layer_norm"),
    (OWN_LLAMA, {"positions": "learned"}, "model.positions=learned"),
    (OWN_LLAMA, {"activation": "gelu"}, "model.activation=gelu"),
    (OWN_LLAMA, {"num_heads": 10}, "model.hidden_size=24 is not a multiple of num_heads=10"),
    (OWN_LLAMA, {"qk_norm": True}, "model.qk_norm=True"),
    (OWN_QWEN3, {"qk_norm": False}, "model.qk_norm=False"),
    (OWN_GPT2, {"activation": "geglu"}, "model.activation=geglu cannot be exported: GPT2LMHeadModel has gelu"),
    (OWN_GPT2, {"mlp_bias": False}, "model.mlp_bias=False"),
    (OWN_GPT2, {"attention_bias": "qkv"}, "model.attention_bias=qkv"),
    (OWN_LLAMA, {"norm_place": "after"}, "model.norm_place=after"),
    (OWN_LLAMA, {"objective": "mlm"}, "model.objective=mlm"),
    (OWN_GPT2, {"num_kv_heads": 2}, "model.num_kv_heads=2"),
    (OWN_GPT2, {"head_dim": 8}, "model.head_dim=8"),
    (OWN_GPT2, {"norm": "rms_norm"}, "model.norm=rms_norm"),
]


@pytest.mark.parametrize(("model", "changes", "message"), NOT_EXPORTED)
def test_a_model_that_the_family_cannot_express_is_refused(model: ModelConfig, changes: dict, message: str) -> None:
    check_exportable(model)
    changed = ModelConfig(**(asdict(model) | changes))
    with pytest.raises(ConfigError, match=message):
        hf_config_from_model(changed)
