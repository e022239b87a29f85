"""Which links of a model's folder are followed, and how a path is written down.

A folder from elsewhere may hold links, and names of other folders. What they lead to is read only
where it came with the folder: inside it, inside the cache folder of its repository on the Hugging
Face hub (whose snapshots are links into its blobs), or in the models that this project ships. So a
download cannot make a record list a private file, an export copy it, or a message quote it. What a
person names is read wherever it is.
"""

import os
import re
from pathlib import Path

from wan.errors import WanError

# In a message: not within a word or an address such as https://.
ABSOLUTE = re.compile(r"(?<![\w.:/~-])~?(?:/[^\s/:'\",;()<>|]+)+")
END_OF_NAME = r"(?![\w-]|\.\w)"
SHIPPED_MODELS = Path(__file__).parent / "miniature"
LONGEST_NAME = 255  # bytes of one part of a path, on every common disk
REMEDY = (
    "a model's folder is read only where it holds its files itself: copy them there, or give the "
    "real place as the model, or as one part of it with transformer=, transformer_2=, vae=, "
    "text_encoder= or tokenizer="
)


def inside(path: Path, *roots: Path) -> Path:
    """The path, if it lies in one of the folders once all links are followed.

    Args:
        roots: folders that a person has named, or what came with one.

    Raises:
        WanError: it lies elsewhere; says where.
    """
    if ".." not in path.parts and path.absolute().is_relative_to(SHIPPED_MODELS):
        return path  # an installer may have linked the files of this project
    try:
        real = Path(os.path.realpath(path))
    except ValueError as error:  # a zero byte
        raise WanError(f"{path}: no file can have this name ({error})") from error
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in path.parts):
        raise WanError(f"{path}: no file can have this name (longer than {LONGEST_NAME} bytes)")
    allowed = [SHIPPED_MODELS, *roots, *(cache for root in roots for cache in hub_caches(root))]
    if any(real.is_relative_to(os.path.realpath(place)) for place in allowed):
        return path
    raise WanError(f"{path}: leads to {real}, outside of {roots[0]}; {REMEDY}")


def hub_caches(folder: Path) -> list[Path]:
    """The cache folder of a repository, if the folder is in one of its snapshots."""
    # <cache>/models--owner--name/snapshots/<commit>/<component>
    return [
        parent.parent
        for start in (folder.absolute(), Path(os.path.realpath(folder)))
        for parent in start.parents
        if parent.name == "snapshots" and parent.parent.name.startswith("models--")
    ]


def all_inside(place: Path, *roots: Path) -> Path:
    """A file or folder, if it and all that is below it is `inside`; errors as there."""
    inside(place, *roots)
    for folder, folders, names in os.walk(place):
        for path in (Path(folder, name) for name in (*folders, *names)):
            if path.is_symlink():
                inside(path, *roots)
    return place


def kept_path(path: str | Path, folder: str | Path) -> str:
    """How a path is written into what is kept or handed on: records, videos, checkpoints, reports.

    What lies in the output folder is written relative to it. A relative path that does not climb is
    written as typed, and so are hub ids and names of shipped models, which are no paths. Of any
    other path only the last name is written: the rest tells of the machine, and digests beside it
    say which file it was.

    Args:
        folder: the output folder.
    """
    typed = Path(os.path.expanduser(path))
    if not typed.is_absolute() and ".." not in typed.parts:
        return str(path)
    place, output = (Path(os.path.abspath(os.path.expanduser(p))) for p in (path, folder))
    if place.is_relative_to(output):
        return place.relative_to(output).as_posix()
    return place.name


def kept_text(text: str, folder: str | Path, *places: str | Path) -> str:
    """A message with each absolute path in it written as `kept_path` does.

    Args:
        folder: the output folder.
        places: paths that it may hold and that may have spaces in them.
    """
    known = {os.path.abspath(place) for place in (*places, folder) if place}
    for place in sorted(known - {"/"}, key=len, reverse=True):
        text = text.replace(f"{place}/", "")
        name = kept_path(place, folder).replace("\\", r"\\")
        text = re.sub(re.escape(place) + END_OF_NAME, name, text)
    return ABSOLUTE.sub(lambda found: kept_path(found[0], folder), text)
