"""Launches written down for other machinery: a JobSet for GKE, a task for SkyPilot, a job for Ray. Pure functions."""
