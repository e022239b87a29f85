"""The jobs of a command: one from the command line, or one per line of a prompt file."""

import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from configs.schema import (
    DISTINCT_SEEDS,
    FASTVIDEO_SEED,
    RANDOM_SEED,
    SampleConfig,
    SamplerConfig,
    check_prompt,
    check_text,
)
from wan.errors import WanError
from wan.files import parse_json, read_text

NOT_A_JOB = 'a prompt that starts so is written {"prompt": "..."}'
# As the source of a value: a line of a prompt file, or the record of a video that is made again.
PROMPT_FILE, RECORD = "prompt file", "record"
# What a line of a prompt file may set, with the type that its JSON value must have.
JOB_KEYS: dict[str, type | tuple[type, ...]] = {
    "prompt": str,
    "negative_prompt": str,
    "image": str,
    "seed": int,
    "num_videos": int,
    "height": int,
    "width": int,
    "num_frames": int,
    "fps": (int, float),
    "guidance_scale": (int, float),
    "guidance_scale_2": (int, float),
    "sampler": str,
    "steps": int,
    "timesteps": list,
    "shift": (int, float),
    "grid": str,
}


@dataclass(frozen=True)
class Job:
    """One prompt with its settings.

    Attributes:
        config: the command's settings with the job's own put in; `prompt` is set.
        sources: where the value of each option comes from.
        name: the file and line, for errors; empty for the only job of a command line.
    """

    config: SampleConfig
    sources: dict[str, str]
    name: str = ""


def read_jobs(config: SampleConfig, sources: dict[str, str]) -> list[Job]:
    """The jobs of a command.

    Raises:
        FileNotFoundError: the prompt file does not exist.
        WanError: there is no prompt and no prompt file, or a line is wrong (names its number).
    """
    if config.prompt_file is None:
        if config.prompt is None:
            raise WanError('no prompt: describe the video, e.g. prompt="a red circle"')
        return [_settled(Job(config, sources))]
    path = Path(config.prompt_file).expanduser()
    jobs = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            name = f"{path}, line {number}"
            try:
                job = _line_job(line.strip(), config, sources, path.parent, name)
                jobs.append(_settled(job))
            except WanError as error:
                raise WanError(f"{name}: {error}") from error
    if not jobs:
        raise WanError(f"prompt_file={path}: no prompt in it; write one per line")
    return jobs


def _settled(job: Job) -> Job:
    """The job with what `compat` stands for, and with a random seed if it asks for one."""
    sources = dict(job.sources)
    changes: dict[str, Any] = {}
    if job.config.compat == "fastvideo":
        source = "compat=fastvideo"
        if not job.config.frame_first_noise:
            changes["frame_first_noise"], sources["frame_first_noise"] = True, source
        if sources["seed"] == "default":
            changes["seed"], sources["seed"] = FASTVIDEO_SEED, source
    if job.config.seed == RANDOM_SEED:
        # The record and the file's name say which.
        changes["seed"] = secrets.randbelow(DISTINCT_SEEDS - job.config.num_videos)
        sources["seed"] = f"random (seed={RANDOM_SEED})"
    return replace(job, config=replace(job.config, **changes), sources=sources)


def _line_job(
    line: str, config: SampleConfig, sources: dict[str, str], folder: Path, name: str
) -> Job:
    values = _parse_line(line)
    given = {"sampler.name" if k == "sampler" else k: v for k, v in values.items()}
    for key in ("steps", "timesteps", "shift", "grid"):
        if key in given:
            given[f"sampler.{key}"] = given.pop(key)
    sampler = _sampler(config.sampler, {k: v for k, v in given.items() if "." in k})
    settings = {k: v for k, v in given.items() if "." not in k}
    if "image" in settings:  # a path relative to the prompt file
        settings["image"] = str(folder / Path(settings["image"]).expanduser())
    check_prompt("prompt", settings["prompt"])
    job = replace(config, prompt_file=None, sampler=sampler, **settings)
    return Job(job, {**sources, **dict.fromkeys(given, PROMPT_FILE)}, name)


def _parse_line(line: str) -> dict[str, Any]:
    """Parse a line of a prompt file: {option: value}."""
    if not line.startswith("{"):
        return {"prompt": line}
    values = parse_json(line, "starts with {", NOT_A_JOB)
    if unknown := sorted(set(values) - set(JOB_KEYS)):
        raise WanError(f"unknown {', '.join(unknown)}; a job may set {', '.join(JOB_KEYS)}")
    if "prompt" not in values:
        raise WanError('no "prompt" in it')
    for key, value in values.items():
        kind = JOB_KEYS[key]
        if isinstance(value, bool) or not isinstance(value, kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            words = " or ".join(k.__name__ for k in kinds)
            raise WanError(f"{key}={value!r}: need {words}")
        check_text(key, str(value))
    if not all(_is_number(t) for t in values.get("timesteps", [])):
        raise WanError(f"timesteps={values['timesteps']}: need a list of numbers")
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _sampler(base: SamplerConfig, given: dict[str, Any]) -> SamplerConfig:
    """The command's sampler with a job's settings.

    Steps and timesteps replace each other, and a grid goes with the name of its sampler.
    """
    settings = {key.removeprefix("sampler."): value for key, value in given.items()}
    if settings.get("name", base.name) != base.name or "timesteps" in settings:
        settings.setdefault("grid", None)
    if "steps" in settings:
        settings.setdefault("timesteps", None)
    elif "timesteps" in settings:
        settings["steps"] = None
    return replace(base, **settings)
