"""How far a judge agrees with people: AlpacaEval's human annotations, 648 pairs of answers with four verdicts each.

The package `alpaca_eval` computes the figures (`alpaca_eval.analyze`), as for its table of evaluators. There a judge
sees a pair in one order, drawn at random; here in both, so that its preference is the mean of two verdicts. As there, a
preference between 1 and 2 is not rounded: 1.5 agrees by one half, whatever most people said.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from aligndistil.benchmarks.alpaca_eval import Comparison, Pair, hub_file, package, quiet
from aligndistil.benchmarks.files import BenchmarkFile, Files
from aligndistil.benchmarks.formats import json_rows
from aligndistil.errors import UserError
from aligndistil.judge import Ask, Verdict
from aligndistil.objectives.base import MetricInfo

CROSS_ANNOTATIONS = hub_file("alpaca_farm_human_crossannotations.json")
"""Four people's verdicts on each pair."""
ANNOTATIONS = hub_file("alpaca_farm_human_annotations.json")
"""Which models' answers the pairs are."""
PEOPLE = 4
METRICS = {
    "agreement": MetricInfo("%", "pairs on which the judge prefers what most of four people do", better="more"),
    "spearman": MetricInfo("", "correlation of the ranks that the judge and people give the models", better="more"),
    "pearson": MetricInfo("", "correlation of the models' win rates by the judge and by people", better="more"),
    "price": MetricInfo("$", "of 1,000 pairs in both orders, at the price in the judge's file"),
}
KEYS = ["instruction", "output_1", "output_2"]


class Agreement(NamedTuple):
    """What a judge has in common with people."""

    agreement: float
    """Percent of pairs on which it prefers what most of four people do; where two of them are against two, the package
    decides by a fixed draw."""
    error: float
    """Its standard error over pairs, as the package has it; NaN where it is not known."""
    spearman: float
    """Correlation of the models' win rates by its verdicts and by people's, of their ranks."""
    pearson: float
    """Of the win rates themselves."""
    annotations: int
    """Verdicts that it rests on."""


class HumanAgreement:
    """Asks a judge about the pairs that people annotated, and compares."""

    def __init__(self, files: Files, reading: str = "weighted") -> None:
        """`reading` as in `AlpacaEval`.

        Raises UserError when a file is not what it should be, MissingError when a package is not installed, and as
        `Files.get` does.
        """
        self._comparison = Comparison(reading, ("output_1-first", "output_2-first"))
        people = _frame(files, CROSS_ANNOTATIONS, "preference", "datasplit")
        with quiet():
            self._analyzer = package("analyze").Analyzer(
                gold_crossannotations=people,
                gold_annotations=_frame(files, ANNOTATIONS, "generator"),
                n_annotators=PEOPLE,
            )
        self._people: pd.DataFrame = self._analyzer.df_gold_crossannotations
        self._once = self._people.drop_duplicates(KEYS).reset_index(drop=True)
        if self._once.empty:
            raise UserError(
                f"{CROSS_ANNOTATIONS.name} has no pair with {PEOPLE} verdicts; see {CROSS_ANNOTATIONS.address}"
            )
        self._pairs = [Pair(str(i), *texts) for i, texts in enumerate(self._once[KEYS].itertuples(index=False))]

    def asks(self) -> list[Ask]:
        """Of each pair, in both orders."""
        return self._comparison.asks(self._pairs)

    def scores(self, verdicts: Mapping[str, Verdict]) -> Agreement:
        """`verdicts` by the keys of `asks`; a pair that lacks one is left out, as in the package."""
        return self._agreement(self._once.assign(preference=1 + self._comparison.preferences(self._pairs, verdicts)))

    def humans(self) -> Agreement:
        """One person against most of the other three. The correlations are 1 by definition."""
        return self._agreement(self._people)

    def _agreement(self, annotations: pd.DataFrame) -> Agreement:
        count = int(annotations["preference"].notna().sum())
        if not count:
            return Agreement(np.nan, np.nan, np.nan, np.nan, 0)
        with quiet():
            found = self._analyzer.agreement_of_annotations(annotations, n_majority_vote_1=1)
            correlations = self._analyzer.estimate_correlations(annotations)
        return Agreement(
            100 * float(found["score"]),
            100 * float(found["sem_samples"]),
            float(correlations["spearman"]),
            float(correlations["pearson"]),
            count,
        )


def published() -> dict[str, Agreement]:
    """The rows of AlpacaEval's own table, by the name of the judge; `humans` is one of them.

    Raises MissingError when the package `alpaca_eval` is not installed.
    """
    folder = Path(package("constants").CURRENT_DIR) / "leaderboards" / "evaluators"
    table = pd.read_csv(folder / "evaluators_leaderboard.csv", index_col=0)
    columns = ["Human agreement", "Spearman corr.", "Pearson corr.", "# parsed"]
    return {
        str(name): Agreement(float(agreement), np.nan, float(spearman), float(pearson), int(count))
        for name, agreement, spearman, pearson, count in table[columns].itertuples()
        if agreement > 1  # one row has a price where its agreement should be
    }


def _frame(files: Files, file: BenchmarkFile, *columns: str) -> pd.DataFrame:
    frame = pd.DataFrame(json_rows(files.get(file), file.name))
    if lacking := [column for column in [*KEYS, *columns] if column not in frame]:
        raise UserError(f"{file.name} has no column {lacking[0]}; it is to be had at {file.address}")
    return frame
