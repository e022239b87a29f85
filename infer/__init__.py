"""Commands that run the models."""
