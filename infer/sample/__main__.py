"""Make videos from prompts.

    python -m infer.sample prompt="a small red circle moving right on a gray background"
    python -m infer.sample model=fastwan_ti2v_5b device=cuda prompt="a cat, running" seed=7
    python -m infer.sample model=wan22_ti2v_5b image=cat.png prompt="it jumps" output_dir=cats
    python -m infer.sample prompt_file=prompts.txt num_videos=2
    python -m infer.sample model=mini-teacher preview=true steps=20 prompt="a blue star"
    python -m infer.sample -m model=mini-teacher steps=4,8,20 seed=0,1 prompt="a blue star"
    torchrun --nproc-per-node 4 -m infer.sample model=wan22_t2v_a14b prompt="a fox"
    python -m infer.sample lora=style.safetensors:0.8,motion.safetensors prompt="a blue star"

The prompt is used exactly as typed; only your shell needs the quotes. An option with the value
`none` below is off, or takes the value of the model's folder. Each video comes with a picture of
its frames, its latents, and a JSON record of all settings. A sweep (-m) also leaves a table and a
page of its videos. Exit codes: 0 done; 1 the result shows no picture (its latents are kept); 2 the
command has an error; 130 stopped with Ctrl-C (the latents reached so far are kept).
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from configs.cli import INTERRUPTED, Run, run
from configs.progress import loading_pytorch
from configs.schema import SampleConfig
from infer.gallery.records import write_sweep
from infer.processes import Processes
from infer.sample.jobs import read_jobs
from infer.sample.line import LINE
from infer.sharing import Sharing, makes_together, printing, told_once
from wan.errors import WanError


class SampleCommand:
    """Makes the videos of each point of a sweep; keeps the model from point to point.

    At the end of a sweep, a table and a page of its videos are written.
    """

    def __init__(self) -> None:
        self._models: Any = None
        self._records: list[str] = []  # of all points so far, in all processes
        self._stopped = False  # by Ctrl-C, with what was made kept
        self._streams: tuple[TextIO, TextIO] | None = None

    def __call__(self, run: Run[SampleConfig]) -> int:
        """Make all videos of one point; returns the exit code.

        Errors in the request are raised before weights are downloaded or read.
        """
        with self._table_at_the_end(run):
            config, processes = run.config, Processes.started()
            jobs = read_jobs(config, run.sources)
            together = makes_together(config, run.sources, jobs.num_videos, processes)
            with loading_pytorch():
                from infer.loading import ModelCache
                from infer.sample.generate import make_video
                from infer.sample.prepare import prepare
            self._models = self._models or ModelCache()
            self._streams = self._streams or (sys.stdout, sys.stderr)
            code, made = 0, list[str]()
            with processes.together(config.device) as team:
                sharing = Sharing(team, together, config.parallel)
                with told_once(team), printing(sharing, *self._streams):
                    session = prepare(run, jobs, self._models, sharing)
                    for request, seed in session.own_videos():
                        story = make_video(session, request, seed)
                        code = max(code, story.code)
                        if not sharing.helps:
                            made.append(str(story.files.record))
                        if code == INTERRUPTED:
                            self._stopped = True
                            self._records += made
                            if together:  # the others wait for this process, and it for none
                                sys.exit(code)
                            return code
                # torchrun ends all as soon as one ends with an error
                for records in team.everyone([*made, *map(str, session.already)]):
                    self._records += records
            return code

    @contextmanager
    def _table_at_the_end(self, run: Run[SampleConfig]) -> Iterator[None]:
        """Write the table and page of a sweep after its last point, or where it is stopped."""
        over = True
        try:
            yield
            over = run.last or self._stopped
        except (WanError, OSError):  # the other points still run
            over = run.last
            raise
        finally:
            if over and run.title and self._records and Processes.started().is_main:
                write_sweep(map(Path, self._records))


if __name__ == "__main__":
    run(SampleCommand(), LINE, __doc__ or "")
