"""Dropout that depends on the token and the place only."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from megagrow.model.dropout import dropout, token_keys
from megagrow.torch_ops import dropout_add, kept, mix

SAMPLES, POSITIONS = torch.arange(4), torch.arange(64)


def keys() -> Tensor:
    return token_keys(1, 2, SAMPLES, POSITIONS)


def test_the_hash_is_splitmix64() -> None:
    """The first outputs of SplitMix64 seeded with 0, from its reference implementation."""
    golden = torch.tensor(-0x61C8864680B583EB)
    first = [int(mix(golden * i)) % 2**64 for i in range(3)]
    assert first == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_four_features_share_a_hash() -> None:
    """By Python's own integers: feature 4 i + j has field j, the lowest first, of output i."""
    key, golden = 12345, 0x9E3779B97F4A7C15
    state = int(mix(torch.tensor(key + 2))) % 2**64
    fields = []
    for i in range(3):
        z = (state + golden * (i + 1)) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
        fields += [z >> 16 * j & 0xFFFF for j in range(4)]
    found = kept(torch.tensor([key]), place=2, rate=0.4, num_features=11)
    assert found.tolist() == [[field >= round(0.4 * 65536) for field in fields[:11]]]


@pytest.mark.parametrize("rate", [2**-16, 0.1, 0.5, 0.9])
def test_the_stated_share_is_dropped_and_the_mean_kept(rate: float) -> None:
    x_BSH = torch.ones(4, 64, 1024, dtype=torch.float64)
    y_BSH = dropout(x_BSH, rate, keys(), place=3)
    acting = round(rate * 65536) / 65536
    tolerance = 5 * (acting * (1 - acting) / x_BSH.numel()) ** 0.5
    assert abs((y_BSH == 0).double().mean() - acting) < tolerance
    assert torch.equal(y_BSH[y_BSH != 0].unique(), torch.tensor([1 / (1 - acting)], dtype=torch.float64))


def test_features_of_a_hash_are_dropped_independently() -> None:
    """Each of the 16 outcomes of four neighbours has its share, and no two of eight neighbours go together."""
    rate = 0.25
    quads_N4 = kept(keys(), 0, rate, 4096).double().view(-1, 4)
    outcomes_N = (quads_N4 @ torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)).long()
    shares_16 = outcomes_N.bincount(minlength=16) / len(quads_N4)
    num_kept_16 = torch.tensor([i.bit_count() for i in range(16)])
    expected_16 = (1 - rate) ** num_kept_16 * rate ** (4 - num_kept_16)
    assert ((shares_16 - expected_16).abs() < 5 * (expected_16 / len(quads_N4)) ** 0.5).all()
    neighbours_N8 = torch.cat((quads_N4[:-1], quads_N4[1:]), dim=1)
    correlations_88 = torch.corrcoef(neighbours_N8.T) - torch.eye(8)
    assert correlations_88.abs().max() < 5 / len(quads_N4) ** 0.5


def test_any_cut_drops_the_same_elements() -> None:
    x_BSH = torch.randn(4, 64, 8)
    whole = dropout(x_BSH, 0.3, keys(), place=5)
    rows, columns = torch.tensor([2, 3]), torch.tensor([40, 41, 7, 6])
    part = dropout(x_BSH[rows][:, columns], 0.3, token_keys(1, 2, SAMPLES[rows], POSITIONS[columns]), place=5)
    assert torch.equal(part, whole[rows][:, columns])
    assert torch.equal(dropout(x_BSH[..., :6], 0.3, keys(), place=5), whole[..., :6])


def test_seed_step_sample_position_place_and_feature_all_count() -> None:
    def kept_by(seed: int = 1, step: int = 2, sample: int = 3, position: int = 4, place: int = 5) -> Tensor:
        keys_11 = token_keys(seed, step, torch.tensor([sample]), torch.tensor([position]))
        return dropout(torch.ones(1, 1, 4096), 0.5, keys_11, place)[0, 0] != 0

    one = kept_by()
    others = [kept_by(seed=2), kept_by(step=3), kept_by(sample=4), kept_by(position=5), kept_by(place=6)]
    others += [one.roll(1), one.roll(4)]
    others += [kept_by(seed=2, step=1), kept_by(sample=4, position=3)]  # sums of the parts must not meet
    for other in others:
        assert abs((one == other).double().mean() - 0.5) < 0.04


def test_gradients_see_the_same_mask() -> None:
    x_BSH, y_BSH, bias_H = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 3, 6), (2, 3, 6), (6,)))
    leaves = [each.requires_grad_() for each in (x_BSH, y_BSH, bias_H)]
    keys_BS = keys()[:2, :3]
    assert gradcheck(lambda x, y, bias: dropout_add(x, y, bias, 0.4, keys_BS, 1), leaves)
    assert gradcheck(lambda y: dropout(y, 0.4, keys_BS, 1), leaves[1:2])
    expected = x_BSH + dropout(y_BSH + bias_H, 0.4, keys_BS, 1)
    torch.testing.assert_close(dropout_add(x_BSH, y_BSH, bias_H, 0.4, keys_BS, 1), expected)


def test_all_or_nothing_is_dropped_at_the_ends() -> None:
    x_BSH = torch.randn(4, 64, 10)
    assert torch.equal(dropout_add(x_BSH, x_BSH, None, 2**-18, keys(), 1), 2 * x_BSH)
    assert torch.equal(dropout_add(x_BSH, x_BSH, None, 1.0, keys(), 1), x_BSH)


def test_without_keys_nothing_is_dropped() -> None:
    x_BSH = torch.randn(2, 3, 4)
    assert dropout(x_BSH, 0.5, None, place=0) is x_BSH


@pytest.mark.parametrize("num_features", [48, 1024])
def test_compiled_dropout_drops_the_same(num_features: int) -> None:
    """By the compiler that training uses: torch 2.13's took a product of the features' numbers for an index."""
    found = torch.compile(kept, fullgraph=True)(keys(), 2, 0.3, num_features)
    assert torch.equal(found, kept(keys(), 2, 0.3, num_features))
