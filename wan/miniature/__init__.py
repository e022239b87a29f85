"""The captioned world of moving shapes and the small models trained on it."""

from pathlib import Path

# In the released folder layout; the teacher takes all but its transformer from the student
STUDENT = Path(__file__).parent / "student"  # few steps: what commands run by default
TEACHER = Path(__file__).parent / "teacher"  # many steps, with guidance: what it learnt from

BUILTIN = "builtin:miniature"
BUILTIN_TEACHER = "builtin:miniature-teacher"
SHIPPED = {"mini": BUILTIN, "mini-teacher": BUILTIN_TEACHER}  # as people call them


def builtin_folder(name: str) -> Path | None:
    """Where a shipped model lies; None for any other name."""
    return {BUILTIN: STUDENT, BUILTIN_TEACHER: TEACHER}.get(name)
