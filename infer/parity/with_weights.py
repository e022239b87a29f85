"""The rungs of the ladder: each compares one part of the model and returns rows.

Expected in float32 on a CPU is the rounding of sums in another order: 2e-6 (relative rms) for the
networks of text and diffusion, 1e-5 for the autoencoder, 1e-4 after a whole sampling run.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from infer.parity.hooks import (
    Align,
    Points,
    align_text,
    align_transformer,
    align_vae,
    join_calls,
    matched,
    matching_modules,
    recording,
    single_call,
)
from infer.parity.models import Sides, reference
from infer.parity.tolerance import (
    Row,
    compare,
    compare_points,
    compare_to_truth,
    count_differences,
)
from wan.models.dit import WanDiT
from wan.models.tokenizer import Tokenizer, clean_prompt
from wan.models.umt5 import encode_text
from wan.pipeline.config import part_folder
from wan.pipeline.parts import weight_kind
from wan.pipeline.pipeline import WanPipeline

NETWORK_TOLERANCE = 2e-6
VAE_TOLERANCE = 1e-5
RUN_TOLERANCE = 1e-4
SAVE_LIMIT = 4_000_000_000  # bytes: a larger release is not written a second time

PROMPTS = (
    "a small red circle moving right on a gray background",
    "",
    "  Two   cats,\tone &amp;amp; the other -- “quoted” … {braces} [x] $HOME a=b\n\nnew line ",
    "Ｆｕｌｌ－ｗｉｄｔｈ，ﬁne ligatures， l’été à Besançon",
    "一只猫在街上走 🙂🙂 قطة تمشي कैट",
    "literal </s> and <extra_id_0> inside",
    "word " * 700,
)


# --- text -----------------------------------------------------------------------------------------


def tokens(sides: Sides) -> list[Row]:
    """Cleaned prompts and ids: both of our back ends against diffusers and transformers."""
    reference("diffusers")
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    cleaned = [prompt_clean(text) for text in PROMPTS]
    differences = sum(clean_prompt(t) != c for t, c in zip(PROMPTS, cleaned, strict=True))
    note = f"{len(PROMPTS)} prompts"
    rows = [count_differences("prompt", f"{sides.name}: cleaning", differences, note)]
    length = sides.config.defaults.max_sequence_length
    tokenizer = sides.their_tokenizer()
    theirs = tokenizer(cleaned, max_length=length, truncation=True).input_ids
    folder = part_folder(sides.folder, "tokenizer")
    for name, missing in (("tokenizer.json", "spiece.model"), ("spiece.model", "tokenizer.json")):
        if not (folder / name).is_file():
            continue
        with tempfile.TemporaryDirectory() as scratch:  # the back end is chosen by what is there
            for file in folder.iterdir():
                if file.name != missing:
                    (Path(scratch) / file.name).write_bytes(file.read_bytes())
            ours = Tokenizer.from_folder(scratch)
            ids = [ours(text, length).ids for text in cleaned]
        differences = sum(a != b for a, b in zip(ids, theirs, strict=True))
        rows.append(count_differences("prompt", f"{sides.name}: ids by {name}", differences, note))
    return rows


def text_encoder(sides: Sides) -> list[Row]:
    """One prompt as long as there may be tensor by tensor, then several, padding included."""
    ours, length = sides.ours("text_encoder"), sides.config.defaults.max_sequence_length
    tokenizer = Tokenizer.from_folder(part_folder(sides.folder, "tokenizer"))
    texts = [PROMPTS[-1], *PROMPTS[:3]]  # positions far apart share a bias from distance 91 on
    batch = sides.their_tokenizer()(
        [clean_prompt(text) for text in texts],
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    )
    ids, mask = batch.input_ids, batch.attention_mask

    def their_layers(model: Any, dtype: torch.dtype) -> Tensor:
        return model(ids[:1], mask[:1]).last_hidden_state[:, : int(mask[0].sum())]

    def their_context(model: Any, dtype: torch.dtype) -> Tensor:
        return model(ids, mask).last_hidden_state * mask.unsqueeze(-1)

    def our_layers(model: Any) -> Tensor:
        return model(ids[:1, : int(mask[0].sum())])

    what = f"{sides.name}: context of {len(texts)} prompts"
    context = encode_text(ours, tokenizer, texts, length)
    theirs = on_references(sides, "text_encoder", their_context)
    long_prompt = f"{sides.name}: a long prompt"
    return [
        *trace_rows(sides, "text_encoder", ours, long_prompt, our_layers, their_layers),
        verdict(sides, "text encoder", what, context, theirs, NETWORK_TOLERANCE),
    ]


# --- the networks, tensor by tensor ---------------------------------------------------------------


@dataclass(frozen=True)
class References:
    """What the reference gives in the dtype of this run, and in float32: the truth."""

    theirs: Any
    truth: Any


def on_references(sides: Sides, part: str, run: Callable[[Any, torch.dtype], Any]) -> References:
    """Run the reference's network once in float32 and, if that is another dtype, in this run's."""
    truth = run(sides.theirs(part, torch.float32), torch.float32)
    if sides.dtype == torch.float32:
        return References(truth, truth)
    return References(run(sides.theirs(part), sides.dtype), truth)


def verdict(
    sides: Sides, rung: str, what: str, ours: Tensor, theirs: References, tolerance: float
) -> Row:
    """A row by the rule of this run's dtype."""
    if sides.dtype == torch.float32:
        return compare(rung, what, ours, theirs.truth, tolerance)
    return compare_to_truth(rung, what, ours, theirs.theirs, theirs.truth)


@dataclass(frozen=True)
class Kind:
    """How a kind of network is compared module by module.

    Attributes:
        rung: the name of its rows.
        align: brings the layouts of a pair of tensors together.
        join: makes one tensor of those of several calls of a module.
        inputs: compare what goes into each module too.
        stage: module name -> the row it counts for.
    """

    rung: str
    tolerance: float
    align: Align
    join: Callable[[list[Tensor]], Tensor] = single_call
    inputs: bool = True
    stage: Callable[[str], str] = lambda name: "all layers"


def trace_rows(
    sides: Sides,
    part: str,
    ours: Any,
    what: str,
    run_ours: Callable[[Any], Tensor],
    run_theirs: Callable[[Any, torch.dtype], Tensor],
) -> list[Row]:
    """One forward on both sides, recorded: a row per stage and one for the result.

    In bfloat16 no single tensor is held against a limit, only the result.

    Args:
        what: names the forward in its rows.
        run_ours, run_theirs: the same computation; the reference gets the dtype it runs in.
    """
    component = weight_kind(part)
    kind = KINDS[component]
    levels = sides.vae_levels if component == "vae" else None
    names = matching_modules(component, ours, levels)

    def record_theirs(model: Any, dtype: torch.dtype) -> tuple[Tensor, dict[str, list[Tensor]]]:
        with recording(model, names, kind.inputs) as seen:
            return run_theirs(model, dtype), seen

    with recording(ours, {name: name for name in names}, kind.inputs) as seen:
        result = run_ours(ours)
    references = on_references(sides, part, record_theirs)
    rows = []
    if sides.dtype == torch.float32:
        stages: dict[str, Points] = {}
        for point in matched(seen, references.truth[1], kind.align, kind.join):
            stages.setdefault(kind.stage(point[0]), []).append(point)
        for stage, points in stages.items():
            rows.append(compare_points(kind.rung, f"{what}: {stage}", points, kind.tolerance))
    results = References(references.theirs[0], references.truth[0])
    rows.append(verdict(sides, kind.rung, f"{what}: result", result, results, kind.tolerance))
    return rows


def transformer_stage(name: str) -> str:
    """blocks.3.ffn.up -> block 3; what comes before the blocks is one stage."""
    first, *rest = name.removesuffix(" input").split(".")
    if first == "blocks":
        return f"block {rest[0]}"
    return "head" if first == "head" else "embedders"


KINDS = {
    "text_encoder": Kind("text encoder", NETWORK_TOLERANCE, align_text),
    "transformer": Kind(
        "transformer", NETWORK_TOLERANCE, align_transformer, stage=transformer_stage
    ),
    "vae": Kind("autoencoder", VAE_TOLERANCE, align_vae, join=join_calls, inputs=False),
}


def transformer(sides: Sides) -> list[Row]:
    """Every block and the whole forward of each network, with both forms of the timestep."""
    per_frame = torch.tensor([[0.0, 937.0, 937.0], [0.0, 411.0, 411.0]])
    rows = []
    for part in (part for part in sides.parts if part.startswith("transformer")):
        ours = sides.ours(part)
        rows += transformer_rows(sides, part, ours, per_frame[:, 1])
        rows += transformer_rows(sides, part, ours, per_frame)
    return rows


def transformer_rows(sides: Sides, part: str, ours: WanDiT, timestep: Tensor) -> list[Row]:
    """One forward, with timesteps (B,) or (B, T)."""
    generator, config = sides.generator(), ours.config
    latents = rounded(torch.randn(2, config.in_channels, 3, 4, 6, generator=generator))
    context = rounded(torch.randn(2, 40, config.text_dim, generator=generator))
    context[:, 21:] = 0
    their_timestep, form = timestep, "t per video"
    if timestep.ndim == 2:  # the reference takes one per token
        their_timestep, form = timestep.repeat_interleave(2 * 3, dim=1), "t per frame"

    def run_theirs(model: Any, dtype: torch.dtype) -> Tensor:
        arguments = (latents.to(dtype), their_timestep, context.to(dtype))
        return model(*arguments, return_dict=False)[0]

    def run_ours(model: WanDiT) -> Tensor:
        return model(latents, timestep, context)

    return trace_rows(sides, part, ours, f"{sides.name} {part}, {form}", run_ours, run_theirs)


def rounded(x: Tensor) -> Tensor:
    """To what bfloat16 holds, so that no side is charged for rounding its inputs."""
    return x.bfloat16().float()


def autoencoder(sides: Sides) -> list[Row]:
    """A clip to latents and latents to a clip, both in the reference's chunks."""
    ours = sides.ours("vae")
    config, stride, generator = ours.config, ours.config.spatial_stride, sides.generator()
    video = rounded(torch.rand(1, 3, 9, 2 * stride, 3 * stride, generator=generator) * 2 - 1)
    latents = rounded(torch.randn(1, config.z_dim, 3, 2, 3, generator=generator))

    def statistics(model: Any) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(getattr(model.config, f"latents_{n}")) for n in ("mean", "std"))
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)

    def encode(model: Any, dtype: torch.dtype) -> Tensor:
        mean, std = statistics(model)
        posterior = model.encode(video.to(dtype)).latent_dist
        return (posterior.mode().float() - mean) / std

    def decode(model: Any, dtype: torch.dtype) -> Tensor:
        mean, std = statistics(model)
        return model.decode((latents * std + mean).to(dtype), return_dict=False)[0].float()

    rows = []
    for what, run_ours, run_theirs in (
        (
            "encode",
            lambda vae: vae.encode_normalized(video, chunk_frames=config.temporal_stride),
            encode,
        ),
        ("decode", lambda vae: vae.decode_normalized(latents, chunk_latents=1).float(), decode),
    ):
        rows += trace_rows(sides, "vae", ours, f"{sides.name} {what}", run_ours, run_theirs)
    return rows


# --- whole runs -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Video:
    """What a run leaves behind: the latents (B, C, T, h, w) after each step, and the pixels."""

    latents: list[Tensor]
    pixels: Tensor


def pipeline(sides: Sides) -> list[Row]:
    """Prompt to pixels with guidance, and from an image where the model takes one.

    The reference loads a folder that our code wrote, unless the release is too big to write twice.
    """
    # Naming the transformer lets a few-step student run like a base model, as in the reference.
    ours = WanPipeline.from_pretrained(
        sides.folder, dtype=sides.dtype, transformer=sides.folder / "transformer"
    )
    noise, settings = sampling_inputs(sides)
    videos = [run_pipeline(ours, noise, settings)]
    if sides.config.expand_timesteps:
        videos.append(run_pipeline(ours, noise, settings | {"image": noise_image(sides)}))
    with tempfile.TemporaryDirectory() as scratch:
        folder, note = sides.folder, "reference loaded from the given folder"
        if sum(file.stat().st_size for file in folder.rglob("*.safetensors")) <= SAVE_LIMIT:
            folder, note = Path(scratch) / "saved", "reference loaded from a folder written here"
            ours.save_pretrained(folder)
        truth = theirs = reference_videos(sides, folder, torch.float32)
        if sides.dtype != torch.float32:
            theirs = reference_videos(sides, folder, sides.dtype)
    rows = []
    for what, video, video_truth, their_video in zip(
        (sides.name, f"{sides.name}, from an image"), videos, truth, theirs, strict=False
    ):
        for k in sorted({1, (sides.steps + 1) // 2, sides.steps}):
            step = References(their_video.latents[k - 1], video_truth.latents[k - 1])
            label = f"{what}: latents after {k} of {sides.steps} steps"
            latents = video.latents[k - 1]
            rows.append(verdict(sides, "sampling", label, latents, step, RUN_TOLERANCE))
        pixels = References(their_video.pixels, video_truth.pixels)
        label = f"{what}: pixels"
        row = verdict(sides, "sampling", label, video.pixels, pixels, RUN_TOLERANCE)
        rows.append(replace(row, note=row.note or note))
    return rows


def sampling_inputs(sides: Sides) -> tuple[Tensor, dict[str, Any]]:
    """Start noise, and the arguments that both pipelines take."""
    config = sides.config
    stride, (_, patch_h, patch_w) = config.vae.spatial_stride, config.transformer.patch_size
    height, width, num_frames = 2 * stride * patch_h, 3 * stride * patch_w, 9
    shape = config.latent_shape(height, width, num_frames)
    settings = {
        "prompt": PROMPTS[0],
        "negative_prompt": "a blue square",
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "num_inference_steps": sides.steps,
        "guidance_scale": 4.0,
        "max_sequence_length": config.defaults.max_sequence_length,
        "output_type": "np",
    }
    return torch.randn(1, *shape, generator=sides.generator()), settings


def noise_image(sides: Sides) -> Image.Image:
    """A picture of another size than the video."""
    pixels = torch.randint(256, (50, 70, 3), dtype=torch.uint8, generator=sides.generator())
    return Image.fromarray(pixels.numpy())


def run_pipeline(pipe: Any, noise: Tensor, settings: dict[str, Any]) -> Video:
    """Sample with either side's pipeline."""
    latents: list[Tensor] = []

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        latents.append(tensors["latents"].clone())
        return {}

    frames = pipe(latents=noise, callback_on_step_end=keep, **settings).frames
    return Video(latents, torch.from_numpy(frames))


def reference_videos(sides: Sides, folder: Path, dtype: torch.dtype) -> list[Video]:
    pipe = sides.their_pipeline(folder, dtype)
    noise, settings = sampling_inputs(sides)
    videos = [run_pipeline(pipe, noise, settings)]
    if sides.config.expand_timesteps:
        parts = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")
        from_image = reference("diffusers").WanImageToVideoPipeline(
            **{name: getattr(pipe, name) for name in parts}, expand_timesteps=True
        )
        from_image.set_progress_bar_config(disable=True)
        videos.append(run_pipeline(from_image, noise, settings | {"image": noise_image(sides)}))
    return videos
