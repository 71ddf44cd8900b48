"""What a model writes while it is trained: greedy completions of the same few held-out prompts at every evaluation."""

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxops.core.state import Params
from jaxops.data.text.documents import Documents
from jaxops.data.text.tokenizer import Tokenizer
from jaxops.families.language.opened import OpenedModel
from jaxops.models.decoder.unrolled import Unrolled
from jaxops.models.lora import Lora
from jaxops.models.reference import WithReference
from jaxops.rl.options import SampleOptions
from jaxops.rl.sample import Sampler
from jaxops.rl.sampled import Prompt
from jaxops.run.task import Evaluate, Evaluation, Measured, Poll, Task
from jaxops.run.weights import Weights

TOKENS = 64
"""The longest completion."""
BEGINNING = 16
"""The longest prompt out of a text that has none: its first tokens."""


class ReferenceAnswer(NamedTuple):
    """A prompt with the answer that the data has for it, both as tokens."""

    prompt: list[int]
    answer: list[int]


def asked_of(documents: Documents, which: Iterable[int], length: int, count: int) -> list[ReferenceAnswer]:
    """Returns the first different prompts of some documents, each with what is learnt from first after it.

    A text without a prompt is asked for after its first tokens. Prompts of `length` tokens or more are left out.

    Args:
      documents: the documents.
      which: their numbers, in the order in which they are looked at.
      length: the number of tokens that the model reads.
      count: the largest number of prompts.
    """
    found: dict[tuple[int, ...], ReferenceAnswer] = {}
    for at in which:
        if len(found) == count:
            break
        part = slice(documents.offsets[at], documents.offsets[at + 1])
        tokens, trained = documents.tokens[part], documents.trained[part]
        begin = int(np.argmax(trained)) if trained.any() else 0
        if begin < 2:  # a begin token alone asks for nothing
            begin = min(BEGINNING, len(tokens) // 2)
        if not 0 < begin < length:
            continue
        left = trained[begin:]
        end = begin + (len(left) if left.all() else int(np.argmin(left)))
        prompt = tokens[:begin].tolist()
        found.setdefault(tuple(prompt), ReferenceAnswer(prompt, tokens[begin : min(end, begin + TOKENS)].tolist()))
    return list(found.values())


@dataclasses.dataclass(frozen=True)
class WithSamples:
    """An evaluation, and beside it what the model writes to a few prompts.

    Attributes:
      inner: the evaluation.
      opened: the model.
      asked: the prompts, at least one.
    """

    inner: Evaluation
    opened: OpenedModel
    asked: Sequence[ReferenceAnswer]

    @property
    def parts(self) -> Collection[str]:
        """The parts that the evaluation has."""
        return self.inner.parts

    def on(self, task: Task, mesh: Mesh) -> Evaluate:
        """Returns the evaluation on this mesh; the sampler is compiled once, at the first evaluation."""
        evaluate, config, tokenizer = self.inner.on(task, mesh), task.config, self.opened.tokenizer
        longest = max(len(one.prompt) for one in self.asked)
        sampler = Sampler(
            Unrolled(self.opened.decoder),
            mesh,
            slots=len(self.asked),
            room=min(longest + TOKENS, self.opened.decoder.config.length),
            options=SampleOptions(max_tokens=TOKENS, temperature=0),
            tokenizer=tokenizer,
            dtype=config.precision.compute,
            logical=config.sharding.logical,
        )
        prompts = [Prompt(one.prompt, example=at) for at, one in enumerate(self.asked)]

        def measured(weights: Weights, part: str, step: int, poll: Poll) -> Measured:
            found = evaluate(weights, part, step, poll)
            params = sampler.handoff(_own_params(self.opened.model, weights.params))
            texts = sampler(params, prompts, seed=0, poll=poll).texts
            assert texts is not None
            samples = [_told(tokenizer, one, text) for one, text in zip(self.asked, texts, strict=True)]
            return dataclasses.replace(found, samples=[*found.samples, *samples])

        return measured


def _own_params(model: Any, params: Params) -> Params:
    """Returns the decoder's parameters out of all, wherever they lie."""
    if isinstance(model, WithReference):
        return model.policy(params)
    if not isinstance(model, Lora):
        return params
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, model.base(params))
    merged: Params = jax.jit(jax.sharding.auto_axes(model.merge, out_sharding=specs))(params)
    return merged


def _told(tokenizer: Tokenizer, asked: ReferenceAnswer, completion: str) -> dict[str, str]:
    return {
        "prompt": tokenizer.decode(asked.prompt),
        "completion": completion,
        "answer": tokenizer.decode(asked.answer, skip_special=True),
    }
