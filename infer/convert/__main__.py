"""Write a checkpoint in another layout, or the LoRA between two checkpoints.

    python -m infer.convert source=.. output=.. layout=..
    python -m infer.convert source=.. base=.. rank=.. output=..

    source   a component (a .safetensors file, an index, or its folder) or a whole release folder
             in the diffusers or the official layout; mini or mini-teacher, the shipped ones
    layout   diffusers: the folder that WanPipeline loads
             official:  the names of the Wan repositories (safetensors in place of their .pth)
             prefixed:  a transformer as one file, official names after `model.diffusion_model.`

Names change and bits don't, unless dtype= asks for it: converting there and back gives the same
tensors. Every tensor is checked against the config first. The output appears whole or not at all.

With base=.. rank=.. it writes a LoRA file instead: the part of source - base that a rank can hold.
A JSON file beside it says how much of the difference is lost, layer by layer.
"""

import json
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from configs.cli import run
from configs.command_line import CommandLine
from configs.conversion import ConvertConfig
from configs.schema import check_choice
from infer.convert.extract_lora import convert_lora
from infer.convert.releases import (
    CONFIG_METADATA,
    EXPERT_FOLDERS,
    TEXT_ENCODER_STEM,
    TOKENIZER_FILES,
    TOKENIZER_FOLDER,
    TRANSFORMER_STEM,
    VAE_STEMS,
    find_config,
    official_pipeline,
    official_transformer_config,
)
from wan.errors import WanError
from wan.files import read_json, write_json
from wan.models.dit_config import DiTConfig
from wan.pipeline.config import (
    DEFAULTS_FILE,
    PipelineConfig,
    model_index_json,
    part_folder,
    scheduler_json,
)
from wan.pipeline.folder import part_builder, vae_levels
from wan.weights.checkpoint import Checkpoint, is_index, open_checkpoint
from wan.weights.hub import SHIPPED, builtin_folder
from wan.weights.keys import COMPONENTS, detect_layout
from wan.weights.load import check_fit, match_names, stored_state, target_dtype
from wan.weights.names import short
from wan.weights.safetensors_file import read_header
from wan.weights.save import save_component

LINE = CommandLine(
    ConvertConfig,
    "convert",
    text_keys=(),
    path_keys=("source", "output", "config", "base"),
)

LAYOUTS = ("diffusers", "official", "prefixed")
PREFIX = "model.diffusion_model."


def main(config: ConvertConfig) -> None:
    config.check_task()
    source = find("source", config.source)
    if config.base is not None:
        convert_lora(config, source, find("base", config.base))
        return
    check_choice("layout", config.layout, LAYOUTS)
    with new_folder(Path(config.output).expanduser()) as folder:
        if (source / "model_index.json").is_file() or is_official_release(source):
            if config.config is not None:
                raise WanError("config= is for a single component; a release brings its own")
            convert_release(source, folder, config)
        else:
            values = None if config.config is None else read_json(Path(config.config).expanduser())
            convert_component(open_checkpoint(source), None, folder, config, values)
    print(f"wrote {config.output}")


def find(option: str, name: str) -> Path:
    """The file or folder of that name, or the folder of a shipped model."""
    path = builtin_folder(SHIPPED.get(name, name)) or Path(name).expanduser()
    if not path.exists():
        shipped = " or ".join(SHIPPED)
        raise FileNotFoundError(f"{option}={name}: no such file or folder, nor {shipped}")
    return path


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its name at the end, and is gone if anything fails."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise WanError(f"output={output}: is there already and not empty; choose another folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.part")
    beside.mkdir()
    try:
        yield beside
        if output.exists():
            output.rmdir()  # empty, and only that goes
        beside.rename(output)
    except BaseException:
        shutil.rmtree(beside)
        raise


# --- one component --------------------------------------------------------------------------------


def convert_component(
    checkpoint: Checkpoint,
    component: str | None,
    folder: Path,
    target: ConvertConfig,
    config: Mapping[str, Any] | None = None,
    model_type: str | None = None,
) -> dict[str, Any]:
    """Write one component into a folder, with its config.json where the layout has one.

    Args:
        component: one of `wan.weights.keys.COMPONENTS`; None finds out by the names.
        target: the layout and dtypes to write.
        config: the component's settings; None looks for them (see `find_config`).
        model_type: for the official config of a transformer; None goes by the latent channels.
    Returns:
        The config that was used.
    """
    component = component or detect_component(checkpoint)
    names = match_names(checkpoint, component)
    shapes = {name: tensor.entry.shape for name, tensor in names.stored.items()}
    values = dict(config or find_config(checkpoint, component, shapes))
    with torch.device("meta"):
        module: Any = part_builder(component, values)()
    wanted = module.state_dict()
    check_fit(checkpoint, component, names, wanted)
    is_prefixed, is_diffusers = target.layout == "prefixed", target.layout == "diffusers"
    if is_prefixed and component != "transformer":
        raise WanError(f"layout=prefixed is for transformers; {checkpoint.path} is a {component}")
    views, scales = stored_state(checkpoint, component)
    state = {name: views[name] for name in wanted}  # in one order, so that shards come out equal
    dtypes = levels = None
    if target.dtype is not None:
        # The loader raises these to float32 anyway; rounding them here loses their bits.
        float32, most = module.FLOAT32_PARAMETERS, getattr(torch, target.dtype)
        float32 = () if target.round_all else float32
        dtypes = {name: target_dtype(name, t.dtype, most, float32) for name, t in state.items()}
    if component == "vae":
        levels = vae_levels(module.config)
    written = save_component(
        state,
        folder,
        component,
        "diffusers" if is_diffusers else "official",
        vae_levels=levels,
        prefix=PREFIX if is_prefixed else "",
        dtypes=dtypes,
        scales=scales,
        # A prefixed file is one file by definition.
        max_shard_bytes=sys.maxsize if is_prefixed else int(target.shard_gb * 1e9),
        metadata=None if is_diffusers else {CONFIG_METADATA: json.dumps(values)},
    )
    if (written_config := layout_config(component, target.layout, values, model_type)) is not None:
        write_json(folder / "config.json", written_config)
    count = sum(tensor.numel() for tensor in state.values())
    more = f" and {len(written) - 1} more" if len(written) > 1 else ""
    print(
        f"{component}: {names.layout.layout} -> {target.layout}, {len(state)} tensors, "
        f"{short(count)} parameters -> {written[0].name}{more}"
    )
    return values


def detect_component(checkpoint: Checkpoint) -> str:
    """Which component a checkpoint is, by its names."""
    reasons = []
    for component in COMPONENTS:
        try:
            detect_layout(component, checkpoint.tensors)
        except WanError as error:
            reasons.append(error)
        else:
            return component
    # The transformer's reason also names a model of another kind.
    raise WanError(f"{checkpoint.path}: {reasons[0]}")


def layout_config(
    component: str, layout: str, values: dict[str, Any], model_type: str | None
) -> dict[str, Any] | None:
    """The config.json for a component in a layout; None if the layout has none for it."""
    if component != "transformer":
        return values if layout == "diffusers" else None
    is_official = "dim" in values
    if layout == "diffusers":
        return DiTConfig.from_json(values).to_json() if is_official else values
    if is_official:
        return values
    config = DiTConfig.from_json(values)
    by_channels = "ti2v" if config.in_channels == 48 else "t2v"
    return official_transformer_config(config, model_type or by_channels)


# --- a whole release ------------------------------------------------------------------------------


def is_official_release(source: Path) -> bool:
    """Whether a folder holds a transformer and more, under the official names."""
    names = [path.name for path in source.iterdir()] if source.is_dir() else []
    others = any(name.startswith((*VAE_STEMS, TEXT_ENCODER_STEM)) for name in names)
    transformer = any(name.startswith(TRANSFORMER_STEM) for name in names)
    return bool(set(EXPERT_FOLDERS.values()) & set(names)) or (transformer and others)


def convert_release(source: Path, folder: Path, target: ConvertConfig) -> None:
    """Write every part of a release; what else it has follows if the layout has a place for it."""
    if target.layout == "prefixed":
        raise WanError("layout=prefixed holds a transformer alone: give that as source=")
    index_file = source / "model_index.json"
    index = read_json(index_file) if index_file.is_file() else None
    model_type = None
    if index is None:
        has_two = (source / EXPERT_FOLDERS["transformer"]).is_dir()
        experts = list(EXPERT_FOLDERS) if has_two else ["transformer"]
    else:
        experts = [name for name in EXPERT_FOLDERS if is_used(index.get(name))]
        model_type = "ti2v" if index.get("expand_timesteps") else "t2v"
    to_official = target.layout == "official"
    configs = {}
    for name in (*experts, "vae", "text_encoder"):
        component = "transformer" if name in experts else name
        path = part_folder(source, name) if index else official_file(source, name, len(experts))
        into = official_folder(folder, name, len(experts)) if to_official else folder / name
        configs[component] = convert_component(
            open_checkpoint(path), component, into, target, model_type=model_type
        )
    tokenizer = folder / (TOKENIZER_FOLDER if to_official else "tokenizer")
    copy_tokenizer(
        part_folder(source, "tokenizer") if index else source / TOKENIZER_FOLDER, tokenizer
    )
    if index and to_official:
        print(
            "model_index.json, scheduler/ and sampling defaults are not written: the official code "
            "holds those of the official models. Steps, size and, of a student, its timesteps are "
            "lost: converted back, the folder will be a base model"
        )
    elif index:
        for name in ("model_index.json", "scheduler/scheduler_config.json", DEFAULTS_FILE):
            if (source / name).is_file():
                write_json(folder / name, read_json(source / name))
    elif not to_official:
        write_official_index(official_pipeline(configs, len(experts)), folder)


def write_official_index(pipeline: PipelineConfig, folder: Path) -> None:
    """Write what diffusers needs of an official release besides its parts."""
    print(
        f"guessed, as official files do not say: a {pipeline.class_name} of shift "
        f"{pipeline.shift:g} and the official defaults; a student needs the model_index.json "
        "that it had"
    )
    index = model_index_json(pipeline)
    if not (folder / "tokenizer" / "tokenizer.json").is_file():
        index["tokenizer"] = ["transformers", "T5TokenizerFast"]  # the one that reads pieces
    write_json(folder / "model_index.json", index)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler_json(pipeline.shift))


def is_used(entry: Any) -> bool:
    """Whether model_index.json names a class for a component."""
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None


def official_folder(release: Path, name: str, num_experts: int) -> Path:
    """The folder of a part in the official layout: one of two experts has its own."""
    return (
        release / EXPERT_FOLDERS[name] if name in EXPERT_FOLDERS and num_experts == 2 else release
    )


def official_file(release: Path, name: str, num_experts: int) -> Path:
    """The weights of a part of an official release, whose pickles were converted before."""
    stems = {"vae": VAE_STEMS, "text_encoder": (TEXT_ENCODER_STEM,)}.get(name, (TRANSFORMER_STEM,))
    return find_weights(official_folder(release, name, num_experts), stems)


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


def copy_tokenizer(source: Path, folder: Path) -> None:
    found = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not found:
        raise WanError(f"{source}: no tokenizer here ({' or '.join(TOKENIZER_FILES[:2])})")
    folder.mkdir(parents=True)
    for path in found:
        shutil.copyfile(path, folder / path.name)


if __name__ == "__main__":
    run(lambda run: main(run.config), LINE, __doc__ or "")
