"""The settings of the training commands."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from configs.data import DataConfig, parse_size
from configs.parallel import ParallelConfig
from configs.schema import (
    MAX_STEPS,
    Options,
    check_device,
    check_every_step,
    check_prompt,
    count,
    option,
    positive,
    seed_option,
    share,
)
from wan.errors import WanError
from wan.models.attention_config import AttentionConfig

OPTIMIZERS = ("adamw", "muon")
CHECKPOINT_BLOCKS = ("none", "full", "selective")  # of wan.models.recompute


def check_grad_clip(name: str, value: float) -> None:
    if not value > 0:  # nor a NaN
        raise WanError(f"{name}={value}: must be above 0; to clip nothing, set 1e9")


def check_size(name: str, text: str) -> None:
    parse_size(text, name)


@dataclass
class LoopConfig(Options):
    """How long to train and what to keep."""

    GROUP: ClassVar[str] = "loop."

    steps: int = count(1000, "optimisation steps in all, a resumed run's earlier ones included")
    log_every: int = count(20, "steps per line of metrics.jsonl")
    save_every: int = count(200, "steps between checkpoints")
    keep_last: int = count(2, "checkpoints kept; with 1, a damaged newest one loses the run")
    export_every: int = option(
        0,
        "steps between models or LoRA files that are kept for good; 0: the end's",
        at_least=0,
    )
    wandb_project: str | None = option(None, "mirror metrics to this wandb project")
    tensorboard: bool = option(False, "mirror metrics to output_dir/tensorboard")
    allow_changes: bool = option(False, "go on from checkpoints of a run with other settings")


@dataclass
class OptimConfig(Options):
    """What every training command has."""

    bfloat16: bool | None = option(
        None, "matrix products in bfloat16, weights stay float32; null: where that is fast"
    )
    grad_clip: float = option(1.0, "largest gradient norm", check=check_grad_clip)
    loop: LoopConfig = field(default_factory=LoopConfig)


@dataclass
class VAETrainConfig(OptimConfig):
    """`train.vae`: the autoencoder of the miniature's world."""

    output_dir: str = option("runs/vae", "checkpoints, metrics and the trained vae/ go here")
    seed: int = seed_option(0, "renders, crops and initial weights")
    threads: int = count(2, "CPU threads")
    vae: dict[str, Any] = option({}, "fields of the released vae/config.json")
    start: str | None = option(None, "a vae/ folder to go on from, with its own config.json")
    decoder_only: bool = option(
        False, "keep the encoder of start=: latents stay what they are", needs=("start",)
    )
    batch_size: int = count(4, "crops per step")
    crops_per_clip: int = count(2, "crops taken from one rendered clip")
    crop_size: int = option(64, "pixels, a multiple of 16", at_least=16, at_most=128)
    crop_frames: int = option(
        17, "4k + 1; fewer than a clip has do not teach its later frames", at_least=1, at_most=17
    )
    whole_clip_steps: int = option(300, "the last steps see whole clips", at_least=0)
    whole_clip_batch: int = count(2, "whole clips per step")
    optimizer: str = option("muon", "adamw or muon", choices=OPTIMIZERS)
    lr: float = positive(5e-3, "peak learning rate")
    warmup: int = option(50, "steps of linear warm-up", at_least=0)
    foreground_weight: float = option(
        4.0, "weight of pixels of objects; backgrounds have 1", at_least=0
    )
    kl_weight: float = option(
        1e-4, "weight of the term that pulls latents towards N(0, 1)", at_least=0
    )
    ema_decay: float = option(
        0.998,
        "decay of the averaged weights that are exported; 0: latest",
        at_least=0,
        below=1,
    )
    validation_clips: int = count(16, "whole clips measured at every checkpoint")
    statistics_clips: int = count(256, "clips behind latents_mean and latents_std")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.crops_per_clip:
            raise WanError(
                f"batch_size={self.batch_size}: must be a multiple of "
                f"crops_per_clip={self.crops_per_clip}"
            )
        if self.crop_frames % 4 != 1:
            raise WanError(f"crop_frames={self.crop_frames}: must be 4k + 1, at most 17")
        if self.crop_size % 16:
            raise WanError(f"crop_size={self.crop_size}: must be a multiple of 16, at most 128")


@dataclass
class TextEncoderTrainConfig(OptimConfig):
    """`train.text_encoder`: tokenizer and text encoder of the miniature."""

    output_dir: str = option("runs/text_encoder", "tokenizer/ and text_encoder/ go here")
    seed: int = seed_option(0, "captions and initial weights")
    threads: int = count(1, "CPU threads")
    vocab_size: int = option(  # 100: the ASCII characters and a few words
        320, "largest number of pieces, characters included", at_least=100
    )
    tokenizer_captions: int = count(20000, "captions behind the tokenizer")
    encoder: dict[str, Any] = option({}, "fields of the released text_encoder/config.json")
    batch_size: int = option(64, "captions per step", at_least=16)  # a quarter of them hide words
    optimizer: str = option("adamw", "adamw or muon", choices=OPTIMIZERS)
    lr: float = positive(2e-3, "peak learning rate")
    warmup: int = option(100, "steps of linear warm-up", at_least=0)
    word_weight: float = option(0.2, "weight of guessing hidden words", at_least=0)
    probe_captions: int = count(2000, "captions behind each measured number")


@dataclass
class LoRAConfig(Options):
    """Low-rank training: the base stays as it is."""

    GROUP: ClassVar[str] = "lora."

    rank: int = option(0, "0 trains all weights, or what start= has", at_least=0)
    alpha: float | None = positive(None, "the LoRA is scaled by alpha / rank; null: rank, so by 1")
    start: str | None = option(None, "a LoRA file to go on with: its layers, ranks and alpha")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None and not self.active:
            raise WanError(
                f"{self.GROUP}alpha={self.alpha:g}: no LoRA is trained; give {self.GROUP}rank= too"
            )

    @property
    def active(self) -> bool:
        """Whether a LoRA is trained, and not all weights."""
        return bool(self.rank or self.start)


@dataclass
class TransformerTrainConfig(OptimConfig):
    """What the commands that train transformers share."""

    checkpoint: str = option("builtin:miniature-teacher", "folder or hub id to start from")
    threads: int = count(2, "CPU threads")
    device: str = option(
        "auto", "auto (cuda if there is one, else cpu), cpu, cuda, cuda:N", check=check_device
    )
    compile: bool = option(False, "compile the transformers' blocks")
    checkpoint_blocks: str = option(
        "none", "activation checkpointing: none, full, selective", choices=CHECKPOINT_BLOCKS
    )
    batch_size: int = count(32, "clips per step, of all processes together")
    gradient_accumulation: int = count(
        1, "parts of a step's clips that are computed one after another; batch_size counts all"
    )
    first_frame_share: float = share(0.0, "share of batches with a clean first frame (TI2V)")
    weight_decay: float = option(
        0.01, "weight decay of matrices; other weights have none", at_least=0
    )
    max_text_tokens: int = option(
        512,
        "captions are cut there, with a warning; transformers read 512 tokens",
        at_least=1,
        at_most=512,
    )
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_every_step(self.attention)


@dataclass
class FinetuneConfig(TransformerTrainConfig):
    """`train.finetune`: flow matching, from a released model or from scratch."""

    output_dir: str = option("runs/finetune", "checkpoints, metrics and the trained model/")
    from_scratch: bool = option(False, "start the transformer from random weights, sized by dit")
    few_step: bool = option(False, "take a few-step student too, which unlearns its few steps")
    dit: dict[str, Any] = option(
        {}, "for from_scratch: fields of transformer/config.json", needs=("from_scratch",)
    )
    sampling: dict[str, Any] = option(
        {}, "for from_scratch: sampling_defaults of the result", needs=("from_scratch",)
    )
    seed: int = seed_option(0, "order of clips, noise, initial weights")
    shift: float = positive(3.0, "shift of the training noise levels; larger models want 5")
    caption_dropout: float = share(0.1, "share of clips trained without their caption")
    optimizer: str = option("muon", "adamw or muon", choices=OPTIMIZERS)
    lr: float = positive(1e-3, "peak learning rate")
    warmup: int = option(100, "steps of linear warm-up", at_least=0)
    ema_decay: float = option(
        0.999,
        "decay of the averaged weights that are exported; 0: latest",
        at_least=0,
        below=1,
    )
    validation_captions: int = option(
        0, "for the world: captions sampled and read at each save", at_least=0
    )
    validation_steps: int = count(12, "Euler steps of those samples", ("validation_captions",))
    validation_guidance: float = option(
        3.0, "guidance of those samples", at_least=0, needs=("validation_captions",)
    )
    validation_clips: int = option(
        0,
        "for data.kind=folder: clips that are not trained on; their loss is measured at each save",
        at_least=0,
    )
    sample_prompts: list[str] = option(
        [],
        "a prompt, or a .txt file of prompts, to sample at each save; give it again for more",
        check=check_prompt,
    )
    sample_every: int | None = option(
        None,
        "steps between samples, a multiple of loop.save_every; null: at every save",
        at_least=1,
    )
    sample_size: str | None = option(
        None, "frames x height x width of samples; null: that of most clips", check=check_size
    )
    sample_steps: int | None = option(
        None, "their steps; null: the model's own", at_least=1, at_most=MAX_STEPS
    )
    sample_shift: float | None = positive(None, "their shift; null: the model's own")
    sample_guidance: float | None = option(
        None, "their guidance; null: the model's own; 1: none", at_least=0
    )
    sample_negative_prompt: str | None = option(
        None, "null: the official one for released base models, else the empty one"
    )
    sample_seed: int = seed_option(0, "their noise, the same for each prompt")
    lora: LoRAConfig = field(default_factory=LoRAConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation_captions and self.data.kind != "world":
            raise WanError(
                f"validation_captions={self.validation_captions} with data.kind={self.data.kind}: "
                "the detectors read the miniature's world only; set it to 0"
            )
        if self.from_scratch and self.lora.active:
            given = "lora.rank > 0" if self.lora.rank else "lora.start"
            raise WanError(f"from_scratch=true and {given}: a LoRA needs a base to adapt")
        if self.validation_clips and self.data.kind != "folder":
            raise WanError(
                f"validation_clips={self.validation_clips} with data.kind={self.data.kind}: clips "
                "of a folder are held out; for the world, validation_captions= are of scenes that "
                "no training sees"
            )
