"""The files of a video: names that never collide, and a JSON record that explains them.

    00003_9f2c81d0_s42.mp4                  the video
    00003_9f2c81d0_s42.png                  frames of it side by side
    00003_9f2c81d0_s42.latents.safetensors  the decoder's input
    00003_9f2c81d0_s42.json                 the record

The number counts up in a folder, then comes a hash of prompt and settings; s is the seed.
"""

import hashlib
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.cli import INTERRUPTED
from wan.files import write_json
from wan.paths import kept_text
from wan.runtime.memory_meter import peak_memory
from wan.weights.safetensors_file import write_tensors

RECORD_VERSION = 1
BAD_RESULT = 1  # exit code


@dataclass(frozen=True)
class OutputFiles:
    """The files of one video, all with the same stem."""

    folder: Path
    stem: str

    @property
    def video(self) -> Path:
        return self.folder / f"{self.stem}.mp4"

    @property
    def sheet(self) -> Path:
        return self.folder / f"{self.stem}.png"

    @property
    def latents(self) -> Path:
        return self.folder / f"{self.stem}.latents.safetensors"

    @property
    def record(self) -> Path:
        return self.folder / f"{self.stem}.json"


def reserve_files(folder: Path, settings: dict[str, Any], seed: int) -> OutputFiles:
    """Names for a new video: the record is created here, so that no other run takes them."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    taken = (re.match(r"(\d{5,})_", entry.name) for entry in folder.iterdir())
    number = max((int(match[1]) + 1 for match in taken if match), default=0)
    while True:
        files = OutputFiles(folder, f"{number:05d}_{digest}_s{seed}")
        try:
            files.record.touch(exist_ok=False)
            return files
        except FileExistsError:
            number += 1


class BadResultError(RuntimeError):
    """The networks ran, but the result shows no picture."""


class Story:
    """The record of one video while it is made, written at its start, in between and at its end.

    As a context manager it turns expected failures into an exit code: Ctrl-C, a result that shows
    no picture, a GPU out of memory. Any other error is noted in the record and raised.

    Attributes:
        code: exit code: 0 done, 1 no picture or out of memory, 130 interrupted.

    Args:
        places: files and folders that an error may name; see `wan.paths.kept_text`.
    """

    def __init__(
        self,
        files: OutputFiles,
        record: dict[str, Any],
        device: torch.device,
        places: Sequence[str | Path] = (),
    ) -> None:
        self.files, self.record, self.code = files, record, 0
        self._device, self._places = device, places

    def write(self) -> None:
        """Replace the record as a whole: a reader sees the old one or the new one, never half."""
        write_json(self.files.record, self.record)

    @contextmanager
    def stage(self, name: str, bars: Any = None) -> Iterator[None]:
        """Time a stage; if an error is raised inside, the record names the stage.

        Args:
            bars: progress bars that are closed at the end of the stage.
        """
        self.record["stage"] = name
        started = time.perf_counter()
        try:
            yield
        finally:
            if bars is not None:
                bars.close()
        if self._device.type == "cuda":  # GPU work that was only queued counts too
            torch.cuda.synchronize(self._device)
        self.record["seconds"][name] = round(time.perf_counter() - started, 3)

    def __enter__(self) -> "Story":
        self.write()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> bool:
        record, files = self.record, self.files
        expected, record["status"] = True, "done"
        if isinstance(error, KeyboardInterrupt):
            self.code, record["status"] = INTERRUPTED, "interrupted"
        elif isinstance(error, BadResultError | FloatingPointError):
            self.code, record["status"] = BAD_RESULT, f"failed: {error}"
        elif isinstance(error, torch.OutOfMemoryError):
            self.code, record["status"] = BAD_RESULT, f"failed: {out_of_memory()}"
        elif error is not None:
            expected, record["status"] = False, f"failed: {type(error).__name__}: {error}"
        record["status"] = kept_text(record["status"], files.folder, *self._places)
        record["finished"] = now()
        record["peak_memory_bytes"] = peak_memory(self._device)
        self.write()
        kept = f"; latents kept in {files.latents}" if files.latents.exists() else ""
        if error is None:
            print(files.video)
        elif self.code == INTERRUPTED:
            print(f"stopped during {record['stage']}{kept}", file=sys.stderr)
        elif expected:
            reason = record["status"].removeprefix("failed: ")
            print(f"error: {reason}{kept}", file=sys.stderr)
        return expected


def out_of_memory() -> str:
    """The error message for a GPU out of memory, with options to try."""
    return (
        "out of memory on the GPU; try offload=stage or block, chunk_latents=1, quantize=int8, "
        "dtype=bfloat16, attention=sdpa, or a smaller height, width or num_frames"
    )


def save_latents(path: Path, latents: Tensor, **about: Any) -> None:
    """Write latents (B, C, T, h, w) in float32; `about` becomes the file's metadata."""
    texts = {key: json.dumps(value, ensure_ascii=False) for key, value in about.items()}
    write_tensors(path, {"latents": latents.float()}, texts)


def tensor_sha256(tensor: Tensor) -> str:
    """sha256 of a tensor's numbers as float32 in row-major order."""
    return hashlib.sha256(tensor.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
