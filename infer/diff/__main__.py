"""Name the first thing that differs between two videos.

    python -m infer.diff outputs/00000_red-fox_9f2c81d0_s42 outputs/00001_red-fox_9f2c81d0_s43
    python -m infer.diff theirs.json outputs/00001_red-fox_9f2c81d0_s43.mp4

Compares what two records hold, in the order in which a video is made: settings, weights, versions
and hardware, noise, text embeddings, the latents after each step, and the pixels before they are
compressed. Of latents that were kept it gives the distance too. What a record of an older version
does not hold is said. Exit codes: 0 the videos are the same bit for bit; 1 they differ; 2 the
command has an error, or nothing tells.
"""

from configs.cli import Run, run
from configs.command_line import CommandLine
from configs.rerun import DiffConfig
from infer.diff.compare import compare, report
from infer.diff.records import VideoRecord, read_record
from wan.errors import WanError

LINE = CommandLine(DiffConfig, "diff", text_keys=(), path_keys=("a", "b"), words=("a", "b"))


def main(run: Run[DiffConfig]) -> int:
    names = run.config.a, run.config.b
    if not all(names):
        raise WanError("two videos are needed: python -m infer.diff A B, each a record or an mp4")
    a, b = map(read_record, names)
    comparison = compare(a, b)
    print(report(comparison, names))
    latents = [one.latents for one in (a, b)]
    if all(path.exists() for path in latents) and a.latents != b.latents:
        print(f"{'kept latents':<21}  {distance(a, b)}")
    line, code = comparison.verdict()
    print(line)
    return code


def distance(a: VideoRecord, b: VideoRecord) -> str:
    """How far the latents that were kept are apart, in words."""
    # Imported here, because PyTorch takes seconds to load.
    from wan.weights.safetensors_file import map_tensors, read_header

    tensors = []
    for record in (a, b):
        found = map_tensors(read_header(record.latents)).get("latents")
        if found is None:
            raise WanError(f"{record.latents}: no latents of infer.sample in it")
        tensors.append(found.double())
    one, other = tensors
    if one.shape != other.shape:
        return f"of {tuple(one.shape)} and {tuple(other.shape)}"
    scale = one.square().mean().sqrt().item()
    apart = (one - other).square().mean().sqrt().item()
    relative = apart / scale if scale > 0 else float("inf") if apart else 0.0
    return f"{relative:.2g} apart (root mean square of the difference, over that of a)"


if __name__ == "__main__":
    run(main, LINE, __doc__ or "")
