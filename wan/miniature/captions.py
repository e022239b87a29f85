"""Sentences about scenes: a small grammar with synonyms, and attributes that may go unsaid.

    sentence    = [opening] clauses [background] | background "," clauses
                | noun phrase background "," motion
    clauses     = clause | clause "and" clause
    clause      = noun phrase ["is"] [motion]
    noun phrase = article [size] [colour] noun

"a small red circle moving right on a gray background" is one. A caption carries what it states
beside its text, so that a model is scored only on what its prompt states.
"""

import random
import re
from dataclasses import dataclass

from wan.miniature.world import (
    ATTRIBUTES,
    NUM_FRAMES,
    OBJECT_ATTRIBUTES,
    STAGE,
    UNSPECIFIED,
    Scene,
    SceneObject,
    sample_scene_with,
)

OMIT = 0.15  # chance that an attribute goes unsaid in the captions that the teacher was trained on
# The first word of each list is the plain one and is used more often than the others together.
NOUNS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    None: ("object", "shape"),
}
COLOUR_WORDS = {
    "red": ("red",),
    "green": ("green",),
    "blue": ("blue",),
    "yellow": ("yellow",),
    "magenta": ("magenta", "purple", "pink"),
    "cyan": ("cyan", "turquoise"),
}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big")}
BACKGROUND_WORDS = {
    "black": ("black",),
    "white": ("white",),
    "gray": ("gray", "grey"),
    "brown": ("brown",),
}
VERBS = ("moving", "drifting", "sliding", "going", "travelling", "traveling")
# Directions follow a verb, the other motions stand alone.
DIRECTIONS = {
    "left": ("left", "to the left", "leftwards", "leftward"),
    "right": ("right", "to the right", "rightwards", "rightward"),
    "up": ("up", "upwards", "upward"),
    "down": ("down", "downwards", "downward"),
}
STANDALONE_MOTIONS = {
    "still": ("staying still", "standing still", "not moving", "staying in place"),
    "circling": ("moving in a circle", "circling", "going around in a circle", "moving in circles"),
}
# Words beyond the grammar. A key is replaced where it stands as whole words; "circle" and its like
# are no keys, because "moving in a circle" has nothing to do with the shape.
MORE_WORDS = {
    "disc": ("disk", "ball", "dot", "round shape"),
    "box": ("block", "rectangle"),
    "red": ("crimson", "scarlet"),
    "green": ("emerald", "lime"),
    "blue": ("navy", "azure"),
    "yellow": ("golden", "gold"),
    "purple": ("violet", "fuchsia"),
    "turquoise": ("aqua", "teal"),
    "little": ("mini", "miniature"),
    "big": ("huge", "giant", "enormous"),
    "drifting": ("floating", "gliding"),
    "sliding": ("heading", "rolling"),
    "travelling": ("flying", "running", "that moves", "which goes"),
    "moving up": ("rising", "ascending", "moving to the top"),
    "moving down": ("falling", "descending", "sinking", "moving to the bottom"),
    "moving left": ("moving from right to left", "moving towards the left"),
    "moving right": ("moving from left to right", "moving towards the right"),
    "staying still": ("motionless", "stationary", "at rest", "standing", "that does not move"),
    "circling": ("orbiting", "looping", "moving around in circles"),
    "over": ("with", "in", "before"),
    "a video of": ("an animation of", "show me", "video of", "i want to see", "draw"),
    "background": ("backdrop", "wall"),
}
ARTICLES = ("a", "one", "the")
PREPOSITIONS = ("on", "over", "against", "in front of")
OPENINGS = ("a video of ", "a clip of ", "there is ")


@dataclass(frozen=True)
class Stated:
    """What a caption says of one object; None where it says nothing."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    motion: str | None = None


@dataclass(frozen=True)
class Caption:
    """A sentence and what it states. `objects` are in the order in which they are mentioned."""

    text: str
    objects: tuple[Stated, ...]
    background: str | None

    def labels(self) -> list[dict[str, int]]:
        """Class indices for training a text encoder, by `label_classes`: one dict per object.

        A word about an object has the labels of that object alone. An encoder whose words all told
        of both objects left a transformer nothing to tell them apart by.
        """
        scene = {
            "count": len(self.objects) - 1,
            "background": _index("background", self.background),
        }
        return [
            scene | {name: _index(name, getattr(stated, name)) for name in OBJECT_ATTRIBUTES}
            for stated in self.objects
        ]


def label_classes() -> dict[str, tuple[str, ...]]:
    """The classes of every label of a word: count and background of the scene, and the attributes
    of the object that the word is about; the last class of an attribute is "unspecified"."""
    attributes = {name: ATTRIBUTES[name] + (UNSPECIFIED,) for name in OBJECT_ATTRIBUTES}
    background = ATTRIBUTES["background"] + (UNSPECIFIED,)
    return {"count": ("1", "2"), "background": background} | attributes


def _index(name: str, value: str | None) -> int:
    return len(ATTRIBUTES[name]) if value is None else ATTRIBUTES[name].index(value)


def caption(scene: Scene, rng: random.Random, omit: float = OMIT) -> Caption:
    """Describe a scene.

    Args:
        omit: probability that a size, a motion or the background goes unsaid; a colour or a shape
            goes unsaid a third as often. The number of objects is always stated.
    """
    pairs = [_state(item, rng, omit) for item in scene.objects]
    # "a circle and a square moving up" could mean both: a motion left unsaid is left to the end.
    stated = tuple(sorted(pairs, key=lambda one: one.motion is None))
    background = None if rng.random() < omit else scene.background
    text = _sentence(stated, background, rng)
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:]
    if rng.random() < 0.15:
        text += "."
    return Caption(text, stated, background)


def sample_scene_for(
    wanted: Caption, rng: random.Random, split: str = "any", num_frames: int = NUM_FRAMES
) -> Scene:
    """Draw a scene that fulfils a caption; what it leaves unsaid follows the world's own law.

    Raises:
        WanError: the split has no object like one in the caption.
    """
    factors = [
        {name: value for name, value in vars(stated).items() if value is not None}
        for stated in wanted.objects
    ]
    return sample_scene_with(rng, factors, wanted.background, split, num_frames)


def _state(item: SceneObject, rng: random.Random, omit: float) -> Stated:
    """What a caption states of an object; see `caption`."""
    chance = {"shape": omit / 3, "colour": omit / 3, "size": omit, "motion": omit}
    attributes = {
        name: None if rng.random() < chance[name] else getattr(item, name)
        for name in OBJECT_ATTRIBUTES
    }
    return Stated(**attributes)


def _say(words: tuple[str, ...], rng: random.Random) -> str:
    return words[0] if rng.random() < 0.6 else rng.choice(words)


def _sentence(stated: tuple[Stated, ...], background: str | None, rng: random.Random) -> str:
    scenery = "" if background is None else _scenery(background, rng)
    form = rng.random()
    if scenery and form < 0.15:
        return f"{scenery}, {_clauses(stated, rng)}"
    if scenery and form < 0.25 and len(stated) == 1 and stated[0].motion:
        return f"{_noun_phrase(stated[0], rng)} {scenery}, {_motion(stated[0].motion, rng)}"
    opening = rng.choice(OPENINGS) if form > 0.85 else ""
    ending = f" {scenery}" if scenery else ""
    return opening + _clauses(stated, rng, verb_is=not opening) + ending


def _scenery(background: str, rng: random.Random) -> str:
    colour = _say(BACKGROUND_WORDS[background], rng)
    return f"{_say(PREPOSITIONS, rng)} a {colour} background"


def _clauses(stated: tuple[Stated, ...], rng: random.Random, verb_is: bool = True) -> str:
    # "is" makes a full sentence of every object that moves, or of none
    link = "is " if verb_is and rng.random() < 0.15 else ""
    clauses = []
    for one in stated:
        clause = _noun_phrase(one, rng)
        if one.motion:
            clause += f" {link}{_motion(one.motion, rng)}"
        clauses.append(clause)
    return " and ".join(clauses)


def _noun_phrase(stated: Stated, rng: random.Random) -> str:
    words = []
    if stated.size:
        words.append(_say(SIZE_WORDS[stated.size], rng))
    if stated.colour:
        words.append(_say(COLOUR_WORDS[stated.colour], rng))
    words.append(_say(NOUNS[stated.shape], rng))
    article = _say(ARTICLES, rng)
    if article == "a" and words[0][0] in "aeiou":
        article = "an"
    return " ".join([article, *words])


def _motion(motion: str, rng: random.Random) -> str:
    if motion in STANDALONE_MOTIONS:
        return _say(STANDALONE_MOTIONS[motion], rng)
    return f"{_say(VERBS, rng)} {_say(DIRECTIONS[motion], rng)}"


EXAMPLES = (
    "a small red circle moving right on a gray background",
    "a large blue star moving up",
    "a green square and a yellow triangle moving in a circle",
)
# Words of sentences that say nothing of what is seen.
FUNCTION_WORDS = "an is are and of with it there two background scene"


def known_words() -> frozenset[str]:
    """All words of the grammar, those that the text encoder has met beyond it, and fillers."""
    tables = (NOUNS, COLOUR_WORDS, SIZE_WORDS, BACKGROUND_WORDS, DIRECTIONS, STANDALONE_MOTIONS)
    texts = [text for table in (*tables, MORE_WORDS) for texts in table.values() for text in texts]
    texts += [*VERBS, *ARTICLES, *PREPOSITIONS, *OPENINGS, FUNCTION_WORDS]
    words = {word for text in texts for word in text.split()}
    return frozenset(words | {f"{word}s" for word in words})


def outside_world(prompt: str, height: int, width: int, num_frames: int) -> str | None:
    """What a request asks of the miniature that it has never seen, in a sentence; None if nothing.

    Args:
        prompt: as typed.
        height, width: pixels.
    """
    reasons = []
    if (height, width, num_frames) != (STAGE, STAGE, NUM_FRAMES):
        reasons.append(
            f"has seen clips of {STAGE}x{STAGE}, {NUM_FRAMES} frames only, not of "
            f"{width}x{height}, {num_frames} frames"
        )
    words = re.findall(r"[^\W\d_]+", prompt.lower())
    unknown = [word for word in dict.fromkeys(words) if word not in known_words()]
    if unknown:
        reasons.append(f"does not know the word{'s' * (len(unknown) > 1)} {', '.join(unknown[:5])}")
    if not reasons:
        return None
    examples = "; ".join(EXAMPLES)
    return f"the miniature {' and '.join(reasons)}. Three prompts that it can do: {examples}"
