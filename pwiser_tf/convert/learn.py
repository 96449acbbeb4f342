"""What a schema takes from the training rows: statistics of numbers, vocabularies of categories."""

import math

from pwiser_tf.convert.csv_reader import Database
from pwiser_tf.schema import Categorical


def bounds(database: Database, rows: str, columns: int) -> list[tuple[int | None, int | None]]:
    """The least and the greatest of `categorical_0 ..`, which are BIGINT; None without a value.

    Args:
      rows: an SQL query.
      columns: how many there are.
    """
    aggregates = [f"{f}(categorical_{i})" for f in ("min", "max") for i in range(columns)]
    (values,) = database.query(f"SELECT {', '.join(aggregates)} FROM ({rows})", "scanning")
    return list(zip(values[:columns], values[columns:], strict=True))


def moments(database: Database, rows: str, columns: int) -> list[tuple[float, float]]:
    """Mean and standard deviation of `numerical_0 ..`, over the values that are not missing.

    A column of nothing else has (0, 0). Arguments as `bounds`.
    """
    if not columns:
        return []
    # Not finite: missing, or an infinite value, which the writing pass refuses with its place.
    aggregates = [
        f"{function}(CASE WHEN isfinite(numerical_{i}) THEN numerical_{i} END)"
        for function in ("avg", "stddev_pop")
        for i in range(columns)
    ]
    (values,) = database.query(f"SELECT {', '.join(aggregates)} FROM ({rows})", "scanning")
    return [settled(*pair) for pair in zip(values[:columns], values[columns:], strict=True)]


def settled(mean: float | None, std: float | None) -> tuple[float, float]:
    """Mean and standard deviation without the last bits; (0, 0) for None, None.

    Those bits depend on the order in which numbers were added, which threads do not keep. What is
    cut off is a millionth of the standard deviation.
    """
    if mean is None or std is None:
        return 0.0, 0.0
    std = float(f"{std:.6e}")
    # A power of two, so that rounding to its multiples is exact.
    unit = 2.0 ** (math.frexp(std)[1] - 20) if std else 0.0
    return (round(mean / unit) * unit if unit else mean), std


def vocabularies(
    database: Database,
    rows: str,
    names: dict[int, str],
    minimum_count: int,
    integers: bool = False,
) -> dict[int, Categorical]:
    """Lists the values of categorical columns.

    A vocabulary holds the values seen at least `minimum_count` times, by falling count, then by
    value. It is of integers where every value is one, written plainly (no leading zero, no sign
    but a minus), else of strings. Memory grows with the number of distinct values only.

    Args:
      rows: an SQL query with categorical_<position> columns.
      names: the features' names, by position.
      integers: the columns are BIGINT; otherwise it is to be found out.
    """
    if not names:
        return {}
    kind = "BIGINT" if integers else "VARCHAR"
    values = ", ".join(f"CAST(categorical_{position} AS {kind})" for position in names)
    database.query(
        f"CREATE OR REPLACE TABLE seen AS SELECT position, value, count(*) AS count FROM ("
        f"SELECT unnest([{values}]) AS value, unnest({list(names)}) AS position FROM ({rows})"
        f") WHERE value IS NOT NULL GROUP BY ALL",
        "counting values",
    )
    if integers:
        number, are_integers = "value", dict.fromkeys(names, True)
    else:
        number, are_integers = _typed(database)
    found = {}
    for position, name in names.items():
        is_integer = are_integers.get(position, False)
        value = number if is_integer else "value"
        listed = database.query(
            f"SELECT {value} AS listed FROM seen WHERE position = {position} "
            f"AND count >= {minimum_count} ORDER BY count DESC, listed",
            name,
        )
        vocabulary = tuple(value for (value,) in listed)
        dtype = "int64" if is_integer else "string"
        found[position] = Categorical(name, dtype, vocabulary, minimum_count)
    database.query("DROP TABLE seen", "clearing up")
    return found


def _typed(database: Database) -> tuple[str, dict[int, bool]]:
    """SQL of a seen text as an integer, and whether all texts of a position are integers."""
    # The smallest integer stands for a missing one (schema.MISSING_INTEGER).
    number = "TRY_CAST(value AS BIGINT)"
    plain = f"CAST({number} AS VARCHAR) = value AND {number} > -9223372036854775808"
    integer = dict(
        database.query(
            f"SELECT position, bool_and(({plain}) IS TRUE) FROM seen GROUP BY position", "typing"
        )
    )
    return number, integer
