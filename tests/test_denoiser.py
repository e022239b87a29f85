"""Guidance, experts and the clean first frame, with networks whose answer is known."""

import pytest
import torch

from wan.errors import WanError
from wan.models.dit import ContextCache, WanDiT
from wan.models.dit_config import DiTConfig
from wan.sampling.denoiser import Denoiser, Expert, num_text_tokens


class FakeNetwork:
    """Velocity = weight * x + mean of the prepared context + timestep per frame; logs its calls."""

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight
        self.calls: list[dict] = []
        self.prepared = 0

    def prepare_context(self, context: torch.Tensor, num_tokens: int) -> torch.Tensor:
        self.prepared += 1
        return context.mean()

    def __call__(self, latents, timestep, context, exact):
        call = {"latents": latents, "timestep": timestep, "context": context, "exact": exact}
        self.calls.append(call)
        frames = timestep if timestep.ndim == 2 else timestep[:, None]
        return self.weight * latents + context + frames[:, None, :, None, None] / 1000


def latents(batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 4, 3, 2, 2, generator=torch.Generator().manual_seed(seed))


def context(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None, None].expand(-1, 6, 5).clone()


def test_without_guidance_there_is_one_forward():
    network = FakeNetwork()
    x = latents()
    v = Denoiser(Expert(network), context(2.0))(x, 500)
    torch.testing.assert_close(v, x + 2.0 + 0.5)
    assert len(network.calls) == 1
    assert network.calls[0]["timestep"].tolist() == [500.0]


@pytest.mark.parametrize("scale", [0.0, 0.5, 5.0])
def test_guidance_extrapolates_from_the_negative_prompt(scale):
    network = FakeNetwork()
    x = latents()
    v = Denoiser(Expert(network, scale), context(2.0), context(-1.0))(x, 500)
    expected = (x - 1.0 + 0.5) + scale * 3.0
    torch.testing.assert_close(v, expected, rtol=1e-5, atol=1e-5)
    assert len(network.calls) == 2


def test_guidance_is_combined_in_float32_for_a_bfloat16_network():
    class Rounded(FakeNetwork):
        def __call__(self, *args, **options):
            return super().__call__(*args, **options).bfloat16()

    x = latents()
    v = Denoiser(Expert(Rounded(), 5.0), context(2.0), context(-1.0))(x, 500)
    conditional, unconditional = (x + 2.5).bfloat16().float(), (x - 0.5).bfloat16().float()
    assert v.dtype == torch.float32
    assert torch.equal(v, unconditional + 5.0 * (conditional - unconditional))


def test_text_is_prepared_once_per_prompt():
    network = FakeNetwork()
    denoiser = Denoiser(Expert(network, 5.0), context(2.0, 3.0), context(0.0, 0.0))
    for timestep in (900, 500, 100):
        denoiser(latents(2), timestep)
    assert network.prepared == 4
    assert len(network.calls) == 12


def test_experts_hand_over_at_the_boundary():
    high, low = FakeNetwork(1.0), FakeNetwork(2.0)
    moved = []
    denoiser = Denoiser(
        Expert(high, 4.0),
        context(2.0),
        context(0.0),
        low_noise=Expert(low, 3.0),
        boundary=0.875,
        before_expert=moved.append,
    )
    x = latents()
    for timestep, weight, scale in [(999, 1, 4), (875, 1, 4), (874, 2, 3), (10, 2, 3)]:
        v = denoiser(x, timestep)
        torch.testing.assert_close(v, weight * x + timestep / 1000 + scale * 2.0)
    assert [len(high.calls), len(low.calls)] == [4, 4]
    assert moved == [high, low]
    assert [high.prepared, low.prepared] == [2, 2]


def test_given_first_frame_is_seen_clean_at_timestep_zero():
    network = FakeNetwork()
    image = latents(seed=9)[:, :, :1]
    x = latents()
    denoiser = Denoiser(Expert(network, 3.0), context(1.0), context(0.0), image_latents=image)
    denoiser(x, 700)
    for call in network.calls:
        assert torch.equal(call["latents"][:, :, :1], image)
        assert torch.equal(call["latents"][:, :, 1:], x[:, :, 1:])
        assert call["timestep"].tolist() == [[0.0, 700.0, 700.0]]
    assert torch.equal(denoiser.impose_image(x)[:, :, :1], image)
    assert torch.equal(denoiser.impose_image(x)[:, :, 1:], x[:, :, 1:])


def test_prompts_can_be_replaced_between_steps():
    denoiser = Denoiser(Expert(FakeNetwork()), context(2.0))
    x = latents()
    denoiser(x, 500)
    denoiser.set_context(context(9.0), None)
    torch.testing.assert_close(denoiser(x, 500), x + 9.5)


def tiny_dit(seed: int = 0, dtype: torch.dtype = torch.float32) -> WanDiT:
    config = DiTConfig(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        ffn_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=5,
        freq_dim=16,
    )
    model = WanDiT(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model.to(dtype)


def test_each_sample_of_a_batch_is_what_it_is_alone():
    """Bit for bit with the real network, with guidance and a given first frame."""
    expert = Expert(tiny_dit(), 5.0)
    texts = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(1))
    images = latents(3, seed=2)[:, :, :1]
    x = latents(3)
    together = Denoiser(expert, texts, texts * 0, image_latents=images)(x, 640)
    for j in range(3):
        one = slice(j, j + 1)
        alone = Denoiser(expert, texts[one], texts[one] * 0, image_latents=images[one])
        assert torch.equal(together[one], alone(x[one], 640))


@pytest.mark.parametrize(
    ("used", "rows"), [(0, 6), (1, 6), (6, 6), (7, 14), (14, 14), (15, 20), (20, 20)]
)
def test_rows_to_tell_apart_are_those_before_the_zero_tail(used, rows):
    texts = torch.zeros(1, 20, 5)
    texts[:, :used] = torch.randn(used, 5)
    texts[:, : used // 2] = 0  # zero rows in front of others are no tail
    assert num_text_tokens(texts) == rows


class RowByRow(WanDiT):
    """The network without the short cut."""

    def prepare_context(self, context: torch.Tensor, num_tokens: int | None = None) -> ContextCache:
        return super().prepare_context(context)


@pytest.mark.parametrize("used", [0, 9, 400, 511, 512])
def test_padding_attended_at_once_is_padding_attended_row_by_row(used):
    """Embeddings that a caller gives may have any number of rows, and no zero tail at all."""
    model, reference = tiny_dit(), RowByRow(tiny_dit().config)
    reference.load_state_dict(model.state_dict())
    texts = torch.randn(2, 512, 5, generator=torch.Generator().manual_seed(1))
    texts[0, used:] = 0
    texts[1, 30:] = 0  # each sample by its own length
    x = latents(2)
    ours = Denoiser(Expert(model, 3.0), texts, texts.flip(0))(x, 640)
    expected = Denoiser(Expert(reference, 3.0), texts, texts.flip(0))(x, 640)
    # The softmax is summed in another order, 1e-6 after two layers with weights as wild as these,
    # and guidance of 3 adds up 3 + 2 such errors. One row miscounted among 512 would show as 1e-3.
    assert (ours - expected).norm() / expected.norm() < 1e-5


def test_the_network_is_spared_the_padding():
    seen = []

    class Watched(WanDiT):
        def prepare_context(self, context, num_tokens=None):
            cache = super().prepare_context(context, num_tokens)
            seen.extend(key.shape[2] for key, _ in cache.per_block)
            return cache

    texts = torch.zeros(2, 512, 5)
    texts[0, :9] = texts[1] = 1.0
    Denoiser(Expert(Watched(tiny_dit().config)), texts)(latents(2), 640)
    assert seen == [16, 16, 512, 512]  # two blocks each


def test_given_first_frame_equals_per_token_timesteps():
    """Frame 0 at timestep 0 is what the reference asks for with a timestep per token."""
    model = tiny_dit()
    texts = torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(1))
    image = latents(seed=2)[:, :, :1]
    x = latents()
    ours = Denoiser(Expert(model), texts, image_latents=image)(x, 640)
    per_token = torch.tensor([[0.0, 640.0, 640.0]])  # 2x2 latents are one token
    seen = torch.cat([image, x[:, :, 1:]], dim=2)
    with torch.no_grad():
        expected = model(seen, per_token, texts)
    torch.testing.assert_close(ours, expected)
    assert not torch.allclose(ours, Denoiser(Expert(model), texts)(x, 640), atol=1e-2)


def test_no_gradients_are_recorded():
    v = Denoiser(Expert(tiny_dit()), torch.zeros(1, 6, 5))(latents(), 640)
    assert not v.requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"boundary": 0.9}, "one expert"),
        ({"low_noise": Expert(FakeNetwork())}, "two experts"),
        ({"low_noise": Expert(FakeNetwork()), "boundary": 875.0}, "between 0 and 1"),
        ({"high_noise": Expert(FakeNetwork(), 5.0)}, "needs a negative context"),
        ({"high_noise": Expert(FakeNetwork(), float("nan"))}, "finite"),
        ({"negative_context": context(1.0, 2.0)}, "2 negative contexts for 1 prompts"),
    ],
)
def test_pieces_that_do_not_fit_are_refused(settings, message):
    arguments = {"high_noise": Expert(FakeNetwork()), "context": context(1.0)} | settings
    with pytest.raises(WanError, match=message):
        Denoiser(**arguments)


def test_another_batch_than_prompts_is_refused():
    with pytest.raises(WanError, match="2 latents for 1 prompts"):
        Denoiser(Expert(FakeNetwork()), context(1.0))(latents(2), 500)


def test_chosen_timesteps_attend_exactly():
    network = FakeNetwork()
    denoiser = Denoiser(Expert(network), context(2.0), exact_timesteps={1000.0, 522.0})
    for timestep in (1000.0, 757.0, 522.0):
        denoiser(latents(), timestep)
    assert [call["exact"] for call in network.calls] == [True, False, True]
