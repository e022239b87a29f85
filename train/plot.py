"""Draw the numbers of a training run, or of several in one picture.

`python -m train.plot run=runs/student_3` writes runs/student_3/plot.png.
`python -m train.plot run=runs/a,runs/b output=both.png` draws each run in a colour of its own.

One panel per family of numbers in metrics.jsonl: what shares a name up to its last part, such as
`critic_loss_sigma_0.2` and `critic_loss_sigma_0.4`, or `val_shape` and `val_colour`.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from configs.cli import Run, run
from configs.command_line import CommandLine
from configs.progress import doing
from configs.schema import PICTURES, Options, check_ending, option
from train.metrics import read_metrics
from wan.errors import WanError
from wan.files import expanded, written_beside

Series = list[tuple[int, float]]  # (step, value)

# Panels of numbers that belong together though their names do not say so.
FAMILIES = {
    "gradient norms": ("student_grad_norm", "critic_grad_norm", "grad_norm"),
    "student's x0": ("student_mean", "student_std", "student_max"),
    "share of saturated latents": ("student_saturated", "teacher_saturated"),
    "learning rates": ("lr", "critic_lr"),
    "student over teacher": (
        *("student_drift", "motion_ratio", "saturation_ratio", "spread_ratio", "diversity_ratio"),
    ),
    "spread of clips, within what the teacher's": (
        *("clip_spread", "clip_spread_low", "clip_spread_high"),
    ),
    "loss on held-out clips": ("val_loss", "val_loss_ema"),
    "PSNR, dB": ("psnr", "val_psnr", "val_psnr_foreground"),
    "health and captions that came true": ("health", "val_joint", "teacher_joint"),
}
PREFIXES = {
    "critic_loss_sigma_": "critic's loss by noise level",
    "exits_": "exits",
    "val_loss_": "loss on held-out clips by noise level",
    "val_": "right",
}
COLUMNS = 3


def check_picture(name: str, value: str) -> None:
    check_ending(name, value, (*PICTURES, ".pdf", ".svg"))


@dataclass
class PlotConfig(Options):
    """`train.plot`: a picture of a run."""

    run: list[str] = option(
        ["runs/student_3"], "the output_dir of a training command, or several: a,b"
    )
    output: str | None = option(
        None,
        "the picture; null: plot.png beside the metrics; needed for several runs",
        check=check_picture,
    )


LINE = CommandLine(
    PlotConfig,
    "plot",
    text_keys=(),
    path_keys=("output",),
    list_keys=("run",),
)


def read_series(path: Path) -> dict[str, Series]:
    """Every number of a metrics.jsonl over steps; what was not finite is left out.

    Raises:
        WanError: there is no such file, or nothing in it yet.
    """
    if not path.is_file():
        raise WanError(f"{path}: no metrics there; run= is the output_dir of a training command")
    series: dict[str, Series] = defaultdict(list)
    for row in read_metrics(path):
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                series[name].append((row["step"] + 1, value))
    if not series:
        raise WanError(f"{path}: no numbers yet")
    return dict(series)


def family(name: str) -> str:
    """The panel a number is drawn in."""
    for title, names in FAMILIES.items():
        if name in names:
            return title
    return next((title for start, title in PREFIXES.items() if name.startswith(start)), name)


LINES = ("-", "--", ":", "-.")  # of numbers in one panel, where colours tell runs apart


def draw(runs: Mapping[str, dict[str, Series]], path: Path) -> None:
    """Write the picture.

    Args:
        runs: the name of each run -> its numbers. Of one, numbers have colours; of several, runs.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise WanError('drawing needs matplotlib: pip install -e ".[plot]"') from error
    panels: dict[str, list[str]] = defaultdict(list)
    for name in dict.fromkeys(name for series in runs.values() for name in series):
        panels[family(name)].append(name)
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(4.6 * COLUMNS, 2.8 * rows), layout="constrained")
    figure.suptitle(", ".join(runs))
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    for axes, (heading, names) in zip(grid.flat, panels.items(), strict=False):
        start = next((start for start, title in PREFIXES.items() if title == heading), "")
        drawn = [(n, one, series[n]) for n in names for one, series in runs.items() if n in series]
        for name, one, points in drawn:
            steps, values = zip(*points, strict=True)
            label = name.removeprefix(start)
            how = {"marker": "." if len(steps) < 30 else "", "linewidth": 1}
            if len(runs) > 1:
                how["color"] = f"C{list(runs).index(one) % 10}"
                how["linestyle"] = LINES[names.index(name) % len(LINES)]
                label = f"{one}: {label}" if len(names) > 1 else one
            axes.plot(steps, values, label=label, **how)
        axes.set_title(heading, fontsize=10)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        if len(drawn) > 1:
            axes.legend(fontsize=7, frameon=False)
    for axes in list(grid.flat)[len(panels) :]:
        axes.remove()
    for axes in grid[-1]:
        axes.set_xlabel("steps", fontsize=8)
    with written_beside(path) as beside:
        figure.savefig(beside, dpi=110, format=path.suffix[1:].lower())


def plot(config: PlotConfig) -> None:
    folders = [expanded(run) for run in config.run]
    if config.output is None and len(folders) > 1:
        raise WanError("run= names several runs: name their picture too, as in output=both.png")
    output = expanded(config.output) if config.output else folders[0] / "plot.png"
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):  # runs/a/dit and runs/b/dit
        names = [str(folder) for folder in folders]
    runs = zip(names, (read_series(folder / "metrics.jsonl") for folder in folders), strict=True)
    with doing("drawing"):
        draw(dict(runs), output)
    print(f"wrote {output}")


def main(run: Run[PlotConfig]) -> None:
    plot(run.config)


if __name__ == "__main__":
    run(main, LINE, __doc__ or "")
