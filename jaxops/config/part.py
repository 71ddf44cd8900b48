"""A choice within a config (its data, model or objective), and the checks that it makes on the whole config."""

from collections.abc import Mapping
from typing import Any, ClassVar


class Part:
    """A choice that builds itself; its checks, unless overridden, find nothing wrong.

    `sort` names the sort of data or model that it goes with; the empty string goes with any. `lacks` says of keys that
    a reader may expect here why there are none.
    """

    sort: ClassVar[str] = ""
    lacks: ClassVar[Mapping[str, str]] = {}

    def problems_in(self, run: Any) -> list[tuple[str, str]]:
        """Returns everything in the whole `run` config that does not go with this choice, as (dotted path, message)."""
        del run
        return []

    def mesh_problems(self, sizes: Mapping[str, int]) -> list[tuple[str, str]]:
        """Returns everything about this choice that does not go on a mesh of these sizes, as (dotted path, message)."""
        del sizes
        return []
