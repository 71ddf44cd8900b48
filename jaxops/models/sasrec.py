"""SASRec: next-item prediction by a causal transformer over a user's history (Kang & McAuley 2018).

Every position of a sequence is trained at once. Items are 1..n_items, 0 is padding; the item matrix is padded to a
multiple of 128 rows, whatever the mesh, so that any mesh can divide it and any mesh can restore it.
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
    """The model's shape: `dim` wide, `length` most recent items, `norm` before or after each sublayer.

    `inputs` name the features whose tables' rows are added up at each place of the history: first `item`, then columns
    of items, of the user and of the events; without any the item matrix is a parameter.
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
        """What no value of another section could make right (dotted path, message)."""
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
        """Everything of the whole `run` config that does not go with this model (dotted path, message)."""
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
        """Everything that does not go on a mesh of these sizes."""
        if sizes["tensor"] > 1 and self.heads % sizes["tensor"]:
            return [("mesh.tensor", f"{sizes['tensor']} does not divide model.heads {self.heads}")]
        return []

    def build(self, data: ItemSequences) -> "SASRec":
        """The model of this shape over the items of the data."""
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
            # constrained before the look-up: under fsdp the matrices are gathered, not whole batches of activations
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
    """The block, recomputed in the backward pass: all of it (`full`) or all but matmuls (`dots`)."""
    if policy == "none":
        return block
    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if policy == "dots" else None
    return jax.checkpoint(block, policy=keep, static_argnums=(3,))


class SASRec:
    """SASRec over a catalogue of `n_items`; parameters are plain dicts, every method is pure.

    Padding on the left: position `length - 1` is always the most recent item. `batch` needs "items" [batch, length]
    and "id" [batch]; packed rows (interactions/packing.py) also carry "segment" and "position" [batch, length]. With
    `config.inputs` the rows of those features are in batch["rows"] [batch, length(, bag), dim], and the item matrix is
    what evaluation puts into params["catalogue"]; bags are pooled by `pools` (mean where it says nothing).
    """

    def __init__(self, config: SASRecConfig, n_items: int, pools: Mapping[str, Literal["sum", "mean"]] | None = None):
        self.config, self.n_items, self.length, self._pools = config, n_items, config.length, pools or {}
        self.on_tables = on_tables = bool(config.inputs)
        self.rows = n_items + 1 if on_tables else -(-(n_items + 1) // PAD_ROWS) * PAD_ROWS
        self._pure = Functional(lambda rngs: _SASRec(config, self.rows, rngs))
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
        """Fresh parameters: normal(0.02), layer norms at one, biases at zero."""
        return self._pure.init(key)

    def encode(
        self, params: Params, batch: Mapping[str, Any], key: Key[Array, ""] | None
    ) -> Float[Array, "batch length dim"]:
        """What the model says after each item of the history; no dropout where `key` is None."""
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
        """The sum of what each place of the history has in the inputs' tables; bags pooled."""
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
        """The item matrix as it is stored, padding rows included (row 0 and rows above n_items).

        Whoever multiplies by it, or reads rows, gathers it over fsdp first: `constrain(matrix, ("vocab", "embed"))`.
        """
        return params["catalogue"] if self.config.inputs else params["item"]["embedding"]

    def real_rows(self) -> Bool[Array, " rows"]:
        """Which rows of the item matrix are items."""
        row = jnp.arange(self.rows)
        return (row > 0) & (row <= self.n_items)

    def apply(
        self, params: Params, batch: Mapping[str, Any], key: Key[Array, ""] | None
    ) -> Float[Array, "batch length rows"]:
        """Logits over the catalogue after each item, float32; rows that are no items are -inf-like (-1e9)."""
        return self.logits(params, self.encode(params, batch, key))

    def logits(self, params: Params, hidden: Float[Array, "... dim"]) -> Float[Array, "... rows"]:
        """Scores of every item for these states, float32, padding rows at -1e9."""
        vectors = self.item_vectors(params)
        if not self.config.inputs:  # else it is no parameter: what evaluation made lies where that put it
            vectors = constrain(vectors, ("vocab", "embed"))
        # float32 out of the product itself: rounded scores would tie
        scores = jnp.einsum("...d,vd->...v", hidden, vectors, preferred_element_type=jnp.float32)
        rows = self.real_rows().reshape((1,) * (scores.ndim - 1) + (-1,))
        return jnp.where(rows, scores, jnp.asarray(-1e9, jnp.float32))
