"""Selection by score."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagrow.config import SaltConfig
from megagrow.data.domains import Domains, write_domains
from megagrow.data.loader import SampleOrder
from megagrow.errors import ConfigError, DataError
from megagrow.salt.score_files import DTYPES, SCORE_NAMES, Cost, Identity, Scores, identity_of, write_scores
from megagrow.salt.select import highest, make_selection, sample_values, select
from tests.salt.samples import opened, random_corpus

SIX = [0.1, 0.5, 0.4, 0.9, 0.2, 0.6]


def scores(values: list[float], name: str = "median_zero", model: str = "small") -> Scores:
    """The given values under one name, falling ones under the others."""
    size = len(values)
    arrays = {n: -np.arange(size, dtype=np.float32) for n in SCORE_NAMES}
    arrays[name] = np.array(values, np.float32)
    identity = Identity("", "", 8, size, model, "float32", False, False, 10)
    num_tokens = np.full(size, 8, np.int32)
    return Scores(Path("folder"), arrays, num_tokens, identity, Cost(0.0, None, 0), None, "")


def kept(values: list[float], domains: Domains | None = None, **settings: Any) -> list[int]:
    ids = select(np.array(values, np.float32), SaltConfig(scores="folder", **settings), domains)
    assert ids.dtype == np.int64
    return ids.tolist()


@pytest.mark.parametrize(
    ("keep", "ids"),
    [(1.0, [0, 1, 2, 3, 4, 5]), (0.5, [1, 3, 5]), (0.1, [3]), (1e-9, [3]), (0.7, [1, 2, 3, 5])],
)
def test_the_highest_scores_are_kept(keep: float, ids: list[int]) -> None:
    assert kept(SIX, keep_fraction=keep) == ids


def test_the_named_score_decides() -> None:
    by_mean = scores([0.1, 0.2, 0.3, 0.4], "mean_nll")
    half = SaltConfig(keep_fraction=0.5)
    assert select(sample_values(by_mean, "mean_nll"), half).tolist() == [2, 3]
    assert select(sample_values(by_mean, "median_zero"), half).tolist() == [0, 1]


def test_of_equal_scores_the_lower_ids_are_kept() -> None:
    values = [0.5] * 1000
    values[700] = 0.6
    assert kept(values, keep_fraction=0.004) == [0, 1, 2, 700]
    # -0 and 0 are the same score.
    assert kept([0.0, -0.0, 0.0, -0.0], keep_fraction=0.5) == [0, 1]


def test_a_share_of_a_tenth_is_a_tenth() -> None:
    """0.1 · 30 is 3.0000000000000004."""
    assert len(kept([0.0] * 30, keep_fraction=0.1)) == 3


@pytest.mark.parametrize(("least", "ids"), [(0.4, [1, 2, 3, 5]), (0.41, [1, 3, 5]), (0.9, [3]), (-1.0, list(range(6)))])
def test_a_threshold_keeps_what_reaches_it(least: float, ids: list[int]) -> None:
    assert kept(SIX, keep="threshold", threshold=least) == ids


def test_a_threshold_that_nothing_reaches_is_refused() -> None:
    with pytest.raises(DataError, match="folder: no sample is kept; the largest median_zero is 0.9: lower salt.thr"):
        kept(SIX, keep="threshold", threshold=1.0)


@pytest.mark.parametrize(
    ("low", "high", "ids"),
    [
        (0.0, 1.0, [0, 1, 2, 3, 4, 5]),
        (0.5, 1.0, [1, 3, 5]),  # as the top half
        (0.0, 0.5, [0, 2, 4]),
        (1 / 3, 2 / 3, [1, 2]),  # of 0.1 0.2 0.4 0.5 0.6 0.9, the middle third
        (0.49, 0.51, [2]),  # at least one
        (0.0, 0.01, [0]),
        (0.99, 1.0, [3]),
    ],
)
def test_a_band_lies_between_quantiles(low: float, high: float, ids: list[int]) -> None:
    assert kept(SIX, keep="band", band_low=low, band_high=high) == ids


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=40), st.integers(1, 8), st.integers(0, 7))
def test_bands_side_by_side_keep_every_sample_once(values: list[float], pieces: int, place: int) -> None:
    """Also where scores are equal; and the uppermost band is the top share."""
    cuts = [round(i * len(values) / pieces) / len(values) for i in range(pieces + 1)]
    bands = [(low, high) for low, high in zip(cuts, cuts[1:], strict=False) if low < high]
    parts = [kept(values, keep="band", band_low=low, band_high=high) for low, high in bands]
    assert sorted(sum(parts, [])) == list(range(len(values)))
    assert parts[-1] == highest(np.array(values), len(parts[-1])).tolist()


WEB_AND_CODE = Domains(("web", "code", "nothing"), np.array([0, 0, 0, 0, 1, 1], np.int32))


def test_a_share_is_kept_of_each_domain() -> None:
    assert kept(SIX, WEB_AND_CODE, keep_fraction=0.5) == [1, 3, 5]
    assert kept([9.0, 8.0, 7.0, 6.0, 0.1, 0.2], WEB_AND_CODE, keep_fraction=0.5) == [0, 1, 5]
    assert kept([9.0, 8.0, 7.0, 6.0, 0.1, 0.2], WEB_AND_CODE, keep_fraction=0.01) == [0, 5]  # at least one of each
    assert kept(SIX, WEB_AND_CODE, keep="band", band_low=0.0, band_high=0.5) == [0, 2, 4]


def test_a_threshold_is_the_same_for_all_domains() -> None:
    assert kept(SIX, WEB_AND_CODE, keep="threshold", threshold=0.5) == kept(SIX, keep="threshold", threshold=0.5)


def test_quotas_are_shares_of_their_own() -> None:
    assert kept(SIX, WEB_AND_CODE, keep_fraction=0.5, quotas=("code=1",)) == [1, 3, 4, 5]
    assert kept(SIX, WEB_AND_CODE, keep_fraction=0.5, quotas=("code=0", "web=0.25")) == [3]
    with pytest.raises(DataError, match=r"no sample is kept; .* raise salt.quotas"):
        kept(SIX, WEB_AND_CODE, quotas=("code=0", "web=0", "nothing=0"))


def test_a_quota_of_an_unknown_domain_is_refused() -> None:
    with pytest.raises(ConfigError, match="salt.quotas names books, a domain that d does not have; it has web"):
        select(np.array(SIX), SaltConfig(scores="folder", quotas=("books=0.5",), domains="d"), WEB_AND_CODE)


@pytest.mark.parametrize(
    ("quotas", "message"),
    [
        (("web",), "'web' must be NAME=SHARE"),
        (("=0.5",), "'=0.5' must be NAME=SHARE"),
        (("web=2",), "'web=2' must be NAME=SHARE, a share between 0 and 1"),
        (("web=nan",), "must be NAME=SHARE"),
        (("web=much",), "must be NAME=SHARE"),
        (("web=1", "web=0.5"), "name a domain twice"),
    ],
)
def test_wrong_quotas(quotas: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SaltConfig(quotas=quotas)
    assert SaltConfig(quotas=("a=b=0.5",)).domain_shares == {"a=b": 0.5}


def test_excess_loss_is_the_difference_to_a_reference() -> None:
    """In float64, in which the difference of two float32 is exact."""
    prior, conditional = scores([4.0, 3.0, 2.0, 5.0], "mean_nll"), scores([3.9, 1.0, 2.5, 4.9], "mean_nll", "large")
    values = sample_values(prior, "excess_nll", conditional)
    expected = [x.astype(np.float64) for x in (prior.values["mean_nll"], conditional.values["mean_nll"])]
    assert values.dtype == np.float64 and np.array_equal(values, expected[0] - expected[1])
    assert select(values, SaltConfig(keep_fraction=0.25)).tolist() == [1]


def test_a_reference_must_be_another_model() -> None:
    one = scores([1.0, 2.0], "mean_nll")
    with pytest.raises(DataError, match="scores of the same model as folder, whose difference is 0"):
        sample_values(one, "excess_nll", one)


def test_a_reference_must_have_seen_documents_alike() -> None:
    one, other = scores([1.0, 2.0], "mean_nll"), scores([1.0, 2.0], "mean_nll", model="large")
    other = replace(other, identity=replace(other.identity, reset_positions=True))
    with pytest.raises(DataError, match="made with reset_positions=True, folder with reset_positions=False: .* alike"):
        sample_values(one, "excess_nll", other)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["median_zero", "excess_nll"])
def test_every_sample_needs_a_score(bad: float, name: str) -> None:
    stored, good = name.replace("excess", "mean"), scores([0.0] * 4, model="large")
    with pytest.raises(DataError, match=f"{stored} of sample 2 is (nan|inf), and 1 of 4") as error:
        sample_values(scores([0.1, 0.2, bad, 0.3], stored), name, good)
    assert "\n" not in str(error.value)


def test_an_unknown_score_is_refused() -> None:
    with pytest.raises(ConfigError, match="salt.score=median is unknown; use one of median_in_top_k, .*excess_nll"):
        sample_values(scores([0.1, 0.2]), "median")


def test_a_selection_makes_an_order() -> None:
    ids = kept([0.1, 0.5, 0.4, 0.9], keep_fraction=0.5)
    assert sorted(SampleOrder(ids, seed=3).ids(0, 2).tolist()) == [1, 3]


def folder_of(path: Path, prefix: Path, values: list[float], model: str) -> str:
    dataset = opened(prefix, 4)
    arrays = {name: np.full(dataset.num_samples, 1, dtype) for name, dtype in DTYPES.items()}
    arrays["mean_nll"] = np.array(values, np.float32)
    write_scores(path, arrays, identity_of(dataset, model, 10, "float32"), Cost(1.0, None, 1))
    return str(path)


def test_a_selection_is_read_from_its_folders(tmp_path: Path) -> None:
    """Two folders of scores and the domains; one document, so that all samples are of its domain."""
    prefix = random_corpus(tmp_path / "corpus", 3, 4)
    write_domains(prefix, Domains(("web",), np.zeros(1, np.int32)))
    salt = SaltConfig(
        scores=folder_of(tmp_path / "small", prefix, [3.0, 3.0, 3.0], "small"),
        reference_scores=folder_of(tmp_path / "large", prefix, [2.0, 1.0, 2.5], "large"),
        score="excess_nll",
        domains=f"{prefix}.domains.safetensors",
        keep_fraction=0.34,
    )
    selection = make_selection(salt, opened(prefix, 4))
    assert selection.ids.tolist() == [1] and selection.values.tolist() == [1.0, 2.0, 0.5]
    assert selection.domains is not None and selection.domains.counts() == {"web": 3}
    assert selection.reference is not None and selection.reference.identity.model == "large"


@pytest.mark.parametrize("field", ["scores", "reference_scores"])
def test_both_folders_must_be_of_the_corpus(tmp_path: Path, field: str) -> None:
    prefix, other = (random_corpus(tmp_path / name, size, 4) for name, size in (("corpus", 3), ("other", 4)))
    right = {
        "scores": folder_of(tmp_path / "small", prefix, [3.0] * 3, "small"),
        "reference_scores": folder_of(tmp_path / "large", prefix, [2.0] * 3, "large"),
    }
    right[field] = folder_of(tmp_path / "wrong", other, [1.0] * 4, field)
    with pytest.raises(DataError, match="wrong/manifest.json: corpus_sha256 is .* what is here is of other samples"):
        make_selection(SaltConfig(**right, score="excess_nll"), opened(prefix, 4))
