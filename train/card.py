"""The model card of a trained folder: a README.md as model hubs show it.

The block between the dashes is what hubs read (huggingface.co/docs/hub/model-cards). No licence is
stated: that is the decision of whoever publishes, and bound by that of the base model.
"""

from dataclasses import dataclass
from typing import Any

from wan.paths import kept_path
from wan.pipeline.config import PipelineConfig
from wan.weights.hub import HUB_ID

CARD = "README.md"
METHODS = {
    "train.finetune": (
        "fine-tuned by flow matching ([arXiv:2210.02747](https://arxiv.org/abs/2210.02747))"
    ),
    "train.distill": (
        "distilled for few steps by distribution matching (DMD2, "
        "[arXiv:2405.14867](https://arxiv.org/abs/2405.14867))"
    ),
}


@dataclass(frozen=True)
class Origin:
    """Where a trained model comes from.

    Attributes:
        command: of training: a key of `METHODS`.
        base: the model that training started from, as its option named it, without folders above.
    """

    command: str
    base: str

    @classmethod
    def of(cls, command: str, config: Any) -> "Origin":
        """The origin that the settings of a command name: its checkpoint and output folder."""
        return cls(command, kept_path(config.checkpoint, config.output_dir))


def model_card(origin: Origin, settings: PipelineConfig) -> str:
    """The text of a card.

    Args:
        settings: what the folder says about itself.
    """
    is_public = HUB_ID.fullmatch(origin.base) is not None
    head = ["pipeline_tag: text-to-video", "tags:", "- wan2.2", "- text-to-video"]
    if settings.timesteps is not None:
        head.append("- few-step")
    if is_public:
        head.insert(0, f"base_model: {origin.base}")
    base = f"[{origin.base}](https://huggingface.co/{origin.base})" if is_public else origin.base
    defaults = settings.defaults
    size = f"{defaults.width}x{defaults.height}, {defaults.num_frames} frames at {defaults.fps:g}"
    facts = [f"It was made for {size} per second."]
    if settings.timesteps is not None:
        levels = ", ".join(f"{t:g}" for t in settings.timesteps)
        facts.append(
            f"It takes {len(settings.timesteps)} steps, at t = {levels}, without guidance."
        )
    else:
        scale = defaults.guidance_scale
        facts.append(f"It takes {defaults.num_inference_steps} steps with guidance {scale:g}.")
    if defaults.attention is not None:
        facts.append(f"It was trained with {defaults.attention} attention, and should run with it.")
    return "\n".join(
        [
            "---",
            *head,
            "---",
            "",
            f"# {origin.base.rpartition('/')[2].removeprefix('builtin:')}, trained further",
            "",
            f"The transformer of {base}, {METHODS[origin.command]}",
            f"with `python -m {origin.command}`. All other parts are copies.",
            " ".join(facts),
            "",
            "```bash",
            'python -m infer.sample checkpoint=FOLDER prompt="..."',
            "```",
            "",
            "Licence: not stated here. That of the base model binds what was made of it.",
            "",
        ]
    )
