"""How a config reaches machines: the table of accelerators."""
