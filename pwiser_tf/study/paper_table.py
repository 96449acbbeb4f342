"""The paper's table: models x losses x seeds on any data, as paired differences with error bars.

    pwiser study --data=demo/data --settings=configs/sample.flags \\
        --models=single_task,mmoe --losses=bce,bce:conversion_weight=4,pwiser --seeds=5 \\
        --output_dir=demo/table

An entry of --models and --losses is a name with any of train's flags that differ from --settings:
pwiser:margin_click=0.1:learning_rate=0.003. The elements of a list are joined by +, as in
bottom_units=64+32. The first loss is the baseline that the others are compared with. Where two
entries set the same flag, the loss's holds.

Each run has the folder runs/DATA/MODEL/LOSS/seed-N and is trained once: the same command, or one
with more models, losses or seeds, keeps finished runs and resumes others. It also writes table.md,
results.json, differences.png, calibration.png and epochs.png.
"""

import pwiser_tf.quiet  # noqa: F401

# isort: split

import os
import pathlib
import shlex
import signal
import sys

from absl import flags

from pwiser_tf import data, runs
from pwiser_tf.command_line import run
from pwiser_tf.config import OPTIONS, Config, config_from_arguments
from pwiser_tf.errors import DataError
from pwiser_tf.options import kind_of
from pwiser_tf.schema import SPLITS, Schema
from pwiser_tf.study import paper_report, paper_results
from pwiser_tf.study.paper_runs import Run, read_result, train_all
from pwiser_tf.tasks import LOSSES

# What the table itself sets for each run.
_OURS = ("data_dir", "model", "loss", "seed")


def split_entry(text: str, flag: str) -> tuple[str, list[str]]:
    """An entry "name[:flag=value]..." as its name and train's arguments ["--flag=value", ...].

    Args:
      text: the entry. flag: the flag that it was given to, for errors.

    Raises:
      DataError: not of that form, or a flag that train does not have or that the table sets.
    """
    name, *overrides = text.split(":")
    if not name or "/" in text.removeprefix(name):
        raise DataError(f"--{flag}: expected name[:flag=value]..., found {text!r}")
    arguments = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key not in OPTIONS or key in _OURS or not value:
            known = ", ".join(known for known in OPTIONS if known not in _OURS)
            raise DataError(
                f"--{flag}, entry {text}: expected flag=value with a flag out of {known}; "
                f"found {override!r}"
            )
        if kind_of(OPTIONS[key][1]) is tuple:
            value = value.replace("+", ",")
        arguments.append(f"--{key}={value}")
    return name, arguments


def settings_of(base: str | None, data_dir: str, model: str, loss: str, more: list) -> Config:
    """The settings of a model's and loss's entry; see the module's text.

    Args:
      base: "FILE[:flag=value]...", a flagfile of train, whose own data and folders do not count;
        None for train's defaults. data_dir: the data set's folder.
      model, loss: the entries. more: further arguments of train, which come last.

    Raises:
      DataError: what train would refuse.
    """
    arguments = []
    if base:
        file, overrides = split_entry(base, "settings")
        arguments += [f"--flagfile={file}", *overrides]
    for flag, of_table, entry in (("model", "models", model), ("loss", "losses", loss)):
        name, overrides = split_entry(entry, of_table)
        arguments += [f"--{flag}={name}", *overrides]
    try:
        return config_from_arguments([*arguments, f"--data_dir={data_dir}", *more])
    except DataError as error:
        raise DataError(f"model {model} with loss {loss}: {error}") from None


def _data_folders(entries: list[str]) -> dict[str, pathlib.Path]:
    """The data sets' folders by name: "NAME=DIR", or DIR, whose last part is then the name."""
    folders = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        folder = pathlib.Path(path if equals else entry).resolve()
        name = name if equals else folder.name
        if not name or "/" in name or name in folders:
            raise DataError(
                f"--data: expected a different name for each data set, found {name!r} in {entry}; "
                "NAME=DIR gives one"
            )
        folders[name] = folder
    return folders


def _distinct(flag: str, entries: list[str]) -> list[str]:
    """The entries; DataError where there are none, or two alike."""
    twice = [entry for entry in entries if entries.count(entry) > 1]
    if not entries or twice:
        found = f"{twice[0]} twice" if twice else "none"
        raise DataError(f"--{flag}: expected different entries, found {found}")
    return entries


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_list(
        "data",
        None,
        "Converted data sets, DIR or NAME=DIR: a table each. The name is the folder's by default.",
        required=True,
    )
    flags.DEFINE_list("models", None, "Entries of architectures; see above.", required=True)
    flags.DEFINE_list(
        "losses", ["bce", "pwiser"], "Entries of losses, the baseline first; see above."
    )
    flags.DEFINE_string(
        "settings",
        None,
        "What all runs have in common: a flagfile of train, FILE[:flag=value]...; its data, "
        "folders and seed do not count. Default: train's defaults.",
    )
    flags.DEFINE_integer("seeds", 5, "Runs of each model and loss: seeds 0, 1, ...", lower_bound=1)
    flags.DEFINE_string("output_dir", None, "Where runs and tables go.", required=True)
    flags.DEFINE_integer(
        "parallel",
        None,
        "Processes that train side by side, each on its share of the cores. Default: one a core.",
        lower_bound=1,
    )
    flags.DEFINE_enum(
        "published",
        None,
        list(paper_results.PUBLISHED),
        "Show MTReclib's numbers for this country. Default: the country in an AliExpress data "
        "set's schema.",
    )


def main() -> None:
    """Trains the runs that are not finished, and writes the tables."""
    signal.signal(signal.SIGTERM, _interrupted)
    args = flags.FLAGS
    folders = _data_folders(args.data)
    models, losses = _distinct("models", args.models), _distinct("losses", args.losses)
    schemas = {name: Schema.load(folder) for name, folder in folders.items()}
    for name, folder in folders.items():
        for split in SPLITS:
            data.check(folder, schemas[name], split)
    output = pathlib.Path(args.output_dir).resolve()
    planned = _plan(args, folders, models, losses, output / "runs")
    output.mkdir(parents=True, exist_ok=True)
    with runs.locked(output):
        unfinished = [run for run in planned if read_result(run, schemas[run.data]) is None]
        print(f"{len(planned)} runs, {len(planned) - len(unfinished)} of them finished", flush=True)
        if unfinished:
            train_all(unfinished, args.parallel or len(os.sched_getaffinity(0)))
        finished = [
            paper_results.Finished(run, read_result(run, schemas[run.data])) for run in planned
        ]
        command = "pwiser study " + shlex.join(sys.argv[1:])
        found = paper_results.results(finished, schemas, command, args.published)
        paper_report.write(found, output)
    print((output / "table.md").read_text(encoding="utf-8"))
    print(f"written to {output}")


def _plan(args, folders, models, losses, runs_folder: pathlib.Path) -> list[Run]:
    """All runs, in the order in which they are trained: seed by seed."""
    # The runs of a pair need the same batches: those that one of the losses needs.
    names = {split_entry(loss, "losses")[0] for loss in losses} & set(LOSSES)
    more = ["--shuffle=groups"] if any(LOSSES[name].needs_groups for name in names) else []
    planned = {
        (name, model, loss): settings_of(args.settings, str(folder), model, loss, more)
        for name, folder in folders.items()
        for model in models
        for loss in losses
    }
    return [
        Run(
            *key,
            settings.replace(seed=seed),
            runs_folder / pathlib.Path(*(part.replace(":", ",") for part in key)) / f"seed-{seed}",
        )
        for seed in range(args.seeds)
        for key, settings in planned.items()
    ]


def _interrupted(signum, frame):
    raise KeyboardInterrupt


if __name__ == "__main__":
    define_flags()
    run(main)
