"""Run a released model at full size without its weights: with random ones.

    python -m infer.rehearse                                  # the 5B: 24 GB of disk
    python -m infer.rehearse quantize=int8 keep=true
    python -m infer.rehearse release=wan21_t2v_1_3b compare=true
    python -m infer.rehearse device=cuda height=704 width=1280 num_frames=121

Writes a folder with the names, shapes, dtypes and shards of the release, runs infer.sample on it in
a process of its own, and prints for each stage what it took: seconds, memory beside the prediction,
bytes from the disk. With compare=true the networks of diffusers and transformers then make the same
video from the same files and noise (needs pip install -e ".[parity]"), and text, latents and pixels
are compared. The video shows nothing. Exit codes: 0 done; 1 infer.sample failed, or the results
differ; 2 the command has an error, such as a disk without room; 130 stopped with Ctrl-C.
"""

from configs.cli import Run, run
from configs.command_line import CommandLine
from configs.progress import loading_pytorch
from configs.rehearsal import RehearseConfig

LINE = CommandLine(RehearseConfig, "rehearse", text_keys=("prompt",), path_keys=("folder",))


def main(run: Run[RehearseConfig]) -> int:
    with loading_pytorch():
        from infer.rehearse.run import rehearse
    return rehearse(run.config)


if __name__ == "__main__":
    run(main, LINE, __doc__ or "")
