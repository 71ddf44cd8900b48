"""The options of `jaxops predict` and `export` for policies; those of `sample` and `chat` are all language models'."""

import dataclasses
from typing import Literal

from jaxops.run.pretrained.options import Generate


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyPredict(Generate):
    """The options of `predict`, which answers prompts as `sample` does, by default with the most probable tokens."""

    temperature: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyExport:
    """The options of `export`: a folder that `transformers` and vLLM open; `dtype` is that of its files."""

    to: Literal["hf"] = "hf"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
