"""Measure how often videos show what their captions say.

A model makes clips of captions of the miniature's world, and analytic detectors read them. A clip
counts as right only if every stated attribute and the number of objects are. Example:

    python -m infer.evaluate num_captions=512 split=heldout output=outputs/evaluation.json

Two ceilings need no trained transformer: source=renders scores the world's own renders (how good
the detectors are), source=vae the same renders through the autoencoder (how much it keeps).

The distance to the truth compares all clips with other true scenes of the same captions, so that
source=renders gives its floor. Diversity needs captions that leave something open, and several
seeds of each: omit=0.5 seeds_per_caption=8 split=train.
"""

from configs.cli import Run, run
from configs.command_line import ATTENTION, CommandLine, Shortcut
from configs.evaluation import EvaluateConfig
from configs.progress import loading_pytorch
from configs.schema import PARTS

LINE = CommandLine(
    EvaluateConfig,
    "evaluate",
    text_keys=("negative_prompt",),
    path_keys=("checkpoint", "output", "sheet", *PARTS),
    shortcuts={
        "steps": Shortcut("sampler.steps", clears=("sampler.timesteps",)),
        "timesteps": Shortcut("sampler.timesteps", clears=("sampler.steps",)),
        "shift": Shortcut("sampler.shift"),
        **ATTENTION,
    },
    written=("output", "sheet"),
)


def main(run: Run[EvaluateConfig]) -> None:
    with loading_pytorch():
        from infer.evaluate.run import evaluate_source
    evaluate_source(run)


if __name__ == "__main__":
    run(main, LINE, __doc__ or "")
