"""The options of `jaxops predict` for policies; those of `export` and `sample` are all decoders'."""

import dataclasses

from jaxops.run.pretrained.options import Generate


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyPredict(Generate):
    """The options of `predict`, which answers prompts as `sample` does, by default with the most probable tokens."""

    temperature: float = 0.0
