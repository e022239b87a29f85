"""Distil a few-step student from a many-step teacher by distribution matching.

    python -m train.distill                                 # the miniature, three steps
    python -m train.distill method=fastwan3 plan=true       # what the released recipe would take

A many-step teacher becomes a student of one to four steps (DMD2, arXiv:2405.14867, without
pictures of the real world: captions are enough). Three networks, all from the teacher's weights:

    student   makes clips as it will when sampling; trained along critic minus teacher
    critic    learns by flow matching what the student's clips look like; the fake score
    teacher   frozen, guided; the real score

Optional terms: an adversarial one on features of critic or teacher (needs clips); regression on the
teacher's own trajectories, which alone (dmd_weight=0) is knowledge distillation; and regression on
where the teacher goes from the student's own states. What comes out is a folder in the released
layout, or a LoRA file.
"""

from configs.cli import Run, run
from configs.command_line import ATTENTION, CommandLine
from configs.distillation import DistillConfig
from configs.progress import loading_pytorch

LINE = CommandLine(
    DistillConfig,
    "distill",
    text_keys=("scores.negative_prompt",),
    path_keys=(
        *("output_dir", "checkpoint", "student.start", "regression.folder"),
        *("student.lora.start", "scores.critic_lora.start"),
        "data.cache_dir",
    ),
    list_keys=("data.folder",),
    shortcuts=ATTENTION,
)


def main(run: Run[DistillConfig]) -> int:
    with loading_pytorch():
        from train.distill.run import distill
    return distill(run.config)


if __name__ == "__main__":
    run(main, LINE, __doc__ or "")
