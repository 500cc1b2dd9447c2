"""Values read by the type of their key: a string stays as it was typed, a number is decimal or an error.

YAML alone would read 0123456 as 42798, 5:00 as 300, 7e5 as 700000.0 and `on` as true, whatever the key is. Here the
dataclass that describes the keys decides. Where no type is known yet (the keys of `policy` and `algorithm`, whose
classes are not imported for this) `plain` reads only what is unambiguous, and `fit` does the rest.
"""

from __future__ import annotations

import math
import re
import shlex
import types
from collections.abc import Sequence
from dataclasses import MISSING as NOTHING
from dataclasses import Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml

from clbench.config.schema import PretrainDataConfig, WandbConfig
from clbench.errors import UserError, nearest

LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, by libyaml where PyYAML was built with it
MAX_DEPTH = 20
WHOLE = re.compile(r"[+-]?[0-9]+")
NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
NOT_FINITE = re.compile(r"[+-]?\.(inf|nan)", re.IGNORECASE)
NULLS = ("", "~", "null", "Null", "NULL")
YES, NO = ("true", "yes", "on", "y", "1"), ("false", "no", "off", "n", "0")
# Types that the annotations do not state, or not in a way that OmegaConf reads.
KNOWN: dict[str, dict[str, Any]] = {
    "policy": {"type": str | None, "path": str | None},
    "algorithm": {"name": str | list[str]},
    "dataset": {
        "task_order": list[int | str] | None,
        "data": str | list[str],
        "repo_id": str | list[str] | None,
        "exclude_episodes": list[int | list[int]],
    },
}
KNOWN["dataset.pretrain"] = {k: v for k, v in KNOWN["dataset"].items() if k != "task_order"}
# Other systems' names of keys: section → name there → name here.
ALIASES = {"dataset": {"task_stream_mode": "partition"}}
RANGES = ("dataset.task_order",)  # lists that may also be one range of indices, 0-4
RANGE = re.compile(r"[0-9]{1,6}-[0-9]{1,6}")
# Flags of CLARE's released training script, which are also accepted as overrides (docs/algorithms/clare.md).
CLARE_FLAGS = {
    "peft_cfg_path": "peft_cfg_path",
    "expand_threshold": "expand_threshold",
    "maximum_expand": "maximum_expand",
    "detect_distribution_shift_steps": "detect_steps",
    "detect_distribution_shift_batch_size": "detect_batch_size",
    "detect_distribution_shift_num_workers": "detect_num_workers",
    "detect_distribution_shift_log_freq": "detect_log_every",
    "train_discriminators_steps": "discriminator_steps",
    "train_discriminators_batch_size": "discriminator_batch_size",
    "train_discriminators_num_workers": "discriminator_num_workers",
    "train_discriminators_log_freq": "discriminator_log_every",
    "train_discriminators_eval_freq": "discriminator_eval_every",
    "train_discriminators_save_freq": "discriminator_save_every",
}
FORMS = {"rename": "{OLD: NEW}", "instructions": "{TEXT: TASK}"}  # of maps, for messages


@dataclass(frozen=True)
class _Place:
    """Where values come from: a file's name or "the command line", and whether ${…} may refer to other values there."""

    source: str
    command: bool = False
    references: bool = False

    def refuse(self, key: str, must: str, given: str | None, form: str) -> NoReturn:
        """Raise UserError: what the key `must` be, what it is (`given`), and the right form."""
        shown = f"{key}={form}" if self.command else f"{key.rpartition('.')[2]}: {form}"
        shown = shlex.quote(shown) if self.command else shown
        found = "" if given is None else f" but is {clip(given, 200)!r}"
        raise UserError(f"{self.source}: {clip(key)} must be {must}{found}; the form is {clip(shown)}")


def clip(text: str, length: int = 500) -> str:
    """The beginning of a string of any length, for a message."""
    return text if len(text) <= length else text[:length] + " …"


def read_yaml(text: str, schema: type, source: str) -> dict[str, Any]:
    """Read a YAML mapping whose keys and types are those of a dataclass.

    Raises:
        UserError: an unknown key, naming the nearest, or a value of the wrong type for its key.
        ValueError, yaml.YAMLError: it is not YAML, not a mapping, or holds what a file may not (see `check_yaml`).
    """
    node = _parsed(text, references=False)
    if node is None:  # nothing but comments
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise ValueError("it must hold a mapping of keys to values")
    return _switched(_section(node, schema, "", _Place(source)))


def read_sections(text: str, schema: type, reserved: dict[str, Any], source: str) -> dict[str, Any]:
    """Read a YAML mapping of names to sections, each with the keys of a dataclass; raises as `read_yaml`.

    `reserved`: keys that are not such names, with their types.
    """
    node = _parsed(text, references=False)
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise ValueError("it must hold a mapping of keys to values")
    place = _Place(source)
    items = _items(node, "", place)
    return {name: _read(child, reserved.get(name, schema), name, place) for name, child in items}


def read_overrides(items: Sequence[str], schema: type, source: str | None = None) -> dict[str, Any]:
    """Read overrides, key=value, as one mapping; later ones win.

    `source`: the file that holds them, where they may not refer to other values; None = the command line.

    Raises:
        UserError: one is not of that form, has an unknown key, or a value of the wrong type for its key.
    """
    place = _Place(source or "the command line", command=True, references=source is None)
    layer: dict[str, Any] = {}
    for item in items:
        key, sign, text = item.removeprefix("--").partition("=")
        if not sign:
            raise UserError(f"override '{clip(item)}' is not of the form key=value (for example train.steps=500).")
        key = key.strip()
        key = f"algorithm.{CLARE_FLAGS[key]}" if key in CLARE_FLAGS else key
        above, _, last = key.rpartition(".")
        key = f"{above}.{ALIASES[above][last]}" if last in ALIASES.get(above, {}) else key
        parts = key.split(".")
        if not all(parts) or len(parts) > MAX_DEPTH:
            raise UserError(f"the override {clip(item)!r} has no valid key (for example train.steps=500).")
        value: Any = _override(text.strip(), _hint(parts, schema, text, place), ".".join(parts), place)
        for part in reversed(parts):
            value = {part: value}
        layer = overlay(layer, value)
    return _switched(layer)


def overlay(below: Any, above: Any) -> Any:
    """`above` over `below`: mappings are merged key by key, anything else is replaced."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    joined = dict(below)
    for key, value in above.items():
        joined[key] = overlay(below[key], value) if key in below else value
    return joined


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """A tree of mappings as one mapping, with dots in its keys."""
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    out: dict[str, Any] = {}
    for k, v in value.items():
        out.update(flatten(v, f"{prefix}{k}."))
    return out


def plain(text: str) -> Any:
    """The value of an unquoted string where no type is known: null, a boolean, a number, or that string.

    A number only where it is written in the usual way: 007, 1_000, 0x10, 5:00 and +1 stay strings.
    """
    if text in NULLS:
        return None
    if text.lower() in (*YES[:3], *NO[:3]) and text in (text.lower(), text.upper(), text.capitalize()):
        return text.lower() in YES
    if re.fullmatch(r"-?[1-9][0-9]*|0", text) and len(text) <= 1000:
        return int(text)
    if NOT_FINITE.fullmatch(text):
        return float(text.lower().replace(".", "", 1))
    if NUMBER.fullmatch(text) and not re.fullmatch(r"[+-]?[0-9]+|[+-]?0[0-9].*", text) and math.isfinite(float(text)):
        return float(text)
    return text


def fit(value: Any, hint: Any, key: str) -> Any:
    """What `plain` read, for a key whose type is known now; raises UserError where it cannot be of that type.

    Types other than strings, numbers, booleans and lists of them are left as they are.
    """
    kind, optional = _without_none(hint)
    if value is None or (isinstance(value, str) and "${" in value):
        if value is None and not optional and kind in (int, float, bool):
            _settings(key).refuse(key, _kind(kind), "null", _form(kind))
        return value
    if get_origin(kind) is list and isinstance(value, list):
        return [fit(v, get_args(kind)[0], key) for v in value]
    if kind is str and not isinstance(value, str):
        if type(value) is int:  # nothing of the string was lost
            return str(value)
        if isinstance(value, bool | float):
            _settings(key).refuse(key, "a string, and without quotes this is not one", str(value), '"TEXT"')
        _settings(key).refuse(key, "a string", str(value), "TEXT")
    if kind in (int, float, bool) and isinstance(value, str):
        return _scalar(value, kind, key, _settings(key))
    fits = {int: int, float: int | float, bool: bool}
    if kind in fits and (not isinstance(value, fits[kind]) or (kind is not bool and isinstance(value, bool))):
        if kind is bool and value in (0, 1):
            return bool(value)
        _settings(key).refuse(key, _kind(kind), str(value), _form(kind))
    if get_origin(kind) is list:
        _settings(key).refuse(key, "a list", str(value), _listed(str(value)))
    return value


def _settings(key: str) -> _Place:
    return _Place("the configuration", command=True)


def check_yaml(text: str, references: bool) -> None:
    """Raise ValueError for YAML that could construct objects, grow when it is read, or read the environment."""
    depth = 0
    event: Any
    for event in yaml.parse(text, Loader=LOADER):
        line = f"line {event.start_mark.line + 1}: "
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"{line}an alias (*{event.anchor}); write the value out")
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"{line}a tag ({event.tag}); only plain values are read")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError(f"{line}more than {MAX_DEPTH} levels of nesting")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.ScalarEvent):
            if "${" in event.value and not references:
                raise ValueError(f"{line}'${{' refers to another value, which files may not; write the value out")
            if event.implicit[0] and len(event.value) > 1000 and event.value.lstrip("+-")[:1].isdigit():
                raise ValueError(f"{line}a number of {len(event.value)} digits")
            if "\0" in event.value or event.value != event.value.encode("utf-8", "replace").decode():
                raise ValueError(f"{line}a character that is not allowed in text")


def _parsed(text: str, references: bool) -> Any:
    """The one document in a YAML text as a tree of nodes, which hold scalars as they were typed."""
    check_yaml(text, references)
    return yaml.compose(text, Loader=LOADER)


@cache
def _fields(schema: type) -> dict[str, tuple[Any, Field[Any]]]:
    hints = get_type_hints(schema)
    return {f.name: (hints[f.name], f) for f in fields(schema)}


def _without_none(hint: Any) -> tuple[Any, bool]:
    """A type without None, and whether it may be None."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint, hint is None
    kinds = [k for k in get_args(hint) if k is not type(None)]
    kind = kinds[0] if len(kinds) == 1 else Union[tuple(kinds)]  # noqa: UP007 (built at run time)
    return kind, len(kinds) < len(get_args(hint))


def _hint(parts: Sequence[str], schema: type, text: str, place: _Place) -> Any:
    """The type of an override's key; UserError for an unknown key."""
    hint: Any = schema
    for i, part in enumerate(parts):
        above = ".".join(parts[:i])
        kind, _ = _without_none(hint)
        name, bracket, _ = part.partition("[")
        if is_dataclass(kind):
            known = _fields(kind)  # type: ignore[arg-type]
            if name in known and bracket:
                inner, _ = _without_none(known[name][0])
                key = ".".join([*parts[:i], name])
                if get_origin(inner) is not list:
                    raise UserError(f"{place.source}: unknown key '{clip('.'.join(parts))}': keys are written with "
                                    "dots, as in train.optimizer.lr.")  # fmt: skip
                place.refuse(key, "given as a whole list: no single element can be set", None, _example(known[name]))
            if part not in known:
                where = f"{above}." if above else ""
                raise UserError(f"{place.source}: unknown key '{where}{clip(part)}'.{nearest(clip(part), known)}")
            hint = KNOWN.get(above, {}).get(part, known[part][0])
        elif get_origin(kind) is dict or kind is Any:
            inner = get_args(kind)[1] if get_origin(kind) is dict else Any
            hint = KNOWN.get(above, {}).get(part, Any) if inner is Any else inner
            if inner is not Any and i < len(parts) - 1:
                old = ".".join(parts[i:])
                place.refuse(above, f"a map ({_map_form(above)}), one of names with dots in braces", f"{old}={text}",
                             _map_form(above))  # fmt: skip
        elif get_origin(kind) is list:
            place.refuse(above, "given as a whole list: no single element can be set", None, _listed(text))
        else:
            raise UserError(f"{place.source}: unknown key '{clip('.'.join(parts))}': '{above}' is {_kind(kind)} and "
                            "has no keys of its own.")  # fmt: skip
    return hint


def _override(text: str, hint: Any, key: str, place: _Place) -> Any:
    """The value of an override. A string is taken as it was typed; quotes around all of it are removed."""
    kind, _ = _without_none(hint)
    if yaml.reader.Reader.NON_PRINTABLE.search(text):
        raise UserError(f"{place.source}: {key} has a character that is not allowed in text.")
    if "${" in text and not place.references:
        raise UserError(f"{key}: '${{' refers to another value, which files may not; write the value out.")
    container = is_dataclass(kind) or get_origin(kind) in (dict, list)
    opening = text[:1] in ("[", "{") and kind not in (str, int, float, bool)
    if container or opening or text[:1] in ("'", '"'):
        try:
            node = _parsed(text, references=place.references)
        except (yaml.YAMLError, ValueError, RecursionError) as e:
            if isinstance(e, ValueError):
                raise UserError(f"{place.source}: {key}: {clip(str(e))}") from e
            if kind is str:  # quotes that are part of the string
                node = None
            else:
                place.refuse(key, f"{_kind(kind)}, and cannot be read", text, _form(kind, text, key))
        quoted = isinstance(node, yaml.ScalarNode) and node.style in ("'", '"')
        if node is not None and (quoted or (kind is not str and (container or opening))):
            return _read(node, hint, key, place)
    return _read(yaml.ScalarNode("", text), hint, key, place)


def _read(node: Any, hint: Any, key: str, place: _Place) -> Any:
    """A node as its key's type."""
    kind, optional = _without_none(hint)
    scalar = isinstance(node, yaml.ScalarNode)
    if scalar and place.references and "${" in node.value:
        return node.value
    if node is None or (scalar and not node.style and node.value in NULLS):
        if optional or kind is Any:
            return None
        must = _kind(kind) if not is_dataclass(kind) else "a section with keys and values"
        place.refuse(key, must, "null", _form(kind, "", key))
    if is_dataclass(kind):
        return _section(node, kind, key, place)  # type: ignore[arg-type]
    if get_origin(kind) is dict:
        return _map(node, get_args(kind)[1], key, place)
    if get_origin(kind) is list:
        if key in RANGES and scalar and RANGE.fullmatch(node.value):
            return [node.value]
        if not isinstance(node, yaml.SequenceNode):
            place.refuse(key, "a list", _said(node), _form(kind, node.value if scalar else "", key))
        return [_read(n, get_args(kind)[0], f"{key}[{i}]", place) for i, n in enumerate(node.value)]
    if get_origin(kind) in (Union, types.UnionType):
        return _either(node, get_args(kind), key, place)
    if kind is Any:
        return _any(node, key, place)
    if not scalar:
        _no_scalar(node, kind, key, place)
    return _scalar(node.value, kind, key, place)


def _no_scalar(node: Any, kind: Any, key: str, place: _Place) -> NoReturn:
    name, index, _ = key.partition("[")
    if index:  # an element
        must = "a list of names" if kind is str else "a list of numbers"
        place.refuse(name, must, None, "[a, b]" if kind is str else "[1, 2]")
    place.refuse(key, _kind(kind), _said(node), _form(kind, "", key))


def _either(node: Any, kinds: Sequence[Any], key: str, place: _Place) -> Any:
    """One of several types: by what the node is, and among scalars a number where it looks like one."""
    for kind in kinds:
        if isinstance(node, yaml.MappingNode) and (is_dataclass(kind) or get_origin(kind) is dict):
            return _read(node, kind, key, place)
        if isinstance(node, yaml.SequenceNode) and get_origin(kind) is list:
            return _read(node, kind, key, place)
    if isinstance(node, yaml.ScalarNode):
        if int in kinds and not node.style and WHOLE.fullmatch(node.value):
            return _scalar(node.value, int, key, place)
        if str in kinds:
            return node.value
    place.refuse(key.partition("[")[0] if int in kinds else key, " or ".join(_kind(k) for k in kinds), _said(node),
                 "[a, b]" if int in kinds else "NAME")  # fmt: skip


def _scalar(text: str, kind: type, key: str, place: _Place) -> Any:
    """Text as a string, a whole number, a number or a boolean."""
    if kind is str:
        return text
    if kind is int and WHOLE.fullmatch(text) and len(text) <= 1000:
        return int(text)
    if kind is float:
        if NOT_FINITE.fullmatch(text):  # rejected with all other values out of range
            return float(text.lower().replace(".", "", 1))
        if NUMBER.fullmatch(text) and len(text) <= 1000:
            return float(text)
    if kind is bool and text.lower() in (*YES, *NO):
        return text.lower() in YES
    name, index, _ = key.partition("[")
    if index:
        place.refuse(name, "a list of numbers", text, "[1, 2]")
    place.refuse(key, _kind(kind), text, _form(kind, text, key))


def _section(node: Any, schema: type, key: str, place: _Place) -> dict[str, Any]:
    if schema is WandbConfig and isinstance(node, yaml.ScalarNode):
        return {"enabled": _scalar(node.value, bool, key, place)}
    if schema is PretrainDataConfig and isinstance(node, yaml.ScalarNode):
        return {"stream": node.value}
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{place.source}: '{clip(key)}' must hold keys and values but is {clip(str(_said(node)))}.")
    known = _fields(schema)
    values: dict[str, Any] = {}
    prefix = f"{key}." if key else ""
    for given, child in _items(node, key, place):
        name = ALIASES.get(key, {}).get(given, given)
        if name not in known:
            raise UserError(f"{place.source}: unknown key '{prefix}{clip(name)}'.{nearest(clip(name), known)}")
        if name in values:
            raise UserError(f"{place.source}: {prefix}{given} is another name of {prefix}{name}: give one of them.")
        values[name] = _read(child, KNOWN.get(key, {}).get(name, known[name][0]), prefix + name, place)
    return values


def _map(node: Any, inner: Any, key: str, place: _Place) -> dict[str, Any]:
    if not isinstance(node, yaml.MappingNode):
        if inner is Any:
            raise UserError(f"{place.source}: '{clip(key)}' must hold keys and values but is {clip(str(_said(node)))}.")
        place.refuse(key, "a map", _said(node), _map_form(key))
    values: dict[str, Any] = {}
    for name, child in _items(node, key, place):
        texts = inner is str
        if texts and isinstance(child, yaml.ScalarNode) and not child.style and child.value in NULLS:
            old, colon, new = name.partition(":")
            hint = f", with a space after the colon: {{{old}: {new}}}" if colon and new else ""
            place.refuse(key, f"a map of strings to strings{hint}", name, _map_form(key))
        if texts and not isinstance(child, yaml.ScalarNode):
            place.refuse(key, "a map of strings to strings", _said(child), _map_form(key))
        values[name] = _read(child, KNOWN.get(key, {}).get(name, inner), f"{key}.{name}", place)
    return values


def _any(node: Any, key: str, place: _Place) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return plain(node.value) if not node.style else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_read(n, Any, f"{key}[{i}]", place) for i, n in enumerate(node.value)]
    return {name: _read(child, Any, f"{key}.{name}", place) for name, child in _items(node, key, place)}


def _items(node: Any, key: str, place: _Place) -> list[tuple[str, Any]]:
    """A mapping's keys, which are strings, and its values."""
    found: dict[str, Any] = {}
    for name, child in node.value:
        if not isinstance(name, yaml.ScalarNode):
            raise UserError(f"{place.source}: {clip(key) or 'it'} has a key that is a list or a map, not a string.")
        if name.value in found:
            twice = clip(f"{key}.{name.value}").lstrip(".")
            raise UserError(f"{place.source} is not valid YAML: it has {twice} twice.")
        found[name.value] = child
    return list(found.items())


def _switched(layer: dict[str, Any]) -> dict[str, Any]:
    """`layer` with log.wandb switched on where it names any of log.wandb's other keys."""
    log = layer.get("log")
    given = log.get("wandb") if isinstance(log, dict) else None
    if isinstance(given, dict) and given and "enabled" not in given:
        given["enabled"] = True
    return layer


def _said(node: Any) -> str:
    """A node for a message."""
    if isinstance(node, yaml.ScalarNode):
        return str(node.value)
    return "a list" if isinstance(node, yaml.SequenceNode) else "a map"


def _kind(kind: Any) -> str:
    if kind in (int, float, bool, str):
        return {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}[kind]
    if is_dataclass(kind):
        return "a map of keys to values"
    return {list: "a list", dict: "a map"}.get(get_origin(kind), "a text")


def _form(kind: Any, text: str = "", key: str = "") -> str:
    """How a value of this kind is written."""
    if get_origin(kind) is list:
        return _listed(text)
    if get_origin(kind) is dict:
        return _map_form(key)
    if is_dataclass(kind):
        return "{KEY: VALUE}"
    return {int: "10", float: "0.5", bool: "true"}.get(kind, "TEXT")


def _listed(text: str) -> str:
    """A list that was written without brackets."""
    items = [i for i in re.split(r"[,;\s]+", text.strip("()[]{} ")) if i]
    return f"[{', '.join(items)}]" if items and len(text) <= 300 else "[a, b]"


def _map_form(key: str) -> str:
    return FORMS.get(key.rpartition(".")[2], "{KEY: VALUE}")


def _example(described: tuple[Any, Field[Any]]) -> str:
    """A list's default."""
    f = described[1]
    default = f.default_factory() if f.default_factory is not NOTHING else None
    return f"[{', '.join(map(str, default))}]" if isinstance(default, list) and default else "[a, b]"
