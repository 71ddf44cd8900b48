"""Search: a sweep whose points are proposed by Optuna, which learns from those that have ended."""
