"""Texts that a trained language model writes: completions of a file of prompts, and the answers of a chat."""

import dataclasses
import datetime
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from jaxops.core.failures import UserError
from jaxops.core.state import Params
from jaxops.data.prompts.writer import PromptForm, PromptWriter
from jaxops.data.text.template import Message
from jaxops.data.text.tokenizer import Tokenizer
from jaxops.models.decoder.decoder import Decoder
from jaxops.models.decoder.unrolled import Unrolled
from jaxops.rl.options import SampleOptions
from jaxops.rl.sample import Sampler
from jaxops.rl.sampled import Prompt, copies
from jaxops.run.given_table import columns_of_rows, joined_columns
from jaxops.run.pretrained.given_prompts import prompt_rows
from jaxops.run.pretrained.options import Generate
from jaxops.run.saved_run import SavedRun

_DISTRIBUTION = [field.name for field in dataclasses.fields(SampleOptions)]


class Generation:
    """Samples from the model of a run. Its weights are placed once, and a sampler is kept for each set of shapes.

    Args:
      saved: the run.
      decoder: its model.
      tokenizer: its tokenizer.
      weights: returns the decoder's parameters; it is called once, before the first sample.
      form: how the run turns prompts into tokens; `Generate.template` other than `auto` comes before its `chats`, and
        without a date it is today.
    """

    def __init__(
        self,
        saved: SavedRun,
        decoder: Decoder,
        tokenizer: Tokenizer,
        weights: Callable[[], Params],
        form: PromptForm,
    ) -> None:
        self._saved, self._decoder, self.tokenizer = saved, decoder, tokenizer
        self._weights, self._form = weights, form
        self._samplers: dict[Any, Sampler] = {}
        self._params: Any = None

    @property
    def length(self) -> int:
        """The largest number of tokens that the model reads."""
        return self._decoder.config.length

    def table(self, source: Any, options: Generate, say: Callable[[str], None]) -> pa.Table:
        """Returns `n` completions of each prompt, as rows with the columns of the prompts.

        Args:
          source: prompts, as `prompt_rows` takes them.
          options: the options.
          say: it is called with each line that a person should read.

        Raises:
          UserError: an option or a prompt does not fit.
        """
        options.require_valid()
        rows = prompt_rows(source)
        columns_of_rows([row for _, row in rows])  # what cannot be written is told before anything is sampled
        writer = self.writer(options, say)
        prompts = [Prompt(self._fitting(writer.ids(row), row[0]), at) for at, row in enumerate(rows)]
        longest = max(len(prompt.ids) for prompt in prompts)
        room = self.room(longest, options)
        if longest >= room:
            raise UserError(f"room: {room} tokens, but the longest prompt has {longest} and needs one more")
        short = sum(len(prompt.ids) + options.max_tokens > room for prompt in prompts)
        if short:
            say(f"{short} of {len(prompts)} prompts leave room for fewer than {options.max_tokens} tokens of {room}")
        sampler, params = self.sampler(options, room)
        asked = copies(prompts, options.n)
        found = sampler(params, asked, seed=options.seed)
        assert found.texts is not None
        made = [
            {
                "copy": prompt.copy,
                "completion": found.texts[at],
                "tokens": int(found.lengths[at]),
                "logprob": float(np.sum(found.plain[at], dtype=np.float64)),
                "stopped": found.stopped[at],
            }
            for at, prompt in enumerate(asked)
        ]
        return joined_columns([rows[prompt.example][1] for prompt in asked], made)

    def room(self, longest: int, options: Generate) -> int:
        """Returns the room for prompt and completion: few different values, so that few programs are compiled."""
        wanted = options.room or 1 << (longest + options.max_tokens - 1).bit_length()
        return min(wanted, self.length)

    def sampler(self, options: Generate, room: int) -> tuple[Sampler, Any]:
        """Returns a sampler with the weights as it wants them."""
        shapes = (options.slots, room, options.segment)
        key = (shapes, *(getattr(options, name) for name in _DISTRIBUTION))
        config = self._saved.config
        if key not in self._samplers:
            self._samplers[key] = Sampler(
                Unrolled(self._decoder),
                self._saved.mesh,
                slots=options.slots,
                room=room,
                segment=options.segment,
                options=options,
                tokenizer=self.tokenizer,
                dtype=config.precision.compute,
                logical=config.sharding.logical,
            )
        if self._params is None:
            self._params = self._samplers[key].handoff(self._weights())
        return self._samplers[key], self._params

    def _fitting(self, ids: list[int], where: str) -> list[int]:
        if len(ids) >= self.length:
            raise UserError(f"{where}: the prompt has {len(ids):,} tokens, but the model reads {self.length:,} at most")
        return ids

    def chat(self, options: Generate) -> "Chat":
        """Returns a conversation with the model.

        Raises:
          UserError: an option does not fit, or the run's chat template is broken.
        """
        options.require_valid()
        return Chat(self, options, self.writer(options, print))

    def writer(self, options: Generate, say: Callable[[str], None]) -> PromptWriter:
        """Returns what turns prompts into tokens; `say` is called with each line that a person should read."""
        chats = options.template == "chat" or (options.template == "auto" and self._form.chats)
        date = self._form.date or datetime.date.today().isoformat()
        return PromptWriter(dataclasses.replace(self._form, chats=chats, date=date), self.tokenizer, say)


class Writes:
    """The part of a served model that writes text: a family's class inherits it and sets `_generation`."""

    _generation: Generation

    def generate(
        self,
        prompts: Any,
        options: Generate | None = None,
        *,
        say: Callable[[str], None] = lambda text: None,
        **keywords: Any,
    ) -> pa.Table:
        """Samples completions: for each prompt and copy the text, its tokens, their logprob and what ended it.

        `logprob` is the sum over the tokens under the model itself, at temperature 1.

        Args:
          prompts: a file, a table or a list, of texts (`prompt`) or conversations (`messages`).
          options: the options of `jaxops sample`.
          say: it is called with each line that a person should read.
          keywords: the fields of `Generate`, in place of `options`.

        Raises:
          UserError: a prompt or an option does not fit.
        """
        return self._generation.table(prompts, options or Generate(**keywords), say)

    def chat(self, options: Generate | None = None, **keywords: Any) -> "Chat":
        """Returns a conversation with the model.

        Raises:
          UserError: an option does not fit, or the run's chat template is broken.
        """
        return self._generation.chat(options or Generate(**keywords))


class Chat:
    """A conversation with a model. One that learnt from plain text continues what was said so far."""

    def __init__(self, generation: Generation, options: Generate, writer: PromptWriter) -> None:
        self._generation, self._writer = generation, writer
        self._options = dataclasses.replace(options, n=1, slots=1, segment=min(options.segment, 4))
        self._messages: list[Message] = []
        self._text = ""
        self._turn = 0
        if writer.chats:
            _ = writer.template  # a template that does not open is told before anything is asked

    def reset(self) -> None:
        """Forgets what was said."""
        self._messages, self._text = [], ""

    def answer(self, said: str, show: Callable[[str], None]) -> str:
        """Returns the model's answer, which becomes part of the conversation.

        Args:
          said: what the user says.
          show: it is called with each piece of the answer as soon as it is certain.

        Raises:
          UserError: the conversation is longer than the model reads, or nothing was said; it is then as it was.
        """
        if not said.strip():
            raise UserError("nothing was said")
        messages = [*self._messages, {"role": "user", "content": said}]
        ids = self._writer.conversation(messages) if self._writer.chats else self._writer.text(self._text + said)
        if len(ids) >= self._generation.length:
            raise UserError(
                f"the conversation has {len(ids):,} tokens, but the model reads {self._generation.length:,} at most;"
                " /reset begins a new one"
            )
        sampler, params = self._generation.sampler(self._options, self._generation.room(len(ids), self._options))
        prompt = Prompt(ids, example=0, turn=self._turn)
        found = sampler(params, [prompt], seed=self._options.seed, watch=lambda row, text: show(text))
        assert found.texts is not None
        self._turn += 1
        self._messages = [*messages, {"role": "assistant", "content": found.texts[0]}]
        self._text += said + found.texts[0]
        return found.texts[0]
