"""The settings of the evaluation command."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from configs.schema import (
    DTYPES,
    SamplerConfig,
    check_at_least,
    check_choice,
    check_device,
    check_seed,
    option,
)
from wan.errors import WanError


@dataclass
class EvaluateConfig:
    """`python -m infer.evaluate`: captions of the miniature's world in, how many came true out.

    What is None here and in the preset is taken from the checkpoint's own folder.
    """

    source: str = option(
        "model",
        "model, or a ceiling: renders (the truth itself), vae (the truth through the autoencoder)",
    )
    num_captions: int = option(512, "clips to make and read")
    split: str = option("heldout", "heldout (combinations never trained on), train or any")
    num_objects: int | None = option(1, "1 or 2; null draws 1 for six scenes in ten")
    omit: float = option(0.0, "chance that a caption leaves an attribute unsaid; training has 0.15")
    seed: int = option(0, "chooses captions and noise; caption i gets noise seed + i")
    batch_size: int = option(16, "clips at a time; changes no clip")

    checkpoint: str = option(MISSING, "a folder or a hub id (owner/name), not the preset's own")
    revision: str | None = option(None, "commit, branch or tag on the hub")
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    guidance_scale: float | None = option(None, "weight of the prompt; 1 = no guidance")
    negative_prompt: str | None = option(None, "what videos should not show; needs guidance")
    allow_untrained: bool = option(False, "let a few-step student do what it was not trained for")
    max_sequence_length: int | None = option(None, "prompt tokens that are read")
    height: int = option(128, "pixels; the world is square")
    width: int = option(128, "pixels")
    num_frames: int = option(17, "4k + 1; at least 9, so that a circling object gets half round")
    fps: float | None = option(None, "of a preset; everything is measured per frame")
    device: str = option("auto", "auto (cuda if there is one, else cpu), cpu, mps, cuda, cuda:N")
    dtype: str = option("auto", "auto (bfloat16 on cuda, else float32), float32, bfloat16")
    attention: str = option("sdpa", "sdpa, math or sliced; all exact")

    output: str | None = option(None, "also write every number and every clip's to this JSON file")
    sheet: str | None = option(None, "also write a PNG of clips that are not what was asked for")

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise WanError("checkpoint= is empty: name a folder or a hub id")
        check_choice("source", self.source, ("model", "renders", "vae"))
        check_choice("split", self.split, ("heldout", "train", "any"))
        check_choice("dtype", self.dtype, ("auto", *DTYPES))
        check_device("device", self.device)
        check_seed("seed", self.seed)
        for name, least in (("num_captions", 1), ("batch_size", 1), ("num_frames", 9)):
            check_at_least(name, getattr(self, name), least)
        check_at_least("height", self.height, 64)
        check_seed("seed + num_captions - 1", self.seed + self.num_captions - 1)
        for name in ("guidance_scale", "max_sequence_length"):
            if getattr(self, name) is not None:
                check_at_least(name, getattr(self, name), 1)
        if self.num_objects not in (None, 1, 2):
            raise WanError(f"num_objects={self.num_objects}: the world shows 1 or 2; null draws")
        if not 0 <= self.omit <= 1:
            raise WanError(f"omit={self.omit}: a probability, from 0 to 1")
        if self.height != self.width:
            raise WanError(f"height={self.height}, width={self.width}: the world is square")
