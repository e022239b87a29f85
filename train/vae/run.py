"""The miniature's autoencoder, trained and exported: the work of `train.vae`."""

import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.cli import INTERRUPTED
from configs.progress import Steps, doing
from configs.training import VAETrainConfig
from train.artefact import Artefacts, Weights, export_part
from train.conditioning import weights_digest
from train.kept import KeptRun
from train.loop import START_DIGEST, run_training, step_generator
from train.metrics import check_mirrors
from train.optim import (
    EMA,
    apply_gradients,
    learning_rate,
    make_optimizers,
    trainable,
    warn_of_warmup,
    with_precision,
)
from train.parallel import ALONE
from train.state import TrainState, load_trainable
from wan.errors import WanError
from wan.files import expanded, read_json, write_json
from wan.miniature.world import render, sample_scene, scene_rng
from wan.models.vae import StreamCache, VAEConfig, WanVAE
from wan.pipeline.parts import vae_levels
from wan.weights.checkpoint import open_checkpoint
from wan.weights.load import load_state


def initialize(vae: WanVAE) -> None:
    """Start every residual block as the identity, so that the shortcuts carry the first signal."""
    for name, module in vae.named_modules():
        if name.endswith(("conv2", "attention.proj")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)


def rendered_clips(count: int, seed: int) -> Tensor:
    """`count` training clips (count, 3, F, H, W) in [-1, 1], a function of the seed."""
    return render([sample_scene(scene_rng(seed, i), split="train") for i in range(count)])


def foreground_mask(clips: Tensor) -> Tensor:
    """1 where a pixel differs from its clip's background or borders one that does: (B,1,F,H,W)."""
    background = clips[:, :, :1, :1, :1]  # objects never reach the corner
    mask = ((clips - background).abs().amax(dim=1, keepdim=True) > 0.1).float()
    return F.max_pool3d(mask, (1, 5, 5), stride=1, padding=(0, 2, 2))


def crop_around_objects(
    clips: Tensor, crops_per_clip: int, size: int, frames: int, generator: torch.Generator
) -> Tensor:
    """Windows that contain some of an object: (B, 3, F, H, W) -> (B * n, 3, frames, size, size)."""
    mask = foreground_mask(clips)
    out = []
    for clip, where in zip(clips, mask, strict=True):
        for _ in range(crops_per_clip):
            start = int(torch.randint(clip.shape[1] - frames + 1, (), generator=generator))
            inside = where[0, start + frames // 2].nonzero()
            pick = inside[int(torch.randint(len(inside), (), generator=generator))]
            jitter = torch.randint(-size // 2, size // 2 + 1, (2,), generator=generator)
            corner = pick + jitter - size // 2
            top = int(corner[0].clamp(0, clip.shape[2] - size))
            left = int(corner[1].clamp(0, clip.shape[3] - size))
            out.append(clip[:, start : start + frames, top : top + size, left : left + size])
    return torch.stack(out)


def reconstruction_loss(video: Tensor, target: Tensor, foreground: float) -> Tensor:
    """L1 plus L2 with `foreground` times the weight on objects, plus L1 of spatial differences."""
    weight = 1 + (foreground - 1) * foreground_mask(target)
    error = video - target
    pixels = (weight * (error.abs() + error.square())).sum() / (3 * weight.sum())
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return pixels + 0.5 * edges


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, var) || N(0, 1)), averaged over latent numbers."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


def make_train_step(vae: WanVAE, config: VAETrainConfig):
    def train_step(state: TrainState) -> dict[str, float]:
        generator = step_generator(config.seed, state.step)
        whole = state.step >= config.loop.steps - config.whole_clip_steps
        seed = config.seed * 1_000_003 + state.step
        if whole:
            clips = rendered_clips(config.whole_clip_batch, seed)
        else:
            clips = crop_around_objects(
                rendered_clips(config.batch_size // config.crops_per_clip, seed),
                config.crops_per_clip,
                config.crop_size,
                config.crop_frames,
                generator,
            )
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(config.bfloat16)):
            with torch.set_grad_enabled(not config.decoder_only):
                mean, log_variance = vae.encode_moments(clips).float().chunk(2, dim=1)
            log_variance = log_variance.clamp(-30, 20)
            noise = torch.randn(mean.shape, generator=generator)
            z = mean + (0.5 * log_variance).exp() * noise
            video = vae.decode_chunk(z, StreamCache(keep=False)).float()
        reconstruction = reconstruction_loss(video, clips, config.foreground_weight)
        divergence = kl_divergence(mean, log_variance)
        loss = reconstruction + config.kl_weight * divergence
        loss.backward()
        lr = learning_rate(state.step, config.lr, config.loop.steps, config.warmup, final=0.02)
        weights = trainable(vae).values()
        norm = apply_gradients(state.optimizers, weights, lr, config.grad_clip)
        state.averages["vae"].update(vae)
        mse = (video.detach().clamp(-1, 1) - clips).square().mean()
        return {
            "loss": loss.item(),
            "psnr": psnr(float(mse)),
            "kl": divergence.item(),
            "grad_norm": norm,
        }

    return train_step


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error on the [-1, 1] scale."""
    return float(10 * np.log10(4 / max(mse, 1e-12)))


@torch.no_grad()
def measure(vae: WanVAE, clips: Tensor, bfloat16: bool) -> dict[str, float]:
    """PSNR of whole-clip reconstructions, over all pixels and over the objects' pixels."""
    made = []
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=bfloat16),
        Steps("whole clips measured", len(clips)) as steps,
    ):
        for clip in clips:
            made.append(vae.decode_normalized(vae.encode_normalized(clip[None]), None))
            steps.add()
        video = torch.cat(made).float()
    error = (video - clips).square()
    mask = foreground_mask(clips).expand_as(error)
    return {
        "val_psnr": psnr(float(error.mean())),
        "val_psnr_foreground": psnr(float((error * mask).sum() / mask.sum())),
    }


@torch.no_grad()
def latent_statistics(vae: WanVAE, num_clips: int, seed: int) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation of raw latents over freshly rendered clips."""
    means = []
    with Steps("clips encoded for the statistics of latents", num_clips) as steps:
        for start in range(0, num_clips, 8):
            moments = vae.encode_moments(rendered_clips(8, seed + start))
            means.append(moments.chunk(2, dim=1)[0].transpose(0, 1).flatten(1))
            steps.add(min(8, num_clips - start))
    z = torch.cat(means, dim=1)
    return z.mean(dim=1).tolist(), z.std(dim=1).tolist()


@dataclass(frozen=True)
class TrainedVAE:
    """The `vae/` of a model, with the statistics of its latents; an artefact of the run.

    Attributes:
        vae: has the weights that are not trained; the others are written over.
    """

    vae: WanVAE
    config: VAETrainConfig
    final: str = "vae"
    ending: str = ""

    def write(self, weights: Weights, place: Path) -> None:
        load_trainable(self.vae, weights)
        if not self.config.decoder_only:
            mean, std = latent_statistics(self.vae, self.config.statistics_clips, seed=2**41)
            self.vae.config = replace(
                self.vae.config, latents_mean=tuple(mean), latents_std=tuple(std)
            )
        export_part(self.vae, place, "vae", vae_levels=vae_levels(self.vae.config))

    def num_bytes(self, weights: Weights) -> int:
        return 4 * sum(weight.numel() for weight in self.vae.parameters())


def build_vae(config: VAETrainConfig) -> WanVAE:
    """From scratch, or with the weights and settings of `start`; what is kept is frozen."""
    if config.start is None:
        if config.decoder_only:
            raise WanError("decoder_only=true keeps an encoder: name its vae/ folder in start=")
        vae = WanVAE(VAEConfig.from_json(config.vae))
        initialize(vae)
        return vae
    folder = expanded(config.start)
    settings = VAEConfig.from_json(read_json(folder / "config.json"))
    vae = WanVAE(settings)
    vae.load_state_dict(load_state(open_checkpoint(folder), "vae"))
    if config.decoder_only:
        for part in (vae.encoder, vae.quant_conv):
            part.requires_grad_(False)
    return vae


def left_by(run: KeptRun) -> Artefacts:
    """What becomes of the autoencoder of a run, by what the run's folder holds."""
    config = run.config(VAETrainConfig)
    if config.start is not None:
        place = run.model("start", config.start, START_DIGEST, weights_digest)
        config = replace(config, start=str(place))
    return Artefacts("vae", [TrainedVAE(build_vae(config), config)])


def train_vae(config: VAETrainConfig) -> int:
    check_mirrors(config.loop)
    folder = expanded(config.output_dir)
    config = with_precision(config, folder, ALONE)
    folder.mkdir(parents=True, exist_ok=True)
    warn_of_warmup(config.loop.steps, config.warmup)
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    vae = build_vae(config)
    optimizers = make_optimizers(vae, config.optimizer, config.lr)
    state = TrainState({"vae": vae}, optimizers, {"vae": EMA(vae, config.ema_decay)})
    with doing("rendering clips to validate with"):
        validation = rendered_clips(config.validation_clips, seed=2**40)
    averaged = copy.deepcopy(vae)

    def on_save(state: TrainState) -> dict[str, float]:
        state.averages["vae"].copy_to(averaged)
        return measure(averaged, validation, bool(config.bfloat16))

    train_step = make_train_step(vae, config)
    identity = asdict(config)
    if config.start is not None:
        identity[START_DIGEST] = weights_digest(expanded(config.start))
    final = TrainedVAE(copy.deepcopy(vae), config)
    left = Artefacts("vae", [final])
    if not run_training(
        state,
        train_step,
        config.loop,
        folder,
        identity,
        on_save,
        artefacts=left,
        schema=type(config),
    ):
        return INTERRUPTED
    left.write_end(state, folder, ALONE)
    measured = measure(final.vae, validation, bool(config.bfloat16))
    write_json(folder / "vae_report.json", measured)
    print(measured)
    return 0
