"""The loop of RLHF: rounds of pairs, votes, a reward model and a policy; a loop that was killed goes on where it was.

Each round is a folder: `pairs.jsonl`, `votes.jsonl`, the runs `reward` and `policy`, `comparisons.jsonl` and
`round.json`. A step of a round is done when its file is there; training resumes by itself. So the same call again does
what is missing. Tested in tests/flow/test_rlhf.py.
"""

import dataclasses
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxops.config.dump import diff
from jaxops.config.load import Loaded
from jaxops.core import stores
from jaxops.core.failures import UserError
from jaxops.core.whole_files import replace_file
from jaxops.evaluate.win_rate import WinRate, win_rate
from jaxops.flow.rlhf.compare import compared, outcomes
from jaxops.flow.rlhf.config import FileJudge, RlhfConfig
from jaxops.flow.rlhf.judges import PairJudge, judge_of
from jaxops.flow.rlhf.lineage import digest_of_file, weights_of
from jaxops.flow.rlhf.pairs import AnswerPair, Vote, preferences, read_pairs, write_lines
from jaxops.flow.rlhf.prompts import LoopPrompts, asked
from jaxops.run.build import build_task, completed, config_from_dict, load_config
from jaxops.run.fit import train_task
from jaxops.run.folder.run_folder import shown_value
from jaxops.run.load import load

PAIRS, VOTES, COMPARED, ROUND, LINEAGE = (
    "pairs.jsonl",
    "votes.jsonl",
    "comparisons.jsonl",
    "round.json",
    "lineage.json",
)
Say = Callable[[str], None]


class Stopped(Exception):
    """A run of the loop was stopped by a signal, and has saved."""


@dataclasses.dataclass(frozen=True)
class Round:
    """One round of the loop.

    Attributes:
      number: from 1.
      folder: its folder.
      start: the address of the model that its policy begins as.
      before: the round before; None for the first.
    """

    number: int
    folder: Path
    start: str
    before: "Round | None"

    @property
    def policy(self) -> Path:
        """The folder of its policy's run."""
        return self.folder / "policy"

    @property
    def reward(self) -> Path:
        """The folder of its reward model's run."""
        return self.folder / "reward"


class RlhfLoop:
    """The loop of a config.

    Args:
      loaded: the config.
      say: it is called with each line that a person should read.

    Raises:
      UserError: a config that it names is wrong, or does not go with the others.
    """

    def __init__(self, loaded: Loaded[RlhfConfig], say: Say) -> None:
        self.config, self._say = loaded.config, say
        self.folder = Path(self.config.run.dir).expanduser() / self.config.run.name
        self._policy, self._reward = load_config(self.config.policy), load_config(self.config.reward)
        self._check()
        self._first = str(self._policy.config.model.weights)
        self._resolved = loaded.resolved
        self._judge: PairJudge | None = None
        self._prompts = LoopPrompts(self.config, self._policy.config)

    def _check(self) -> None:
        if jax.process_count() > 1:
            raise UserError(f"jaxops rlhf runs in one process, but this is one of {jax.process_count()}")
        if stores.is_url(self.config.run.dir):
            raise UserError(f"run.dir: the loop keeps its files in a local folder, not in {self.config.run.dir}")
        policy, reward = self._policy.config, self._reward.config
        if policy.task != "policy":
            raise UserError(f"policy: {self.config.policy} is a config of task {policy.task}, expected policy")
        if reward.task != "reward":
            raise UserError(f"reward: {self.config.reward} is a config of task {reward.task}, expected reward")
        if not hasattr(policy.model, "weights"):
            raise UserError(f"policy: {self.config.policy} has fresh parameters; the loop begins with model.weights")
        if getattr(reward.data, "kind", "preferences") != "preferences":
            raise UserError(
                f"reward: {self.config.reward} learns from data of another kind; votes are kind: preferences"
            )
        judged = [one for one in self._policy.resolved["rewards"] if "run" in one]
        if len(judged) != 1:
            raise UserError(
                f"policy: {self.config.policy} has {len(judged)} rewards that are runs; expected one ({{run: round}}),"
                " in whose place each round has its own reward model"
            )

    def run(self) -> list[dict[str, Any]]:
        """Runs what is missing of all rounds, and returns what each found.

        Raises:
          TooFewVotes: people have not answered enough pairs of a round.
          Stopped: a run was stopped by a signal.
          UserError, RunFailed: what training and sampling raise.
        """
        self._begin()
        for config in self.config.prepare:
            self._say(f"before the first round: {config}")
            _trained(load_config(config))
        found, before = [], None
        for number in range(1, self.config.rounds + 1):
            folder = self.folder / f"round-{number}"
            folder.mkdir(exist_ok=True)
            last = before is not None and self.config.start == "last"
            now = Round(number, folder, str(before.policy) if last and before is not None else self._first, before)
            found.append(self._round(now))
            before = now
            _write_json(self.folder / LINEAGE, {"version": 1, "first": self._first, "rounds": found})
        return found

    @property
    def waiting_for(self) -> Path:
        """The file with the pairs of the first round that is not judged."""
        numbers = range(1, self.config.rounds + 1)
        folders = [self.folder / f"round-{number}" for number in numbers]
        return next(folder / PAIRS for folder in folders if not (folder / VOTES).exists())

    def _begin(self) -> None:
        """Makes the folder, and refuses one that other configs have begun."""
        self.folder.mkdir(parents=True, exist_ok=True)
        told = ("run.name", "run.dir")  # the loop sets them itself
        may_change: dict[str, tuple[str, ...]] = {
            "loop": ("rounds",),
            "policy": (*self._policy.config.may_change_on_resume, *told),
            "reward": (*self._reward.config.may_change_on_resume, *told),
        }
        kept = {"loop": self._resolved, "policy": self._policy.resolved, "reward": self._reward.resolved}
        there = self.folder / "loop.json"
        if not there.exists():
            _write_json(there, kept)
            return
        before, here = json.loads(there.read_text(encoding="utf-8")), json.loads(json.dumps(kept))
        if before.keys() != here.keys():
            raise UserError(f"{there} is not of this version of jaxops; set run.name to begin another loop")
        # Fields that are newer than the loop.
        before["loop"] = {"prepare": [], **before["loop"]}
        before |= {part: json.loads(json.dumps(completed(before[part], part))) for part in ("policy", "reward")}
        changed = [
            f"  {part}: {path}: {shown_value(old)} there, {shown_value(new)} here"
            for part, free in may_change.items()
            for path, old, new in diff(before[part], here[part])
            if not any(path == one or path.startswith(one + ".") for one in free)
        ]
        if changed:
            raise UserError(
                f"{self.folder} is a loop of other configs:\n" + "\n".join(changed) + "\nOf the loop `rounds` alone may"
                " change, and of its policy and reward model what a resumed run may change. Set run.name to begin"
                " another loop."
            )

    def _round(self, now: Round) -> dict[str, Any]:
        if (done := now.folder / ROUND).exists():
            self._say(f"round {now.number} is done: {done}")
            found = dict(json.loads(done.read_text(encoding="utf-8")))
            if isinstance(self.config.judge, FileJudge):  # people may have compared more answers since
                rate = self._compare(now)
                found["win_rate"] = None if rate is None else rate._asdict()
                _write_json(done, found)
            return found
        pairs = self._pairs(now)
        votes = self._votes(now, pairs)
        self._say(f"round {now.number}: a reward model from the votes of {now.number} round(s)")
        self._fit(self._reward.resolved, self._reward_changes(now))
        self._say(f"round {now.number}: a policy from {now.start}")
        self._fit(self._policy.resolved, self._policy_changes(now))
        rate = self._compare(now)
        found = {
            "round": now.number,
            "start": now.start,
            "pairs": {"count": len(pairs), "sha256": digest_of_file(now.folder / PAIRS)},
            "votes": {"count": len(votes), "sha256": digest_of_file(now.folder / VOTES)},
            "reward": weights_of(now.reward),
            "policy": weights_of(now.policy),
            "win_rate": None if rate is None else rate._asdict(),
        }
        _write_json(now.folder / ROUND, found)
        return found

    def _pairs(self, now: Round) -> list[AnswerPair]:
        """Returns the pairs of a round, sampled where they are not there yet."""
        if not (path := now.folder / PAIRS).exists():
            wanted = self.config.pairs.per_round
            judged = self.config.pairs.choose == "disagreement" and now.before is not None
            many = wanted * (self.config.pairs.candidates if judged else 1)
            rng = random.Random(f"{self.config.run.seed} {now.number}")
            prompts = self._prompts.sampled
            rows = rng.sample(prompts, many) if many <= len(prompts) else rng.choices(prompts, k=many)
            self._say(f"round {now.number}: sampling {many} pairs of answers")
            models = [now.start if side == "policy" else self._first for side in self.config.pairs.from_]
            sides = self._answers(models, rows, [now.number * 2 + at for at in range(len(models))])
            found, left = [], 0
            for at, (row, a, b) in enumerate(zip(rows, *sides, strict=True)):
                if a == b or not (_is_text(a) and _is_text(b)):
                    left += 1
                else:
                    found.append(AnswerPair(f"{self.config.run.name}-{now.number}-{at:06}", asked(row), a, b))
            if left:
                self._say(
                    f"round {now.number}: {left} of {many} pairs are left out: answers are equal, blank or no text"
                )
            if not found:
                raise UserError(f"round {now.number}: no pair is left: nothing can be preferred")
            if judged and now.before is not None:
                found = self._disagreed(now.before, found)[:wanted]
            write_lines(path, map(dataclasses.asdict, found))
        return read_pairs(path)

    def _answers(
        self, models: Sequence[str], rows: Sequence[Mapping[str, Any]], seeds: Sequence[int]
    ) -> list[list[str]]:
        """Returns the answers of each model to the same prompts; only one model is in memory at a time."""
        answers, found = self.config.answers, []
        loaded: str | None = None
        served: Any = None
        for model, seed in zip(models, seeds, strict=True):
            if model != loaded:
                served = None  # the one before is freed first
                loaded, served = model, load(model)
            table = served.generate(
                [dict(row) for row in rows],
                seed=self.config.run.seed * 1000 + seed,
                max_tokens=answers.max_tokens,
                temperature=answers.temperature,
                slots=answers.slots,
            )
            found.append([str(text) for text in table.column("completion").to_pylist()])
        return found

    def _disagreed(self, before: Round, pairs: list[AnswerPair]) -> list[AnswerPair]:
        """Returns pairs in the order of the disagreement of the heads of the last round's reward model."""
        served: Any = load(str(before.reward))
        prompts = [pair.prompt for pair in pairs]
        apart = served.heads(prompts, [pair.a for pair in pairs]) - served.heads(prompts, [pair.b for pair in pairs])
        if apart.shape[1] < 2:
            raise UserError("pairs.choose: one head cannot disagree; give the reward model an ensemble of 2 or more")
        order = np.argsort(-apart.std(axis=1, ddof=1), kind="stable")
        return [pairs[at] for at in order]

    def _votes(self, now: Round, pairs: list[AnswerPair]) -> list[Vote]:
        """Returns the votes of a round, asked for where they are not there yet."""
        if (path := now.folder / VOTES).exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            return [Vote(row["id"], row["label"], row.get("annotator")) for row in map(json.loads, lines)]
        votes = self._judging.votes(pairs)
        write_lines(path, preferences(pairs, votes))
        return votes

    @property
    def _judging(self) -> PairJudge:
        if self._judge is None:
            self._judge = judge_of(self.config.judge, self.config.run.seed)
        return self._judge

    def _reward_changes(self, now: Round) -> dict[str, Any]:
        votes = [str(self.folder / f"round-{number}" / VOTES) for number in range(1, now.number + 1)]
        return {"data.path": votes, "run.dir": str(now.folder), "run.name": "reward"}

    def _policy_changes(self, now: Round) -> dict[str, Any]:
        rewards = [
            {**one, "run": str(now.reward), "name": one.get("name") or "reward"} if "run" in one else one
            for one in self._policy.resolved["rewards"]
        ]
        found: dict[str, Any] = {"rewards": rewards, "run.dir": str(now.folder), "run.name": "policy"}
        if now.start != self._first:
            found["model.weights"] = now.start
            if self._policy.config.model.lora is None:
                found["reference"] = self._first
        return found

    def _fit(self, resolved: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
        values = json.loads(json.dumps(resolved))
        for path, value in changes.items():
            *above, name = path.split(".")
            inside = values
            for part in above:
                inside = inside[part]
            inside[name] = value
        _trained(config_from_dict(values, source="the loop's config"))

    def _compare(self, now: Round) -> WinRate | None:
        """Returns how often the judge prefers the round's policy to what it began as; None where nobody has said."""
        path = now.folder / COMPARED
        if not path.exists():
            rng = random.Random(f"{self.config.run.seed} compare {now.number}")
            count = min(self.config.compare.count, len(self._prompts.compared))
            rows = rng.sample(self._prompts.compared, count)
            new, old = self._answers([str(now.policy), now.start], rows, [500 + now.number, 600 + now.number])
            name = f"{self.config.run.name}-{now.number}"
            found = compared(name, [asked(row) for row in rows], new, old, self.config.run.seed)
            write_lines(path, map(dataclasses.asdict, found))
        pairs = read_pairs(path)
        votes = self._judging.votes([pair for pair in pairs if pair.a != pair.b], required=False)
        if not votes and any(pair.a != pair.b for pair in pairs):
            self._say(f"round {now.number}: nobody has compared the policies yet: {path}")
            return None
        rate = win_rate(outcomes(pairs, votes, self.config.run.seed))
        self._say(
            f"round {now.number}: win rate {rate.rate:.3f} ({rate.low:.3f} to {rate.high:.3f} at any number of"
            f" comparisons) over {now.start}, {rate.comparisons} prompts compared"
        )
        return rate


def _trained(loaded: Loaded[Any]) -> None:
    """Trains a run to its end; one that is finished stays as it is.

    Raises:
      Stopped: it was stopped by a signal.
    """
    if train_task(build_task(loaded)).state != "finished":
        raise Stopped


def _is_text(answer: str) -> bool:
    """Returns whether an answer can be shown to people and learnt from."""
    return bool(answer.strip()) and "\0" not in answer


def _write_json(path: Path, value: Any) -> None:
    replace_file(path, [json.dumps(value, indent=1, sort_keys=True).encode()])
