"""Which rows of the training files are held out: by time, by group, or at random."""

import dataclasses
import datetime
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
    if not source.train:
        return Cut("none", str(_TRAIN), "none")
    if rule == "auto":
        rule = "time" if source.log.time else "group" if source.log.group else "random"
    held_out = validation_fraction + test_fraction
    if held_out == 0:
        return Cut(rule, str(_TRAIN), "none")
    if rule == "time":
        if not source.log.time:
            raise DataError("--validation_split=time needs a time column (--time)")
        moment, text = _moment(database, source)
        shares = (validation_fraction, test_fraction)
        starts = _starts(database, source, moment, *shares)
        validation, test = (f"{moment} >= {_cast(text, start)}" for start in starts)
        if test_fraction == 0:
            test = "false"
        shown = [_shown(text, start) for start in starts]
        description = f"the last by {source.log.time}: validation from {shown[0]}"
        if test_fraction:
            description += f", test from {shown[1]}"
    else:
        if rule == "group" and not source.log.group:
            raise DataError("--validation_split=group needs a group column (--group)")
        key = "row_group" if rule == "group" else f"part_number * {2**40} + row_number"
        place = _place(key, seed)
        test = f"{place} < {round(test_fraction * _PRIME)}"
        validation = f"{place} < {round(held_out * _PRIME)}"
        what = f"groups by {source.log.group}" if rule == "group" else "rows"
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


def groups_in_several(database: Database, source: Source, cut: Cut) -> list[str]:
    """A warning where groups have rows in several splits."""
    if not source.log.group:
        return []
    rows = " UNION ALL ".join(
        f"SELECT row_group, split FROM ({cut.rows(source, part)})" for part in source.parts
    )
    ((groups, several),) = database.query(
        "SELECT count(*), count(*) FILTER (WHERE kinds > 1) FROM (SELECT row_group, "
        f"count(DISTINCT split) AS kinds FROM ({rows}) GROUP BY row_group)",
        "checking groups",
    )
    if not several:
        return []
    return [
        f"{several:,} of {groups:,} groups ({source.log.group}) have rows in several splits: alike "
        "rows are then learnt from and measured"
    ]


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
    # With its UTC offset; a time without one is taken as UTC.
    timestamp = "epoch_us(TRY_CAST(moment AS TIMESTAMPTZ))"
    union = " UNION ALL ".join(part.relation() for part in source.train)
    ((rows, numbers, timestamps),) = database.query(
        f"SELECT count(*), count({number}), count({timestamp}) FROM ({union})", "reading times"
    )
    if not rows:
        raise DataError("no rows", file=source.train[0].name)
    if rows == numbers:
        return number, "DOUBLE"
    if rows == timestamps:
        return timestamp, "BIGINT"
    moment = number if numbers > timestamps else timestamp
    for part in source.train:
        bad = database.query(
            f"SELECT row_number FROM (SELECT *, row_number() OVER () AS row_number FROM "
            f"({part.relation()})) WHERE {moment} IS NULL ORDER BY row_number LIMIT 1",
            "finding the fault",
        )
        if bad:
            expected = "a number" if numbers > timestamps else "an ISO date or time, or a number"
            raise part.fault(bad[0][0] - 1, source.log.time, f"{expected} as in the other rows")
    raise AssertionError("a row without a time, but not found again")


def _starts(
    database: Database, source: Source, moment: str, validation: float, test: float
) -> tuple:
    """The times at which validation and test begin: each split has whole times, and some rows.

    Where too many rows share a time, test may have more than its share; validation has its share
    of the rows before. Exact; sorts on disk.
    """
    union = " UNION ALL ".join(part.relation() for part in source.train)
    times = f"SELECT {moment} AS moment FROM ({union})"
    ((rows, first, distinct),) = database.query(
        f"SELECT count(*), min(moment), count(DISTINCT moment) FROM ({times})", "times"
    )
    needed = 1 + (validation > 0) + (test > 0)
    if distinct < needed:
        raise DataError(
            f"column {source.log.time} has {distinct} different times; a split by time needs "
            f"{needed}, one for each split: use --validation_split=group or random"
        )

    def at(share: float, limit=None) -> object:
        """The time at which the last `share` of all rows begins, of those before the limit; or the
        second of all times."""
        count, earlier = rows, times
        if limit is not None:
            earlier = f"SELECT * FROM ({times}) WHERE moment < {limit!r}"
            ((count,),) = database.query(f"SELECT count(*) FROM ({earlier})", "times")
        offset = min(max(int(count - share * rows), 0), count - 1)
        query = f"SELECT moment FROM ({earlier}) ORDER BY moment LIMIT 1 OFFSET {offset}"
        found = database.query(query, "sorting times")[0][0]
        if found == first:
            query = f"SELECT min(moment) FROM ({times}) WHERE moment > {first!r}"
            found = database.query(query, "times")[0][0]
        return found

    test_start = at(test) if test else None
    start = at(validation + test)
    if validation and test and start >= test_start:
        start = at(validation, test_start)
        if start >= test_start:
            # There is one time before: test begins one time later.
            query = f"SELECT min(moment) FROM ({times}) WHERE moment > {start!r}"
            test_start = database.query(query, "times")[0][0]
    return start, (test_start if test else start)


def _cast(kind: str, value) -> str:
    return f"CAST('{value}' AS {kind})"


def _shown(kind: str, value) -> str:
    """A time for people."""
    if kind != "BIGINT":
        return f"{value:g}" if value != int(value) else str(int(value))
    moment = datetime.datetime.fromtimestamp(0, datetime.UTC)
    return str(moment + datetime.timedelta(microseconds=value)).removesuffix("+00:00")
