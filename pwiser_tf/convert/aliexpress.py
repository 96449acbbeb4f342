"""The AliExpress search data (Tianchi 74690), processed or raw, as a Source.

Processed: train.csv and test.csv with a header of 82 columns. Raw: for each split an item file and
a user file without header, zipped or not, joined on the search id. Both give the same features
under the same names.
"""

import dataclasses
import pathlib
import re
from collections.abc import Sequence

from pwiser_tf.convert import archives, learn
from pwiser_tf.convert.csv_reader import INTEGER, LABEL, NUMBER, TEXT, CsvFile, Database, Kind
from pwiser_tf.convert.features import Feature, Log
from pwiser_tf.convert.source import (
    Features,
    FilePart,
    JoinedPart,
    Source,
    group_key,
    integer,
    paths,
    select,
)
from pwiser_tf.errors import DataError
from pwiser_tf.schema import Categorical, Numerical

CATEGORICAL = tuple(f"categorical_{i}" for i in range(1, 17))
NUMERICAL = tuple(f"numerical_{i}" for i in range(1, 64))
GROUP = "search_id"
# The columns of the raw files, counted from 1, in the order of the features.
USER_COLUMNS, ITEM_COLUMNS, RAW_LABEL = 33, 49, 49
USER_CATEGORICAL = (*range(2, 9), 32, 33)
ITEM_CATEGORICAL = (19, 34, 35, 36, 40, 41, 42)
USER_NUMERICAL = tuple(range(9, 32))
ITEM_NUMERICAL = tuple(c for c in range(2, 49) if c not in ITEM_CATEGORICAL)
_LOG = Log(
    features=(
        *(Feature(name=name, dtype="int64", min_count=1) for name in CATEGORICAL),
        *(Feature(name=name, type="numerical", transform="identity") for name in NUMERICAL),
    ),
    click="click",
    conversion="conversion",
    group=GROUP,
)
# The raw file and column number of each name in the processed layout.
_RAW_COLUMN = {
    GROUP: ("item", 1),
    "click": ("item", RAW_LABEL),
    "conversion": ("item", RAW_LABEL),
    **dict(
        zip(
            CATEGORICAL + NUMERICAL,
            [
                *(("user", c) for c in USER_CATEGORICAL),
                *(("item", c) for c in ITEM_CATEGORICAL),
                *(("user", c) for c in USER_NUMERICAL),
                *(("item", c) for c in ITEM_NUMERICAL),
            ],
            strict=True,
        )
    ),
}
# Columns of larger integers get a list of their values, not a range with mostly unused ids.
RANGE_LIMIT = 2**20

_LAYOUTS = (
    "AliExpress_{CC}/train.csv and test.csv, or {CC}/ or aliexpress_{CC}_datasets/ with "
    "{cc}_item_train, {cc}_item_test, {cc}_user_train and {cc}_user_test as .csv or .zip, or "
    "aliexpress_{CC}_datasets.zip"
)
_FOLDER = re.compile(r"(?:aliexpress_)?([a-z]{2})(?:_datasets)?", re.IGNORECASE)
_BUNDLE = re.compile(r"(?:aliexpress_)?([a-z]{2})_datasets\.zip", re.IGNORECASE)
_RAW = re.compile(r"(?:([a-z]{2})_)?(item|user)_(train|test)\.(csv|zip)", re.IGNORECASE)


def open_files(
    database: Database, train: Sequence[str], validation: Sequence[str], test: Sequence[str]
) -> Source:
    """The processed layout, as paths or patterns.

    Without validation or test files, those splits are cut from `train`.
    """
    parts = [
        [_processed(database, pathlib.Path(path)) for path in paths(patterns)]
        for patterns in (train, validation, test)
    ]
    return _source(*parts, {"layout": "processed"})


def open_folder(
    database: Database, folder: str, country: str | None, scratch: pathlib.Path
) -> Source:
    """A folder (or bundle) in any of the layouts.

    Args:
      folder: the country's folder, the folder that holds it, or aliexpress_{CC}_datasets.zip.
      country: two letters; needed where there are several.
      scratch: a folder for what has to be unpacked.

    Raises:
      DataError: no layout, several countries, a file missing or broken.
    """
    path = pathlib.Path(folder)
    if not path.exists():
        raise DataError("no such folder", file=path)
    found = _find(path)
    if country:
        found = [layout for layout in found if layout.country == country.upper()]
    countries = sorted({layout.country for layout in found})
    if not found:
        what = f" for country {country}" if country else ""
        raise DataError(f"found no AliExpress data{what}, expected {_LAYOUTS}", file=path)
    if len(countries) > 1:
        raise DataError(f"found {', '.join(countries)}; choose one with --country", file=path)
    layout = found[0]
    notes = {"layout": layout.kind, "country": layout.country}
    if layout.kind == "processed":
        for name in ("train", "test"):
            if name not in layout.files:
                raise DataError("no such file", file=layout.folder / f"{name}.csv")
        parts = [_processed(database, layout.files[name]) for name in ("train", "test")]
        return _source(parts[:1], [], parts[1:], notes)
    files, bundle = layout.files, layout.files.get("bundle")
    if bundle:
        unpacked = archives.unpack(bundle, scratch, bundle)
        files = {key: path for path in unpacked if (key := _raw_key(path.name))}
    parts = []
    for split in ("train", "test"):
        pair = []
        for side, columns in (("item", ITEM_COLUMNS), ("user", USER_COLUMNS)):
            if (side, split) not in files:
                name = f"{layout.country.lower()}_{side}_{split}"
                raise DataError(
                    f"found no {name}.csv or {name}.zip, expected item and user files of train "
                    "and test",
                    file=bundle or layout.folder,
                )
            path = files[side, split]
            shown = f"{bundle}/{path.name}" if bundle else path
            pair.append(_raw_file(_unpacked(path, scratch, shown), side, columns, shown))
        database.files += pair
        part, unmatched = _join(database, split, *pair)
        notes[f"{split}_item_rows_without_user"] = str(unmatched)
        parts.append(part)
    expected = "0, 1 or 2"
    return dataclasses.replace(_source(parts[:1], [], parts[1:], notes), expected_label=expected)


def _source(train, validation, test, notes: dict[str, str]) -> Source:
    return Source(
        dataset="aliexpress",
        log=_LOG,
        train=tuple(train),
        validation=tuple(validation),
        test=tuple(test),
        learn=_learn,
        missing=False,
        notes=notes,
    )


def _learn(database: Database, rows: str, log: Log) -> Features:
    """Categories are small integers from 0 and keep their order; numbers are scaled already."""
    bounds = learn.bounds(database, rows, len(CATEGORICAL))
    listed = [
        (f"categorical_{i}", False, feature)
        for i, feature in enumerate(log.of_type("categorical"))
        if bounds[i][0] is not None and (bounds[i][0] < 0 or bounds[i][1] >= RANGE_LIMIT)
    ]
    vocabularies = learn.vocabularies(database, rows, listed)
    categorical = tuple(
        vocabularies.get(name) or Categorical(name, "int64", range((bounds[i][1] or 0) + 1))
        for i, name in enumerate(CATEGORICAL)
    )
    # Written as they are: their statistics come from the writing pass.
    numerical = tuple(Numerical(name, "identity", 0.0, 0.0, 0.0) for name in NUMERICAL)
    return Features(categorical, numerical)


def _processed(database: Database, path: pathlib.Path) -> FilePart:
    kinds: dict[str, Kind] = {GROUP: TEXT, "click": LABEL, "conversion": LABEL}
    kinds |= dict.fromkeys(CATEGORICAL, INTEGER) | dict.fromkeys(NUMERICAL, NUMBER)
    file = CsvFile(path, kinds)
    database.files.append(file)
    expressions = {f"categorical_{i}": integer(file.column(n)) for i, n in enumerate(CATEGORICAL)}
    expressions |= {f"numerical_{i}": file.column(n) for i, n in enumerate(NUMERICAL)}
    expressions |= {name: file.column(name) for name in ("click", "conversion")}
    return FilePart(file, expressions | {"row_group": group_key(file.column(GROUP))})


@dataclasses.dataclass(frozen=True)
class _JoinedPart(JoinedPart):
    """An item file joined with a user file, in the item file's order."""

    database: Database

    def fault(self, row: int, column: str, expected: str) -> DataError:
        ((item_row, user_row),) = self.database.query(
            f"SELECT {self.keys} FROM {self.table} WHERE rowid = {row}", "finding the fault"
        )
        side, number = _RAW_COLUMN[column]
        item, user = self.files
        file, raw_row = (item, item_row) if side == "item" else (user, user_row)
        return file.fault(raw_row - 1, str(number), expected)


def _join(database: Database, split: str, item: CsvFile, user: CsvFile) -> tuple[_JoinedPart, int]:
    """Joins the two files into a table; returns the part and how many item rows had no user."""
    sides = {"item": item, "user": user}
    label = f"item.{item.column(str(RAW_LABEL))}"
    label = f"CASE WHEN {label} IN (0, 1, 2) THEN {label} END"
    expressions = {}
    for position, name in enumerate(CATEGORICAL):
        side, number = _RAW_COLUMN[name]
        column = f'"{side}".{sides[side].column(str(number))}'
        expressions[f"categorical_{position}"] = integer(column)
    for position, name in enumerate(NUMERICAL):
        side, number = _RAW_COLUMN[name]
        expressions[f"numerical_{position}"] = f'"{side}".{sides[side].column(str(number))}'
    expressions |= {
        "click": f"CAST({label} IN (1, 2) AS FLOAT)",
        "conversion": f"CAST({label} = 2 AS FLOAT)",
        "row_group": group_key(f"item.{item.column('1')}"),
        "item_row": "item.row",
        "user_row": '"user".row',
    }
    item_rows, user_rows = (
        f"(SELECT *, row_number() OVER () AS row FROM {file.table()})" for file in (item, user)
    )
    joined = select(
        expressions,
        f'{item_rows} AS item JOIN {user_rows} AS "user" '
        f'ON item.{item.column("1")} = "user".{user.column("1")}',
    )
    table = f"joined_{split}"
    # Ordered, because a join that spills gives its rows in no fixed order.
    database.query(
        f"CREATE TABLE {table} AS {joined} ORDER BY item_row, user_row", f"joining {split}"
    )
    ((items, matched),) = database.query(
        f"SELECT (SELECT count(*) FROM {item.table()}), "
        f"(SELECT count(DISTINCT item_row) FROM {table})",
        "counting",
    )
    part = _JoinedPart(table, (item, user), "item_row, user_row", database)
    return part, items - matched


def _raw_file(path: pathlib.Path, side: str, columns: int, shown) -> CsvFile:
    kinds: dict[str, Kind] = {"1": TEXT}
    kinds |= {str(n): INTEGER for s, n in map(_RAW_COLUMN.get, CATEGORICAL) if s == side}
    kinds |= {str(n): NUMBER for s, n in map(_RAW_COLUMN.get, NUMERICAL) if s == side}
    if side == "item":
        kinds[str(RAW_LABEL)] = Kind(LABEL.sql, "0, 1 or 2")
    return CsvFile(path, kinds, names=[str(c) for c in range(1, columns + 1)], shown=shown)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """What was found: `files` by split, by (side, split), or "bundle", as `kind` says."""

    country: str
    kind: str
    folder: pathlib.Path
    files: dict


def _find(path: pathlib.Path) -> list[_Layout]:
    """The layouts at a path or in its subfolders, the readiest first."""
    if path.is_file():
        return _find_files(path.parent, [path])
    folders = [path, *sorted(p for p in path.iterdir() if p.is_dir() and _FOLDER.fullmatch(p.name))]
    found = [
        layout
        for folder in folders
        for layout in _find_files(folder, sorted(p for p in folder.iterdir() if p.is_file()))
    ]
    return sorted(found, key=lambda layout: ("processed", "raw", "bundle").index(layout.kind))


def _find_files(folder: pathlib.Path, paths: list[pathlib.Path]) -> list[_Layout]:
    match = _FOLDER.fullmatch(folder.absolute().name)
    country = match[1].upper() if match else "?"
    found = []
    if processed := {p.stem: p for p in paths if p.name in ("train.csv", "test.csv")}:
        found.append(_Layout(country, "processed", folder, processed))
    raw: dict[str, dict] = {}
    # .zip sorts after .csv: what is unpacked already wins.
    for path in sorted(paths, key=lambda path: path.suffix.lower(), reverse=True):
        if key := _raw_key(path.name):
            prefix = _RAW.fullmatch(path.name)[1]
            raw.setdefault(prefix.upper() if prefix else country, {})[key] = path
    found += [_Layout(name, "raw", folder, files) for name, files in raw.items()]
    for path in paths:
        if bundle := _BUNDLE.fullmatch(path.name):
            found.append(_Layout(bundle[1].upper(), "bundle", folder, {"bundle": path}))
    return found


def _raw_key(name: str) -> tuple[str, str] | None:
    """(side, split) of a raw file's name."""
    match = _RAW.fullmatch(name)
    return (match[2].lower(), match[3].lower()) if match else None


def _unpacked(path: pathlib.Path, scratch: pathlib.Path, shown) -> pathlib.Path:
    """The CSV file itself, unpacked into the scratch folder where it is zipped."""
    if path.suffix.lower() != ".zip":
        return path
    files = [p for p in archives.unpack(path, scratch, shown) if p.suffix.lower() == ".csv"]
    if len(files) != 1:
        raise DataError(f"found {len(files)} CSV files in it, expected one", file=shown)
    return files[0]
