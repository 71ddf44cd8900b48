"""Vocabularies of Hugging Face: a folder with tokenizer.json, read by the package `tokenizers` (extra `lm`)."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxops.core.failures import UserError
from jaxops.data.text.tokenizer import FILES, TURN_ENDS, EncodedText, check_added, digest_of, encoded, json_object

NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class HFTokenizer:
    """A `Tokenizer` out of the files of a folder, by name; `name` says in messages where they are from.

    Cutting and padding that tokenizer.json may ask for are switched off: they would drop the ends of texts unseen.

    Raises:
      UserError: tokenizer.json is missing or broken, or a named token is not in the vocabulary.
    """

    def __init__(self, files: Mapping[str, bytes], name: str, kind: str = "tokenizer.json") -> None:
        self.kind, self._name, self._given = kind, name, dict(files)
        if "tokenizer.json" not in files:
            raise UserError(
                f"{name}: no tokenizer.json (a tokenizer.model or vocab.json alone is not read); in transformers, "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one"
            )
        self._inner = _opened(files["tokenizer.json"], f"{name}/tokenizer.json")
        self._ids: dict[str, int] = self._inner.get_vocab(with_added_tokens=True)
        if not self._ids:
            raise UserError(f"{name}/tokenizer.json: the vocabulary is empty")
        self.vocab = max(self._ids.values()) + 1
        added = self._inner.get_added_tokens_decoder()
        self.special = frozenset(index for index, token in added.items() if token.special)
        self.words: Mapping[str, str] = self._named_tokens()
        self.bos, self.eos, self.pad = self._id("bos_token"), self._id("eos_token"), self._id("pad_token")
        self.stops = self._stops()
        self.template = self._template()
        self.files: Mapping[str, bytes] = {key: files[key] for key in FILES if key in files} | self._kept_stops()
        self.digest = digest_of({"tokenizer.json": files["tokenizer.json"]})

    def _json(self, file: str) -> dict[str, Any]:
        return json_object(self._given.get(file, b"{}"), f"{self._name}/{file}")

    def _named_tokens(self) -> dict[str, str]:
        """Returns what the folder calls its tokens; tokenizer_config.json comes before special_tokens_map.json."""
        found: dict[str, str] = {}
        for file in ("special_tokens_map.json", "tokenizer_config.json"):
            for which, value in self._json(file).items():
                if which in NAMED and value is not None:
                    text = value.get("content") if isinstance(value, dict) else value
                    if not isinstance(text, str):
                        raise UserError(f"{self._name}/{file}: {which} is {str(value)[:60]}, expected a string")
                    found[which] = text
        for which, text in found.items():
            if text not in self._ids:
                raise UserError(
                    f"{self._name}: {which} is {text!r}, which tokenizer.json does not have; one of the files is of "
                    "another model"
                )
        return found

    def _id(self, which: str) -> int | None:
        return self._ids[self.words[which]] if which in self.words else None

    def _stops(self) -> tuple[int, ...]:
        found = [self.eos]
        for file in ("generation_config.json", "config.json"):
            value = self._json(file).get("eos_token_id")
            found += value if isinstance(value, list) else [value]
        found += [self._ids[word] for word in TURN_ENDS if self._ids.get(word) in self.special]
        return tuple(dict.fromkeys(one for one in found if isinstance(one, int) and one < self.vocab))

    def _kept_stops(self) -> dict[str, bytes]:
        """Returns generation_config.json with the stops of config.json, which is a model's and no tokenizer's file."""
        if self._json("config.json").get("eos_token_id") is None:
            return {}
        whole = self._json("generation_config.json") | {"eos_token_id": list(self.stops)}
        return {"generation_config.json": json.dumps(whole, indent=2).encode()}

    def _template(self) -> str | None:
        """Returns the chat template: of its own file before that of the config; of several, the one called default."""
        if "chat_template.jinja" in self._given:
            try:
                return self._given["chat_template.jinja"].decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{self._name}/chat_template.jinja: no UTF-8 text ({error})") from None
        found = self._json("tokenizer_config.json").get("chat_template")
        if isinstance(found, list):
            if not all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in found):
                raise UserError(
                    f"{self._name}/tokenizer_config.json: chat_template is a list, of which each needs a name (text)"
                )
            named = {one["name"]: one.get("template") for one in found}
            if len(named) > 1 and "default" not in named:
                raise UserError(
                    f"{self._name}: several chat templates ({', '.join(map(str, named))}) and none is called "
                    "`default`; write the one to use into a file and give its path as `template:`"
                )
            found = named.get("default", next(iter(named.values()), None))
        if found is not None and not isinstance(found, str):
            raise UserError(f"{self._name}/tokenizer_config.json: chat_template is no text, but {str(found)[:60]!r}")
        return found

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Returns the ids of a text; with `special`, with those that tokenizer.json puts around every text."""
        return self._inner.encode(_checked(text), add_special_tokens=special).ids

    def encode_batch(self, texts: Sequence[str], special: bool = False) -> list[EncodedText]:
        """Returns the ids of each text and the characters that they stand for."""
        out = []
        for found in self._inner.encode_batch([_checked(text) for text in texts], add_special_tokens=special):
            offsets = np.array(found.offsets, np.int32).reshape(-1, 2)
            out.append(EncodedText(np.array(found.ids, np.int32), offsets[:, 0], offsets[:, 1]))
        return out

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Returns the text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self._inner.decode([int(one) for one in ids], skip_special_tokens=skip_special)

    def token(self, index: int) -> str:
        """Returns the name of an id as the vocabulary spells it; ids that it leaves out are called `<id 7>`."""
        found = self._inner.id_to_token(int(index)) if index >= 0 else None
        return f"<id {index}>" if found is None else found

    def with_tokens(self, tokens: Sequence[str]) -> "HFTokenizer":
        """Returns a tokenizer that has these special tokens too; those it has already keep their ids.

        Raises:
          UserError: a token is empty, or no Unicode text.
        """
        check_added(tokens)
        larger = imported_tokenizers().Tokenizer.from_buffer(self._given["tokenizer.json"])
        larger.add_special_tokens(list(dict.fromkeys(tokens)))
        return HFTokenizer(self._given | {"tokenizer.json": larger.to_str().encode()}, self._name, self.kind)

    def with_template(self, template: str) -> "HFTokenizer":
        """Returns a tokenizer with another chat template, in the files of both older and newer readers."""
        config = self._json("tokenizer_config.json") | {"chat_template": template}
        changed = {
            "chat_template.jinja": template.encode(),
            "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2).encode(),
        }
        return HFTokenizer(self._given | changed, self._name, self.kind)


def imported_tokenizers() -> Any:
    """Imports the package `tokenizers`.

    Raises:
      UserError: it is not installed.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            "a tokenizer.json is read by a package that is not installed: pip install 'jaxops[lm]' "
            "(the tokenizer `bytes` needs none)"
        ) from error
    return tokenizers


def _opened(content: bytes, name: str) -> Any:
    """Opens tokenizer.json with nothing that shortens, pads, or takes the blanks out of a token's characters."""
    whole = json_object(content, name)
    if _untrimmed(whole.get("post_processor")):
        content = json.dumps(whole, ensure_ascii=False).encode()
    try:
        found = imported_tokenizers().Tokenizer.from_buffer(content)
    except UserError:
        raise
    except Exception as error:  # `tokenizers` raises a bare Exception for everything that it cannot read
        raise UserError(f"{name}: not a tokenizer ({error})") from None
    found.no_truncation()
    found.no_padding()
    return found


def _untrimmed(part: Any) -> bool:
    """Sets `trim_offsets` to false in a post-processor; true where it changed something."""
    changed = False
    if isinstance(part, dict):
        if part.get("trim_offsets"):
            part["trim_offsets"] = False
            changed = True
        below = part.get("processors")
        for one in below if isinstance(below, list) else ():
            changed |= _untrimmed(one)
    return changed


def _checked(text: str) -> str:
    encoded(text)
    return text
