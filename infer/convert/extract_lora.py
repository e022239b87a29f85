"""`infer.convert` with base=: a LoRA file from two checkpoints, and how much it loses."""

from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from configs.conversion import ConvertConfig
from infer.loading import StageBars
from wan.errors import WanError
from wan.files import expanded, write_json
from wan.lora.extract import ExtractedLoRA, extract_lora
from wan.lora.files import ATTENTION
from wan.lora.merge import write_lora
from wan.pipeline.config import read_pipeline_config
from wan.runtime.offload import resolve_device
from wan.weights.checkpoint import Checkpoint, open_checkpoint
from wan.weights.names import grouped


def convert_lora(config: ConvertConfig, source: Path, base: Path) -> None:
    """Write the LoRA of source - base, and its losses layer by layer as JSON beside it."""
    rank, output = config.rank, expanded(config.output)
    assert rank is not None
    report = output.with_suffix(".json")
    if output.suffix != ".safetensors":
        raise WanError(f"output={output}: a LoRA is one file: {output}.safetensors")
    if taken := [path for path in (output, report) if path.exists()]:
        raise WanError(f"{taken[0]}: is there already; choose another output=")
    with StageBars() as bars:
        lora = extract_lora(
            open_transformer("source", source),
            open_transformer("base", base),
            rank,
            diffs=config.diffs,
            dtype=getattr(torch, config.dtype or "float32"),
            device=resolve_device(config.device),
            on_progress=partial(bars, "tensors compared"),
        )
    print(losses(lora))
    about = {"rank": str(rank), "residual_energy": f"{lora.residual:.6g}"}
    write_lora(output, lora.tensors, about | trained_attention(source))
    layers = [asdict(change) | {"residual": change.residual} for change in lora.changes]
    write_json(report, {"rank": rank, "residual": lora.residual, "layers": layers})
    size = sum(tensor.nbytes for tensor in lora.tensors.values())
    print(f"wrote {output} ({size / 1e6:.1f} MB) and {report}")


def trained_attention(source: Path) -> dict[str, str]:
    """Metadata with the sparse self-attention of a release; a single component has no record."""
    if not (source / "model_index.json").is_file():
        return {}
    attention = read_pipeline_config(source).defaults.attention
    return {} if attention is None else {ATTENTION: attention}


def open_transformer(option: str, source: Path) -> Checkpoint:
    """The transformer of a release, or a component itself."""
    if (source / "transformer_2").is_dir():
        raise WanError(
            f"{option}={source}: two experts take a LoRA each: give {source / 'transformer'}, then "
            f"{source / 'transformer_2'}"
        )
    inside = source / "transformer"
    return open_checkpoint(inside if inside.is_dir() else source)


def losses(lora: ExtractedLoRA) -> str:
    """How much every pair loses, what is left out, and the loss of the whole, as text."""
    lines = [f"{'rank':>5}  {'lost energy':>11}  layer"]
    lines += [f"{c.rank:>5}  {c.residual:>11.3%}  {c.name}" for c in lora.changes if c.rank]
    num_whole = sum(change.rank == 0 for change in lora.changes) - len(lora.left_out)
    if num_whole:
        lines.append(f"{num_whole} biases, norms and tables are kept as whole differences")
    if lora.left_out:
        energy = sum(change.energy for change in lora.changes)
        share = sum(change.energy for change in lora.left_out) / energy
        lines.append(
            f"left out, {share:.3%} of the energy of all changes (diffs=true keeps them): "
            f"{grouped((change.name for change in lora.left_out), limit=len(lora.left_out))}"
        )
    lines.append(f"{lora.num_equal} tensors are equal in both; {lora.residual:.3%} lost in all")
    return "\n".join(lines)
