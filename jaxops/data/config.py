"""The data section of a recommender's config and how it is opened: out come events and a split."""

import dataclasses
from typing import Any

from jaxops.data import arrange, cache, sources
from jaxops.data.heldout import Split
from jaxops.data.interactions import Interactions, read_interactions
from jaxops.data.sequences import read_sequences
from jaxops.data.spec import (
    Columns,
    GlobalTime,
    InteractionsFile,
    LeaveOneOut,
    MinCount,
    MovieLens100K,
    RecDataConfig,
    SequencesFile,
    SplitConfig,
)
from jaxops.data.splits import make_split

__all__ = [
    "Columns",
    "GlobalTime",
    "InteractionsFile",
    "LeaveOneOut",
    "MinCount",
    "MovieLens100K",
    "RecData",
    "RecDataConfig",
    "SequencesFile",
    "SplitConfig",
    "open_data",
]


@dataclasses.dataclass(frozen=True, eq=False)
class RecData:
    """Events, their split, and where they came from (`info`: plain values, for the run folder)."""

    inter: Interactions
    split: Split
    info: dict[str, Any]


def open_data(config: RecDataConfig, progress: arrange.Progress = arrange.silent) -> RecData:
    """Read (or fetch, or map from its cache) the data of `config` and split it.

    Raises:
      UserError: what reading, fetching and splitting raise; a config of another family.
    """
    inter, info = _events(config, progress)
    return RecData(inter, make_split(inter, config.split), {"kind": config.kind, **info})


def _events(config: RecDataConfig, progress: arrange.Progress) -> tuple[Interactions, dict[str, Any]]:
    match config:
        case MovieLens100K():
            source = sources.find_source("movielens_100k")
            inter = read_interactions(
                str(sources.get(source.name)),
                Columns(weight="rating"),
                config.min_count,
                format="tsv",
                header=("user", "item", "rating", "time"),
                progress=progress,
            )
            return inter, {"title": source.title, "licence": source.licence, "sha256": source.sha256}
        case SequencesFile():
            return read_sequences(config.path), {"path": config.path}
        case InteractionsFile(cache=None):
            inter = read_interactions(
                config.path,
                config.columns,
                config.min_count,
                format=config.format,
                header=config.header,
                progress=progress,
            )
            return inter, {"path": config.path}
        case InteractionsFile(cache=str(root)):
            folder = cache.ensure(config, root, progress)
            return cache.open_cache(folder), {"path": config.path, "cache": str(folder)}
    raise TypeError(f"not a data config of the recommendation family: {config!r}")
