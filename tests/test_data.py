import random

import numpy as np
import pytest
import torch

from train.data import LatentCache, folder_cache, read_clip, world_cache
from wan.errors import WanError
from wan.vae import VAEConfig, WanVAE
from wan.video import write_video

TINY = VAEConfig(
    base_dim=4,
    decoder_base_dim=4,
    z_dim=2,
    dim_mult=(1, 2, 2),
    num_res_blocks=1,
    temperal_downsample=(True, True),
    patch_size=4,
    in_channels=48,
    out_channels=48,
)


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    torch.manual_seed(0)
    return WanVAE(TINY).eval()


def numbered(count: int) -> LatentCache:
    latents = torch.arange(count, dtype=torch.float16).view(count, 1, 1, 1, 1)
    return LatentCache(latents, lambda index, rng: f"clip {index}")


def test_every_epoch_shows_each_clip_once_and_in_another_order():
    cache = numbered(12)
    batches = [cache.batch(step, 4, seed=0) for step in range(6)]
    order = torch.cat([latents.flatten() for latents, _ in batches]).int().tolist()
    assert sorted(order[:12]) == sorted(order[12:]) == list(range(12))
    assert order[:12] != order[12:]
    latents, captions = batches[2]
    assert captions == [f"clip {int(x)}" for x in latents.flatten()]


def test_a_batch_is_a_function_of_its_step_alone():
    one, two = numbered(10), numbered(10)
    one.batch(0, 4, seed=1)
    assert torch.equal(one.batch(7, 4, seed=1)[0], two.batch(7, 4, seed=1)[0])


def test_the_world_is_encoded_once_and_said_in_many_ways(vae, tmp_path):
    cache = world_cache(vae, tmp_path, num_clips=3, seed=5)
    assert cache.latents.shape == (3, 2, 5, 8, 8)
    assert len({cache.caption_of(0, random.Random(i)) for i in range(8)}) > 1
    (shard,) = tmp_path.glob("world-*/latents-*.safetensors")
    written = shard.stat().st_mtime_ns
    again = world_cache(vae, tmp_path, num_clips=3, seed=5)
    assert shard.stat().st_mtime_ns == written
    assert torch.equal(again.latents, cache.latents)


def test_another_autoencoder_finds_another_cache(vae, tmp_path):
    world_cache(vae, tmp_path, num_clips=1, seed=0)
    torch.manual_seed(1)
    world_cache(WanVAE(TINY).eval(), tmp_path, num_clips=1, seed=0)
    assert len(list(tmp_path.glob("world-*"))) == 2


def test_a_cache_that_was_not_finished_is_written_anew(vae, tmp_path):
    world_cache(vae, tmp_path, num_clips=1, seed=0)
    (listing,) = tmp_path.glob("world-*/clips.jsonl")
    listing.unlink()
    assert len(world_cache(vae, tmp_path, num_clips=1, seed=0)) == 1
    assert listing.exists()


def make_clip(path, frames=5, fps=8.0, size=(64, 96), caption="a gray wall"):
    video = np.full((frames, *size, 3), 128, dtype=np.uint8)
    video[:, :, size[1] // 2 :] = 200
    write_video(path, video, fps)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def test_clips_of_a_folder_are_cropped_to_size_and_keep_their_captions(vae, tmp_path):
    make_clip(tmp_path / "a.mp4")
    clip = read_clip(tmp_path / "a.mp4", 5, 32, 32, 8.0)
    assert clip.shape == (3, 5, 32, 32)
    assert (
        clip[:, :, :, :12].mean() < clip[:, :, :, -12:].mean() - 0.3
    )  # both halves are in the crop
    cache = folder_cache(vae, tmp_path, tmp_path / "cache", 5, 32, 32, 8.0)
    assert cache.latents.shape == (1, 2, 2, 2, 2)
    assert cache.batch(0, 2, seed=0)[1] == ["a gray wall", "a gray wall"]


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ({"caption": None}, "caption is missing"),
        ({"frames": 3}, "3 frames"),
        ({"fps": 25.0}, "25 fps, data.fps=8"),
    ],
)
def test_clips_that_do_not_fit_are_refused_by_name(vae, tmp_path, clip, message):
    make_clip(tmp_path / "a.mp4", **clip)
    with pytest.raises(WanError, match=message) as error:
        folder_cache(vae, tmp_path, tmp_path / "cache", 5, 32, 32, 8.0)
    assert "a.mp4" in str(error.value)


def test_a_folder_without_clips_is_refused(vae, tmp_path):
    with pytest.raises(WanError, match=r"no \.mp4 files"):
        folder_cache(vae, tmp_path, tmp_path / "cache", 5, 32, 32, 8.0)
