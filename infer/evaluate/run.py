"""Make clips, let the detectors read them, report: the work of `infer.evaluate`."""

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from configs.cli import Run
from configs.evaluation import EvaluateConfig
from configs.progress import Steps
from configs.schema import kept_settings
from infer.evaluate.measure import Result, VideoSource, summarise, table, write_record
from infer.evaluate.parts import ClipParts
from infer.evaluate.queue import weights_of
from infer.evaluate.report import Column, mean_of
from infer.evaluate.sources import SOURCES
from infer.evaluate.store import keep_clip, kept_clip
from infer.gallery.command import command, sample_command
from infer.gallery.measured import aspect_of, measured_clip, measures_of, seen_words
from infer.gallery.page import SEED, Page, write_page
from infer.processes import Processes, Team
from wan.errors import WanError
from wan.files import expanded, read_sealed
from wan.media.images import write_image
from wan.media.labels import stacked
from wan.miniature.metrics import MEASURES
from wan.paths import kept_path
from wan.weights.checked import read_checked, write_checked

# B batch, F frames, H W pixels


SHEET_ROWS, SHEET_FRAMES = 16, 5
EACH = [Column(name.replace("_", " "), ".3f", mean_of(name), (name,)) for name in MEASURES]


def failure_row(video: Tensor) -> Tensor:
    """Frames of a clip (3, F, H, W) side by side: (H, W', 3) uint8."""
    chosen = torch.linspace(0, video.shape[1] - 1, SHEET_FRAMES).round().long()
    row = video[:, chosen].nan_to_num(-1).clamp(-1, 1)  # black where there is no number
    return ((row + 1) * 127.5).round().byte().permute(2, 1, 3, 0).flatten(1, 2)


def _writable(path: str | None) -> Path | None:
    """A file that can be written later, so that minutes of work don't end in an error."""
    if path is None:
        return None
    file = expanded(path)
    if file.is_dir():
        raise WanError(f"{file} is a folder: name the file to write")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise WanError(f"{file}: can't be written ({error.strerror}); choose another") from error
    return file


@contextmanager
def parts_folder(output: Path | None, team: Team) -> Iterator[Path]:
    """Where clips are kept until all are made: beside the output, or nowhere that lasts."""
    if output is not None:
        yield output.with_suffix(".parts")
        return
    with tempfile.TemporaryDirectory() if team.is_main else nullcontext("") as own:
        yield Path(team.first(lambda: own))


def make_clips(config: EvaluateConfig, parts: ClipParts, output: Path | None, team: Team) -> None:
    """Make what is not stored of the clips; return when all processes have.

    Of the first clips that do not match, a row of frames is stored too, if a sheet is asked for.

    Args:
        output: where the record will be; the first clips are kept beside it.
    """
    missing = team.first(lambda: parts.missing(0, team.size))
    count = sum(stop - start for start, stop in missing)
    if team.size > 1 and team.is_main and missing:
        print(f"{team.size} processes share {count} clips", file=sys.stderr)
    config = replace(config, device=team.processes.device(config.device))
    source: VideoSource | None = None
    num_failed = 0

    def seen(number: int, result: Result, video: Tensor) -> None:
        nonlocal num_failed
        if output is not None and number < config.keep_clips:
            keep_clip(kept_clip(output, number), video, config.fps or 8)
        if config.sheet is not None and not result.score.joint and num_failed < SHEET_ROWS:
            num_failed += 1
            write_checked(parts.row_file(number), {"row": failure_row(video)})

    with Steps("clips", config.num_clips, config.num_clips - count, not team.is_main) as steps:
        already = steps.done

        def advance(number: int) -> None:
            if new := already + team.tally("clips", number) - steps.done:
                steps.add(new)

        for start, stop in missing:
            if team.claim(f"clips {start} to {stop}"):
                source = source or SOURCES[config.source](config)
                parts.make((start, stop), source, {}, team.size, seen)
                advance(stop - start)
        team.everyone(None, lambda: advance(0))


def evaluate_source(run: Run[EvaluateConfig]) -> None:
    """The command: make the clips, print the table, write the files that the settings name."""
    config = run.config
    output, sheet = (_writable(path) for path in (config.output, config.sheet))
    started = time.perf_counter()
    with (
        Processes.started().together(config.device) as team,
        parts_folder(output, team) as folder,
    ):
        weights = None if output is None else team.first(lambda: weights_of(config))
        if output is not None and team.is_main:
            check_output(config, output, weights)
        parts = ClipParts("clips", config, folder, weights, with_rows=sheet is not None)
        make_clips(config, parts, output, team)
        if not team.is_main:
            return
        results, _ = parts.joined()
        seconds = time.perf_counter() - started
        print(f"{config.num_captions} captions, split {config.split}, source {config.source}")
        print(table(summarise(results)))
        print(f"{'seconds in all':<28} {seconds:>7.0f}")
        if team.size > 1:
            print(f"{'processes at once':<28} {team.size:>7}")
        if output is not None:
            kept = kept_settings(asdict(config), output.parent)
            more = {"config": kept, "presets": run.presets, "seconds": seconds, "weights": weights}
            write_record(output, results, **more)
            page = kept_clip(output, 0).with_name("index.html")
            page.parent.mkdir(exist_ok=True)
            write_page(page, page_of(config, output, table(summarise(results))))
            print(f"page: {page}")
        if sheet is not None:
            write_sheet(sheet, parts, results)
        parts.remove()


def check_output(config: EvaluateConfig, output: Path, weights: dict[str, str] | None) -> None:
    """Refuse to replace the numbers of an evaluation with other settings or of other weights.

    Raises:
        WanError: see above; before anything is made.
    """
    if not output.exists():
        return
    record = read_sealed(output)
    there = record.get("config")
    there = there if isinstance(there, dict) else {}
    asked = kept_settings(asdict(config), output.parent)
    names = dict.fromkeys([*config.question(), "quantize", "compile"])
    differing = [name for name in names if not same(there.get(name), asked[name])]
    if not differing and record.get("weights") not in (None, weights):
        differing = ["weights"]
    if differing:
        raise WanError(
            f"output={config.output}: holds an evaluation that differs in {', '.join(differing)}; "
            "name another file, or move that one away"
        )


def same(there: Any, asked: Any) -> bool:
    """Whether a setting is the one of a record, which may lack what older releases did not have."""
    if isinstance(there, dict) and isinstance(asked, dict):
        return all(same(there.get(name), value) for name, value in asked.items())
    return bool(there == asked)


def page_of(config: EvaluateConfig, output: Path, summary: str) -> Page:
    """The page of the clips that are kept, which lies beside them.

    Args:
        output: the record.
        summary: what a reader should know, as text.
    """
    clips = []
    again = command("infer.evaluate", replace(config, output=None, sheet=None), output.parent)
    for number, clip in enumerate(read_sealed(output)["clips"][: config.keep_clips]):
        if config.source == "model":
            again = sample_command(config, clip["prompt"], clip["seed"], output.parent)
        settings = {SEED: str(clip["seed"])} if config.seeds_per_caption > 1 else {}
        clips.append(measured_clip(clip, settings, kept_clip(output, number), EACH, again))
    notes = [f"The first {len(clips)} of {config.num_clips} clips.", summary]
    common = {"source": config.source, "captions": config.split}
    if config.source == "model":
        common |= {"model": kept_path(config.checkpoint, output.parent)}
    return Page(
        f"Evaluation: {output.stem}",
        clips,
        notes,
        common,
        measures_of(EACH),
        aspect=aspect_of(clips),
    )


def write_sheet(sheet: Path, parts: ClipParts, results: Sequence[Result]) -> None:
    """A picture of the first clips that do not match, a row each, with what was asked and seen.

    There is none if all match.
    """
    failed = [number for number, result in enumerate(results) if not result.score.joint]
    files = [parts.row_file(number) for number in failed[:SHEET_ROWS]]
    if files:
        rows = [Image.fromarray(read_checked(file)["row"].numpy()) for file in files]
        asked = [results[number].example.caption.text for number in failed]
        seen = [seen_words(asdict(results[number].detection)) for number in failed]
        headings = [
            f"asked: {one.rstrip('.')}. Seen: {other}"
            for one, other in zip(asked, seen, strict=True)
        ]
        write_image(sheet, stacked(list(zip(headings, rows, strict=False))))
