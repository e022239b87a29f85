"""A record's settings as a request for `infer.sample`.

A record may come from a stranger. What it decides are the values of sampling, each of the type and
in the range of its option. Of the places that it names, only those are used that cannot reach
outside: shipped models, models on the hub, and files beside the record. All others are given again.
"""

import re
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from configs.command_line import option_names
from configs.rerun import OF_A_VIDEO, PLACES, RerunConfig, typed_options
from configs.schema import (
    PARTS,
    STRENGTH,
    SampleConfig,
    SamplerConfig,
    check_prompt,
    check_text,
)
from infer.diff.records import VideoRecord
from infer.sample.jobs import RECORD, Job
from wan.errors import WanError
from wan.files import expanded
from wan.models.attention_config import AttentionConfig
from wan.weights.digests import sha256_file
from wan.weights.hub import HUB_ID, SHIPPED

# What the model's folder or the machine decided is asked for again as it was decided.
DECIDED = ("height", "width", "num_frames", "fps", "max_sequence_length", "device", "dtype")
GROUPS: dict[str, Callable[..., Any]] = {"sampler": SamplerConfig, "attention": AttentionConfig}
VERSION = re.compile(r"[\w.-]+(/[\w.-]+)*", re.ASCII)  # of a model: no way out of its folder


def job_of(record: VideoRecord, given: RerunConfig) -> Job:
    """The job that makes the video of a record again.

    Raises:
        WanError: the record lacks its settings, one of them is not allowed, or a place that it
            names must be given.
    """
    try:
        config = config_of(record, given)
    except WanError as error:
        raise error.about(str(record.path)) from error
    check_inputs(record, config)
    # What the record sets counts as typed, so that nothing else takes its place.
    sources = dict.fromkeys(option_names(SampleConfig), "default")
    sources |= dict.fromkeys((*DECIDED, "prompt", "seed", "checkpoint"), RECORD)
    sources |= dict.fromkeys(typed_options(config), RECORD)
    own = {name for name, value in vars(given).items() if value is not None}
    return Job(config, sources | dict.fromkeys(own & sources.keys(), "command line"))


def typed(record: VideoRecord) -> dict[str, Any]:
    """The options of the video that the record holds, by dotted name.

    Raises:
        WanError: an option is unknown, or its value is of a wrong type.
    """
    if "config" not in record.values:
        raise WanError(
            "its comment is of an older version and lists the settings only; give the record that "
            "was written beside it"
        )
    found = {}
    known = option_names(SampleConfig)
    for name, value in flat(record.values["config"]).items():
        if name not in known:
            raise WanError(f"{name}: this version has no such option")
        if name in OF_A_VIDEO:
            found[name] = of_type(name, value, OF_A_VIDEO[name])
    return found


def flat(values: Mapping[str, Any], front: str = "") -> dict[str, Any]:
    """Nested groups of options as one table of dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{front}{name}.")
        else:
            found[front + name] = value
    return found


def of_type(name: str, value: Any, kind: Any) -> Any:
    """A value of JSON as an option of this type holds it; whole numbers become floats there.

    Raises:
        WanError: it is of another type.
    """
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = (one for one in get_args(kind) if one is not type(None))
        if value is None:
            return None
    if get_origin(kind) is list and isinstance(value, list):
        return [of_type(name, one, get_args(kind)[0]) for one in value]
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise WanError(f"{name}={value!r}: need {getattr(kind, '__name__', str(kind))}")
    if kind is str:
        check_text(name, value)
    return value


def config_of(record: VideoRecord, given: RerunConfig) -> SampleConfig:
    """The settings of a record as those of `infer.sample`, with the places that were given."""
    options = typed(record)
    settings = record.settings
    options |= {
        name: of_type(name, settings[name], OF_A_VIDEO[name])
        for name in DECIDED
        if settings.get(name) is not None
    }
    prompt = of_type("prompt", record.values["prompt"], str)
    check_prompt("prompt", prompt)
    options |= {"prompt": prompt, "seed": of_type("seed", record.values["seed"], int)}
    options.setdefault("negative_prompt", record.values.get("negative_prompt"))
    for name in ("device", "dtype", "offload"):
        if getattr(given, name) is not None:
            options[name] = getattr(given, name)
    grouped: dict[str, dict[str, Any]] = {name: {} for name in GROUPS}
    plain: dict[str, Any] = {}
    for name, value in options.items():
        group, dot, rest = name.partition(".")
        (grouped[group] if dot else plain)[rest or name] = value
    for group, build in GROUPS.items():
        plain[group] = build(**grouped[group])
    return SampleConfig(**plain, **places_of(record, given), output_dir=given.output_dir)


def places_of(record: VideoRecord, given: RerunConfig) -> dict[str, Any]:
    """Where the model, its parts, the image and the LoRAs are.

    Raises:
        WanError: a place must be given, or one is given that the record does not know of.
    """
    named = record.settings
    found: dict[str, Any] = {name: getattr(given, name) for name in PLACES}
    if found["checkpoint"] is None:
        found["checkpoint"] = place("checkpoint", named.get("checkpoint"), record.path.parent)
        for name in ("revision", "variant"):
            found[name] = found[name] or version(name, named.get(name))
    for name in (*PARTS, "image", "decoder"):
        if found[name] is None and named.get(name) is not None:
            found[name] = place(name, named[name], record.path.parent)
    if found["image"] is not None and not has_image(record):
        raise WanError("image=: the video was made without one")
    if found["decoder"] is not None and named.get("decoder") is None:
        raise WanError("decoder=: the video was decoded by the model's own VAE")
    for name in ("lora", "lora_2"):
        entries = of_type(name, named.get(name), list[str] | None) or []
        found[name] = loras(name, entries, found[name], record.path.parent)
    return found


def has_image(record: VideoRecord) -> bool:
    """Whether the video started from an image, which the comment of an mp4 does not name."""
    return any(
        value is not None
        for value in (record.settings.get("image"), record.values.get("image_sha256"))
    )


def place(option: str, name: Any, folder: Path) -> str:
    """A place that a record names, if it cannot reach outside.

    Raises:
        WanError: it must be given.
    """
    again = f"give it as {option}=, if it is yours to use"
    if not isinstance(name, str) or not name:
        raise WanError(f"it does not say which {option} was used; {again}")
    beside = folder / name
    if beside.exists() and beside.resolve().is_relative_to(folder.resolve()):
        return str(beside)
    of_model = name in SHIPPED.values() or (HUB_ID.fullmatch(name) and not Path(name).exists())
    if option == "checkpoint" and of_model:
        return name
    raise WanError(
        f"{option}={name}: a record is not followed to places outside its own folder; {again}"
    )


def version(name: str, value: Any) -> str | None:
    """The revision or the variant that a record names."""
    if value is None:
        return None
    if not isinstance(value, str) or not VERSION.fullmatch(value) or ".." in value:
        raise WanError(f"{name}={value!r}: no {name} can have this name")
    return value


def loras(
    option: str, entries: Sequence[str], given: Sequence[str] | None, folder: Path
) -> list[str] | None:
    """The LoRAs with their strengths: those that are given have the record's unless they say."""
    if given is not None and len(given) != len(entries):
        raise WanError(
            f"{option}=: {len(given)} of them, and the video was made with {len(entries)}"
        )
    found = []
    for number, entry in enumerate(entries):
        match = STRENGTH.fullmatch(entry)
        name, strength = (match[1], match[2]) if match else (entry, "1")
        if given is None:
            found.append(f"{place(option, name, folder)}:{strength}")
        else:
            said = STRENGTH.fullmatch(given[number]) is not None
            found.append(given[number] if said else f"{given[number]}:{strength}")
    return found or None


def check_inputs(record: VideoRecord, config: SampleConfig) -> None:
    """Refuse an image that is not the one of the record.

    Raises:
        WanError: its content is another, or there is none where there was one.
    """
    wanted = record.values.get("image_sha256")
    if config.image is None and wanted is not None:
        raise WanError("the video started from a picture; give it as image=FILE")
    if config.image is None or wanted is None:
        return
    found = sha256_file(expanded(config.image))
    if found != wanted:
        raise WanError(
            f"image={config.image}: not the picture that the video started from (sha256 "
            f"{found[:12]}.. and {wanted[:12]}..)"
        )
