"""Tests megagrow/data/mlm.py: what is masked how often, and what it depends on."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from torch import Tensor

from megagrow import torch_ops
from megagrow.config import DataConfig, ModelConfig
from megagrow.data.description import check_one_tokenizer, description_path
from megagrow.data.mlm import Masking, make_masking
from megagrow.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer
from megagrow.errors import ConfigError, DataError
from megagrow.model.dropout import token_keys

VOCAB = 40
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0 … 4
MASKING = Masking(mask_id=4, special_ids=tuple(range(5)), vocab_size=VOCAB, seed=7)
MODEL = ModelConfig(objective="mlm", vocab_size=VOCAB)


def make_tokenizer() -> tokenizers.Tokenizer:
    words = [*SPECIAL, *(f"w{i}" for i in range(5, VOCAB))]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def random_tokens(num_samples: int = 64, length: int = 512) -> Tensor:
    return torch.randint(VOCAB, (num_samples, length), generator=torch.Generator().manual_seed(1))


def test_everything_happens_as_often_as_in_transformers() -> None:
    """Each share against that of transformers' collator, within five standard deviations of their difference."""
    tokens_BS = random_tokens(256)
    special = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(), **special)
    collator = transformers.DataCollatorForLanguageModeling(fast, mlm_probability=0.15, seed=3)
    theirs = collator([{"input_ids": row} for row in tokens_BS.tolist()])
    seen_BS, chosen_BS = MASKING(tokens_BS, torch.arange(len(tokens_BS)))
    ours = counts(tokens_BS, seen_BS, chosen_BS)
    expected = counts(tokens_BS, theirs["input_ids"], theirs["labels"] != -100)
    assert ours.keys() == expected.keys()
    for name, (hits, trials) in ours.items():
        their_hits, their_trials = expected[name]
        share = (hits + their_hits) / (trials + their_trials)
        sigma = math.sqrt(share * (1 - share) * (1 / trials + 1 / their_trials))
        assert abs(hits / trials - their_hits / their_trials) <= 5 * sigma, (name, hits / trials, share)


def counts(tokens_BS: Tensor, seen_BS: Tensor, chosen_BS: Tensor) -> dict[str, tuple[int, int]]:
    """How often each thing happens, and out of how many times."""
    assert torch.equal(seen_BS[~chosen_BS], tokens_BS[~chosen_BS])
    plain_BS = tokens_BS >= len(SPECIAL)
    random_BS = chosen_BS & (seen_BS != tokens_BS) & (seen_BS != 4)
    num_chosen = int(chosen_BS.sum())
    found = {
        "special tokens chosen": (int((chosen_BS & ~plain_BS).sum()), int((~plain_BS).sum())),
        "chosen": (num_chosen, int(plain_BS.sum())),
        "first position chosen": (int((chosen_BS & plain_BS)[:, 0].sum()), int(plain_BS[:, 0].sum())),
        "neighbours chosen": (int((chosen_BS[:, 1:] & chosen_BS[:, :-1]).sum()), chosen_BS[:, 1:].numel()),
        "masked": (int((chosen_BS & (seen_BS == 4)).sum()), num_chosen),
        "random": (int(random_BS.sum()), num_chosen),
        "kept": (int((chosen_BS & (seen_BS == tokens_BS)).sum()), num_chosen),
    }
    for token in range(VOCAB):
        found[f"random token {token}"] = (int((random_BS & (seen_BS == token)).sum()), int(random_BS.sum()))
    return found


def test_shares_are_those_of_the_paper() -> None:
    """Within five standard deviations, which a per cent is far above."""
    tokens_BS = random_tokens(2048)
    found = counts(tokens_BS, *MASKING(tokens_BS, torch.arange(2048)))
    changed = 0.1 * (1 - 1 / VOCAB - 1 / VOCAB)  # a random token may be the same, or the mask
    stated = {"chosen": 0.15, "masked": 0.8 + 0.1 / VOCAB, "random": changed, "kept": 0.1 + 0.1 / VOCAB}
    for name, share in stated.items():
        hits, trials = found[name]
        assert abs(hits / trials - share) <= 5 * math.sqrt(share * (1 - share) / trials) < 0.01, (name, hits / trials)


def test_masks_depend_on_seed_visit_and_position_only() -> None:
    tokens_BS, visits_B = random_tokens(12, 64), torch.arange(100, 112)
    whole = MASKING(tokens_BS, visits_B)
    for rows in (slice(0, 3), slice(5, 12), slice(11, 12)):  # whoever reads which of them
        for found, expected in zip(MASKING(tokens_BS[rows], visits_B[rows]), whole, strict=True):
            assert torch.equal(found, expected[rows])
    others = MASKING(tokens_BS, visits_B + 12), replace(MASKING, seed=8)(tokens_BS, visits_B)
    for _, chosen_BS in others:
        both, one = int((chosen_BS & whole[1]).sum()), int(whole[1].sum())
        assert 0 < both < one / 2, "masked alike"


@pytest.mark.parametrize("place", range(4))
def test_masks_are_not_those_of_dropout(place: int) -> None:
    """Both are hashes of a seed, a number and a position, and the seeds are the same unless somebody changes one."""
    tokens_BS, visits_B = torch.full((64, 512), 9), torch.arange(64)
    seen_BS, _ = replace(MASKING, rate=1.0)(tokens_BS, visits_B)
    keys_BS = token_keys(MASKING.seed, 0, visits_B, torch.arange(512))
    dropped_BSH = ~torch_ops.kept(keys_BS, place, 0.15, 8)
    for dropped_BS in dropped_BSH.unbind(-1):
        assert float((seen_BS[dropped_BS] == 4).double().mean()) == pytest.approx(0.8, abs=0.04)


def test_the_rate_is_an_option() -> None:
    _, chosen_BS = replace(MASKING, rate=0.4)(torch.full((64, 512), 9), torch.arange(64))
    assert float(chosen_BS.double().mean()) == pytest.approx(0.4, abs=0.02)
    seen_BS, chosen_BS = replace(MASKING, rate=1.0)(torch.tensor([[0, 9, 3, 9]]), torch.tensor([5]))
    assert chosen_BS.tolist() == [[False, True, False, True]]
    assert seen_BS[0, [0, 2]].tolist() == [0, 3]


def test_tokens_come_from_the_tokenizer(folder: Path) -> None:
    masking = make_masking(DataConfig(train="absent", tokenizer=str(folder), seed=7), MODEL)
    assert masking == MASKING


def test_a_tokenizer_may_name_its_mask_token(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"mask_token": {"content": "w9"}, "pad_token": "[PAD]"}))
    masking = make_masking(DataConfig(train="absent", tokenizer=str(folder), special_tokens=(20,)), MODEL)
    assert masking.mask_id == 9
    assert masking.special_ids == (0, 1, 2, 3, 4, 9, 20)


def test_options_stand_in_for_a_tokenizer() -> None:
    data = DataConfig(train="absent", tokenizer="byte", mask_token=257, special_tokens=(0,), mask_rate=0.3)
    masking = make_masking(data, replace(MODEL, vocab_size=258))
    assert masking == Masking(257, (0, 256, 257), vocab_size=257, seed=1234, rate=0.3)
    masking = make_masking(DataConfig(train="absent", mask_token=3), MODEL)
    assert (masking.special_ids, masking.vocab_size) == ((3,), VOCAB)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({}, ["without data.tokenizer there is none", "data.mask_token"]),
        ({"tokenizer": "byte"}, ["data.tokenizer=byte has none", "data.mask_token"]),
        ({"mask_token": VOCAB}, [f"[{VOCAB}]", f"model.vocab_size={VOCAB}"]),
        ({"mask_token": 1, "special_tokens": (99,)}, ["[99]", f"model.vocab_size={VOCAB}"]),
        ({"mask_rate": 0.0}, ["data.mask_rate=0.0", "at most 1"]),
        ({"mask_rate": 1.5}, ["data.mask_rate=1.5"]),
        ({"mask_token": -2}, ["data.mask_token=-2", "-1"]),
        ({"special_tokens": (-1,)}, ["data.special_tokens=[-1]"]),
    ],
)
def test_what_does_not_fit_is_one_line(change: dict, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        make_masking(DataConfig(train="absent", **change), MODEL)
    assert "\n" not in str(refused.value)
    assert all(part in str(refused.value) for part in parts), str(refused.value)


@pytest.mark.parametrize(("offset", "accepted"), [(1, True), (5, True), (6, False), (20, False)])
def test_positions_begin_after_a_special_token(folder: Path, offset: int, accepted: bool) -> None:
    data, model = DataConfig(train="absent", tokenizer=str(folder)), replace(MODEL, position_offset=offset)
    if accepted:
        assert make_masking(data, model).mask_id == 4
        return
    with pytest.raises(ConfigError, match=f"model.position_offset={offset} .* set model.position_offset=1"):
        make_masking(data, model)


@pytest.mark.parametrize("field", ["train", "validation"])
def test_datasets_of_another_tokenizer_are_refused(folder: Path, field: str) -> None:
    """Each one that says what made it; the others are taken on trust."""
    fingerprint = load_tokenizer(folder).fingerprint
    described("huggingface", fingerprint, folder / "same")
    described("byte", ByteTokenizer().fingerprint, folder / "other")
    data = DataConfig(train=f"{folder}/same {folder}/unknown", tokenizer=str(folder))
    check_one_tokenizer(data)
    for tokenizer, whose in ((str(folder), r"data\.tokenizer="), ("", "that of ")):
        changed = replace(data, **{field: f"{folder}/same {folder}/other"}, tokenizer=tokenizer)
        with pytest.raises(DataError, match=rf"other\.json: .* made with another tokenizer than {whose}") as refused:
            check_one_tokenizer(changed)
        assert "\n" not in str(refused.value)
    check_one_tokenizer(replace(data, train=f"{folder}/other", tokenizer=""))
    more = HuggingFaceTokenizer(folder / "tokenizer.json")._tokenizer
    more.add_special_tokens(["<|im_end|>"])
    (folder / "more").mkdir()
    more.save(str(folder / "more/tokenizer.json"))
    check_one_tokenizer(replace(data, tokenizer=str(folder / "more")))  # which has all that the dataset has
    described("huggingface", load_tokenizer(folder / "more").fingerprint, folder / "new")
    with pytest.raises(DataError, match=r"new\.json: .* made with another tokenizer"):
        check_one_tokenizer(replace(data, train=f"{folder}/new"))
    with pytest.raises(DataError, match="absent: no such tokenizer"):
        check_one_tokenizer(replace(data, tokenizer="absent"))


def described(kind: str, fingerprint: str, prefix: Path) -> None:
    """Writes what a dataset says of itself."""
    counts = {"vocab_size": VOCAB, "eod_id": None, "num_documents": 1, "num_tokens": 1}
    description = {"tokenizer": kind, "tokenizer_sha256": fingerprint, "split": "train", "source": "test", **counts}
    description_path(prefix).write_text(json.dumps(description))
