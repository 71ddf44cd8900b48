"""`jaxops data build`, `inspect` and `verify` for the data of recommenders."""

from jaxops.config.types import ByPath
from jaxops.core.failures import EXIT_FAILED, EXIT_OK, UserError
from jaxops.data.clicks.spec import ClickDataConfig
from jaxops.data.interactions import cache
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
    found, root = _cached(config, "build")
    _, folder = cache.open_built(found, root)
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


def verify_data(config: RecConfig) -> Shown:
    """Reads every byte of the cache of a config's interactions and holds it against the checksums; builds nothing.

    The exit status is 1 if it is damaged.

    Raises:
      UserError: the data have no cache, or it was not built yet.
    """
    found, root = _cached(config, "verify")
    folder = cache.folder_of(found, root)
    files: dict[str, int] = {}
    try:
        files = cache.sizes(folder)
        damage = cache.problems(folder, whole=True)
    except cache.DamagedCache as error:
        damage = [str(error)]
    try:
        stale = not damage and not cache.is_current(found, folder)
    except UserError:  # the inputs are gone, which does not make the cache wrong
        stale = True
    total = sum(files.values())
    info = {"cache": str(folder), "files": len(files), "bytes": total, "damage": damage, "current": not stale}
    rows: list[tuple[str, ...]] = [(f"{folder}: {len(files)} files, {total:,} bytes",)]
    if damage:
        rows += [(f"DAMAGED: {what}",) for what in damage]
        rows.append(("the next run that reads it builds it again from its source; so does `jaxops data build`",))
    else:
        rows.append(("every byte is as it was written",))
    if stale:
        rows.append(("its source has changed since, or is gone: the next run builds it again",))
    return Shown(info, rows, EXIT_FAILED if damage else EXIT_OK)


def _cached(config: RecConfig, command: str) -> tuple[InteractionsFile, str]:
    """Returns the interactions of a config and the root of their cache.

    Raises:
      UserError: the data have none.
    """
    found = _not_by_path(config)
    if not isinstance(found, InteractionsFile):
        raise UserError(f"data {command}: data.kind is {found.kind}; only kind interactions has a cache")
    if not found.cache:
        raise UserError(f"data {command}: data.cache is not set; give the folder of the cache (data.cache=DIR)")
    return found, found.cache


def _not_by_path(config: RecConfig) -> InteractionsConfig | ClickDataConfig:
    if isinstance(config.data, ByPath):
        raise UserError(f"data: {config.data.fn} is a function of your own; there is nothing to build or inspect")
    return config.data
