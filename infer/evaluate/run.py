"""Make clips, let the detectors read them, report: the work of `infer.evaluate`."""

import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from configs.cli import Run
from configs.evaluation import EvaluateConfig
from configs.schema import kept_settings
from infer.evaluate.measure import (
    Result,
    draw_examples,
    evaluate,
    summarise,
    table,
    write_record,
)
from infer.evaluate.sources import SOURCES
from wan.errors import WanError
from wan.files import expanded
from wan.media.images import write_image

# B batch, F frames, H W pixels


SHEET_ROWS, SHEET_FRAMES = 16, 5


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


def evaluate_source(run: Run[EvaluateConfig]) -> None:
    """The command: make the clips, print the table, write the files that the settings name."""
    config = run.config
    output, sheet = (_writable(path) for path in (config.output, config.sheet))
    examples = draw_examples(config)
    started = time.perf_counter()
    source = SOURCES[config.source](config)
    results: list[Result] = []
    failed: list[Tensor] = []
    progress = tqdm(total=len(examples), desc="clips", unit="clip", disable=None)
    for result, video in evaluate(examples, source, config.batch_size):
        results.append(result)
        if not result.score.joint and len(failed) < SHEET_ROWS:
            failed.append(failure_row(video))
        progress.update()
    progress.close()
    seconds = time.perf_counter() - started
    print(f"{config.num_captions} captions, split {config.split}, source {config.source}")
    print(table(summarise(results)))
    print(f"{'seconds in all':<28} {seconds:>7.0f}")
    if output is not None:
        kept = kept_settings(asdict(config), output.parent)
        more = {"config": kept, "presets": run.presets, "seconds": seconds}
        write_record(output, results, **more)
    if sheet is not None and failed:
        write_image(sheet, Image.fromarray(torch.cat(failed).numpy()))
