"""Checks of an algorithm before it runs: misspelt hooks, missing claims, impossible combinations."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from clbench.algorithms.protocol import CLAlgorithm
from clbench.errors import UserError

# Overriding one of these methods requires the claim to what it decides.
CLAIMED_BY = {
    "phases": "phases",
    "plan_batch": "batch_mix",
    "transform_stream": "stream",
    "save_policy": "structure",
    "restore_structure": "structure",
    "eval_view": "eval_view",
}

# What an algorithm may own alone. Two algorithms of a composition that claim the same thing are refused.
CLAIMS = ("batch_mix", "gradient_edits", "weight_edits", "phases", "structure", "eval_view", "stream")


HOOKS = frozenset(n for n, f in vars(CLAlgorithm).items() if callable(f) and not n.startswith("_") and n != "Config")


def check_hooks(cls: type[CLAlgorithm]) -> None:
    """Raise UserError for a method that looks like a misspelt hook, or a hook with other parameters.

    A public method that is not a hook is a mistake if its name is close to a hook's or starts like one; helpers may
    have any other name, and any name with a leading underscore.
    """
    for owner in cls.__mro__:
        if owner in (CLAlgorithm, object) or not issubclass(owner, CLAlgorithm):
            continue
        for name, value in vars(owner).items():
            if name.startswith("_") or not inspect.isfunction(value):
                continue
            if name not in HOOKS:
                close = difflib.get_close_matches(name, HOOKS, n=1, cutoff=0.75)
                if close or name.startswith(("on_", "before_", "after_", "modify_", "compute_")):
                    hint = f" Did you mean '{close[0]}'?" if close else f" Hooks: {', '.join(sorted(HOOKS))}."
                    raise UserError(
                        f"{owner.__name__}.{name} is not a hook and would never be called.{hint} "
                        "(A helper's name may start with an underscore.)"
                    )
                continue
            claim = CLAIMED_BY.get(name)
            if claim is not None and claim not in cls.claims:
                raise UserError(f"{owner.__name__} overrides {name} and so must claim '{claim}' in `claims`.")
            want = list(inspect.signature(getattr(CLAlgorithm, name)).parameters)
            have = list(inspect.signature(value).parameters)
            if have != want:
                raise UserError(
                    f"{owner.__name__}.{name}({', '.join(have)}) must take ({', '.join(want)}), as it is called."
                )


def stands_alone(name: str, config: Any) -> None:
    """Raise UserError when a stream transform is combined with other algorithms: there is no sequence to act on."""
    names = config.algorithm.get("name")
    if not isinstance(names, str) and len(names) > 1:
        raise UserError(f"{name} cannot be combined with other algorithms ({', '.join(map(str, names))}).")
