#!/usr/bin/env python3
"""Judges an attempt by the ends of its workers, for a cluster that tries again by itself.

usage: judge_attempt.py FOLDER N COUNT    attempt N, of COUNT workers; prints JSON: {"retry", "status", "why"}

It needs Python 3.8 and nothing else, and judges as jaxops/launch/verdict.py does (tests/launch/test_start_worker.py).
"""

import json
import os
import sys

EXIT_USAGE, EXIT_SAVED, EXIT_LOST = 2, 75, 76
PREEMPTED = (75, 129, 130, 137, 143)


def decide(folder, attempt, count):
    """Returns whether to try again, the exit status of the attempt, and why."""
    ends = []
    for worker in range(count):
        try:
            with open(f"{folder}/attempt-{attempt}/worker-{worker}.json") as file:
                ends.append(json.load(file))
        except (OSError, ValueError):
            ends.append({"code": None, "why": "lost"})
    codes = [end["code"] for end in ends]
    answer = lambda retry, status, why: {"retry": retry, "status": status, "why": why}
    if all(code == 0 for code in codes):
        return answer(False, 0, "done")
    saved = all(code in (0, EXIT_SAVED) for code in codes)
    if any(end["why"] == "max-hours" for end in ends):
        return answer(False, EXIT_SAVED if saved else EXIT_LOST, "--max-hours are used up")
    if os.path.exists(f"{folder}/stop"):
        return answer(False, EXIT_SAVED if saved else 130, "stopped")
    for worker, end in enumerate(ends):
        if end["code"] is None or (end["code"] in PREEMPTED and end["why"] != "others"):
            status = EXIT_SAVED if end["code"] == EXIT_SAVED else EXIT_LOST
            return answer(True, status, "worker {} was preempted ({})".format(worker, end["code"]))
    for wrong in (EXIT_USAGE, 1):
        if wrong in codes:
            return answer(False, wrong, f"worker {codes.index(wrong)} ended with {wrong}")
    for worker, code in enumerate(codes):
        if code not in (0, EXIT_SAVED, EXIT_LOST) and code < 128:
            return answer(False, 1, f"worker {worker} ended with {code}")
    return answer(True, EXIT_LOST, "a worker was lost")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    print(json.dumps(decide(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
