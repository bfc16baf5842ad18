"""config.json <-> ModelConfig: what is read, what is refused and how, what is written."""

import json
from dataclasses import asdict, replace

import pytest
import torch
import transformers

from megagrow.checkpoint.hf import check_exportable, hf_config_from_model, model_config_from_hf
from megagrow.config import ModelConfig, RopeScaling
from megagrow.errors import CheckpointError, ConfigError
from megagrow.model.rotary import rotary_frequencies
from tests.checkpoint.hf_folders import (
    CLASSES,
    GPT2,
    LLAMA,
    OWN_GPT2,
    OWN_GPT_NEOX,
    OWN_LLAMA,
    OWN_MISTRAL,
    OWN_QWEN2,
    OWN_QWEN3,
    ROPE_SCALINGS,
)

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
    if family in ("mistral", "qwen2", "qwen3"):
        optional.remove("num_key_value_heads")  # absent it would be 8 or 32, null as many as query heads
    if family == "mistral":
        optional.remove("max_position_embeddings")  # absent it would be more than the window
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


@pytest.mark.parametrize("kind", ROPE_SCALINGS)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_scaled_rotation_is_found_wherever_a_version_puts_it(family: str, kind: str) -> None:
    settings = ROPE_SCALINGS[kind]
    entries = {"model_type": family, **CLASSES[family][2]}
    model = model_config_from_hf(entries | {"rope_parameters": settings})
    assert model.rope_scaling is not None
    assert (model.rope_scaling.kind, model.rope_scaling.factor) == (settings["rope_type"], settings["factor"])
    older = {("type" if key == "rope_type" else key): value for key, value in settings.items()}
    assert model_config_from_hf(entries | {"rope_scaling": older}) == model
    assert model_config_from_hf(entries | {"rope_scaling": settings, "rope_parameters": settings}) == model
    written = hf_config_from_model(model)
    for newer_or_older in ("rope_parameters", "rope_scaling"):
        alone = {k: v for k, v in written.items() if not k.startswith("rope_") or k in (newer_or_older, "rope_theta")}
        assert model_config_from_hf(alone) == model


def test_the_share_that_is_rotated_is_found_wherever_a_version_puts_it() -> None:
    entries = {"model_type": "gpt_neox", **CLASSES["gpt_neox"][2]}
    assert model_config_from_hf(entries).rope_fraction == 0.25
    for stated in (
        {"rotary_pct": 0.5},
        {"rotary_pct": 0.5, "partial_rotary_factor": 0.5},
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
    ):
        assert model_config_from_hf(entries | stated).rope_fraction == 0.5
    written = hf_config_from_model(replace(OWN_GPT_NEOX, rope_fraction=0.5))
    assert written["rotary_pct"] == written["rope_parameters"]["partial_rotary_factor"] == 0.5


@pytest.mark.parametrize(
    ("family", "stated"),
    [
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 32}),
        ("mistral", {}),  # 4096
        ("qwen2", {"sliding_window": 8}),
        ("qwen3", {"sliding_window": 8, "use_sliding_window": False}),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True}),  # after 28 layers
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}),  # 4096
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "layer_types": ["full_attention"] * 3}),
    ],
)
def test_a_window_that_reaches_the_whole_context_changes_nothing(family: str, stated: dict) -> None:
    entries = {"model_type": family, **CLASSES[family][2]}
    assert model_config_from_hf(entries | stated).max_seq_length == 32


LLAMA3, YARN = ROPE_SCALINGS["llama3"], ROPE_SCALINGS["yarn"]


@pytest.mark.parametrize("truncate", [None, False, True, "left out"])
def test_whether_yarns_ramp_is_rounded_is_what_transformers_makes_of_it(truncate: bool | str | None) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = {**YARN, "beta_fast": 3.3, "beta_slow": 1.1, "truncate": truncate}
    if truncate == "left out":
        del settings["truncate"]
    entries = {"model_type": "llama", **CLASSES["llama"][2], "head_dim": 64, "rope_parameters": settings}
    theirs, _ = ROPE_INIT_FUNCTIONS["yarn"](transformers.LlamaConfig(**entries), torch.device("cpu"))
    found = model_config_from_hf(entries)
    other = replace(found, rope_scaling=replace(found.rope_scaling, truncate=not found.rope_scaling.truncate))
    ours, opposite = (rotary_frequencies(each)[0].float() for each in (found, other))
    assert not torch.allclose(opposite, theirs, rtol=1e-4)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("theirs", "ours"), [("gelu", "gelu_erf"), ("gelu_new", "gelu"), ("gelu_fast", "gelu")])
def test_gpt2_with_either_gelu(theirs: str, ours: str) -> None:
    """Cerebras-GPT has the exact one."""
    model = model_config_from_hf({"model_type": "gpt2", **CLASSES["gpt2"][2], "activation_function": theirs})
    assert model.activation == ours
    written = hf_config_from_model(model)["activation_function"]
    assert written == ("gelu" if ours == "gelu_erf" else "gelu_new")


@pytest.mark.parametrize("stated", [{"finetuned": True}, {"finetuned": False}, {}])
@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_what_transformers_does_not_read_of_a_rotation_is_passed_over(kind: str, stated: dict) -> None:
    stated = stated if kind == "yarn" else {"original_max_position_embeddings": 16} if stated else {}
    settings = YARN if kind == "yarn" else {"rope_type": "linear", "factor": 2.0}
    entries = {"model_type": "llama", **CLASSES["llama"][2]}
    plain, more = (model_config_from_hf(entries | {"rope_scaling": each}) for each in (settings, settings | stated))
    assert plain == more


WINDOWED = ["full_attention", "sliding_attention", "full_attention"]
REFUSED = [
    ("llama", {"model_type": "mamba"}, "model_type='mamba' is not supported; use one of llama, mistral, "),
    ("llama", {"model_type": ["llama"]}, "model_type=['llama'] is not supported"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type='dynamic' is not"),
    ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type='longrope' is not"),
    ("llama", {"rope_scaling": {"rope_type": ["yarn"]}}, "rope_scaling.rope_type=['yarn'] is not"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "type": "linear"}}, "type='linear' contradict"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor=0.5 must be at least 1"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor='2' must be a positive number"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2, "mscale": 2}}, "rope_scaling.mscale=2 is not supported"),
    ("llama", {"rope_parameters": {**LLAMA3, "low_freq_factor": None}}, "rope_parameters.low_freq_factor is missing"),
    ("llama", {"rope_parameters": {**LLAMA3, "low_freq_factor": 5}}, "high_freq_factor=4.0 must exceed"),
    ("llama", {"rope_parameters": LLAMA3, "rope_scaling": {"type": "linear", "factor": 8}}, "contradict each other"),
    ("llama", {"rope_parameters": LLAMA3, "original_max_position_embeddings": 8}, "contradict each other"),
    ("llama", {"rope_parameters": {**YARN, "attention_factor": 0}}, "attention_factor=0 must be a positive number"),
    ("llama", {"rope_parameters": {**YARN, "truncate": "no"}}, "rope_parameters.truncate='no' must be true or false"),
    ("llama", {"rope_parameters": {"rope_theta": 0}}, "rope_parameters.rope_theta=0 must be a positive number"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("llama", {"rope_parameters": {"full_attention": {}}}, "full_attention"),
    ("gpt_neox", {"rotary_pct": 0.1}, "or so is the share of it that rope_fraction=0.1 rotates (0)"),
    ("gpt_neox", {"rotary_pct": 0.5, "rope_parameters": {"partial_rotary_factor": 1.0}}, "rotary_pct=0.5 contradict"),
    ("gpt_neox", {"rope_theta": 100.0}, "rotary_emb_base=10000.0"),
    ("gpt_neox", {"use_parallel_residual": 1}, "use_parallel_residual=1 must be true or false"),
    ("gpt_neox", {"hidden_act": "relu"}, "use a model with hidden_act='gelu' or hidden_act='gelu_new'"),
    ("mistral", {"sliding_window": 31}, "set max_position_embeddings=31 to use this one within its window"),
    ("mistral", {"max_position_embeddings": None}, "sliding_window=4096 is shorter than the context"),
    ("mistral", {"sliding_window": "all"}, "sliding_window='all' must be a positive whole number"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, "sliding_window=8 is shorter"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "sliding_window=8 is shorter"),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": WINDOWED},
        "sliding_window=8 is shorter",
    ),
    ("qwen2", {"layer_types": WINDOWED}, "layer_types names sliding_attention, but there is no sliding_window in use"),
    ("qwen2", {"layer_types": ["full_attention"]}, "layer_types must be a list of full_attention or"),
    ("qwen2", {"layer_types": ["linear_attention"] * 3}, "layer_types must be a list of full_attention or"),
    ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window='yes' must be true or false"),
    ("llama", {"rope_scaling": []}, "rope_scaling=[] must be an object"),
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
    ("gpt2", {"activation_function": "silu"}, "activation_function='silu' is not supported"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn=True"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
    ("gpt2", {"pruned_heads": {"0": [1]}}, "pruned_heads="),
    ("gpt2", {"n_head": 5}, "num_heads=5 does not divide hidden_size=24"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED)
def test_what_would_be_lost_is_refused(family: str, changes: dict, message: str) -> None:
    entries = {"model_type": family, **CLASSES[family][2]}
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
    replace(OWN_LLAMA, rope_scaling=RopeScaling("linear", 3.0)),
    OWN_MISTRAL,
    replace(OWN_QWEN2, rope_scaling=RopeScaling("yarn", 4.0, 8, attention_factor=1.5, truncate=False)),
    OWN_QWEN3,
    OWN_GPT2,
    replace(OWN_GPT2, tied_embeddings=False),
    replace(OWN_GPT_NEOX, rope_scaling=RopeScaling("llama3", 8.0, 16)),
    replace(OWN_GPT_NEOX, parallel_residual=False, attention_bias="none", activation="gelu", tied_embeddings=True),
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
    older = {"rope_theta", "rope_scaling", "rotary_pct", "rotary_emb_base"}
    assert {k: v for k, v in entries.items() if k not in older}.items() <= written.items()


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
    (OWN_LLAMA, {"attention_bias": "qkv"}, "model.attention_bias=qkv cannot be exported: LlamaForCausalLM has none or"),
    (OWN_LLAMA, {"rope_fraction": 0.5}, "model.rope_fraction=0.5"),
    (OWN_QWEN2, {"attention_bias": "all"}, "model.attention_bias=all"),
    (OWN_GPT_NEOX, {"activation": "swiglu"}, "GPTNeoXForCausalLM has gelu_erf or gelu"),
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
