"""The pipeline class that a model_index.json names, and which of ours runs it."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan.errors import WanError
from wan.files import read_json
from wan.paths import inside
from wan.weights.hub import hub_id

BASE, FEW_STEP = PIPELINE_CLASSES = ("WanPipeline", "WanDMDPipeline")
# Pipelines of Wan's other models, which have networks or inputs of their own.
OTHER_FAMILIES = re.compile(r"(?i)vace|animate|causal|control|camera|s2v|speech|phantom")
PART_CLASSES = {
    "transformer": "WanTransformer3DModel",
    "transformer_2": "WanTransformer3DModel",
    "vae": "AutoencoderKLWan",
    "text_encoder": "UMT5EncoderModel",
}


def read_index(folder: Path) -> dict[str, Any]:
    """Read model_index.json, with one of our own two classes as its `_class_name`.

    Raises:
        WanError: it is missing, or of a pipeline that is not supported.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        raise WanError(
            f"{folder}: no model_index.json; give the top folder of a model{other_layout(folder)}"
        )
    index = read_json(inside(path, folder))
    return index | {"_class_name": pipeline_class(path, index)}


def other_layout(folder: Path) -> str:
    """What to do with a folder of the official layout, where it is not read; "" for any other."""
    names = ("config.json", "high_noise_model/config.json")
    configs = [inside(folder / name, folder) for name in names]
    if not any(c.is_file() and read_json(c).get("_class_name") == "WanModel" for c in configs):
        return ""
    if (name := hub_id(folder)) is not None:
        return f" (this is the official layout; {name}-Diffusers has the one that is read here)"
    there, back = (shlex.quote(str(place)) for place in (folder, f"{folder}-diffusers"))
    return (
        " (this is the official layout; the other one is written by: python -m infer.convert "
        f"layout=diffusers source={there} output={back})"
    )


def pipeline_class(path: Path, index: Mapping[str, Any]) -> str:
    """Which of our two classes runs the model of a model_index.json.

    A class of another name is recognised by its parts: diffusers' image-to-video and video-to-video
    classes, and subclasses of trainers, save the same networks.

    Raises:
        WanError: the class is of another family, or a part is of another kind.
    """
    name = str(index.get("_class_name"))
    if name in PIPELINE_CLASSES:
        return name
    strange, other_family = strange_part(index), OTHER_FAMILIES.search(name)
    if "wan" in name.lower() and not other_family and strange is None:
        return FEW_STEP if "dmd" in name.lower() or "timesteps" in index else BASE
    hint = ""
    if not other_family and strange is None:
        hint = f"; if its networks are those of a {BASE}, write that name as _class_name"
    raise WanError(
        f"{path}: pipeline class {name!r}{strange or ''} is not supported; known are "
        f"{', '.join(PIPELINE_CLASSES)}{hint}"
    )


def strange_part(index: Mapping[str, Any]) -> str | None:
    """What a model_index.json lists that no supported pipeline has, in words; None if nothing."""
    for part, entry in index.items():
        kind = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if kind is not None and part.endswith("_encoder") and part not in PART_CLASSES:
            return f" with an {part}"
        if kind is not None and kind != PART_CLASSES.get(part, kind):
            return f" with a {part} of class {kind!r}"
    return None if is_used(index.get("transformer")) else " without a transformer"


def is_used(entry: Any) -> bool:
    """Whether model_index.json names a class for a component."""
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None
