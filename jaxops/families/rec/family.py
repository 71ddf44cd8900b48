"""The recommendation family: the config's sort of recommender chooses the module that builds and restores it."""

from typing import Any, Protocol

from jaxops.config.load import Loaded
from jaxops.families.rec import clicks, retrieval, sequences
from jaxops.families.rec.config import RecConfig, Sort
from jaxops.families.rec.data_commands import build_data, inspect_data, verify_data
from jaxops.families.rec.options import Export, Predict
from jaxops.run.family import Family, Given, Served
from jaxops.run.saved_run import SavedRun
from jaxops.run.task import Task


class Recipe(Protocol):
    """A module that builds and restores one sort of recommender."""

    def build(self, loaded: Loaded[Any], given: Given) -> Task: ...

    def restore(self, saved: SavedRun) -> Served: ...


RECIPES: dict[Sort, Recipe] = {"sequence": sequences, "retrieval": retrieval, "click": clicks}


def build(loaded: Loaded[RecConfig], given: Given) -> Task:
    """Opens the data of a recommender's config and puts its task together.

    Raises:
      UserError: the data cannot be opened, or do not fit the config.
    """
    return RECIPES[loaded.config.sort].build(loaded, given)


def restore(saved: SavedRun) -> Served:
    """Restores the trained recommender of a run.

    Raises:
      UserError: the run folder lacks a part of its transform.
    """
    return RECIPES[saved.config.sort].restore(saved)


FAMILY = Family(
    config=RecConfig,
    build=build,
    load=restore,
    data={"build": build_data, "inspect": inspect_data, "verify": verify_data},
    predict=Predict,
    export=Export,
    writes=("data.cache",),
)
