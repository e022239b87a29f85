"""Make the clips of each setting that are not stored yet, and report: the work of `infer.study`."""

from functools import partial
from pathlib import Path

from torch import Tensor

from configs.cli import Run
from configs.evaluation import CAPTION_SETS, StudyConfig
from configs.progress import doing
from infer.evaluate.queue import Job, LastPipeline, conclude, run_each, weights_of
from infer.evaluate.store import Missing, StoredClips, keep_clip, kept_clip
from infer.machine import writable_folder
from infer.processes import Processes, Team
from infer.study.report import read_settings, write_report

FPS = 8  # of clips to look at


def clips_of(name: str, captions: str, config: StudyConfig, folder: Path) -> StoredClips:
    """The clips of one setting and set of captions."""
    question, file = config.evaluation(name, captions), folder / name / f"{captions}.json"
    return StoredClips(f"{name}, {captions}", question, file, weights_of(question))


def list_missing(
    config: StudyConfig, folder: Path, num_processes: int
) -> tuple[list[tuple[str, str, Missing]], dict[str, str]]:
    """What is not stored yet, by setting and set of captions; and the settings that failed, with
    their reasons.
    """
    missing: list[tuple[str, str, Missing]] = []

    def look(name: str, team: Team) -> None:
        found = [(c, clips_of(name, c, config, folder)) for c in CAPTION_SETS]
        missing.extend((name, c, clips.missing(num_processes)) for c, clips in found)

    names = config.only or config.settings
    looks = [Job(name, name, partial(look, name), clips=0) for name in names]
    failed = run_each(looks, "settings looked for")
    return missing, failed


def run_settings(config: StudyConfig, folder: Path, team: Team) -> dict[str, str]:
    """Run the settings one after the other; the names of those that failed, with their reasons."""
    missing, failed = team.first(lambda: list_missing(config, folder, team.size))
    models = LastPipeline(team.processes)
    jobs: list[Job] = []
    for name, captions, what in missing:
        clips = clips_of(name, captions, config, folder)
        jobs += clips.jobs(name, what, models, partial(keep, clips.file))
    return failed | run_each(jobs, "parts of the clips", team)


def keep(record: Path, number: int, video: Tensor) -> None:
    """Keep a clip (3, F, H, W) of a record to look at."""
    keep_clip(kept_clip(record, number), video, FPS)


def study(run: Run[StudyConfig]) -> int:
    """The command; exit code 1 if a setting failed or there is nothing to report."""
    config = run.config
    folder = writable_folder(config.output_dir)
    with Processes.started().together(config.device) as team:
        failed = {} if config.report_only else run_settings(config, folder, team)
        if not team.is_main:
            return 0
        with doing("reading what is stored"):
            rows = read_settings(config, folder)
        with doing("writing the report"):
            report = write_report(config, rows, folder) if rows else None
        return conclude(report, failed, "settings", folder)
