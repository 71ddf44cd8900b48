"""The held-out part of text data: chosen by what an example says, so that copies never straddle the split."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from jaxops.core.failures import UserError
from jaxops.data import notes
from jaxops.data.text.formats import Example, read_examples
from jaxops.data.text.spec import OneTextData, Share

Split = TypeVar("Split")


def read_parts(config: OneTextData) -> tuple[list[Example], list[Example], int]:
    """Reads the examples of training and validation (which may be none), and the number of exact copies among them.

    Raises:
      UserError: what reading raises; training is empty.
    """
    examples = read_examples(config, config.path)
    digests = [example.digest() for example in examples]
    examples, digests, copies = _without_copies(config, examples, digests)
    if config.valid is None:
        return examples, [], copies
    if not isinstance(config.valid, Share):
        held = read_examples(config, config.valid)
        trained = set(digests)
        both = sum(example.digest() in trained for example in held)
        if both:
            notes.tell(f"{both} of {len(held)} examples of data.valid are in data.path too: validation knows them")
        return examples, held, copies
    return *split(examples, digests, config.valid.share), copies


def split(
    examples: Sequence[Split], digests: Sequence[bytes], share: float, what: str = "example(s)"
) -> tuple[list[Split], list[Split]]:
    """Returns the examples of training and those that are held out (`held_out`).

    Args:
      examples: the examples.
      digests: by example, a digest of what decides its side.
      share: the share that is held out (`data.valid.share`).
      what: names what the digests are of in messages.

    Raises:
      UserError: nothing is left to train on.
    """
    chosen = held_out(digests, share)
    train = [example for example, out in zip(examples, chosen, strict=True) if not out]
    if not train:
        raise UserError(
            f"data.valid.share {share} leaves nothing to train on: {len(set(digests))} different {what}; use a smaller "
            "share, more data, or `valid: PATH`"
        )
    return train, [example for example, out in zip(examples, chosen, strict=True) if out]


def _without_copies(
    config: OneTextData, examples: list[Example], digests: list[bytes]
) -> tuple[list[Example], list[bytes], int]:
    """Counts exact copies, says so, and leaves them out where the config wants it."""
    first = {digest: at for at, digest in reversed(list(enumerate(digests)))}
    copies = len(digests) - len(first)
    if copies:
        at = next(at for at, digest in enumerate(digests) if first[digest] != at)
        done = "left out" if config.copies == "drop" else "kept (`copies: drop` leaves them out)"
        notes.tell(
            f"{copies} of {len(digests)} examples are exact copies, {done}: {examples[at].where} repeats "
            f"{examples[first[digests[at]]].where}"
        )
    if config.copies == "drop":
        kept = sorted(first.values())
        examples, digests = [examples[at] for at in kept], [digests[at] for at in kept]
    return examples, digests, copies


def held_out(digests: Sequence[bytes], share: float) -> np.ndarray:
    """Returns which examples are held out: those whose digest, as a fraction of all digests, is below the share.

    An example keeps its side when others come or go. At least one is held out: that of the smallest digest.
    """
    place = np.array([int.from_bytes(digest[:6], "big") for digest in digests]) / 2**48
    chosen = place < share
    if not chosen.any():
        chosen = place == place.min()
        notes.tell(f"data.valid.share {share} of {len(digests)} examples is less than one: one is held out")
    return chosen
