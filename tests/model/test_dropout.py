"""Dropout that depends on the token and the place only."""

import pytest
import torch

from megagrow.model.dropout import _mix, dropout, token_keys

SAMPLES, POSITIONS = torch.arange(4), torch.arange(64)


def test_the_hash_is_splitmix64() -> None:
    """The first outputs of SplitMix64 seeded with 0, from its reference implementation."""
    golden = torch.tensor(-0x61C8864680B583EB)
    first = [int(_mix(golden * i)) % 2**64 for i in range(3)]
    assert first == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_stated_share_is_dropped_and_the_mean_kept(rate: float) -> None:
    x_BSH = torch.ones(4, 64, 256, dtype=torch.float64)
    y_BSH = dropout(x_BSH, rate, token_keys(1, 2, SAMPLES, POSITIONS), place=3)
    tolerance = 5 * (rate * (1 - rate) / x_BSH.numel()) ** 0.5
    assert abs((y_BSH == 0).double().mean() - rate) < tolerance
    assert torch.equal(y_BSH[y_BSH != 0].unique(), torch.tensor([1 / (1 - rate)], dtype=torch.float64))


def test_any_cut_drops_the_same_elements() -> None:
    x_BSH = torch.randn(4, 64, 8)
    whole = dropout(x_BSH, 0.3, token_keys(1, 2, SAMPLES, POSITIONS), place=5)
    rows, columns = torch.tensor([2, 3]), torch.tensor([40, 41, 7, 6])
    part = dropout(x_BSH[rows][:, columns], 0.3, token_keys(1, 2, SAMPLES[rows], POSITIONS[columns]), place=5)
    assert torch.equal(part, whole[rows][:, columns])


def test_seed_step_sample_position_place_and_feature_all_count() -> None:
    def kept(seed: int = 1, step: int = 2, sample: int = 3, position: int = 4, place: int = 5) -> torch.Tensor:
        keys_11 = token_keys(seed, step, torch.tensor([sample]), torch.tensor([position]))
        return dropout(torch.ones(1, 1, 4096), 0.5, keys_11, place)[0, 0] != 0

    one = kept()
    others = [kept(seed=2), kept(step=3), kept(sample=4), kept(position=5), kept(place=6), one.roll(1)]
    others += [kept(seed=2, step=1), kept(sample=4, position=3)]  # sums of the parts must not meet
    for other in others:
        assert abs((one == other).double().mean() - 0.5) < 0.04


def test_without_keys_nothing_is_dropped() -> None:
    x_BSH = torch.randn(2, 3, 4)
    assert dropout(x_BSH, 0.5, None, place=0) is x_BSH
