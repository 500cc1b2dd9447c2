"""Statistics of a configuration's data, and the repair of policies that normalise by others.

python3 scripts/compute_dataset_statistics.py --config metaworld_quick --out stats.json
python3 scripts/compute_dataset_statistics.py --config RUN --repair
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from clbench.checkpoints.base import find_base
from clbench.checkpoints.run_folder import moved, read_checkpoint, read_manifest, run_folder
from clbench.checkpoints.statistics import Normalizer, fault, normalizers
from clbench.checkpoints.trusted import check_checkpoint, trusting
from clbench.checkpoints.whole import DESCRIPTION, damage, write_whole
from clbench.config.compose import compose, compose_files, override, read_config
from clbench.config.schema import Config, base_origin
from clbench.data.statistics import QUANTILES, Stats, of_tasks, unscaled
from clbench.data.task import Task
from clbench.env_file import load_env_file
from clbench.errors import UserError, shortage
from clbench.io import read_json, write_bytes, write_json
from clbench.lock import held
from clbench.paths import results_root
from clbench.patience import patience
from clbench.processes import no_threads
from clbench.streams.stream import pretraining_tasks, stream_tasks
from clbench.surroundings import settle
from clbench.terminal import show, tell

if TYPE_CHECKING:
    import torch

BEFORE = "statistics_before"  # folder with the files as they were before a repair
LEVELS = 256


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="compute_dataset_statistics.py",
        description="Compute the statistics that policies are normalised by, from all frames of a configuration's "
        "tasks: mean, std, min, max, count, q01, q10, q50, q90, q99, and which dimensions take two values only. Write "
        "them as LeRobot's stats.json, or into policies that have none, or another set's.",
        epilog="after --: overrides as key=value, e.g. -- dataset.data=FOLDER. See docs/data.md.",
    )
    p.add_argument(
        "--config", required=True, metavar="FILE|RUN|STREAM",
        help="a configuration or a stream's file (.yaml), a run by id or folder, or a stream by name",
    )  # fmt: skip
    p.add_argument(
        "--tasks", choices=("base", "stream"),
        help="whose tasks: those that the base is made on, or the stream's (default: base; stream, where the base is "
        "random or given)",
    )  # fmt: skip
    p.add_argument(
        "--images", action="store_true",
        help="also of camera images, a channel at a time, over every frame: decodes all of them",
    )  # fmt: skip
    p.add_argument("--out", metavar="FILE", type=Path, help="write the statistics as JSON")
    p.add_argument(
        "--repair", nargs="?", const=True, metavar="RUN|FOLDER",
        help="write the right statistics into all checkpoints of a run (default: that of --config), or into a LeRobot "
        "checkpoint's folder. The files as they were are kept. Only for policies that were trained with these "
        "statistics, or are about to be trained",
    )  # fmt: skip
    p.add_argument(
        "--trust", action="append", default=[], metavar="CHECKPOINT|RUN|TYPE",
        help="as of clbench train (docs/security.md)",
    )  # fmt: skip
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of scripts/compute_dataset_statistics.py; 2 and one line on stderr for a user's mistake."""
    argv = list(sys.argv[1:] if argv is None else argv)
    overrides: list[str] = []
    if "--" in argv:
        at = argv.index("--")
        argv, overrides = argv[:at], argv[at + 1 :]
    args = parser().parse_args(argv)
    try:
        load_env_file()  # runs and data may be elsewhere
        settle()
        no_threads()
        with trusting(args.trust):
            run(args, overrides)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader (head, less) has seen enough; Python must not flush again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as e:
        if args.debug:
            tell(*traceback.format_exc().splitlines())
        tell("error: " + " ".join(str(e).split()))
        return 2
    except Exception as e:
        short = shortage(e)
        if short is None or args.debug:
            raise
        tell(f"error: {short}")
        return 2


def run(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    config, folder = read(args.config, overrides)
    target = None
    if args.repair is not None:
        target = _target(args.repair, folder)
    data = _of_config(config, folder, args.tasks)
    with patience(f"computing statistics of {data.what}"):
        stats = of_tasks(data.tasks)
    show(*summary(data, stats))
    if args.images:
        stats |= image_statistics(data.tasks)
    if args.out is not None:
        write_json(args.out, {k: {n: v.tolist() for n, v in values.items()} for k, values in stats.items()})
        show(f"written: {args.out}")
    if target is not None:
        repair(target, data)


def read(name: str, overrides: Sequence[str]) -> tuple[Config, Path | None]:
    """The configuration that a file, a run or a stream's name stands for; a run's folder."""
    if (Path(name) / "manifest.json").is_file() or (results_root() / name / "manifest.json").is_file():
        folder = run_folder(name)
        return override(moved(read_config(folder / "config.yaml"), folder), overrides), folder
    if name.endswith((".yaml", ".yml")) and not Path(name).is_file():
        raise UserError(f"--config {name}: there is no such file.")
    if name.endswith((".yaml", ".yml")):
        return compose_files([name], overrides)[0], None
    if os.sep in name:
        raise UserError(f"--config {name}: that is neither a .yaml file nor the folder of a run (manifest.json).")
    return compose(model="dit_dec_tiny", algorithms=["seqfft"], dataset=name, overrides=overrides)[0], None


# ------------------------------------------------------------------------------------------------ of which data


@dataclass(frozen=True)
class Data:
    """Tasks whose statistics are wanted. `given`: the base of a run that has them already, where it was given."""

    what: str
    tasks: list[Task]
    given: Path | None = None


def _of_config(config: Config, folder: Path | None, which: str | None) -> Data:
    manifest = None if folder is None else read_manifest(folder)
    kind = (manifest or {}).get("base", {}).get("kind") or base_origin(config)
    of_base = which == "base" or (which is None and kind == "pretrained")
    if of_base and kind == "given":
        raise UserError(
            "--tasks base: the base was given (policy.path), and which data it learned is not known. The statistics of "
            "the stream's own tasks are --tasks stream."
        )
    opened = pretraining_tasks if of_base and kind == "pretrained" else stream_tasks
    with patience("opening the data"):
        tasks, _ = opened(config.dataset, config.render)
    whose = "the base of " if opened is pretraining_tasks else ""
    given = None
    if kind == "given" and which is None and folder is not None and manifest is not None:
        given = find_base(manifest["base"], folder, f"run {folder.name} is")
        given = given if fault(given, of_tasks(tasks, quantiles=False)) is None else None
    return Data(f"{whose}{config.dataset.name}", tasks, given)


def summary(data: Data, stats: Stats) -> list[str]:
    """What the statistics are of, and what they are, in lines."""
    roots = ", ".join(str(r) for r in dict.fromkeys(t.root for t in data.tasks))
    frames = next(iter(stats.values()))["count"][0]
    episodes = sum(len(t.episodes) for t in data.tasks)
    lines = [f"{data.what}: {', '.join(t.name for t in data.tasks)}: {episodes} episodes, {frames} frames ({roots})"]
    for name, s in stats.items():
        constant, binary = np.flatnonzero(s["min"] == s["max"]), np.flatnonzero(s["binary"])
        about = [f"from {s['min'].min():.4g} to {s['max'].max():.4g}"]
        if len(constant):
            about.append(f"constant: {_places(constant)}")
        if len(binary):
            about.append(f"two values only: {_places(binary)}")
        if (raw := unscaled(s)).any():
            about.append(f"left as they are by quantiles and min_max: {_places(np.flatnonzero(raw))}")
        lines.append(f"{name} {s['min'].shape}: {'; '.join(about)}")
    return lines


def _places(places: np.ndarray) -> str:
    return ", ".join(map(str, places.tolist()))


def image_statistics(tasks: Sequence[Task]) -> Stats:
    """Statistics of every channel, in [0, 1], over all pixels of all frames; "count" is the number of images.

    Values are those of bytes, so counting how often each occurs gives exact quantiles, too.
    """
    import torch

    from clbench.data.frames import StreamFrames, unpacked

    alone = SimpleNamespace(action_delta_indices=None, observation_delta_indices=None)
    frames = StreamFrames([tuple(tasks)], alone)  # type: ignore[arg-type]
    cameras = [k for k, f in frames.parts(0)[0].features.items() if f["dtype"] in ("image", "video")]
    if not cameras:
        raise UserError("--images: the data has no camera images.")
    total, done = frames.length(0), 0
    counts = {key: np.zeros((3, LEVELS), dtype=np.int64) for key in cameras}
    with patience("decoding images", lambda: f"{done} of {total} frames"):
        for start in range(0, total, 32):
            index = torch.arange(start, min(start + 32, total))
            batch = unpacked(frames.fetch(torch.stack([torch.zeros_like(index), index], 1)))
            for key in cameras:
                levels = (batch[key] * (LEVELS - 1)).round().long()
                for c in range(3):
                    counts[key][c] += torch.bincount(levels[:, c].flatten(), minlength=LEVELS).numpy()
            done = start + len(index)
    return {key: _of_counts(c, total) for key, c in counts.items()}


def _of_counts(counts: np.ndarray, images: int) -> dict[str, np.ndarray]:
    """Statistics of values 0 … 255 that occur so often (3, 256), as shares of 255, each (3, 1, 1)."""
    levels, n = np.arange(LEVELS) / (LEVELS - 1), counts.sum(1, keepdims=True)
    mean = (counts * levels).sum(1, keepdims=True) / n
    ends = np.cumsum(counts, 1)

    def at(rank: np.ndarray) -> np.ndarray:
        return levels[(ends <= rank).sum(1)]

    found = {"mean": mean[:, 0], "std": np.sqrt((counts * np.square(levels - mean)).sum(1) / n[:, 0])}
    found |= {"min": at(np.zeros_like(n)), "max": at(n - 1)}
    for name, q in QUANTILES.items():
        place = q * (n - 1)
        below = np.floor(place)
        low, high = at(below), at(np.minimum(below + 1, n - 1))
        found[name] = low + (place - below)[:, 0] * (high - low)
    return {**{name: v.reshape(3, 1, 1) for name, v in found.items()}, "count": np.array([images])}


# ------------------------------------------------------------------------------------------------ repair


def _target(repair: str | bool, folder: Path | None) -> Path:
    """The run, or the policy's folder, that is to be repaired."""
    if repair is True:
        if folder is None:
            raise UserError("--repair without a name is for --config RUN; otherwise say what: --repair RUN|FOLDER.")
        return folder
    policy = Path(str(repair)).expanduser()
    return policy if (policy / "config.json").is_file() else run_folder(policy)


def repair(target: Path, data: Data) -> None:
    """Write the data's statistics into a run's checkpoints, or into a policy's folder, where there are others.

    Raises:
        UserError: something else in a checkpoint is damaged, a training or an evaluation is under way, or a folder
            cannot be written. What was repaired before stays so; the same command goes on.
    """
    if (target / "manifest.json").is_file():
        with held(target, "training"), held(target / "eval", "evaluation"):
            places = list(_places_of_run(target))
            done = [p for holder, p in places if _repair(holder, p, data, target)]
            _say(target, len(places), done)
            records = target / "eval" / "cells"
            if done and records.is_dir():
                tell(
                    f"note: {records.parent} holds episodes that were played with the statistics of before. Move it "
                    "away, then evaluate the run again."
                )
        return
    done = [target] if _repair(target, target, data, target.parent) else []
    _say(target, 1, done)


def _say(target: Path, count: int, done: list[Path]) -> None:
    kept = target if (target / "manifest.json").is_file() else target.parent
    if not done:
        show(f"nothing to repair: {target} has these statistics")
    else:
        show(f"repaired: {len(done)} of {count} policies in {target}; the files of before are in {kept / BEFORE}")


def _places_of_run(run: Path) -> Iterator[tuple[Path, Path]]:
    """Everything of a run that holds a policy, and the policy's folder in it; its base, where clbench made that."""
    for pattern in ("checkpoints/*", "training_state/*", "weights/*/*"):
        for holder in sorted(run.glob(pattern)):
            if (holder / "policy" / "config.json").is_file() and not holder.name.startswith("."):
                yield holder, holder / "policy"
    base = read_manifest(run)["base"]
    if base.get("kind") in ("pretrained", "random"):
        try:
            found = find_base(base, run, f"run {run.name} is")
        except UserError:
            return  # not on this machine: it is of no use to these checkpoints
        yield found, found


def _repair(holder: Path, policy: Path, data: Data, keep: Path) -> bool:
    """Write the right statistics into a policy's folder; whether others were there.

    `holder`: the folder with the description of all files, where there is one. `keep`: BEFORE goes there.
    """
    check_checkpoint(policy)
    new = _new_files(policy, data)
    changed = {n: b for n, b in new.items() if not (policy / n).is_file() or (policy / n).read_bytes() != b}
    if not changed:
        return False
    inside = policy.relative_to(holder)
    names = {str(inside / n) for n in changed}
    sealed = (holder / DESCRIPTION).is_file()
    reason = damage(holder, names) if sealed else None
    if reason is not None:
        raise UserError(
            f"{holder} is damaged beside its statistics ({reason}), so it is left as it is. Put the file back from a "
            "copy first."
        )
    place = holder.relative_to(keep) if holder.is_relative_to(keep) else Path(holder.name)
    _keep(holder, [*sorted(names), *([DESCRIPTION] if sealed else [])], keep / BEFORE / place)
    if not sealed:
        for name, content in changed.items():
            write_bytes(policy / name, content)
        return True

    def fill(temporary: Path) -> dict[str, Any]:
        for path in (p for p in holder.rglob("*") if p.is_file() and not p.is_symlink()):
            name = path.relative_to(holder)
            if str(name) in names or str(name) == DESCRIPTION:
                continue
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            _link(path, temporary / name)
        (temporary / inside).mkdir(parents=True, exist_ok=True)
        for file, content in changed.items():
            (temporary / inside / file).write_bytes(content)
        described = read_checkpoint(holder)
        return {k: v for k, v in described.items() if k not in ("digest", "files", "seal")}

    write_whole(holder, fill, lambda: sum(map(len, changed.values())))
    return True


def _link(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _keep(holder: Path, names: list[str], place: Path) -> None:
    """Copy files into a new folder beside those of earlier repairs."""
    where, number = place, 1
    while where.exists():
        number += 1
        where = place.with_name(f"{place.name}-{number}")
    for name in names:
        if (holder / name).is_file():
            write_bytes(where / name, (holder / name).read_bytes())


def _new_files(policy: Path, data: Data) -> dict[str, bytes]:
    """Files of a policy's folder by name, with the right statistics: its steps' states, and what names these."""
    from safetensors.torch import save

    from clbench.checkpoints.policy_io import read_policy_config

    config = read_policy_config(policy, "cpu")
    right = _states_of(data.given) if data.given is not None else _states_from(config, data)
    files: dict[str, bytes] = {}
    pipelines: dict[str, Any] = {}
    for step in normalizers(policy):
        state = right(step)
        described = pipelines.setdefault(step.pipeline, read_json(policy / step.pipeline))
        entry = described["steps"][step.place]
        before = entry.get("state_file")
        if state:
            stem = step.pipeline.removesuffix(".json")
            entry["state_file"] = before or f"{stem}_step_{step.place}_{step.name}.safetensors"
            files[entry["state_file"]] = save(state)
        else:
            entry.pop("state_file", None)
        if entry.get("state_file") != before:
            files[step.pipeline] = json.dumps(described, indent=2).encode()
    return files


def _states_from(config: Any, data: Data) -> Callable[[Normalizer], dict[str, torch.Tensor]]:
    """Each step's state as it is in a policy that is made for the data now."""
    from lerobot.processor import ProcessorStepRegistry

    from clbench.checkpoints.statistics import OURS
    from clbench.data.frames import StreamFrames
    from clbench.policies.dit.configuration import DitConfig
    from clbench.policies.dit.processor import stats_of_steps
    from clbench.training.pretrain import frame_statistics, takes_ranges

    stats: Any = frame_statistics(StreamFrames([tuple(data.tasks)], config), takes_ranges(config))
    of_lerobots, of_ours = stats_of_steps(config, stats) if isinstance(config, DitConfig) else (stats, stats)

    def state(step: Normalizer) -> dict[str, torch.Tensor]:
        own = of_ours if step.name in OURS else of_lerobots
        return ProcessorStepRegistry.get(step.name)(**step.settings, stats=own).state_dict()

    return state


def _states_of(base: Path) -> Callable[[Normalizer], dict[str, torch.Tensor]]:
    """Each step's state as the given base has it."""
    from clbench.tensor_files import read_tensors

    there = {(s.pipeline, s.name): s.state_file for s in normalizers(base)}

    def state(step: Normalizer) -> dict[str, torch.Tensor]:
        if (step.pipeline, step.name) not in there:
            raise UserError(
                f"the base {base} has no step {step.name} in {step.pipeline}, which the run's policies have."
            )
        file = there[step.pipeline, step.name]
        return {} if file is None else read_tensors(base / file)

    return state


if __name__ == "__main__":
    sys.exit(main())
