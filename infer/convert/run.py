"""Write a component, a release or a LoRA in another layout: the work of `infer.convert`."""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from configs.conversion import ConvertConfig
from configs.progress import Steps, doing
from configs.schema import check_choice
from infer.convert.extract_lora import convert_lora
from infer.convert.releases import layout_config
from wan.errors import WanError
from wan.files import expanded, folder_beside, read_json, write_json
from wan.paths import all_inside, inside
from wan.pipeline.config import (
    DEFAULTS_FILE,
    PipelineConfig,
    component_settings,
    model_index_json,
    shared_parts,
)
from wan.pipeline.folder import folder_places, part_builder
from wan.pipeline.known_models import CONFIG_METADATA, component_of, known_config
from wan.pipeline.layouts import (
    EXPERT_FOLDERS,
    TOKENIZER_FOLDER,
    find_parts,
    official_folder,
    pipeline_of_parts,
)
from wan.pipeline.model_index import is_used
from wan.pipeline.parts import vae_levels
from wan.pipeline.tokenizer_files import write_tokenizer
from wan.weights.checkpoint import Checkpoint, open_checkpoint
from wan.weights.hub import SHIPPED, builtin_folder
from wan.weights.load import check_fit, match_names, stored_state, target_dtype
from wan.weights.names import short
from wan.weights.save import save_component

CONFIG_OPTION = ", or give its settings as config=FILE"
LAYOUTS = ("diffusers", "official", "prefixed")
PREFIX = "model.diffusion_model."


def convert(config: ConvertConfig) -> None:
    config.check_task()
    if config.base is not None:
        convert_lora(config, find("source", config.source), find("base", config.base))
        return
    check_choice("layout", config.layout, LAYOUTS)
    given = config.parts
    source = find("source", config.source) if config.source else given["transformer"].parent
    parts = find_parts(source, given)
    is_release = bool(parts) or (source / "model_index.json").is_file()
    if is_release and config.config is not None:
        raise WanError("config= is for a single component; a release brings its own")
    if given and not is_release:
        raise WanError(f"{next(iter(given))}=: for a whole release; source={source} is one part")
    with new_folder(expanded(config.output)) as folder:
        if is_release:
            convert_release(source, parts, folder, config)
        else:
            values = None if config.config is None else read_json(expanded(config.config))
            convert_component(open_checkpoint(source), None, folder, config, values)
    print(f"wrote {config.output}")


def find(option: str, name: str) -> Path:
    """The file or folder of that name, or the folder of a shipped model."""
    path = builtin_folder(SHIPPED.get(name, name)) or expanded(name)
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
    with folder_beside(output) as beside:
        yield beside
        if output.exists():
            output.rmdir()  # empty, and only that goes
        beside.rename(output)


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
        config: the component's settings; None looks for them (see `known_config`).
        model_type: for the official config of a transformer; None goes by the latent channels.
    Returns:
        The config that was used.
    """
    component = component or component_of(checkpoint)
    names = match_names(checkpoint, component)
    values = dict(config or known_config(component, checkpoint, CONFIG_OPTION))
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
    kept = {name: tensor.dtype for name, tensor in state.items()}
    total = sum(state[name].numel() * dtype.itemsize for name, dtype in (dtypes or kept).items())
    with Steps(f"MB of {component} written", total, unit=10**6) as steps:
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
            on_bytes=steps.add,
        )
    for file in checkpoint.files:
        file.open().close()  # notices what was overwritten meanwhile
    if (written_config := layout_config(component, target.layout, values, model_type)) is not None:
        write_json(folder / "config.json", written_config)
    count = sum(tensor.numel() for tensor in state.values())
    more = f" and {len(written) - 1} more" if len(written) > 1 else ""
    print(
        f"{component}: {names.layout.layout} -> {target.layout}, {len(state)} tensors, "
        f"{short(count)} parameters -> {written[0].name}{more}"
    )
    return values


# --- a whole release ------------------------------------------------------------------------------


def convert_release(
    source: Path, parts: Mapping[str, Path], folder: Path, target: ConvertConfig
) -> None:
    """Write every part of a release; what else it has follows if the layout has a place for it.

    Args:
        source: the folder of the release.
        parts: where its parts are, for a folder without model_index.json.
    """
    given = target.parts
    if target.layout == "prefixed":
        raise WanError("layout=prefixed holds a transformer alone: give that as source=")
    index = None if parts else read_json(inside(source / "model_index.json", source))
    model_type = None
    if index is None:
        pipeline = pipeline_of_parts(source, parts)
        experts = [part for part in EXPERT_FOLDERS if part in parts]
        model_type = "ti2v" if pipeline.expand_timesteps else "t2v"
    else:
        experts = [name for name in EXPERT_FOLDERS if is_used(index.get(name))]
        model_type = "ti2v" if index.get("expand_timesteps") else "t2v"
    to_official = target.layout == "official"
    if "transformer_2" in given and len(experts) == 1:
        raise WanError("transformer_2=: this model has one network, not two experts")
    places = parts or folder_places(source, shared_parts(source) | given)
    for name in (*experts, "vae", "text_encoder"):
        place = places.get(name, source / name)
        if name not in given:
            all_inside(place, source)
        component = "transformer" if name in experts else name
        into = official_folder(folder, name, len(experts)) if to_official else folder / name
        values = component_settings(source, name, given) if index and name in given else None
        with doing(name):
            checkpoint = open_checkpoint(place, model=source)
            convert_component(checkpoint, component, into, target, values, model_type)
    tokenizer = folder / (TOKENIZER_FOLDER if to_official else "tokenizer")
    own_tokenizer = places.get("tokenizer", source / "tokenizer")
    write_tokenizer(all_inside(own_tokenizer, source, *given.values()), tokenizer)
    if index and to_official:
        print(
            "model_index.json, scheduler/ and sampling defaults are not written: the official code "
            "holds those of the official models. Steps, size and, of a student, its timesteps are "
            "lost: converted back, the folder will be a base model"
        )
    elif index:
        for name in ("model_index.json", "scheduler/scheduler_config.json", DEFAULTS_FILE):
            if (source / name).is_file():
                write_json(folder / name, read_json(inside(source / name, source)))
    elif not to_official:
        write_official_index(pipeline, folder)


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
    write_json(folder / "scheduler" / "scheduler_config.json", pipeline.scheduler.to_json())
