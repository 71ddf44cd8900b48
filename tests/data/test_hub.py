"""Models of the Hugging Face Hub: what is fetched, what is kept, and one message for each thing that goes wrong.

The library that fetches is the real one; the Hub is a server on this machine (tests/fake_hub.py).
"""

import builtins
import errno

import huggingface_hub
import huggingface_hub.constants as constants
import pytest
from fake_hub import hub_here  # noqa: F401 (a fixture)

from jaxops.core.failures import RunFailed, UserError
from jaxops.data.hub import MODEL, TOKENIZER, HubAddress
from jaxops.data.text.tokenizer import FILES as FILES_OF_TOKENIZERS

FILES = {
    "config.json": b'{"a": 1}',
    "generation_config.json": b'{"b": 1}',
    "model.safetensors": b"weights",
    "tokenizer.json": b"words",
    "tokenizer_config.json": b'{"c": 1}',
    "chat_template.jinja": b"template",
    "pytorch_model.bin": b"a pickle",
    "README.md": b"read me",
    "onnx/config.json": b"{}",
    "onnx/model.onnx": b"another form",
    "original/model.safetensors": b"other weights",
}
READ = {name for name in FILES if "/" not in name} - {"pytorch_model.bin", "README.md"}


@pytest.fixture
def hub(hub_here):  # noqa: F811
    """A hub with one model, an empty cache and no token."""
    hub_here.commit("org/model", FILES)
    return hub_here


def told(address: str) -> str:
    """The message for an address that cannot be fetched."""
    with pytest.raises(UserError) as caught:
        HubAddress.parse(address).resolved().fetched(MODEL)
    assert "Traceback" not in str(caught.value) and address in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("address", "shown", "commit"),
    [
        ("hf://org/model", "hf://org/model@main", None),
        ("hf://org/model-1.7B@v1.0", "hf://org/model-1.7B@v1.0", None),
        ("hf://org/model@refs/pr/1", "hf://org/model@refs/pr/1", None),
        (f"hf://org/model@{'ab' * 20}", f"hf://org/model@{'ab' * 20}", "ab" * 20),
        (f"hf://org/model@main:{'ab' * 20}", f"hf://org/model@main:{'ab' * 20}", "ab" * 20),
    ],
)
def test_an_address_is_read_and_written(address, shown, commit):
    found = HubAddress.parse(address)
    assert (str(found), found.commit) == (shown, commit)
    assert HubAddress.parse(shown) == found


@pytest.mark.parametrize(
    "address", ["hf://model", "hf://org/model@", "hf://a/b/c", "hf://org/model@main:abc", "hf://../model", "org/model"]
)
def test_another_address_is_told(address):
    with pytest.raises(UserError, match="expected hf://ORG/MODEL or hf://ORG/MODEL@REVISION"):
        HubAddress.parse(address)


def test_only_what_is_read_is_fetched_and_never_a_pickle(hub):
    folder = HubAddress.parse("hf://org/model").fetched(MODEL)
    assert hub.fetched() == READ
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {name: FILES[name] for name in READ}


def test_of_a_tokenizer_no_weights_are_fetched(hub):
    HubAddress.parse("hf://org/model").fetched(TOKENIZER)
    assert hub.fetched() == READ - {"model.safetensors"}


def test_all_that_a_tokenizer_is_made_of_is_fetched():
    assert {*FILES_OF_TOKENIZERS} <= {*TOKENIZER} <= {*MODEL}


def test_shards_are_fetched_with_their_index(hub):
    shards = {f"model-0000{at}-of-00002.safetensors": bytes([at]) for at in (1, 2)}
    hub.commit("org/large", {"config.json": b"{}", "model.safetensors.index.json": b"[]", **shards})
    HubAddress.parse("hf://org/large").fetched(MODEL)
    assert hub.fetched() == {"config.json", "model.safetensors.index.json", *shards}


def test_a_commit_is_kept_when_its_branch_moves_on(hub):
    before = HubAddress.parse("hf://org/model").resolved()
    assert before.commit == hub.refs["org/model"]["main"]
    after = hub.commit("org/model", FILES | {"model.safetensors": b"newer"})
    assert HubAddress.parse("hf://org/model").resolved().commit == after != before.commit
    assert (HubAddress.parse(str(before)).fetched(MODEL) / "model.safetensors").read_bytes() == b"weights"
    assert (HubAddress.parse("hf://org/model").fetched(MODEL) / "model.safetensors").read_bytes() == b"newer"


def test_what_is_in_the_cache_needs_no_hub(hub, monkeypatch):
    folder = HubAddress.parse("hf://org/model").fetched(MODEL)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    again = HubAddress.parse("hf://org/model").resolved()
    assert again.fetched(MODEL) == folder and hub.asked == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.status = 503
    assert HubAddress.parse("hf://org/model").resolved() == again
    assert again.fetched(MODEL) == folder


def test_a_token_is_sent_and_opens_a_gated_model(hub, monkeypatch):
    hub.gated, hub.token = {"org/model"}, "hf_right"
    assert "is gated. Accept its terms at http" in (said := told("hf://org/model@main")) and "none was given" in said
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "is gated" in (said := told("hf://org/model@main")) and "the one that was given may not" in said
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert HubAddress.parse("hf://org/model").fetched(MODEL).is_dir()
    assert {"Bearer hf_wrong", "Bearer hf_right", None} <= hub.tokens


def test_an_unknown_model_is_told(hub, monkeypatch):
    said = told("hf://org/modle@main")
    assert "has no model org/modle, or it is private and needs a token" in said
    monkeypatch.setenv("HF_TOKEN", "hf_any")  # with a token the Hub says 404 and not 401
    assert "has no model org/modle" in told("hf://org/modle@main")


def test_an_unknown_revision_is_told_with_the_nearest(hub):
    hub.commit("org/model", FILES, branch="v1.0-release")
    said = told("hf://org/model@v1.0-relase")
    assert "org/model has no branch, tag or commit 'v1.0-relase'; did you mean 'v1.0-release'?" in said


def test_an_unknown_commit_is_told(hub):
    assert "has no branch, tag or commit" in told(f"hf://org/model@{'ab' * 20}")


def test_offline_without_a_cache_is_told(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = told("hf://org/model@main")
    assert "does not have all of its files, and HF_HUB_OFFLINE is set" in said and "HF_HOME" in said


def test_offline_with_a_part_in_the_cache_is_told(hub, monkeypatch):
    HubAddress.parse("hf://org/model").fetched(TOKENIZER)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="does not have all of its files, and HF_HUB_OFFLINE is set"):
        HubAddress.parse("hf://org/model").fetched(MODEL)


def test_a_hub_that_does_not_answer_is_told(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 does not answer (" in told("hf://org/model@main")


@pytest.mark.parametrize(("status", "said"), [(500, "answered with status 500"), (403, "status 403")])
def test_another_answer_is_told(hub, status, said):
    hub.status = status
    assert said in told("hf://org/model@main")


def test_pickles_alone_are_told(hub):
    hub.commit("org/old", {"config.json": b"{}", "pytorch_model.bin": b"a pickle"})
    assert "has no weights in safetensors" in (said := told("hf://org/old@main")) and "never read" in said
    assert hub.fetched() == {"config.json"}


def test_a_data_set_is_told(hub):
    hub.commit("org/text", {"train.jsonl": b"{}"})
    assert "has no config.json" in told("hf://org/text@main")


@pytest.mark.parametrize(("number", "kind"), [(errno.EACCES, UserError), (errno.ENOSPC, RunFailed)])
def test_a_cache_that_cannot_be_written_is_told(hub, monkeypatch, number, kind):
    def refuse(*args, **keywords):
        raise OSError(number, "no")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(kind, match=r"cannot be kept in .*HF_HOME"):
        HubAddress.parse("hf://org/model").resolved()


def test_a_missing_package_is_told(monkeypatch):
    imported = builtins.__import__

    def without(name, *args):
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return imported(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'jaxops\[hf\]'"):
        HubAddress.parse("hf://org/model").resolved()
