"""Raw CSV to TFRecord shards and schema.json: `pwiser convert --help`.

Data flows one way: the training rows are scanned for the schema, every row is encoded by it, and
the folder with shards and schema appears when all of it is written. TensorFlow is not imported.

    pwiser convert --format=aliexpress --input=AliExpress_NL --output_dir=data/nl
    pwiser convert --format=aliccp --input=ali-ccp --output_dir=data/ccp
    pwiser convert --format=columns --train=log.csv --output_dir=data/log \\
        --categorical=user,item --numerical=price --click=clicked --conversion=bought --time=day
"""

import functools
import pathlib
import shutil
import signal
import sys
from collections.abc import Callable

from absl import flags

from pwiser_tf.convert import aliccp, aliexpress, columns, output, splits
from pwiser_tf.convert.csv_reader import Database
from pwiser_tf.convert.encode import Encoder
from pwiser_tf.convert.source import Source
from pwiser_tf.errors import DataError
from pwiser_tf.schema import SPLITS, Schema, Split

# The flags that only some formats read; elsewhere they are refused.
_FLAGS = {
    "aliccp": ("input", "fields", "min_count"),
    "aliexpress": ("input", "country"),
    "columns": (
        "categorical", "numerical", "click", "conversion", "group", "time", "delimiter",
        "min_count",
    ),
}  # fmt: skip

# About 200,000 rows of the AliExpress layout. All files of a split are open at once, hence a most.
_BYTES_A_SHARD = 128 << 20
_FEWEST_SHARDS, _MOST_SHARDS = 4, 500


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of this command line."""
    string, number, names, choice, integer, boolean = (
        functools.partial(define, flag_values=values)
        for define in (
            flags.DEFINE_string,
            flags.DEFINE_float,
            flags.DEFINE_list,
            flags.DEFINE_enum,
            flags.DEFINE_integer,
            flags.DEFINE_bool,
        )
    )
    choice("format", None, sorted(_FLAGS), "What the input is.")
    string(
        "input",
        None,
        "aliexpress: the folder of a country, or the folder that holds it. aliccp: the folder of "
        "the raw files. Processed files can be named by --train instead.",
    )
    string("country", None, "aliexpress: two letters, where --input holds several countries.")
    names(
        "fields",
        list(aliccp.DEFAULT_FIELDS),
        f"aliccp: the fields that become features: some of {', '.join(aliccp.CATEGORIES)}, and of "
        f"the values {', '.join(aliccp.VALUES)}. Default: the 18 of AITM.",
    )
    names("train", [], "CSV files or patterns.")
    names("validation", [], "Likewise; without it, --validation_fraction is cut from --train.")
    names("test", [], "Likewise; without it, --test_fraction is cut from --train.")
    names("categorical", [], "columns: the categorical features.")
    names("numerical", [], "columns: the numerical features.")
    string("click", None, "columns: the label of a click, 0 or 1.")
    string("conversion", None, "columns: the label of a conversion, 0 or 1.")
    string("group", None, "columns: the search or session of a row, for group metrics.")
    string("time", None, "columns: a number or an ISO date or time, for --validation_split=time.")
    string("delimiter", ",", r"columns: between cells, one character; \t is a tab.")
    integer(
        "min_count",
        None,
        "columns, aliccp: a category seen fewer times in training is out-of-vocabulary. At 2, "
        "values seen once teach the model what an unknown value is like; at 1 nothing does. "
        f"Default: {columns.DEFAULT_MINIMUM_COUNT}; aliccp {aliccp.DEFAULT_MINIMUM_COUNT}, about "
        "AITM's.",
        lower_bound=1,
    )
    string("output_dir", None, "The folder to make.")
    boolean("overwrite", False, "Replace an earlier data set in --output_dir.")
    number(
        "validation_fraction",
        0.1,
        "The share of the training rows held out for choosing, where there are no validation "
        "files; 0: none.",
    )
    number("test_fraction", 0.1, "The share cut off as test where there are no test files.")
    choice(
        "validation_split",
        "auto",
        list(splits.RULES),
        "How rows are held out. time: the last by --time, as a model is used on what comes after "
        "its training. group: by a hash of the group, as rows of one search are alike and would "
        "leak. random: by a hash of the row's number. auto: the first of these that the data has "
        "columns for; so group for aliexpress and raw aliccp, whose files carry no time.",
    )
    integer("seed", 0, "Which groups or rows are held out.")
    integer(
        "shards",
        None,
        "Files a split; row i goes to file i % shards, or a hash of its group says to which, so "
        "that no group is torn apart. Training holds two of them in memory; "
        f"default: one for each {_BYTES_A_SHARD >> 20} MB of training CSV, {_FEWEST_SHARDS} at "
        "least.",
        lower_bound=1,
    )


def convert(
    open_source: Callable[[Database, pathlib.Path], Source],
    output_dir: str,
    *,
    overwrite: bool = False,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    validation_split: str = "auto",
    seed: int = 0,
    shards: int | None = None,
) -> Schema:
    """Converts a source into a data set's folder; returns its schema.

    Args:
      open_source: makes the Source from a database and a folder for temporary files.
      output_dir and the rest: as the flags of those names.

    Raises:
      DataError: the input, or the combination of arguments, cannot be used. Nothing is left.
      OSError: a file cannot be read or written. Nothing is left.
    """
    for name, fraction in (
        ("validation_fraction", validation_fraction),
        ("test_fraction", test_fraction),
        ("validation_fraction and test_fraction", validation_fraction + test_fraction),
    ):
        if not 0 <= fraction < 1:
            raise DataError(f"--{name}: found {fraction}, expected at least 0 and below 1")
    with output.whole_folder(output_dir, overwrite) as folder:
        scratch = folder / "scratch"
        scratch.mkdir()
        with Database(scratch) as database:
            source = open_source(database, scratch)
            cut = splits.make_cut(
                database,
                source,
                validation_split,
                0 if source.validation else validation_fraction,
                0 if source.test else test_fraction,
                seed,
            )
            rows = " UNION ALL ".join(cut.rows(source, part) for part in source.train)
            kept = (
                f"SELECT * FROM ({rows}) WHERE split = {SPLITS.index('train')} "
                "AND (conversion = 1 AND click = 0) IS NOT TRUE"
            )
            categorical, numerical = source.learn(database, kept)
            encoder = Encoder(source, categorical, numerical)
            if shards is None:
                wanted = sum(part.size for part in source.train) // _BYTES_A_SHARD
                shards = min(max(wanted, _FEWEST_SHARDS), _MOST_SHARDS)
            written = _write(database, source, cut, encoder, folder, shards)
        shutil.rmtree(scratch)
        train = written["train"]
        if not train.rows:
            raise DataError(
                f"found no training rows: {train.dropped} have a conversion without a click and "
                "are dropped, the others are held out",
                file=source.train[0].name,
            )
        schema = Schema(
            dataset=source.dataset,
            categorical=categorical,
            numerical=encoder.numerical(),
            click=source.click,
            conversion=source.conversion,
            group=source.group,
            splits={name: split for name, split in written.items() if split.rows},
            notes={**source.notes, "held_out": cut.description},
        )
        schema.save(folder)
    return schema


def _write(
    database: Database,
    source: Source,
    cut: splits.Cut,
    encoder: Encoder,
    folder: pathlib.Path,
    shards: int,
) -> dict[str, Split]:
    """Encodes all rows and writes their shards; returns the splits."""
    writers = [output.SplitWriter(folder, name, shards) for name in SPLITS]
    for part in source.parts:
        row = 0
        query = encoder.project(cut.rows(source, part))
        for batch in database.batches(query, "writing", part.size):
            rows = encoder.encode(batch, part, row)
            for position, writer in enumerate(writers):
                chosen = rows.split == position
                if chosen.any():
                    columns = (rows.frames, rows.grade, rows.group)
                    if not chosen.all():
                        columns = (None if c is None else c[chosen] for c in columns)
                    writer.write(*columns)
            row += batch.num_rows
        if not row:
            raise DataError("found no rows, expected some below the header", file=part.name)
    return {name: writer.close() for name, writer in zip(SPLITS, writers, strict=True)}


def report(schema: Schema) -> str:
    """What was made, as a table of its splits and a line for each kind of feature."""
    lines = [
        f"{'split':<11}{'rows':>12}{'clicks':>11}{'conversions':>13}{'dropped':>9}"
        f"{'CTR %':>9}{'CTCVR %':>9}{'CVR %':>8}"
    ]
    for name, split in schema.splits.items():
        rate = [
            f"{100 * part / whole:.3f}" if whole else "-"
            for part, whole in (
                (split.clicks, split.rows),
                (split.conversions, split.rows),
                (split.conversions, split.clicks),
            )
        ]
        lines.append(
            f"{name:<11}{split.rows:>12,}{split.clicks:>11,}{split.conversions:>13,}"
            f"{split.dropped:>9,}{rate[0]:>9}{rate[1]:>9}{rate[2]:>8}"
        )
    listed = ", ".join(f"{f.name} ({f.dtype}, {f.size} ids)" for f in schema.categorical)
    lines.append(f"{len(schema.categorical)} categorical: {listed or '-'}")
    lines.append(f"{len(schema.numerical)} numerical")
    lines += [f"{name.replace('_', ' ')}: {value}" for name, value in schema.notes.items()]
    return "\n".join(lines)


def _warnings(schema: Schema, validation_fraction: float) -> list[str]:
    found = []
    for name, split in schema.splits.items():
        if split.dropped:
            found.append(f"{name}: dropped {split.dropped:,} rows with a conversion but no click")
        for what, count in (("clicks", split.clicks), ("conversions", split.conversions)):
            if not count:
                found.append(f"{name} holds no {what}: nothing can be learnt or measured there")
    if validation_fraction and "validation" not in schema.splits:
        found.append("no row fell into the validation split; raise --validation_fraction")
    return found


def _open_source(values: flags.FlagValues) -> Callable[[Database, pathlib.Path], Source]:
    """The chosen format's Source, from the flags; refuses flags that it does not read."""
    for name in sorted(set().union(*_FLAGS.values()) - set(_FLAGS[values.format])):
        if values[name].present:
            raise DataError(f"--{name} says nothing with --format={values.format}")
    files = values.train, values.validation, values.test
    if values.format == "columns":
        return _open_columns(values, files)
    if bool(values.input) == bool(values.train):
        raise DataError(f"--format={values.format} needs either --input or --train")
    for name in ("validation", "test"):
        if values.input and values[name].value:
            raise DataError(f"--{name} goes with --train, not with --input")
    if values.format == "aliexpress":
        if values.input:
            return lambda database, scratch: aliexpress.open_folder(
                database, values.input, values.country, scratch
            )
        return lambda database, _: aliexpress.open_files(database, *files)
    choice = values.fields, values.min_count or aliccp.DEFAULT_MINIMUM_COUNT
    if values.input:
        return lambda database, scratch: aliccp.open_folder(
            database, values.input, scratch, *choice
        )
    return lambda database, _: aliccp.open_files(database, *files, *choice)


def _open_columns(
    values: flags.FlagValues, files: tuple[list[str], ...]
) -> Callable[[Database, pathlib.Path], Source]:
    for name in ("train", "click", "conversion"):
        if not values[name].value:
            raise DataError(f"--format=columns needs --{name}")
    if not values.categorical and not values.numerical:
        raise DataError("--format=columns needs --categorical or --numerical")
    delimiter = values.delimiter.replace(r"\t", "\t")
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise DataError(f"--delimiter: found {values.delimiter!r}, expected one character")
    return lambda database, _: columns.open_files(
        database,
        *files,
        categorical=values.categorical,
        numerical=values.numerical,
        click=values.click,
        conversion=values.conversion,
        group=values.group,
        time=values.time,
        delimiter=delimiter,
        minimum_count=values.min_count or columns.DEFAULT_MINIMUM_COUNT,
    )


def main(values: flags.FlagValues = flags.FLAGS) -> None:
    """Converts as the flags say and prints the report."""
    for name in ("format", "output_dir"):
        if not values[name].value:
            raise DataError(f"--{name} is needed; --help shows all flags")
    # So that the partial folder is removed then too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    schema = convert(
        _open_source(values),
        values.output_dir,
        overwrite=values.overwrite,
        validation_fraction=values.validation_fraction,
        test_fraction=values.test_fraction,
        validation_split=values.validation_split,
        seed=values.seed,
        shards=values.shards,
    )
    print(report(schema))
    for warning in _warnings(schema, values.validation_fraction):
        print("warning:", warning, file=sys.stderr)
    print("wrote", values.output_dir)
