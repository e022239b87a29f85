"""Flow-matching training: `python -m train.finetune data.kind=clips data.folder=clips/`.

From a released model (all weights, or a LoRA) or from scratch; on a folder of clips with captions
or on the miniature's rendered world. The text encoder and the autoencoder are frozen. What comes
out is a complete folder in the released layout, or a LoRA file.
"""

import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from configs.training import FinetuneConfig
from infer.cli import INTERRUPTED, run_command
from infer.command_line import ATTENTION
from train.data import LatentCache, folder_cache, world_cache
from train.loop import run_training, step_generator
from train.losses import flow_matching_loss, sample_sigmas
from train.optim import EMA, apply_gradients, learning_rate, make_optimizers
from train.state import TrainState
from wan.checkpoint import open_checkpoint
from wan.denoiser import guide
from wan.dit import WanDiT
from wan.dit_config import DiTConfig
from wan.errors import WanError
from wan.flow import add_noise, velocity_target
from wan.hub import resolve_model
from wan.lora import add_lora, save_lora
from wan.miniature import BUILTIN, WEIGHTS
from wan.miniature.captions import caption
from wan.miniature.detect import accuracies, detect, score
from wan.miniature.world import NUM_FRAMES, STAGE, sample_scene, scene_rng
from wan.noise import draw_noise, sample_generators
from wan.pipeline_config import (
    BASE,
    PipelineConfig,
    SamplingDefaults,
    component_config,
    override_defaults,
    read_pipeline_config,
    write_configs,
)
from wan.placement import resolve_device
from wan.samplers import sample_euler
from wan.schedule import euler_schedule
from wan.tokenizer import Tokenizer, clean_prompt, read_json_object
from wan.umt5 import UMT5Config, UMT5Encoder, pad_ids
from wan.vae import VAEConfig, WanVAE
from wan.weights import load_module, save_component

TEXT_LENGTH = 512  # rows of context every Wan transformer reads


class Texts:
    """Captions -> context rows, with a frozen encoder; padded rows are zero.

    Captions of clips are encoded once by `remember`, after which the encoder is not needed; the
    world's are new in every step. The number of rows that comes with a context lets the transformer
    attend the zero rows as one.
    """

    def __init__(self, encoder: UMT5Encoder, tokenizer: Tokenizer, max_tokens: int) -> None:
        self.encoder: UMT5Encoder | None = encoder
        self.device = encoder.token_embedding.weight.device
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.known: dict[str, Tensor] = {}

    @torch.no_grad()
    def remember(self, captions: Iterable[str]) -> None:
        """Encode the captions and the empty one, then let the encoder go."""
        for text in tqdm(sorted({"", *captions}), desc="encoding captions"):
            self.known[text] = self.encode([text])[0].cpu()
        self.encoder = None

    def __call__(self, captions: list[str]) -> tuple[Tensor, int]:
        """B texts -> context (B, 512, D) and the number of rows that are not zero everywhere."""
        if self.encoder is None:
            rows = [self.known[text].to(self.device) for text in captions]
        else:
            rows = self.encode(captions)
        longest = -(-max(len(row) for row in rows) // 8) * 8  # few lengths, few compilations
        context = rows[0].new_zeros(len(rows), TEXT_LENGTH, rows[0].shape[1])
        for row, encoded in enumerate(rows):
            context[row, : len(encoded)] = encoded
        return context, min(longest, TEXT_LENGTH)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> list[Tensor]:
        """Each text's real rows (n, D), from one batch."""
        assert self.encoder is not None
        tokens = [self.tokenizer(clean_prompt(text), self.max_tokens) for text in captions]
        if cut := [text for text, one in zip(captions, tokens, strict=True) if one.truncated]:
            warnings.warn(
                f"{len(cut)} captions are longer than max_text_tokens={self.max_tokens} and lose "
                f"their ends, the first is {cut[0][:60]!r}",
                stacklevel=2,
            )
        ids, mask = pad_ids([one.ids for one in tokens])
        encoded = self.encoder(ids.to(self.device), mask.to(self.device))
        return [row[: len(one.ids)] for row, one in zip(encoded, tokens, strict=True)]


M = TypeVar("M", bound=nn.Module)


def load_frozen(
    build: Callable[[], M], folder: Path, name: str, device: torch.device, dtype: torch.dtype
) -> M:
    """A component that training only reads."""
    module = load_module(build, open_checkpoint(folder / name), name, dtype=dtype, device=device)
    return module.requires_grad_(False).eval()


def read_settings(config: FinetuneConfig, folder: Path) -> PipelineConfig:
    """The released settings, or for a network from scratch those of the frozen parts and `dit`."""
    if not config.from_scratch:
        settings = read_pipeline_config(folder)
        if settings.boundary_ratio is not None:
            raise WanError(
                f"{folder}: a model of two experts; each needs noise levels of its own side of the "
                "boundary, which this command does not draw. Models with one transformer only"
            )
        if config.first_frame_share and not settings.expand_timesteps:
            raise WanError(
                f"first_frame_share={config.first_frame_share}: this model takes no first frame "
                "(expand_timesteps is false in its model_index.json)"
            )
        return settings
    parts = {
        name: read_json_object(component_config(folder, name, {}))
        for name in ("vae", "text_encoder")
    }
    return PipelineConfig(
        class_name=BASE,
        transformer=DiTConfig.from_json(config.dit),
        vae=VAEConfig.from_json(parts["vae"]),
        text_encoder=UMT5Config.from_json(parts["text_encoder"]),
        expand_timesteps=config.first_frame_share > 0,
        shift=config.shift,
        defaults=override_defaults(SamplingDefaults(), config.sampling, "sampling"),
    )


def build_dit(
    config: FinetuneConfig, settings: PipelineConfig, folder: Path, device: torch.device
) -> WanDiT:
    """The transformer to train, in float32."""

    def build() -> WanDiT:
        return WanDiT(settings.transformer, config.attention, config.checkpoint_blocks)

    generator = torch.Generator().manual_seed(config.seed)
    if config.from_scratch:
        dit = build()
        dit.init_weights(generator)
        return dit.to(device)
    checkpoint = open_checkpoint(folder / "transformer")
    dit = load_module(
        build,
        checkpoint,
        "transformer",
        dtype=torch.float32,
        device=device,
        share_mapping=False,
    )
    if config.lora.rank:
        add_lora(dit, config.lora.rank, config.lora.alpha, generator=generator)
    return dit


def make_train_step(
    dit: WanDiT, texts: Texts, cache: LatentCache, config: FinetuneConfig
) -> Callable[[TrainState], dict[str, float]]:
    device = texts.device
    trainable = [p for p in dit.parameters() if p.requires_grad]

    def train_step(state: TrainState) -> dict[str, float]:
        generator = step_generator(config.seed, state.step)
        x0, captions = cache.batch(state.step, config.batch_size, config.seed)
        dropped = torch.rand(len(captions), generator=generator) < config.caption_dropout
        captions = ["" if drop else text for text, drop in zip(captions, dropped, strict=True)]
        sigma = sample_sigmas(len(x0), config.shift, generator)
        noise = torch.randn(x0.shape, generator=generator)
        given = float(torch.rand((), generator=generator)) < config.first_frame_share

        levels = sigma[:, None].repeat(1, x0.shape[2])  # (B, T)
        if given:
            levels[:, 0] = 0  # the first frame is clean, and says so by its timestep
        x = add_noise(x0, noise, levels[:, None, :, None, None])
        weight = (levels > 0).float()[:, None, :, None, None] if given else None
        timestep = 1000 * (levels if given else sigma)
        context, num_rows = texts(captions)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bfloat16):
            velocity = dit(x.to(device), timestep.to(device), context, num_rows)
        target = velocity_target(x0, noise).to(device)
        loss = flow_matching_loss(velocity, target, None if weight is None else weight.to(device))
        loss.backward()
        lr = learning_rate(state.step, config.lr, config.loop.steps, config.warmup, final=0.02)
        norm = apply_gradients(state.optimizers, trainable, lr, config.grad_clip)
        state.averages["dit"].update(dit)
        return {"loss": loss.item(), "grad_norm": norm, "lr": lr}

    return train_step


@torch.no_grad()
def read_samples(
    dit: WanDiT, texts: Texts, vae: WanVAE, config: FinetuneConfig
) -> dict[str, float]:
    """Sample clips for held-out captions of the world and let the detectors read them."""
    rng = random.Random(config.seed)
    said = [
        caption(sample_scene(scene_rng(2**42, i), split="heldout", num_objects=1), rng, omit=0.0)
        for i in range(config.validation_captions)
    ]
    scores = []
    for start in range(0, len(said), 32):
        part = said[start : start + 32]
        context, num_rows = texts([c.text for c in part] + [""] * len(part))
        side = STAGE // vae.config.spatial_stride
        shape = (vae.config.z_dim, vae.config.latent_frames(NUM_FRAMES), side, side)
        x = draw_noise(shape, sample_generators(start, len(part))).to(texts.device)

        def velocity(x: Tensor, timestep: float, context=context, num_rows=num_rows) -> Tensor:
            levels = torch.full((2 * len(x),), timestep, device=x.device)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=config.bfloat16):
                both = dit(torch.cat([x, x]), levels, context, num_rows)
            with_text, without = both.chunk(2)
            return guide(with_text, without, config.validation_guidance)

        x = sample_euler(velocity, x, euler_schedule(config.validation_steps, config.shift))
        videos = vae.decode(x, None).float().cpu()
        scores += [score(detect(v), c) for v, c in zip(videos, part, strict=True)]
    return {f"val_{name}": share for name, share in accuracies(scores).items()}


def export(
    dit: WanDiT, source: Path, settings: PipelineConfig, folder: Path, config: FinetuneConfig
) -> Path:
    """The LoRA file, or the whole released layout with the trained transformer."""
    if config.lora.rank:
        return save_lora(folder / "pytorch_lora_weights.safetensors", dit)
    beside = folder / f".model-{os.getpid()}"
    shutil.rmtree(beside, ignore_errors=True)
    for name in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(source / name, beside / name)
    write_configs(settings, beside)
    save_component(dit.state_dict(), beside / "transformer", "transformer")
    model = folder / "model"
    if model.exists():  # written by an earlier end of this same run
        shutil.rmtree(model)
    beside.rename(model)
    return model


def open_data(config: FinetuneConfig, vae: WanVAE) -> LatentCache:
    data, root = config.data, Path(config.data.cache_dir)
    if data.folder is None:
        return world_cache(vae, root, data.num_clips, data.seed)
    size = (data.num_frames, data.height, data.width)
    return folder_cache(vae, Path(data.folder), root, *size, data.fps)


def finetune(config: FinetuneConfig) -> int:
    config.data.check_source()
    torch.set_num_threads(config.threads)
    device = resolve_device(config.device)
    source = WEIGHTS if config.checkpoint == BUILTIN else resolve_model(config.checkpoint)
    folder = Path(config.output_dir)
    if source.resolve().is_relative_to(folder.resolve()):
        raise WanError(
            f"checkpoint={config.checkpoint} lies in output_dir={folder}, which this run would "
            "write over; choose another output_dir="
        )
    settings = read_settings(config, source)
    folder.mkdir(parents=True, exist_ok=True)

    exact, half = torch.float32, torch.float32 if device.type == "cpu" else torch.bfloat16
    vae = load_frozen(lambda: WanVAE(settings.vae), source, "vae", device, exact)
    cache = open_data(config, vae)
    encoder = load_frozen(
        lambda: UMT5Encoder(settings.text_encoder), source, "text_encoder", device, half
    )
    texts = Texts(encoder, Tokenizer.from_folder(source / "tokenizer"), config.max_text_tokens)
    if cache.captions is not None:
        texts.remember(cache.captions)
        del encoder
    dit = build_dit(config, settings, source, device)
    half = torch.bfloat16 if config.bfloat16 else torch.float32
    dit.attention.verify(settings.transformer.attention_head_dim, device, half)
    average = EMA(dit, config.ema_decay)
    state = TrainState(
        {"dit": dit},
        make_optimizers(dit, config.optimizer, config.lr, weight_decay=config.weight_decay),
        {"dit": average},
    )
    if config.compile:
        for block in dit.blocks:
            block.compile()

    def on_save(state: TrainState) -> dict[str, float]:
        if not config.validation_captions:
            return {}
        with average.in_place(dit):
            return read_samples(dit, texts, vae, config)

    train_step = make_train_step(dit, texts, cache, config)
    if not run_training(state, train_step, config.loop, folder, asdict(config), on_save):
        return INTERRUPTED
    average.copy_to(dit)
    print(f"wrote {export(dit, source, settings, folder, config)}")
    return 0


if __name__ == "__main__":
    run_command(
        finetune,
        FinetuneConfig,
        "finetune",
        text_keys=(),
        path_keys=("output_dir", "checkpoint", "data.folder", "data.cache_dir"),
        shortcuts=ATTENTION,
    )
