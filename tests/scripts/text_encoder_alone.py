"""Encode the prompt first, free the text encoder, and run the rest without it."""

import gc

import torch

from wan import WanPipeline

model_id = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
pipe = WanPipeline.from_pretrained(model_id, transformer=None, vae=None, torch_dtype=torch.float32)
with torch.no_grad():
    prompt_embeds, negative_prompt_embeds = pipe.encode_prompt(
        prompt=["a small red circle", "a large blue square"],
        negative_prompt=["", ""],
        do_classifier_free_guidance=True,
        max_sequence_length=64,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
del pipe
gc.collect()

pipe = WanPipeline.from_pretrained(
    model_id, text_encoder=None, tokenizer=None, torch_dtype=torch.float32
)
result = pipe(
    prompt_embeds=prompt_embeds,
    negative_prompt_embeds=negative_prompt_embeds,
    height=128,
    width=128,
    num_frames=5,
    num_inference_steps=2,
    guidance_scale=4.0,
    generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
    output_type="pt",
)[0]
