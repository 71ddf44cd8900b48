"""Reward functions as users write them, good and bad; `ASKED` notes what each call was asked."""

import asyncio
import threading

import numpy as np

from jaxops.config.bypath import ByPath
from jaxops.config.types import Duration
from jaxops.core.answers import Key
from jaxops.rl.rewards.config import FunctionReward
from jaxops.rl.rewards.function import Asked

ASKED: list[list[str]] = []
MEETING = threading.Barrier(2)
RELEASED = threading.Event()


def reward(fn: str, **fields) -> FunctionReward:
    """The reward of a function of this module; `kwargs` and `seconds` are those of its path and time-out."""
    path = ByPath(f"reward_functions:{fn}", fields.pop("kwargs", {}), fields.pop("guard", None))
    return FunctionReward(fn=path, timeout=Duration(fields.pop("seconds", 20.0)), **fields)


def asked(*completions: str, step: int = 1, **columns: list) -> list[Asked]:
    return [
        Asked(Key(step, 10 + i), f"prompt {i}", completion, {name: values[i] for name, values in columns.items()})
        for i, completion in enumerate(completions)
    ]


def length(prompts, completions, **columns):
    ASKED.append(list(completions))
    return [len(completion) for completion in completions]


def measures(prompts, completions):
    """A reward and further metrics; completions say what goes wrong with these."""
    ASKED.append(list(completions))
    vowels = [sum(one in "aeiou" for one in text) / len(text) if text else None for text in completions]
    words = [len(text.split()) for text in completions]
    if "short" in completions:
        words.pop()
    if "nan" in completions:
        words[completions.index("nan")] = float("nan")
    found = {"words": np.array(words), "vowels": vowels, "of no interest": words}
    if "less" in completions:
        del found["vowels"]
    return [float(len(text)) for text in completions], found


async def measures_later(prompts, completions):
    return measures(prompts, completions)


async def length_later(prompts, completions):
    ASKED.append(list(completions))
    await asyncio.sleep(0)
    return [float(len(completion)) for completion in completions]


def exact(prompts, completions, answer, bonus=0.0):
    ASKED.append(list(completions))
    return [float(one == right) + bonus for one, right in zip(completions, answer, strict=True)]


def names_of_columns(prompts, completions, **columns):
    return [len(columns) + 100 * ("answer" in columns) for _ in completions]


def scalars(prompts, completions):
    kinds = {"int": 2, "bool": True, "none": None, "numpy": np.float32(0.5), "array": np.array(3), "long": np.int64(7)}
    return [kinds[one] for one in completions]


def as_array(prompts, completions):
    return np.arange(len(completions), dtype=np.float32)


def bad_where(prompts, completions):
    """Each completion says what goes wrong."""
    ASKED.append(list(completions))
    special = {"nan": float("nan"), "inf": float("inf"), "huge": 1e39, "text": "0.5", "list": [1.0], "none": None}
    if "raise" in completions:
        raise ValueError("no number in it")
    if "exit" in completions:
        raise SystemExit(3)
    if "hang" in completions:
        RELEASED.wait(20)
    return [special.get(one, float(len(one))) for one in completions if one != "skip"]


async def bad_later(prompts, completions):
    ASKED.append(list(completions))
    if "raise" in completions:
        raise KeyError("answer")
    if "hang" in completions:
        try:
            await asyncio.sleep(20)
        except asyncio.CancelledError:
            ASKED.append(["cancelled"])
            raise
    if "block" in completions:
        RELEASED.wait(20)
    return [float(len(one)) for one in completions]


def changes_what_it_gets(prompts, completions, tags):
    for messages, each in zip(prompts, tags, strict=True):
        messages.append({"role": "user", "content": "more"})
        each.clear()
    return [0.0 for _ in completions]


def sees(prompts, completions, tags):
    return [float(len(messages) + 10 * len(each)) for messages, each in zip(prompts, tags, strict=True)]


def together(prompts, completions):
    """Returns only where two calls run at a time."""
    MEETING.wait(10)
    return [1.0] * len(completions)


async def together_later(prompts, completions):
    await asyncio.to_thread(MEETING.wait, 10)
    return [1.0] * len(completions)


def text(prompts, completions):
    return "0.5"


def without_duplicates(prompts, completions):
    return [float(len(one)) for one in dict.fromkeys(completions)]


def silent(prompts, completions):
    ASKED.append(list(completions))
    RELEASED.wait(20)


def keyed(prompts, completions, key):
    raise RuntimeError(f"the service refused {key}")


def slow_for_several(prompts, completions):
    if len(completions) > 1:
        RELEASED.wait(20)
    return [float(len(one)) for one in completions]
