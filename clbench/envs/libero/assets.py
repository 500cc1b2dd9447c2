"""LIBERO's assets (meshes, textures, XML): installing them, finding them, and importing LIBERO without prompts.

hf-libero ships task definitions and initial states, but not the assets, which it fetches from the Hugging Face hub at
first use; and its first import asks for folders on the terminal if its config.yaml is missing. Here one command does
both beforehand, from an archive, a folder or the hub:

    clbench data assets libero --from FILE    # an archive, a folder, or hub

They go to `root()`: assets/, the record assets.json, and a config.yaml of clbench's own. Nothing is written into the
installed package, and ~/.libero is neither read nor changed. Every import of LIBERO goes through `import_libero`.

`assets.json` lists what must be present: the sha256 of every file that decides the physics (.xml, .stl), and the
names of those that are only seen (.msh, .png, and others). It is made from an installed set by

    python -m clbench.envs.libero.assets FOLDER > clbench/envs/libero/assets.json
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import shutil
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from clbench.errors import UserError
from clbench.io import read_json, write_json, write_text
from clbench.paths import cache_root

COMMAND = "clbench data assets libero --from FILE (an archive, a folder, or hub)"
INSTALL = "Install it with scripts/bootstrap.sh, or set LIBERO_PYTHON to an interpreter that has hf-libero."
HUB_REPOSITORY = "lerobot/libero-assets"  # hf-libero's own source
EXPECTED_FILE = Path(__file__).with_name("assets.json")
RECORD = "assets.json"
PHYSICS = (".xml", ".stl")  # robosuite gives visual meshes (.msh) no mass and no contacts
MAX_FILES = 20_000
MAX_BYTES = 4 * 1024**3
_LFS_POINTER = b"version https://git-lfs"


def root() -> Path:
    """Where LIBERO's assets are kept: $CLBENCH_LIBERO_ROOT, else libero/ in the cache."""
    value = os.environ.get("CLBENCH_LIBERO_ROOT")
    return Path(value).expanduser() if value else cache_root() / "libero"


# ------------------------------------------------------------------------------------------------ what must be present


@cache
def expected() -> tuple[dict[str, str], tuple[str, ...]]:
    """Return {path: sha256} of the files that decide the physics, and the paths of the visible ones."""
    raw = json.loads(EXPECTED_FILE.read_text())
    return raw["physics"], tuple(raw["visual"])


def physics_digests(assets: Path) -> dict[str, str]:
    """Return {path: sha256} of the expected physics files that exist."""
    return _digests(assets, expected()[0])


def _digests(assets: Path, names: Iterable[str]) -> dict[str, str]:
    """{path: sha256} of those of `names` that exist."""
    return {n: hashlib.sha256((assets / n).read_bytes()).hexdigest() for n in names if (assets / n).is_file()}


def differing(assets: Path) -> list[str]:
    """Return the physics files of `assets` that differ from those clbench was tested with. UserError: missing files."""
    physics, visual = expected()
    missing = [name for name in (*physics, *visual) if not (assets / name).is_file()]
    if missing:
        raise UserError(
            f"{assets} lacks {len(missing)} of the {len(physics) + len(visual)} files that LIBERO needs, "
            f"among them {missing[0]}. Install the assets with: {COMMAND}"
        )
    for name in (*physics, *visual):
        with (assets / name).open("rb") as file:
            start = file.read(len(_LFS_POINTER))
        if not start or start == _LFS_POINTER:
            what = "is a Git LFS pointer, not the file itself" if start else "is empty"
            raise UserError(f"{assets / name} {what}. Install the assets with: {COMMAND}")
    found = physics_digests(assets)
    return [name for name, digest in physics.items() if found[name] != digest]


def installed() -> Path:
    """Return the folder of the installed assets.

    Raises UserError, naming the command, when they are missing, incomplete, or not as they were installed.
    """
    assets = root() / "assets"
    if not (root() / RECORD).is_file() or not assets.is_dir():
        raise UserError(f"LIBERO's assets are not installed (looked in {root()}). Install them with: {COMMAND}")
    accepted = _record().get("accepted")
    accepted = accepted if isinstance(accepted, dict) else {}
    changed = differing(assets)
    if changed:
        found = physics_digests(assets)
        wrong = [name for name in changed if found[name] != accepted.get(name)]
        if wrong:
            raise UserError(
                f"{assets / wrong[0]} is not the file that was installed ({len(wrong)} such files). "
                f"Install the assets again: {COMMAND}"
            )
    return assets


def _record() -> dict[str, Any]:
    record = read_json(root() / RECORD)
    return record if isinstance(record, dict) else {}


def digest() -> str:
    """Return 12 hex digits over all physics files: equal where the simulation is the same."""
    return _short(physics_digests(installed()))


def looks_digest() -> str:
    """Return 12 hex digits over all visual meshes and textures: equal where images show the same things."""
    return _short(_digests(installed(), expected()[1]))


def _short(digests: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:12]


# -------------------------------------------------------------------------------------------------------- installing


def install(source: str, accept_differences: bool = False) -> tuple[Path, list[str]]:
    """Install assets from `source`: an archive (.tar, also compressed), a folder, or "hub".

    Returns the folder and the names of physics files that differ from those clbench was tested with.

    Raises UserError: the source is missing or unreadable, holds what an assets archive should not (absolute paths,
    "..", links, devices, too many or too large files), lacks files, or has different physics files and
    `accept_differences` is not set. What was installed before is then unchanged.
    """
    from clbench.lock import held  # here, because other interpreters import this module but never install

    place = root()
    try:
        place.mkdir(parents=True, exist_ok=True)
        working = Path(tempfile.mkdtemp(prefix=".partial-", dir=place))
    except OSError as e:
        raise UserError(f"cannot write in {place}: {e.strerror}. Set CLBENCH_LIBERO_ROOT to a writable folder.") from e
    try:
        with held(place, "installation"):
            for left in place.glob(".partial-*"):  # of a process that was killed
                if left != working:
                    shutil.rmtree(left)
            working.mkdir(exist_ok=True)  # another process may have removed it as a leftover
            changed = _install(source, place, working, accept_differences)
    except OSError as e:
        raise UserError(f"cannot install LIBERO's assets in {place}: {e.strerror or e}.") from e
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return place / "assets", changed


def _install(source: str, place: Path, working: Path, accept_differences: bool) -> list[str]:
    """Do the work of `install` in `place`, by way of the folder `working`; returns what differs."""
    if source == "hub":
        found = _download(working / "source")
    elif Path(source).expanduser().is_dir():
        found = Path(source).expanduser()
    else:
        found = working / "source"
        _extract(Path(source).expanduser(), found)
    assets = _find(found, source)
    changed = differing(assets)
    if changed and not accept_differences:
        raise UserError(
            f"{source}: {len(changed)} files that decide the physics differ from LIBERO's, e.g. {changed[0]}: "
            "results would not be comparable. Use another source, or --accept-differences."
        )
    new = working / "assets"
    if assets.is_relative_to(working):
        os.replace(assets, new)
    else:
        shutil.copytree(assets, new)
    digests = physics_digests(new)
    if (place / "assets").exists():
        os.replace(place / "assets", working / "replaced")
    os.replace(new, place / "assets")
    write_json(place / RECORD, {"source": source, "accepted": {name: digests[name] for name in changed}})
    return changed


def _find(folder: Path, source: str) -> Path:
    """Return the folder in `folder` (itself, or up to two levels below) that holds the assets."""
    marks = sorted({name.split("/")[0] for name in expected()[0]})
    for pattern in (".", "*", "*/*"):
        for candidate in [folder] if pattern == "." else sorted(folder.glob(pattern)):
            if all((candidate / mark).is_dir() for mark in marks):
                return candidate
    raise UserError(f"{source} holds no LIBERO assets: no folder in it has {', '.join(marks)}.")


def _extract(archive: Path, folder: Path) -> None:
    """Unpack `archive` into `folder`, regular files and folders only, within bounds."""
    if not archive.is_file():
        raise UserError(f"no file or folder {archive}. Give an archive of LIBERO's assets, a folder, or 'hub'.")
    files = total = 0
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                if not (member.isreg() or member.isdir()):
                    raise UserError(f"{archive}: {member.name!r} is neither a file nor a folder. Nothing is installed.")
                files += 1
                total += member.size
                if files > MAX_FILES or total > MAX_BYTES:
                    raise UserError(
                        f"{archive} holds more than {MAX_FILES} files or {MAX_BYTES >> 30} GiB: not LIBERO's assets."
                    )
                parts = Path(member.name).parts
                if member.name.startswith(("/", "\\")) or ".." in parts:
                    raise UserError(f"{archive}: {member.name!r} leads out of the folder. Nothing is installed.")
                tar.extract(member, folder, filter="data")
    except (tarfile.TarError, EOFError, ValueError, OSError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{archive} cannot be unpacked: {' '.join(str(e).split()) or type(e).__name__}") from e
    except Exception as e:
        if type(e).__module__ not in ("lzma", "_lzma", "zlib", "bz2"):
            raise
        raise UserError(f"{archive} is damaged: {e}") from e


def _download(folder: Path) -> Path:
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(repo_id=HUB_REPOSITORY, repo_type="model", local_dir=folder)
    except Exception as e:
        raise UserError(
            f"cannot fetch {HUB_REPOSITORY} from the Hugging Face hub ({type(e).__name__}: "
            f"{' '.join(str(e).split())[:200]}). Give an archive or a folder instead of 'hub'."
        ) from e
    return folder


# --------------------------------------------------------------------------------------------------------- importing


def package() -> Path:
    """Return the folder of the package `libero.libero` without importing it; UserError when it is not installed."""
    spec = importlib.util.find_spec("libero")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (Path(place) / "libero" / "benchmark").is_dir():
            return Path(place) / "libero"
    raise UserError(f"LIBERO is not installed. {INSTALL}")


def write_config() -> Path:
    """Write the config.yaml that keeps LIBERO from prompting, and return its folder."""
    place, libero = root().resolve(), package()
    folders = {
        "assets": place / "assets",
        "bddl_files": libero / "bddl_files",
        "benchmark_root": libero,
        "datasets": place / "datasets",
        "init_states": libero / "init_files",
    }
    text = "".join(f"{key}: {json.dumps(str(path))}\n" for key, path in folders.items())
    file = place / "config.yaml"
    if not file.is_file() or file.read_text() != text:  # missing, or from an environment that was elsewhere
        write_text(file, text)
    return place


def import_libero() -> ModuleType:
    """Import LIBERO's environments and return `libero.libero.envs`, without prompts or downloads.

    Raises UserError when the package or its assets are missing, or when they cannot be imported.
    """
    package()
    assets = installed()
    os.environ["LIBERO_CONFIG_PATH"] = str(write_config())
    try:
        with _quiet_robosuite():
            module = importlib.import_module("libero.libero")
            module._assets_path_cache = str(assets.resolve())  # type: ignore[attr-defined]
            return importlib.import_module("libero.libero.envs")
    except (ImportError, OSError, AttributeError) as e:
        raise UserError(f"LIBERO cannot be imported ({type(e).__name__}: {e}). {INSTALL}") from e


@contextlib.contextmanager
def _quiet_robosuite() -> Iterator[None]:
    """Keep robosuite, imported in the block, from two things.

    It logs to /tmp/robosuite.log, which fails if another user owns that file; and it loads OpenGL, which fails if there
    is none. Drawing is done by clbench.envs.rendering.
    """
    spec = importlib.util.find_spec("robosuite")
    if spec is None or spec.origin is None:
        raise UserError(f"robosuite is not installed. {INSTALL}")
    if "robosuite" in sys.modules:
        yield
        return
    before = os.environ.get("MUJOCO_GL")
    macros_spec = importlib.util.spec_from_file_location("robosuite.macros", Path(spec.origin).with_name("macros.py"))
    assert macros_spec is not None and macros_spec.loader is not None
    macros: Any = importlib.util.module_from_spec(macros_spec)
    macros_spec.loader.exec_module(macros)
    macros.FILE_LOGGING_LEVEL = None
    macros.CONSOLE_LOGGING_LEVEL = "ERROR"  # it would recommend a private settings file at every start
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)  # also to other listeners
    macros.MUJOCO_GPU_RENDERING = False
    sys.modules["robosuite.macros"] = macros
    os.environ["MUJOCO_GL"] = "disable"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # its sources cause some when they are compiled
            yield
    finally:
        if before is None:
            del os.environ["MUJOCO_GL"]
        else:
            os.environ["MUJOCO_GL"] = before


def _describe(assets: Path) -> str:
    """The contents of assets.json, from a folder of assets."""
    files = sorted(p.relative_to(assets).as_posix() for p in assets.rglob("*") if p.is_file())
    physics = {n: hashlib.sha256((assets / n).read_bytes()).hexdigest() for n in files if n.endswith(PHYSICS)}
    return json.dumps({"physics": physics, "visual": [n for n in files if n not in physics]}, indent=0)


if __name__ == "__main__":
    print(_describe(Path(sys.argv[1])))
