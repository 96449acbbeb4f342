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

from pwiser_tf.convert import aliccp, aliexpress, columns, learn, output, splits
from pwiser_tf.convert import features as log_features
from pwiser_tf.convert.csv_reader import MEMORY_MB, Database
from pwiser_tf.convert.encode import Encoder
from pwiser_tf.convert.source import Features, Source
from pwiser_tf.errors import DataError
from pwiser_tf.schema import SPLITS, Schema, Split

# The flags that only some formats read; elsewhere they are refused.
_FLAGS = {
    "aliccp": ("input", "fields", "min_count"),
    "aliexpress": ("input", "country"),
    "columns": (
        "features", "categorical", "numerical", "click", "conversion", "group", "time", "missing",
        "delimiter", "header", "quote", "min_count",
    ),
}  # fmt: skip

# About 200,000 rows of the AliExpress layout. All files of a split are open at once, hence a most.
_BYTES_A_SHARD = 128 << 20
_ALARMING_COPIES = 0.4
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
    string(
        "features",
        None,
        "columns: a feature file (docs/reference/features.md), the full way to say what a log "
        "holds; the short way are the six flags that follow.",
    )
    names("categorical", [], "columns: the categorical features.")
    names("numerical", [], "columns: the numerical features.")
    string("click", None, "columns: the label of a click, 0 or 1.")
    string("conversion", None, "columns: the label of a conversion, 0 or 1; none: CTR only.")
    string("group", None, "columns: the search or session of a row, for group metrics.")
    string("time", None, "columns: a number or an ISO date or time, for --validation_split=time.")
    names(
        "missing",
        list(log_features.MISSING_MARKS),
        "columns: the texts that stand for a missing value.",
    )
    string("delimiter", ",", r"columns: between cells, one character; \t is a tab, \x01 Hive's.")
    names("header", [], "columns: the names of all columns, for CSV files without a header.")
    string("quote", '"', "columns: the character around cells with delimiters; empty: none.")
    integer(
        "min_count",
        None,
        "columns, aliccp: a category seen fewer times in training is out-of-vocabulary. At 2, "
        "values seen once teach the model what an unknown value is like; at 1 nothing does. "
        f"Default: {log_features.DEFAULT_MINIMUM_COUNT}; aliccp "
        f"{aliccp.DEFAULT_MINIMUM_COUNT}, about that of AITM.",
        lower_bound=1,
    )
    string("output_dir", None, "The folder to make.")
    boolean("overwrite", False, "Replace an earlier data set in --output_dir.")
    string(
        "schema",
        None,
        "A converted data set whose schema encodes these data: the same ids and statistics, as for "
        "a second day. With --test alone, all rows are test.",
    )
    boolean("grow", False, "With --schema: give new values ids behind the known ones.")
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
    integer(
        "memory_mb",
        None,
        f"What the reader's buffers may hold; the rest of the process takes some 150 MB. Default: "
        f"{MEMORY_MB}, and 0.75 more for each column beyond 300.",
        lower_bound=50,
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
    known: Schema | None = None,
    grow: bool = False,
    memory_mb: int | None = None,
) -> tuple[Schema, list[str]]:
    """Converts a source into a data set's folder; returns its schema, and what was odd.

    Args:
      open_source: makes the Source from a database and a folder for temporary files.
      known: the schema to encode by; None: it is learnt. grow: values that it does not have get
        ids behind the known ones.
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
        with Database(scratch, memory_mb) as database:
            source = open_source(database, scratch)
            database.expect_columns(len(source.log.features))
            cut = splits.make_cut(
                database,
                source,
                validation_split,
                0 if source.validation else validation_fraction,
                0 if source.test else test_fraction,
                seed,
            )
            features = None if known is None else _features(known, source)
            if known is None or grow:
                log = source.log if features is None else learn.typed(source.log, features)
                learnt = source.learn(database, _training_rows(source, cut), log)
                features = learn.grown(features, learnt) if features else learnt
            encoder = Encoder(source, features)
            if shards is None:
                wanted = sum(part.size for part in source.parts) // _BYTES_A_SHARD
                shards = min(max(wanted, _FEWEST_SHARDS), _MOST_SHARDS)
            written = _write(database, source, cut, encoder, folder, shards)
            warnings = database.warnings
            if cut.rule != "group" or source.validation or source.test:
                warnings += splits.groups_in_several(database, source, cut)
        shutil.rmtree(scratch)
        train = written["train"]
        # Training refuses a single row too.
        if train.rows < 2 and source.train:
            raise DataError(
                f"found {train.rows} training rows, expected at least 2: {train.dropped} have a "
                "conversion without a click and are dropped, the others are held out",
                file=source.train[0].name,
            )
        for name, fraction in (("validation", validation_fraction), ("test", test_fraction)):
            if source.train and fraction and not written[name].rows:
                # One group stays one group.
                more = f"raise --{name}_fraction, choose another --validation_split"
                if cut.rule == "group":
                    more = "there are few groups: choose --validation_split=random or time"
                raise DataError(
                    f"no row is in the {name} split: {more}, or give files by --{name} "
                    f"(--{name}_fraction=0: no such split)"
                )
        coverage = encoder.coverage.shares()
        warnings += encoder.coverage.warnings(coverage if known is None else known.coverage)
        schema = Schema(
            dataset=source.dataset,
            categorical=features.categorical,
            numerical=encoder.numerical(),
            click=source.log.click,
            conversion=source.log.conversion,
            group=source.log.group,
            lists=features.lists,
            vectors=features.vectors,
            weight=source.log.weight,
            segments=encoder.segments(),
            source=source.source,
            coverage=coverage,
            splits={name: split for name, split in written.items() if split.rows},
            notes={**source.notes, "held_out": cut.description},
        )
        schema.save(folder)
    return schema, warnings + _warnings(schema)


def _features(schema: Schema, source: Source) -> Features:
    """The features of an existing schema; DataError where the source has others."""
    found = Features(schema.categorical, schema.numerical, schema.lists, schema.vectors)
    names = {f.name for f in (*found.categorical, *found.numerical, *found.lists, *found.vectors)}
    other = names ^ {feature.name for feature in source.log.features}
    if other:
        raise DataError(f"--schema has other features than these data: {', '.join(sorted(other))}")
    return found


def _training_rows(source: Source, cut: splits.Cut) -> str:
    """The SQL query of the rows to learn from."""
    rows = " UNION ALL ".join(cut.rows(source, part) for part in source.train)
    kept = f"SELECT * FROM ({rows}) WHERE split = {SPLITS.index('train')}"
    if source.log.conversion_without_click == "drop":
        kept += " AND (conversion = 1 AND click = 0) IS NOT TRUE"
    return kept


def _write(
    database: Database,
    source: Source,
    cut: splits.Cut,
    encoder: Encoder,
    folder: pathlib.Path,
    shards: int,
) -> dict[str, Split]:
    """Encodes all rows and writes their shards; returns the splits."""
    writer = output.Writer(folder, shards)
    for part in source.parts:
        row = 0
        query = encoder.project(database, cut.rows(source, part))
        for batch in database.batches(query, "writing", part.size):
            writer.write(*encoder.encode(batch, part, row))
            row += batch.num_rows
        if not row:
            raise DataError("found no rows, expected some below the header", file=part.name)
    if writer.copies > _ALARMING_COPIES:
        database.warnings.append(
            f"{writer.copies:.0%} of the rows equal another one in all features and labels: was a "
            "file joined or logged twice?"
        )
    return writer.close()


def report(schema: Schema) -> str:
    """What was made, as a table of its splits and a line for each kind of feature."""
    ctr_only = not schema.conversion
    header = f"{'split':<11}{'rows':>12}{'clicks':>11}"
    header += "" if ctr_only else f"{'conversions':>13}{'dropped':>9}"
    lines = [f"{header}{'CTR %':>9}" + ("" if ctr_only else f"{'CTCVR %':>9}{'CVR %':>8}")]
    for name, split in schema.splits.items():
        rate = [
            f"{100 * part / whole:.3f}" if whole else "-"
            for part, whole in (
                (split.clicks, split.rows),
                (split.conversions, split.rows),
                (split.conversions, split.clicks),
            )
        ]
        line = f"{name:<11}{split.rows:>12,}{split.clicks:>11,}"
        line += "" if ctr_only else f"{split.conversions:>13,}{split.dropped:>9,}"
        lines.append(f"{line}{rate[0]:>9}" + ("" if ctr_only else f"{rate[1]:>9}{rate[2]:>8}"))
    listed = ", ".join(f"{f.name} ({f.dtype}, {f.size} ids)" for f in schema.categorical)
    lines.append(f"{len(schema.categorical)} categorical: {listed or '-'}")
    if schema.lists:
        listed = ", ".join(
            f"{f.name} ({f.dtype}, {f.size} ids, at most {f.max_length})" for f in schema.lists
        )
        lines.append(f"{len(schema.lists)} lists: {listed}")
    lines.append(f"{len(schema.numerical)} numerical")
    if schema.vectors:
        lines.append(f"{len(schema.vectors)} vectors")
    if not schema.conversion:
        lines.append("no column of conversions: the model will have CTR only")
    lines += [f"{name.replace('_', ' ')}: {value}" for name, value in schema.notes.items()]
    return "\n".join(lines)


def _warnings(schema: Schema) -> list[str]:
    """What is odd in a data set's counts."""
    found = []
    for name, split in schema.splits.items():
        if split.dropped:
            found.append(f"{name}: dropped {split.dropped:,} rows with a conversion but no click")
        counts = {"clicks": split.clicks}
        if schema.conversion:
            counts["conversions"] = split.conversions
        for what, count in counts.items():
            if not count:
                found.append(f"{name} holds no {what}: nothing can be learnt or measured there")
        if split.clicks == split.rows:
            found.append(f"{name}: every row has a click: nothing can be learnt or measured there")
    if "train" in schema.splits and "validation" not in schema.splits:
        found.append("there is no validation split, without which training does not choose epochs")
    return found


def _open_source(
    values: flags.FlagValues, known: Schema | None
) -> Callable[[Database, pathlib.Path], Source]:
    """The chosen format's Source, from the flags; refuses flags that it does not read."""
    for name in sorted(set().union(*_FLAGS.values()) - set(_FLAGS[values.format])):
        if values[name].present:
            raise DataError(f"--{name} says nothing with --format={values.format}")
    files = values.train, values.validation, values.test
    if values.format == "columns":
        return _open_columns(values, files, known)
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
    values: flags.FlagValues, files: tuple[list[str], ...], known: Schema | None
) -> Callable[[Database, pathlib.Path], Source]:
    if not values.train and not (known and values.test):
        raise DataError("--format=columns needs --train, or --schema and --test")
    delimiter = columns.character("delimiter", values.delimiter)
    quote = columns.character("quote", values.quote) if values.quote else ""
    log = _log(values, known)
    return lambda database, _: columns.open_files(
        database, log, *files, delimiter=delimiter, header=values.header or None, quote=quote
    )


def _log(values: flags.FlagValues, known: Schema | None) -> log_features.Log:
    """The log that --schema, --features or the short flags describe."""
    short = ("categorical", "numerical", "click", "conversion", "group", "time", "min_count")
    if known:
        for name in (*short, "features", "missing"):
            if values[name].present:
                raise DataError(f"--{name} beside --schema, which says it")
        return log_features.Log.from_json(known.source)
    if values.features:
        for name in (*short, "missing"):
            if values[name].present:
                raise DataError(f"--{name} beside --features: state it in the feature file")
        return log_features.read(values.features)
    if not values.click:
        raise DataError("--format=columns needs --click, or --features")
    if not values.categorical and not values.numerical:
        raise DataError("--format=columns needs --categorical or --numerical, or --features")
    return log_features.from_flags(**{name: values[name].value for name in (*short, "missing")})


def main(values: flags.FlagValues = flags.FLAGS) -> None:
    """Converts as the flags say and prints the report."""
    if not values.output_dir:
        raise DataError("--output_dir is needed; --help shows all flags")
    # So that the partial folder is removed then too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    known = None
    if values.schema:
        known = Schema.load(values.schema)
        if not values.format:
            values.format = known.dataset
        if values.format != known.dataset:
            raise DataError(
                f"--format={values.format}, but this is a schema of {known.dataset}",
                file=values.schema,
            )
    elif values.grow:
        raise DataError("--grow goes with --schema")
    if values.grow and not values.train:
        raise DataError("--grow needs --train: new ids are those of values in training rows")
    if not values.format and values.features:
        values.format = "columns"
    if not values.format:
        raise DataError("--format is needed; --help shows all flags")
    schema, warnings = convert(
        _open_source(values, known),
        values.output_dir,
        overwrite=values.overwrite,
        validation_fraction=values.validation_fraction,
        test_fraction=values.test_fraction,
        validation_split=values.validation_split,
        seed=values.seed,
        shards=values.shards,
        known=known,
        grow=values.grow,
        memory_mb=values.memory_mb,
    )
    print(report(schema))
    for warning in warnings:
        print("warning:", warning, file=sys.stderr)
    print("wrote", values.output_dir)
