"""Numbers of a run: one JSON object per line on the local disk, mirrored to wandb and tensorboard.

Each line carries a digest of itself (`wan.files.sealed`), so that a damaged one is noticed.
"""

import importlib
import io
import json
import math
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from configs.training import LoopConfig
from wan.errors import WanError
from wan.files import parse_json, read_bytes, sealed, unsealed, write_text

MAX_METRICS_BYTES = 1 << 32


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without an unfinished last one of a run that was killed.

    Raises:
        WanError: a line is damaged; names it.
    """
    lines = read_bytes(path, MAX_METRICS_BYTES).split(b"\n")[:-1]
    rows = []
    for number, line in enumerate(lines, 1):
        source = f"{path}, line {number}"
        try:
            row = unsealed(parse_json(line, source), source)
            if not isinstance(row.get("step"), int):
                raise WanError(f"{source}: no step in it")
        except WanError as error:
            raise WanError(
                f"{source}: damaged, and its numbers cannot be made again; take the line out of "
                "the file to go on without them"
            ) from error
        rows.append(row)
    return rows


def media_files(folder: Path, step: int) -> list[Path]:
    """Pictures and clips of the save after `step` steps, such as samples/0000200-0.mp4."""
    found = (folder / "samples").glob(f"{step:07d}-*")
    return sorted(path for path in found if path.suffix in (".png", ".mp4"))


class MetricsLog:
    """Appends to `metrics.jsonl`. After a resume, lines of steps to be repeated are dropped first.

    wandb and tensorboard are mirrors: the first failure of each is a warning, and the run goes on.

    Args:
        folder: where the run lives.
        first_step: the step about to run; later lines come from work that was not saved.
        wandb_project: mirror to this wandb project; None: not.
        config: the run's settings, for wandb.
        tensorboard: mirror to files for tensorboard in `folder`/tensorboard.
    Raises:
        WanError: a mirror is asked for and not installed, or a line there is damaged.
        OSError: the file can't be written; what was there is untouched.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int = 0,
        wandb_project: str | None = None,
        config: dict[str, Any] | None = None,
        tensorboard: bool = False,
    ) -> None:
        self.path = folder / "metrics.jsonl"
        rows = read_metrics(self.path) if self.path.exists() else []
        kept = [row for row in rows if row["step"] < first_step]
        write_text(self.path, "".join(json.dumps(sealed(row)) + "\n" for row in kept))
        self.mirrors: dict[str, Mirror] = {}
        self.warned: set[str] = set()
        if wandb_project is not None:
            check_wandb(wandb_project)
            self.start("wandb", lambda: Wandb(folder, wandb_project, config or {}))
        if tensorboard:
            check_tensorboard()
            self.start("tensorboard", lambda: Tensorboard(folder / "tensorboard", kept, first_step))

    def write(self, step: int, **values: float | int | str) -> None:
        """One line. JSON has no NaN or infinity: they are written as null.

        Raises:
            OSError: names the file. Half a line may be left, which the next run drops.
        """
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
        }
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(sealed({"step": step, **finite})) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        for name, mirror in self.mirrors.items():
            self.attempt(name, partial(mirror.write, step, values))

    def show(self, step: int, media: Sequence[Path]) -> None:
        """Pictures (png) and clips (mp4) of a save, named without their step: samples/triptych for
        samples/0000200-triptych.png."""
        named = {f"samples/{path.stem.partition('-')[2]}": path for path in media}
        for name, mirror in self.mirrors.items():
            if named:
                self.attempt(name, partial(mirror.show, step, named))

    def close(self) -> None:
        for name, mirror in self.mirrors.items():
            self.attempt(name, mirror.close)

    def start(self, name: str, make: Callable[[], "Mirror"]) -> None:
        def begin() -> None:
            self.mirrors[name] = make()

        self.attempt(name, begin)

    def attempt(self, name: str, send: Callable[[], Any]) -> None:
        """Send something to a mirror; its first failure is a warning, and none ends the run."""
        try:
            send()
        except Exception as error:  # the network's, the server's, the library's own: of any kind
            if name not in self.warned:
                text = " ".join(f"{type(error).__name__}: {error}".split())
                print(f"warning: {name}: {text}; {self.path} goes on", file=sys.stderr)
            self.warned.add(name)


class Mirror(Protocol):
    """What shows the numbers of a run elsewhere. Errors of any kind may leave its methods."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """The numbers of a line."""

    def show(self, step: int, media: Mapping[str, Path]) -> None:
        """Pictures and clips by name."""

    def close(self) -> None: ...


class Wandb:
    """A run of wandb; a resumed training goes on in the same one. Files are sent as they are."""

    def __init__(self, folder: Path, project: str, config: dict[str, Any]) -> None:
        import wandb

        identity = folder / "wandb_id.txt"
        if not identity.exists() or not identity.read_text().strip():
            write_text(identity, uuid.uuid4().hex[:12])
        run = wandb.init(
            project=project,
            dir=folder,
            config=config,
            name=folder.name,
            id=identity.read_text().strip(),
            resume="allow",
        )
        run.define_metric("*", step_metric="trainer/step")
        self.run, self.wandb = run, wandb

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self.run.log({"trainer/step": step, **values})

    def show(self, step: int, media: Mapping[str, Path]) -> None:
        sent = {
            name: self.wandb.Video(str(path), format="mp4")
            if path.suffix == ".mp4"
            else self.wandb.Image(str(path))
            for name, path in media.items()
        }
        self.run.log({"trainer/step": step, **sent})

    def close(self) -> None:
        self.run.finish()


class Tensorboard:
    """Files for tensorboard, by the number of finished steps. Clips are shown as small GIFs.

    Where a resumed run repeats steps, tensorboard is told to forget their points.

    Args:
        rows: lines of earlier steps, for a folder that has none of them yet.
        first_step: the step about to run.
    """

    def __init__(self, folder: Path, rows: Sequence[Mapping[str, Any]], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        new = not any(folder.glob("*tfevents*"))
        self.writer: Any = SummaryWriter(str(folder), purge_step=None if new else first_step + 1)
        for row in rows if new else ():
            self.write(row["step"], row)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if name != "step" and isinstance(value, int | float):
                self.writer.add_scalar(name, value, step + 1)
        self.writer.flush()

    def show(self, step: int, media: Mapping[str, Path]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        for name, path in media.items():
            content, (width, height) = as_gif(path) if path.suffix == ".mp4" else as_png(path)
            image = Summary.Image(
                height=height, width=width, colorspace=3, encoded_image_string=content
            )
            value = Summary.Value(tag=name, image=image)
            self.writer.file_writer.add_summary(Summary(value=[value]), step + 1)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def check_mirrors(config: LoopConfig) -> None:
    """Refuse a mirror that is not installed, before a run does anything."""
    if config.wandb_project is not None:
        check_wandb(config.wandb_project)
    if config.tensorboard:
        check_tensorboard()


def check_wandb(project: str) -> None:
    check_installed("wandb", f"wandb_project={project!r}")


def check_tensorboard() -> None:
    check_installed("tensorboard", "tensorboard=true")


def check_installed(module: str, asked: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise WanError(
            f'loop.{asked}: {module} is not installed; pip install -e ".[train]"'
        ) from error


def as_png(path: Path) -> tuple[bytes, tuple[int, int]]:
    """The bytes of a picture, and its width and height."""
    with Image.open(path) as picture:
        return path.read_bytes(), picture.size


def as_gif(path: Path, max_width: int = 320) -> tuple[bytes, tuple[int, int]]:
    """A video as the bytes of a GIF that plays without end, and its width and height."""
    from wan.media.video import read_video  # loads PyTorch, which train.plot does without

    frames, info = read_video(path)
    pictures = [Image.fromarray(frame) for frame in frames]
    width, height = pictures[0].size
    if width > max_width:
        size = (max_width, max(1, round(height * max_width / width)))
        pictures = [picture.resize(size) for picture in pictures]
    file = io.BytesIO()
    duration = 1000 / info.fps  # milliseconds of a frame
    pictures[0].save(
        file, "GIF", save_all=True, append_images=pictures[1:], duration=duration, loop=0
    )
    return file.getvalue(), pictures[0].size
