"""Make videos from prompts.

    python -m infer.sample prompt="a small red circle moving right on a gray background"
    python -m infer.sample model=fastwan_ti2v_5b device=cuda prompt="a cat, running" seed=7
    python -m infer.sample model=wan22_ti2v_5b image=cat.png prompt="it jumps" output_dir=cats
    python -m infer.sample prompt_file=prompts.txt num_videos=2
    python -m infer.sample -m steps=4,8,20 seed=0,1 prompt="a blue star"

The prompt is taken exactly as typed: only your shell needs its quotes. Options that show `none`
below are off, or as the model's own folder says. Each video comes with a picture of its frames, its
latents, and a JSON record of everything that made it. Exit codes: 0 done; 1 a result that is no
picture (its latents are kept); 2 something to correct in the command; 130 stopped with Ctrl-C (what
there was by then is kept).
"""

import signal
import sys
from typing import Any

from configs.cli import INTERRUPTED, Run, run
from configs.command_line import ATTENTION, CommandLine, Shortcut
from configs.schema import SampleConfig
from infer.sample.jobs import read_jobs

LINE = CommandLine(
    SampleConfig,
    "sample",
    text_keys=("prompt", "negative_prompt"),
    path_keys=("prompt_file", "image", "checkpoint", "output_dir", "lora", "lora_2"),
    shortcuts={
        "steps": Shortcut("sampler.steps", clears=("sampler.timesteps",)),
        "timesteps": Shortcut("sampler.timesteps", clears=("sampler.steps",)),
        "shift": Shortcut("sampler.shift"),
        **ATTENTION,
    },
)


class SampleCommand:
    """Makes the videos of one point of a sweep after another; keeps the model in between."""

    def __init__(self) -> None:
        self._models: Any = None

    def __call__(self, run: Run[SampleConfig]) -> int:
        """All videos that a command asks for; returns the exit code.

        Everything that can be wrong with the request is found before weights are fetched or read.
        """
        jobs = read_jobs(run.config, run.sources)
        # Here and not above: PyTorch takes seconds to load, a mistyped option should not.
        from infer.loading import ModelCache
        from infer.sample.generate import make_video, prepare

        self._models = self._models or ModelCache()
        session = prepare(run, jobs, self._models)
        code = 0
        for request in session.requests:
            for seed in request.seeds:
                code = max(code, make_video(session, request, seed))
                if code == INTERRUPTED:
                    return code
        return code


def main() -> None:
    # A scheduler's request to stop is treated as a person's: what there is by then is kept.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run(SampleCommand(), LINE, sys.modules[__name__].__doc__ or "")


if __name__ == "__main__":
    main()
