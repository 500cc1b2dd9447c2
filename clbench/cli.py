"""The `clbench` command. Heavy imports happen inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clbench import __version__, patience
from clbench.arguments import numbers, whole
from clbench.errors import LOST_EXIT, RESUME_EXIT, Interrupted, RankLost, UserError, nearest, shortage
from clbench.terminal import show, tell

if TYPE_CHECKING:
    from clbench.config.schema import Config, DatasetConfig, PretrainDataConfig
    from clbench.data.source import DataSource, Depth
    from clbench.stopping import Stop

OVERRIDES = "after --: overrides as key=value, e.g. -- train.steps=500 algorithm.expand_threshold=4"


def parser() -> argparse.ArgumentParser:
    """Build the argument parser of all commands."""
    p = argparse.ArgumentParser(
        prog="clbench",
        description="Continual learning of robot policies: train, evaluate in simulators, compare.",
    )
    p.add_argument("--version", action="version", version=f"clbench {__version__}")
    sub = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = _command(sub, "train", "train a run: one checkpoint per task")
    _axes(train)
    train.add_argument("--seed", type=whole, help="the run's seed (default 0)")
    train.add_argument("--run-id", help="name of the run's folder (default MODEL_ALGO_DATASET_sSEED)")
    train.add_argument("--resume", nargs="?", const=True, default=False, metavar="RUN",
                       help="continue a run from its newest whole state; starts it when there is none")  # fmt: skip
    train.add_argument("--curves-later", action="store_true", help="leave the learning curves that "
                       "train.eval_during_training asks for to `clbench eval`")  # fmt: skip
    train.add_argument("--allow-change", action="append", default=[], metavar="KEY",
                       help="with --resume: let this key differ from what the run was started with")  # fmt: skip
    train.add_argument("--init-from", metavar="RUN[:K]", help="start from another run's checkpoint K (default: last)")
    train.add_argument("--gpus", help="a count (0 = CPU), or ids as in 0,1: one process for each")
    train.add_argument("--nproc", type=whole, help="processes on the CPU (default 1)")
    train.add_argument("--strategy", choices=("ddp", "zero2"),
                       help="how several processes share the work (default: train.strategy, which is ddp)")  # fmt: skip
    train.add_argument("--port", type=whole, help="port on which the processes meet (default: a free one)")
    _trust(train)

    pre = _command(sub, "pretrain", "train and cache the base of a stream, unless it is there")
    _axes(pre, algo=False)
    _trust(pre)

    ev = _command(sub, "eval", "evaluate a run: the T×T matrix of success in simulators, or, without one, of action "
                  "errors on held-out episodes")  # fmt: skip
    ev.add_argument("--run-id", required=True, help="the run, by id or folder")
    ev.add_argument("--trials", type=whole, help="episodes per cell (default: the run's eval.episodes)")
    ev.add_argument("--cells", choices=("full", "lower", "last", "diagonal"), help="which cells (default: full)")
    ev.add_argument("--views", metavar="NAME,NAME", help="beside the run's own: blind (cameras show their mean image), "
                    "deaf (another task's instruction), or a view of the algorithm")  # fmt: skip
    ev.add_argument("--last-only", action="store_true", help="the last checkpoint only, as --cells last")
    ev.add_argument("--rows", metavar="K,K", help="a share: the cells of these checkpoints alone, counted from 0; the "
                    "command without it writes the matrix")  # fmt: skip
    ev.add_argument("--curves", action="store_true", help="learning curves alone, of the weights kept within tasks "
                    "(train.eval_during_training, train.keep_weights_every_steps)")  # fmt: skip
    ev.add_argument("--follow", action="store_true", help="with --curves: beside a training run, until it is complete")
    ev.add_argument("--step", type=whole, metavar="S", help="the matrix after S steps of each task instead of all "
                    "(train.keep_weights_every_steps), into eval/steps")  # fmt: skip
    ev.add_argument("--base", action="store_true", help="also evaluate the base before the stream")
    ev.add_argument("--random", action="store_true", help="also evaluate uniformly random actions")
    ev.add_argument("--workers", type=whole, help="processes (default: one a core, at most 2)")
    ev.add_argument("--gpus", help="1 = the policy runs on a GPU, 0 = on the CPU")
    ev.add_argument("--output-base", metavar="DIR", help="write DIR/RUN/eval instead of into the run's folder")
    _trust(ev)

    from clbench.metrics import cli as metrics_cli
    from clbench.report import cli as report_cli

    metrics_cli.add_arguments(_command(sub, "metrics", "print every metric of a run or matrix"))
    report_cli.add_arguments(_command(sub, "report", "tables and pictures of one run, or of several beside each other"))

    results = _command(sub, "results", "pack what runs recorded into one small file, without weights, and unpack it")
    actions = results.add_subparsers(dest="action", required=True, metavar="ACTION")
    packing = _command(actions, "pack", "write the records of evaluated runs into one file")
    packing.add_argument("runs", nargs="+", metavar="RUN", help="run folders (or names under results/)")
    packing.add_argument("--out", type=Path, required=True, metavar="FILE", help="NAME.tar.xz")
    unpacking = _command(actions, "unpack", "write the runs of such a file as folders")
    unpacking.add_argument("file", type=Path)
    unpacking.add_argument("--to", type=Path, required=True, metavar="DIR", help="the folder they are written into")

    data = _command(sub, "data", "make, fetch, import and check demonstrations, install a simulator's assets")
    kinds = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    make = _command(kinds, "make", "make the demonstrations of a stream and of its pretraining tasks")
    make.add_argument("name", help="a stream (see: clbench list)")
    make.add_argument("--force", action="store_true", help="replace data made with other settings")
    make.add_argument("--demos", type=whole, help="demonstrations per task (default: the stream's make.demos_per_task)")
    make.add_argument("--state-only", action="store_true",
                      help="states instead of camera images: libero_object means libero_object_state")  # fmt: skip
    make.add_argument("--workers", type=whole, default=2, help="simulator processes (default 2)")
    make.add_argument(
        "--leave-out-failing",
        action="store_true",
        help="leave out tasks that their expert proves unable to do, and list them, instead of ending",
    )
    assets = _command(kinds, "assets", "install the assets that a simulator does not bring along")
    assets.add_argument("name", choices=("libero",), help="the simulator")
    assets.add_argument("--from", dest="source", required=True, metavar="FILE|FOLDER|hub",
                        help="an archive (.tar.xz, …), a folder, or 'hub', the Hugging Face hub")  # fmt: skip
    assets.add_argument("--accept-differences", action="store_true",
                        help="also where files that decide the physics are not the expected ones")  # fmt: skip

    check = _command(kinds, "check", "check a stream's data set, fetching it where it is one of the hub")
    check.add_argument("name", help="a stream (see: clbench list)")
    check.add_argument("--no-fetch", action="store_true",
                       help="of a hub's set fetch only the description, and say how much the rest is")  # fmt: skip
    check.epilog = "after --: overrides as key=value, e.g. -- dataset.repo_id=HuggingFaceVLA/libero"
    _importing(_command(kinds, "import", "write a data set of another format (RLDS, LIBERO's HDF5) in LeRobot's"))

    listed = _command(sub, "list", "what there is to choose from: models, algorithms, streams and the other axes")
    listed.add_argument("axis", nargs="?", help="one of them, e.g. streams (default: all)")

    _command(sub, "doctor", "what this machine has, what is missing, and how to get it")

    sweep = _command(sub, "sweep", "train, evaluate and compare the runs of an experiment file; finished ones are kept")
    sweep.add_argument("experiment", help="a name under configs/experiments, or a YAML file")
    sweep.add_argument("--dry-run", action="store_true", help="only print its units of work, done and left")
    sweep.add_argument("--report", action="store_true", help="only draw the report of the runs that are finished")
    _trust(sweep)
    return p


def _command(sub: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str) -> argparse.ArgumentParser:
    p = sub.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    p.add_argument("--debug", action="store_true", help="show tracebacks")
    return p


def _importing(p: argparse.ArgumentParser) -> None:
    p.add_argument("folder", type=Path, metavar="FOLDER", help="the data: a TFDS folder (dataset_info.json, …), or one "
                   "with files *.hdf5")  # fmt: skip
    p.add_argument("--from", dest="source", required=True, choices=("rlds", "libero_hdf5"), help="its format")
    p.add_argument("--out", required=True, metavar="NAME", help="the new set: a name in the data root, or a path")
    p.add_argument("--map", action="append", default=[], metavar="KEY=FEATURE", dest="maps",
                   help="which feature of the data becomes observation.images.NAME, observation.state, action or task "
                        "(the instruction); A+B joins numbers, none leaves out; may be given again")  # fmt: skip
    p.add_argument("--gripper", metavar="open=A,close=B", help="the data's commands that open and close the "
                   "gripper; in the new set they are -1 and 1")  # fmt: skip
    p.add_argument("--rotation", choices=("axis_angle", "quaternion_xyzw", "quaternion_wxyz", "euler_xyz"),
                   help="of the data's state, after the position; in the new set it is axis_angle")  # fmt: skip
    p.add_argument("--images", choices=("as_is", "rotate", "flip", "mirror"),
                   help="what turns the images into those of the simulator: nothing, half a turn, upside down, left "
                        "and right exchanged (default: what the format needs)")  # fmt: skip
    p.add_argument("--observed", choices=("before", "after"), help="whether an HDF5 file's observations were made "
                   "before or after the action in their row (default: as its joints show)")  # fmt: skip
    p.add_argument("--split", metavar="NAME", help="of RLDS (default: train)")
    p.add_argument("--fps", type=whole, help="frames a second, where the data does not say (LIBERO: 20)")
    p.add_argument("--instruction", metavar="TEXT", help="of episodes without one")
    p.add_argument("--force", action="store_true", help="replace a set that was imported before")


def _axes(p: argparse.ArgumentParser, algo: bool = True) -> None:
    p.add_argument("--model", default="dit_dec_tiny",
                   help="a preset or a policy type, see `clbench list` (default dit_dec_tiny)")  # fmt: skip
    p.add_argument("--dataset", default="metaworld_quick",
                   help="a stream, see `clbench list streams` (default metaworld_quick)")  # fmt: skip
    if algo:
        p.add_argument("--algo", default="clare", help="one algorithm or several joined by commas (default clare)")
    p.add_argument("--yaml", nargs="+", metavar="FILE", help="merge these files left to right instead of the axes")
    p.add_argument("--smoke", action="store_true", help="a few steps per task: proves that it runs, measures nothing")
    p.epilog = OVERRIDES


def _trust(p: argparse.ArgumentParser) -> None:
    p.add_argument("--trust", action="append", default=[], metavar="CHECKPOINT|RUN|TYPE",
                   help="let these checkpoints, or fresh policies of this type, run code of models that they name and "
                        "fetch from hubs (docs/security.md); may be given again")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. 0: done; 2: the user can fix it (one message); 75: stopped cleanly; 130: interrupted."""
    from clbench.env_file import load_env_file
    from clbench.processes import no_threads
    from clbench.surroundings import settle

    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        load_env_file()  # before the imports that read variables
        settle()
        no_threads()
    except UserError as e:
        tell(f"clbench: {e}")
        return 2
    overrides: list[str] = []
    if "--" in argv:
        at = argv.index("--")
        argv, overrides = argv[:at], argv[at + 1 :]
    args = parser().parse_args(argv)
    patience.quiet = False  # until the configuration is known
    debug = getattr(args, "debug", False) or bool(os.environ.get("CLBENCH_DEBUG"))
    if debug:
        os.environ["CLBENCH_DEBUG"] = "1"
    try:
        from clbench.checkpoints.trusted import trusting
        from clbench.stopping import interruptible

        with interruptible(), trusting(getattr(args, "trust", [])):
            return _run(args, overrides, argv)
    except UserError as e:
        if debug:
            tell(*traceback.format_exc().splitlines())
        tell(f"clbench: {e}")
        return LOST_EXIT if isinstance(e, RankLost) else 2
    except BrokenPipeError:
        return 141
    except Exception as e:  # noqa: BLE001 (one line for the user; the traceback with --debug)
        if debug:
            tell(*traceback.format_exc().splitlines())
        short = shortage(e)
        if short is not None:
            tell(f"clbench: {short}")
            return 2
        text = " ".join(f"{type(e).__name__}: {e}".split())
        tell(f"clbench: unexpected error, {text} (--debug shows where; please report it)")
        return 1
    except Interrupted as e:
        if os.environ.get("RANK", "0") == "0":  # said once, not once per rank
            tell(f"clbench: {e}")
        return RESUME_EXIT
    except KeyboardInterrupt:
        tell("clbench: interrupted")
        return 130


def _run(args: argparse.Namespace, overrides: list[str], argv: Sequence[str]) -> int:
    if overrides and args.command not in ("train", "pretrain", "eval", "data"):
        raise UserError(f"`clbench {args.command}` takes no overrides after --.")
    commands = {
        "pretrain": _pretrain,
        "eval": _eval,
        "data": _data,
        "results": _results_files,
        "list": _list,
        "doctor": _doctor,
        "sweep": _sweep,
    }
    if args.command == "train":
        from clbench.stopping import stoppable

        with stoppable() as stop:  # from before the imports on, which take seconds
            return _train(args, overrides, [*argv, "--", *overrides] if overrides else argv, stop)
    if args.command in commands:
        return commands[args.command](args, overrides)
    with patience.patience("reading runs and computing" if args.command == "metrics" else "reading runs and drawing"):
        if args.command == "metrics":
            from clbench.metrics.cli import run
        else:
            from clbench.report.cli import run
        return run(args)


def _compose(args: argparse.Namespace, overrides: Sequence[str], algo: str) -> tuple[Config, list[str]]:
    from clbench.config.compose import compose, compose_files
    from clbench.registry import algorithm_names

    if args.yaml:
        return compose_files(args.yaml, overrides, args.smoke)
    return compose(
        model=args.model,
        algorithms=[a for a in algo.split(",") if a],
        dataset=args.dataset,
        registered=algorithm_names(),
        overrides=overrides,
        smoke=args.smoke,
    )


def default_run_id(config: Config, dataset: str, smoke: bool) -> str:
    """{model}_{algo}_{dataset}_s{seed}, with "_smoke" behind a smoke run's."""
    name = config.algorithm["name"]
    algo = name if isinstance(name, str) else "+".join(name)
    return f"{config.model}_{algo}_{dataset}_s{config.seed}" + ("_smoke" if smoke else "")


def _train(args: argparse.Namespace, overrides: list[str], argv: Sequence[str], stop: Stop) -> int:
    ranks = _ranks(args)
    where = [*_device(args.gpus, args.nproc), *([f"train.strategy={args.strategy}"] if args.strategy else [])]
    if args.seed is not None:
        overrides = [f"seed={args.seed}", *overrides]
    if isinstance(args.resume, str):  # where it runs may change, what it computes may not
        if args.run_id or args.yaml or args.init_from or args.smoke:
            raise UserError(f"--resume {args.resume} continues that run with its own settings; leave other flags away.")
        from clbench.checkpoints.run_folder import moved, run_folder
        from clbench.evaluation.evaluate import run_config

        folder = run_folder(args.resume)
        from clbench.config.compose import override

        config = override(moved(run_config(folder), folder), [*where, *overrides])
        files, run_id = [str(folder / "config.yaml")], folder.name
        if folder.parent.resolve() != _results(config):
            config.output_dir = str(folder.parent)
    else:
        if args.init_from:
            args.model = "checkpoint"
            overrides = [f"policy.path={_init_from(args.init_from)}", *overrides]
        overrides = [*where, *overrides]
        config, files = _compose(args, overrides, args.algo)
        run_id = args.run_id or default_run_id(config, config.dataset.name, args.smoke)
    from clbench.launch import launch, launched

    patience.quiet = config.log.progress == "quiet"
    if not launched() or os.environ.get("RANK") == "0":
        tell(f"configuration: {' ← '.join(files)}{' ← overrides' if overrides else ''}")
    from clbench.checkpoints.hub import with_local_base
    from clbench.checkpoints.run_folder import place_of_run
    from clbench.checkpoints.trusted import check_start
    from clbench.config.dit import check_policy
    from clbench.config.policy_types import check_fits
    from clbench.config.schema import base_origin
    from clbench.streams.stream import build_stream, check_images, checked_order, pretraining_data
    from clbench.training.log import wanted_loggers

    allowed = [key for keys in args.allow_change for key in keys.split(",")]
    if not launched():
        _check_ranks(config, ranks, args.port)
        folder, exists = place_of_run(run_id, config.output_dir, bool(args.resume))
        if exists:
            from clbench.checkpoints.changes import check_overrides

            check_overrides(folder, config, allowed)
    # Mistakes show before anything heavy is imported or fetched.
    wanted_loggers(config.log)
    config = with_local_base(config)
    d = config.dataset
    checked_order(d)
    check_start(config.policy)
    check_policy(config.policy)
    check_fits(config)
    sets: list[tuple[bool, Callable[[], object]]] = [
        (_fetches(d), lambda: build_stream(d, sequential=False, render=config.render))
    ]
    own_base = base_origin(config) == "pretrained" and not isinstance(args.resume, str)  # one that goes on has its base
    if own_base:
        assert d.pretrain is not None
        sets.append((_fetches(d.pretrain), lambda: pretraining_data(d, config.render)))
    check_images(d, config.render, base=own_base)
    with patience.patience("looking at the data"):
        for _, opened in sorted(sets, key=lambda s: s[0]):  # those of the hub last
            opened()
    if ranks > 1 and not launched():
        from clbench.processes import load

        load()
        from clbench.algorithms.build import build_algorithm

        build_algorithm(config)  # what would fail in every rank is said once
        stop.check("Nothing was started.")
        return launch(argv, ranks, args.port)
    from clbench.processes import load

    load()
    from clbench.training.trainer import train

    command = ["clbench", *sys.argv[1:]]
    resume = bool(args.resume)
    train(
        config, run_id, resume=resume, allow_change=allowed, command=command, files=files, stop=stop,
        play_curves=not args.curves_later,
    )  # fmt: skip
    return 0


def _fetches(part: DatasetConfig | PretrainDataConfig) -> bool:
    """Whether a data set of the hub is among those that are named."""
    from clbench.config.schema import sets_of

    return any(one.repo_id is not None for one in sets_of(part))


def _ranks(args: argparse.Namespace) -> int:
    """How many processes are asked for; an outer launcher must have started as many."""
    from clbench.launch import world_size

    if args.nproc is not None and args.nproc < 1:
        raise UserError(f"--nproc {args.nproc} must be at least 1.")
    gpus = _gpu_count(args.gpus)
    if args.nproc is not None and gpus > 0:
        raise UserError("--nproc is for processes on the CPU; --gpus alone says how many use GPUs.")
    asked = args.nproc if args.nproc is not None else max(1, gpus)
    world = world_size()
    if world > 1 and (args.nproc is not None or gpus > 0) and asked != world:
        raise UserError(f"{asked} processes are asked for, but the launcher started {world}.")
    return asked


def _check_ranks(config: Config, ranks: int, port: int | None) -> None:
    """Whether so many processes can train this at all."""
    from clbench.launch import check_port

    if port is not None and not 0 < port < 65536:
        raise UserError(f"--port {port} is no port number (1 to 65535).")
    if port is not None and ranks > 1:
        check_port(port)
    if config.train.strategy == "zero2" and ranks == 1:
        raise UserError("train.strategy zero2 needs several processes: give --nproc or --gpus, or use ddp.")
    parts = ranks * config.train.gradient_accumulation
    if config.train.batch_size % parts:
        raise UserError(
            f"train.batch_size {config.train.batch_size} cannot be shared equally by {ranks} processes × "
            f"{config.train.gradient_accumulation} micro-batches; choose a multiple of {parts}."
        )
    if config.train.device == "cuda" and ranks > 1:
        import torch

        if torch.cuda.device_count() < ranks:
            raise UserError(f"{ranks} GPUs are asked for, this machine shows {torch.cuda.device_count()}.")


def _gpu_count(gpus: str | None) -> int:
    if gpus is None:
        return 0
    ids = [g for g in gpus.split(",") if g]
    if not ids or not all(g.isascii() and g.isdigit() for g in ids) or len(set(ids)) != len(ids):
        raise UserError(f"--gpus {gpus} is neither a count nor a list of ids like 0,1.")
    return len(ids) if "," in gpus else int(gpus)


def _device(gpus: str | None, nproc: int | None = None) -> list[str]:
    """Overrides for --gpus (a count, 0 = CPU, or a list of ids) and --nproc (processes on the CPU)."""
    if gpus is None:
        return ["train.device=cpu"] if nproc is not None and nproc > 1 else []
    count = _gpu_count(gpus)
    if "," in gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(g for g in gpus.split(",") if g)
    return ["train.device=cuda" if count else "train.device=cpu"]


def _one_device(gpus: str | None) -> list[str]:
    """The same for a command that uses one GPU at most."""
    if _gpu_count(gpus) > 1:
        raise UserError(f"an evaluation puts its policy on one GPU: --gpus {gpus} is not possible.")
    return _device(gpus)


def _results(config: Config) -> Path:
    from clbench.paths import results_root

    return Path(config.output_dir).resolve() if config.output_dir else results_root().resolve()


def _init_from(text: str) -> str:
    from clbench.checkpoints.run_folder import checkpoint_damage, checkpoint_folder, finished_visits, run_folder
    from clbench.checkpoints.trusted import check_checkpoint

    run, _, k = text.partition(":")
    folder = run_folder(run)
    done = finished_visits(folder)
    counted = k.isascii() and k.isdigit()
    number = int(k) if counted else done - 1
    if not done:
        raise UserError(f"--init-from {text}: run {run} has no checkpoint yet.")
    if (k and not counted) or not 0 <= number < done:
        raise UserError(f"--init-from {text}: run {run} has checkpoints 0 to {done - 1}.")
    reason = checkpoint_damage(folder, number)
    if reason is not None:
        raise UserError(f"--init-from {text}: {checkpoint_folder(folder, number)} is damaged ({reason}).")
    policy = checkpoint_folder(folder, number) / "policy"
    if (policy / "adapter_config.json").is_file():
        raise UserError(f"--init-from {text}: that checkpoint is an adapter; only whole policies can be a base.")
    check_checkpoint(policy)
    return str(policy.resolve())


def _pretrain(args: argparse.Namespace, overrides: list[str]) -> int:
    config, _ = _compose(args, overrides, "seqfft")
    patience.quiet = config.log.progress == "quiet"
    from clbench.checkpoints.hub import with_local_base
    from clbench.checkpoints.trusted import check_start
    from clbench.config.dit import check_policy
    from clbench.config.policy_types import check_fits

    config = with_local_base(config)
    check_start(config.policy)
    check_policy(config.policy)
    check_fits(config)
    from clbench.processes import load
    from clbench.stopping import stoppable

    load()
    from clbench.training.backend import Backend
    from clbench.training.pretrain import ensure_base

    with stoppable() as stop:
        folder, _ = ensure_base(config, Backend(config.train), stop, config.log.progress)
    show(folder)
    return 0


def _eval(args: argparse.Namespace, overrides: list[str]) -> int:
    from clbench.checkpoints.run_folder import run_folder
    from clbench.config.compose import override
    from clbench.evaluation.evaluate import CellsFailed, evaluate, evaluate_share, run_config
    from clbench.evaluation.records import eval_folder

    folder = run_folder(args.run_id)
    for item in overrides:
        if not item.removeprefix("--").startswith(("eval.", "log.")):
            raise UserError(f"override '{item}': an evaluation takes eval.* and log.* only; the rest is the run's own.")
    overrides = [*_one_device(args.gpus), *overrides]
    for flag, key in (("trials", "episodes"), ("workers", "workers")):
        if getattr(args, flag) is not None:
            overrides = [f"eval.{key}={getattr(args, flag)}", *overrides]
    cells = "last" if args.last_only else args.cells
    overrides = [
        *([f"eval.cells={cells}"] if cells else []),
        *(["eval.base_row=true"] if args.base else []),
        *(["eval.random_row=true"] if args.random else []),
        *([f"eval.views=[{args.views}]"] if args.views else []),
        *overrides,
    ]
    config = override(run_config(folder), overrides)
    patience.quiet = config.log.progress == "quiet"
    output = Path(args.output_base) / folder.name if args.output_base else None
    if sum((args.curves, args.step is not None, args.rows is not None)) > 1 or (args.follow and not args.curves):
        raise UserError("--rows, --step and --curves are three kinds of evaluation, and --follow belongs to --curves.")
    if args.curves or args.step is not None:
        return _eval_within(args, folder, config, output)
    if args.rows is not None:
        played = evaluate_share(folder, config, numbers(args.rows), output, progress=config.log.progress != "quiet")
        show(f"{played} episodes played of rows {args.rows}; the matrix is written by the command without --rows")
        return 0
    try:
        matrix = evaluate(folder, config, output, progress=config.log.progress != "quiet")
    except CellsFailed as e:
        _print_matrix(e.matrix)
        raise
    _print_matrix(matrix)
    show(f"matrix: {eval_folder(output or folder, config.eval.split) / 'matrix.json'}")
    if config.train.eval_during_training is not None and matrix["run"].get("mode") != "multitask":
        return _eval_within(args, folder, config, output)
    return 0


def _eval_within(args: argparse.Namespace, folder: Path, config: Config, output: Path | None) -> int:
    """`clbench eval --curves` and `--step`: what was kept within tasks."""
    from clbench.evaluation import curves
    from clbench.evaluation.records import eval_folder
    from clbench.stopping import stoppable

    progress = config.log.progress != "quiet"
    with stoppable() as stop:
        if args.step is not None:
            matrix, path = curves.evaluate_step(folder, config, args.step, stop, output, progress)
            _print_matrix(matrix)
            show(f"matrix: {path}")
            return 0
        curves.check_has_curves(folder, config)
        play = curves.follow_curves if args.follow else curves.play_curves
        states = play(folder, config, stop, output, progress)
    for s in states:
        show(f"task {s.k + 1} {s.task}: {s.played} of {s.points} points")
        if s.absent:
            show(f"  no weights, yet or any more, of step {', '.join(map(str, s.absent))}")
    show(f"learning curves: {eval_folder(output or folder) / curves.FOLDER}")
    return 0


def _print_matrix(matrix: dict[str, object]) -> None:
    tasks = matrix["tasks"]
    assert isinstance(tasks, list)
    if "quantity" in matrix:
        show(f"{matrix['quantity']} in {matrix['unit']}, {matrix['direction']}")
        show("mean error of the whole chunk after task k (rows) on task j (columns): "
             + ", ".join(f"{j}={t}" for j, t in enumerate(tasks)))  # fmt: skip
        _print_rows(matrix, "error", "6.3f")
        return
    show("success rate after task k (rows) on task j (columns): " + ", ".join(f"{j}={t}" for j, t in enumerate(tasks)))
    if matrix["split"] != "test":
        show(f"{matrix['split']} episodes")
    run = matrix["run"]
    assert isinstance(run, dict)
    if run["privileged"]:
        show(f"privileged observations: {run['privileged']}")
    _print_rows(matrix, "success", "5.2f")


def _print_rows(matrix: dict[str, object], key: str, form: str) -> None:
    rows = [(name, matrix[name]) for name in ("random", "base") if matrix[name]]
    cells = matrix[key]
    assert isinstance(cells, list)
    rows += [(f"k={k}", row) for k, row in enumerate(cells)]
    for name, row in rows:
        assert isinstance(row, list)
        show(f"{name:>7} " + " ".join("   – " if v is None else f"{v:{form}}" for v in row))


def _results_files(args: argparse.Namespace, overrides: list[str]) -> int:
    from clbench.evaluation.packed import pack, unpack
    from clbench.metrics.cli import default_run

    if args.action == "pack":
        runs = [default_run(run) for run in args.runs]
        size = pack(runs, args.out)
        show(f"{args.out}: {len(runs)} run{'s' if len(runs) != 1 else ''}, {size:,} bytes")
    else:
        show(*unpack(args.file, args.to))
    return 0


def _data(args: argparse.Namespace, overrides: list[str]) -> int:
    actions = {"assets": _assets, "make": _make_data, "check": _check_data, "import": _import_data}
    from clbench.stopping import clearing_away

    reads = args.action in ("check", "import")
    with clearing_away(), patience.patience("reading the data" if reads else "loading packages"):
        return actions[args.action](args, overrides)


def _check_data(args: argparse.Namespace, overrides: list[str]) -> int:
    from clbench.config.compose import compose
    from clbench.data.source import NoData
    from clbench.streams.stream import check_images, pretraining_data, stream_data

    config, _ = compose(
        model="dit_dec_tiny", algorithms=["seqfft"], dataset=args.name, registered=["seqfft"], overrides=overrides
    )
    d, render = config.dataset, config.render
    base, not_yet = d.pretrain is not None, ""
    if base:
        try:
            pretraining_data(d, render, "meta")
        except NoData as e:  # they need not be there for the stream's to be in order
            base, not_yet = False, str(e)
    check_images(d, render, base)
    depth: Depth = "size" if args.no_fetch else "all"
    _print_data(f"stream {d.name}", stream_data(d, render, depth), args.name)
    if base:
        _print_data("base's tasks", pretraining_data(d, render, depth), args.name)
    elif not_yet:
        show(f"base's tasks, without which no training starts: {not_yet}")
    return 0


def _print_data(title: str, data: DataSource, stream: str) -> None:
    from clbench.data.source import check_every_byte

    d = data.description
    check_every_byte(data.root, d, stream)
    if d["kind"] == "several":
        show(f"{title}: {len(d['sets'])} data sets, {d['partition']}",
             f"  fingerprint {data.fingerprint or 'not known before all is fetched'}")  # fmt: skip
        for one in d["sets"]:
            _print_set(f"  {one['name']}", Path(one["root"]), one, one.get("fingerprint", ""), one["features"])
        for t in data.tasks.values():
            show(f"  task {len(t.episodes):5} episodes {t.frames:7} frames  {t.name}")
        show(f"  not used: {d['tasks_unused']} tasks, {d['episodes_unused']} episodes")
        return
    _print_set(title, data.root, d, data.fingerprint, data.features)
    for t in data.tasks.values():
        show(f"  task {t.task_index:3} {len(t.episodes):5} episodes {t.frames:7} frames  {t.name}: {t.text}")
    left_out = d.get("episodes_excluded", [])
    show(f"  not used: {d['tasks_unused']} tasks, {d['episodes_unused']} episodes"
         + (f" (with exclude_episodes: {len(left_out)})" if left_out else ""))  # fmt: skip


def _print_set(title: str, root: Path, d: dict[str, Any], fingerprint: str, features: dict[str, str] | None) -> None:
    """What is known about one data set."""
    origin = {"made": "made by clbench", "lerobot": "not made by clbench", "hub": "from the hub"}[d["kind"]]
    if "imported" in d:
        origin = f"imported from {d['imported']['imported_from']} ({d['imported']['source']['folder']})"
    show(f"{title}: {root}, {origin}")
    if d["kind"] == "hub":
        show(f"  repo_id {d['repo_id']}, revision {d['revision']}, commit {d['commit']}")
    show(f"  fingerprint {fingerprint or 'not known before all is fetched'}")
    if features is not None:
        show("  features " + ", ".join(k if k == v else f"{k} as {v}" for k, v in features.items())
             + (f"; not used: {', '.join(d['features_unused'])}" if d["features_unused"] else ""))  # fmt: skip
        steps = d.get("simulator_steps_per_second")
        plays = "there is no simulator" if steps is None else f"the simulator makes {steps:g} steps"
        show(f"  it says {d['fps']:g} frames a second; {plays}")


def _import_data(args: argparse.Namespace, overrides: list[str]) -> int:
    from clbench.data.importing.conventions import parse_gripper
    from clbench.data.importing.layout import parse_maps
    from clbench.data.importing.write import Options, check_place, import_recording
    from clbench.data.source import data_folder

    if overrides:
        raise UserError("`clbench data import` takes no overrides after --.")
    for flag, source in (("split", "rlds"), ("observed", "libero_hdf5")):
        if getattr(args, flag) is not None and args.source != source:
            raise UserError(f"--{flag} is for --from {source}.")
    options = Options(
        maps=parse_maps(args.maps), gripper=None if args.gripper is None else parse_gripper(args.gripper),
        rotation=args.rotation, fps=args.fps, instruction=args.instruction,
    )  # fmt: skip
    root = data_folder(args.out)
    check_place(root, args.force)
    if args.source == "rlds":
        from clbench.data.importing.rlds import Rlds

        done = import_recording(Rlds(args.folder, args.split, args.images), root, options, args.force)
    else:
        from clbench.data.importing.libero_hdf5 import LiberoHdf5

        done = import_recording(LiberoHdf5(args.folder, args.observed, args.images), root, options, args.force)
    show(f"{root}: {sum(done.texts.values())} episodes, {done.frames} frames, {done.fps} a second")
    show(*(f"  {key} from {feature}" for key, feature in done.layout.as_map().items()))
    show(f"  not used: {', '.join(done.unused) or 'nothing'}")
    show("  taken as " + "; ".join(f"{name}: {how}" for name, how in sorted(done.conventions.items())))
    show(*(f"  task {i:3} {n:5} episodes  {text}" for i, (text, n) in enumerate(done.texts.items())))
    if done.is_libero:
        show(f"to train on it: --dataset STREAM -- {shlex.quote(f'dataset.data={args.out}')}, STREAM being one with "
             "LIBERO's tasks (clbench list streams)")  # fmt: skip
    else:
        show("to train on it, write a stream without a simulator: docs/add_a_stream.md")
    return 0


def _assets(args: argparse.Namespace, overrides: list[str]) -> int:
    from clbench.envs.libero.assets import install

    if overrides:
        raise UserError("`clbench data assets` takes no overrides after --.")
    with patience.patience("installing the assets"):
        folder, differing = install(args.source, args.accept_differences)
    if differing:
        tell(f"warning: {len(differing)} files that decide the physics are not those clbench was tested with, first "
             f"{differing[0]}: compare no results with others'.")  # fmt: skip
    show(folder)
    return 0


def _stream_on_states(name: str) -> str:
    """The stream of that name whose observations are states only."""
    from clbench.config.compose import DATASET_ALIASES, available, compose
    from clbench.envs.making import family

    name = DATASET_ALIASES.get(name, name)
    known = available("datasets")
    if f"{name}_state" in known:
        return f"{name}_state"
    if name not in known:
        raise UserError(f"there is no stream '{name}_state'.{nearest(f'{name}_state', known)}")
    config, _ = compose(model="dit_dec_tiny", algorithms=["seqfft"], dataset=name, registered=["seqfft"])
    if family(config.dataset.env_type).cameras:
        raise UserError(f"the stream '{name}' is on camera images and has no variant on states.")
    return name


def _make_data(args: argparse.Namespace, overrides: list[str]) -> int:
    from clbench.config.compose import compose
    from clbench.data.info import load_info
    from clbench.data.make import OtherSet, demonstrable, make_dataset
    from clbench.data.source import data_folder
    from clbench.streams.stream import drawing, without

    config, _ = compose(
        model="dit_dec_tiny",
        algorithms=["seqfft"],
        dataset=_stream_on_states(args.name) if args.state_only else args.name,
        registered=["seqfft"],
        overrides=overrides,
    )
    d = config.dataset
    if d.env is None:
        raise UserError(
            f"the stream '{d.name}' has no simulator (dataset.env: null), so no demonstrations can be made for it: "
            "dataset.data names a data set that is there already, or dataset.repo_id one of the hub."
        )
    parts: list[DatasetConfig | PretrainDataConfig] = [d] if d.pretrain is None else [d, d.pretrain]
    sets: list[tuple[partial[Path], dict[str, str], partial[str] | None]] = []
    for part in parts:  # what is left out, and refused, shows before anything is made
        if part.repo_id is not None:
            tell(f"{part.repo_id} is a data set of the hub, nothing is made for it: see `clbench data check "
                 f"{shlex.quote(args.name)}`.")  # fmt: skip
            continue
        tasks, cannot = demonstrable(d.env.type, part.tasks)
        root = data_folder(part.data)
        for task, why in cannot.items():
            tell(f"{root.name}: no demonstrations can be made of {task}, which is left out: {why}.")
        rest = None if d.pretrain is part and d.pretrain.partial else partial(without, d, part)
        if cannot and rest:
            tell(f"{root.name}: to train on the rest give -- {shlex.quote(rest(cannot))}")
        make = part.make
        making = partial(
            make_dataset, root, name=root.name, env_type=d.env.type, tasks=tasks, seed=make.seed,
            demos_per_task=make.demos_per_task if args.demos is None else args.demos,
            action_noise=make.action_noise, tail_steps=make.tail_steps, max_steps=make.max_steps,
            ceiling_episodes=make.ceiling_episodes, workers=args.workers, force=args.force,
            progress=config.log.progress != "quiet", render=drawing(d.env.type, config.render),
            leave_out=args.leave_out_failing or rest is None,
        )  # fmt: skip
        try:
            making(only_check=True)
        except OtherSet as e:
            if part is d:
                raise
            raise UserError(f"{e} It is for the base, which streams may share: dataset.pretrain.data=NAME, given to "
                            "training as well, takes another set for this one.") from e  # fmt: skip
        sets.append((making, cannot, rest))
    for making, cannot, rest in sets:
        info = load_info(making())
        if info.left_out and rest:
            tell(f"{info.name}: to train on the rest give -- {shlex.quote(rest({*cannot, *info.left_out}))}")
    return 0


def _list(args: argparse.Namespace, overrides: list[str]) -> int:
    from clbench.listing import listing

    for line in listing(args.axis):
        show(line)
    return 0


def _doctor(args: argparse.Namespace, overrides: list[str]) -> int:
    with patience.patience("looking at this machine"):
        from clbench.doctor import doctor

        return doctor()


def _sweep(args: argparse.Namespace, overrides: list[str]) -> int:
    from clbench.sweep import run_sweep

    return run_sweep(args.experiment, dry_run=args.dry_run, trust=args.trust, report=args.report)


if __name__ == "__main__":  # as launchers of ranks start it: first on the path is where that was
    if not sys.flags.safe_path and sys.path[0] == os.getcwd() and not Path(sys.path[0], "clbench").is_dir():
        del sys.path[0]  # a user's datasets.py there must not hide the package of that name
    sys.exit(main())
