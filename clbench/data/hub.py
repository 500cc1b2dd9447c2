"""Copies of hub data sets: the same cache and the same files that LeRobot itself would use and fetch.

huggingface_hub is called directly, not through LeRobotDataset: LeRobot asks the hub for a set's versions whenever it is
opened, so a machine without a network could not open what is in its cache; and importing LeRobot takes 10 s.
What has been fetched is used as it is, without contacting the hub; only what is missing is fetched.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clbench.data.lerobot_set import FORMAT, INFO, has_set, is_described
from clbench.errors import UserError
from clbench.io import read_json, write_json
from clbench.patience import patience
from clbench.terminal import tell

RECORD = ".clbench_hub.json"  # in a user's folder: which set it is a copy of
META = "meta/"


@dataclass(frozen=True)
class HubCopy:
    """A hub data set on this machine; files may be missing."""

    repo_id: str
    revision: str
    commit: str
    root: Path


def cache_folder() -> Path:
    """LeRobot's cache of hub data sets: $HF_LEROBOT_HOME/hub, by default ~/.cache/huggingface/lerobot/hub."""
    from huggingface_hub import constants

    home = os.environ.get("HF_LEROBOT_HOME") or os.path.join(constants.HF_HOME, "lerobot")
    return Path(home).expanduser() / "hub"


def local_copy(repo_id: str, revision: str | None = None, folder: Path | None = None) -> HubCopy | None:
    """The copy on this machine, without asking the hub; None if its description has not been fetched completely.

    Raises:
        UserError: `folder` holds something else.
    """
    wanted = revision or FORMAT
    if folder is None:
        from huggingface_hub import errors, snapshot_download

        try:
            root = Path(
                snapshot_download(
                    repo_id, repo_type="dataset", revision=wanted, cache_dir=cache_folder(), allow_patterns=META,
                    local_files_only=True,
                )
            )  # fmt: skip
        except errors.LocalEntryNotFoundError:
            return None
        return HubCopy(repo_id, wanted, root.name, root) if is_described(root) else None
    if not (folder / RECORD).is_file():
        if folder.is_dir() and any(p.name != ".cache" for p in folder.iterdir()):
            raise UserError(
                f"{folder} is not empty and is not a copy of {repo_id} that clbench fetched. Name another folder, or "
                "omit repo_id to use the data set that is there."
            )
        return None
    record = read_json(folder / RECORD)
    found = [record.get(k) if isinstance(record, dict) else None for k in ("repo_id", "revision", "commit")]
    if found[:2] != [repo_id, wanted]:
        raise UserError(
            f"{folder} holds {found[0]} at revision {found[1]}, not {repo_id} at {wanted}. Name another folder."
        )
    return HubCopy(repo_id, wanted, str(found[2]), folder) if record.get("described") is True else None


def fetch_description(repo_id: str, revision: str | None = None, folder: Path | None = None) -> HubCopy:
    """Fetch a set's description (meta/, a few MB), with a message.

    Raises:
        UserError: the hub cannot be reached; the set or revision does not exist or is not open to this user; the disk
            is full.
    """
    wanted = revision or FORMAT
    kept = folder or cache_folder()
    tell(f"fetching the description (meta/) of {repo_id}, revision {wanted}, from the hub into {kept}")
    if folder is None:
        root = Path(_snapshot(repo_id, wanted, wanted, allow_patterns=META, cache_dir=cache_folder()))
        commit = root.name
    else:
        commit = _commit(repo_id, wanted)
        record = {"repo_id": repo_id, "revision": wanted, "commit": commit}
        write_json(folder / RECORD, record)
        root = Path(_snapshot(repo_id, wanted, commit, allow_patterns=META, local_dir=folder))
    if not is_described(root):
        _commit(repo_id, wanted)  # without a network the client returns what it has; this raises
    if not has_set(root):
        raise UserError(f"{repo_id} (revision {wanted}) has no {INFO}: it is not a LeRobot data set.")
    if folder is not None:
        write_json(folder / RECORD, record | {"described": True})
    return HubCopy(repo_id, wanted, commit, root if folder is None else folder)


def size_of(copy: HubCopy, files: Sequence[str], in_cache: bool) -> int:
    """How many bytes fetching these files would take; asks the hub. Raises as `fetch_files`."""
    parts = _snapshot(
        copy.repo_id, copy.revision, copy.commit, allow_patterns=list(files), dry_run=True, **_place(copy, in_cache)
    )
    known = {p.filename: p for p in parts}
    absent = [f for f in files if f not in known]
    if absent:
        raise UserError(f"{copy.repo_id} (commit {copy.commit[:12]}) lacks {absent[0]}, which its own description "
                        "lists: the set on the hub is incomplete. Use another revision or set.")  # fmt: skip
    return sum(p.file_size for p in parts if p.will_download)


def fetch_files(copy: HubCopy, files: Sequence[str], in_cache: bool) -> None:
    """Fetch these files at the copy's commit, first printing their size and destination. Raises UserError."""
    size = size_of(copy, files, in_cache)
    tell(f"fetching {len(files)} files ({size / 1e6:.1f} MB) of {copy.repo_id} from the hub into {copy.root}")
    _snapshot(copy.repo_id, copy.revision, copy.commit, allow_patterns=list(files), **_place(copy, in_cache))


def _place(copy: HubCopy, in_cache: bool) -> dict[str, Any]:
    return {"cache_dir": cache_folder()} if in_cache else {"local_dir": copy.root}


def _commit(repo_id: str, revision: str) -> str:
    from huggingface_hub import HfApi

    def ask() -> str:
        return str(HfApi().dataset_info(repo_id, revision=revision).sha)

    return str(asked(repo_id, revision, ask))


def _snapshot(repo_id: str, revision: str, commit: str, **options: Any) -> Any:
    import huggingface_hub

    def fetch() -> Any:
        return huggingface_hub.snapshot_download(repo_id, repo_type="dataset", revision=commit, **options)

    return asked(repo_id, revision, fetch)


def asked(repo_id: str, revision: str, call: Any, what: str = "data set") -> Any:
    """`call()`, with any failure between here and the hub reported in one message.

    Args:
        what: "data set" | "model" | "tokenizer", what `repo_id` names.
    """
    import httpx
    from huggingface_hub import errors

    model = what != "data set"
    instead = {
        "data set": " Or make the demonstrations yourself (clbench data make), or name a local copy "
        "(dataset.data=FOLDER).",
        "model": " Or name a local copy (policy.path=FOLDER).",
        "tokenizer": "",
    }[what]
    try:
        with _quiet_client(), patience(f"asking the hub for {repo_id}"):
            return call()
    except errors.GatedRepoError as e:
        raise UserError(
            f"{repo_id} is open only to users who accepted its terms on the hub: accept them there, then log in with "
            "`hf auth login` (or set HF_TOKEN)."
        ) from e
    except errors.RepositoryNotFoundError as e:
        raise UserError(
            f"the hub has no {what} {repo_id}, or it is private. Check the name; for a private one log in with "
            "`hf auth login` (or set HF_TOKEN)."
        ) from e
    except errors.RevisionNotFoundError as e:
        raise UserError(
            f"the hub's {repo_id} has no revision '{revision}'." if model else _no_revision(repo_id, revision)
        ) from e
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, errors.DryRunError,
            errors.FileMetadataError, httpx.HTTPError) as e:  # fmt: skip
        cause: BaseException = e
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, errors.GatedRepoError | errors.RepositoryNotFoundError | errors.RevisionNotFoundError):
            return asked(repo_id, revision, lambda: _raise(cause), what)
        why = "HF_HUB_OFFLINE is set" if isinstance(cause, errors.OfflineModeIsEnabled) else _first_line(cause)
        raise UserError(
            f"{repo_id} (revision {revision}) is not complete on this machine and the hub cannot be reached ({why}). "
            f"Run this again with a network; what was fetched is kept.{instead}"
        ) from e
    except OSError as e:
        place = "HF_HOME" if model else "dataset.data=FOLDER (a path) or HF_LEROBOT_HOME"
        why = f"cannot store {repo_id} on this machine: {_first_line(e)}"
        raise UserError(f"{why}. Choose a place with {place}.") from e


@contextlib.contextmanager
def _quiet_client() -> Iterator[None]:
    """Without its warnings about each attempt: what remains wrong after the last is one message of ours."""
    from huggingface_hub.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _raise(error: BaseException) -> None:
    raise error


def _no_revision(repo_id: str, revision: str) -> str:
    """The message about a revision that a set lacks: which ones it has."""
    from huggingface_hub import HfApi

    try:
        refs = HfApi().list_repo_refs(repo_id, repo_type="dataset")
    except Exception:  # noqa: BLE001 (they only make the message more helpful)
        names: list[str] = []
    else:
        names = [r.name for r in (*refs.tags, *refs.branches)]
    has = f" It has {', '.join(names[:10])}." if names else ""
    if revision == FORMAT:
        return (
            f"the hub's {repo_id} has no tag {FORMAT}, LeRobot's data format.{has} A set in format v2 has to be "
            "converted (LeRobot's lerobot/scripts/convert_dataset_v21_to_v30.py); for one in format v3 without the tag "
            "give dataset.revision=main."
        )
    return f"the hub's {repo_id} has no revision '{revision}'.{has}"


def _first_line(e: BaseException) -> str:
    text = str(e).strip().splitlines()
    return f"{type(e).__name__}: {text[0].rstrip('.')[:200]}" if text else type(e).__name__
