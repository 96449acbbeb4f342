"""Which rows of the training files are held out: by time, by group, or at random."""

import dataclasses
import random

from pwiser_tf.convert.csv_reader import Database
from pwiser_tf.convert.source import Part, Source
from pwiser_tf.errors import DataError
from pwiser_tf.schema import SPLITS

RULES = ("auto", "time", "group", "random")
# Arithmetic modulo this prime stays within BIGINT.
_PRIME = 2**31 - 1
_TRAIN, _VALIDATION, _TEST = range(len(SPLITS))


@dataclasses.dataclass(frozen=True)
class Cut:
    """A rule that names the split of each row of the training files.

    Attributes:
      rule: "time", "group" or "random".
      expression: SQL giving a position in schema.SPLITS; reads the relation's columns, and
        `row_number` and `part_number` where the rule is "random".
      description: for the schema's notes.
    """

    rule: str
    expression: str
    description: str

    def rows(self, source: Source, part: Part) -> str:
        """The SQL query of a part's relation with one more column, `split`, in its order."""
        for split, parts in ((_VALIDATION, source.validation), (_TEST, source.test)):
            if part in parts:
                return f"SELECT *, {split} AS split FROM ({part.relation()})"
        relation = part.relation()
        if self.rule == "random":
            number = source.train.index(part)
            relation = (
                f"SELECT *, row_number() OVER () AS row_number, {number} AS part_number "
                f"FROM ({relation})"
            )
        return f"SELECT *, {self.expression} AS split FROM ({relation})"


def make_cut(
    database: Database,
    source: Source,
    rule: str,
    validation_fraction: float,
    test_fraction: float,
    seed: int,
) -> Cut:
    """The cut of the training files.

    Args:
      rule: one of RULES. "auto" is "time" where the source has a time column, since a model is
        used on what comes after its training; else "group" where it has a group, since rows of
        one search are alike and would leak from one split to the other; else "random".
      validation_fraction: the share of validation; 0 gives none.
      test_fraction: the share of test, 0 where the source has test files.
      seed: changes which groups or rows are held out; has no part in "time".

    Raises:
      DataError: the rule needs a column that the source lacks, or times cannot be read.
    """
    if rule == "auto":
        rule = "time" if source.time else "group" if source.group else "random"
    held_out = validation_fraction + test_fraction
    if held_out == 0:
        return Cut(rule, str(_TRAIN), "none")
    if rule == "time":
        if not source.time:
            raise DataError("--validation_split=time needs a time column (--time)")
        moment, text = _moment(database, source)
        starts = _quantiles(database, source, moment, [1 - held_out, 1 - test_fraction])
        validation, test = (f"{moment} >= {_cast(text, start)}" for start in starts)
        if test_fraction == 0:
            test = "false"
        description = f"the last by {source.time}: validation from {starts[0]}"
        if test_fraction:
            description += f", test from {starts[1]}"
    else:
        if rule == "group" and not source.group:
            raise DataError("--validation_split=group needs a group column (--group)")
        key = "row_group" if rule == "group" else f"part_number * {2**40} + row_number"
        place = _place(key, seed)
        test = f"{place} < {round(test_fraction * _PRIME)}"
        validation = f"{place} < {round(held_out * _PRIME)}"
        what = f"groups by {source.group}" if rule == "group" else "rows"
        description = (
            f"{what} by hash, seed {seed}: validation {validation_fraction}, test {test_fraction}"
        )
    if validation_fraction == 0:
        validation = "false"
    return Cut(
        rule,
        f"CASE WHEN {test} THEN {_TEST} WHEN {validation} THEN {_VALIDATION} ELSE {_TRAIN} END",
        description,
    )


def _place(key: str, seed: int) -> str:
    """SQL: a BIGINT from 0 to a pseudo-random place in 0.._PRIME - 1, fixed by the seed.

    A random quadratic polynomial over the field of that prime: the places of any three keys are
    independent (Wegman and Carter, 1981). Ten times as fast as a cryptographic hash.
    """
    generator = random.Random(seed)
    low, high, shift, square, line = (generator.randrange(1, _PRIME) for _ in range(5))
    x = f"({key}) % {_PRIME} * {low} + ({key}) // {_PRIME} % {_PRIME} * {high} + {shift}"
    x = f"(({x}) % {_PRIME})"
    return f"(({x} * {x} % {_PRIME} * {square} + {x} * {line}) % {_PRIME})"


def _moment(database: Database, source: Source) -> tuple[str, str]:
    """SQL of the time as a number or a timestamp, and its type: whichever reads every row."""
    number = "nullif(TRY_CAST(moment AS DOUBLE), CAST('nan' AS DOUBLE))"
    timestamp = "TRY_CAST(moment AS TIMESTAMP)"
    union = " UNION ALL ".join(part.relation() for part in source.train)
    ((rows, numbers, timestamps),) = database.query(
        f"SELECT count(*), count({number}), count({timestamp}) FROM ({union})", "reading times"
    )
    if not rows:
        raise DataError("no rows", file=source.train[0].name)
    if rows == numbers:
        return number, "DOUBLE"
    if rows == timestamps:
        return timestamp, "TIMESTAMP"
    moment = number if numbers > timestamps else timestamp
    for part in source.train:
        bad = database.query(
            f"SELECT row_number FROM (SELECT *, row_number() OVER () AS row_number FROM "
            f"({part.relation()})) WHERE {moment} IS NULL ORDER BY row_number LIMIT 1",
            "finding the fault",
        )
        if bad:
            expected = "a number" if numbers > timestamps else "an ISO date or time, or a number"
            raise part.fault(bad[0][0] - 1, source.time, f"{expected} as in the other rows")
    raise AssertionError("a row without a time, but not found again")


def _quantiles(database: Database, source: Source, moment: str, shares: list[float]) -> list:
    """The times from which on the last 1 - share of the rows lies. Exact; sorts on disk."""
    union = " UNION ALL ".join(part.relation() for part in source.train)
    times = f"SELECT {moment} AS moment FROM ({union})"
    ((rows, first),) = database.query(f"SELECT count(*), min(moment) FROM ({times})", "times")
    starts = []
    for share in shares:
        offset = min(int(share * rows), rows - 1)
        found = database.query(
            f"SELECT moment FROM ({times}) ORDER BY moment LIMIT 1 OFFSET {offset}", "sorting times"
        )
        starts.append(found[0][0])
    if starts[0] == first:
        raise DataError(
            f"column {source.time} cannot tell early rows from late ones: {first} is the "
            "time of too many of them; use --validation_split=group or random"
        )
    return starts


def _cast(kind: str, value) -> str:
    return f"CAST('{value}' AS {kind})"
