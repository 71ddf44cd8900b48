"""The seconds of a save against the grace period, measured in the folder of runs."""

import jax
import pytest
from tiny_runs import furnish

from jaxops.core.mesh import make_mesh
from jaxops.launch import preflight, save_speed
from jaxops.launch.accelerators import find_accelerator
from jaxops.plan.plan import plan
from jaxops.run.build import load_config


def test_what_is_measured_is_bounded_removed_and_reckoned_on(tmp_path, monkeypatch):
    monkeypatch.setattr(save_speed, "MOST_BYTES", 8 << 20)
    monkeypatch.setattr(save_speed, "BLOCK", 2 << 20)
    clock = iter(range(100))
    found = save_speed.measure(str(tmp_path), 1 << 40, now=lambda: next(clock))
    assert found.written == 8 << 20 and not list(tmp_path.iterdir())
    assert found.reckon(80 << 20) == pytest.approx(10 * found.seconds)


def test_the_time_bounds_it_too(tmp_path, monkeypatch):
    monkeypatch.setattr(save_speed, "BLOCK", 1 << 20)
    clock = iter(range(0, 1000, 6))
    assert save_speed.measure(str(tmp_path), 1 << 40, now=lambda: next(clock)).written == 2 << 20


@pytest.mark.parametrize(("grace", "fits"), [(30.0, True), (3.0, False)])
def test_a_grace_period_that_is_too_short_says_how_long_it_must_be(monkeypatch, grace, fits):
    speed = save_speed.SaveSpeed(written=1 << 30, seconds=5.0)
    monkeypatch.setattr(save_speed, "measure", lambda place, share: speed)
    if fits:
        save_speed.check_save("/runs", 4 << 30, grace)
        return
    with pytest.raises(RuntimeError, match=r"takes about 20 s in /runs \(205 MiB/s measured\).*Use --grace 30"):
        save_speed.check_save("/runs", 4 << 30, grace)


def test_a_small_state_is_not_measured(monkeypatch):
    monkeypatch.setattr(save_speed, "measure", None)
    save_speed.check_save("/runs", 1000, 1.0)


@pytest.mark.slow
def test_the_share_of_a_worker_is_that_of_the_state_it_would_save():
    """Parameters and Adam's two moments of them, as `jaxops plan` reckons the parameters by itself."""
    found = plan(load_config("language/sft_tiny"), find_accelerator("cpu-8"), compiling=False)
    share = save_speed.state_share("language/sft_tiny", [], make_mesh(**found.mesh))
    assert share == pytest.approx(3 * found.groups["parameters"] * (8 if found.mesh["fsdp"] == 8 else 1), rel=0.05)


@pytest.mark.slow
def test_a_family_that_must_read_its_data_for_it_is_not_asked(tmp_path, monkeypatch):
    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert save_speed.state_share("my.yaml", [], make_mesh(data=len(jax.devices()))) == 0


def test_little_shared_memory_is_a_problem_where_launches_on_chips_look(monkeypatch):
    monkeypatch.setattr(preflight, "LEAST_SHM", 1 << 60)
    assert "emptyDir" in str(preflight._problem("shared memory", preflight._look_at_shm))
    monkeypatch.setattr(preflight, "LEAST_SHM", 1)
    assert preflight._problem("shared memory", preflight._look_at_shm) is None
