"""The table of accelerators: what a name means, what is refused, and that libtpu knows the same slices.

Sources, each of Google Cloud's documentation as of November 2026:

* peak FLOP/s, memory bandwidth, bandwidth between chips (both directions), network of a chip, topologies with cores,
  chips and hosts: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, "System architecture" and "Configurations".
  v4's page gives no bandwidth in both directions; 600 GB/s is six links of 50 GB/s each way. v5e's network is 6.4 Tbps
  of a pod of 256 chips.
* memory that a program may use: what libtpu 0.0.42's compiler says ("exceeds available HBM (15.75G)"); the data sheets
  have 32, 16, 95, 32 and 192 GiB.
* machine types and node selectors: docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus.
* which chips are reached by instance groups: docs.cloud.google.com/tpu/docs/tpus-in-compute-engine (v5p, v6e, TPU7x).
"""

import importlib.util
import json
import subprocess
import sys

import pytest

from jaxops.core.failures import UserError
from jaxops.core.flops import peak_flops
from jaxops.launch.accelerators import CHIPS, accelerator_types, find_accelerator

NO_LIBTPU = importlib.util.find_spec("libtpu") is None


@pytest.mark.parametrize(
    ("name", "chips", "cores", "devices", "hosts", "topology", "machine"),
    [
        ("v4-8", 4, 8, 4, 1, "2x2x1", "ct4p-hightpu-4t"),
        ("v5p-128", 64, 128, 64, 16, "4x4x4", "ct5p-hightpu-4t"),
        ("v5e-1", 1, 1, 1, 1, "1x1", "ct5lp-hightpu-1t"),
        ("v5e-8", 8, 8, 8, 1, "2x4", "ct5lp-hightpu-8t"),
        ("v5e-64", 64, 64, 64, 16, "8x8", "ct5lp-hightpu-4t"),
        ("v6e-256", 256, 256, 256, 64, "16x16", "ct6e-standard-4t"),
        ("tpu7x-64", 32, 64, 64, 8, "2x4x4", "tpu7x-standard-4t"),
        ("2xv6e-256", 512, 512, 512, 128, "16x16", "ct6e-standard-4t"),
        ("v5litepod-16", 16, 16, 16, 4, "4x4", "ct5lp-hightpu-4t"),
        ("cpu-8", 8, 8, 8, 1, "1", None),
    ],
)
def test_a_name_is_chips_cores_devices_and_hosts(name, chips, cores, devices, hosts, topology, machine):
    found = find_accelerator(name)
    assert (found.chips, found.cores, found.devices, found.hosts) == (chips, cores, devices, hosts)
    assert (found.topology, found.machine) == (topology, machine)


def test_it_says_what_a_name_means():
    assert str(find_accelerator("v5p-128")) == "v5p-128 = 64 chips on 16 hosts"
    assert str(find_accelerator("v5e-1")) == "v5e-1 = 1 chip on 1 host"
    assert str(find_accelerator("tpu7x-8")) == "tpu7x-8 = 4 chips on 1 host (8 jax devices)"
    assert str(find_accelerator("2xv5e-16")) == "2xv5e-16 = 32 chips on 8 hosts (2 slices of 4x4)"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("v5e-63", "v5e has no slice of that size; did you mean 'v5e-64'?"),
        ("v5p-129", "its number counts cores, 2 a chip"),
        ("v7e-64", "no such accelerator; did you mean 'v"),
        ("v5e64", "did you mean 'v5e-64'?"),
        ("h100-8", "known: v4, v5e, v5p, v6e, tpu7x or cpu"),
        ("", "no such accelerator"),
        ("0xv5e-4", "no such accelerator"),
        ("v5e-0", "no such accelerator"),
        ("2xcpu-4", "write cpu-8"),
        ("v5p-2", "v5p has no slice of that size"),
        ("v5e-4; rm -rf", "no such accelerator"),
    ],
)
def test_what_is_no_accelerator_is_refused(name, told):
    with pytest.raises(UserError) as refused:
        find_accelerator(name)
    assert told in str(refused.value)


def test_every_type_of_the_table_is_found_by_its_own_name():
    for name in accelerator_types():
        found = find_accelerator(name)
        assert found.type == name
        assert found.chips_of_host * found.hosts == found.chips
        assert found.machine is None or found.chips_of_host in found.chip.machine


def test_one_peak_for_a_chip_here_and_where_mfu_is_computed():
    for chip in CHIPS.values():
        assert chip.flops == peak_flops(chip.kind, "bfloat16") * chip.devices


def test_a_node_selector_names_the_slice():
    assert find_accelerator("v6e-64").node_selector == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "8x8",
    }


LIKE_LIBTPU = """
import json, sys
from jaxops.core.mesh import make_mesh
from jaxops.launch.accelerators import find_accelerator
from jaxops.plan.devices import planned_devices, prepare
out = {}
for name in sys.argv[1:]:
    found = find_accelerator(name)
    prepare(found)
    devices = planned_devices(found)
    of = lambda x: getattr(x, "slice_index", 0)
    tensor = 2 if found.devices // found.slices % 2 == 0 else 1
    mesh = make_mesh(replica=found.slices, fsdp=-1, tensor=tensor, devices=devices) if len(devices) < 1000 else None
    out[name] = {
        "devices": len(devices),
        "chips": len({(of(x), *x.coords) for x in devices}),
        "hosts": len({(of(x), x.process_index) for x in devices}),
        "kind": devices[0].device_kind,
        "meshed": mesh is None or mesh.size == len(devices),
    }
print(json.dumps(out))
"""


@pytest.mark.slow
@pytest.mark.skipif(NO_LIBTPU, reason="libtpu is not installed: make plan-env, then .venv-plan/bin/python -m pytest")
def test_libtpu_knows_every_slice_of_the_table():
    names = [name for name in accelerator_types() if not name.startswith("cpu")] + ["2xv6e-256", "4xv5e-16"]
    done = subprocess.run([sys.executable, "-c", LIKE_LIBTPU, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, there in json.loads(done.stdout.splitlines()[-1]).items():
        found = find_accelerator(name)
        assert there == {
            "devices": found.devices,
            "chips": found.chips,
            "hosts": found.hosts,
            "kind": found.chip.kind,
            "meshed": True,
        }, name
