"""What a training run leaves behind: a folder that pipelines and diffusers load, or a LoRA file."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from train.tensor_cache import only_writer
from wan.files import folder_beside
from wan.lora.files import ATTENTION
from wan.lora.merge import save_lora
from wan.models.attention import SPARSE
from wan.models.dit import WanDiT
from wan.pipeline.config import PipelineConfig, part_folder, write_configs
from wan.weights.digests import list_files
from wan.weights.save import replace_component, save_component


def export_part(module: Any, folder: Path, name: str, **options: Any) -> None:
    """Write one part of a model in the released layout: config.json and weights.

    Args:
        options: for `wan.weights.save.replace_component`.
    """
    replace_component(module.state_dict(), folder, name, module.config.to_json(), **options)


def export_model(
    dit: WanDiT, source: Path, settings: PipelineConfig, folder: Path, lora_rank: int
) -> Path:
    """Write the LoRA file, or the whole released layout with the trained transformer.

    Args:
        source: the folder whose other parts are copied.
        settings: what the result says about itself; a sparse attention is added from `dit`, to a
            LoRA too.
        lora_rank: above 0 if the network carries a LoRA, which alone is written then.
    Raises:
        WanError: another process is writing to `folder`.
    """
    attention = dit.attention.config
    trained = str(attention) if attention.name in SPARSE else None
    settings = replace(settings, defaults=replace(settings.defaults, attention=trained))
    if lora_rank:
        metadata = {} if trained is None else {ATTENTION: trained}
        return save_lora(folder / "pytorch_lora_weights.safetensors", dit, metadata=metadata)
    model = folder / "model"
    with only_writer(folder), folder_beside(model) as beside:
        for name in ("vae", "text_encoder", "tokenizer"):
            for file, path in list_files(part_folder(source, name)).items():
                (beside / name / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, beside / name / file)
        write_configs(settings, beside)
        save_component(dit.state_dict(), beside / "transformer", "transformer")
        if model.exists():  # written by an earlier end of this same run
            shutil.rmtree(model)
        beside.rename(model)
    return model
