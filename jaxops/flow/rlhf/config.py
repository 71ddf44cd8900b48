"""The config of the loop of RLHF."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field

from jaxops.config.types import ByPath, Factory

Positive = Annotated[int, Field(ge=1)]
PAIRWISE = Factory(leading=3, note="a function fn(prompts, first, second) -> list of 0 to 1", open=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairSampling:
    """The pairs of answers that a round has judged.

    Attributes:
      per_round: the number of pairs.
      from_: whose answers the two are: of the `policy` as it is, or of the `reference` that the loop began with.
      choose: `random`, or `disagreement`: out of `candidates` times as many, those that the heads of the last round's
        reward model disagree about most; the first round has none and draws at random.
      candidates: how many times as many pairs are sampled to choose from.
    """

    per_round: Positive = 200
    from_: tuple[Literal["policy", "reference"], Literal["policy", "reference"]] = ("policy", "policy")
    choose: Literal["random", "disagreement"] = "random"
    candidates: Annotated[int, Field(ge=1, le=64)] = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileJudge:
    """People answer in files: lines of {"id", "choice": "a" | "b" | "tie"}, and "annotator" where one likes.

    Attributes:
      path: a file, or a folder whose `.jsonl` files are all read.
      enough: the share of a round's pairs that must be answered before it goes on.
    """

    kind: Literal["file"] = "file"
    path: str
    enough: Annotated[float, Field(gt=0, le=1)] = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PanelJudge:
    """A simulated panel: a reward model that learnt from real people's ratings, with people's noise.

    Each member prefers the first answer with probability sigmoid((score of first - score of second) / noise).

    Attributes:
      run: the reward model's run. It must not be one that the policy is trained by.
      noise: the deviation of scores at which a member is no longer sure; 0 always prefers the higher score.
      members: the number of members, each with a vote of their own.
    """

    kind: Literal["panel"] = "panel"
    run: str
    noise: Annotated[float, Field(ge=0)] = 1.0
    members: Annotated[int, Field(ge=1, le=1000)] = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class FunctionJudge:
    """A function `fn(prompts, first, second)`, which returns the probability that the first answer is better."""

    fn: Annotated[ByPath, PAIRWISE]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """How answers to judge are sampled."""

    max_tokens: Positive = 128
    temperature: Annotated[float, Field(gt=0)] = 1.0
    slots: Positive = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """How the policies of two rounds are compared: on `count` prompts of `prompts`.

    By default they are the loop's own, or what the policy's data hold out where the loop has none of its own.
    """

    prompts: str | None = None
    count: Positive = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopSection:
    """The loop's name and folder, and the seed of what it draws."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)] = "rlhf"
    dir: str = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RlhfConfig:
    """The loop: in each round pairs of answers are judged, a reward model learns from all votes, and a policy from it.

    Attributes:
      rounds: the number of rounds.
      policy: the config of a policy's run, whose `model.weights` the loop begins with. Exactly one of its rewards is
        `{run: ...}`; in its place each round has the reward model of that round.
      reward: the config of a reward model's run; its data are the votes of all rounds.
      prompts: the prompts that pairs of answers are sampled for: a file with a column `prompt` or `messages`. By
        default they are those that the policy is trained on.
      prepare: configs of runs that are trained before the first round, in this order: what the policy begins with, and
        the reward model of a panel.
      start: what a round's policy begins as: the `last` round's policy, or always the `first` model.
    """

    task: Literal["rlhf"] = "rlhf"
    rounds: Positive = 1
    policy: str
    reward: str
    prompts: str | None = None
    prepare: tuple[str, ...] = ()
    pairs: PairSampling = PairSampling()
    judge: FileJudge | PanelJudge | FunctionJudge
    answers: Answers = Answers()
    compare: Compared = Compared()
    start: Literal["last", "first"] = "last"
    run: LoopSection = LoopSection()
