"""A trained reward model, read from its run folder: it scores texts."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
from jaxtyping import Array, Bool, Float

from jaxops.core.failures import UserError
from jaxops.core.state import Params
from jaxops.data import notes
from jaxops.data.preferences.opened import tokenised
from jaxops.data.preferences.pairs import SingleTextBatches, Texts
from jaxops.data.preferences.spec import AnsweredPart, TooLong
from jaxops.data.text.documents import MODEL, Documents
from jaxops.data.text.formats import Example
from jaxops.families.reward.given_texts import read_given
from jaxops.families.reward.opened import build_reward, with_adapters
from jaxops.families.reward.options import RewardPredict
from jaxops.families.reward.reference import Normaliser, reference_of
from jaxops.models.decoder.decoder import build_decoder
from jaxops.models.lora import on_model
from jaxops.rl.rewards.judge import Judge
from jaxops.run.given_table import as_file
from jaxops.run.load import evaluate_saved
from jaxops.run.pretrained.stored import stored_architecture, stored_tokenizer
from jaxops.run.saved_run import SavedRun


class ServedReward:
    """A trained reward model."""

    def __init__(self, saved: SavedRun):
        self.saved = saved
        self.tokenizer = stored_tokenizer(saved)
        decoder = build_decoder(stored_architecture(saved), self.tokenizer.vocab)
        self.reward = build_reward(saved.config, decoder)
        self.model = with_adapters(self.reward, saved.config)
        saved.expect(self.model.shapes, {})

    def predict(
        self,
        source: Any,
        options: RewardPredict | None = None,
        *,
        say: Callable[[str], None] = lambda text: None,
        **keywords: Any,
    ) -> pa.Table:
        """Scores texts: the columns of the source, and for each row its score, the heads' disagreement and tokens read.

        A score has a mean of 0 and a deviation of 1 on the run's reference texts; `disagreement` is the deviation of
        the heads' scores in the same unit (null for one head). A text that is longer than `data.length` is read as far
        as training would, and `cut` says so.

        Args:
          source: a file of {"prompt", "completion"}, {"messages"} or {"text"}, a pyarrow table or a data frame.
          options: the options of `jaxops predict`.
          say: it is called with each line that a person should read.
          keywords: the fields of `RewardPredict`, in place of `options`.

        Raises:
          UserError: the source does not fit.
        """
        given = options or RewardPredict(**keywords)
        with as_file(source) as path, notes.collected() as remarks:
            texts = read_given(self.saved.config.data, str(path))
            documents = self._tokenised(texts.examples)
        for remark in remarks:
            say(remark)
        scores = self.scores(documents, given.batch)
        spread = scores.std(axis=1, ddof=1) if scores.shape[1] > 1 else np.zeros(len(scores))
        size = np.diff(documents.offsets)
        table = texts.table.append_column("score", pa.array(scores.mean(axis=1)))
        table = table.append_column("disagreement", pa.array(spread, mask=np.full(len(scores), scores.shape[1] < 2)))
        table = table.append_column("tokens", pa.array(np.minimum(size, self.saved.config.data.length)))
        return table.append_column("cut", pa.array(size > self.saved.config.data.length))

    def score(self, examples: Sequence[Example], batch: int = 64) -> Float[np.ndarray, "texts heads"]:
        """Returns each head's normalised score of each text; see `predict`."""
        return self.scores(self._tokenised(examples), batch)

    def scores(self, documents: Documents, batch: int = 64) -> Float[np.ndarray, "texts heads"]:
        """Returns each head's normalised score of each tokenised text, cut as in training."""
        return self.normaliser(self._raw(documents, batch))

    @functools.cached_property
    def normaliser(self) -> Normaliser:
        """The shift and scale that give the scores of the reference texts a mean of 0 and a deviation of 1.

        Raises:
          UserError: the run folder lacks its reference texts.
        """
        tokens, offsets = reference_of(self.saved)
        return Normaliser.of(self._raw(Documents(tokens, np.zeros(len(tokens), bool), offsets), 64))

    def judge(self, *, asked: bool = True) -> Judge:
        """Returns the model for policy optimisation, where its parameters join those of the policy.

        Args:
          asked: true where it will be asked for scores. Then the shift and scale that normalise them are computed now,
            which reads the weights; a plan does not ask.

        Raises:
          UserError: the run folder lacks its reference texts.
        """
        with self.saved.source() as source:
            return Judge(
                self.model,
                on_model(self.model, self._scores),
                self._answer_rows,
                self.normaliser.__call__ if asked else lambda scores: self.normaliser(scores),
                source,
                self.saved.config.data.length,
            )

    def heads(self, prompts: Sequence[Any], completions: Sequence[str]) -> Float[np.ndarray, "texts heads"]:
        """Returns each head's normalised score of each completion of a prompt, which is a text or a conversation."""
        return self.score([self._answered(prompt, said) for prompt, said in zip(prompts, completions, strict=True)])

    def _answer_rows(
        self, prompts: Sequence[Any], completions: Sequence[str]
    ) -> tuple[dict[str, np.ndarray], Bool[np.ndarray, " texts"]]:
        examples = [self._answered(prompt, said) for prompt, said in zip(prompts, completions, strict=True)]
        documents = self._tokenised(examples)
        rows = self._cut(documents).rows(np.arange(len(examples)))
        cut = np.diff(documents.offsets) > self.saved.config.data.length
        return {name: rows[name] for name in ("tokens", "segment", "position")}, cut

    def _answered(self, prompt: Any, completion: str) -> Example:
        """Returns an answer in the form that the run learnt from: a conversation, or a text.

        Raises:
          UserError: the prompt is a conversation, and the run learnt from texts.
        """
        data, where = self.saved.config.data, "a completion"
        if isinstance(data, AnsweredPart) and data.template is not None:
            asked = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else tuple(prompt)
            messages = (*asked, {"role": "assistant", "content": completion})
            return Example(where, messages=messages, asked=len(asked))
        if not isinstance(prompt, str):
            raise UserError(
                f"{self.saved.folder.where} learnt to judge texts, and a prompt is a conversation; train it with"
                " data.template, or ask with prompts that are texts"
            )
        return Example(where, text=prompt + completion, prompt=len(prompt))

    def _cut(self, documents: Documents) -> Texts:
        data = self.saved.config.data
        side: TooLong = "cut_end" if data.too_long == "cut_end" else "cut_start"
        return Texts.cut(documents, data.length, side, self.tokenizer.pad or 0)

    def _tokenised(self, examples: Sequence[Example]) -> Documents:
        """Tokenises with the template that was learnt with: the run keeps it, its file may be another one by now."""
        data = self.saved.config.data
        if isinstance(data, AnsweredPart) and data.template is not None:
            data = dataclasses.replace(data, template=MODEL)
        return tokenised(data, examples, self.tokenizer)

    def _raw(self, documents: Documents, batch: int) -> Float[np.ndarray, "texts heads"]:
        texts = self._cut(documents)
        passes = self.saved.passes({}, batch)
        with jax.set_mesh(self.saved.mesh):
            weights = self.saved.placed(passes)
            found = passes.over(
                "texts", on_model(self.model, self._scores), weights, SingleTextBatches(texts, passes.size)
            )
            return np.concatenate([np.asarray(jax.device_get(one)) for one in found])[: len(texts)]

    def _scores(self, params: Params, batch: Any) -> Float[Array, "batch heads"]:
        return self.reward.scores(params, batch["tokens"], batch["segment"], batch["position"])

    def evaluate(self, parts: tuple[str, ...] = ("valid", "test")) -> dict[str, float]:
        """Returns the metrics on the run's own held-out judgements, computed on the devices of this machine.

        Raises:
          UserError: the data or the weights that the run began with cannot be opened, or the data has changed.
        """
        return evaluate_saved(self.saved, parts)

    def export(self, path: Path, options: Any = None, **keywords: Any) -> str:
        """Raises a UserError: a reward model has no format of others.

        Raises:
          UserError: always.
        """
        del path, options, keywords
        raise UserError("a reward model has no export: `jaxops predict` scores texts, `jaxops ckpt export` copies it")
