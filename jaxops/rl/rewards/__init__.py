"""Rewards of completions: functions of one's own, trained reward models, and penalties on the length."""
