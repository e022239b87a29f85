"""What is measured of one video: pure functions of embeddings and frames.

F frames, H W pixels, P prompts, D channels of an embedding of length 1.
"""

import itertools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wan.errors import WanError

Frames = NDArray[np.uint8]
LONGEST = 512  # pixels: flow is computed on frames that are no larger
TOP = 0.05  # share of the pixels that move most

MEANING = {
    "text": (
        "Text agreement is 100 times the mean cosine of the prompt and the frames in CLIP's space "
        "(CLIPScore, arXiv:2104.08718, without its factor). It says whether the things and the "
        "place that the prompt names are there. It hardly knows numbers, left and right, which "
        "colour belongs to which thing, and what moves how. Levels of different prompts or CLIP "
        "models do not compare."
    ),
    "text_rank": (
        "Own prompt is the share of the other prompts that agree less with the video than its own: "
        "50 % for a model that reads none, 100 % where each video is told apart."
    ),
    "consistency": (
        "Consistency is 100 times the mean cosine of a frame with the first and with the one "
        "before (the subject consistency of VBench, arXiv:2311.17982). It falls when things change "
        "their look or vanish. A video that stands still has 100: read it beside motion."
    ),
    "motion": (
        "Motion is the mean optical flow of the 5 % of pixels that move most, in percent of the "
        "frame's diagonal per second (DIS flow, arXiv:1603.03590; cf. VBench's dynamic degree). "
        "It counts flicker and a moving camera too, and says nothing of whether the motion is the "
        "one that was asked for."
    ),
}


def evenly_spaced(frames: Frames, count: int) -> Frames:
    """At most `count` of the frames (F, H, W, 3), the first and the last among them."""
    if len(frames) <= count:
        return frames
    return frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]


def agreement(frames: Tensor, texts: Tensor) -> list[float]:
    """100 times the mean cosine of the frames (F, D) with each text (P, D): P numbers."""
    return (100 * (texts.double() @ frames.double().mean(0))).tolist()


def rank_of_own(values: list[float], own: int) -> float | None:
    """The share of the other prompts that agree less, half for those that agree as much.

    Args:
        values: agreement with every prompt.
        own: which of them is the video's.
    Returns:
        From 0 to 1; None if there is no other prompt.
    """
    others = [value for number, value in enumerate(values) if number != own]
    if not others:
        return None
    return sum((v < values[own]) + (v == values[own]) / 2 for v in others) / len(others)


def consistency(frames: Tensor) -> float | None:
    """100 times the mean cosine of each frame (F, D) with the first and the one before.

    None of a single frame.

    Source: subject consistency of VBench, arXiv:2311.17982, section 3.2.
    """
    if len(frames) < 2:
        return None
    frames = frames.double()
    with_first = frames[1:] @ frames[0]
    with_last = (frames[1:] * frames[:-1]).sum(-1)
    return float(50 * (with_first + with_last).mean())


def flow_library() -> Any:
    """OpenCV.

    Raises:
        WanError: it is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise WanError(
            'motion needs OpenCV: pip install -e ".[metrics]"; or leave motion out of measures='
        ) from error
    return cv2


def motion(frames: Frames, fps: float) -> float | None:
    """Mean flow of the pixels that move most, in percent of the diagonal per second.

    None of a single frame.

    Args:
        frames: (F, H, W, 3) RGB.
    Source: Kroeger et al., "Fast optical flow using dense inverse search", arXiv:1603.03590, as
        OpenCV has it, with its preset "medium".
    """
    if len(frames) < 2:
        return None
    cv2 = flow_library()
    height, width = frames.shape[1:3]
    shrink = min(1.0, LONGEST / max(height, width))
    size = (max(16, round(width * shrink)), max(16, round(height * shrink)))
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grey = [
        cv2.resize(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), size, interpolation=cv2.INTER_AREA)
        for frame in frames
    ]
    lengths = []
    for before, after in itertools.pairwise(grey):
        flow = torch.from_numpy(dis.calc(before, after, None))
        length = flow.double().square().sum(-1).sqrt().flatten()
        lengths.append(float(length.topk(max(1, round(TOP * len(length)))).values.mean()))
    diagonal = (size[0] ** 2 + size[1] ** 2) ** 0.5
    return 100 * fps * sum(lengths) / len(lengths) / diagonal
