"""What a container may lack but libraries take for granted: a writable home, caches and temporary folder.

`settle` is called once when a command starts, before the imports that read these variables. It changes nothing if
everything is as on a user's own machine; a variable that the user set is changed only if it cannot be used. Processes
that the command starts inherit the changes. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tempfile
from pathlib import Path

from clbench.paths import cache_root

FOLDER = "libraries"  # in the cache: what libraries store when the home cannot be written


def settle() -> None:
    """Give this process, and those it starts, writable folders."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # if the locale lacks a character: "?" and no error
    home = Path(os.path.expanduser("~"))
    if not home.is_dir():
        os.environ["HOME"] = str(_made("home"))
    _settle_temporary()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    hugging_face = Path(os.environ.get("HF_HOME") or cache / "huggingface").expanduser()
    if not _writable(hugging_face):
        if hugging_face.is_dir():  # models that come with an image: read there, nothing is written there
            os.environ["HF_HOME"] = str(hugging_face)
        else:
            os.environ["HF_HOME"] = str(_made("huggingface"))
    hugging_face = Path(os.environ.get("HF_HOME") or hugging_face)
    for variable, name in (("HF_DATASETS_CACHE", "datasets"), ("HF_MODULES_CACHE", "modules")):
        _offer(variable, hugging_face / name, f"huggingface/{name}")
    config = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    _offer("MPLCONFIGDIR", config / "matplotlib", "matplotlib")
    _offer("WANDB_CONFIG_DIR", config / "wandb", "wandb-config")
    data = Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser()
    _offer("WANDB_DATA_DIR", data / "wandb", "wandb-data")
    _offer("TRITON_CACHE_DIR", Path("~/.triton/cache").expanduser(), "triton")
    if not _writable(cache):
        if (cache / "torch").is_dir():
            os.environ.setdefault("TORCH_HOME", str(cache / "torch"))
        os.environ["XDG_CACHE_HOME"] = str(_made("cache"))


def _offer(variable: str, default: Path, name: str) -> None:
    """Set a variable if what it names, or else `default`, cannot be written."""
    if not _writable(Path(os.environ.get(variable) or default).expanduser()):
        os.environ[variable] = str(_made(name))


def _settle_temporary() -> None:
    """A temporary folder for this process and for programs that take TMPDIR as it is."""
    asked = os.environ.get("TMPDIR")
    try:
        found = tempfile.gettempdir()  # the writable one of TMPDIR, /tmp, /var/tmp, /usr/tmp and the working folder
        if asked and Path(asked).absolute() != Path(found).absolute():
            os.environ["TMPDIR"] = found
    except FileNotFoundError:  # none of them
        tempfile.tempdir = os.environ["TMPDIR"] = str(_made("tmp"))


def _writable(folder: Path) -> bool:
    """Whether the folder exists and can be written, or can be made."""
    existing = next((p for p in (folder, *folder.absolute().parents) if p.exists()), Path("/"))
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _made(name: str) -> Path:
    """A folder for libraries: in clbench's cache, or in a temporary folder if that cannot be written either."""
    folder = cache_root().absolute() / FOLDER / name
    if not _writable(folder):
        own = Path(tempfile.gettempdir()) / f"clbench-{os.getuid()}"
        with contextlib.suppress(FileExistsError):
            own.mkdir(mode=0o700)
        there = own.lstat()
        if not stat.S_ISDIR(there.st_mode) or there.st_uid != os.getuid() or there.st_mode & 0o022:  # another user's
            own = Path(tempfile.mkdtemp(prefix="clbench-"))
        folder = own / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder
