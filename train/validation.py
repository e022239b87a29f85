"""Validation: what a model makes of a fixed set of captions, at each save.

For the miniature's world the detectors read how often a clip shows what its caption states. A
distilled student is also compared with its teacher, because the losses of DMD do not tell how good
it is: its gradient is not expected to shrink. Both sample the same captions from the same noise,
and what needs no detector is compared: how much moves, how saturated it is, how far latents spread,
how much two clips of one caption differ.
"""

import itertools
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from wan.media.images import write_image
from wan.media.video import contact_sheet, to_uint8
from wan.miniature.captions import Caption, caption
from wan.miniature.detect import accuracies, detect, score
from wan.miniature.world import sample_scene, scene_rng
from wan.models.vae import WanVAE

# V validation captions, each sampled twice: clips i and V + i of videos (2V, 3, F, H, W) in [-1, 1]
# and of latents (2V, C, T, H, W)

UNSEEN = 2**42  # stream of scenes that no training draws
PANEL = ((1, 0.0), (2, 0.0), (1, 0.5))  # (objects, chance that an attribute goes unsaid), in turn
RATIOS = ("motion_ratio", "saturation_ratio", "spread_ratio", "diversity_ratio")
SATURATED = 3.0  # of latents, whose mean is 0 and variance 1 over clips by the model's statistics


def world_panel(count: int, seed: int, kinds: Sequence[tuple[int, float]] = PANEL) -> list[Caption]:
    """Captions of held-out scenes.

    Args:
        kinds: (number of objects, chance that an attribute goes unsaid) of the scenes, in turn.
    """
    rng = random.Random(seed)
    return [
        caption(sample_scene(scene_rng(UNSEEN, i), "heldout", num_objects), rng, omit)
        for i, (num_objects, omit) in zip(range(count), itertools.cycle(kinds), strict=False)
    ]


def read_clips(
    videos: Iterable[Tensor], captions: Sequence[Caption], prefix: str
) -> dict[str, float]:
    """Share of what captions state that the detectors find in their clips (3, F, H, W).

    Returns:
        `prefix` and the attribute -> share; "joint" is that of clips that show all of it.
    """
    pairs = zip(videos, captions, strict=True)
    read = accuracies(score(detect(video), stated) for video, stated in pairs)
    return {f"{prefix}_{name}": share for name, share in read.items()}


def motion(videos: Tensor) -> float:
    """Mean absolute change of a pixel from frame to frame; 0 for single frames."""
    return float(videos.diff(dim=2).abs().mean()) if videos.shape[2] > 1 else 0.0


def saturation(videos: Tensor) -> float:
    """Mean spread of a pixel's three channels: its colourfulness, in [0, 2]."""
    return float((videos.amax(dim=1) - videos.amin(dim=1)).mean())


def diversity(latents: Tensor) -> float:
    """How much two clips of one caption differ overall: rms over channels of the difference of
    their means over space and time, mean over captions.

    Where things are differs from noise to noise in any student, so whole latents keep their
    distance; what is lost first, the choice of what a caption leaves open, shows in the means.
    """
    means = latents.float().mean(dim=(2, 3, 4))
    one, other = means.chunk(2)
    return float((one - other).square().mean(dim=1).sqrt().mean())


def saturated_share(latents: Tensor) -> float:
    """Share of numbers beyond +-SATURATED, in [0, 1]; 0.0027 if they are normal.

    Too much guidance, or a student that runs away along the score, shows here first.
    """
    return float((latents.detach().abs() > SATURATED).float().mean())


@dataclass(frozen=True)
class Samples:
    """What one network made of the panel's captions, two of each."""

    latents: Tensor
    videos: Tensor


def ratios(student: Samples, teacher: Samples) -> dict[str, float]:
    """Student over teacher: motion, saturation, spread of latents, diversity; 1 is ideal."""
    tiny = 1e-6

    def over(measure: Callable[[Tensor], float], what: str) -> float:
        return (measure(getattr(student, what)) + tiny) / (measure(getattr(teacher, what)) + tiny)

    return {
        "motion_ratio": over(motion, "videos"),
        "saturation_ratio": over(saturation, "videos"),
        "spread_ratio": over(lambda latents: float(latents.std()), "latents"),
        "diversity_ratio": over(diversity, "latents"),
    }


def health(values: dict[str, float]) -> float:
    """One number in [0, 1] by which checkpoints are ranked.

    The product of min(r, 1 / r) over the ratios; where detectors can tell, times (1 + j) / 2 for a
    share j of captions that came true.
    """
    total = (1 + values.get("val_joint", 1.0)) / 2
    for name in RATIOS:
        total *= min(values[name], 1 / max(values[name], 1e-6))
    return total


def panel_numbers(
    student: Samples, teacher: Samples, captions: Sequence[Caption] | None
) -> dict[str, float]:
    """Everything that a save logs: ratios, what the detectors read of the world, health.

    Args:
        captions: the V captions of the panel; None for another world than the miniature's.
    """
    values = ratios(student, teacher)
    if captions is not None:
        twice = [*captions, *captions]
        values |= read_clips(student.videos, twice, "val")
        values["teacher_joint"] = read_clips(teacher.videos, twice, "teacher")["teacher_joint"]
    values["health"] = health(values)
    return values


@torch.no_grad()
def decode(vae: WanVAE, latents: Tensor) -> Samples:
    """Videos of latents, one at a time, on the CPU."""
    videos = torch.cat([vae.decode_normalized(z[None]).float().cpu() for z in latents])
    return Samples(latents.cpu(), videos)


def stack_sheets(videos: Sequence[Tensor], max_frames: int = 9) -> Image.Image:
    """Contact sheets of videos (3, F, H, W) below each other."""
    sheets = [contact_sheet(to_uint8(video), max_frames, max_width=160) for video in videos]
    whole = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)))
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole


def write_pictures(
    folder: Path,
    step: int,
    student: Samples,
    teacher: Samples,
    triptych: Sequence[Tensor],
    write_clip: Callable[[Path, Tensor], None],
    shown: int = 4,
) -> None:
    """Clips of the student (mp4), a sheet of student above teacher, and the triptych.

    A disk that is full costs the pictures, not the checkpoint that comes after them: a warning says
    so, and what was written of this step goes.

    Args:
        triptych: a sample of the student, and what teacher and critic make of it noised: videos.
    """
    pairs = [
        video
        for ours, theirs in zip(student.videos[:shown], teacher.videos[:shown], strict=True)
        for video in (ours, theirs)
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_image(folder / f"{step:07d}-student-teacher.png", stack_sheets(pairs))
        write_image(folder / f"{step:07d}-triptych.png", stack_sheets(triptych))
        for number, video in enumerate(student.videos[:shown]):
            write_clip(folder / f"{step:07d}-{number}.mp4", video)
    except OSError as error:
        print(f"warning: {folder}: no pictures of step {step}: {error}", file=sys.stderr)
        for path in folder.glob(f"{step:07d}-*"):
            path.unlink(missing_ok=True)
