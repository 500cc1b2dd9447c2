"""One registry for what a configuration names: algorithms, policies, simulators and the other AXES.

clbench's own names are in `OWN`. An installed package adds to any axis without changing clbench, through the entry
point group of that axis, `clbench.AXIS`:

    [project.entry-points."clbench.algorithms"]
    my_algo = "my_package.my_module:MyAlgo"

and `--algo my_algo` finds it. Policies of LeRobot's own third-party packages (distributions named lerobot_policy_…)
are found as LeRobot finds them, and need no entry point. `register` adds something for this process only (a notebook, a
test). A name that two of them claim is an error. Listing and describing import nothing: all is read from the sources.

Standard library only, and Python 3.10: a simulator's own interpreter also reads it (envs/serve.py).
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import (
    EntryPoint,
    EntryPoints,
    PackageNotFoundError,
    distribution,
    distributions,
    entry_points,
)
from pathlib import Path
from typing import Any

from clbench.errors import UserError, nearest

# Axis → what one of its names is.
AXES: dict[str, str] = {
    "algorithms": "algorithm",
    "policies": "policy type",
    "simulators": "environment type",
    "experts": "scripted expert",
    "streams": "stream",
    "metrics": "metric",
    "loggers": "logger",
    "executors": "executor",
}

OWN: dict[str, dict[str, str]] = {
    "algorithms": {
        "seqfft": "clbench.algorithms.seqfft:SeqFFT",
        "seqlora": "clbench.algorithms.seqlora:SeqLoRA",
        "er": "clbench.algorithms.er:ER",
        "mir": "clbench.algorithms.mir:MIR",
        "agem": "clbench.algorithms.agem:AGEM",
        "ewc": "clbench.algorithms.ewc:EWC",
        "packnet": "clbench.algorithms.packnet:PackNet",
        "clare": "clbench.algorithms.clare:CLARE",
        "multitask": "clbench.algorithms.multitask:Multitask",
        "singletask": "clbench.algorithms.singletask:SingleTask",
    },
    "policies": {
        "dit_dec": "clbench.policies.dit_dec.configuration_dit_dec:DitDecConfig",
        "dit_encdec": "clbench.policies.dit_encdec.configuration_dit_encdec:DitEncDecConfig",
    },
    "simulators": {
        "metaworld": "clbench.envs.metaworld:Metaworld",
        "metaworld_pixels": "clbench.envs.metaworld:MetaworldPixels",
        "libero": "clbench.envs.libero.images:Libero",
        "libero_state": "clbench.envs.libero.simulator:LiberoState",
    },
    "experts": {  # by environment type
        "metaworld": "clbench.data.experts.metaworld:MetaworldExperts",
        "metaworld_pixels": "clbench.data.experts.metaworld:MetaworldExperts",
        "libero": "clbench.data.experts.libero:LiberoExperts",
        "libero_state": "clbench.data.experts.libero:LiberoExperts",
    },
    "streams": {},  # as code; most are files (config/folders.py)
    "metrics": {
        name: f"clbench.metrics.definitions:{name}"
        for name in (
            "auc_clare",
            "fwt_clare",
            "nbt_clare",
            "nbt_clare_tasks",
            "fwt_libero",
            "nbt_libero",
            "auc_libero",
            "asr",
            "asr_tasks",
            "bwt_gem",
            "bwt_gem_tasks",
            "fwt_gem",
            "forgetting",
            "forgetting_corrected",
            "nbt_final",
            "zero_shot",
            "zero_shot_heldout",
            "intransigence",
            "intransigence_prefixes",
            "ft_cw",
        )
    },
    "loggers": {
        "tensorboard": "clbench.training.loggers:TensorBoard",
        "wandb": "clbench.training.loggers:Wandb",
        "trackio": "clbench.training.loggers:Trackio",
    },
    "executors": {"local": "clbench.execution.local:LocalExecutor"},
}
ALGORITHMS = OWN["algorithms"]
LEROBOT_POLICIES = "lerobot_policy_"  # LeRobot imports every package whose distribution's name begins like this


@dataclass(frozen=True)
class Entry:
    """One name of an axis.

    Attributes:
        target: "module:attribute", imported by `load`.
        origin: the distribution that provides it, "clbench", or "this process".
    """

    axis: str
    name: str
    target: str
    origin: str


@dataclass(frozen=True)
class Description:
    """What the sources say about an entry.

    Attributes:
        text: the first line of its docstring.
        needs: distributions that it needs besides clbench's own: its class attribute `needs`.
        missing: those of them that are not installed.
    """

    text: str
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(name for name in self.needs if not installed(name))


_registered: dict[tuple[str, str], Any] = {}


def register(axis: str, name: str, thing: Any) -> None:
    """Add a name to an axis for this process; `thing` is what `load` returns. `None` removes the name again.

    Raises:
        UserError: the name is taken, or there is no such axis.
    """
    _check_axis(axis)
    if thing is None:
        _registered.pop((axis, name), None)
        return
    if name in OWN[axis]:
        raise UserError(f"the {AXES[axis]} name '{name}' is already taken; choose another.")
    _registered[axis, name] = thing


def entries(axis: str) -> dict[str, Entry]:
    """Every name of an axis, sorted. UserError for a name that two packages provide."""
    _check_axis(axis)
    found = {name: Entry(axis, name, target, "clbench") for name, target in OWN[axis].items()}
    for point in _points(axis):
        entry = Entry(axis, point.name, point.value.partition("[")[0].strip(), _origin(point))
        before = found.get(point.name)
        if before is not None and before.target != entry.target:
            raise UserError(f"the {AXES[axis]} name '{point.name}' of {point.value} is already taken; rename it.")
        found.setdefault(point.name, entry)
    for entry in _lerobot_policies(_changed()) if axis == "policies" else ():
        before = found.setdefault(entry.name, entry)
        if before.target != entry.target:
            raise UserError(
                f"the policy type name '{entry.name}' of {entry.origin} is already taken by {before.origin}: uninstall "
                "one of them."
            )
    for (where, name), thing in _registered.items():
        if where == axis:
            found[name] = Entry(axis, name, target_of(thing), "this process")
    return dict(sorted(found.items()))


def names(axis: str) -> list[str]:
    """Every name of an axis, sorted."""
    return list(entries(axis))


def load(axis: str, name: str) -> Any:
    """Import and return what a name stands for.

    Raises:
        UserError: there is no such name, or it cannot be imported.
    """
    _check_axis(axis)
    if name in OWN[axis]:
        return import_target(OWN[axis][name])
    if (axis, name) in _registered:
        return _registered[axis, name]
    known = entries(axis)
    if name not in known:
        raise UserError(f"unknown {AXES[axis]} '{name}'.{nearest(name, known)}")
    try:
        return import_target(known[name].target)
    except (ImportError, AttributeError) as e:
        raise UserError(f"the {AXES[axis]} '{name}' ({known[name].target}) cannot be imported: {e}") from e


def describe(entry: Entry) -> Description:
    """What an entry's source says about it, without importing it; an empty text if it cannot be found."""
    thing = _registered.get((entry.axis, entry.name))
    if thing is not None:
        text, needs = (thing.__doc__ or "").strip().splitlines()[:1], getattr(thing, "needs", ())
        return Description(text[0] if text else "", tuple(needs))
    module, _, attribute = entry.target.partition(":")
    path = source(module)
    if path is None:
        return Description("")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == attribute:
            text = (ast.get_docstring(node) or ast.get_docstring(tree) or "").splitlines()
            return Description(text[0] if text else "", _needs(node))
    text = (ast.get_docstring(tree) or "").splitlines()
    return Description(text[0] if text else "")


def declared(entry: Entry, attribute: str) -> Any:
    """The value of a class attribute of an entry, a literal in its source, without importing it; None if it has none.

    The attribute is looked for in the class itself, not in those that it inherits from.
    """
    thing = _registered.get((entry.axis, entry.name))
    if thing is not None:
        return vars(thing).get(attribute)
    module, _, name = entry.target.partition(":")
    path = source(module)
    tree = None if path is None else ast.parse(path.read_text(encoding="utf-8"))
    for node in [] if tree is None else tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _literal(node, attribute)
    return None


@lru_cache(maxsize=1)
def _lerobot_policies(changed: tuple[tuple[str, int], ...]) -> tuple[Entry, ...]:
    """The policy types of LeRobot's third-party packages, from their sources; read once, like entry points."""
    found = []
    for dist in distributions():
        name = dist.metadata["Name"] or ""
        folder = _folder(name) if name.startswith(LEROBOT_POLICIES) else None
        if folder is None:
            continue
        for file in sorted(folder.rglob("*.py")):
            module = ".".join([name, *file.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__")
            for kind, cls in _policy_classes(file):
                found.append(Entry("policies", kind, f"{module}:{cls}", f"{name} {dist.version}"))
    return tuple(found)


def _policy_classes(file: Path) -> Iterator[tuple[str, str]]:
    """Type and class of every policy configuration in a file: @PreTrainedConfig.register_subclass("TYPE")."""
    text = file.read_text(encoding="utf-8", errors="replace")
    if "PreTrainedConfig.register_subclass" not in text:
        return
    try:
        tree = ast.parse(text)
    except SyntaxError:  # for another version of Python
        return
    for node in (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)):
        for call in node.decorator_list:
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("PreTrainedConfig.register_subclass"):
                given = [*call.args, *(k.value for k in call.keywords)]
                names = [v.value for v in given if isinstance(v, ast.Constant) and isinstance(v.value, str)]
                if names:
                    yield names[0], node.name


def package_folders(group: str) -> list[tuple[str, Path]]:
    """Folders of the packages named by a group's entry points, with the distribution; nothing is imported.

    Raises:
        UserError: a value does not name a package that can be found.
    """
    found = []
    for point in sorted(_points(group), key=lambda p: (_origin(p), p.name)):
        folder = _folder(point.value)
        if folder is None:
            raise UserError(
                f"{_origin(point)}: the entry point '{point.name}' of clbench.{group} names {point.value}, but there "
                "is no such package. Install it again, or fix its pyproject.toml."
            )
        found.append((_origin(point), folder))
    return found


def algorithm_names() -> list[str]:
    """Every name that `--algo` accepts."""
    return names("algorithms")


def algorithm_class(name: str) -> type:
    """Import and return the algorithm class behind a name."""
    found: type = load("algorithms", name)
    return found


def import_target(target: str) -> Any:
    """Import and return what "module:attribute" names."""
    module, _, attribute = target.partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def target_of(thing: Any) -> str:
    """Return "module:attribute" of a class or function."""
    return f"{getattr(thing, '__module__', '')}:{getattr(thing, '__qualname__', type(thing).__qualname__)}"


def _check_axis(axis: str) -> None:
    if axis not in AXES:
        raise UserError(f"there is no axis '{axis}'.{nearest(axis, AXES)}")


def _points(axis: str) -> Sequence[EntryPoint]:
    return list(_installed_points(_changed()).select(group=f"clbench.{axis}"))


def _changed() -> tuple[tuple[str, int], ...]:
    """Where packages are searched for, and when each place last changed."""
    found = []
    for place in sys.path:
        with contextlib.suppress(OSError):
            found.append((place, os.stat(place or os.curdir).st_mtime_ns))
    return tuple(found)


@lru_cache(maxsize=1)
def _installed_points(changed: tuple[tuple[str, int], ...]) -> EntryPoints:
    """The entry points of all installed packages; reading them takes a while, and they change only with `changed`."""
    return entry_points()


def _origin(point: EntryPoint) -> str:
    return "?" if point.dist is None else f"{point.dist.name} {point.dist.version}"


def source(module: str) -> Path | None:
    """The file of a module; only its top-level package is searched for, so that nothing is imported."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for place in spec.submodule_search_locations or ():
        stem = Path(place).joinpath(*rest)
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            if path.is_file():
                return path
    return None


def _folder(package: str) -> Path | None:
    """The folder of a package; only its top-level package is searched for, so that nothing is imported."""
    top, *rest = package.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    places = [] if spec is None else spec.submodule_search_locations or []
    return next((folder for p in places if (folder := Path(p).joinpath(*rest)).is_dir()), None)


def _needs(node: ast.ClassDef | ast.FunctionDef) -> tuple[str, ...]:
    return tuple(_literal(node, "needs") or ())


def _literal(node: ast.ClassDef | ast.FunctionDef, name: str) -> Any:
    """The literal that is assigned to a name in the body of a class; None: there is none."""
    for part in node.body:
        if not isinstance(part, ast.Assign | ast.AnnAssign):
            continue
        targets = part.targets if isinstance(part, ast.Assign) else [part.target]
        if part.value is not None and any(isinstance(t, ast.Name) and t.id == name for t in targets):
            return ast.literal_eval(part.value)
    return None


def installed(name: str) -> bool:
    """Whether a distribution of that name is installed."""
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
