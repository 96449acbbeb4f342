"""A served model from the command line: scores a file of candidates, shows the model's state.

    python -m pwiser_serving.client score --server localhost:8500 --model demo \\
        --input candidates.csv --output scores.csv --keep candidate_id
    python -m pwiser_serving.client status --server localhost:8500 --model demo
    python -m pwiser_serving.client metadata --server localhost:8500 --model demo

`score` reads a CSV, JSON lines (.jsonl, .ndjson) or a Parquet file, which has a column for each raw
feature of the model, in any order; other columns are ignored. Or a TFRecord file (.tfrecord,
.tfrecords) of tf.train.Examples of raw features. A file with another suffix is a CSV. All but
Parquet may be compressed by gzip or zstd; Parquet and compression are recognised by the content.
`--input -` reads a CSV, compressed or not, from standard input.

Values are read as `pwiser convert` reads a log. The texts of --missing, and null, are missing
values. In a feature of integers, 18.0 is 18, and a text that is no integer is an unknown value. A
list or a vector is an array of JSON, a list of Parquet, or a text that --separator splits. The
weights of list NAME are in column NAME.weights, or in the text itself behind --weight_separator; a
value without one has weight 1. A list with more values than the model takes is cut.

With --schema the file is a raw log: its columns have the names that the feature file gave them, and
missing marks, separators (of each feature its own) and weights are those of the feature file. For
simple files --missing, --separator, --weight_separator and --newest_last say the same.

The output has a row for each row of the input, in its order: the columns of --keep, then the
model's scores: ctr, cvr and ctcvr, or only ctr; interest and score, if the model has them. Its
suffix chooses the format: .jsonl, .parquet, otherwise CSV; .csv.gz and .jsonl.gz are compressed.
`--output -` writes a CSV to standard output, as the scores arrive. Without --output a table is
printed.

An output file appears whole or not at all. A command that ends early leaves OUTPUT.partial, and the
same command continues after it: no row is lost or there twice. All rows are scored by the version
that answered first. If the server no longer has it, or if the input or a flag has changed, the
command says so and does nothing: remove OUTPUT.partial to begin again. Nothing is kept of an input
that cannot be read again, as standard input.

A request above the server's message limit is sent again in parts; a row that alone is too large is
an error of the input.

Exit code 0: done. 2: the command, the input or the model's name is wrong. 1: the server is away,
too slow or fails, so that the same command may succeed later; and for `status`, no version is
AVAILABLE.
"""

import argparse
import collections
import contextlib
import dataclasses
import os
import pathlib
import re
import signal
import stat
import sys
from collections.abc import Callable, Iterator, Sequence

import grpc
import numpy as np

from pwiser_serving import command_line, outputs, rules
from pwiser_serving.base_scorer import PROBABILITIES, RAW_SIGNATURE
from pwiser_serving.candidates import (
    STANDARD,
    CandidateError,
    CandidateFile,
    JsonFile,
    format_suffix,
    partitions,
)
from pwiser_serving.connection import TLS
from pwiser_serving.errors import FeatureError, ModelNotFound, RequestTooLarge, ScoringError
from pwiser_serving.scorer import Scorer

# The rows of so many requests make a part of the output: a command that ends early loses no more.
_REQUESTS_PER_PART = 16

_END_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# Errors of the command, not of the server: the same command will not succeed later.
_WRONG_COMMAND = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
)


def open_candidates(path: pathlib.Path, dialect: rules.Dialect):
    """A candidate file by its suffix: TFRecord, JSON lines, Parquet, otherwise CSV.

    Raises:
      CandidateError: it cannot be opened or read in this format.
    """
    suffix = format_suffix(path)
    if suffix in (".tfrecord", ".tfrecords"):
        from pwiser_serving import tfrecord

        return tfrecord.CandidateFile(path)
    if suffix in outputs.JSON_SUFFIXES:
        return JsonFile(path, dialect)
    if suffix == ".parquet" or _is_parquet(path):
        if format_suffix(path) != path.suffix:
            raise CandidateError(outputs.NO_ZIPPED_PARQUET, file=path)
        try:
            from pwiser_serving import parquet
        except ImportError:
            raise CandidateError(outputs.NO_PARQUET, file=path) from None
        return parquet.CandidateFile(path, dialect)
    return CandidateFile(path, dialect)


def _is_parquet(path: pathlib.Path) -> bool:
    """Whether a file, not a pipe, has the content of Parquet."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"PAR1"


def score_file(
    scorer: Scorer, candidates, keep: Sequence[str], *, skip: int = 0
) -> Iterator[outputs.Columns]:
    """The output's columns, batch by batch: those of keep, then the scores.

    Args:
      scorer: calls `candidates.signature`; candidates: from `open_candidates`; skip: rows to leave
      out first.

    Raises:
      CandidateError: the file does not hold what the model takes.
      ScoringError: the server did not answer, or refused.
    """
    candidates.require(keep, "--keep names")
    for name in scorer.outputs(candidates.signature):
        if name in keep:
            reason = f"--keep={name}: model {scorer.model} has a score of this name"
            raise CandidateError(reason, file=candidates.path)
    inputs = scorer.inputs(candidates.signature)
    if candidates.signature == RAW_SIGNATURE:
        needed, useful = candidates.dialect.columns(inputs)
        needed -= partitions(candidates.path).keys()
        candidates.require(sorted(needed), f"model {scorer.model} needs")
        for name in useful:
            candidates.use(name)
    elif inputs:
        candidates.names = sorted(scorer.inputs(RAW_SIGNATURE))
    waiting = collections.deque()

    def batches():
        for batch in candidates.batches(scorer.rows_per_request, skip=skip):
            waiting.append((batch.rows, {name: batch.column(name) for name in keep}))
            yield batch.features(inputs)

    results = scorer.score_batches(batches())
    while True:
        try:
            scores = next(results, None)
        except ScoringError as error:
            if not waiting:
                raise
            rows = waiting[0][0]
            if isinstance(error, RequestTooLarge):
                row, reason = rows[error.row], "this row alone is above the server's message limit"
                raise CandidateError(
                    f"{reason}: {error.details}", file=candidates.path, row=row
                ) from None
            if error.code is not grpc.StatusCode.INVALID_ARGUMENT:
                raise
            raise CandidateError(
                f"the model refuses these rows: {error}",
                file=candidates.path,
                row=f"{rows[0]} to {rows[-1]}",
            ) from None
        if scores is None:
            return
        yield waiting.popleft()[1] | scores


def _score(flags: argparse.Namespace) -> None:
    with contextlib.ExitStack() as stack:
        candidates = stack.enter_context(open_candidates(flags.input, flags.dialect))
        options = {"signature": candidates.signature, "rows_per_request": flags.batch_size}
        scorer = stack.enter_context(_scorer(flags, flags.version, **options))
        if flags.output == STANDARD:
            _stream(flags, candidates, scorer, options)
        elif flags.output:
            _write(flags, candidates, scorer, options)
        else:
            scores = scorer.outputs(candidates.signature)
            _print(score_file(scorer, candidates, flags.keep), flags.keep, scores)
            sys.stdout.flush()


def _stream(flags: argparse.Namespace, candidates, asked: Scorer, options: dict) -> None:
    """Scores as a CSV to standard output."""
    identity, version, rows = _identity(flags.input), asked.metadata().version, 0
    pinned = flags.version if version is None else version
    out = sys.stdout.buffer
    with _scorer(flags, pinned, **options) as scorer, _progress(candidates, 0) as tell:
        header = outputs.csv_header([*flags.keep, *scorer.outputs(candidates.signature)])
        for columns in score_file(scorer, candidates, flags.keep):
            # A command whose first row is wrong writes nothing.
            out.write((header + outputs.csv_rows(columns)).encode())
            header = ""
            rows += _count(columns)
            tell(_count(columns))
    out.write(header.encode())
    out.flush()
    _require_unchanged(flags.input, identity)
    print(f"standard output: {rows} rows scored by {_by(flags.model, version)}", file=sys.stderr)


def _write(flags: argparse.Namespace, candidates, asked: Scorer, options: dict) -> None:
    """Scores into a file, after the rows of an earlier command."""
    identity = _identity(flags.input)
    command = {
        "input": identity,
        "--model": flags.model,
        "--version": flags.version,
        "--keep": flags.keep,
    }
    dialect = {f"--{name}": value for name, value in dataclasses.asdict(flags.dialect).items()}
    # As JSON holds it.
    command |= {n: list(v) if isinstance(v, tuple) else v for n, v in dialect.items()}
    partial = outputs.Partial(flags.output, command, resumable=identity is not None)
    with _opened(partial):
        done = partial.rows
        try:
            if not done:
                partial.begin(asked.metadata().version)
            by = _by(flags.model, partial.version)
            if done:
                print(f"{flags.output}: resuming after {done} rows scored by {by}", file=sys.stderr)
            pinned = flags.version if partial.version is None else partial.version
            with _scorer(flags, pinned, **options) as scorer, _progress(candidates, done) as tell:
                _save(score_file(scorer, candidates, flags.keep, skip=done), partial, tell)
                names = scorer.outputs(candidates.signature)
            _require_unchanged(flags.input, identity)
            empty = candidates.no_rows()
            no_scores = dict.fromkeys(names, np.zeros(0, np.float32))
            partial.finish({name: empty.column(name) for name in flags.keep} | no_scores)
        except (ScoringError, OSError) as error:
            if isinstance(error, ModelNotFound) and partial.rows:
                error.add_note(
                    f"{partial.folder} holds {partial.rows} rows of this version: remove it to "
                    "begin again, if the version will not come back"
                )
            elif partial.keeps(error):
                error.add_note(_kept(partial))
            raise
    print(f"{flags.output}: {partial.rows} rows scored by {by}", file=sys.stderr)


def _save(batches: Iterator[outputs.Columns], partial: outputs.Partial, tell) -> None:
    """Saves the batches in parts; after a failure also the unfinished part."""
    part, rows = [], 0
    try:
        for columns in batches:
            part.append(columns)
            rows += _count(columns)
            tell(_count(columns))
            if len(part) == _REQUESTS_PER_PART:
                # Reset first: `finally` must not try a part again that cannot be saved.
                full, part = part, []
                saved, rows = rows, 0
                partial.save(full, saved)
    finally:
        if part:
            partial.save(part, rows)


def _count(columns: outputs.Columns) -> int:
    return len(next(iter(columns.values())))


def _by(model: str, version: int | None) -> str:
    return model if version is None else f"{model}, version {version}"


def _require_unchanged(path: pathlib.Path, identity: dict[str, int] | None) -> None:
    if _identity(path) != identity:
        raise CandidateError("changed while it was read", file=path)


def _identity(path: pathlib.Path) -> dict[str, int] | None:
    """Facts that show that a file has not changed; None if it cannot be read again."""
    if path == STANDARD or not stat.S_ISREG((found := path.stat()).st_mode):
        return None
    return {"bytes": found.st_size, "modified_ns": found.st_mtime_ns}


def _kept(partial: outputs.Partial) -> str:
    return f"{partial.folder} keeps {partial.rows} rows: the same command continues after them"


def _end_on_signals(partial: outputs.Partial | None = None) -> None:
    """SIGINT and SIGTERM end the process at once, and print what is kept.

    They do not raise: after an exception within a gRPC call, closing its channel waits forever.
    """

    def end(number, _):
        if partial and partial.keeps(None):
            # Not print: the signal may have interrupted one.
            os.write(sys.stderr.fileno(), f"\n{_kept(partial)}\n".encode())
        elif partial:
            partial.discard()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    for number in _END_SIGNALS:
        signal.signal(number, end)


@contextlib.contextmanager
def _opened(partial: outputs.Partial) -> Iterator[None]:
    """Opens the partial, and sets what a signal does. A signal during the opening, when its rows
    are not known yet, takes effect right after."""
    came = []
    for number in _END_SIGNALS:
        signal.signal(number, lambda number, _: came.append(number))
    with partial:
        _end_on_signals(partial)
        for number in came:
            os.kill(os.getpid(), number)
        yield


@contextlib.contextmanager
def _progress(candidates, done: int) -> Iterator[Callable[[int], object]]:
    """A bar at a terminal; gives a function to call with each batch's rows."""
    if not sys.stderr.isatty():
        yield lambda rows: None
        return
    import tqdm

    with tqdm.tqdm(total=candidates.total, initial=done, unit=" rows", unit_scale=True) as bar:
        yield bar.update


def _print(batches: Iterator[outputs.Columns], keep: Sequence[str], scores: Sequence[str]) -> None:
    """Prints a table with the widths of the first batch."""
    header, widths = [*keep, *scores], None
    for columns in batches:
        kept = [outputs.texts(columns[name]) for name in keep]
        numbers = [[f"{value:.6f}" for value in columns[name]] for name in scores]
        rows = list(zip(*kept, *numbers, strict=True))
        if widths is None:
            widths = _widths(header, rows)
            _print_row(header, widths)
        for row in rows:
            _print_row(row, widths)
    if widths is None:
        _print_row(header, _widths(header, []))


def _widths(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(header, *rows, strict=True)]


def _print_row(row: Sequence[str], widths: Sequence[int]) -> None:
    print("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)))


def _status(flags: argparse.Namespace) -> None:
    with _scorer(flags, flags.version) as scorer:
        versions = scorer.status()
    header = ("version", "state", "error")
    rows = []
    for version in versions:
        good = version.code is grpc.StatusCode.OK
        error = "" if good else " ".join(f"{version.code.name}: {version.message}".split())
        rows.append((str(version.version), version.state, error))
    widths = _widths(header, rows)[:-1]
    for row in (header, *rows):
        cells = [text.ljust(width) for text, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[-1]]).rstrip())
    if not any(version.state == "AVAILABLE" for version in versions):
        sys.exit(1)


def _metadata(flags: argparse.Namespace) -> None:
    with _scorer(flags, flags.version) as scorer:
        metadata = scorer.metadata()
    print(f"model {flags.model}, version {metadata.version}")
    for name, signature in metadata.signatures.items():
        print(f"{name} ({signature['method']})")
        for side in ("inputs", "outputs"):
            print(f"  {side}")
            width = max(map(len, signature[side]), default=0)
            for tensor, info in signature[side].items():
                sizes = "?" if info["shape"] is None else info["shape"]
                shape = ", ".join("rows" if size is None else str(size) for size in sizes)
                print(f"    {tensor.ljust(width)}  {info['type']} [{shape}]")


def _scorer(flags: argparse.Namespace, version: int | str | None, **options) -> Scorer:
    files = {name: getattr(flags, name) for name in _TLS_FLAGS}
    tls = TLS(**files) if flags.tls or any(files.values()) else None
    try:
        return Scorer(
            flags.server, flags.model, version=version, timeout=flags.timeout, tls=tls, **options
        )
    except ValueError as error:
        command_line.fail(error)


# The flags for the arguments of TLS.
_TLS_FLAGS = {
    "root_certificates": "PEM file of the authorities to trust; those of gRPC by default",
    "private_key": "PEM file, for a server that asks who its client is",
    "certificate_chain": "PEM file that belongs to --private_key",
    "server_name": "the name in the server's certificate; --server's by default",
}


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _marks(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _version(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _parser() -> command_line.Parser:
    parser = command_line.Parser(
        prog="python -m pwiser_serving.client",
        description="Scores candidates with a model behind TF Serving's gRPC API.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run, timeout, told in (
        ("score", _score, 30.0, "score a CSV, JSON lines, Parquet or TFRecord of raw features"),
        ("status", _status, 5.0, "the state of each version; exit code 0 if one is AVAILABLE"),
        ("metadata", _metadata, 5.0, "the model's signatures, their inputs and outputs"),
    ):
        command = commands.add_parser(name, help=told, description=told)
        command.set_defaults(run=run)
        add = command.add_argument
        add("--server", default="localhost:8500", help="host:port of the server")
        add("--model", required=True, help="the model's name on the server")
        add("--version", type=_version, help="a version's number or label; the newest by default")
        add("--timeout", type=float, default=timeout, help="seconds for one request")
        add("--tls", action="store_true", help="use TLS; also on with a flag of its files")
        for flag, meaning in _TLS_FLAGS.items():
            add(f"--{flag}", help=meaning)
        if name == "score":
            add(
                "--input",
                required=True,
                type=pathlib.Path,
                help=".parquet, .tfrecord, .jsonl, otherwise CSV, also in gzip or zstd; - is a CSV "
                "on standard input",
            )
            add(
                "--schema",
                type=pathlib.Path,
                help="schema.json, or a folder that has it: a data set, a run, or assets.extra of "
                "an exported model. The columns, separators, weights, missing marks and the end of "
                "a list that is kept are then those of the feature file",
            )
            default = rules.Dialect()
            add(
                "--delimiter",
                default=default.delimiter,
                help=r"between a CSV's cells, one character; \t is a tab, \x01 Hive's",
            )
            add("--header", type=_names, help="the columns of a CSV without a header, a,b,c")
            add("--quote", default=default.quote, help="around a CSV's cells; empty: there is none")
            add(
                "--missing",
                type=_marks,
                default=argparse.SUPPRESS,
                help="the texts that stand for a missing value, a,b,c (default: "
                f"{','.join(default.missing)})",
            )
            add(
                "--separator",
                default=argparse.SUPPRESS,
                help=f"between the values of a list (default: {default.separator})",
            )
            add(
                "--weight_separator",
                default=argparse.SUPPRESS,
                help="between a value of a list and its weight (default: "
                f"{default.weight_separator})",
            )
            add(
                "--newest_last",
                type=_names,
                default=argparse.SUPPRESS,
                help="the lists, a,b,c, of which the last values are kept where there are more "
                'than the model takes (newest = "last" in the feature file); of others the first',
            )
            add(
                "--output",
                type=pathlib.Path,
                help=".jsonl, .parquet, otherwise CSV; .csv.gz and .jsonl.gz are compressed; - is "
                "a CSV on standard output; without this flag a table is printed",
            )
            add("--keep", default="", help="columns of the input to repeat, a,b,c")
            add("--batch_size", type=int, default=4096, help="rows in one request")
    return parser


def _flags(arguments: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    flags = parser.parse_args(arguments)
    if not flags.timeout > 0:
        parser.error(f"--timeout: found {flags.timeout:g}, expected more than 0 seconds")
    if flags.command != "score":
        return flags
    if flags.batch_size < 1:
        parser.error(f"--batch_size: found {flags.batch_size}, expected 1 or more")
    if flags.output in (None, STANDARD):
        if sys.stdout is None:
            parser.error("standard output is closed, expected a file's name as --output")
    else:
        _check_output(parser, flags)
    for name in ("delimiter", "quote"):
        if (text := getattr(flags, name)) or name == "delimiter":
            code = re.fullmatch(r"\\x([0-9a-fA-F]{2})", text)
            character = chr(int(code[1], 16)) if code else text.replace(r"\t", "\t")
            if len(character) != 1 or character in "\r\n" + '"' * (name == "delimiter"):
                parser.error(f"--{name}: found {text!r}, expected one character")
            setattr(flags, name, character)
    flags.dialect = _dialect(parser, flags)
    flags.keep = [name for name in flags.keep.split(",") if name]
    for name in flags.keep:
        if name in PROBABILITIES or flags.keep.count(name) > 1:
            reason = "a score's name" if name in PROBABILITIES else "named twice"
            parser.error(f"--keep: {name} is {reason}, and the output has each column once")
    return flags


def _dialect(parser: command_line.Parser, flags: argparse.Namespace) -> rules.Dialect:
    """How the input is read: as --schema says, or as the flags do."""
    fields = {field.name for field in dataclasses.fields(rules.Dialect)} - {"schema"}
    stated = {name: value for name, value in vars(flags).items() if name in fields}
    if flags.schema:
        for name in ("missing", "separator", "weight_separator", "newest_last"):
            if name in stated:
                parser.error(f"--{name} beside --schema, which says it")
        try:
            stated |= rules.of_schema(flags.schema)
        except OSError as error:
            parser.error(f"--schema: {error.filename}: {error.strerror}")
        except ValueError as error:
            parser.error(f"--schema: {error}")
    dialect = rules.Dialect(**stated)
    if not dialect.separator or not dialect.weight_separator:
        parser.error("--separator and --weight_separator: expected at least one character")
    return dialect


def _check_output(parser: command_line.Parser, flags: argparse.Namespace) -> None:
    if not flags.output.absolute().parent.is_dir():
        parser.error(f"--output: {flags.output.parent} is not a folder")
    if flags.output.exists():
        # It is replaced: it must not be a device, or the input.
        if not flags.output.is_file():
            parser.error(f"--output: {flags.output} is a folder or device, expected a file's name")
        read = 0 if flags.input == STANDARD else flags.input
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(read), flags.output.stat()):
                parser.error(f"--output: {flags.output} is the input")
    if flags.output.is_symlink():
        flags.output = flags.output.resolve()


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    flags = _flags(arguments)
    _end_on_signals()
    try:
        flags.run(flags)
    except BrokenPipeError:
        # The table's reader has closed the pipe: Python must not fail when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ScoringError as error:
        command_line.fail(error, 2 if error.code in _WRONG_COMMAND else 1)
    except (CandidateError, FeatureError, outputs.OutputError, OSError) as error:
        command_line.fail(error)


if __name__ == "__main__":
    main()
