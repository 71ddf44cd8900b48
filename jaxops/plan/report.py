"""A plan as lines for people and as plain values for programs."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from jaxops.core.memory import readable
from jaxops.plan.plan import Plan
from jaxops.plan.program import ProgramPlan
from jaxops.plan.roofline import ASSUMPTIONS
from jaxops.plan.search import LayoutPlan, Microbatch

HOUR = 3600.0


def lines(plan: Plan, price: float | None = None) -> list[str]:
    """Returns the lines of a report.

    Args:
      plan: the plan.
      price: what a chip costs an hour, in any currency.
    """
    return [*_head(plan), "", *_memory(plan), *_programs(plan), *_time(plan, price), *_verdict(plan)]


def _head(plan: Plan) -> Iterator[str]:
    axes = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    limit = "unknown" if plan.memory is None else readable(plan.memory)
    yield f"{plan.accelerator}; mesh {axes}; {limit} for programs on each device"
    machine = plan.accelerator.machine
    if machine is not None:
        yield f"machines: {plan.accelerator.hosts} x {machine}, by {plan.accelerator.backend}"
    for note in plan.notes:
        yield f"note: {note}"


def _memory(plan: Plan) -> Iterator[str]:
    yield "memory on each device, predicted"
    for name, size in plan.groups.items():
        yield f"  {name:<24} {readable(size):>10}"
    yield f"  {'state together':<24} {readable(plan.state):>10}"
    yield f"  {'gradients':<24} {readable(plan.gradients):>10}   in {plan.microbatches} microbatch(es)"
    beside = {name: size for one in plan.programs for name, size in one.beside.items()}
    for name, size in beside.items():
        yield f"  {name:<24} {readable(size):>10}"
    yield ""


def _programs(plan: Plan) -> Iterator[str]:
    yield "programs of a step"
    for one in plan.programs:
        yield (
            f"  {one.name} x {one.times:,}: {one.flops / 1e12:,.3f} TFLOPs a run over all devices, arguments"
            f" {readable(one.arguments)}, temporaries {readable(one.temporaries)} (estimate)"
        )
        if one.uncounted:
            yield f"    FLOPs not counted: {', '.join(one.uncounted)}"
        yield from _compiled(plan, one)
    yield ""


def _compiled(plan: Plan, one: ProgramPlan) -> Iterator[str]:
    found = one.compiled
    if found is None:
        return
    if found.problem is not None:
        yield f"    does not compile ({found.seconds:.0f} s): {found.problem}"
        return
    known = "known from an earlier plan" if found.cached else f"compiled in {found.seconds:.0f} s"
    yield (
        f"    {known}: arguments {readable(found.arguments)} + temporaries {readable(found.temporaries)} + outputs"
        f" {readable(found.outputs)} - reused {readable(found.aliased)} = {readable(found.peak)}; with the rest of the"
        f" state {readable(plan.peak(one))}"
    )
    if found.donated:
        works = "works" if found.donation_works else "FAILS: the old and the new state lie side by side"
        yield f"    donation {works} ({readable(found.aliased)} of {readable(found.donated)})"
    if not found.collectives:
        yield "    collectives: none"
    for each in found.collectives:
        where = "in loops" if each.in_loop else "outside of loops"
        slices = ", BETWEEN SLICES" if each.between_slices else ""
        yield (
            f"    {each.kind} over {' x '.join(each.axes)} {where}: {each.count} of {readable(each.bytes)} a run, the"
            f" largest {readable(each.largest)}{slices}"
        )


def _time(plan: Plan, price: float | None) -> Iterator[str]:
    bound = plan.roofline
    if bound is None or not bound.seconds:
        return
    each = ", ".join(f"{one.name} {one.seconds:.3g} s ({one.by})" for one in bound.bounds if one.seconds > 0)
    whole = all(one.compiled is not None for one in plan.programs)
    yield f"a step takes at least {bound.seconds:.3g} s: {each}"
    tokens = f", {plan.tokens / bound.seconds:,.0f} tokens/s" if plan.tokens and len(plan.programs) == 1 else ""
    rate = f"at most {plan.rows / bound.seconds:,.1f} examples/s{tokens}, MFU at most {100 * bound.mfu:.0f} %"
    yield f"  {rate} ({bound.flops / 1e12:,.1f} TFLOPs a step, recomputation counted)"
    yield f"  assumed: {ASSUMPTIONS}" + ("" if whole else "; exchanges of what was not compiled count as nothing")
    if plan.steps is not None:
        hours = plan.steps * bound.seconds / HOUR
        cost = "" if price is None else f", {hours * plan.accelerator.chips * price:,.2f} at {price:g} a chip-hour"
        yield f"  {plan.steps:,} steps: at least {hours:.2f} h, {hours * plan.accelerator.chips:,.1f} chip-hours{cost}"
    yield ""


def _verdict(plan: Plan) -> Iterator[str]:
    if (problem := plan.problem) is not None:
        yield f"does not fit: {problem}"
        return
    if plan.memory is None:
        yield "the memory of these devices is unknown"
        return
    asked = [one for one in plan.programs if one.compiled is not None]
    largest = max(asked or plan.programs, key=plan.peak)
    peak = plan.peak(largest)
    share = f"{readable(peak)} of {readable(plan.memory)} ({100 * peak / plan.memory:.0f} %), in {largest.name}"
    if len(asked) == len(plan.programs):
        yield f"fits: at most {share}, as compiled"
    elif asked:
        yield f"fits, what was compiled: {share}; not compiled: {_names(plan)}"
    elif peak <= plan.memory:
        yield f"should fit: {share}, by the estimate; nothing was compiled"
    else:
        yield f"may not fit: {share}, by the estimate, which is rough; nothing was compiled"


def _names(plan: Plan) -> str:
    return ", ".join(one.name for one in plan.programs if one.compiled is None)


def values(plan: Plan, price: float | None = None) -> dict[str, Any]:
    """Returns the plan as plain values.

    Args:
      plan: the plan.
      price: what a chip costs an hour.
    """
    accelerator, bound = plan.accelerator, plan.roofline
    hours = None if bound is None or plan.steps is None else plan.steps * bound.seconds / HOUR
    return {
        "accelerator": {
            "type": accelerator.type,
            "topology": accelerator.topology,
            "slices": accelerator.slices,
            "chips": accelerator.chips,
            "cores": accelerator.cores,
            "devices": accelerator.devices,
            "hosts": accelerator.hosts,
            "machine": accelerator.machine,
            "backend": accelerator.backend,
        },
        "mesh": dict(plan.mesh),
        "memory_per_device": plan.memory,
        "state": dict(plan.groups),
        "gradients": plan.gradients,
        "microbatches": plan.microbatches,
        "programs": [_program(plan, one) for one in plan.programs],
        "step": None
        if bound is None
        else {
            "seconds_at_least": bound.seconds,
            "mfu_at_most": bound.mfu,
            "flops": bound.flops,
            "bounds": [dataclasses.asdict(one) for one in bound.bounds],
            "assumptions": ASSUMPTIONS,
        },
        "run": {
            "steps": plan.steps,
            "hours_at_least": hours,
            "chip_hours_at_least": None if hours is None else hours * accelerator.chips,
            "cost_at_least": None if hours is None or price is None else hours * accelerator.chips * price,
        },
        "notes": list(plan.notes),
        "compiled": plan.compiles,
        "problem": plan.problem,
    }


def _program(plan: Plan, one: ProgramPlan) -> dict[str, Any]:
    found = dataclasses.asdict(one)
    found["peak"] = plan.peak(one)
    if one.compiled is not None:
        found["compiled"] |= {"peak": one.compiled.peak, "donation_works": one.compiled.donation_works}
    return found


def layout_lines(layouts: Sequence[LayoutPlan]) -> list[str]:
    """Returns a line for each of several layouts, in the order they have."""
    found = []
    for number, layout in enumerate(layouts, start=1):
        name = " ".join(layout.overrides)
        if layout.plan is None or layout.problem is not None:
            found.append(f"{number}. {name}: does not fit: {layout.problem}")
            continue
        plan, bound = layout.plan, layout.plan.roofline
        peak = max(map(plan.peak, plan.programs))
        share = "" if plan.memory is None else f" of {readable(plan.memory)} ({100 * peak / plan.memory:.0f} %)"
        time = ""
        if bound is not None and bound.seconds:
            slowest = max(bound.bounds, key=lambda one: one.seconds)
            time = (
                f", a step at least {bound.seconds:.3g} s (bound by {slowest.by}), MFU at most {100 * bound.mfu:.0f} %"
            )
        found.append(f"{number}. {name}: {readable(peak)}{share}{time}")
    planned = [layout.plan for layout in layouts if layout.plan is not None]
    if any(one.compiled is None for plan in planned for one in plan.programs):
        found.append(
            "not all programs were compiled: memory is an estimate, and exchanges between chips count as nothing"
        )
    return found


def microbatch_line(found: Microbatch) -> str:
    """Returns the line that says how large a microbatch may be."""
    size = lambda many: "more than the compiler takes" if many is None else readable(many)
    if found.size is None:
        return f"no microbatch fits: the smallest, {found.next}, takes {size(found.needs)}"
    beyond = (
        "the whole update at once" if found.next is None else f"the next, {found.next}, would take {size(found.needs)}"
    )
    return f"largest microbatch that fits, as compiled: batch.microbatch={found.size} ({size(found.peak)}); {beyond}"
