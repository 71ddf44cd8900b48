"""How a frozen dataclass is read from YAML and overrides, with errors that help; knows no model, no jax."""
