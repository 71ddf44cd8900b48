"""Opens prompts: reads, splits and tokenises them, once in each process and to the same arrays."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxops.data import notes
from jaxops.data.prompts.encode import EncodedPrompts, encode_prompts
from jaxops.data.prompts.formats import AskedPrompt, read_prompts
from jaxops.data.prompts.source import Prompts
from jaxops.data.prompts.spec import AnyPrompts
from jaxops.data.text.formats import SHOWN
from jaxops.data.text.heldout import split
from jaxops.data.text.spec import Share
from jaxops.data.text.tokenizer import Tokenizer

MULTIPLE = 8
"""The width of a batch is a multiple of it, so that a few tokens more or less compile no new program."""


@dataclasses.dataclass(frozen=True, eq=False)
class OpenedPrompts:
    """Prompts that are ready to be answered.

    Attributes:
      train: the prompts of training.
      valid: the held-out prompts, or None. Their batches are as wide as those of training, or wider.
      columns: names of the columns beside the prompt.
      inspection: plain values that describe the prompts, their digest among them.
    """

    train: Prompts
    valid: Prompts | None
    columns: tuple[str, ...]
    inspection: dict[str, Any]


def open_prompts(config: AnyPrompts, tokenizer: Tokenizer, seed: int) -> OpenedPrompts:
    """Reads prompts and turns them into tokens.

    Args:
      config: the data section.
      tokenizer: that of the model, with its chat template.
      seed: draws the order of each epoch (`run.seed`).

    Raises:
      UserError: what reading or the template raises; no prompt is left.
    """
    with notes.collected() as remarks:
        train, valid, copies = _read(config)
        names = tuple(dict.fromkeys(name for row in (*train, *valid) for name in row.columns))
        parts = {"train": _with_columns(train, names, "train")}
        if valid:
            parts["valid"] = _with_columns(valid, names, "valid")
        encoded = {name: encode_prompts(config, rows, tokenizer, name) for name, rows in parts.items()}
    fill = next((one for one in (tokenizer.pad, tokenizer.eos) if one is not None), 0)
    opened: dict[str, Prompts] = {}
    width = 0
    for name, part in encoded.items():  # training comes first
        width = max(width, min(-(-part.longest // MULTIPLE) * MULTIPLE, config.max_tokens))
        opened[name] = Prompts(part.rows, part.tokens, part.offsets, width=width, seed=seed, fill=fill)
    inspection: dict[str, Any] = {
        "kind": config.kind,
        "max_tokens": config.max_tokens,
        "width": opened["train"].width,
        "columns": list(names),
        "copies": copies,
        "tokenizer": tokenizer.digest,
        "digest": _digest(encoded),
    }
    inspection |= {name: _counts(part) for name, part in encoded.items()}
    inspection |= {"notes": remarks} if remarks else {}
    return OpenedPrompts(opened["train"], opened.get("valid"), names, inspection)


def _read(config: AnyPrompts) -> tuple[list[AskedPrompt], list[AskedPrompt], int]:
    """Reads the prompts of training and those that are held out, and counts the copies at `data.path`."""
    prompts = read_prompts(config, config.path)
    digests = [prompt.asked.digest() for prompt in prompts]
    copies = _tell_copies(prompts, digests)
    if config.valid is None:
        return prompts, [], copies
    if isinstance(config.valid, Share):
        return *split(prompts, [prompt.held_by for prompt in prompts], config.valid.share, "prompt(s)"), copies
    held, trained = read_prompts(config, config.valid), {*digests}
    both = sum(prompt.asked.digest() in trained for prompt in held)
    if both:
        notes.tell(f"{both} of {len(held)} prompts of data.valid are in data.path too: training answers them")
    return prompts, held, copies


def _tell_copies(prompts: Sequence[AskedPrompt], digests: Sequence[bytes]) -> int:
    """Counts the prompts that ask what one before them asks, and says so."""
    first: dict[bytes, int] = {}
    repeats = [(at, seen) for at, digest in enumerate(digests) if (seen := first.setdefault(digest, at)) != at]
    if repeats:
        at, seen = repeats[0]
        notes.tell(
            f"{len(repeats)} of {len(prompts)} prompts are exact copies, kept: {prompts[at].where} repeats "
            f"{prompts[seen].where}"
        )
    return len(repeats)


def _with_columns(prompts: Sequence[AskedPrompt], names: Sequence[str], part: str) -> list[AskedPrompt]:
    """Gives all prompts the same columns, and says how many lack one: a reward gets None for it."""
    lacking = {name: sum(name not in prompt.columns for prompt in prompts) for name in names}
    told = [f"{name!r} in {count}" for name, count in lacking.items() if count]
    if told:
        shown = ", ".join(told[:SHOWN]) + (f" and {len(told) - SHOWN} more columns" if len(told) > SHOWN else "")
        notes.tell(f"{part}: of {len(prompts)} prompts some have no column {shown}, which is None there")
    filled = lambda prompt: {name: prompt.columns.get(name) for name in names}
    return [dataclasses.replace(prompt, columns=filled(prompt)) for prompt in prompts]


def _counts(part: EncodedPrompts) -> dict[str, int]:
    counts = {"prompts": len(part.rows), "tokens": len(part.tokens), "longest": part.longest}
    return counts | {"too_long": part.too_long, "empty": part.empty}


def _digest(parts: dict[str, EncodedPrompts]) -> str:
    """Returns a digest of the tokens, texts and columns of all prompts: of all that a run reads, but for the seed."""
    found = hashlib.sha256()
    for name, part in parts.items():
        found.update(f"{name} {len(part.rows)}\n".encode())
        found.update(np.ascontiguousarray(part.tokens).tobytes() + np.ascontiguousarray(part.offsets).tobytes())
        for row in part.rows:
            said = json.dumps([row.written, row.columns], sort_keys=True, default=str)
            found.update(said.encode() + b"\n")
    return found.hexdigest()
