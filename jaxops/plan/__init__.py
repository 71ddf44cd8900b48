"""Ahead of time: memory, collectives and FLOPs of a config on a mesh that is not here."""
