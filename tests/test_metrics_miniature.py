"""Metrics have their textbook values, and see what they are there to see."""

import math
import random
from dataclasses import replace

import pytest
import torch

from wan.errors import WanError
from wan.miniature.captions import Caption, Stated, caption, sample_scene_for
from wan.miniature.detect import Detection, detect, score
from wan.miniature.metrics import (
    PARTS,
    Shown,
    clip_features,
    clip_measures,
    frechet_distance,
    kernel_distance,
    kernel_terms,
    seed_diversity,
    shown_by_clip,
    shown_by_scene,
)
from wan.miniature.world import NUM_FRAMES, Scene, SceneObject, in_split, render, sample_scene

MOVER = SceneObject("star", "green", "large", "right", 24.0, 46.0, 64.0, speed=2.0)
SAID = Caption("", (Stated("star", "green", "large", "right"),), "white")


def measures(item: SceneObject, said: Caption = SAID) -> dict[str, float | None]:
    seen = detect(render([Scene((item,), "white")])[0])
    return clip_measures(said, score(seen, said))


def test_the_motion_ratio_is_the_share_of_the_speed_and_nothing_for_what_stands_still():
    assert measures(MOVER)["motion_ratio"] == pytest.approx(1, abs=0.02)
    assert measures(replace(MOVER, speed=1.0))["motion_ratio"] == pytest.approx(0.5, abs=0.02)
    assert measures(replace(MOVER, motion="still", speed=0.0))["motion_ratio"] == 0
    resting = replace(SAID, objects=(Stated(motion="still"),))
    assert measures(replace(MOVER, motion="still", speed=0.0), resting)["motion_ratio"] is None


def test_a_missing_object_has_no_measures_and_two_are_averaged():
    nothing = Detection("white", ())
    assert set(clip_measures(SAID, score(nothing, SAID)).values()) == {None}
    fast, slow = replace(MOVER, y=30.0), replace(MOVER, y=95.0, speed=1.0, colour="red")
    said = replace(SAID, objects=SAID.objects + (Stated("star", "red", "large", "right"),))
    seen = detect(render([Scene((fast, slow), "white")])[0])
    assert clip_measures(said, score(seen, said))["motion_ratio"] == pytest.approx(0.75, abs=0.02)


def shown(*pairs) -> list[Shown]:
    return [Shown({"size": size}, place) for size, place in pairs]


def test_diversity_of_seeds_has_its_textbook_values():
    even = seed_diversity(shown(("small", (10.0, 10.0)), ("large", (110.0, 10.0))))
    assert even == {"entropy": pytest.approx(1), "cells": 2, "spread": pytest.approx(2**-0.5 * 100)}
    same = seed_diversity(shown(*[("small", (10.0, 10.0))] * 3))
    assert same == {"entropy": 0, "cells": 1, "spread": 0}
    three = seed_diversity(shown(("small", (1.0, 1.0)), ("small", (2.0, 2.0)), ("large", None)))
    assert three["entropy"] == pytest.approx(-(2 * math.log(2 / 3) + math.log(1 / 3)) / math.log(8))


def test_what_cannot_be_told_never_looks_diverse():
    place = (10.0, 10.0)
    told = shown(("small", place), ("small", place), ("large", (90.0, 90.0)))
    untold = shown(("small", place), ("small", place), (None, None))
    assert seed_diversity(told)["entropy"] > seed_diversity(untold)["entropy"] == 0
    assert seed_diversity(shown((None, None), (None, None))) == {
        "entropy": 0,
        "cells": 0,
        "spread": 0,
    }
    assert seed_diversity([Shown({}, place)])["entropy"] is None


def test_clips_and_scenes_show_the_same():
    rng = random.Random(3)
    scene = sample_scene(rng, "train", 1)
    said = replace(caption(scene, rng, omit=0.0), background=None)
    said = replace(said, objects=(replace(said.objects[0], motion=None, size=None),))
    true = shown_by_scene(said, scene, NUM_FRAMES)
    seen = detect(render([scene])[0])
    read = shown_by_clip(said, seen, score(seen, said))
    assert set(read.unsaid) == {"size", "motion", "background"}
    assert read.unsaid == true.unsaid
    assert read.place == pytest.approx(true.place, abs=0.5)
    with pytest.raises(WanError, match="one object"):
        shown_by_scene(replace(said, objects=said.objects * 2), scene, NUM_FRAMES)


@pytest.mark.parametrize("num_objects", [1, 2])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_scenes_for_a_caption_fulfil_it_and_vary_in_the_rest(num_objects, split):
    rng = random.Random(0)
    varied = set()
    for _ in range(20):
        said = caption(sample_scene(rng, split, num_objects), rng, omit=0.5)
        scene = sample_scene_for(said, rng, split)
        assert said.background in (None, scene.background)
        for stated, item in zip(said.objects, scene.objects, strict=True):
            kind = (item.shape, item.colour, item.size, item.motion)
            assert in_split(kind, split)
            wanted = (stated.shape, stated.colour, stated.size, stated.motion)
            assert all(w in (None, k) for w, k in zip(wanted, kind, strict=True))
            if stated.size is None:
                varied.add(item.size)
    assert varied == {"small", "large"}


def test_impossible_scenes_are_refused():
    rng = random.Random(0)
    with pytest.raises(WanError, match="no object"):
        sample_scene_for(Caption("", (Stated("heart"),), None), rng)
    twin = Stated("star", "red")
    with pytest.raises(WanError, match="differ in shape or colour"):
        sample_scene_for(Caption("", (twin, twin), None), rng)


def test_the_frechet_distance_of_normal_samples_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(20000, 2, generator=generator, dtype=torch.float64)
    mix = torch.tensor([[2.0, 0.5], [0.0, 0.5]], dtype=torch.float64)
    clips = torch.randn(20000, 2, generator=generator, dtype=torch.float64) @ mix + 3
    values = torch.linalg.eigvalsh(mix.T @ mix)
    expected = 18 + (values + 1 - 2 * values.sqrt()).sum()
    assert frechet_distance(clips, truth) == pytest.approx(float(expected), rel=0.03)
    assert frechet_distance(truth, truth) == pytest.approx(0, abs=1e-6)


def test_the_kernel_distance_is_the_mean_over_pairs_and_has_no_bias():
    generator = torch.Generator().manual_seed(1)
    clips, truth = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)

    def kernel(a, b):
        return float((a @ b / 3 + 1) ** 3)

    total = 0.0
    for i in range(5):
        for j in range(5):
            if i != j:
                (xi, xj), (yi, yj) = ((side[i], side[j]) for side in (clips, truth))
                total += kernel(xi, xj) + kernel(yi, yj) - kernel(xi, yj) - kernel(xj, yi)
    assert float(kernel_distance(kernel_terms(clips, truth))) == pytest.approx(total / 20)

    draws = torch.randn(300, 2, 16, 3, generator=generator)
    same = torch.cat([kernel_distance(kernel_terms(a, b)) for a, b in draws])
    assert abs(float(same.mean())) < 3 * float(same.std()) / 300**0.5
    shifted = torch.cat([kernel_distance(kernel_terms(a + 1, b)) for a, b in draws])
    assert float(shifted.mean()) > 1


def test_captions_that_are_drawn_twice_are_not_paired_with_themselves():
    generator = torch.Generator().manual_seed(2)
    clips, truth = torch.randn(2, 6, 3, generator=generator)
    terms = kernel_terms(clips, truth)
    doubled = kernel_distance(terms, torch.full((1, 6), 2.0, dtype=torch.float64))
    assert float(doubled) == pytest.approx(float(kernel_distance(terms)))


@pytest.fixture(scope="module")
def worlds() -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets of clips of the same 24 captions: (24, 3, 17, 64, 64) each."""
    rng = random.Random(0)
    scenes = [sample_scene(rng, "any", 1) for _ in range(24)]
    said = [caption(scene, rng, omit=0.0) for scene in scenes]
    others = [sample_scene_for(one, rng) for one in said]
    one, other = (render(side, height=64, width=64) for side in (scenes, others))
    return one, other


def distances(clips: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    ours, theirs = (torch.stack([clip_features(v) for v in side]) for side in (clips, truth))
    return {
        part: float(kernel_distance(kernel_terms(ours[:, columns], theirs[:, columns])))
        for part, columns in PARTS.items()
    }


def test_features_see_how_things_move_and_how_they_look(worlds):
    clips, truth = worlds
    floor = distances(clips, truth)
    assert abs(floor["all"]) < 0.1
    standing = distances(clips[:, :, :1].expand_as(clips), truth)
    assert standing["all"] > 1
    assert standing["motion"] > 1 > 10 * abs(standing["appearance"] - floor["appearance"])
    dull = distances(clips * 0.8, truth)
    assert dull["all"] > 5 * abs(floor["all"]) + 0.1
    assert dull["appearance"] > 5 * abs(floor["appearance"]) + 0.1
    assert torch.equal(clip_features(clips[0]), clip_features(clips[0]))
