"""A checkpoint on disk: one safetensors file, or a folder of shards with an optional index.

Opening one reads every header and compares the index with the shards, so that missing, repeated or
misplaced tensors are reported before memory is allocated. No tensor is read.

Beside the weights there may be other ones of the same network: a variant in another dtype, named as
in `model.fp16.safetensors`, or a copy under a name of its own. The released name without a variant
is the one that is opened.

A shard may be a link to a file that came with it, and to no other: see `wan.paths`.
"""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from wan.errors import WanError
from wan.files import read_json
from wan.paths import inside
from wan.weights.safetensors_file import (
    GGUF,
    GGUF_SUFFIX,
    PICKLE_SUFFIXES,
    SafetensorsFile,
    TensorEntry,
    map_tensors,
    read_header,
    refuse_pickle,
)

INDEX_SUFFIX = ".safetensors.index.json"
# A variant's name stands before the shard's number; older files have it behind.
SHARD_NAME = re.compile(
    r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<variant>\.[\w-]+)?\.safetensors"
)
INDEX_NAME = re.compile(
    r"(?P<stem>.+)\.safetensors(?P<old>\.[\w-]+)?\.index(?P<variant>\.[\w-]+)?\.json"
)
RELEASED_STEMS = ("diffusion_pytorch_model", "model")  # of networks, of text encoders
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\.safetensors")  # no folder, no drive


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored; it has not been read."""

    name: str  # in the file
    file: SafetensorsFile
    entry: TensorEntry
    scale: "StoredTensor | None" = None  # what its numbers are multiplied with


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a checkpoint, by the names in its files."""

    path: Path
    files: tuple[SafetensorsFile, ...]
    tensors: dict[str, StoredTensor]

    @property
    def metadata(self) -> dict[str, str]:
        """The string metadata of all files; a later file's entry replaces an earlier one's."""
        return {key: value for file in self.files for key, value in file.metadata.items()}

    def map(self) -> dict[str, Tensor]:
        """Every tensor as a view of its mapped file, in the stored dtype: see `map_tensors`."""
        return {name: tensor for file in self.files for name, tensor in map_tensors(file).items()}


def open_checkpoint(
    path: str | Path, variant: str | None = None, model: Path | None = None
) -> Checkpoint:
    """Open a .safetensors file, an index, or a folder that holds one checkpoint.

    Args:
        variant: for a folder: the weights of that variant, such as "fp16".
        model: the folder of the whole model, in which links may lead; None: the checkpoint's own.

    Raises:
        WanError: there is no checkpoint, or several, or only pickles, or the files contradict each
            other; the message names files and tensors.
    """
    path = Path(path)
    if not path.is_dir():
        if is_index(path.name):
            return open_index(path, model or path.parent)
        if not path.exists() and not path.is_symlink():
            raise WanError(f"{path}: no such file or folder")
        return combine(path, [read_header(path)])
    names = sorted(file.name for file in path.iterdir() if not file.name.startswith("."))
    stem = choose_family(path, names, variant)
    names = [name for name in names if is_weights(name) and family(name) == stem]
    if index := [name for name in names if is_index(name)]:
        check_link(path / index[0], path, model or path)
        return open_index(path / index[0], model or path)
    check_complete_set(path, names)
    for name in names:
        check_link(path / name, path, model or path)
    return combine(path, [read_header(path / name) for name in names])


def is_index(name: str) -> bool:
    """True for the name of an index of shards."""
    return INDEX_NAME.fullmatch(name) is not None


def is_weights(name: str) -> bool:
    """True for the name of a safetensors file, or of an index of such."""
    return name.endswith(".safetensors") or is_index(name)


def family(name: str) -> str:
    """The stem that the names of an index and its shards share, a variant's name included."""
    if match := SHARD_NAME.fullmatch(name):
        return match["stem"] + (match["variant"] or "")
    if match := INDEX_NAME.fullmatch(name):
        return match["stem"] + (match["variant"] or match["old"] or "")
    return name.removesuffix(".safetensors")


def holds_weights(place: Path) -> bool:
    """Whether a folder holds safetensors files, or a file is one."""
    return place.is_file() or (place.is_dir() and any(is_weights(f.name) for f in place.iterdir()))


def has_variant(folder: Path, variant: str) -> bool:
    """Whether a folder holds weights of a variant."""
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    return any(is_weights(name) and family(name).endswith(f".{variant}") for name in names)


def choose_family(path: Path, names: list[str], variant: str | None) -> str:
    """The weights that are meant, of all in a folder: their stem.

    Raises:
        WanError: there are none, or several of which none has the released name.
    """
    stems = sorted({family(name) for name in names if is_weights(name)})
    if not stems:
        raise WanError(nothing_found(path, names))
    found = ", ".join(f"{stem}*.safetensors" for stem in stems)
    if variant is not None:
        wanted = [stem for stem in stems if stem.endswith(f".{variant}")]
        if not wanted:
            raise WanError(f"{path}: no weights of variant={variant} here, only {found}")
    else:
        wanted = [s for s in stems if not any(s.startswith(f"{other}.") for other in stems)]
    of_plain = {stem.removesuffix(f".{variant}"): stem for stem in wanted}
    released = [of_plain[stem] for stem in RELEASED_STEMS if stem in of_plain]
    chosen = released if released else wanted
    if len(chosen) > 1:
        raise WanError(f"{path}: holds several checkpoints ({found}): give the file or index")
    (stem,) = chosen
    others = [f"{other}*.safetensors" for other in stems if other != stem]
    if others and variant is None:
        variants = [other.removeprefix(f"{stem}.") for other in stems if f"{stem}." in other]
        hint = f"; variant={variants[0]} takes the other" if variants else ""
        warnings.warn(f"{path}: {stem} is taken, not {', '.join(others)}{hint}", stacklevel=3)
    return stem


def nothing_found(path: Path, names: list[str]) -> str:
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        return refuse_pickle(path / pickles[0])
    if gguf := [name for name in names if name.endswith(GGUF_SUFFIX)]:
        return f"{path / gguf[0]}: not a safetensors file but {GGUF}"
    if "model_index.json" in names:
        return f"{path}: a whole pipeline; give one component, e.g. {path / 'transformer'}"
    found = ", ".join(names[:8]) or "nothing"
    cached = any(parent.name == "snapshots" for parent in path.absolute().parents)
    hint = "; if the repository has them as variants only, name one as variant=" if cached else ""
    return f"{path}: no .safetensors file here (found: {found}){hint}"


def check_complete_set(path: Path, files: list[str]) -> None:
    """Without an index, several files must be the complete set that their names announce."""
    shards = [SHARD_NAME.fullmatch(name) for name in files]
    if len(files) == 1 and shards[0] is None:
        return
    counts = {match["count"] for match in shards if match is not None}
    if None in shards or len(counts) != 1:
        raise WanError(f"{path}: {', '.join(files)} do not form one set; give the file you mean")
    count = int(counts.pop())
    present = {int(match["number"]) for match in shards if match is not None}
    missing = sorted(set(range(1, count + 1)) - present)
    if missing:
        first = next(match for match in shards if match is not None)
        stem, end = first["stem"], f"-of-{count:05d}{first['variant'] or ''}.safetensors"
        raise WanError(
            f"{path}: missing "
            + ", ".join(f"{stem}-{i:05d}{end}" for i in missing[:8])
            + f" ({len(missing)} of {count} shards): fetch them again"
        )


def open_index(path: Path, model: Path) -> Checkpoint:
    """Open the shards that an index lists, and check that index and shards agree."""
    folder = path.parent
    weight_map, total_size = read_index(path)
    listed = sorted(set(weight_map.values()))
    for name in listed:
        if not FILE_NAME.fullmatch(name) or len(name) > 255:
            raise WanError(
                f"{path}: shard name {ascii(name)[:120]}: must be a plain .safetensors file name "
                "in the index's folder"
            )
        check_link(folder / name, folder, model)
    missing = [name for name in listed if not (folder / name).exists()]
    if missing:
        raise WanError(
            f"{path}: lists {', '.join(missing[:8])} ({len(missing)} of {len(listed)} shards "
            "missing): fetch them again"
        )
    stem = family(path.name)
    unlisted = sorted(
        file.name
        for file in folder.glob("*.safetensors")
        if family(file.name) == stem and file.name not in listed and file.name[0] != "."
    )
    if unlisted:
        raise WanError(
            f"{path}: does not list {', '.join(unlisted[:8])}, which lie beside it: move away what "
            "belongs to another download"
        )
    checkpoint = combine(path, [read_header(folder / name) for name in listed])
    check_weight_map(path, weight_map, checkpoint)
    stored = sum(t.entry.end - t.entry.start for t in checkpoint.tensors.values())
    if total_size is not None and total_size != stored:
        # Published repacks get this number wrong, and the shards themselves have just been checked.
        warnings.warn(f"{path}: total_size {total_size:,}, shards hold {stored:,}", stacklevel=3)
    return checkpoint


def read_index(path: Path) -> tuple[dict[str, str], float | None]:
    """Read weight_map and metadata.total_size (None if missing) of an index file."""
    try:
        index = read_json(path)
    except OSError as error:
        raise WanError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    weight_map = index.get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise WanError(f"{path}: needs a weight_map from tensor names to file names")
    metadata = index.get("metadata")
    total_size = metadata.get("total_size") if isinstance(metadata, dict) else None
    return weight_map, total_size if type(total_size) in (int, float) else None


def check_link(path: Path, *roots: Path) -> None:
    """Refuse a link that leads nowhere, or to what did not come with it: see `wan.paths.inside`."""
    inside(path, *roots)
    if path.is_symlink() and not path.exists():
        raise WanError(f"{path}: a broken symlink; fetch the file again")


def combine(path: Path, files: list[SafetensorsFile]) -> Checkpoint:
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, entry in file.tensors.items():
            if name in tensors:
                raise WanError(
                    f"{path}: tensor {name} is in {tensors[name].file.path.name} and in "
                    f"{file.path.name}; these are shards of different downloads"
                )
            tensors[name] = StoredTensor(name, file, entry)
    return Checkpoint(path, tuple(files), tensors)


def check_weight_map(path: Path, weight_map: dict[str, str], checkpoint: Checkpoint) -> None:
    """Check that every listed tensor is in its shard, and that no other tensor exists."""
    problems = []
    for name, file_name in weight_map.items():
        stored = checkpoint.tensors.get(name)
        if stored is None:
            problems.append(f"{name} is not in {file_name}")
        elif stored.file.path.name != file_name:
            problems.append(f"{name} is in {stored.file.path.name}, not in {file_name}")
    problems += [
        f"{name} in {stored.file.path.name} is not listed"
        for name, stored in checkpoint.tensors.items()
        if name not in weight_map
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise WanError(
            f"{path}: index and shards disagree: {'; '.join(problems[:4])}{more}; fetch the index "
            "and its shards from one revision"
        )
