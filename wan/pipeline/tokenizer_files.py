"""The tokenizer of a model: its call, and where it is: a folder, or a tensor of a text encoder.

ComfyUI's text encoders carry their SentencePiece model as a tensor of bytes. Where a model has no
tokenizer folder, that file stands for it.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from wan.errors import WanError, check_names
from wan.files import written_beside
from wan.models.spiece import num_pieces
from wan.models.tokenizer import EOS, EOS_ID, PAD, PAD_ID, Tokenizer
from wan.models.tokenizer_export import write_tokenizer_folder
from wan.paths import all_inside
from wan.pipeline.arguments import FileArguments, check_arguments, file_options
from wan.pipeline.config import SHARED_FILE, part_folder
from wan.weights.checkpoint import open_checkpoint
from wan.weights.hub import resolve_model
from wan.weights.keys import SPIECE
from wan.weights.load import match_names, stored_tokenizer

TOKENIZER_FILES = (
    "tokenizer.json",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
NUM_SENTINELS = 300  # <extra_id_N> of UMT5; a SentencePiece model does not say how many follow it


class TokenizedTexts(dict[str, Any]):
    """Token ids and their masks, read by name or as attributes.

    `input_ids` and `attention_mask` are lists, or tensors (B, S) int64; 0 in a mask is padding.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no {name} here; there are {', '.join(self)}") from None

    def to(self, device: str | torch.device) -> "TokenizedTexts":
        """The same with all tensors on a device."""
        return TokenizedTexts({name: tensor.to(device) for name, tensor in self.items()})


class AutoTokenizer(Tokenizer):
    """A `Tokenizer` with the call of transformers' tokenizers, for scripts that tokenise by hand.

    The texts are taken as they are: a pipeline cleans its prompts first.
    """

    pad_token, eos_token = PAD, EOS
    pad_token_id, eos_token_id = PAD_ID, EOS_ID
    model_max_length = 512

    @classmethod
    def from_pretrained(
        cls, name: str | Path, subfolder: str | None = None, **arguments: Unpack[FileArguments]
    ) -> Tokenizer:
        """Read a tokenizer.

        Args:
            name: a model with `subfolder="tokenizer"`, or the tokenizer's own folder.
            arguments: see `FileArguments`.

        Raises:
            WanError: there is none, or it is damaged.
        """
        check_arguments(arguments, FileArguments)
        patterns = tuple(f"{subfolder}/{n}" if subfolder else n for n in TOKENIZER_FILES)
        folder = resolve_model(name, patterns=(*patterns, SHARED_FILE), **file_options(arguments))
        if subfolder is not None:
            return read_tokenizer(part_folder(folder, subfolder))
        return read_tokenizer(all_inside(folder, folder))

    def __len__(self) -> int:
        return self.vocab_size

    def __call__(
        self,
        text: str | Sequence[str],
        max_length: int | None = None,
        *,
        padding: bool | str | None = None,
        truncation: bool | None = None,
        add_special_tokens: bool = True,
        return_attention_mask: bool = True,
        return_tensors: str | None = None,
    ) -> Any:
        """Tokenise one text or several.

        With `max_length` by position alone it is the call of `Tokenizer`.

        Args:
            padding: True or "longest", "max_length", or none.
            truncation: keep `max_length` ids of a longer text, </s> included.
            add_special_tokens: end with </s>.
            return_tensors: "pt" or None, which returns lists.

        Raises:
            WanError: another value, or texts of different lengths as one tensor.
        """
        if isinstance(text, str) and max_length is not None and padding is truncation is None:
            return super().__call__(text, max_length)
        check_names("padding", [str(padding)], ("None", "True", "False", "longest", "max_length"))
        check_names("return_tensors", [str(return_tensors)], ("None", "pt"))
        most = self.model_max_length if max_length is None else max_length
        end = [EOS_ID] if add_special_tokens else []
        rows = [self._encode(one) for one in ([text] if isinstance(text, str) else text)]
        kept = most - len(end) if truncation else None
        rows = [[*row[:kept], *end] for row in rows]
        longest = most if padding == "max_length" else max(map(len, rows), default=0)
        width = longest if padding else 0
        masks = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        ids = [row + [PAD_ID] * (width - len(row)) for row in rows]
        found: dict[str, Any] = {"input_ids": ids}
        if return_attention_mask:
            found["attention_mask"] = masks
        if return_tensors == "pt":
            found = {name: as_tensor(lists) for name, lists in found.items()}
        elif isinstance(text, str):
            found = {name: lists[0] for name, lists in found.items()}
        return TokenizedTexts(found)


def as_tensor(lists: list[list[int]]) -> Tensor:
    """Lists of one length as a tensor (B, S) int64."""
    if len({len(one) for one in lists}) > 1:
        raise WanError('return_tensors="pt" of texts of different lengths: give padding=True')
    return torch.tensor(lists, dtype=torch.int64)


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
        return AutoTokenizer.from_folder(place)
    spiece, num_sentinels = tensor_of_file(place)
    tokenizer = AutoTokenizer.from_spiece(spiece, num_sentinels, place)
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
        with written_beside(folder / path.name) as beside:
            shutil.copyfile(path, beside)


def tensor_of_file(place: Path) -> tuple[bytes, int]:
    """The SentencePiece model in a text encoder's file, and the number of sentinels after it."""
    checkpoint = open_checkpoint(place)
    spiece = stored_tokenizer(checkpoint)
    if spiece is None:
        raise WanError(f"{place}: no tensor {SPIECE} in it; give the tokenizer's folder")
    embedding = match_names(checkpoint, "text_encoder").stored["token_embedding.weight"]
    return spiece, min(NUM_SENTINELS, embedding.entry.shape[0] - num_pieces(spiece, place))
