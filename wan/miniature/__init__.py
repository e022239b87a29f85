"""The captioned world of moving shapes and the small model trained on it."""

from pathlib import Path

BUILTIN = "builtin:miniature"  # what commands call the shipped model
WEIGHTS = Path(__file__).parent / "weights"  # where it lies, in the released folder layout
