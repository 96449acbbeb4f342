"""The Ali-CCP data (Tianchi 408), raw or processed, as a Source.

Raw: for each split a skeleton file (an exposure a row: labels and its own features) and a file of
common features, which many exposures share. A list of features is text: features separated by
\\x01, each `field \\x02 feature id \\x03 value`. Processed: files with a header
`click,purchase,101,121,...` and one integer a field. Both give the same features.

**How the raw files are joined, and what that takes.** Neither file is ever in memory. DuckDB reads
each once, cuts the chosen fields out of the lists, and keeps those alone, as integers, in a
database in the scratch folder beside the output; there the two are joined and brought back into
the skeleton's order, spilling to the same folder. Memory is bounded by csv_reader.MEMORY_MB
whatever the size: 8 million generated rows with 800,000 common ones took 410 MB of memory in all,
and 60 bytes a row of the scratch folder, which is removed. For the real 85 million rows allow 10 GB
beside the output, and 40 GB more where archives (.zip, .tar.gz) are to be unpacked there first.

**Rules.** A field of the common features overrides the exposure's own. Of a field that is repeated
in one list (210, an item's several intentions) the first is taken. A field that is absent is
missing, id 0; its value (D508, ...) is then 0. Exposures whose common features are absent are kept,
with what they have, and counted: they are exposures like others, and serving meets such users too.

**Groups.** The rows of one `common_feature_id` are the exposures of one user at one moment (some 58
a row in train): what a search is for AliExpress. It is the group, in metrics and when validation
is cut. Processed files do not have it, and are cut by row.

**Histories** (109_14, 110_14, 127_14, 150_14: the categories, shops, brands and intentions that a
user met in 14 days) are lists with weights, of raw files alone, where --fields names them. They use
the vocabularies of 206, 207, 216 and 210 where these are features too.
"""

import dataclasses
import pathlib
import re
from collections.abc import Sequence

from pwiser_tf.convert import archives, learn
from pwiser_tf.convert.csv_reader import INTEGER, LABEL, NUMBER, TEXT, CsvFile, Database, Kind
from pwiser_tf.convert.features import Feature, Log
from pwiser_tf.convert.source import FilePart, JoinedPart, Source, group_key, integer, paths, select
from pwiser_tf.errors import DataError

USER_FIELDS = ("101", "121", "122", "124", "125", "126", "127", "128", "129")
ITEM_FIELDS = ("205", "206", "207", "210", "216")
CROSS_FIELDS = ("508", "509", "702", "853")
CONTEXT_FIELDS = ("301",)
# A history, and the item field with the same ids.
HISTORIES = {"109_14": "206", "110_14": "207", "127_14": "216", "150_14": "210"}
_LONGEST_HISTORY = 50
# The value of a cross field: how often this user met this item's category, shop, brand, intention.
VALUES = {f"D{field}": field for field in CROSS_FIELDS}
CATEGORIES = (*USER_FIELDS, *ITEM_FIELDS, *CROSS_FIELDS, *CONTEXT_FIELDS)
# The choice of AITM (Xi et al., KDD 2021), which most results on these data use.
DEFAULT_FIELDS = tuple(field for field in CATEGORIES if field != "210")
DEFAULT_MINIMUM_COUNT = 10

_SKELETON = ("sample_id", "click", "conversion", "common_feature_id", "n_features", "feature_list")
_COMMON = ("common_feature_id", "n_features", "feature_list")
_GROUP = "common_feature_id"
_ID = "[0-9]{1,18}"
# A number that float32 holds.
_VALUE = r"[-+]?(?:[0-9]{1,20}\.?[0-9]*|\.[0-9]+)(?:[eE](?:-[0-9]+|\+?[0-9]))?"
# One feature, with the separator before it.
_FEATURE = rf"\x01[0-9A-Za-z_]+\x02{_ID}\x03{_VALUE}"


def open_files(
    database: Database,
    train: Sequence[str],
    validation: Sequence[str],
    test: Sequence[str],
    fields: Sequence[str] = DEFAULT_FIELDS,
    minimum_count: int = DEFAULT_MINIMUM_COUNT,
) -> Source:
    """The processed layout; other columns of the files are ignored.

    In these files 0 stands for an id that was missing or rare; here it is id 0 again.

    Args:
      train, validation, test: paths or patterns; without the last two they are cut from `train`.
      fields: which fields are features: of CATEGORIES, and of VALUES.
      minimum_count: an id seen fewer times in training is out-of-vocabulary, id 0.

    Raises:
      DataError: a field that is not offered, or a file that cannot be used.
    """
    log = _log(fields, minimum_count)
    if log.of_type("list"):
        raise DataError("--fields: processed files have no histories, only the raw ones have")
    # They have no group, and their own name of the second label.
    log = dataclasses.replace(log, conversion="purchase", group=None)
    categorical, numerical = _names(log, "categorical"), _names(log, "numerical")
    kinds: dict[str, Kind] = {"click": LABEL, "purchase": LABEL}
    kinds |= dict.fromkeys(categorical, INTEGER) | dict.fromkeys(numerical, NUMBER)
    parts = []
    for patterns in (train, validation, test):
        files = [CsvFile(path, kinds) for path in paths(patterns)]
        database.files += files
        parts.append([_processed(file, categorical, numerical) for file in files])
    source = _source(log, *parts, {"layout": "processed"})

    def learn_without_zero(database, rows, log):
        zeros = [f"nullif(categorical_{i}, 0) AS categorical_{i}" for i in range(len(categorical))]
        replaced = f"REPLACE ({', '.join(zeros)})" if zeros else ""
        return source.learn(database, f"SELECT * {replaced} FROM ({rows})", log)

    return dataclasses.replace(source, missing=False, learn=learn_without_zero)


def open_folder(
    database: Database,
    folder: str,
    scratch: pathlib.Path,
    fields: Sequence[str] = DEFAULT_FIELDS,
    minimum_count: int = DEFAULT_MINIMUM_COUNT,
) -> Source:
    """The raw layout: the folder that holds the four files, or the archives they come in.

    Args:
      folder: has sample_skeleton_train and common_features_train, likewise of test, as .csv,
        .csv.gz or .zip, itself or in its folders sample_train and sample_test; or has
        sample_train and sample_test as .tar.gz or .zip.
      scratch: a folder for what has to be unpacked.
      fields, minimum_count: as in `open_files`.

    Raises:
      DataError: a field that is not offered; a file missing or broken.
    """
    log = _log(fields, minimum_count)
    path = pathlib.Path(folder)
    if not path.is_dir():
        raise DataError("no such folder", file=path)
    parts, notes = [], {"layout": "raw"}
    for split in ("train", "test"):
        files = []
        for stem, names in ((f"sample_skeleton_{split}", _SKELETON),
                            (f"common_features_{split}", _COMMON)):  # fmt: skip
            found, shown = _find(path, split, stem, scratch)
            kinds = dict.fromkeys(names, TEXT) | {"n_features": INTEGER}
            if names is _SKELETON:
                kinds |= {"click": LABEL, "conversion": LABEL}
            files.append(CsvFile(found, kinds, names=names, shown=shown))
        database.files += files
        part, alone = _join(database, split, *files, log)
        notes[f"{split}_rows_without_common_features"] = str(alone)
        parts.append([part])
    train, test = parts
    return _source(log, train, [], test, notes)


def _names(log: Log, kind: str) -> tuple[str, ...]:
    return tuple(feature.name for feature in log.of_type(kind))


def _log(fields: Sequence[str], minimum_count: int) -> Log:
    """The features among the fields, in their order."""
    for field in fields:
        if field not in CATEGORIES and field not in VALUES and field not in HISTORIES:
            offered = ", ".join((*CATEGORIES, *VALUES, *HISTORIES))
            raise DataError(f"--fields: found {field!r}, expected some of {offered}")
        if list(fields).count(field) > 1:
            raise DataError(f"--fields: found {field} twice")
    if not fields:
        raise DataError("--fields: found none, expected at least one")
    ids = {"dtype": "int64", "min_count": minimum_count}
    features = [Feature(name=field, **ids) for field in fields if field in CATEGORIES]
    for field in fields:
        if field in VALUES:
            features.append(Feature(name=field, type="numerical"))
        elif field in HISTORIES:
            owner = HISTORIES[field] if HISTORIES[field] in fields else None
            features.append(
                Feature(
                    name=field,
                    type="list",
                    side="user",
                    vocabulary=owner,
                    weights=field,
                    max_length=_LONGEST_HISTORY,
                    **ids,
                )
            )
    return Log(features=tuple(features), click="click", conversion="conversion", group=_GROUP)


def _source(log: Log, train, validation, test, notes) -> Source:
    def learn_features(database, rows, log):
        found = learn.of_log(database, rows, log)
        # An absent feature has the value 0.
        numerical = (dataclasses.replace(each, fill_value=0.0) for each in found.numerical)
        return dataclasses.replace(found, numerical=tuple(numerical))

    return Source(
        dataset="aliccp",
        log=log,
        train=tuple(train),
        validation=tuple(validation),
        test=tuple(test),
        learn=learn_features,
        missing=True,
        notes=notes,
    )


def _processed(file: CsvFile, categorical, numerical) -> FilePart:
    expressions = {f"categorical_{i}": integer(file.column(n)) for i, n in enumerate(categorical)}
    expressions |= {f"numerical_{i}": file.column(name) for i, name in enumerate(numerical)}
    return FilePart(
        file,
        expressions | {"click": file.column("click"), "conversion": file.column("purchase")},
    )


# ---- raw


class _JoinedPart(JoinedPart):
    """A skeleton file with its common features, in the skeleton's order."""

    def fault(self, row: int, column: str, expected: str) -> DataError:
        # Only labels and the group can still be wrong, and those are the skeleton's.
        return self.files[0].fault(row, column, expected)


def _find(folder: pathlib.Path, split: str, stem: str, scratch: pathlib.Path):
    """One of the four files, unpacked where it has to be, and what messages call it."""
    whole = f"sample_{split}"
    for inside in (folder, folder / whole):
        for suffix in (".csv", ".csv.gz"):
            if (path := inside / (stem + suffix)).is_file():
                return path, path
    for inside in (folder, folder / whole):
        for name in (stem, whole):
            for suffix in archives.SUFFIXES:
                archive = inside / (name + suffix)
                if not archive.is_file():
                    continue
                # Both files of a split may lie in one archive, which is unpacked once.
                unpacked = scratch / f"unpacked_{archive.name}" / f"{stem}.csv"
                if not unpacked.parent.exists():
                    archives.unpack(archive, scratch, archive)
                if not unpacked.is_file():
                    raise DataError(f"found no {stem}.csv in it", file=archive)
                return unpacked, f"{archive}/{stem}.csv"
    raise DataError(
        f"found no {stem}.csv, .csv.gz, .zip or {whole}.tar.gz, expected sample_skeleton and "
        "common_features of train and test",
        file=folder,
    )


def _join(
    database: Database, split: str, skeleton: CsvFile, common: CsvFile, log: Log
) -> tuple[_JoinedPart, int]:
    """Joins the two files into a table; returns the part and how many rows had no common ones."""
    _extract(database, "common", common, {}, log)
    repeated = database.query(
        "SELECT min(rowid), max(rowid) FROM common GROUP BY id HAVING count(*) > 1 "
        "ORDER BY 1 LIMIT 1",
        "checking common features",
    )
    if repeated:
        (first, last) = repeated[0]
        expected = f"an id that no other row has; row {common.cell(first, _GROUP)[0]} has it"
        raise common.fault(last, _GROUP, expected)
    # So that the order of the rows is the order of rowid.
    labels = {name: skeleton.column(name) for name in ("click", "conversion")}
    group = {"row_group": group_key(skeleton.column(_GROUP))}
    _extract(database, "skeleton", skeleton, labels | group, log)
    expressions = {}
    for i in range(len(log.of_type("categorical"))):
        name = f"categorical_{i}"
        expressions[name] = f"coalesce(common.{name}, skeleton.{name})"
    for i in range(len(log.of_type("numerical"))):
        name = f"numerical_{i}"
        expressions[name] = f"coalesce(common.{name}, skeleton.{name}, 0)"
    for i in range(len(log.of_type("list"))):
        # An empty list is an absent field.
        longer = f"CASE WHEN common.list_length_{i} > 0 THEN common ELSE skeleton END"
        for name in (f"list_{i}", f"weights_{i}", f"list_length_{i}"):
            expressions[name] = longer.replace("common E", f"common.{name} E").replace(
                "skeleton E", f"skeleton.{name} E"
            )
    expressions |= {name: f"skeleton.{name}" for name in (*labels, *group)}
    expressions |= {"row": "skeleton.rowid", "alone": "common.id IS NULL"}
    table = f"joined_{split}"
    # Ordered, because a join that spills gives its rows in no fixed order.
    joined = select(expressions, "skeleton LEFT JOIN common ON skeleton.id = common.id")
    database.query(f"CREATE TABLE {table} AS {joined} ORDER BY row", f"joining {split}")
    database.query("DROP TABLE skeleton; DROP TABLE common", "clearing up")
    ((rows, alone),) = database.query(
        f"SELECT count(*), count(*) FILTER (WHERE alone) FROM {table}", "counting"
    )
    if alone == rows > 0:
        raise DataError(
            f"found the {_GROUP} of no row of {skeleton.shown} in it, expected those of all",
            file=common.shown,
        )
    return _JoinedPart(table, (skeleton, common), "row, alone"), alone


def _extract(database: Database, table: str, file: CsvFile, more: dict[str, str], log: Log) -> None:
    """Makes a table of a raw file's ids and chosen features, in the order of its rows.

    Raises:
      DataError: a feature list is broken, or has more or fewer features than the row says.
    """
    expressions = {"id": file.column(_GROUP)} | more
    for position, field in enumerate(_names(log, "categorical")):
        # Text before a field's name is the same for all: the search jumps to what can match.
        expressions[f"categorical_{position}"] = (
            rf"TRY_CAST(regexp_extract(list, '\x01{field}\x02([0-9]+)', 1) AS BIGINT)"
        )
    for position, field in enumerate(_names(log, "list")):
        pattern = rf"\x01{field}\x02([0-9]+)\x03([^\x01]+)"
        found = f"regexp_extract_all(list, '{pattern}', "
        expressions[f"list_{position}"] = f"list_slice({found}1), 1, {_LONGEST_HISTORY})"
        expressions[f"list_length_{position}"] = f"len({found}1))"
        weights = f"list_slice({found}2), 1, {_LONGEST_HISTORY})"
        expressions[f"weights_{position}"] = f"CAST({weights} AS FLOAT[])"
    for position, name in enumerate(_names(log, "numerical")):
        pattern = rf"\x01{VALUES[name]}\x02[0-9]+\x03([^\x01]+)"
        expressions[f"numerical_{position}"] = (
            f"TRY_CAST(regexp_extract(list, '{pattern}', 1) AS FLOAT)"
        )
    expressions["fine"] = (
        f"(regexp_full_match(list, '(?:{_FEATURE})*') "
        "AND strlen(list) - strlen(replace(list, chr(1), '')) = features) IS TRUE"
    )
    text = file.column("feature_list")
    # Every feature has a separator before it.
    listed = f"SELECT *, {file.column('n_features')} AS features, "
    listed += f"CASE WHEN {text} <> '' THEN chr(1) || {text} ELSE '' END AS list"
    query = select(expressions, f"({listed} FROM {file.table()})")
    database.query(f"CREATE TABLE {table} AS {query}", f"reading {file.path.name}")
    ((row,),) = database.query(f"SELECT min(rowid) FROM {table} WHERE NOT fine", "checking")
    if row is not None:
        raise _broken(file, row)
    database.query(f"ALTER TABLE {table} DROP COLUMN fine", "checking")


def _broken(file: CsvFile, row: int) -> DataError:
    """What is wrong with a row's feature list."""
    line, text = file.cell(row, "feature_list")
    features = text.split("\x01") if text else []
    place = {"file": file.shown, "row": line}
    for number, feature in enumerate(features, 1):
        if not re.fullmatch(_FEATURE, "\x01" + feature):
            expected = rf"field \x02 id \x03 value as feature {number} of the list"
            return DataError(expected, found=feature, column="feature_list", **place)
    expected = f"{len(features)}, the number of features in feature_list"
    return file.fault(row, "n_features", expected)
