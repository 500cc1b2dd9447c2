"""`clbench sweep`: the runs of an experiment file, trained, evaluated and compared. Finished runs are not run again.

name: cw10                          # the report goes to results/reports/cw10
model: dit_dec_tiny
dataset: metaworld_cw10
seeds: [0, 1, 2]
algorithms: [seqfft, er, clare]     # names, or {algo: er, label: er_lr3, overrides: [train.optimizer.lr=3e-4]}
overrides: [eval.episodes=20]       # for all runs
parallel: 2                         # runs at once, each with one thread
executor: local                     # what runs the commands (clbench list executors)

Its work is a graph of units (execution/units.py), which `--dry-run` prints; an executor runs them.
"""

from __future__ import annotations

import shlex
import shutil
import time
import unicodedata
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from clbench.config.compose import compose, load_yaml
from clbench.config.dit import check_policy
from clbench.config.folders import find, names
from clbench.config.policy_types import check_fits
from clbench.config.schema import Config, base_origin
from clbench.errors import UserError, nearest
from clbench.evaluation.records import eval_folder
from clbench.execution.local import KEPT
from clbench.execution.units import Unit, check
from clbench.io import read_json
from clbench.lock import held, taken_by
from clbench.paths import bases_root, data_root, results_root
from clbench.patience import patience
from clbench.registry import algorithm_names, load
from clbench.stopping import Stop, stoppable
from clbench.streams.stream import visit_order
from clbench.terminal import last_line, show, tell

NO_SIMULATOR = "the stream has no simulator and holds out no episodes (dataset.env: null, dataset.holdout: 0)"
LOCK_SECONDS = 60.0  # to wait for another command of one of its runs


@dataclass
class Method:
    """One algorithm of an experiment, or a combination of several joined by commas.

    Attributes:
        label: used in its runs' names.
        prefixes: also one run on the stream's first task, one on its first two, and so on (LABEL_first1, …); with
            multitask, the references for the metric intransigence_prefixes.
    """

    algo: str = ""
    label: str = ""
    overrides: list[str] = field(default_factory=list)
    prefixes: bool = False


@dataclass
class Experiment:
    """The keys of an experiment file."""

    name: str = ""
    model: str = "dit_dec_tiny"
    dataset: str = "metaworld_quick"
    seeds: list[int] = field(default_factory=lambda: [0])
    algorithms: list[str | Method] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    parallel: int = 1
    executor: str = "local"
    smoke: bool = False


@dataclass(frozen=True)
class PlannedRun:
    """One run of an experiment."""

    run_id: str
    train: tuple[str, ...]
    config: Config


def load_experiment(name: str) -> tuple[Experiment, list[PlannedRun]]:
    """Read an experiment file and list its runs; raises UserError for unknown keys and names."""
    from clbench.checkpoints.run_folder import results_folder

    path = Path(name) if name.endswith((".yaml", ".yml")) else find("experiments", name)
    if path is None or not path.is_file():
        raise UserError(f"no experiment '{name}'.{nearest(name, names('experiments'))}")
    experiment = Experiment(**load_yaml(path, Experiment))
    if not experiment.algorithms or not experiment.seeds:
        raise UserError(f"{path}: algorithms and seeds must not be empty.")
    if experiment.parallel < 1:
        raise UserError(f"{path}: parallel must be at least 1 but is {experiment.parallel}.")
    experiment.name = experiment.name or path.stem
    results_folder(experiment.name, None)  # its logs and its report go to folders of that name
    entries = [Method(e) if isinstance(e, str) else Method(**e) for e in experiment.algorithms]  # type: ignore[arg-type]
    if not all(e.algo for e in entries):
        raise UserError(f"{path}: an algorithm is a name or {{algo, label, overrides}}; one lacks algo.")
    if any(e.prefixes for e in entries):
        entries = [part for e in entries for part in (e, *(_prefixes(e, experiment) if e.prefixes else ()))]
    runs = []
    for seed in experiment.seeds:  # all of one seed before the next
        for entry in entries:
            algo = entry.algo
            run_id = f"{experiment.name}_{entry.label or algo}_s{seed}"
            results_folder(run_id, None)  # a name or label must not lead elsewhere
            own: tuple[str, ...] = ("--algo", algo, "--seed", str(seed), "--run-id", run_id, "--resume")
            overrides = (*experiment.overrides, *entry.overrides)
            config, _ = compose(
                model=experiment.model,
                algorithms=algo.split(","),
                dataset=experiment.dataset,
                registered=algorithm_names(),
                overrides=[f"seed={seed}", *overrides],
                smoke=experiment.smoke,
                source=str(path),
            )
            if config.train.eval_during_training is not None:  # measured by the evaluation's unit
                own += ("--curves-later",)
            runs.append(PlannedRun(run_id, (*_axes(experiment), *own, "--", *overrides), config))
    folders = [unicodedata.normalize("NFC", run.run_id).casefold() for run in runs]  # as some file systems see them
    for run, folder in zip(runs, folders, strict=True):
        if folders.count(folder) > 1:
            raise UserError(f"{path}: two runs for the folder {run.run_id}. Use different labels, and each seed once.")
    if len({run.config.eval.split for run in runs}) > 1:
        raise UserError(f"{path}: its runs differ in eval.split, but one report cannot hold both. Write two files.")
    return experiment, runs


def _prefixes(entry: Method, experiment: Experiment) -> list[Method]:
    """The entry's runs on the stream's first task, its first two, …, all but the last."""
    config, _ = compose(
        model=experiment.model,
        algorithms=entry.algo.split(","),
        dataset=experiment.dataset,
        registered=algorithm_names(),
        overrides=[*experiment.overrides, *entry.overrides],
        smoke=experiment.smoke,
    )
    order = list(dict.fromkeys(visit_order(config.dataset)))
    return [
        Method(
            entry.algo,
            f"{entry.label or entry.algo}_first{k}",
            [*entry.overrides, f"dataset.task_order=[{', '.join(order[:k])}]", "dataset.libero_order=null"],
        )
        for k in range(1, len(order))
    ]


def _axes(experiment: Experiment) -> tuple[str, ...]:
    smoke = ("--smoke",) if experiment.smoke else ()
    return ("--model", experiment.model, "--dataset", experiment.dataset, *smoke)


def evaluated(config: Config) -> bool:
    """Whether runs can be evaluated: in a simulator, or on held-out episodes."""
    return config.dataset.env is not None or config.dataset.holdout > 0


def finished(run: PlannedRun) -> bool:
    """Whether a run is trained, and evaluated if it has a simulator, with the experiment's settings."""
    from clbench.checkpoints.changes import FREE_ON_RESUME, changed_keys
    from clbench.checkpoints.kept import curves_lack
    from clbench.checkpoints.run_folder import finished_visits, read_manifest

    folder = results_root() / run.run_id
    complete = eval_folder(folder, run.config.eval.split) / "complete.json"
    played = evaluated(run.config)
    if not (folder / "manifest.json").is_file() or (played and not complete.is_file()):
        return False
    manifest = read_manifest(folder)
    if finished_visits(folder) != len(manifest["checkpoints"]):
        return False
    if not played:
        return not changed_keys(folder, run.config, FREE_ON_RESUME)
    done, asked = read_json(complete), run.config.eval
    if not isinstance(done, dict) or not isinstance(done.get("views", []), list):
        raise UserError(f"{complete} is damaged: it does not state what was evaluated. Remove it and evaluate again.")
    covered = done.get("cells") in {asked.cells, "full"} and done.get("episodes") == asked.episodes
    covered &= all(v in done.get("views", []) for v in asked.views)
    covered &= asked.heldout_episodes in (0, done.get("heldout_episodes", 0))
    if run.config.train.eval_during_training is not None and manifest["mode"] != "multitask":
        covered &= not curves_lack(folder, len(manifest["checkpoints"]))
    return covered and not changed_keys(folder, run.config, FREE_ON_RESUME)


def run_sweep(name: str, dry_run: bool = False, trust: Sequence[str] = (), report: bool = False) -> int:
    """Run what is left of an experiment; returns 1 when a run failed, after the others have finished.

    Args:
        trust: what --trust names. Its commands get that and the experiment's own runs.
        report: only draw the report of the runs that are finished.

    Raises Interrupted when a signal asked to stop; the runs under way have saved.
    """
    if report:
        experiment, runs = load_experiment(name)
        return draw_report(name, experiment, runs)
    with stoppable() as stop, ExitStack() as stack:
        return _run_sweep(name, dry_run, trust, stop, stack)


def _run_sweep(name: str, dry_run: bool, trust: Sequence[str], stop: Stop, stack: ExitStack) -> int:
    experiment, runs = load_experiment(name)
    logs = results_root() / "sweeps" / experiment.name
    if not dry_run:
        stack.enter_context(held(logs, "sweep"))  # two of one experiment would train the same runs
    left = [r for r in runs if not finished(r)]
    show(f"experiment {experiment.name}: {len(runs) - len(left)} of {len(runs)} runs are finished")
    if runs and not evaluated(runs[0].config):
        show(f"{NO_SIMULATOR}: runs are trained but not evaluated")
    for r in runs:
        check_policy(r.config.policy)
        check_fits(r.config)
    with patience("checking the configurations"):
        from clbench.algorithms.build import build_algorithm

        for r in runs:  # errors visible in a configuration, before any heavy work
            build_algorithm(r.config)
    graph = units(experiment, runs, logs, trust, name)
    if dry_run:
        for unit in graph:
            done = any(unit.about == r.run_id for r in runs) and all(unit.about != r.run_id for r in left)
            after = f", after {', '.join(unit.after)}" if unit.after else ""
            show(f"  {'done' if done else 'left'}  {unit.name}{after}: {shlex.join(('clbench', *unit.arguments))}")
        return 0
    for stale in logs.glob(".slots-*"):  # left by a sweep that was killed
        shutil.rmtree(stale)
    if not left:
        return draw_report(name, experiment, runs)
    show(f"runs → {results_root()}, their output → {logs}")
    _wait_for_locks(left, stop)
    graph = units(experiment, left, logs, trust, name)
    statuses = load("executors", experiment.executor)(experiment.parallel, logs).run(graph, stop)
    for unit in graph:
        if statuses[unit.name]:
            tell(f"failed: {unit.about}; see {unit.log}")
    if statuses.get("report") == 0 and (said := last_line(graph[-1].log)):
        show(said)
    return 1 if any(status != 0 for status in statuses.values()) else 0


def units(
    experiment: Experiment, runs: Sequence[PlannedRun], logs: Path, trust: Sequence[str], name: str
) -> list[Unit]:
    """The graph of an experiment: demonstrations if they are missing, the base, each run, the report.

    The base is shared: it is made before runs race for it, with all cores. All of one seed comes before the next.
    Within a seed, training runs come first, the longest of them first, because the evaluations, which can be shared
    among slots, fill what is left (slots.py).
    """
    found: list[Unit] = []
    first: tuple[str, ...] = ()
    axes, shared = _axes(experiment), experiment.overrides
    if runs and _lacks_data(runs[0].config):
        own = [o for o in shared if o.removeprefix("--").startswith(("dataset.", "render."))]
        arguments = ("data", "make", experiment.dataset, *(("--", *own) if own else ()))
        found.append(Unit("demonstrations", "demonstrations", arguments, logs / "data.log", data_root(),
                          order=(-2,), cores=0, about="the demonstrations"))  # fmt: skip
        first = ("demonstrations",)
    found.append(Unit("base", "base", ("pretrain", *axes, *_trusting(trust), "--", *shared), logs / "pretrain.log",
                      bases_root(), first, order=(-1,), cores=0, about="the base"))  # fmt: skip
    seeds = list(dict.fromkeys(r.config.seed for r in runs))
    workers = ("--workers", "1") if experiment.parallel > 1 else ()
    for r in runs:
        folder, log, seed = results_root() / r.run_id, logs / f"{r.run_id}.log", seeds.index(r.config.seed)
        own_trust = [r.run_id] if folder.is_dir() else []
        train, evaluate = f"train {r.run_id}", f"evaluate {r.run_id}"
        found.append(Unit(train, "train", ("train", *_trusting(trust, *own_trust), *r.train), log, folder, ("base",),
                          order=(seed, 0, -_steps(r.config)), about=r.run_id))  # fmt: skip
        if not evaluated(r.config):
            continue
        arguments = ("eval", *_trusting(trust, r.run_id), "--run-id", r.run_id, *workers)
        found.append(Unit(evaluate, "evaluate", arguments, log, folder / "eval", (train,), order=(seed, 1),
                          about=r.run_id))  # fmt: skip
    last = tuple(u.name for u in found if u.kind == "evaluate")
    if not last:  # there is nothing to draw
        check(found)
        return found
    found.append(Unit("report", "report", ("sweep", name, "--report"), logs / "report.log",
                      results_root() / "reports" / experiment.name, last, anyway=True, about="the report"))  # fmt: skip
    check(found)
    return found


def _lacks_data(config: Config) -> bool:
    """Whether demonstrations have to be made, for the stream or its base."""
    from clbench.data.source import NoData
    from clbench.streams.stream import pretraining_data, stream_data

    try:
        stream_data(config.dataset, config.render, "meta")
        if base_origin(config) == "pretrained":
            pretraining_data(config.dataset, config.render, "meta")
    except NoData:
        return True
    except UserError:  # reported by the command that needs it
        return False
    return False


def _steps(config: Config) -> float:
    """How long a training run takes compared with others: steps per task, including its algorithm's own phases."""
    own = [v for k, v in config.algorithm.items() if k.endswith("steps") and isinstance(v, int)]
    return config.train.steps + sum(own)


def draw_report(name: str, experiment: Experiment, runs: Sequence[PlannedRun]) -> int:
    """Draw the report of the runs that are finished; returns 0, even when none is."""
    if runs and not evaluated(runs[0].config):
        show(f"{NO_SIMULATOR}: there is no report")
        return 0
    done = [r.run_id for r in runs if finished(r)]
    if done:
        with patience("reading runs and drawing"):
            from clbench.report import build_report

            page = build_report(
                [results_root() / r for r in done],
                name=experiment.name,
                command=f"clbench sweep {name}",
                split=runs[0].config.eval.split,
            )
        show(f"report of {len(done)} of {len(runs)} runs: {page}")
    return 0


def _wait_for_locks(runs: Sequence[PlannedRun], stop: Stop) -> None:
    """Wait for commands of an earlier sweep that was killed: they save and end. After LOCK_SECONDS a run fails."""
    until, said = time.monotonic() + LOCK_SECONDS, False
    for run in runs:
        folder = results_root() / run.run_id
        for place, what in ((folder, "training"), (folder / "eval", "evaluation")):
            while time.monotonic() < until and (who := taken_by(place, what)) is not None:
                if not said:
                    show(f"waiting for the {what} of {run.run_id} to end ({who})")
                said = True
                stop.check(KEPT)
                time.sleep(0.2)


def _trusting(names: Sequence[str], *more: str) -> tuple[str, ...]:
    return tuple(f"--trust={name}" for name in [*names, *more]) if names else ()
