"""Flow-matching training of the transformer: `python -m train.finetune data.kind=clips ...`.

From a released model (all weights, or a LoRA) or from scratch; on a folder of clips with captions
or on the miniature's rendered world. The text encoder and the autoencoder are frozen. What comes
out is a complete folder in the released layout, or a LoRA file.
"""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from configs.training import FinetuneConfig
from infer.cli import run_command
from train.data import LatentCache, folder_cache, world_cache
from train.loop import run_training, step_generator
from train.losses import flow_matching_loss, sample_sigmas
from train.optim import EMA, learning_rate, make_optimizers, set_learning_rate
from train.state import TrainState
from wan.checkpoint import open_checkpoint
from wan.dit import WanDiT
from wan.dit_config import DiTConfig
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
    read_pipeline_config,
    write_configs,
)
from wan.samplers import sample_euler
from wan.schedule import euler_schedule
from wan.tokenizer import Tokenizer, clean_prompt, read_json_object
from wan.umt5 import UMT5Config, UMT5Encoder
from wan.vae import VAEConfig, WanVAE
from wan.weights import load_module, save_component

TEXT_LENGTH = 512  # rows of context every Wan transformer reads


class Texts:
    """Captions -> context rows, with the frozen encoder; padded rows are zero.

    The number of rows that comes with it lets the transformer attend the zero rows as one.
    """

    def __init__(self, encoder: UMT5Encoder, tokenizer: Tokenizer, max_tokens: int) -> None:
        self.encoder, self.tokenizer, self.max_tokens = encoder, tokenizer, max_tokens

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> tuple[Tensor, int]:
        """B texts -> context (B, 512, D) and the number of rows that are not zero everywhere."""
        rows = [self.tokenizer(clean_prompt(text), self.max_tokens).ids for text in captions]
        longest = -(-max(len(ids) for ids in rows) // 8) * 8  # few lengths, few compilations
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = True
        device = self.encoder.token_embedding.weight.device
        ids, mask = ids.to(device), mask.to(device)
        encoded = self.encoder(ids, mask) * mask.unsqueeze(-1)
        return torch.nn.functional.pad(encoded, (0, 0, 0, TEXT_LENGTH - longest)), longest


M = TypeVar("M", bound=nn.Module)


def load_frozen(build: Callable[[], M], folder: Path, name: str, config: FinetuneConfig) -> M:
    """A component that training only reads."""
    checkpoint = open_checkpoint(folder / name)
    module = load_module(build, checkpoint, name, dtype=torch.float32, device=config.device)
    return module.requires_grad_(False).eval()


def read_settings(config: FinetuneConfig, folder: Path) -> PipelineConfig:
    """The released settings, or for a network from scratch those of the frozen parts and `dit`."""
    if not config.from_scratch:
        return read_pipeline_config(folder)
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
        defaults=SamplingDefaults(**config.sampling),
    )


def build_dit(config: FinetuneConfig, settings: PipelineConfig, folder: Path) -> WanDiT:
    """The transformer to train, in float32."""

    def build() -> WanDiT:
        return WanDiT(settings.transformer, checkpoint_blocks=config.checkpoint_blocks)

    generator = torch.Generator().manual_seed(config.seed)
    if config.from_scratch:
        dit = build()
        dit.init_weights(generator)
        return dit.to(config.device)
    checkpoint = open_checkpoint(folder / "transformer")
    dit = load_module(
        build,
        checkpoint,
        "transformer",
        dtype=torch.float32,
        device=config.device,
        share_mapping=False,
    )
    if config.lora.rank:
        add_lora(dit, config.lora.rank, config.lora.alpha, generator=generator)
    return dit


def make_train_step(
    dit: WanDiT, texts: Texts, cache: LatentCache, config: FinetuneConfig
) -> Callable[[TrainState], dict[str, float]]:
    device = config.device
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
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=config.bfloat16):
            velocity = dit(x.to(device), timestep.to(device), context, num_rows)
        target = velocity_target(x0, noise).to(device)
        loss = flow_matching_loss(velocity, target, None if weight is None else weight.to(device))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable, config.grad_clip)
        rate = learning_rate(state.step, config.lr, config.loop.steps, config.warmup, 0.02)
        set_learning_rate(state.optimizers, rate)
        for optimizer in state.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        state.averages["dit"].update(dit)
        return {"loss": loss.item(), "grad_norm": norm.item(), "lr": rate}

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
        x = draw_noise(shape, sample_generators(start, len(part))).to(config.device)

        def velocity(x: Tensor, timestep: float, context=context, num_rows=num_rows) -> Tensor:
            levels = torch.full((2 * len(x),), timestep, device=x.device)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=config.bfloat16):
                both = dit(torch.cat([x, x]), levels, context, num_rows)
            with_text, without = both.chunk(2)
            return without + config.validation_guidance * (with_text - without)

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
    model = folder / "model"
    shutil.rmtree(model, ignore_errors=True)
    for name in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(source / name, model / name)
    write_configs(settings, model)
    save_component(dit.state_dict(), model / "transformer", "transformer")
    return model


def open_data(config: FinetuneConfig, vae: WanVAE) -> LatentCache:
    data, root = config.data, Path(config.data.cache_dir)
    if data.folder is None:
        return world_cache(vae, root, data.num_clips, data.seed)
    size = (data.num_frames, data.height, data.width)
    return folder_cache(vae, Path(data.folder), root, *size, data.fps)


def finetune(config: FinetuneConfig) -> None:
    torch.set_num_threads(config.threads)
    source = WEIGHTS if config.checkpoint == BUILTIN else resolve_model(config.checkpoint)
    settings = read_settings(config, source)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)

    vae = load_frozen(lambda: WanVAE(settings.vae), source, "vae", config)
    cache = open_data(config, vae)
    encoder = load_frozen(
        lambda: UMT5Encoder(settings.text_encoder), source, "text_encoder", config
    )
    texts = Texts(encoder, Tokenizer.from_folder(source / "tokenizer"), config.max_text_tokens)
    dit = build_dit(config, settings, source)
    averaged = build_dit(config, settings, source).eval()
    state = TrainState(
        {"dit": dit},
        make_optimizers(dit, config.optimizer, config.lr, weight_decay=config.weight_decay),
        {"dit": EMA(dit, config.ema_decay)},
    )
    if config.compile:
        for block in dit.blocks:
            block.compile()

    def on_save(state: TrainState) -> dict[str, float]:
        state.averages["dit"].copy_to(averaged)
        return read_samples(averaged, texts, vae, config) if config.validation_captions else {}

    run_training(state, make_train_step(dit, texts, cache, config), config.loop, folder, on_save)
    if state.step < config.loop.steps:
        return  # stopped on request; the same command goes on
    state.averages["dit"].copy_to(averaged)
    print(f"wrote {export(averaged, source, settings, folder, config)}")


if __name__ == "__main__":
    run_command(finetune, FinetuneConfig, "finetune")
