"""The code that a launch brings to its hosts: one tar of the repository, the same bytes for the same files.

It holds what git tracks and what git would add (`git ls-files -co --exclude-standard`), so changes that are not
committed come along and ignored files do not. Tested in tests/launch/test_code.py.
"""

import dataclasses
import hashlib
import io
import os
import re
import stat
import subprocess
import tarfile
from pathlib import Path

from jaxops.core.failures import UserError

MOST_BYTES = 100 << 20
"""The largest tar of code, in bytes."""
_SECRET = re.compile(
    r"(?:\.env(?:\..+)?|.+\.env|\.netrc|_netrc|\.pgpass|\.npmrc|\.pypirc|\.htpasswd|\.git-credentials"
    r"|id_(?:rsa|dsa|ecdsa|ed25519)|.+\.(?:pem|key|p12|pfx|jks|keystore|kdbx)"
    r"|credentials(?:\.json)?|application_default_credentials\.json|service[-_]account.*\.json|client_secret.*\.json"
    r"|secrets?\.(?:json|ya?ml|toml))",
    re.IGNORECASE,
)
_EXAMPLE = re.compile(r".*\.(?:example|sample|template|dist)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Code:
    """The code of a launch.

    Attributes:
      folder: the top of the repository.
      inside: the current folder below it, in which the workers run too.
      tar: the bytes of the tar.
      sha256: their digest, which names the code.
      files: the paths in it.
    """

    folder: Path
    inside: str
    tar: bytes
    sha256: str
    files: tuple[str, ...]


def bundle(folder: Path, most: int = MOST_BYTES) -> Code:
    """Makes the tar of the repository that `folder` is in.

    Raises:
      UserError: it is in no git repository, the tar would be too large, or a file looks like it holds a secret.
    """
    folder = folder.resolve()
    top = Path(_git(folder, "rev-parse", "--show-toplevel").strip())
    names = sorted(name for name in _git(top, "ls-files", "-coz", "--exclude-standard").split("\0") if name)
    names = [name for name in names if os.path.lexists(top / name)]  # deleted, and not committed yet
    refused = [name for name in names if _looks_secret(name.rpartition("/")[2])]
    if refused:
        raise UserError(
            f"code: {', '.join(refused[:5])} in {top} may hold a secret, and would be copied to every host; add it to"
            " .gitignore (git rm --cached, if it is tracked), and give its values by --secret NAME"
        )
    sizes = {name: (top / name).lstat().st_size for name in names}
    if (total := sum(sizes.values())) > most:
        large = sorted(sizes, key=lambda name: -sizes[name])[:3]
        named = ", ".join(f"{name} ({sizes[name] / 2**20:.0f} MiB)" for name in large)
        raise UserError(
            f"code: {total / 2**20:.0f} MiB in {top}, and hosts are sent {most / 2**20:.0f} MiB at most; the largest:"
            f" {named}. Add data to .gitignore and put it where all hosts read it"
        )
    data = _tar(top, names)
    inside = folder.relative_to(top).as_posix()
    return Code(top, inside, data, hashlib.sha256(data).hexdigest(), tuple(names))


def _looks_secret(name: str) -> bool:
    return _SECRET.fullmatch(name) is not None and _EXAMPLE.fullmatch(name) is None


def _git(folder: Path, *argv: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *argv], capture_output=True, timeout=120)
    except FileNotFoundError:
        raise UserError("code: git is not installed on this machine; it says which files belong to the code") from None
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip()
        raise UserError(
            f"code: {folder} is in no git repository that can be read ({said[:200]}); run `git init` there, or launch"
            " from the folder of your code"
        )
    return os.fsdecode(done.stdout)


def _tar(top: Path, names: list[str]) -> bytes:
    """Returns a tar without times, owners and other modes than 644 and 755."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in names:
            path = top / name
            mode = path.lstat().st_mode
            if stat.S_ISDIR(mode):
                raise UserError(
                    f"code: {name} in {top} is a repository of its own (a submodule?), which a tar of this one leaves"
                    " out; install it in the environment, or add it to .gitignore"
                )
            entry = tarfile.TarInfo(name)
            entry.mode = 0o755 if mode & stat.S_IXUSR else 0o644
            if stat.S_ISLNK(mode):
                target = os.readlink(path)
                if not (path.parent / target).resolve().is_relative_to(top) or os.path.isabs(target):
                    raise UserError(f"code: the link {name} -> {target} in {top} leads out of the repository")
                entry.type, entry.linkname = tarfile.SYMTYPE, target
                tar.addfile(entry)
            elif stat.S_ISREG(mode):
                content = path.read_bytes()
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return made.getvalue()
