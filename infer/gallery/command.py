"""The command that makes a clip again, from the settings that it was made with."""

import json
import re
import shlex
from dataclasses import fields
from functools import reduce
from pathlib import Path
from typing import Any

from configs.evaluation import EvaluateConfig
from configs.schema import PATH_OPTIONS, SampleConfig, kept_settings, walk_options

SHORT = {"attention.name": "attention"} | {
    f"sampler.{name}": name for name in ("steps", "timesteps", "shift")
}
LITERAL = ("prompt", "negative_prompt", *PATH_OPTIONS)
SHIPPED = "builtin:"


def sample_command(
    question: EvaluateConfig, prompt: str, seed: int, folder: Path, **own: Any
) -> str:
    """The command of `infer.sample` for one clip of a measured setting.

    Args:
        folder: the output folder; paths are written as `kept_settings` does.
        own: options of `infer.sample` that the question does not have.
    """
    shared = {item.name for item in fields(SampleConfig)} & set(vars(question))
    values = {name: getattr(question, name) for name in shared} | own
    if values["negative_prompt"] is None and not question.checkpoint.startswith(SHIPPED):
        values["negative_prompt"] = ""  # where infer.sample has an official one
    return command(
        "infer.sample", SampleConfig(**values | {"prompt": prompt, "seed": seed}), folder
    )


def command(module: str, config: Any, folder: Path) -> str:
    """A command with all options that differ from their defaults, for a POSIX shell."""
    words, usual = ["python", "-m", module], type(config)()
    for name, _, _ in walk_options(type(config)):
        value, default = (reduce(getattr, name.split("."), one) for one in (config, usual))
        if value != default:
            value = kept_settings({name: value}, folder)[name]
            literal = name in LITERAL and value is not None
            words.append(f"{SHORT.get(name, name)}={value if literal else as_typed(value)}")
    return shlex.join(words)


def as_typed(value: Any) -> str:
    """A value in the grammar of the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(as_typed, value))}]"
    if isinstance(value, str) and not re.fullmatch(r"[\w.-]+", value, re.ASCII):
        return json.dumps(value, ensure_ascii=False)
    return json.dumps(value) if isinstance(value, bool) or value is None else str(value)
