"""Compare a student with its teacher on the same captions and seeds, and report.

    python -m infer.study study=mini                    # make what is missing, then the report
    python -m infer.study study=mini report_only=true   # only the report, of what is stored

A study is a YAML file in configs/study/. Results are stored per setting and set of captions, every
few minutes too. Clips whose settings, captions and weights have not changed are not made again: an
interrupted study goes on where it stopped, and if captions are added, only the new ones are made. A
setting that fails is named at the end; the others are still made. Options of a setting are changed
as in settings.teacher_unipc_50.share=0.1.
"""

from functools import partial
from pathlib import Path

from configs.cli import Run, run
from configs.command_line import CommandLine
from configs.evaluation import CAPTION_SETS, StudyConfig
from infer.evaluate.queue import LastPipeline, conclude, run_each, weights_of
from infer.evaluate.store import StoredClips
from infer.machine import writable_folder
from infer.study.report import read_settings, write_report

LINE = CommandLine(StudyConfig, "study", text_keys=(), path_keys=("output_dir", "checkpoint"))


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


def main(run: Run[StudyConfig]) -> int:
    """The command; exit code 1 if a setting failed or there is nothing to report."""
    config = run.config
    folder = writable_folder(config.output_dir)
    failed = [] if config.report_only else run_settings(config, folder)
    rows = read_settings(config, folder)
    report = write_report(config, rows, folder) if rows else None
    return conclude(report, failed, "settings", folder)


if __name__ == "__main__":
    run(main, LINE, __doc__ or "")
