"""The Chit-Chat dialogues of BYU's Perception, Control and Cognition Laboratory, as conversations to learn from."""

import json
from collections.abc import Iterator

TURNS = 4
"""Turns of a conversation: dialogues are cut into pieces of so many, for most have dozens."""
ROLES = ("user", "assistant")


def conversations(content: bytes) -> bytes:
    """Returns JSON lines of {"messages"} out of the package's dataset.json.

    The messages that a person sends in a row are one turn, joined by blanks. Who begins is the user, who answers is the
    assistant. Each piece begins with the user and ends with the assistant.
    """
    lines = [
        json.dumps({"messages": piece}, ensure_ascii=False)
        for dialogue in json.loads(content).values()
        for piece in _pieces(dialogue["messages"])
    ]
    return ("\n".join(lines) + "\n").encode()


def _pieces(turns: list[list[dict[str, str]]]) -> Iterator[list[dict[str, str]]]:
    said = [" ".join(message["text"].strip() for message in turn).strip() for turn in turns]
    said = [text for text in said if text]
    for start in range(0, len(said), TURNS):
        piece = said[start : start + TURNS]
        piece = piece[: len(piece) // 2 * 2]
        if piece:
            yield [{"role": ROLES[at % 2], "content": text} for at, text in enumerate(piece)]
