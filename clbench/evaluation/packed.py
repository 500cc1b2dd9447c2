"""Packed results: the records of runs in one small file, without weights; for archives, pages and other machines.

A .tar.xz file, the same bytes for the same runs:

    results.json          {"format": 1, "clbench": version, "runs": [names], "sha256": {member: its sum}}
    RUN/manifest.json     as in the run's folder; likewise config.yaml, log.jsonl, and all JSON below eval/

The machine's own paths in them are replaced by results/RUN, data/NAME, bases/NAME. `clbench metrics` and `clbench
report` read such a file in place of run folders. Reading checks names, sizes and checksums, and runs nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import re
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath

import clbench
from clbench.errors import UserError
from clbench.io import parse_json, read_bytes, refuse_links, write_bytes
from clbench.paths import PROJECT_ROOT, bases_root, cache_root, data_root, model_root, results_root

SUFFIX = ".tar.xz"
INDEX = "results.json"
FORMAT = 1
MAX_BYTES = 2**30  # of all members
MAX_MEMBERS = 200_000
MEMBER = re.compile(r"[^/]+/(config\.yaml|manifest\.json|log\.jsonl|eval/([^/]+/)*[^/]+\.jsonl?)")


def pack(runs: Sequence[Path], file: Path) -> int:
    """Write the records of some evaluated runs into `file`; returns its size in bytes.

    Raises:
        UserError: a folder is not an evaluated run, two have the same name, or the file cannot be written.
    """
    if not file.name.endswith(SUFFIX):
        raise UserError(f"{file}: the name of a file of packed results must end with {SUFFIX}.")
    if len({run.name for run in runs}) < len(runs):
        raise UserError("two of the runs have the same name: a file of packed results tells runs apart by name.")
    members: dict[str, bytes] = {}
    for run in runs:
        if not (run / "manifest.json").is_file() or not (run / "eval" / "matrix.json").is_file():
            raise UserError(f"{run} is not an evaluated run: manifest.json or eval/matrix.json is missing.")
        refuse_links(run)
        for path in sorted(p for p in run.rglob("*") if p.is_file()):
            name = f"{run.name}/{path.relative_to(run).as_posix()}"
            if MEMBER.fullmatch(name) and not any(part.startswith(".") for part in PurePosixPath(name).parts):
                members[name] = _without_places(read_bytes(path, MAX_BYTES), run)
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in members.items()}
    index = {"format": FORMAT, "clbench": clbench.__version__, "runs": [run.name for run in runs], "sha256": sums}
    packed = io.BytesIO()
    with lzma.open(packed, "wb", preset=9) as xz, tarfile.open(fileobj=xz, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in {INDEX: (json.dumps(index, indent=1) + "\n").encode(), **members}.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o644
            tar.addfile(member, io.BytesIO(data))
    write_bytes(file, packed.getvalue())
    return len(packed.getvalue())


def _without_places(data: bytes, run: Path) -> bytes:
    """A file's text with this machine's folders replaced by neutral names."""
    text = data.decode("utf-8", "replace")
    folders = {
        run.parent.resolve(): "results", results_root().resolve(): "results", data_root().resolve(): "data",
        model_root().resolve(): "models", bases_root().resolve(): "bases", cache_root().resolve(): "cache",
        PROJECT_ROOT: ".", Path.home(): "~",
    }  # fmt: skip
    for folder in sorted((f for f in folders if len(f.parts) > 1), key=lambda f: -len(str(f))):
        text = re.sub(re.escape(str(folder)) + r"(?=[/\"'\s]|$)", folders[folder], text)
    return text.encode()


def unpack(file: Path, folder: Path) -> list[Path]:
    """Write the runs of a file of packed results into `folder`; returns their folders.

    Raises:
        UserError: it is not such a file, damaged, too large, or a run with one of its names exists already.
    """
    found: dict[str, bytes] = {}
    total = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(read_bytes(file, MAX_BYTES)), mode="r:xz") as tar:
            for member in tar:
                total += member.size
                if total > MAX_BYTES or len(found) > MAX_MEMBERS:
                    raise UserError(f"{file} holds more than {MAX_BYTES} bytes or {MAX_MEMBERS} files.")
                parts = PurePosixPath(member.name).parts
                good = member.isreg() and not member.issparse() and not any(p in ("..", ".") for p in parts)
                if not good or not (member.name == INDEX or MEMBER.fullmatch(member.name)) or member.name in found:
                    raise UserError(f"{file} holds {member.name!r}, which does not belong in packed results.")
                stream = tar.extractfile(member)
                assert stream is not None  # it is a regular file
                found[member.name] = stream.read()
    except (tarfile.TarError, lzma.LZMAError, EOFError) as e:
        raise UserError(f"{file} is not a file of packed results, or it is damaged: {e}.") from e
    names = _check_index(file, found)
    for name in names:
        if (folder / name).exists():
            raise UserError(f"{folder / name} exists already: unpack {file.name} into another folder.")
    for name, data in found.items():
        if name != INDEX:
            write_bytes(folder / name, data)
    return [folder / name for name in names]


def _check_index(file: Path, found: dict[str, bytes]) -> list[str]:
    """The names of the runs; UserError if the members are not those that were packed."""
    try:
        index = parse_json(found[INDEX].decode())
        version, names, sums = index["format"], index["runs"], index["sha256"]
    except (KeyError, TypeError, ValueError, RecursionError) as e:
        raise UserError(f"{file} is not a file of packed results: it has no valid {INDEX}.") from e
    if version != FORMAT:
        raise UserError(f"{file} has format {version!r}; this version of clbench reads format {FORMAT}.")
    have = {name: hashlib.sha256(data).hexdigest() for name, data in found.items() if name != INDEX}
    runs = {name.split("/")[0] for name in have}
    if sums != have or not isinstance(names, list) or sorted(runs) != sorted(map(str, names)):
        raise UserError(f"{file} is damaged: its members are not those that were packed.")
    return [str(name) for name in names]


def is_packed(path: Path | str) -> bool:
    """Whether a path names a file of packed results."""
    return str(path).endswith(SUFFIX)


@contextmanager
def unpacked(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """The same paths, with packed files replaced by their runs, in a temporary folder inside the block."""
    with ExitStack() as stack:
        found: list[Path] = []
        for path in paths:
            if is_packed(path):
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="clbench-results-")))
                found += unpack(path, folder)
            else:
                found.append(path)
        yield found
