"""The ratings of Hutto & Gilbert (ICWSM 2014): how single people rated the mood of texts, -4 to 4."""

import io
import json
import tarfile
from collections.abc import Iterator

SOURCES = {
    "film": "movieReviewSnippets",
    "editorial": "nytEditorialSnippets",
    "product": "amazonReviewSnippets",
    "tweet": "tweets",
}
"""The names of the files, by where the texts are from."""
REVIEWS = ("film", "product")


def ratings(content: bytes) -> bytes:
    """Returns JSON lines of {"id", "source", "text", "ratings"} out of the archive that the package carries.

    Texts and ratings are joined by id: the two files of a source are not always in one order. The means in the files
    are left aside, as those of 195 tweets are not the means of their ratings.
    """
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        lines = [json.dumps(row, ensure_ascii=False) for source in SOURCES for row in _rows(archive, source)]
    return ("\n".join(lines) + "\n").encode()


def reviews(content: bytes) -> bytes:
    """Returns the lines of `ratings` whose texts are reviews of films and products."""
    lines = ratings(content).splitlines()
    return b"\n".join(line for line in lines if json.loads(line)["source"] in REVIEWS) + b"\n"


def _rows(archive: tarfile.TarFile, source: str) -> Iterator[dict[str, object]]:
    given = {row[0]: json.loads(row[3]) for row in _table(archive, f"{SOURCES[source]}_anonDataRatings.txt")}
    for row in _table(archive, f"{SOURCES[source]}_GroundTruth.txt"):
        yield {"id": f"{source}/{row[0]}", "source": source, "text": row[2].strip(), "ratings": given[row[0]]}


def _table(archive: tarfile.TarFile, name: str) -> list[list[str]]:
    file = archive.extractfile(f"hutto_ICWSM_2014/{name}")
    assert file is not None  # KeyError where it is not there; the archive's checksum is known
    return [line.split("\t") for line in file.read().decode("utf-8-sig").split("\r\n") if line.strip()]
