"""Anybody's log, CSV or Parquet, its columns named by a feature file or by flags, as a Source."""

import itertools
import pathlib
import re
import urllib.parse
from collections.abc import Sequence

from pwiser_tf.convert import learn
from pwiser_tf.convert.csv_reader import (
    NUMBER,
    TEXT,
    CsvFile,
    Database,
    Kind,
    literal,
    literals,
)
from pwiser_tf.convert.features import Feature, Log
from pwiser_tf.convert.parquet_reader import ParquetFile, is_parquet
from pwiser_tf.convert.source import FilePart, ParquetPart, Part, Source, group_key, paths
from pwiser_tf.errors import DataError

_PARTITION = re.compile(r"([^=/]+)=([^/]*)")
_NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"
# The words of a label, in lower case.
_TRUE, _FALSE = ("1", "true", "t", "yes", "y"), ("0", "false", "f", "no", "n")


def open_files(
    database: Database,
    log: Log,
    train: Sequence[str],
    validation: Sequence[str],
    test: Sequence[str],
    *,
    delimiter: str = ",",
    header: Sequence[str] | None = None,
    quote: str = '"',
) -> Source:
    """Files with the columns that `log` names, in any order; other columns are ignored.

    Args:
      train, validation, test: files, folders or patterns; without the last two, these splits are
        cut from `train`. A folder part "name=value" is a column (Hive's partitions).
      delimiter, header, quote: of CSV files; header: the columns' names where a file has none.

    Raises:
      DataError: a column is not in a file, or a file is there twice.
    """
    kinds = _kinds(log)
    parts, seen = [], {}
    for split, patterns in (("train", train), ("validation", validation), ("test", test)):
        opened = []
        for path in paths(patterns):
            stat = pathlib.Path(path).stat()
            identity = stat.st_dev, stat.st_ino
            if identity in seen:
                raise DataError(
                    f"this file is in --{split}, but also in {seen[identity]}", file=path
                )
            seen[identity] = f"--{split} as {path}"
            opened.append(_open(path, log, kinds, delimiter, header, quote))
        database.files += [file for file, _ in opened]
        parts.append(_parts(opened))
    return Source(
        dataset="columns",
        log=log,
        train=parts[0],
        validation=parts[1],
        test=parts[2],
        learn=learn.of_log,
        missing=True,
        source=log.to_json(),
    )


def character(flag: str, text: str) -> str:
    r"""The one character that a flag names, written as it is, as \t or as \x01."""
    found = re.fullmatch(r"\\x([0-9a-fA-F]{2})", text)
    character = chr(int(found[1], 16)) if found else text.replace(r"\t", "\t")
    if len(character) != 1 or character in "\r\n" or (flag == "delimiter" and character == '"'):
        raise DataError(f"--{flag}: found {text!r}, expected one character")
    return character


def _kinds(log: Log) -> dict[str, Kind]:
    """How each column is read: as a number where it is nothing else, otherwise as text."""
    roles = [(f.column, NUMBER if f.type == "numerical" else TEXT) for f in log.features]
    roles += [(f.weights, TEXT) for f in log.features if f.weights]
    others = (log.click, log.conversion, log.weight, log.group, log.time, *log.segments)
    roles += [(column, TEXT) for column in others if column]
    kinds: dict[str, Kind] = {}
    for column, kind in roles:
        kinds[column] = kind if kinds.get(column, kind) is kind else TEXT
    return kinds


def partitions(path: str) -> dict[str, str]:
    """The columns that stand in the names of a file's folders, "name=value", and their values."""
    found = _PARTITION.findall(str(pathlib.Path(path).parent))
    return {name: urllib.parse.unquote(value) for name, value in found}


def _open(path, log, kinds, delimiter, header, quote) -> tuple[CsvFile | ParquetFile, dict]:
    """A file, and the SQL of a relation's columns."""
    of_folders = {name: value for name, value in partitions(path).items() if name in kinds}
    inside = {column: kind for column, kind in kinds.items() if column not in of_folders}
    if is_parquet(path):
        file = ParquetFile(path, inside)
    else:
        file = CsvFile(
            path, inside, delimiter=delimiter, names=header, quote=quote, missing=log.missing
        )
    return file, _Expressions(file, log, of_folders).all()


def _parts(opened: Sequence[tuple[CsvFile | ParquetFile, dict]]) -> tuple[Part, ...]:
    """Files as parts; Parquet files of the same types that follow each other are one part, since a
    query for each of many small files would take long."""

    def alike(entry: tuple[int, tuple[CsvFile | ParquetFile, dict]]) -> tuple:
        number, (file, expressions) = entry
        if isinstance(file, CsvFile):
            return (number,)
        return expressions, [file.types[column] for column in file.kinds]

    parts: list[Part] = []
    for _, entries in itertools.groupby(enumerate(opened), alike):
        files, (expressions, *_) = zip(*(entry for _, entry in entries), strict=True)
        if isinstance(files[0], CsvFile):
            parts.append(FilePart(files[0], expressions))
        else:
            parts.append(ParquetPart(files, expressions))
    return tuple(parts)


class _Expressions:
    """The SQL of a relation's columns (see source.Part), for one file."""

    def __init__(self, file: CsvFile | ParquetFile, log: Log, partitions: dict[str, str]):
        self._file = file
        self._log = log
        self._partitions = partitions

    def all(self) -> dict[str, str]:
        log = self._log
        found = {}
        for i, feature in enumerate(log.of_type("categorical")):
            if self._is_integer(feature.column):
                found[f"categorical_{i}"] = f"CAST({self._file.column(feature.column)} AS BIGINT)"
            else:
                found[f"categorical_{i}"] = self._text(feature.column)
        for i, feature in enumerate(log.of_type("list", "sequence")):
            found |= self._list(i, feature)
        for i, feature in enumerate(log.of_type("numerical")):
            found[f"numerical_{i}"] = self._number(feature.column)
        for i, feature in enumerate(log.of_type("vector")):
            elements = self._elements(feature)
            found[f"vector_{i}"] = f"list_transform({elements}, lambda x: {_parsed('x')})"
        found["click"] = self._label(log.click)
        # CTR only: no row has a conversion.
        found["conversion"] = self._label(log.conversion) if log.conversion else "0"
        if log.group:
            found["row_group"] = group_key(self._text(log.group))
        if log.time:
            found["moment"] = self._text(log.time)
        if log.weight:
            found["row_weight"] = self._number(log.weight)
        for i, column in enumerate(log.segments):
            found[f"segment_{i}"] = self._text(column)
        return found

    def _is_integer(self, column: str, or_list: bool = False) -> bool:
        """Whether a column holds integers that BIGINT can hold, and which need no parsing."""
        if not isinstance(self._file, ParquetFile) or column in self._partitions:
            return False
        return self._file.is_integer(column, or_list)

    def _text(self, column: str) -> str:
        """A column as text, NULL where it is missing."""
        if column in self._partitions:
            value = self._partitions[column]
            is_missing = value == _NO_PARTITION or value in self._log.missing
            return "NULL" if is_missing else literal(value)
        text = self._file.column(column)
        if isinstance(self._file, ParquetFile):
            if self._file.is_list(column):
                raise DataError(
                    'this column holds lists: a feature of type "list", "sequence" or "vector"',
                    file=self._file.shown,
                    column=column,
                )
            text = f"CAST({text} AS VARCHAR)"
            if self._is_integer(column):
                # Which no missing mark is.
                return text
            # CSV files are read so already.
            return f"CASE WHEN NOT {_among(text, self._log.missing)} THEN {text} END"
        return text

    def _number(self, column: str) -> str:
        """A column as FLOAT; infinity, which is refused with its place, where it is no number."""
        if isinstance(self._file, CsvFile) and self._file.kinds.get(column) is NUMBER:
            return self._file.column(column)
        is_parquet = isinstance(self._file, ParquetFile) and column not in self._partitions
        if is_parquet and self._file.is_number(column):
            # A double may be too large.
            return _parsed(self._file.column(column))
        return _parsed(self._text(column))

    def _label(self, column: str) -> str:
        if self._is_integer(column):
            return self._file.column(column)
        text = self._text(column)
        word = f"lower(trim({text}))"
        number = f"TRY_CAST({text} AS FLOAT)"
        return (
            f"CASE WHEN {text} = '0' THEN 0 WHEN {text} = '1' THEN 1 "
            f"WHEN {_among(word, _TRUE)} OR {number} = 1 THEN 1 "
            f"WHEN {_among(word, _FALSE)} OR {number} = 0 THEN 0 END"
        )

    def _elements(self, feature: Feature) -> str:
        """A list's values; empty where it is missing. BIGINT[] if they are integers, otherwise
        VARCHAR[] without blanks around them."""
        column, file = feature.column, self._file
        if self._is_integer(column, or_list=True) and not self._is_integer(column):
            return f"coalesce(CAST({file.column(column)} AS BIGINT[]), [])"
        if isinstance(file, ParquetFile) and column in file.kinds and file.is_list(column):
            elements = f"CAST({file.column(column)} AS VARCHAR[])"
        elif feature.separator:
            elements = f"string_split({self._text(column)}, {literal(feature.separator)})"
        else:
            raise DataError(
                f"feature {feature.name} is of type {feature.type}, and the column holds no lists: "
                "state a separator",
                file=file.shown,
                column=column,
            )
        return f"list_transform(coalesce({elements}, []), lambda x: trim(x))"

    def _list(self, i: int, feature: Feature) -> dict[str, str]:
        """list_i, weights_i where it has weights, and list_length_i, the length before the cut."""
        elements = self._elements(feature)
        last = feature.type == "sequence" and feature.newest == "last"
        cut = f"-{feature.max_length}, -1" if last else f"1, {feature.max_length}"
        if not feature.weighted:
            kept = f"list_filter({elements}, lambda x: {self._is_present('x', feature)})"
            return {
                f"list_{i}": f"list_slice({kept}, {cut})",
                f"list_length_{i}": f"len({kept})",
            }
        if feature.weight_separator:
            mark = literal(feature.weight_separator)
            # A value without a weight counts once.
            rest = f"substr(x, strpos(x, {mark}) + length({mark}))"
            weight = f"CASE WHEN contains(x, {mark}) THEN {rest} ELSE '1' END"
            pair = f"{{'value': trim(split_part(x, {mark}, 1)), 'weight': {_parsed(weight)}}}"
            pairs = f"list_transform({elements}, lambda x: {pair})"
        else:
            file = self._file
            if not (isinstance(file, ParquetFile) and file.is_list(feature.weights)):
                raise DataError(
                    f"feature {feature.name}: expected a column of lists of weights",
                    file=file.shown,
                    column=feature.weights,
                )
            weights = f"coalesce({file.column(feature.weights)}, [])"
            parsed = f"list_transform({weights}, lambda x: {_parsed('x')})"
            # Another number of weights is no weight of any value, which is refused.
            weights = f"CASE WHEN len({weights}) = len({elements}) THEN {parsed} ELSE [] END"
            pairs = (
                f"list_transform(list_zip({elements}, {weights}), "
                "lambda x: {'value': x[1], 'weight': x[2]})"
            )
        kept = f"list_filter({pairs}, lambda x: {self._is_present('x.value', feature)})"
        return {
            f"list_{i}": f"list_transform(list_slice({kept}, {cut}), lambda x: x.value)",
            f"list_length_{i}": f"len({kept})",
            f"weights_{i}": f"list_transform(list_slice({kept}, {cut}), lambda x: x.weight)",
        }

    def _is_present(self, value: str, feature: Feature) -> str:
        """SQL: whether a value of a list is not missing; a missing one is no value of it."""
        present = f"{value} IS NOT NULL"
        if self._is_integer(feature.column, or_list=True):
            return present
        return f"{present} AND NOT {_among(value, self._log.missing)}"


def _parsed(text: str) -> str:
    """SQL: a text or number as FLOAT, NULL where it is NULL, infinity where it is no number."""
    return f"CASE WHEN {text} IS NOT NULL THEN coalesce(TRY_CAST({text} AS FLOAT), 'inf') END"


def _among(value: str, texts: Sequence[str]) -> str:
    """SQL: whether a value is one of the texts; false where it is NULL."""
    # DuckDB makes a join of IN and of list_contains, one for each column of each file.
    return f"coalesce(list_position({literals(texts)}, {value}), 0) > 0"
