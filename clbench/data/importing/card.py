"""Where an imported set came from: `meta/clbench_import.json`, next to LeRobot's own metadata.

    imported_from    rlds | libero_hdf5
    source           the folder, and bytes and sha256 of every file that was read
    map, unused      feature of the set → feature of the source; features of the source that nothing came from
    conventions      how grippers, rotations, images and observations were represented there
    fingerprint      sha256 of the set's states, actions, episode and task indices, and pixels, as in info.py
    files, seal      bytes and sha256 of every other file of the set; sha256 of this description

Standard library only, so that opening a data set costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clbench.data.info import sums_of_files
from clbench.errors import UserError
from clbench.io import read_json, seal, write_json

CARD_FILE = "meta/clbench_import.json"
FORMAT = 1
REMEDY = "Import it again (clbench data import … --force)."


@dataclass(frozen=True)
class ImportCard:
    """The parts of a card that are used.

    Attributes:
        origin: what manifest.json says about it: everything except the checksums of the set's own files.
        files: path → bytes and sha256 of the set's files.
    """

    origin: dict[str, Any]
    files: dict[str, tuple[int, str]]


def is_imported(root: Path) -> bool:
    """Whether a folder holds a set that clbench imported."""
    return (root / CARD_FILE).is_file()


def write_card(root: Path, description: dict[str, Any], files: dict[str, tuple[int, str]]) -> None:
    """Write the card of the set in `root`."""
    raw = {"format": FORMAT, **description, "files": {name: list(found) for name, found in files.items()}}
    write_json(root / CARD_FILE, raw | {"seal": seal(raw)})


def load_card(root: Path) -> ImportCard:
    """Read the card of an imported set; UserError where it is damaged, or a newer clbench wrote it."""
    path = root / CARD_FILE
    raw = read_json(path)
    found = raw.get("format") if isinstance(raw, dict) else None
    if type(found) is int and found > FORMAT:
        raise UserError(f"{path} has format {found}, this clbench reads up to {FORMAT}. Use a newer clbench.")
    try:
        if type(found) is not int or raw.pop("seal") != seal(raw):
            raise ValueError("it was changed since the set was imported")
        files = sums_of_files(raw.pop("files"))
        if files is None:
            raise ValueError("it lists no files")
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        what = f"'{e.args[0]}' is missing" if isinstance(e, KeyError) else str(e)
        raise UserError(f"{path} is damaged: {what}. {REMEDY}") from e
    return ImportCard(raw, files)
