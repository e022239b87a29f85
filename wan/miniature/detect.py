"""Analytic detectors: what a clip of the world shows, read from its pixels without any learning.

    background  median of the border pixels, nearest palette entry
    objects     connected components of what differs from the background, split where two colours
                touch, linked from frame to frame into tracks
    colour      nearest palette entry to the median over the inner pixels of a track
    shape       the outline that overlaps best with the object's pixels at its centre and area
    size        radius of that outline
    motion      a line or a circle fitted to the centres

An attribute that looks like nothing in the world is None, which never counts as right. Lengths are
pixels of the 128 x 128 stage, whatever the size of the clip.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.errors import WanError
from wan.miniature.captions import Caption, Stated
from wan.miniature.world import (
    BACKGROUNDS,
    COLOURS,
    OBJECT_ATTRIBUTES,
    PATH_RADIUS,
    RADIUS,
    SHAPES,
    SPEED,
    STAGE,
    TURN_FRAMES,
    signed_distance,
)

# F frames, H W pixels, N pixels of a mask, K components, P side of the patch around one object

MIN_FRAMES = 9  # a third of a turn: fewer frames don't tell a circle from a line
CONTRAST = 0.2  # RGB distance from the background; the faintest object in the world has 0.45
MIN_AREA = 60.0  # the smallest object of the world has 385
CORE_DEPTH = 2  # pixels this far inside an object carry its colour unmixed
SPLIT_SHARE = 0.2  # of the inner pixels in a second colour: two objects that touch
COLOUR_REACH = 25.0  # CIELAB; palette entries are at least 30 apart
LINK_REACH = 16.0  # an object moves up to 3.5 pixels a frame
MIN_PERMANENCE = 0.5  # a track seen in a smaller share of the frames is a passing speck
FULL_PERMANENCE = 0.8  # an object seen in a smaller share comes and goes
SOFTNESS = (0.0, 0.1, 0.2)  # blur of an outline in radii
OUTLINE_GRID, OUTLINE_REACH = 256, 1.6  # cells, and radii from the centre to the edge
SHAPE_REACH = 0.7  # least overlap (IoU) with the best outline
STILL_SPEED = 0.25  # below: still; up to MOVING_SPEED: neither
MOVING_SPEED = 0.5
STILL_SPREAD = 1.5  # rms distance from the mean position
LINE_RESIDUAL = 3.0  # rms distance from the fitted line's points
LINE_ANGLE = math.radians(30)
CIRCLE_RADIUS = 3.0  # least radius of a fitted circle
CIRCLE_ROUNDNESS = 0.4  # least ratio of its axes


@dataclass(frozen=True)
class DetectedObject:
    """One tracked object. Attributes are None where nothing in the world fits."""

    shape: str | None
    colour: str | None
    size: str | None
    motion: str | None
    shape_iou: float  # mean over frames, with the best outline
    radius: float
    colour_distance: float  # CIELAB, to the nearest palette entry
    saturation_ratio: float  # HSV saturation over that of the palette entry
    residual: float  # rms distance of the centres from the fitted path
    motion_ratio: float | None  # measured over nominal speed; None unless it moves
    permanence: float  # share of frames in which it is seen
    x: float  # mean centre
    y: float


@dataclass(frozen=True)
class Detection:
    background: str | None
    objects: tuple[DetectedObject, ...]

    @property
    def count(self) -> int | None:
        """Number of objects; None if one comes and goes."""
        steady = all(item.permanence >= FULL_PERMANENCE for item in self.objects)
        return len(self.objects) if steady else None


@dataclass(frozen=True)
class Score:
    """Stated attributes that came out right; `attributes[name]` has one entry per statement.

    Beside the attributes of objects the names are "count" and "background".
    """

    attributes: dict[str, tuple[bool, ...]]
    joint: bool  # all of them
    matches: tuple[DetectedObject | None, ...]  # the object found for each one in the caption


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """sRGB in [0, 1] to CIELAB under D65, over the last axis: (..., 3) -> (..., 3) float32."""
    rgb = rgb.float().clamp(0, 1)
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = torch.tensor(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
         [0.0193339, 0.1191920, 0.9503041]]
    )  # fmt: skip
    white = torch.tensor([0.95047, 1.0, 1.08883])
    xyz = linear @ to_xyz.T / white
    root = torch.where(xyz > 216 / 24389, xyz ** (1 / 3), xyz * (841 / 108) + 4 / 29)
    x, y, z = root.unbind(-1)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), -1)


def detect(video: Tensor) -> Detection:
    """Read what a clip shows.

    Args:
        video: (3, F, H, W), uint8, or float in [-1, 1].
    Raises:
        WanError: another shape, not square, or fewer than 9 frames.
    """
    planes = _planes(video)  # (3, F, H, W)
    num_frames = planes.shape[1]
    scale = planes.shape[2] / STAGE
    edges = (planes[:, :, :2], planes[:, :, -2:], planes[..., :2], planes[..., -2:])
    behind = torch.cat([edge.flatten(1) for edge in edges], 1).median(1).values  # (3,)
    background, _ = _nearest(behind, BACKGROUNDS)

    red, green, blue = (plane - level for plane, level in zip(planes, behind, strict=True))
    mask = red * red + green * green + blue * blue > CONTRAST**2  # (F, H, W)
    pixels = mask.nonzero()  # (N, 3): frame, row, column
    core = _erode(mask, CORE_DEPTH)[mask]  # (N,)
    colours = planes[:, mask].T.contiguous()  # (N, 3)
    labels = _split_colours(_label(pixels, mask.shape), core, colours)
    tracks = _link(pixels, labels, colours, num_frames, scale)
    objects = []
    for track in range(int(tracks.max()) + 1 if len(tracks) else 0):
        mine = tracks == track
        objects.append(_measure(pixels[mine], colours[mine], core[mine], behind, num_frames, scale))
    return Detection(background, tuple(objects))


def _planes(video: Tensor) -> Tensor:
    """(3, F, H, W) float32 in [0, 1]."""
    if video.ndim != 4 or video.shape[0] != 3 or video.shape[2] != video.shape[3]:
        raise WanError(f"video {tuple(video.shape)}: detectors take (3, frames, side, side)")
    if video.shape[1] < MIN_FRAMES:
        raise WanError(f"video of {video.shape[1]} frames: detectors need {MIN_FRAMES} or more")
    if video.dtype == torch.uint8:
        return video.float() / 255
    return (video.float() * 0.5 + 0.5).clamp_(0, 1)


def _nearest(rgb: Tensor, palette: dict[str, tuple[int, int, int]]) -> tuple[str | None, float]:
    """The palette entry nearest in CIELAB, or None if it is out of reach, and the distance."""
    table = rgb_to_lab(torch.tensor(list(palette.values())) / 255)
    distances = (table - rgb_to_lab(rgb)).norm(dim=-1)
    best = int(distances.argmin())
    distance = float(distances[best])
    return (list(palette)[best] if distance <= COLOUR_REACH else None), distance


def _erode(mask: Tensor, depth: int) -> Tensor:
    """Pixels of (F, H, W) whose square neighbourhood of this depth is all set; outside counts as
    unset."""
    for axis in (1, 2):
        length = mask.shape[axis]
        padded = F.pad(mask, (depth, depth) if axis == 2 else (0, 0, depth, depth))
        for shift in range(2 * depth + 1):
            mask = mask & padded.narrow(axis, shift, length)
    return mask


def _label(pixels: Tensor, shape: torch.Size) -> Tensor:
    """Connected components (4 neighbours) within each frame: (N, 3) -> (N,) labels in [0, N).

    Every pixel starts with its own label; the largest label of each unbroken run along a row, then
    along a column, spreads over the run until nothing changes. Runs are long, so few rounds do.
    """
    _, height, width = shape
    frame, row, column = pixels.unbind(1)
    by_row = (frame * height + row) * (width + 1) + column  # + 1: rows' ends don't touch
    by_column = (frame * width + column) * (height + 1) + row
    runs = []
    for position in (by_row, by_column):
        ordered, order = position.sort()
        starts = torch.ones_like(ordered)
        starts[1:] = ordered[1:] != ordered[:-1] + 1
        run = torch.empty_like(order)
        run[order] = starts.cumsum(0) - 1
        runs.append(run)
    labels = torch.arange(len(pixels))
    while True:
        before = labels
        for run in runs:
            largest = torch.zeros_like(labels).scatter_reduce_(0, run, labels, "amax")
            labels = largest[run]
        if torch.equal(labels, before):
            return labels


def _split_colours(labels: Tensor, core: Tensor, colours: Tensor) -> Tensor:
    """Give each colour of a component its own label, if it has enough inner pixels: (N,) labels
    in [0, K)."""
    _, labels = labels.unique(return_inverse=True)
    num_components = int(labels.max()) + 1 if len(labels) else 0
    palette = torch.tensor(list(COLOURS.values())) / 255
    kind = torch.cdist(colours, palette).argmin(1)  # (N,)
    votes = torch.bincount(
        labels[core] * len(palette) + kind[core], minlength=num_components * len(palette)
    ).view(-1, len(palette))
    present = votes > SPLIT_SHARE * votes.sum(1, keepdim=True)  # (K, 6)
    mixed = present.sum(1) > 1
    if mixed.any():
        pixel = mixed[labels].nonzero().flatten()
        distance = torch.cdist(colours[pixel], palette)
        distance[~present[labels[pixel]]] = math.inf
        labels = labels * (len(palette) + 1)
        labels[pixel] += 1 + distance.argmin(1)
        _, labels = labels.unique(return_inverse=True)
    return labels


def _link(pixels: Tensor, labels: Tensor, colours: Tensor, num_frames: int, scale: float) -> Tensor:
    """Link the components of successive frames into tracks: (N,) track index, -1 for none.

    Pairs are taken in order of distance, where a change of colour counts like a jump.
    """
    if not len(labels):
        return labels
    area = torch.bincount(labels)
    centre = _mean_by(labels, pixels.float(), area)  # (K, 3): frame, row, column
    colour = _mean_by(labels, colours, area)
    features = torch.cat([centre[:, 1:] / scale, colour * 2 * LINK_REACH], 1)
    frame = centre[:, 0].round().long()
    track_of = torch.full((len(area),), -1)
    last: list[int] = []  # the latest component of each track
    for f in range(num_frames):
        here = ((frame == f) & (area >= MIN_AREA * scale**2)).nonzero().flatten().tolist()
        pairs = sorted(
            (float((features[k] - features[last[t]]).norm()), k, t)
            for k in here
            for t in range(len(last))
        )
        taken: set[int] = set()
        for distance, k, t in pairs:
            if distance < LINK_REACH and track_of[k] < 0 and t not in taken:
                track_of[k] = t
                taken.add(t)
                last[t] = k
        for k in here:
            if track_of[k] < 0:
                track_of[k] = len(last)
                last.append(k)
    seen = torch.bincount(track_of[track_of >= 0], minlength=len(last))
    kept = seen >= MIN_PERMANENCE * num_frames
    renumbered = torch.where(kept, kept.cumsum(0) - 1, -1)
    renumbered = torch.cat([renumbered, torch.tensor([-1])])  # so that -1 stays -1
    return renumbered[track_of][labels]


def _mean_by(labels: Tensor, values: Tensor, counts: Tensor) -> Tensor:
    """Mean of (N, C) values per label: (K, C)."""
    total = torch.zeros(len(counts), values.shape[1]).index_add_(0, labels, values)
    return total / counts[:, None]


def _measure(
    pixels: Tensor, colours: Tensor, core: Tensor, behind: Tensor, num_frames: int, scale: float
) -> DetectedObject:
    """Read one track: its pixels (N, 3), their colours (N, 3), and which are inner ones (N,)."""
    inner = colours[core] if core.any() else colours
    rgb = inner.median(0).values
    colour, colour_distance = _nearest(rgb, COLOURS)
    # At least half covered by the object, as the contrast threshold alone depends on the colours
    span = rgb - behind
    covered = (colours - behind) @ span > 0.5 * span.square().sum()
    if covered.any():  # none are where their median is the background's own colour
        pixels = pixels[covered]
    counts = torch.bincount(pixels[:, 0], minlength=num_frames)
    frames = (counts > 0).nonzero().flatten()
    centres = torch.zeros(num_frames, 2).index_add_(0, pixels[:, 0], pixels[:, 1:] + 0.5)
    centres = centres / counts.clamp(min=1)[:, None]  # (F, 2): row, column

    overlaps = _overlaps(pixels, centres, counts)  # (O, F)
    ious = overlaps[:, frames].mean(1)
    best = outlines()[int(ious.argmax())]
    shape_iou = float(ious.max())
    radius = math.sqrt(float(counts[frames].float().median()) / best.area) / scale
    limit = math.sqrt(RADIUS["small"] * RADIUS["large"])
    track = centres[frames].flip(1) / scale  # (F', 2): x, y
    motion, ratio, residual = fit_motion(frames, track)
    x, y = track.mean(0).tolist()
    return DetectedObject(
        shape=best.shape if shape_iou >= SHAPE_REACH else None,
        colour=colour,
        size="small" if radius < limit else "large",
        motion=motion,
        shape_iou=shape_iou,
        radius=radius,
        colour_distance=colour_distance,
        saturation_ratio=_saturation(rgb) / _nominal_saturation(rgb),
        residual=residual,
        motion_ratio=ratio,
        permanence=len(frames) / num_frames,
        x=x,
        y=y,
    )


@dataclass(frozen=True)
class Outline:
    """A shape of radius 1 on a fine grid, its corners rounded by a blur.

    Autoencoders round corners: without softer outlines a blurred triangle looks most like a circle.
    The softest ones are those that a person still names without hesitating.
    """

    shape: str
    inside: Tensor  # (OUTLINE_GRID, OUTLINE_GRID) bool, over [-OUTLINE_REACH, OUTLINE_REACH)
    area: float


@cache
def outlines() -> tuple[Outline, ...]:
    """Every shape at every softness; circles look the same at all of them."""
    step = 2 * OUTLINE_REACH / OUTLINE_GRID
    grid = (torch.arange(OUTLINE_GRID) + 0.5) * step - OUTLINE_REACH
    found = []
    for shape in SHAPES:
        sharp = signed_distance(shape, grid[None, :], grid[:, None], 1.0) < 0
        for softness in SOFTNESS if shape != "circle" else SOFTNESS[:1]:
            inside = blur(sharp.float()[None], softness / step)[0] > 0.5 if softness else sharp
            found.append(Outline(shape, inside, float(inside.sum()) * step**2))
    return tuple(found)


def _overlaps(pixels: Tensor, centres: Tensor, counts: Tensor) -> Tensor:
    """Intersection over union of the object with each outline of its centre and area: (O, F)."""
    reach = int((pixels[:, 1:] - centres[pixels[:, 0]]).abs().max()) + 6
    corner = centres.floor().long() - reach  # (F, 2)
    grid = torch.arange(2 * reach) + 0.5
    masks = torch.zeros(len(counts), 2 * reach, 2 * reach, dtype=torch.bool)  # (F, P, P)
    row, column = (pixels[:, 1:] - corner[pixels[:, 0]]).unbind(1)
    masks[pixels[:, 0], row, column] = True
    offset = grid + (corner - centres)[..., None]  # (F, 2, P)
    ious = []
    for outline in outlines():
        radius = (counts.clamp(min=1) / outline.area).sqrt()[:, None, None]
        cell = (offset / radius + OUTLINE_REACH) * (OUTLINE_GRID / (2 * OUTLINE_REACH))
        # The outermost cells are outside every outline, and so is what lies beyond them.
        cell = cell.long().clamp(0, OUTLINE_GRID - 1)  # (F, 2, P)
        template = outline.inside[cell[:, 0, :, None], cell[:, 1, None, :]]  # (F, P, P)
        both = (template & masks).sum((1, 2))
        ious.append(both / (template | masks).sum((1, 2)).clamp(min=1))
    return torch.stack(ious)


def _saturation(rgb: Tensor) -> float:
    """HSV saturation."""
    return float((rgb.max() - rgb.min()) / rgb.max().clamp(min=1e-6))


def _nominal_saturation(rgb: Tensor) -> float:
    """Saturation of the palette entry nearest to a colour, however far."""
    table = torch.tensor(list(COLOURS.values())) / 255
    return _saturation(table[(rgb_to_lab(table) - rgb_to_lab(rgb)).norm(dim=-1).argmin()])


def fit_motion(frames: Tensor, track: Tensor) -> tuple[str | None, float | None, float]:
    """Name the motion of a track.

    Args:
        frames: (F,) frame numbers, ascending.
        track: (F, 2) centres (x, y) in stage pixels.
    Returns:
        The motion or None; measured over nominal speed (None unless it moves); and the rms
        distance of the centres from the fitted path.
    """
    time = frames.double()
    track = track.double()
    spread = _rms(track - track.mean(0))
    line, line_residual = _least_squares(torch.stack((torch.ones_like(time), time), 1), track)
    velocity = line[1]  # (2,)
    speed = float(velocity.norm())
    if speed < STILL_SPEED and spread < STILL_SPREAD:
        return "still", None, spread

    angle = 2 * math.pi / TURN_FRAMES * time
    basis = torch.stack((torch.ones_like(time), angle.cos(), angle.sin()), 1)
    circle, circle_residual = _least_squares(basis, track)
    major, minor = torch.linalg.svdvals(circle[1:]).tolist()
    path_radius = math.sqrt((major**2 + minor**2) / 2)
    if circle_residual < line_residual and path_radius >= CIRCLE_RADIUS:
        round_enough = minor >= CIRCLE_ROUNDNESS * major and circle_residual < LINE_RESIDUAL
        motion = "circling" if round_enough else None
        return motion, path_radius / PATH_RADIUS, circle_residual

    dx, dy = velocity.tolist()
    across, along = sorted((abs(dx), abs(dy)))
    straight = math.atan2(across, along) <= LINE_ANGLE and line_residual < LINE_RESIDUAL
    if speed < MOVING_SPEED or not straight:
        return None, speed / SPEED, line_residual
    if abs(dx) > abs(dy):
        return ("right" if dx > 0 else "left"), speed / SPEED, line_residual
    return ("down" if dy > 0 else "up"), speed / SPEED, line_residual


def _least_squares(basis: Tensor, track: Tensor) -> tuple[Tensor, float]:
    """Coefficients (terms, 2) of the best fit, and its rms distance from the track."""
    coefficients = torch.linalg.lstsq(basis, track).solution
    return coefficients, _rms(basis @ coefficients - track)


def _rms(offsets: Tensor) -> float:
    return float(offsets.square().sum(1).mean().sqrt())


def score(detection: Detection, caption: Caption) -> Score:
    """Compare a detection with what a caption states.

    Two objects are compared under the assignment that gets most attributes right. An object that
    was not found has all its attributes wrong; a further one makes the count wrong.
    """
    found: list[DetectedObject | None] = list(detection.objects)
    found += [None] * (len(caption.objects) - len(found))
    matches = max(
        itertools.permutations(found, len(caption.objects)),
        key=lambda order: sum(sum(right.values()) for right in _compare(caption, order)),
    )
    attributes: dict[str, tuple[bool, ...]] = {"count": (detection.count == len(caption.objects),)}
    if caption.background is not None:
        attributes["background"] = (detection.background == caption.background,)
    for name in OBJECT_ATTRIBUTES:
        results = tuple(right[name] for right in _compare(caption, matches) if name in right)
        if results:
            attributes[name] = results
    joint = all(all(results) for results in attributes.values())
    return Score(attributes, joint, matches)


def _compare(caption: Caption, order: Sequence[DetectedObject | None]) -> list[dict[str, bool]]:
    return [_right(stated, item) for stated, item in zip(caption.objects, order, strict=True)]


def _right(stated: Stated, item: DetectedObject | None) -> dict[str, bool]:
    """Each stated attribute of one object, and whether the detected one has it."""
    return {
        name: item is not None and getattr(item, name) == value
        for name, value in vars(stated).items()
        if value is not None
    }


def accuracies(scores: Iterable[Score]) -> dict[str, float]:
    """Share of right statements per attribute, and "joint" per clip."""
    right: dict[str, list[bool]] = {}
    for one in scores:
        for name, results in one.attributes.items():
            right.setdefault(name, []).extend(results)
        right.setdefault("joint", []).append(one.joint)
    return {name: sum(results) / len(results) for name, results in right.items()}


def blur(planes: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (N, H, W) by `sigma` > 0 pixels; edges are continued."""
    reach = math.ceil(3 * sigma)
    kernel = torch.exp(-torch.arange(-reach, reach + 1).square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(planes[:, None], (reach,) * 4, mode="replicate")
    blurred = F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
    return blurred[:, 0]
