"""Numbers of a run: one JSON object per line on the local disk, mirrored to wandb if asked."""

import json
import math
import uuid
from pathlib import Path
from typing import Any

from wan.errors import WanError


class MetricsLog:
    """Appends to `metrics.jsonl`. After a resume, lines of steps to be repeated are dropped first.

    Args:
        folder: where the run lives.
        first_step: the step about to run; later lines come from work that was not saved.
        wandb_project: mirror to this wandb project; None keeps everything local.
        config: the run's settings, shown by wandb.
    Raises:
        WanError: wandb is asked for and not installed.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int = 0,
        wandb_project: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.path = folder / "metrics.jsonl"
        text = self.path.read_text() if self.path.exists() else ""
        whole = text[: text.rfind("\n") + 1].splitlines()  # a killed run may leave half a line
        kept = [line for line in whole if json.loads(line)["step"] < first_step]
        beside = self.path.with_suffix(".jsonl.part")
        beside.write_text("".join(line + "\n" for line in kept))
        beside.replace(self.path)
        self.wandb = None
        if wandb_project is not None:
            self.wandb = start_wandb(folder, wandb_project, config or {})

    def write(self, step: int, **values: float | int | str) -> None:
        """One line. JSON has no NaN or infinity: they are written as null."""
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
        }
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")
        if self.wandb is not None:
            self.wandb.log({"trainer/step": step, **values})

    def close(self) -> None:
        if self.wandb is not None:
            self.wandb.finish()


def start_wandb(folder: Path, project: str, config: dict[str, Any]):
    try:
        import wandb
    except ImportError as error:
        raise WanError(
            f"wandb_project={project!r}: wandb is not installed; pip install 'wan-few-step[train]'"
        ) from error
    identity = folder / "wandb_id.txt"  # a resumed run goes on in the same wandb run
    if not identity.exists():
        identity.write_text(uuid.uuid4().hex[:12])
    run = wandb.init(
        project=project,
        dir=folder,
        config=config,
        name=folder.name,
        id=identity.read_text().strip(),
        resume="allow",
    )
    run.define_metric("*", step_metric="trainer/step")
    return run
