"""The end of a run: its last records, the baselines, `summary.json` and the report.

Tested in tests/run/test_records.py.
"""

from typing import Any

from jaxops.core import distributed
from jaxops.core.writers import Writers
from jaxops.run.folder.run_folder import RunFolder
from jaxops.run.progress import Progress
from jaxops.run.summary import FinishedRun, write_summary
from jaxops.run.task import Task


def finish(
    task: Task, folder: RunFolder, writers: Writers, progress: Progress, state: str, found: dict[str, Any]
) -> FinishedRun:
    """Writes the last records, the summary and the report on process 0; every process must call it.

    Args:
      task: the task; a run that is finished is set beside its baselines.
      folder: the run folder.
      writers: the writers, for the figures on the test part.
      progress: tells a person of the results.
      state: `finished`, `interrupted`, `preempted` or `paused`.
      found: what the summary says beside that, with the final metrics by name.

    Raises:
      RunFailed: a process failed, or a file cannot be written.
    """

    def write() -> dict[str, Any]:
        baselines: dict[str, Any] = {}
        if state == "finished":
            numbers = {name: x for name, x in found.items() if name.startswith("test/") and isinstance(x, float | int)}
            if numbers:
                writers.write(found["step"], numbers)
            if writers.take_pictures:
                from jaxops.report.pictures import pictures  # matplotlib takes a second to import

                for name, png in pictures(found):
                    writers.picture(found["step"], name, png)
            for name, figures in (task.baselines() if task.baselines else {}).items():
                baselines |= {f"baseline/{name}/{key}": value for key, value in figures.items()}
        writers.flush()  # a run that is finished opens its records no more
        summary, report = write_summary(folder, state, found | baselines)
        if state == "finished":
            progress.table(summary, task.config.evaluate.metrics, task.about.note)
        progress.say(f"report: {report}")
        return folder.summary()

    return FinishedRun(folder.dir, distributed.run_on_primary("summary", write), state)
