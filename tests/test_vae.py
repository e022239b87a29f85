"""The autoencoder: what the maths promises, and equality with diffusers."""

from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan

from wan.errors import WanError
from wan.models.vae import VAEConfig, WanVAE, decode_tiled, patchify, unpatchify
from wan.models.vae_layers import Conv3d, DoublingConv2d
from wan.weights.keys import VAELevels, released_name

WAN22 = VAEConfig(base_dim=8, decoder_base_dim=12, z_dim=6)
WAN22.latents_mean, WAN22.latents_std = (0.1,) * 6, (1.3,) * 6
WAN21 = VAEConfig(
    base_dim=8,
    decoder_base_dim=None,
    z_dim=4,
    is_residual=False,
    patch_size=None,
    in_channels=3,
    out_channels=3,
)
GENERATIONS = pytest.mark.parametrize("config", [WAN22, WAN21], ids=["2.2", "2.1"])
# Sums in another order: values near 1, float32
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


def build(config: VAEConfig) -> WanVAE:
    torch.manual_seed(0)
    return WanVAE(config).eval()


def clip(config: VAEConfig, frames: int = 17) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    side = 2 * config.spatial_stride
    return torch.rand(1, 3, frames, side, side, generator=generator) * 2 - 1


@GENERATIONS
@torch.no_grad()
def test_encode_and_decode_equal_diffusers(config):
    vae = build(config)
    settings = {
        k: v for k, v in config.to_json().items() if k not in ("_class_name", "clip_output")
    }
    if not config.latents_mean:
        settings |= {"latents_mean": [0.0] * config.z_dim, "latents_std": [1.0] * config.z_dim}
    oracle = AutoencoderKLWan(**settings).eval()
    levels = VAELevels(config.is_residual, config.num_res_blocks)
    oracle.load_state_dict(
        {released_name("vae", "diffusers", k, levels): v for k, v in vae.state_dict().items()}
    )
    video = clip(config)
    mean, std = vae.latent_statistics(video.device)
    latents = (oracle.encode(video).latent_dist.mode() - mean) / std
    torch.testing.assert_close(vae.encode_normalized(video), latents, **ROUNDING)
    torch.testing.assert_close(
        vae.decode_normalized(latents), oracle.decode(latents * std + mean).sample, **ROUNDING
    )


@GENERATIONS
@pytest.mark.parametrize("chunk", [4, 8, 16])
@torch.no_grad()
def test_encoding_does_not_depend_on_the_chunks(config, chunk):
    vae, video = build(config), clip(config)
    torch.testing.assert_close(
        vae.encode_normalized(video, chunk), vae.encode_normalized(video, None), **ROUNDING
    )


@GENERATIONS
@pytest.mark.parametrize("chunk", [1, 2, 3, 4])
@torch.no_grad()
def test_decoding_does_not_depend_on_the_chunks(config, chunk):
    vae = build(config)
    latents = torch.randn(1, config.z_dim, 5, 2, 2, generator=torch.Generator().manual_seed(2))
    whole = vae.decode_normalized(latents, None)
    assert whole.shape[2] == 17
    torch.testing.assert_close(vae.decode_normalized(latents, chunk), whole, **ROUNDING)


@GENERATIONS
@torch.no_grad()
def test_a_later_latent_never_changes_an_earlier_frame(config):
    vae = build(config)
    latents = torch.randn(1, config.z_dim, 4, 2, 2, generator=torch.Generator().manual_seed(3))
    changed = latents.clone()
    changed[:, :, -1] += 1
    before, after = vae.decode_normalized(latents, 1), vae.decode_normalized(changed, 1)
    assert torch.equal(before[:, :, :9], after[:, :, :9])
    assert not torch.equal(before[:, :, 9:], after[:, :, 9:])


@GENERATIONS
def test_whole_clip_training_pass_reaches_every_parameter(config):
    vae = build(config)
    moments = vae.encode_moments(clip(config))
    vae.decode_normalized(moments.chunk(2, dim=1)[0], None).square().sum().backward()
    idle = [n for n, p in vae.named_parameters() if p.grad is None]
    assert idle == []


@pytest.mark.parametrize("size", [1, 2, 4])
def test_patches_put_columns_before_rows(size):
    video = torch.arange(2 * 3 * 2 * 8 * 8).reshape(2, 3, 2, 8, 8)
    patches = patchify(video, size)
    assert torch.equal(unpatchify(patches, size), video)
    if size == 2:  # channel = colour * 4 + column * 2 + row
        assert torch.equal(patches[:, 1], video[:, 0, :, 1::2, 0::2])
        assert torch.equal(patches[:, 2], video[:, 0, :, 0::2, 1::2])


def test_stride_follows_from_the_config():
    assert (WAN22.spatial_stride, WAN22.temporal_stride) == (16, 4)
    assert (WAN21.spatial_stride, WAN21.temporal_stride) == (8, 4)


@torch.no_grad()
def test_tiles_that_cover_everything_give_the_plain_result():
    vae = build(WAN22)
    latents = torch.randn(1, 6, 2, 4, 4, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(
        decode_tiled(vae, latents, tile=4, overlap=1), vae.decode_normalized(latents)
    )


def stub(decode) -> SimpleNamespace:
    """What tiles need of an autoencoder with 2 x 2 pixels per latent."""
    return SimpleNamespace(config=SimpleNamespace(spatial_stride=2), decode_normalized=decode)


@pytest.mark.parametrize("size", [(6, 6), (10, 6), (11, 17), (3, 8)])
@pytest.mark.parametrize("overlap", [0, 1, 2, 5])
def test_tiles_of_a_decoder_that_sees_no_neighbours_give_the_whole_frame(size, overlap):
    def decode(latents, chunk_latents):
        return latents.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)

    latents = torch.randn(1, 3, 2, *size, generator=torch.Generator().manual_seed(5))
    tiled = decode_tiled(stub(decode), latents, tile=6, overlap=overlap)
    torch.testing.assert_close(tiled, decode(latents, None))


def test_tiles_fade_into_each_other():
    levels = iter((0.0, 1.0, 2.0, 3.0))  # two rows of two tiles

    def decode(latents, chunk_latents):
        return torch.full((1, 3, 1, 12, 12), next(levels))

    tiled = decode_tiled(stub(decode), torch.zeros(1, 3, 1, 10, 10), tile=6, overlap=2)
    fade = torch.tensor([0.0] * 8 + [0.2, 0.4, 0.6, 0.8] + [1.0] * 8)  # share of the second
    torch.testing.assert_close(tiled[0, 0, 0], 2 * fade[:, None] + fade)


@torch.no_grad()
def test_tiles_come_in_the_dtype_of_the_whole_frame():
    vae, latents = build(WAN22), torch.zeros(1, 6, 1, 2, 3)
    vae.decoder.bfloat16()
    vae.post_quant_conv.bfloat16()
    assert vae.decode_normalized(latents).dtype == torch.bfloat16
    assert decode_tiled(vae, latents, tile=2, overlap=1).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperal_downsample": (True,)}, "1 entries for 4 levels"),
        ({"in_channels": 3}, "patch_size=2 makes 12 channels"),
        ({"latents_mean": (0.0,)}, "z_dim is 48"),
        ({"latents_mean": None}, "latents_mean=None: must be a list"),
        ({"temperal_downsample": 3}, "temperal_downsample=3: must be a list"),
        ({"dim_mult": (1, 2, 4, 8)}, "average-down shortcut"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message):
    with pytest.raises(WanError, match=message):
        VAEConfig(**change)


def test_unknown_or_unsupported_settings_are_refused():
    values = WAN22.to_json()
    assert VAEConfig.from_json(values) == WAN22
    with pytest.raises(WanError, match="unknown setting colour"):
        VAEConfig.from_json({**values, "colour": 1})
    with pytest.raises(WanError, match="attn_scales"):
        VAEConfig.from_json({**values, "attn_scales": [0.5]})


def test_what_a_config_leaves_out_is_as_in_diffusers():
    # Wan2.1 folders were saved before the fields of 2.2 existed.
    short = {"_class_name": "AutoencoderKLWan", "base_dim": 8, "z_dim": 16, "num_res_blocks": 1}
    config, oracle = VAEConfig.from_json(short), AutoencoderKLWan.from_config(short)
    for name, value in asdict(config).items():
        expected = oracle.config[name]
        assert value == (tuple(expected) if isinstance(expected, list) else expected), name
    levels = VAELevels(config.is_residual, config.num_res_blocks)
    ours = {released_name("vae", "diffusers", n, levels) for n in WanVAE(config).state_dict()}
    assert ours == set(oracle.state_dict())
    with pytest.raises(WanError, match="z_dim=4 without latents_mean"):
        VAEConfig.from_json({**short, "z_dim": 4})
    with pytest.raises(WanError, match="z_dim=4 without latents_std"):
        VAEConfig.from_json({**short, "z_dim": 4, "latents_mean": [0.0] * 4})


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 16, 32, 32), "nearest are 13 and 17"),
        ((1, 3, 17, 30, 32), "multiples of 16"),
        ((1, 3, 17, 0, 32), "0x32 pixels: .* not 0"),
        ((1, 4, 17, 32, 32), "need \\(B, 3, F, H, W\\)"),
    ],
)
def test_clips_the_strides_do_not_divide_are_refused(shape, message):
    with pytest.raises(WanError, match=message):
        build(WAN22).encode_normalized(torch.zeros(shape))


def test_latents_and_chunks_out_of_range_are_refused():
    vae = build(WAN22)
    with pytest.raises(WanError, match="need \\(B, 6"):
        vae.decode_normalized(torch.zeros(1, 5, 2, 2, 2))
    with pytest.raises(WanError, match="none 0"):
        vae.decode_normalized(torch.zeros(1, 6, 0, 2, 2))
    with pytest.raises(WanError, match="chunk_latents=0"):
        vae.decode_normalized(torch.zeros(1, 6, 2, 2, 2), 0)
    with pytest.raises(WanError, match="multiple of 4"):
        vae.encode_normalized(clip(WAN22), 3)


@pytest.mark.parametrize(("kernel", "stride"), [((3, 3, 3), 1), ((3, 1, 1), (2, 1, 1))])
def test_both_libraries_of_convolutions_give_the_same_values_and_gradients(kernel, stride):
    layer = Conv3d(5, 6, kernel, stride=stride)
    results = []
    for enabled in (True, False):
        x = torch.linspace(-1, 1, 5 * 7 * 6 * 6).reshape(1, 5, 7, 6, 6).requires_grad_()
        layer.zero_grad()
        with torch.backends.mkldnn.flags(enabled=enabled):
            y = layer(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, layer.weight.grad.clone(), layer.bias.grad.clone()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 3)])
def test_four_small_kernels_give_what_one_gives_on_doubled_pixels(size):
    torch.manual_seed(0)
    layer, x = DoublingConv2d(3, 5, 3, padding=1).double(), torch.randn(2, 3, *size).double()
    doubled = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    expected = F.conv2d(doubled, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-7)
    grads = [torch.autograd.grad(y.sum(), layer.weight)[0] for y in (layer(x), expected)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)
