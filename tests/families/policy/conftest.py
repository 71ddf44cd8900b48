"""One run of a policy that the tests of this folder look at."""

from pathlib import Path

import pytest
from policy_runs import furnish, trained


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory) -> Path:
    """The folder, in which nothing has been trained but `runs/ppo`."""
    folder = tmp_path_factory.mktemp("policy")
    furnish(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("jaxops.report.page.write_report", lambda run: Path(run) / "report.html")
        trained("ppo")
    return folder


@pytest.fixture
def there(policy_folder, monkeypatch) -> Path:
    monkeypatch.chdir(policy_folder)
    return policy_folder


@pytest.fixture
def begun(there) -> Path:
    """The folder, with the language model `runs/sft` and the reward model `runs/rm`."""
    for name in ("sft", "rm"):
        if not Path(f"runs/{name}").exists():
            trained(name, config=f"{name}.yaml")
    return there
