"""The reward family: scores learnt from human judgements, from a config to a task, and from a run to a served model."""

from typing import Any

from jaxops.config.bypath import ByPath
from jaxops.config.load import Loaded
from jaxops.core.failures import UserError
from jaxops.data.preferences.open import read_judgements
from jaxops.data.preferences.opened import OpenedJudgements
from jaxops.data.preferences.spec import AnsweredPart
from jaxops.data.text.documents import with_learnt_template
from jaxops.evaluate.judged_pairs import LABELS, agreement_notes, agreement_rows, baselines, count_rows
from jaxops.families.reward.config import PretrainedReward, RewardConfig
from jaxops.families.reward.data_commands import inspect_data, preview_data
from jaxops.families.reward.evaluation import RewardEvaluation, scores_of_features, scores_of_pairs
from jaxops.families.reward.opened import OpenedReward, open_reward
from jaxops.families.reward.options import RewardPredict
from jaxops.families.reward.reference import stored_reference
from jaxops.families.reward.serving import ServedReward
from jaxops.families.reward.trunk import Trunk
from jaxops.models.lora import Lora, on_model
from jaxops.objectives.ensemble import each_head
from jaxops.run.callables import objective_from
from jaxops.run.family import Family, Given
from jaxops.run.pretrained.pinned import pinned
from jaxops.run.pretrained.stored import stored
from jaxops.run.task import About, NoEvaluation, Task, of_config

HEADS = (r"^reward/", "float32")
"""The heads are small and stay in float32, whatever the dtype of the decoder."""


def build(loaded: Loaded[RewardConfig], given: Given) -> Task:
    """Opens judgements, tokenizer and model of a config and puts its task together.

    Raises:
      UserError: something cannot be opened, or does not go together.
    """
    loaded = pinned(loaded)
    config = loaded.config
    if given.data is not None or given.model is not None:
        raise UserError("a reward model's data and model come from its config; an objective may be given")
    read = read_judgements(config.data)
    opened = open_reward(config, lambda: read.words)
    trunk = Trunk(config, opened) if opened.keeps_trunk else None
    data = read.opened(opened.tokenizer, trunk)
    sources, valid = opened.sources, data.valid
    scores = on_model(opened.model, scores_of_pairs(opened.reward))
    if trunk is not None:
        scores = scores_of_features(opened.reward)
    template = config.data.template if isinstance(config.data, AnsweredPart) else None
    return Task(
        **of_config(config, loaded.resolved, opened.model),
        objective=_objective(config, given, opened),
        reads=() if trunk is not None and _is_ours(config, given) else None,
        source=data.source(config.run.seed),
        evaluation=NoEvaluation() if valid is None else RewardEvaluation(valid, scores),
        start=(lambda: sources) if sources else None,
        frozen=opened.frozen,
        dtypes=(HEADS, *(opened.model.dtypes if isinstance(opened.model, Lora) else ())),
        baselines=None if valid is None or not config.evaluate.baselines else lambda: baselines(valid, data.agreement),
        inspection={
            **data.inspection,
            "split": {"sha256": data.inspection["digest"]},
            **({} if trunk is None else {"features": {"sha256": trunk.digest}}),
        },
        transform={
            **stored(opened.reward.decoder.config, with_learnt_template(opened.tokenizer, template)),
            **stored_reference(data.texts, config.reference),
        },
        about=_about(config, opened, data),
    )


def _objective(config: RewardConfig, given: Given, opened: OpenedReward) -> Any:
    """Returns the objective: ours for each head, a user's own on the mean of all heads."""
    if not _is_ours(config, given):
        return on_model(opened.model, objective_from(config.objective, given.objective, opened.reward))
    assert not isinstance(config.objective, ByPath)
    if not opened.keeps_trunk:
        return on_model(opened.model, each_head(opened.reward, config.objective.build))
    scores = scores_of_features(opened.reward)
    flat = lambda params, batch: scores(params, batch).reshape(-1, opened.reward.ensemble)
    return each_head(opened.reward, config.objective.build, flat)


def _is_ours(config: RewardConfig, given: Given) -> bool:
    """Returns whether the objective is one of the config's kinds; one of the user's own reads the texts themselves."""
    return given.objective is None and not isinstance(config.objective, ByPath)


def _about(config: RewardConfig, opened: OpenedReward, data: OpenedJudgements) -> About:
    model = config.model.weights if isinstance(config.model, PretrainedReward) else "decoder"
    rows = [("tokenizer", f"{opened.tokenizer.kind}, {opened.tokenizer.vocab:,} ids")]
    rows += [*count_rows(data.inspection), *agreement_rows(data.agreement)]
    notes = [
        "Accuracy is on single judgements that are not ties, held out with all others of the same prompt or text; its "
        "95 % interval counts them for what a bootstrap over prompts or texts says they are worth.",
        "Log loss and ECE are of the probability that Bradley-Terry gives the first text, a tie being half a win.",
        "Bias to longer: how much more often the model prefers the longer answer than people do. Bias to first: the "
        "same for the text that was shown first, which is every other pair's second.",
        f"Scores are served with a mean of 0 and a deviation of 1 on {config.reference:,} texts of training.",
    ]
    return About(
        model=model, labels=LABELS, headline="accuracy", data=rows, notes=[*notes, *agreement_notes(data.agreement)]
    )


def restore(saved: Any) -> ServedReward:
    """Restores the trained reward model of a run.

    Raises:
      UserError: the run folder lacks a part of it.
    """
    return ServedReward(saved)


FAMILY = Family(
    config=RewardConfig,
    build=build,
    load=restore,
    data={"inspect": inspect_data, "preview": preview_data},
    predict=RewardPredict,
)
