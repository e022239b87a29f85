"""The files of a video: names that never collide, and a JSON record that explains them.

    00003_red-fox_9f2c81d0_s42.mp4                  the video
    00003_red-fox_9f2c81d0_s42.png                  frames of it side by side
    00003_red-fox_9f2c81d0_s42.gif                  with preview=true, what the last step predicted
    00003_red-fox_9f2c81d0_s42.latents.safetensors  the decoder's input
    00003_red-fox_9f2c81d0_s42.json                 the record

The number counts up in a folder. Then come a few words of the prompt, or of a sweep the values of
this point, and a hash of prompt and settings; s is the seed.
"""

import hashlib
import json
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.cli import INTERRUPTED
from wan.errors import WanError
from wan.files import create_sealed, read_sealed, write_sealed
from wan.media.video import Frames
from wan.paths import kept_text
from wan.runtime.memory_meter import peak_memory
from wan.weights.safetensors_file import write_tensors

RECORD_VERSION = 1
# The words are missing in names of older releases, and where a prompt has none.
VIDEO_NAME = re.compile(r"\d{5,}_(?:[a-z0-9-]+_)?([0-9a-f]{8})_s(\d+)\.json")
NAME_LENGTH = 32
DONE = "done"
UNFINISHED = "unfinished"  # the status of a video that is being made, or whose process was killed
BAD_RESULT = 1  # exit code
# What the comment of an mp4 keeps of its record, beside the settings.
IN_COMMENT = (
    *("record_version", "negative_prompt", "schedule", "image_sha256", "noise_sha256"),
    *("text_sha256", "image_latents_sha256", "steps_sha256", "latents_sha256", "pixels_sha256"),
)


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
    def preview(self) -> Path:
        return self.folder / f"{self.stem}.gif"

    @property
    def latents(self) -> Path:
        return self.folder / f"{self.stem}.latents.safetensors"

    @property
    def record(self) -> Path:
        return self.folder / f"{self.stem}.json"


def reserve_files(
    folder: Path, settings: dict[str, Any], seed: int, record: dict[str, Any], words: str = ""
) -> OutputFiles:
    """Names for a new video: its record is written here, so that no other run takes them.

    Args:
        words: as `name_words` makes them.
    """
    digest = f"{words}_{digest_of(settings)}" if words else digest_of(settings)
    taken = (re.match(r"(\d{5,})_", entry.name) for entry in folder.iterdir())
    number = max((int(match[1]) + 1 for match in taken if match), default=0)
    while True:
        files = OutputFiles(folder, f"{number:05d}_{digest}_s{seed}")
        try:
            create_sealed(files.record, record)
            return files
        except FileExistsError:
            number += 1


def name_words(prompt: str, swept: str = "") -> str:
    """A few words for the name of a video: at most 32 letters, digits and hyphens, of ASCII.

    Args:
        swept: the values of this point of a sweep, as in "steps=4, seed=0". They come before the
            prompt; the seed is in the name anyway, and of a path only the last part is taken.
    Returns:
        "" where the text has no such letters.
    """
    values = [part for part in swept.split(", ") if part and not part.startswith("seed=")]
    text = ", ".join(re.sub(r"[^=,\s]*[/\\]", "", value) for value in values) or prompt
    plain = unicodedata.normalize("NFKD", text[:500]).encode("ascii", "ignore").decode().lower()
    words = [word for word in re.findall(r"[a-z0-9]+", plain) if word not in ("a", "an", "the")]
    found = words[0][:NAME_LENGTH] if words else ""
    for word in words[1:]:
        if len(found) + 1 + len(word) > NAME_LENGTH:
            break
        found += f"-{word}"
    return found


def digest_of(settings: dict[str, Any]) -> str:
    """Eight digits that stand for a prompt and its settings in a file's name."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


class FinishedVideos:
    """The videos that a folder holds, found by what they were made from. Each is given out once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._records: dict[tuple[str, int], list[Path]] = {}
        for path in sorted(folder.glob("*.json")):
            if match := VIDEO_NAME.fullmatch(path.name):
                self._records.setdefault((match[1], int(match[2])), []).append(path)

    def take(self, settings: dict[str, Any], seed: int) -> Path | None:
        """The record of a finished video of these settings that was not given out before.

        Args:
            settings: the prompt and the settings, as `reserve_files` takes them.
        """
        found = self._records.get((digest_of(settings), seed), [])
        asked = json.loads(json.dumps(settings))
        while found:
            path = found.pop(0)
            try:
                record = read_sealed(path)
            except WanError:  # damaged: made again
                continue
            same = all(record.get(name) == value for name, value in asked.items())
            video = (record.get("video") or {}).get("file")
            if same and record.get("status") == DONE and (self._folder / str(video)).is_file():
                return path
        return None


class BadResultError(RuntimeError):
    """The networks ran, but the result shows no picture."""


class Story:
    """The record of one video while it is made, written in between and at its end.

    Until then its status is `UNFINISHED`, which stays true however the process ends. As a context
    manager it turns expected failures into an exit code: Ctrl-C, a result that shows no picture, a
    GPU out of memory. Any other error is noted in the record and raised.

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
        self._hasher = ThreadPoolExecutor(1)
        self._hashes: list[Future[None]] = []

    def write(self) -> None:
        """Replace the record as a whole: a reader sees the old one or the new one, never half."""
        self.finish_hashes()
        write_sealed(self.files.record, self.record)

    def hash(self, put: Callable[[str], None], values: Tensor | Frames) -> None:
        """Call `put` with the sha256 of a tensor or of frames, in a thread of its own.

        A tensor is copied to the CPU here, so the networks go on while it is hashed, and may write
        over it. Frames are not copied. Several are hashed one after the other, in this order.
        """
        if isinstance(values, Tensor):
            values = values.detach().to("cpu", copy=True)
        self._hashes.append(self._hasher.submit(lambda: put(sha256_of(values))))

    def finish_hashes(self) -> None:
        """Wait until all that `hash` was asked for is in the record."""
        while self._hashes:
            self._hashes.pop(0).result()

    @contextmanager
    def stage(self, name: str, bars: Any = None) -> Iterator[None]:
        """Time a stage, and note when it began (Unix time); an error inside names the stage.

        Args:
            bars: progress bars that are closed at the end of the stage.
        """
        self.record["stage"] = name
        self.record["begun"][name] = round(time.time(), 3)
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
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> bool:
        record, files = self.record, self.files
        expected, record["status"] = True, DONE
        self._hasher.shutdown()
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


class Assistance(Story):
    """What stands in place of a `Story` in a process that helps to make a video: it writes nothing.

    Expected failures become the same exit codes. The main process, which has the files, tells them.
    """

    def __init__(self, device: torch.device) -> None:
        parts: dict[str, Any] = {name: {} for name in ("begun", "seconds", "text_sha256")}
        self.record = parts | {"steps_sha256": []}
        self.code, self._device = 0, device

    def write(self) -> None:
        pass

    def hash(self, put: Callable[[str], None], values: Tensor | Frames) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> bool:
        if isinstance(error, KeyboardInterrupt):
            self.code = INTERRUPTED
        elif isinstance(error, FloatingPointError):
            self.code = BAD_RESULT
        elif isinstance(error, torch.OutOfMemoryError):
            raise WanError(out_of_memory()) from error  # only this process knows
        return self.code != 0


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


def sha256_of(values: Tensor | Frames) -> str:
    """sha256 of a tensor's numbers as float32 in row-major order, or of frames as they are."""
    if isinstance(values, Tensor):
        values = values.float().contiguous().numpy()
    return hashlib.sha256(values.data).hexdigest()


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
