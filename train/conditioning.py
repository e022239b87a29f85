"""The parts of a model that training only reads: their loading, their identity, texts as context.

Where texts come from is a function from B captions to the real rows of each, (n, D): an encoder at
work, or what `train.preprocess` stored.
"""

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from wan.models.tokenizer import Tokenizer, clean_prompt
from wan.models.umt5 import UMT5Encoder, pad_ids
from wan.pipeline.config import part_folder
from wan.weights.checkpoint import open_checkpoint
from wan.weights.digests import hash_files, list_files
from wan.weights.load import load_module

TEXT_LENGTH = 512  # rows of context every Wan transformer reads

M = TypeVar("M", bound=nn.Module)
RowsOf = Callable[[list[str]], list[Tensor]]


def load_frozen(
    build: Callable[[], M], folder: Path, name: str, device: torch.device, dtype: torch.dtype
) -> M:
    """A component that training only reads."""
    module = load_module(
        build, open_checkpoint(part_folder(folder, name)), name, dtype=dtype, device=device
    )
    return module.requires_grad_(False).eval()


def text_dtype(device: torch.device) -> torch.dtype:
    """In which the text encoder runs, and its embeddings are stored."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def component_digests(folder: Path) -> dict[str, str]:
    """Which autoencoder and which text encoder (with its tokenizer) a model folder has.

    All bytes of their files count: the same weights in another layout or dtype are others.
    """
    digests = {}
    for name, parts in {"vae": ("vae",), "text_encoder": ("text_encoder", "tokenizer")}.items():
        files = {
            f"{part}/{n}": p
            for part in parts
            for n, p in list_files(part_folder(folder, part)).items()
        }
        sums = hash_files(files.values())
        lines = "".join(f"{sums[path]}  {file}\n" for file, path in files.items())
        digests[name] = hashlib.sha256(lines.encode()).hexdigest()
    return digests


def transformer_digest(folder: Path) -> str:
    """Which transformer a model folder has."""
    files = list_files(part_folder(folder, "transformer"))
    sums = hash_files(path for name, path in files.items() if name.endswith(".safetensors"))
    return hashlib.sha256("".join(sorted(sums.values())).encode()).hexdigest()


class TextRows:
    """Captions -> the real rows of each (n, D), by a frozen encoder."""

    def __init__(self, encoder: UMT5Encoder, tokenizer: Tokenizer, max_tokens: int) -> None:
        self.encoder, self.tokenizer, self.max_tokens = encoder, tokenizer, max_tokens

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> list[Tensor]:
        tokens = [self.tokenizer(clean_prompt(text), self.max_tokens) for text in captions]
        if cut := [text for text, one in zip(captions, tokens, strict=True) if one.truncated]:
            warnings.warn(
                f"{len(cut)} captions are longer than max_text_tokens={self.max_tokens} and lose "
                f"their ends, the first is {cut[0][:60]!r}",
                stacklevel=2,
            )
        ids, mask = pad_ids([one.ids for one in tokens])
        device = self.encoder.token_embedding.weight.device
        encoded = self.encoder(ids.to(device), mask.to(device))
        return [row[: len(one.ids)] for row, one in zip(encoded, tokens, strict=True)]


class Texts:
    """Captions -> context rows; padded rows are zero.

    The number of rows that comes with a context lets the transformer attend the zero rows as one.
    """

    def __init__(self, rows_of: RowsOf, device: torch.device) -> None:
        self.rows_of, self.device = rows_of, device

    def __call__(self, captions: list[str]) -> tuple[Tensor, int]:
        """B texts -> context (B, 512, D) and the number of rows that are not zero everywhere."""
        rows = [row.to(self.device) for row in self.rows_of(captions)]
        longest = -(-max(len(row) for row in rows) // 8) * 8  # few lengths, few compilations
        context = rows[0].new_zeros(len(rows), TEXT_LENGTH, rows[0].shape[1])
        for row, encoded in enumerate(rows):
            context[row, : len(encoded)] = encoded
        return context, min(longest, TEXT_LENGTH)
