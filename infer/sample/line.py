"""The options of `infer.sample`, which the page of `infer.app` fills in too. Loads no PyTorch."""

from configs.command_line import ATTENTION, CommandLine, Shortcut
from configs.schema import PARTS, SampleConfig

LINE = CommandLine(
    SampleConfig,
    "sample",
    text_keys=("prompt", "negative_prompt"),
    path_keys=(
        *("prompt_file", "image", "checkpoint", "output_dir", *PARTS),
        *("decoder", "preview_decoder"),
    ),
    list_keys=("lora", "lora_2"),
    shortcuts={
        "steps": Shortcut("sampler.steps", clears=("sampler.timesteps",)),
        "timesteps": Shortcut("sampler.timesteps", clears=("sampler.steps",)),
        "shift": Shortcut("sampler.shift"),
        **ATTENTION,
    },
)
