"""`clbench list`: every name of every axis, what it is, where it comes from and what it needs. Nothing is imported.

YAML files are described by the first sentence of the comment they begin with, code by the first line of its docstring
(registry.describe).
"""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from clbench import registry
from clbench.config import folders, policy_types
from clbench.config.compose import load_yaml
from clbench.envs.lerobot_gym import lerobot_environments
from clbench.errors import UserError, nearest
from clbench.io import read_text

WIDTH = 100  # at most, and if the output is not a terminal
# Axis → how to use one of its names.
GIVEN = {
    "models": "--model NAME: presets, or a policy type with its own defaults",
    "algorithms": "--algo NAME, or several joined by commas",
    "streams": "--dataset NAME",
    "experiments": "clbench sweep NAME",
    "policies": "--model NAME, with the type's own defaults; policy.type in a preset",
    "simulators": "dataset.env.type in a stream",
    "metrics": "printed by clbench metrics and clbench report",
    "loggers": "log.NAME=true for clbench's own, log.loggers={NAME: {}} for others",
    "executors": "executor: NAME in an experiment",
}
FILES = {"models": "models", "streams": "datasets", "experiments": "experiments"}  # axis → kind of files
ALIASES = {"model": "models", "algorithm": "algorithms", "algos": "algorithms", "datasets": "streams",
           "dataset": "streams", "stream": "streams"}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One name of an axis; `needs`: what it requires besides clbench, in words; `more`: said by `clbench list AXIS`."""

    name: str
    origin: str
    text: str
    needs: str = ""
    more: tuple[str, ...] = ()


def axes() -> list[str]:
    """Every axis: those of files, and those of the registry."""
    return [*GIVEN, *(axis for axis in registry.AXES if axis not in GIVEN)]


def listing(axis: str | None = None) -> Iterator[str]:
    """The lines of `clbench list [AXIS]`.

    Raises:
        UserError: there is no such axis, or two plugins provide the same name.
    """
    if axis is not None:
        axis = ALIASES.get(axis, axis)
        if axis not in axes():
            raise UserError(f"there is no axis '{axis}'.{nearest(axis, axes())}")
    asked = axes() if axis is None else ["models", "policies"] if axis == "models" else [axis]
    for number, name in enumerate(asked):
        if number:
            yield ""
        yield from _table(name, whole=axis is not None)


def items(axis: str) -> list[Item]:
    """Every name of an axis, sorted."""
    if axis in FILES:
        found = {name: _file_item(axis, name, *at) for name, at in folders.files(FILES[axis]).items()}
        in_code = registry.entries(axis) if axis in registry.AXES else {}
        found = {name: _code_item(entry) for name, entry in in_code.items()} | found  # the user's file takes precedence
        return [found[name] for name in sorted(found)]
    found = {name: _code_item(entry) for name, entry in registry.entries(axis).items()}
    if axis == "simulators":
        found |= {name: _lerobot_simulator(name) for name in lerobot_environments() if name not in found}
    if axis == "policies":
        found |= {kind: _policy_item(kind) for kind in policy_types.types() if kind not in found}
        found = {kind: replace(item, needs=_needs_of_policy(kind), more=_facts(kind)) for kind, item in found.items()}
    return [found[name] for name in sorted(found)]


def _table(axis: str, whole: bool) -> Iterator[str]:
    """The names of an axis; `whole`: with all that is known of each."""
    rows = items(axis)
    given = f" ({GIVEN[axis]})" if axis in GIVEN else ""
    yield f"{axis}{given}" + ("" if rows else ": none")
    width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
    first = max((len(row.name) for row in rows), default=0)
    second = min(24, max((len(row.origin) for row in rows), default=0))
    left = 2 + first + 2 + second + 2
    for row in rows:
        text = " ".join(part for part in (row.text, f"[{row.needs}]" if row.needs else "") if part)
        lines = textwrap.wrap(text, max(30, width - left), break_on_hyphens=False) or [""]
        yield f"  {row.name:<{first}}  {row.origin:<{second}}  {lines[0]}".rstrip()
        for text in row.more if whole else ():
            lines += textwrap.wrap(text, max(30, width - left), break_on_hyphens=False, subsequent_indent="  ")
        yield from (" " * left + line for line in lines[1:])


def _file_item(axis: str, name: str, folder: folders.Folder, path: Path) -> Item:
    try:
        needs = _needs_of_file(axis, path)
    except UserError:  # reported in full when it is used
        needs = "not valid: see clbench's message when it is used"
    return Item(name, folder.origin, comment(path), needs, _facts(_type_of_file(path)) if axis == "models" else ())


def _type_of_file(path: Path) -> str:
    """The policy type of a preset; "" if it has none."""
    try:
        return str((load_yaml(path).get("policy") or {}).get("type") or "")
    except UserError:
        return ""


def _facts(kind: str) -> tuple[str, ...]:
    """What methods find in a policy of this type."""
    facts = policy_types.LEROBOT.get(kind)
    if facts is not None and facts.rewards:
        return (f"not trained here: it {facts.rewards}",)
    if facts is None and kind not in policy_types.OWN:
        clare = policy_types.clare_targets(kind)
        return (f"CLARE: {clare}",) if clare else ()
    one_pass = facts is None or facts.one_pass
    unless = f" (unless {facts.unless})" if facts is not None and facts.unless else ""
    losses = "in one pass, drawn from outside" + unless if one_pass else "one by one, each under a seed"
    lora = facts.lora if facts is not None else "attention, feed-forward and conditioning layers"
    along = f"; completely: {facts.also_train}" if facts is not None and facts.also_train else ""
    clare = policy_types.clare_targets(kind)
    return (
        f"losses per sample: {losses}",
        f"LoRA: {lora or 'set lora.target_modules'}{along}",
        f"CLARE: {clare or 'set algorithm.target_modules'}",
    )


def _needs_of_file(axis: str, path: Path) -> str:
    if axis == "models":
        kind = load_yaml(path).get("policy", {}).get("type")
        return _needs_of_policy(str(kind)) if kind is not None else ""
    if axis == "streams":
        dataset = load_yaml(path).get("dataset", {})
        if "env" in dataset and dataset["env"] is None:
            return "no simulator: evaluated by action errors on held-out episodes"
        env = dataset.get("env") or {}
        simulators = registry.entries("simulators")
        return _code_item(simulators[env["type"]]).needs if env.get("type") in simulators else ""
    return ""


def comment(path: Path) -> str:
    """The first sentence of the comment that a YAML file begins with."""
    try:
        text = read_text(path, 256 * 1024)
    except UserError:
        return ""
    lines: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    return re.split(r"(?<=[.!?])\s", " ".join(filter(None, lines)), maxsplit=1)[0]


def _code_item(entry: registry.Entry) -> Item:
    described = registry.describe(entry)
    return Item(entry.name, entry.origin, described.text, _needs(described.needs, described.missing))


def _lerobot_simulator(name: str) -> Item:
    need = f"gym-{name}"
    missing = (need,) if find_spec(need.replace("-", "_")) is None else ()
    return Item(name, "lerobot", f"LeRobot's environment: pip install 'lerobot[{name}]'.", _needs((need,), missing))


def _needs(names: tuple[str, ...], missing: tuple[str, ...]) -> str:
    marked = [f"{name} (missing)" if name in missing else name for name in names]
    return f"needs {', '.join(marked)}" if marked else ""


def _policy_item(kind: str) -> Item:
    """A LeRobot policy type."""
    try:
        origin = f"lerobot {version('lerobot')}"
    except PackageNotFoundError:
        origin = "lerobot (missing)"
    module = f"lerobot.policies.{kind}.configuration_{kind}"
    path = registry.source(module)
    found = None if path is None else re.search(
        rf"register_subclass\(\"{kind}\"\)\s+(?:@.*\s+)*class (\w+)", path.read_text(encoding="utf-8")
    )  # fmt: skip
    target = module if found is None else f"{module}:{found[1]}"
    return Item(kind, origin, registry.describe(registry.Entry("policies", kind, target, origin)).text)


def _needs_of_policy(kind: str) -> str:
    missing = policy_types.missing(kind)
    facts = policy_types.LEROBOT.get(kind)
    extra = f"lerobot[{facts.extra}]" if facts is not None and facts.extra else ""
    wants: list[tuple[bool, Callable[[], str]]] = [
        (policy_types.wants_cameras(kind), lambda: "camera images"),
        (policy_types.wants_trust(kind), lambda: f"--trust {kind}"),
        (facts is not None and facts.risk == policy_types.HUB, lambda: "a hub's models"),
        (bool(extra) and not missing, lambda: extra),
        (bool(missing), lambda: f"{extra + ': ' if extra else ''}{', '.join(f'{name} (missing)' for name in missing)}"),
    ]
    said = [word() for wanted, word in wants if wanted]
    return f"needs {', '.join(said)}" if said else ""
