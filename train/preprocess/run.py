"""Clips and texts judged, encoded and stored: the work of `train.preprocess`.

Under torchrun the processes share out clips and texts, into one folder; the main one prints.
"""

import hashlib
import itertools
import math
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from configs.cli import USER_ERROR
from configs.data import FRAMES, PreprocessConfig, parse_size
from configs.parallel import ParallelConfig
from configs.progress import Steps, doing
from train.clips import (
    RECIPE,
    Clip,
    ClipRules,
    judge_clip,
    list_clips,
    noted,
    read_caption,
    read_prompts,
    read_samples,
)
from train.conditioning import CaptionEncoder, component_digests, load_frozen, text_dtype
from train.data import (
    CONTENT,
    INDEX,
    REPORT,
    SET_ASIDE,
    as_text,
    content_digest,
    encode_float16,
    other_rate,
    text_key,
)
from train.dataset_toml import toml_clips
from train.parallel import Ranks, start
from train.tensor_cache import TensorStore, is_shard, key_of, only_writer, open_to_extend
from wan.errors import WanError
from wan.files import expanded, read_json, read_sealed, write_sealed, write_text
from wan.models.dit_config import DiTConfig
from wan.models.tokenizer import Tokenizer, clean_prompt
from wan.models.vae import VAEConfig, WanVAE
from wan.pipeline.config import component_config, part_folder, read_defaults
from wan.settings import check_kinds
from wan.weights.digests import sha256_file
from wan.weights.hub import resolve_model

CHECK = "check.jsonl"  # the report of check_only=true and of runs that fail: both change no data
CHUNK = 16  # frames that the autoencoder takes at a time
TEXTS_PER_SHARD = 256
PAUSE = 0.2  # seconds between looks at what other processes have done
NAMED = 3  # clips of one reason that an error names
# The options that, with `sizes`, say what becomes of a clip.
RULES = ("fps", "retime", "max_crop", "max_upscale", "frames", "frame_stride", "frame_samples")

BACKGROUND = "image_background"  # one of them too, where it is given: older folders have none

Line = dict[str, Any]
T = TypeVar("T")


def preprocess(config: PreprocessConfig) -> int:
    """Judge and encode all clips, encode all texts; the index is written last.

    Under torchrun the processes share out clips and texts, into one folder; the main one prints.
    """
    if config.clips is None and config.prompts is None:
        raise WanError("nothing to do: give clips= (a folder or a list), prompts= or both")
    torch.set_num_threads(config.threads)
    with start(ParallelConfig(), config.device) as ranks:
        try:
            return Preprocessing(config, ranks).run()
        except (WanError, OSError):  # of one process, and so of all
            if ranks.is_main:
                raise
            return USER_ERROR


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


class Preprocessing:
    """One run of the command in one process.

    Attributes:
        source: the checkpoint's folder.
        index: the settings; what was stored is added at the end.
    """

    def __init__(self, config: PreprocessConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.folder = expanded(config.output_dir)
        self.name = ranks.first(uuid.uuid4().hex)  # of this run among those of a sweep
        found: tuple[list[Clip], list[str], Line, Path] = ([], [], {}, Path())
        with ranks.together():
            if ranks.is_main:  # it downloads
                found = self.read_inputs()
        self.clips, self.prompts, self.index, self.source = ranks.first(found)
        with ranks.together():
            if not ranks.is_main:  # maybe on another machine
                self.source = resolve_model(config.checkpoint)
            self.tokenizer = Tokenizer.from_folder(part_folder(self.source, "tokenizer"))

    def read_inputs(self) -> tuple[list[Clip], list[str], Line, Path]:
        """The clips, the prompts, the settings and the model."""
        config = self.config
        clips: list[Clip] = []
        if config.clips is not None:
            path = expanded(config.clips)
            is_toml = path.suffix == ".toml" and not path.is_dir()
            with doing(f"clips={config.clips}: looking for clips"):
                clips = toml_clips(path, config) if is_toml else list_clips(path)
        prompts = read_prompts(expanded(config.prompts)) if config.prompts is not None else []
        source = resolve_model(config.checkpoint)
        vae = VAEConfig.from_json(read_json(component_config(source, "vae", {})))
        with doing(f"checkpoint={config.checkpoint}: reading it, for {len(clips)} clips"):
            index = {
                "identity": identity(config, source, self.ranks.device),
                "latent_shapes": latent_shapes(config, vae, patch_size(source)),
            }
        if clips:
            shown = read_defaults(source, vae, two_experts=False).fps
            if warning := other_rate(config.sizes, config.fps, shown):
                print(f"warning: fps={config.fps:g}: {warning}", file=sys.stderr)
        return clips, prompts, index, source

    def run(self) -> int:
        """All of the work; the exit code."""
        config, ranks = self.config, self.ranks
        with ExitStack() as stack:
            with ranks.together():
                if ranks.is_main:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    if not config.check_only:
                        stack.enter_context(only_writer(self.folder))
                        claim(self.folder, self.index)
            latents = self.open_store("latents")
            known = ranks.first({key: latents.facts(key) for key in latents.stored})
            judged = self.judge_all(known)
            lines = [sample.line | sample.facts for samples in judged for sample in samples]
            with ranks.together():
                if ranks.is_main:
                    self.report_on(lines)
            if config.check_only:
                return 0
            self.encode_all(judged, latents)
            self.finish(lines, latents)
        return 0

    def open_store(self, name: str) -> TensorStore:
        """A store of the folder; only the main process knows what is in it already."""
        store = TensorStore(self.folder, name)
        with self.ranks.together():
            if self.ranks.is_main and not self.config.check_only:
                store = open_to_extend(self.folder, name, self.config.verify)
        return store

    def own(self, things: Sequence[T]) -> Sequence[T]:
        """This process's share."""
        return things[self.ranks.rank :: self.ranks.size]

    def judge_all(self, known: dict[str, Line]) -> list[list[Sample]]:
        """The samples of each clip, in the order of the clips.

        Args:
            known: facts about what is stored, by key.
        """
        config = self.config
        of_clips = ("recipe", "vae", "sizes", *RULES, BACKGROUND)
        settings = {n: value for n, value in self.index["identity"].items() if n in of_clips}
        values = {name: getattr(config, name) for name in (*RULES, BACKGROUND)}
        rules = ClipRules(config.parsed_sizes(), **values)
        files: dict[Path, list[int]] = {}
        for number, clip in enumerate(self.clips):
            files.setdefault(clip.path, []).append(number)
        by_file = list(files.values())
        own = self.own(by_file)
        found = []
        with (
            self.ranks.together(),
            self.progress("clips judged", len(by_file), len(own)) as advance,
        ):
            for numbers in own:
                found.append(judge([self.clips[n] for n in numbers], rules, settings, known))
                advance(1)
        by_rank = self.ranks.gather(found)
        judged: dict[int, list[Sample]] = {}
        for i, numbers in enumerate(by_file):
            judged.update(zip(numbers, by_rank[i % len(by_rank)][i // len(by_rank)], strict=True))
        return [judged[number] for number in range(len(self.clips))]

    def report_on(self, lines: list[Line]) -> None:
        """Count the tokens of captions, and print what became of the clips.

        Raises:
            WanError: too many are set aside; their lines are in `CHECK`.
        """
        config = self.config
        for line in lines:
            if line["verdict"] == "ok":
                tokens = self.tokenizer(clean_prompt(line["caption"]), config.max_text_tokens)
                line["caption_tokens"] = tokens.num_tokens_before_truncation
                line["caption_cut"] = tokens.truncated
        failure = too_many_set_aside(
            lines, len({clip.name for clip in self.clips}), config, self.folder / CHECK
        )
        if config.check_only or failure:
            write_text(self.folder / CHECK, as_text(lines))
        if failure:
            raise WanError(failure)
        print(summary(lines, self.prompts, self.folder), flush=True)
        if dropped := dropped_seconds(lines, config.frames):
            print(dropped, flush=True)

    def encode_all(self, judged: list[list[Sample]], store: TensorStore) -> None:
        """Store the latents of all samples that are to be encoded, each once, by shards.

        Ctrl-C and errors end it after the samples that are ready have been stored.
        """
        work: list[tuple[Clip, list[Sample]]] = []
        seen: set[str] = set()
        for clip, samples in zip(self.clips, judged, strict=True):
            missing = [s for s in samples if s.numbers and s.line["key"] not in seen]
            seen |= {sample.line["key"] for sample in missing}
            work += [(clip, missing)] if missing else []
        own = self.own(work)
        shards: list[Path] = []
        fresh: dict[str, Tensor] = {}
        facts = {s.line["key"]: s.facts for _, samples in own for s in samples}
        with self.ranks.together(), self.progress("clips encoded", len(work), len(own)) as advance:
            vae: WanVAE | None = None
            try:
                for clip, samples in own:
                    vae = vae or load_frozen(
                        self.source, "vae", None, self.ranks.device, torch.float32
                    )
                    numbers, of_clip = [s.numbers for s in samples], samples[0].facts
                    videos = read_samples(clip, numbers, of_clip, self.config.image_background)
                    for sample, video in zip(samples, videos, strict=True):
                        latents = encode_float16(vae, video[None], CHUNK)[0].contiguous()
                        fresh[sample.line["key"]] = latents
                        if len(fresh) == self.config.shard_clips:
                            shards.append(store.add(fresh, facts))
                            fresh = {}
                    advance(1)
            except (Exception, KeyboardInterrupt):
                if fresh:
                    store.add(fresh, facts)
                raise
            if fresh:
                shards.append(store.add(fresh, facts))
        self.collect(shards, store)

    def encode_texts(self, texts: list[str], store: TensorStore) -> None:
        """Store the token embeddings (n, D) of each text that is not stored yet."""
        own = self.own(texts)
        shards: list[Path] = []
        with self.ranks.together(), self.progress("texts encoded", len(texts), len(own)) as advance:
            if own:
                device = self.ranks.device
                encoder = load_frozen(self.source, "text_encoder", None, device, text_dtype(device))
                tokens_of = CaptionEncoder(encoder, self.tokenizer, self.config.max_text_tokens)
            for start in range(0, len(own), TEXTS_PER_SHARD):
                encoded = {}
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # captions that are cut: the report names each
                    for text in own[start : start + TEXTS_PER_SHARD]:
                        # One at a time: a text's embedding depends on the text alone, to the bit.
                        (tokens,) = tokens_of([text])
                        encoded[text_key(self.index, text)] = tokens.cpu().contiguous()
                        advance(1)
                shards.append(store.add(encoded, {key: {} for key in encoded}))
        self.collect(shards, store)

    def collect(self, shards: list[Path], store: TensorStore) -> None:
        """Let the main process know what all have written."""
        written = self.ranks.gather(shards)
        with self.ranks.together():
            if self.ranks.is_main:
                for path in itertools.chain(*written[1:]):
                    store.register(path)

    def finish(self, lines: list[Line], latents: TensorStore) -> None:
        """Encode the texts, then write report and index."""
        good = [line for line in lines if line["verdict"] == "ok"]
        index = self.index | {
            "prompts": self.prompts,
            "negative_prompt": self.config.negative_prompt,
        }
        texts = {line["caption"] for line in good}
        texts |= {*self.prompts, "", self.config.negative_prompt or ""}
        stored = self.open_store("texts")
        missing = [text for text in sorted(texts) if text_key(index, text) not in stored]
        self.encode_texts(self.ranks.first(missing), stored)
        with self.ranks.together():
            if self.ranks.is_main:
                clip_keys = [line["key"] for line in good]
                text_keys = [text_key(index, text) for text in texts]
                report = as_text(lines)
                index["content_sha256"] = content_digest(latents, clip_keys, stored, text_keys)
                index["report_sha256"] = hashlib.sha256(report.encode()).hexdigest()
                write_text(self.folder / REPORT, report)
                write_sealed(self.folder / INDEX, index)

    @contextmanager
    def progress(self, what: str, total: int, own: int) -> Iterator[Callable[[int], None]]:
        """A bar of the main process that counts what all have done; yields a function for it.

        Args:
            own: how many of the `total` are this process's.
        """
        left = own
        tally = f"{self.name} {what}"
        with Steps(what, total, quiet=not self.ranks.is_main) as steps:

            def advance(number: int) -> None:
                nonlocal left
                left -= number
                if new := self.ranks.tally(tally, number) - steps.done:
                    steps.add(new)

            try:
                yield advance
                while self.ranks.is_main and steps.done < total:
                    advance(0)
                    time.sleep(PAUSE)
            finally:
                self.ranks.tally(
                    f"{self.name} {what}", left
                )  # none is to wait for what an error ended


def identity(config: PreprocessConfig, source: Path, device: torch.device) -> Line:
    """Everything that a folder's content follows from, apart from its clips and texts."""
    names = ["sizes", *RULES, "max_text_tokens"]
    names += [BACKGROUND] if config.image_background is not None else []
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
    changed = [name for name in now | there if there.get(name) != now.get(name)]
    if changed:
        told = [name for name in changed if name in there] or changed  # older ones have fewer
        lines = "; ".join(f"{name}: {there.get(name)} there, {now.get(name)} now" for name in told)
        raise WanError(
            f"output_dir={folder} holds data of other settings ({lines}); it can be trained on as "
            "it is, so choose another for these"
        )


def judge(
    clips: Sequence[Clip], rules: ClipRules, settings: Line, known: dict[str, Line]
) -> list[list[Sample]]:
    """The samples of each clip of one file; one with a reason if it is refused.

    Args:
        clips: one for each caption; the file is read once for all.
        settings: with the file's content, what the keys of its latents follow from.
        known: facts about what is stored already, by key; its frames are not read again.
    """
    path = clips[0].path
    captioned: list[tuple[Line, list[str]]] = []
    for clip in clips:
        line: Line = {"clip": clip.name, "verdict": "ok"}
        line |= {"repeats": clip.repeats} if clip.repeats > 1 else {}
        reasons: list[str] = []
        with noted(reasons):
            line["caption"] = read_caption(clip)
        captioned.append((line, reasons))
    facts: Line = {}
    flaws: list[str] = []
    good: list[Sample] = []
    try:
        content = sha256_file(path)
        count = known.get(key_of(settings, content, 0), {}).get("samples", 1)
        keys = [key_of(settings, content, i) for i in range(count)]
        stored = all(key in known for key in keys)
        if stored:
            good = [Sample({"key": key, CONTENT: content}, known[key]) for key in keys]
        if not stored or any(reasons for _, reasons in captioned):  # a refusal has all reasons
            taken = judge_clip(clips[0], rules, facts)
        for i, numbers in enumerate([] if stored else taken):
            key = key_of(settings, content, i)
            used = [numbers[0], numbers[-1]]
            place = {"sample": i + 1, "samples": len(taken), "used_frames": used}
            named = {"key": key, CONTENT: content}
            good.append(Sample(named, facts | place, [] if key in known else numbers))
    except (WanError, OSError) as error:
        flaws.append(error.on_command_line if isinstance(error, WanError) else str(error))
    judged = []
    for line, reasons in captioned:
        if good and not reasons:
            judged.append([replace(one, line=line | one.line) for one in good])
        else:
            reason = "; ".join(reasons + flaws)
            reason = reason.replace(f"{path.parent}/", "")  # it may be handed on
            judged.append([Sample(line | {"verdict": SET_ASIDE, "reason": reason}, facts)])
    return judged


def set_aside(lines: list[Line]) -> set[str]:
    """The names of clips that are set aside, with one of their captions at least."""
    return {line["clip"] for line in lines if line["verdict"] == SET_ASIDE}


def allowed(num_clips: int, config: PreprocessConfig) -> int:
    """How many clips may be set aside."""
    if config.max_set_aside is not None:
        return config.max_set_aside
    return math.floor(config.max_set_aside_share * num_clips + 1e-9)


def too_many_set_aside(
    lines: list[Line], num_clips: int, config: PreprocessConfig, report: Path
) -> str | None:
    """Why the run fails, with all reasons, when too many clips are set aside, or all."""
    bad = set_aside(lines)
    some_left = any(line["verdict"] == "ok" for line in lines)
    if len(bad) <= allowed(num_clips, config) and (some_left or not lines):
        return None
    by_reason: dict[str, dict[str, None]] = {}
    for line in lines:
        if line["verdict"] == SET_ASIDE:
            by_reason.setdefault(line["reason"], {})[line["clip"]] = None
    names = {reason: list(found) for reason, found in by_reason.items()}
    reasons = "; ".join(
        f"{', '.join(found[:NAMED])}{f' and {len(found) - NAMED} more' * (len(found) > NAMED)}: "
        f"{reason}"
        for reason, found in sorted(names.items(), key=lambda item: -len(item[1]))
    )
    may_be = min(allowed(num_clips, config), num_clips - 1)
    again = "" if config.check_only else "; check_only=true judges them again and encodes nothing"
    return (
        f"{len(bad)} of {num_clips} clips are set aside, {may_be} may be (max_set_aside_share=, "
        f"max_set_aside=). {report} has a line for each{again}. {reasons}"
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
        f"{folder}: {', '.join(parts)}; {len(set_aside(lines))} clips set aside, {cut} captions cut"
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
