"""The config of a recommender run: the common sections, and its own data, model, tables and objective."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

from jaxops.config.types import ByPath, Factory
from jaxops.core.metric import Metric
from jaxops.data.clicks.spec import ClickDataConfig
from jaxops.data.interactions.spec import InteractionsConfig
from jaxops.evaluate.clicks import click_metric
from jaxops.evaluate.ranking import Repeats, ranking_metric
from jaxops.families.rec.tables_config import TableConfig
from jaxops.models.dcn import DCNv2Config
from jaxops.models.dlrm import DLRMConfig
from jaxops.models.linear import LinearConfig
from jaxops.models.sasrec import SASRecConfig
from jaxops.models.two_tower import TwoTowerConfig
from jaxops.objectives.clicks import Clicks
from jaxops.objectives.ranking import Bce, Gbce, SampledSoftmax, Softmax
from jaxops.objectives.retrieval import InBatchSoftmax
from jaxops.run.config import EarlyStop, Evaluate, RunConfig

Sort = Literal["sequence", "retrieval", "click"]
"""The three sorts of recommenders: next items of a history, two towers, and clicks on examples with features."""
RecData = InteractionsConfig | ClickDataConfig | Annotated[ByPath, Factory(leading=0)]
RecModel = (
    SASRecConfig
    | TwoTowerConfig
    | DLRMConfig
    | DCNv2Config
    | LinearConfig
    | Annotated[ByPath, Factory(leading=1, note="a factory, called once as fn(data, ...)")]
)
RecObjective = Softmax | SampledSoftmax | Bce | Gbce | InBatchSoftmax | Clicks | Annotated[ByPath, Factory(leading=1)]
EXPECTED_OBJECTIVE: Mapping[Sort, str] = {
    "sequence": "{model}: expected softmax, sampled_softmax, bce or gbce, got {got}",
    "retrieval": "{model}: expected {{kind: in_batch_softmax}}, got {got}",
    "click": "{model} predicts clicks: expected {{kind: clicks}}, got {got}",
}
EXPECTED_DATA: Mapping[bool, str] = {
    True: "{model} learns from clicks: expected kind clicks, criteo or movielens_100k_clicks",
    False: "{model} learns from interactions: {got} is for dlrm, dcnv2 and linear",
}
"""The error message for data of the wrong kind, under True for click models."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecEarlyStop(EarlyStop):
    """Stops the run after `patience` evaluations without a better `metric` on validation."""

    metric: str = "ndcg@10"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecEvaluate(Evaluate):
    """Evaluates every `every` steps on validation, and at the end on validation and test with the kept parameters.

    `slices` adds the same metrics of parts of the data. A slice is cold_user or cold_item (training has no event of
    it), warm_user or warm_item (it has), or a column of users, items or clicks, each value of which is a slice.
    """

    metrics: tuple[str, ...] = ("hr@10", "ndcg@10", "mrr@10")
    stop: RecEarlyStop | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecConfig(RunConfig):
    """A recommender run.

    `repeats` says whether an item that a user has had may be learnt, measured and recommended again, and
    `untrained_items` whether two-tower recommends items that training never saw, whose id rows are still random.
    """

    task: str = "rec"
    data: RecData
    model: RecModel = SASRecConfig()
    tables: Mapping[str, TableConfig] = dataclasses.field(default_factory=dict)
    objective: RecObjective = Softmax()
    evaluate: RecEvaluate = RecEvaluate()
    repeats: Repeats = "exclude"
    untrained_items: Literal["exclude", "allow"] = "exclude"

    @property
    def sort(self) -> Sort:
        """The sort of recommender; for a user's own model the data decide."""
        return self.model.sort or ("click" if self.data.sort == "clicks" else "sequence")  # type: ignore[return-value]

    def metric(self, name: str) -> Metric:
        """Returns the ranking or click metric of this name.

        Raises:
          UserError: there is no such metric; the message names the nearest right one.
        """
        return click_metric(name) if self.sort == "click" else ranking_metric(name)

    def problems(self) -> list[tuple[str, str]]:
        """Returns (dotted path, message) of everything that cannot work on any machine."""
        found = super().problems()
        sort, clicks = self.sort, self.sort == "click"
        if self.objective.sort not in ("", sort):
            text = EXPECTED_OBJECTIVE[sort].format(model=self.model.kind, got=self.objective.kind)
            found.append(("objective", text))
        if self.data.sort not in ("", "clicks" if clicks else "interactions") or (clicks and not self.data.sort):
            found.append(("data", EXPECTED_DATA[clicks].format(model=self.model.kind, got=self.data.kind)))
        for name in ("repeats", "untrained_items"):
            if clicks and getattr(self, name) == "allow":
                found.append((name, f"{self.model.kind} predicts clicks of rows and recommends nothing; leave it out"))
        return found + self.model.problems_in(self) + self.objective.problems_in(self)

    def mesh_problems(self, sizes: Mapping[str, int]) -> list[tuple[str, str]]:
        """Returns (dotted path, message) of everything that cannot work on a mesh of these sizes.

        An axis of -1 is checked again once the devices are known.
        """
        found = super().mesh_problems(sizes) + self.model.mesh_problems(sizes)
        if sizes["sequence"] > 1:
            found.append(("mesh.sequence", f"{self.model.kind} has no sequence parallelism: leave it at 1"))
        return found
