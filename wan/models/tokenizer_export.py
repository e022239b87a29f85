"""Write a SentencePiece model as a tokenizer folder in the released layout."""

import base64
import json
from pathlib import Path
from typing import Any

from wan.files import read_bytes, write_bytes, write_text
from wan.models.spiece import MAX_SPIECE_BYTES, read_spiece
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
    pieces, charsmap, byte_fallback = read_spiece(read_bytes(path, MAX_SPIECE_BYTES), path)
    ids = {piece: index for index, (piece, _) in enumerate(pieces)}
    _check_specials(path, [ids.get(piece) for piece in SPECIALS])
    sentinels = [(f"<extra_id_{n}>", 0.0) for n in reversed(range(num_sentinels))]
    vocab = pieces + sentinels
    charsmaps = []
    if charsmap:
        table = base64.b64encode(charsmap).decode()
        charsmaps = [{"type": "Precompiled", "precompiled_charsmap": table}]
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
