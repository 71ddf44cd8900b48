"""PTX mixing: its gradient, that no mesh and no microbatch changes it, and which rows of text each update reads."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_optimum import PROMPTS, WORDS, Problem
from test_checks import LONGEST, T, gradients, models, ready, rollout

from jaxops.core.interrupt import Interrupted
from jaxops.core.mesh import make_mesh
from jaxops.core.sharding import named_leaves
from jaxops.core.turn import Turn
from jaxops.models.decoder.architecture import Architecture
from jaxops.models.decoder.decoder import Decoder
from jaxops.models.lora import Lora, LoraConfig
from jaxops.models.policy import PolicyModel
from jaxops.objectives.language import next_token
from jaxops.rl.groups import Grpo
from jaxops.rl.kl import Kl
from jaxops.rl.ppo import Ppo
from jaxops.rl.ptx import PTX, with_ptx

PPO = Ppo(epochs=2, minibatches=2, kl=Kl(coef=0.1), value_weight=0.5)
SLOW = pytest.mark.slow


class Lines:
    """An endless stream of rows of text in which one to `length` tokens are learnt from; it notes what is read."""

    def __init__(self, vocab=WORDS, length=7):
        self.vocab, self.length, self.examples, self.read = vocab, length, 11, []

    def batch(self, cursor, size):
        self.read.append((cursor, size))
        number = np.arange(cursor, cursor + size)
        place = np.arange(self.length)[None]
        tokens = ((number[:, None] * 7 + (place + 3) ** 2) % self.vocab).astype(np.int32)
        real = (place < number[:, None] % self.length + 1).astype(np.int32)
        found = {"tokens": tokens, "targets": (tokens * 3 + 1) % self.vocab, "segment": real, "mask": real.astype("f4")}
        position = np.broadcast_to(place, tokens.shape).astype(np.int32)
        return {"id": number.astype(np.int32), "weight": np.ones(size, "f4"), "position": position, **found}


def update_batch(vocab, on=1.0):
    """What an update reads: 32 completions and 64 rows of text."""
    batch = {name: jnp.concatenate([x, x[::-1], x, x]) for name, x in ready(rollout()).items()}
    text = jax.tree.map(jnp.asarray, Lines(vocab).batch(3, 64))
    return {**batch, "policy_on": batch["policy_on"] * on, PTX: text}


@pytest.mark.parametrize(
    "algorithm, axes, accumulation",
    [
        pytest.param(PPO, {}, 1, marks=SLOW),
        (PPO, {"data": 8}, 4),
        pytest.param(PPO, {}, 4, marks=SLOW),
        pytest.param(PPO, {"data": 2, "fsdp": 2, "tensor": 2}, 2, marks=SLOW),
        pytest.param(Grpo(), {"fsdp": 8}, 1, marks=SLOW),
    ],
    ids=lambda value: getattr(value, "kind", str(value)),
)
def test_the_gradient_is_that_of_the_algorithm_and_the_weighted_one_of_the_text(algorithm, axes, accumulation):
    """Rows have one to seven tokens, so a mean of the means of parts would show."""
    model, params = models()
    alone, language = algorithm.objective(model, T, LONGEST), next_token(model.decoder)
    batch = update_batch(20)
    found = gradients(with_ptx(alone, model, 1.7), params, batch, model.rules, accumulation, axes)
    of_policy = gradients(alone, params, batch, model.rules, 1, {})
    on_text = lambda params, batch, key: language(params["policy"], batch[PTX], None)
    of_text = gradients(on_text, params, batch, model.rules, 1, {})
    assert max(np.abs(x).max() for x in jax.tree.leaves(of_text)) > 0.1
    largest = max(np.abs(x).max() for x in jax.tree.leaves(found))
    for (path, x), (_, y), (_, z) in zip(*map(named_leaves, (found, of_policy, of_text)), strict=True):
        assert np.abs(x - (y + 1.7 * z)).max() <= 1e-6 * largest, path


def test_the_text_is_a_mean_over_its_own_tokens_and_the_metric_has_no_coefficient():
    model, params = models(dropout=0.0)
    batch = update_batch(20)
    sums = with_ptx(PPO.objective(model, T, LONGEST), model, 2.5)(params, batch, jax.random.key(0))
    text = {name: np.asarray(x) for name, x in batch[PTX].items()}
    hidden_of = jax.jit(model.decoder.hidden)  # compiled once for each of the seven lengths
    total, count = 0.0, 0
    for row in range(len(text["id"])):
        size = int(text["mask"][row].sum())
        one = jnp.asarray(text["tokens"][row : row + 1, :size])
        place = jnp.arange(size, dtype=jnp.int32)[None]
        hidden = hidden_of(params["policy"], one, jnp.ones_like(one), place)
        logits = np.asarray(hidden @ model.decoder.head(params["policy"]), np.float64)[0, :, :20]
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        total -= logprobs[np.arange(size), text["targets"][row, :size]].sum()
        count += size
    assert float(sums["ptx_nll"].value()) == pytest.approx(total / count, rel=1e-5)
    assert float(sums["loss/ptx"].value()) == pytest.approx(2.5 * total / count, rel=1e-5)
    assert float(sums["loss/ptx"].count) == count


def test_while_values_are_trained_alone_the_text_is_not_in_the_loss():
    model, params = models(dropout=0.0)
    mixed = with_ptx(PPO.objective(model, T, LONGEST), model, 2.5)
    sums = mixed(params, update_batch(20, on=0.0), None)
    assert float(sums["loss/ptx"].value()) == 0 and float(sums["ptx_nll"].value()) > 1


def test_of_a_policy_with_adapters_the_adapters_learn_from_the_text():
    decoder = Decoder(Architecture(vocab=20, dim=16, heads=2, layers=1, hidden=32, length=32))
    model = PolicyModel(Lora(decoder, LoraConfig(rank=2)), value="head")
    params = model.init(jax.random.key(0))
    mixed = with_ptx(PPO.objective(model, T, LONGEST), model, 1.0)
    batch = update_batch(20, on=1.0)
    loss = lambda lora: mixed({**params, "policy": {**params["policy"], "lora": lora}}, batch, None)["loss/ptx"].total
    found = jax.grad(loss)(params["policy"]["lora"])
    assert max(np.abs(x).max() for x in jax.tree.leaves(found)) > 1e-3


def one_step(problem, cursor=0, poll=lambda: False):
    turn = Turn(problem.batch, poll, cursor, len(PROMPTS))
    with jax.set_mesh(problem.mesh):
        problem.state, sums = problem.step(problem.state, problem.batch(0, 2), None, turn)
    return sums, turn


def position(problem):
    return {name: int(x) for name, x in problem.state.extra[PTX].items()}


def test_each_update_reads_the_next_rows_and_the_state_says_where_they_are():
    text = Lines()
    problem = Problem(PPO, value="head", batch=16, layers=0, text=text)
    text.read.clear()
    one_step(problem)
    assert text.read == [(0, 8), (8, 8), (16, 8), (24, 8)]
    assert position(problem) == {"row": 32, "example": 2}
    text.read.clear()
    one_step(problem, cursor=2)
    assert text.read[0] == (32, 8) and position(problem) == {"row": 64, "example": 4}
    # A rollback has gone past six bad prompts: three steps, and the rows that they would have read.
    text.read.clear()
    one_step(problem, cursor=10)
    assert text.read[0] == (64 + 3 * 32, 8) and position(problem) == {"row": 5 * 32 + 32, "example": 12}


def test_updates_that_an_early_stop_leaves_out_take_no_text():
    problem = Problem(dataclasses.replace(PPO, target_kl=1e-9), value="head", batch=16, layers=0, text=Lines())
    _, turn = one_step(problem)
    assert 1 < turn.updates < 4 and position(problem) == {"row": 8 * turn.updates, "example": 2}


def test_an_interrupted_step_has_read_no_text():
    problem, calls = Problem(PPO, value="head", batch=16, layers=0, text=Lines()), iter(range(100))
    with pytest.raises(Interrupted):
        one_step(problem, poll=lambda: next(calls) >= 1)
    assert position(problem) == {"row": 0, "example": 0}


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_from_recorded_rollouts_every_mesh_makes_the_same_updates(axes):
    alone = Problem(PPO, value="trunk", batch=16, layers=1, text=Lines())
    recorded, collect = [], alone.step.collector.collect

    def record(*given):
        recorded.append(collect(*given))
        return recorded[-1]

    alone.step.collector.collect = record
    spread = Problem(PPO, value="trunk", batch=16, layers=1, text=Lines(), mesh=make_mesh(**axes))
    replayed = iter(recorded)
    spread.step.collector.collect = lambda *given: next(replayed)
    for at in range(2):
        one_step(alone, cursor=2 * at)
        one_step(spread, cursor=2 * at)
    assert position(alone) == position(spread) == {"row": 64, "example": 4}
    for (path, x), (_, y) in zip(*(named_leaves(each.state.params) for each in (alone, spread)), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=1e-5, err_msg=path)


def test_the_update_is_planned_with_its_rows_of_text():
    problem = Problem(PPO, value="head", batch=16, layers=1, text=Lines())
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), problem.state)
    with jax.set_mesh(problem.mesh):
        update = problem.step.programs(abstract, problem.batch(0, 2))[-1]
        update.fn.lower(*update.args)
    assert update.args[1][PTX]["tokens"].shape == (8, 7)
