"""The world draws what a scene says, keeps its promises about chance, and speaks its grammar."""

import itertools
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from wan.errors import WanError
from wan.miniature.captions import (
    ARTICLES,
    BACKGROUND_WORDS,
    COLOUR_WORDS,
    DIRECTIONS,
    NOUNS,
    OPENINGS,
    PREPOSITIONS,
    SIZE_WORDS,
    STANDALONE_MOTIONS,
    VERBS,
    caption,
    label_classes,
)
from wan.miniature.detect import rgb_to_lab
from wan.miniature.world import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    MOTIONS,
    RADIUS,
    SHAPES,
    STAGE,
    Scene,
    SceneObject,
    object_boxes,
    render,
    sample_scene,
    scene_rng,
    trajectory,
)


def still(shape: str, radius: float = 24.0, x: float = 64.0, y: float = 64.0) -> Scene:
    item = SceneObject(shape, "red", "large", "still", radius, x, y, speed=0.0)
    return Scene((item,), "black")


def lab(rgb: tuple[int, int, int]) -> torch.Tensor:
    return rgb_to_lab(torch.tensor(rgb) / 255)


def test_colours_are_far_from_backgrounds_and_from_each_other():
    for name, rgb in COLOURS.items():
        for behind in BACKGROUNDS.values():
            assert torch.dist(lab(rgb), lab(behind)) >= 30
        others = [other for key, other in COLOURS.items() if key != name]
        assert min(torch.dist(lab(rgb), lab(other)) for other in others) >= 40


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", 3.14159),
        ("square", 4 * 0.9**2),
        ("triangle", 3 * 3**0.5 / 4 * 1.2**2),
        ("star", 5 * 1.2 * 0.504 * 0.587785),  # ten triangles, sin 36 degrees
    ],
)
@pytest.mark.parametrize("radius", [14.0, 23.3])
def test_coverage_sums_to_the_area_and_centroid_of_the_shape(shape, area, radius):
    video = render([still(shape, radius, x=60.3, y=66.9)], num_frames=1)[0, 0, 0]
    low, high = video.min(), video.max()
    coverage = (video - low) / (high - low)
    assert coverage.sum() == pytest.approx(area * radius**2, rel=0.01)
    # all four shapes have their centre of mass at the position of the object
    grid = torch.arange(STAGE) + 0.5
    assert (coverage.sum(0) @ grid / coverage.sum()) == pytest.approx(60.3, abs=0.1)
    assert (coverage.sum(1) @ grid / coverage.sum()) == pytest.approx(66.9, abs=0.1)


@pytest.mark.parametrize("shape", SHAPES)
def test_object_boxes_are_tight(shape):
    scene = still(shape)
    image = render([scene], num_frames=1)[0, 0, 0]
    rows = (image > 0).any(1).nonzero().flatten()
    columns = (image > 0).any(0).nonzero().flatten()
    left, top, right, bottom = object_boxes(scene.objects[0], 1)[0]
    assert columns[0].item() == pytest.approx(left, abs=2.5)  # sharp points cover less than half
    assert columns[-1].item() + 1 == pytest.approx(right, abs=2.5)
    assert rows[0].item() == pytest.approx(top, abs=2.5)
    assert rows[-1].item() + 1 == pytest.approx(bottom, abs=2.5)


def test_a_larger_render_is_the_same_scene():
    scenes = [sample_scene(scene_rng(0, i)) for i in range(4)]
    large = render(scenes, num_frames=5, height=2 * STAGE, width=2 * STAGE)
    small = render(scenes, num_frames=5)
    pooled = torch.nn.functional.avg_pool3d(large, (1, 2, 2))
    assert (pooled - small).abs().mean() < 2e-3


def test_motions_move_as_named():
    for motion, (dx, dy) in {"left": (-32, 0), "right": (32, 0), "up": (0, -32)}.items():
        item = replace(still("star").objects[0], motion=motion, speed=2.0)
        (x0, y0), (x1, y1) = trajectory(item)[0], trajectory(item)[-1]
        assert (x1 - x0, y1 - y0) == pytest.approx((dx, dy))
    circling = replace(still("star").objects[0], motion="circling", speed=3.0, phase=1.0)
    path = trajectory(circling, 25)
    assert path[-1] == pytest.approx(path[0])  # one full turn
    across = (path[12][0] - path[0][0], path[12][1] - path[0][1])
    assert math.hypot(*across) == pytest.approx(2 * 3.0 * 24 / (2 * math.pi))


@pytest.mark.parametrize("split", ["train", "heldout", "any"])
@pytest.mark.parametrize("num_objects", [1, 2])
def test_scenes_stay_inside_apart_and_in_their_split(split, num_objects):
    for index in range(200):
        scene = sample_scene(scene_rng(1, index), split, num_objects)
        assert len(scene.objects) == num_objects
        boxes = [object_boxes(item) for item in scene.objects]
        for box in itertools.chain(*boxes):
            assert min(box) >= 0.99
            assert max(box) <= STAGE - 0.99
        for item in scene.objects:
            if split != "any":
                assert (item.triple in HELD_OUT) == (split == "heldout")
        if num_objects == 2:
            one, other = scene.objects
            assert (one.shape, one.colour) != (other.shape, other.colour)
            for a, b in zip(*boxes, strict=True):
                assert max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3]) >= 4


def test_held_out_triples_are_a_tenth_and_leave_every_value_in_training():
    assert len(HELD_OUT) == 14
    assert ("circle", "red", "right") not in HELD_OUT
    for position, values in enumerate((SHAPES, tuple(COLOURS), MOTIONS)):
        assert {triple[position] for triple in HELD_OUT} == set(values)


def test_factors_are_balanced():
    scenes = [sample_scene(scene_rng(2, i)) for i in range(3000)]
    assert sum(len(scene.objects) == 2 for scene in scenes) / 3000 == pytest.approx(0.4, abs=0.03)
    items = [item for scene in scenes for item in scene.objects]
    for name, values in (("shape", SHAPES), ("colour", tuple(COLOURS)), ("motion", MOTIONS)):
        share = Counter(getattr(item, name) for item in items)
        for value in values:  # held-out triples tilt the shares a little
            assert share[value] / len(items) == pytest.approx(1 / len(values), rel=0.2)


def test_a_scene_depends_on_its_seed_and_index_only():
    assert sample_scene(scene_rng(3, 7)) == sample_scene(scene_rng(3, 7))
    assert sample_scene(scene_rng(3, 7)) != sample_scene(scene_rng(4, 7))


def test_bad_requests_are_refused():
    rng = random.Random(0)
    with pytest.raises(WanError, match="train, heldout, any"):
        sample_scene(rng, split="test")
    with pytest.raises(WanError, match="1 or 2"):
        sample_scene(rng, num_objects=3)
    with pytest.raises(WanError, match="square"):
        render([still("star")], height=64, width=128)
    with pytest.raises(WanError, match="num_frames=81"):
        sample_scene(rng, num_frames=81)


def vocabulary() -> set[str]:
    """Every lower-case word that captions use."""
    tables = (NOUNS, COLOUR_WORDS, SIZE_WORDS, BACKGROUND_WORDS, DIRECTIONS, STANDALONE_MOTIONS)
    phrases = [phrase for table in tables for group in table.values() for phrase in group]
    phrases += [*VERBS, *ARTICLES, *PREPOSITIONS, *OPENINGS, "an", "and", "is", "background"]
    return {word for phrase in phrases for word in phrase.split()}


def test_captions_say_what_they_state():
    words = vocabulary()
    for index in range(500):
        rng = scene_rng(5, index)
        scene = sample_scene(rng)
        said = caption(scene, rng)
        text = said.text.lower().replace(",", "").rstrip(".")
        assert set(text.split()) <= words
        assert ("background" in text) == (said.background is not None)
        assert len(said.objects) == len(scene.objects)
        for stated in said.objects:
            fits = [
                all(value in (None, getattr(item, name)) for name, value in vars(stated).items())
                for item in scene.objects
            ]
            assert any(fits)
        for word in ("star", "triangle", "red", "green"):
            stated_words = {value for one in said.objects for value in vars(one).values()}
            assert (word in text.split()) == (word in stated_words)
        # every sentence of two objects that leaves one motion out leaves out the last
        assert [one.motion is None for one in said.objects] in ([False], [True], [False, True]) or (
            len({one.motion is None for one in said.objects}) == 1
        )


def test_omission_has_its_two_rates():
    counts: Counter = Counter()
    for index in range(2000):
        rng = scene_rng(6, index)
        said = caption(sample_scene(rng, num_objects=1), rng).objects[0]
        counts.update(name for name, value in vars(said).items() if value is None)
    assert counts["size"] / 2000 == pytest.approx(0.15, abs=0.03)
    assert counts["motion"] / 2000 == pytest.approx(0.15, abs=0.03)
    assert counts["colour"] / 2000 == pytest.approx(0.05, abs=0.02)
    assert counts["shape"] / 2000 == pytest.approx(0.05, abs=0.02)


def test_the_first_prompt_of_the_readme_is_a_sentence_of_the_grammar():
    item = SceneObject("circle", "red", "small", "right", RADIUS["small"], 40.0, 64.0, speed=2.0)
    rng = random.Random(0)
    texts = {caption(Scene((item,), "gray"), rng).text for _ in range(5000)}
    assert "a small red circle moving right on a gray background" in texts


def test_labels_index_their_classes():
    classes = label_classes()
    rng = scene_rng(8, 0)
    scene = sample_scene(rng, num_objects=2)
    drawn = caption(scene, rng, omit=0.0)
    for labels, stated in zip(drawn.labels(), drawn.objects, strict=True):
        assert labels.keys() == classes.keys()
        assert classes["count"][labels["count"]] == "2"
        assert classes["background"][labels["background"]] == scene.background
        assert classes["colour"][labels["colour"]] == stated.colour
    unsaid = caption(scene, rng, omit=1.0).labels()[0]
    assert classes["motion"][unsaid["motion"]] == "unspecified"
