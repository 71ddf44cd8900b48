"""The replay of a recorded PPO run of TRL 1.12 (trl_trace.py): every metric and weight agrees, and errors show.

Three updates of three epochs of two minibatches, on tiny GPT-2 models with left-padded prompts, padding that was
sampled, completions that end early and such that never do.
"""

import functools
import json
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
TRACE = HERE.parent / "fixtures" / "policy" / "trl112_ppo_trace.npz"
COUNTS = ("noise", "entries")


@functools.cache
def replayed():
    """The differences by name; those of planted errors as `planted`. It runs apart, for float64."""
    command = [sys.executable, str(HERE / "trl_trace.py"), str(TRACE), "--plants"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stderr[-4000:]
    return json.loads(found.stdout.splitlines()[-1])


def compared(differences):
    return {name: x for name, x in differences.items() if name != "planted" and not name.endswith(COUNTS)}


def test_the_replay_agrees_with_the_recorded_run():
    found = compared(replayed())
    assert {"loss/policy_avg", "policy/approxkl_avg", "val/ratio_var", "final/policy", "final/value"} <= found.keys()
    assert len(found) == 21
    assert {name: x for name, x in found.items() if not x < 1e-5} == {}


def test_weights_whose_first_gradient_is_rounding_are_few_and_near():
    # Both models have 2 x 32 biases of keys; of the policy's 27 thousand weights three more.
    assert 64 <= replayed()["final/policy/noise/entries"] < 80
    assert replayed()["final/policy/noise"] < 1e-4 and replayed()["final/value/noise"] < 1e-4


@pytest.mark.parametrize("plant", ["lambda", "kl_sign", "eos_mask"])
def test_a_planted_error_shows(plant):
    found = compared(replayed()["planted"][plant])
    beyond = {name for name, x in found.items() if x > 1e-3}
    assert {"final/policy", "whitening/out", "objective/kl"} <= beyond
    assert any(name.startswith(("loss/", "policy/")) for name in beyond)
