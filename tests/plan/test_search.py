"""Layouts beside each other, and the largest microbatch that fits."""

import json
from types import SimpleNamespace

import pytest
from test_plan import SFT, small

from jaxops.cli.main import main
from jaxops.core.failures import UserError
from jaxops.plan.plan import plan
from jaxops.plan.report import layout_lines, microbatch_line
from jaxops.plan.search import compare, largest_microbatch, read_layout
from jaxops.run.build import load_config


@pytest.fixture(autouse=True)
def _own_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXOPS_CACHE", str(tmp_path / "cache"))


def test_a_layout_is_read_as_people_write_it():
    assert read_layout("mesh.fsdp=64,tensor=4") == ("mesh.fsdp=64", "mesh.tensor=4")
    assert read_layout("mesh.fsdp=8, batch.microbatch=16") == ("mesh.fsdp=8", "batch.microbatch=16")
    assert read_layout("mesh={fsdp: 8, tensor: 2}") == ("mesh={fsdp: 8, tensor: 2}",)
    assert read_layout("model.lora.rank=4,alpha=8") == ("model.lora.rank=4", "model.lora.alpha=8")
    # A comma may stand in a value; the config then says what is wrong with it.
    assert read_layout("mesh.fsdp=8,tensor") == ("mesh.fsdp=8,tensor",)


@pytest.mark.parametrize("text", ["fsdp=8", "mesh.fsdp", "mesh.fsdp=", "=8"])
def test_what_is_no_layout_is_told(text):
    with pytest.raises(UserError, match="expected layouts like"):
        read_layout(text)


def on_virtual_chips(monkeypatch):
    """Eight virtual devices with the memory and rates of a table's row, and a compiler for them."""
    monkeypatch.setattr("jaxops.plan.plan.has_compiler", lambda accelerator: True)
    monkeypatch.setattr("jaxops.plan.devices.has_compiler", lambda accelerator: False)
    monkeypatch.setattr("jaxops.plan.plan.version_of", lambda accelerator: "virtual")


def test_layouts_are_ranked_by_what_fits_and_then_by_time(monkeypatch):
    on_virtual_chips(monkeypatch)
    planned = lambda overrides, memory: plan(
        load_config("language/sft", [*SFT, "batch.global=48", *overrides]), small(memory), compiling=False
    )
    texts = ["mesh.data=8,fsdp=1", "mesh.fsdp=3", "mesh.fsdp=8"]
    roomy = compare(lambda overrides: planned(overrides, 2**34), [read_layout(text) for text in texts])
    assert [layout.problem is None for layout in roomy] == [True, True, False]
    times = [layout.plan.roofline.seconds for layout in roomy[:2]]
    assert times == sorted(times)
    assert "fsdp 3 does not fit 8 devices" in roomy[2].problem and roomy[2].plan is None
    held = {layout.overrides: layout.plan.held(layout.plan.update) for layout in roomy[:2]}
    between = (held["mesh.fsdp=8",] + held["mesh.data=8", "mesh.fsdp=1"]) / 2
    tight = compare(lambda overrides: planned(overrides, between), [read_layout(text) for text in texts])
    assert tight[0].overrides == ("mesh.fsdp=8",) and "too much on each device" in tight[1].problem
    told = layout_lines(tight)
    assert told[0].startswith("1. mesh.fsdp=8: ") and "a step at least" in told[0]
    assert told[1].startswith("2. mesh.data=8 mesh.fsdp=1: does not fit") and "estimate" in told[-1]
    assert "fsdp 3 does not fit" in told[2]


@pytest.mark.slow
def test_the_largest_microbatch_is_the_largest_that_compiles_to_fit(monkeypatch):
    on_virtual_chips(monkeypatch)
    base = [*SFT, "mesh.fsdp=8", "batch.global=128"]

    def planned(memory):
        return lambda overrides: plan(load_config("language/sft", [*base, *overrides]), small(memory))

    first = planned(2**34)(())
    assert list(first.microbatch_sizes) == [8, 16, 32, 64, 128]
    peaks = {size: (one := planned(2**34)([f"batch.microbatch={size}"])).peak(one.update) for size in (8, 16, 32, 64)}
    assert sorted(peaks.values()) == list(peaks.values())
    found = largest_microbatch(planned((peaks[16] + peaks[32]) / 2), first.microbatch_sizes)
    assert (found.size, found.peak, found.next, found.needs) == (16, peaks[16], 32, peaks[32])
    assert "batch.microbatch=16" in microbatch_line(found) and "the next, 32, would take" in microbatch_line(found)
    whole = largest_microbatch(planned(2**34), first.microbatch_sizes)
    assert (whole.size, whole.next) == (128, None) and "the whole update at once" in microbatch_line(whole)


@pytest.mark.parametrize("limit", range(9))
def test_bisection_finds_the_border_with_few_compiles(limit):
    sizes, asked = [2**power for power in range(8)], []

    def planned(overrides):
        at = sizes.index(int(overrides[0].removeprefix("batch.microbatch=")))
        asked.append(at)
        update = SimpleNamespace(compiled=SimpleNamespace(problem=None))
        return SimpleNamespace(problem=None if at < limit else "full", update=update, peak=lambda update: 10 * at)

    found = largest_microbatch(planned, sizes)
    assert found.size == (sizes[limit - 1] if limit else None) and len(asked) <= 4
    assert found.next == (sizes[limit] if limit < 8 else None)
    if not limit:
        assert "no microbatch fits: the smallest, 1, takes" in microbatch_line(found)


def test_the_command_compares_and_searches(capsys):
    base = ["plan", "language/sft", *SFT, "batch.global=48", "--on", "cpu-8"]
    assert main([*base, "--no-compile", "--json", "--compare", "mesh.fsdp=8", "mesh.fsdp=3"]) == 0
    first, second = json.loads(capsys.readouterr().out)["layouts"]
    assert first["overrides"] == ["mesh.fsdp=8"] and first["problem"] is None and first["plan"]["programs"]
    assert second["plan"] is None and "does not fit 8 devices" in second["problem"]
    assert main([*base, "--no-compile", "--compare", "mesh.fsdp=3"]) == 2
    assert capsys.readouterr().out.startswith("1. mesh.fsdp=3: does not fit: ")
    assert main([*base, "mesh.fsdp=8", "--largest-microbatch", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["largest_microbatch"]["size"] == 48
    assert main([*base, "mesh.fsdp=8", "--largest-microbatch", "--no-compile"]) == 2
    assert "leave out --no-compile" in capsys.readouterr().err
    assert main([*base, "--compare", "fsdp=8"]) == 2
    assert "expected layouts like mesh.fsdp=64,tensor=4" in capsys.readouterr().err
