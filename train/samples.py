"""Samples of fixed prompts while a network is fine-tuned.

They are made as inference makes them: by the model's own sampler, with its guidance and steps, from
noise that depends on the seed alone. So what changes from save to save is the network. Prompts are
encoded once, before the network is loaded. The autoencoder is opened when samples are there to be
decoded, and closed again.
"""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from configs.data import parse_size
from configs.progress import Steps
from configs.schema import check_prompt
from configs.training import FinetuneConfig
from train.clips import read_prompts
from train.conditioning import CaptionEncoder, Texts, load_frozen, text_dtype
from train.parallel import Ranks
from train.rollout import sampler_velocity
from train.validation import Pictures, decode_clip
from wan.errors import WanError
from wan.files import expanded
from wan.media.video import to_uint8, write_video
from wan.models.dit import WanDiT
from wan.models.tokenizer import Tokenizer
from wan.models.vae import WanVAE
from wan.pipeline.config import OFFICIAL_NEGATIVE_PROMPT, PipelineConfig, part_folder
from wan.pipeline.plan import SamplingPlan, SamplingRequest, plan_sampling
from wan.sampling.denoiser import Condition
from wan.sampling.noise import draw_noise, sample_generators
from wan.sampling.samplers import sample

MAX_PROMPTS = 32  # each is sampled twice at every save
OPTIONS = ("every", "size", "seed", "steps", "shift", "guidance", "negative_prompt")


def sample_prompts(config: FinetuneConfig) -> list[str]:
    """The prompts of `sample_prompts=`, those of files read.

    Raises:
        WanError: too many, one is empty, or other options of samples are given and no prompt.
    """
    prompts: list[str] = []
    for entry in config.sample_prompts:
        is_file = entry.endswith(".txt")
        prompts += read_prompts(expanded(entry), "sample_prompts") if is_file else [entry]
    for prompt in prompts:
        check_prompt("sample_prompts", prompt)
    if len(prompts) > MAX_PROMPTS:
        raise WanError(
            f"sample_prompts=: {len(prompts)} prompts, at most {MAX_PROMPTS}, as each is sampled "
            "twice at every save; sample more of what a run writes with infer.sample"
        )
    defaults = {each.name: each.default for each in fields(config)}
    given = [n for n in OPTIONS if getattr(config, f"sample_{n}") != defaults[f"sample_{n}"]]
    if given and not prompts:
        names = ", ".join(f"sample_{name}=" for name in given)
        raise WanError(f"{names} without sample_prompts=: nothing is sampled; give prompts too")
    every, save = config.sample_every, config.loop.save_every
    if every is not None and every % save:
        raise WanError(
            f"sample_every={every}: samples are made at saves, so give a multiple of "
            f"loop.save_every={save}"
        )
    return list(dict.fromkeys(prompts))


def given_shape(config: FinetuneConfig, settings: PipelineConfig) -> tuple[int, ...] | None:
    """(C, T, h, w) of the latents that `sample_size=` asks for; None if it is not given.

    Raises:
        WanError: the model cannot make this size.
    """
    if config.sample_size is None:
        return None
    frames, height, width = parse_size(config.sample_size, "sample_size")
    return settings.latent_shape(height, width, frames)


def sampling_plan(config: FinetuneConfig, settings: PipelineConfig) -> SamplingPlan:
    """How samples are made: as the model says, but for the options that are given.

    Raises:
        WanError: the options do not fit the model.
    """
    given_shape(config, settings)
    named = {f"sample_{n}": getattr(config, f"sample_{n}") for n in OPTIONS[3:]}
    if settings.timesteps and (given := [n for n, value in named.items() if value is not None]):
        raise WanError(
            f"{', '.join(given)}: this model is a few-step student, which is sampled in its own "
            "steps and without guidance; leave it out"
        )
    return plan_sampling(
        settings,
        SamplingRequest(
            num_inference_steps=config.sample_steps,
            shift=config.sample_shift,
            guidance_scale=config.sample_guidance,
            negative_prompt=config.sample_negative_prompt is not None,
        ),
    )


def encode_prompts(
    prompts: Sequence[str], settings: PipelineConfig, source: Path, ranks: Ranks, max_tokens: int
) -> Texts:
    """Captions -> context, of these texts alone; the text encoder is gone afterwards.

    The main process encodes them for all.
    """
    encoded: dict[str, Tensor] = {}
    with ranks.together():
        if ranks.is_main:
            device = ranks.device
            encoder = load_frozen(
                source, "text_encoder", settings.text_encoder, device, text_dtype(device)
            )
            tokenizer = Tokenizer.from_folder(part_folder(source, "tokenizer"))
            tokens_of = CaptionEncoder(encoder, tokenizer, max_tokens)
            encoded = {text: tokens_of([text])[0].cpu().clone() for text in prompts}
    encoded = ranks.first(encoded)
    return Texts(lambda captions: [encoded[text] for text in captions], ranks.device)


@dataclass(frozen=True)
class Sampler:
    """Everything that samples follow from, but for the network.

    Attributes:
        texts: prompts and `negative` -> context.
        shape: (C, T, h, w) of the latents of a sample.
        open_vae: opens the autoencoder.
        fps: frames per second of the files.
    """

    prompts: list[str]
    negative: str
    texts: Texts
    plan: SamplingPlan
    shape: tuple[int, ...]
    seed: int
    bfloat16: bool
    fps: float
    open_vae: Callable[[], WanVAE]
    ranks: Ranks

    @torch.no_grad()
    def sample(self, dit: WanDiT) -> dict[int, Tensor]:
        """Latents (C, T, h, w) on the CPU, of the prompts that are this process's share.

        There are none, and a line says so, where the device's memory does not suffice. Of several
        processes, which wait for each other in the network, that ends the run instead.
        """
        made: dict[int, Tensor] = {}
        count = len(self.prompts)
        share = -(-count // self.ranks.data_size)

        def make(numbers: list[int]) -> list[None]:
            for number in numbers:
                made[number] = self.sample_one(dit, self.prompts[number], bar)
            return [None] * len(numbers)

        total = share * len(self.plan.schedule)
        with Steps("steps of samples", total, quiet=not self.ranks.is_main) as bar:
            try:
                self.ranks.spread(make, range(count), 1, "samples")
            except torch.OutOfMemoryError as error:
                if self.ranks.size > 1:
                    raise
                print(f"warning: sample_prompts=: no samples now: {error}", file=sys.stderr)
                made.clear()
        self.ranks.reshard(dit)
        first = self.ranks.data_rank * share  # what is made behind the share fills up the turns
        return {n: made[n] for n in range(first, min(first + share, count)) if n in made}

    def sample_one(self, dit: WanDiT, prompt: str, bar: Steps) -> Tensor:
        condition, null = (Condition(*self.texts([text])) for text in (prompt, self.negative))
        scale = self.plan.guidance_scale
        velocity = sampler_velocity(dit, condition, null, scale, self.bfloat16)
        generators = sample_generators(self.seed, 1)
        stepper = self.plan.stepper(renoise=lambda i: draw_noise(self.shape, generators))
        x = draw_noise(self.shape, generators).to(self.ranks.device)

        def on_step(*_: object) -> None:
            bar.add()

        return sample(velocity, x, stepper, on_step)[0].cpu()

    def write(self, folder: Path, step: int, made: dict[str, dict[int, Tensor]]) -> None:
        """Write mp4 files that say step, weights, number and prompt; all processes call it.

        Args:
            made: the name of the weights -> what `sample` has made with them.
        """
        pictures = Pictures(folder, step)
        if self.ranks.leads_group and any(made.values()):
            pictures.note(lambda: self.write_share(pictures, made))
        pictures.close(self.ranks)

    def write_share(self, pictures: Pictures, made: dict[str, dict[int, Tensor]]) -> None:
        vae = self.open_vae()
        for weights, latents in made.items():
            for number, clip in latents.items():
                prompt = self.prompts[number]
                about = f"{pictures.step} steps, {weights} weights, seed {self.seed}"
                frames = to_uint8(decode_clip(vae, clip))
                metadata = {"title": prompt, "comment": about}
                write = partial(write_video, frames=frames, fps=self.fps, metadata=metadata)
                pictures.write(f"{weights}-{number + 1}-{short_name(prompt)}.mp4", write)


def short_name(prompt: str, most: int = 40) -> str:
    """The beginning of a prompt as a part of a file's name: a-small-red-circle."""
    return "-".join(re.findall(r"\w+", prompt.lower()))[:most].strip("-")


def open_sampler(
    config: FinetuneConfig,
    settings: PipelineConfig,
    source: Path,
    plan: SamplingPlan,
    shape: tuple[int, ...],
    ranks: Ranks,
    vae: WanVAE | None,
) -> Sampler:
    """Encode the prompts of a run and decide all that its samples follow from.

    Args:
        shape: of the latents of clips; `sample_size=` comes before it.
        vae: the autoencoder, if it is in memory anyway.
    """
    negative = config.sample_negative_prompt
    if negative is None:
        negative = OFFICIAL_NEGATIVE_PROMPT if settings.released_base else ""
    texts = [*config.sample_prompts, negative]

    def open_vae() -> WanVAE:
        if vae is not None:
            return vae
        return load_frozen(source, "vae", settings.vae, ranks.device, torch.float32)

    return Sampler(
        config.sample_prompts,
        negative,
        encode_prompts(texts, settings, source, ranks, config.max_text_tokens),
        plan,
        given_shape(config, settings) or shape,
        config.sample_seed,
        bool(config.bfloat16),
        settings.defaults.fps,
        open_vae,
        ranks,
    )
