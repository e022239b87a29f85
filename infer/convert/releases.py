"""The config.json of a component in each layout."""

from typing import Any

from wan.models.dit_config import DiTConfig


def layout_config(
    component: str, layout: str, values: dict[str, Any], model_type: str | None
) -> dict[str, Any] | None:
    """The config.json for a component in a layout; None if the layout has none for it."""
    if component != "transformer":
        return values if layout == "diffusers" else None
    is_official = "dim" in values
    if layout == "diffusers":
        return DiTConfig.from_json(values).to_json() if is_official else values
    if is_official:
        return values
    config = DiTConfig.from_json(values)
    by_channels = "ti2v" if config.in_channels == 48 else "t2v"
    return official_transformer_config(config, model_type or by_channels)


def official_transformer_config(config: DiTConfig, model_type: str) -> dict[str, Any]:
    """The official config.json of a transformer.

    What the official code fixes is only written where this model differs.

    Args:
        model_type: "t2v", or "ti2v" for a model with a timestep per token.
    """
    values: dict[str, Any] = {
        "_class_name": "WanModel",
        "model_type": model_type,
        "dim": config.width,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.in_channels,
        "num_heads": config.num_attention_heads,
        "num_layers": config.num_layers,
        "out_dim": config.out_channels,
        "text_len": 512,
    }
    fixed = DiTConfig()
    for name in ("text_dim", "rope_max_seq_len"):
        if getattr(config, name) != getattr(fixed, name):
            values[name] = getattr(config, name)
    if config.patch_size != fixed.patch_size:
        values["patch_size"] = list(config.patch_size)
    return values
