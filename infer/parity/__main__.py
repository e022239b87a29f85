"""Compare our models with diffusers and transformers on the same weights.

    python -m infer.parity [checkpoint=..]

    checkpoint=random   small models of both generations with random weights (the default)
    checkpoint=mini     the miniature that comes with this project; mini-teacher, its teacher
    checkpoint=FOLDER   a release in the diffusers layout, or its id on the hub
    full_block=true     one block of TI2V-5B at full width, random weights

Prints a row per comparison, and the first tensor that diverges. Exits with 1 if a row fails.
Needs pip install -e .[parity]
"""

from configs.cli import Run, run
from configs.command_line import CommandLine
from configs.parity import ParityConfig
from configs.progress import loading_pytorch

LINE = CommandLine(
    ParityConfig,
    "parity",
    path_keys=("checkpoint",),
)


def main(run: Run[ParityConfig]) -> int:
    with loading_pytorch():
        from infer.parity.run import parity
    return parity(run.config)


if __name__ == "__main__":
    run(main, LINE, __doc__ or "")
