"""The settings of `python -m train.export`, which makes a LoRA or a model of a checkpoint."""

from dataclasses import dataclass

from configs.schema import Options, option


@dataclass
class ExportConfig(Options):
    """`train.export`: from a checkpoint of a run to what others load."""

    run: str = option("runs/finetune", "the output_dir of a training command")
    step: int | None = option(None, "of the checkpoint; null: the newest", at_least=0)
    weights: str | None = option(
        None,
        "ema (averaged) or current (as the last step left them); null: what the run's end writes",
        choices=("ema", "current"),
    )
    output: str | None = option(
        None,
        "name of the new folder, and with .safetensors of the LoRA; with that ending, the LoRA "
        "alone; null: exports/step-N in the run's folder",
    )
    checkpoint: str | None = option(None, "where the model that the run started from lies by now")
    start: str | None = option(None, "the same for what its start= or student.start= named")
