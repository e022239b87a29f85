"""Where the tokenizer of a model is: a folder, or a tensor inside the text encoder's file.

ComfyUI's text encoders carry their SentencePiece model as a tensor of bytes. Where a model has no
tokenizer folder, that file stands for it.
"""

import shutil
from pathlib import Path

from wan.errors import WanError
from wan.models.tokenizer import Tokenizer
from wan.models.tokenizer_export import num_pieces, write_tokenizer_folder
from wan.weights.checkpoint import open_checkpoint
from wan.weights.keys import SPIECE
from wan.weights.load import match_names, stored_tokenizer

TOKENIZER_FILES = (
    "tokenizer.json",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
NUM_SENTINELS = 300  # <extra_id_N> of UMT5; a SentencePiece model does not say how many follow it


def is_tokenizer(place: Path) -> bool:
    """Whether a folder or a file holds a tokenizer."""
    if place.is_file():
        return (
            place.suffix == ".safetensors" and stored_tokenizer(open_checkpoint(place)) is not None
        )
    return any((place / name).is_file() for name in TOKENIZER_FILES[:2])


def read_tokenizer(place: Path) -> Tokenizer:
    """The tokenizer of a folder, or of a text encoder's file.

    Raises:
        WanError: there is none, or it is damaged.
    """
    if not place.is_file():
        return Tokenizer.from_folder(place)
    spiece, num_sentinels = tensor_of_file(place)
    tokenizer = Tokenizer.from_spiece(spiece, num_sentinels, place)
    tokenizer.source = place
    return tokenizer


def write_tokenizer(place: Path, folder: Path) -> None:
    """Write a tokenizer as a folder: its files as they are, or those that its tensor gives.

    Raises:
        WanError: there is no tokenizer.
    """
    if place.is_file():
        spiece, num_sentinels = tensor_of_file(place)
        write_tokenizer_folder(spiece, folder, num_sentinels)
        return
    found = [place / name for name in TOKENIZER_FILES if (place / name).is_file()]
    if not is_tokenizer(place):
        raise WanError(f"{place}: no tokenizer here ({' or '.join(TOKENIZER_FILES[:2])})")
    folder.mkdir(parents=True, exist_ok=True)
    for path in found:
        shutil.copyfile(path, folder / path.name)


def tensor_of_file(place: Path) -> tuple[bytes, int]:
    """The SentencePiece model in a text encoder's file, and the number of sentinels after it."""
    checkpoint = open_checkpoint(place)
    spiece = stored_tokenizer(checkpoint)
    if spiece is None:
        raise WanError(f"{place}: no tensor {SPIECE} in it; give the tokenizer's folder")
    embedding = match_names(checkpoint, "text_encoder").stored["token_embedding.weight"]
    return spiece, min(NUM_SENTINELS, embedding.entry.shape[0] - num_pieces(spiece, place))
