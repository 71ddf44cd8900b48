"""`jaxops data build` and `jaxops data inspect` for the data of recommenders."""

from jaxops.config.types import ByPath
from jaxops.core.failures import UserError
from jaxops.data.clicks.spec import ClickDataConfig
from jaxops.data.interactions.cache import ensure
from jaxops.data.interactions.open import open_data
from jaxops.data.interactions.spec import InteractionsConfig, InteractionsFile
from jaxops.families.rec.config import RecConfig
from jaxops.families.rec.ranking import described, inspected
from jaxops.run.family import Shown


def build_data(config: RecConfig) -> Shown:
    """Builds the memory-mapped cache of a config's interactions.

    Raises:
      UserError: the data have no cache to build, or cannot be read.
    """
    found = _not_by_path(config)
    if not isinstance(found, InteractionsFile):
        raise UserError(f"data build: data.kind is {found.kind}; a cache is built of kind interactions only")
    if not found.cache:
        raise UserError("data build: data.cache is not set; give the folder to build in (data.cache=DIR)")
    folder = ensure(found, found.cache)
    return Shown({"cache": str(folder)}, [(f"built: {folder}",)])


def inspect_data(config: RecConfig) -> Shown:
    """Describes a config's interactions: counts, time range, lengths, the split and its hash, and what was dropped.

    Raises:
      UserError: the data are not interactions, or cannot be read.
    """
    found = _not_by_path(config)
    if not isinstance(found, InteractionsConfig):
        raise UserError(f"data: {found.kind} is for click models; there are no interactions to open")
    info = inspected(open_data(found, sides=isinstance(found, InteractionsFile)))
    return Shown(info, described(info))


def _not_by_path(config: RecConfig) -> InteractionsConfig | ClickDataConfig:
    if isinstance(config.data, ByPath):
        raise UserError(f"data: {config.data.fn} is a function of your own; there is nothing to build or inspect")
    return config.data
