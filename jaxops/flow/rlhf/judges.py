"""The judges of pairs of answers: files that people write, a simulated panel, and functions of one's own."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxops.core.failures import UserError, nearest
from jaxops.data.text.formats import read_rows
from jaxops.flow.rlhf.config import FileJudge, FunctionJudge, PanelJudge
from jaxops.flow.rlhf.pairs import AnswerPair, Vote
from jaxops.run.load import load

CHOICES: Mapping[str, float] = {"a": 1.0, "b": 0.0, "tie": 0.5}
"""How probable a choice makes it that the first answer is the better one."""


class TooFewVotes(Exception):
    """Too few pairs are answered.

    Attributes:
      missing: the number of pairs without an answer.
    """

    def __init__(self, missing: int, of: int, where: str) -> None:
        super().__init__(f"{missing} of {of} pairs have no answer in {where}")
        self.missing = missing


class PairJudge(Protocol):
    """Judges pairs of answers."""

    def votes(self, pairs: Sequence[AnswerPair], required: bool = True) -> list[Vote]:
        """Returns what is said of the pairs, one vote or more for each that is judged.

        Args:
          pairs: the pairs.
          required: whether too few answers are an error.

        Raises:
          TooFewVotes: people have not answered enough of them.
          UserError: an answer means nothing.
        """
        ...


def judge_of(config: FileJudge | PanelJudge | FunctionJudge, seed: int) -> PairJudge:
    """Returns the judge of a config.

    Raises:
      UserError: it cannot be opened.
    """
    if isinstance(config, FileJudge):
        return Files(config)
    if isinstance(config, PanelJudge):
        return Panel(config, seed)
    return Function(config)


class Files:
    """People's answers in files. Of several answers of one annotator to one pair the last counts."""

    def __init__(self, config: FileJudge) -> None:
        self._config = config

    def votes(self, pairs: Sequence[AnswerPair], required: bool = True) -> list[Vote]:
        """Returns the answers that the files have of these pairs, in the order of the files."""
        known = {pair.id for pair in pairs}
        given = [vote for where, row in self._rows() if (vote := _vote(where, row)).id in known]
        last = {(vote.id, at if vote.annotator is None else vote.annotator): vote for at, vote in enumerate(given)}
        found = list(last.values())
        answered = len({vote.id for vote in found})
        if required and answered < self._config.enough * len(pairs):
            raise TooFewVotes(len(pairs) - answered, len(pairs), self._config.path)
        return found

    def _rows(self) -> list[tuple[str, dict[str, Any]]]:
        path = Path(self._config.path).expanduser()
        if not path.exists():
            return []
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        return [row for file in files if file.stat().st_size for row in read_rows(str(file))]


def _vote(where: str, row: Mapping[str, Any]) -> Vote:
    for name in ("id", "choice"):
        if name not in row:
            raise UserError(f"{where}: no {name!r} (there are: {', '.join(map(str, row))}){nearest(name, row)}")
    choice = str(row["choice"]).strip().lower()
    if choice not in CHOICES:
        raise UserError(f"{where}: choice is {row['choice']!r}, expected a, b or tie{nearest(choice, CHOICES)}")
    annotator = row.get("annotator")
    return Vote(str(row["id"]), CHOICES[choice], None if annotator is None else str(annotator))


class Panel:
    """Members of a simulated panel, who vote by a reward model's scores and by chance."""

    def __init__(self, config: PanelJudge, seed: int) -> None:
        self._config, self._seed = config, seed
        self._served = load(config.run)
        if not hasattr(self._served, "heads"):
            task = self._served.saved.config.task
            raise UserError(f"judge.run: {config.run} is a run of task {task}, which judges no texts")

    def votes(self, pairs: Sequence[AnswerPair], required: bool = True) -> list[Vote]:
        """Returns the vote of every member on every pair; the same pair always gets the same votes."""
        del required
        prompts = [pair.prompt for pair in pairs]
        scores = [
            self._served.heads(prompts, [getattr(pair, side) for pair in pairs]).mean(axis=1)  # type: ignore[attr-defined]
            for side in ("a", "b")
        ]
        found = []
        for pair, apart in zip(pairs, scores[0] - scores[1], strict=True):
            for member in range(self._config.members):
                found.append(Vote(pair.id, self._choice(pair.id, member, float(apart)), f"panel-{member}"))
        return found

    def _choice(self, pair: str, member: int, apart: float) -> float:
        if self._config.noise == 0:
            return 0.5 if apart == 0 else float(apart > 0)
        sure = 1 / (1 + np.exp(np.clip(-apart / self._config.noise, -50, 50)))
        key = [self._seed, member, *pair.encode()]
        return float(np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).random() < sure)


class Function:
    """A function of one's own."""

    def __init__(self, config: FunctionJudge) -> None:
        self._name = config.fn.fn
        self._call: Callable[..., Any] = config.fn.bound()

    def votes(self, pairs: Sequence[AnswerPair], required: bool = True) -> list[Vote]:
        """Returns what the function says of each pair."""
        del required
        said = list(self._call([pair.prompt for pair in pairs], [pair.a for pair in pairs], [pair.b for pair in pairs]))
        if len(said) != len(pairs):
            raise UserError(f"judge {self._name}: {len(said)} answers for {len(pairs)} pairs")
        found = []
        for pair, one in zip(pairs, said, strict=True):
            if isinstance(one, bool | np.bool_ | int | float | np.number) and 0 <= float(one) <= 1:
                found.append(Vote(pair.id, float(one), None))
            else:
                raise UserError(
                    f"judge {self._name}: it said {json.dumps(one, default=repr)[:100]} of pair {pair.id}, expected the"
                    " probability from 0 to 1 that the first answer is better"
                )
        return found
