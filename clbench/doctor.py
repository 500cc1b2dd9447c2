"""`clbench doctor`: what this machine has, what is missing, and how to get it. Changes nothing."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from clbench.config.compose import available, compose
from clbench.config.schema import sets_of
from clbench.data.lerobot_set import has_set
from clbench.data.source import data_folder
from clbench.env_file import env_file, read_env_file
from clbench.envs.libero import assets as libero_assets
from clbench.envs.making import other_python, simulator_versions
from clbench.envs.rendering import LIBRARIES, backend_name, libraries
from clbench.errors import UserError
from clbench.paths import bases_root, cache_root, data_root, results_root
from clbench.terminal import show

REQUIRED = ("torch", "lerobot", "accelerate", "peft", "transformers", "omegaconf")
OPTIONAL = {
    "metaworld": "simulator and demonstrations of the metaworld streams: install the extra 'metaworld'",
    "mujoco": "physics of the simulators: comes with the extra 'metaworld'",
    "deepspeed": "--strategy zero2: install the extra 'deepspeed'",
    "tensorboard": "log.tensorboard=true: pip install tensorboard",
    "wandb": "log.wandb=true: pip install wandb",
}
MARKS = {"ok": "ok     ", "missing": "MISSING", "note": "–      "}


@dataclass(frozen=True)
class Finding:
    """One line of the answer. `state`: ok, missing (something essential), or note (something optional is missing)."""

    state: str
    what: str
    remedy: str = ""


def versions() -> Iterator[Finding]:
    """Python and packages."""
    yield Finding("ok", f"Python {platform.python_version()}")
    for name in REQUIRED:
        try:
            yield Finding("ok", f"{name} {version(name)}")
        except PackageNotFoundError:
            yield Finding("missing", name, "bash scripts/test.sh makes the environment")
    for name, remedy in OPTIONAL.items():
        try:
            yield Finding("ok", f"{name} {version(name)}")
        except PackageNotFoundError:
            yield Finding("note", f"{name} is not installed", remedy)


def devices() -> Iterator[Finding]:
    """Processors, GPUs, and what ZeRO-2 needs besides DeepSpeed."""
    yield Finding("ok", f"{os.cpu_count()} processor cores")
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    count = torch.cuda.device_count()
    for i in range(count):
        p = torch.cuda.get_device_properties(i)
        yield Finding("ok", f"GPU {i}: {p.name}, {p.total_memory / 1e9:.0f} GB")
    if not count:
        yield Finding("note", "no GPU that torch sees", "everything runs on the CPU; --nproc N uses several processes")
    if importlib.util.find_spec("deepspeed") is not None:
        if any(shutil.which(c) for c in ("c++", "g++", "clang++")):
            yield Finding("ok", "a C++ compiler, which DeepSpeed uses once")
        else:
            yield Finding("note", "no C++ compiler", "--strategy zero2 builds a small operator: install g++")


def renderers() -> Iterator[Finding]:
    """What can draw camera images. State streams do not need it."""
    chosen = os.environ.get("MUJOCO_GL", "").strip().lower()
    found = libraries()
    if found:
        yield Finding("ok", f"renderers: {', '.join(found)}" + (f" (MUJOCO_GL={chosen})" if chosen else ""))
    else:
        yield Finding("note", "no EGL or OSMesa", "only needed for camera images: install libegl1 or libosmesa6")
        return
    try:
        used = backend_name()
        if used in LIBRARIES and used not in found:
            yield Finding("note", f"MUJOCO_GL={chosen} has no such library here", "unset it, or install the library")
    except UserError as e:
        yield Finding("note", f"MUJOCO_GL={chosen}", str(e))


def simulators() -> Iterator[Finding]:
    """What LIBERO needs besides its package; checked without importing it, which could prompt for input."""
    variable = other_python("libero_state")
    if variable is not None:
        try:
            found = ", ".join(f"{n.replace('_', ' ')} {v}" for n, v in simulator_versions("libero_state").items())
            yield Finding("ok", f"LIBERO under {variable}={os.environ[variable]}: {found}")
        except UserError as e:
            yield Finding("note", "LIBERO under another interpreter", str(e))
        return
    try:
        libero_assets.package()
    except UserError:
        yield Finding(
            "note", "LIBERO is not installed",
            "only for the libero streams: install the extra 'libero', or set LIBERO_PYTHON to a Python that has it",
        )  # fmt: skip
        return
    yield Finding("ok", f"LIBERO (hf-libero {version('hf-libero')})")
    try:
        yield Finding("ok", f"LIBERO's assets: {libero_assets.installed()}")
    except UserError as e:
        yield Finding("note", "LIBERO's assets", str(e))


def settings() -> Iterator[Finding]:
    """What .env sets, by name only: a value may be a secret."""
    file = env_file()
    if file is None:
        yield Finding("ok", "no .env (.env.example lists what it may contain)")
        return
    found = read_env_file(file)
    lost = [k for k, v in found.items() if os.environ.get(k, v) != v]
    yield Finding("ok", f"{file} sets {', '.join(k for k in found if k not in lost) or 'nothing'}")
    if lost:
        yield Finding("note", f"{file} has other values for {', '.join(lost)}", "the environment's are used")


def folders() -> Iterator[Finding]:
    """Data, results, caches: do they exist, are they writable, and what do they hold?"""
    for label, variable, root in (
        ("data", "CLBENCH_DATA_ROOT", data_root()),
        ("results", "CLBENCH_RESULTS_ROOT", results_root()),
        ("cache", "CLBENCH_CACHE_ROOT", cache_root()),
    ):
        nearest = next(p for p in (root, *root.absolute().parents) if p.exists())
        free = shutil.disk_usage(nearest).free / 1e9
        if os.access(nearest, os.W_OK):
            yield Finding("ok", f"{label}: {root} ({free:.0f} GB free)")
        else:
            yield Finding("missing", f"{label}: {root} is not writable", f"set {variable}, in .env or outside")
    for name in available("datasets"):
        yield _stream(name)
    bases = list(bases_root().glob("*/base.json"))
    yield (
        Finding("ok", f"{len(bases)} pretrained bases")
        if bases
        else Finding(
            "note", "no pretrained base yet", "the first training run makes it (or clbench pretrain --dataset NAME)"
        )
    )


def _stream(name: str) -> Finding:
    try:
        config, _ = compose(model="dit_dec_tiny", algorithms=["seqfft"], dataset=name, registered=["seqfft"])
    except UserError as e:
        return Finding("missing", f"stream {name}", str(e))
    d = config.dataset
    parts = [one for part in (d, d.pretrain) if part is not None for one in sets_of(part)]
    needed = [part.data for part in parts if part.repo_id is None]
    absent = [n for n in needed if not has_set(data_folder(n))]
    if absent:
        return Finding("note", f"stream {name}: no data in {', '.join(absent)}", f"clbench data make {name}")
    return Finding("ok", f"stream {name}")


SECTIONS: dict[str, Callable[[], Iterator[Finding]]] = {
    "versions": versions,
    "devices": devices,
    "renderers": renderers,
    "simulators": simulators,
    "settings": settings,
    "folders and data": folders,
}


def doctor() -> int:
    """Print all findings; returns 1 when something essential is missing."""
    missing = 0
    for title, check in SECTIONS.items():
        show(title)
        for f in check():
            show(f"  {MARKS[f.state]} {f.what}" + (f" — {f.remedy}" if f.remedy else ""))
            missing += f.state == "missing"
    show("something essential is missing: see above." if missing else "nothing essential is missing.")
    return 1 if missing else 0
