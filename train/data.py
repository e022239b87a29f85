"""Clips as cached latents with captions, in an order that resumed runs repeat exactly.

A cache is a folder of safetensors shards, each with one tensor `latents` (n, C, T, h, w) in
float16, and `clips.jsonl`, a JSON object per clip. Its name holds a digest of what it depends on:
source, sizes, and the weights of the autoencoder. Another autoencoder finds another cache, never a
stale one.
"""

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from wan.errors import WanError
from wan.miniature.captions import caption
from wan.miniature.world import render, sample_scene, scene_rng
from wan.vae import WanVAE
from wan.video import read_video

SHARD = 512  # clips per file


@dataclass
class LatentCache:
    """Latents of N clips and what can be said of each.

    `caption_of(index, rng)` gives a text for a clip; the world's clips have many.
    """

    latents: Tensor  # (N, C, T, h, w) float16
    caption_of: Callable[[int, random.Random], str]
    captions: list[str] | None = None  # all there are; None: no end of them

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, list[str]]:
        """Batch number `step` of an endless, epoch-wise shuffled stream: float32 latents and texts.

        A function of its arguments alone: nothing to save, nothing to skip after a resume.
        """
        indices = []
        for position in range(step * size, (step + 1) * size):
            epoch, place = divmod(position, len(self))
            indices.append(shuffled(len(self), seed, epoch)[place])
        captions = [
            self.caption_of(index, random.Random(f"{seed}/{step}/{row}"))
            for row, index in enumerate(indices)
        ]
        return self.latents[indices].float(), captions


@lru_cache(maxsize=2)
def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch."""
    order = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=order).tolist()


def world_cache(vae: WanVAE, root: Path, num_clips: int, seed: int) -> LatentCache:
    """Encoded clips of the miniature's world; captions are drawn anew each time a clip is used."""
    scenes = [sample_scene(scene_rng(seed, i), split="train") for i in range(num_clips)]

    def batches() -> Iterator[tuple[Tensor, list[dict]]]:
        for start in range(0, num_clips, SHARD):
            part = scenes[start : start + SHARD]
            latents = [encode_float16(vae, render(part[i : i + 8])) for i in range(0, len(part), 8)]
            yield torch.cat(latents), [{"scene": start + i} for i in range(len(part))]

    # The scenes and how one of them is drawn: another version of the world finds another cache.
    drawn = hashlib.sha256(render(scenes[:1]).numpy().tobytes()).hexdigest()
    folder = root / f"world-{digest(vae, [repr(scenes), drawn])}"
    latents, _ = cached(folder, batches, num_clips)
    return LatentCache(latents, lambda i, rng: caption(scenes[i], rng).text)


def folder_cache(
    vae: WanVAE, source: Path, root: Path, num_frames: int, height: int, width: int, fps: float
) -> LatentCache:
    """Encoded clips of a folder: `name.mp4` beside `name.txt` with its caption.

    A clip is read from its start, must have at least `num_frames` frames at `fps`, is scaled to
    cover `height` x `width` and centre-cropped.
    Raises:
        WanError: no clips, a clip without caption, unreadable, too short, or at another frame rate.
    """
    clips = sorted(p for p in source.glob("*.mp4"))
    if not clips:
        raise WanError(f"data.folder={source}: no .mp4 files there")
    captions = []
    for clip in clips:
        text = clip.with_suffix(".txt")
        if not text.is_file() or not text.read_text(encoding="utf-8").strip():
            raise WanError(f"{clip}: its caption is missing; write one sentence into {text.name}")
        captions.append(text.read_text(encoding="utf-8").strip())

    def batches() -> Iterator[tuple[Tensor, list[dict]]]:
        for start in range(0, len(clips), SHARD):
            part = clips[start : start + SHARD]
            latents = [
                encode_float16(vae, read_clip(clip, num_frames, height, width, fps)[None], chunk=16)
                for clip in part
            ]
            yield torch.cat(latents), [{"file": clip.name} for clip in part]

    content = [[c.name, c.stat().st_size, c.stat().st_mtime_ns] for c in clips]
    folder = root / f"clips-{digest(vae, [content, num_frames, height, width, fps])}"
    latents, _ = cached(folder, batches, len(clips))
    return LatentCache(latents, lambda i, rng: captions[i], captions)


def read_clip(path: Path, num_frames: int, height: int, width: int, fps: float) -> Tensor:
    """The first `num_frames` frames: (3, F, height, width) in [-1, 1]."""
    frames, info = read_video(path)  # (F, H, W, 3) uint8
    if abs(info.fps - fps) > 0.01 * fps:
        raise WanError(f"{path}: {info.fps:g} fps, data.fps={fps:g}; re-time the clip first")
    if len(frames) < num_frames:
        raise WanError(f"{path}: {len(frames)} frames, data.num_frames={num_frames} are needed")
    video = torch.as_tensor(frames[:num_frames]).permute(0, 3, 1, 2).float() / 127.5 - 1
    scale = max(height / video.shape[2], width / video.shape[3])
    size = [max(height, round(video.shape[2] * scale)), max(width, round(video.shape[3] * scale))]
    video = torch.nn.functional.interpolate(video, size, mode="bilinear", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return video[:, :, top : top + height, left : left + width].permute(1, 0, 2, 3).clamp(-1, 1)


@torch.no_grad()
def encode_float16(vae: WanVAE, video: Tensor, chunk: int | None = None) -> Tensor:
    """Normalised latents; `chunk` frames at a time keep memory small for large clips."""
    device = vae.quant_conv.weight.device
    return vae.encode(video.to(device), chunk).half().cpu()


def digest(vae: WanVAE, what: list) -> str:
    """Twelve hex digits of everything a cache's content follows from."""
    sha = hashlib.sha256(json.dumps(what).encode())
    sha.update(json.dumps(vae.config.to_json(), sort_keys=True).encode())
    for name, weight in sorted(vae.state_dict().items()):
        sha.update(name.encode())
        sha.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return sha.hexdigest()[:12]


def cached(
    folder: Path, batches: Callable[[], Iterator[tuple[Tensor, list[dict]]]], count: int
) -> tuple[Tensor, list[dict]]:
    """Read the cache, or write it first; `clips.jsonl` comes last and marks it complete."""
    listing = folder / "clips.jsonl"
    if not listing.exists():
        folder.mkdir(parents=True, exist_ok=True)
        lines: list[dict] = []
        with tqdm(total=count, desc="encoding clips", unit="clip") as progress:
            for number, (latents, rows) in enumerate(batches()):
                save_file({"latents": latents}, folder / f"latents-{number:05d}.safetensors")
                lines += rows
                progress.update(len(rows))
        beside = folder / f".clips.jsonl-{os.getpid()}"
        beside.write_text("".join(json.dumps(line) + "\n" for line in lines))
        beside.replace(listing)
    parts = []
    for path in sorted(folder.glob("latents-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            parts.append(file.get_tensor("latents"))
    rows = [json.loads(line) for line in listing.read_text().splitlines()]
    latents = torch.cat(parts)
    if not len(latents) == len(rows) == count:
        raise WanError(
            f"{folder}: {len(latents)} latents, {len(rows)} rows, {count} clips; delete it"
        )
    return latents, rows
