"""A growth by every sparse method, for tests that go over all of them."""

from collections.abc import Callable
from dataclasses import replace
from math import ceil

from megagrow.config import Breaker, ModelConfig
from megagrow.growth.methods import make_recipe
from megagrow.growth.recipe import Recipe

Grown = Callable[[ModelConfig], ModelConfig]


def larger(
    hidden: float = 1, query: float = 1, kv: float = 1, ffn: float = 1, layers: float = 1, vocab: int = 0
) -> Grown:
    """Sizes times factors, rounded up; `query` is heads per key/value head, `vocab` is added."""

    def target(source: ModelConfig) -> ModelConfig:
        kv_heads = ceil(source.num_kv_heads * kv)
        return replace(
            source,
            hidden_size=ceil(source.hidden_size * hidden),
            num_heads=kv_heads * ceil(source.num_heads // source.num_kv_heads * query),
            num_kv_heads=kv_heads,
            ffn_size=ceil(source.ffn_size * ffn),
            num_layers=ceil(source.num_layers * layers),
            vocab_size=source.vocab_size + vocab,
        )

    return target


def with_eps(target: Grown, padded_from: int = 1) -> Grown:
    """The same with the eps that fits when `padded_from` copies of the source's hidden units are padded with zeros."""

    def scaled(source: ModelConfig) -> ModelConfig:
        model = target(source)
        return replace(model, norm_eps=source.norm_eps * (source.hidden_size * padded_from / model.hidden_size))

    return scaled


DOUBLED = larger(hidden=2, query=2, kv=2, ffn=2)
UNEVEN = larger(hidden=2.25, query=1.5, kv=2, ffn=1.5)

# name -> (method, target, breaker, whether the function is kept); layers grow where the method says so
METHODS: dict[str, tuple[str, Grown, Breaker, bool]] = {
    "clone": ("clone", larger(hidden=3, query=2, kv=2, ffn=2), "none", True),
    "clone, rest": ("clone", with_eps(UNEVEN, 2), "none", True),
    "clone, noise": ("clone", DOUBLED, "noise", True),
    "clone, split": ("clone", larger(hidden=2, query=3, kv=2, ffn=3), "split", True),
    "net2net": ("net2net", larger(hidden=2, query=1.5, kv=2, ffn=1.5), "none", True),
    "net2net, noise": ("net2net", larger(hidden=3, query=2, kv=2, ffn=1.5), "noise", True),
    "fpi": ("fpi", larger(hidden=2, kv=2, ffn=1.5), "none", True),
    "fpi, uneven": ("fpi", UNEVEN, "none", False),
    "aki": ("aki", larger(hidden=1.5, query=2, kv=2, ffn=1.5), "none", False),
    "zero_pad": ("zero_pad", with_eps(UNEVEN), "none", True),
    "zero_pad, inside": ("zero_pad", larger(query=2, kv=2, ffn=1.5), "none", True),
    "direct_copy": ("direct_copy", UNEVEN, "none", False),
    "rms_random": ("rms_random", UNEVEN, "none", False),
    "stack": ("stack", larger(layers=1.5), "none", False),
    "interleave": ("interleave", larger(layers=1.5), "none", False),
    "insert_identity": ("insert_identity", larger(layers=1.5), "none", True),
    "middle": ("middle", larger(layers=1.5), "none", False),
    "dus": ("dus", larger(layers=2), "none", False),
    "vocabulary": ("stack", larger(vocab=5), "none", True),
    "clone+insert_identity": ("clone+insert_identity", larger(hidden=2, ffn=2, layers=2, vocab=3), "none", True),
    "rms_random+interleave": ("rms_random+interleave", larger(hidden=1.5, ffn=2, layers=2), "none", False),
    "clone, key/value heads": ("clone", larger(query=0.5, kv=2, hidden=2), "none", True),
    "aki+middle": ("aki+middle", larger(hidden=2, ffn=2, layers=1.5), "none", False),
}


def recipe_of(name: str, source: ModelConfig, seed: int = 3) -> Recipe:
    """The recipe of one of `METHODS`.

    Raises:
        ConfigError: there is no exact answer for this kind of model, and the method promises one.
    """
    method, target, breaker, _ = METHODS[name]
    return make_recipe(method, source, target(source), breaker, 0.3, seed)
