"""Wan2.2 few-step video diffusion: the models and their maths."""
