"""Write a checkpoint in another layout, or the LoRA between two checkpoints.

    python -m infer.convert source=.. output=.. layout=..
    python -m infer.convert source=.. base=.. rank=.. output=..

    source   a component (a .safetensors file, an index, or its folder) or a whole release folder
             in the diffusers or the official layout, ComfyUI's models folder, or its three files in
             one folder; mini or mini-teacher, the shipped ones. Left out if transformer=, vae= and
             text_encoder= name the files
    layout   diffusers: the folder that WanPipeline loads
             official:  the names of the Wan repositories (safetensors in place of their .pth)
             prefixed:  a transformer as one file, official names after `model.diffusion_model.`

Names change and bits don't, unless dtype= asks for it: converting there and back gives the same
tensors. Every tensor is checked against the config first. The output appears whole or not at all.

With base=.. rank=.. it writes a LoRA file instead: the part of source - base that a rank can hold.
A JSON file beside it says how much of the difference is lost, layer by layer.
"""

from configs.cli import Run, run
from configs.command_line import CommandLine
from configs.conversion import ConvertConfig
from configs.progress import loading_pytorch
from configs.schema import PARTS

LINE = CommandLine(
    ConvertConfig,
    "convert",
    text_keys=(),
    path_keys=("source", "output", "config", "base", *PARTS),
)


def main(run: Run[ConvertConfig]) -> None:
    with loading_pytorch():
        from infer.convert.run import convert
    convert(run.config)


if __name__ == "__main__":
    run(main, LINE, __doc__ or "")
