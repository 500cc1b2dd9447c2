"""Policies on a hub as bases: `policy.path=OWNER/NAME`, or OWNER/NAME@REVISION. And those of CLARE's released code.

Only JSON and safetensors files are fetched, into the hub client's own cache. What is complete there is used as it is,
without contacting the hub.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from clbench.checkpoints import released, trusted
from clbench.checkpoints.base import WEIGHTS
from clbench.checkpoints.statistics import PIPELINES
from clbench.config.schema import Config
from clbench.data.hub import asked
from clbench.errors import UserError
from clbench.io import read_text
from clbench.paths import model_root, named_folder
from clbench.terminal import tell

STATE_FILE = re.compile(r'"state_file":\s*"([^"]+)"')
FILES: dict[str, Any] = {"allow_patterns": ["*.json", "*.safetensors"], "ignore_patterns": ["*/*"]}


def named(path: str) -> tuple[str, str] | None:
    """Repository and revision that a `policy.path` names; None: it is a folder, or no such name."""
    if trusted.HUB_NAME.fullmatch(path) is None or named_folder(path, model_root()).exists():
        return None
    repo_id, _, revision = path.partition("@")
    return repo_id, revision or "main"


def with_local_base(config: Config) -> Config:
    """The configuration with a hub's model in `policy.path` replaced by its folder on this machine, fetched if needed.

    A policy of CLARE's released code is replaced by what is made of it (released.py).

    Raises:
        UserError: the hub cannot be reached, has no such model or revision, or the model is not a LeRobot policy.
    """
    path = str(config.policy.get("path") or "")
    if not path:
        return config
    here, wanted = path, named(path)
    if wanted is not None:
        folder = _fetched(*wanted)
        for name in ("config.json", WEIGHTS):
            if not (folder / name).is_file():
                raise UserError(f"the hub's {path} is not a LeRobot policy: it has no {name}.")
        if {path, wanted[0]} & set(trusted.given().models):
            trusted.trust_also(folder)
        here = str(folder)
    ours = released.in_our_form(here)
    return config if ours == path else replace(config, policy={**config.policy, "path": ours})


def _is_whole(folder: Path) -> bool:
    """Whether a folder has a policy with its processors and their states, not only what others fetched of it.

    A policy of CLARE's released code has no processors.
    """
    if (folder / WEIGHTS).is_file() and released.is_released(folder):
        return True
    if not all((folder / name).is_file() for name in ("config.json", WEIGHTS, *PIPELINES)):
        return False
    states = [s for name in PIPELINES for s in STATE_FILE.findall(read_text(folder / name))]
    return all((folder / name).is_file() for name in states)


def _fetched(repo_id: str, revision: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        local = str(huggingface_hub.snapshot_download(repo_id, revision=revision, local_files_only=True, **FILES))
    except errors.LocalEntryNotFoundError:
        local = ""
    if local and _is_whole(Path(local)):
        return Path(local)
    tell(f"fetching the policy {repo_id}, revision {revision}, from the hub")

    def fetch() -> str:
        return str(huggingface_hub.snapshot_download(repo_id, revision=revision, **FILES))

    return Path(asked(repo_id, revision, fetch, "model"))
