"""Asks the user's reward functions about completions: each sample once, and every answer is journalled as it comes.

rewards = HostRewards(config.rewards, parts.journal, columns)
scored = rewards.all(mesh, size, rewards.score(asked_of_owned_rows, turn.poll))

Tested in tests/rl/test_host_rewards.py and tests/rl/test_host_rewards_faults.py.
"""

import dataclasses
import datetime
import decimal
import functools
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from jax.sharding import Mesh

from jaxops.config.dump import plain_of
from jaxops.core.answers import Key, digest_of
from jaxops.core.failures import RunFailed, UserError
from jaxops.core.interrupt import Interrupted
from jaxops.core.journal import MISSING, exchange
from jaxops.core.secret_text import printable, without_secrets
from jaxops.rl.rewards.calls import Calls, EndedCall, EventLoop, Limits, TimeOut
from jaxops.rl.rewards.config import FunctionReward, Reward
from jaxops.rl.rewards.function import Answer, Asked, Fault, FunctionAnswer, UserFunction, answers_of, unnamed_metrics

ROUNDS = 4
"""How many parts the samples are asked in, one after the other; `poll` is called before each.

It is fixed, since all processes must poll equally often, however many of their answers the journal holds.
"""
_EXCERPT = 200
_LOGGER = logging.getLogger("jaxops.rewards")


class FunctionScores(NamedTuple):
    """The answers of all functions about one completion.

    Attributes:
      scores: the answer of each function, by name; None drops the sample.
      faults: `error` or `timeout` by name, of the functions that had no answer.
      metrics: the further metrics of each function that has any and had an answer, by the names of both.
    """

    scores: Mapping[str, float | None]
    faults: Mapping[str, str]
    metrics: Mapping[str, Mapping[str, float | None]] = {}


class KnownAnswers(Protocol):
    """Known answers, by sample and question: a `Journal`, or `Unkept`."""

    def lookup(self, key: Key, digest: str) -> Any:
        """Returns the known answer, or MISSING."""
        ...

    def record(self, key: Key, digest: str, answer: Any) -> Any:
        """Keeps an answer, and returns it."""
        ...

    def flush(self) -> None:
        """Makes what was recorded durable."""
        ...


class Unkept:
    """Keeps no answers: an evaluation asks for all of them again."""

    def lookup(self, key: Key, digest: str) -> Any:
        """Returns MISSING."""
        del key, digest
        return MISSING

    def record(self, key: Key, digest: str, answer: Any) -> Any:
        """Returns the answer."""
        del key, digest
        return answer

    def flush(self) -> None:
        """Does nothing."""


@dataclasses.dataclass(frozen=True)
class _Row:
    """A sample while it is asked about."""

    asked: Asked
    digest: str
    scores: dict[str, float | None]
    faults: dict[str, str]
    metrics: dict[str, Mapping[str, float | None]]

    @property
    def answer(self) -> dict[str, Any]:
        """The sample's answers as the journal keeps them."""
        return _answer_of(FunctionScores(self.scores, self.faults, self.metrics))


def _warn(text: str) -> None:
    _LOGGER.warning("%s", printable(text))


class HostRewards:
    """The reward functions of a run, and the journal of their answers.

    A call with several samples that fails is made again sample by sample. So the fault is that of one sample, and the
    answers for the others count. A function counts as silent after more than 2 * workers late calls in a row, those of
    several samples left out. The samples of its late calls are then not asked about alone, until it answers again.

    Args:
      rewards: all rewards of the run, of which the functions are used.
      journal: the journal of the run; `Unkept()` keeps no answers.
      columns: the names of the columns that the data has.
      say: it is called with each line that a person should read; by default a warning of the logger `jaxops.rewards`.

    Attributes:
      names: the names of the functions.

    Raises:
      UserError: a function cannot be imported or called with these columns.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        journal: KnownAnswers,
        columns: Sequence[str] = (),
        say: Callable[[str], None] = _warn,
    ) -> None:
        self._functions = {
            reward.label: UserFunction(reward, columns) for reward in rewards if isinstance(reward, FunctionReward)
        }
        self._loops = {name: EventLoop() for name in self._functions}
        self._journal, self._say = journal, say
        self._said: set[tuple[str, str]] = set()
        self._late = dict.fromkeys(self._functions, 0)
        """How many calls of a function were late, one after the other; calls that are made again are not among them."""
        self._specs = [[name, plain_of(function.config.fn)] for name, function in self._functions.items()]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._functions)

    def score(self, asked: Sequence[Asked], poll: Callable[[], bool]) -> list[FunctionScores]:
        """Returns what the functions say of these completions; what the journal knows is not asked again.

        Answers are durable when it returns or raises. It calls `poll` ROUNDS times.

        Raises:
          Interrupted: `poll` returned true.
          RunFailed: a function with `on_error: stop` had no answer; the message names the sample and what happened.
          UserError: a column holds a value that has no digest.
        """
        rows = [self._known(one) for one in asked]
        try:
            for part in range(ROUNDS):
                if poll():
                    raise Interrupted
                self._ask(rows[part * len(rows) // ROUNDS : (part + 1) * len(rows) // ROUNDS])
        finally:
            self._journal.flush()
        return [FunctionScores(row.scores, row.faults, row.metrics) for row in rows]

    def all(self, mesh: Mesh, size: int, mine: Sequence[FunctionScores]) -> list[FunctionScores]:
        """Returns what was said of all `size` completions, in global order, on every process; see `journal.exchange`.

        Args:
          mesh: the mesh that the batch is sharded over.
          size: the number of rows of the batch.
          mine: what was said of the rows that this process owns, in the order of `owned_rows(mesh, size)`.
        """
        if not self._functions:
            return [FunctionScores({}, {})] * size
        answers = exchange(mesh, size, [_answer_of(one) for one in mine])
        return [FunctionScores(*_scored_in(answer)) for answer in answers]

    def _known(self, asked: Asked) -> _Row:
        if not self._functions:
            return _Row(asked, "", {}, {}, {})
        digest = self._digest(asked)
        return _Row(asked, digest, *_scored_in(self._journal.lookup(asked.key, digest)))

    def _digest(self, asked: Asked) -> str:
        """The digest of all that the functions are asked with: their paths and keywords, the texts and the columns."""
        seen = sorted({name for function in self._functions.values() for name in function.sees})
        columns = {name: _jsonable(asked.columns.get(name)) for name in seen}
        question = [self._specs, _jsonable(asked.prompt), asked.completion, columns]
        try:
            return digest_of(question)
        except TypeError as error:
            raise UserError(
                f"example {asked.key.id}: its prompt or a column that a reward sees ({', '.join(seen) or 'none'}) holds"
                f" a value of which no digest can be taken: {error}"
            ) from error

    def _ask(self, rows: Sequence[_Row]) -> None:
        """Asks every function about the rows whose answer it has not given yet.

        Raises:
          RunFailed: a function with `on_error: stop` had no answer; calls that were running have ended by then.
        """
        calls: Calls[str, list[_Row]] = Calls()
        for name, function in self._functions.items():
            config = function.config
            calls.open(name, Limits(config.workers, config.timeout.seconds), self._loops[name])
            missing = [row for row in rows if name not in row.scores]
            for chunk in _chunks(missing, config.workers):
                self._add(calls, name, chunk)
        stopped: str | None = None
        for ended in calls:
            found = self._answers(ended)
            if isinstance(found, Fault) and len(ended.tag) > 1 and not self._is_down(ended.group):
                if stopped is None:
                    self._note_call(ended.group, ended.tag, found)
                    for row in ended.tag:
                        self._add(calls, ended.group, [row])
                continue
            for row, answer in self._each(calls, ended, found):
                message = self._take(ended.group, row, answer)
                if message is not None and stopped is None:
                    stopped = message
                    calls.clear()  # what is running may end: its answers are not lost
        if stopped is not None:
            raise RunFailed(stopped)

    def _add(self, calls: Calls[str, list[_Row]], name: str, rows: list[_Row]) -> None:
        calls.add(name, rows, functools.partial(self._functions[name].call, [row.asked for row in rows]))

    def _is_down(self, name: str) -> bool:
        """Whether so many calls of single samples were late, one after the other, that further ones would be too."""
        return self._late[name] > 2 * self._functions[name].config.workers

    def _each(
        self, calls: Calls[str, list[_Row]], ended: EndedCall[str, list[_Row]], found: list[Answer] | Fault
    ) -> list[tuple[_Row, Answer]]:
        """Returns the rows of a call with their answers, and those that wait where the function has gone silent."""
        name = ended.group
        if not isinstance(found, Fault):
            self._late[name] = 0
            return list(zip(ended.tag, found, strict=True))
        each: list[tuple[_Row, Answer]] = [(row, found) for row in ended.tag]
        self._late[name] = self._late[name] + 1 if found.sort == "timeout" else 0
        if self._is_down(name):
            silent = Fault("timeout", f"it was not asked, since the last {self._late[name]} calls were all late")
            each += [(row, silent) for waiting in calls.clear(name) for row in waiting]
        return each

    def _answers(self, ended: EndedCall[str, list[_Row]]) -> list[Answer] | Fault:
        function = self._functions[ended.group]
        if isinstance(ended.error, TimeOut):
            return Fault("timeout", f"it did not answer within {function.config.timeout.to_config()}")
        if ended.error is not None:
            return function.raised(ended.error)
        named = function.config.metrics
        if (more := unnamed_metrics(ended.result, named)) and self._is_news(ended.group, "metrics"):
            self._say(
                f"reward {ended.group}: it returns metrics that its config does not name, and that are left out:"
                f" {', '.join(more)}. `metrics: [{more[0]}]` beside its `fn` has them logged."
            )
        return answers_of(ended.result, len(ended.tag), named)

    def _take(self, name: str, row: _Row, answer: Answer) -> str | None:
        """Records an answer as the journal's, or what becomes of a fault; returns the message that stops the run."""
        if isinstance(answer, Fault):
            on_error = self._functions[name].config.on_error
            if on_error == "stop":
                advice = "on_error: drop (or zero) goes on without the answer; what others have answered is kept."
                return f"{self._told(name, row, answer)}\n{advice}"
            self._note(name, row, answer)
            row.faults[name] = answer.sort
            answer = FunctionAnswer(None if on_error == "drop" else 0.0)
        row.scores[name] = answer.score
        if answer.metrics:
            row.metrics[name] = answer.metrics
        self._journal.record(row.asked.key, row.digest, row.answer)
        return None

    def _note(self, name: str, row: _Row, fault: Fault) -> None:
        """Says the first fault of each sort; the metrics count all."""
        if self._is_news(name, fault.sort):
            becomes = {"drop": "The sample is dropped", "zero": "It scores 0"}[self._functions[name].config.on_error]
            self._say(f"{self._told(name, row, fault)}\n{becomes}; further {fault.sort}s are counted and not shown.")
        if fault.sort == "timeout" and self._is_news(name, "thread"):
            self._say(f"reward {name}: a late call cannot be ended, unless it is async; its thread is left behind.")

    def _note_call(self, name: str, rows: Sequence[_Row], fault: Fault) -> None:
        """Says the first fault of each sort of a call with several samples."""
        if self._is_news(name, f"{fault.sort} of a call"):
            first, last = rows[0].asked.key, rows[-1].asked.key
            said = without_secrets(f"reward {name}, step {first.step}, a call with {len(rows)} samples: {fault.what}")
            self._say(
                f"{said}\nThey are asked about one by one: example {first.id}, copy {first.copy}, to example {last.id},"
                f" copy {last.copy}."
            )

    def _is_news(self, name: str, sort: str) -> bool:
        if (name, sort) in self._said:
            return False
        self._said.add((name, sort))
        return True

    def _told(self, name: str, row: _Row, fault: Fault) -> str:
        asked = row.asked
        return without_secrets(
            f"reward {name} ({self._functions[name].config.fn.fn}), step {asked.key.step}, example {asked.key.id},"
            f" copy {asked.key.copy}: {fault.what}\n"
            f"  prompt: {_excerpt(asked.prompt)}\n"
            f"  completion: {_excerpt(asked.completion)}"
        )


def _chunks(rows: Sequence[_Row], count: int) -> Iterator[list[_Row]]:
    """Yields up to `count` chunks of nearly one size."""
    count = min(count, len(rows))
    for part in range(count):
        yield list(rows[part * len(rows) // count : (part + 1) * len(rows) // count])


def _answer_of(said: FunctionScores) -> dict[str, Any]:
    metrics = {name: dict(found) for name, found in said.metrics.items()}
    return {"scores": dict(said.scores), "faults": dict(said.faults), **({"metrics": metrics} if metrics else {})}


def _scored_in(answer: Any) -> tuple[dict[str, float | None], dict[str, str], dict[str, Mapping[str, float | None]]]:
    """Returns scores, faults and metrics of an answer of the journal; nothing where it is none of ours."""
    if not isinstance(answer, Mapping) or not isinstance(answer.get("scores"), Mapping):
        return {}, {}, {}
    return dict(answer["scores"]), dict(answer.get("faults") or {}), dict(answer.get("metrics") or {})


def _jsonable(value: Any) -> Any:
    """Returns plain values with those that JSON lacks (dates, bytes, decimals) as their type and text."""
    if isinstance(value, Mapping):
        return {key: _jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(entry) for entry in value]
    if isinstance(value, bytes | bytearray):
        return [type(value).__name__, value.hex()]
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta | decimal.Decimal | uuid.UUID):
        return [type(value).__name__, str(value)]
    return value


def _excerpt(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return repr(text[:_EXCERPT]) + ("..." if len(text) > _EXCERPT else "")
