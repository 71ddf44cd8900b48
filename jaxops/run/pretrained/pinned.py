"""Holds a run to one commit of each model of the Hugging Face Hub that its config names.

A branch of the Hub moves. So the resolved config, which the run folder keeps, has `hf://ORG/MODEL@main:COMMIT`, and the
same command later reads that commit, whatever `main` is by then. Tested in tests/families/language/test_hub_runs.py.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

from jaxops.config.load import Loaded
from jaxops.core import distributed, store_probe, stores
from jaxops.core.failures import UserError
from jaxops.data.hub import HUB, HubAddress
from jaxops.run.folder.run_folder import RunFolder
from jaxops.run.pretrained.config import Pretrained


def pinned(loaded: Loaded[Any]) -> Loaded[Any]:
    """Returns the config with the commit of each address of the Hub in it: of `model.weights` and of `tokenizer`.

    The commit is the one in the run folder if the run has begun with the same model and revision, else the one that
    the revision is now. All processes agree on it.

    Raises:
      UserError: an address is wrong, there is no such model or revision, or the Hub cannot be asked.
    """
    asked = _addresses(loaded.config)
    if all(address.commit is not None for address in asked.values()):
        return loaded
    found: dict[str, str] = distributed.run_on_primary("resolve names of the Hub", lambda: _resolved(loaded, asked))
    config, resolved = loaded.config, dict(loaded.resolved)
    if "model.weights" in found:
        weights = found["model.weights"]
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, weights=weights))
        resolved["model"] = {**resolved["model"], "weights": weights}
    if "tokenizer" in found:
        config = dataclasses.replace(config, tokenizer=found["tokenizer"])
        resolved["tokenizer"] = found["tokenizer"]
    return dataclasses.replace(loaded, config=config, resolved=resolved)


def _addresses(config: Any) -> dict[str, HubAddress]:
    """Returns the addresses of the Hub in a config, by dotted path."""
    named = {"tokenizer": config.tokenizer}
    if isinstance(config.model, Pretrained):
        named["model.weights"] = config.model.weights
    there = {path: value for path, value in named.items() if isinstance(value, str) and value.startswith(HUB)}
    return {path: _of_option(path, functools.partial(HubAddress.parse, value)) for path, value in there.items()}


def _resolved(loaded: Loaded[Any], asked: Mapping[str, HubAddress]) -> dict[str, str]:
    """Returns each address with its commit."""
    begun = _addresses_of_run(loaded.config.run)
    found = {}
    for path, address in asked.items():
        same = [one for one in begun if (one.repo, one.revision) == (address.repo, address.revision)]
        known = same[0] if same and address.commit is None else _of_option(path, address.resolved)
        found[path] = str(known)
    return found


def _of_option(path: str, make: Callable[[], HubAddress]) -> HubAddress:
    """Returns what `make` does; its error names the option.

    Raises:
      UserError: that of `make`.
    """
    try:
        return make()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _addresses_of_run(run: Any) -> list[HubAddress]:
    """Returns the addresses with a commit in the run folder of a config; none where the run has not begun."""
    folder = RunFolder(os.path.join(run.dir, run.name))
    if stores.is_url(folder.dir):
        store_probe.check_access(folder.where, write=False)
    if not folder.exists:
        return []
    there = folder.config()
    model = there.get("model")
    named = [there.get("tokenizer"), model.get("weights") if isinstance(model, dict) else None]
    parsed = [HubAddress.parse(one) for one in named if isinstance(one, str) and one.startswith(HUB)]
    return [one for one in parsed if one.commit is not None]
