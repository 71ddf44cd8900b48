"""Metrics, baselines and exact search, each as mergeable sums or plain numpy."""
