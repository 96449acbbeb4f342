"""Anybody's CSV, its columns named by flags, as a Source."""

from collections.abc import Sequence

from pwiser_tf.convert import learn
from pwiser_tf.convert.csv_reader import LABEL, NUMBER, TEXT, CsvFile, Database, Kind
from pwiser_tf.convert.source import CsvPart, Source, group_key, paths
from pwiser_tf.errors import DataError
from pwiser_tf.schema import Numerical

DEFAULT_MINIMUM_COUNT = 2


def open_files(
    database: Database,
    train: Sequence[str],
    validation: Sequence[str],
    test: Sequence[str],
    *,
    categorical: Sequence[str],
    numerical: Sequence[str],
    click: str,
    conversion: str,
    group: str | None = None,
    time: str | None = None,
    delimiter: str = ",",
    minimum_count: int = DEFAULT_MINIMUM_COUNT,
) -> Source:
    """CSV files with a header each, in any order of columns; other columns are ignored.

    A missing category (an empty cell) has id 0, a missing number (empty, or nan) the training
    mean. Vocabularies are as `learn.vocabularies` makes them; numbers are standardized.

    Args:
      train, validation, test: paths or patterns; without the last two they are cut from `train`.
      categorical, numerical, click, conversion, group, time: column names.
      minimum_count: a category seen fewer times in training has id 0 too, which is how the
        model learns what an unknown value is like.

    Raises:
      DataError: a column has two roles that exclude each other, or is not in a file.
    """
    kinds: dict[str, Kind] = {}
    roles = [("--categorical", name, TEXT) for name in categorical]
    roles += [("--numerical", name, NUMBER) for name in numerical]
    roles += [("--click", click, LABEL), ("--conversion", conversion, LABEL)]
    roles += [("--group", name, TEXT) for name in [group] if name]
    roles += [("--time", name, TEXT) for name in [time] if name]
    seen: dict[str, str] = {}
    for flag, name, kind in roles:
        # A group may well be a feature too; a label or a number may not be read as text.
        if name in seen and (seen[name] == flag or not kinds[name] is kind is TEXT):
            raise DataError(f"column {name} is named by both {seen[name]} and {flag}")
        seen[name], kinds[name] = flag, kind
    parts = []
    for patterns in (train, validation, test):
        files = [CsvFile(path, kinds, delimiter=delimiter) for path in paths(patterns)]
        database.files += files
        parts.append(
            tuple(_part(f, categorical, numerical, click, conversion, group, time) for f in files)
        )

    def learn_features(database, rows):
        positions = dict(enumerate(categorical))
        vocabularies = learn.vocabularies(database, rows, positions, minimum_count)
        moments = learn.moments(database, rows, len(numerical))
        return (
            tuple(vocabularies[position] for position in positions),
            tuple(
                Numerical(name, "standardize", mean, std, fill_value=mean)
                for name, (mean, std) in zip(numerical, moments, strict=True)
            ),
        )

    return Source(
        dataset="columns",
        categorical=tuple(categorical),
        numerical=tuple(numerical),
        click=click,
        conversion=conversion,
        group=group or None,
        time=time or None,
        train=parts[0],
        validation=parts[1],
        test=parts[2],
        learn=learn_features,
        missing=True,
    )


def _part(file: CsvFile, categorical, numerical, click, conversion, group, time) -> CsvPart:
    expressions = {f"categorical_{i}": file.column(name) for i, name in enumerate(categorical)}
    expressions |= {f"numerical_{i}": file.column(name) for i, name in enumerate(numerical)}
    expressions |= {"click": file.column(click), "conversion": file.column(conversion)}
    if group:
        expressions["row_group"] = group_key(file.column(group))
    if time:
        expressions["moment"] = file.column(time)
    return CsvPart(file, expressions)
