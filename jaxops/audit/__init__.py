"""Checks of an objective, a model and a step on a mesh, each with a verdict, what was measured and its bound."""
