"""The first script of a model's card: the autoencoder in float32, the rest as asked."""

import torch

from wan import AutoencoderKLWan, WanPipeline
from wan import export_to_video

model_id = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
vae = AutoencoderKLWan.from_pretrained(model_id, subfolder="vae", torch_dtype=torch.float32)
pipe = WanPipeline.from_pretrained(model_id, vae=vae, torch_dtype=torch.float32)
pipe.to("cpu")

prompt = "a large blue star moving up"
negative_prompt = "a small red circle"
output = pipe(
    prompt=prompt,
    negative_prompt=negative_prompt,
    height=128,
    width=128,
    num_frames=17,
    num_inference_steps=3,
    guidance_scale=3.0,
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(output, "t2v.mp4", fps=16)
result = output
