"""Folders without a model_index.json: the official layout, and ComfyUI's files.

    official     diffusion_pytorch_model*, or high_noise_model/ and low_noise_model/
                 Wan2.2_VAE* or Wan2.1_VAE*     models_t5_umt5-xxl-enc*     google/umt5-xxl/
    ComfyUI      diffusion_models/     vae/     text_encoders/
                 or the three files side by side; two transformers are told apart by "high_noise"
                 and "low_noise" in their names

Both say nothing of the pipeline: it is a base model with the settings of the official code.
Source: the released repositories; Wan2.2 `wan/configs` and `generate.py`.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from wan.errors import WanError
from wan.models.dit_config import DiTConfig
from wan.models.umt5 import UMT5Config
from wan.models.vae import VAEConfig
from wan.paths import all_inside
from wan.pipeline.config import TWO_EXPERTS, PipelineConfig, read_defaults
from wan.pipeline.known_models import component_of, known_config
from wan.pipeline.model_index import BASE
from wan.pipeline.tokenizer_files import is_tokenizer
from wan.sampling.scheduler_config import SchedulerSettings
from wan.weights.checkpoint import is_index, open_checkpoint
from wan.weights.hub import hub_id
from wan.weights.keys import detect_layout
from wan.weights.safetensors_file import GGUF_SUFFIX, read_header

# File and folder names of the official layout.
EXPERT_FOLDERS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
TRANSFORMER_STEM = "diffusion_pytorch_model"
VAE_STEMS = ("Wan2.2_VAE", "Wan2.1_VAE")
TEXT_ENCODER_STEM = "models_t5_umt5-xxl-enc"
TOKENIZER_FOLDER = "google/umt5-xxl"

COMFYUI_FOLDERS = {  # the second name is the older one
    "transformer": ("diffusion_models", "unet"),
    "vae": ("vae",),
    "text_encoder": ("text_encoders", "clip"),
}
# The expert that a file's name speaks of.
NOISE = re.compile(r"(?i)(high|low)[-_. ]?noise|(?<![a-z])(high|low)(?![a-z])")


def find_parts(folder: Path, given: Mapping[str, Path] | None = None) -> dict[str, Path]:
    """The parts of a folder in the official layout or in ComfyUI's: part -> file or folder.

    Args:
        given: parts that are taken from elsewhere, and are not looked for.

    Returns:
        All parts, the given ones and the tokenizer included; empty if the folder has neither
        layout.

    Raises:
        WanError: a part is missing, is a pickle, cannot be told from another, or is a link to what
            did not come with the folder.
    """
    given = dict(given or {})
    if not folder.is_dir() or (folder / "model_index.json").is_file() or hub_id(folder):
        return {}  # of a repository, only what a released layout has is fetched
    if given.keys() >= COMFYUI_FOLDERS.keys():
        found = given
    elif is_official(folder):
        found = official_parts(folder, given) | given
    elif found := comfyui_parts(folder, given):
        found |= given
    else:
        return {}
    found["tokenizer"] = find_tokenizer(folder, found)
    for part in found.keys() - given.keys():
        all_inside(found[part], folder, *given.values())
    return found


def find_tokenizer(folder: Path, found: Mapping[str, Path]) -> Path:
    """The tokenizer that goes with these parts."""
    places = [folder / TOKENIZER_FOLDER, folder / "tokenizer", found["text_encoder"]]
    if "tokenizer" in found:
        return found["tokenizer"]
    place = next((place for place in places if is_tokenizer(place)), None)
    if place is None:
        raise WanError(
            f"{folder}: no tokenizer in {TOKENIZER_FOLDER} or tokenizer, nor in the text encoder's "
            "file: give the folder of a release's tokenizer as tokenizer=FOLDER"
        )
    return place


def pipeline_of_parts(folder: Path, places: Mapping[str, Path]) -> PipelineConfig:
    """The settings of a model whose parts `find_parts` has found.

    Raises:
        WanError: a part is of no known model, or the parts don't fit together.
    """
    configs = {
        part: known_config(part, open_checkpoint(places[part]))
        for part in ("transformer", "vae", "text_encoder")
    }
    return official_pipeline(configs, 1 + ("transformer_2" in places), folder)


def official_pipeline(
    configs: Mapping[str, Mapping[str, Any]], num_experts: int, folder: Path
) -> PipelineConfig:
    """The settings of an official release, which stand in its code.

    Args:
        configs: of the transformer, the vae and the text_encoder.
        num_experts: 2 for A14B, whose high-noise expert hands over at sigma 0.875.
        folder: may hold sampling defaults.
    """
    vae = VAEConfig.from_json(dict(configs["vae"]))
    model_type = configs["transformer"].get("model_type")
    # A spatial stride of 16 marks TI2V-5B, where nothing else says that.
    per_token = model_type == "ti2v" if model_type else vae.spatial_stride == 16
    return PipelineConfig(
        class_name=BASE,
        transformer=DiTConfig.from_json(dict(configs["transformer"])),
        vae=vae,
        text_encoder=UMT5Config.from_json(dict(configs["text_encoder"])),
        boundary_ratio=0.875 if num_experts == 2 else None,
        expand_timesteps=per_token,
        # The official code samples text-to-video of Wan2.1 with 5; 3 is its value for videos from
        # an image in 480p.
        scheduler=SchedulerSettings(shift=12.0 if num_experts == 2 else 5.0),
        defaults=read_defaults(folder, vae, num_experts == 2),
    )


# --- the official layout --------------------------------------------------------------------------


def is_official(folder: Path) -> bool:
    """Whether a folder holds a transformer and more, under the official names."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    others = any(name.startswith((*VAE_STEMS, TEXT_ENCODER_STEM)) for name in names)
    transformer = any(name.startswith(TRANSFORMER_STEM) for name in names)
    return bool(set(EXPERT_FOLDERS.values()) & set(names)) or (transformer and others)


def official_parts(folder: Path, given: Mapping[str, Path]) -> dict[str, Path]:
    """The parts of an official release that are not given, whose pickles were converted before."""
    has_two = (folder / EXPERT_FOLDERS["transformer"]).is_dir()
    experts = TWO_EXPERTS if has_two else TWO_EXPERTS[:1]
    stems = {"vae": VAE_STEMS, "text_encoder": (TEXT_ENCODER_STEM,)}
    return {
        part: find_weights(
            official_folder(folder, part, len(experts)), stems.get(part, (TRANSFORMER_STEM,))
        )
        for part in (*experts, "vae", "text_encoder")
        if part not in given
    }


def official_folder(release: Path, part: str, num_experts: int) -> Path:
    """The folder of a part in the official layout: one of two experts has its own."""
    return (
        release / EXPERT_FOLDERS[part] if part in EXPERT_FOLDERS and num_experts == 2 else release
    )


def find_weights(folder: Path, stems: tuple[str, ...]) -> Path:
    """The index or the one file of a component in a folder that holds several.

    Raises:
        WanError: none, several, or only a pickle, with the command that converts it.
    """
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    paths = [path for path in paths if path.name.startswith(stems)]
    indices = [path for path in paths if is_index(path.name)]
    files = [path for path in paths if path.suffix == ".safetensors"]
    found = indices or files
    if not found and paths:
        read_header(paths[0])  # says what it is and how to convert it
    if len(found) != 1:
        wanted = " or ".join(f"{stem}*.safetensors" for stem in stems)
        listed = ", ".join(path.name for path in found) or "nothing"
        raise WanError(f"{folder}: need one {wanted}, found {listed}")
    return found[0]


# --- ComfyUI's files ------------------------------------------------------------------------------


def comfyui_parts(folder: Path, given: Mapping[str, Path]) -> dict[str, Path]:
    """The parts among ComfyUI's files that are not given; empty if the folder has no such files."""
    if any((folder / name).is_dir() for name in ("diffusion_models", "text_encoders")):
        files = {
            part: [f for name in names for f in weight_files(folder / name, "**/*")]
            for part, names in COMFYUI_FOLDERS.items()
        }
        files = {part: of_component(part, paths) for part, paths in files.items()}
    else:
        files = {part: [] for part in COMFYUI_FOLDERS}
        for path in weight_files(folder, "*"):
            try:
                files[component_of(open_checkpoint(path))].append(path)
            except WanError:
                continue  # not of Wan
        if sum(bool(paths) for paths in files.values()) < 2:
            return {}
    found = {} if "transformer" in given else experts_among(folder, files["transformer"])
    for part in ("vae", "text_encoder"):
        if part not in given:
            found[part] = only_one(folder, part, files[part])
    return found


def weight_files(folder: Path, pattern: str) -> list[Path]:
    """The safetensors and GGUF files below a folder; GGUF is refused by name where it matters."""
    return [
        path
        for suffix in (".safetensors", GGUF_SUFFIX)
        for path in sorted(folder.glob(f"{pattern}{suffix}"))
        if not path.name.startswith(".")
    ]


def of_component(component: str, paths: Iterable[Path]) -> list[Path]:
    """The files that hold weights of a component of Wan.

    Raises:
        WanError: there are files, but none does; says what the first one is.
    """
    fitting, reasons = [], []
    for path in paths:
        try:
            detect_layout(component, read_header(path).tensors)
            fitting.append(path)
        except WanError as error:
            reasons.append(str(error) if str(path) in str(error) else f"{path}: {error}")
    if reasons and not fitting:
        raise WanError(reasons[0])
    return fitting


def experts_among(folder: Path, paths: list[Path]) -> dict[str, Path]:
    """One transformer, or two whose names say which is for high and which for low noise."""
    noise: dict[str, list[Path]] = {"high": [], "low": [], "": []}
    for path in paths:
        match = NOISE.search(path.stem)
        noise[(match[1] or match[2]).lower() if match else ""].append(path)
    high, low = noise["high"], noise["low"]
    if len(high) == len(low) == 1 and not noise[""]:
        return {"transformer": high[0], "transformer_2": low[0]}
    if len(paths) == 1 and (high or low):
        part, other = ("transformer_2", "low") if high else ("transformer", "high")
        raise WanError(
            f"{paths[0]}: one of two experts, and no {other}-noise one beside it: put it there, or "
            f"give both as transformer= and transformer_2= ({part} is missing)"
        )
    return {"transformer": only_one(folder, "transformer", paths)}


def only_one(folder: Path, part: str, paths: list[Path]) -> Path:
    """The one file of a part.

    Raises:
        WanError: there is none, or several.
    """
    if len(paths) == 1:
        return paths[0]
    listed = ", ".join(str(path.relative_to(folder)) for path in paths[:6])
    more = f" and {len(paths) - 6} more" if len(paths) > 6 else ""
    found = f"several files for the {part} ({listed}{more})" if paths else f"no file of the {part}"
    raise WanError(f"{folder}: {found}: name the one to take as {part}=FILE")
