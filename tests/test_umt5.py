"""UMT5: against transformers' UMT5EncoderModel, and what encode_text promises."""

import math
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from wan.errors import WanError
from wan.models.tokenizer import EOS_ID, Tokenizer
from wan.models.umt5 import UMT5Config, UMT5Encoder, encode_text, relative_position_buckets
from wan.weights.checkpoint import open_checkpoint
from wan.weights.load import load_module

TINY = UMT5Config(vocab_size=97, d_model=48, d_kv=8, d_ff=80, num_layers=3, num_heads=4)


def tiny_encoder() -> UMT5Encoder:
    torch.manual_seed(0)
    encoder = UMT5Encoder(TINY).eval().requires_grad_(False)
    for name, parameter in encoder.named_parameters():
        if name.endswith("norm.weight"):
            parameter.uniform_(0.5, 1.5)  # ones would hide a forgotten norm weight
    return encoder


def reference_model(encoder: UMT5Encoder) -> transformers.UMT5EncoderModel:
    """transformers' encoder with the same weights, renamed here by hand."""
    config = transformers.UMT5Config(**encoder.config.to_json())
    config.dropout_rate = 0.0
    config._attn_implementation = "eager"
    reference = transformers.UMT5EncoderModel(config).eval().requires_grad_(False)
    attention, ffn = "layer.0.SelfAttention", "layer.1.DenseReluDense"
    renamed = {
        "attention_norm": "layer.0.layer_norm",
        "ffn_norm": "layer.1.layer_norm",
        "attention.query": f"{attention}.q",
        "attention.key": f"{attention}.k",
        "attention.value": f"{attention}.v",
        "attention.out": f"{attention}.o",
        "attention.relative_bias": f"{attention}.relative_attention_bias",
        "ffn.gate": f"{ffn}.wi_0",
        "ffn.up": f"{ffn}.wi_1",
        "ffn.down": f"{ffn}.wo",
    }
    weights = encoder.state_dict()
    target = {"shared.weight": weights.pop("token_embedding.weight")}
    target["encoder.embed_tokens.weight"] = target["shared.weight"]
    target["encoder.final_layer_norm.weight"] = weights.pop("final_norm.weight")
    for name, tensor in weights.items():
        _, layer, ours = name.removesuffix(".weight").split(".", 2)
        target[f"encoder.block.{layer}.{renamed[ours]}.weight"] = tensor
    reference.load_state_dict(target)
    return reference


def relative_rms(ours: Tensor, reference: Tensor) -> float:
    difference = (ours.double() - reference.double()).pow(2).mean()
    return float((difference / reference.double().pow(2).mean()).sqrt())


@pytest.mark.parametrize("length", [1, 2, 9, 40, 300])
def test_encoder_equals_transformers(length):
    encoder = tiny_encoder()
    ids = torch.randint(TINY.vocab_size, (2, length))
    with torch.no_grad():
        expected = reference_model(encoder)(input_ids=ids).last_hidden_state
    assert relative_rms(encoder(ids), expected) <= 2e-6  # float32 rounding of another order of sums


def test_encoder_equals_transformers_with_a_mask():
    encoder = tiny_encoder()
    ids = torch.randint(TINY.vocab_size, (3, 24))
    mask = torch.arange(24) < torch.tensor([[24], [7], [1]])
    with torch.no_grad():
        expected = reference_model(encoder)(input_ids=ids, attention_mask=mask.long())
    ours = encoder(ids, mask)
    assert relative_rms(ours[mask], expected.last_hidden_state[mask]) <= 2e-6


def test_bfloat16_is_no_further_from_float32_than_transformers():
    encoder = tiny_encoder()
    reference = reference_model(encoder)
    ids = torch.randint(TINY.vocab_size, (4, 32))
    exact = encoder(ids)
    with torch.no_grad():
        theirs = reference.to(torch.bfloat16)(input_ids=ids).last_hidden_state
    ours = encoder.to(torch.bfloat16)(ids)
    assert ours.dtype == torch.bfloat16
    assert relative_rms(ours, exact) <= 1.2 * relative_rms(theirs, exact)


def test_the_mask_gives_what_the_real_tokens_alone_give():
    encoder = tiny_encoder()
    ids = torch.randint(TINY.vocab_size, (1, 20))
    mask = torch.arange(20)[None] < 6
    torch.testing.assert_close(encoder(ids, mask)[:, :6], encoder(ids[:, :6]), rtol=1e-5, atol=1e-5)


def test_a_row_without_real_tokens_stays_finite():
    out = tiny_encoder()(torch.zeros(1, 5, dtype=torch.long), torch.zeros(1, 5, dtype=torch.bool))
    assert out.isfinite().all()


def test_buckets_follow_the_published_ranges():
    buckets = relative_position_buckets(200, 32, 128)
    starts = {0: 0, 1: 1, 7: 7, 8: 8, 11: 8, 12: 9, 15: 9, 16: 10, 22: 10, 23: 11, 31: 11, 32: 12}
    starts |= {45: 12, 46: 13, 63: 13, 64: 14, 90: 14, 91: 15, 128: 15, 199: 15}
    for distance, bucket in starts.items():
        assert buckets[199, 199 - distance] == bucket
        assert distance == 0 or buckets[0, distance] == bucket + 16  # key after the query
    assert not (buckets == 16).any()


def test_scores_are_not_scaled():
    """With one head and bias zero, attention must be softmax(q k) v without 1/sqrt(d)."""
    encoder = tiny_encoder()
    attention = encoder.blocks[0].attention
    attention.relative_bias.weight.zero_()
    x = torch.randn(1, 5, TINY.d_model)
    q, k, v = (
        proj(x).unflatten(-1, (TINY.num_heads, TINY.d_kv)).transpose(1, 2)
        for proj in (attention.query, attention.key, attention.value)
    )
    expected = attention.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(-2))
    buckets = torch.zeros(5, 5, dtype=torch.long)
    torch.testing.assert_close(attention(x, buckets, None), expected)


def test_config_survives_the_released_json():
    released = {**UMT5Config().to_json(), "transformers_version": "4.48.0", "use_cache": True}
    assert UMT5Config.from_json(released) == UMT5Config()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t5"}, "model_type='t5'"),
        ({"feed_forward_proj": "relu"}, "feed_forward_proj='relu'"),
        ({"d_kv": None}, "lacks d_kv"),
        ({"relative_attention_num_buckets": 6}, "multiple of 4"),
    ],
)
def test_config_refuses_other_encoders(change, message):
    values = {k: v for k, v in {**UMT5Config().to_json(), **change}.items() if v is not None}
    with pytest.raises(WanError, match=message):
        UMT5Config.from_json(values)


def test_full_size_model_has_the_released_number_of_parameters():
    with torch.device("meta"):
        encoder = UMT5Encoder(UMT5Config())
    assert sum(p.numel() for p in encoder.parameters()) == 5_680_910_336
    assert len(encoder.state_dict()) == 242


# encode_text -------------------------------------------------------------------------------------


def letters(vocab_size: int = 60) -> Tokenizer:
    """A tokenizer with one id per character."""
    return Tokenizer(lambda text: [4 + ord(c) % (vocab_size - 4) for c in text], vocab_size)


def test_a_prompts_embedding_does_not_depend_on_its_batch():
    encoder, prompts = tiny_encoder(), ["a red circle", "a", "", "a blue star", "a red circle"]
    batch = encode_text(encoder, letters(), prompts, max_length=32)
    for row, prompt in zip(batch, prompts, strict=True):
        assert torch.equal(row, encode_text(encoder, letters(), [prompt], max_length=32)[0])


def test_rows_after_the_end_are_zero_and_the_empty_prompt_is_its_end_token():
    encoder = tiny_encoder()
    context = encode_text(encoder, letters(), ["", "abc"], max_length=8)
    assert context.shape == (2, 8, TINY.d_model)
    assert not context[0, 1:].any()
    assert not context[1, 4:].any()
    assert context[1, :4].abs().sum(-1).all()
    torch.testing.assert_close(context[0, :1], encoder(torch.tensor([[EOS_ID]]))[0])


def test_no_graph_is_kept_even_of_a_trainable_encoder():
    encoder = tiny_encoder().requires_grad_(True)
    assert not encode_text(encoder, letters(), ["abc"], 8).requires_grad
    assert encoder(torch.tensor([[5, 1]])).requires_grad


def test_prompts_are_cleaned_before_they_are_tokenised():
    encoder = tiny_encoder()
    messy, clean = encode_text(encoder, letters(), ["  a &amp;amp;\n b ", "a & b"], 16)
    assert torch.equal(messy, clean)


def test_a_long_prompt_is_cut_with_a_warning():
    encoder = tiny_encoder()
    with pytest.warns(UserWarning, match="has 21 tokens, the model reads the first 8"):
        cut = encode_text(encoder, letters(), ["a" * 20], max_length=8)
    torch.testing.assert_close(cut, encode_text(encoder, letters(), ["a" * 7], max_length=8))


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(WanError, match="same model"):
        encode_text(tiny_encoder(), letters(vocab_size=4000), ["~" * 3 + "é"], max_length=8)


def test_attention_is_sharp_enough_to_tell_orders_apart():
    """Position enters through the bias alone; without it the encoder would be a bag of words."""
    encoder = tiny_encoder()
    forward, backward = encoder(torch.tensor([[5, 6, 7]])), encoder(torch.tensor([[7, 6, 5]]))
    assert math.sqrt(float((forward[0, 0] - backward[0, 2]).pow(2).mean())) > 1e-3


@pytest.mark.parametrize("names", [("shared",), ("encoder.embed_tokens",), None], ids=str)
def test_the_embedding_that_transformers_reads_is_the_one_that_is_loaded(tmp_path, names):
    """transformers 5.0 saves untied embeddings under two names; the encoder reads one of them."""
    config = transformers.UMT5Config(**TINY.to_json())
    transformers.UMT5EncoderModel(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    both = {f"{name}.weight" for name in ("shared", "encoder.embed_tokens")}
    rows = {name: torch.randn(TINY.vocab_size, TINY.d_model) for name in sorted(both)}
    kept = {n: t for n, t in rows.items() if names is None or n.removesuffix(".weight") in names}
    kept |= {n: t for n, t in tensors.items() if n not in both}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    theirs = transformers.UMT5EncoderModel.from_pretrained(tmp_path).encoder.embed_tokens.weight
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they differ
        ours = load_module(lambda: UMT5Encoder(TINY), open_checkpoint(tmp_path), "text_encoder")
    assert torch.equal(ours.token_embedding.weight, theirs)
