"""The prompts of a loop: those that pairs of answers are sampled for, and those that policies are compared on.

Tested in tests/flow/test_rlhf.py.
"""

import functools
from collections.abc import Mapping
from typing import Any

from jaxops.data.prompts.open import OpenedPrompts, open_prompts
from jaxops.data.prompts.source import Prompts
from jaxops.families.policy.config import PolicyConfig
from jaxops.families.policy.opened import open_policy
from jaxops.flow.rlhf.config import RlhfConfig
from jaxops.run.pretrained.given_prompts import prompt_rows

Row = Mapping[str, Any]


class LoopPrompts:
    """The prompts of a loop. Files are read at once; the policy's own prompts when they are asked for.

    Args:
      config: the config of the loop.
      policy: the config of its policy, whose prompts are taken where the loop has none of its own.

    Raises:
      UserError: a file of prompts cannot be read.
    """

    def __init__(self, config: RlhfConfig, policy: PolicyConfig) -> None:
        self._config, self._policy = config, policy
        # What is wrong with a file is said before anything is trained; the policy's own prompts need its tokenizer.
        if config.prompts is not None:
            _ = self.sampled
        if config.prompts is not None or config.compare.prompts is not None:
            _ = self.compared

    @functools.cached_property
    def sampled(self) -> list[Row]:
        """The prompts that pairs of answers are sampled for."""
        given = self._config.prompts
        return _rows_in(given) if given is not None else _rows_of(self._opened.train)

    @functools.cached_property
    def compared(self) -> list[Row]:
        """The prompts that policies are compared on."""
        if (given := self._config.compare.prompts) is not None:
            return _rows_in(given)
        if self._config.prompts is None and self._opened.valid is not None:
            return _rows_of(self._opened.valid)
        return self.sampled

    @functools.cached_property
    def _opened(self) -> OpenedPrompts:
        """The prompts of the policy's config."""
        tokenizer = open_policy(self._policy, judging=False).tokenizer
        return open_prompts(self._policy.data, tokenizer, self._policy.run.seed)


def asked(row: Row) -> Any:
    """Returns the prompt of a row: a text, or a list of messages."""
    return row["messages"] if row.get("messages") is not None else row["prompt"]


def _rows_in(path: str) -> list[Row]:
    return [row for _, row in prompt_rows(path)]


def _rows_of(prompts: Prompts) -> list[Row]:
    """Returns the prompts of a policy's data as rows of a file of prompts."""
    written = [prompts.text(example) for example in range(prompts.examples)]
    return [{"prompt" if isinstance(text, str) else "messages": text} for text in written]
