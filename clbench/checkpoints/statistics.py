"""What a policy's processors normalise by, and whether that belongs to the policy and to the data. Imports no torch.

LeRobot leaves a feature without statistics as it is, and takes any numbers for statistics: the policy sees and commands
other units than it learned, moves, and never succeeds. So both are looked at before anything is trained or played.
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clbench.checkpoints.run_folder import as_argument
from clbench.config.compose import available, streams
from clbench.config.dit import RANGES
from clbench.config.schema import Config, base_origin, sets_of
from clbench.data.source import is_here
from clbench.data.statistics import Stats, of_tasks
from clbench.data.task import Task
from clbench.errors import UserError
from clbench.io import read_json
from clbench.paths import INSTALLED
from clbench.streams.stream import pretraining_tasks, stream_tasks

PIPELINES = ("policy_preprocessor.json", "policy_postprocessor.json")
MODES = {
    "IDENTITY": (), "MEAN_STD": ("mean", "std"), "MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}  # fmt: skip
OF_LEROBOT = ("normalizer_processor", "unnormalizer_processor")
OURS = ("clbench_normalizer", "clbench_unnormalizer")
VECTORS = ("STATE", "ENV", "ACTION")  # kinds of features; images without statistics are left as they are, in [0, 1]
FAR = 10.0  # half the dimensions reach so many times as far from the statistics' middle as the statistics do
NARROW = 20.0  # half the dimensions fill less than this part of the statistics' range
ROUNDING = 1e-5  # of float32, relative


@dataclass(frozen=True)
class Normalizer:
    """A step that normalises, or undoes it, with the statistics that it has.

    Attributes:
        pipeline, place: the file that describes it, and which of that file's steps it is.
        settings: what it is built with.
        needs: feature → names of the statistics that are used; of vectors alone.
        shapes: feature → shape of one frame's value.
        values: feature → name → statistic.
        state_file: that holds them; None: the file names none.
    """

    pipeline: str
    place: int
    name: str
    settings: dict[str, Any]
    needs: dict[str, tuple[str, ...]]
    shapes: dict[str, tuple[int, ...]]
    values: Stats
    state_file: str | None


def normalizers(policy: Path) -> list[Normalizer]:
    """The steps that normalise in a policy's folder; UserError where they cannot be read."""
    return [step for pipeline in PIPELINES for step in _of_pipeline(policy, pipeline)]


def _of_pipeline(policy: Path, pipeline: str) -> Iterable[Normalizer]:
    path = policy / pipeline
    described = read_json(path)
    try:
        for place, step in enumerate(described["steps"]):
            name, settings = step.get("registry_name"), step.get("config", {})
            if name not in (*OF_LEROBOT, *OURS):
                continue
            features, state = settings["features"], step.get("state_file")
            modes: dict[str, tuple[str, ...]]
            if name in OURS:
                modes = dict.fromkeys(features, (*RANGES[settings["mode"]], "mask"))
            else:
                modes = {k: MODES[settings["norm_map"].get(f["type"], "IDENTITY")] for k, f in features.items()}
                only = settings.get("normalize_observation_keys")
                if only is not None:
                    modes = {k: v for k, v in modes.items() if k in only or features[k]["type"] == "ACTION"}
            if state is not None and (not isinstance(state, str) or Path(state).name != state):
                raise ValueError(f"state_file {state!r} is no file name")
            yield Normalizer(
                pipeline, place, name, settings,
                {key: needed for key, needed in modes.items() if needed and features[key]["type"] in VECTORS},
                {key: tuple(int(n) for n in f["shape"]) for key, f in features.items()},
                _values(policy / state) if state is not None else {}, state,
            )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{path} is no processor: {type(e).__name__} {e}.") from e


def _values(path: Path) -> Stats:
    """The statistics in a step's state; none where the file is missing."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.exists():
        return {}
    if not path.is_file():
        raise UserError(f"cannot read {path}: it is no regular file.")
    found: Stats = {}
    try:
        for name, value in load_file(path).items():
            key, _, statistic = name.rpartition(".")
            found.setdefault(key, {})[statistic] = value
    except (OSError, SafetensorError, ValueError, KeyError) as e:
        raise UserError(f"cannot read {path}: {e}. The checkpoint is incomplete or damaged.") from e
    return found


# ------------------------------------------------------------------------------------------------ what is wrong


def fault(policy: Path, data: Stats | None = None, exact: bool = False) -> str | None:
    """What is wrong with the statistics in a policy's folder, or None.

    Args:
        data: mean, std, min and max of the data, where it is known.
        exact: the statistics are to be those of just this data; otherwise they must not be far from it.
    """
    wants = read_json(policy / "config.json")
    for step in normalizers(policy):
        found = _unfit(step, wants if step.pipeline == PIPELINES[0] else {})
        if found is None and data is not None:
            found = _foreign(step, data, exact)
        if found is not None:
            return found
    return None


def _unfit(step: Normalizer, wants: dict[str, Any]) -> str | None:
    """What a step lacks, or has of other shapes. `wants`: the policy's configuration."""
    if step.name in OF_LEROBOT:
        for key, feature in {**(wants.get("input_features") or {}), **(wants.get("output_features") or {})}.items():
            mode = step.settings["norm_map"].get(feature["type"], "IDENTITY")
            if feature["type"] not in VECTORS or mode == "IDENTITY":
                continue
            shape = tuple(feature["shape"])
            if key not in step.shapes:
                there = ", ".join(f"'{k}' {s}" for k, s in step.shapes.items())
                return f"the policy has '{key}' {shape}, and its processor normalises {there or 'nothing'}"
            if step.shapes[key] != shape:
                return f"'{key}' is {shape} for the policy and {step.shapes[key]} for its processor"
    for key, names in step.needs.items():
        shape, values = step.shapes[key], step.values.get(key, {})
        missing = [name for name in names if name not in values]
        if missing:
            there = ", ".join(f"'{k}' {next(iter(v.values())).shape}" for k, v in step.values.items() if v)
            lacks = f"'{key}' {shape} has no {' and no '.join(missing)}"
            return f"{lacks} ({step.name} has statistics of {there or 'nothing'})"
        for name in names:
            if values[name].shape != shape and (values[name].shape, shape) != ((), (1,)):
                return f"'{key}' has shape {shape}, and its {name} has shape {values[name].shape}"
            if not np.isfinite(values[name]).all():
                return f"the {name} of '{key}' {shape} has values that are not finite"
        if "std" in names and (values["std"] < 0).any():
            return f"the std of '{key}' {shape} is negative"
        if "std" not in names and (values[names[0]] > values[names[1]]).any():
            return f"the {names[0]} of '{key}' {shape} is greater than its {names[1]}"
    return None


def _foreign(step: Normalizer, data: Stats, exact: bool) -> str | None:
    """Whether a step's statistics are of other data."""
    for key in step.needs:
        if key not in data:
            continue
        values = {name: np.asarray(v, dtype=np.float64).reshape(-1) for name, v in step.values[key].items()}
        here = {name: v.reshape(-1) for name, v in data[key].items()}
        if len(here["min"]) != int(np.prod(step.shapes[key])):
            return f"'{key}' is {data[key]['min'].shape} in the data, and its statistics are of {step.shapes[key]}"
        found = _other(values, here) if exact and {"min", "max"} <= values.keys() else _far(values, here)
        if found is not None:
            return f"the statistics of '{key}' {step.shapes[key]} {found}"
    return None


def _other(values: Mapping[str, np.ndarray], data: Mapping[str, np.ndarray]) -> str | None:
    """Which dimension's range is not the data's."""
    size = np.maximum(np.abs(data["min"]), np.abs(data["max"]))
    off = np.maximum(np.abs(values["min"] - data["min"]), np.abs(values["max"] - data["max"]))
    if (off <= ROUNDING * size + 1e-12).all():
        return None
    return f"are another set's: {_ranges(values['min'], values['max'], data, int(off.argmax()))}"


def _ranges(low: np.ndarray, high: np.ndarray, data: Mapping[str, np.ndarray], d: int) -> str:
    return (f"dimension {d} goes from {low[d]:.4g} to {high[d]:.4g} in them, and from {data['min'][d]:.4g} to "
            f"{data['max'][d]:.4g} in the data")  # fmt: skip


def _far(values: Mapping[str, np.ndarray], data: Mapping[str, np.ndarray]) -> str | None:
    """Whether most of the data lies far outside of the statistics' range, or fills next to nothing of it.

    Single dimensions may: what was constant in one set moves in another, and tasks differ in what moves most.
    """
    pairs = [pair for pair in (("min", "max"), ("q01", "q99"), ("q10", "q90")) if set(pair) <= values.keys()]
    if pairs:
        low, high = (values[name] for name in pairs[0])
    else:
        low, high = values["mean"] - 3 * values["std"], values["mean"] + 3 * values["std"]
    moves = high > low
    if not moves.any():
        return None
    half, middle = (high - low)[moves] / 2, (high + low)[moves] / 2
    reach = np.maximum(np.abs(data["min"][moves] - middle), np.abs(data["max"][moves] - middle)) / half
    if np.median(reach) > FAR:
        worst = int(np.flatnonzero(moves)[reach.argmax()])
        return f"are far from the data: {_ranges(low, high, data, worst)}"
    fills = (data["max"] - data["min"])[moves] / (2 * half)
    fills, where = fills[fills > 0], np.flatnonzero(moves)[fills > 0]
    if len(fills) and np.median(fills) < 1 / NARROW:
        return f"are far wider than the data: {_ranges(low, high, data, int(where[fills.argmin()]))}"
    return None


# ------------------------------------------------------------------------------------------------ before it matters


def check_run(folder: Path, manifest: dict[str, Any], config: Config, policies: Iterable[str | None]) -> None:
    """Raise UserError where a run's policies do not have the statistics that they are to have, with the remedy.

    Where the data of the run's base is on this machine, as it was, they must be just that data's. Where the base was
    given, they must not be far from the stream's data. Without data, they must fit the policy.
    """
    known: tuple[Stats, bool] | None = None
    looked = False
    for policy in dict.fromkeys(policies):
        if policy is None or not all((Path(policy) / name).is_file() for name in ("config.json", *PIPELINES)):
            continue  # what is missing there is said by those who need it
        if not looked:
            known, looked = _known_data(manifest, config), True
        try:
            found = fault(Path(policy), *(known or ()))
        except UserError:  # a damaged file is named, with what to do, by those who compare its sum
            continue
        if found is not None:
            which = ""
            if manifest["base"].get("kind") == "given" and not Path(policy).resolve().is_relative_to(folder.resolve()):
                which = f"{shlex.quote(policy)} --tasks stream"
            raise UserError(
                f"{policy} cannot be evaluated with the statistics that its processors normalise by: {found}. If the "
                f"policy was trained with the right ones, write them back with: {repair_command(folder, which)}"
            )


def _known_data(manifest: dict[str, Any], config: Config) -> tuple[Stats, bool] | None:
    """Statistics of the data that a run's base was made of, True; or of the stream's, False; None: it is not here."""
    base, dataset = manifest["base"], config.dataset
    kind = base.get("kind") or base_origin(config)
    opened = pretraining_tasks if kind == "pretrained" else stream_tasks
    settings = dataset.pretrain if kind == "pretrained" else dataset
    try:
        if settings is None or not all(is_here(one) for one in sets_of(settings)):
            return None
        tasks, data = opened(dataset, config.render, "size")
        if not data.fingerprint:
            return None
        return _of_low(tasks), kind != "given" and data.fingerprint == base.get("data_fingerprint")
    except UserError:  # a policy is evaluated wherever its data is, or whatever has become of it
        return None


def _of_low(tasks: Sequence[Task]) -> Stats:
    return of_tasks(tasks, quantiles=False)


def check_base(base: Path, config: Config, tasks: Sequence[Task]) -> None:
    """Raise UserError where a base's statistics do not fit it, or are far from the data that it is to be trained on."""
    if not all((base / name).is_file() for name in PIPELINES):
        return  # said when it is loaded
    found = fault(base, _of_low(tasks))
    if found is not None:
        where = f"{_stream(config)} --tasks stream --repair {shlex.quote(str(base))}"
        raise UserError(
            f"the base {base} cannot be trained on {config.dataset.name} with the statistics that its processors "
            f"normalise by: {found}. Take another base, or give it the stream's statistics: {script()} --config {where}"
        )


def _stream(config: Config) -> str:
    """What names the configuration of the stream in a command."""
    name = config.dataset.name
    return shlex.quote(name) if name in (*available("datasets"), *streams()) else "FILE.yaml"


@functools.cache
def script() -> str:
    return "python3 -m clbench.training.statistics" if INSTALLED else "python3 scripts/compute_dataset_statistics.py"


def repair_command(run: Path, which: str = "") -> str:
    """The command that writes the right statistics into a run's checkpoints, or into `which` policy."""
    return f"{script()} --config {as_argument(run)} --repair {which}".rstrip()
