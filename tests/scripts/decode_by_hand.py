"""Latents decoded by hand with the autoencoder's statistics, with tiling turned on."""

import torch

from wan import AutoencoderKLWan, WanPipeline

model_id = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
pipe = WanPipeline.from_pretrained(model_id, torch_dtype=torch.float32)
latents = pipe(
    "a large green star",
    height=128,
    width=128,
    num_frames=5,
    num_inference_steps=2,
    guidance_scale=5.0,
    generator=torch.manual_seed(1),
    output_type="latent",
    return_dict=False,
)[0]

vae = AutoencoderKLWan.from_pretrained(model_id, subfolder="vae", torch_dtype=torch.float32)
vae.enable_tiling()
vae.enable_slicing()
shape = (1, vae.config.z_dim, 1, 1, 1)
mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents.device, latents.dtype)
std = 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(latents.device, latents.dtype)
latents = latents.to(vae.dtype) / std + mean
with torch.no_grad():
    video = vae.decode(latents, return_dict=False)[0]
    again = vae.encode(video).latent_dist.mode()
result = torch.cat([video.flatten(), again.flatten()])
