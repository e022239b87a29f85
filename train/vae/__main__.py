"""Train the miniature's autoencoder.

    python -m train.vae output_dir=runs/vae

Most steps see crops around the objects of rendered clips, which are small and hold the hard pixels;
the last ones see whole clips. There is no perceptual and no adversarial term: the world has flat
colours and sharp edges, and an L1 with weight on the objects is enough for it.
"""

from configs.cli import Run, run
from configs.command_line import CommandLine
from configs.progress import loading_pytorch
from configs.training import VAETrainConfig

LINE = CommandLine(
    VAETrainConfig,
    "vae",
    text_keys=(),
    path_keys=("output_dir", "start"),
)


def main(run: Run[VAETrainConfig]) -> int:
    with loading_pytorch():
        from train.vae.run import train_vae
    return train_vae(run.config)


if __name__ == "__main__":
    run(main, LINE, __doc__ or "")
