"""Opens tokenizers of every kind by their address, or from the files that a run keeps."""

from collections.abc import Mapping
from pathlib import Path

from jaxops.core.failures import UserError, nearest
from jaxops.data.text.byte_tokenizer import TEMPLATE, ByteTokenizer
from jaxops.data.text.gguf_tokenizer import read_gguf_tokenizer
from jaxops.data.text.hf_tokenizer import HFTokenizer
from jaxops.data.text.tokenizer import FILES, Tokenizer, check_added, json_object


def open_tokenizer(address: str) -> Tokenizer:
    """Opens the tokenizer at an address: `bytes`, a folder, a `tokenizer.json`, or a GGUF file (`gguf://` or a path).

    Raises:
      UserError: nothing is there, the files make no tokenizer, or a package is missing.
    """
    if address == "bytes":
        return ByteTokenizer()
    path = Path(address.removeprefix("gguf://")).expanduser()
    if address.startswith("gguf://") or path.suffix == ".gguf":
        return read_gguf_tokenizer(path)
    folder = path.parent if path.name == "tokenizer.json" else path
    if not folder.is_dir():
        hint = nearest(address, ["bytes"])
        raise UserError(
            f"no tokenizer at {address}{hint}: expected `bytes`, a folder with tokenizer.json or a GGUF file"
        )
    found = {name: (folder / name).read_bytes() for name in (*FILES, "config.json") if (folder / name).is_file()}
    return tokenizer_of(found, str(folder))


def tokenizer_of(files: Mapping[str, bytes], name: str) -> Tokenizer:
    """Rebuilds a tokenizer from its files; `name` says in messages where they are from.

    Raises:
      UserError: the files make no tokenizer, or the package `tokenizers` is missing.
    """
    config = json_object(files.get("tokenizer_config.json", b"{}"), f"{name}/tokenizer_config.json")
    if isinstance(config.get("jaxops"), dict) and config["jaxops"].get("kind") == "bytes":
        added = config["jaxops"].get("added", [])
        if not isinstance(added, list) or not all(isinstance(token, str) for token in added):
            raise UserError(
                f"{name}/tokenizer_config.json: jaxops.added is {str(added)[:60]!r}, expected a list of strings"
            )
        try:
            check_added(added)
        except UserError as error:
            raise UserError(f"{name}/tokenizer_config.json: jaxops.added: {error}") from None
        template = config.get("chat_template")
        return ByteTokenizer(tuple(added), template if isinstance(template, str) else TEMPLATE)
    return HFTokenizer(files, name)
