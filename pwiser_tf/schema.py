"""Schema: the features, vocabularies, statistics, labels and splits of a data set.

The converter writes it as `schema.json` beside the records; training, evaluation, export and the
served graph read it. Everything in it comes from the training split. The rules that turn a raw
value into what a model sees are here, once for NumPy (`Categorical.ids`, `Numerical.apply`,
`Numerical.buckets`); `layers.RawFeatures` states the same rules as a graph, and a test holds the
two together.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib

import farmhash
import numpy as np
import pandas as pd

from pwiser_tf.errors import DataError

FORMAT_VERSION = 2
FILE_NAME = "schema.json"
VOCABULARY_FOLDER = "vocabularies"
SPLITS = ("train", "validation", "test")
TRANSFORMS = ("standardize", "log", "identity", "quantiles")

# The id of every value that the vocabulary does not hold: unknown, rare, missing, negative.
OUT_OF_VOCABULARY = 0
# How a missing value is written where the raw type has no other way: integers have no NaN.
MISSING_INTEGER = -(2**63)
# Stands in a list for what is no integer: a value, with id 0, where a missing one is none.
UNKNOWN_INTEGER = MISSING_INTEGER + 1
MISSING_STRING = ""


def missing_value(dtype: str) -> int | str:
    """How a missing value of a raw type, "int64" or "string", is written."""
    return MISSING_INTEGER if dtype == "int64" else MISSING_STRING


@dataclasses.dataclass(frozen=True)
class Categorical:
    """A categorical feature. The value at position k of its vocabulary has id k + 1.

    Attributes:
      name: the feature's name.
      dtype: "int64" or "string", the type of a raw value.
      vocabulary: the known values: a range (integers from 0), or a tuple of integers or strings.
      minimum_count: a value seen fewer times than this in the training split was left out.
      hash_buckets: above 0, ids are hashes in 1..hash_buckets, and there is no vocabulary.
      shares: the feature whose vocabulary, and embeddings, this one uses; None: its own.
    """

    name: str
    dtype: str
    vocabulary: range | tuple
    minimum_count: int = 1
    hash_buckets: int = 0
    shares: str | None = None

    @property
    def size(self) -> int:
        """The number of ids, id 0 included: the rows of an embedding table."""
        return (self.hash_buckets or len(self.vocabulary)) + 1

    def texts(self) -> list[str]:
        """What stands for each id, for tables."""
        known = map(str, self.vocabulary)
        if self.hash_buckets:
            known = (f"bucket {k}" for k in range(1, self.size))
        return ["(unknown)", *known]

    @functools.cached_property
    def _index(self) -> pd.Index:
        return pd.Index(self.vocabulary, dtype="int64" if self.dtype == "int64" else object)

    def ids(self, values: np.ndarray) -> np.ndarray:
        """Raw values [batch] (int64, or objects that are str or None) to ids, int64 [batch].

        A hash is FarmHash's Fingerprint64 of the text (of an integer: in decimal), which
        TensorFlow computes as tf.strings.to_hash_bucket_fast, and BigQuery as FARM_FINGERPRINT.
        """
        if self.hash_buckets:
            without = (None, MISSING_STRING, MISSING_INTEGER, UNKNOWN_INTEGER)
            hashed = (
                OUT_OF_VOCABULARY
                if value in without
                else farmhash.fingerprint64(str(value)) % self.hash_buckets + 1
                for value in np.asarray(values).tolist()
            )
            return np.fromiter(hashed, np.int64, len(values))
        if isinstance(self.vocabulary, range):
            values = np.asarray(values, np.int64)
            known = (values >= 0) & (values < len(self.vocabulary))
            return np.where(known, values + 1, OUT_OF_VOCABULARY)
        return self._index.get_indexer(values).astype(np.int64) + 1


@dataclasses.dataclass(frozen=True)
class IdList(Categorical):
    """A list (a bag of ids) or a sequence (ids in time order); a value has an id as above.

    Attributes:
      kind: "list" or "sequence".
      max_length: the number of values that are kept.
      newest: which end of a sequence is the newest, "first" or "last": that end is kept. Of a
        list the first ones are kept.
      weighted: whether each value has a weight.
    """

    kind: str = "list"
    max_length: int = 50
    newest: str = "first"
    weighted: bool = False


@dataclasses.dataclass(frozen=True)
class Numerical:
    """A number: fill what is missing, clip, transform.

    standardize, identity: (value - offset) / scale, in float64, then float32. log: the same of
    sign(value) log(1 + |value|). quantiles: the id of its bucket, see `buckets`.

    Attributes:
      name: the feature's name.
      transform: one of TRANSFORMS.
      mean, std: of the (for log: logarithmic) values of the training split that are not missing.
      fill_value: replaces a missing (NaN) or infinite value, in raw units.
      low, high: smaller and greater values count as these, in raw units: the range of the
        training split, so that no served number moves a prediction out of what was learnt. NaN
        in a schema of format 1: no bounds.
      boundaries: for quantiles, the rising raw values at which a bucket begins.
    """

    name: str
    transform: str
    mean: float
    std: float
    fill_value: float
    low: float = math.nan
    high: float = math.nan
    boundaries: tuple[float, ...] = ()

    @property
    def offset(self) -> float:
        """What is subtracted from the clipped value, after its logarithm."""
        return 0.0 if self.transform == "identity" else self.mean

    @property
    def scale(self) -> float:
        """What the difference is divided by."""
        return self.std if self.transform != "identity" and np.float32(self.std) > 0 else 1.0

    def clean(self, values: np.ndarray) -> np.ndarray:
        """Raw values [batch], filled and clipped, float64 of float32 precision, as servers have."""
        values = _normal(values).astype(np.float64)
        values = np.where(np.isfinite(values), values, np.float32(self.fill_value))
        if not math.isnan(self.low):
            values = np.clip(values, np.float32(self.low), np.float32(self.high))
        return values

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Raw values [batch], NaN where missing, to model inputs, float32 [batch]."""
        values = self.clean(values)
        if self.transform == "log":
            values = _log(values)
        return ((values - self.offset) / self.scale).astype(np.float32)

    def buckets(self, values: np.ndarray) -> np.ndarray:
        """Raw values [batch] to ids of buckets, int64 [batch]; missing ones have id 0."""
        values = _normal(values)
        bucket = np.searchsorted(_normal(self.boundaries), values, side="right") + 1
        return np.where(np.isfinite(values), bucket, OUT_OF_VOCABULARY)

    @property
    def size(self) -> int:
        """The number of bucket ids, id 0 included."""
        return len(self.boundaries) + 2


@dataclasses.dataclass(frozen=True)
class Vector:
    """An array of `length` floats, in the numerical array as they are; clipped as numbers are."""

    name: str
    length: int
    low: float = math.nan
    high: float = math.nan
    fill_value: float = 0.0

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Raw values [batch, length], NaN where missing, to model inputs, float32."""
        values = np.asarray(values, np.float32)
        values = np.where(np.isfinite(values), values, np.float32(self.fill_value))
        return values if math.isnan(self.low) else np.clip(values, self.low, self.high)


@dataclasses.dataclass(frozen=True)
class Shard:
    """One TFRecord file: its name, its rows and bytes, and the CRC32C of its content (None in a
    schema that was written before checksums were)."""

    file: str
    rows: int
    bytes: int
    crc32c: int | None = None


@dataclasses.dataclass(frozen=True)
class Split:
    """One split: its counts and files. `dropped` rows had a conversion without a click."""

    rows: int
    clicks: int
    conversions: int
    dropped: int
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True)
class Schema:
    """A data set. See the module's text; `load` and `save` are its JSON form.

    Attributes:
      dataset: where it came from: "aliccp", "aliexpress" or "columns".
      categorical, numerical: the features with one value a row, in the order of the log.
      click, conversion: the label columns' names in the raw data; no conversion: CTR only.
      group: the raw column of the group (search or session), or None.
      lists: the features with many ids a row. vectors: those with an array of floats a row.
      weight: the raw column of the row weights, or None.
      segments: raw column to its values, for metrics by segment.
      source: what the converter needs to read more such data (`convert --schema`).
      splits: name ("train", "validation", "test") to Split; one without rows is absent.
      coverage: feature to split to the shares of its values that are missing, unknown, and (of a
        list) cut.
      notes: how the data set was made (split rule, seed, and the like), for readers.
    """

    dataset: str
    categorical: tuple[Categorical, ...]
    numerical: tuple[Numerical, ...]
    click: str
    conversion: str | None
    group: str | None
    lists: tuple[IdList, ...] = ()
    vectors: tuple[Vector, ...] = ()
    weight: str | None = None
    segments: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    source: dict = dataclasses.field(default_factory=dict)
    splits: dict[str, Split] = dataclasses.field(default_factory=dict)
    coverage: dict[str, dict[str, list[float]]] = dataclasses.field(default_factory=dict)
    notes: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def id_features(self) -> tuple[Categorical | Numerical, ...]:
        """The columns of the record's categorical array: categories, then numbers in buckets."""
        return (*self.categorical, *(f for f in self.numerical if f.transform == "quantiles"))

    @property
    def value_features(self) -> tuple[Numerical, ...]:
        """The first columns of the record's numerical array, which the vectors follow."""
        return tuple(f for f in self.numerical if f.transform != "quantiles")

    @property
    def numerical_width(self) -> int:
        """The columns of the record's numerical array."""
        return len(self.value_features) + sum(vector.length for vector in self.vectors)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all that a model depends on: features, vocabularies, transforms, labels.

        Two data sets that share it can be encoded for, and evaluated with, one model.
        """
        parts = [self.click, self.conversion, bool(self.group)]
        for feature in self.categorical:
            parts.append([feature.name, feature.dtype, _vocabulary_json(feature.vocabulary)])
            if feature.hash_buckets or feature.shares:
                parts[-1] += [feature.hash_buckets, feature.shares]
        for feature in self.numerical:
            values = dataclasses.astuple(feature)
            # As format 1 had it, where there is nothing new.
            parts.append(values[:5] if math.isnan(feature.low) else values)
        for feature in self.lists:
            values = [_vocabulary_json(feature.vocabulary), feature.hash_buckets, feature.shares]
            parts.append([feature.name, feature.dtype, *values])
            parts[-1] += [feature.kind, feature.max_length, feature.newest, feature.weighted]
        for feature in self.vectors:
            parts.append(dataclasses.astuple(feature))
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @functools.cached_property
    def data_fingerprint(self) -> str:
        """A hash of the features and of every split's rows: two that share it are one data set."""
        splits = {name: dataclasses.astuple(split) for name, split in sorted(self.splits.items())}
        return hashlib.sha256(json.dumps([self.fingerprint, splits]).encode()).hexdigest()[:16]

    def split(self, name: str) -> Split:
        """The split of that name; DataError where the data set has none."""
        if name not in self.splits:
            have = ", ".join(self.splits) or "none"
            raise DataError(f"the data set has no {name} split; it has: {have}")
        return self.splits[name]

    def save(self, folder: str | os.PathLike) -> None:
        """Writes schema.json and the vocabulary files into the folder, which must exist."""
        folder = pathlib.Path(folder)
        content = {
            "format_version": FORMAT_VERSION,
            "dataset": self.dataset,
            "fingerprint": self.fingerprint,
            "notes": self.notes,
            "labels": {"click": self.click, "conversion": self.conversion},
            "group": self.group,
            "weight": self.weight,
            "segments": {name: list(values) for name, values in self.segments.items()},
            "out_of_vocabulary": {
                "id": OUT_OF_VOCABULARY,
                "rule": "the value at line k of a vocabulary (from 0), or the integer k, has id "
                "k + 1; unknown, rare, missing and negative values have id 0",
            },
            "categorical": [
                _save_categorical(feature, folder, f"{position:03d}")
                for position, feature in enumerate(self.categorical)
            ],
            "lists": [
                _save_categorical(feature, folder, f"list-{position:03d}")
                for position, feature in enumerate(self.lists)
            ],
            "numerical": [_without_nan(dataclasses.asdict(each)) for each in self.numerical],
            "vectors": [_without_nan(dataclasses.asdict(each)) for each in self.vectors],
            "source": self.source,
            "splits": {name: dataclasses.asdict(split) for name, split in self.splits.items()},
            "coverage": self.coverage,
        }
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Schema":
        """Reads what `save` wrote, in this format or the one before.

        Raises:
          DataError: a file is missing, or is not what `save` wrote.
          OSError: a file cannot be read.
        """
        folder = pathlib.Path(folder)
        path = folder / FILE_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content["format_version"]
            if version not in (1, FORMAT_VERSION):
                raise DataError(f"format version {FORMAT_VERSION} or 1", file=path, found=version)
            vocabularies: dict[str, range | tuple] = {}
            categorical = tuple(
                _load_categorical(Categorical, entry, folder, vocabularies)
                for entry in content["categorical"]
            )
            schema = cls(
                dataset=content["dataset"],
                categorical=categorical,
                numerical=tuple(_load(Numerical, entry) for entry in content["numerical"]),
                click=content["labels"]["click"],
                conversion=content["labels"]["conversion"],
                group=content["group"],
                lists=tuple(
                    _load_categorical(IdList, entry, folder, vocabularies)
                    for entry in content.get("lists", [])
                ),
                vectors=tuple(_load(Vector, entry) for entry in content.get("vectors", [])),
                weight=content.get("weight"),
                segments={name: tuple(v) for name, v in content.get("segments", {}).items()},
                source=content.get("source", {}),
                coverage=content.get("coverage", {}),
                splits={
                    name: Split(**{**entry, "shards": tuple(Shard(**s) for s in entry["shards"])})
                    for name, entry in content["splits"].items()
                },
                notes=content["notes"],
            )
            fingerprint = content["fingerprint"]
        except FileNotFoundError as error:
            raise DataError("no such file; pwiser convert writes it", file=error.filename) from None
        except DataError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            detail = f"{type(error).__name__}: {error}"
            raise DataError(
                f"not a schema written by the converter ({detail})", file=path
            ) from None
        if fingerprint != schema.fingerprint:
            raise DataError(
                "features and vocabularies as written by the converter: a file was changed or "
                "belongs to another data set",
                file=path,
                found=f"fingerprint {fingerprint}, computed {schema.fingerprint}",
            )
        return schema


def _normal(values) -> np.ndarray:
    """Float32, as TensorFlow computes with it: what is closer to 0 than a normal number is 0."""
    values = np.asarray(values, np.float32)
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.float32(0), values)


def _log(values):
    """The logarithm that numbers of both signs have: sign(x) log(1 + |x|)."""
    return np.sign(values) * np.log1p(np.abs(values))


def _vocabulary_json(vocabulary: range | tuple) -> list:
    return ["below", len(vocabulary)] if isinstance(vocabulary, range) else list(vocabulary)


def _without_nan(entry: dict) -> dict:
    """JSON has no NaN: such an attribute has its default, and is left out."""
    return {name: value for name, value in entry.items() if value == value}


def _load(cls, entry: dict):
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()})


def _save_categorical(feature: Categorical, folder: pathlib.Path, file: str) -> dict:
    """A feature's JSON; writes its vocabulary file, where it has one of its own."""
    # Not asdict, which copies each value of a vocabulary.
    entry = {field.name: getattr(feature, field.name) for field in dataclasses.fields(feature)}
    if feature.shares or feature.hash_buckets:
        del entry["vocabulary"]
    elif isinstance(feature.vocabulary, range):
        entry["vocabulary"] = {"integers_below": len(feature.vocabulary)}
    else:
        # One JSON value a line, so that no value, however odd, can break a line.
        file = f"{VOCABULARY_FOLDER}/{file}.jsonl"
        (folder / VOCABULARY_FOLDER).mkdir(exist_ok=True)
        values = json.dumps(feature.vocabulary, ensure_ascii=False, separators=("\n", ":"))[1:-1]
        (folder / file).write_text(values + "\n" * bool(values), encoding="utf-8")
        entry["vocabulary"] = {"file": file, "count": len(feature.vocabulary)}
    return entry


def _load_categorical(cls, entry: dict, folder: pathlib.Path, vocabularies: dict):
    """A feature from its JSON; `vocabularies` holds those of the features loaded before it."""
    source = entry.get("vocabulary", {})
    if entry.get("shares"):
        vocabulary = vocabularies[entry["shares"]]
    elif "integers_below" in source:
        vocabulary = range(source["integers_below"])
    elif "file" in source:
        text = (folder / source["file"]).read_text(encoding="utf-8")
        # Not splitlines(): that also splits at characters which JSON leaves as they are.
        values = ",".join(line for line in text.split("\n") if line)
        vocabulary = tuple(json.loads(f"[{values}]"))
        if len(vocabulary) != source["count"]:
            raise DataError(
                f"{source['count']} values", file=folder / source["file"], found=len(vocabulary)
            )
    elif entry["hash_buckets"]:
        vocabulary = ()
    else:
        raise ValueError(f"feature {entry['name']} has no vocabulary")
    vocabularies[entry["name"]] = vocabulary
    return cls(**{**entry, "vocabulary": vocabulary})
