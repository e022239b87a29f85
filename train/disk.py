"""Whether the disk has room for what a run is going to write, said before its first step."""

import math
import shutil
import sys
from pathlib import Path

from configs.training import LoopConfig
from train.checkpoint import is_own, list_checkpoints
from wan.errors import WanError


def check_room(
    folder: Path,
    config: LoopConfig,
    step: int,
    checkpoint_bytes: int,
    artefact_bytes: int,
    ranked: bool = False,
) -> None:
    """Compare what a run has yet to write with what is free.

    A new checkpoint is written before the oldest goes, so that `keep_last` + 1 lie there at once,
    and the best one beside them where checkpoints are ranked.

    Args:
        folder: the run's.
        step: where the run begins.
        checkpoint_bytes: of one checkpoint.
        artefact_bytes: of all that is made of one step; 0 where nothing is.
        ranked: whether a best checkpoint is kept.
    Raises:
        WanError: the checkpoints do not fit. Exports that do not fit are only warned of, since
            they may be moved away while the run goes on.
    """
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return
    if usage.total == 0 or step >= config.steps:  # some disks on a network do not say
        return
    there = sum(map(is_own, list_checkpoints(folder / "checkpoints")))
    saves = math.ceil(config.steps / config.save_every) - step // config.save_every

    def to_come(keep_last: int) -> int:
        return max(1, min(there + saves, keep_last + 1 + ranked) - there) * checkpoint_bytes

    needed, free = to_come(config.keep_last), usage.free
    one = f"{gigabytes(checkpoint_bytes)} each (weights, averages and the optimisers' numbers)"
    if needed > free:
        fewer = ""
        if to_come(1) < needed:
            fewer = f"loop.keep_last=1 needs {gigabytes(to_come(1))}; "
        if to_come(1) > checkpoint_bytes:
            fewer += (
                f"loop.save_every={config.steps}, a single one at the end, needs "
                f"{gigabytes(checkpoint_bytes)}; "
            )
        raise WanError(
            f"{folder}: the checkpoints to come need {gigabytes(needed)} at once, {one}, and "
            f"{gigabytes(free)} are free; {fewer}or free space, or choose another output_dir="
        )
    exports = 1  # at the end
    if config.export_every:
        exports += config.steps // config.export_every - step // config.export_every
    total = needed + exports * artefact_bytes
    if total > free:
        print(
            f"warning: {folder}: {gigabytes(total)} are to be written, {gigabytes(free)} are free: "
            f"checkpoints {gigabytes(needed)}, and {exports} exports of "
            f"{gigabytes(artefact_bytes)}; raise loop.export_every=, or move exports away in time",
            file=sys.stderr,
        )


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
