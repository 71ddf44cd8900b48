"""Known errors of policy optimisation, planted one at a time, and the tests that find each.

    python tests/rl/mutants.py [--doc] [NAME ...]

An error is one line of the source changed: the function is compiled again with the changed text, and its code put in
the place of the old. A line that is no longer there once, and only once, fails: this list follows the source. For each
error the named tests run, in this process; without any error all of them pass. `--doc` writes the table into
docs/rlhf.md.
"""

import argparse
import contextlib
import dataclasses
import gc
import importlib
import inspect
import io
import pathlib
import sys
import textwrap

import pytest

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
DOC = HERE.parents[1] / "docs" / "rlhf.md"
BEGIN, END = "<!-- planted errors: begin -->", "<!-- planted errors: end -->"

ADVANTAGES, LOSSES = "rl/test_advantages.py", "objectives/test_policy.py"
GRADIENT, STEP, LEARNT = "rl/test_exact_gradient.py", "rl/test_policy_updates.py", "rl/test_algorithms.py"
TEXT = "rl/test_ptx.py"
PPO_TABLE = f"{GRADIENT}::test_ppo_follows_the_gradients_of_its_objective_and_of_the_error_of_its_values[table]"
PPO_NET = f"{GRADIENT}::test_ppo_follows_the_gradients_of_its_objective_and_of_the_error_of_its_values[transformer]"
ONE_OBJECTIVE = f"{GRADIENT}::test_without_scaling_all_algorithms_follow_the_gradient_of_one_objective"
METRICS = f"{GRADIENT}::test_metrics_are_the_expectations_that_they_are_called"
SAMPLED = f"{LEARNT}::test_what_a_step_samples_has_the_exact_probabilities_and_is_fresh_each_step"


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One planted error.

    Attributes:
      name: what is wrong.
      where: the function, as module:qualified.name below jaxops.
      right: text of its source that is there exactly once.
      wrong: what stands there instead.
      tests: the tests that should find it, below tests/.
    """

    name: str
    where: str
    right: str
    wrong: str
    tests: tuple[str, ...]


def mutant(name, where, right, wrong, *tests):
    return Mutant(name, where, right, wrong, tests)


MUTANTS = [
    mutant(
        "score on the last column, not on the last token",
        "rl.advantages:rewards_of_tokens",
        "last = (mask > 0) & (jnp.cumsum(after[:, ::-1], axis=1)[:, ::-1] == 0)",
        "last = jnp.arange(mask.shape[1])[None] == mask.shape[1] - 1",
        f"{ADVANTAGES}::test_rewards_of_tokens",
        PPO_TABLE,
    ),
    mutant(
        "training's log-probabilities at temperature 1",
        "models.policy:PolicyModel._scores",
        "temperature=temperature",
        "temperature=1.0",
        PPO_NET,
        METRICS,
    ),
    mutant(
        "the reference alone at temperature 1",
        "models.policy:PolicyModel.reference_logprobs",
        "batch, temperature, self._hidden",
        "batch, 1.0, self._hidden",
        PPO_TABLE,
    ),
    mutant(
        "scores as whole numbers",
        "rl.collect:Collector._once",
        "scored.total, 0.0).astype(np.float32)",
        "scored.total, 0.0).astype(np.int32).astype(np.float32)",
        PPO_TABLE,
    ),
    mutant(
        "the token that ends is not in the mask",
        "rl.rollout:rollout_of",
        "(np.arange(longest)[None] < counts[:, None])",
        "(np.arange(longest)[None] < (counts - [why != 'length' for why in sampled.stopped])[:, None])",
        PPO_TABLE,
    ),
    mutant(
        "k3 in the reward",
        "rl.ppo:Ppo.learnt",
        "rollout.reference, self.kl.estimator, mask",
        'rollout.reference, "k3", mask',
        PPO_TABLE,
    ),
    mutant(
        "log-probabilities of the token after",
        "models.policy:PolicyModel._hidden",
        'batch["length"][:, None] - 1 + jnp',
        'batch["length"][:, None] + jnp',
        PPO_NET,
    ),
    mutant(
        "the first token's state is that before the prompt's last",
        "models.policy:PolicyModel._hidden",
        'batch["length"][:, None] - 1 + jnp',
        'batch["length"][:, None] - 2 + jnp',
        PPO_NET,
    ),
    mutant(
        "values of the state after each token",
        "models.policy:PolicyModel.values",
        "[None, None])[..., 0]",
        "[None, None])[:, jnp.minimum(jnp.arange(hidden.shape[1]) + 1, hidden.shape[1] - 1), 0]",
        PPO_TABLE,
    ),
    mutant(
        "sign of the KL in PPO's reward",
        "rl.advantages:rewards_of_tokens",
        "else rewards - jnp.where",
        "else rewards + jnp.where",
        f"{ADVANTAGES}::test_rewards_of_tokens",
        PPO_TABLE,
    ),
    mutant(
        "sign of the KL in the score of a group",
        "rl.algorithms:Algorithm._penalised",
        "return rollout.scores - rollout.coefficient",
        "return rollout.scores + rollout.coefficient",
        f"{ONE_OBJECTIVE}[rloo]",
    ),
    mutant(
        "KL of padding in the score of a group",
        "rl.algorithms:Algorithm._penalised",
        "rollout.reference, self.kl.estimator, rollout.mask)",
        "rollout.reference, self.kl.estimator)",
        f"{ONE_OBJECTIVE}[rloo]",
    ),
    mutant(
        "KL at tokens outside the mask",
        "rl.advantages:rewards_of_tokens",
        "jnp.where(mask > 0, coefficient * kl, 0.0)",
        "coefficient * kl",
        f"{ADVANTAGES}::test_rewards_of_tokens",
    ),
    mutant(
        "sign of the advantage",
        "objectives.policy:clipped_surrogate",
        "plain, bounded = -advantages * ratio, -advantages * jnp",
        "plain, bounded = advantages * ratio, advantages * jnp",
        f"{LOSSES}::test_the_clipped_surrogate",
        PPO_TABLE,
    ),
    mutant(
        "the ratio is not clipped",
        "objectives.policy:clipped_surrogate",
        "jnp.maximum(plain, bounded)",
        "plain",
        f"{LOSSES}::test_the_clipped_surrogate",
    ),
    mutant(
        "the better of both surrogates, not the worse",
        "objectives.policy:clipped_surrogate",
        "jnp.maximum(plain, bounded)",
        "jnp.minimum(plain, bounded)",
        f"{LOSSES}::test_the_clipped_surrogate",
    ),
    mutant(
        "the smaller of both errors of values",
        "objectives.policy:clipped_value_loss",
        "jnp.maximum(error",
        "jnp.minimum(error",
        f"{LOSSES}::test_the_clipped_value_loss",
    ),
    mutant(
        "means diluted by padding",
        "objectives.policy:aggregated",
        "Sum(jnp.sum(each), jnp.sum(mask))",
        "Sum(jnp.sum(each), jnp.sum(jnp.ones_like(mask)))",
        f"{LOSSES}::test_means",
        PPO_TABLE,
    ),
    mutant(
        "entropy diluted by padding",
        "rl.algorithms:Algorithm.objective",
        'sums["entropy"] = Sum.of(found.entropy, mask)',
        'sums["entropy"] = Sum.of(found.entropy)',
        f"{LEARNT}::test_the_objective_far_from_where_it_sampled_is_that_of_a_loop_in_float64",
    ),
    mutant(
        "entropy is made smaller",
        "rl.algorithms:Algorithm.objective",
        "mean(-self.entropy * found.entropy * on)",
        "mean(self.entropy * found.entropy * on)",
        f"{LEARNT}::test_the_objective_far_from_where_it_sampled_is_that_of_a_loop_in_float64",
    ),
    mutant(
        "whitening of each completion by itself",
        "rl.advantages:whitened",
        "mean = jnp.sum(values * mask) / count",
        "mean = jnp.sum(values * mask, axis=1, keepdims=True) / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)",
        f"{ADVANTAGES}::test_whitening",
    ),
    mutant(
        "the reference is the policy",
        "models.policy:PolicyModel.reference",
        "else params[REFERENCE]",
        "else params[POLICY]",
        PPO_TABLE,
    ),
    mutant(
        "the same noise at every step",
        "rl.collect:Collector._once",
        "seed=self.seed, step=step",
        "seed=self.seed, step=0",
        SAMPLED,
    ),
    mutant(
        "sampling at temperature 1",
        "rl.distribution:log_distribution",
        "/ jnp.float32(options.temperature)",
        "/ jnp.float32(1)",
        SAMPLED,
    ),
    mutant(
        "probabilities of the model recorded, not those that were drawn from",
        "rl.rollout:rollout_of",
        "sampled.logprobs[row, :count]",
        "sampled.plain[row, :count]",
        SAMPLED,
        METRICS,
    ),
    mutant(
        "advantages look to the end, whatever lambda",
        "rl.advantages:generalised_advantages",
        "+ gamma * lam * following",
        "+ gamma * following",
        f"{ADVANTAGES}::test_generalised_advantages",
    ),
    mutant(
        "gamma in the place of lambda",
        "rl.ppo:Ppo.learnt",
        "lam=self.gae.lambda_",
        "lam=self.gae.gamma",
        f"{LEARNT}::test_what_ppo_learns_from_is_that_of_a_loop_in_float64",
    ),
    mutant(
        "a cut completion is bootstrapped though it is terminal",
        "rl.ppo:Ppo.learnt",
        'if self.cut == "bootstrap":',
        "if True:",
        PPO_TABLE,
    ),
    mutant(
        "a completion that ended is bootstrapped",
        "rl.ppo:Ppo.learnt",
        "jnp.where(rollout.ended, 0.0, at_end)",
        "at_end",
        f"{LEARNT}::test_what_ppo_learns_from_is_that_of_a_loop_in_float64",
    ),
    mutant(
        "bootstrap from the state before the last token",
        "rl.ppo:Ppo.learnt",
        "rollout.lengths[:, None], axis=1",
        "rollout.lengths[:, None] - 1, axis=1",
        f"{LEARNT}::test_what_ppo_learns_from_is_that_of_a_loop_in_float64",
    ),
    mutant(
        "returns without the values",
        "rl.advantages:generalised_advantages",
        "advantages + values.T, 0.0",
        "advantages, 0.0",
        f"{ADVANTAGES}::test_generalised_advantages",
        PPO_TABLE,
    ),
    mutant(
        "old log-probabilities are those of now",
        "rl.algorithms:Algorithm._policy_terms",
        'logprobs, batch["old"], batch["advantages"]',
        'logprobs, logprobs, batch["advantages"]',
        f"{LEARNT}::test_the_objective_far_from_where_it_sampled_is_that_of_a_loop_in_float64",
    ),
    mutant(
        "the same minibatches in every epoch",
        "rl.step:PolicyStep._minibatches",
        "jax.random.fold_in(key, epoch)",
        "key",
        f"{LEARNT}::test_every_epoch_goes_through_all_completions_in_an_order_of_its_own",
    ),
    mutant(
        "the same minibatches in every step",
        "rl.step:PolicyStep._minibatches",
        "ORDER), step)",
        "ORDER), 0)",
        f"{LEARNT}::test_every_epoch_goes_through_all_completions_in_an_order_of_its_own",
    ),
    mutant(
        "advantages normalised by minibatch",
        "rl.algorithms:Algorithm._policy_terms",
        'batch["advantages"], mask, **',
        '__import__("jaxops.rl.advantages", fromlist=["whitened"]).whitened(batch["advantages"], mask), mask, **',
        PPO_TABLE,
    ),
    mutant(
        "the baseline of a group counts what was dropped",
        "rl.advantages:group_advantages",
        "count = jnp.sum(there, axis=1, keepdims=True)",
        "count = jnp.full_like(rows[:, :1], group)",
        f"{ADVANTAGES}::test_advantages_over_a_group",
        f"{ONE_OBJECTIVE}[rloo]",
    ),
    mutant(
        "RLOO with the mean of all as baseline",
        "rl.advantages:group_advantages",
        'found = away * count / jnp.maximum(count - 1, 1.0) if baseline == "others" else away',
        "found = away",
        f"{ADVANTAGES}::test_advantages_over_a_group",
    ),
    mutant(
        "dropped completions are learnt from",
        "rl.step:PolicyStep._learnt",
        'rollout["mask"] * kept[:, None]',
        'rollout["mask"]',
        f"{ONE_OBJECTIVE}[ppo]",
    ),
    mutant(
        "the coefficient of the KL moves away from its target",
        "rl.kl:adapted",
        "kl / config.target - 1",
        "1 - kl / config.target",
        f"{ADVANTAGES}::test_the_coefficient_moves_towards_the_target",
    ),
    mutant(
        "the coefficient follows the KL of a token",
        "rl.step:PolicyStep._learnt",
        "whole = jnp.sum(each, axis=1)",
        "whole = jnp.sum(each, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1.0)",
        METRICS,
    ),
    mutant(
        "the correction for sampling upside down",
        "rl.algorithms:importance",
        "jnp.clip(old - sampled,",
        "jnp.clip(sampled - old,",
        f"{LEARNT}::test_weights_for_the_difference_of_sampling_and_training",
    ),
    mutant(
        "warming up stops values as well",
        "rl.ppo:Ppo._value_terms",
        "self.value_weight * loss",
        'self.value_weight * loss * batch["policy_on"][:, None]',
        f"{LEARNT}::test_first_steps_may_train_the_values_alone",
    ),
    mutant(
        "warming up stops nothing but the surrogate",
        "rl.algorithms:Algorithm.objective",
        "[:, None] * kl * on",
        "[:, None] * kl",
        f"{LEARNT}::test_while_values_are_trained_alone_nothing_else_is_in_the_loss",
    ),
    mutant(
        "warming up is one step too long",
        "rl.step:PolicyStep._learnt",
        "step >= algorithm.values_first",
        "step > algorithm.values_first",
        f"{LEARNT}::test_first_steps_may_train_the_values_alone",
    ),
    mutant(
        "the worst of a group is learnt",
        "rl.advantages:best_of_group",
        "jnp.where(there, -rows, jnp.inf)",
        "jnp.where(there, rows, jnp.inf)",
        f"{LEARNT}::test_best_of_n_learns_the_best_of_each_group_as_if_it_were_given[1]",
    ),
    mutant(
        "a dropped completion takes the place of the best",
        "rl.advantages:best_of_group",
        "jnp.where(there, -rows, jnp.inf)",
        "-rows",
        f"{LEARNT}::test_best_of_n_learns_the_best_of_each_group_as_if_it_were_given[1]",
    ),
    mutant(
        "running scores forget their mean",
        "rl.step:_scaled",
        "scaled = (scores - mean)",
        "scaled = scores",
        f"{LEARNT}::test_running_scores_and_their_bounds",
    ),
    mutant(
        "scores are bounded before they are scaled",
        "rl.step:PolicyStep._learnt",
        'scores = given["score"]',
        'scores = jnp.clip(given["score"], -(algorithm.score_clip or 9e9), algorithm.score_clip or 9e9)',
        f"{LEARNT}::test_running_scores_and_their_bounds",
    ),
    mutant(
        "the deviation of a group over n",
        "rl.advantages:group_advantages",
        "keepdims=True) / jnp.maximum(count - 1, 1.0))",
        "keepdims=True) / jnp.maximum(count, 1.0))",
        f"{ADVANTAGES}::test_advantages_over_a_group",
    ),
    mutant(
        "slope of k3 by its other side",
        "objectives.policy:kl_estimate",
        "reference - logprobs, -LARGEST",
        "logprobs - reference, -LARGEST",
        f"{LOSSES}::test_estimates_of_the_kl",
    ),
    mutant(
        "the state is given away before the last chance to stop",
        "rl.step:PolicyStep.__call__",
        "if turn.poll():\n            raise Interrupted\n        # From here on",
        "# From here on",
        f"{STEP}::test_interrupted_before_its_first_update_a_step_has_not_been",
    ),
    mutant(
        "copies of one prompt have one noise",
        "rl.collect:_named",
        "copy=first + at",
        "copy=at",
        f"{STEP}::test_a_prompt_that_comes_twice_in_a_batch_gets_completions_of_its_own",
    ),
    mutant(
        "text beside completions is divided by rows, not by tokens",
        "rl.ptx:with_ptx",
        "coef * on * nll.total, nll.count",
        'coef * on * nll.total, jnp.sum(batch[PTX]["weight"])',
        f"{TEXT}::test_the_text_is_a_mean_over_its_own_tokens_and_the_metric_has_no_coefficient",
    ),
    mutant(
        "text beside completions has the weight 1",
        "rl.ptx:with_ptx",
        "coef * on * nll.total",
        "on * nll.total",
        f"{TEXT}::test_the_text_is_a_mean_over_its_own_tokens_and_the_metric_has_no_coefficient",
    ),
    mutant(
        "every update reads the same rows of text",
        "rl.ptx:PtxRows.batch",
        "row + update * self._rows",
        "row",
        f"{TEXT}::test_each_update_reads_the_next_rows_and_the_state_says_where_they_are",
    ),
    mutant(
        "updates that are left out take their text with them",
        "rl.step:PolicyStep.__call__",
        "self.text.after(row, turn.updates,",
        "self.text.after(row, self.algorithm.epochs * self.algorithm.minibatches,",
        f"{TEXT}::test_updates_that_an_early_stop_leaves_out_take_no_text",
    ),
]
"""All planted errors; an equivalent change, which no test can find, would be no error and is not here."""


def function_of(where):
    """Returns the function that a mutant changes, without what decorates it."""
    module, name = where.split(":")
    found = importlib.import_module(f"jaxops.{module}")
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    return inspect.unwrap(found)


@contextlib.contextmanager
def planted(error):
    """Runs with the changed source of one function.

    Raises:
      LookupError: the text is not in the source exactly once.
    """
    function = function_of(error.where)
    source = textwrap.dedent(inspect.getsource(function))
    right = error.right.replace("\n    ", "\n") if "\n" in error.right else error.right
    if source.count(right) != 1:
        raise LookupError(f"{error.name}: {error.where} has {right!r} {source.count(right)} times, not once")
    scope = {}
    text = "from __future__ import annotations\n" + source.replace(right, error.wrong)
    exec(compile(text, function.__code__.co_filename, "exec"), function.__globals__, scope)
    original, function.__code__ = function.__code__, inspect.unwrap(scope[function.__name__]).__code__
    try:
        yield
    finally:
        function.__code__ = original


class Failures:
    """A plugin that notes which tests failed."""

    def __init__(self):
        self.failed, self.told, self.passed = [], [], 0

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid)
            self.told.append(str(report.longrepr.reprcrash.message).splitlines()[0])
        self.passed += report.when == "call" and report.passed


def failures(tests, first=True):
    """Runs tests afresh, and returns (names of those that failed, number that passed)."""
    # Test modules keep compiled problems: each run imports its own.
    for name in [name for name, module in sys.modules.items() if _is_test(module)]:
        del sys.modules[name]
    gc.collect()
    found, told = Failures(), io.StringIO()
    options = ["-q", "-p", "no:cacheprovider", "-m", "", "-W", "ignore:Module already imported"]
    options += ["-x"] if first else []
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        pytest.main([*options, *(str(HERE.parent / test) for test in tests)], plugins=[found])
    if not found.failed and not found.passed:
        raise RuntimeError(f"no test ran:\n{told.getvalue()}")
    # An error that cannot even run is found by anything, and shows nothing.
    if any(message.startswith(("NameError", "TypeError", "AttributeError", "SyntaxError")) for message in found.told):
        raise RuntimeError(f"the changed source does not run: {found.told}")
    return found.failed, found.passed


def _is_test(module):
    path = getattr(module, "__file__", None)
    inside = path is not None and HERE.parent in pathlib.Path(path).parents
    return inside and module.__name__ not in ("__main__", "conftest")


def short(node):
    """Returns a test's name with its file, as the table shows it."""
    path, _, name = node.partition("::")
    return f"`{pathlib.Path(path).name}` {name.partition('[')[0].removeprefix('test_').replace('_', ' ')}"


def table(found):
    """Returns the table in Markdown."""
    lines = ["| planted error | found by |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {name} | {test} |" for name, test in found.items())])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="only those whose name contains one of these")
    parser.add_argument("--doc", action="store_true", help="write the table into docs/rlhf.md")
    options = parser.parse_args()
    importlib.import_module("conftest")  # before jaxops: what it sets is there for all
    chosen = [one for one in MUTANTS if not options.names or any(part in one.name for part in options.names)]
    found, survivors = {}, []
    for error in chosen:
        with planted(error):
            failed, _ = failures(error.tests)
        found[error.name] = short(failed[0]) if failed else "NOTHING"
        survivors += [] if failed else [error.name]
        print(f"| {error.name} | {found[error.name]} |", flush=True)
    # Last, so that an error which stayed behind in something compiled would show.
    broken, passed = failures(dict.fromkeys(test for error in chosen for test in error.tests), first=False)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} planted errors are found; ", end="")
    print(f"without any, {passed} tests pass and {len(broken)} fail", *broken, sep="\n")
    if options.doc and not survivors and not broken:
        before, rest = DOC.read_text().split(BEGIN)
        DOC.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{rest.split(END)[1]}")
    sys.exit(bool(survivors or broken))


if __name__ == "__main__":
    main()
