"""The prompt's embedding as trainers compute it: tokenizer and text encoder called by hand."""

import torch
from wan import WanPipeline
from wan import AutoTokenizer, UMT5EncoderModel

model_id = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
tokenizer = AutoTokenizer.from_pretrained(model_id, subfolder="tokenizer")
text_encoder = UMT5EncoderModel.from_pretrained(
    model_id, subfolder="text_encoder", torch_dtype=torch.float32
)
text_inputs = tokenizer(
    ["a small red circle", "a large green square moving right"],
    padding="max_length",
    max_length=32,
    truncation=True,
    add_special_tokens=True,
    return_attention_mask=True,
    return_tensors="pt",
)
ids, mask = text_inputs.input_ids, text_inputs.attention_mask
seq_lens = mask.gt(0).sum(dim=1).long()
with torch.no_grad():
    prompt_embeds = text_encoder(ids, mask).last_hidden_state
prompt_embeds = [u[:v] for u, v in zip(prompt_embeds, seq_lens)]
prompt_embeds = torch.stack(
    [torch.cat([u, u.new_zeros(32 - u.size(0), u.size(1))]) for u in prompt_embeds], dim=0
)

pipe = WanPipeline.from_pretrained(
    model_id, text_encoder=text_encoder, tokenizer=tokenizer, torch_dtype=torch.float32
)
result = pipe(
    prompt_embeds=prompt_embeds,
    height=128,
    width=128,
    num_frames=5,
    num_inference_steps=2,
    guidance_scale=1.0,
    generator=torch.manual_seed(2),
    output_type="latent",
).frames
