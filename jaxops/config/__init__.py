"""Reads a frozen dataclass from YAML and overrides, with errors that help; it knows no model and no jax."""
