"""How a config reaches machines: the table of accelerators, and the engine of `jaxops launch`."""
