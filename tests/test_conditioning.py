"""What training reads of a model: texts are those that sampling encodes."""

import torch

from train.conditioning import CaptionEncoder, Texts, load_frozen
from wan.models.tokenizer import Tokenizer
from wan.models.umt5 import encode_text
from wan.weights.hub import STUDENT


def test_texts_are_encoded_as_sampling_encodes_them():
    cpu = torch.device("cpu")
    encoder = load_frozen(STUDENT, "text_encoder", None, cpu, torch.float32)
    tokenizer = Tokenizer.from_folder(STUDENT / "tokenizer")
    captions = ["a red circle", "", "a small blue star moving left on a gray background"]
    context, num_tokens = Texts(CaptionEncoder(encoder, tokenizer, 512), cpu)(captions)
    expected = encode_text(encoder, tokenizer, captions, 512)
    torch.testing.assert_close(context, expected, rtol=1e-4, atol=1e-5)
    assert not context[:, num_tokens:].any()
