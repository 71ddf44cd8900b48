"""Shows rows as a person reads them: the tokens as text, and which of them the loss sees."""

from collections.abc import Iterator, Sequence

import numpy as np
from rich.text import Text

from jaxops.data.protocol import Source
from jaxops.data.text.tokenizer import Tokenizer

LEARNT = "black on green"
OPEN, CLOSE = "⟦", "⟧"


def preview(source: Source, tokenizer: Tokenizer, rows: int, cursor: int = 0, coloured: bool = False) -> Text:
    """Returns the first `rows` rows after a cursor as text, segment by segment; `.plain` has no colour.

    Args:
      source: the rows.
      tokenizer: the tokenizer that they were made with.
      rows: the number of rows to show.
      cursor: the number of rows to leave out before them.
      coloured: True shows in green what is learnt from; else it stands in ⟦ ⟧.

    Example:
      rich.print(preview(data.source(0), tokenizer, rows=2, coloured=True))
    """
    batch = source.batch(cursor, rows)
    out = Text()
    for row in range(rows):
        learnt, held = int(batch["mask"][row].sum()), int((batch["segment"][row] > 0).sum())
        out.append(
            f"row {int(batch['id'][row])}: {held} of {batch['tokens'].shape[1]} places filled, "
            f"{learnt} tokens learnt from\n",
            "bold" if coloured else "",
        )
        for number, (ids, trained) in enumerate(segments_of({name: value[row] for name, value in batch.items()}), 1):
            out.append(f"  segment {number}, {len(ids)} tokens\n", "dim" if coloured else "")
            for text, seen in pieces(ids, trained, tokenizer):
                if coloured:
                    out.append(text, LEARNT if seen else "")
                else:
                    out.append(f"{OPEN}{text}{CLOSE}" if seen else text)
            out.append("\n")
    return out


def segments_of(row: dict[str, np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the tokens of each segment of a row, its last target included, and which of them are learnt from."""
    for number in range(1, int(row["segment"].max(initial=0)) + 1):
        at = np.flatnonzero(row["segment"] == number)
        ids = np.append(row["tokens"][at], row["targets"][at[-1]])
        yield ids, np.concatenate([np.zeros(1, bool), row["mask"][at] > 0])


def pieces(ids: Sequence[int] | np.ndarray, trained: np.ndarray, tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """Yields runs of tokens that are learnt from and runs that are not, decoded."""
    edges = np.flatnonzero(np.diff(trained)) + 1
    for run, seen in zip(np.split(np.asarray(ids), edges), np.split(trained, edges), strict=True):
        if len(run):
            yield tokenizer.decode(run.tolist()), bool(seen[0])
