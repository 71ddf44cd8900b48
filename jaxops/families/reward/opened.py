"""Opens the reward model that a config names: its decoder and heads, its tokenizer, and where its weights come from."""

import dataclasses
from collections.abc import Callable, Sequence

from jaxops.core.weights import WeightSource
from jaxops.data.text.tokenizer import Tokenizer
from jaxops.data.text.trained_tokenizer import TrainedTokenizer
from jaxops.families.reward.config import FreshReward, PretrainedReward, RewardConfig
from jaxops.models.decoder.decoder import Decoder, build_decoder
from jaxops.models.lora import Lora
from jaxops.models.reward import RewardModel
from jaxops.run.pretrained.opened import open_decoder

BESIDE = (r"^(?!lora/|reward/)",)
"""The parameters that are frozen under adapters: all but these and the heads."""


@dataclasses.dataclass(frozen=True)
class OpenedReward:
    """A reward model before its parameters are read.

    Attributes:
      reward: the reward model.
      model: what is trained: the reward model, or its adapters and heads beside it.
      tokenizer: the tokenizer.
      sources: the weights that training begins with; none for fresh parameters.
      keeps_trunk: whether the heads alone are trained.
    """

    reward: RewardModel
    model: RewardModel | Lora
    tokenizer: Tokenizer
    sources: tuple[WeightSource, ...]
    keeps_trunk: bool = False

    @property
    def frozen(self) -> tuple[str, ...]:
        """Patterns of the parameters that are not trained."""
        return BESIDE if isinstance(self.model, Lora) or self.keeps_trunk else ()


def open_reward(config: RewardConfig, words: Callable[[], Sequence[str]]) -> OpenedReward:
    """Opens the model of a config; nothing but headers of its weights is read.

    Args:
      config: the config.
      words: gives the texts of training, for a vocabulary that is made out of them.

    Raises:
      UserError: the weights or the tokenizer cannot be opened, or do not go together.
    """
    if isinstance(config.tokenizer, TrainedTokenizer):
        assert isinstance(config.model, FreshReward)  # RewardConfig.problems
        tokenizer = config.tokenizer.build(words())
        reward = build_reward(config, build_decoder(config.model.architecture, tokenizer.vocab))
        return OpenedReward(reward, with_adapters(reward, config), tokenizer, ())
    model = config.model.architecture if isinstance(config.model, FreshReward) else config.model
    opened = open_decoder(model, config.tokenizer, config.data.length)
    reward = build_reward(config, opened.decoder)
    frozen = isinstance(config.model, PretrainedReward) and config.model.frozen
    return OpenedReward(reward, with_adapters(reward, config), opened.tokenizer, opened.sources, frozen)


def build_reward(config: RewardConfig, decoder: Decoder) -> RewardModel:
    """Returns the reward model of a config above a decoder."""
    return RewardModel(decoder, config.model.ensemble)


def with_adapters(reward: RewardModel, config: RewardConfig) -> RewardModel | Lora:
    """Returns the reward model, with the adapters of the config where it has any.

    Raises:
      UserError: the adapters do not fit the decoder.
    """
    lora = config.model.lora if isinstance(config.model, PretrainedReward) else None
    return reward if lora is None else Lora(reward, lora)
