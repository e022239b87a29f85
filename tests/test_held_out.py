"""Clips that training never sees, and the loss on them."""

from dataclasses import replace

import pytest
import torch

from train.data import CONTENT, LatentCache, Source, sources_of
from train.held_out import LEVELS, NOISE_SEED, held_out_loss, hold_out, said_of
from train.parallel import ALONE
from train.tensor_cache import key_of
from wan.errors import WanError

NAMES = ["a", "a", "b", "c", "c", "c", "d", "e"]  # of the videos of eight samples, in two buckets


def numbered(names=NAMES) -> LatentCache:
    count = len(names)
    return LatentCache(
        torch.arange(count, dtype=torch.float16).view(count, 1, 1, 1, 1),
        lambda number, rng: f"clip {number}",
        [(1, 1, 1, 1)] * 2,
        [list(range(3)), list(range(3, count))],
        sources=[Source(name) for name in names],
    )


def test_samples_captions_and_copies_of_a_video_have_one_source():
    lines = [
        {"clip": "a.mp4", "key": "1"},
        {"clip": "a.mp4", "key": "2"},  # the next chunk of it
        {"clip": "copy.mp4", "key": "1"},
        {"clip": "copy.mp4", "key": "2"},
        {"clip": "b.mp4", "key": "3"},
        {"clip": "b.mp4", "key": "3"},  # with another caption
    ]
    assert sources_of(lines) == [Source("a.mp4")] * 4 + [Source("b.mp4")] * 2


def test_a_video_is_known_by_its_content_and_not_by_its_name():
    lines = [
        {"clip": "1.mp4", "key": "1", CONTENT: "cat"},
        {"clip": "1.mp4", "key": "2", CONTENT: "dog"},  # of another folder
        {"clip": "all/1.mp4", "key": "3", CONTENT: "cat"},  # at another size
    ]
    cat, dog = Source("1.mp4", "cat"), Source("1.mp4", "dog")
    assert sources_of(lines) == [cat, dog, cat]
    cache = replace(numbered(NAMES[:3]), sources=[cat, dog, cat], buckets=[[0, 1], [2]])
    assert hold_out(cache, 1)[1] == [0, 2]
    older = {"clip": "1.mp4", "key": "4"}  # its content is not known: the name may be any of them
    assert len({*sources_of([*lines[:2], older])}) == 1


@pytest.mark.parametrize("count", [1, 2, 4])
def test_what_is_held_out_is_never_trained_on_and_a_video_stays_whole(count):
    cache = numbered()
    rest, held = hold_out(cache, count)
    seen = {int(x) for step in range(40) for x in rest.batch(step, 2, seed=0)[0].flatten()}
    assert seen == set(range(8)) - set(held)
    assert len({NAMES[number] for number in held}) == count
    assert not {NAMES[number] for number in held} & {NAMES[number] for number in seen}
    assert {int(x) for step in range(40) for x in cache.batch(step, 2, seed=0)[0].flatten()} == set(
        range(8)
    )


def test_which_clips_are_held_out_follows_from_names_alone():
    _, held = hold_out(numbered(), 2)
    _, turned = hold_out(numbered(NAMES[::-1]), 2)
    assert sorted(7 - number for number in turned) == held
    _, more = hold_out(numbered(), 3)
    assert set(held) < set(more)


def test_new_clips_move_none_that_was_trained_on_to_those_that_are_held_out():
    grown = numbered([*NAMES, *"fghijklmnop"])
    before = {NAMES[number] for number in hold_out(numbered(), 3)[1]}
    after = {grown.sources[number].name for number in hold_out(grown, 3)[1]}
    assert after & set(NAMES) < before  # some of the new ones took the place of others


def test_something_must_be_left_to_train_on():
    with pytest.raises(WanError, match=r"validation_clips=5: the data has 5 .* give 4 at most"):
        hold_out(numbered(), 5)


@pytest.mark.parametrize(
    ("names", "words"), [(["a", "a"], "has one clip only"), ([], "has prompts only")]
)
def test_data_with_nothing_to_hold_out_is_refused_in_words(names, words):
    cache = LatentCache(torch.zeros(2, 1, 1, 1, 1), str, sources=[Source(n) for n in names])
    with pytest.raises(WanError, match=words) as error:
        hold_out(cache, 1)
    assert "at most" not in str(error.value)


def test_no_folder_with_a_weight_is_held_out_as_a_whole():
    small = NAMES.index(sorted(set(NAMES), key=key_of)[0])  # the first to be held out
    alone = [int(name == NAMES[small]) for name in NAMES]
    cache = replace(numbered(), folder_of=alone, weights=[3.0, 1.0])
    with pytest.raises(WanError, match=r"=1: all clips of folder 2 of .* a weight of 1"):
        hold_out(cache, 1)
    rest, _ = hold_out(replace(cache, weights=[]), 1)
    with pytest.raises(WanError, match="number 2 of them has no clips to train on"):
        replace(rest, weights=[3.0, 1.0]).batch(0, 1, seed=0)


def test_one_line_says_what_is_held_out():
    _, held = hold_out(numbered(), 4)
    line = said_of(numbered(), held, most=2)
    assert line.startswith(f"held out for validation: 4 of 5 clips in {len(held)} samples: ")
    assert line.endswith(" and 2 more")


def test_the_loss_is_that_of_fixed_noises_at_fixed_levels():
    """Of a network that answers the same everywhere, it can be computed by hand."""
    latents = torch.randn(3, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    cache = LatentCache(
        latents, lambda number, rng: f"clip {number}", sources=[Source(name) for name in "abc"]
    )
    asked = []

    def network(x, timestep, context, num_tokens):
        asked.append((float(timestep) / 1000, context))
        return torch.full_like(x, 0.5)

    network.modules = lambda: ()
    texts = lambda captions: (captions, 8)  # noqa: E731
    found = [
        held_out_loss(network, texts, cache, [0, 2], False, ALONE, "val_loss") for _ in range(2)
    ]
    assert found[0] == found[1]
    assert (
        asked[:10]
        == asked[10:]
        == [(pytest.approx(level), [f"clip {number}"]) for number in (0, 2) for level in LEVELS]
    )
    expected = torch.zeros(2, len(LEVELS))
    for row, number in enumerate((0, 2)):
        generator = torch.Generator().manual_seed(NOISE_SEED + row)
        for column in range(len(LEVELS)):
            noise = torch.randn(2, 3, 4, 4, generator=generator)
            expected[row, column] = (0.5 - (noise - latents[number].float())).square().mean()
    names = ["val_loss", *(f"val_loss_sigma_{level}" for level in LEVELS)]
    assert list(found[0]) == names
    numbers = [float(expected.mean()), *expected.mean(0).tolist()]
    assert list(found[0].values()) == pytest.approx(numbers, rel=1e-5)
