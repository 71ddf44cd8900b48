"""A trained language model, read from its run folder: it scores texts, writes texts, and is exported."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import Array, Float

from jaxops.core.failures import UserError
from jaxops.core.state import Params
from jaxops.data import notes
from jaxops.data.preferences.spec import PreferenceData, RatingData
from jaxops.data.text.documents import MODEL, tokenise
from jaxops.data.text.formats import read_examples, read_rows, wanted_columns
from jaxops.data.text.source import TextBatches, TextRows, whole
from jaxops.data.text.spec import (
    ChatData,
    CompletionData,
    MixtureData,
    OneTextData,
    Templated,
    TextData,
)
from jaxops.families.language.opened import trained_model
from jaxops.families.language.options import LanguagePredict
from jaxops.families.language.prompt_form import prompt_form, written_as
from jaxops.models.decoder.decoder import build_decoder
from jaxops.models.lora import Lora, on_model
from jaxops.models.reference import WithReference
from jaxops.objectives.language import scores_of_batch
from jaxops.run.given_table import as_file, columns_of_rows, joined_columns
from jaxops.run.load import evaluate_saved
from jaxops.run.pretrained.export import DecoderExport, export_decoder
from jaxops.run.pretrained.generation import Generation, Writes
from jaxops.run.pretrained.stored import stored_architecture, stored_tokenizer
from jaxops.run.saved_run import SavedRun


class ServedLanguage(Writes):
    """A trained language model."""

    def __init__(self, saved: SavedRun):
        self.saved = saved
        self.tokenizer = stored_tokenizer(saved)
        self.decoder = build_decoder(stored_architecture(saved), self.tokenizer.vocab)
        self.model = trained_model(self.decoder, saved.config)
        saved.expect(self.model.shapes, {})
        self._generation = Generation(saved, self.decoder, self.tokenizer, lambda: self.params, prompt_form(saved))

    @property
    def params(self) -> Params:
        """The decoder's parameters: those of the policy alone, with the adapters merged where the run trained any."""
        held = self.saved.weights.params
        if isinstance(self.model, WithReference):
            return self.model.policy(held)
        return self.model.merge(jax.tree.map(jnp.asarray, held)) if isinstance(self.model, Lora) else held

    def predict(
        self,
        source: Any,
        options: LanguagePredict | None = None,
        *,
        say: Callable[[str], None] = lambda text: None,
        **keywords: Any,
    ) -> pa.Table:
        """Scores texts: for each row the number of tokens that are learnt from, their mean NLL, and their perplexity.

        The columns of the source come along. A text that is longer than `data.length` is scored up to there, and `cut`
        says so. A row of which nothing is learnt from has nulls. Where the run learnt from each turn `apart`, each turn
        has a row, without the columns.

        Args:
          source: a file, a pyarrow table or a data frame, in the form of the run's data, or in another one that its
            columns tell: `messages`, `prompt` and `completion`, or `text`.
          options: the options of `jaxops predict`.
          say: it is called with each line that a person should read.
          keywords: the fields of `LanguagePredict`, in place of `options`.

        Raises:
          UserError: the source does not fit.
        """
        given = options or LanguagePredict(**keywords)
        with as_file(source) as path, notes.collected() as remarks:
            along = [row for _, row in read_rows(str(path))]
            columns_of_rows(along)  # what cannot be written is told before anything is scored
            config = _of_source(self.saved.config.data, str(path), dict.fromkeys(name for row in along for name in row))
            documents = tokenise(config, read_examples(config, str(path)), self.tokenizer)
        for remark in remarks:
            say(remark)
        texts = whole(documents, config.length)
        rows = TextRows(documents, texts, config.length, packed=False, seed=0, fill=self.tokenizer.pad or 0)
        passes = self.saved.passes({}, given.batch)
        with jax.set_mesh(self.saved.mesh):
            weights = self.saved.placed(passes)
            sums = passes.over("texts", on_model(self.model, self._scores), weights, TextBatches(rows, passes.size))
            nll, count = (np.concatenate(part)[: len(rows)] for part in zip(*map(jax.device_get, sums), strict=True))
        none = count == 0
        mean = np.divide(nll, count, out=np.zeros_like(nll), where=~none)
        cut = np.diff(documents.offsets) - 1 > config.length
        found = {"tokens": count.astype(np.int64), "nll": mean, "perplexity": np.exp(mean), "cut": cut}
        scores = pa.table({name: pa.array(x, mask=none & (x.dtype.kind == "f")) for name, x in found.items()})
        return joined_columns(along, scores.to_pylist()) if len(along) == len(scores) else scores

    def _scores(
        self, params: Params, batch: Mapping[str, Array]
    ) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
        scores = scores_of_batch(self.decoder, params, batch, None)
        return jnp.sum(-scores.logprobs * batch["mask"], axis=1), jnp.sum(batch["mask"], axis=1)

    def evaluate(self, parts: tuple[str, ...] = ("valid", "test")) -> dict[str, float]:
        """Returns the metrics on the run's own held-out text, computed on the devices of this machine.

        Raises:
          UserError: the text or the weights that the run began with cannot be opened, or the text has changed.
        """
        evaluate = dataclasses.replace(self.saved.config.evaluate, samples=0)  # which would be thrown away
        config = dataclasses.replace(self.saved.config, evaluate=evaluate)
        loaded = dataclasses.replace(self.saved.loaded, config=config)
        return evaluate_saved(dataclasses.replace(self.saved, loaded=loaded), parts)

    def export(self, path: Path, options: DecoderExport | None = None, **keywords: Any) -> str:
        """Writes a folder of config.json, safetensors and the tokenizer, which `transformers` and vLLM open as it is.

        Raises:
          UserError: the folder exists and is not empty, or no published model type has this architecture.
        """
        given = options or DecoderExport(**keywords)
        return export_decoder(path, self.decoder.config, self.params, self.tokenizer, given.dtype)


def _of_source(data: Any, path: str, there: Collection[str]) -> OneTextData:
    """Returns the data section for a file of texts to score: unpacked, nothing held out, cut at the end.

    The form is that of the run's data where the file has its columns, else the one whose usual columns are there.

    Raises:
      UserError: no form's columns are there.
    """
    changed: dict[str, Any] = {"path": path, "valid": None, "pack": False, "copies": "keep", "format": "auto"}
    kept: dict[str, Any] = {"path": path, "length": data.length, "pack": False}
    several = isinstance(data, MixtureData | PreferenceData | RatingData)
    forms: list[OneTextData] = [] if several else [dataclasses.replace(data, **changed)]
    # The run's tokenizer has the template that was learnt with: its file may be another one by now.
    forms = [dataclasses.replace(one, template=MODEL) if isinstance(one, Templated) else one for one in forms]
    learnt = written_as(data)
    written = kept | {"arguments": learnt.arguments, "date": learnt.date}
    forms += [ChatData(**written), CompletionData(**written), TextData(**kept)]
    for form in forms:
        if {name for name, needed in wanted_columns(form).items() if needed} <= {*there}:
            return form
    raise UserError(
        f"{path}: no column to score: expected messages, prompt and completion, or text (there are: {', '.join(there)})"
    )
