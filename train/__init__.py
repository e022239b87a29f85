"""Commands that change weights."""
