"""Opens the data section of a recommender's config: events, their split and their side files."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from jaxops.core.failures import UserError
from jaxops.data import notes, side, sources
from jaxops.data.interactions import arrange, cache
from jaxops.data.interactions.heldout import Split
from jaxops.data.interactions.interactions import Interactions, read_interactions
from jaxops.data.interactions.sequences import read_sequences
from jaxops.data.interactions.spec import (
    Columns,
    InteractionsConfig,
    InteractionsFile,
    MovieLens100K,
    SequencesFile,
)
from jaxops.data.interactions.splits import make_split
from jaxops.data.spec import SideFile

PEOPLE = ("age", "gender", "occupation")
"""The columns that MovieLens-100K has of its users."""


@dataclasses.dataclass(frozen=True, eq=False)
class RecData:
    """Events, their split, and where they came from (`info`: plain values, for the run folder).

    `user_features` and `item_features` are further columns, by user row and by item row - 1; a bag has a list a row.
    """

    inter: Interactions
    split: Split
    info: dict[str, Any]
    user_features: Mapping[str, pa.Array] = dataclasses.field(default_factory=dict)
    item_features: Mapping[str, pa.Array] = dataclasses.field(default_factory=dict)


def open_data(
    config: InteractionsConfig, progress: arrange.Progress = arrange.silent, *, sides: bool = False
) -> RecData:
    """Reads (or fetches, or maps from its cache) the data of `config` and splits it; with `sides` its side files too.

    Raises:
      UserError: what reading, fetching and splitting raise.
    """
    users, items = _side(config) if sides else (None, None)
    for kind, file in (("user", users), ("item", items)):
        if file is not None and file.numeric:
            raise UserError(f"data.{kind}_features.numeric: {file.numeric[0]!r}: only click models read numbers")
    duplicates = config.duplicates if isinstance(config, InteractionsFile) else "auto"
    with notes.collected() as remarks:
        inter, info = _events(config, progress)
        split = make_split(inter, config.split, repeats=duplicates == "keep")
        if duplicates == "auto":
            _tell_copies(inter, split)
        features: dict[str, dict[str, pa.Array]] = {"user": {}, "item": {}}
        for kind, file, ids in (("user", users, inter.user_ids), ("item", items, inter.item_ids)):
            if file is not None:
                features[kind], join = side.join_side(file, ids, f"data.{kind}_features")
                info[f"{kind}_features"] = dataclasses.asdict(join)
    return RecData(inter, split, {"kind": config.kind, **info, "notes": remarks}, features["user"], features["item"])


def _tell_copies(inter: Interactions, split: Split) -> None:
    dropped = inter.dropped.get("duplicate_events", 0)
    if dropped:
        notes.tell(
            f"{dropped:,} event(s) are exact copies of another (the same in all columns that are read) and were"
            " dropped; data.duplicates: keep keeps them"
        )
    if inter.copies:
        left_out = sum(split.counts.get(f"{part}_copies", 0) for part in ("valid", "test"))
        notes.tell(
            f"{inter.copies:,} event(s) are exact copies of another, and times are dates alone, where honest repeats"
            f" look the same: they are kept, and {left_out:,} held-out target(s) with a copy before them are left out;"
            " data.duplicates: drop or keep decides otherwise"
        )


def user_columns(config: object) -> tuple[str, ...]:
    """Returns the columns of users by the config alone, bags among them; a name that items have too is theirs."""
    if isinstance(config, MovieLens100K):
        return PEOPLE
    if not isinstance(config, InteractionsFile):
        return ()
    users, items = (
        (*file.columns, *file.bags) if file else () for file in (config.user_features, config.item_features)
    )
    return tuple(name for name in users if name not in items)


def _side(config: InteractionsConfig) -> tuple[SideFile | None, SideFile | None]:
    match config:
        case MovieLens100K():
            people, films = (str(sources.get(f"movielens_100k_{name}")) for name in ("people", "films"))
            return (
                SideFile(path=people, key="user", columns=PEOPLE),
                SideFile(path=films, key="item", columns=("year",), bags=("genres",)),
            )
        case InteractionsFile():
            return config.user_features, config.item_features
    return None, None


def _events(config: InteractionsConfig, progress: arrange.Progress) -> tuple[Interactions, dict[str, Any]]:
    match config:
        case MovieLens100K():
            source = sources.find_source("movielens_100k")
            inter = read_interactions(
                str(sources.get(source.name)),
                Columns(),  # a rating is no weight: a film that somebody disliked was seen too
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
                duplicates=config.duplicates,
                text=config.text,
                progress=progress,
            )
            return inter, {"path": config.path}
        case InteractionsFile(cache=str(root)):
            inter, folder = cache.open_built(config, root, progress)
            return inter, {"path": config.path, "cache": str(folder)}
    raise TypeError(f"not a data config of the recommendation family: {config!r}")
