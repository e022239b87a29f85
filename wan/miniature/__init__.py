"""The captioned world of moving shapes and the small model trained on it."""
