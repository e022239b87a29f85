"""A small world of moving shapes: what a scene is, how one is drawn by chance, how it is rendered.

A scene holds one or two flat objects on a plain background. Its *factors* (shape, colour, size,
motion, background, count) are what captions speak of and detectors read; its *nuisance variables*
(start, radius, speed, brightness) follow known laws and are never mentioned.

All lengths are pixels of a 128 x 128 stage, x to the right and y down, pixel centres at .5; a clip
of another size is the same scene, scaled. All speeds are pixels per frame at 8 frames per second.
"""

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wan.errors import WanError

# B batch, F frames, H W pixels, P side of the patch that an object is drawn in

STAGE = 128
NUM_FRAMES = 17

SHAPES = ("circle", "square", "triangle", "star")
SIZES = ("small", "large")
MOTIONS = ("left", "right", "up", "down", "still", "circling")
# sRGB in 0..255; every background is at least 30 CIELAB units away from every object colour
COLOURS = {
    "red": (225, 40, 40),
    "green": (45, 175, 60),
    "blue": (45, 70, 225),
    "yellow": (240, 215, 45),
    "magenta": (215, 55, 205),
    "cyan": (50, 205, 225),
}
BACKGROUNDS = {
    "black": (14, 14, 14),
    "white": (242, 242, 242),
    "gray": (128, 128, 128),
    "brown": (104, 68, 40),
}
UNSPECIFIED = "unspecified"
ATTRIBUTES = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": SIZES,
    "motion": MOTIONS,
    "background": tuple(BACKGROUNDS),
}
OBJECT_ATTRIBUTES = ("shape", "colour", "size", "motion")
Kind = tuple[str, str, str, str]  # a value of each, in this order

RADIUS = {"small": 16.0, "large": 25.0}
RADIUS_JITTER = 0.08
SPEED = 2.0
SPEED_JITTER = 0.10
PATH_RADIUS = 12.0  # of a circling object's path
TURN_FRAMES = 24  # of a full turn: two thirds of one in 17 frames
TOP = -math.pi / 2  # where on its path a circling object starts: a phase that varied was not learnt
BRIGHTNESS_JITTER = 0.03
TWO_OBJECTS = 0.4  # share of scenes with two objects
EDGE_MARGIN = 1.0
OBJECT_GAP = 4.0  # between the boxes of two objects, in every frame

# Corner distances in units of the radius, chosen so that the four shapes look equally large.
SQUARE_HALF = 0.9
TRIANGLE_REACH = 1.2
STAR_REACH = 1.2
STAR_INNER = 0.42 * STAR_REACH  # 0.38 would be the pentagram; fatter points survive compression

_SIN36, _COS36 = math.sin(math.pi / 5), math.cos(math.pi / 5)
# Box of each shape around its centre, in radii: half width, up, down
_BOX = {
    "circle": (1.0, 1.0, 1.0),
    "square": (SQUARE_HALF,) * 3,
    "triangle": (TRIANGLE_REACH * math.sqrt(3) / 2, TRIANGLE_REACH, TRIANGLE_REACH / 2),
    "star": (STAR_REACH * math.sin(2 * math.pi / 5), STAR_REACH, STAR_REACH * _COS36),
}
# The longest clip in which the largest and fastest object stays inside
MAX_FRAMES = 1 + int(
    (STAGE - 2 * (EDGE_MARGIN + 1.2 * RADIUS["large"] * (1 + RADIUS_JITTER)))
    / (SPEED * (1 + SPEED_JITTER))
)
_DIRECTION = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}


@dataclass(frozen=True)
class SceneObject:
    """One object: its factors, then its nuisance variables."""

    shape: str
    colour: str
    size: str
    motion: str
    radius: float
    x: float  # centre in frame 0
    y: float
    speed: float  # along the path; 0 for a still object
    phase: float = 0.0  # where on its path a circling object starts, radians

    @property
    def triple(self) -> tuple[str, str, str]:
        return self.shape, self.colour, self.motion


@dataclass(frozen=True)
class Scene:
    objects: tuple[SceneObject, ...]
    background: str
    brightness: float = 1.0


def _held_out_triples() -> frozenset[tuple[str, str, str]]:
    triples = [(s, c, m) for s in SHAPES for c in COLOURS for m in MOTIONS]
    return frozenset(random.Random("held-out").sample(triples, round(0.1 * len(triples))))


# (shape, colour, motion) combinations that no training scene shows
HELD_OUT = _held_out_triples()
SPLITS = ("train", "heldout", "any")


def in_split(kind: Kind, split: str) -> bool:
    """Whether an object of this kind may appear in the split: "train", "heldout" or "any"."""
    shape, colour, _, motion = kind
    return split == "any" or ((shape, colour, motion) in HELD_OUT) == (split == "heldout")


def scene_rng(seed: int, index: int) -> random.Random:
    """The generator of the index-th scene of a stream, which needs none of the others drawn."""
    return random.Random(f"{seed}/{index}")


def sample_scene(
    rng: random.Random,
    split: str = "train",
    num_objects: int | None = None,
    num_frames: int = NUM_FRAMES,
    two_objects: float = TWO_OBJECTS,
) -> Scene:
    """Draw a scene: factors uniform within the split, start uniform over what keeps it inside.

    Args:
        split: "train" has no held-out (shape, colour, motion) triple, in "heldout" every object is
            one, "any" ignores the distinction.
        num_objects: 1 or 2; None draws it. Two objects differ in colour or shape and their boxes
            stay apart in every frame.
        num_frames: the clip length during which the objects stay inside.
        two_objects: chance of two where the number is drawn.
    Raises:
        WanError: unknown split, another number of objects, or more than MAX_FRAMES frames.
    """
    if split not in SPLITS:
        raise WanError(f"split={split!r}: choose one of {', '.join(SPLITS)}")
    if num_objects not in (None, 1, 2):
        raise WanError(f"num_objects={num_objects}: the world shows 1 or 2 objects")
    if num_frames > MAX_FRAMES:
        raise WanError(f"num_frames={num_frames}: objects stay inside for at most {MAX_FRAMES}")
    if num_objects is None:
        num_objects = 2 if rng.random() < two_objects else 1
    background = rng.choice(tuple(BACKGROUNDS))
    brightness = 1 + rng.uniform(-BRIGHTNESS_JITTER, BRIGHTNESS_JITTER)
    objects = _arrange(
        rng, lambda: [_sample_kind(rng, split) for _ in range(num_objects)], num_frames
    )
    return Scene(objects, background, brightness)


def sample_scene_with(
    rng: random.Random,
    wanted: Sequence[Mapping[str, str]],
    background: str | None = None,
    split: str = "any",
    num_frames: int = NUM_FRAMES,
) -> Scene:
    """Draw a scene of which some factors are given; the others follow `sample_scene`'s law.

    Args:
        wanted: for each object, attribute -> the value it must have.
        background: None draws one.
    Raises:
        WanError: the split has no object with the wanted factors, or two would be the same.
    """
    every = itertools.product(SHAPES, COLOURS, SIZES, MOTIONS)
    kinds = [kind for kind in every if in_split(kind, split)]
    choices = [
        [k for k in kinds if all(k[OBJECT_ATTRIBUTES.index(n)] == v for n, v in one.items())]
        for one in wanted
    ]
    if not all(choices):
        raise WanError(f"split={split}: no object of it is like {[dict(one) for one in wanted]}")
    looks = {kind[:2] for options in choices for kind in options}
    if len(choices) == 2 and len(looks) == 1:
        raise WanError(
            f"two objects that are both {' '.join(*looks)}: they must differ in shape or colour"
        )
    brightness = 1 + rng.uniform(-BRIGHTNESS_JITTER, BRIGHTNESS_JITTER)
    objects = _arrange(rng, lambda: [rng.choice(options) for options in choices], num_frames)
    return Scene(objects, background or rng.choice(tuple(BACKGROUNDS)), brightness)


def _arrange(
    rng: random.Random, draw_kinds: Callable[[], list[Kind]], num_frames: int
) -> tuple[SceneObject, ...]:
    """Draw kinds until one or two objects of them differ and find room."""
    while True:
        kinds = draw_kinds()
        if len(kinds) == 2 and kinds[0][:2] == kinds[1][:2]:
            continue
        # A tight pair of kinds may need many draws; after these, the next pair gets its turn.
        for _ in range(200):
            objects = tuple(_place(rng, *kind, num_frames) for kind in kinds)
            if len(objects) == 1 or _stay_apart(objects[0], objects[1], num_frames):
                return objects


def _sample_kind(rng: random.Random, split: str) -> Kind:
    """(shape, colour, size, motion) of an object of the split."""
    size = rng.choice(SIZES)
    if split == "heldout":
        shape, colour, motion = rng.choice(sorted(HELD_OUT))
        return shape, colour, size, motion
    while True:
        shape, colour, motion = rng.choice(SHAPES), rng.choice(tuple(COLOURS)), rng.choice(MOTIONS)
        if split == "any" or (shape, colour, motion) not in HELD_OUT:
            return shape, colour, size, motion


def _place(
    rng: random.Random, shape: str, colour: str, size: str, motion: str, num_frames: int
) -> SceneObject:
    """Draw the nuisance variables of an object; its start is uniform over what keeps it inside."""
    radius = RADIUS[size] * (1 + rng.uniform(-RADIUS_JITTER, RADIUS_JITTER))
    nominal = {"still": 0.0, "circling": 2 * math.pi * PATH_RADIUS / TURN_FRAMES}
    speed = nominal.get(motion, SPEED) * (1 + rng.uniform(-SPEED_JITTER, SPEED_JITTER))
    phase = TOP if motion == "circling" else 0.0
    at_origin = SceneObject(shape, colour, size, motion, radius, 0.0, 0.0, speed, phase)
    boxes = object_boxes(at_origin, num_frames)
    start = []
    for axis in (0, 1):
        low = EDGE_MARGIN - min(box[axis] for box in boxes)
        high = STAGE - EDGE_MARGIN - max(box[axis + 2] for box in boxes)
        start.append(rng.uniform(low, high))
    return SceneObject(shape, colour, size, motion, radius, start[0], start[1], speed, phase)


def trajectory(item: SceneObject, num_frames: int = NUM_FRAMES) -> list[tuple[float, float]]:
    """Centre (x, y) in every frame. Circling objects turn clockwise."""
    if item.motion == "circling":
        path_radius = item.speed * TURN_FRAMES / (2 * math.pi)
        angles = [item.phase + 2 * math.pi * f / TURN_FRAMES for f in range(num_frames)]
        centre_x = item.x - path_radius * math.cos(item.phase)
        centre_y = item.y - path_radius * math.sin(item.phase)
        return [
            (centre_x + path_radius * math.cos(a), centre_y + path_radius * math.sin(a))
            for a in angles
        ]
    dx, dy = _DIRECTION.get(item.motion, (0.0, 0.0))
    step_x, step_y = item.speed * dx, item.speed * dy
    return [(item.x + f * step_x, item.y + f * step_y) for f in range(num_frames)]


def object_boxes(item: SceneObject, num_frames: int = NUM_FRAMES) -> list[tuple[float, ...]]:
    """The tight box (left, top, right, bottom) of the object in every frame."""
    half, up, down = (item.radius * reach for reach in _BOX[item.shape])
    return [(x - half, y - up, x + half, y + down) for x, y in trajectory(item, num_frames)]


def _stay_apart(one: SceneObject, other: SceneObject, num_frames: int) -> bool:
    for a, b in zip(object_boxes(one, num_frames), object_boxes(other, num_frames), strict=True):
        gap = max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3])
        if gap < OBJECT_GAP:
            return False
    return True


def signed_distance(shape: str, x: Tensor, y: Tensor, radius: float | Tensor) -> Tensor:
    """Distance from points to the outline, negative inside; exact near edges, a bound at corners.

    Args:
        x, y: coordinates relative to the object's centre, y down; any broadcastable shapes.
        radius: nominal radius in the same unit.
    """
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - SQUARE_HALF * radius
    if shape == "triangle":
        slant = x.abs() * (math.sqrt(3) / 2) - y / 2
        return torch.maximum(slant, y) - TRIANGLE_REACH / 2 * radius
    if shape == "star":
        return _star_distance(x, y, radius)
    raise WanError(f"shape={shape!r}: choose one of {', '.join(SHAPES)}")


def _star_distance(x: Tensor, y: Tensor, radius: float | Tensor) -> Tensor:
    """The star's five mirror axes fold the plane onto one half point; what is left is one line."""
    along, across = -y, x.abs()  # the top point lies on the positive `along` axis
    for angle in (3 * math.pi / 5, math.pi / 5):  # mirrors between points, the outer one first
        normal_along, normal_across = -math.sin(angle), math.cos(angle)
        beyond = (along * normal_along + across * normal_across).clamp(min=0)
        along = along - 2 * beyond * normal_along
        across = across - 2 * beyond * normal_across
        across = across.abs()
    edge_along, edge_across = STAR_INNER * _COS36 - STAR_REACH, STAR_INNER * _SIN36
    length = math.hypot(edge_along, edge_across)
    return ((along - STAR_REACH * radius) * edge_across - across * edge_along) / length


def render(
    scenes: Sequence[Scene], num_frames: int = NUM_FRAMES, height: int = STAGE, width: int = STAGE
) -> Tensor:
    """Draw scenes with analytic anti-aliasing: (B, 3, F, H, W) float32 in [-1, 1].

    A pixel's colour is the mix by coverage, taken as the clamped distance from its centre to the
    outline. A scene must have been drawn for at least `num_frames` to stay inside.

    Raises:
        WanError: the size is not square.
    """
    if height != width:
        raise WanError(f"height={height}, width={width}: the stage is square, give equal sides")
    video = torch.empty(len(scenes), 3, num_frames, height, width)
    for clip, scene in zip(video, scenes, strict=True):
        clip[:] = _pixel(BACKGROUNDS[scene.background], scene.brightness)
        for item in scene.objects:
            _draw(clip, item, _pixel(COLOURS[item.colour], scene.brightness))
    return video


def _pixel(rgb: tuple[int, int, int], brightness: float) -> Tensor:
    """(3, 1, 1, 1) in [-1, 1]."""
    return (torch.tensor(rgb) * (brightness * 2 / 255) - 1).clamp(-1, 1).view(3, 1, 1, 1)


def _draw(clip: Tensor, item: SceneObject, colour: Tensor) -> None:
    """Blend one object into a clip (3, F, H, W), touching only the box around it in each frame."""
    side = clip.shape[-1]
    scale = side / STAGE
    num_frames = clip.shape[1]
    centres = torch.tensor(trajectory(item, num_frames)) * scale  # (F, 2)
    reach = math.ceil(1.2 * item.radius * scale) + 2
    patch = min(2 * reach, side)
    corner = (centres.floor().long() - reach).clamp(0, side - patch)  # (F, 2), left and top
    grid = torch.arange(patch) + 0.5
    x = (grid + (corner[:, :1] - centres[:, :1]))[:, None, :]  # (F, 1, P)
    y = (grid + (corner[:, 1:] - centres[:, 1:]))[:, :, None]  # (F, P, 1)
    distance = signed_distance(item.shape, x, y, item.radius * scale)  # (F, P, P)
    coverage = (0.5 - distance).clamp_(0, 1)
    for f, (left, top) in enumerate(corner.tolist()):
        region = clip[:, f, top : top + patch, left : left + patch]
        region.lerp_(colour[:, 0], coverage[f].expand_as(region))
