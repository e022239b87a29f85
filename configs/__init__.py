"""Run settings: YAML values and the dataclasses that check them."""
