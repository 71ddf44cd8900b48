"""Reward functions and judges of the tests of policies; a copy lies in the folder of their runs."""

import json
import os


def low(prompts, completions):
    """Likes characters of the first half of ASCII; each call is written down where ASKED names a file."""
    note(prompts, completions)
    return [sum(ord(c) < 64 for c in text) / max(len(text), 1) for text in completions]


def measured(prompts, completions):
    """The same, with the number of characters as a further metric; of long completions there is none."""
    return low(prompts, completions), {"characters": [len(text) if len(text) < 6 else None for text in completions]}


def note(prompts, completions):
    if place := os.environ.get("ASKED"):
        with open(place, "a") as file:
            for row in zip(prompts, completions, strict=True):
                file.write(json.dumps(row) + "\n")


def answered(prompts, completions, answer, level=0):
    assert all(said.startswith("a") for said in answer) and len(answer) == len(prompts)
    return [float(said[1:] == asked.removeprefix("say ")) for said, asked in zip(answer, prompts, strict=True)]


def everything(prompts, completions, **columns):
    assert sorted(columns) == ["answer", "level"]
    return [float(level) for level in columns["level"]]


def needs(prompts, completions, solution):
    return [0.0 for _ in prompts]


def half(prompts, completions, level):
    """Drops a third and fails at another."""
    if len(prompts) == 1 and level[0] == 1:
        raise ValueError("no level 1")
    if 1 in level:
        raise ValueError("no level 1 among them")
    return [None if one == 2 else 1.0 for one in level]


def longer(prompts, completions, references):
    return [float(len(one) > len(other)) for one, other in zip(completions, references, strict=True)]


def wrong_judge(prompts, completions, references):
    return [2.0]


one_arg = len
