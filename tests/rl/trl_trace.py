"""Replays a recorded PPO run of TRL 1.12 with jaxops' functions, in float64, and prints how far the two differ.

`python tests/rl/trl_trace.py tests/fixtures/policy/trl112_ppo_trace.npz [--plants]`

Hyperparameters, prompts, sampled tokens, permutations and initial weights are read from the file; all else is computed
again. The last line is one JSON object: the largest absolute difference of each logged metric over all updates, of the
inputs and outputs of whitening, of the log-probabilities at sampling, and of the final weights. With `--plants` it also
has these differences where one thing is computed wrongly, to show that they tell.

Adam's first step of a weight is the rate times g / (|g| + eps). Where g is rounding noise (all of a softmax's key bias,
and a weight whose gradient happens to vanish), so is the step: those weights are counted and compared apart.

What TRL does otherwise than jaxops is done here and not there: the score lands on the token after the one that ended
the completion, ratios, entropies and the KL of an update are means over padding too, and a padding token sees the
tokens before it. The recording was made in float32, which is what is left of the differences.
"""

import argparse
import functools
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxops.core.sharding import map_named, named_leaves
from jaxops.models.decoder.architecture import Architecture
from jaxops.models.decoder.decoder import Decoder
from jaxops.models.decoder.tensors import stacked, tensor_shapes, unstacked
from jaxops.objectives.policy import aggregated, clipped_surrogate, clipped_value_loss, kl_estimate
from jaxops.objectives.token_logprobs import token_logprobs
from jaxops.rl.advantages import generalised_advantages, rewards_of_tokens, whitened

NOISE = 1e-6
"""A first gradient below this share of the largest of its array is float32's rounding."""


class SeeingDecoder(Decoder):
    """A decoder whose padding sees the tokens before it, though none sees padding; ours sees nothing there."""

    def _kinds(self, position: Any, seen: Any, distance: Any) -> Any:
        valid = jnp.diagonal(seen, axis1=1, axis2=2)
        causal = jnp.tril(jnp.ones(seen.shape[1:], bool))[None]
        return super()._kinds(position, causal & valid[:, None, :], distance)


class Plant(NamedTuple):
    """What may be computed wrongly: an error of lambda, the sign of the KL, and the mask of the ending token."""

    lam: float = 0.0
    kl_sign: float = 1.0
    end: float = 1.0


RIGHT = Plant()
PLANTS = {"lambda": Plant(lam=-0.05), "kl_sign": Plant(kl_sign=-1.0), "eos_mask": Plant(end=0.0)}


class Rollout(NamedTuple):
    """One batch: tokens with their prompts, and what is fixed before the update. All but `tokens` are [batch, longest].

    `mask` is 1 up to the token that ended the completion, and `through` up to the one after it.
    """

    tokens: Any
    mask: Any
    through: Any
    logprobs: Any
    values: Any
    advantages: Any
    returns: Any


class Replay:
    """The recorded run; `cfg` are its hyperparameters."""

    def __init__(self, path: str):
        with np.load(path, allow_pickle=False) as file:
            self.file = dict(file)
        self.cfg = {name.removeprefix("cfg/"): x.item() for name, x in self.file.items() if name.startswith("cfg/")}
        self.updates = sum(name.endswith("/queries") for name in self.file)
        self.prompt = self.file["u0/queries"].shape[1]
        vocab, dim = self.file["init_policy/transformer.wte.weight"].shape
        self.architecture = Architecture(
            vocab=vocab,
            dim=dim,
            layers=self.cfg["n_layer"],
            heads=self.cfg["n_head"],
            length=len(self.file["init_policy/transformer.wpe.weight"]),
            norm="layer",
            norm_eps=1e-5,
            activation="gelu_tanh",
            gated=False,
            positions="learned",
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            tied=True,
        )
        self.decoder = SeeingDecoder(self.architecture)
        self.temperature = self.cfg["temperature"] + 1e-7
        self.judge, self.reference = self.weights("reward"), self.weights("ref")
        cfg = self.cfg
        self.optimizer = optax.adamw(
            cfg["learning_rate"], cfg["adam_b1"], cfg["adam_b2"], cfg["adam_eps"], weight_decay=cfg["weight_decay"]
        )

    def weights(self, prefix: str) -> dict[str, Any]:
        """Returns recorded weights as parameters; a head of one score, where there is one, as `score`."""
        tensors = {name: self.file[f"{prefix}/{name}"] for name in tensor_shapes(self.architecture)}
        whole = lambda stack: jnp.asarray(stack[tuple(slice(0, size) for size in stack.shape)], jnp.float64)
        leaves = {path: whole(stack) for path, stack in stacked(self.architecture, tensors, prefix).items()}
        params = map_named(lambda path, _: leaves[path], self.decoder.shapes)
        score = self.file.get(f"{prefix}/score.weight")
        return params if score is None else params | {"score": jnp.asarray(score.T, jnp.float64)}

    def hidden(self, params: Any, tokens: Any) -> Any:
        """Returns hidden states; padding is a token 0 that no other token sees, and positions count what is not."""
        real = tokens != self.cfg["pad_token_id"]
        position = jnp.cumsum(real, axis=1) - real
        return self.decoder.hidden(params, jnp.where(real, tokens, 0), real.astype(jnp.int32), position)

    def policy(self, params: Any, tokens: Any) -> Any:
        """Returns the scores of the completions' tokens."""
        before = self.hidden(params, tokens)[:, self.prompt - 1 : -1]
        return token_logprobs(
            before,
            self.decoder.head(params),
            tokens[:, self.prompt :],
            real_vocab=self.decoder.real_vocab,
            temperature=self.temperature,
        )

    def values(self, params: Any, tokens: Any) -> Any:
        """Returns the value of the state before each token of the completions."""
        return (self.hidden(params, tokens)[:, self.prompt - 1 : -1] @ params["score"])[..., 0]

    @functools.partial(jax.jit, static_argnums=0)
    def rollout(self, params: dict[str, Any], tokens: Any, plant: Plant) -> tuple[Rollout, dict[str, Any], Any]:
        """Returns what an update trains on, the metrics of its sampling, and what was whitened, before and after."""
        cfg = self.cfg
        completions = tokens[:, self.prompt :]
        column = jnp.arange(completions.shape[1])[None]
        first = lambda hit: jnp.min(jnp.where(hit, column, column.size), axis=1, keepdims=True)
        until_end = jnp.where(column > first(completions == cfg["eos_token_id"]), cfg["pad_token_id"], completions)
        last = first(until_end == cfg["pad_token_id"]) - 1
        mask, through = (column <= last).astype(float), (column <= last + 1).astype(float)
        has_end = jnp.any(until_end == cfg["eos_token_id"], axis=1)
        mask = jnp.where((column == last) & has_end[:, None], plant.end, mask)

        read = tokens.at[:, self.prompt :].set(until_end)
        scores = self.hidden(self.judge, read) @ self.judge["score"]
        scores = jnp.take_along_axis(scores, last[..., None] + self.prompt, axis=1)
        scores = scores[:, 0, 0] - jnp.where(has_end, 0.0, cfg["missing_eos_penalty"])

        new, reference = self.policy(params["policy"], tokens).logprobs, self.policy(self.reference, tokens).logprobs
        values = self.values(params["value"], tokens) * through
        kl = kl_estimate(new, reference, cfg.get("kl_estimator", "k1")) * mask
        coefficient = cfg["kl_coef"] * plant.kl_sign
        raw = rewards_of_tokens(scores, through, kl, coefficient)
        rewards = whitened(raw, through, shift=False, variance="unbiased") if cfg["whiten_rewards"] else raw
        found = generalised_advantages(rewards, values, through, gamma=cfg["gamma"], lam=cfg["lam"] + plant.lam)
        advantages = whitened(found.advantages, mask, variance="unbiased")
        calls = [(raw, rewards)] if cfg["whiten_rewards"] else []
        calls.append((found.advantages, advantages))

        penalty = jnp.mean(jnp.sum(-coefficient * kl, axis=1))
        metrics = {
            "objective/kl": jnp.mean(jnp.sum(kl, axis=1)),
            "objective/entropy": jnp.mean(jnp.sum(-new * mask, axis=1)),
            "objective/non_score_reward": penalty,
            "objective/rlhf_reward": penalty + jnp.mean(scores),
            "objective/scores": jnp.mean(scores),
            "val/num_eos_tokens": jnp.sum(completions == cfg["eos_token_id"]),
        }
        return Rollout(tokens, mask, through, new, values, advantages, found.returns), metrics, calls

    def loss(self, params: dict[str, Any], batch: Rollout) -> tuple[Any, dict[str, Any]]:
        """Returns the loss of a minibatch, and its metrics."""
        cfg = self.cfg
        scores, values = self.policy(params["policy"], batch.tokens), self.values(params["value"], batch.tokens)
        clip = {"low": cfg["cliprange"], "high": cfg["cliprange"]}
        surrogate = clipped_surrogate(scores.logprobs, batch.logprobs, batch.advantages, batch.mask, **clip)
        mean = lambda x, mask: (found := aggregated(x, mask)).total / found.count
        bounded = clipped_value_loss(values, batch.values, batch.returns, cfg["cliprange_value"])
        free = clipped_value_loss(values, batch.values, batch.returns, None)
        metrics = {
            "loss/policy_avg": mean(surrogate.loss, batch.mask),
            "loss/value_avg": mean(bounded, batch.through),
            "policy/clipfrac_avg": mean(surrogate.clipped.astype(float), batch.mask),
            "val/clipfrac_avg": mean((bounded > free).astype(float), batch.through),
            "policy/approxkl_avg": jnp.mean(kl_estimate(scores.logprobs, batch.logprobs, "k2") * batch.mask),
            "policy/entropy_avg": jnp.mean(scores.entropy),
            "val/ratio": jnp.mean(surrogate.ratio),
        }
        return metrics["loss/policy_avg"] + cfg["vf_coef"] * metrics["loss/value_avg"], metrics

    @functools.partial(jax.jit, static_argnums=0)
    def step(self, params: Any, moments: Any, batch: Rollout) -> Any:
        """Returns parameters and moments after a minibatch, its metrics and its gradients."""
        grads, metrics = jax.grad(self.loss, has_aux=True)(params, batch)
        changes, moments = self.optimizer.update(grads, moments, params)
        return optax.apply_updates(params, changes), moments, metrics, grads

    def run(self, plant: Plant = RIGHT) -> dict[str, float]:
        """Replays all updates, and returns the largest difference of everything that was recorded."""
        cfg = self.cfg
        params = {"policy": self.weights("init_policy"), "value": self.weights("init_value")}
        moments, first = self.optimizer.init(params), None
        away: dict[str, float] = {}
        size, whitening, epoch = cfg["batch_size"] // cfg["num_mini_batches"], 0, 0
        for update in range(self.updates):
            tokens = jnp.asarray(self.file[f"u{update}/query_responses"])
            batch, metrics, calls = self.rollout(params, tokens, plant)
            self._note_logprobs(away, update, batch)
            for call in calls:
                for name, mine in zip(("in", "out"), call, strict=True):
                    apart = jnp.abs(mine - self.file[f"whiten{whitening}_{name}"])
                    apart = jnp.where(self.file[f"whiten{whitening}_mask"], apart, 0.0)
                    _note(away, f"whitening/{name}", float(jnp.max(apart)))
                whitening += 1
            steps = []
            for _ in range(cfg["num_ppo_epochs"]):
                order, epoch = self.file[f"perm{epoch}"], epoch + 1
                for start in range(0, cfg["batch_size"], size):
                    part = jax.tree.map(lambda x, rows=order[start : start + size]: x[rows], batch)
                    params, moments, found, grads = self.step(params, moments, part)
                    first = grads if first is None else first
                    steps.append(found)
            metrics |= {name: np.mean([s[name] for s in steps]) for name in steps[0]}
            metrics["val/ratio_var"] = np.var([s["val/ratio"] for s in steps], ddof=1)
            metrics |= {"lr": cfg["learning_rate"], "episode": cfg["batch_size"] * (update + 1)}
            logged = {name for name in self.file if name.startswith(f"log{update}/")} - {f"log{update}/eps"}
            assert logged == {f"log{update}/{name}" for name in metrics}, f"other metrics were logged: {logged}"
            for name, mine in metrics.items():
                _note(away, name, abs(float(mine) - self.file[f"log{update}/{name}"].item()))
        for part, weights in params.items():
            self._note_weights(away, part, weights, first[part])
        return away

    def _note_logprobs(self, away: dict[str, float], update: int, batch: Rollout) -> None:
        completions = batch.tokens[:, self.prompt :]
        sampled = jax.nn.log_softmax(jnp.asarray(self.file[f"u{update}/gen_logits"], jnp.float64))
        sampled = jnp.take_along_axis(sampled, completions[..., None], axis=2)[..., 0]
        _note(away, "sampling/logprobs", float(jnp.max(jnp.abs(sampled - batch.logprobs) * batch.mask)))

    def _note_weights(self, away: dict[str, float], part: str, weights: Any, first: Any) -> None:
        gradients, noisy = self.tensors(first), f"final/{part}/noise"
        away[f"{noisy}/entries"] = 0.0
        for name, mine in self.tensors(weights).items():
            apart, size = np.abs(mine - self.file[f"final_{part}/{name}"]), np.abs(gradients[name])
            # An embedding that no token looks up has no gradient at all, and stays where it is.
            noise = (size < NOISE * size.max()) & (apart > 0)
            if name.endswith("c_attn.bias"):
                noise[self.architecture.dim : 2 * self.architecture.dim] = True
            away[f"{noisy}/entries"] += float(noise.sum())
            _note(away, noisy, float(np.max(apart, where=noise, initial=0.0)))
            _note(away, f"final/{part}", float(np.max(apart, where=~noise, initial=0.0)))

    def tensors(self, params: Any) -> dict[str, np.ndarray]:
        """Returns parameters by their names in the file."""
        named = {path: np.asarray(leaf) for path, leaf in named_leaves(params) if path != "score"}
        found = {name: np.asarray(cut) for name, cut in unstacked(self.architecture, named).items()}
        return found | ({"score.weight": np.asarray(params["score"]).T} if "score" in params else {})


def _note(away: dict[str, float], name: str, distance: float) -> None:
    away[name] = max(away.get(name, 0.0), distance)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file")
    parser.add_argument("--plants", action="store_true", help="also replay with errors that were planted")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_platforms", "cpu")
    replay = Replay(options.file)
    found: dict[str, Any] = replay.run()
    if options.plants:
        found["planted"] = {name: replay.run(plant) for name, plant in PLANTS.items()}
    print(json.dumps(found))
