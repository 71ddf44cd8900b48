"""The side files of MovieLens-100K in one form, whichever address they came from: tab-separated, UTF-8, with a header.

Films: item, year (of the title; empty where it has none), genres apart by `|`.
People: user, age, gender, occupation, zip.
"""

import re

GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
"""As u.item has its flags, from left to right."""


def films_of_grouplens(content: bytes) -> bytes:
    """Converts u.item: id | title (year) | dates | address | 19 flags, in Latin-1."""
    rows = []
    for line in content.decode("latin-1").splitlines():
        parts = line.split("|")
        year = re.search(r"\((\d{4})\)\s*$", parts[1])
        flags = parts[-len(GENRES) :]
        genres = "|".join(name for name, flag in zip(GENRES, flags, strict=True) if flag == "1")
        rows.append(f"{parts[0]}\t{year[1] if year else ''}\t{genres}")
    return _table("item\tyear\tgenres", rows)


def films_of_recbole(content: bytes) -> bytes:
    """Converts ml-100k.item: id, title, year, genres apart by spaces."""
    rows = []
    for line in content.decode("utf-8").splitlines()[1:]:
        item, _, year, genres = line.split("\t")
        rows.append(f"{item}\t{year if re.fullmatch('[0-9]{4}', year) else ''}\t{genres.replace(' ', '|')}")
    return _table("item\tyear\tgenres", rows)


def people_of_grouplens(content: bytes) -> bytes:
    """Converts u.user: id | age | gender | occupation | zip."""
    return _table("user\tage\tgender\toccupation\tzip", content.decode("latin-1").replace("|", "\t").splitlines())


def people_of_recbole(content: bytes) -> bytes:
    """Converts ml-100k.user: the same columns, under a header."""
    return _table("user\tage\tgender\toccupation\tzip", content.decode("utf-8").splitlines()[1:])


def _table(header: str, rows: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in [header, *rows]).encode()
