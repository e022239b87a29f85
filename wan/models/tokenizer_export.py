"""Write a SentencePiece model as a tokenizer folder in the released layout."""

import base64
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wan.errors import WanError
from wan.files import write_bytes, write_text
from wan.models.tokenizer import EOS, EOS_ID, PAD, SPECIALS, UNK, UNK_ID, _check_specials


def write_tokenizer_folder(spiece: bytes, folder: str | Path, num_sentinels: int) -> None:
    """Write a SentencePiece model as a folder in the released layout, which transformers reads too.

    Writes spiece.model, tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    Raises:
        WanError: the model is not a unigram model with the ids of `wan.models.tokenizer`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "spiece.model", spiece)
    special = {"eos_token": EOS, "pad_token": PAD, "unk_token": UNK}
    sentinels = [f"<extra_id_{n}>" for n in range(num_sentinels)]
    objects = {
        "tokenizer.json": tokenizer_json_from_spiece(folder / "spiece.model", num_sentinels),
        "special_tokens_map.json": {**special, "additional_special_tokens": sentinels},
        "tokenizer_config.json": {
            # transformers 5 rebuilds T5's own classes from their defaults, with <unk> at id 2. This
            # class uses tokenizer.json unchanged, in version 4 too.
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
            "extra_ids": num_sentinels,
            "additional_special_tokens": sentinels,
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
            "model_max_length": 512,
        },
    }
    for name, values in objects.items():
        write_text(folder / name, json.dumps(values, ensure_ascii=False, indent=1) + "\n")


def tokenizer_json_from_spiece(path: str | Path, num_sentinels: int) -> dict[str, Any]:
    """The `tokenizer.json` that gives the same ids as a `spiece.model`.

    Args:
        path: a SentencePiece unigram model with <pad>, </s>, <s>, <unk> as ids 0 to 3.
        num_sentinels: how many <extra_id_N> follow the pieces.

    Raises:
        WanError: the model is damaged, of another type, or normalises text in a way that
            tokenizer.json cannot express.
    """
    path = Path(path)
    pieces, model_type, charsmap, byte_fallback = _read_spiece(path)
    if model_type != 1:
        raise WanError(f"{path}: SentencePiece model type {model_type}; 1 (unigram) is needed")
    ids = {piece: index for index, (piece, _) in enumerate(pieces)}
    _check_specials(path, [ids.get(piece) for piece in SPECIALS])
    sentinels = [(f"<extra_id_{n}>", 0.0) for n in reversed(range(num_sentinels))]
    vocab = pieces + sentinels
    charsmaps = [{"type": "Precompiled", "precompiled_charsmap": charsmap}] if charsmap else []
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    added = [*range(4), *range(len(pieces), len(vocab))]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": vocab[index][0],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for index in added
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                *charsmaps,
                {"type": "Strip", "strip_left": False, "strip_right": True},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
            ],
        },
        "pre_tokenizer": metaspace,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": EOS, "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": EOS, "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
                {"SpecialToken": {"id": EOS, "type_id": 0}},
            ],
            "special_tokens": {EOS: {"id": EOS, "ids": [EOS_ID], "tokens": [EOS]}},
        },
        "decoder": metaspace,
        "model": {
            "type": "Unigram",
            "unk_id": UNK_ID,
            "vocab": vocab,
            "byte_fallback": byte_fallback,
        },
    }


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


def _read_spiece(path: Path) -> tuple[list[tuple[str, float]], int, str, bool]:
    """Pieces with scores, model type, normalisation table (base64) and byte fallback of a model.

    The sentencepiece library gives access to neither table nor type, so the few needed fields are
    read from the file, a protocol buffer. Source: field numbers of sentencepiece_model.proto.
    """
    pieces: list[tuple[str, float]] = []
    model_type, charsmap, byte_fallback = 1, b"", False
    kept = {"add_dummy_prefix": True, "remove_extra_whitespaces": True, "escape_whitespaces": True}
    try:
        for number, value in _fields(path.read_bytes()):
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
    return pieces, model_type, base64.b64encode(charsmap).decode(), byte_fallback


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) pairs of a protocol buffer message; a value is an int or raw bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

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
