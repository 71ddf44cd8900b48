"""Models of the Hugging Face Hub by address: `hf://ORG/MODEL@REVISION`, fetched by the library huggingface_hub.

That library keeps the files in its own cache and reads its own variables: HF_HOME, HF_TOKEN, HF_HUB_OFFLINE,
HF_ENDPOINT. Only files that are read are fetched, and never a pickle. Tested in tests/data/test_hub.py against a server
on this machine that speaks as much of the Hub's API as the library asks for.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from jaxops.core.failures import NO_ROOM, RunFailed, UserError, nearest

HUB = "hf://"
"""The beginning of an address of the Hub."""
MAIN = "main"
TOKENIZER = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
MODEL = (*TOKENIZER, *WEIGHTS)
"""The files of a model that are read: its config, its weights in safetensors, its tokenizer and chat template."""
_ADDRESS = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^:@\s]+)(:(?P<commit>[0-9a-f]{40}))?)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclasses.dataclass(frozen=True)
class HubAddress:
    """A model of the Hub, at a revision.

    Attributes:
      repo: `ORG/MODEL`.
      revision: the branch, tag or commit that was asked for.
      commit: the commit that the revision was when it was resolved; None before that.
    """

    repo: str
    revision: str = MAIN
    commit: str | None = None

    @staticmethod
    def parse(address: str) -> "HubAddress":
        """Returns the parts of `hf://ORG/MODEL`, `hf://ORG/MODEL@REVISION` or `hf://ORG/MODEL@REVISION:COMMIT`.

        Raises:
          UserError: it is no such address.
        """
        found = _ADDRESS.fullmatch(address.removeprefix(HUB))
        if not address.startswith(HUB) or found is None or ".." in found["repo"]:
            raise UserError(
                f"{address}: expected hf://ORG/MODEL or hf://ORG/MODEL@REVISION, a branch, tag or commit of a model of"
                " the Hugging Face Hub"
            )
        revision = found["revision"] or MAIN
        return HubAddress(found["repo"], revision, revision if _COMMIT.fullmatch(revision) else found["commit"])

    def __str__(self) -> str:
        known = f":{self.commit}" if self.commit not in (None, self.revision) else ""
        return f"{HUB}{self.repo}@{self.revision}{known}"

    def resolved(self) -> "HubAddress":
        """Returns the address with the commit that its revision is now, asking the Hub unless it has one.

        Without a network it is the commit that the revision was when its files came into the cache.

        Raises:
          UserError: there is no such model or revision, it may not be read, or the Hub cannot be asked.
        """
        if self.commit is not None:
            return self
        # The library notes in its cache what the revision was; the name of the folder is the commit.
        return dataclasses.replace(self, commit=self._snapshot(["config.json"]).name)

    def fetched(self, files: Sequence[str]) -> Path:
        """Returns a folder with those of the files that the model has, fetched unless they are in the cache.

        Args:
          files: names, or patterns of names, such as MODEL.

        Raises:
          UserError: as `resolved`; or the model has none of the files.
          RunFailed: the disk is full.
        """
        folder = self._snapshot(files)
        if "config.json" in files and not folder.is_dir():
            raise UserError(f"{self} has no config.json: it is no model that can be read")
        if files == MODEL and not any(folder.glob("model*.safetensors")):
            raise UserError(
                f"{self} has no weights in safetensors (model.safetensors, or several files with an index). Pickles"
                " (pytorch_model.bin) are never read, as they can run code; another revision may have safetensors"
            )
        return folder

    def _snapshot(self, files: Sequence[str]) -> Path:
        library = _library()
        with self._told(library):
            found = library.snapshot_download(
                self.repo, revision=self.commit or self.revision, allow_patterns=list(files), library_name="jaxops"
            )
        return Path(found)

    @contextlib.contextmanager
    def _told(self, library: ModuleType) -> Iterator[None]:
        """Turns the library's errors into messages for the person who named the address."""
        errors = library.errors
        try:
            yield
        except errors.GatedRepoError:
            raise UserError(
                f"{self}: the model is gated. Accept its terms at {library.constants.ENDPOINT}/{self.repo}, then give a"
                f" token that may read it: `hf auth login`, or HF_TOKEN{_token(library)}"
            ) from None
        except errors.RepositoryNotFoundError:
            raise UserError(self._unknown(library)) from None
        except errors.RevisionNotFoundError:
            raise UserError(
                f"{self}: {self.repo} has no branch, tag or commit {self.revision!r}{self._nearest(library)}"
            ) from None
        except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
            raise UserError(self._unreached(library, error)) from None
        except errors.HfHubHTTPError as error:
            raise UserError(self._refused(library, error)) from None
        except (errors.HFValidationError, errors.HTTPError) as error:  # HTTPError is that of the library's client
            raise UserError(f"{self}: {_first_line(error)}") from None
        except OSError as error:
            text = f"{self}: its files cannot be kept in {library.constants.HF_HUB_CACHE} (HF_HOME): {error}"
            raise (RunFailed if error.errno in NO_ROOM else UserError)(text) from None

    def _unreached(self, library: ModuleType, error: Exception) -> str:
        """Returns the message for a Hub that was not asked or did not answer, while the cache lacks the files."""
        where = f"the cache ({library.constants.HF_HUB_CACHE}, set by HF_HOME) does not have all of its files"
        if library.constants.HF_HUB_OFFLINE:
            return f"{self}: {where}, and HF_HUB_OFFLINE is set, so that nothing is fetched"
        cause = error.__cause__
        if isinstance(cause, library.errors.HfHubHTTPError):
            return self._refused(library, cause)
        why = f" ({_first_line(cause)})" if cause is not None else ""
        return f"{self}: {library.constants.ENDPOINT} does not answer{why}, and {where}; try again, or name a folder"

    def _unknown(self, library: ModuleType) -> str:
        """Returns the message for a model that the Hub does not have, or does not show to whoever asks."""
        return (
            f"{self}: {library.constants.ENDPOINT} has no model {self.repo}, or it is private and needs a token:"
            f" `hf auth login`, or HF_TOKEN{_token(library)}"
        )

    def _refused(self, library: ModuleType, error: Exception) -> str:
        """Returns the message for an answer of the Hub that is an error."""
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 401:  # what the Hub answers for a model that is not there, too, where no token is sent
            return self._unknown(library)
        if status == 403:
            return f"{self}: the Hub refuses it (status 403): it needs a token that may read it{_token(library)}"
        return f"{self}: the Hub answered with status {status} ({_first_line(error)})"

    def _nearest(self, library: ModuleType) -> str:
        try:
            refs = library.HfApi().list_repo_refs(self.repo)
        except Exception:  # the message is complete without it
            return ""
        return nearest(self.revision, [one.name for one in (*refs.branches, *refs.tags)])


def _library() -> ModuleType:
    """Returns the package huggingface_hub, imported when an address of the Hub is first read.

    Raises:
      UserError: it is not installed.
    """
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError:
        raise UserError(
            "hf:// addresses are read by a package that is not installed: pip install 'jaxops[hf]'"
        ) from None
    return huggingface_hub


def _token(library: ModuleType) -> str:
    """Returns a clause that says whether a token was sent."""
    return " (the one that was given may not)" if library.get_token() else " (none was given)"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
