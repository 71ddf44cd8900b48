"""A folder with data, config and a package of one's own."""

import pytest
from tiny_runs import folder, no_report  # noqa: F401 (fixtures)


@pytest.fixture(autouse=True)
def _no_report(no_report):  # noqa: F811
    pass
