"""Schema: the features, vocabularies, numeric statistics, labels and splits of a data set.

The converter writes it as `schema.json` next to the records. Training, evaluation, export and the
served graph read it. Vocabularies and statistics come only from the training split. This module
defines how a raw value becomes a model input, in NumPy (`Categorical.ids`, `Numerical.apply`).
`layers.RawFeatures` implements the same rules as a TensorFlow graph; a test compares the two.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib

import numpy as np
import pandas as pd

from pwiser_tf.errors import DataError

FORMAT_VERSION = 1
FILE_NAME = "schema.json"
VOCABULARY_FOLDER = "vocabularies"
SPLITS = ("train", "validation", "test")

# The id of every value that is not in the vocabulary: unknown, rare, missing, negative.
OUT_OF_VOCABULARY = 0
# The missing value of raw types that have no NaN.
MISSING_INTEGER = -(2**63)
MISSING_STRING = ""


@dataclasses.dataclass(frozen=True)
class Categorical:
    """A categorical feature. The value at position k of its vocabulary has id k + 1.

    Attributes:
      name: the raw column.
      dtype: "int64" or "string", the type of a raw value.
      vocabulary: the known values: a range (integers from 0), or a tuple of integers or strings.
      minimum_count: a value seen fewer times than this in the training split was left out.
    """

    name: str
    dtype: str
    vocabulary: range | tuple
    minimum_count: int = 1

    @property
    def size(self) -> int:
        """The number of ids, including id 0: the rows of an embedding table."""
        return len(self.vocabulary) + 1

    @functools.cached_property
    def _index(self) -> pd.Index:
        return pd.Index(self.vocabulary, dtype="int64" if self.dtype == "int64" else object)

    def ids(self, values: np.ndarray) -> np.ndarray:
        """Maps raw values [batch] (int64, or str and None as objects) to ids, int64 [batch]."""
        if isinstance(self.vocabulary, range):
            values = np.asarray(values, np.int64)
            known = (values >= 0) & (values < len(self.vocabulary))
            return np.where(known, values + 1, OUT_OF_VOCABULARY)
        return self._index.get_indexer(values).astype(np.int64) + 1


@dataclasses.dataclass(frozen=True)
class Numerical:
    """A numerical feature: missing values are filled, then (value - offset) / scale in float32.

    Attributes:
      name: the raw column.
      transform: "identity", or "standardize" (offset = mean, scale = std, or 1 if std is 0).
      mean, std: of the non-missing values of the training split, in raw units.
      fill_value: replaces a missing (NaN) or infinite value, in raw units.
    """

    name: str
    transform: str
    mean: float
    std: float
    fill_value: float

    @property
    def offset(self) -> np.float32:
        return np.float32(self.mean if self.transform == "standardize" else 0.0)

    @property
    def scale(self) -> np.float32:
        standardized = self.transform == "standardize" and np.float32(self.std) > 0
        return np.float32(self.std if standardized else 1.0)

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Raw values [batch], NaN where missing, to model inputs, float32 [batch]."""
        values = np.asarray(values, np.float32)
        values = np.where(np.isfinite(values), values, np.float32(self.fill_value))
        return (values - self.offset) / self.scale


@dataclasses.dataclass(frozen=True)
class Shard:
    """One TFRecord file: its name, its rows and bytes, and the CRC32C of its content (None in
    schemas written before checksums were added)."""

    file: str
    rows: int
    bytes: int
    crc32c: int | None = None


@dataclasses.dataclass(frozen=True)
class Split:
    """One split: its counts and files. `dropped` counts rows with a conversion but no click."""

    rows: int
    clicks: int
    conversions: int
    dropped: int
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True)
class Schema:
    """A data set; see the module docstring. `save` writes it as JSON, `load` reads it.

    Attributes:
      dataset: the raw format: "aliccp", "aliexpress" or "columns".
      categorical, numerical: the features, in the order of the record's arrays.
      click, conversion: the label columns' names in the raw data.
      group: the raw column of the group (search or session), or None.
      splits: name ("train", "validation", "test") to Split; a split without rows is absent.
      notes: how the data set was made (split rule, seed and so on), for human readers.
    """

    dataset: str
    categorical: tuple[Categorical, ...]
    numerical: tuple[Numerical, ...]
    click: str
    conversion: str
    group: str | None
    splits: dict[str, Split] = dataclasses.field(default_factory=dict)
    notes: dict[str, str] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of everything that a model depends on: features, vocabularies, transforms, labels.

        One model can be used on all data sets with the same hash.
        """
        parts = [self.click, self.conversion, bool(self.group)]
        for feature in self.categorical:
            parts.append([feature.name, feature.dtype, _vocabulary_json(feature.vocabulary)])
        for feature in self.numerical:
            parts.append(dataclasses.astuple(feature))
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @functools.cached_property
    def data_fingerprint(self) -> str:
        """A hash of the features and the rows of every split: equal for equal data sets only."""
        splits = {name: dataclasses.astuple(split) for name, split in sorted(self.splits.items())}
        return hashlib.sha256(json.dumps([self.fingerprint, splits]).encode()).hexdigest()[:16]

    def split(self, name: str) -> Split:
        """The split with this name; DataError if the data set does not have it."""
        if name not in self.splits:
            have = ", ".join(self.splits) or "none"
            raise DataError(f"the data set has no {name} split; it has: {have}")
        return self.splits[name]

    def save(self, folder: str | os.PathLike) -> None:
        """Writes schema.json and the vocabulary files into the folder, which must exist."""
        folder = pathlib.Path(folder)
        categorical = []
        for position, feature in enumerate(self.categorical):
            entry = {"name": feature.name, "dtype": feature.dtype}
            if isinstance(feature.vocabulary, range):
                entry["vocabulary"] = {"integers_below": len(feature.vocabulary)}
            else:
                # One JSON value per line: JSON escapes line breaks inside a value.
                file = f"{VOCABULARY_FOLDER}/{position:03d}.jsonl"
                (folder / VOCABULARY_FOLDER).mkdir(exist_ok=True)
                lines = (json.dumps(value, ensure_ascii=False) for value in feature.vocabulary)
                text = "".join(line + "\n" for line in lines)
                (folder / file).write_text(text, encoding="utf-8")
                entry["vocabulary"] = {"file": file, "count": len(feature.vocabulary)}
            entry["minimum_count"] = feature.minimum_count
            categorical.append(entry)
        content = {
            "format_version": FORMAT_VERSION,
            "dataset": self.dataset,
            "fingerprint": self.fingerprint,
            "notes": self.notes,
            "labels": {"click": self.click, "conversion": self.conversion},
            "group": self.group,
            "out_of_vocabulary": {
                "id": OUT_OF_VOCABULARY,
                "rule": "the value at line k of a vocabulary (from 0), or the integer k, has id "
                "k + 1; unknown, rare, missing and negative values have id 0",
            },
            "categorical": categorical,
            "numerical": [dataclasses.asdict(feature) for feature in self.numerical],
            "splits": {name: dataclasses.asdict(split) for name, split in self.splits.items()},
        }
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Schema":
        """Reads a folder's schema.json; DataError names the file if it is missing or wrong."""
        folder = pathlib.Path(folder)
        path = folder / FILE_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content["format_version"]
            if version != FORMAT_VERSION:
                raise DataError(f"format version {FORMAT_VERSION}", file=path, found=version)
            schema = cls(
                dataset=content["dataset"],
                categorical=tuple(_load_categorical(e, folder) for e in content["categorical"]),
                numerical=tuple(Numerical(**entry) for entry in content["numerical"]),
                click=content["labels"]["click"],
                conversion=content["labels"]["conversion"],
                group=content["group"],
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
                "both to be equal: a file was changed or belongs to another data set",
                file=path,
                found=f"fingerprint {fingerprint}, computed {schema.fingerprint}",
            )
        return schema


def _vocabulary_json(vocabulary: range | tuple) -> list:
    return ["below", len(vocabulary)] if isinstance(vocabulary, range) else list(vocabulary)


def _load_categorical(entry: dict, folder: pathlib.Path) -> Categorical:
    source = entry["vocabulary"]
    if "integers_below" in source:
        vocabulary = range(source["integers_below"])
    else:
        text = (folder / source["file"]).read_text(encoding="utf-8")
        # Not splitlines(): it also splits at characters that JSON does not escape.
        vocabulary = tuple(json.loads(line) for line in text.split("\n") if line)
        if len(vocabulary) != source["count"]:
            raise DataError(
                f"{source['count']} values", file=folder / source["file"], found=len(vocabulary)
            )
    return Categorical(entry["name"], entry["dtype"], vocabulary, entry["minimum_count"])
