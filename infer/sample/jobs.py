"""The jobs of a command: one from the command line, or one per line of a prompt file."""

import json
import re
import secrets
import warnings
from collections.abc import Callable, Iterator
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
    check_sample_seed,
    check_text,
)
from wan.errors import WanError, errors_about
from wan.files import expanded, parse_json, read_text
from wan.settings import check_length, is_of

NOT_A_JOB = 'a prompt that starts so is written {"prompt": "..."}'
# As the source of a value: a line of a prompt file, or the record of a video that is made again.
PROMPT_FILE, RECORD = "prompt file", "record"
MAX_CHECKED = 1000
MORE = ""  # no key of settings
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


@dataclass(frozen=True)
class Jobs:
    """The jobs of a command. A file of many prompts takes the memory of its text, no more.

    Attributes:
        checked: one job for each set of settings, up to `MAX_CHECKED`; the first job comes first.
        count, num_videos: how many jobs there are, and how many videos they make.
        each: yields all jobs in their order, each made when its turn comes.
    """

    checked: list[Job]
    count: int
    num_videos: int
    each: Callable[[], Iterator[Job]]

    @classmethod
    def one(cls, job: Job) -> "Jobs":
        """The only job of a command."""
        return cls([job], 1, job.config.num_videos, lambda: iter([job]))


def read_jobs(config: SampleConfig, sources: dict[str, str]) -> Jobs:
    """The jobs of a command.

    All lines of a prompt file are read, and the settings of the first `MAX_CHECKED` that differ in
    more than prompt and seed are checked as a whole.

    Raises:
        FileNotFoundError: the prompt file does not exist.
        WanError: there is no prompt and no prompt file, or a line is wrong (names its number).
    """
    if config.prompt_file is None:
        if config.prompt is None:
            raise WanError('no prompt: describe the video, e.g. prompt="a red circle"')
        return Jobs.one(_settled(Job(config, sources)))
    path = expanded(config.prompt_file)
    text = read_text(path)

    def job_of(number: int, values: dict[str, Any]) -> Job:
        job = _line_job(values, config, sources, path.parent, f"{path}, line {number}")
        return _settled(job)

    checked: list[Job] = []
    seen: set[str] = set()
    count = num_videos = 0
    for number, line in _lines(text):
        with errors_about(f"{path}, line {number}"):
            values = _parse_line(line)
            _check_own(values, config)
            count += 1
            num_videos += values.get("num_videos", config.num_videos)
            key = _key(values)
            if key not in seen and len(seen) < MAX_CHECKED:
                seen.add(key)
                checked.append(job_of(number, values))
            elif key not in seen and MORE not in seen:
                seen.add(MORE)
                warnings.warn(
                    f"{path}: {MAX_CHECKED} different settings are checked now, further ones from "
                    f"line {number} on when their turn comes",
                    stacklevel=2,
                )
    if not checked:
        raise WanError(f"prompt_file={path}: no prompt in it; write one per line")

    def each() -> Iterator[Job]:
        lines = _lines(text)
        next(lines)
        yield checked[0]  # with the seed that it drew, if it drew one
        for number, line in lines:
            with errors_about(f"{path}, line {number}"):
                job = job_of(number, _parse_line(line))
            yield job

    return Jobs(checked, count, num_videos, each)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines of a text that are not empty, with their numbers from 1."""
    number, end = 1, 0
    for line in re.finditer(r"\S[^\n]*", text):  # one step for each, however many are empty
        number += text.count("\n", end, line.start())
        end = line.end()
        yield number, line[0].strip()


def _check_own(values: dict[str, Any], config: SampleConfig) -> None:
    """Check what each line has of its own: its prompt and its seeds."""
    check_prompt("prompt", values["prompt"])
    check_length("negative_prompt=", values.get("negative_prompt", ""))
    first = values.get("seed", config.seed)
    for name, more in (("seed", 0), ("seed + num_videos - 1", values.get("num_videos", 1) - 1)):
        check_sample_seed(name, first + more)


def _key(values: dict[str, Any]) -> str:
    """The settings of a line that others may share: all but its texts and its seed."""
    shared = {name: value for name, value in values.items() if name not in ("prompt", "seed")}
    if "negative_prompt" in shared:
        shared["negative_prompt"] = bool(shared["negative_prompt"])
    return json.dumps(shared, sort_keys=True)


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
    values: dict[str, Any], config: SampleConfig, sources: dict[str, str], folder: Path, name: str
) -> Job:
    given = {"sampler.name" if k == "sampler" else k: v for k, v in values.items()}
    for key in ("steps", "timesteps", "shift", "grid"):
        if key in given:
            given[f"sampler.{key}"] = given.pop(key)
    sampler = _sampler(config.sampler, {k: v for k, v in given.items() if "." in k})
    settings = {k: v for k, v in given.items() if "." not in k}
    if "image" in settings:  # a path relative to the prompt file
        settings["image"] = str(folder / expanded(settings["image"]))
    job = replace(config, prompt_file=None, sampler=sampler, **settings)
    return Job(job, {**sources, **dict.fromkeys(given, PROMPT_FILE)}, name)


def _parse_line(line: str) -> dict[str, Any]:
    """Parse a line of a prompt file: {option: value}."""
    if not line.startswith("{"):
        check_text("prompt", line)
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
    if not all(is_of(float, t) for t in values.get("timesteps", [])):
        raise WanError(f"timesteps={values['timesteps']}: need a list of numbers")
    return values


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
