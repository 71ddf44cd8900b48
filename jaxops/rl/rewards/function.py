"""A user's reward function: which columns of the data it sees, how it is called, and what its answers may be."""

import copy
import inspect
import math
import os
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxops.config.bypath import python_name, spelled
from jaxops.core.answers import Key
from jaxops.core.failures import UserError, nearest
from jaxops.rl.rewards.config import CALLED, FunctionReward

LARGEST = float(np.finfo(np.float32).max)
"""Rewards become float32, where a larger number would be infinite."""
_HERE = os.path.dirname(__file__)
_SHOWN = 500
"""Characters of a message or value of the user's that are shown."""


class Asked(NamedTuple):
    """A completion to judge.

    Attributes:
      key: its sample, by which the journal knows it.
      prompt: a text, or the messages of a conversation.
      completion: the text that the policy wrote.
      columns: the other columns of the prompt's example, by name.
    """

    key: Key
    prompt: Any
    completion: str
    columns: Mapping[str, Any] = {}


class Fault(NamedTuple):
    """Why a function has no answer: `sort` is `error` or `timeout`, and `what` happened."""

    sort: str
    what: str


class FunctionAnswer(NamedTuple):
    """The answer of a function about a completion.

    Attributes:
      score: the reward; None drops the sample.
      metrics: further numbers by name; None where it has none of that name for this completion.
    """

    score: float | None
    metrics: Mapping[str, float | None] = {}


Answer = FunctionAnswer | Fault
"""What a function says of a completion, or why there is no answer."""


class UserFunction:
    """The function of one `FunctionReward`, imported and checked.

    Args:
      config: the reward.
      columns: the names of the columns that the data has.

    Attributes:
      config: the reward.
      sees: the columns that the function is given.

    Raises:
      UserError: it cannot be imported or called, or needs a column that the data lacks; one message holds all reasons.
    """

    def __init__(self, config: FunctionReward, columns: Sequence[str]) -> None:
        self.config = config
        if wrong := [message for _, message in config.fn.complaints(CALLED)]:
            raise UserError(f"reward {config.label}: {config.fn.fn}: {'; '.join(wrong)}")
        found = config.fn.resolve()
        self._file = _source(found)
        self.sees = _seen(found, config, columns)
        self._call = config.fn.bound()

    def call(self, asked: Sequence[Asked]) -> Any:
        """Returns what the function returns for these completions: a result, or an awaitable of an async function.

        The function gets copies, so that it cannot change what others are asked.
        """
        columns = {python_name(name): [copy.deepcopy(one.columns.get(name)) for one in asked] for name in self.sees}
        prompts = [copy.deepcopy(one.prompt) for one in asked]
        return self._call(prompts, [one.completion for one in asked], **columns)

    def raised(self, error: BaseException) -> Fault:
        """Returns the fault of a call that raised, with the line of the function's own file that did it."""
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_HERE)]
        frames = [frame for frame in frames if frame.filename == self._file] or frames
        line = f" ({_relative(frames[-1].filename)}:{frames[-1].lineno}, in {frames[-1].name})" if frames else ""
        try:
            message = _short(str(error))
        except Exception:
            message = "(it cannot be shown)"
        return Fault("error", f"it raised {type(error).__name__}{': ' if message else ''}{message}{line}")


def check_columns(rewards: Sequence[Any], columns: Sequence[str]) -> None:
    """Checks that every reward function among `rewards` can be called with the columns of the data.

    Raises:
      UserError: one cannot; the message holds all reasons, each with the nearest column.
    """
    wrong = []
    for reward in rewards:
        if isinstance(reward, FunctionReward):
            try:
                UserFunction(reward, columns)
            except UserError as error:
                wrong.append(str(error))
    if wrong:
        raise UserError("\n".join(wrong))


def _seen(found: Any, config: FunctionReward, columns: Sequence[str]) -> tuple[str, ...]:
    """Returns the columns that a function is given.

    Raises:
      UserError: it needs others, or a column has the name of one of its two positional parameters.
    """
    try:
        parameters = list(inspect.signature(found).parameters.values())
    except (ValueError, TypeError):  # some builtins have no signature
        return ()
    leading = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:2]
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    free = [name for name in columns if python_name(name) not in config.fn.kwargs]  # the config's own keywords win
    known = f" (columns: {', '.join(columns) or 'none'})"
    wrong = [
        f"it needs {spelled(name)!r}, but the data has no such column{nearest(spelled(name), free)}{known}"
        for name, parameter in named.items()
        if name not in leading and parameter.default is parameter.empty
        if name not in config.fn.kwargs and name not in map(python_name, free)
    ]
    clash = [name for name in free if python_name(name) in leading and python_name(name) in named]
    if takes_all:
        wrong += [
            f"the data has a column {name!r}, which is the name of one of its positional parameters: give that"
            " parameter another name, as it is handed over by its place"
            for name in clash
        ]
    if wrong:
        raise UserError(f"reward {config.label}: {config.fn.fn}: {'; '.join(wrong)}")
    return tuple(
        name for name in free if takes_all or (python_name(name) in named and python_name(name) not in leading)
    )


def answers_of(result: Any, count: int, metrics: Sequence[str] = ()) -> list[Answer] | Fault:
    """Returns the answers in what a function returned, or one fault of the whole result.

    Args:
      result: a list of rewards, or (list of rewards, list by name of further metric).
      count: the number of completions that it was asked about.
      metrics: the names of the further metrics that it must return.
    """
    scores, further = _divided(result)
    values = _numbers(scores, count, "answers")
    if isinstance(values, Fault):
        return values
    columns: dict[str, list[float | Fault | None]] = {}
    for name in metrics:
        if name not in further:
            there = f"only {', '.join(map(_short, map(str, further)))}" if further else "none"
            return Fault("error", f"it returned no metric {name!r}, which its config names, but {there}")
        column = _numbers(further[name], count, f"values of the metric {name!r}")
        if isinstance(column, Fault):
            return column
        columns[name] = column
    return [_judged(value, {name: column[row] for name, column in columns.items()}) for row, value in enumerate(values)]


def unnamed_metrics(result: Any, metrics: Sequence[str]) -> list[str]:
    """Returns the names of metrics that a function returned and its config does not name."""
    return [_short(str(name)) for name in _divided(result)[1] if name not in metrics]


def _divided(result: Any) -> tuple[Any, Mapping[Any, Any]]:
    """Returns rewards and further metrics; a tuple of two whose second is no mapping is a tuple of two rewards."""
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping):
        return result
    return result, {}


def _judged(value: float | Fault | None, metrics: Mapping[str, float | Fault | None]) -> Answer:
    if isinstance(value, Fault):
        return value
    for name, number in metrics.items():
        if isinstance(number, Fault):
            return Fault(number.sort, f"metric {name!r}: {number.what}")
    return FunctionAnswer(value, metrics)  # type: ignore[arg-type]


def _numbers(result: Any, count: int, what: str) -> list[float | Fault | None] | Fault:
    """Returns the numbers in a list for `count` completions, or one fault of the whole list."""
    it = "it returned" if what == "answers" else f"it returned, as {what},"
    if isinstance(result, str | bytes | Mapping | set | frozenset) or not hasattr(result, "__len__"):
        return Fault("error", f"{it} {_show(result)}, not a list of {count}")
    try:
        values = list(result)
    except Exception as error:
        return Fault("error", f"{it} {_show(result)}, which cannot be read as a list: {error}")
    if len(values) != count:
        return Fault("error", f"it returned {len(values)} {what} for {count} completion{'s' if count > 1 else ''}")
    return [_number(value) for value in values]


def _number(value: Any) -> float | Fault | None:
    if value is not None and not isinstance(value, int | float) and getattr(value, "ndim", None) == 0:
        try:
            value = value.item()  # a scalar of numpy, jax or torch
        except Exception as error:
            return Fault("error", f"it answered {_show(value)}, which cannot be read: {error}")
    if value is None:
        return None
    if not isinstance(value, int | float):
        return Fault("error", f"it answered {_show(value)}: expected a finite number, or None to drop the sample")
    if isinstance(value, float) and not math.isfinite(value):
        return Fault("error", f"it answered {value}: expected a finite number, or None to drop the sample")
    if abs(value) > LARGEST:
        return Fault("error", f"it answered {_show(value)}, which float32 cannot hold")
    return float(value)


def _show(value: Any) -> str:
    try:
        return f"{_short(repr(value))} ({type(value).__name__})"
    except Exception:
        return f"a {type(value).__name__}"


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _source(found: Any) -> str:
    try:
        return inspect.getsourcefile(inspect.unwrap(found)) or ""
    except (TypeError, ValueError):
        return ""


def _relative(path: str) -> str:
    try:
        return os.path.relpath(path)
    except ValueError:  # on another drive
        return path
