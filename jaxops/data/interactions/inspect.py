"""A summary of a data set before training on it: plain values for `data.json`, rows for people."""

from typing import Any

import numpy as np

from jaxops.data.interactions.interactions import Interactions
from jaxops.data.interactions.open import RecData
from jaxops.data.interactions.ranges import user_ranges
from jaxops.data.moments import iso

CHUNK = 1 << 22
"""The number of events that are looked at at once."""
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


def inspect(data: RecData) -> dict[str, Any]:
    """Returns counts, times, lengths, popularity, ties, dropped events by reason, and the split with its SHA-256.

    Everything in it is JSON. `lengths.histogram` counts users with `edges[i]` to `edges[i + 1] - 1` events.
    `ties` is the share of events that have their user and time in common with another (null without times).
    """
    inter, split = data.inter, data.split
    per_item, tied = _scan(inter)
    boundaries = split.boundaries
    return {
        "version": 1,
        "source": data.info,
        "events": inter.n_events,
        "users": inter.n_users,
        "items": inter.n_items,
        "density": inter.n_events / (inter.n_users * inter.n_items),
        "ids": {"user": inter.user_ids.kind, "item": inter.item_ids.kind},
        "time": {"from": iso(float(inter.time.min())), "to": iso(float(inter.time.max()))} if inter.timed else None,
        "ties": tied / inter.n_events if inter.timed else None,
        "lengths": {**_quantiles(inter.lengths), "histogram": _histogram(inter.lengths)},
        "events_per_item": _quantiles(per_item[1:]),
        "dropped": inter.dropped,
        "copies": inter.copies,
        "split": {
            "kind": split.kind,
            "sha256": split.sha256,
            "boundaries": None if boundaries is None else [iso(at) for at in boundaries],
            **split.counts,
        },
    }


def describe(info: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns `inspect`'s answer as (name, value) rows for a table."""
    split, time, source = info["split"], info["time"], info["source"]
    rows = [(name, str(source[name])) for name in ("title", "licence", "path", "cache") if name in source]
    rows += [
        ("events", f"{info['events']:,}"),
        ("users", f"{info['users']:,} ({info['ids']['user']} ids)"),
        ("items", f"{info['items']:,} ({info['ids']['item']} ids)"),
        ("density", f"{info['density']:.3%}"),
        ("time", f"{time['from']} to {time['to']}" if time else "none, the order is the file's"),
    ]
    if info["ties"] is not None:
        rows.append(("ties", f"{info['ties']:.1%} of events share user and time with another (row order decides)"))
    rows += [
        ("events a user", _span(info["lengths"])),
        ("events an item", _span(info["events_per_item"])),
        ("dropped", ", ".join(f"{n:,} {why}" for why, n in info["dropped"].items()) or "nothing"),
        *([("exact copies", f"{info['copies']:,} events, kept")] if info.get("copies") else []),
        ("split", split["kind"] + (" at " + ", ".join(split["boundaries"]) if split["boundaries"] else "")),
        ("training", f"{split['train_events']:,} events of {split['train_users']:,} users"),
    ]
    rows += [(title, _part(split, name)) for name, title in (("valid", "validation"), ("test", "test"))]
    rows += [("note", text) for text in source.get("notes", ())]
    return [*rows, ("split SHA-256", split["sha256"])]


def _part(split: dict[str, Any], name: str) -> str:
    cold = f"{split[f'{name}_cold_user']:,} with a cold user, {split[f'{name}_cold_item']:,} with a cold item"
    left_out = {"users without a history": "no_history", "copies of an earlier event left out": "copies"}
    counts = {what: split.get(f"{name}_{key}", 0) for what, key in left_out.items()}
    return f"{split[name]:,} queries ({cold})" + "".join(f"; {n:,} {what}" for what, n in counts.items() if n)


def _scan(inter: Interactions) -> tuple[np.ndarray, int]:
    """Counts the events of each item row, and those that are tied."""
    per_item, tied = np.zeros(inter.n_items + 1, np.int64), 0
    for start, stop in user_ranges(inter.offsets, CHUNK):
        at = slice(int(inter.offsets[start]), int(inter.offsets[stop]))
        per_item += np.bincount(inter.item[at], minlength=len(per_item))
        same = (np.diff(inter.time[at]) == 0) & (np.diff(inter.user[at]) == 0)
        tied += int(np.count_nonzero(np.append(same, False) | np.insert(same, 0, False)))
    return per_item, tied


def _quantiles(counts: np.ndarray) -> dict[str, float]:
    values = np.quantile(counts, QUANTILES)
    named = {f"q{round(100 * q)}": float(value) for q, value in zip(QUANTILES, values, strict=True)}
    return {"mean": float(counts.mean()), **named}


def _histogram(lengths: np.ndarray) -> dict[str, list[int]]:
    """Counts lengths in bins that double: 1, 2-3, 4-7, ..."""
    edges = 2 ** np.arange(int(lengths.max()).bit_length() + 1)
    counts = np.bincount(np.digitize(lengths, edges) - 1, minlength=len(edges) - 1)
    return {"edges": edges.tolist(), "counts": counts[: len(edges) - 1].tolist()}


def _span(counts: dict[str, float]) -> str:
    low, middle, high = (counts[name] for name in ("q0", "q50", "q100"))
    return f"{low:,.0f} to {high:,.0f}, median {middle:,.0f}, mean {counts['mean']:,.1f}"


def histogram_of(info: dict[str, Any]) -> dict[str, Any]:
    """Returns the lengths of `inspect`'s answer as a histogram with its title; an empty mapping where there is none."""
    found = info.get("lengths", {}).get("histogram")
    return {"title": "Users by number of events", "label": "events of a user", **found} if found else {}
