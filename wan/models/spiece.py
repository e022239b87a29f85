"""A SentencePiece model file, read field by field, and its table of replaced characters."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from wan.errors import WanError

MAX_SPIECE_BYTES = 64 << 20  # that of UMT5 has 4.5 MB
MAX_REPLACEMENT = 64  # bytes; the longest of NFKC, which UMT5 uses, has 33


def num_pieces(spiece: bytes, path: Path) -> int:
    """The number of pieces of a SentencePiece model, special ones included.

    Args:
        path: where it was read, for messages.

    Raises:
        WanError: it is damaged.
    """
    try:
        return sum(number == 1 for number, _ in _fields(spiece))
    except (IndexError, ValueError) as error:
        raise WanError(f"{path}: not a SentencePiece model, or damaged ({error})") from error


def check_charsmap(charsmap: bytes, path: Path) -> None:
    """Refuse a table that is damaged, or that replaces a character by a long text.

    Damage would stop the tokenizers library in the middle of a prompt, and a long text would let a
    prompt explode.

    Args:
        charsmap: the size of a trie in 4 bytes, little-endian; the trie, a double array of Darts
            in units of 4 bytes; and the texts that stand for its keys, each with a zero byte
            behind it. Empty for no table.
        path: where it was read, for messages.

    Raises:
        WanError: says which of the two.
    """
    if not charsmap:
        return
    size = int.from_bytes(charsmap[:4], "little")
    trie, texts = charsmap[4 : 4 + size], charsmap[4 + size :]
    if len(trie) != size or not size or size % 4 or not _is_sound(trie, texts):
        raise WanError(f"{path}: its table of replaced characters is damaged; download it again")
    longest = max(map(len, texts.split(b"\0")))
    if longest > MAX_REPLACEMENT:
        raise WanError(
            f"{path}: it replaces a character by {longest:,} bytes, at most {MAX_REPLACEMENT} are "
            "allowed; this is no tokenizer of UMT5"
        )


def _is_sound(trie: bytes, texts: bytes) -> bool:
    """Whether no walk through a trie leaves it, and each of its values is the start of a text."""
    try:
        texts.decode()
    except UnicodeDecodeError:
        return False
    units = np.frombuffer(trie, dtype="<u4")
    is_value = units >> 31 == 1
    # From a unit, a byte leads to one of the 256 places of a block.
    offsets = (units >> 10) << ((units & (1 << 9)) >> 6)
    last = (np.arange(len(units)) ^ offsets) | 255
    places = units[is_value] & 0x7FFFFFFF
    if not texts.endswith(b"\0") or (places >= len(texts)).any():
        return False
    inside_a_character = np.frombuffer(texts, dtype=np.uint8)[places] & 0xC0 == 0x80
    return bool((last[~is_value] < len(units)).all() and not inside_a_character.any())


def charsmap_of(spiece: bytes, path: Path) -> bytes:
    """The normalisation table of a model; empty if it has none.

    Raises:
        WanError: the file is damaged.
    """
    try:
        normalizers = [dict(_fields(value)) for number, value in _fields(spiece) if number == 3]
    except (IndexError, ValueError, TypeError) as error:
        raise WanError(f"{path}: not a SentencePiece model, or damaged ({error})") from error
    table = normalizers[-1].get(2, b"") if normalizers else b""
    if not isinstance(table, bytes):
        raise WanError(f"{path}: not a SentencePiece model, or damaged")
    return table


def read_spiece(spiece: bytes, path: Path) -> tuple[list[tuple[str, float]], bytes, bool]:
    """Pieces with scores, normalisation table and byte fallback of a unigram model.

    The sentencepiece library gives access to neither table nor type, so the few needed fields are
    read from the file, a protocol buffer. Source: field numbers of sentencepiece_model.proto.

    Args:
        path: where it was read, for messages.

    Raises:
        WanError: it is damaged, of another type, or normalises text in a way that tokenizer.json
            cannot express.
    """
    pieces: list[tuple[str, float]] = []
    model_type, charsmap, byte_fallback = 1, b"", False
    kept = {"add_dummy_prefix": True, "remove_extra_whitespaces": True, "escape_whitespaces": True}
    try:
        for number, value in _fields(spiece):
            if number == 1:
                piece = dict(_fields(value))
                (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
                pieces.append((piece[1].decode(), score))
            elif number == 2:
                trainer = dict(_fields(value))
                model_type = trainer.get(3, model_type)
                byte_fallback = bool(trainer.get(35, byte_fallback))
            elif number == 3:
                normalizer = dict(_fields(value))
                charsmap = normalizer.get(2, charsmap)
                kept = {name: bool(normalizer.get(n, 1)) for n, name in enumerate(kept, start=3)}
    except (IndexError, KeyError, ValueError, AttributeError, TypeError, struct.error) as error:
        raise WanError(f"{path}: not a SentencePiece model, or damaged ({error})") from error
    if off := [name for name, value in kept.items() if not value]:
        raise WanError(f"{path}: {', '.join(off)} is off; tokenizer.json cannot give the same ids")
    if model_type != 1:
        raise WanError(f"{path}: SentencePiece model type {model_type}; 1 (unigram) is needed")
    check_charsmap(charsmap, path)
    return pieces, charsmap, byte_fallback


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) pairs of a protocol buffer message; a value is an int or raw bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while shift < 70:  # 64 bits
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
        raise ValueError(f"a number of more than 64 bits at byte {at}")

    while at < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"wire type {wire} at byte {at}")
        size = {1: 8, 5: 4}.get(wire) or varint()
        if at + size > len(message):
            raise ValueError(f"field {number} runs past the end")
        yield number, message[at : at + size]
        at += size
