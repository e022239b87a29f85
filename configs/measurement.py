"""The settings of `python -m infer.measure`, and of the same measures in an ablation."""

from dataclasses import dataclass

from configs.schema import Options, check_device, check_ending, check_filled, option
from wan.errors import WanError

MEASURES = ("text", "consistency", "motion")


@dataclass
class MeasuringConfig(Options):
    """What is measured of videos, and with which networks."""

    measures: list[str] = option(
        list(MEASURES), f"which of {', '.join(MEASURES)}", choices=MEASURES
    )
    clip_model: str = option(
        "openai/clip-vit-large-patch14",
        "network of text and consistency: a folder or a hub id; owner/name@commit pins it",
        check=check_filled,
    )
    image_tower: str | None = option(
        None,
        "another network for consistency, such as facebook/dinov2-base; none: CLIP's of images",
        check=check_filled,
    )
    sampled_frames: int = option(
        16, "frames of a video that networks see, evenly spaced; motion sees all", at_least=2
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.measures)) < len(self.measures):
            raise WanError(f"measures={self.measures}: one is there twice")
        if not {"text", "consistency"} & set(self.measures):
            for name in ("clip_model", "image_tower", "sampled_frames"):
                value = getattr(self, name)
                if value != getattr(MeasuringConfig, name):
                    raise WanError(f"{name}={value}: read by measures=[text,consistency] only")
        elif self.image_tower is not None and "consistency" not in self.measures:
            raise WanError(f"image_tower={self.image_tower}: read by measures=[consistency] only")


@dataclass
class MeasureConfig(MeasuringConfig):
    """`python -m infer.measure`: which videos are measured, and by what."""

    videos: str = option("", "an mp4, its record, or a folder with such, at any depth")
    device: str = option("auto", "auto, cpu, mps, cuda or cuda:N", check=check_device)
    output: str | None = option(
        None, "every video's numbers, as JSON; none: measures.json beside the videos"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ending("output", self.output, (".json",))
        if not self.measures:
            raise WanError(f"measures= is empty: choose from {', '.join(MEASURES)}")
