"""Keeps secrets out of configurations, manifests, logs and locks. Standard library only.

A secret is the value of an environment variable that is named like one, wherever it occurs in a text, and the value of
a key that is named like one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from typing import Any

SECRET = re.compile(
    r"(^|_)(api_?key|key|token)$|(^|_)(secrets?|passwords?|passwd|passphrase|credentials?)(_|$)", re.IGNORECASE
)
REDACTED = "<redacted>"
MIN_LENGTH = 8  # of a value that is searched for in texts: shorter ones are words
_ASSIGNED = re.compile(r"""([\w.-]+)(\s*[=:]\s*)("[^"]*"|'[^']*'|[^\s,{}\[\]]+)""")  # key=value, {key: value}


def is_secret(name: str) -> bool:
    """Whether a key or variable is named like a secret."""
    return SECRET.search(name) is not None


def _is_value(text: str) -> bool:
    """Whether a text can be searched for in others; the path of a file with a secret is not a secret."""
    return len(text) >= MIN_LENGTH and not (text.startswith("/") and os.path.exists(text))


def secrets_of(*values: Any) -> set[str]:
    """The secrets in the environment, and those in `values` under keys that are named like one."""
    found = {v for k, v in os.environ.items() if is_secret(k) and _is_value(v)}

    def look(value: Any, secret: bool) -> None:
        if isinstance(value, dict):
            for k, v in value.items():
                look(v, is_secret(str(k)))
        elif isinstance(value, list | tuple):
            for v in value:
                look(v, secret)
        elif secret and isinstance(value, str) and _is_value(value):
            found.add(value)

    look(list(values), False)
    return found


def redact(value: Any, secrets: Collection[str] = ()) -> Any:
    """`value` (dicts, lists, plain values) without `secrets`, and without the values of keys named like a secret."""
    if isinstance(value, dict):
        return {
            redact(k, secrets): REDACTED if is_secret(str(k)) and isinstance(v, str) and v else redact(v, secrets)
            for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact(v, secrets) for v in value]
    if isinstance(value, str):
        for secret in sorted(secrets, key=len, reverse=True):  # one may be the beginning of another
            value = value.replace(secret, REDACTED)
    return value


def redact_command(arguments: Sequence[str], secrets: Collection[str]) -> list[str]:
    """A command line without `secrets`, and without the values of overrides whose key is named like one."""

    def named(key: str) -> bool:
        return is_secret(key.rpartition(".")[2].replace("-", "_"))

    def assigned(match: re.Match[str]) -> str:
        return match[1] + match[2] + (REDACTED if named(match[1]) else match[3])

    def one(argument: str) -> str:
        key, equals, value = redact(argument, secrets).partition("=")
        return key + equals + (REDACTED if equals and value and named(key) else _ASSIGNED.sub(assigned, value))

    return [one(a) for a in arguments]
