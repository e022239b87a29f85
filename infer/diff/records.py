"""Find and read the record of a video: a JSON file, an mp4, or the name that both share.

A record may come from a stranger. Here it is read and its kinds are checked; nothing that it says
names a file to open.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan.errors import WanError
from wan.files import expanded, parse_json, read_sealed
from wan.settings import Kinds, check_kinds

ENDINGS = (".json", ".mp4", ".png", ".latents.safetensors")
VERSION = 1
# What a record may hold of what is read here: the kinds of each entry's value.
KINDS: Kinds = {
    "record_version": (int,),
    "prompt": (str,),
    "negative_prompt": (str, type(None)),
    "seed": (int,),
    "settings": (dict,),
    "schedule": (dict,),
    "config": (dict,),
    "environment": (dict,),
    "video": (dict, type(None)),
    "weights_sha256": (dict, type(None)),
    "text_sha256": (dict,),
    "steps_sha256": (list,),
    **dict.fromkeys(
        ("image_sha256", "noise_sha256", "image_latents_sha256", "latents_sha256", "pixels_sha256"),
        (str, type(None)),
    ),
}
NEEDED = ("record_version", "prompt", "seed", "settings")


@dataclass(frozen=True)
class VideoRecord:
    """What is known of a video that was made.

    Attributes:
        path: the file that says it.
        values: the record. An older one, or the comment of an mp4, lacks entries.
        latents: where the video's latents are if they were kept.
    """

    path: Path
    values: Mapping[str, Any]
    latents: Path

    @property
    def settings(self) -> dict[str, Any]:
        """The value of each setting by name."""
        return {
            name: entry.get("value") if isinstance(entry, dict) else entry
            for name, entry in self.values["settings"].items()
        }


def read_record(name: str) -> VideoRecord:
    """The record of a video.

    Args:
        name: a record, an mp4, or the name that both share, without its ending. An mp4 is read
            where its record does not lie beside it.

    Raises:
        OSError: there is no such file.
        WanError: it is not a record, or damaged, or from a newer version.
    """
    given = expanded(name)
    ending = next((one for one in ENDINGS if given.name.endswith(one)), "")
    stem = given.with_name(given.name.removesuffix(ending)) if ending else given
    latents = stem.with_name(f"{stem.name}.latents.safetensors")
    record = stem.with_name(f"{stem.name}.json")
    if ending == ".mp4":
        values = _beside(given, record)
        if values is None:
            return VideoRecord(given, checked(_in_comment(given), given), latents)
        return VideoRecord(record, values, latents)
    values = checked(read_sealed(record), record)
    return VideoRecord(record, values, latents)


def _beside(video: Path, record: Path) -> dict[str, Any] | None:
    """The record beside an mp4; None if there is none, or if it is another video's."""
    if not video.is_file():
        raise FileNotFoundError(f"{video}: no such file")
    if not record.exists():
        return None
    values = checked(read_sealed(record), record)
    return values if (values.get("video") or {}).get("file") == video.name else None


def _in_comment(path: Path) -> dict[str, Any]:
    """The record in the comment of an mp4; one of an older version has the settings only."""
    from wan.media.video import open_video  # needs PyTorch

    with open_video(path) as container:
        comment = container.metadata.get("comment", "")
    if not comment:
        raise WanError(
            f"{path}: nothing in it says how it was made (embed_prompt=false, or another program); "
            "give the record that was written beside it"
        )
    settings = parse_json(comment, f"{path}, its comment")
    kept = settings.pop("record", {})
    if not isinstance(kept, dict):
        raise WanError(f"{path}: the comment in it is not one of infer.sample")
    version = {"record_version": VERSION} if not kept else {}
    both = {name: settings[name] for name in ("prompt", "seed") if name in settings}
    return {**version, "settings": settings, **both, **kept}


def checked(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """The values of a record.

    Raises:
        WanError: an entry that is needed is missing, or one has another kind of value.
    """
    version = values.get("record_version")
    if isinstance(version, int) and version > VERSION:
        raise WanError(f"{path}: a record of version {version}, and {VERSION} is the newest known")
    if missing := [name for name in NEEDED if name not in values]:
        raise WanError(
            f"{path}: not the record of a video (no {', '.join(missing)} in it); give one that "
            "infer.sample wrote"
        )
    check_kinds(values, KINDS, str(path))
    digests = [*values.get("steps_sha256", []), *values.get("text_sha256", {}).values()]
    digests += (values.get("weights_sha256") or {}).values()
    if not all(isinstance(digest, str) for digest in digests):
        raise WanError(f"{path}: damaged, a sha256 in it is no text")
    return values
