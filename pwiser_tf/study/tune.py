"""Searches the options of a loss on the validation split, and those of BCE with as many trials.

    pwiser tune --flagfile=configs/us.flags --trials=30

Each trial trains a model with the flags of `pwiser train` and other values of the searched options
(by default those of the loss and the learning rate; or --tune). Its value is the best over its
epochs of the mean of the CTR and CTCVR AUC on the validation split. Optuna draws the options (TPE;
the first trial has those of the flags) and prunes trials that fall behind the median of earlier
ones. Plain BCE, the baseline, gets the same number of trials, sampler, seed and pruner. The test
split is never opened: it may be absent.

The study is stored in --study_dir. The same command resumes it, also in the middle of a trial, and
finds what an uninterrupted study would have found; --trials can be raised later. The sampler's seed
follows from --seed and the trial's number. (Only a kill in the milliseconds in which the options of
a trial are drawn can change them.) Trials run in a worker process that is replaced after some of
them, so that the memory in use stays the same.

    study.db         Optuna's storage (SQLite)
    trials/          the run of the current trial, and the best run of each loss
    train.log        the output of training
    best.flags       for pwiser train: all flags, with the best values of --loss
    best-bce.flags   the same for the baseline
    trials.csv       a row a trial
    tune.png         the course of the search, and which options mattered
"""

import math
import pathlib
import shutil
import sys
import textwrap
from collections.abc import Callable

import optuna
import sqlalchemy.exc
from absl import flags
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from pwiser_tf import config, report, runs
from pwiser_tf.config import OPTIONS, Config, changed_options
from pwiser_tf.errors import DataError
from pwiser_tf.evaluation import evaluate
from pwiser_tf.files import write_text
from pwiser_tf.schema import Schema
from pwiser_tf.study import tune_report, workers
from pwiser_tf.study.workers import Job, Pool
from pwiser_tf.tasks import LOSSES, SCORE_SPACES, TASKS
from pwiser_tf.training import Diverged, fit, share_cores

BASELINE = "bce"

# Lowest and highest value, and whether they are searched as logarithms.
_RANGES = {
    name: field.metadata["search"]
    for name, (_, field) in OPTIONS.items()
    if field.metadata["search"]
}
_MARGINS = ("margin_click", "margin_nonclick")
# The margins where they are measured in logits: another quantity, so another parameter.
_LOGIT_RANGE = (0.1, 5.0, True)
_CHOICES = {
    "loss_tasks": {"both": TASKS, **{task: (task,) for task in TASKS}},
    "score_space": {space: space for space in SCORE_SPACES},
}
# In the order in which a trial draws them: the range of a margin depends on the score space.
SEARCHABLE = tuple(dict.fromkeys(["learning_rate", "pwiser_weight", *_CHOICES, *_RANGES]))

_COMPLETE, _PRUNED, _DIVERGED = "complete", "pruned", "diverged"
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
# No trial is pruned before this many trials, nor by its first epoch: a low learning rate begins
# slowly.
_TRIALS_BEFORE_PRUNING = 5
_EPOCHS_BEFORE_PRUNING = 1


def searched(loss: str, wanted: list[str] | None) -> tuple[str, ...]:
    """The options to search for a loss: those of `wanted` that it reads, by default its own.

    Raises:
      DataError: the loss reads none of `wanted`, or `wanted` has the score space without margins.
    """
    read = ("learning_rate", "conversion_weight", *LOSSES[loss].options)
    has = tuple(name for name in SEARCHABLE if name in read)
    if wanted is None:
        # The conversion weight is a control: BCE's way to do what PWiseR does.
        left_out = ["conversion_weight", *(() if "score_space" in has else _CHOICES)]
        return tuple(name for name in has if name not in left_out)
    names = tuple(name for name in has if name in wanted)
    if not names:
        raise DataError(
            f"--tune={','.join(wanted)}: nothing of it applies to {loss}; expected some of "
            f"{','.join(has)}"
        )
    if "score_space" in names and not set(_MARGINS) <= set(names):
        raise DataError(
            f"--tune={','.join(wanted)}: score_space needs margin_click and margin_nonclick beside "
            "it, because the same number is another margin in logits than in probabilities"
        )
    return names


def draw(trial: optuna.Trial, base: Config, names: tuple[str, ...]) -> Config:
    """`base` with values of the options `names` that the trial draws."""
    values = {}
    for name in names:
        if name in _CHOICES:
            values[name] = _CHOICES[name][trial.suggest_categorical(name, list(_CHOICES[name]))]
        else:
            space = values.get("score_space", base.loss.score_space)
            parameter, (low, high, logarithmic) = _parameter(name, space)
            values[name] = trial.suggest_float(parameter, low, high, log=logarithmic)
    return base.replace(**values)


def _parameter(name: str, score_space: str) -> tuple[str, tuple[float, float, bool]]:
    """The name of an option in the study, and its range."""
    if name in _MARGINS and score_space == "logit":
        return f"{name}_logit", _LOGIT_RANGE
    return name, _RANGES[name]


def first_values(base: Config, names: tuple[str, ...]) -> dict:
    """The parameters of the first trial: those of `base`, moved into their ranges."""
    parameters = {}
    for name in names:
        value = base.values()[name]
        if name in _CHOICES:
            # No task at all has no name among the choices: then the trial begins with both.
            found = [key for key, choice in _CHOICES[name].items() if choice == value]
            parameters[name] = found[0] if found else next(iter(_CHOICES[name]))
        else:
            parameter, (low, high, _) = _parameter(name, base.loss.score_space)
            parameters[parameter] = min(max(value, low), high)
    return parameters


def _train_trial(config: Config, folder: pathlib.Path, checkpoint_seconds: float) -> str:
    """In a worker: trains or resumes a trial; the parent process decides after each epoch."""

    def on_epoch(_, entry: dict) -> None:
        aucs = {task: entry["validation"][task]["auc"] for task in TASKS}
        if not workers.ask((entry["epoch"] - 1, entry["monitored"], aucs)):
            raise optuna.TrialPruned

    try:
        fit(config, folder, checkpoint_seconds, on_epoch)
    except optuna.TrialPruned:
        return _PRUNED
    except Diverged:
        return _DIVERGED
    return _COMPLETE


class Search:
    """The trials of one loss, some of which may be finished.

    Attributes:
      loss: its name. names: the searched options. study: Optuna's.

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
        asked = {**self._base.read(), "data_dir": schema.data_fingerprint, "tune": self.names}
        held = self.study.user_attrs.get("asked")
        if held is None:
            self.study.set_user_attr("asked", asked)
            return
        for name, (old, new) in changed_options(held, asked).items():
            raise DataError(
                f"the study of {self.loss} in this folder has --{name}={old}, not {new}: give its "
                "own flags to resume it, or another --study_dir",
                file=path,
            )

    def finished(self) -> list[FrozenTrial]:
        """The trials that are complete or pruned."""
        return self.study.get_trials(states=_FINISHED)

    def best(self) -> FrozenTrial:
        """The best trial, of equal ones the first; DataError where none is complete."""
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

    def run_trial(self, pool: Pool, checkpoint_seconds: float, show: Callable) -> FrozenTrial:
        """Runs one more trial, or the one that was interrupted.

        Args:
          pool: of one worker. show: called with a line of text after each epoch.
        """
        number = len(self.finished())
        self.study.sampler = optuna.samplers.TPESampler(seed=self._base.training.seed + number)
        interrupted = self.study.get_trials(states=(TrialState.RUNNING,))
        if interrupted:
            # Optuna has no public way to resume a trial that another process began.
            trial = optuna.Trial(self.study, interrupted[0]._trial_id)
        else:
            trial = self.study.ask()
        config = draw(trial, self._base, self.names)
        name = f"{self.loss} {trial.number + 1}"
        # Epoch, from 0, to its monitored value.
        values = dict(self.study.trials[trial.number].intermediate_values)

        def falls_behind() -> bool:
            # After the last epoch there is nothing left to save.
            return len(values) < config.training.epochs and trial.should_prune()

        def record(epoch: int, value: float, aucs: dict) -> bool:
            """Records a finished epoch; whether training is to go on."""
            if all(value > earlier for step, earlier in values.items() if step < epoch):
                trial.set_user_attr("best_epoch", epoch + 1)
                for task, auc in aucs.items():
                    trial.set_user_attr(f"{task}_auc", auc)
            if epoch not in values:
                trial.report(value, epoch)
                values[epoch] = value
            show(f"{name}, epoch {epoch + 1}: {value:.4f}")
            return not falls_behind()

        outcome = _PRUNED
        # It may have been interrupted between the decision to prune it and `tell`.
        if not (values and falls_behind()):
            arguments = config, self.folder(trial), checkpoint_seconds
            job = Job(name, self._log, _train_trial, arguments)
            [(_, outcome)] = pool.run([job], answer=lambda question: record(*question))
        if outcome == _COMPLETE:
            return self.study.tell(trial, max(values.values()))
        if outcome == _DIVERGED:
            trial.set_user_attr("diverged", True)
        return self.study.tell(trial, state=TrialState.PRUNED)

    def delete_runs(self) -> None:
        """Deletes the runs of finished trials except the best: their weights fill the disk."""
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
    """Runs or resumes the study in `folder` until the loss of `base` and BCE have `trials` each.

    Args:
      base: the config of every trial, except for the searched options.
      folder: of the study; it is created if absent, and locked while this runs.
      trials: finished trials of each loss, those of earlier calls included.
      wanted: the options to search, see `searched`.
      checkpoint_seconds: the interval at which a run's state is saved, besides after each epoch.

    Returns:
      Loss to its Search: that of BCE first.

    Raises:
      DataError: as `training.fit`; a study of other flags or data, or with more trials.
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
        with bar, Pool(1) as pool:
            # In turn, so that an interrupted study has compared equal numbers, or nearly.
            for number in range(trials):
                for search in searches.values():
                    if len(search.finished()) <= number:
                        trial = search.run_trial(pool, checkpoint_seconds, bar.set_postfix_str)
                        bar.update()
                        with tqdm.external_write_mode():
                            print(_describe(search, trial), flush=True)
                    search.delete_runs()
    return searches


def _describe(search: Search, trial: FrozenTrial) -> str:
    values = ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in trial.params.items()
    )
    outcome = tune_report.outcome(trial)
    if outcome != "diverged":
        best = ", best so far" if search.best().number == trial.number else ""
        outcome = (
            f"{tune_report.best_value(trial):.4f}, epoch {trial.user_attrs['best_epoch']} of "
            f"{len(trial.intermediate_values)}{', pruned' if outcome == 'pruned' else best}"
        )
    return f"{search.loss} {trial.number + 1}: {outcome}; {values}"


def _write_best(search: Search, args: flags.FlagValues, folder: pathlib.Path) -> pathlib.Path:
    """Writes the flagfile of a search's best trial; returns its path."""
    trial = search.best()
    path = folder / ("best.flags" if search.loss == args.loss else f"best-{search.loss}.flags")
    tuned = f" --tune={','.join(args.tune)}" if args.tune else ""
    aucs = " and ".join(
        f"{trial.user_attrs[f'{task}_auc']:.4f} ({task.upper()})"
        for task in TASKS
        if trial.user_attrs[f"{task}_auc"] is not None
    )
    comment = [
        f"Number {trial.number + 1} of {len(search.finished())} trials of {search.loss}, the best, "
        "found with",
        "",
        f"  pwiser tune --loss={args.loss} --trials={args.trials}{tuned}",
        "",
        *textwrap.wrap(
            f"and the flags below, except for the searched ones: {', '.join(search.names)}. "
            f"Validation AUC {aucs or 'undefined'} at epoch {trial.user_attrs['best_epoch']}; the "
            "test split was not opened.",
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
    lines = [f"# {line}".rstrip() for line in comment]
    for name, value in values.items():
        if value is not None:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            lines.append(f"--{name}={text}")
    write_text(path, "\n".join(lines) + "\n")
    return path


def compare_best(searches: dict[str, Search], data_dir: str) -> str:
    """The best trials of the losses on the validation split, and what follows from it, as text."""
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
        f"Searched: {counts}. The best of many trials is evaluated here on the rows that chose "
        "it: its figures are too good, the more so the more trials there are. The intervals do not "
        f"include that choice, and those of CTCVR rest on {conversions} conversions; where the "
        "interval of a difference contains 0, no difference was shown. What counts is the "
        "comparison on the test split over several seeds (pwiser study).",
        report.TABLE_WIDTH,
    )
    lines += [warning for search in searches.values() for warning in warnings_about(search)]
    return "\n".join(lines)


def warnings_about(search: Search) -> list[str]:
    """Signs that a better trial than the best one exists: it stopped early, or is at an edge."""
    trial, found = search.best(), []
    if trial.user_attrs["best_epoch"] == search.settings(trial).training.epochs:
        found.append(
            f"warning: {search.loss}: the best trial's last epoch was its best; it may be "
            "undertrained: raise --epochs"
        )
    for name, value in trial.params.items():
        if isinstance(value, float):
            searched = trial.distributions[name]
            scale = math.log if searched.log else float
            low, high = scale(searched.low), scale(searched.high)
            if not 0.02 < (scale(value) - low) / (high - low) < 0.98:
                found.append(
                    f"warning: {search.loss}: {name} {value:.3g} lies at the edge of the searched "
                    f"range, {searched.low:g} to {searched.high:g}"
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
        f"The options to search, out of {','.join(SEARCHABLE)}; default: learning_rate and those "
        "of --loss. The baseline searches those of them that BCE reads.",
    )
    flags.register_validator(
        "tune",
        lambda names: names is None or (bool(names) and set(names) <= set(SEARCHABLE)),
        message=f"expected names out of {','.join(SEARCHABLE)}",
    )


def main() -> None:
    """Runs the study and writes its results."""
    args = flags.FLAGS
    settings = config.config_from_flags(args, given=sys.argv[1:])
    folder = pathlib.Path(args.study_dir or f"{args.workdir.rstrip('/')}-tune")
    share_cores()
    with runs.file_errors():
        searches = tune(settings, folder, args.trials, args.tune, args.checkpoint_seconds)
        studies = {loss: search.study for loss, search in searches.items()}
        tune_report.write_csv(folder / "trials.csv", studies)
        tune_report.plot_studies(folder / "tune.png", studies)
        print(compare_best(searches, settings.data_dir))
        written = [str(_write_best(search, args, folder)) for search in searches.values()]
        print(f"for pwiser_tf.train: {', '.join(written)}; plot in {folder / 'tune.png'}")
