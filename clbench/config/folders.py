"""Where configuration files are looked for. Of several files with the same name the first counts:

1. `./configs` of the working directory;
2. the folders that $CLBENCH_CONFIG_PATH names, separated by colons;
3. those of installed packages, through the entry point group `clbench.configs`, whose values name packages;
4. clbench's own: `configs/` in the checkout, which a wheel contains as `clbench/configs`.

Each has the folders of KINDS, or some of them. Files are read as data; no package is imported to find them.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from clbench import registry
from clbench.errors import UserError
from clbench.paths import INSTALLED, PACKAGE, PROJECT_ROOT

KINDS = ("models", "datasets", "algorithms", "recipes", "smoke", "experiments")
VARIABLE = "CLBENCH_CONFIG_PATH"
SHIPPED = (PACKAGE if INSTALLED else PROJECT_ROOT) / "configs"
GROUP = "configs"  # of entry points: clbench.configs
USER, PLUGIN, OWN = "user", "plugin", "clbench"


@dataclass(frozen=True)
class Folder:
    """A folder of configurations.

    Attributes:
        kind: who owns it: USER, PLUGIN or OWN.
        origin: for people: "clbench", a distribution and its version, or the folder as the user would write it.
    """

    path: Path
    kind: str
    origin: str

    def file(self, kind: str, name: str) -> Path | None:
        """The YAML file of that name, or None. A name never leads out of the folder."""
        path = self.path / kind / f"{name}.yaml"
        return path if path.parent == self.path / kind and path.is_file() else None


def folders() -> list[Folder]:
    """All folders, in the order in which they are searched.

    Raises:
        UserError: $CLBENCH_CONFIG_PATH or an entry point names something that is not a folder.
    """
    found: dict[Path, Folder] = {}
    own = SHIPPED.resolve()
    here = Path("configs")
    if here.is_dir():
        found[here.resolve()] = Folder(here.resolve(), USER, "./configs")
    for text in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        path = Path(text).expanduser()
        if not path.is_dir():
            raise UserError(f"{VARIABLE} names {text}, which is not a folder. Correct it, or unset it.")
        found.setdefault(path.resolve(), Folder(path.resolve(), USER, text))
    for folder in _of_plugins(tuple(sys.path)):
        found.setdefault(folder.path, folder)
    found.pop(own, None)
    return [*found.values(), Folder(own, OWN, OWN)]


@cache
def _of_plugins(path: tuple[str, ...]) -> tuple[Folder, ...]:
    """The folders of installed packages; looking for them takes a while, so it is done once per search path."""
    return tuple(Folder(place.resolve(), PLUGIN, origin) for origin, place in registry.package_folders(GROUP))


def forget() -> None:
    """Look for installed packages again (tests install some)."""
    _of_plugins.cache_clear()


def shipped(*parts: str) -> Path:
    """A file of clbench's own, which no other folder can replace."""
    return SHIPPED.joinpath(*parts)


def holders(kind: str, name: str) -> list[tuple[Folder, Path]]:
    """Every folder that has this name, the one that counts first.

    Raises:
        UserError: two plugins provide it, and no file of the user's decides.
    """
    found = [(folder, path) for folder in folders() if (path := folder.file(kind, name)) is not None]
    _one_plugin(kind, name, [folder for folder, _ in found])
    return found


def find(kind: str, name: str) -> Path | None:
    """The file that counts for a name, or None."""
    found = holders(kind, name)
    return found[0][1] if found else None


def files(kind: str) -> dict[str, tuple[Folder, Path]]:
    """Every name of a kind, sorted, with the folder and the file that count."""
    stems = {path.stem for folder in folders() for path in (folder.path / kind).glob("*.yaml")}
    return {name: found[0] for name in sorted(stems) if (found := holders(kind, name))}


def names(kind: str) -> list[str]:
    """Every name of a kind, sorted."""
    return sorted({path.stem for folder in folders() for path in (folder.path / kind).glob("*.yaml")})


def _one_plugin(kind: str, name: str, found: list[Folder]) -> None:
    if kind == "recipes" or not found or found[0].kind != PLUGIN:  # several packages' recipes are merged: recipes.py
        return
    plugins = [folder for folder in found if folder.kind == PLUGIN]
    if len(plugins) > 1:
        raise UserError(
            f"{kind}/{name}.yaml is provided by {' and by '.join(f.origin for f in plugins)}. Uninstall one of them, "
            f"or put the one that you mean into ./configs/{kind}."
        )


def shown(path: Path) -> str:
    """A file as shown to people: configs/… is clbench's own, ./configs/… the working directory's."""
    if path.is_relative_to(SHIPPED):
        return str(Path("configs") / path.relative_to(SHIPPED))
    for folder in folders():
        if path.is_relative_to(folder.path):
            inside = path.relative_to(folder.path)
            return f"{folder.origin}: {inside}" if folder.kind == PLUGIN else f"{folder.origin.rstrip('/')}/{inside}"
    return str(path)
