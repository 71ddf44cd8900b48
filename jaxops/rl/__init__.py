"""Reinforcement learning on language models: sampling first."""
