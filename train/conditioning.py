"""The parts of a model that training only reads: loading them, their digests, encoding captions.

Captions are encoded by a function from B captions to the token embeddings of each, (n, D): a text
encoder at work (`CaptionEncoder`), or what `train.preprocess` stored.
"""

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.progress import doing
from wan.errors import WanError
from wan.models.tokenizer import Tokenizer, clean_prompt
from wan.models.umt5 import UMT5Encoder, pad_ids
from wan.pipeline.config import PipelineConfig, part_folder
from wan.pipeline.folder import load_part
from wan.precision import default_dtype
from wan.weights.checkpoint import open_checkpoint
from wan.weights.digests import list_files, remembered_sha256
from wan.weights.load import load_state

SMALL = 1_000_000  # values of a tensor that is read to tell two models' parts apart
TEXT_LENGTH = 512  # tokens of context that every Wan transformer reads

TokensOf = Callable[[list[str]], list[Tensor]]


def check_trainable(settings: PipelineConfig, folder: Path, first_frame_share: float) -> None:
    """Raise a WanError for a model that these commands cannot train from."""
    if settings.boundary_ratio is not None:
        raise WanError(
            f"{folder}: a model of two experts; each needs noise levels of its own side of the "
            "boundary, which this command does not draw. Models with one transformer only"
        )
    if first_frame_share and not settings.expand_timesteps:
        raise WanError(
            f"first_frame_share={first_frame_share}: this model takes no first frame "
            "(expand_timesteps is false in its model_index.json)"
        )


def load_frozen(
    folder: Path, part: str, config: Any, device: torch.device, dtype: torch.dtype, **options: Any
) -> Any:
    """A network that training only reads: no gradients, evaluation mode.

    Args:
        config, options: as in `wan.pipeline.folder.load_part`.
    """
    with doing(f"loading {part}"):
        module = load_part(folder, part, config, options, dtype=dtype, device=device)
    return module.requires_grad_(False)


def text_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which the text encoder runs and its embeddings are stored."""
    return default_dtype(device)


def component_digests(folder: Path) -> dict[str, str]:
    """One sha256 of a folder's vae, one of its text_encoder together with its tokenizer.

    All bytes of their files count: the same weights in another layout or dtype are others.
    """
    digests = {}
    for name, parts in {"vae": ("vae",), "text_encoder": ("text_encoder", "tokenizer")}.items():
        files = {
            f"{part}/{n}": p
            for part in parts
            for n, p in list_files(part_folder(folder, part)).items()
        }
        with doing(f"hashing {name}"):
            sums = remembered_sha256(files.values())
        lines = "".join(f"{sums[path]}  {file}\n" for file, path in files.items())
        digests[name] = hashlib.sha256(lines.encode()).hexdigest()
    return digests


def check_same_part(part: str, name: str, one: Path, other: Path) -> None:
    """Refuse a model whose text encoder or autoencoder is not that of another one.

    The weights count, in bfloat16, and not how they are stored. Those of less than a million values
    (norms, biases) stand for all, so that of a large text encoder little is read.

    Args:
        name: what the user calls the model in folder `one`, for the error.
    Raises:
        WanError: the weights differ.
    """
    folders = [part_folder(folder, part) for folder in (one, other)]
    if folders[0] == folders[1] or not folders[0].is_dir():
        return
    ours, theirs = (load_state(open_checkpoint(folder), part) for folder in folders)
    small = [n for n, tensor in ours.items() if tensor.numel() < SMALL and n in theirs]
    if not small or any(not same_numbers(ours[n], theirs[n]) for n in small):
        raise WanError(
            f"{name}: its {part} is not that of {other}, so its transformer would be given what it "
            "has never seen; name the model that it was distilled from"
        )


def same_numbers(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same once they are rounded to bfloat16."""
    return one.shape == other.shape and torch.equal(one.bfloat16(), other.bfloat16())


def transformer_digest(folder: Path) -> str:
    """One sha256 over all safetensors files of a folder's transformer."""
    return weights_digest(part_folder(folder, "transformer"))


def weights_digest(part: Path) -> str:
    """One sha256 over all safetensors files of a part's folder."""
    files = list_files(part)
    with doing(f"hashing {part}"):
        weights = (path for name, path in files.items() if name.endswith(".safetensors"))
        sums = remembered_sha256(weights)
    return hashlib.sha256("".join(sorted(sums.values())).encode()).hexdigest()


class CaptionEncoder:
    """Captions -> the embeddings of their n tokens, (n, D) each, by a frozen text encoder."""

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
        return [states[: len(one.ids)] for states, one in zip(encoded, tokens, strict=True)]


class Texts:
    """Captions -> the context that transformers read, zero after each caption's tokens.

    The number of tokens that comes with a context lets the transformer attend the zeros as one.
    """

    def __init__(self, tokens_of: TokensOf, device: torch.device) -> None:
        self.tokens_of, self.device = tokens_of, device

    def __call__(self, captions: list[str]) -> tuple[Tensor, int]:
        """B captions -> context (B, 512, D), and the token from which on all of it is zero."""
        encoded = [tokens.to(self.device) for tokens in self.tokens_of(captions)]
        longest = -(-max(map(len, encoded)) // 8) * 8  # few lengths, few compilations
        context = encoded[0].new_zeros(len(encoded), TEXT_LENGTH, encoded[0].shape[1])
        for sample, tokens in zip(context, encoded, strict=True):
            sample[: len(tokens)] = tokens
        return context, min(longest, TEXT_LENGTH)
