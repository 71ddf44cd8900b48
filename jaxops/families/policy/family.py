"""The policy family: RLHF from a config to a task, and from a run folder to a served policy."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxops.config.load import Loaded
from jaxops.core.failures import UserError
from jaxops.core.step import Step
from jaxops.data import notes
from jaxops.data.prompts.open import OpenedPrompts, open_prompts
from jaxops.data.prompts.source import Prompts
from jaxops.data.protocol import Source
from jaxops.data.text.open import TextParts, open_text
from jaxops.families.policy.config import PolicyConfig, ValueHead
from jaxops.families.policy.data_commands import inspect_data, preview_data
from jaxops.families.policy.evaluation import PolicyEvaluation
from jaxops.families.policy.opened import OpenedPolicy, open_policy
from jaxops.families.policy.options import PolicyPredict
from jaxops.families.policy.outline import outlined, outlined_judges
from jaxops.families.policy.serving import ServedPolicy
from jaxops.models.decoder.unrolled import Unrolled
from jaxops.models.policy import POLICY
from jaxops.rl.collect import Collector
from jaxops.rl.options import SampleOptions
from jaxops.rl.ptx import PTX, PtxRows, ptx_extra, with_ptx
from jaxops.rl.rewards.function import check_columns
from jaxops.rl.rewards.scoring import Scoring
from jaxops.rl.sample import Sampler
from jaxops.rl.step import PolicyStep, UpdateParts, drawn_batch, policy_extras
from jaxops.rl.watch import PolicyAlarms
from jaxops.run.family import Family, Given
from jaxops.run.pretrained.config import Pretrained
from jaxops.run.pretrained.export import DecoderExport
from jaxops.run.pretrained.options import Generate
from jaxops.run.pretrained.pinned import pinned
from jaxops.run.pretrained.stored import stored
from jaxops.run.task import About, NoEvaluation, StepParts, Task, of_config


def build(loaded: Loaded[PolicyConfig], given: Given) -> Task:
    """Opens models, prompts and rewards of a config and puts its task together.

    Raises:
      UserError: something cannot be opened, or does not go together.
    """
    loaded = pinned(loaded)
    config = loaded.config
    if given.data is not None or given.model is not None:
        raise UserError("a policy's prompts and models come from its config; an objective may be given")
    opened = open_policy(config)
    prompts = open_prompts(config.data, opened.tokenizer, config.run.seed)
    check_columns(config.rewards, prompts.columns)
    return _task(loaded, given, opened, prompts)


def outline(loaded: Loaded[PolicyConfig], given: Given, folder: Path) -> Task:
    """Puts the task of a config together over stand-ins in `folder`: only its shapes and programs count.

    Raises:
      UserError: nothing tells the architecture of a model.
    """
    with notes.collected(quiet=True):  # they would be about stand-ins
        loaded = outlined(loaded, folder)
        judges, assumed = outlined_judges(loaded.config)
        opened = open_policy(loaded.config, judges=judges)
        prompts = open_prompts(loaded.config.data, opened.tokenizer, loaded.config.run.seed)
        prompts.inspection.pop("notes", None)
    task = _task(loaded, given, opened, prompts)
    return dataclasses.replace(task, notices=[*task.notices, *assumed])


def _task(loaded: Loaded[PolicyConfig], given: Given, opened: OpenedPolicy, prompts: OpenedPrompts) -> Task:
    config = loaded.config
    text = _open_ptx(config, opened)
    parts = _Parts(config, opened, prompts, text)
    algorithm, model = config.algorithm, opened.model
    longest = config.sample.max_tokens
    objective = algorithm.objective(model, config.sample.temperature, longest)
    extras = policy_extras(algorithm)
    if config.mixed_text is not None:
        objective, extras = with_ptx(objective, model, config.mixed_text.coef), extras | {PTX: ptx_extra()}
    return Task(
        **of_config(config, loaded.resolved, model),
        objective=objective if given.objective is None else given.objective(model),
        source=prompts.train,
        evaluation=NoEvaluation() if prompts.valid is None else parts.evaluation(prompts.valid),
        extras=extras,
        frozen=model.frozen,
        reads=(f"^{POLICY}/",) if model.frozen and not model.copies_reference else (),
        dtypes=model.dtypes,
        start=(lambda: opened.sources) if opened.sources else None,
        copies=opened.copies,
        step=parts.step,
        update_batch=parts.update_batch,
        inspection=_inspection(prompts, text),
        transform=stored(model.decoder.config, opened.tokenizer),
        about=_about(config, opened, prompts),
        alarms=parts.alarms(),
        undefined={} if model.has_reference else {"valid": dict.fromkeys(_AGAINST_REFERENCE, _NO_REFERENCE)},
        notices=parts.notices(),
        models=model.parts,
    )


_AGAINST_REFERENCE = ("kl", "kl_token", "win_rate")
_NO_REFERENCE = "algorithm.kl.coef is 0, so that no reference is kept"


def _open_ptx(config: PolicyConfig, opened: OpenedPolicy) -> TextParts | None:
    """Opens the text that updates learn from beside completions.

    Raises:
      UserError: it cannot be opened, or its rows are longer than the policy reads.
    """
    if config.mixed_text is None:
        return None
    length, room = config.mixed_text.data.length, opened.model.decoder.config.length
    if length > room:
        raise UserError(f"ptx.data.length: {length} tokens in a row, but the policy reads {room} at most")
    try:
        return open_text(config.mixed_text.data, opened.tokenizer)
    except UserError as error:
        raise UserError(f"ptx.data: {error}") from None


def _inspection(prompts: OpenedPrompts, text: TextParts | None) -> dict[str, Any]:
    """Returns the description of the data; what tells them apart covers the text too."""
    digest, found = prompts.inspection["digest"], dict(prompts.inspection)
    if text is not None:
        found[PTX] = text.inspection
        digest = hashlib.sha256(f"{digest} {text.inspection['digest']}".encode()).hexdigest()
    return {**found, "split": {"sha256": digest}}


class _Parts:
    """The parts of a task that are built on a mesh."""

    def __init__(
        self, config: PolicyConfig, opened: OpenedPolicy, prompts: OpenedPrompts, text: TextParts | None
    ) -> None:
        self._config, self._opened, self._prompts = config, opened, prompts
        self._text: Source | None = None if text is None else text.source(config.run.seed)
        held_out = 0 if prompts.valid is None else prompts.valid.width
        self.width = max(prompts.train.width, held_out)
        self._samplers: dict[Any, Sampler] = {}

    def step(self, parts: StepParts) -> Step:
        """Returns the step of the algorithm."""
        config, model = self._config, self._opened.model
        scoring = self._scoring(parts.mesh, self._prompts.train)
        collector = self._collector(config.sample.options(), parts.mesh, scoring)
        return PolicyStep(
            UpdateParts(parts.update, parts.mesh, lambda: parts.journal),
            model,
            config.algorithm,
            collector,
            compute_dtype=np.dtype(config.precision.compute),
            logical=config.sharding.logical,
            text=self._text_rows(parts.mesh),
        )

    def _text_rows(self, mesh: Mesh) -> PtxRows | None:
        """Returns the rows of text of the updates of a step."""
        config, given = self._config, self._config.mixed_text
        if self._text is None or given is None:
            return None
        share = config.algorithm.epochs * config.algorithm.completions * given.rows_per_completion
        return PtxRows(self._text, self._rows_of_text(config.completions), share, mesh)

    def _rows_of_text(self, completions: int) -> int:
        """Returns the number of rows of text of an update of a step with so many completions."""
        assert self._config.mixed_text is not None
        return completions // self._config.algorithm.minibatches * self._config.mixed_text.rows_per_completion

    def update_batch(self, size: int) -> Mapping[str, Any]:
        """Returns a batch as the update reads it: its completions are drawn, not sampled."""
        algorithm, vocab = self._config.algorithm, self._opened.model.decoder.real_vocab
        completions = size * algorithm.completions
        found: dict[str, Any] = {
            **drawn_batch(algorithm, completions, self.width, self._config.sample.max_tokens, vocab)
        }
        return (
            found if self._text is None else found | {PTX: dict(self._text.batch(0, self._rows_of_text(completions)))}
        )

    def evaluation(self, held_out: Prompts) -> PolicyEvaluation:
        """Returns the evaluation on the held-out prompts."""
        config = self._config
        options = config.sample.options(config.evaluate.temperature)
        judge = config.evaluate.judge
        return PolicyEvaluation(
            held_out,
            self._scoring,
            functools.partial(self._collector, options),
            None if judge is None else judge.bound(),
        )

    def alarms(self) -> PolicyAlarms:
        """Returns the rules that watch the run."""
        config, held_out = self._config, self._prompts.valid
        prompts = min(config.evaluate.prompts, held_out.examples if held_out is not None else 1)
        return PolicyAlarms(config.watch.in_dtype(config.precision.compute), prompts)

    def notices(self) -> list[str]:
        """Returns what a person should know before training begins."""
        config, found = self._config, list(self._prompts.inspection.get("notes", ()))
        kl = config.algorithm.kl
        if config.algorithm.penalises and kl.in_ == "reward" and kl.estimator != "k1":
            found.append(
                f"algorithm.kl.estimator: {kl.estimator} in the reward has not the gradient of the KL; k1 has"
                " (docs/rlhf.md)"
            )
        if config.evaluate.judge is not None and not {"win_rate", "reward"} <= {*config.evaluate.metrics}:
            found.append("evaluate.metrics: without win_rate and reward nothing sees whether the judge falls (watch)")
        if not config.algorithm.has_values and config.value != ValueHead():
            found.append(f"value: {config.algorithm.kind} compares completions with each other and has no values")
        return found

    def _scoring(self, mesh: Mesh, prompts: Prompts) -> Scoring:
        config = self._config
        return Scoring(
            config.rewards,
            prompts,
            self._prompts.columns,
            self._opened.judges,
            mesh,
            dtype=np.dtype(config.precision.compute),
            logical=config.sharding.logical,
        )

    def _collector(self, options: SampleOptions, mesh: Mesh, scoring: Scoring) -> Collector:
        return Collector(
            self._opened.model,
            self._sampler(options, mesh),
            scoring,
            judged=scoring.programs,
            names=scoring.names,
            width=self.width,
            completions=self._config.completions,
            seed=self._config.run.seed,
            mesh=mesh,
        )

    def _sampler(self, options: SampleOptions, mesh: Mesh) -> Sampler:
        """Returns a sampler; where training and evaluation sample alike they share one, and its programs."""
        config, opened = self._config, self._opened
        if (options, mesh) not in self._samplers:
            self._samplers[options, mesh] = Sampler(
                Unrolled(opened.model.decoder),
                mesh,
                slots=config.sample.slots,
                room=self.width + options.max_tokens,
                segment=config.sample.segment,
                options=options,
                tokenizer=opened.tokenizer,
                dtype=config.precision.compute,
                logical=config.sharding.logical,
                name="sample" if options == config.sample.options() else "evaluate_sample",
            )
        return self._samplers[options, mesh]


def _about(config: PolicyConfig, opened: OpenedPolicy, prompts: OpenedPrompts) -> About:
    model, text = config.model.weights if isinstance(config.model, Pretrained) else "decoder", config.mixed_text
    rows = [
        ("tokenizer", f"{opened.tokenizer.kind}, {opened.tokenizer.vocab:,} ids"),
        ("prompts", f"{prompts.train.examples:,}"),
        *([("held-out prompts", f"{prompts.valid.examples:,}")] if prompts.valid is not None else []),
        ("completions of a step", f"{config.completions:,} of up to {config.sample.max_tokens:,} tokens"),
        ("rewards", ", ".join(reward.label for reward in config.rewards)),
        ("algorithm", config.algorithm.kind),
        *([("text beside them", f"{text.data.kind}, weight {text.coef:g}")] if text is not None else []),
    ]
    note = "The reward is what the policy is trained for; people or another judge say whether answers are better."
    curves = [("kl", "reward"), ("kl", "win_rate")]
    return About(model=model, headline="reward", data=rows, curves=curves, notes=[note])


def restore(saved: Any) -> ServedPolicy:
    """Restores the trained policy of a run.

    Raises:
      UserError: the run folder lacks a part of it.
    """
    return ServedPolicy(saved)


FAMILY = Family(
    config=PolicyConfig,
    build=build,
    load=restore,
    data={"inspect": inspect_data, "preview": preview_data},
    predict=PolicyPredict,
    export=DecoderExport,
    generate=Generate,
    outline=outline,
)
