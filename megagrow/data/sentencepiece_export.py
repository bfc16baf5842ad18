"""A sentencepiece model as a Hugging Face `tokenizer.json` with the same ids.

sentencepiece merges any two neighbours that together are a piece, best score first, leftmost first.
`tokenizers` merges listed pairs by rank, so every way to split a piece becomes a pair of its rank.
The file is read field by field (protocol buffers' wire format), so that protobuf is not needed.
Source: sentencepiece, src/sentencepiece_model.proto.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers

from megagrow.errors import DataError

_UNIGRAM, _BPE = 1, 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_SPACE = "▁"
_PROBES = (
    "def f(x):\n    if x:\n\t\treturn 'a  b'  # done\n\n\n",
    "  The quick brown fox, 12.5 % of 2048 — jumps; isn't it?   ",
    "naïve Ωμέγα 你好世界 مرحبا \U0001f600 \U0001f1e9\U0001f1ea e\u0301",
    "no-break\u00a0 joiner \u200d ligature \ufb01 \r\n \x00",
    " " * 37 + "x" + " " * 5 + "\n" * 7,
    "",
)


@dataclass(frozen=True)
class _Model:
    pieces: list[tuple[str, float, int]]  # (piece, score, type), by id
    model_type: int
    byte_fallback: bool
    unknown_id: int
    charsmap: bytes  # compiled normalisation rules; empty: identity
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def to_hugging_face(model: bytes, where: str) -> tokenizers.Tokenizer:
    """The `tokenizers` equivalent of a sentencepiece model (BPE or unigram).

    BPE ids are equal; unigram ids too but for ties, which the two libraries break differently
    (about 1 line of source code in 1,000). `where` names the model in errors. Raises DataError when
    the model has no equivalent, or when ids differ on probe texts.
    """
    spec = _parse(model)
    if any(kind == _UNUSED for _, _, kind in spec.pieces):
        raise DataError(f"{where}: unused pieces cannot be exported for Hugging Face")
    tokenizer = tokenizers.Tokenizer(_model(spec, where))
    tokenizer.normalizer = _normalizer(spec)
    tokenizer.decoder = _decoder(spec)
    control = [piece for piece, _, kind in spec.pieces if kind == _CONTROL]
    symbols = [piece for piece, _, kind in spec.pieces if kind == _USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in control])
    tokenizer.add_tokens([AddedToken(piece, normalized=True) for piece in symbols])
    probes = [f"x{piece}y {piece}".replace(_SPACE, " ") for piece in symbols]
    _check_equal(model, tokenizer, [*_PROBES, *probes], where)
    return tokenizer


def _model(spec: _Model, where: str) -> models.Model:
    vocab = {piece: i for i, (piece, _, _) in enumerate(spec.pieces)}
    unknown = spec.pieces[spec.unknown_id][0]
    if spec.model_type == _BPE:
        return models.BPE(
            vocab=vocab,
            merges=_merges(spec),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=spec.byte_fallback,
        )
    if spec.model_type == _UNIGRAM:
        scores = [(piece, score) for piece, score, _ in spec.pieces]
        return models.Unigram(scores, spec.unknown_id, spec.byte_fallback)
    raise DataError(f"{where}: only BPE and unigram models can be exported for Hugging Face")


def _merges(spec: _Model) -> list[tuple[str, str]]:
    mergeable = {p: i for i, (p, _, kind) in enumerate(spec.pieces) if kind == _NORMAL}
    ranked = []
    for piece, i in mergeable.items():
        for cut in range(1, len(piece)):
            left, right = mergeable.get(piece[:cut]), mergeable.get(piece[cut:])
            if left is not None and right is not None:
                ranked.append((-spec.pieces[i][1], i, left, right, piece[:cut], piece[cut:]))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _normalizer(spec: _Model) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.charsmap:
        steps.append(normalizers.Precompiled(spec.charsmap))
    if spec.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex(r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])


def _decoder(spec: _Model) -> decoders.Decoder:
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _check_equal(model: bytes, tokenizer: tokenizers.Tokenizer, probes: list[str], where: str) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    for probe in probes:
        if tokenizer.encode(probe, add_special_tokens=False).ids != processor.encode(probe):
            raise DataError(f"{where}: has no Hugging Face equivalent, the ids of {probe[:20]!r} would differ")


def _parse(model: bytes) -> _Model:
    top = list(_fields(model))
    pieces = [_piece(dict(_fields(_bytes(value)))) for number, value in top if number == 1]
    sections = {number: dict(_fields(_bytes(v))) for number, v in top if number in (2, 3)}
    trainer, normalizer = sections.get(2, {}), sections.get(3, {})
    kinds = [kind for _, _, kind in pieces]
    return _Model(
        pieces=pieces,
        model_type=int(trainer.get(3, _UNIGRAM)),
        byte_fallback=bool(trainer.get(35, False)),
        unknown_id=kinds.index(_UNKNOWN),
        charsmap=_bytes(normalizer.get(2, b"")),
        add_dummy_prefix=bool(normalizer.get(3, True)),
        remove_extra_whitespaces=bool(normalizer.get(4, True)),
    )


def _piece(fields: dict[int, int | bytes]) -> tuple[str, float, int]:
    (score,) = struct.unpack("<f", _bytes(fields.get(2, bytes(4))))
    return _bytes(fields[1]).decode("utf-8"), score, int(fields.get(3, _NORMAL))


def _bytes(value: int | bytes) -> bytes:
    assert isinstance(value, bytes)
    return value


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a message that sentencepiece has already accepted."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire_type = key & 7
        if wire_type == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(wire_type)
        if size is None:
            size, at = _varint(message, at)
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
