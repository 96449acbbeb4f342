"""What a schema takes from the training rows: vocabularies, and the statistics of numbers."""

import dataclasses
import math
from collections.abc import Sequence

from pwiser_tf.convert.csv_reader import Database
from pwiser_tf.convert.features import DEFAULT_MINIMUM_COUNT, Feature, Log
from pwiser_tf.convert.source import Features
from pwiser_tf.schema import UNKNOWN_INTEGER, Categorical, IdList, Numerical, Vector

# A feature whose dtype is not stated has integers where at least this share of its values does.
_INTEGER_SHARE = 0.9
# More columns in one scan would need more memory than the reader has.
_COLUMNS_A_SCAN = 64
# Boundaries of quantile buckets come from about this many rows.
_QUANTILE_ROWS = 500_000
_EXAMPLES = 3
# If most of the frequent texts hold one of these, they are likely lists.
_SEPARATORS, _LOOKED_AT = ("|", "\x02"), 1000
# The text of an integer: digits without leading zeros, for 007 and 7 may be two codes; and ".0", as
# pandas writes integers beside a gap.
INTEGER_PATTERN = r"-?(0|[1-9][0-9]*)(\.0*)?"


def of_log(database: Database, rows: str, log: Log) -> Features:
    """The features of a log.

    Args:
      rows: an SQL query of a relation's columns (see source.Part): the kept training rows.
    """
    categorical, lists = log.of_type("categorical"), log.of_type("list", "sequence")
    columns = [(f"categorical_{i}", False, f) for i, f in enumerate(categorical)]
    columns += [(f"list_{i}", True, f) for i, f in enumerate(lists)]
    known = vocabularies(database, rows, columns)
    found = Features(
        tuple(_categorical(feature, known) for feature in categorical),
        numbers(database, rows, log.of_type("numerical")),
        tuple(_id_list(feature, known) for feature in lists),
        _vectors(database, rows, log.of_type("vector")),
    )
    for feature in (*found.categorical, *found.lists):
        if feature.size == 1:
            database.warnings.append(
                f"feature {feature.name}: no value was seen {feature.minimum_count} times in "
                "training: all rows have id 0, and it contributes nothing"
            )
        elif feature.size == 2 and not feature.hash_buckets and feature in found.categorical:
            database.warnings.append(
                f"feature {feature.name}: training has one value, {feature.vocabulary[0]!r}"
            )
        for separator in _SEPARATORS if feature in found.categorical else ():
            like_lists = [v for v in feature.vocabulary[:_LOOKED_AT] if separator in str(v)]
            if len(like_lists) > len(feature.vocabulary[:_LOOKED_AT]) / 2:
                database.warnings.append(
                    f"feature {feature.name}: its values look like lists, as {like_lists[0]!r}: "
                    'each is one category. A feature file can state type = "list" and a separator'
                )
    return found


def typed(log: Log, known: Features) -> Log:
    """The log, with the dtypes of the known features: new data must not be guessed otherwise."""
    dtypes = {feature.name: feature.dtype for feature in (*known.categorical, *known.lists)}
    features = (
        dataclasses.replace(feature, dtype=dtypes.get(feature.name, feature.dtype))
        for feature in log.features
    )
    return dataclasses.replace(log, features=tuple(features))


def grown(old: Features, new: Features) -> Features:
    """The old features, whose vocabularies have the new values behind their own."""
    vocabularies: dict[str, range | tuple] = {}

    def grow(feature: Categorical, learnt: Categorical) -> Categorical:
        owner = feature.shares or feature.name
        if owner not in vocabularies:
            vocabulary = feature.vocabulary
            if not feature.hash_buckets:
                seen = set(vocabulary)
                more = tuple(value for value in learnt.vocabulary if value not in seen)
                vocabulary = (*vocabulary, *more) if more else vocabulary
            vocabularies[owner] = vocabulary
        return dataclasses.replace(feature, vocabulary=vocabularies[owner])

    return dataclasses.replace(
        old,
        categorical=tuple(map(grow, old.categorical, new.categorical)),
        lists=tuple(map(grow, old.lists, new.lists)),
    )


def _shared(feature: Feature, known: dict[str, Categorical]) -> dict:
    """The fields that a categorical feature and a list have."""
    own = known[feature.vocabulary or feature.name]
    return {
        "name": feature.name,
        "dtype": own.dtype,
        "vocabulary": own.vocabulary,
        "minimum_count": own.minimum_count,
        "hash_buckets": own.hash_buckets,
        "shares": feature.vocabulary,
    }


def _categorical(feature: Feature, known: dict[str, Categorical]) -> Categorical:
    return Categorical(**_shared(feature, known))


def _id_list(feature: Feature, known: dict[str, Categorical]) -> IdList:
    return IdList(
        **_shared(feature, known),
        kind=feature.type,
        max_length=feature.max_length,
        newest=feature.newest,
        weighted=feature.weighted,
    )


def vocabularies(
    database: Database, rows: str, columns: Sequence[tuple[str, bool, Feature]]
) -> dict[str, Categorical]:
    """The vocabulary of each feature that has its own, by its name.

    A vocabulary holds the values seen at least `min_count` times, in all features that share it,
    by falling count, then by value; `max_vocabulary` of them. Memory grows with the number of
    distinct values only.

    Args:
      columns: (the relation's column, whether it holds lists, the feature).
    """
    if not columns:
        return {}
    owners = [feature for _, _, feature in columns if not feature.vocabulary]
    position = {feature.name: k for k, feature in enumerate(owners)}
    database.query(
        "CREATE OR REPLACE TABLE seen (position INTEGER, value VARCHAR, count BIGINT)", "counting"
    )
    types = database.types(rows)
    at = {column: position[feature.vocabulary or feature.name] for column, _, feature in columns}
    # (the values of a row, their positions) of each scan.
    scans = [(column, str(at[column])) for column, is_list, _ in columns if is_list]
    scalars = [column for column, is_list, _ in columns if not is_list]
    # One array has one type.
    for kind in dict.fromkeys(types[column] for column in scalars):
        of_kind = [column for column in scalars if types[column] == kind]
        for start in range(0, len(of_kind), _COLUMNS_A_SCAN):
            chosen = of_kind[start : start + _COLUMNS_A_SCAN]
            positions = [at[column] for column in chosen]
            scans.append((f"[{', '.join(chosen)}]", f"unnest({positions})"))
    for values, positions in scans:
        database.query(
            "INSERT INTO seen SELECT position, CAST(value AS VARCHAR), count(*) FROM ("
            f"SELECT unnest({values}) AS value, {positions} AS position FROM ({rows})) "
            "WHERE value IS NOT NULL GROUP BY position, value",
            "counting values",
        )
    integer_shares = _integer_shares(database)
    found = {}
    for k, feature in enumerate(owners):
        dtype = feature.dtype or _guessed(database, feature.name, k, integer_shares.get(k))
        minimum = feature.min_count or DEFAULT_MINIMUM_COUNT
        if feature.hash_buckets:
            vocabulary, minimum = (), 1
        else:
            vocabulary = _listed(database, k, dtype, minimum, feature.max_vocabulary, feature.name)
        found[feature.name] = Categorical(
            feature.name, dtype, vocabulary, minimum, feature.hash_buckets or 0
        )
    database.query("DROP TABLE seen", "clearing up")
    return found


def integer(text: str) -> str:
    """SQL: a text as BIGINT where it is an integer ("18", "18.0"), otherwise NULL."""
    number = f"TRY_CAST({text} AS BIGINT)"
    # The two smallest integers stand for a missing and for an unknown value.
    return (
        f"CASE WHEN {number} > {UNKNOWN_INTEGER} AND (CAST({number} AS VARCHAR) = {text} OR "
        f"regexp_full_match({text}, '{INTEGER_PATTERN}')) THEN {number} END"
    )


def _integer_shares(database: Database) -> dict[int, tuple[int, int]]:
    """(occurrences of integers, occurrences) of each position."""
    found = database.query(
        f"SELECT position, sum(CASE WHEN ({integer('value')}) IS NULL THEN 0 ELSE count END), "
        "sum(count) FROM seen GROUP BY position",
        "typing",
    )
    return {position: (int(integers), int(total)) for position, integers, total in found}


def _guessed(database: Database, name: str, position: int, share: tuple[int, int] | None) -> str:
    """The dtype of a feature that states none; warns where its values are of two kinds."""
    integers, total = share or (0, 1)
    dtype = "int64" if integers >= _INTEGER_SHARE * total else "string"
    if total / 2 <= integers < total:
        examples = database.query(
            f"SELECT value, sum(count) AS total FROM seen WHERE position = {position} AND "
            f"({integer('value')}) IS NULL GROUP BY value ORDER BY total DESC, value "
            f"LIMIT {_EXAMPLES}",
            name,
        )
        shown = ", ".join(f"{value!r} ({count})" for value, count in examples)
        meaning, other = "they are unknown (id 0)", "string"
        if dtype == "string":
            meaning, other = "all are read as texts", "int64"
        database.warnings.append(
            f"feature {name}: {total - integers:,} of {total:,} values are no integers: {shown}; "
            f'{meaning}. A feature file can state dtype = "{other}"'
        )
    return dtype


def _listed(
    database: Database, position: int, dtype: str, minimum: int, most: int | None, label: str
) -> tuple:
    value = integer("value") if dtype == "int64" else "value"
    limit = f"LIMIT {most}" if most else ""
    listed = database.query(
        f"SELECT listed FROM (SELECT {value} AS listed, sum(count) AS total FROM seen WHERE "
        f"position = {position} GROUP BY listed) WHERE listed IS NOT NULL AND total >= {minimum} "
        f"ORDER BY total DESC, listed {limit}",
        label,
    )
    return tuple(value for (value,) in listed)


def numbers(database: Database, rows: str, features: Sequence[Feature]) -> tuple[Numerical, ...]:
    """The numerical features with their statistics; warns of constant ones. Arguments as above."""
    if not features:
        return ()
    aggregates = []
    for i, feature in enumerate(features):
        value = _number(i, feature)
        scaled = value
        if feature.transform == "log":
            scaled = f"sign({value}) * ln(1 + abs({value}))"
        aggregates += [f"avg({scaled})", f"stddev_pop({scaled})", f"min({value})", f"max({value})"]
    (values,) = database.query(f"SELECT {', '.join(aggregates)} FROM ({rows})", "scanning")
    made = []
    for i, feature in enumerate(features):
        mean, std, low, high = values[4 * i : 4 * i + 4]
        mean, std = settled(mean, std)
        shown = "no value" if low is None else f"{low:g} or no value"
        low, high = (0.0, 0.0) if low is None else (low, high)
        if low == high:
            database.warnings.append(
                f"feature {feature.name}: {shown} in every training row: it contributes nothing, "
                "whatever is served"
            )
        fill = math.copysign(math.expm1(abs(mean)), mean) if feature.transform == "log" else mean
        boundaries: tuple[float, ...] = ()
        if feature.transform == "quantiles":
            boundaries = _quantiles(database, rows, i, feature)
        made.append(
            Numerical(feature.name, feature.transform, mean, std, fill, low, high, boundaries)
        )
    return tuple(made)


def _number(i: int, feature: Feature) -> str:
    """SQL: a number as DOUBLE, clipped; NULL if it is missing, or what the writing pass refuses."""
    value = f"CASE WHEN isfinite(numerical_{i}) THEN CAST(numerical_{i} AS DOUBLE) END"
    if feature.clip:
        value = f"greatest(least({value}, {feature.clip[1]!r}), {feature.clip[0]!r})"
    return value


def _quantiles(database: Database, rows: str, i: int, feature: Feature) -> tuple[float, ...]:
    """The rising values at which buckets with about equally many rows begin, but the first."""
    sampled = (
        f"SELECT {_number(i, feature)} AS value FROM (SELECT numerical_{i}, "
        f"row_number() OVER () AS row, count(*) OVER () AS rows FROM ({rows})) "
        f"WHERE row % greatest(rows // {_QUANTILE_ROWS}, 1) = 0 AND isfinite(value)"
    )
    shares = [k / feature.buckets for k in range(1, feature.buckets)]
    ((values,),) = database.query(
        f"SELECT quantile_disc(value, {shares}) FROM ({sampled})", feature.name
    )
    return tuple(sorted(set(values or ())))


def _vectors(database: Database, rows: str, features: Sequence[Feature]) -> tuple[Vector, ...]:
    if not features:
        return ()
    aggregates = ", ".join(
        f"min(list_min(vector_{i})), max(list_max(vector_{i}))" for i in range(len(features))
    )
    (values,) = database.query(f"SELECT {aggregates} FROM ({rows})", "scanning")
    made = []
    for i, feature in enumerate(features):
        low, high = values[2 * i : 2 * i + 2]
        low, high = (0.0, 0.0) if low is None else (low, high)
        if feature.clip:
            low, high = max(low, feature.clip[0]), min(high, feature.clip[1])
        made.append(Vector(feature.name, feature.length, low, high))
    return tuple(made)


def bounds(database: Database, rows: str, columns: int) -> list[tuple[int | None, int | None]]:
    """The least and the greatest of `categorical_0 ..`, which are BIGINT; None without a value.

    Args:
      rows: an SQL query.
      columns: their number.
    """
    aggregates = [f"{f}(categorical_{i})" for f in ("min", "max") for i in range(columns)]
    (values,) = database.query(f"SELECT {', '.join(aggregates)} FROM ({rows})", "scanning")
    return list(zip(values[:columns], values[columns:], strict=True))


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
