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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from configs.data import MAX_REPEATS, DataConfig, parse_size, same_rate
from configs.progress import Steps, doing
from train.conditioning import (
    TEXT_LENGTH,
    CaptionEncoder,
    Texts,
    TokensOf,
    component_digests,
    load_frozen,
    text_dtype,
)
from train.parallel import Ranks
from train.tensor_cache import TensorStore, key_of, open_to_read
from wan.errors import WanError
from wan.files import MAX_RECORD_BYTES, expanded, parse_json, read_bytes, read_sealed
from wan.miniature.captions import caption
from wan.miniature.world import TWO_OBJECTS, Scene, render, sample_scene, scene_rng
from wan.models.tokenizer import Tokenizer
from wan.models.vae import WanVAE
from wan.pipeline.config import PipelineConfig, part_folder
from wan.settings import check_kinds, is_of
from wan.weights.checked import read_checked, write_checked

SHARD = 512  # clips per file of the world's cache
INDEX, REPORT = "index.json", "report.jsonl"  # of a folder that train.preprocess wrote
CONTENT = "file_sha256"  # of the clip's file, in a line of the report; older ones have none
SET_ASIDE = "set aside"  # the verdict of a clip that is not used; "ok" of one that is

DATA_DIGEST, DATA_CONTENT = "data_digest", "data_content"  # among the settings that a run keeps
FINEST = 10_000  # to one part of so many, weights of folders are exact

Shape = tuple[int, ...]


class Source(NamedTuple):
    """The video that a clip was taken from.

    Attributes:
        name: as the report has it.
        content: sha256 of the file; empty where older releases wrote the report, so that videos of
            one name are one.
    """

    name: str
    content: str = ""


@dataclass(frozen=True)
class Mixture:
    """Numbers of clips from several sources, in an endless stream.

    Attributes:
        parts: the numbers of each source; in an epoch of the source each comes as often as here.
        shares: whole numbers in proportion to how often the sources come.
    """

    parts: list[list[int]]
    shares: tuple[int, ...]

    def draw(self, step: int, size: int, seed: int) -> list[int]:
        """The numbers of one step: `size` places of the stream."""
        numbers = []
        for position in range(step * size, (step + 1) * size):
            source, place = chosen(self.shares, position, seed)
            part = self.parts[source]
            epoch, place = divmod(place, len(part))
            numbers.append(part[shuffled(len(part), seed, epoch)[place]])
        return numbers


@dataclass(frozen=True)
class Renewal:
    """How clips are replaced by new ones while training goes on.

    Attributes:
        passes: epochs before they are.
        clips: number of the generation, from 1 on -> its clips, which have no renewal.
    """

    passes: int
    clips: Callable[[int], "LatentCache"]


@dataclass
class LatentCache:
    """Latents of N clips, their captions, and the order in which they come.

    Attributes:
        latents: N of (C, T, h, w) float16: one tensor, or a sequence that reads them when indexed.
        caption_of: (number, rng) -> a caption; the world's clips have many.
        shapes: (C, T, h, w) of each bucket.
        buckets: numbers of the clips of each shape, as often as they come in an epoch; a batch is
            drawn from one bucket.
        captions: numbers of the captions, as often as they come in an epoch: one per clip, then
            the prompts that have no clip.
        folder_of: the folder of each caption, counted from 0, if there are several.
        weights: how often the folders come; empty: by what they hold, as if they were one.
        tokens_of: stored text embeddings, if there are any: captions -> (n, D) of each.
        digest: of the folders' content, so that a resumed run can tell whether it is the same.
        content: what is told of each folder if it is not.
        sources: the video that each clip was taken from, in folders: samples, captions and copies
            of one video have the same.
        renewal: how the clips are replaced by new ones; None: they stay.
    """

    latents: Tensor | Sequence[Tensor]
    caption_of: Callable[[int, random.Random], str]
    shapes: list[Shape] = field(default_factory=list)
    buckets: list[list[int]] = field(default_factory=list)
    captions: list[int] = field(default_factory=list)
    folder_of: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    tokens_of: TokensOf | None = None
    digest: str | None = None
    content: dict[str, Any] = field(default_factory=dict)
    sources: list[Source] = field(default_factory=list)
    renewal: Renewal | None = None

    def __post_init__(self) -> None:
        self.shapes = self.shapes or [tuple(self.latents[0].shape)]
        self.buckets = self.buckets or [list(range(len(self.latents)))]
        self.captions = self.captions or list(range(len(self.latents)))
        self.clip_mixtures, self.shares = self._mixed([b for b in self.buckets if b])
        (self.caption_mixture,), _ = self._mixed([self.captions])

    def __len__(self) -> int:
        return len(self.latents)

    def identity(self) -> dict[str, Any]:
        """What a run's settings keep of the data; nothing of the world, whose options say all."""
        known = {DATA_DIGEST: self.digest, DATA_CONTENT: self.content}
        return known if self.digest is not None else {}

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, list[str]]:
        """Batch number `step` of an endless, epoch-wise shuffled stream: float32 latents and texts.

        A function of its arguments alone: nothing to save, nothing to skip after a resume. Each
        bucket is a stream of its own, and batches are drawn from them in proportion to their clips.
        Of several folders with `weights`, the same holds for each folder within a bucket.

        Raises:
            WanError: there are no clips, or none in a folder that has a weight.
        """
        if self.renewal is not None:
            epoch = sum(map(len, self.buckets))
            generation, step = divmod(step, max(1, self.renewal.passes * epoch // size))
            if generation:
                return self.renewal.clips(generation).batch(step, size, seed)
        if not len(self):
            raise WanError("the data has prompts only, and this training needs clips")
        if self.weights and (empty := set(range(len(self.weights))) - self.folders_of_clips()):
            raise WanError(
                f"data.folder: number {min(empty) + 1} of them has no clips to train on, and "
                "this training needs some; leave it out with its weight"
            )
        bucket, number = chosen(self.shares, step, seed)
        indices = self.clip_mixtures[bucket].draw(number, size, seed)
        latents = torch.stack([self.latents[index] for index in indices])
        return latents.float(), self._captions(indices, step, seed)

    def prompts(self, step: int, size: int, seed: int) -> list[str]:
        """Captions of step `step` from a stream of the same kind, for training without clips."""
        return self._captions(self.caption_mixture.draw(step, size, seed), step, seed)

    def _captions(self, indices: list[int], step: int, seed: int) -> list[str]:
        return [
            self.caption_of(index, random.Random(f"{seed}/{step}/{place}"))
            for place, index in enumerate(indices)
        ]

    def repeats_in_batches(self, size: int) -> str | None:
        """A warning if batches of `size` clips hold one several times, as a bucket has fewer."""
        counts = zip(self.shapes, (len(set(bucket)) for bucket in self.buckets), strict=True)
        few = [
            f"{count} of latents {'x'.join(map(str, shape[1:]))}"
            for shape, count in counts
            if 0 < count < size
        ]
        if not few:
            return None
        return (
            f"warning: batch_size={size}: batches are of one size, and there are fewer clips to "
            f"train on ({', '.join(few)}, as frames x height x width), so batches hold a clip "
            "several times; give a smaller batch_size= or more clips"
        )

    def folders_of_clips(self) -> set[int]:
        """The folders that have clips to train on, counted from 0, if there are several."""
        return {self.folder_of[number] for bucket in self.buckets for number in bucket}

    def _mixed(self, groups: list[list[int]]) -> tuple[list[Mixture], tuple[int, ...]]:
        """A mixture for each group of numbers, and the shares of the groups."""
        if not self.weights:
            return [Mixture([group], (1,)) for group in groups], in_lowest_terms(map(len, groups))
        mixtures, sums = [], []
        totals = Counter(self.folder_of[number] for group in groups for number in group)
        for group in groups:
            parts: dict[int, list[int]] = {}
            for number in group:
                parts.setdefault(self.folder_of[number], []).append(number)
            weights = [
                Fraction(self.weights[folder]).limit_denominator(FINEST)
                * len(part)
                / totals[folder]
                for folder, part in parts.items()
            ]
            mixtures.append(Mixture(list(parts.values()), whole_shares(weights)))
            sums.append(sum(weights, Fraction(0)))
        return mixtures, whole_shares(sums)


def in_lowest_terms(numbers: Iterable[int]) -> tuple[int, ...]:
    """Whole numbers divided by their greatest common divisor."""
    found = tuple(numbers)
    return tuple(number // (math.gcd(*found) or 1) for number in found)


def whole_shares(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """The smallest whole numbers in proportion to weights, or nearly: with a sum of `FINEST`."""
    common = math.lcm(*(weight.denominator for weight in weights))
    shares = in_lowest_terms(int(weight * common) for weight in weights)
    if (total := sum(shares)) > FINEST:
        shares = in_lowest_terms(max(1, round(share * FINEST / total)) for share in shares)
    return shares


@lru_cache(maxsize=64)
def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch."""
    order = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=order).tolist()


def chosen(shares: tuple[int, ...], position: int, seed: int) -> tuple[int, int]:
    """Which of several streams stands at a position, and how many of its places came before.

    Positions go in turns. In a turn each stream comes as often as its share says, in a shuffled
    order. With the numbers of clips in lowest terms as shares, every clip is seen equally often.
    """
    if len(shares) == 1:
        return 0, position
    turn, place = divmod(position, sum(shares))
    return order_of_turn(shares, turn, seed)[place]


@lru_cache(maxsize=64)
def order_of_turn(shares: tuple[int, ...], turn: int, seed: int) -> list[tuple[int, int]]:
    """What `chosen` returns for each position of one turn."""
    choices = [stream for stream, share in enumerate(shares) for _ in range(share)]
    seen = [turn * share for share in shares]
    order = []
    for place in shuffled(len(choices), seed, turn):
        stream = choices[place]
        order.append((stream, seen[stream]))
        seen[stream] += 1
    return order


def world_cache(
    vae: WanVAE,
    root: Path,
    num_clips: int,
    seed: int,
    repeat_circling: int = 1,
    two_objects: float = TWO_OBJECTS,
    passes: int | None = None,
    generation: int = 0,
    first: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> LatentCache:
    """Encoded clips of the miniature's world; captions are drawn anew each time a clip is used.

    Args:
        root: the folder of all such caches; what is missing there is rendered and encoded first.
        repeat_circling: how often a clip with a circling object comes in an epoch.
        two_objects: share of scenes with two objects.
        passes: epochs after which the next generation of scenes takes the place of this one; it is
            rendered and encoded when its first batch is drawn. None: never.
        generation: the scenes begin after those of the generations before.
        first: lets one process render the next generation before the others read it.
    """
    numbers = range(generation * num_clips, (generation + 1) * num_clips)
    scenes = [
        sample_scene(scene_rng(seed, i), split="train", two_objects=two_objects) for i in numbers
    ]
    # The scenes and how one of them is drawn: another version of the world finds another cache.
    drawn = hashlib.sha256(render(scenes[:1]).numpy().tobytes()).hexdigest()
    folder = root / f"world-{digest(vae, [repr(scenes), drawn])}"
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[Tensor] = []
    with Steps("clips of the world", num_clips) as progress:
        for number, start in enumerate(range(0, num_clips, SHARD)):
            part = scenes[start : start + SHARD]
            path = folder / f"latents-{number:05d}.safetensors"
            shards.append(world_shard(vae, path, part, progress))
            progress.add(start + len(part) - progress.done)
    latents = torch.cat(shards)
    circling = [i for i, s in enumerate(scenes) if any(o.motion == "circling" for o in s.objects)]

    @lru_cache(maxsize=1)
    def later(generation: int) -> LatentCache:
        given = (vae, root, num_clips, seed, repeat_circling, two_objects)
        with first():
            return world_cache(*given, generation=generation)

    return LatentCache(
        latents,
        lambda i, rng: caption(scenes[i], rng).text,
        buckets=[[*range(num_clips)] + (repeat_circling - 1) * circling],
        renewal=None if passes is None else Renewal(passes, later),
    )


def world_shard(vae: WanVAE, path: Path, scenes: Sequence[Scene], progress: Steps) -> Tensor:
    """The latents (n, C, T, h, w) of some scenes: from their file, or made and written there.

    Args:
        progress: counts the scenes that are made.
    """
    if path.exists():
        try:
            latents = read_checked(path)["latents"]
            if len(latents) != len(scenes):
                raise WanError(f"{path}: {len(latents)} latents, {len(scenes)} clips")
            return latents
        except (WanError, KeyError) as error:
            print(f"warning: {error}; it is made again", file=sys.stderr)
    groups = [scenes[i : i + 8] for i in range(0, len(scenes), 8)]
    made = []
    for group in groups:
        made.append(encode_float16(vae, render(group)))
        progress.add(len(group))
    latents = torch.cat(made)
    write_checked(path, {"latents": latents})
    return latents


def open_data(
    data: DataConfig,
    settings: PipelineConfig,
    source: Path,
    ranks: Ranks,
    max_text_tokens: int = TEXT_LENGTH,
) -> tuple[LatentCache, Texts, WanVAE | None]:
    """Clips and their texts as a training command's `data.` options say.

    Args:
        settings, source: of the model whose vae, text_encoder and tokenizer are used.
        ranks: of all processes, which draw the same batches.
        max_text_tokens: for the world, whose captions are encoded while training.

    Returns:
        The clips, captions -> context, and for the world the autoencoder, to look at samples with.
    """
    data.check_source()
    device = ranks.device
    if data.folder:
        with doing("opening the encoded clips"):
            weights = component_digests(source) if data.check_weights else None
            cache = folder_cache(map(expanded, data.folder), weights, data.weights)
        for shape, bucket in zip(cache.shapes, cache.buckets, strict=True):
            if bucket:
                check_shape(shape, settings, ", ".join(data.folder))
        for each in cache.content.values() if ranks.is_main else ():
            made = each["settings"]
            if warning := other_rate(made["sizes"], made["fps"], settings.defaults.fps):
                print(f"warning: data.folder: {each['folder']}: {warning}", file=sys.stderr)
        assert cache.tokens_of is not None
        return cache, Texts(cache.tokens_of, device), None
    vae = load_frozen(source, "vae", settings.vae, device, torch.float32)
    clips = (data.num_clips, data.seed, data.repeat_circling, data.two_objects, data.passes)
    cache = world_cache(vae, expanded(data.cache_dir), *clips, first=ranks.main_first)
    return cache, world_texts(settings, source, device, max_text_tokens), vae


def other_rate(sizes: Sequence[str], fps: float, shown: float) -> str | None:
    """What comes of clips whose frame rate is not the one that the model's videos are shown with.

    Args:
        sizes: frames x height x width, of the clips; pictures have no rate.
        fps: frames per second of the clips that training sees.
        shown: frames per second of the model's own settings.
    """
    if same_rate(fps, shown) or all(parse_size(size)[0] == 1 for size in sizes):
        return None
    return (
        f"its clips have {fps:g} frames per second, and the model's videos are shown with "
        f"{shown:g}: what is learnt moves {shown / fps:.2g} times as fast there; encode clips with "
        f"fps={shown:g}, or show videos with fps={fps:g}"
    )


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
    """Latents of folders, read and checked each time one is indexed."""

    def __init__(self, places: list[tuple[TensorStore, str]]) -> None:
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: Any) -> Any:
        store, key = self.places[number]
        return store.read(key)


@dataclass(frozen=True)
class EncodedFolder:
    """What `train.preprocess` wrote into a folder, found complete.

    Attributes:
        lines: of the report, for the samples that are used.
        sha256: of the index.
    """

    path: Path
    index: dict[str, Any]
    lines: list[dict[str, Any]]
    latents: TensorStore
    texts: TensorStore
    sha256: str

    def content(self) -> dict[str, Any]:
        """What is told of it where it is not the folder that a run began with."""
        sizes = Counter(line["size"] for line in self.lines)
        return {
            "folder": str(self.path),
            "samples": len(self.lines),
            "clips": len({line.get("clip") for line in self.lines}),
            "prompts": len(self.index["prompts"]),
            "samples by size": ", ".join(f"{sizes[size]} of {size}" for size in sorted(sizes)),
            "settings": self.index["identity"],
            "sha256 of": {
                "captions": key_of([line["caption"] for line in self.lines]),
                "latents": key_of([self.latents.stored[x["key"]].sha256 for x in self.lines]),
                "repeats": key_of([line.get("repeats", 1) for line in self.lines]),
                "prompts": key_of(self.index["prompts"], self.index["negative_prompt"]),
            },
        }


def folder_cache(
    folders: Path | Iterable[Path],
    digests: dict[str, str] | None,
    weights: Sequence[float] | None = None,
) -> LatentCache:
    """Open what `train.preprocess` wrote; it needs neither autoencoder nor text encoder.

    Args:
        digests: of the vae and text_encoder it must have been made with; None: any.
        weights: of the folders, see `LatentCache`.

    Raises:
        WanError: not finished, incomplete, damaged, made with other weights, or the folders do not
            fit together.
    """
    paths = [folders] if isinstance(folders, Path) else list(folders)
    opened = [open_folder(path, digests) for path in paths]
    for other in opened[1:]:
        check_alike(opened[0], other)
    lines = [(number, line) for number, each in enumerate(opened) for line in each.lines]
    prompts = [
        (number, text) for number, each in enumerate(opened) for text in each.index["prompts"]
    ]
    captions = [line["caption"] for _, line in lines] + [text for _, text in prompts]
    buckets: dict[Shape, list[int]] = {
        tuple(shape): [] for each in opened for shape in each.index["latent_shapes"].values()
    }
    repeated: list[int] = []
    for number, (folder, line) in enumerate(lines):
        shape = tuple(opened[folder].index["latent_shapes"][line["size"]])
        times = [number] * line.get("repeats", 1)
        buckets[shape] += times
        repeated += times

    def tokens_of(texts: list[str]) -> list[Tensor]:
        return [stored_tokens(opened, text) for text in texts]

    shas = [each.sha256 for each in opened]
    return LatentCache(
        StoredLatents([(opened[folder].latents, line["key"]) for folder, line in lines]),
        lambda number, rng: captions[number],
        list(buckets),
        list(buckets.values()),
        [*repeated, *range(len(lines), len(captions))],
        [folder for folder, _ in [*lines, *prompts]],
        list(weights or []),
        tokens_of,
        shas[0] if len(shas) == 1 else key_of(shas),
        {str(number): each.content() for number, each in enumerate(opened, 1)},
        sources_of([line for _, line in lines]),
    )


def open_folder(folder: Path, digests: dict[str, str] | None) -> EncodedFolder:
    """One folder, with arguments and errors as for `folder_cache`."""
    index, lines, index_sha256 = read_index(folder)
    for name, digest in (digests or {}).items():
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
    return EncodedFolder(folder, index, good, latents, texts, index_sha256)


def check_alike(one: EncodedFolder, other: EncodedFolder) -> None:
    """Refuse two folders whose clips cannot be in one training, and say what differs."""

    def facts(folder: EncodedFolder) -> dict[str, Any]:
        channels = {shape[0] for shape in folder.index["latent_shapes"].values()}
        names = ("vae", "text_encoder", "text_dtype")
        return {
            "channels of latents": sorted(channels),
            **{name: folder.index["identity"][name] for name in names},
        }

    there, here = facts(one), facts(other)
    differ = [name for name in there if there[name] != here[name]]
    if differ:
        words = "; ".join(
            f"another {name}"
            if name in ("vae", "text_encoder")
            else f"{name}: {there[name]} and {here[name]}"
            for name in differ
        )
        raise WanError(
            f"data.folder: {one.path} and {other.path} do not go together ({words}); preprocess "
            "one of them again, with the other's checkpoint= and on the same kind of device="
        )


def stored_tokens(folders: Sequence[EncodedFolder], text: str) -> Tensor:
    """The embedding (n, D) of a text, from the first folder that has it."""
    for folder in folders:
        if (key := text_key(folder.index, text)) in folder.texts:
            return folder.texts.read(key)
    raise WanError(
        f"{folders[0].path}: no embedding of {text[:60]!r} there; run train.preprocess again with "
        "negative_prompt= or prompts="
    )


def data_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between the data of two runs, in words; nothing if they are the same.

    Args:
        before, now: settings with what `LatentCache.identity` returned among them.
    """
    if before.get(DATA_DIGEST) == now.get(DATA_DIGEST):
        return []
    if DATA_CONTENT not in before or DATA_CONTENT not in now:
        return ["data: other clips or captions; the checkpoint is too old to say which"]
    folders, others = before[DATA_CONTENT], now[DATA_CONTENT]
    if len(folders) != len(others):
        return [f"data.folder: {len(folders)} of them there, {len(others)} now"]
    return [
        f"{others[number]['folder']}: {change}"
        for number in others
        for change in content_changes(folders.get(number, {}), others[number])
    ] or ["data.folder: the folders' order"]


def content_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What differs between what `EncodedFolder.content` said of a folder, in words."""
    settings, others = before.get("settings", {}), now["settings"]
    for name in others | settings:
        if name in ("vae", "text_encoder") and settings.get(name) != others.get(name):
            yield f"encoded by another {name}"
        elif settings.get(name) != others.get(name):
            yield f"{name}: {settings.get(name)} there, {others.get(name)} now"
    counts = [name for name in now if name not in ("folder", "settings", "sha256 of")]
    changed = [name for name in counts if before.get(name) != now[name]]
    for name in changed:
        yield f"{name}: {before.get(name)} there, {now[name]} now"
    sums = before.get("sha256 of", {})
    for name, value in now["sha256 of"].items():
        counted = name in changed or (name != "prompts" and "samples" in changed)
        if sums.get(name) != value and not counted:
            yield f"other {name}"


def sources_of(lines: Sequence[dict[str, Any]]) -> list[Source]:
    """Each sample's video; it has the name of the first one of the files with the same content.

    The content is known by the files' sha256, whatever their names, sizes and folders. If a line
    has none, as older releases wrote them, it is known by the key, and the name says the rest.
    """
    known = all(CONTENT in line for line in lines)
    first: dict[str, Source] = {}
    for line in lines:
        name, content = line.get("clip", line["key"]), line[CONTENT] if known else ""
        first.setdefault(content or line["key"], Source(name, content))
    return [first[line[CONTENT] if known else line["key"]] for line in lines]


def as_text(lines: Iterable[Mapping[str, Any]]) -> str:
    """A report, as it is written."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


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
    if any(CONTENT in line for line in lines):  # which the keys follow from
        told = as_text([{n: x for n, x in line.items() if n != CONTENT} for line in lines])
        index |= {"report_sha256": hashlib.sha256(told.encode()).hexdigest()}
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
LINE_KINDS = {
    "verdict": TEXT,
    "caption": TEXT_OR_NONE,
    "key": TEXT,
    "size": TEXT,
    CONTENT: TEXT,
    "repeats": (int,),
}
NEEDED = ("verdict", "caption", "key", "size")
IDENTITY_KINDS = {
    "vae": TEXT,
    "text_encoder": TEXT,
    "max_text_tokens": (int,),
    "text_dtype": TEXT,
    "sizes": (list,),
    "fps": (int, float),
}


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
        good = NEEDED if line.get("verdict") == "ok" else ("verdict",)
        check_kinds(line, LINE_KINDS, f"{folder / REPORT}, line {number}", good)
        if not 1 <= line.get("repeats", 1) <= MAX_REPEATS:
            raise WanError(f"{folder / REPORT}, line {number}: damaged, its repeats are no number")


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
