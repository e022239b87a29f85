"""The captioned world of moving shapes and the small models trained on it."""

from pathlib import Path

BUILTIN = "builtin:miniature"  # what commands call the shipped student
BUILTIN_TEACHER = "builtin:miniature-teacher"
WEIGHTS = Path(__file__).parent / "weights"  # where they lie, in the released folder layout
TEACHER = Path(__file__).parent / "teacher"


def builtin_folder(name: str) -> Path | None:
    """Where a shipped model lies; None for any other name."""
    return {BUILTIN: WEIGHTS, BUILTIN_TEACHER: TEACHER}.get(name)
