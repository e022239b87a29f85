"""An image in front, at the size that keeps its proportions."""

import numpy as np
import torch

from wan import WanImageToVideoPipeline
from wan import load_image

model_id = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
pipe = WanImageToVideoPipeline.from_pretrained(model_id, torch_dtype=torch.float32)
image = load_image("cat.png")
max_area = 128 * 96
aspect_ratio = image.height / image.width
mod_value = pipe.vae.config.scale_factor_spatial * pipe.transformer.config.patch_size[1]
height = round(np.sqrt(max_area * aspect_ratio)) // mod_value * mod_value
width = round(np.sqrt(max_area / aspect_ratio)) // mod_value * mod_value
image = image.resize((width, height))

output = pipe(
    image=image,
    prompt="a large yellow circle moving left",
    negative_prompt="a square",
    height=height,
    width=width,
    num_frames=9,
    num_inference_steps=3,
    guidance_scale=2.5,
    generator=torch.Generator("cpu").manual_seed(42),
    output_type="np",
)
result = output["frames"][0]
