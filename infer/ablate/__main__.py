"""Measure the quality and the seconds of every combination of some settings.

    python -m infer.ablate experiment=attention      # full attention and the rest, 3 and 50 steps
    python -m infer.ablate experiment=steps          # 1 step to 50, teacher and student
    python -m infer.ablate experiment=attention_5b   # the same of the 5B, on a GPU; and steps_5b
    python -m infer.ablate model=mini-teacher attention=[sdpa,spatial] steps=[4,20]
    python -m infer.ablate model=wan22_ti2v_5b prompt="a fox runs" num_seeds=4 steps=[4,10,20]

Without a prompt, clips of captions of the miniature's world are made, and its detectors read
whether they match. With prompts, clips of any model are compared with its exact many-step result on
the same noise: that measures how near a setting comes to it, and not which video is better.

Stored clips of the same settings and weights are not made again, so an interrupted run goes on
where it stopped. What fails is named at the end, with exit code 1; the rest is still made.
"""

from configs.ablation import AblateConfig
from configs.cli import Run, run
from configs.command_line import CommandLine, Shortcut
from configs.progress import loading_pytorch

LINE = CommandLine(
    AblateConfig,
    "ablate",
    text_keys=("prompt", "negative_prompt"),
    text_lists=("prompts",),
    path_keys=("prompt_file", "output_dir", "checkpoint"),
    shortcuts={name: Shortcut(f"grid.{name}") for name in ("attention", "steps", "shift")},
)


def main(run: Run[AblateConfig]) -> int:
    with loading_pytorch():
        from infer.ablate.run import ablate
    return ablate(run)


if __name__ == "__main__":
    run(main, LINE, __doc__ or "")
