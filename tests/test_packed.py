"""Packed results: nothing of the machine in them, the same numbers out of them, and no trust in what they hold."""

from __future__ import annotations

import io
import json
import lzma
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from clbench import cli
from clbench.errors import UserError
from clbench.evaluation.packed import INDEX, pack, unpack, unpacked
from clbench.metrics import compute_metrics
from clbench.metrics.record import load_record
from clbench.report.refresh import refresh
from tests.test_metrics_record import make_run

TASKS = ["a", "b", "c"]
PAGES = Path(__file__).resolve().parents[1] / "docs" / "results"


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    found = []
    for name in ("one", "two"):
        run = make_run(tmp_path / "results" / name, rng.integers(0, 2, (3, 3, 8)), TASKS)
        (run / "config.yaml").write_text(f"output_dir: {run.parent}\ndataset: {{data: {Path.home()}/sets/x}}\n")
        (run / "log.jsonl").write_text('{"event": "run_end", "seconds": 1.0}\n')
        (run / "checkpoints/task_00/policy").mkdir(parents=True)
        (run / "checkpoints/task_00/policy/model.safetensors").write_bytes(b"weights")
        (run / "notes.txt").write_text("mine")
        found.append(run)
    return found


def test_the_same_numbers_come_out(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "both.tar.xz"
    arguments = ["results", "pack", *map(str, runs), "--out", str(file)]
    assert cli.main(arguments) == 0 and "2 runs" in capsys.readouterr().out
    first = file.read_bytes()
    assert cli.main(arguments) == 0 and file.read_bytes() == first
    with unpacked([file]) as there:
        for run, copy in zip(runs, there, strict=True):
            assert compute_metrics(load_record(copy)) == compute_metrics(load_record(run))
            assert not (copy / "checkpoints").exists() and not (copy / "notes.txt").exists()
    assert not there[0].exists()
    capsys.readouterr()
    assert cli.main(["metrics", *map(str, runs)]) == 0
    pairs = capsys.readouterr().out
    assert cli.main(["metrics", str(file)]) == 0
    assert capsys.readouterr().out == pairs
    assert cli.main(["report", str(file)]) == 0
    folder = tmp_path / "both_report"
    assert (folder / "index.html").is_file() and r"| er \[one\] − er \[two\] |" in (folder / "paired.md").read_text()
    assert cli.main(["results", "unpack", str(file), "--to", str(tmp_path / "elsewhere")]) == 0
    assert (tmp_path / "elsewhere/one/eval/cells/k00_j00.jsonl").read_bytes() == (
        runs[0] / "eval/cells/k00_j00.jsonl"
    ).read_bytes()


def test_nothing_of_the_machine_is_in_it(runs: list[Path], tmp_path: Path) -> None:
    pack(runs, tmp_path / "r.tar.xz")
    with lzma.open(tmp_path / "r.tar.xz") as f:
        text = f.read().decode()
    assert str(tmp_path) not in text and str(Path.home()) + "/" not in text
    assert "output_dir: results\n" in text and "data: ~/sets/x" in text


def changed(file: Path, to: Path, edit: Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]) -> Path:
    with tarfile.open(file) as tar:
        members = [(m, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    edit(members)
    with tarfile.open(to, "w:xz") as tar:
        for member, data in members:
            member.size = len(data) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(data))
    return to


def add(name: str, kind: bytes = tarfile.REGTYPE) -> Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]:
    def edit(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        members.append((member, b"{}"))

    return edit


def rewrite(place: str, to: bytes) -> Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]:
    def edit(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        i = next(i for i, (m, _) in enumerate(members) if m.name == place)
        members[i] = (members[i][0], to)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (add("../one/manifest.json"), "which does not belong in packed results"),
        (add("one/../../manifest.json"), "which does not belong in packed results"),
        (add("/one/manifest.json"), "which does not belong in packed results"),
        (add("one/checkpoints/x.json"), "which does not belong in packed results"),
        (add("one/eval/link.json", tarfile.SYMTYPE), "which does not belong in packed results"),
        (add("one/eval/more.json"), "is damaged: its members are not those that were packed"),
        (add("three/manifest.json"), "is damaged: its members are not those that were packed"),
        (rewrite("one/manifest.json", b"{}"), "is damaged: its members are not those that were packed"),
        (rewrite(INDEX, b"[]"), "has no valid results.json"),
        (rewrite(INDEX, json.dumps({"format": 2, "runs": [], "sha256": {}}).encode()), "has format 2"),
    ],
)
def test_what_it_should_not_hold_is_refused(
    runs: list[Path], tmp_path: Path, edit: Callable[[list[tuple[tarfile.TarInfo, bytes]]], None], message: str
) -> None:
    pack(runs, tmp_path / "r.tar.xz")
    bad = changed(tmp_path / "r.tar.xz", tmp_path / "bad.tar.xz", edit)
    with pytest.raises(UserError, match=message):
        unpack(bad, tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_mistakes_are_named(runs: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "r.tar.xz"
    pack(runs, file)
    unpack(file, tmp_path / "there")
    with pytest.raises(UserError, match="exists already"):
        unpack(file, tmp_path / "there")
    with pytest.raises(UserError, match=r"must end with \.tar\.xz"):
        pack(runs, tmp_path / "r.zip")
    with pytest.raises(UserError, match="is not an evaluated run"):
        pack([tmp_path], file)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match="is damaged"):
        unpack(file, tmp_path / "again")
    file.write_bytes(b"text")
    with pytest.raises(UserError, match="not a file of packed results"):
        unpack(file, tmp_path / "again")


def test_a_page_is_made_anew_from_its_records(runs: list[Path], tmp_path: Path) -> None:
    """Tables between the marks and pictures of the report's names; all else stays, and twice changes nothing."""
    page = tmp_path / "pages" / "mine"
    page.mkdir(parents=True)
    pack(runs, page / "records.tar.xz")
    blocks = "<!-- table -->\nold\n<!-- /table -->\n\n<!-- paired -->\n<!-- /paired -->\nend\n"
    (page / "README.md").write_text(f"# Mine\n\n{blocks}")
    (page / "success.png").write_bytes(b"old")
    (page / "other.png").write_bytes(b"own")
    assert refresh(page) == ["success.png", "README.md"]
    text = (page / "README.md").read_text()
    assert text.startswith("# Mine\n\n<!-- table -->\n| algorithm | seeds | AUC |")
    assert text.endswith("<!-- /paired -->\nend\n")
    auc = compute_metrics(load_record(runs[0]))["auc_clare"]
    assert f"{auc['value']:.3f} [{auc['low']:.2f}, {auc['high']:.2f}]" in text
    assert (page / "other.png").read_bytes() == b"own" and len((page / "success.png").read_bytes()) > 1000
    assert refresh(page) == []
    (page / "records.tar.xz").unlink()
    with pytest.raises(UserError, match="has no records"):
        refresh(page)


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(p.parent.name for p in PAGES.glob("*/records.tar.xz")))
def test_the_pages_are_those_of_their_records(page: str, tmp_path: Path) -> None:
    """scripts/refresh_results.sh would change no text. Pictures depend on fonts, and are not compared."""
    copy = Path(shutil.copytree(PAGES / page, tmp_path / page))
    assert "README.md" not in refresh(copy)
