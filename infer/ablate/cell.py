"""One cell of a grid: what it is, and where its results are stored."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.ablation import Setting
from infer.evaluate.queue import is_stored
from infer.evaluate.store import StoredClips, cut, kept_clip
from wan.files import read_sealed
from wan.settings import Kinds, check_kinds

CLIP_KINDS: Kinds = {
    "seconds": (float,),
    "measures": (dict,),
    "joint": (bool, float, type(None)),
    "processes": (int,),
    "prompt": (str,),
    "seed": (int,),
    "right": (dict,),
    "seen": (dict,),
}
CLIP_NEEDS = ("seconds", "measures", "prompt", "seed")


@dataclass(frozen=True)
class Cell:
    """A setting with one seed, and with one prompt or the captions of the world.

    Attributes:
        name: names the cell in messages.
        number: the prompt's, from 0.
        key: sha256 of all that its result depends on, but for the number of captions.
        file: the record; its clips are kept at `video`.
        reference: the clip that a prompt's clip is compared with.
        clips: those of the world's captions.
    """

    name: str
    setting: Setting
    seed: int
    prompt: str | None
    number: int
    key: str
    file: Path
    reference: Path | None = None
    clips: StoredClips | None = None

    def video(self, number: int) -> Path:
        """Where a clip is kept to look at: the first beside the record, as in older releases."""
        return kept_clip(self.file, number) if number else self.file.with_suffix(".mp4")

    @property
    def is_stored(self) -> bool:
        if self.clips is None:
            return is_stored(self.file, self.key, self.name)
        return self.clips.is_complete(self.clips.read())

    def record(self) -> dict[str, Any]:
        record = read_sealed(self.file)
        check_kinds(record, {"clips": (list,), "plan": (dict, type(None))}, str(self.file))
        for clip in record.get("clips", ()):
            source = f"{self.file}, a clip"
            check_kinds(clip, CLIP_KINDS, source, CLIP_NEEDS)
            values = clip["measures"]
            check_kinds(values, dict.fromkeys(values, (float, type(None))), source)
        return record if self.clips is None else cut(record, self.clips.question)
