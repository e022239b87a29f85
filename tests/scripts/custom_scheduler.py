"""Another shift for UniPC, and another scheduler, made from the configuration of the first."""

import torch

from wan import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline

pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.2-TI2V-5B-Diffusers", torch_dtype=torch.float32)
flow_shift = 3.0  # 5.0 for 720P, 3.0 for 480P
call = dict(prompt="a small green square", height=128, width=128, num_frames=5)
call |= dict(num_inference_steps=4, guidance_scale=5.0, output_type="latent")

pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=flow_shift)
torch.manual_seed(0)
unipc = pipe(**call).frames

pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=flow_shift)
torch.manual_seed(0)
euler = pipe(**call).frames
result = torch.stack([unipc, euler])
