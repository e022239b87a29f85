"""Measure agreement with the prompt, consistency and motion of any model's videos.

    python -m infer.measure outputs
    python -m infer.measure outputs/00003_9f2c81d0_s42.mp4 measures=[motion]
    python -m infer.measure outputs image_tower=facebook/dinov2-base

Takes the videos that infer.sample made, with the prompts and settings of their records, and prints
a row for each combination of the settings that differ. text is the agreement of prompt and frames
by a CLIP model, consistency that of the frames with each other by its image tower or another
network, motion the optical flow. The report says what each does and does not mean. The networks are
folders or hub ids with safetensors weights, and are named in the report with their digests. Needs
pip install -e ".[metrics]". Videos of the miniature's world are better read by its own detectors:
see infer.evaluate.

What measures.json already holds of the same videos, prompts and networks is not measured again.
"""

from configs.cli import Run, run
from configs.command_line import CommandLine
from configs.measurement import MeasureConfig
from configs.progress import loading_pytorch

LINE = CommandLine(
    MeasureConfig,
    "measure",
    text_keys=(),
    path_keys=("videos", "output", "clip_model", "image_tower"),
    words=("videos",),
    written=("output",),
)


def main(run: Run[MeasureConfig]) -> int:
    with loading_pytorch():
        from infer.measure.run import measure_videos
    return measure_videos(run.config)


if __name__ == "__main__":
    run(main, LINE, __doc__ or "")
