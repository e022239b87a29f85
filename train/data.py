"""Clips as cached latents with captions, in an order that resumed runs repeat exactly.

Two sources: the miniature's world, rendered and encoded here, and a folder that `train.preprocess`
wrote. The world's cache is a folder of safetensors shards, each with one tensor `latents`
(n, C, T, h, w) in float16 and a digest of it. The folder's name holds a digest of what they depend
on: scenes, sizes, and the weights of the autoencoder. Another autoencoder finds another cache,
never a stale one.
"""

import hashlib
import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from configs.data import DataConfig
from train.conditioning import (
    TEXT_LENGTH,
    CaptionEncoder,
    Texts,
    TokensOf,
    component_digests,
    load_frozen,
    text_dtype,
)
from train.tensor_cache import TensorStore, key_of, open_to_read
from wan.errors import WanError
from wan.files import MAX_RECORD_BYTES, expanded, parse_json, read_bytes, read_sealed
from wan.miniature.captions import caption
from wan.miniature.world import Scene, render, sample_scene, scene_rng
from wan.models.tokenizer import Tokenizer
from wan.models.vae import WanVAE
from wan.pipeline.config import PipelineConfig, part_folder
from wan.settings import check_kinds, is_of
from wan.weights.checked import read_checked, write_checked

SHARD = 512  # clips per file of the world's cache
INDEX, REPORT = "index.json", "report.jsonl"  # of a folder that train.preprocess wrote
SET_ASIDE = "set aside"  # the verdict of a clip that is not used; "ok" of one that is

Shape = tuple[int, ...]


@dataclass
class LatentCache:
    """Latents of N clips, their captions, and the order in which they come.

    Attributes:
        latents: N of (C, T, h, w) float16: one tensor, or a sequence that reads them when indexed.
        caption_of: (number, rng) -> a caption; the world's clips have many.
        shapes: (C, T, h, w) of each bucket.
        buckets: numbers of the clips of each shape; a batch is drawn from one bucket.
        num_captions: number of captions: one per clip, then the prompts that have no clip.
        tokens_of: stored text embeddings, if there are any: captions -> (n, D) of each.
        digest: of a folder's content, so that a resumed run can tell whether it is the same.
        sources: the name of the video that each clip was taken from, in a folder: samples, captions
            and copies of one video have the same.
    """

    latents: Tensor | Sequence[Tensor]
    caption_of: Callable[[int, random.Random], str]
    shapes: list[Shape] = field(default_factory=list)
    buckets: list[list[int]] = field(default_factory=list)
    num_captions: int = 0
    tokens_of: TokensOf | None = None
    digest: str | None = None
    sources: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.shapes = self.shapes or [tuple(self.latents[0].shape)]
        self.buckets = self.buckets or [list(range(len(self.latents)))]
        self.num_captions = self.num_captions or len(self.latents)

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, list[str]]:
        """Batch number `step` of an endless, epoch-wise shuffled stream: float32 latents and texts.

        A function of its arguments alone: nothing to save, nothing to skip after a resume. Each
        bucket is a stream of its own, and batches are drawn from them in proportion to their clips.

        Raises:
            WanError: there are prompts only.
        """
        if not len(self):
            raise WanError("the data has prompts only, and this training needs clips")
        sizes = tuple(len(bucket) for bucket in self.buckets if bucket)
        bucket, number = bucket_of(sizes, step, seed)
        members = [bucket for bucket in self.buckets if bucket][bucket]
        indices = [members[place] for place in stream(len(members), number, size, seed)]
        latents = torch.stack([self.latents[index] for index in indices])
        return latents.float(), self._captions(indices, step, seed)

    def prompts(self, step: int, size: int, seed: int) -> list[str]:
        """Captions of step `step` from a stream of the same kind, for training without clips."""
        return self._captions(stream(self.num_captions, step, size, seed), step, seed)

    def _captions(self, indices: list[int], step: int, seed: int) -> list[str]:
        return [
            self.caption_of(index, random.Random(f"{seed}/{step}/{place}"))
            for place, index in enumerate(indices)
        ]


def stream(count: int, step: int, size: int, seed: int) -> list[int]:
    """The numbers of one step: `size` numbers below `count`, each of which comes once per epoch."""
    numbers = []
    for position in range(step * size, (step + 1) * size):
        epoch, place = divmod(position, count)
        numbers.append(shuffled(count, seed, epoch)[place])
    return numbers


@lru_cache(maxsize=16)
def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch."""
    order = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=order).tolist()


def bucket_of(sizes: tuple[int, ...], step: int, seed: int) -> tuple[int, int]:
    """The bucket that batch `step` is drawn from, and how many of its batches came before.

    Steps go in turns. In a turn, each bucket has as many batches as its number of clips divided by
    the greatest common divisor of all buckets' numbers, in a shuffled order: so every clip is seen
    equally often.
    """
    turn, place = divmod(step, sum(sizes) // math.gcd(*sizes))
    return turn_of_buckets(sizes, turn, seed)[place]


@lru_cache(maxsize=4)
def turn_of_buckets(sizes: tuple[int, ...], turn: int, seed: int) -> list[tuple[int, int]]:
    """What `bucket_of` returns for each step of one turn."""
    shares = [size // math.gcd(*sizes) for size in sizes]
    choices = [bucket for bucket, share in enumerate(shares) for _ in range(share)]
    seen = [turn * share for share in shares]
    order = []
    for place in shuffled(len(choices), seed, turn):
        bucket = choices[place]
        order.append((bucket, seen[bucket]))
        seen[bucket] += 1
    return order


def world_cache(
    vae: WanVAE, root: Path, num_clips: int, seed: int, repeat_circling: int = 1
) -> LatentCache:
    """Encoded clips of the miniature's world; captions are drawn anew each time a clip is used.

    Args:
        root: the folder of all such caches; what is missing there is rendered and encoded first.
        repeat_circling: how often a clip with a circling object comes in an epoch.
    """
    scenes = [sample_scene(scene_rng(seed, i), split="train") for i in range(num_clips)]
    # The scenes and how one of them is drawn: another version of the world finds another cache.
    drawn = hashlib.sha256(render(scenes[:1]).numpy().tobytes()).hexdigest()
    folder = root / f"world-{digest(vae, [repr(scenes), drawn])}"
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[Tensor] = []
    with tqdm(total=num_clips, desc="clips of the world", unit="clip", disable=None) as progress:
        for number, start in enumerate(range(0, num_clips, SHARD)):
            part = scenes[start : start + SHARD]
            path = folder / f"latents-{number:05d}.safetensors"
            shards.append(world_shard(vae, path, part))
            progress.update(len(part))
    latents = torch.cat(shards)
    numbers = list(range(num_clips))
    circling = [i for i in numbers if any(o.motion == "circling" for o in scenes[i].objects)]
    return LatentCache(
        latents,
        lambda i, rng: caption(scenes[i], rng).text,
        buckets=[numbers + (repeat_circling - 1) * circling],
    )


def world_shard(vae: WanVAE, path: Path, scenes: Sequence[Scene]) -> Tensor:
    """The latents (n, C, T, h, w) of some scenes: from their file, or made and written there."""
    if path.exists():
        try:
            latents = read_checked(path)["latents"]
            if len(latents) != len(scenes):
                raise WanError(f"{path}: {len(latents)} latents, {len(scenes)} clips")
            return latents
        except (WanError, KeyError) as error:
            print(f"warning: {error}; it is made again", file=sys.stderr)
    groups = [scenes[i : i + 8] for i in range(0, len(scenes), 8)]
    latents = torch.cat([encode_float16(vae, render(group)) for group in groups])
    write_checked(path, {"latents": latents})
    return latents


def open_data(
    data: DataConfig,
    settings: PipelineConfig,
    source: Path,
    device: torch.device,
    max_text_tokens: int = TEXT_LENGTH,
) -> tuple[LatentCache, Texts, WanVAE | None]:
    """Clips and their texts as a training command's `data.` options say.

    Args:
        settings, source: of the model whose vae, text_encoder and tokenizer are used.
        max_text_tokens: for the world, whose captions are encoded while training.

    Returns:
        The clips, captions -> context, and for the world the autoencoder, to look at samples with.
    """
    data.check_source()
    if data.folder is not None:
        weights = component_digests(source) if data.check_weights else None
        cache = folder_cache(expanded(data.folder), weights)
        for shape, bucket in zip(cache.shapes, cache.buckets, strict=True):
            if bucket:
                check_shape(shape, settings, data.folder)
        assert cache.tokens_of is not None
        return cache, Texts(cache.tokens_of, device), None
    vae = load_frozen(source, "vae", settings.vae, device, torch.float32)
    cache = world_cache(
        vae, expanded(data.cache_dir), data.num_clips, data.seed, data.repeat_circling
    )
    return cache, world_texts(settings, source, device, max_text_tokens), vae


def world_texts(
    settings: PipelineConfig, source: Path, device: torch.device, max_tokens: int
) -> Texts:
    """Captions -> context, by a model's own text encoder."""
    encoder = load_frozen(source, "text_encoder", settings.text_encoder, device, text_dtype(device))
    tokenizer = Tokenizer.from_folder(part_folder(source, "tokenizer"))
    return Texts(CaptionEncoder(encoder, tokenizer, max_tokens), device)


def check_shape(shape: Shape, settings: PipelineConfig, folder: str) -> None:
    """Raise a WanError if the transformer does not take a folder's latents."""
    try:
        settings.transformer.token_grid(shape[1:])
    except WanError as error:
        raise WanError(
            f"data.folder={folder}: this transformer takes no clips of that size ({error}); "
            "preprocess them with other sizes="
        ) from error


class StoredLatents(Sequence[Tensor]):
    """Latents of a folder, read and checked each time one is indexed."""

    def __init__(self, store: TensorStore, keys: list[str]) -> None:
        self.store, self.keys = store, keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: Any) -> Any:
        return self.store.read(self.keys[number])


def folder_cache(folder: Path, weights: dict[str, str] | None) -> LatentCache:
    """Open what `train.preprocess` wrote; it needs neither autoencoder nor text encoder.

    Args:
        weights: digests of the vae and text_encoder it must have been made with; None: any.

    Raises:
        WanError: not finished, incomplete, damaged, or made with other weights.
    """
    index, lines, index_sha256 = read_index(folder)
    for name, digest in (weights or {}).items():
        if index["identity"][name] != digest:
            raise WanError(
                f"{folder}: was made with another {name} than this checkpoint's; preprocess the "
                "clips again, or data.check_weights=false if only dtype or layout differ"
            )
    good = [line for line in lines if line["verdict"] == "ok"]
    latents, texts = open_to_read(folder, "latents"), open_to_read(folder, "texts")
    captions = [line["caption"] for line in good] + index["prompts"]
    stored = {*captions, "", index["negative_prompt"] or ""}
    clip_keys = [line["key"] for line in good]
    text_keys = [text_key(index, text) for text in stored]
    again = "run train.preprocess there again with the same settings"
    for what, keys, store in (("clips", clip_keys, latents), ("texts", text_keys, texts)):
        if missing := [key for key in keys if key not in store]:
            raise WanError(f"{folder}: {len(missing)} of {len(keys)} {what} are missing; {again}")
    content = content_digest(latents, clip_keys, texts, text_keys)
    if index["content_sha256"] != content:
        raise WanError(
            f"{folder}: its latents or texts are not those that {INDEX} was written for; {again}"
        )

    def tokens_of(captions: list[str]) -> list[Tensor]:
        try:
            return [texts.read(text_key(index, text)) for text in captions]
        except KeyError as error:
            known = [text_key(index, text) in texts for text in captions]
            unknown = captions[known.index(False)]
            raise WanError(
                f"{folder}: no embedding of {unknown[:60]!r} there; run train.preprocess again "
                "with negative_prompt= or prompts="
            ) from error

    shapes = [tuple(shape) for shape in index["latent_shapes"].values()]
    buckets = [
        [number for number, line in enumerate(good) if line["size"] == size]
        for size in index["latent_shapes"]
    ]
    return LatentCache(
        StoredLatents(latents, clip_keys),
        lambda number, rng: captions[number],
        shapes,
        buckets,
        len(captions),
        tokens_of,
        index_sha256,
        sources_of(good),
    )


def sources_of(lines: Sequence[dict[str, Any]]) -> list[str]:
    """The name of each sample's video; that of the first one for files with the same content."""
    first: dict[str, str] = {}
    return [first.setdefault(line["key"], line.get("clip", line["key"])) for line in lines]


def content_digest(
    latents: TensorStore, clip_keys: list[str], texts: TensorStore, text_keys: list[str]
) -> str:
    """Digest of the stored sha256 of all clips and texts, in key order; no tensor is read."""
    return key_of(
        [latents.stored[key].sha256 for key in clip_keys],
        [texts.stored[key].sha256 for key in sorted(text_keys)],
    )


def read_index(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """The index, the report's lines and the index's sha256, of a folder that is complete.

    Raises:
        WanError: the folder is not complete.
    """
    if not (folder / INDEX).exists():
        raise WanError(f"data.folder={folder}: not a folder of train.preprocess: no {INDEX} there")
    again = "run train.preprocess there again with the same settings"
    try:
        index = read_sealed(folder / INDEX)
        report = read_bytes(folder / REPORT, MAX_RECORD_BYTES)
        complete = index["report_sha256"] == hashlib.sha256(report).hexdigest()
        texts = report.decode().split("\n") if complete else []
        lines = [parse_json(text, f"{folder / REPORT}") for text in texts if text]
    except (FileNotFoundError, KeyError, UnicodeDecodeError):  # what is written last
        complete = False
    except WanError as error:
        raise WanError(f"data.folder={folder}: {error}; {again}") from error
    if not complete:
        raise WanError(
            f"data.folder={folder}: the last run of train.preprocess there did not finish, or its "
            f"{REPORT} is damaged; {again}"
        )
    try:
        check_index(index, lines, folder)
    except WanError as error:
        raise WanError(f"data.folder={folder}: {error}; {again}") from error
    # The digest of what older releases wrote: a resumed run must find its data unchanged.
    written = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
    return index, lines, hashlib.sha256(written.encode()).hexdigest()


TEXT = (str,)
TEXT_OR_NONE = (str, type(None))
INDEX_KINDS = {
    "identity": (dict,),
    "latent_shapes": (dict,),
    "prompts": (list,),
    "negative_prompt": TEXT_OR_NONE,
    "content_sha256": TEXT,
}
LINE_KINDS = {"verdict": TEXT, "caption": TEXT_OR_NONE, "key": TEXT, "size": TEXT}
IDENTITY_KINDS = {"vae": TEXT, "text_encoder": TEXT, "max_text_tokens": (int,), "text_dtype": TEXT}


def check_index(index: dict[str, Any], lines: list[dict[str, Any]], folder: Path) -> None:
    """Refuse an index or a report whose entries are missing or of other types."""
    source = str(folder / INDEX)
    check_kinds(index, INDEX_KINDS, source, INDEX_KINDS)
    check_kinds(index["identity"], IDENTITY_KINDS, f"{source}, identity", IDENTITY_KINDS)
    shapes = index["latent_shapes"].values()
    is_shape = [isinstance(s, list) and [is_of(int, n) for n in s] == [True] * 4 for s in shapes]
    if not all(is_shape) or not all(isinstance(prompt, str) for prompt in index["prompts"]):
        raise WanError(f"{source}: damaged, its prompts are no texts or its shapes no sizes")
    for number, line in enumerate(lines, 1):
        good = LINE_KINDS if line.get("verdict") == "ok" else ("verdict",)
        check_kinds(line, LINE_KINDS, f"{folder / REPORT}, line {number}", good)


def text_key(index: dict[str, Any], text: str) -> str:
    """The key of a text's embedding: a digest of the text and of how texts are encoded."""
    identity = index["identity"]
    return key_of(*(identity[n] for n in ("text_encoder", "max_text_tokens", "text_dtype")), text)


@torch.no_grad()
def encode_float16(vae: WanVAE, video: Tensor, chunk: int | None = None) -> Tensor:
    """Normalised latents; `chunk` frames at a time keep memory small for large clips."""
    device = vae.quant_conv.weight.device
    return vae.encode_normalized(video.to(device), chunk).half().cpu()


def digest(vae: WanVAE, what: list) -> str:
    """Twelve hex digits of everything a cache's content follows from."""
    sha = hashlib.sha256(json.dumps(what).encode())
    sha.update(json.dumps(vae.config.to_json(), sort_keys=True).encode())
    for name, weight in sorted(vae.state_dict().items()):
        sha.update(name.encode())
        sha.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return sha.hexdigest()[:12]
