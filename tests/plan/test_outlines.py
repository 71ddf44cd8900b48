"""Stand-ins for weights: opened as real ones are, of the right shapes, and next to nothing on disk."""

import json
import math

import jax
import pytest

from jaxops.core.failures import UserError
from jaxops.models.decoder.architecture import Architecture
from jaxops.models.decoder.decoder import Decoder
from jaxops.models.decoder.huggingface import config_json
from jaxops.models.decoder.pretrained import open_pretrained
from jaxops.run.pretrained.config import Pretrained
from jaxops.run.pretrained.stand_in import architecture_at, stand_in_tokenizer, stand_in_weights

LARGE = Architecture(vocab=32000, dim=4096, layers=32, heads=32, hidden=11008, length=4096, tied=False)


@pytest.fixture
def named(tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "config.json").write_text(json.dumps(config_json(LARGE)))
    return str(tmp_path / "large")


def test_weights_of_seven_billion_take_no_room(named, tmp_path):
    made = stand_in_weights(Pretrained(weights=named, remat="full"), tmp_path / "made")
    (file,) = (tmp_path / "made").glob("*.safetensors")
    found = open_pretrained(made.weights)
    assert made.remat == "full" and found.architecture == architecture_at(named)
    assert file.stat().st_size > 13e9 and file.stat().st_blocks * 512 < 1e6
    shapes = found.source.arrays.shapes()
    wanted = jax.tree.leaves(Decoder(found.architecture).shapes)
    assert sum(math.prod(leaf.shape) for leaf in shapes.values()) == sum(leaf.size for leaf in wanted)


def test_what_tells_no_architecture_is_refused(tmp_path):
    with pytest.raises(UserError, match="a plan needs no weights, but it needs their shapes"):
        architecture_at(str(tmp_path / "nothing"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        architecture_at(str(tmp_path))


def test_a_tokenizer_is_needed_for_its_number_of_ids_alone():
    assert stand_in_tokenizer(LARGE, "some/folder") == (LARGE, "bytes")
    model, _ = stand_in_tokenizer(Architecture(), "bytes", added=3)
    assert model.vocab == 263
    with pytest.raises(UserError, match="give the number of its ids"):
        stand_in_tokenizer(Architecture(), "some/folder")
