"""Small data in the form that each shipped config reads, for tests that run configs and commands as they are shipped.

MovieLens-100K may not be handed on and its download needs a network, so its three files are drawn here in their form;
`movielens` makes them the named data sets, checksums and all.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxops.data import sources
from jaxops.data.clicks.criteo import write_criteo
from jaxops.data.movielens import GENRES

USERS, ITEMS, EVENTS = 90, 60, 40
JOBS = ("artist", "doctor", "student")


def _walks(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users, items and times of EVENTS events a user: nobody sees an item twice, and no two events share a time."""
    draw = np.random.default_rng(seed)
    order = np.stack(
        [np.roll(draw.permutation(ITEMS) if user % 3 else np.arange(ITEMS), user) for user in range(USERS)]
    )
    items = order[:, :EVENTS].reshape(-1)
    users = np.repeat(np.arange(USERS), EVENTS)
    times = 880_000_000 + 7 * users + np.tile(np.arange(EVENTS) * 5000, USERS)
    return users + 1, items + 1, times


def plays(path: Path) -> None:
    """A Parquet file of events with the columns user, item and time."""
    users, items, times = _walks()
    pq.write_table(pa.table({"user": users, "item": items, "time": times}), path)


def sequences(path: Path) -> None:
    """A file in the form of S3-Rec: a user and their items in order, one user a line."""
    users, items, _ = _walks()
    lines = [f"{user} {' '.join(map(str, items[users == user][:12]))}" for user in range(1, USERS + 1)]
    path.write_text("\n".join(lines) + "\n")


def criteo(path: Path) -> None:
    """A click log in Criteo's form."""
    write_criteo(path, 3000)


def movielens(patch: pytest.MonkeyPatch) -> None:
    """Puts small files in the form of MovieLens-100K where the named data sets are kept."""
    users, items, times = _walks()
    stars = 1 + (users + 3 * items) % 5
    ratings = "".join(f"{u}\t{i}\t{s}\t{t}\n" for u, i, s, t in zip(users, items, stars, times, strict=True))
    films = "".join(f"{i}\t{1960 + i % 40}\t{GENRES[i % 19]}|{GENRES[(i + 7) % 19]}\n" for i in range(1, ITEMS + 1))
    people = "".join(f"{u}\t{18 + u % 50}\t{'MF'[u % 2]}\t{JOBS[u % 3]}\t{10000 + u}\n" for u in range(1, USERS + 1))
    texts = {
        "movielens_100k": ratings,
        "movielens_100k_films": f"item\tyear\tgenres\n{films}",
        "movielens_100k_people": f"user\tage\tgender\toccupation\tzip\n{people}",
    }
    for name, text in texts.items():
        source = dataclasses.replace(sources.find_source(name), sha256=hashlib.sha256(text.encode()).hexdigest())
        source.path.parent.mkdir(parents=True, exist_ok=True)
        source.path.write_text(text)
        patch.setitem(sources.SOURCES, name, source)


def ratings(patch: pytest.MonkeyPatch, name: str = "icwsm14") -> None:
    """Puts a small file in the form of ICWSM-14 where the named data set is kept."""
    words = ("good", "bad", "fine", "dull", "warm")
    rows = [
        {"id": f"film/{at}", "source": "film", "text": f"a {words[at % 5]} one {at}", "ratings": [at % 5, at % 3, 1]}
        for at in range(400)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    source = dataclasses.replace(sources.find_source(name), sha256=hashlib.sha256(text.encode()).hexdigest())
    source.path.parent.mkdir(parents=True, exist_ok=True)
    source.path.write_text(text)
    patch.setitem(sources.SOURCES, name, source)


def reviews(patch: pytest.MonkeyPatch) -> None:
    """The same for the reviews of ICWSM-14."""
    ratings(patch, "icwsm14_reviews")


def dialogues(patch: pytest.MonkeyPatch) -> None:
    """Two hundred short conversations in place of Chit-Chat."""
    turns = lambda at: [{"role": "user", "content": f"hello {at}"}, {"role": "assistant", "content": f"hi {at % 7}"}]
    text = "".join(json.dumps({"messages": turns(at)}) + "\n" for at in range(200))
    source = dataclasses.replace(sources.find_source("chitchat"), sha256=hashlib.sha256(text.encode()).hexdigest())
    source.path.parent.mkdir(parents=True, exist_ok=True)
    source.path.write_text(text)
    patch.setitem(sources.SOURCES, "chitchat", source)


NAMED: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "named://icwsm14": ratings,
    "named://icwsm14_reviews": reviews,
    "named://chitchat": dialogues,
}
"""Named data sets that shipped configs read, and what puts a small one in their place."""
FILES: dict[str, Callable[[Path], None]] = {
    "plays.parquet": plays,
    "criteo.tsv": criteo,
    "data/criteo.tsv": criteo,
    "data/amazon_beauty_s3rec.txt": sequences,
}
"""Where shipped configs and README look for a file of one's own, and what is to lie there."""


def write_file(folder: Path, name: str) -> None:
    """Writes one of FILES below a folder."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    FILES[name](folder / name)
