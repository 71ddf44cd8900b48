"""What runs wrote, for tests that hold a resumed run against one that never stopped: all but what the clock decides."""

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jaxops.core.checkpoint import Checkpoints
from jaxops.core.metrics_file import read_metrics
from jaxops.core.plain import flatten, name

OF_THE_CLOCK = ("time", "train/targets_per_s", "train/examples_per_s", "train/step_ms", "train/tflops_per_s")
OF_THE_CALL = ("finished", "wall_s", "command")
"""Of a summary: when it was written, by what."""


def records(run: str | Path) -> list[dict]:
    """The lines of metrics.jsonl in their order, without events and what depends on the clock."""
    lines = [line for line in read_metrics(Path(run) / "metrics.jsonl") if "event" not in line]
    return [{name: value for name, value in line.items() if name not in OF_THE_CLOCK} for line in lines]


def shown(run: str | Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: the points of each curve, as it reads the files in the order of their names."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(Path(run).glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while len(data) > 12 and len(data) >= 16 + (size := struct.unpack_from("<Q", data)[0]):
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            if event.session_log.status == SessionLog.START:
                curves = {name: [p for p in points if p[0] < event.step] for name, points in curves.items()}
            for value in event.summary.value:
                if value.tag not in OF_THE_CLOCK:
                    curves.setdefault(value.tag, []).append((event.step, value.simple_value))
    return {name: points for name, points in curves.items() if points}


def assert_same_records(run: str | Path, reference: str | Path) -> None:
    assert records(run) == records(reference)
    assert shown(run) == shown(reference)


def summary(run: str | Path) -> dict[str, Any]:
    """summary.json without what differs between two calls."""
    found = json.loads((Path(run) / "summary.json").read_text())
    return {name: value for name, value in found.items() if name not in OF_THE_CALL}


def state(run: str | Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every array of the latest checkpoint, bit for bit, which must be whole."""
    with Checkpoints(Path(run) / "checkpoints") as checkpoints:
        latest = checkpoints.latest()
        assert latest is not None and checkpoints.verify(latest) == []
        arrays = {name(path): np.asarray(leaf) for path, leaf in flatten(checkpoints.load_params(latest, "")).items()}
    return {path: (str(array.dtype), array.shape, array.tobytes()) for path, array in arrays.items()}


def saved(run: str | Path) -> list[str]:
    """The names below checkpoints/; a second save of a step has a number behind it, which a resumed run may save on."""
    return sorted(path.name.partition("-")[0] for path in (Path(run) / "checkpoints").iterdir())


def report(run: str | Path) -> tuple[list[str], list[str]]:
    """The tables of results of a report, and what its figures say they show; those of the clock by title alone."""
    page = (Path(run) / "report.html").read_text()
    found = re.findall(r"<table>\s*<caption>.*?</table>", page, re.S)
    tables = [re.sub(r"\s*<[^>]*>\s*", " ", table) for table in found]
    figures = []
    for label in re.findall(r'aria-label="([^"]*)"', page):
        title = label.partition(":")[0]
        figures.append(title if title == "Throughput" or title in OF_THE_CLOCK else label)
    return tables, figures
