"""The table of differences from diffusers says what is so: one check for every row."""

import re
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from wan import (
    UniPCMultistepScheduler,
    WanDMDPipeline,
    WanError,
    WanImageToVideoPipeline,
    WanPipeline,
    export_to_video,
    load_image,
)
from wan.media.video import read_video
from wan.pipeline.arguments import known_dtype
from wan.weights.keys import our_name

PAGE = (Path(__file__).parents[1] / "infer/README.md").read_text(encoding="utf-8")
TEACHER = "builtin:miniature-teacher"
PROMPT = "a large blue star moving up"
QUICK = {"num_frames": 5, "num_inference_steps": 2, "output_type": "latent"}


def load(**arguments):
    return WanPipeline.from_pretrained(TEACHER, **arguments)


@pytest.fixture(scope="module")
def pipe():
    return load()


def refused(what, *words, **arguments) -> str:
    with pytest.raises(WanError) as error:
        what(**arguments)
    assert all(word in str(error.value) for word in words), str(error.value)
    return str(error.value)


def left_out_dtype(pipe):
    assert pipe.dtype == torch.float32
    assert known_dtype(None, torch.device("cuda")) == torch.bfloat16


def pickles_written(pipe, tmp_path):
    with pytest.warns(UserWarning, match="safetensors files are written instead"):
        pipe.vae.save_pretrained(tmp_path, safe_serialization=False)
    assert {file.suffix for file in tmp_path.iterdir()} == {".safetensors", ".json"}


def left_out_sizes(pipe):
    own = pipe.config.defaults
    assert (own.height, own.width, own.num_frames) != (480, 832, 81)
    output = pipe(PROMPT, num_inference_steps=1)
    assert output.frames.shape[1:4] == (own.num_frames, own.height, own.width)
    assert len(pipe.plan().schedule) == own.num_inference_steps


def left_out_length(pipe):
    assert pipe.encode_prompt(PROMPT)[0].shape[1] == pipe.config.defaults.max_sequence_length == 512


def scale_in_a_callback(pipe):
    def raise_it(pipeline, *_):
        pipeline._guidance_scale = 6.0

    calls = [
        pipe(PROMPT, seed=0, guidance_scale=3.0, **QUICK, **one).frames
        for one in ({}, {"callback_on_step_end": raise_it})
    ]
    assert not torch.equal(*calls)


def no_generator(pipe):
    torch.manual_seed(5)
    first = pipe(PROMPT, **QUICK).frames
    assert torch.equal(first, pipe(PROMPT, **QUICK, generator=torch.Generator().manual_seed(5))[0])


def misspelt(pipe):
    refused(lambda: setattr(pipe, "schedulr", 1), "did you mean scheduler")


def student(pipe):
    pipeline = WanDMDPipeline.from_pretrained("builtin:miniature")
    refused(pipeline, "was trained for", prompt=PROMPT, guidance_scale=5.0)


def tiles(pipe):
    whole = pipe.vae.decode(latents := torch.randn(1, 16, 1, 12, 12))[0]
    pipe.vae.enable_tiling(128, 128, 96, 96)
    tiled = pipe.vae.decode(latents)[0]
    pipe.vae.disable_tiling()
    assert not torch.equal(whole, tiled)


def slicing(pipe):
    with pytest.warns(UserWarning, match="one by one"):
        pipe.disable_vae_slicing()


def xformers(pipe):
    pipe.enable_xformers_memory_efficient_attention()
    assert str(pipe.transformer.attention.config) == "sdpa"


def by_position(pipe):
    x, text = torch.randn(1, 16, 1, 4, 4), torch.randn(1, 3, pipe.transformer.config.text_dim)
    assert isinstance(pipe.transformer(x, torch.tensor([9.0]), text), torch.Tensor)
    assert (
        pipe.transformer(x, torch.tensor([9.0]), encoder_hidden_states=text).sample.shape == x.shape
    )


def exported(pipe, tmp_path):
    frames = np.full((1, 18, 22, 3), 0.5019, dtype=np.float32)  # 127.98 of 255
    read, info = read_video(export_to_video(frames, tmp_path / "a.mp4"))
    assert (info.height, info.width) == (18, 22)
    assert abs(read.mean() - 128) <= 1


def transparent(pipe):
    refused(load_image, "background=", image=Image.new("RGBA", (2, 2), (9, 9, 9, 0)))


def other_models(pipe):
    refused(WanImageToVideoPipeline, "not supported", image_encoder=object())
    image = Image.new("RGB", (128, 128))
    refused(WanImageToVideoPipeline.from_pipe(pipe), "last_image", image=image, last_image=image)


def image_latents(pipe):
    image = Image.new("RGB", (128, 128))
    video = WanImageToVideoPipeline.from_pipe(pipe)
    refused(lambda: video.prepare_latents(image, 1, 16, 128, 128, 5), "encode_image")


def part_alone(pipe):
    refused(lambda: pipe.transformer.enable_group_offload("cpu"), "pipeline")


def casting(pipe):
    refused(lambda: pipe.transformer.enable_layerwise_casting(), "quantize")


def caching(pipe):
    refused(lambda: pipe.transformer.enable_cache(None), "enable_cache")


def shared_dtype(pipe):
    half = WanPipeline.from_pretrained(TEACHER, torch_dtype=torch.bfloat16, vae=None)
    assert WanPipeline.from_pipe(half).dtype == torch.bfloat16


def half_a_model(pipe):
    half = load(vae=None)
    refused(lambda: half.save_pretrained("nowhere"), "vae=None")


def unread_negative(pipe):
    with pytest.warns(UserWarning, match="no effect without guidance"):
        pipe.plan(negative_prompt=True, guidance_scale=1.0)


def two_scales(pipe):
    parts = pipe.components | {"transformer_2": pipe.transformer}
    two = WanPipeline(**parts, boundary_ratio=0.9)
    plan = two.plan(guidance_scale=1.0, guidance_scale_2=3.0)
    assert (plan.guidance_scale, plan.guidance_scale_2, plan.guided) == (1.0, 3.0, True)


class DDIMScheduler:
    """What is read of another library's scheduler."""

    config: ClassVar = {"_class_name": "DDIMScheduler"}


def other_scheduler(pipe):
    refused(lambda: setattr(pipe, "scheduler", DDIMScheduler()), "DDIMScheduler is not supported")


def exponential(pipe):
    settings = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    for name in ("use_exponential_sigmas", "use_beta_sigmas"):
        refused(UniPCMultistepScheduler, name, **settings, **{name: True})


def misspelt_setting(pipe):
    config = pipe.scheduler.config
    refused(lambda: UniPCMultistepScheduler.from_config(config, flow_shft=3), "flow_shft")


def lora_file(pipe, path, diff=None):
    """A pair for one layer and, if asked for, a whole difference of a norm."""
    stem = "diffusion_model.blocks.0"
    width = pipe.config.transformer.width
    tensors = {f"{stem}.ffn.0.lora_A.weight": torch.full((1, width), 0.1)}
    tensors[f"{stem}.ffn.0.lora_B.weight"] = torch.full((pipe.config.transformer.ffn_dim, 1), 0.1)
    if diff is not None:
        tensors[f"{stem}.norm3.diff"] = torch.full((width,), diff)
    save_file(tensors, path)
    return path


def unfused(pipe, tmp_path):
    pipe.load_lora_weights(lora_file(pipe, tmp_path / "a.safetensors"), adapter_name="a")
    weight = pipe.transformer.blocks[0].ffn.up.weight
    with_adapter = weight.clone()
    pipe.fuse_lora(lora_scale=0.5)
    assert not torch.equal(weight, with_adapter)
    pipe.unfuse_lora()
    assert torch.equal(weight, with_adapter)
    pipe.unload_lora_weights()


def norms(pipe, tmp_path):
    before = pipe.transformer.blocks[0].cross_norm.weight.clone()
    pipe.load_lora_weights(lora_file(pipe, tmp_path / "a.safetensors", diff=0.25))
    assert torch.equal(pipe.transformer.blocks[0].cross_norm.weight, before + 0.25)
    pipe.unload_lora_weights()


def several_files(pipe, tmp_path):
    for name in ("a", "b"):
        lora_file(pipe, tmp_path / f"{name}.safetensors")
    refused(lambda: pipe.load_lora_weights(tmp_path), "a.safetensors, b.safetensors")


def layer_names(pipe):
    ours = our_name("transformer", "diffusers", "blocks.0.attn1.to_q.weight")
    assert ours == "blocks.0.self_attention.query.weight"
    assert ours in dict(pipe.transformer.named_parameters())


def unknown_adapter(pipe, tmp_path):
    pipe.load_lora_weights(lora_file(pipe, tmp_path / "a.safetensors"), adapter_name="a")
    refused(lambda: pipe.delete_adapters("b"), "unknown b")
    pipe.unload_lora_weights()


CHECKS = {
    "`torch_dtype` left out": left_out_dtype,
    "`torch_dtype=torch.float16`": lambda: refused(load, "too narrow", torch_dtype=torch.float16),
    "`safe_serialization=False`": pickles_written,
    "`use_safetensors=False`": lambda: refused(load, "only safetensors", use_safetensors=False),
    "`push_to_hub=True`": lambda pipe: refused(
        lambda: pipe.save_pretrained("nowhere", push_to_hub=True), "hf upload"
    ),
    '`device_map="balanced"`': lambda: refused(load, "offload=", device_map="balanced"),
    "`quantization_config=`": lambda: refused(
        load, 'quantize="int8"', quantization_config={"a": 1}
    ),
    "`low_cpu_mem_usage=False`": lambda: refused(load, "leave it out", low_cpu_mem_usage=False),
    "height, width, num_frames or steps left out": left_out_sizes,
    "a size that no video can have": lambda pipe: refused(
        pipe, "multiple of 32; nearest are 96 and 128", prompt=PROMPT, height=100
    ),
    "`encode_prompt` without `max_sequence_length`": left_out_length,
    "`pipe._guidance_scale` in a callback": scale_in_a_callback,
    "no generator on a GPU": no_generator,
    "`pipe.schedulr = ...`": misspelt,
    "a student, `WanDMDPipeline`": student,
    "`enable_vae_tiling`": tiles,
    "`disable_vae_slicing`": slicing,
    "`enable_xformers_memory_efficient_attention`": xformers,
    "`WanImageToVideoPipeline.prepare_latents(image, ..)`": image_latents,
    "`transformer.enable_group_offload`": part_alone,
    "`enable_layerwise_casting`": casting,
    "`transformer.enable_cache`": caching,
    "`from_pipe` without `torch_dtype`": shared_dtype,
    "`transformer(x, t, text)` by position": by_position,
    "`export_to_video`": exported,
    "`load_image` of a transparent picture": transparent,
    "`last_image=`, `image_encoder=`": other_models,
    "`save_pretrained` with a part that is None": half_a_model,
    "a negative prompt without guidance": unread_negative,
    "`guidance_scale=1, guidance_scale_2=3`": two_scales,
    "`pipe.scheduler = DDIMScheduler()`": other_scheduler,
    "`UniPCMultistepScheduler(use_exponential_sigmas=True)`": exponential,
    "`from_config(config, flow_shft=3)`": misspelt_setting,
    "`unfuse_lora` after `fuse_lora(lora_scale=0.5)`": unfused,
    "a LoRA that changes norms or tables": norms,
    "`load_lora_weights` of a folder with several files": several_files,
    "`pipe.transformer.blocks[0].attn1.to_q`": layer_names,
    "`delete_adapters` of an unknown name": unknown_adapter,
}


def rows() -> list[str]:
    """The first column of the table on the page."""
    section = PAGE.split("## Coming from diffusers")[1].split("\n## ")[0]
    return re.findall(r"^\| (.+?) \| ", section, flags=re.MULTILINE)[1:]


def test_every_row_is_checked():
    assert rows() == list(CHECKS)


@pytest.mark.parametrize("row", CHECKS, ids=lambda row: row.strip("`"))
def test_a_row_of_the_table(row, pipe, tmp_path):
    check = CHECKS[row]
    available = {"pipe": pipe, "tmp_path": tmp_path}
    names = check.__code__.co_varnames[: check.__code__.co_argcount]
    check(**{name: available[name] for name in names})
