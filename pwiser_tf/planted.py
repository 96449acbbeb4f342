"""Predictions against the probabilities behind a generated log: `pwiser evaluate --truth`.

A truth file (docs/guides/evaluate.md) has the rows of a log. Records keep a row's group but no
number of the row; they keep the order of the rows of a group. So a row is found again by its group
and its position in the group.
"""

import dataclasses
import math
import os
import tempfile

import numpy as np

from pwiser_tf import metrics
from pwiser_tf.convert.csv_reader import TEXT, CsvFile, Database
from pwiser_tf.convert.parquet_reader import ParquetFile, is_parquet
from pwiser_tf.convert.source import group_key, select
from pwiser_tf.errors import DataError
from pwiser_tf.schema import Schema

# P(genuine click), P(click), P(click and conversion), each given exposure.
TARGETS = ("interest", "ctr", "ctcvr")
# The outputs of a model that are measured, where it has them. cvr is ctcvr / ctr.
OUTPUTS = ("ctr", "ctcvr", "interest", "score")
# The name of the planted probabilities among the outputs.
BEST = "best"
_GENUINE = "genuine"


@dataclasses.dataclass(frozen=True)
class Truth:
    """A truth file.

    Attributes:
      file: where it was read.
      schema: of the records that it belongs to.
      group: the groups as in the records, int64 [n].
      columns: TARGETS (no ctcvr where there are no conversions) and, where the file has them,
        "genuine" and the log's label columns: float64 [n].
    """

    file: CsvFile | ParquetFile
    schema: Schema
    group: np.ndarray
    columns: dict[str, np.ndarray]

    @classmethod
    def read(cls, path: str | os.PathLike, schema: Schema) -> "Truth":
        """Reads a CSV or Parquet file.

        Raises:
          DataError: the data have no groups, a column is absent, a cell is not valid.
          OSError: it cannot be read.
        """
        if not schema.group:
            raise DataError("--truth needs data with a group, by which their rows are found again")
        opener = ParquetFile if is_parquet(path) else CsvFile
        targets = TARGETS if schema.conversion else TARGETS[:2]
        labels = [
            name
            for name in (_GENUINE, schema.click, schema.conversion)
            if name in opener(path, {}).names and name not in targets
        ]
        file = opener(path, dict.fromkeys((schema.group, *targets, *labels), TEXT))
        text = f"CAST({file.column(schema.group)} AS VARCHAR)"
        # By position, because a column may have any name.
        wanted = {"row_group": f"coalesce({group_key(text)}, -1)"}
        for name in (*targets, *labels):
            cell = file.column(name)
            number = f"TRY_CAST({cell} AS DOUBLE)"
            if name in labels:
                number = f"coalesce({number}, CAST(TRY_CAST({cell} AS BOOLEAN) AS DOUBLE))"
            wanted[f"value_{len(wanted)}"] = number
        with tempfile.TemporaryDirectory() as folder, Database(folder) as database:
            database.files.append(file)
            batches = list(database.batches(select(wanted, file.table()), "truth", file.size))
        if not sum(len(batch) for batch in batches):
            raise DataError("found no rows", file=path)
        group, *values = (
            np.concatenate([batch[name].to_numpy(zero_copy_only=False) for batch in batches])
            for name in wanted
        )
        columns = dict(zip((*targets, *labels), values, strict=True))
        _refuse_where(file, group < 0, schema.group, "a group in every row")
        for name in targets:
            outside = ~((columns[name] >= 0) & (columns[name] <= 1))
            _refuse_where(file, outside, name, "a probability")
        for name in labels:
            _refuse_where(file, ~np.isin(columns[name], (0, 1)), name, "0 or 1")
        return cls(file, schema, group, columns)

    def of_records(self, group: np.ndarray, grade: np.ndarray, split: str) -> dict[str, np.ndarray]:
        """The columns for the rows of a split, float64 [rows].

        Args:
          group, grade: of the records, [rows], in their order.
          split: its name, for messages. Rows of other splits may be in the file too.

        Raises:
          DataError: a group is absent, or has another number of rows, or a label differs.
        """
        distinct, counts = np.unique(group, return_counts=True)
        kept = np.flatnonzero(np.isin(self.group, distinct))
        present, found = np.unique(self.group[kept], return_counts=True)
        if len(present) < len(distinct):
            absent = np.setdiff1d(distinct, present)
            raise DataError(
                f"has no rows of {len(absent):,} of the {len(distinct):,} groups of the {split} "
                f"split; {self.schema.group} in the records, for example: {absent[0]}",
                file=self.file.shown,
            )
        other = np.flatnonzero(found != counts)
        if len(other):
            first = other[0]
            row = int(kept[np.argmax(self.group[kept] == distinct[first])])
            raise DataError(
                f"found {found[first]} rows of {self.schema.group} "
                f"{self.file.cell(row, self.schema.group)[1]}, expected {counts[first]} as in the "
                f"{split} split ({len(other):,} of {len(distinct):,} groups differ): groups must "
                "be whole, since rows are found by their order in the group",
                file=self.file.shown,
            )
        # A stable sort keeps the order of the rows within each group, on both sides.
        rows = np.empty(len(group), np.int64)
        rows[np.argsort(group, kind="stable")] = kept[np.argsort(self.group[kept], kind="stable")]
        self._check_label(self.schema.click, rows, grade >= 1, split)
        self._check_label(self.schema.conversion, rows, grade == 2, split)
        matched = {name: values[rows] for name, values in self.columns.items()}
        if _GENUINE in matched:
            # A genuine click is a click.
            clicked = np.where(matched[_GENUINE] == 1, grade >= 1, False)
            self._check_label(_GENUINE, rows, clicked, split)
        return matched

    def _check_label(self, column, rows, expected: np.ndarray, split: str) -> None:
        """DataError where a label of the file, if it has that column, is not the records'."""
        if column not in self.columns:
            return
        wrong = np.flatnonzero(self.columns[column][rows] != expected)
        if len(wrong):
            expected = f"{int(expected[wrong[0]])} as in the {split} split ({len(wrong):,} of "
            expected += f"{len(rows):,} rows differ): it is not the truth of these rows"
            raise self.file.fault(int(rows[wrong[0]]), column, expected)


def measure(
    predictions: dict[str, np.ndarray], truth: dict[str, np.ndarray], group: np.ndarray
) -> dict[str, dict]:
    """Each output of a model against the planted truth, ready for JSON.

    Args:
      predictions: output to float [n]; those of OUTPUTS are measured.
      truth: TARGETS (or without ctcvr) and maybe "genuine", [n].
      group: [n].

    Returns:
      Output to a dict, and so for BEST, the planted probabilities themselves, each against itself:
        interest_auc, ctr_auc, ctcvr_auc: `metrics.expected_auc` for that planted probability.
        genuine_auc: AUC for the drawn genuine clicks.
        top1_interest, top1_purchase: of the row that the output ranks first in its group, the
          planted interest and ctcvr, averaged over groups (`metrics.top_mean`).
        pcoc: predicted / planted, with the planted probability of the output's own name.
      None where undefined.
    """
    measured = {}
    for name in (output for output in OUTPUTS if output in predictions):
        scores = np.asarray(predictions[name])
        measured[name] = _measure(dict.fromkeys(TARGETS, scores), truth, group)
        if name in truth and truth[name].any():
            pcoc = scores.sum(dtype=np.float64) / truth[name].sum()
            measured[name]["pcoc"] = float(pcoc)
    return {**measured, BEST: _measure(truth, truth, group)}


def _measure(scores: dict[str, np.ndarray], truth: dict[str, np.ndarray], group) -> dict:
    """The metrics, but PCOC; `scores` ranks the rows for each of TARGETS."""
    found = {f"{name}_auc": None for name in (*TARGETS, _GENUINE)}
    found |= {"top1_interest": None, "top1_purchase": None, "pcoc": None}
    for name in (target for target in TARGETS if target in truth):
        found[f"{name}_auc"] = metrics.expected_auc(truth[name], scores[name])
    if _GENUINE in truth:
        found["genuine_auc"] = metrics.auc(truth[_GENUINE], scores["interest"])
    for name, target in (("top1_interest", "interest"), ("top1_purchase", "ctcvr")):
        if target in truth:
            found[name] = metrics.top_mean(truth[target], scores[target], group)
    return {
        name: None if value is None or math.isnan(value) else value for name, value in found.items()
    }


def _refuse_where(file, bad: np.ndarray, column: str, expected: str) -> None:
    if bad.any():
        raise file.fault(int(np.argmax(bad)), column, expected)
