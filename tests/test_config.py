"""Tests config.py, command_line.py and presets.py: bad input gets one line with value, rule and remedy."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megagrow import presets
from megagrow.checks import check, problems
from megagrow.command_line import parse
from megagrow.config import (
    Config,
    DataConfig,
    GrowthConfig,
    InitConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RopeScaling,
    RunConfig,
    SaltConfig,
    TrainConfig,
    microbatch_size,
)
from megagrow.config_file import dump, from_dict, load_file, option_names, to_dict
from megagrow.earlier_growth import EarlierGrowth
from megagrow.errors import ConfigError
from megagrow.model.rotary import rotary_frequencies
from megagrow.timeline import growth_configs, growth_settings

GROUPED = ModelConfig(hidden_size=768, num_heads=24, num_kv_heads=8, ffn_size=1536)
SMALL = ModelConfig(hidden_size=64, num_heads=4, num_layers=2, ffn_size=128)


def test_a_dump_reads_back_equal(tmp_path: Path) -> None:
    for name in presets.names():
        config = presets.get(name)
        path = tmp_path / f"{name}.json"
        path.write_text(dump(config))
        assert load_file(path) == config
        assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {hiden_size: 3}", ["model.hiden_size", "did you mean model.hidden_size?"]),
        ("model: {bias: true}", ["model.bias", "did you mean model.attention_bias and model.mlp_bias?"]),
        ("growth: {source: {bias: 1}}", ["growth.source.attention_bias and growth.source.mlp_bias?"]),
        ("optm: {lr: 1}", ["optm", "did you mean optim?"]),
        ("train: {steps: soon}", ["train.steps='soon'", "int"]),
        ("train: {steps: true}", ["train.steps=True", "int"]),
        ("optim: {schedule: wds}", ["optim.schedule='wds'", "wsd, cosine, constant"]),
        ("growth: {source: {num_layer: 2}}", ["growth.source.num_layer", "num_layers"]),
        ("model: [1, 2]", ["model must be a mapping"]),
        ("model: {", ["not valid YAML"]),
        ("train: {steps: 0}", ["train.steps=0", "positive"]),
        ("train: {dropout: 0.000001}", ["train.dropout=1e-06", "2^-16"]),
        ("train: {dropout: 1.0}", ["train.dropout=1.0", "2^-16"]),
        ("!!python/object/apply:os.system ['true']", ["not valid YAML"]),
    ],
)
def test_a_bad_file_gets_one_line(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_file(path)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_yaml_numbers_without_a_dot_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optim: {lr: 1e-3}\nmodel: {hidden_size: 64, num_heads: 4}\n")
    assert load_file(path).optim.lr == 1e-3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["usage", "quickstart_small"]),
        (["quickstart_smal"], ["quickstart_smal", "did you mean quickstart_small?"]),
        (["missing.yaml"], ["missing.yaml", "neither a preset nor a file"]),
        (["quickstart_small", "--train.step", "3"], ["--train.step", "did you mean train.steps?"]),
        (["quickstart_small", "--train.steps", "abc"], ["train.steps='abc'", "int"]),
        (["quickstart_small", "--train.steps"], ["--train.steps needs a value"]),
        (["quickstart_small", "--growth.source.num-layers", "2"], ["growth.source is a whole model", "YAML"]),
        (["quickstart_small", "--growth.earlier.at-step", "2"], ["growth.earlier is a list", "give it whole"]),
        (["quickstart_small", "--growth.earlier", "[{layers: 2}]"], ["unknown key growth.earlier[0].layers"]),
        (["quickstart_small", "--growth.earlier", "[{num_layers: -2}]"], ["num_layers=-2", "must not be negative"]),
        (["quickstart_small", "--growth.at-plateau", "1.5"], ["growth.at_plateau=1.5", "[0, 1)"]),
        (["quickstart_small", "--train.label-smoothing", "1"], ["train.label_smoothing=1.0", "[0, 1)"]),
        (["quickstart_small", "--train.z-loss", "-1e-4"], ["train.z_loss=-0.0001", "must not be negative"]),
        (["quickstart_small", "--salt.divergence", "js"], ["salt.divergence='js'", "reverse_kl"]),
        (["quickstart_small", "stray"], ["stray is no option", "in quotes"]),
        (["quickstart_small", "--optim.clip-norm", "-1"], ["optim.clip_norm=-1.0", "must not be negative"]),
        (["quickstart_small", "--optim.max-bad-steps", "0"], ["optim.max_bad_steps=0", "positive"]),
        (["quickstart_small", "--run.log-interval", "0"], ["run.log_interval=0", "positive"]),
        (["quickstart_small", "--checkpoint.keep-last", "-1"], ["checkpoint.keep_last=-1", "must not be negative"]),
    ],
)
def test_bad_arguments_get_one_line(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(arguments)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_options_override_single_fields() -> None:
    text = "--train.steps 7 --init.from 2024 --run.debug true --optim.lr=1e-4 --data.seq-length 64"
    config = parse(["quickstart_small", *text.split()])
    assert (config.train.steps, config.init.from_, config.run.debug, config.optim.lr) == (7, "2024", True, 1e-4)
    assert config.data.seq_length == 64
    assert config.model == presets.get("quickstart_small").model


def test_growths_of_a_run_fit_on_the_command_line_and_into_a_file(tmp_path: Path) -> None:
    arguments = ["--growth.method", "stack", "--growth.at-step=9", "--init.from=x", "--growth.earlier"]
    config = parse(["quickstart_small", *arguments, "[{num_layers: 4, at_tokens: 100, freeze_steps: 2}]"])
    assert config.growth.earlier == (EarlierGrowth(num_layers=4, at_tokens=100, freeze_steps=2),)
    assert growth_settings(config.growth, 0).method == "stack"
    (tmp_path / "run.json").write_text(dump(config))
    assert load_file(tmp_path / "run.json") == config


def test_the_growths_in_the_documentation_fit_together(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs/when_to_grow.md").read_text()
    (tmp_path / "run.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    config = load_file(tmp_path / "run.yaml")
    check(config, 1)
    sizes = [(each.model.num_layers, each.model.hidden_size) for each in growth_configs(config, config.growth.source)]
    assert sizes == [(3, 512), (6, 512), (12, 512)]


def test_derived_fields_follow_an_override() -> None:
    model = parse(["quickstart_small", "--model.num-heads", "6"]).model
    assert (model.num_heads, model.num_kv_heads, model.head_dim) == (6, 6, 16)
    assert parse(["quickstart_small", "--model.hidden-size=192"]).model.head_dim == 64
    model = parse(["quickstart_small", "--model.num-heads", "6", "--model.num-kv-heads", "2"]).model
    assert (model.num_kv_heads, model.head_dim) == (2, 16)


def test_every_field_is_an_option() -> None:
    assert {"init.from", "growth.source.num_layers", "model.hidden_size", "run.dir"} <= set(option_names())


def config_with(**sections: object) -> Config:
    return dataclasses.replace(Config(), **sections)


def growing(*earlier: EarlierGrowth, at_step: int = 9, **fields: Any) -> GrowthConfig:
    """Depth from `SMALL`'s, before step 9."""
    return GrowthConfig(method="stack", source=SMALL, at_step=at_step, earlier=earlier, **fields)


SCORED: dict[str, Any] = {"scores": "x", "steps": 5}
ONLINE: dict[str, Any] = {"teacher": "x", "steps": 5, "online_buffer": 4}

BAD_COMBINATIONS = [
    (
        config_with(model=GROUPED, parallel=ParallelConfig(tensor=3)),
        3,
        ["tensor=3 neither divides num_kv_heads=8", "use 1, 2, 4 or 8, or a multiple of 8"],
    ),
    (config_with(parallel=ParallelConfig(tensor=2, pipeline=2)), 6, ["does not divide the 6 launched ranks", "4"]),
    (config_with(parallel=ParallelConfig(pipeline=16)), 16, ["parallel.pipeline=16 x 1", "num_layers=8", "at most 10"]),
    (config_with(train=TrainConfig(global_batch_size=6)), 4, ["global_batch_size=6", "4 data-parallel", "use 4 or 8"]),
    (config_with(train=TrainConfig(microbatch_size=3)), 1, ["microbatch_size=3", "share of 16", "1, 2, 4, 8 or 16"]),
    (
        config_with(parallel=ParallelConfig(pipeline=4), train=TrainConfig(microbatch_size=8)),
        4,
        ["2 microbatches", "4 pipeline stages", "microbatch_size<=4"],
    ),
    (
        config_with(parallel=ParallelConfig(pipeline=3, layers_per_stage=(4, 0, 4))),
        3,
        ["[4, 0, 4] leaves pipeline rank 1 without any layer"],
    ),
    (
        config_with(
            parallel=ParallelConfig(
                pipeline=4, schedule="Interleaved1F1B", layers_per_stage=(1, 0, 2, 2, 1, 0, 1, 1), stages_per_rank=2
            )
        ),
        4,
        ["leaves pipeline rank 1 without any layer", "one of its stages"],
    ),
    (
        config_with(parallel=ParallelConfig(pipeline=2, layers_per_stage=(4, 3))),
        2,
        ["[4, 3] has 7 layers, the model 8"],
    ),
    (config_with(parallel=ParallelConfig(pipeline=2, layers_per_stage=(8,))), 2, ["names 1 stages", "give 2 numbers"]),
    (config_with(parallel=ParallelConfig(replicate=3)), 4, ["replicate=3", "4 data-parallel ranks", "use 1, 2 or 4"]),
    (
        config_with(parallel=ParallelConfig(pipeline=2, schedule="ZBVZeroBubble"), train=TrainConfig(recompute="full")),
        2,
        ["recompute=full", "schedule=ZBVZeroBubble", "Interleaved1F1B or 1F1B"],
    ),
    (
        config_with(parallel=ParallelConfig(pipeline=2, schedule="DualPipeV"), train=TrainConfig(compile=True)),
        2,
        ["train.compile", "schedule=DualPipeV", "hangs"],
    ),
    (
        config_with(parallel=ParallelConfig(pipeline=2, schedule="DualPipeV"), train=TrainConfig(microbatch_size=8)),
        2,
        ["2 microbatches", "4 pipeline stages", "microbatch_size<=4"],
    ),
    (
        config_with(
            parallel=ParallelConfig(pipeline=2, schedule="Interleaved1F1B"),
            train=TrainConfig(global_batch_size=15, microbatch_size=3),
        ),
        2,
        ["5 microbatches", "equal rounds", "multiple of 2"],
    ),
    (config_with(parallel=ParallelConfig(context=3)), 3, ["seq_length=128", "multiple of 6", "use 126 or 132"]),
    (
        config_with(
            parallel=ParallelConfig(tensor=8, context=8, sequence_parallel=True), data=DataConfig(seq_length=80)
        ),
        64,
        ["10 tokens of a rank", "parallel.tensor=8", "multiple of 64"],
    ),
    (
        config_with(optim=OptimConfig(offload=True, backend="apex")),
        1,
        ["optim.offload", "optim.backend=apex", "backend=torch"],
    ),
    (config_with(growth=GrowthConfig(method="stack")), 1, ["nothing to grow", "--init.from"]),
    (
        config_with(growth=GrowthConfig(method="ligo", source=SMALL, at_step=5, optimizer="exact")),
        1,
        ["growth.optimizer=exact", "learned maps", "reset"],
    ),
    (
        config_with(model=SMALL, growth=GrowthConfig(method="clone", source=ModelConfig(head_dim=16), at_step=5)),
        1,
        ["hidden_size=64 is smaller than the source's 512"],
    ),
    (
        config_with(
            growth=GrowthConfig(method="clone", source=dataclasses.replace(SMALL, norm="layer_norm"), at_step=5)
        ),
        1,
        ["norm=layer_norm", "rms_norm", "keeps the kind of model"],
    ),
    (
        config_with(
            model=SMALL, growth=GrowthConfig(method="clone", source=SMALL, at_step=5), init=InitConfig(from_="x")
        ),
        1,
        ["growth.source", "init.from", "leave one"],
    ),
    (config_with(model=SMALL, growth=GrowthConfig(method="clone", source=SMALL)), 1, ["growth.at_step=0", "set"]),
    (
        config_with(
            model=dataclasses.replace(SMALL, positions="learned", max_seq_length=64), data=DataConfig(seq_length=65)
        ),
        1,
        ["data.seq_length=65", "max_seq_length=64 of model"],
    ),
    (config_with(salt=SaltConfig(scores="x")), 1, ["salt.scores", "salt.steps=0"]),
    (config_with(salt=SaltConfig(teacher="x")), 1, ["salt.steps=0", "set salt.steps"]),
    (
        config_with(salt=SaltConfig(teacher="grown", steps=2)),
        1,
        ["salt.teacher=grown", "growth.method=none", "./grown"],
    ),
    (config_with(salt=SaltConfig(cache="x")), 1, ["salt.cache", "salt.steps=0", "set salt.steps"]),
    (config_with(salt=SaltConfig(teacher="x", cache="y", steps=2)), 1, ["salt.teacher=x", "salt.cache=y", "leave one"]),
    (
        config_with(salt=SaltConfig(cache="x", steps=2), data=DataConfig(order="megatron", num_samples=9)),
        1,
        ["salt.cache", "data.order=megatron", "Use order=megagrow"],
    ),
    *(
        (config_with(salt=SaltConfig(**fields)), 1, words)
        for fields, words in [
            ({"share": 0.1}, ["salt.share=0.1 without salt.teacher, salt.cache or salt.scores does nothing"]),
            ({"scores": "x", "steps": 5, "schedule": "cosine"}, ["salt.schedule=cosine", "salt.teacher is not set"]),
            ({"teacher": "x", "steps": 5, "end_when_better": True}, ["salt.end_when_better", "data.validation"]),
            ({"teacher": "x", "steps": 5, "keep": "band"}, ["salt.keep=band", "set salt.scores"]),
            (SCORED | {"threshold": 1.0}, ["salt.threshold=1.0 belongs to salt.keep=threshold, and salt.keep=top"]),
            (SCORED | {"keep": "band", "keep_fraction": 0.1}, ["salt.keep_fraction=0.1", "salt.keep=band; leave it"]),
            (SCORED | {"band_low": 0.1}, ["salt.band_low=0.1 belongs to salt.keep=band"]),
            (SCORED | {"score": "excess_nll"}, ["salt.reference_scores=(empty)", "set both, or neither"]),
            (SCORED | {"reference_scores": "y"}, ["salt.score=median_zero", "set both, or neither"]),
            (SCORED | {"quotas": ("web=1",)}, ["salt.quotas=['web=1']", "need salt.domains and salt.keep=top"]),
            ({"teacher": "x", "steps": 5, "domains": "d"}, ["salt.domains belong to salt.scores"]),
            (ONLINE | {"scores": "x"}, ["salt.online_buffer scores by itself", "leave one of them out"]),
            ({"online_buffer": 4}, ["salt.online_buffer=4", "set salt.teacher"]),
            (ONLINE | {"keep_fraction": 0.1}, ["keeps 0 of so many batches", "larger buffer"]),
            (ONLINE | {"keep_fraction": 0.9}, ["keeps 4 of so many batches"]),
            (ONLINE | {"keep": "threshold"}, ["salt.keep=threshold", "set salt.scores"]),
            (
                ONLINE | {"score": "excess_nll"},
                ["excess_nll is the difference of two models' losses", "by one, the te"],
            ),
        ]
    ),
    (
        config_with(salt=SaltConfig(**ONLINE), data=DataConfig(order="megatron")),
        1,
        ["salt.online_buffer passes over samples", "use order=megagrow"],
    ),
    (
        config_with(salt=SaltConfig(scores="x", steps=3, divergence="reverse_kl")),
        1,
        ["salt.divergence=reverse_kl", "salt.teacher is not set"],
    ),
    (
        config_with(salt=SaltConfig(cache="x", steps=3, divergence="reverse_kl")),
        1,
        ["salt.divergence=reverse_kl", "the mass of all others", "or salt.teacher"],
    ),
    *(
        (
            config_with(model=dataclasses.replace(SMALL, num_layers=8), train=TrainConfig(steps=50), growth=growth),
            1,
            words,
        )
        for growth, words in [
            (
                growing(at_step=0, at_tokens=50 * 16 * 128),
                ["at_tokens=102400 is not reached", "50 steps of 2048 tokens"],
            ),
            (growing(at_step=5, at_tokens=5), ["at_step=5 and at_tokens=5", "leave one"]),
            (growing(at_step=0, at_plateau=0.1), ["growth.at_step=0"]),
            (growing(EarlierGrowth(num_layers=6)), ["growth.at_step=0 would grow growth.source"]),
            (growing(EarlierGrowth(num_layers=6, at_step=9)), ["growth comes before step 9", "step 9 at the latest"]),
            (growing(EarlierGrowth(num_layers=6, at_step=40)), ["before it at step 40"]),
            (growing(EarlierGrowth(num_layers=6, at_tokens=9 * 2048)), ["before it at step 9"]),
            (growing(EarlierGrowth(at_step=5)), ["growth.earlier[0]: the model does not grow"]),
            (growing(EarlierGrowth(num_layers=8, at_step=5)), ["growth: the model does not grow"]),
            (growing(EarlierGrowth(num_layers=9, at_step=5)), ["growth: ", "num_layers=8 is smaller"]),
            (growing(EarlierGrowth(num_layers=1, at_step=5)), ["growth.earlier[0]: ", "num_layers=1 is smaller"]),
            (growing(EarlierGrowth(num_heads=3, num_kv_heads=2, at_step=5)), ["num_kv_heads=2", "num_heads=3"]),
            (growing(EarlierGrowth(num_layers=6, at_step=5, method="ligo", optimizer="exact")), ["optimizer=exact"]),
            (growing(freeze_steps=41), ["freeze_steps=41", "trains all layers"]),
            (
                growing(freeze_steps=4, optimizer="reset", rewarmup_part="new", rewarmup_steps=5),
                ["growth.rewarmup_steps=5", "freeze_steps=4", "rewarmup_part=all"],
            ),
            (
                growing(EarlierGrowth(num_layers=6, at_step=5, optimizer="reset", freeze_steps=4)),
                ["growth.earlier[0].freeze_steps=4", "up to the next growth"],
            ),
            (
                growing(EarlierGrowth(num_layers=6, at_step=5, optimizer="asymmetric")),
                ["growth comes before step 9", "step 5 adds have updates of their own", "before step 184 at the"],
            ),
            (
                growing(EarlierGrowth(num_layers=6, at_step=5), rewarmup_part="new", rewarmup_steps=5),
                ["growth comes before step 9", "before step 10 at the earliest"],
            ),
        ]
    ),
    (
        config_with(
            model=dataclasses.replace(SMALL, num_layers=8),
            growth=growing(freeze_steps=2),
            parallel=ParallelConfig(pipeline=2, schedule="DualPipeV"),
        ),
        2,
        ["freeze_steps=2", "DualPipeV", "1F1B"],
    ),
    (config_with(growth=GrowthConfig(source=SMALL)), 1, ["growth.method=none", "stack, clone"]),
    (
        config_with(
            model=dataclasses.replace(SMALL, num_layers=8),
            train=TrainConfig(steps=50),
            growth=growing(EarlierGrowth(num_layers=6, at_step=5)),
            salt=SaltConfig("grown", steps=42),
        ),
        1,
        ["salt.steps=42 do not fit", "before step 9 at the latest", "train.steps=50", "at most 41"],
    ),
]


@pytest.mark.parametrize(
    ("method", "earlier", "policies"),
    [("ligo", EarlierGrowth(), ["reset", "reset"]), ("stack", EarlierGrowth(method="ligo"), ["reset", "exact"])],
)
def test_learned_maps_leave_the_moments_behind_unless_told_otherwise(
    method: str, earlier: EarlierGrowth, policies: list[str]
) -> None:
    earlier = dataclasses.replace(earlier, num_layers=6, at_step=5)
    growth = dataclasses.replace(growing(earlier), method=method)
    model = dataclasses.replace(SMALL, num_layers=8)
    check(config_with(model=model, train=TrainConfig(steps=50), growth=growth), 1)
    assert [growth_settings(growth, number).optimizer for number in (0, 1)] == policies


@pytest.mark.parametrize(("config", "world_size", "words"), BAD_COMBINATIONS)
def test_bad_combinations_say_value_rule_and_remedy(config: Config, world_size: int, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check(config, world_size)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("name", presets.names())
def test_presets_pass_the_check_and_say_how_they_are_run(name: str) -> None:
    config = presets.get(name)
    if config.growth.method != "none" and config.growth.source is None and not config.init.from_:
        config = dataclasses.replace(config, init=InitConfig(from_="source"))
    for world_size in (1, 2, 8):
        check(config, world_size)
    assert json.loads(dump(config))["run"]["dir"].startswith("runs/")
    assert f"-m megagrow {name}" in (presets.docstring(name))


def test_quotas_are_given_as_a_list() -> None:
    arguments = ["--salt.quotas", "[Github=0.1, Wikipedia (en)=1]", "--salt.end-when-better", "true"]
    salt = parse(["quickstart_small", *arguments]).salt
    assert salt.domain_shares == {"Github": 0.1, "Wikipedia (en)": 1.0} and salt.end_when_better


@pytest.mark.parametrize(
    "fields",
    [
        SCORED | {"keep": "threshold", "threshold": 1.0},
        SCORED | {"keep": "band", "band_low": 0.0, "band_high": 0.5, "domains": "d"},
        SCORED | {"score": "excess_nll", "reference_scores": "y"},
        SCORED | {"domains": "d", "quotas": ("web=0.2",), "keep_fraction": 0.4},
        ONLINE | {"score": "mean_nll"},
        {"teacher": "x", "share": 0.1, "schedule": "cosine", "end_when_better": True},
        {"cache": "x", "steps": 5, "divergence": "cross_entropy", "temperature_on": "both"},
    ],
)
def test_good_combinations_of_stage_one(fields: dict[str, Any]) -> None:
    config = config_with(salt=SaltConfig(**fields), data=DataConfig(validation="v"))
    check(config, 1)
    check(dataclasses.replace(config, train=dataclasses.replace(config.train, label_smoothing=0.1, z_loss=1e-4)), 1)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"share": 1.5}, "salt.share=1.5 must lie between 0 and 1"),
        ({"online_buffer": -1}, "salt.online_buffer=-1 must not be negative"),
        ({"top_k": 0}, "salt.top_k=0 must be positive"),
        ({"threshold": math.nan}, "salt.threshold=nan must be a finite number"),
        ({"band_low": 0.8}, "salt.band_low=0.8 and band_high=0.75 must be quantiles"),
        ({"band_high": 1.1}, "must be quantiles, 0 <= low < high <= 1"),
    ],
)
def test_salt_refuses_impossible_values(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SaltConfig(**fields)


def test_models_refuse_impossible_shapes() -> None:
    for wrong, words in [
        ({"hidden_size": 65, "num_heads": 4}, "does not divide hidden_size=65"),
        ({"num_heads": 8, "num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=8"),
        ({"hidden_size": 24, "num_heads": 8}, "head_dim=3 is odd.* make it even"),
    ]:
        with pytest.raises(ConfigError, match=words):
            ModelConfig(**wrong)


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        ({"schedule": "1F1B", "stages_per_rank": 2}, "stages_per_rank=2 does not go with schedule=1F1B, which takes 1"),
        ({"schedule": "DualPipeV", "stages_per_rank": 1}, "which takes 2"),
        ({"context": 0}, "parallel.context=0 must be positive"),
    ],
)
def test_a_bad_layout_is_refused_by_itself(parallel: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ParallelConfig(pipeline=2, **parallel)


def test_stages_follow_the_schedule_when_only_that_changes() -> None:
    plain = ParallelConfig(pipeline=2)
    assert plain.num_stages == 2
    assert dataclasses.replace(plain, schedule="ZBVZeroBubble").num_stages == 4


def test_all_problems_are_listed() -> None:
    config = config_with(
        model=GROUPED, parallel=ParallelConfig(tensor=3, context=5), train=TrainConfig(global_batch_size=7)
    )
    found = problems(config, 16)
    assert len(found) >= 3
    assert any("num_kv_heads=8" in problem for problem in found) and any("seq_length=128" in p for p in found)


@pytest.mark.parametrize(("share", "pipeline", "size"), [(16, 1, 16), (11, 4, 1), (12, 4, 3), (10, 4, 2), (3, 4, 1)])
def test_the_default_microbatch_divides_the_share(share: int, pipeline: int, size: int) -> None:
    config = config_with(parallel=ParallelConfig(pipeline=pipeline), train=TrainConfig(global_batch_size=share))
    assert microbatch_size(config, pipeline) == size


FINITE = ("lr", "eps", "weight_decay", "clip_norm", "spike_sigma", "min_lr_ratio")
YARN = {"kind": "yarn", "factor": 4.0, "original_max_positions": 8}


@pytest.mark.parametrize(
    ("version", "serves"),
    [("2.11.0+cu128", False), ("2.12.1", False), ("2.13.0a0+nv26.5", True), ("2.13.0+cpu", True), ("3.0.0", True)],
)
def test_an_older_torch_is_refused_schedules_that_split_the_backward_pass(
    version: str, serves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    check(config_with(parallel=ParallelConfig(pipeline=2, schedule="Interleaved1F1B", stages_per_rank=2)), 2)
    split = config_with(parallel=ParallelConfig(pipeline=2, schedule="DualPipeV"))
    if serves:
        check(split, 2)
    else:
        with pytest.raises(ConfigError, match=r"DualPipeV needs torch 2\.13; 2\.1.*; use Interleaved1F1B or 1F1B"):
            check(split, 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "linear", "factor": math.inf}, "rope_scaling.factor=inf"),
        ({"factor": math.nan}, "rope_scaling.factor=nan"),
        ({"kind": "llama3", "high_freq_factor": math.inf}, "rope_scaling.high_freq_factor=inf"),
        ({"attention_factor": math.inf}, "rope_scaling.attention_factor=inf"),
        ({"beta_slow": 1e-320}, "rope_scaling.beta_slow=1e-320"),
        ({"beta_slow": 9e-7}, "rope_scaling.beta_slow=9e-07"),
        ({"beta_fast": 1e308}, r"rope_scaling.beta_fast=1e\+308"),
    ],
)
def test_a_scaling_that_cannot_be_computed_is_refused(changes: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RopeScaling(**(YARN | changes))


@pytest.mark.parametrize(
    ("section", "fields", "words"),
    [
        (OptimConfig, {"eps": 0.0}, "optim.eps=0.0 must be at least 1e-30"),
        (OptimConfig, {"eps": math.nan}, "optim.eps=nan"),
        *((OptimConfig, {name: math.inf}, f"optim.{name}=inf must be finite") for name in FINITE),
        (TrainConfig, {"z_loss": math.inf}, "train.z_loss=inf must be finite"),
        (RunConfig, {"timeout": math.inf}, "run.timeout=inf must be at most"),
        (RunConfig, {"timeout": math.nan}, "run.timeout=nan must be positive"),
        (RunConfig, {"timeout": 0.0}, "run.timeout=0.0 must be positive"),
    ],
    ids=str,
)
def test_numbers_that_no_run_can_use_are_refused(section: Any, fields: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        section(**fields)


def test_yarn_needs_periods_that_differ() -> None:
    with pytest.raises(ConfigError, match=r"model.rope_theta=1.0 must be greater than 1 with rope_scaling.kind=yarn"):
        ModelConfig(rope_theta=1.0, rope_scaling=RopeScaling(**YARN))
    with pytest.raises(ConfigError, match=r"model.rope_theta=inf"):
        ModelConfig(rope_theta=math.inf)
    for theta, beta in ((1.0000000000000002, 1e-6), (1e300, 1e6)):
        model = ModelConfig(rope_theta=theta, rope_scaling=RopeScaling(**YARN, beta_slow=beta, beta_fast=1e6))
        frequencies, scale = rotary_frequencies(model)
        assert frequencies.isfinite().all() and math.isfinite(scale)


@pytest.mark.parametrize("breaker", ["nois", "", SMALL])
def test_a_breaker_that_does_not_exist_is_refused(breaker: Any) -> None:
    """A small model in its place too: the fields of a growth are many, and this is the second one."""
    with pytest.raises(ConfigError, match=r"growth.breaker=.* must be one of none, noise, split"):
        GrowthConfig("clone", breaker)
