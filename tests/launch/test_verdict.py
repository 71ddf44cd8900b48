"""What the ends of several workers mean: one preempted worker makes all preempted, an own mistake is never repeated."""

import pytest

from jaxops.launch.verdict import End, judge


def ends(*codes: int | None, **more) -> list[End]:
    return [End(f"worker {n}", code, "" if code is not None else "lost", **more) for n, code in enumerate(codes)]


@pytest.mark.parametrize(
    ("codes", "status", "retry"),
    [
        ((0, 0), 0, False),
        ((75, 75), 75, True),
        ((76, 76), 76, True),
        ((137, 76), 76, True),
        ((76, 143), 76, True),
        ((1, 137), 76, True),  # what the other one makes of it is no mistake of its own
        ((2, None), 76, True),
        ((1, 75), 75, True),
        ((130, 76), 76, True),
        ((134, 76), 76, True),
        ((0, 76), 76, True),
        ((1, 1), 1, False),
        ((1, 76), 1, False),  # 76 says only that another one went
        ((1, 134), 1, False),
        ((2, 2), 2, False),
        ((2, 1), 2, False),
        ((127, 0), 1, False),
        ((77, 77), 1, False),
    ],
)
def test_verdicts(codes, status, retry):
    verdict = judge(ends(*codes))
    assert (verdict.status, verdict.retry) == (status, retry), verdict.why


def test_what_the_launcher_ended_itself_is_no_preemption():
    first, second = ends(1, 137)
    verdict = judge([first, End(second.worker, 137, asked=True)])
    assert (verdict.status, verdict.retry) == (1, False)


@pytest.mark.parametrize(("codes", "status"), [((75, 75), 75), ((75, 0), 75), ((137, 76), 130), ((0, 0), 0)])
def test_a_stop_is_never_tried_again(codes, status):
    verdict = judge(ends(*codes), stopped=True)
    assert (verdict.status, verdict.retry) == (status, False)


@pytest.mark.parametrize(("codes", "status"), [((75, 75), 75), ((137, 75), 76)])
def test_hours_that_are_used_up_are_never_tried_again(codes, status):
    verdict = judge([End("worker 0", codes[0], "max-hours"), End("worker 1", codes[1])])
    assert (verdict.status, verdict.retry) == (status, False) and "max-hours" in verdict.why
