"""Make the clips of each setting that are not stored yet, and report: the work of `infer.study`."""

from functools import partial
from pathlib import Path

from configs.cli import Run
from configs.evaluation import CAPTION_SETS, StudyConfig
from infer.evaluate.queue import LastPipeline, conclude, run_each, weights_of
from infer.evaluate.store import StoredClips
from infer.machine import writable_folder
from infer.study.report import read_settings, write_report


def run_setting(name: str, config: StudyConfig, folder: Path, models: LastPipeline) -> None:
    """Make and measure the clips of one setting that are not stored yet."""
    weights = weights_of(config.evaluation(name, CAPTION_SETS[0]))
    for captions in CAPTION_SETS:
        question, file = config.evaluation(name, captions), folder / name / f"{captions}.json"
        StoredClips(f"{name}, {captions}", question, file, weights).make_missing(models)


def run_settings(config: StudyConfig, folder: Path) -> list[str]:
    """Run the settings one after the other; the names of those that failed."""
    models = LastPipeline()
    names = config.only or config.settings
    return run_each({name: partial(run_setting, name, config, folder, models) for name in names})


def study(run: Run[StudyConfig]) -> int:
    """The command; exit code 1 if a setting failed or there is nothing to report."""
    config = run.config
    folder = writable_folder(config.output_dir)
    failed = [] if config.report_only else run_settings(config, folder)
    rows = read_settings(config, folder)
    report = write_report(config, rows, folder) if rows else None
    return conclude(report, failed, "settings", folder)
