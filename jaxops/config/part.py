"""A choice within a config (its data, model or objective) and the questions that the whole config asks it."""

from collections.abc import Mapping
from typing import Any, ClassVar


class Part:
    """A choice that builds itself, with the answers of one that has nothing to object to.

    `sort` says which sort of data or model it goes with; the empty string goes with any.
    """

    sort: ClassVar[str] = ""

    def problems_in(self, run: Any) -> list[tuple[str, str]]:
        """Everything of the whole `run` config that does not go with this choice (dotted path, message)."""
        del run
        return []

    def mesh_problems(self, sizes: Mapping[str, int]) -> list[tuple[str, str]]:
        """Everything about this choice that does not go on a mesh of these sizes (dotted path, message)."""
        del sizes
        return []
