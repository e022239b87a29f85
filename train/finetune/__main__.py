"""Train a transformer on clips by flow matching.

    python -m train.finetune data.kind=folder data.folder=runs/data

From a released model (all weights, or a LoRA) or from scratch; on clips that `train.preprocess`
encoded or on the miniature's rendered world. The text encoder and the autoencoder are frozen, and
not loaded for encoded clips. What comes out is a complete folder in the released layout, or a LoRA
file.
"""

from configs.cli import Run, run
from configs.command_line import ATTENTION, CommandLine
from configs.progress import loading_pytorch
from configs.training import FinetuneConfig

LINE = CommandLine(
    FinetuneConfig,
    "finetune",
    text_keys=("sample_negative_prompt",),
    text_lists=("sample_prompts",),
    path_keys=("output_dir", "checkpoint", "lora.start", "data.cache_dir"),
    list_keys=("data.folder",),
    shortcuts=ATTENTION,
)


def main(run: Run[FinetuneConfig]) -> int:
    with loading_pytorch():
        from train.finetune.run import finetune
    return finetune(run.config)


if __name__ == "__main__":
    run(main, LINE, __doc__ or "")
