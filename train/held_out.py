"""Clips that are kept from training, and the loss of a network on them.

The loss of training says little: every step draws other clips, noise levels and noises. Here all
three are the same at every save, so that only the weights change. Which clips are held out follows
from their names: runs of other settings are measured on the same ones. Videos of one name and other
content are two, and a file under two names is one.
"""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import torch

from train.conditioning import Texts
from train.data import LatentCache
from train.losses import flow_matching_loss
from train.parallel import Ranks
from train.rollout import autocast
from train.tensor_cache import key_of
from wan.errors import WanError
from wan.models.dit import WanDiT
from wan.sampling.denoiser import Condition, predict_velocity
from wan.sampling.flow import add_noise, velocity_target
from wan.sampling.noise import draw_noise, sample_generators
from wan.sampling.schedule import NUM_TIMESTEPS

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # noise levels at which the loss is measured
NOISE_SEED = 2_000_000  # of the first clip's noises; the next one has the next seed


def hold_out(cache: LatentCache, count: int) -> tuple[LatentCache, list[int]]:
    """Keep the clips of some videos from training.

    All samples, captions and copies of a video stay together. Where clips are added to the data,
    new ones may take the place of some that were held out, but none that was trained on does.

    Args:
        count: how many videos are held out.
    Returns:
        The clips to train on, and the numbers of those that are held out.
    Raises:
        WanError: nothing would be left to train on, or nothing of a folder that has a weight.
    """
    videos = sorted(set(cache.sources), key=lambda source: (key_of(source.name), source.content))
    if not videos:
        raise WanError(f"validation_clips={count}: the data has prompts only, and no clips")
    if len(videos) == 1:
        raise WanError(
            f"validation_clips={count}: the data has one clip only, which must be left to train "
            "on; preprocess more clips, or leave validation_clips= out"
        )
    if count >= len(videos):
        raise WanError(
            f"validation_clips={count}: the data has {len(videos)} different clips, and some must "
            f"be left to train on; give {len(videos) - 1} at most"
        )
    chosen = set(videos[:count])
    held = [number for number, video in enumerate(cache.sources) if video in chosen]
    rest = [[n for n in bucket if cache.sources[n] not in chosen] for bucket in cache.buckets]
    left = replace(cache, buckets=rest)
    if cache.weights and (emptied := cache.folders_of_clips() - left.folders_of_clips()):
        number = min(emptied)
        raise WanError(
            f"validation_clips={count}: all clips of folder {number + 1} of data.folder= would be "
            f"held out, and it has a weight of {cache.weights[number]:g}; give fewer "
            "validation_clips=, add clips to that folder, or leave it out with its weight"
        )
    return left, held


def said_of(cache: LatentCache, held: Sequence[int], most: int = 3) -> str:
    """One line about the clips that are held out."""
    names = [source.name for source in sorted({cache.sources[number] for number in held})]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    samples = f" in {len(held)} samples" if len(held) > len(names) else ""
    return (
        f"held out for validation: {len(names)} of {len(set(cache.sources))} clips{samples}: "
        f"{', '.join(names[:most])}{more}"
    )


@torch.no_grad()
def held_out_loss(
    dit: WanDiT,
    texts: Texts,
    cache: LatentCache,
    held: Sequence[int],
    bfloat16: bool,
    ranks: Ranks,
    prefix: str,
) -> dict[str, float]:
    """The flow-matching loss on clips, each with its caption, at `LEVELS` and with fixed noises.

    One forward at a time, so that a loss does not depend on the number of processes.

    Returns:
        `prefix`_sigma_0.1 and so on -> the mean over clips at that level; `prefix` -> that over
        levels too.
    """

    def losses_of(numbers: list[int]) -> list[list[float]]:
        return [losses(number) for number in numbers]

    def losses(number: int) -> list[float]:
        clip = held[number]
        x0 = cache.latents[clip][None].float().to(ranks.device)
        condition = Condition(*texts([cache.caption_of(clip, Random(number))]))
        generators = sample_generators(NOISE_SEED + number, 1)
        found = []
        for level in LEVELS:
            noise = draw_noise(x0.shape[1:], generators).to(ranks.device)
            sigma = torch.full((1,), level, device=ranks.device)
            x = add_noise(x0, noise, sigma)
            with autocast(ranks.device, bfloat16):
                velocity = predict_velocity(dit, x, NUM_TIMESTEPS * sigma, condition)
            found.append(flow_matching_loss(velocity, velocity_target(x0, noise)).item())
        return found

    by_clip = ranks.spread(losses_of, range(len(held)), 1, "held-out clips")
    ranks.reshard(dit)
    by_level = [sum(column) / len(by_clip) for column in zip(*by_clip, strict=True)]
    named = {f"{prefix}_sigma_{level}": x for level, x in zip(LEVELS, by_level, strict=True)}
    return {prefix: sum(by_level) / len(by_level), **named}
