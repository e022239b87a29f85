"""A callback that turns guidance off after some steps, and one that stops the call."""

import torch

from wan import WanPipeline

pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.2-TI2V-5B-Diffusers", torch_dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
seen = []


def without_guidance(pipe, step_index, timestep, callback_kwargs):
    seen.append((step_index, int(timestep), pipe.guidance_scale, pipe.num_timesteps))
    if step_index == int(pipe.num_timesteps * 0.5):
        pipe._guidance_scale = 0.0
    callback_kwargs["latents"] = callback_kwargs["latents"] * 1.01
    return callback_kwargs


def stop(pipe, step_index, timestep, callback_kwargs):
    if step_index == 1:
        pipe._interrupt = True
    return callback_kwargs


call = dict(prompt="a red square", height=128, width=128, num_frames=5, num_inference_steps=4)
call |= dict(guidance_scale=3.0, output_type="latent", negative_prompt="blue")
changed = pipe(
    **call,
    generator=torch.Generator().manual_seed(3),
    callback_on_step_end=without_guidance,
    callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
).frames
stopped = pipe(**call, generator=torch.Generator().manual_seed(3), callback_on_step_end=stop).frames
assert [step for step, *_ in seen] == [0, 1, 2, 3]
assert [scale for _, _, scale, _ in seen] == [3.0, 3.0, 3.0, 0.0]
result = torch.stack([changed, stopped])
