"""How the texts of a file become values: the rules by which the converter reads a log.

They are stated once for all formats. The project's tests hold them together with the converter.
"""

import dataclasses
import decimal
import itertools
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from pwiser_serving.errors import FeatureError
from pwiser_serving.features import MISSING_INTEGER, Ragged, listed, optional, width
from pwiser_serving.protos import tensor_pb2

MISSING_MARKS = ("", "NA", "N/A", "NaN", "nan", "NULL", "null", "None", r"\N")
# What stands for a text that is no integer: no vocabulary holds it. A missing value has id 0 too,
# but is no value of a list.
UNKNOWN_INTEGER = MISSING_INTEGER + 1

# 007 and 7 may be two codes; 18.0 is how a column with gaps is often written.
_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)(\.0*)?")
# No integer of 64 bits is longer.
_LONGEST_INTEGER = 20
# From here on, the nearest float32 is infinite.
_TOO_LARGE = 2.0**128 - 2.0**103
# Up to so many characters, the nearest float64 rounds to the nearest float32.
_SHORT = 15
# float() takes these as blanks; the converter does not.
_NO_BLANKS = re.compile("[\x1c-\x1f]")
# The blanks around a value of a list: Unicode's space separators.
_BLANKS = (
    " \u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u202f\u205f\u3000"
)


# schema.json's formats that are read, and the name that the file has in a folder.
_SCHEMA_FORMATS, _SCHEMA_FILE = (1, 2), "schema.json"


@dataclasses.dataclass(frozen=True)
class Feature:
    """How a feature is read from a file.

    Attributes:
      column: the column.
      separator: between the values of a list; None: the file has lists.
      weights: the column of the weights of a list, or None. weight_separator: between a value and
        its weight where the file has no such column; None: it must have one.
      newest_last: whether the last values are kept, where a list is too long.
    """

    column: str
    separator: str | None = "|"
    weights: str | None = None
    weight_separator: str | None = ":"
    newest_last: bool = False


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How a file writes its rows and values.

    Attributes:
      delimiter, quote: of a CSV; quote "": there is none.
      header: the columns' names of a CSV without a header, or None.
      missing: the texts that stand for a missing value.
      separator: between the values of a list. weight_separator: between a value and its weight.
      newest_last: the lists of which the last values are kept, where one is too long.
      schema: how each feature is read, by its name; None: as these say, from the column of its
        name, and weights from column NAME.weights.
    """

    delimiter: str = ","
    quote: str = '"'
    header: tuple[str, ...] | None = None
    missing: tuple[str, ...] = MISSING_MARKS
    separator: str = "|"
    weight_separator: str = ":"
    newest_last: tuple[str, ...] = ()
    schema: Mapping[str, Feature] | None = None

    def feature(self, name: str) -> Feature:
        """How the feature of that name is read. FeatureError: the schema does not have it."""
        if self.schema is None:
            last = name in self.newest_last
            marks = self.separator, f"{name}.weights", self.weight_separator
            return Feature(name, *marks, last)
        if name not in self.schema:
            raise FeatureError(name, f"the model takes it; the schema has: {listed(self.schema)}")
        return self.schema[name]

    def columns(self, inputs: Mapping[str, tensor_pb2.TensorInfo]) -> tuple[set[str], set[str]]:
        """The columns that a file must have, and those that it may have, for a signature."""
        needed, useful = set(), set()
        of_weights = optional(inputs)
        for name in sorted(inputs.keys() - of_weights):
            feature = self.feature(name)
            needed.add(feature.column)
            if f"{name}.weights" in of_weights and feature.weights:
                (useful if feature.weight_separator else needed).add(feature.weights)
        return needed, useful

    def newest_last_of(self, inputs: Iterable[str]) -> set[str]:
        """The inputs that are lists whose last values are kept."""
        if self.schema is None:
            return set(self.newest_last)
        return {name for name in inputs if name in self.schema and self.schema[name].newest_last}

    def column(self, name: str) -> str:
        """The column that an input is read from, for messages."""
        owner = name.removesuffix(".weights")
        if self.schema is None or owner not in self.schema:
            return name
        feature = self.schema[owner]
        return feature.column if owner == name else feature.weights or feature.column


def of_schema(path: pathlib.Path) -> dict:
    """What a schema.json, or the one in a folder, says of a file: Dialect's missing and schema.

    One that says nothing (of format 1, or of a public data set) means the converter's defaults.

    Raises:
      ValueError: it is no such file; OSError: it cannot be read.
    """
    path = path / _SCHEMA_FILE if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if (version := content["format_version"]) not in _SCHEMA_FORMATS:
            raise ValueError(f"found format_version {version}, expected 1 or 2")
        found = {}
        for kind in ("categorical", "numerical", "lists", "vectors"):
            for entry in content.get(kind, ()):
                newest_last = entry.get("newest") == "last"
                found[entry["name"]] = Feature(entry["name"], newest_last=newest_last)
        source = content.get("source") or {}
        for entry in source.get("features", ()):
            marks = (entry[key] for key in ("column", "separator", "weights", "weight_separator"))
            found[entry["name"]] = Feature(*marks, found[entry["name"]].newest_last)
        return {"missing": tuple(source.get("missing", MISSING_MARKS)), "schema": found}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        detail = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: not a schema of pwiser convert ({detail})") from None


# A text for each row, or for a list its texts, None where there is no value; or a column whose
# values are known already.
Cells = Sequence[str | Sequence[str | None] | None] | Ragged | np.ndarray


def columns(
    read: Callable[[str, int], Cells | None],
    inputs: Mapping[str, tensor_pb2.TensorInfo],
    dialect: Dialect,
) -> dict[str, Sequence]:
    """The columns of a file as features.to_arrays takes them.

    Args:
      read: a column by its name and the data type that the model takes; None if there is none.
      inputs: a signature's inputs by name. dialect: says in which columns they are.

    Raises:
      FeatureError: a text that is not such a value.
    """
    found: dict[str, Sequence] = {}
    weights_of_lists = optional(inputs)
    for name, info in inputs.items():
        if name in weights_of_lists:
            continue
        feature = dialect.feature(name)
        cells = read(feature.column, info.dtype)
        if width(info) is None:
            found[name] = _scalars(name, cells, info.dtype, dialect.missing)
            continue
        lists = _lists(name, cells, feature, dialect.missing)
        if (name_of_weights := f"{name}.weights") in weights_of_lists:
            weights = read(feature.weights, tensor_pb2.DT_FLOAT) if feature.weights else None
            if weights is not None:
                weights = _lists(name_of_weights, weights, feature, dialect.missing)
            elif isinstance(lists.values, list) and feature.weight_separator:
                lists, weights = _weighted(lists, feature.weight_separator, dialect.missing)
            if weights is not None:
                found[name_of_weights] = _elements(
                    name_of_weights, weights, tensor_pb2.DT_FLOAT, ()
                )
        missing = () if info.dtype == tensor_pb2.DT_FLOAT else dialect.missing
        found[name] = _elements(name, lists, info.dtype, missing)
    return found


def integer(text: str) -> int:
    """The integer that a text is; UNKNOWN_INTEGER where it is none of 64 bits."""
    digits = text.partition(".")[0] if _INTEGER.fullmatch(text) else ""
    if not 0 < len(digits) <= _LONGEST_INTEGER:
        return UNKNOWN_INTEGER
    number = int(digits)
    return number if UNKNOWN_INTEGER < number < 2**63 else UNKNOWN_INTEGER


def number(text: str) -> float:
    """The number that a text is, such that float32 rounds it as the text itself; may be NaN.

    Raises:
      ValueError: it is none, or infinite as float32.
    """
    value = float(text)
    if not text.isascii() or _NO_BLANKS.search(text):
        raise ValueError(text)
    if len(text) > _SHORT and math.isfinite(value):
        exact, near = decimal.Decimal(text), decimal.Decimal(value)
        # Rounded twice, a number close to the middle of two float32s could become the wrong one:
        # of the two float64s around it, the odd one is never such a middle.
        if exact != near and math.frexp(value)[0] * 2**53 % 2 == 0:
            value = math.nextafter(value, math.inf if exact > near else -math.inf)
    if abs(value) >= _TOO_LARGE:
        raise ValueError(text)
    return value


def _scalars(name: str, cells: Cells, data_type: int, missing: Sequence[str]) -> Sequence:
    if isinstance(cells, np.ndarray):
        return cells
    if not isinstance(cells, Ragged):
        for row, text in enumerate(cells):
            if not isinstance(text, str | None):
                raise FeatureError(name, "one value", row=row, found=text)
        values = _values(name, cells, data_type, missing)
        if data_type == tensor_pb2.DT_INT64:
            values[values == UNKNOWN_INTEGER] = MISSING_INTEGER
        return values
    raise FeatureError(name, "found lists, expected one value in each row")


def _lists(name: str, cells: Cells, feature: Feature, missing: Sequence[str]) -> Ragged:
    """The values of each cell, where they are not known already the texts of them."""
    if isinstance(cells, Ragged):
        return cells
    rows = []
    for row, cell in enumerate(cells):
        if isinstance(cell, str):
            if cell in missing:
                cell = None
            elif feature.separator is None:
                raise FeatureError(name, "a list: no separator is known", row=row, found=cell)
            else:
                cell = cell.split(feature.separator)
        rows.append(cell or [])
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return Ragged(list(itertools.chain.from_iterable(rows)), lengths)


def _weighted(lists: Ragged, separator: str, missing: Sequence[str]) -> tuple[Ragged, Ragged]:
    """Texts of values and of their weights, from texts with both."""
    values, weights = [], []
    for text in lists.values:
        value, mark, rest = (text or "").partition(separator)
        values.append(value.strip(_BLANKS))
        counted = mark and values[-1] not in missing
        weights.append(rest if counted else "1")
    return Ragged(values, lists.lengths), Ragged(weights, lists.lengths)


def _elements(name: str, lists: Ragged, data_type: int, missing: Sequence[str]) -> Ragged:
    if isinstance(lists.values, np.ndarray):
        return lists
    texts = [text and text.strip(_BLANKS) for text in lists.values]
    try:
        return Ragged(_values(name, texts, data_type, missing), lists.lengths)
    except FeatureError as error:
        raise lists.in_its_row(error) from None


def _values(name: str, texts: Sequence[str], data_type: int, missing: Sequence[str]) -> Sequence:
    marks = {None, *missing}
    if data_type == tensor_pb2.DT_STRING:
        return ["" if text in marks else text for text in texts]
    if data_type == tensor_pb2.DT_INT64:
        integers = (MISSING_INTEGER if text in marks else integer(text) for text in texts)
        return np.fromiter(integers, np.int64, len(texts))
    if data_type != tensor_pb2.DT_FLOAT:
        # features.to_arrays refuses it.
        return texts
    values = np.empty(len(texts), np.float32)
    for place, text in enumerate(texts):
        try:
            values[place] = math.nan if text in marks else number(text)
        except ValueError:
            raise FeatureError(name, "a finite number", row=place, found=text) from None
    return values
