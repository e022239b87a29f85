"""Numbers of a run: one JSON object per line on the local disk, mirrored to wandb if asked.

Each line carries a digest of itself (`wan.files.sealed`), so that a damaged one is noticed.
"""

import json
import math
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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

    wandb is a mirror: the first failure there is a warning, and the run goes on.

    Args:
        folder: where the run lives.
        first_step: the step about to run; later lines come from work that was not saved.
        wandb_project: mirror to this wandb project; None keeps everything local.
        config: the run's settings, for wandb.
    Raises:
        WanError: wandb_project is given and wandb is not installed, or a line there is damaged.
        OSError: the file can't be written; what was there is untouched.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int = 0,
        wandb_project: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.path = folder / "metrics.jsonl"
        rows = read_metrics(self.path) if self.path.exists() else []
        kept = [row for row in rows if row["step"] < first_step]
        write_text(self.path, "".join(json.dumps(sealed(row)) + "\n" for row in kept))
        self.wandb: Any = None
        self.warned = False
        if wandb_project is not None:
            check_wandb(wandb_project)
            self.mirror(lambda: self.start_wandb(folder, wandb_project, config or {}))

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
        if self.wandb is not None:
            self.mirror(lambda: self.wandb.log({"trainer/step": step, **values}))

    def show(self, step: int, media: Sequence[Path]) -> None:
        """Pictures (png) and clips (mp4) of a save, to wandb as the files they are."""
        if self.wandb is not None and media:
            self.mirror(lambda: self.wandb.log({"trainer/step": step, **as_media(media)}))

    def close(self) -> None:
        if self.wandb is not None:
            self.mirror(self.wandb.finish)

    def start_wandb(self, folder: Path, project: str, config: dict[str, Any]) -> None:
        import wandb

        identity = folder / "wandb_id.txt"  # a resumed run goes on in the same wandb run
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
        self.wandb = run

    def mirror(self, send: Callable[[], Any]) -> None:
        """Send something to wandb; the first failure is a warning, and none ends the run."""
        try:
            send()
        except Exception as error:  # the network's, the server's, wandb's own: of any kind
            if not self.warned:
                text = " ".join(f"{type(error).__name__}: {error}".split())
                print(f"warning: wandb: {text}; {self.path} goes on", file=sys.stderr)
            self.warned = True


def check_wandb(project: str) -> None:
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise WanError(
            f"wandb_project={project!r}: wandb is not installed; pip install 'wan-few-step[train]'"
        ) from error


def as_media(paths: Sequence[Path]) -> dict[str, Any]:
    """Files as wandb wants them, named without their step: samples/triptych for
    samples/0000200-triptych.png."""
    import wandb

    return {
        f"samples/{path.stem.partition('-')[2]}": (
            wandb.Video(str(path), format="mp4")
            if path.suffix == ".mp4"
            else wandb.Image(str(path))
        )
        for path in paths
    }
