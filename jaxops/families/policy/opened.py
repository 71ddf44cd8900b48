"""Opens what a config of policy optimisation names: the policy, its value and reference, and its reward models."""

import contextlib
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from jaxops.core.failures import UserError
from jaxops.core.weights import Rename, WeightSource
from jaxops.data.text.tokenizer import Tokenizer
from jaxops.families.policy.config import FreshDecoder, PolicyConfig, ValueTrunk
from jaxops.models.decoder.architecture import Architecture
from jaxops.models.decoder.decoder import Decoder
from jaxops.models.lora import LORA, Lora
from jaxops.models.policy import POLICY, REFERENCE, REWARDS, SCORE, VALUE, PolicyModel, ValueKind
from jaxops.rl.rewards.config import RunReward
from jaxops.rl.rewards.judge import Judge
from jaxops.run.load import open_saved_run, serve
from jaxops.run.pretrained.config import Pretrained
from jaxops.run.pretrained.opened import OpenedDecoder, open_decoder
from jaxops.run.pretrained.stored import stored_tokenizer


@dataclasses.dataclass(frozen=True)
class OpenedPolicy:
    """The models of a run before their parameters are read.

    Attributes:
      model: policy, value, reference and reward models.
      tokenizer: the policy's.
      judges: the reward models, by the names of their rewards.
      sources: the weights that training begins with.
      copies: what begins as a copy of something else (`Task.copies`).
    """

    model: PolicyModel
    tokenizer: Tokenizer
    judges: Mapping[str, Judge]
    sources: tuple[WeightSource, ...]
    copies: Mapping[str, str]


def open_policy(
    config: PolicyConfig, *, judging: bool = True, judges: Mapping[str, Judge] | None = None
) -> OpenedPolicy:
    """Opens the models of a config; of their weights nothing but headers is read.

    Args:
      config: the config.
      judging: whether the reward models are opened too; without them the parameters lack theirs.
      judges: the reward models, where they are opened already.

    Raises:
      UserError: a model cannot be opened, or they do not go together.
    """
    longest = config.data.max_tokens + config.sample.max_tokens
    wanted = config.model.architecture if isinstance(config.model, FreshDecoder) else config.model
    opened = open_decoder(wanted, config.tokenizer, longest, reads="data.max_tokens + sample.max_tokens")
    policy = with_adapters(opened.decoder, config)
    judges = judges if judges is not None else open_judges(config) if judging else {}
    kind: ValueKind | None = config.value.kind if config.algorithm.has_values else None
    model = PolicyModel(
        policy,
        value=kind,
        reference=config.keeps_reference,
        judges={name: judge.model for name, judge in judges.items()},
        reference_dtype=config.precision.compute,
    )
    sources = [dataclasses.replace(one, below=f"{POLICY}/") for one in opened.sources]
    sources += [dataclasses.replace(judge.source, below=f"{REWARDS}/{name}/") for name, judge in judges.items()]
    copies: dict[str, str] = {}
    if model.copies_reference and config.reference is None:
        copies[f"{REFERENCE}/"] = f"{POLICY}/"
    elif config.reference is not None:
        sources += _reference_sources(config.reference, opened, longest)
    if kind == "trunk":
        weights = config.value.weights if isinstance(config.value, ValueTrunk) else None
        if weights is None:
            parts = [name for name in model.shapes[VALUE] if name != SCORE]
            copies |= {f"{VALUE}/{name}/": f"{POLICY}/{name}/" for name in parts}
        else:
            with _named("value.weights"):
                sources.append(_value_source(weights, opened.decoder, opened.tokenizer))
    return OpenedPolicy(model, opened.tokenizer, judges, tuple(sources), copies)


def _reference_sources(address: str, policy: OpenedDecoder, longest: int) -> list[WeightSource]:
    """Returns the weights at an address as those of the reference."""
    found = open_decoder(Pretrained(weights=address), None, longest)
    if found.tokenizer.digest != policy.tokenizer.digest:
        raise UserError(
            f"reference: the tokenizer of {address} is another one than the policy's; tokens would mean others"
        )
    if differ := _differences(found.decoder.config, policy.decoder.config):
        raise UserError(f"reference: the decoder of {address} is another one than the policy's: {differ}")
    return [dataclasses.replace(one, below=f"{REFERENCE}/") for one in found.sources]


def with_adapters(decoder: Decoder, config: PolicyConfig) -> Decoder | Lora:
    """Returns the decoder, with the adapters of the config where it has any.

    Raises:
      UserError: the adapters do not fit the decoder.
    """
    lora = config.adapters
    return decoder if lora is None else Lora(decoder, lora)


def open_judges(config: PolicyConfig) -> dict[str, Judge]:
    """Opens the reward models of a config, by the names of their rewards.

    Raises:
      UserError: a run folder cannot be opened, or holds no reward model.
    """
    return {
        reward.label: reward_model_of(reward, at)
        for at, reward in enumerate(config.rewards)
        if isinstance(reward, RunReward)
    }


def reward_model_of(reward: RunReward, at: int, *, asked: bool = True) -> Judge:
    """Returns the reward model that a reward of the config names.

    Args:
      reward: the reward.
      at: its number in the config.
      asked: whether it will be asked for scores.

    Raises:
      UserError: the run folder cannot be opened, or holds no reward model.
    """
    with _named(f"rewards.{at}.run"):
        served = serve(open_saved_run(reward.run, reward.step))
        if not hasattr(served, "judge"):
            task = served.saved.config.task
            raise UserError(f"{reward.run} is a run of task {task}, which keeps no reward model")
        found: Judge = served.judge(asked=asked)
        return found


@contextlib.contextmanager
def _named(field: str) -> Iterator[None]:
    """Puts the field of the config in front of what is wrong with the run that it names."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{field}: {error}") from None


def _value_source(weights: str, decoder: Decoder, tokenizer: Tokenizer) -> WeightSource:
    """Returns a language or reward model's run as weights of the value: its trunk, and its head where it has one."""
    served = serve(open_saved_run(weights))
    held = getattr(served, "decoder", None) or getattr(getattr(served, "reward", None), "decoder", None)
    if not isinstance(held, Decoder):
        raise UserError(f"{weights} is a run of task {served.saved.config.task}, which has no decoder")
    # A reward model has no head over the vocabulary, and a value needs none.
    if differ := _differences(held.config, decoder.config, unread=("tied", "final_cap")):
        raise UserError(
            f"the decoder of {weights} is another one than the policy's, and they must be alike, since the value begins"
            f" with its weights: {differ}"
        )
    words = stored_tokenizer(served.saved)
    if words.digest != tokenizer.digest:
        raise UserError(
            f"{weights} reads tokens of another tokenizer ({words.kind}, {words.vocab:,} ids) than the"
            f" policy's ({tokenizer.kind}, {tokenizer.vocab:,} ids); the value reads the policy's tokens"
        )
    with served.saved.source() as source:
        below = _trunk(source.arrays.shapes())
        if any(path.startswith(f"{below}{LORA}/") for path in source.arrays.shapes()):
            raise UserError(
                f"{weights} has adapters beside its weights, which the value would leave out: train one without"
                " model.lora, or leave value.weights out"
            )
    rename = [Rename("^reward/", f"{SCORE}/"), Rename(f"^{below}", "")]
    with served.saved.source(match=f"^{below}", rename=rename) as source:
        return dataclasses.replace(source, below=f"{VALUE}/")


def _trunk(paths: Iterable[str]) -> str:
    """Returns what the paths of a run's decoder begin with: in a policy's run that of its value, where it has one."""
    held = [path for path in paths if not path.startswith(f"{VALUE}/{SCORE}/")]
    return next((f"{name}/" for name in (VALUE, POLICY) if any(path.startswith(f"{name}/") for path in held)), "")


def _differences(theirs: Architecture, mine: Architecture, unread: Collection[str] = ()) -> str:
    """Returns what makes a decoder compute otherwise than the policy's, weights apart; empty where nothing does."""
    other, policy = _computes(theirs), _computes(mine)
    differ = [name for name in policy if name not in unread and other[name] != policy[name]]
    return "; ".join(f"{name} is {other[name]}, the policy's is {policy[name]}" for name in differ)


def _computes(architecture: Architecture) -> dict[str, Any]:
    """Returns the values that the outcome of a decoder depends on, each default filled in."""
    found = dataclasses.asdict(architecture)
    for unread in ("kind", "dropout", "remat", "pattern", "query_scalar"):
        del found[unread]
    found |= {"kv_heads": architecture.key_heads, "head_dim": architecture.width, "hidden": architecture.inner}
    found |= {"kinds of layers": architecture.layer_kinds, "scale of attention": architecture.scale}
    if architecture.positions == "rope":  # the length is a bound alone; learned positions have a vector for each
        del found["length"]
        found |= {f"rope.{name}": value for name, value in found["rope"].items()}
    del found["rope"]
    return found
