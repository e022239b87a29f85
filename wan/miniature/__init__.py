"""The captioned world of moving shapes and the small model trained on it."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"  # in the released folder layout
TEACHER = WEIGHTS  # the shipped model is a teacher: it takes many steps

BUILTIN = "builtin:miniature"  # what commands call the shipped model
BUILTIN_TEACHER = "builtin:miniature-teacher"  # and the one that students learn from


def builtin_folder(name: str) -> Path | None:
    """Where a shipped model lies; None for any other name."""
    return {BUILTIN: WEIGHTS, BUILTIN_TEACHER: TEACHER}.get(name)
