"""SASRec: next-item prediction by a causal transformer over a user's history (Kang & McAuley 2018).

Every position of a sequence is trained at once. Items are 1..n_items and 0 is padding. The item matrix is padded to a
multiple of 128 rows on every mesh, so that any mesh can divide it and restore it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from jaxops.config.bypath import ByPath
from jaxops.config.part import Part
from jaxops.core.random import dropout, example_keys
from jaxops.core.sharding import Rule, constrain
from jaxops.models.functional import Functional, Params
from jaxops.models.inputs import Input, ItemSequences, pooled
from jaxops.models.transformer import BLOCK_RULES, Block, LayerNorm

PAD_ROWS = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class SASRecConfig(Part):
    """The shape of SASRec.

    Attributes:
      dim: width of items and activations.
      layers: number of transformer blocks.
      heads: number of attention heads; it divides `dim`.
      hidden: width of the feed-forward layers; null is 4 x dim.
      length: number of most recent items that the model reads.
      dropout: rate of every dropout.
      norm: normalisation before (`pre`) or after (`post`) each sublayer.
      remat: how much of a block the backward pass recomputes: nothing, all (`full`) or all but matmuls (`dots`).
      inputs: features whose tables' rows are summed at each position: first `item`, then columns of items, of the user
        and of the events. Without any the item matrix is a parameter.
    """

    sort: ClassVar[str] = "sequence"
    label: ClassVar[str] = "SASRec"

    kind: Literal["sasrec"] = "sasrec"
    dim: int = 64
    layers: int = 2
    heads: int = 2
    hidden: int | None = None
    length: int = 50
    dropout: float = 0.2
    norm: Literal["pre", "post"] = "pre"
    remat: Literal["none", "full", "dots"] = "none"
    inputs: tuple[str, ...] = ()

    def problems(self) -> list[tuple[str, str]]:
        """Returns the errors that no value of another section could mend, as (dotted path, message)."""
        found = [
            (name, "expected a positive number")
            for name in ("dim", "layers", "heads", "length")
            if getattr(self, name) < 1
        ]
        if self.hidden is not None and self.hidden < 1:
            found.append(("hidden", "expected a positive number, or null for 4 x dim"))
        if not 0 <= self.dropout < 1:
            found.append(("dropout", "expected a rate in [0, 1)"))
        if not found and self.dim % self.heads:
            found.append(("heads", f"must divide dim {self.dim}"))
        return found

    def problems_in(self, run: Any) -> list[tuple[str, str]]:
        """Returns everything in the `run` config that does not go with this model, as (dotted path, message)."""
        if not self.inputs:
            unread = "sasrec reads no table unless model.inputs names them (the items' first)"
            return [("tables", unread)] if run.tables else []
        found = []
        if not isinstance(run.objective, ByPath) and run.objective.kind != "sampled_softmax":
            found.append(
                ("objective", f"sasrec on tables: expected {{kind: sampled_softmax}}, got {run.objective.kind}")
            )
        for name in self.inputs:
            for table, one in run.tables.items():
                if name not in (one.features or (table,)):
                    continue
                if one.pool != "mean":
                    found.append((f"tables.{table}.pool", "sasrec takes the mean of a bag: sum is for other models"))
                if one.dim != self.dim:
                    wanted = f"model.inputs are added up, so all are model.dim {self.dim}"
                    found.append((f"tables.{table}.dim", f"{one.dim}: {wanted}"))
        return found

    def mesh_problems(self, sizes: Mapping[str, int]) -> list[tuple[str, str]]:
        """Returns everything that does not go on a mesh of these sizes, as (dotted path, message)."""
        if sizes["tensor"] > 1 and self.heads % sizes["tensor"]:
            return [("mesh.tensor", f"{sizes['tensor']} does not divide model.heads {self.heads}")]
        return []

    def build(self, data: ItemSequences) -> "SASRec":
        """Builds the model for the items of this data."""
        return SASRec(self, data.n_items, data.pools)


class _SASRec(nnx.Module):
    def __init__(self, config: SASRecConfig, rows: int, rngs: nnx.Rngs):
        self.config = config
        normal = nnx.initializers.normal(0.02)
        if not config.inputs:
            self.item = nnx.Embed(rows, config.dim, embedding_init=normal, rngs=rngs)
        self.position = nnx.Embed(config.length, config.dim, embedding_init=normal, rngs=rngs)
        for layer in range(config.layers):
            hidden = config.hidden or 4 * config.dim
            block = Block(config.dim, config.heads, hidden, config.dropout, config.norm, rngs=rngs)
            setattr(self, f"block_{layer}", block)
        self.norm = LayerNorm(config.dim, rngs=rngs)

    def __call__(
        self,
        items: Int[Array, "batch length"],
        segment: Int[Array, "batch length"],
        position: Int[Array, "batch length"],
        keys: Key[Array, " batch"] | None,
        looked_up: Float[Array, "batch length dim"] | None = None,
    ) -> Float[Array, "batch length dim"]:
        config = self.config
        if looked_up is None:
            # Constrained before the look-up, so that under fsdp the matrices are gathered and not whole batches.
            looked_up = constrain(self.item.embedding[...], ("vocab", "embed"))[items]
        x = looked_up * jnp.asarray(config.dim**0.5, looked_up.dtype)
        x = x + constrain(self.position.embedding[...], (None, "embed"))[position]
        if config.norm == "post":
            x = self.norm(x)
        x = constrain(dropout(x, config.dropout, keys, 0), ("batch", "length", "embed"))
        same = segment[:, :, None] == segment[:, None, :]
        mask = _causal(items.shape[1])[None] & same & (items > 0)[:, None, :]
        for layer in range(config.layers):
            x = _remat(getattr(self, f"block_{layer}"), config.remat)(x, mask, keys, 1 + 3 * layer)
        return self.norm(x) if config.norm == "pre" else x


def _causal(length: int) -> Bool[Array, "length length"]:
    return jnp.tril(jnp.ones((length, length), bool))


def _remat(block: Any, policy: str) -> Any:
    """Wraps the block so that the backward pass recomputes all of it (`full`) or all but its matmuls (`dots`)."""
    if policy == "none":
        return block
    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if policy == "dots" else None
    return jax.checkpoint(block, policy=keep, static_argnums=(3,))


class SASRec:
    """SASRec over a catalogue of `n_items`; parameters are plain dicts and every method is pure.

    Sequences are padded on the left: position `length - 1` is always the most recent item. A batch holds "items"
    [batch, length] and "id" [batch]; packed rows (interactions/packing.py) also hold "segment" and "position"
    [batch, length]. With `config.inputs` the rows of those features are in batch["rows"], [batch, length, dim], or
    [batch, length, bag, dim] for a bag, and evaluation puts the item matrix into params["catalogue"]. Bags are pooled
    as `pools` says, by mean where it does not name the feature.
    """

    def __init__(self, config: SASRecConfig, n_items: int, pools: Mapping[str, Literal["sum", "mean"]] | None = None):
        self.config, self.n_items, self.length, self._pools = config, n_items, config.length, pools or {}
        self.on_tables = on_tables = bool(config.inputs)
        self.rows = n_items + 1 if on_tables else -(-(n_items + 1) // PAD_ROWS) * PAD_ROWS
        self._pure = Functional.of(_SASRec, config, self.rows)
        self.rules: list[Rule] = [
            (r"^item/embedding$", ("tensor", "fsdp")),
            (r"^position/embedding$", (None, "fsdp")),
            *BLOCK_RULES,
            (r"(bias|scale)$", ()),
        ]
        self.shapes = self._pure.shapes
        self.item_rows = () if on_tables else ("item/embedding",)
        self.padding = {} if on_tables else {"item/embedding": f"{self.rows - n_items} of {self.rows} rows are padding"}

    def init(self, key: Key[Array, ""]) -> Params:
        """Draws fresh parameters: normal(0.02), layer norm scales one, biases zero."""
        return self._pure.init(key)

    def encode(
        self, params: Params, batch: Mapping[str, Any], key: Key[Array, ""] | None
    ) -> Float[Array, "batch length dim"]:
        """Returns the hidden state after each item of the history. A `key` of None turns dropout off."""
        items = batch["items"]
        segment, position = batch.get("segment"), batch.get("position")
        if segment is None or position is None:
            start = self.config.length - items.shape[1]
            segment = jnp.ones_like(items)
            position = jnp.broadcast_to(jnp.arange(start, self.config.length, dtype=items.dtype), items.shape)
        params = {name: value for name, value in params.items() if name != "catalogue"}
        keys = example_keys(key, batch["id"])
        return self._pure.bind(params)(items, segment, position, keys, self._looked_up(batch))

    def _looked_up(self, batch: Mapping[str, Any]) -> Float[Array, "batch length dim"] | None:
        """Sums the rows of all inputs' tables at each position of the history, bags pooled."""
        if not self.config.inputs:
            return None
        total = None
        for name in self.config.inputs:
            bag = batch["rows"][name].ndim == 4
            feature = Input(name=name, dim=self.config.dim, bag=bag, pool=self._pools.get(name, "mean"))
            rows = pooled(batch, feature)
            total = rows if total is None else total + rows
        return total

    def item_vectors(self, params: Params) -> Float[Array, "rows dim"]:
        """Returns the item matrix as it is stored, with its padding rows (row 0 and the rows above n_items).

        A caller that multiplies by it, or reads rows, gathers it over fsdp first:
        `constrain(matrix, ("vocab", "embed"))`.
        """
        return params["catalogue"] if self.config.inputs else params["item"]["embedding"]

    def real_rows(self) -> Bool[Array, " rows"]:
        """Returns a mask that is True for the rows of the item matrix that are items."""
        row = jnp.arange(self.rows)
        return (row > 0) & (row <= self.n_items)

    def apply(
        self, params: Params, batch: Mapping[str, Any], key: Key[Array, ""] | None
    ) -> Float[Array, "batch length rows"]:
        """Returns the logits over the catalogue after each item, float32; rows that are no items have -1e9."""
        return self.logits(params, self.encode(params, batch, key))

    def logits(self, params: Params, hidden: Float[Array, "... dim"]) -> Float[Array, "... rows"]:
        """Returns the scores of every item for these hidden states, float32; rows that are no items have -1e9."""
        vectors = self.item_vectors(params)
        if not self.config.inputs:  # With inputs the matrix is no parameter: evaluation chose its sharding.
            vectors = constrain(vectors, ("vocab", "embed"))
        # The product itself gives float32: rounded scores would tie.
        scores = jnp.einsum("...d,vd->...v", hidden, vectors, preferred_element_type=jnp.float32)
        rows = self.real_rows().reshape((1,) * (scores.ndim - 1) + (-1,))
        return jnp.where(rows, scores, jnp.asarray(-1e9, jnp.float32))
