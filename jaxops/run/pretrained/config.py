"""The choice of a pretrained decoder in a config, for every family that begins with a language model."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field

from jaxops.config.part import Part
from jaxops.models.lora import LoraConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained(Part):
    """A model whose weights and architecture are read from elsewhere.

    Attributes:
      weights: a folder with config.json and safetensors files, a GGUF file, `runs/NAME`, `hf://ORG/MODEL@REVISION` of
        the Hugging Face Hub, or `named://NAME` of one that `jaxops data list` has.
      dropout: rate of dropout while it is trained on.
      remat: how much of a layer the backward pass recomputes: nothing, all but matmuls (`dots`) or all (`full`).
      lora: adapters that are trained in place of the weights, which are frozen then.
    """

    weights: str
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    remat: Literal["none", "dots", "full"] = "none"
    lora: LoraConfig | None = None
