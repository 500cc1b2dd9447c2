"""Policies. Importing this package registers clbench's own policies with LeRobot and CLARE with PEFT.

LeRobot's command lines find them with `--policy.discover_packages_path=clbench.policies` or, together with
`--policy.path=FOLDER`, with `--plugins.discover_packages_path=clbench.policies`.
"""

import clbench.adapters.clare  # noqa: F401 (registers CLARE with PEFT)
from clbench.policies.dit_dec.configuration_dit_dec import DitDecConfig
from clbench.policies.dit_encdec.configuration_dit_encdec import DitEncDecConfig

__all__ = ["DitDecConfig", "DitEncDecConfig"]
