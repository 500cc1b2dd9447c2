"""What the benchmarks share: alternating repeats, the ratios' table, the machine's state, finding the data."""

from __future__ import annotations

import argparse
import bisect
import contextlib
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence

import psutil

from clbench.config.compose import compose
from clbench.config.files import load_yaml
from clbench.config.folders import find
from clbench.config.schema import Config
from clbench.data.info import INFO_FILE
from clbench.data.source import data_folder
from clbench.errors import UserError

TINY = "dit_dec_tiny"


def tiny_config(dataset: str, algorithm: str = "seqfft", model: str = TINY) -> Config:
    """Return the configuration of the tiny DiT-Dec, or another preset, on a stream."""
    given = [f"policy.{key}={value}" for key, value in random_encoders(model).items()]
    config, _ = compose(model=model, algorithms=[algorithm], dataset=dataset, registered=[algorithm], overrides=given)
    return config


def random_encoders(model: str) -> dict[str, str]:
    """Keys of `policy` that give a preset the encoders it has under --smoke: full size, random weights, no hub."""
    file = find("smoke", model)
    section = {} if file is None else load_yaml(file).get("policy", {})
    shown = {True: "true", False: "false", None: "null"}
    return {
        key: json.dumps(value) if isinstance(value, dict) else shown.get(value, str(value))
        for key, value in section.items()
        if "_encoder" in key
    }


def stream_config(dataset: str, model: str = TINY) -> Config:
    """Return the configuration of a preset on a stream; UserError when the stream's data is not there."""
    config = tiny_config(dataset, model=model)
    for data in (config.dataset.data, config.dataset.pretrain.data if config.dataset.pretrain else None):
        if data is not None and not (data_folder(data) / INFO_FILE).is_file():
            raise UserError(f"there are no demonstrations in {data_folder(data)}: run `clbench data make {dataset}`.")
    return config


def add_device_arguments(p: argparse.ArgumentParser, width: int | None = None) -> None:
    """Add --device and --width: where a benchmark trains, and how wide a policy."""
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to train (default cpu)")
    shown = f"default {width}" if width else "default: the preset's 128"
    p.add_argument("--width", type=int, default=width, help=f"d_model of the policy, a multiple of 4 ({shown})")


def add_model_argument(p: argparse.ArgumentParser) -> None:
    """Add --model: a preset."""
    p.add_argument("--model", default=TINY, help=f"preset (default {TINY}); encoders from a hub get random weights")


def check_device(device: str, count: int = 1) -> None:
    """Raise UserError when torch does not see that many CUDA devices."""
    import torch

    if device == "cuda" and torch.cuda.device_count() < count:
        raise UserError(f"torch sees {torch.cuda.device_count()} CUDA devices, {count} needed. There is --device cpu.")


def policy_size(width: int | None) -> dict[str, int]:
    """Keys of `policy` for a width: heads are 32 to 128 wide."""
    return {} if width is None else {"d_model": width, "n_heads": max(4, width // 128)}


def wait_for(device: str) -> None:
    """Until the device has done what it was given: before a clock is read."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def machine(threads: str, device: str = "cpu") -> str:
    """One line about the machine. Other work on it shows in the load: about 0 on an idle machine."""
    load = ", ".join(f"{v:.1f}" for v in os.getloadavg())
    gpus = ""
    if device == "cuda":
        import torch

        gpus = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}, torch {torch.__version__}, "
    return (
        f"machine: {platform.machine()}, {os.cpu_count()} cores, {gpus}torch threads {threads}, "
        f"load over 1, 5, 15 minutes {load}"
    )


class CpuSampler:
    """Notes every half second how much processor time a process and its children have used; a context manager."""

    INTERVAL = 0.5

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._used: dict[int, float] = {}  # by process, kept after it has ended
        self._times: list[float] = []
        self._totals: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> CpuSampler:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        last = False
        while True:
            with contextlib.suppress(psutil.NoSuchProcess):  # ended between listing and asking
                for process in [self._root, *self._root.children(recursive=True)]:
                    used = process.cpu_times()
                    self._used[process.pid] = used.user + used.system
            self._times.append(time.monotonic())
            self._totals.append(sum(self._used.values()))
            if last:
                return
            last = self._stop.wait(self.INTERVAL)  # one more sample after the end

    def between(self, start: float, end: float) -> float:
        """Processor seconds between two moments of time.monotonic(), interpolated."""
        return self._at(end) - self._at(start)

    def _at(self, moment: float) -> float:
        i = min(max(bisect.bisect(self._times, moment), 1), len(self._times) - 1)
        t0, t1 = self._times[i - 1], self._times[i]
        share = min(max((moment - t0) / (t1 - t0), 0.0), 1.0)
        return self._totals[i - 1] + share * (self._totals[i] - self._totals[i - 1])


def spread(values: Sequence[float]) -> list[str]:
    """Minimum, median, maximum as table cells."""
    return [f"{v:.2f}" for v in (min(values), statistics.median(values), max(values))]


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns: the first to the left, the others to the right."""
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        cells = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells).rstrip(), flush=True)


def print_verdict(ratio: float, aim: float, at_least: bool) -> None:
    """Say whether the median ratio meets its aim."""
    met = ratio >= aim if at_least else ratio <= aim
    sign = "≥" if at_least else "≤"
    print(f"aim: {sign} {aim:g}; median {ratio:.2f}: {'met' if met else 'MISSED'}", flush=True)


def run(main: Callable[[], None]) -> None:
    """Run a benchmark; what a user can fix ends it with one message and status 2."""
    try:
        main()
    except UserError as e:
        print(f"{os.path.basename(sys.argv[0])}: {e}", file=sys.stderr)
        sys.exit(2)
