"""Two videos, compared by what their records hold: from what went in to what came out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from configs.rerun import PLACES
from configs.schema import STRENGTH
from infer.diff.records import VideoRecord
from wan.errors import WanError, shortened, visible

SAME, DIFFERENT, UNKNOWN = "the same", "different", "not compared"
DIFFER = 1  # exit code


@dataclass(frozen=True)
class Level:
    """One stage of a video's making, compared.

    Attributes:
        name: the stage.
        state: SAME, DIFFERENT or UNKNOWN.
        detail: what differs first, or why it was not compared.
    """

    name: str
    state: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.name:<21}  {self.state}{f': {self.detail}' if self.detail else ''}"


@dataclass(frozen=True)
class Comparison:
    """All levels of a comparison, in the order in which a video is made.

    Attributes:
        levels: settings, weights, versions and hardware, noise, text embeddings, latents, pixels.
    """

    levels: tuple[Level, ...]

    @property
    def first(self) -> Level | None:
        """The first level that differs."""
        return next((level for level in self.levels if level.state == DIFFERENT), None)

    @property
    def result(self) -> Level | None:
        """The last level that was compared of those that show the video: pixels, or latents."""
        *_, latents, pixels = self.levels
        return next((level for level in (pixels, latents) if level.state != UNKNOWN), None)

    def verdict(self) -> tuple[str, int]:
        """The result in one line, and the exit code: 0 the same video, 1 another.

        Raises:
            WanError: nothing tells.
        """
        first, result = self.first, self.result
        if result is None and first is None:
            raise WanError(
                "nothing tells whether the videos are the same: a record holds no sha256 of "
                "latents or pixels (it is of an older version, or its run ended early)"
            )
        same = None if result is None or result.state != SAME else result.name
        if same == "pixels":
            despite = f", though {first.name} differ: {first.detail}" if first else ""
            return f"the same, bit for bit{despite}", 0
        if same is not None and first is None:
            return "the same, bit for bit, up to the latents; pixels were not compared", 0
        assert first is not None
        return f"first difference: {first.name}: {first.detail}", DIFFER


def compare(a: VideoRecord, b: VideoRecord) -> Comparison:
    """Compare two videos level by level."""
    first, second = a.values, b.values
    machines = [_flat(one, "environment") for one in (first, second)]
    return Comparison(
        (
            _settings(a, b),
            _weights(a, b),
            _named("versions and hardware", *machines),
            _digest("noise", first.get("noise_sha256"), second.get("noise_sha256")),
            _texts(first, second),
            _latents(first, second),
            _digest("pixels", first.get("pixels_sha256"), second.get("pixels_sha256")),
        )
    )


def _settings(a: VideoRecord, b: VideoRecord) -> Level:
    return _named("settings", *(compared_settings(one) for one in (a, b)))


def compared_settings(record: VideoRecord) -> dict[str, Any]:
    """What was asked for, by name. Names of files are left out: their content is compared."""
    values, settings = record.values, record.settings
    found = {name: values.get(name) for name in ("prompt", "negative_prompt", "seed")}
    left_out = (*PLACES, *found, "num_videos")
    found |= {name: value for name, value in settings.items() if name not in left_out}
    for name in ("lora", "lora_2"):
        entries = settings.get(name)
        for number, entry in enumerate(entries if isinstance(entries, list) else [], 1):
            strength = STRENGTH.fullmatch(str(entry))
            found[f"strength of {name} {number}"] = float(strength[2]) if strength else 1.0
    schedule = values.get("schedule", {})
    return found | {name: schedule.get(name) for name in ("timesteps", "sigmas")}


def _weights(a: VideoRecord, b: VideoRecord) -> Level:
    digests = [one.values.get("weights_sha256") or {} for one in (a, b)]
    images = [one.values.get("image_sha256") for one in (a, b)]
    name = "weights"
    if None in images and images != [None, None] and not any(map(_old_image, (a, b))):
        return Level(name, DIFFERENT, f"image= only in {'ab'[images[0] is None]}")
    if None not in images and images[0] != images[1]:
        return Level(name, DIFFERENT, f"image= is another picture ({_two(*images)})")
    if not all(digests):
        lacking = " and ".join(side for side, one in zip("ab", digests, strict=True) if not one)
        return Level(name, UNKNOWN, f"no sha256 of weights in {lacking}")
    return _named(name, *digests)


def _old_image(record: VideoRecord) -> bool:
    """Whether the record names an image of which it has no sha256."""
    return "image_sha256" not in record.values


def _texts(first: Mapping[str, Any], second: Mapping[str, Any]) -> Level:
    """Text embeddings, and the first frame's latents, which are encoded beside them."""
    name = "text embeddings"
    texts = [one.get("text_sha256") or {} for one in (first, second)]
    if not all(texts):
        return _digest(name, *(one or None for one in texts))
    level = _named(name, *texts)
    images = [one.get("image_latents_sha256") for one in (first, second)]
    if level.state == SAME and images[0] != images[1]:
        return Level(name, DIFFERENT, f"the same, but not the first frame ({_two(*images)})")
    return level


def _latents(first: Mapping[str, Any], second: Mapping[str, Any]) -> Level:
    steps = [one.get("steps_sha256") or [] for one in (first, second)]
    last = [one.get("latents_sha256") for one in (first, second)]
    count = max(map(len, steps))
    for number, (one, other) in enumerate(zip(*steps, strict=False), 1):
        if one != other:
            return Level("latents", DIFFERENT, f"from step {number} of {count} on")
    if None in last:
        return _digest("latents", *last)
    if last[0] != last[1]:
        after = "at the last step" if not all(steps) else "after the last step"
        return Level("latents", DIFFERENT, after)
    return Level("latents", SAME)


def _digest(name: str, one: Any, other: Any) -> Level:
    if one is None or other is None:
        lacking = " and ".join(s for s, value in (("a", one), ("b", other)) if value is None)
        return Level(name, UNKNOWN, f"no sha256 of it in {lacking}")
    return Level(name, SAME) if one == other else Level(name, DIFFERENT, _two(one, other))


def _named(name: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> Level:
    """Compare two tables of values; a name that is missing counts as None."""
    if not one or not other:
        lacking = " and ".join(s for s, values in (("a", one), ("b", other)) if not values)
        return Level(name, UNKNOWN, f"not in {lacking}")
    keys = dict.fromkeys([*one, *other])
    differing = [key for key in keys if one.get(key) != other.get(key)]
    if not differing:
        return Level(name, SAME)
    shown = [f"{_short(key)} {_two(one.get(key), other.get(key))}" for key in differing[:3]]
    if "threads" in differing:
        shown.append("OMP_NUM_THREADS= chooses the threads, and sums depend on them")
    more = f"; and {len(differing) - 3} more" if differing[3:] else ""
    return Level(name, DIFFERENT, "; ".join(shown) + more)


def _flat(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A table with those inside it laid out beside its own values."""
    found: dict[str, Any] = {}
    for name, value in values.get(key, {}).items():
        found |= value if isinstance(value, dict) else {name: value}
    return found


def _two(one: Any, other: Any) -> str:
    return f"{_short(one)} and {_short(other)}"


def _short(value: Any) -> str:
    """A value on one line; of a sha256, the start is enough."""
    if value is None:
        return "none"
    text = " ".join(visible(str(value)).split())
    is_digest = len(text) == 64 and not set(text) - set("0123456789abcdef")
    return f"{text[:12]}.." if is_digest else shortened(text, 80)


def report(comparison: Comparison, names: Sequence[str]) -> str:
    """The comparison as text: a line for each of the two, a line per level."""
    given = [f"{side}  {visible(name)}" for side, name in zip("ab", names, strict=True)]
    return "\n".join([*given, *map(str, comparison.levels)])
