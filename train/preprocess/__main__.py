"""Encode clips and captions once, into what training reads.

    python -m train.preprocess clips=clips/

A folder (`name.mp4` beside `name.txt`) or a list of clips, images as clips of one frame, and texts
without clips (`prompts=`). All clips are decoded to their ends and judged: damaged ones are set
aside with the reasons, and too many of them fail the run, which then leaves check.jsonl. Then each
is brought to the size that keeps most of the picture and encoded: its start, or several samples of
it (`frames=`). report.jsonl says what became of it. To resume, or to add clips, run the same
command again. torchrun shares the clips out.
"""

from configs.cli import Run, run
from configs.command_line import CommandLine
from configs.data import PreprocessConfig
from configs.progress import loading_pytorch

LINE = CommandLine(
    PreprocessConfig,
    "preprocess",
    text_keys=("negative_prompt",),
    path_keys=("clips", "prompts", "output_dir", "checkpoint"),
)


def main(run: Run[PreprocessConfig]) -> int:
    with loading_pytorch():
        from train.preprocess.run import preprocess
    return preprocess(run.config)


if __name__ == "__main__":
    run(main, LINE, __doc__ or "")
