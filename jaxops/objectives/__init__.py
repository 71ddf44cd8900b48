"""Losses: pure functions of parameters, batch and key that return mergeable sums."""
