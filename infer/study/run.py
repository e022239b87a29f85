"""Make the clips of each setting that are not stored yet, and report: the work of `infer.study`."""

from functools import partial
from pathlib import Path

from configs.cli import Run
from configs.evaluation import CAPTION_SETS, StudyConfig
from configs.progress import doing
from infer.evaluate.queue import Job, LastPipeline, conclude, run_each, weights_of
from infer.evaluate.store import Missing, StoredClips
from infer.machine import writable_folder
from infer.processes import Processes, Team
from infer.study.report import read_settings, write_report


def clips_of(name: str, captions: str, config: StudyConfig, folder: Path) -> StoredClips:
    """The clips of one setting and set of captions."""
    question, file = config.evaluation(name, captions), folder / name / f"{captions}.json"
    return StoredClips(f"{name}, {captions}", question, file, weights_of(question))


def list_missing(
    config: StudyConfig, folder: Path, num_processes: int
) -> tuple[list[tuple[str, str, Missing]], list[str]]:
    """What is not stored yet, by setting and set of captions; and the settings that failed."""
    missing: list[tuple[str, str, Missing]] = []

    def look(name: str, team: Team) -> None:
        found = [(c, clips_of(name, c, config, folder)) for c in CAPTION_SETS]
        missing.extend((name, c, clips.missing(num_processes)) for c, clips in found)

    names = config.only or config.settings
    looks = [Job(name, name, partial(look, name), clips=0) for name in names]
    failed = run_each(looks, "settings looked for")
    return missing, failed


def run_settings(config: StudyConfig, folder: Path, team: Team) -> list[str]:
    """Run the settings one after the other; the names of those that failed."""
    missing, failed = team.first(lambda: list_missing(config, folder, team.size))
    models = LastPipeline(team.processes)
    jobs = [
        job
        for name, captions, what in missing
        for job in clips_of(name, captions, config, folder).jobs(name, what, models)
    ]
    return [*failed, *run_each(jobs, "parts of the clips", team)]


def study(run: Run[StudyConfig]) -> int:
    """The command; exit code 1 if a setting failed or there is nothing to report."""
    config = run.config
    folder = writable_folder(config.output_dir)
    with Processes.started().together(config.device) as team:
        failed = [] if config.report_only else run_settings(config, folder, team)
        if not team.is_main:
            return 0
        with doing("reading what is stored"):
            rows = read_settings(config, folder)
        with doing("writing the report"):
            report = write_report(config, rows, folder) if rows else None
        return conclude(report, failed, "settings", folder)
