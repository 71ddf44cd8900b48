"""A trained policy, read from its run folder: it answers prompts, chats, and is exported like any language model."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pyarrow as pa

from jaxops.core.state import Params
from jaxops.data.prompts.encode import form_of
from jaxops.families.policy.opened import with_adapters
from jaxops.families.policy.options import PolicyPredict
from jaxops.models.decoder.decoder import build_decoder
from jaxops.models.lora import Lora
from jaxops.run.load import evaluate_saved
from jaxops.run.pretrained.export import DecoderExport, export_decoder
from jaxops.run.pretrained.generation import Generation, Writes
from jaxops.run.pretrained.stored import POLICY, stored_architecture, stored_tokenizer
from jaxops.run.saved_run import SavedRun


class ServedPolicy(Writes):
    """A trained policy."""

    def __init__(self, saved: SavedRun):
        self.saved = saved
        self.tokenizer = stored_tokenizer(saved)
        self.decoder = build_decoder(stored_architecture(saved), self.tokenizer.vocab)
        self.model = with_adapters(self.decoder, saved.config)
        saved.expect(self.model.shapes, {}, below=POLICY)
        self._generation = Generation(
            saved, self.decoder, self.tokenizer, lambda: self.params, form_of(saved.config.data)
        )

    @property
    def params(self) -> Params:
        """The policy's parameters, with the adapters merged into them where the run trained any."""
        held = self._held
        return self.model.merge(jax.tree.map(jnp.asarray, held)) if isinstance(self.model, Lora) else held

    @functools.cached_property
    def _held(self) -> Params:
        """The parameters of the policy; value, reference and reward models beside them are not read."""
        return self.saved.params_below(POLICY)

    def predict(
        self,
        source: Any,
        options: PolicyPredict | None = None,
        *,
        say: Callable[[str], None] = lambda text: None,
        **keywords: Any,
    ) -> pa.Table:
        """Answers prompts, as `generate` does; by default with the most probable tokens.

        Args:
          source: a file, a table or a list, of texts (`prompt`) or conversations (`messages`).
          options: the options of `jaxops predict`.
          say: it is called with each line that a person should read.
          keywords: the fields of `PolicyPredict`, in place of `options`.

        Raises:
          UserError: a prompt or an option does not fit.
        """
        return self._generation.table(source, options or PolicyPredict(**keywords), say)

    def evaluate(self, parts: tuple[str, ...] = ("valid", "test")) -> dict[str, float]:
        """Returns the metrics on the run's own held-out prompts, computed on the devices of this machine.

        Raises:
          UserError: the prompts or a model that the run began with cannot be opened, or the prompts have changed.
        """
        return evaluate_saved(self.saved, parts)

    def export(self, path: Path, options: DecoderExport | None = None, **keywords: Any) -> str:
        """Writes a folder of config.json, safetensors and the tokenizer, which `transformers` and vLLM open as it is.

        Raises:
          UserError: the folder exists and is not empty, or no published model type has this architecture.
        """
        given = options or DecoderExport(**keywords)
        return export_decoder(path, self.decoder.config, self.params, self.tokenizer, given.dtype)
