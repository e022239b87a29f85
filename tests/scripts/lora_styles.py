"""A style LoRA at run time: two adapters, their weights, fused and taken away again."""

import torch

from wan import WanPipeline

pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.2-TI2V-5B-Diffusers", torch_dtype=torch.float32)
call = dict(prompt="a red star", height=128, width=128, num_frames=5, num_inference_steps=2)
call |= dict(guidance_scale=2.0, output_type="latent")


def run(**more):
    return pipe(**call, **more, generator=torch.Generator().manual_seed(0)).frames


plain = run()
pipe.load_lora_weights("style.safetensors", adapter_name="style")
pipe.load_lora_weights(".", weight_name="motion.safetensors", adapter_name="motion")
one = run()
pipe.set_adapters(["style", "motion"], [0.7, 1.2])
assert pipe.get_active_adapters() == ["style", "motion"]
both = run()
scaled = run(attention_kwargs={"scale": 0.5})
pipe.fuse_lora(lora_scale=0.9)
fused = run()
pipe.unfuse_lora()
pipe.delete_adapters("motion")
pipe.unload_lora_weights()
assert torch.allclose(run(), plain, atol=1e-5)
result = torch.stack([one, both, scaled, fused])
