"""Tests megagrow/data/tokenizer.py and sentencepiece_export.py: round trips, equal exports."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from megagrow.data.builtin import Document
from megagrow.data.sentencepiece_export import _merges, _Model, to_hugging_face
from megagrow.data.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    _sample,
    load_tokenizer,
    train_sentencepiece,
)
from megagrow.errors import ConfigError, DataError

SAMPLES = [
    "",
    " ",
    "\n",
    "\t\tx\n",
    "   three before,  two between, two after  ",
    "def f(a, b=1):\n    if a:\n        return {'k': [a, b]}  # why\n\n\nclass C:\n\tpass\r\n",
    "The quick brown fox — “jumps” over 12,345.67 lazy dogs; isn't it?",
    "naïve café Ωμέγα Привет 你好，世界 こんにちは 한국어 مرحبا שלום हिन्दी",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "e\u0301 \ufb01 \u00a0 \u2028 \ufeff",
    "\x00\x01\x7f\x85",
    " " * 61 + "x" + "\n" * 9,
]
FREQUENT = [*" \n\t\r()0é\U0001f600", "    ", "self", "return"]
TEXT = st.lists(
    st.sampled_from(FREQUENT) | st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"),
    max_size=60,
).map("".join)


@pytest.fixture(scope="module", params=["sentencepiece", "exported", "byte", "exported byte"])
def tokenizer(
    request: pytest.FixtureRequest,
    trained: SentencePieceTokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Tokenizer:
    """The three kinds; `exported` is the tokenizer.json that `save` writes, read again."""
    original = ByteTokenizer() if "byte" in request.param else trained
    if "exported" not in request.param:
        return original
    folder = tmp_path_factory.mktemp("exported")
    original.save(folder)
    return load_tokenizer(folder)


@given(text=TEXT)
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids) and tokenizer.eod_id not in ids


def test_samples_and_source_code_come_back(tokenizer: Tokenizer, library: list[Document]) -> None:
    for text in [*SAMPLES, *(file.text for file in library)]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_protocol_and_end_of_document(tokenizer: Tokenizer) -> None:
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.eod_id is not None and 0 <= tokenizer.eod_id < tokenizer.vocab_size
    assert tokenizer.decode([tokenizer.eod_id]) == ""
    with pytest.raises(DataError, match="lone surrogate at character 1"):
        tokenizer.encode("a\ud800")


def test_training_learns_code(trained: SentencePieceTokenizer, library: list[Document]) -> None:
    assert trained.vocab_size == 700
    text = "".join(file.text for file in library)
    assert len(trained.encode(text)) < 0.5 * len(text)
    assert len(trained.encode("        return self")) <= 4  # indentation and words are pieces


def test_training_is_deterministic_also_when_it_samples(library: list[Document], tmp_path: Path) -> None:
    texts = [file.text for file in library]
    for name in ("a", "b"):
        train_sentencepiece(iter(texts), 400, tmp_path / name, max_bytes=100_000)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    chunks = _sample(texts, 100_000)
    assert 80_000 < sum(len(chunk.encode()) for chunk in chunks) <= 100_000
    last_half = "".join(texts)[sum(map(len, texts)) // 2 :]
    assert sum(chunk in last_half for chunk in chunks) > len(chunks) / 4  # not just the beginning
    assert "".join(_sample(["a" * 5000 + "\n" + "b" * 9], 10**6)) == "a" * 5000 + "\n" + "b" * 9


def test_a_sample_of_short_texts_is_as_large_as_allowed_and_even() -> None:
    texts = [f"{i:05}" + "x" * (i % 200) for i in range(20_000)]
    chunks = _sample(texts, 200_000)
    assert 199_000 < sum(map(len, chunks)) <= 200_000
    tenths = np.bincount([int(chunk[:5]) // 2000 for chunk in chunks], minlength=10)
    assert tenths.min() > 150 and tenths.max() < 240, "about 190 of each tenth"
    lengths = np.array([len(chunk) for chunk in chunks])
    assert abs(lengths.mean() - np.mean([len(text) for text in texts])) < 5, "long ones are kept as often as short ones"
    assert _sample(["ü" * 100] * 9, 500) == ["ü" * 100] * 2 and _sample(["too long"], 3) == ["too long"]


def test_training_errors_are_one_line(tmp_path: Path) -> None:
    def failing() -> list[str]:
        raise DataError("corpus.jsonl:3: not valid JSON")

    for texts, vocab_size, error, message in (
        ([], 300, DataError, "no text to train"),
        ([""], 300, DataError, "no text to train"),
        (["a few words"], 4000, DataError, "too high .4000.. Please set it to a value <= "),
        (["a"], 258, ConfigError, "vocab_size=258 must be at least 259"),
        ((text for text in ["a"] for _ in failing()), 300, DataError, "corpus.jsonl:3"),
    ):
        with pytest.raises(error, match=message) as caught:
            train_sentencepiece(texts, vocab_size, tmp_path / "t")
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["none", "llama", "gpt2", "mistral", "qwen3", "gpt_neox", "bert", "roberta"])
@pytest.mark.parametrize("kind", ["sentencepiece", "byte"])
def test_transformers_gives_the_same_ids(
    trained: SentencePieceTokenizer,
    library: list[Document],
    tmp_path: Path,
    kind: str,
    family: str,
) -> None:
    """Also beside a config.json, whose model type makes transformers choose other classes."""
    from transformers import AutoConfig, AutoTokenizer

    ours: Tokenizer = trained if kind == "sentencepiece" else ByteTokenizer()
    ours.save(tmp_path)
    if family != "none":
        AutoConfig.for_model(family).save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == ours.eod_id and len(theirs) == ours.vocab_size
    for text in [*SAMPLES, *(file.text for file in library[:10])]:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text
    theirs.save_pretrained(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").fingerprint == ours.fingerprint


@pytest.mark.parametrize("stated", [None, {"model_max_length": 1024}, {"eos_token": None, "tokenizer_class": None}])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "qwen3", "gpt_neox", "bert", "roberta"])
def test_a_tokenizer_of_another_family_keeps_its_ids_and_its_end(
    library: list[Document], tmp_path: Path, family: str, stated: dict[str, Any] | None
) -> None:
    """GPT-2's own tokenizer_config.json names neither a class nor the end of a text."""
    from transformers import AutoConfig, AutoTokenizer

    fast = tokenizers.Tokenizer(tokenizers.models.BPE())
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    fast.train_from_iterator([file.text for file in library[:5]], trainer)
    fast.save(str(tmp_path / "tokenizer.json"))
    if stated is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(stated))
    ours = load_tokenizer(tmp_path / "tokenizer.json")
    ours.save(tmp_path / "out")
    AutoConfig.for_model(family).save_pretrained(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.eos_token_id == ours.eod_id and len(theirs) == ours.vocab_size
    assert theirs.bos_token_id == ours.eod_id, "as GPT-2's own class has it"
    assert theirs.model_max_length == (stated or {}).get("model_max_length", theirs.model_max_length)
    for text in SAMPLES:
        assert theirs(text)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text


def test_ids_of_a_padded_vocabulary_are_no_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("text")
    assert tokenizer.decode([*ids, tokenizer.vocab_size, tokenizer.vocab_size + 100]) == "text"


@pytest.fixture(scope="module")
def exported(trained: SentencePieceTokenizer, tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    folder = tmp_path_factory.mktemp("exported")
    trained.save(folder)
    return HuggingFaceTokenizer(folder / "tokenizer.json")


@given(text=TEXT)
def test_export_gives_the_same_ids_on_any_text(
    trained: SentencePieceTokenizer, exported: HuggingFaceTokenizer, text: str
) -> None:
    assert exported.encode(text) == trained.encode(text)


def foreign_model(library: list[Document], **options: object) -> bytes:
    """A sentencepiece model with settings that are not ours."""
    trained = io.BytesIO()
    lines = [line for file in library for line in file.text.splitlines() if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=trained, minloglevel=2, **options
    )
    return trained.getvalue()


FOREIGN = {
    "llama 2": {"byte_fallback": True, "normalization_rule_name": "identity"},
    "defaults": {},
    "symbol": {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["<sep>"],
    },
}
FOREIGN["llama 2"]["remove_extra_whitespaces"] = False


def test_merges_go_by_score_not_by_id() -> None:
    """Vocabularies that were extended by hand are not sorted; merging "abc" shows the order."""
    pieces = [("<unk>", 0.0, 2), ("a", -9.0, 1), ("b", -9.0, 1), ("c", -9.0, 1)]
    pieces += [("ab", -5.0, 1), ("bc", -1.0, 1), ("abc", -3.0, 1)]
    spec = _Model(pieces, 2, True, 0, b"", False, False)
    assert _merges(spec) == [("b", "c"), ("a", "bc"), ("ab", "c"), ("a", "b")]


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_models_export_with_the_same_ids(library: list[Document], name: str) -> None:
    model = foreign_model(library, model_type="bpe", vocab_size=600, **FOREIGN[name])
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    fast = to_hugging_face(model, "foreign.model")
    texts = [*(file.text for file in library), "a<sep> b", "<unk>", "  x  y  ", "ﬁne ½ Ａ"]
    for text in texts:
        assert fast.encode(text, add_special_tokens=False).ids == processor.encode(text)


@pytest.fixture
def folder(library: list[Document], tmp_path: Path) -> Path:
    """A Hugging Face folder whose tokenizer is a sentencepiece model with files beside it."""
    folder = tmp_path / "folder"
    folder.mkdir()
    model = foreign_model(library, model_type="bpe", vocab_size=600, control_symbols=["<end>"], **FOREIGN["llama 2"])
    (folder / "tokenizer.model").write_bytes(model)
    config = {"add_bos_token": True, "bos_token": "<s>", "eos_token": {"content": "<end>"}, "chat_template": "{{ x }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("asks", [True, False, None])
def test_what_begins_a_text_is_what_transformers_puts_there(folder: Path, asks: bool | None) -> None:
    from transformers import AutoTokenizer, LlamaConfig

    stated = json.loads((folder / "tokenizer_config.json").read_text())
    del stated["add_bos_token"]
    stated |= {"tokenizer_class": "LlamaTokenizer", "eos_token": "<end>"} | (
        {} if asks is None else {"add_bos_token": asks}
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    LlamaConfig().save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    begins = AutoTokenizer.from_pretrained(folder)("x")["input_ids"][0]
    assert tokenizer.begin_ids == ((begins,) if begins == tokenizer._processor.bos_id() else ())
    assert bool(tokenizer.begin_ids) is bool(asks)


def test_a_tokenizer_that_cannot_spell_every_text_loads(tmp_path: Path) -> None:
    """Of nucleotides, say; its template ends texts, too."""
    vocab = {"A": 0, "C": 1, "G": 2, "T": 3, "[CLS]": 4, "[SEP]": 5}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    fast.post_processor = tokenizers.processors.Sequence(
        [
            tokenizers.processors.ByteLevel(),
            tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 4), ("[SEP]", 5)]),
        ]
    )
    fast.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).begin_ids == (4,)
    fast.post_processor = tokenizers.processors.RobertaProcessing(("[SEP]", 5), ("[CLS]", 4))
    fast.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).begin_ids == (4,)


def test_of_a_hugging_face_folder_everything_stays(folder: Path, tmp_path: Path) -> None:
    """BOS and chat template stand beside the model, where transformers looks for them, and so does what ends a text."""
    tokenizer = load_tokenizer(folder)
    processor = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    assert tokenizer.eod_id == processor.piece_to_id("<end>") != processor.eos_id()
    assert tokenizer.encode("x")[:1] != [processor.bos_id()]
    tokenizer.save(tmp_path / "copy")
    contents = [{file.name: file.read_bytes() for file in place.iterdir()} for place in (folder, tmp_path / "copy")]
    assert contents[0] == contents[1]
    (folder / "tokenizer.json").write_text("{}")
    load_tokenizer(folder / "tokenizer.model").save(tmp_path / "export")
    assert "added_tokens" in json.loads((tmp_path / "export/tokenizer.json").read_text())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", {"<tool>": 600}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"0": {"content": "<unk>"}, "600": {"content": "<tool>"}}}),
        ("tokenizer_config.json", {"eos_token": "<tool>"}),
    ],
)
def test_tokens_that_are_added_beside_a_model_are_not_passed_over(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"tokenizer\.model: lacks <tool>, .* make tokenizer\.json of them first"):
        load_tokenizer(folder)


def test_models_without_an_equivalent_are_refused(library: list[Document], tmp_path: Path) -> None:
    (tmp_path / "c.model").write_bytes(foreign_model(library, model_type="char", vocab_size=90))
    with pytest.raises(DataError, match=r"c.model: only BPE and unigram"):
        load_tokenizer(tmp_path / "c.model").save(tmp_path / "out")
    symbols = foreign_model(library, model_type="bpe", vocab_size=600, user_defined_symbols=["<sep>"])
    (tmp_path / "s.model").write_bytes(symbols)  # a space is put before the text, not after <sep>
    with pytest.raises(DataError, match="s.model: has no Hugging Face equivalent"):
        load_tokenizer(tmp_path / "s.model").save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fingerprint_is_of_the_pieces_not_of_the_file(trained: SentencePieceTokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    exported = HuggingFaceTokenizer(tmp_path / "tokenizer.json")
    assert exported.fingerprint == trained.fingerprint != ByteTokenizer().fingerprint
    changed = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = changed["model"]["vocab"]
    vocab["self"], vocab["def"] = vocab["def"], vocab["self"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    assert load_tokenizer(tmp_path).fingerprint != trained.fingerprint


def word_level(folder: Path, special: str = "[X]") -> tokenizers.Tokenizer:
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast.add_special_tokens([special])
    fast.save(str(folder / "tokenizer.json"))
    return fast


def test_end_of_document_of_a_tokenizer_json(tmp_path: Path) -> None:
    word_level(tmp_path)
    assert load_tokenizer(tmp_path).eod_id is None
    for content in ({"eos_token": "[X]"}, {"eos_token": {"content": "[X]"}}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
        assert load_tokenizer(tmp_path).eod_id == 3
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "[Y]"}')
    with pytest.raises(DataError, match=r"lacks eos_token=\[Y\], which the files beside it name"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    word_level(tmp_path, "</s>")
    assert load_tokenizer(tmp_path).eod_id == 3


def test_truncation_and_padding_of_a_tokenizer_json_are_not_applied(tmp_path: Path) -> None:
    fast = word_level(tmp_path)
    fast.enable_truncation(2)
    fast.enable_padding(length=9)
    fast.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("a b a b a") == [0, 1, 0, 1, 0]


def test_saving_a_tokenizer_json_keeps_the_files_beside_it(tmp_path: Path) -> None:
    word_level(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "[X]", "extra": 1}')
    load_tokenizer(tmp_path).save(tmp_path / "out")
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["extra"] == 1
    assert load_tokenizer(tmp_path / "out").eod_id == 3
    before = (tmp_path / "tokenizer.json").read_bytes()
    load_tokenizer(tmp_path).save(tmp_path)  # onto itself
    assert (tmp_path / "tokenizer.json").read_bytes() == before


def test_wrong_paths_and_files_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, content in (
        ("bad.model", b"junk" * 20),
        ("zero.model", b""),
        ("bad.json", b"{}"),
        ("half.json", b'{"model"'),
        ("text.txt", b"x"),
    ):
        (tmp_path / name).write_bytes(content)
    for name, message in (
        ("absent.model", "no such tokenizer"),
        ("empty", "holds neither tokenizer.json nor tokenizer.model"),
        ("bad.model", "not a sentencepiece model"),
        ("zero.model", "not a sentencepiece model"),
        ("bad.json", "not a tokenizer.json"),
        ("half.json", "not a tokenizer.json"),
        ("text.txt", "not a tokenizer by its name"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            load_tokenizer(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
