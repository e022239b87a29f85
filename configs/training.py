"""The settings of the training commands."""

from dataclasses import dataclass, field
from typing import Any

from configs.data import DataConfig
from configs.parallel import CHECKPOINT_BLOCKS, ParallelConfig
from configs.schema import (
    check_at_least,
    check_choice,
    check_device,
    check_every_step,
    check_positive,
    check_seed,
    option,
)
from wan.errors import WanError
from wan.models.attention_config import AttentionConfig

OPTIMIZERS = ("adamw", "muon")


def check_grad_clip(value: float) -> None:
    if not value > 0:  # nor a NaN
        raise WanError(f"grad_clip={value}: must be above 0; to clip nothing, set 1e9")


def check_ema_decay(value: float) -> None:
    if not 0 <= value < 1:
        raise WanError(f"ema_decay={value}: must lie in [0, 1); 0 keeps the latest weights")


@dataclass
class LoopConfig:
    """How long to train and what to keep."""

    steps: int = option(1000, "optimisation steps in all, a resumed run's earlier ones included")
    log_every: int = option(20, "steps per line of metrics.jsonl")
    save_every: int = option(200, "steps between checkpoints")
    keep_last: int = option(2, "checkpoints kept; the newest alone is not safe")
    wandb_project: str | None = option(None, "mirror metrics to this wandb project")
    allow_changes: bool = option(False, "go on from checkpoints of a run with other settings")

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "save_every", "keep_last"):
            check_at_least(f"loop.{name}", getattr(self, name), 1)


@dataclass
class VAETrainConfig:
    """`train.vae`: the autoencoder of the miniature's world."""

    output_dir: str = option("runs/vae", "checkpoints, metrics and the trained vae/ go here")
    seed: int = option(0, "renders, crops and initial weights")
    threads: int = option(2, "CPU threads")
    vae: dict[str, Any] = option({}, "fields of the released vae/config.json")
    start: str | None = option(None, "a vae/ folder to go on from; brings its own config.json")
    decoder_only: bool = option(False, "keep the encoder of start=: latents stay what they are")
    batch_size: int = option(4, "crops per step")
    crops_per_clip: int = option(2, "crops taken from one rendered clip")
    crop_size: int = option(64, "pixels, a multiple of the spatial stride")
    crop_frames: int = option(17, "4k + 1; fewer than a clip has do not teach its later frames")
    whole_clip_steps: int = option(300, "the last steps see whole clips")
    whole_clip_batch: int = option(2, "whole clips per step")
    optimizer: str = option("muon", "adamw or muon")
    lr: float = option(5e-3, "peak learning rate")
    warmup: int = option(50, "steps of linear warm-up")
    grad_clip: float = option(1.0, "largest gradient norm")
    foreground_weight: float = option(4.0, "weight of objects' pixels; backgrounds have 1")
    kl_weight: float = option(1e-4, "pull of the latents towards N(0, 1)")
    ema_decay: float = option(0.998, "of the averaged weights that are kept")
    bfloat16: bool = option(True, "compute convolutions in bfloat16")
    validation_clips: int = option(16, "whole clips measured at every checkpoint")
    statistics_clips: int = option(256, "clips behind latents_mean and latents_std")
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_seed("seed", self.seed)
        check_positive("lr", self.lr)
        check_grad_clip(self.grad_clip)
        check_ema_decay(self.ema_decay)
        for name in (
            *("batch_size", "crops_per_clip", "whole_clip_batch", "threads"),
            *("validation_clips", "statistics_clips"),
        ):
            check_at_least(name, getattr(self, name), 1)
        if self.batch_size % self.crops_per_clip:
            raise WanError(
                f"batch_size={self.batch_size}: must be a multiple of "
                f"crops_per_clip={self.crops_per_clip}"
            )
        if not 1 <= self.crop_frames <= 17 or self.crop_frames % 4 != 1:
            raise WanError(f"crop_frames={self.crop_frames}: must be 4k + 1, at most 17")
        if not 16 <= self.crop_size <= 128 or self.crop_size % 16:
            raise WanError(f"crop_size={self.crop_size}: must be a multiple of 16, at most 128")


@dataclass
class TextEncoderTrainConfig:
    """`train.text_encoder`: tokenizer and text encoder of the miniature."""

    output_dir: str = option("runs/text_encoder", "tokenizer/ and text_encoder/ go here")
    seed: int = option(0, "captions and initial weights")
    threads: int = option(1, "CPU threads")
    vocab_size: int = option(320, "largest number of pieces, characters included")
    tokenizer_captions: int = option(20000, "captions behind the tokenizer")
    encoder: dict[str, Any] = option({}, "fields of the released text_encoder/config.json")
    batch_size: int = option(64, "captions per step")
    optimizer: str = option("adamw", "adamw or muon")
    lr: float = option(2e-3, "peak learning rate")
    warmup: int = option(100, "steps of linear warm-up")
    grad_clip: float = option(1.0, "largest gradient norm")
    word_weight: float = option(0.2, "weight of guessing hidden words")
    bfloat16: bool = option(True, "compute matrix products in bfloat16")
    probe_captions: int = option(2000, "captions behind each measured number")
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_seed("seed", self.seed)
        check_positive("lr", self.lr)
        check_grad_clip(self.grad_clip)
        for name in ("threads", "tokenizer_captions", "probe_captions"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("vocab_size", self.vocab_size, 100)  # the ASCII characters and a few words
        check_at_least("batch_size", self.batch_size, 16)  # a quarter of them hide words


@dataclass
class LoRAConfig:
    """Low-rank training: the base stays as it is."""

    rank: int = option(0, "0 trains all weights")
    alpha: float | None = option(None, "the pair counts alpha / rank times; null: rank")

    def __post_init__(self) -> None:
        check_at_least("lora.rank", self.rank, 0)


@dataclass
class FinetuneConfig:
    """`train.finetune`: flow matching, from a released model or from scratch."""

    output_dir: str = option("runs/finetune", "checkpoints, metrics and the trained model/")
    checkpoint: str = option("builtin:miniature-teacher", "folder or hub id in the released layout")
    from_scratch: bool = option(False, "start the transformer from random weights, sized by dit")
    dit: dict[str, Any] = option({}, "for from_scratch: fields of transformer/config.json")
    sampling: dict[str, Any] = option({}, "for from_scratch: sampling_defaults of the result")
    seed: int = option(0, "order of clips, noise, initial weights")
    threads: int = option(2, "CPU threads")
    device: str = option("cpu", "auto, cpu, cuda, cuda:N")
    bfloat16: bool = option(True, "matrix products in bfloat16; weights stay float32")
    compile: bool = option(False, "compile the transformer")
    checkpoint_blocks: str = option("none", "recomputed in backward passes: none, full, selective")
    batch_size: int = option(32, "clips per step, of all processes together")
    shift: float = option(3.0, "of the training noise levels; larger models want 5")
    caption_dropout: float = option(0.1, "share of clips trained without their caption")
    first_frame_share: float = option(0.0, "share of batches with a clean first frame (TI2V)")
    optimizer: str = option("muon", "adamw or muon")
    lr: float = option(1e-3, "peak learning rate")
    warmup: int = option(100, "steps of linear warm-up")
    weight_decay: float = option(0.01, "of matrices")
    grad_clip: float = option(1.0, "largest gradient norm")
    ema_decay: float = option(0.999, "of the averaged weights that are kept")
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    max_text_tokens: int = option(512, "for the world: captions are cut there, with a warning")
    validation_captions: int = option(0, "for the world: captions sampled and read at each save")
    validation_steps: int = option(12, "Euler steps of those samples")
    validation_guidance: float = option(3.0, "guidance of those samples")
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("checkpoint_blocks", self.checkpoint_blocks, CHECKPOINT_BLOCKS)
        check_device("device", self.device)
        check_seed("seed", self.seed)
        check_every_step(self.attention)
        for name in ("lr", "shift"):
            check_positive(name, getattr(self, name))
        check_grad_clip(self.grad_clip)
        check_ema_decay(self.ema_decay)
        for name in ("caption_dropout", "first_frame_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise WanError(f"{name}={getattr(self, name)}: must lie between 0 and 1")
        for name in ("batch_size", "threads", "max_text_tokens", "validation_steps"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("validation_captions", self.validation_captions, 0)
        if self.max_text_tokens > 512:
            raise WanError(f"max_text_tokens={self.max_text_tokens}: the models read 512 rows")
        if self.validation_captions and self.data.kind != "world":
            raise WanError(
                f"validation_captions={self.validation_captions} with data.kind={self.data.kind}: "
                "the detectors read the miniature's world only; set it to 0"
            )
        if self.from_scratch and self.lora.rank:
            raise WanError("from_scratch=true and lora.rank > 0: a LoRA needs a base to adapt")
