"""Clips and texts judged, encoded and stored: the work of `train.preprocess`."""

import hashlib
import json
import math
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from configs.data import FRAMES, PreprocessConfig, parse_size
from train.clips import (
    RECIPE,
    Clip,
    ClipRules,
    judge_clip,
    list_clips,
    read_caption,
    read_prompts,
    read_samples,
)
from train.conditioning import CaptionEncoder, TokensOf, component_digests, load_frozen, text_dtype
from train.data import INDEX, REPORT, SET_ASIDE, content_digest, encode_float16, text_key
from train.tensor_cache import TensorStore, is_shard, key_of, only_writer, open_to_extend
from wan.errors import WanError
from wan.files import expanded, read_json, read_sealed, write_sealed, write_text
from wan.models.dit_config import DiTConfig
from wan.models.tokenizer import Tokenizer, clean_prompt
from wan.models.vae import VAEConfig, WanVAE
from wan.pipeline.config import component_config, part_folder
from wan.runtime.offload import resolve_device
from wan.settings import check_kinds
from wan.weights.digests import sha256_file
from wan.weights.hub import resolve_model

CHECK = "check.jsonl"  # the report of check_only=true and of runs that fail: both change no data
CHUNK = 16  # frames that the autoencoder takes at a time
TEXTS_PER_SHARD = 256
# The options that, with `sizes`, say what becomes of a clip.
RULES = ("fps", "retime", "max_crop", "max_upscale", "frames", "frame_stride", "frame_samples")

Line = dict[str, Any]


def preprocess(config: PreprocessConfig) -> int:
    """Judge and encode all clips, encode all texts; the index is written last."""
    if config.clips is None and config.prompts is None:
        raise WanError("nothing to do: give clips= (a folder or a list), prompts= or both")
    clips = list_clips(expanded(config.clips)) if config.clips is not None else []
    prompts = read_prompts(expanded(config.prompts)) if config.prompts is not None else []
    torch.set_num_threads(config.threads)
    device = resolve_device(config.device)
    source = resolve_model(config.checkpoint)

    def load_vae() -> WanVAE:
        return load_frozen(source, "vae", None, device, torch.float32)

    def load_encoder() -> TokensOf:
        encoder = load_frozen(source, "text_encoder", None, device, text_dtype(device))
        return CaptionEncoder(encoder, tokenizer, config.max_text_tokens)

    index: Line = {
        "identity": identity(config, source, device),
        "latent_shapes": latent_shapes(
            config,
            VAEConfig.from_json(read_json(component_config(source, "vae", {}))),
            patch_size(source),
        ),
    }
    tokenizer = Tokenizer.from_folder(part_folder(source, "tokenizer"))
    folder = expanded(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with nullcontext() if config.check_only else only_writer(folder):
        latents = TensorStore(folder, "latents")
        if not config.check_only:
            claim(folder, index)
            latents = open_to_extend(folder, "latents", config.verify)
        lines = judge_and_encode(clips, config, index, latents, load_vae)
        good = [line for line in lines if line["verdict"] == "ok"]
        for line in good:
            tokens = tokenizer(clean_prompt(line["caption"]), config.max_text_tokens)
            line["caption_tokens"] = tokens.num_tokens_before_truncation
            line["caption_cut"] = tokens.truncated
        report = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        failure = too_many_set_aside(lines, len(clips), config, folder / CHECK)
        if config.check_only or failure:
            write_text(folder / CHECK, report)
        if failure:
            raise WanError(failure)
        print(summary(lines, prompts, folder))
        if dropped := dropped_seconds(lines, config.frames):
            print(dropped)
        if config.check_only:
            return 0
        index |= {"prompts": prompts, "negative_prompt": config.negative_prompt}
        texts = {line["caption"] for line in good} | {*prompts, "", config.negative_prompt or ""}
        stored_texts = open_to_extend(folder, "texts", config.verify)
        encode_texts(texts, index, stored_texts, load_encoder)
        clip_keys, text_keys = [line["key"] for line in good], [text_key(index, t) for t in texts]
        index["content_sha256"] = content_digest(latents, clip_keys, stored_texts, text_keys)
        index["report_sha256"] = hashlib.sha256(report.encode()).hexdigest()
        write_text(folder / REPORT, report)
        write_sealed(folder / INDEX, index)
    return 0


def identity(config: PreprocessConfig, source: Path, device: torch.device) -> Line:
    """Everything that a folder's content follows from, apart from its clips and texts."""
    names = ("sizes", *RULES, "max_text_tokens")
    return {
        "recipe": RECIPE,
        **component_digests(source),
        **{name: getattr(config, name) for name in names},
        "text_dtype": str(text_dtype(device)).removeprefix("torch."),
    }


def patch_size(source: Path) -> tuple[int, int, int]:
    """The patch size of the checkpoint's transformer; (1, 1, 1) if it has none."""
    path = part_folder(source, "transformer") / "config.json"
    if not path.is_file():
        return (1, 1, 1)
    return read_json(path).get("patch_size", DiTConfig.patch_size)


def latent_shapes(
    config: PreprocessConfig, vae: VAEConfig, patch: tuple[int, int, int]
) -> dict[str, list[int]]:
    """(C, T, h, w) by size.

    Raises:
        WanError: a size that the autoencoder's stride times the transformer's patch doesn't divide.
    """
    shapes, stride = {}, vae.spatial_stride
    tall, wide = stride * patch[1], stride * patch[2]
    for name, (frames, height, width) in zip(config.sizes, config.parsed_sizes(), strict=True):
        if height % tall or width % wide:
            raise WanError(
                f"sizes: {name}: the height must be a multiple of {tall}, the width of {wide}"
            )
        shapes[name] = [vae.z_dim, vae.latent_frames(frames), height // stride, width // stride]
    return shapes


def claim(folder: Path, index: Line) -> None:
    """Write the folder's settings into its index before anything else is in it.

    Raises:
        WanError: the folder holds something else, or data of other settings.
    """
    path = folder / INDEX
    shards = [*TensorStore(folder, "latents").shards(), *TensorStore(folder, "texts").shards()]
    if not shards:
        write_sealed(path, index)
        return
    if not path.exists():
        raise WanError(
            f"output_dir={folder} holds {shards[0].name} and no {INDEX}: it is no folder of this "
            "command; choose another"
        )
    try:
        before, now = read_sealed(path), index["identity"]
        check_kinds(before, {"identity": (dict,)}, str(path), ("identity",))
        there = before["identity"]
    except WanError as error:
        if not any(map(is_shard, shards)):
            raise
        # What they hold is known by their keys.
        print(f"warning: {error}; it is written again", file=sys.stderr)
        write_sealed(path, index)
        return
    changed = [name for name in now if there.get(name) != now[name]]
    if changed:
        told = [name for name in changed if name in there] or changed  # older ones have fewer
        lines = "; ".join(f"{name}: {there.get(name)} there, {now[name]} now" for name in told)
        raise WanError(
            f"output_dir={folder} holds data of other settings ({lines}); it can be trained on as "
            "it is, so choose another for these"
        )


def judge_and_encode(
    clips: list[Clip],
    config: PreprocessConfig,
    index: Line,
    latents: TensorStore,
    load_vae: Callable[[], WanVAE],
) -> list[Line]:
    """The report's lines, one per sample or refused clip; latents of samples are stored by shards.

    Ends early when more clips are set aside than is allowed, except with check_only.
    """
    settings = {name: index["identity"][name] for name in ("recipe", "vae", "sizes", *RULES)}
    rules = ClipRules(config.parsed_sizes(), **{name: getattr(config, name) for name in RULES})
    known = {key: latents.facts(key) for key in latents.stored}
    lines: list[Line] = []
    fresh: dict[str, Tensor] = {}
    vae: WanVAE | None = None
    for clip in tqdm(clips, desc="clips", unit="clip"):
        judged = judge(clip, rules, settings, known)
        lines += [sample.line | sample.facts for sample in judged]
        missing = [sample for sample in judged if sample.numbers]
        if missing and not config.check_only:
            vae = vae or load_vae()
            videos = read_samples(clip, [s.numbers for s in missing], missing[0].facts)
            for sample, video in zip(missing, videos, strict=True):
                key = sample.line["key"]
                fresh[key] = encode_float16(vae, video[None], CHUNK)[0].contiguous()
                known[key] = sample.facts
                if len(fresh) == config.shard_clips:
                    latents.add(fresh, known)
                    fresh = {}
        if num_set_aside(lines) > allowed(len(clips), config) and not config.check_only:
            break
    if fresh:
        latents.add(fresh, known)
    return lines


@dataclass(frozen=True)
class Sample:
    """One stretch of a clip that training sees, or a clip that is refused.

    Attributes:
        line: its line in the report, without `facts`.
        facts: what follows from the clip's file and the settings; they belong to the line too.
        numbers: its frames in the file, if they are to be encoded; else empty.
    """

    line: Line
    facts: Line
    numbers: list[int] = field(default_factory=list)


def judge(clip: Clip, rules: ClipRules, settings: Line, known: dict[str, Line]) -> list[Sample]:
    """The samples of a clip; one with a reason if it is refused.

    Args:
        settings: with the file's content, what the keys of its latents follow from.
        known: facts about what is stored already, by key; its frames are not read again.
    """
    line: Line = {"clip": clip.name, "verdict": "ok"}
    facts: Line = {}
    try:
        line["caption"] = read_caption(clip)
        content = sha256_file(clip.path)
        count = known.get(key_of(settings, content, 0), {}).get("samples", 1)
        keys = [key_of(settings, content, i) for i in range(count)]
        if all(key in known for key in keys):
            return [Sample(line | {"key": key}, known[key]) for key in keys]
        taken = judge_clip(clip, rules, facts)
    except (WanError, OSError) as error:
        reason = str(error).replace(f"{clip.path.parent}/", "")  # a report may be handed on
        return [Sample(line | {"verdict": SET_ASIDE, "reason": reason}, facts)]
    judged = []
    for i, numbers in enumerate(taken):
        key = key_of(settings, content, i)
        place = {"sample": i + 1, "samples": len(taken), "used_frames": [numbers[0], numbers[-1]]}
        judged.append(Sample(line | {"key": key}, facts | place, [] if key in known else numbers))
    return judged


def num_set_aside(lines: list[Line]) -> int:
    return sum(line["verdict"] == SET_ASIDE for line in lines)


def allowed(num_clips: int, config: PreprocessConfig) -> int:
    """How many clips may be set aside."""
    if config.max_set_aside is not None:
        return config.max_set_aside
    return math.floor(config.max_set_aside_share * num_clips + 1e-9)


def too_many_set_aside(
    lines: list[Line], num_clips: int, config: PreprocessConfig, report: Path
) -> str | None:
    """Why the run fails, with the first reasons, when too many clips are set aside, or all."""
    bad = [line for line in lines if line["verdict"] == SET_ASIDE]
    if len(bad) <= allowed(num_clips, config) and (len(bad) < num_clips or not num_clips):
        return None
    first = "; ".join(f"{line['clip']}: {line['reason']}" for line in bad[:3])
    judged = sum(line.get("sample", 1) == 1 for line in lines)
    return (
        f"{len(bad)} of the first {judged} clips ({num_clips} in all) are set aside, "
        f"{min(allowed(num_clips, config), num_clips - 1)} may be (max_set_aside_share=, "
        f"max_set_aside=): {first}; all reasons are in {report}"
    )


def summary(lines: list[Line], prompts: list[str], folder: Path) -> str:
    """What the command ends with: clips by size and what they lost, prompts, what was set aside."""
    by_size: dict[str, list[Line]] = {}
    for line in lines:
        if line["verdict"] == "ok":
            by_size.setdefault(line["size"], []).append(line)
    parts = [
        f"{clips_of(found)} of {size} ({cropped_away(found)})" for size, found in by_size.items()
    ]
    parts += [f"{len(prompts)} prompts"] if prompts else []
    cut = sum(line.get("caption_cut", False) for line in lines)
    return (
        f"{folder}: {', '.join(parts)}; {num_set_aside(lines)} clips set aside, {cut} captions cut"
    )


def clips_of(lines: list[Line]) -> str:
    """How many clips, and in how many samples if these are more."""
    clips = sum(line["sample"] == 1 for line in lines)
    return f"{clips} clips" + (f" in {len(lines)} samples" if len(lines) > clips else "")


def cropped_away(lines: list[Line]) -> str:
    shares = [line["cropped_share"] for line in lines]
    mean = sum(shares) / len(shares)
    return f"{mean:.0%} of the picture cropped away, {max(shares):.0%} at most"


def dropped_seconds(lines: list[Line], frames: str) -> str | None:
    """One sentence if more than half of the good videos' seconds are in no sample."""
    total = used = reached = 0.0
    for line in lines:
        if line["verdict"] != "ok" or "fps" not in line:  # a picture
            continue
        if line["sample"] == 1:
            total += line["decoded_frames"] / line["fps"]
            reached = 0.0
        start = line["used_frames"][0] / line["fps"]
        end = start + parse_size(line["size"])[0] / (line["retimed_to"] or line["fps"])
        used += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    if used >= total / 2:
        return None
    return (
        f"only {used:.1f} of the clips' {total:.1f} seconds are used, {1 - used / total:.0%} are "
        f"dropped: frames={frames} {FRAMES[frames]}; frames=chunk takes clips whole, in several "
        "samples"
    )


def encode_texts(
    texts: set[str], index: Line, store: TensorStore, load_encoder: Callable[[], TokensOf]
) -> None:
    """Store the token embeddings (n, D) of each text that is not stored yet."""
    missing = sorted(text for text in texts if text_key(index, text) not in store)
    if not missing:
        return
    tokens_of = load_encoder()
    with tqdm(total=len(missing), desc="texts") as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # captions that are cut: the report names each
        for start in range(0, len(missing), TEXTS_PER_SHARD):
            part = missing[start : start + TEXTS_PER_SHARD]
            # One at a time: a text's embedding depends on the text alone, to the bit.
            encoded = {text_key(index, t): tokens_of([t])[0].cpu().contiguous() for t in part}
            store.add(encoded, {key: {} for key in encoded})
            progress.update(len(part))
