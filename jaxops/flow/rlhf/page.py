"""One page for the whole loop: its rounds, what they are made of, and how each policy did against the one before."""

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxops.report.html import write_page
from jaxops.run.folder.run_folder import RunFolder

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem;padding:0 1rem;color:#1f2430}"
    "table{border-collapse:collapse;width:100%}th,td{text-align:right;padding:.35rem .6rem;border-bottom:1px solid}"
    "th:first-child,td:first-child{text-align:left}.note{color:#667}"
)


def write_loop_page(folder: Path, rounds: Sequence[Mapping[str, Any]]) -> Path:
    """Writes `report.html` of a loop, with links to the reports of its runs, and returns its path."""
    rows = "".join(_row(folder, one) for one in rounds)
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(folder.name)}</title>"
        f"<style>{STYLE}</style><h1>{html.escape(folder.name)}</h1>"
        "<table><tr><th>round<th>pairs<th>votes<th>reward model: accuracy<th>policy: reward<th>KL<th>win rate</tr>"
        f"{rows}</table><p class=note>The win rate is over what the round's policy began as, with an interval that"
        " holds at any number of comparisons. lineage.json says which votes made which weights.</p></html>"
    )
    return write_page(folder / "report.html", page)


def _row(folder: Path, one: Mapping[str, Any]) -> str:
    rate = one["win_rate"]
    told = "nobody has said" if rate is None else f"{rate['rate']:.3f} ({rate['low']:.3f} to {rate['high']:.3f})"
    reward, policy = (one[name]["run"] for name in ("reward", "policy"))
    cells = [
        str(one["round"]),
        f"{one['pairs']['count']:,}",
        f"{one['votes']['count']:,}",
        _linked(folder, reward, _value(reward, "valid/accuracy")),
        _linked(folder, policy, _value(policy, "valid/reward")),
        _value(policy, "valid/kl"),
        told,
    ]
    return "<tr>" + "".join(f"<td>{cell}" for cell in cells) + "</tr>"


def _value(run: str, name: str) -> str:
    value = RunFolder(run).summary().get(name)
    return f"{value:.4f}" if isinstance(value, int | float) else "-"


def _linked(folder: Path, run: str, text: str) -> str:
    there = os.path.relpath(Path(run) / "report.html", folder)
    return f'<a href="{html.escape(there)}">{html.escape(text)}</a>'
