"""Parts by hand, a whole model saved with a variant, and loaded again."""

import torch

from wan import WanImageToVideoPipeline, WanPipeline

pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.2-TI2V-5B-Diffusers", torch_dtype=torch.float32)
pipe.save_pretrained("saved", variant="bf16", max_shard_size="200KB")
again = WanPipeline.from_pretrained(
    "saved",
    variant="bf16",
    dtype=torch.float32,
    use_safetensors=True,
    low_cpu_mem_usage=True,
    local_files_only=True,
)
built = WanPipeline(**again.components, expand_timesteps=True)
other = WanImageToVideoPipeline.from_pipe(built)
assert other.transformer is built.transformer
call = dict(prompt=["a star"], height=128, width=128, num_frames=5, num_inference_steps=2)
call |= dict(guidance_scale=1.0, num_videos_per_prompt=2, output_type="latent")
result = built(**call, generator=torch.Generator().manual_seed(0)).frames
