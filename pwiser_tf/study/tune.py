"""Searches a loss's settings on the validation split, and those of BCE with as many trials.

    pwiser tune --flagfile=configs/us.flags --trials=30

Each trial trains a model with train's flags and other values of what is searched (`DEFAULTS`; or
--tune), and is worth its best epoch's monitored value: the mean of the CTR and CTCVR AUC on the
validation split. Optuna draws the values (TPE; the first trial has those of the flags) and stops
what falls behind the median of the trials before it. Plain BCE, the baseline, gets the same number
of trials, sampler, seed and pruner. The test split is never opened: it may be absent.

The study lives in --study_dir. Interrupted at any moment, it goes on when the same command is given
again, in the middle of a trial too, and finds what it would have found; --trials can be raised
later. The sampler's seed follows from --seed and the trial's number. (Only a kill in the
milliseconds in which a trial's values are drawn can change those values.)

    study.db         Optuna's storage (SQLite)
    trials/          the run under way, and each loss's best so far
    train.log        what training prints
    best.flags       for pwiser_tf.train: all flags, with the best values of --loss
    best-bce.flags   the same for the baseline
    trials.csv       a row a trial
    tune.png         the course of the search, and what mattered
"""

import contextlib
import json
import math
import pathlib
import shutil
import sys
import textwrap

import optuna
import sqlalchemy.exc
import tf_keras as keras
from absl import flags
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from pwiser_tf import config, report, runs
from pwiser_tf.config import OPTIONS, Config
from pwiser_tf.errors import DataError
from pwiser_tf.evaluation import evaluate
from pwiser_tf.schema import Schema
from pwiser_tf.study.tune_report import plot_studies, write_csv
from pwiser_tf.tasks import SCORE_SPACES, TASKS
from pwiser_tf.training import Diverged, fit, share_cores

BASELINE = "bce"

# What is searched for each loss, unless --tune says otherwise.
_RANKING = ("learning_rate", "ranking_weight")
DEFAULTS = {
    "bce": ("learning_rate",),
    "pwiser": (
        "learning_rate",
        "pwiser_weight",
        "loss_tasks",
        "score_space",
        "margin_click",
        "margin_nonclick",
    ),
    "ranknet": _RANKING,
    "combined_pair": _RANKING,
    "jrc": _RANKING,
    "listce": _RANKING,
    "focal": ("learning_rate", "focal_gamma"),
}
# Lowest and highest value, and whether they are searched as logarithms.
_RANGES = {
    **{
        name: field.metadata["search"]
        for name, (_, field) in OPTIONS.items()
        if field.metadata["search"]
    },
    # The margins where they are measured in logits: another quantity, so another parameter.
    "margin_click_logit": (0.1, 5.0, True),
    "margin_nonclick_logit": (0.1, 5.0, True),
}
_MARGINS = ("margin_click", "margin_nonclick")
_CHOICES = {
    "score_space": {space: space for space in SCORE_SPACES},
    "loss_tasks": {"both": TASKS, **{task: (task,) for task in TASKS}},
}
SEARCHABLE = tuple(dict.fromkeys([*sum(DEFAULTS.values(), ()), "conversion_weight"]))

_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
# No trial is stopped before so many trials are done, nor by its first epoch: a low learning rate
# begins slowly.
_TRIALS_BEFORE_PRUNING = 5
_EPOCHS_BEFORE_PRUNING = 1


def searched(loss: str, wanted: list[str] | None) -> tuple[str, ...]:
    """The settings to search for a loss: its own ones, or those of `wanted` that it has.

    Raises:
      DataError: `wanted` holds nothing that the loss has, or the score space without the margins.
    """
    if wanted is None:
        return DEFAULTS[loss]
    # The conversion weight is a control, plain BCE's way to what PWiseR does: of --tune alone.
    tasks = () if loss == BASELINE else ("loss_tasks",)
    has = tuple(dict.fromkeys((*DEFAULTS[loss], *tasks, "conversion_weight")))
    names = tuple(name for name in has if name in wanted)
    if not names:
        raise DataError(
            f"--tune={','.join(wanted)}: nothing of it applies to {loss}; expected some of "
            f"{','.join(has)}"
        )
    if "score_space" in names and not set(_MARGINS) <= set(names):
        raise DataError(
            f"--tune={','.join(wanted)}: score_space needs margin_click and margin_nonclick beside "
            "it, for one number is not the same margin in probabilities and in logits"
        )
    return names


def draw(trial: optuna.Trial, base: Config, names: tuple[str, ...]) -> Config:
    """The trial's settings: `base` with other values of those `names`, drawn by the trial."""
    values = {}
    for name in names:
        if name in _CHOICES:
            values[name] = _CHOICES[name][trial.suggest_categorical(name, list(_CHOICES[name]))]
        else:
            parameter = _parameter(name, values.get("score_space", base.loss.score_space))
            low, high, logarithmic = _RANGES[parameter]
            values[name] = trial.suggest_float(parameter, low, high, log=logarithmic)
    return base.replace(**values)


def _parameter(name: str, score_space: str) -> str:
    """The name under which the sampler knows a setting."""
    return f"{name}_logit" if name in _MARGINS and score_space == "logit" else name


def first_values(base: Config, names: tuple[str, ...]) -> dict:
    """The first trial's parameters: those of `base`, moved into the ranges that are searched."""
    parameters = {}
    for name in names:
        value = base.values()[name]
        if name in _CHOICES:
            # No task at all has no name among the choices: then the trial begins with both.
            found = [key for key, choice in _CHOICES[name].items() if choice == value]
            parameters[name] = found[0] if found else next(iter(_CHOICES[name]))
        else:
            parameter = _parameter(name, base.loss.score_space)
            low, high, _ = _RANGES[parameter]
            parameters[parameter] = min(max(value, low), high)
    return parameters


class Search:
    """The trials of one loss, of which any number may be done already.

    Attributes:
      loss: its name. names: what is searched. study: Optuna's.

    Raises:
      DataError: the study in the folder is of other flags or data, or it is no study.
    """

    def __init__(self, folder: pathlib.Path, base: Config, names: tuple[str, ...], schema: Schema):
        self.loss = base.loss.name
        self._base = base
        self.names = names
        self._trials = folder / "trials"
        self._log = folder / "train.log"
        path = folder / "study.db"
        try:
            self.study = optuna.create_study(
                storage=f"sqlite:///{path}",
                study_name=base.loss.name,
                direction="maximize",
                load_if_exists=True,
                pruner=optuna.pruners.MedianPruner(_TRIALS_BEFORE_PRUNING, _EPOCHS_BEFORE_PRUNING),
            )
            self._check(path, schema)
            if not self.study.trials:
                self.study.enqueue_trial(first_values(base, names))
        except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            detail = str(error.__cause__ or error).strip().split("\n")[0]
            raise DataError(f"not a study of pwiser_tf.tune ({detail})", file=path) from None

    def _check(self, path: pathlib.Path, schema: Schema) -> None:
        """DataError where the study is of other flags or data than those asked for."""
        asked = {**self._base.read(), "tune": self.names}
        # As the database gives it back; and a data set may be moved.
        asked = json.loads(json.dumps({**asked, "data_dir": schema.fingerprint}))
        held = self.study.user_attrs.get("asked")
        if held is None:
            self.study.set_user_attr("asked", asked)
        elif held != asked:
            name = next(name for name in asked if held.get(name) != asked[name])
            raise DataError(
                f"the study of {self.loss} in this folder has --{name}={held.get(name)}, not "
                f"{asked[name]}: give its own flags to go on with it, or another --study_dir",
                file=path,
            )

    def finished(self) -> list[FrozenTrial]:
        """The trials that were trained to their end or pruned."""
        return self.study.get_trials(states=_FINISHED)

    def best(self) -> FrozenTrial:
        """The best trial; DataError where none came to its end."""
        complete = self.study.get_trials(states=(TrialState.COMPLETE,))
        if not complete:
            raise DataError(f"every trial of {self.loss} diverged: lower --learning_rate")
        return max(complete, key=lambda trial: trial.value)

    def settings(self, trial: FrozenTrial) -> Config:
        """The settings that a trial had."""
        return draw(optuna.trial.FixedTrial(trial.params), self._base, self.names)

    def folder(self, trial: FrozenTrial | optuna.Trial) -> pathlib.Path:
        """The workdir of a trial's run."""
        return self._trials / f"{self.loss}-{trial.number + 1:03d}"

    def run_trial(self, checkpoint_seconds: float, show) -> FrozenTrial:
        """Runs one more trial, or the one that was interrupted; `show` is told of each epoch."""
        number = len(self.finished())
        self.study.sampler = optuna.samplers.TPESampler(seed=self._base.training.seed + number)
        interrupted = self.study.get_trials(states=(TrialState.RUNNING,))
        if interrupted:
            # Optuna has no public way to take up a trial that another process began.
            trial = optuna.Trial(self.study, interrupted[0]._trial_id)
        else:
            trial = self.study.ask()
        settings = draw(trial, self._base, self.names)
        # Epoch, from 0, to its monitored value.
        values = dict(self.study.trials[trial.number].intermediate_values)

        def falls_behind() -> bool:
            # After the last epoch there is nothing left to save.
            return len(values) < settings.training.epochs and trial.should_prune()

        def on_epoch(_, entry: dict) -> None:
            epoch, value = entry["epoch"] - 1, entry["monitored"]
            if all(value > earlier for step, earlier in values.items() if step < epoch):
                trial.set_user_attr("best_epoch", epoch + 1)
                for task in TASKS:
                    trial.set_user_attr(f"{task}_auc", entry["validation"][task]["auc"])
            if epoch not in values:
                trial.report(value, epoch)
                values[epoch] = value
            show(trial.number + 1, epoch + 1, value)
            if falls_behind():
                raise optuna.TrialPruned

        # Else graph on graph would gather in memory.
        keras.backend.clear_session()
        try:
            # Killed between this verdict and its entry in the database, the run ends here.
            if values and falls_behind():
                raise optuna.TrialPruned
            with self._training_in_log():
                _, _, progress = fit(settings, self.folder(trial), checkpoint_seconds, on_epoch)
        except optuna.TrialPruned:
            return self.study.tell(trial, state=TrialState.PRUNED)
        except Diverged:
            trial.set_user_attr("diverged", True)
            return self.study.tell(trial, state=TrialState.PRUNED)
        return self.study.tell(trial, progress.best_value)

    @contextlib.contextmanager
    def _training_in_log(self):
        with (
            self._log.open("a", encoding="utf-8") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            yield

    def tidy(self) -> None:
        """Deletes the runs of finished trials but the best: a run's weights take much room."""
        complete = self.study.get_trials(states=(TrialState.COMPLETE,))
        kept = self.folder(self.best()) if complete else None
        for folder in map(self.folder, self.finished()):
            if folder != kept and folder.exists():
                shutil.rmtree(folder)


def tune(
    base: Config,
    folder: pathlib.Path,
    trials: int,
    wanted: list[str] | None = None,
    checkpoint_seconds: float = 60,
) -> dict[str, Search]:
    """Runs or resumes the study in `folder` until its loss and BCE have as many trials each.

    Args:
      base: the settings of every trial, but for what is searched.
      folder: the study's; made if it is not there, and locked while this runs.
      trials: finished trials of each loss, those of earlier calls counted.
      wanted: what to search (of `SEARCHABLE`); None: `DEFAULTS`.
      checkpoint_seconds: how often a run's state is saved, besides after each epoch.

    Returns:
      Loss to its Search: that of BCE first, then that of the loss of `base`.

    Raises:
      DataError: as `train.fit`; a study of other flags or data; more trials than asked for.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    losses = dict.fromkeys((BASELINE, base.loss.name))
    names = {loss: searched(loss, wanted) for loss in losses}
    schema = Schema.load(base.data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with runs.locked(folder):
        searches = {
            loss: Search(folder, base.replace(loss=loss), names[loss], schema) for loss in losses
        }
        done = {loss: len(search.finished()) for loss, search in searches.items()}
        if max(done.values()) > trials:
            raise DataError(
                f"--trials={trials}: the study has {max(done.values())} already; ask for at least "
                "as many",
                file=folder,
            )
        bar = tqdm(
            total=len(losses) * trials, initial=sum(done.values()), unit="trial", disable=None
        )
        with bar:
            # In turn, so that a study broken off has compared equal numbers, or nearly.
            for number in range(trials):
                for search in searches.values():
                    search.tidy()
                    if len(search.finished()) > number:
                        continue

                    def show(trial: int, epoch: int, value: float, loss=search.loss) -> None:
                        bar.set_postfix_str(f"{loss} {trial}, epoch {epoch}: {value:.4f}")

                    trial = search.run_trial(checkpoint_seconds, show)
                    bar.update()
                    with tqdm.external_write_mode():
                        print(_line(search, trial), flush=True)
            for search in searches.values():
                search.tidy()
    return searches


def _line(search: Search, trial: FrozenTrial) -> str:
    values = ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in trial.params.items()
    )
    if trial.user_attrs.get("diverged"):
        outcome = "diverged"
    else:
        epochs = trial.intermediate_values
        outcome = f"{max(epochs.values()):.4f}, epoch {trial.user_attrs['best_epoch']}"
        outcome += f" of {len(epochs)}"
        if trial.state == TrialState.PRUNED:
            outcome += ", pruned"
        elif search.best().number == trial.number:
            outcome += ", best so far"
    return f"{search.loss} {trial.number + 1}: {outcome}; {values}"


def write_flagfile(path: pathlib.Path, header: list[str], values: dict) -> None:
    """Writes a flagfile whole or not at all.

    Args:
      path: of the file. header: lines of comment, without their "#".
      values: flag to its value; tuples are joined by commas, None is left out.
    """
    lines = [f"# {line}".rstrip() for line in header]
    for name, value in values.items():
        if value is not None:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            lines.append(f"--{name}={text}")
    aside = path.with_name(f".{path.name}.partial")
    try:
        aside.write_text("\n".join(lines) + "\n", encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _write_best(search: Search, args: flags.FlagValues, folder: pathlib.Path) -> pathlib.Path:
    """Writes a search's flagfile; returns its path."""
    trial = search.best()
    name = "best.flags" if search.loss == args.loss else f"best-{search.loss}.flags"
    tuned = f" --tune={','.join(args.tune)}" if args.tune else ""
    aucs = " and ".join(
        f"{trial.user_attrs[f'{task}_auc']:.4f} ({task.upper()})"
        for task in TASKS
        if trial.user_attrs[f"{task}_auc"] is not None
    )
    command = f"  pwiser tune --loss={args.loss} --trials={args.trials}{tuned}"
    header = [
        f"Number {trial.number + 1} of {len(search.finished())} trials of {search.loss}, the best, "
        "found with",
        "",
        command,
        "",
        *textwrap.wrap(
            f"and the flags below, but for those searched: {', '.join(search.names)}. Validation "
            f"AUC {aucs or 'undefined'} at epoch {trial.user_attrs['best_epoch']}; the test split "
            "was not opened.",
            98,
        ),
    ]
    values = {
        **search.settings(trial).values(),
        "data_dir": args.data_dir,
        "workdir": str(folder / f"run-{search.loss}"),
        "export_dir": args.export_dir,
        "model_name": args.model_name,
    }
    write_flagfile(folder / name, header, values)
    return folder / name


def judge(searches: dict[str, Search], data_dir: str) -> str:
    """The best trial of each loss on the validation split, and what may be concluded: text."""
    evaluations = {}
    for loss, search in searches.items():
        model, _, schema = runs.load_run(search.folder(search.best()))
        evaluations[loss] = evaluate(model, data_dir, schema, "validation", loss)
    summaries = {loss: evaluation.summary for loss, evaluation in evaluations.items()}
    lines = ["validation split, the best trial of each loss", report.table(summaries), ""]
    if len(evaluations) > 1:
        grade = evaluations[BASELINE].grade
        predictions = {loss: evaluation.predictions for loss, evaluation in evaluations.items()}
        lines += [report.difference_table(grade, predictions), ""]
    counts = "; ".join(
        f"{loss}, {len(search.finished())} trials over {', '.join(search.names)}"
        for loss, search in searches.items()
    )
    conversions = summaries[BASELINE]["ctcvr"]["positives"]
    lines += textwrap.wrap(
        f"Searched: {counts}. The best of many trials is judged here on the rows that chose it: "
        "its figures are too good, the more so the more was searched. The intervals know nothing "
        f"of that choice, and those of CTCVR rest on {conversions} conversions; a difference whose "
        "interval holds 0 tells nothing apart. What counts is the comparison on the test split "
        "over several seeds (pwiser study).",
        report.TABLE_WIDTH,
    )
    lines += [warning for search in searches.values() for warning in warnings_about(search)]
    return "\n".join(lines)


def warnings_about(search: Search) -> list[str]:
    """What about a search's best trial says that it may not be the best that there is."""
    trial, found = search.best(), []
    if trial.user_attrs["best_epoch"] == search.settings(trial).training.epochs:
        found.append(
            f"warning: {search.loss}: the best trial's last epoch was its best; it may be "
            "undertrained: raise --epochs"
        )
    for name, distribution in trial.distributions.items():
        if name in _RANGES:
            place, low, high = (
                math.log(value) if distribution.log else value
                for value in (trial.params[name], distribution.low, distribution.high)
            )
            if not 0.02 < (place - low) / (high - low) < 0.98:
                found.append(
                    f"warning: {search.loss}: {name} {trial.params[name]:.3g} lies at the edge of "
                    f"what was searched, {distribution.low:g} to {distribution.high:g}"
                )
    return found


def define_flags() -> None:
    """Defines the flags of this command: train's, and its own."""
    config.define_flags()
    config.define_run_flags()
    flags.DEFINE_integer("trials", None, "Trials of each loss.", lower_bound=1, required=True)
    flags.DEFINE_string("study_dir", None, "The folder of this study; default: WORKDIR-tune.")
    flags.DEFINE_list(
        "tune",
        None,
        f"What to search, out of {','.join(SEARCHABLE)}; default: what --loss has of its own, and "
        "learning_rate. The baseline searches what of it plain BCE has.",
    )
    flags.register_validator(
        "tune",
        lambda names: names is None or (bool(names) and set(names) <= set(SEARCHABLE)),
        message=f"expected names out of {','.join(SEARCHABLE)}",
    )


def main() -> None:
    """Tunes as the flags say."""
    args = flags.FLAGS
    settings = config.config_from_flags(args, given=sys.argv[1:])
    folder = pathlib.Path(args.study_dir or f"{args.workdir.rstrip('/')}-tune")
    share_cores()
    with runs.file_errors():
        searches = tune(settings, folder, args.trials, args.tune, args.checkpoint_seconds)
        studies = {loss: search.study for loss, search in searches.items()}
        write_csv(folder / "trials.csv", studies)
        plot_studies(folder / "tune.png", studies)
        print(judge(searches, settings.data_dir))
        written = [str(_write_best(search, args, folder)) for search in searches.values()]
        print(f"for pwiser_tf.train: {', '.join(written)}; plot in {folder / 'tune.png'}")
