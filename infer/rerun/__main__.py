"""Make a video again from its record, and say whether it is the same.

    python -m infer.rerun outputs/00000_red-fox_9f2c81d0_s42.json
    python -m infer.rerun theirs.mp4 checkpoint=/models/release lora=style.safetensors
    python -m infer.rerun outputs/00000_red-fox_9f2c81d0_s42 device=cpu

The record of a video, or the comment in its mp4, holds every setting and the sha256 of what was
made on the way. The new video gets a name and a record of its own. Where it is not the same, the
first thing that differs is named, as by infer.diff. A record is not trusted: it decides how to
sample, and it is followed to shipped models, to the hub and to files beside it. Other places are
given again, and their content is compared with the record's. Exit codes: 0 the same bit for bit; 1
different, or the result shows no picture; 2 the command has an error; 130 stopped with Ctrl-C.
"""

from configs.cli import INTERRUPTED, Run, run
from configs.command_line import CommandLine
from configs.progress import loading_pytorch
from configs.rerun import RerunConfig
from configs.schema import PARTS
from infer.diff.compare import compare, report
from infer.diff.records import VideoRecord, read_record
from infer.processes import Processes
from wan.errors import WanError

LINE = CommandLine(
    RerunConfig,
    "rerun",
    text_keys=(),
    path_keys=("record", "checkpoint", "image", "decoder", "output_dir", *PARTS),
    list_keys=("lora", "lora_2"),
    words=("record",),
)


def main(run: Run[RerunConfig]) -> int:
    config = run.config
    if Processes.started().size > 1:
        raise WanError("infer.rerun makes one video in one process: start it without torchrun")
    if not config.record:
        raise WanError("no record: python -m infer.rerun FILE, a record or an mp4 of infer.sample")
    record = read_record(config.record)
    with loading_pytorch():
        from infer.loading import ModelCache
        from infer.rerun.request import job_of
        from infer.sample.generate import make_video
        from infer.sample.jobs import Jobs
        from infer.sample.prepare import prepare
    job = job_of(record, config)
    session = prepare(Run(job.config, job.sources, {}, ""), Jobs.one(job), ModelCache())
    (request,) = session.requests
    story = make_video(session, request, job.config.seed)
    if story.code == INTERRUPTED:
        return story.code
    new = VideoRecord(story.files.record, story.record, story.files.latents)
    comparison = compare(record, new)
    print(report(comparison, (config.record, str(story.files.record))))
    line, code = comparison.verdict()
    print(line)
    return max(code, story.code)


if __name__ == "__main__":
    run(main, LINE, __doc__ or "")
