"""Which small model a run trains first when none is given, and for how long."""

import dataclasses

import pytest

from megagrow.config import Config, DataConfig, GrowthConfig, InitConfig, ModelConfig, TrainConfig
from megagrow.earlier_growth import EarlierGrowth
from megagrow.errors import ConfigError
from megagrow.growth.bootstrap import bootstrapped, derived_source, explain, source_tokens
from megagrow.roles import num_parameters

BOOTSTRAP = GrowthConfig("stack", bootstrap=True)


@pytest.mark.parametrize(
    ("parameters", "tokens", "expected"),
    [(8e9, 15e12, 6.58e9), (7e9, 2e12, 11.11e9), (13e9, 2e12, 15.84e9), (70e9, 2e12, 42.48e9)],
)
def test_the_rule_gives_the_published_figures(parameters: float, tokens: float, expected: float) -> None:
    """The table of its authors' README: Llama 3 8B, Llama 2 7B, 13B and 70B."""
    assert source_tokens(parameters, 6 * parameters * tokens) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("depth", "expected"), [(3, 2), (4, 2), (5, 2), (6, 2), (7, 3), (8, 2), (9, 3), (10, 5), (12, 3), (24, 6), (32, 8)]
)
def test_the_small_model_is_a_shallower_one(depth: int, expected: int) -> None:
    target = ModelConfig(num_layers=depth)
    assert derived_source(target) == dataclasses.replace(target, num_layers=expected)


def test_a_large_run_follows_the_rule() -> None:
    """Llama 3 8B: 6.58e9 tokens and a little, as the model has 8.03e9 parameters."""
    model = ModelConfig(
        vocab_size=128_256, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, ffn_size=14_336
    )
    assert num_parameters(model) == pytest.approx(8.03e9, rel=1e-3)
    config = Config(
        model=model,
        data=DataConfig(seq_length=8192),
        train=TrainConfig(steps=1_788_139, global_batch_size=1024),
        growth=BOOTSTRAP,
    )
    found = bootstrapped(config)
    assert found.growth.source is not None and found.growth.source.num_layers == 8
    assert found.growth.at_step * 8192 * 1024 == pytest.approx(6.6e9, rel=5e-3)
    assert "that G_stack's rule asks for" in explain(found)
    assert bootstrapped(found) == found


def test_a_small_run_trains_the_small_model_for_a_quarter_of_it() -> None:
    found = bootstrapped(Config(growth=BOOTSTRAP))
    assert found.growth.at_step == 250
    assert "no more than 25% of train.steps=1000" in explain(found)


def test_what_is_given_stays() -> None:
    source = ModelConfig(num_layers=4)
    given = bootstrapped(Config(growth=dataclasses.replace(BOOTSTRAP, source=source, at_tokens=5_000)))
    assert (given.growth.source, given.growth.at_step) == (source, 0)
    early = bootstrapped(Config(growth=dataclasses.replace(BOOTSTRAP, at_step=20)))
    assert early.growth.at_step == 20
    for found in (given, early):
        assert "as the configuration says; G_stack's rule asks for" in explain(found) and "25%" not in explain(found)
    plain = Config(growth=GrowthConfig("stack", source=source, at_step=5))
    assert bootstrapped(plain) is plain


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"init": InitConfig(from_="x")}, "init.from names one; leave one"),
        ({"growth": dataclasses.replace(BOOTSTRAP, earlier=(EarlierGrowth(num_layers=4),))}, "growth.earlier holds"),
        ({"model": ModelConfig(num_layers=2)}, "model.num_layers=2; give one as growth.source"),
    ],
)
def test_what_contradicts_it_is_refused(fields: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        bootstrapped(dataclasses.replace(Config(growth=BOOTSTRAP), **fields))
