"""A decoder that lies under `policy/` of a run is found there, and nothing of the models beside it is taken."""

import jax
import numpy as np
import pytest

import jaxops as jx
from jaxops.core.failures import UserError
from jaxops.core.sharding import named_leaves
from jaxops.core.weights import load_weights, targets_of
from jaxops.models.lora import Lora, LoraConfig
from jaxops.run.fit import fit
from jaxops.run.load import open_saved_run
from jaxops.run.pretrained.config import Pretrained
from jaxops.run.pretrained.opened import open_decoder
from jaxops.run.pretrained.stored import decoder_subtree

CONFIG = """\
task: toy_subtrees:FAMILY
model: {weights: unused, lora: {rank: 2}}
optimizer: {kind: sgd, lr: 0.1}
batch: {global: 8}
run: {name: policy, steps: 1, loggers: []}
"""


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """The folder of a run of a policy with adapters."""
    folder = tmp_path_factory.mktemp("subtrees")
    (folder / "policy.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxops.run.summary.write_report", lambda *_, **__: None, raising=False)
        fit(jx.build_task(jx.load_config(folder / "policy.yaml", [f"run.dir={folder}"])), quiet=True)
    return str(folder / "policy")


def test_the_decoder_of_a_policy_is_what_the_next_run_begins_with(policy):
    saved = open_saved_run(policy)
    expected = dict(named_leaves(saved.params_below(decoder_subtree(saved))))
    opened = open_decoder(Pretrained(weights=policy, lora=LoraConfig(rank=2)), None, 64)
    shapes = targets_of(Lora(opened.decoder, LoraConfig(rank=2)).shapes)
    # Without a sharding, numpy arrays are made.
    targets = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in shapes.items()}
    arrays, plan = load_weights(targets, opened.sources)
    assert not plan.left and not plan.skipped and arrays.keys() == expected.keys()
    assert any(path.startswith("lora/") for path in arrays) and any(path.startswith("layers/") for path in arrays)
    reference = dict(named_leaves(saved.weights.params["reference"]))
    for path, value in expected.items():
        np.testing.assert_array_equal(arrays[path], value, err_msg=path)
        assert path not in reference or not path.endswith("kernel") or np.any(reference[path] != value)


@pytest.mark.parametrize(
    ("lora", "said"), [(None, "which would be left out"), (LoraConfig(rank=2, alpha=1.0), "trained as LoraConfig")]
)
def test_adapters_of_a_policy_are_not_left_out_unseen(policy, lora, said):
    with pytest.raises(UserError, match=said):
        open_decoder(Pretrained(weights=policy, lora=lora), None, 64)


def test_what_is_read_below_a_prefix_is_that_part_of_the_parameters(policy):
    saved = open_saved_run(policy)
    whole = saved.weights.params
    for below, part in (("policy/", whole["policy"]), ("policy/layers/", whole["policy"]["layers"]), ("", whole)):
        found, expected = dict(named_leaves(saved.params_below(below))), dict(named_leaves(part))
        assert found.keys() == expected.keys()
        for path, value in expected.items():
            np.testing.assert_array_equal(found[path], value, err_msg=path)
    with pytest.raises(UserError, match="reward"):
        saved.params_below("reward/")
