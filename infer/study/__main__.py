"""Compare a student with its teacher on the same captions and seeds, and report.

    python -m infer.study study=mini                    # make what is missing, then the report
    python -m infer.study study=mini report_only=true   # only the report, of what is stored

A study is a YAML file in configs/study/. Results are stored per setting and set of captions, every
few minutes too. Clips whose settings, captions and weights have not changed are not made again: an
interrupted study goes on where it stopped, and if captions are added, only the new ones are made. A
setting that fails is named at the end; the others are still made. Options of a setting are changed
as in settings.teacher_unipc_50.share=0.1.
"""

from configs.cli import Run, run
from configs.command_line import CommandLine
from configs.evaluation import StudyConfig
from configs.progress import loading_pytorch

LINE = CommandLine(StudyConfig, "study", text_keys=(), path_keys=("output_dir", "checkpoint"))


def main(run: Run[StudyConfig]) -> int:
    with loading_pytorch():
        from infer.study.run import study
    return study(run)


if __name__ == "__main__":
    run(main, LINE, __doc__ or "")
