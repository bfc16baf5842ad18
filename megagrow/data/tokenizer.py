"""Text to token ids and back: sentencepiece models, Hugging Face `tokenizer.json`, bytes."""

import hashlib
import heapq
import io
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import sentencepiece
import tokenizers

from megagrow.data import sentencepiece_export
from megagrow.data.files import os_errors_as_data_errors, write_atomically
from megagrow.errors import ConfigError, DataError, named, one_line, shown
from megagrow.json_file import parse_object

END_OF_DOCUMENT = "<|endoftext|>"
_END_NAMES = (END_OF_DOCUMENT, "</s>", "<|end_of_text|>", "<eos>", "<eod>", "[SEP]")
_MASK_NAMES, _PAD_NAMES = ("[MASK]", "<mask>"), ("[PAD]", "<pad>")
# What BERT's and RoBERTa's tokenizers call the rest of their special tokens, for tokenizer_config.json.
_ROLES = {
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "pad_token": _PAD_NAMES,
    "mask_token": _MASK_NAMES,
}
_HUGGING_FACE_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
_CHUNK_CHARACTERS = 2048  # text is sampled for training in pieces of whole lines of about this size


@runtime_checkable
class Tokenizer(Protocol):
    """What every tokenizer offers."""

    name: str  # "sentencepiece", "huggingface" or "byte"
    vocab_size: int  # one more than the largest id
    eod_id: int | None  # the id that ends a document; None: the tokenizer has none
    mask_id: int | None  # the id that hides a token from an encoder, likewise
    pad_id: int | None  # the id that fills up, likewise
    special_ids: tuple[int, ...]  # ids that stand for no text, in order
    begin_ids: tuple[int, ...]  # what transformers puts before a text; `encode` and megagrow's own data do not
    fingerprint: str  # sha256 over (id, piece): what an id means, whatever file says it

    def fingerprint_of_first(self, num_tokens: int) -> str:
        """That of a tokenizer whose tokens are the first ones of this, which some more were added to."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, nothing added. Raises DataError for a lone surrogate."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""

    def save(self, folder: str | Path) -> None:
        """Write what `transformers.AutoTokenizer.from_pretrained` needs to give the same ids."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer at `path`: a sentencepiece `*.model`, a `tokenizer.json`, a folder, or "byte".

    In a folder, `tokenizer.json` goes before `tokenizer.model` (it knows added tokens).
    Raises DataError naming the path when there is none or it cannot be read.
    """
    if str(path) == ByteTokenizer.name:
        return ByteTokenizer()
    path = tokenizer_file(path)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    raise DataError(f"{path}: not a tokenizer by its name; give a *.model, a tokenizer.json or `byte`")


def tokenizer_file(path: str | Path) -> Path:
    """The file that `load_tokenizer` reads. Raises DataError when there is none."""
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "tokenizer.model")]
        found = [file for file in found if file.is_file()]
        if not found:
            raise DataError(f"{path}: holds neither tokenizer.json nor tokenizer.model")
        path = found[0]
    if not path.is_file():
        raise DataError(f"{path}: no such tokenizer; give a *.model, a tokenizer.json or `byte`")
    return path


class SentencePieceTokenizer:
    """A sentencepiece model file."""

    name = "sentencepiece"

    def __init__(self, path: str | Path) -> None:
        with os_errors_as_data_errors(path):
            self._model = Path(path).read_bytes()
        self._path = Path(path)
        try:
            if not self._model:  # the library takes it for a model that is not loaded yet
                raise RuntimeError("empty file")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
            self.vocab_size = int(self._processor.vocab_size())
        except (RuntimeError, OSError) as error:
            raise DataError(f"{path}: not a sentencepiece model") from error
        pieces = [self._processor.id_to_piece(i) for i in range(self.vocab_size)]
        vocab = {piece: i for i, piece in enumerate(pieces)}
        end = self._processor.eos_id()
        if self._is_of_hugging_face():
            _check_nothing_is_added(self._path, vocab)
            end = vocab.get(_declared(self._path, "eos_token") or "", end)
        self.eod_id: int | None = _named(vocab, _END_NAMES, end)
        self.mask_id: int | None = _named(vocab, _MASK_NAMES)
        self.pad_id: int | None = _named(vocab, (), self._processor.pad_id())
        marks = (i for i in range(self.vocab_size) if self._processor.is_control(i) or self._processor.is_unknown(i))
        self.special_ids: tuple[int, ...] = _sorted_ids(*marks, self.eod_id, self.mask_id)
        self.begin_ids: tuple[int, ...] = self._begin_ids() if self._is_of_hugging_face() else ()
        self._pieces = list(enumerate(pieces))
        self.fingerprint = _fingerprint(self._pieces)

    def fingerprint_of_first(self, num_tokens: int) -> str:
        return _fingerprint(self._pieces[:num_tokens])

    def encode(self, text: str) -> list[int]:
        _refuse_surrogates(text)
        ids: list[int] = self._processor.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode([int(i) for i in ids if i < self.vocab_size])  # a padded vocabulary has more
        return text

    def save(self, folder: str | Path) -> None:
        if self._is_of_hugging_face():
            _copy_beside(self._path, Path(folder))  # transformers reads all of it, and so all of it stays
            return
        fast = sentencepiece_export.to_hugging_face(self._model, str(self._path))
        end = None if self.eod_id is None else self._processor.id_to_piece(self.eod_id)
        write_atomically(Path(folder) / "tokenizer.model", self._model)
        _save_hugging_face(Path(folder), fast, end)

    def _begin_ids(self) -> tuple[int, ...]:
        asks = _beside(self._path, "tokenizer_config.json").get("add_bos_token") is True
        return (self._processor.bos_id(),) if asks and self._processor.bos_id() >= 0 else ()

    def _is_of_hugging_face(self) -> bool:
        """Whether the model is what a Hugging Face folder has, and not one that stands beside a `tokenizer.json`."""
        has = [self._path.with_name(name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")]
        return self._path.name == "tokenizer.model" and has == [True, False]


class HuggingFaceTokenizer:
    """A `tokenizer.json`; the files beside it say which token ends a document."""

    name = "huggingface"

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        with os_errors_as_data_errors(path):
            content = self._path.read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises the bare class
            raise DataError(f"{path}: not a tokenizer.json ({one_line(error)})") from error
        stated = json.loads(content)
        self.steps: dict[str, Any] = {name: stated.get(name) for name in ("normalizer", "pre_tokenizer")}
        self._tokenizer.no_truncation()  # the file may ask for either; a corpus wants neither
        self._tokenizer.no_padding()
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocab:
            raise DataError(f"{path}: the vocabulary is empty")
        self.vocab_size = max(vocab.values()) + 1
        end = _declared(self._path, "eos_token")
        if end is not None and end not in vocab:
            raise DataError(
                f"{path}: lacks eos_token={named(end)}, which the files beside it name; save the tokenizer with "
                "transformers, which adds it"
            )
        self.eod_id: int | None = _named(vocab, _END_NAMES, -1 if end is None else vocab[end])
        self.mask_id: int | None = _named(vocab, _MASK_NAMES, vocab.get(_declared(self._path, "mask_token") or "", -1))
        self.pad_id: int | None = _named(vocab, _PAD_NAMES, vocab.get(_declared(self._path, "pad_token") or "", -1))
        added = self._tokenizer.get_added_tokens_decoder()
        marks = (i for i, token in added.items() if token.special)
        self.special_ids: tuple[int, ...] = _sorted_ids(*marks, self.eod_id, self.mask_id)
        self.begin_ids: tuple[int, ...] = _begin_ids(stated.get("post_processor"))
        self._pieces = [(i, piece) for piece, i in vocab.items()]
        self.fingerprint = _fingerprint(self._pieces)

    def fingerprint_of_first(self, num_tokens: int) -> str:
        return _fingerprint((i, piece) for i, piece in self._pieces if i < num_tokens)

    def encode(self, text: str) -> list[int]:
        _refuse_surrogates(text)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)
        return text

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        _copy_beside(self._path, folder)
        with os_errors_as_data_errors(folder):
            write_atomically(folder / "tokenizer.json", self._path.read_bytes())
        stated = _beside(self._path, "tokenizer_config.json")
        lacking = {**self._lacking(stated), **self._undeclared_end()}
        filled = {**stated, **{name: value for name, value in lacking.items() if stated.get(name) is None}}
        if filled != stated:
            write_atomically(folder / "tokenizer_config.json", _as_json(filled))

    def _lacking(self, stated: Mapping[str, Any]) -> dict[str, Any]:
        """What a configuration without a class lacks: transformers would take that of the model's family, whatever
        made the ids."""
        if stated.get("tokenizer_class") is not None:
            return {}
        roles = self._roles()
        if (begin := self._begin()) is not None:
            roles["bos_token"] = begin
        return _tokenizer_config(
            None, {role: name for role, name in roles.items() if _declared(self._path, role) is None}
        )

    def _begin(self) -> str | None:
        """The token that begins a text: of the template, or as GPT-2's class has it, which begins with an end."""
        if self.begin_ids:
            begin = str(self._tokenizer.id_to_token(self.begin_ids[0]))
            return None if begin == "[CLS]" else begin  # BERT's has a name of its own
        end = None if self.eod_id is None else self._tokenizer.id_to_token(self.eod_id)
        return END_OF_DOCUMENT if end == END_OF_DOCUMENT else None

    def _undeclared_end(self) -> dict[str, str]:
        """The token that ends documents, where the files beside this one do not name it."""
        if self.eod_id is None or _declared(self._path, "eos_token") is not None:
            return {}
        return {"eos_token": str(self._tokenizer.id_to_token(self.eod_id))}

    def _roles(self) -> dict[str, str]:
        """Special tokens by what they are for, of an encoder's tokenizer."""
        if self.mask_id is None:
            return {}
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        found = {role: next((name for name in names if name in vocab), None) for role, names in _ROLES.items()}
        found["mask_token"] = self._tokenizer.id_to_token(self.mask_id)
        return {role: name for role, name in found.items() if name is not None}


class ByteTokenizer:
    """UTF-8 bytes: ids 0 … 255, and 256 at the end of a document. Needs no file."""

    name = "byte"
    vocab_size = 257
    eod_id: int | None = 256
    mask_id: int | None = None
    pad_id: int | None = None
    special_ids: tuple[int, ...] = (256,)
    begin_ids: tuple[int, ...] = ()

    def __init__(self) -> None:
        self.fingerprint = self.fingerprint_of_first(self.vocab_size)

    def fingerprint_of_first(self, num_tokens: int) -> str:
        return _fingerprint(enumerate([*_byte_characters(), END_OF_DOCUMENT][:num_tokens]))

    def encode(self, text: str) -> list[int]:
        return list(self.encode_bytes(text))

    def encode_bytes(self, text: str) -> bytes:
        """The same ids as bytes, which takes no time."""
        _refuse_surrogates(text)
        return text.encode()

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def save(self, folder: str | Path) -> None:
        vocab = {character: byte for byte, character in enumerate(_byte_characters())}
        fast = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
        fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        fast.decoder = tokenizers.decoders.ByteLevel()
        fast.add_special_tokens([END_OF_DOCUMENT])
        _save_hugging_face(Path(folder), fast, END_OF_DOCUMENT)


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    output_prefix: str | Path,
    max_bytes: int = 128 << 20,
) -> SentencePieceTokenizer:
    """Train BPE with byte fallback, write OUTPUT_PREFIX.model (whole or not at all), and load it.

    Any text can be encoded and comes back unchanged (U+2581 apart, sentencepiece's own sign for a
    space). Id 0 is "<unk>" (never used), id 1 ends a document, 2 … 257 are the bytes. Of a larger
    corpus, a uniform sample of about `max_bytes` is used; the result depends on the arguments only.
    Raises DataError when the text is too small for `vocab_size`, or `vocab_size` for the text.
    """
    if vocab_size < 259:
        raise ConfigError(f"vocab_size={vocab_size} must be at least 259: 256 bytes, 2 marks, text")
    sample = _sample(texts, max_bytes)
    if not sample:
        raise DataError("no text to train a tokenizer on: the input is empty")
    trained = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=trained,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=8 * _CHUNK_CHARACTERS,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            eos_piece=END_OF_DOCUMENT,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = one_line(error).split("] ")[-1] or "no usable text"
        raise DataError(f"cannot train {vocab_size} pieces on this text: {reason}") from error
    write_atomically(f"{output_prefix}.model", trained.getvalue())
    return SentencePieceTokenizer(f"{output_prefix}.model")


def _sample(texts: Iterable[str], max_bytes: int) -> list[str]:
    """Chunks of whole lines in their order, a uniform sample of at most `max_bytes`, but of one at least.

    Each chunk draws a number, and those with the lowest stay, as many as have room: its size does not count.
    """
    kept: list[tuple[float, int, str]] = []  # the highest number first (negated), and its place in the corpus
    chooser, limit, size = random.Random(0), 1.0, 0
    for place, chunk in enumerate(chunk for text in texts for chunk in _chunks(text)):
        if (number := chooser.random()) >= limit:
            continue
        heapq.heappush(kept, (-number, place, chunk))
        size += _num_bytes(chunk)
        while size > max_bytes and len(kept) > 1:
            highest, _, dropped = heapq.heappop(kept)
            limit, size = -highest, size - _num_bytes(dropped)
    return [chunk for _, _, chunk in sorted(kept, key=lambda entry: entry[1])]


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _chunks(text: str) -> Iterator[str]:
    """Whole lines up to the chunk size; longer lines are cut (the trainer skips long sentences)."""
    start = 0
    while start < len(text):
        end = start + _CHUNK_CHARACTERS
        if end < len(text):
            end = (text.rfind("\n", start, end) + 1) or end
        yield text[start:end]
        start = end


def _named(vocab: dict[str, int], names: Sequence[str], declared: int = -1) -> int | None:
    """The declared id, else that of the first of these usual names in the vocabulary, else None."""
    if declared >= 0:
        return declared
    return next((vocab[name] for name in names if name in vocab), None)


def _sorted_ids(*ids: int | None) -> tuple[int, ...]:
    return tuple(sorted({i for i in ids if i is not None}))


def _fingerprint(pieces: Iterable[tuple[int, str]]) -> str:
    return hashlib.sha256(json.dumps(sorted(pieces)).encode()).hexdigest()


def _begin_ids(post_processor: Any) -> tuple[int, ...]:
    """What the template of a tokenizer.json has before a text."""
    if not isinstance(post_processor, dict):
        return ()
    if post_processor["type"] == "Sequence":
        return tuple(i for each in post_processor["processors"] for i in _begin_ids(each))
    if post_processor["type"] in ("BertProcessing", "RobertaProcessing"):
        return (int(post_processor["cls"][1]),)
    found: list[int] = []
    for piece in post_processor.get("single", ()):
        if "Sequence" in piece:
            return tuple(found)
        found += post_processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    return ()


def _refuse_surrogates(text: str) -> None:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"lone surrogate at character {error.start}: not valid text") from error


def _declared(file: Path, role: str) -> str | None:
    """The token that the files beside one of a tokenizer name for a role. Raises DataError where it is no text."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _beside(file, name).get(role)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            return token
        if token is not None:
            raise DataError(
                f"{file.with_name(name)}: {role} is {shown(token)}, must be the text of a token; correct it"
            )
    return None


def _beside(file: Path, name: str) -> dict[str, Any]:
    """What a file beside one of a tokenizer holds; nothing where there is none."""
    path = file.with_name(name)
    if not path.is_file():
        return {}
    with os_errors_as_data_errors(path):
        content = path.read_bytes()
    return parse_object(content, path, DataError, "restore the file")


def _check_nothing_is_added(file: Path, vocab: Mapping[str, int]) -> None:
    """Raises DataError where transformers gives ids to tokens that a sentencepiece model does not have."""
    decoder = _beside(file, "tokenizer_config.json").get("added_tokens_decoder")
    entries = decoder.values() if isinstance(decoder, dict) else ()
    contents = [entry.get("content") for entry in entries if isinstance(entry, dict)]
    added = [*_beside(file, "added_tokens.json"), *contents, _declared(file, "eos_token")]
    lacking = [token for token in added if isinstance(token, str) and token not in vocab]
    if lacking:
        raise DataError(
            f"{file}: lacks {named(lacking[0])}, which the files beside it add; make tokenizer.json of them first "
            "(transformers' fast tokenizers write it when they are saved)"
        )


def _copy_beside(file: Path, folder: Path) -> None:
    """Copies what a Hugging Face folder has of a tokenizer beside this file of it."""
    with os_errors_as_data_errors(folder):
        for source in (file.with_name(name) for name in _HUGGING_FACE_FILES):
            if source.is_file():
                write_atomically(folder / source.name, source.read_bytes())


def _save_hugging_face(folder: Path, fast: tokenizers.Tokenizer, end: str | None) -> None:
    write_atomically(folder / "tokenizer.json", fast.to_str(pretty=True).encode("utf-8"))
    write_atomically(folder / "tokenizer_config.json", _as_json(_tokenizer_config(end)))


def _tokenizer_config(end: str | None, roles: Mapping[str, str] | None = None) -> dict[str, Any]:
    fixed = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return {**(roles or {}), **fixed, **({} if end is None else {"eos_token": end})}


def _as_json(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()


def _byte_characters() -> list[str]:
    """The printable character by which byte-level vocabularies write each byte (GPT-2's table)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (chr(256 + i) for i in range(256))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]
