"""Opens human judgements: reads and splits them, then tokenises, once in each process and to the same arrays.

Reading comes before the tokenizer, so that one can be made out of the texts of training.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from jaxops.core.failures import UserError
from jaxops.data import notes
from jaxops.data.preferences.agreement import AnnotatorAgreement, of_preferences, of_ratings
from jaxops.data.preferences.choices import Choices, read_choices
from jaxops.data.preferences.formats import Pair, read_pairs
from jaxops.data.preferences.opened import Featured, Judgements, OpenedJudgements, fill_id, inspected, tokenised
from jaxops.data.preferences.pairs import Pairs, PairSource, RatedSource, Texts
from jaxops.data.preferences.ratings import Rated, Ratings, read_rated, with_partners
from jaxops.data.preferences.spec import ChoiceData, JudgementConfig, PreferenceData, RatingData
from jaxops.data.text.heldout import split
from jaxops.data.text.spec import Share
from jaxops.data.text.tokenizer import Tokenizer

Judgement = TypeVar("Judgement")
DRAWN = 0
"""The seed of the judgements of evaluation, which are the same in every run."""


def read_judgements(config: JudgementConfig) -> Judgements:
    """Reads judgements and splits them: all of one prompt (ratings: of one text) are on one side.

    Raises:
      UserError: what reading raises; nothing is left to train on.
    """
    with notes.collected() as remarks:
        if isinstance(config, PreferenceData):
            return Preferences(config, *_split(config, read_pairs, lambda pair: pair.prompt), remarks)
        if isinstance(config, ChoiceData):
            return Choices(config, *_split(config, read_choices, lambda choice: choice.prompt), remarks)
        rated, held = _split(config, read_rated, lambda one: one.text.digest())
        held = with_partners(held, "valid") if held else []
        return RatedTexts(config, with_partners(rated, "train"), held, remarks)


def _split(
    config: Any, read: Callable[[Any, Any], list[Judgement]], key: Callable[[Judgement], bytes]
) -> tuple[list[Judgement], list[Judgement]]:
    """Reads the judgements of training and those that are held out."""
    everything = read(config, config.path)
    if config.valid is None:
        return everything, []
    keys = [key(one) for one in everything]
    if not isinstance(config.valid, Share):
        held = read(config, config.valid)
        both = len({key(one) for one in held} & {*keys})
        if both:
            what = "texts" if isinstance(config, RatingData) else "prompts"
            notes.tell(f"{both} {what} of data.valid are in data.path too: validation knows them")
        return everything, held
    return split(everything, keys, config.valid.share, "prompt(s) or text(s)")


@dataclasses.dataclass(frozen=True, eq=False)
class Preferences:
    """Preferences that are read and split."""

    config: PreferenceData
    train: list[Pair]
    valid: list[Pair]
    remarks: list[str]

    @property
    def words(self) -> list[str]:
        """All that is said in the texts of training."""
        return [said for pair in self.train for text in pair.texts for said in text.said]

    def opened(
        self, tokenizer: Tokenizer, featured: Featured | None = None, *, answers: bool = False
    ) -> OpenedJudgements:
        """Tokenises the texts and cuts them to the length of a row."""
        with notes.collected() as remarks:
            against = sum(pair.label < 0.5 for pair in (*self.train, *self.valid))
            if against:
                notes.tell(f"{against} labels are below 0.5: there the rejected text counts as the better one")
            train = self._pairs(self.train, tokenizer, "train", featured, answers)
            valid = self._pairs(self.valid, tokenizer, "valid", featured, answers) if self.valid else None
        inspection = inspected(self.config, tokenizer, {"train": train, "valid": valid}, self.remarks + remarks)
        inspection["conversations"] = sum(pair.texts[0].text is None for pair in self.train)
        everybody = of_preferences([*self.train, *self.valid])
        return OpenedJudgements(lambda seed: PairSource(train, seed), train.texts, valid, everybody, inspection)

    def _pairs(
        self, pairs: list[Pair], tokenizer: Tokenizer, part: str, featured: Featured | None, answers: bool
    ) -> Pairs:
        config = self.config
        documents = tokenised(config, [text for pair in pairs for text in pair.texts], tokenizer)
        texts = Texts.cut(documents, config.length, config.too_long, fill_id(tokenizer))
        kept = self._kept(pairs, texts, np.diff(documents.offsets) > config.length, part, answers)
        told = [pair for pair, keep in zip(pairs, kept, strict=True) if keep]
        prompts = {prompt: at for at, prompt in enumerate(dict.fromkeys(pair.prompt for pair in told))}
        prompt = np.array([prompts[pair.prompt] for pair in told])
        margins = [pair.margin for pair in told]
        return Pairs(
            featured(texts) if featured else texts,
            np.arange(2 * len(pairs)).reshape(-1, 2)[kept],
            np.array([pair.weight for pair in told], np.float32),
            np.array([pair.label for pair in told], np.float32),
            np.array([margin or 0.0 for margin in margins], np.float32) if any(margins) else None,
            np.stack([prompt, prompt], axis=1),
            tuple(pair.annotator for pair in told),
        )

    def _kept(self, pairs: list[Pair], texts: Texts, over: np.ndarray, part: str, answers: bool) -> np.ndarray:
        """Returns which pairs are learnt from, and tells what was cut or left out.

        Args:
          pairs: the pairs.
          texts: their texts, two for each.
          over: the texts that are longer than a row.
          part: names the pairs.
          answers: leave out pairs of which a side has nothing to learn from.

        Raises:
          UserError: none is left, or none of them counts.
        """
        longer = over.reshape(-1, 2)
        kept = np.array([not np.array_equal(texts.of(2 * at), texts.of(2 * at + 1)) for at in range(len(pairs))])
        alike = np.flatnonzero(~kept)
        if len(alike):
            notes.tell(
                f"{part}: {len(alike)} of {len(pairs)} pairs have the same tokens on both sides within data.length "
                f"{self.config.length} and are left out, the first {pairs[alike[0]].where}"
            )
        silent = kept & (texts.targets.reshape(-1, 2) == 0).any(axis=1)
        if answers and silent.any():
            notes.tell(
                f"{part}: {silent.sum()} of {len(pairs)} pairs have an answer without a token to learn from within "
                f"data.length {self.config.length} and are left out, the first {pairs[np.argmax(silent)].where}"
            )
            kept &= ~silent
        if longer.any():
            chosen, rejected = longer.sum(axis=0)
            what = {
                "cut_start": "lose their beginning",
                "cut_end": "lose their end",
                "drop": "are left out with their pairs",
            }
            notes.tell(
                f"{part}: {chosen} chosen and {rejected} rejected of {len(pairs)} texts each are longer than "
                f"data.length {self.config.length} and {what[self.config.too_long]}"
            )
            if self.config.too_long == "drop":
                kept &= ~longer.any(axis=1)
        if not any(pair.weight > 0 for pair, keep in zip(pairs, kept, strict=True) if keep):
            raise UserError(
                f"{part}: no pair is left to learn from within data.length {self.config.length}; the longest text has "
                f"{int(np.diff(texts.documents.offsets).max(initial=0))} tokens. Raise data.length, see data.too_long, "
                "and whether the weights are zero"
            )
        return kept


@dataclasses.dataclass(frozen=True, eq=False)
class RatedTexts:
    """Rated texts that are read and split."""

    config: RatingData
    train: list[Rated]
    valid: list[Rated]
    remarks: list[str]

    @property
    def words(self) -> list[str]:
        """All that is said in the texts of training."""
        return [said for one in self.train for said in one.text.said]

    def opened(
        self, tokenizer: Tokenizer, featured: Featured | None = None, *, answers: bool = False
    ) -> OpenedJudgements:
        """Tokenises the texts, cuts them to the length of a row, and draws the judgements of evaluation."""
        with notes.collected() as remarks:
            rated, train = self._texts(self.train, tokenizer, "train", featured, answers)
            held_out, valid = (
                self._texts(self.valid, tokenizer, "valid", featured, answers) if self.valid else ([], None)
            )
        ratings = Ratings(rated)
        judged, agreement = None, AnnotatorAgreement()
        if valid is not None:
            held = Ratings(held_out)
            judged, agreement = self._judged(valid, held), of_ratings(held, DRAWN, self.config.judgements)
        source = lambda seed: RatedSource(train, ratings, self.config.labels, seed)
        inspection = inspected(self.config, tokenizer, {"train": train, "valid": judged}, self.remarks + remarks)
        inspection["train"]["ratings"] = len(ratings.values)
        judges = f"{inspection['digest']} {_digest_of_ratings(ratings)}"
        inspection["digest"] = hashlib.sha256(judges.encode()).hexdigest()
        return OpenedJudgements(source, train, judged, agreement, inspection)

    def _texts(
        self, rated: list[Rated], tokenizer: Tokenizer, part: str, featured: Featured | None, answers: bool
    ) -> tuple[list[Rated], Texts]:
        """Returns the texts that are kept, with their tokens. With `answers` one needs a token after its first."""
        config = self.config
        documents = tokenised(config, [one.text for one in rated], tokenizer)
        silent = np.diff(documents.offsets) < 2
        if answers and silent.any():
            where = rated[int(np.argmax(silent))].text.where
            notes.tell(f"{part}: {silent.sum()} texts of one token have nothing to learn, left out, the first {where}")
            left = [one for one, drop in zip(rated, silent, strict=True) if not drop]
            return self._texts(with_partners(left, part), tokenizer, part, featured, answers)
        over = int((np.diff(documents.offsets) > config.length).sum())
        if over:
            side = "beginning" if config.too_long == "cut_start" else "end"
            notes.tell(
                f"{part}: {over} of {len(rated)} texts are longer than data.length {config.length}, lose their {side}"
            )
        texts = Texts.cut(documents, config.length, config.too_long, fill_id(tokenizer))
        return rated, featured(texts) if featured else texts

    def _judged(self, texts: Texts, ratings: Ratings) -> Pairs:
        drawn = [ratings.drawn(DRAWN, epoch) for epoch in range(self.config.judgements)]
        sides = np.concatenate([np.stack([one.first, one.second], axis=1) for one in drawn])
        label = np.concatenate([ratings.single(one) for one in drawn]).astype(np.float32)
        return Pairs(texts, sides, np.ones(len(sides), np.float32), label, None, sides, (None,) * len(sides))


def _digest_of_ratings(ratings: Ratings) -> str:
    return hashlib.sha256(ratings.values.tobytes() + ratings.offsets.tobytes()).hexdigest()
