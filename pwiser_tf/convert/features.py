"""What a log holds: its labels, its columns, its features. Read from a TOML file or from flags.

    [labels]
    click = "clicked"
    conversion = "bought"
    [features.item]
    type = "categorical"

docs/reference/features.md lists every key.
"""

import dataclasses
import os
import pathlib
import tomllib
import types
import typing
from collections.abc import Sequence

from pwiser_tf.errors import DataError
from pwiser_tf.schema import TRANSFORMS

TYPES = ("categorical", "list", "sequence", "numerical", "vector")
SIDES = ("user", "candidate", "context")
CONVERSIONS_WITHOUT_CLICK = ("drop", "click", "exposure", "refuse")
# What stands for a missing value in files of pandas, R, SQL, Hive and spreadsheets.
MISSING_MARKS = ("", "NA", "N/A", "NaN", "nan", "NULL", "null", "None", r"\N")
DEFAULT_MINIMUM_COUNT = 2

_OF_IDS = ("dtype", "min_count", "max_vocabulary", "hash_buckets", "vocabulary")
_OF_LISTS = (*_OF_IDS, "separator", "weight_separator", "weights", "max_length")
# The keys of each type, besides those of all.
_KEYS = {
    "categorical": _OF_IDS,
    "list": _OF_LISTS,
    "sequence": (*_OF_LISTS, "newest"),
    "numerical": ("transform", "buckets", "clip"),
    "vector": ("length", "separator", "clip"),
}
_KEYS_OF_ALL = ("column", "type", "side")
_CHOICES = {
    "type": TYPES,
    "side": SIDES,
    "dtype": ("int64", "string"),
    "newest": ("first", "last"),
    "transform": TRANSFORMS,
    "conversion_without_click": CONVERSIONS_WITHOUT_CLICK,
}
_POSITIVE = ("min_count", "max_vocabulary", "hash_buckets", "max_length", "length", "buckets")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feature:
    """A feature of a log, as the feature file states it; docs/reference/features.md.

    Attributes:
      name: the feature's. column: the raw column.
      type: one of TYPES. side: one of SIDES.
      dtype: "int64" or "string"; None: guessed from the values.
      min_count: a value seen fewer times in training has id 0; None: DEFAULT_MINIMUM_COUNT.
      max_vocabulary: the most values that are kept, the frequent ones; None: all.
      hash_buckets: ids are hashes in so many buckets; None: a vocabulary.
      vocabulary: the feature whose vocabulary is used too.
      separator: between the values of a text; None: the file has lists.
      weight_separator: between a value and its weight. weights: the column of a list's weights.
      max_length: the number of values kept. newest: the end of a sequence that is kept.
      transform: one of TRANSFORMS. buckets: of quantiles. clip: least and greatest value.
      length: of a vector.
    """

    name: str
    column: str = ""
    type: str = "categorical"
    side: str = "candidate"
    dtype: str | None = None
    min_count: int | None = None
    max_vocabulary: int | None = None
    hash_buckets: int | None = None
    vocabulary: str | None = None
    separator: str | None = None
    weight_separator: str | None = None
    weights: str | None = None
    max_length: int = 50
    newest: str = "first"
    transform: str = "standardize"
    buckets: int = 32
    clip: tuple[float, ...] | None = None
    length: int | None = None

    def __post_init__(self):
        if not self.column:
            object.__setattr__(self, "column", self.name)

    @property
    def weighted(self) -> bool:
        """Whether each value of the list has a weight."""
        return bool(self.weight_separator or self.weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log:
    """What a log holds.

    Attributes:
      features: in order.
      click, conversion: the label columns; no conversion: CTR only.
      weight: a column of row weights. conversion_without_click: what such a row becomes.
      group, time: columns, or None. segments: columns kept for metrics by segment.
      missing: the texts that stand for a missing value.
    """

    features: tuple[Feature, ...]
    click: str
    conversion: str | None = None
    weight: str | None = None
    conversion_without_click: str = "drop"
    group: str | None = None
    time: str | None = None
    segments: tuple[str, ...] = ()
    missing: tuple[str, ...] = MISSING_MARKS

    def of_type(self, *types: str) -> tuple[Feature, ...]:
        """The features of those types."""
        return tuple(feature for feature in self.features if feature.type in types)

    def to_json(self) -> dict:
        """What `from_json` reads; it stands in schema.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: dict) -> "Log":
        """The log that `to_json` wrote."""
        features = tuple(Feature(**_tuples(feature)) for feature in content["features"])
        return cls(**{**_tuples(content), "features": features})


def _tuples(content: dict) -> dict:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in content.items()}


_TABLES = {
    "labels": ("click", "conversion", "weight", "conversion_without_click"),
    "columns": ("group", "time", "segments", "missing"),
}


def read(path: str | os.PathLike) -> Log:
    """Reads a feature file.

    Raises:
      DataError: it is not TOML, or a key is unknown, of the wrong type, or impossible beside the
        others; the message names file, table and key.
      OSError: it cannot be read.
    """
    path = pathlib.Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"expected a feature file in TOML ({error})", file=path) from None
    _check_keys(content, (*_TABLES, "features"), path, "the top level")
    values = {}
    for table, keys in _TABLES.items():
        given = content.get(table, {})
        _check_keys(given, keys, path, f"[{table}]")
        values |= {key: _value(Log, key, value, path, f"[{table}]") for key, value in given.items()}
    if "click" not in values:
        raise DataError("table [labels], key click: expected a column's name", file=path)
    features = []
    for name, given in content.get("features", {}).items():
        where = f"[features.{name}]"
        _check_keys(given, (*_KEYS_OF_ALL, *dict.fromkeys(sum(_KEYS.values(), ()))), path, where)
        stated = {key: _value(Feature, key, value, path, where) for key, value in given.items()}
        features.append(Feature(name=name, **stated))
    log = Log(features=tuple(features), **values)
    _check(log, path, {name: set(keys) for name, keys in content.get("features", {}).items()})
    return log


def from_flags(
    *,
    categorical: Sequence[str],
    numerical: Sequence[str],
    click: str,
    conversion: str | None,
    group: str | None = None,
    time: str | None = None,
    missing: Sequence[str] = MISSING_MARKS,
    min_count: int | None = None,
) -> Log:
    """The log that the short flags describe; DataError where they contradict each other."""
    features = [Feature(name=name, min_count=min_count) for name in categorical]
    features += [Feature(name=name, type="numerical") for name in numerical]
    log = Log(
        features=tuple(features),
        click=click,
        conversion=conversion or None,
        group=group or None,
        time=time or None,
        missing=tuple(missing),
    )
    _check(log, None, {})
    return log


def _check_keys(given, known: Sequence[str], path: pathlib.Path, where: str) -> None:
    if not isinstance(given, dict):
        raise DataError(f"{where}: expected a table", file=path)
    for key in given:
        if key not in known:
            raise DataError(
                f"table {where}, key {key}: unknown; expected one of {', '.join(known)}", file=path
            )


def _value(cls, key: str, value, path: pathlib.Path, where: str):
    """A key's value, of its type; DataError where it is of another, or none of the choices."""
    annotation = next(f.type for f in dataclasses.fields(cls) if f.name == key)
    kinds = (
        typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    )
    kind = typing.get_origin(kinds[0]) or kinds[0]

    def refuse(expected: str):
        raise DataError(
            f"table {where}, key {key}: found {value!r}, expected {expected}", file=path
        )

    if kind is tuple:
        element = typing.get_args(kinds[0])[0]
        allowed = (int, float) if element is float else (element,)
        if not isinstance(value, list) or not all(type(item) in allowed for item in value):
            refuse("a list of numbers" if element is float else "a list of texts")
        return tuple(map(element, value))
    if type(value) is not kind:
        refuse({"str": "a text", "int": "an integer"}[kind.__name__])
    if value == "":
        refuse("a text that is not empty")
    if key in _CHOICES and value not in _CHOICES[key]:
        refuse(f"one of {', '.join(_CHOICES[key])}")
    if key in _POSITIVE and value < 1:
        refuse("at least 1")
    return value


def _check(log: Log, path: pathlib.Path | None, stated: dict[str, set[str]]) -> None:
    """Refuses what does not go together."""

    def refuse(feature: Feature, key: str, message: str):
        place = f"table [features.{feature.name}], key {key}: " if path else ""
        raise DataError(f"{place}{message}", file=path)

    if not log.features:
        raise DataError("expected at least one feature", file=path)
    if not log.missing:
        raise DataError('missing: expected at least one text ("" is an empty cell)', file=path)
    names = [feature.name for feature in log.features]
    by_name = {feature.name: feature for feature in log.features}
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"feature {name} is named twice", file=path)
        if "/" in name or name.endswith(".weights"):
            raise DataError(
                f'feature {name}: "/" and ".weights" stand in names of records and signatures; '
                "state another name, and the column",
                file=path,
            )
    for label, column in (("click", log.click), ("conversion", log.conversion)):
        for feature in log.features:
            if column and feature.column == column:
                refuse(
                    feature,
                    "column",
                    f"{column} is the label of a {label}: a model that reads "
                    "it learns nothing else",
                )
    if log.click == log.conversion:
        raise DataError(f"click and conversion are both column {log.click}", file=path)
    for feature in log.features:
        for key in stated.get(feature.name, set()) - {*_KEYS_OF_ALL, *_KEYS[feature.type]}:
            refuse(feature, key, f"not for type {feature.type}")
        if feature.hash_buckets:
            for key in ("min_count", "max_vocabulary", "vocabulary"):
                if getattr(feature, key) and key in stated.get(feature.name, ()):
                    refuse(feature, key, "impossible beside hash_buckets: there is no vocabulary")
        if feature.vocabulary:
            owner = by_name.get(feature.vocabulary)
            if owner is None or owner.type not in ("categorical", "list", "sequence"):
                refuse(feature, "vocabulary", f"{feature.vocabulary} is no feature with ids")
            if owner.vocabulary:
                refuse(
                    feature,
                    "vocabulary",
                    f"{owner.name} itself uses that of {owner.vocabulary}: name that one",
                )
            if owner.type != "categorical" and feature.type == "categorical":
                refuse(feature, "vocabulary", f"let {owner.name} use that of {feature.name}")
            for key in ("dtype", "min_count", "max_vocabulary"):
                if key in stated.get(feature.name, ()):
                    refuse(feature, key, f"state it for {owner.name}, whose vocabulary this is")
        if feature.weight_separator and not feature.separator:
            refuse(feature, "weight_separator", "needs a separator between the values too")
        if feature.weight_separator and feature.weights:
            refuse(feature, "weights", "impossible beside weight_separator")
        if feature.type == "vector" and not feature.length:
            refuse(feature, "length", "expected the number of floats of a vector")
        if "buckets" in stated.get(feature.name, ()) and feature.transform != "quantiles":
            refuse(feature, "buckets", 'goes with transform = "quantiles"')
        if feature.clip and (len(feature.clip) != 2 or not feature.clip[0] < feature.clip[1]):
            refuse(feature, "clip", "expected [least, greatest]")
