import random
from collections import Counter
from contextlib import contextmanager
from fractions import Fraction

import pytest
import torch

from configs.data import DataConfig
from train.data import FINEST, LatentCache, whole_shares, world_cache
from wan.errors import WanError
from wan.miniature.world import TWO_OBJECTS, sample_scene, scene_rng
from wan.models.vae import VAEConfig, WanVAE
from wan.weights.safetensors_file import write_tensors

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


def test_the_default_share_of_two_objects_is_the_worlds():
    assert DataConfig().two_objects == TWO_OBJECTS


def test_new_scenes_take_the_place_of_old_ones_after_their_passes(vae, tmp_path):
    cache = world_cache(vae, tmp_path, num_clips=4, seed=5, passes=2)  # four batches of two
    seen = [cache.batch(step, 2, seed=0)[0] for step in range(9)]
    first, second, third = (
        torch.stack(part).flatten(0, 1) for part in (seen[:4], seen[4:8], seen[8:])
    )
    stays = world_cache(vae, tmp_path, num_clips=4, seed=5)
    assert torch.equal(first, torch.cat([stays.batch(step, 2, seed=0)[0] for step in range(4)]))
    assert len(first.unique(dim=0)) == len(second.unique(dim=0)) == 4
    assert not (second[:, None] == first[None]).flatten(2).all(2).any()
    assert not (third[:, None] == second[None]).flatten(2).all(2).any()
    # Of several processes one renders what the others then read.
    turns = []

    @contextmanager
    def first():
        turns.append(len(list(tmp_path.iterdir())))
        yield

    shared = world_cache(vae, tmp_path, num_clips=4, seed=7, passes=1, first=first)
    for step in range(4):
        shared.batch(step, 2, seed=0)
    assert len(turns) == 1
    assert len(list(tmp_path.iterdir())) == turns[0] + 1
    # Whoever begins in the third generation, after a resume, gets the same; it is all on the disk.
    later = world_cache(vae, tmp_path, num_clips=4, seed=5, passes=2)
    assert torch.equal(later.batch(8, 2, seed=0)[0], seen[8])
    twice = world_cache(vae, tmp_path, num_clips=8, seed=5)  # the same endless list of scenes
    torch.testing.assert_close(twice.latents[4:], later.renewal.clips(1).latents)


def test_more_scenes_have_two_objects_if_asked(vae, tmp_path):
    for share, number in ((0.0, 1), (1.0, 2)):
        cache = world_cache(vae, tmp_path, num_clips=3, seed=0, two_objects=share)
        texts = [cache.caption_of(i, random.Random(0)) for i in range(3)]
        assert [1 + (" and " in text) for text in texts] == [number] * 3, texts


def test_another_autoencoder_finds_another_cache(vae, tmp_path):
    world_cache(vae, tmp_path, num_clips=1, seed=0)
    torch.manual_seed(1)
    world_cache(WanVAE(TINY).eval(), tmp_path, num_clips=1, seed=0)
    assert len(list(tmp_path.glob("world-*"))) == 2


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr("train.data.SHARD", 1)


def test_a_cache_that_was_not_finished_is_completed(vae, tmp_path, small_shards, capsys):
    whole = world_cache(vae, tmp_path, num_clips=3, seed=0).latents
    first, second, _ = sorted(tmp_path.glob("world-*/latents-*.safetensors"))
    written = first.stat().st_mtime_ns
    second.unlink()
    assert torch.equal(world_cache(vae, tmp_path, num_clips=3, seed=0).latents, whole)
    assert first.stat().st_mtime_ns == written
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: content[: len(content) // 2],
        lambda content: content.replace(b'"F16"', b'"I16"'),
        lambda content: content.replace(b'"latents"', b'"latentz"'),
        lambda content: b"",
    ],
    ids=["flipped", "cut", "another dtype", "another name", "empty"],
)
def test_a_damaged_shard_of_the_world_is_made_again(vae, tmp_path, small_shards, capsys, damage):
    whole = world_cache(vae, tmp_path, num_clips=2, seed=0).latents
    _, shard = sorted(tmp_path.glob("world-*/latents-*.safetensors"))
    sound = shard.read_bytes()
    shard.write_bytes(damage(sound))
    assert shard.read_bytes() != sound
    assert torch.equal(world_cache(vae, tmp_path, num_clips=2, seed=0).latents, whole)
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("warning")]
    assert shard.name in line
    assert "it is made again" in line
    assert shard.read_bytes() == sound


def test_a_shard_of_an_older_release_is_read(vae, tmp_path, capsys):
    whole = world_cache(vae, tmp_path, num_clips=2, seed=0).latents
    (shard,) = tmp_path.glob("world-*/latents-*.safetensors")
    write_tensors(shard, {"latents": whole})
    written = shard.stat().st_mtime_ns
    assert torch.equal(world_cache(vae, tmp_path, num_clips=2, seed=0).latents, whole)
    assert shard.stat().st_mtime_ns == written


def test_batches_hold_one_bucket_and_show_every_clip_equally_often():
    latents = [torch.full((1, 1, 1, width), float(i)) for i, width in enumerate([1] * 6 + [2] * 3)]
    cache = LatentCache(
        latents,
        lambda index, rng: str(index),
        shapes=[(1, 1, 1, 1), (1, 1, 1, 2)],
        buckets=[list(range(6)), [6, 7, 8]],
    )
    seen = Counter()
    widths = []
    for step in range(9):  # batches of 2: twice through all nine clips
        batch, captions = cache.batch(step, 2, seed=3)
        widths.append(batch.shape[-1])
        assert captions == [str(int(x)) for x in batch[..., 0].flatten()]
        seen.update(captions)
    assert set(seen.values()) == {2}
    assert sorted(widths) == [1] * 6 + [2] * 3
    assert widths != sorted(widths)
    again = LatentCache(latents, cache.caption_of, cache.shapes, cache.buckets)
    assert torch.equal(again.batch(8, 2, seed=3)[0], batch)


def test_a_bucket_that_no_clip_is_in_is_left_out():
    cache = LatentCache(
        torch.zeros(2, 1, 1, 1, 1), lambda i, rng: "", [(1,) * 4, (2,) * 4], [[], [0, 1]]
    )
    assert cache.batch(0, 2, seed=0)[0].shape == (2, 1, 1, 1, 1)


def of_folders(weights, counts=(6, 3), repeats=1, wide=()):
    """A cache of two folders; some of its clips are of another shape."""
    total = sum(counts)
    latents = [torch.full((1, 1, 1, 1 + (i in wide)), float(i)) for i in range(total)]
    buckets = [[n for n in range(total) if (n in wide) == is_wide] for is_wide in (False, True)]
    buckets[0] += [0] * (repeats - 1)
    return LatentCache(
        latents,
        lambda index, rng: str(index),
        shapes=[(1, 1, 1, 1), (1, 1, 1, 2)],
        buckets=buckets,
        captions=[*range(total), *[0] * (repeats - 1)],
        folder_of=[0] * counts[0] + [1] * counts[1],
        weights=weights,
    )


@pytest.mark.parametrize(("weights", "wide"), [([3, 1], ()), ([0.3, 0.1], ()), ([3, 1], (0, 1, 8))])
def test_folders_come_by_their_weights_and_each_shows_its_clips_equally_often(weights, wide):
    cache = of_folders(weights, wide=wide)
    steps = 24  # of 3 clips: 54 of the first folder and 18 of the second
    batches = [cache.batch(step, 3, seed=5) for step in range(steps)]
    seen = Counter(text for _, texts in batches for text in texts)
    assert {seen[str(i)] for i in range(6)} == {9}
    assert {seen[str(i)] for i in range(6, 9)} == {6}
    assert torch.equal(of_folders(weights, wide=wide).batch(7, 3, seed=5)[0], batches[7][0])
    mixed = [len({int(text) < 6 for text in texts}) for _, texts in batches]
    assert set(mixed) == {1, 2}  # folders are mixed within batches
    said = Counter(text for step in range(steps) for text in cache.prompts(step, 3, seed=5))
    assert said == seen if not wide else sum(said[str(i)] for i in range(6)) == 54


def test_a_size_with_fewer_clips_than_a_batch_is_named():
    cache = of_folders([3, 1], wide=(0, 1, 8))
    count = len(cache) - 3
    assert cache.repeats_in_batches(3) is None
    assert "batch_size=4: " in cache.repeats_in_batches(4)
    shapes = ["x".join(map(str, shape[1:])) for shape in cache.shapes]
    (few,) = [s for s, b in zip(shapes, cache.buckets, strict=True) if len(b) == 3]
    assert f"(3 of latents {few}, as" in cache.repeats_in_batches(4)
    assert f"{count} of latents" in cache.repeats_in_batches(count + 1)


def test_without_weights_several_folders_are_as_one():
    one = of_folders([])
    whole = LatentCache(one.latents, one.caption_of)
    for step in range(6):
        assert one.batch(step, 4, seed=2)[1] == whole.batch(step, 4, seed=2)[1]
        assert one.prompts(step, 4, seed=2) == whole.prompts(step, 4, seed=2)


def test_a_clip_that_is_repeated_comes_so_often_in_an_epoch_with_its_caption():
    cache = of_folders([1, 1], counts=(2, 4), repeats=3)
    seen = Counter(text for step in range(8) for text in cache.batch(step, 4, seed=0)[1])
    assert seen == {"0": 12, "1": 4} | dict.fromkeys("2345", 4)
    said = Counter(text for step in range(8) for text in cache.prompts(step, 4, seed=0))
    assert said == seen


def test_shares_of_large_folders_stay_small_numbers():
    shares = whole_shares([Fraction(3) * 9973 / 10007, Fraction(3) * 34 / 10007, Fraction(1)])
    assert sum(shares) <= FINEST + 1
    assert shares[0] / shares[2] == pytest.approx(3 * 9973 / 10007, rel=1e-3)
    assert whole_shares([Fraction(1, 4), Fraction(3, 4)]) == (1, 3)


def test_a_weight_of_a_folder_without_clips_is_refused():
    cache = LatentCache(
        torch.zeros(1, 1, 1, 1, 1),
        lambda i, rng: "",
        captions=[0, 1],
        folder_of=[0, 1],
        weights=[1, 1],
    )
    with pytest.raises(WanError, match="number 2 of them has no clips to train on"):
        cache.batch(0, 1, seed=0)
    assert len(cache.prompts(0, 2, seed=0)) == 2


def test_prompts_without_clips_come_in_epochs_too():
    cache = LatentCache(
        [], lambda index, rng: str(index), shapes=[(1, 2, 3, 4)], captions=[*range(6)]
    )
    texts = [text for step in range(3) for text in cache.prompts(step, 4, seed=0)]
    assert sorted(texts[:6]) == sorted(texts[6:]) == [str(i) for i in range(6)]
    with pytest.raises(WanError, match="prompts only"):
        cache.batch(0, 4, seed=0)


def test_the_order_of_batches_is_what_it_was():
    """Runs that are resumed with a later version must see what they would have seen."""
    latents, _ = numbered(7).batch(5, 3, seed=11)
    assert latents.flatten().int().tolist() == [6, 1, 3]
    rng = random.Random("11/5/0")
    drawn = LatentCache(latents, lambda index, rng: str(rng.random())).batch(5, 3, seed=11)[1]
    assert drawn[0] == str(rng.random())


def test_clips_with_a_circling_object_come_as_often_as_asked(vae, tmp_path):
    plain = world_cache(vae, tmp_path, num_clips=24, seed=1)
    cache = world_cache(vae, tmp_path, num_clips=24, seed=1, repeat_circling=3)
    assert len(cache) == len(plain) == 24
    counts = Counter(cache.buckets[0])
    assert set(counts) == set(range(24))
    assert set(counts.values()) == {1, 3}
    repeated = [index for index, count in counts.items() if count == 3]
    scenes = [sample_scene(scene_rng(1, i), split="train") for i in range(24)]
    assert repeated == [
        i for i, s in enumerate(scenes) if any(o.motion == "circling" for o in s.objects)
    ]
