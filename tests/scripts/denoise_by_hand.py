"""The loop of a trainer's validation: parts loaded one by one, the scheduler stepped by hand."""

import torch

from wan import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

model_id = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
transformer = WanTransformer3DModel.from_pretrained(
    model_id, subfolder="transformer", torch_dtype=torch.float32
)
scheduler = UniPCMultistepScheduler.from_pretrained(model_id, subfolder="scheduler")
vae = AutoencoderKLWan.from_pretrained(model_id, subfolder="vae", torch_dtype=torch.float32)
pipe = WanPipeline.from_pretrained(
    model_id, transformer=transformer, scheduler=scheduler, vae=vae, torch_dtype=torch.float32
)
embeds, negative = pipe.encode_prompt("a small blue circle", "", max_sequence_length=64)
latents = pipe.prepare_latents(
    1,
    transformer.config.in_channels,
    128,
    128,
    5,
    torch.float32,
    torch.device("cpu"),
    torch.Generator().manual_seed(5),
)
scheduler.set_timesteps(4, device="cpu")
for t in scheduler.timesteps:
    timestep = t.expand(latents.shape[0])
    with torch.no_grad():
        noise_pred = transformer(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=embeds,
            return_dict=False,
        )[0]
        noise_uncond = transformer(latents, timestep, negative, return_dict=False)[0]
    noise_pred = noise_uncond + 2.0 * (noise_pred - noise_uncond)
    latents = scheduler.step(noise_pred, t, latents, return_dict=False)[0]
result = latents
