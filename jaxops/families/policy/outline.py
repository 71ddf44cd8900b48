"""The outline of a policy's run: its task over stand-ins, of which a plan reads the shapes."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxops.config.load import Loaded
from jaxops.core.named_arrays import HostArrays
from jaxops.core.weights import WeightSource
from jaxops.families.policy.config import FreshDecoder, PolicyConfig, ValueTrunk
from jaxops.families.policy.opened import open_policy, reward_model_of
from jaxops.models.decoder.decoder import Decoder
from jaxops.models.reward import RewardModel
from jaxops.rl.rewards.config import RunReward
from jaxops.rl.rewards.judge import Judge
from jaxops.run.pretrained.stand_in import stand_in_weights, write_rows

LONGER = 2
"""How many times longer than `data.max_tokens` the stand-in prompt is: it is cut, and so is as wide as may be."""


def outlined(loaded: Loaded[PolicyConfig], folder: Path) -> Loaded[PolicyConfig]:
    """Returns the config with stand-ins for weights, tokenizer and prompts in `folder`.

    Raises:
      UserError: nothing tells the architecture.
    """
    config = loaded.config
    model: Any = config.model
    tokenizer = config.tokenizer
    if not isinstance(model, FreshDecoder):  # of a fresh decoder the tokenizer tells the size
        model, tokenizer = stand_in_weights(model, folder / "weights"), "bytes"
    text = "a" * (LONGER * config.data.max_tokens)
    path = write_rows(folder / "prompts.jsonl", {config.data.columns.prompt: text})
    more: dict[str, Any] = {"words": 1} if config.data.kind == "beginnings" else {"template": "none", "arguments": {}}
    data = dataclasses.replace(config.data, path=path, valid=None, format="auto", too_long="cut_start", **more)
    value = ValueTrunk() if isinstance(config.value, ValueTrunk) else config.value
    config = dataclasses.replace(config, model=model, tokenizer=tokenizer, data=data, value=value, reference=None)
    return dataclasses.replace(loaded, config=config)


def outlined_judges(config: PolicyConfig) -> tuple[Mapping[str, Judge], list[str]]:
    """Returns the reward models of a config, and what was assumed of those whose runs are not there.

    Raises:
      UserError: a run cannot be opened, or holds no reward model.
    """
    found: dict[str, Judge] = {}
    assumed = []
    decoder: Decoder | None = None
    for at, reward in enumerate(config.rewards):
        if not isinstance(reward, RunReward):
            continue
        if "://" in reward.run or Path(reward.run).is_dir():
            found[reward.label] = reward_model_of(reward, at, asked=False)
            continue
        decoder = decoder or open_policy(config, judging=False).model.decoder
        length = config.data.max_tokens + config.sample.max_tokens
        found[reward.label] = _like(decoder, length)
        assumed.append(f"rewards.{at}.run: there is no {reward.run} yet: assumed as large as the policy, with one head")
    return found, assumed


def _like(decoder: Decoder, length: int) -> Judge:
    """Returns a reward model with a decoder like this one, which is never asked."""
    model = RewardModel(decoder)

    def scores(params: Any, batch: Mapping[str, Any]) -> Any:
        return model.scores(params, batch["tokens"], batch["segment"], batch["position"])

    def rows(prompts: Any, texts: Any) -> tuple[dict[str, np.ndarray], np.ndarray]:
        raise AssertionError("an outline is never asked for scores")

    return Judge(model, scores, rows, lambda given: given, WeightSource("nothing", HostArrays({})), length)
