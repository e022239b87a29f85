"""Train the miniature's tokenizer and text encoder.

    python -m train.text_encoder

The encoder learns to tell, at every one of its tokens, what the whole caption states: so a small
DiT finds each attribute whichever token it looks at. Captions are disturbed on the way (by other
words, missing words, filler, another order): people do not type the sentences of a grammar.
"""

from configs.cli import Run, run
from configs.command_line import CommandLine
from configs.progress import loading_pytorch
from configs.training import TextEncoderTrainConfig

LINE = CommandLine(
    TextEncoderTrainConfig,
    "text_encoder",
    text_keys=(),
    path_keys=("output_dir",),
)


def main(run: Run[TextEncoderTrainConfig]) -> int:
    with loading_pytorch():
        from train.text_encoder.run import train_text_encoder
    return train_text_encoder(run.config)


if __name__ == "__main__":
    run(main, LINE, __doc__ or "")
