"""`jaxops data inspect` and `jaxops data preview` for prompts."""

from jaxops.data.prompts.open import OpenedPrompts, open_prompts
from jaxops.data.text.tokenizer import Tokenizer
from jaxops.families.policy.config import PolicyConfig
from jaxops.families.policy.opened import open_policy
from jaxops.run.family import Shown
from jaxops.run.pretrained.prompt_commands import inspect_prompts, preview_prompts


def inspect_data(config: PolicyConfig) -> Shown:
    """Counts a config's prompts and tokens, and says what is odd about them.

    Raises:
      UserError: the prompts or their tokenizer cannot be opened.
    """
    return inspect_prompts(_opened(config)[0])


def preview_data(config: PolicyConfig) -> Shown:
    """Shows the first prompts of training as the model reads them.

    Raises:
      UserError: the prompts or their tokenizer cannot be opened.
    """
    return preview_prompts(*_opened(config))


def _opened(config: PolicyConfig) -> tuple[OpenedPrompts, Tokenizer]:
    tokenizer = open_policy(config, judging=False).tokenizer
    return open_prompts(config.data, tokenizer, config.run.seed), tokenizer
