"""Measure time and memory, on a CPU beside diffusers and on a GPU stage by stage.

    python -m infer.bench [targets=[decode,dit]] [device=cuda attention=cudnn]

    on the CPU     against diffusers and transformers: the same weights, inputs, threads and dtype,
                   in one process, taking turns. Needs pip install -e .[parity]
    device=cuda    the stages of TI2V-5B at 121x704x1280 with random weights, eager and compiled,
                   beside the least time that their FLOPs need, and their sum. Nothing is
                   downloaded. First, bfloat16 results on the device are held against diffusers.

Prints a table of medians, with the middle half of all calls as spread, and writes bench.json. Aims
that were missed, in time or in memory, are named at the end; profile=true says why.
"""

from configs.benchmark import BenchConfig
from configs.cli import Run, run
from configs.command_line import ATTENTION, CommandLine
from configs.progress import loading_pytorch

LINE = CommandLine(
    BenchConfig,
    "bench",
    path_keys=("checkpoint", "output_dir"),
    shortcuts=ATTENTION,
)


def main(run: Run[BenchConfig]) -> None:
    with loading_pytorch():
        from infer.bench.run import bench
    bench(run.config)


if __name__ == "__main__":
    run(main, LINE, __doc__ or "")
