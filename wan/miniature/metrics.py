"""How good a set of clips is: per clip, over the seeds of a caption, and as a distribution.

All functions are pure and none needs trained weights. Per-clip values come from the detectors;
distances come from fixed random convolutions, whose statistics are known to tell distributions of
images apart (Naeem et al., arXiv:2002.09797) and which no model was trained to please.

N clips, D features, C channels, R rounds of a bootstrap.
"""

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.errors import WanError
from wan.miniature.captions import Caption, Stated
from wan.miniature.detect import DetectedObject, Detection, Score
from wan.miniature.world import (
    ATTRIBUTES,
    OBJECT_ATTRIBUTES,
    STAGE,
    Scene,
    render,
    sample_scene,
    trajectory,
)

MEASURES = ("shape_iou", "residual", "motion_ratio", "saturation_ratio", "permanence")
FEATURE_SIDE = 64  # pixels of the clips that the convolutions see
WIDTHS = (3, 16, 32, 32)
# Which features a distance is of: everything, single frames, differences of frames
PARTS = {
    "all": slice(None),
    "appearance": slice(2 * WIDTHS[-1]),
    "motion": slice(2 * WIDTHS[-1], None),
}
SCALE_SCENES = 64  # whose features are the unit of all
GRID = 4  # cells per side of the stage, in which places are counted

# --- one clip -------------------------------------------------------------------------------------


def clip_measures(caption: Caption, score: Score) -> dict[str, float | None]:
    """Means over the objects of a caption that were found; None where there is nothing to measure.

    Returns:
        "shape_iou", "permanence": shares; "saturation_ratio": over that of the palette;
        "residual": rms distance from the fitted path in stage pixels; "motion_ratio": measured
        over nominal speed of the objects that should move, 0 for one that stands still.
    """
    pairs = [p for p in zip(caption.objects, score.matches, strict=True) if p[1] is not None]
    return {
        name: _mean([_measure(name, stated, item) for stated, item in pairs if item is not None])
        for name in MEASURES
    }


def _measure(name: str, stated: Stated, item: DetectedObject) -> float | None:
    if name != "motion_ratio":
        return getattr(item, name)
    return None if stated.motion in (None, "still") else item.motion_ratio or 0.0


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


# --- the seeds of one caption ---------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """What a clip of one object shows beyond its caption; None where detectors cannot tell.

    Attributes:
        unsaid: attribute -> value, for those that the caption leaves open.
        place: mean centre of the object in stage pixels, which no caption speaks of. Unlike the
            centre in the first frame, it does not depend on the motion.
    """

    unsaid: dict[str, str | None]
    place: tuple[float, float] | None


def shown_by_clip(caption: Caption, detection: Detection, score: Score) -> Shown:
    """What the detectors read from a clip."""
    (item,) = score.matches
    unsaid = {name: getattr(item, name, None) for name in _unsaid(caption)}
    if "background" in unsaid:
        unsaid["background"] = detection.background
    return Shown(unsaid, None if item is None else (item.x, item.y))


def shown_by_scene(caption: Caption, scene: Scene, num_frames: int) -> Shown:
    """What a clip of this scene would show."""
    (item,) = scene.objects
    unsaid: dict[str, str | None] = {name: getattr(item, name, None) for name in _unsaid(caption)}
    if "background" in unsaid:
        unsaid["background"] = scene.background
    path = trajectory(item, num_frames)
    x, y = (sum(values) / num_frames for values in zip(*path, strict=True))
    return Shown(unsaid, (x, y))


def _unsaid(caption: Caption) -> list[str]:
    if len(caption.objects) != 1:
        raise WanError(f"{caption.text!r}: diversity is measured on captions of one object")
    names = [name for name in OBJECT_ATTRIBUTES if getattr(caption.objects[0], name) is None]
    return names + (["background"] if caption.background is None else [])


def seed_diversity(clips: Sequence[Shown]) -> dict[str, float | None]:
    """How much the clips of one caption differ. To be read beside the same of as many true scenes.

    What cannot be told counts as a repeat of what is shown most, so that broken clips never look
    diverse.

    Returns:
        "entropy": of the unsaid attributes, over the logarithm of their number of values, mean over
        attributes; None if the caption says everything. "cells": distinct places on a 4 x 4 grid.
        "spread": standard deviation of the place in stage pixels.
    """
    entropies: list[float | None] = []
    for name in clips[0].unsaid:
        counts = Counter(clip.unsaid[name] for clip in clips)
        untold = counts.pop(None, 0)
        commonest = max(counts, key=lambda value: counts[value]) if counts else None
        counts[commonest] += untold
        shares = [count / len(clips) for count in counts.values()]
        entropy = -sum(share * math.log(share) for share in shares if share > 0)
        entropies.append(entropy / math.log(len(ATTRIBUTES[name])))
    places = [clip.place for clip in clips if clip.place is not None]
    cells = {tuple(int(c * GRID / STAGE) for c in place) for place in places}
    spread = 0.0
    if places:
        offsets = torch.tensor(places, dtype=torch.float64)
        offsets = offsets - offsets.mean(0)
        spread = math.sqrt(float(offsets.square().sum()) / max(len(clips) - 1, 1))
    return {"entropy": _mean(entropies), "cells": float(len(cells)), "spread": spread}


# --- sets of clips --------------------------------------------------------------------------------


@cache
def _kernels() -> tuple[Tensor, ...]:
    """The fixed convolutions: weights (C', C, 3, 3) that keep the scale under ReLU."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(outputs, inputs, 3, 3, generator=generator) * math.sqrt(2 / (9 * inputs))
        for inputs, outputs in itertools.pairwise(WIDTHS)
    )


def clip_features(video: Tensor) -> Tensor:
    """Features of one clip (3, F, H, W) in [-1, 1]: (D,) float32, see `PARTS`.

    The first half is of single frames, the second of the differences of successive frames, so that
    what things look like and how they move can be told apart. All are in units of their deviation
    from their mean over some fixed scenes, so that distances don't depend on what is compared.
    """
    mean, deviation = _scale()
    return (_raw_features(video) - mean) / deviation


@cache
def _scale() -> tuple[Tensor, Tensor]:
    """Mean and deviation of every feature over scenes of the world: (D,) each."""
    scenes = [sample_scene(random.Random(f"features/{i}"), "any") for i in range(SCALE_SCENES)]
    videos = render(scenes, height=FEATURE_SIDE, width=FEATURE_SIDE)
    features = torch.stack([_raw_features(video) for video in videos])
    return features.mean(0), features.std(0)


def _raw_features(video: Tensor) -> Tensor:
    frames = F.interpolate(video.float().transpose(0, 1), size=FEATURE_SIDE, mode="area")
    return torch.cat([_random_features(frames), _random_features(frames.diff(dim=0))])


def _random_features(x: Tensor) -> Tensor:
    """Mean and deviation of each channel: (F, 3, h, w) -> (2 C,)."""
    for kernel in _kernels():
        x = F.conv2d(x, kernel, stride=2, padding=1).relu()
    channels = x.transpose(0, 1).flatten(1)  # (C, F h w)
    return torch.cat([channels.mean(1), channels.std(1)])


def frechet_distance(clips: Tensor, truth: Tensor) -> float:
    """|m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)) of features (N, D), in float64.

    Source: Heusel et al., arXiv:1706.08500. Biased upwards for small N: compare only equal N.
    """
    clips, truth = clips.double(), truth.double()
    root = _root(torch.cov(clips.T))
    overlap = torch.linalg.eigvalsh(root @ torch.cov(truth.T) @ root).clamp(min=0).sqrt().sum()
    traces = clips.var(0).sum() + truth.var(0).sum()
    return float((clips.mean(0) - truth.mean(0)).square().sum() + traces - 2 * overlap)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def kernel_terms(clips: Tensor, truth: Tensor) -> Tensor:
    """What each pair of captions adds to the kernel distance: (N, N), zero on the diagonal.

    Row i of both is of caption i. The kernel is (x . y / D + 1)^3 (KID: arXiv:1801.01401), the
    estimator the U-statistic of pairs of Gretton et al., JMLR 2012, lemma 6: without a bias,
    although a clip and the truth of the same caption are not independent.

    Args:
        clips, truth: features (N, D), at least two rows.
    """
    clips, truth = clips.double(), truth.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    between = kernel(clips, truth)
    terms = kernel(clips, clips) + kernel(truth, truth) - between - between.T
    return terms.fill_diagonal_(0)


def kernel_distance(terms: Tensor, counts: Tensor | None = None) -> Tensor:
    """Unbiased squared MMD from `kernel_terms`, for each row of counts (R, N): (R,).

    A caption that was drawn twice is not paired with itself. Without counts: every caption once.
    """
    if counts is None:
        counts = torch.ones(1, len(terms), dtype=terms.dtype)
    pairs = counts.sum(1).square() - counts.square().sum(1)
    return ((counts @ terms) * counts).sum(1) / pairs
