"""`jaxops data inspect` and `jaxops data preview` for prompts."""

from jaxops.data.prompts.open import open_prompts
from jaxops.data.prompts.preview import preview_prompts
from jaxops.families.policy.config import PolicyConfig
from jaxops.families.policy.opened import open_policy
from jaxops.run.family import Shown
