"""The detectors read renders as they were drawn, and don't read what isn't there."""

import math
import random
from dataclasses import replace

import pytest
import torch

from wan.errors import WanError
from wan.miniature.captions import Caption, Stated, caption
from wan.miniature.detect import (
    Detection,
    accuracies,
    blur,
    detect,
    fit_motion,
    rgb_to_lab,
    score,
)
from wan.miniature.world import (
    COLOURS,
    MOTIONS,
    SHAPES,
    Scene,
    SceneObject,
    render,
    sample_scene,
    scene_rng,
)


@pytest.fixture(autouse=True)
def _one_thread():
    """Detectors are many small operations, which threads only slow down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def item(**factors) -> SceneObject:
    plain = SceneObject("star", "green", "large", "right", 24.0, 46.0, 64.0, speed=2.0)
    return replace(plain, **factors)


def detect_scene(*objects: SceneObject, background: str = "white") -> Detection:
    return detect(render([Scene(objects, background)])[0])


def accuracies_on_renders(num_clips, num_objects, seed, degrade=lambda video: video):
    """Accuracy of the detectors on clips of every kind, which show what their captions state."""
    scores = []
    for index in range(num_clips):
        scene = sample_scene(scene_rng(seed, index), "any", num_objects)
        stated = caption(scene, random.Random(0), omit=0.0)
        scores.append(score(detect(degrade(render([scene])[0])), stated))
    return accuracies(scores)


def blurred_and_noisy(sigma: float, noise: float):
    """Gaussian blur of `sigma` pixels, then noise, a share of the range from black to white."""
    generator = torch.Generator().manual_seed(0)

    def degrade(video: torch.Tensor) -> torch.Tensor:
        blurred = blur(video.flatten(0, 1), sigma).view_as(video)
        return blurred + 2 * noise * torch.randn(video.shape, generator=generator)

    return degrade


@pytest.mark.parametrize("num_objects", [1, 2])
def test_every_attribute_is_read_from_renders(num_objects):
    # none of 1,000 clips fails in a longer run
    assert min(accuracies_on_renders(25, num_objects, seed=1).values()) == 1


def test_blur_and_noise_are_tolerated():
    found = accuracies_on_renders(12, None, seed=2, degrade=blurred_and_noisy(1.0, 0.03))
    assert min(found.values()) == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_small_shapes_keep_their_names_when_corners_are_rounded(shape):
    video = render([Scene((item(shape=shape, size="small", radius=14.0),), "gray")])[0]
    soft = detect(blurred_and_noisy(2.5, 0.02)(video)).objects[0]
    assert (soft.shape, soft.size) == (shape, "small")
    assert soft.shape_iou > 0.9


def test_other_sizes_are_read_in_stage_pixels():
    scene = Scene((item(),), "white")
    small = detect(render([scene], height=96, width=96)[0]).objects[0]
    large = detect(render([scene], height=256, width=256)[0]).objects[0]
    assert small.radius == pytest.approx(24, rel=0.04)
    assert large.radius == pytest.approx(24, rel=0.02)
    assert (large.x, large.y) == pytest.approx((46 + 16, 64), abs=0.5)
    assert large.motion_ratio == pytest.approx(1, abs=0.02)


def test_bytes_and_floats_read_alike():
    video = render([sample_scene(scene_rng(0, 1))])[0]
    as_bytes = ((video + 1) * 127.5).round().to(torch.uint8)
    names = [(one.shape, one.colour, one.size, one.motion) for one in detect(video).objects]
    again = [(one.shape, one.colour, one.size, one.motion) for one in detect(as_bytes).objects]
    assert names == again


def test_a_wrong_statement_is_wrong_alone():
    scene = Scene((item(),), "white")
    detection = detect(render([scene])[0])
    truth = Stated("star", "green", "large", "right")
    for name, value in {
        "shape": "circle",
        "colour": "blue",
        "size": "small",
        "motion": "up",
    }.items():
        result = score(detection, Caption("", (replace(truth, **{name: value}),), "white"))
        wrong = [key for key, right in result.attributes.items() if not all(right)]
        assert wrong == [name]
        assert not result.joint
    result = score(detection, Caption("", (truth,), "brown"))
    assert result.attributes["background"] == (False,)
    assert not result.joint


def test_unstated_attributes_are_not_scored():
    detection = detect_scene(item())
    result = score(detection, Caption("", (Stated(colour="green"),), None))
    assert result.attributes == {"count": (True,), "colour": (True,)}
    assert result.joint


def test_two_objects_are_matched_in_any_order_but_attributes_stay_bound():
    one = item(y=32.0)
    other = item(shape="circle", colour="blue", motion="left", x=80.0, y=96.0)
    detection = detect_scene(one, other)
    first = Stated("star", "green", "large", "right")
    second = Stated("circle", "blue", "large", "left")
    assert score(detection, Caption("", (first, second), "white")).joint
    assert score(detection, Caption("", (second, first), "white")).joint
    swapped = (replace(first, colour="blue"), replace(second, colour="green"))
    result = score(detection, Caption("", swapped, "white"))
    assert result.attributes["colour"] == (False, False)
    assert result.attributes["shape"] == (True, True)


def test_a_missing_or_a_further_object_fails_the_count():
    stated = Stated("star", "green", "large", "right")
    alone = detect_scene(item())
    result = score(alone, Caption("", (stated, stated), "white"))
    assert result.attributes["count"] == (False,)
    assert sorted(result.attributes["shape"]) == [False, True]
    pair = detect_scene(item(y=32.0), item(y=96.0))
    result = score(pair, Caption("", (stated,), "white"))
    assert result.attributes["count"] == (False,)
    assert result.attributes["shape"] == (True,)


@pytest.mark.parametrize("motion", ["still", "right"])
def test_touching_objects_are_split_by_colour(motion):
    radius = 14.0
    left = item(shape="square", motion=motion, radius=radius, x=40.0)
    right = item(shape="square", motion=motion, radius=radius, x=40.0 + 1.8 * radius, colour="red")
    detection = detect_scene(left, right)
    assert detection.count == 2
    assert {one.colour for one in detection.objects} == {"green", "red"}
    assert {one.shape for one in detection.objects} == {"square"}
    assert {one.motion for one in detection.objects} == {motion}


def test_an_empty_stage_has_no_objects():
    detection = detect_scene()
    assert detection.count == 0
    assert detection.background == "white"
    result = score(detection, Caption("", (Stated(shape="star"),), "white"))
    assert result.attributes == {"count": (False,), "background": (True,), "shape": (False,)}


def test_an_object_that_comes_and_goes_is_not_counted():
    video = render([Scene((item(motion="still", speed=0.0),), "white")])[0]
    video[:, 11:] = video[:, :1, :1, :1]
    assert detect(video).objects[0].permanence == pytest.approx(11 / 17)
    assert detect(video).count is None
    video[:, 5:] = video[:, :1, :1, :1]
    assert detect(video).count == 0


def test_what_is_not_in_the_world_is_none():
    video = render([Scene((), "white")])[0]
    video[:, :, 60:68, 20:100] = torch.tensor([0.1, -0.3, -0.9]).view(3, 1, 1, 1)  # brown bar
    found = detect(video).objects[0]
    assert (found.shape, found.colour) == (None, None)
    assert found.shape_iou < 0.6
    violet = detect(torch.tensor([0.0, -1.0, 0.5]).view(3, 1, 1, 1).expand(3, 17, 128, 128))
    assert violet.background is None


TIME = torch.arange(17.0)


def path(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.stack((x, y), 1) + 60


def test_motions_are_named_by_their_paths():
    zero = torch.zeros(17)
    turn = 2 * math.pi / 24 * TIME
    assert fit_motion(TIME, path(2 * TIME, zero)) == ("right", pytest.approx(1), pytest.approx(0))
    assert fit_motion(TIME, path(-2 * TIME, 0.3 * TIME))[0] == "left"
    assert fit_motion(TIME, path(zero, -1.2 * TIME))[:2] == ("up", pytest.approx(0.6))
    assert fit_motion(TIME, path(zero, 2 * TIME))[0] == "down"
    assert fit_motion(TIME, path(12 * turn.cos(), 12 * turn.sin()))[:2] == (
        "circling",
        pytest.approx(1),
    )
    assert fit_motion(TIME, path(5 * turn.cos(), 6 * turn.sin()))[0] == "circling"
    assert fit_motion(TIME, path(0.3 * turn.cos(), zero))[0] == "still"


@pytest.mark.parametrize(
    "track",
    [
        path(2 * TIME, 2 * TIME),  # diagonal
        path(0.4 * TIME, 0 * TIME),  # too slow to be either
        path(9 * (TIME * math.pi / 8).cos(), 0 * TIME),  # to and fro
        path(20 * (TIME > 8), 0 * TIME),  # a jump
        path(4 * (-1) ** TIME, 0 * TIME),  # a tremble
    ],
)
def test_other_paths_have_no_name(track):
    assert fit_motion(TIME, track)[0] is None


def test_a_lost_frame_does_not_change_the_motion():
    frames = torch.cat([TIME[:4], TIME[6:]])
    motion, ratio, _ = fit_motion(frames, path(2 * frames, 0 * frames))
    assert (motion, ratio) == ("right", pytest.approx(1))


def test_measures_follow_the_scene():
    slow = detect_scene(item(speed=1.8)).objects[0]
    assert slow.motion_ratio == pytest.approx(0.9, abs=0.02)
    assert slow.residual < 0.2
    assert slow.shape_iou > 0.95
    assert slow.saturation_ratio == pytest.approx(1, abs=0.02)
    pale = render([Scene((item(),), "white")])[0] * 0.8 + 0.2
    assert detect(pale).objects[0].saturation_ratio < 0.9


def test_every_factor_of_a_detection_can_be_stated():
    # names in detections and captions are the same words
    for shape in SHAPES:
        for motion in MOTIONS:
            scene = Scene((item(shape=shape, motion=motion, x=60.0),), "white")
            said = caption(scene, scene_rng(0, 0), omit=0.0)
            assert score(detect(render([scene])[0]), said).joint, (shape, motion)


def test_lab_of_known_colours():
    known = {(255, 255, 255): (100, 0, 0), (255, 0, 0): (53.24, 80.09, 67.20), (0, 0, 0): (0, 0, 0)}
    for rgb, expected in known.items():
        torch.testing.assert_close(
            rgb_to_lab(torch.tensor(rgb) / 255), torch.tensor(expected).float(), atol=0.05, rtol=0
        )
    assert len(COLOURS) == 6


def test_noise_whose_median_is_the_background_is_judged():
    noise = torch.randn(3, 17, 128, 128, generator=torch.Generator().manual_seed(0))
    detection = detect((noise * 2 - 2.4).clamp(-1, 1))
    assert detection.objects
    assert all(one.shape is None and one.colour is None for one in detection.objects)


def test_bad_videos_are_refused():
    with pytest.raises(WanError, match="side, side"):
        detect(torch.zeros(3, 17, 64, 128))
    with pytest.raises(WanError, match="9 or more"):
        detect(torch.zeros(3, 5, 64, 64))
