"""Make a LoRA file or a model's folder from a checkpoint that a run keeps.

    python -m train.export run=runs/finetune
    python -m train.export run=runs/finetune step=2000 weights=current output=look

What comes out is what the end of the run would write at that step. The run may have ended, been
stopped or killed, or be still at work. A CPU is enough, and neither data nor a text encoder is
loaded. Of the model that the run started from, a LoRA needs nothing; for a whole model, its other
parts are copied.
"""

from configs.cli import Run, run
from configs.command_line import CommandLine
from configs.export import ExportConfig
from configs.progress import loading_pytorch

LINE = CommandLine(
    ExportConfig,
    "export",
    text_keys=(),
    path_keys=("run", "output", "checkpoint", "start"),
    written=("output",),
)


def main(run: Run[ExportConfig]) -> None:
    with loading_pytorch():
        from train.kept import export_kept
    export_kept(run.config)


if __name__ == "__main__":
    run(main, LINE, __doc__ or "")
