"""Reports of synthetic run folders: what is written, what is left out, nothing hostile gets through."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clbench.algorithms.er import ER
from clbench.cli import main
from clbench.errors import UserError
from clbench.metrics import compute_metrics, load_record
from clbench.report import build, build_report
from clbench.report.beyond import beyond_the_method
from clbench.report.build import file_names, folder_name
from clbench.report.cli import add_arguments, run
from clbench.report.runs import group_runs, load_runs
from clbench.report.tables import bytes_text, count_text, escape_latex, to_latex

TASKS = ["reach-v3", "push-v3", "handle-press-side-v3", "window-close-v3"]


def write_run(
    root: Path,
    algorithm: str = "er",
    *,
    seed: int = 0,
    tasks: list[str] = TASKS,
    mode: str = "sequential",
    episodes: int = 10,
    full: bool = True,
    routing: bool = False,
    keep: float = 0.8,
    log: bool = True,
    first: int = 0,
) -> Path:
    """A run folder with everything a run leaves; `keep` is how much of a task each later one leaves."""
    rng = np.random.default_rng([seed, len(algorithm)])
    n = len(tasks)
    k_rows = 1 if mode == "multitask" else n
    path = root / f"{algorithm}_s{seed}"
    (path / "eval/cells").mkdir(parents=True)

    def cell(name: str, k: int, j: int, rate: float) -> float:
        wins = rng.random(episodes) < rate
        with (path / "eval/cells" / name).open("w") as f:
            for i, won in enumerate(wins):
                e: dict[str, Any] = {
                    "k": k,
                    "j": j,
                    "episode": i,
                    "seed": 1_000_000 + first + i,
                    "success_once": bool(won),
                }
                e |= {"success_at_end": bool(won), "length": 100, "return": 1.0, "seconds": 0.5}
                if routing and k == n - 1:
                    chosen = rng.integers(0, n) if rng.random() < 0.2 else j
                    e["routing"] = {f"blocks.{b}.mlp": {str(chosen): 90, str((chosen + b) % n): 10} for b in range(4)}
                f.write(json.dumps(e) + "\n")
        return float(wins.mean())

    success: list[list[float | None]] = []
    for k in range(k_rows):
        row: list[float | None] = []
        for j in range(n):
            rate = 0.85 if mode == "multitask" else 0.9 * keep ** (k - j) if j <= k else 0.08
            skipped = not full and j > k
            row.append(None if skipped else cell(f"k{k:02d}_j{j:02d}.jsonl", k, j, rate))
        success.append(row)
    base = [cell(f"base_j{j:02d}.jsonl", -1, j, 0.1) for j in range(n)]
    (path / "eval/matrix.json").write_text(
        json.dumps(
            {
                "tasks": tasks,
                "success": success,
                "episodes": [[episodes] * n] * k_rows,
                "base": base,
                "random": None,
                "criterion": "success_once",
            }
        )
    )
    (path / "eval/summary.json").write_text(json.dumps({"seconds": 400.0 + seed, "episodes": 160, "workers": 2}))
    visits = [
        {"k": k, "task": t, "instruction": f"do {t}", "env": {}, "expert_success": 1.0} for k, t in enumerate(tasks)
    ]
    manifest = {
        "run_id": path.name,
        "algorithm": algorithm,
        "policy": "dit_dec_tiny",
        "dataset": "metaworld_quick",
    }
    manifest |= {"seed": seed, "visits": visits, "base": {"hash": "abc"}, "mode": mode}  # type: ignore[dict-item]
    manifest |= {"versions": {"torch": "2.8"}, "git_revision": "0123abc"}  # type: ignore[dict-item]
    (path / "manifest.json").write_text(json.dumps(manifest))
    if log:
        with (path / "log.jsonl").open("w") as f:
            for k in range(k_rows):
                for phase in ("train", "discriminator") if routing else ("train",):
                    for step in range(0, 200, 5):
                        loss = float(np.exp(-step / 60) + 0.05 * rng.random())
                        f.write(
                            json.dumps({"event": "step", "k": k, "phase": phase, "step": step, "loss": loss}) + "\n"
                        )
                end = {"event": "task_end", "k": k, "seconds": 90.0, "parameters_total": 3_000_000}
                end |= {
                    "parameters_added": 60_000 if routing else 512,
                    "exemplar_bytes": 12_345_678,
                    "state_bytes": 4000,
                }
                end["peak_memory_mb"] = 1500 + 10 * k
                f.write(json.dumps(end) + "\n")
            f.write(json.dumps({"event": "run_end", "seconds": 400.0}) + "\n")
    return path


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of a page's text: drawing takes seconds."""
    monkeypatch.setattr(build, "_draw", lambda *_: ([], ["pictures"]))
    monkeypatch.setattr(build, "_matrix_image", lambda *_: ("matrix.png", "a matrix", b"png"))


def images(page: str) -> int:
    return page.count('src="data:image/png;base64,')


def table_lines(index: Path) -> list[str]:
    """The lines of the table in table.md, without what stands below it."""
    table, below = (index.parent / "table.md").read_text().split("\n\n", maxsplit=1)
    assert below.startswith("AUC, FWT and NBT as in CLARE (FWT is the diagonal), not as in LIBERO, ")
    return table.splitlines()


def test_one_run(tmp_path: Path) -> None:
    path = write_run(tmp_path, "clare", routing=True)
    index = build_report([path])
    assert index == path / "report/index.html"
    names = {p.name for p in index.parent.iterdir()}
    pictures = {"matrix_clare_s0.png", "success.png", "parameters.png", "cost.png", "routing.png", "loss.png"}
    assert names == pictures | {"index.html", "metrics.json", "table.tex", "table.md"}
    page = index.read_text()
    assert images(page) == 6 and "Left out" not in page
    for word in ("auc_clare", "mean R[n][n]", "10 episodes a cell", "0123abc", "not comparable", "Wilson"):
        assert word in page, word
    assert "| 240 k |" in (index.parent / "table.md").read_text()  # four tasks of 60 k each
    metrics = json.loads((index.parent / "metrics.json").read_text())["metrics"]
    assert metrics["fwt_gem"]["low"] is not None and metrics["ft_cw"]["missing"]


def test_several_algorithms_and_seeds(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, a, seed=s, keep=k) for a, k in (("er", 0.9), ("naive", 0.5)) for s in (0, 1)]
    runs += [write_run(tmp_path, "multitask", seed=s, mode="multitask") for s in (0, 1)]
    index = build_report(runs)
    assert index == tmp_path / "reports/metaworld_quick/index.html"
    table = table_lines(index)
    assert [line.split("|")[1].strip() for line in table[2:]] == ["er", "naive", "multitask"]
    er, joint = ([c.strip() for c in line.split("|")[1:-1]] for line in (table[2], table[4]))
    assert er[1] == "2" and all("[" in c for c in er[2:7]) and er[8:11] == ["12.3 MB", "4 kB", "6.0"]
    assert joint[2:5] == ["–"] * 3 and "[" in joint[5] and joint[6] == "–"
    latex = (index.parent / "table.tex").read_text()
    assert r"\toprule" in latex and latex.count(r"\\") == 4
    data = json.loads((index.parent / "metrics.json").read_text())
    assert data["groups"][0]["metrics"]["intransigence"]["n"] == 2  # the multitask run of the same seed
    assert data["groups"][0]["metrics"]["auc_clare"]["low"] < data["groups"][0]["metrics"]["auc_clare"]["high"]
    assert images(index.read_text()) == 6 + 3 + 6


def test_what_is_absent_is_left_out_and_said(tmp_path: Path) -> None:
    path = write_run(tmp_path, full=False, log=False)
    (path / "manifest.json").unlink()
    (path / "eval/summary.json").unlink()
    index = build_report([path], tmp_path / "elsewhere")
    page = index.read_text()
    assert index.parent == tmp_path / "elsewhere" and images(page) == 2
    for word in (
        "Left out",
        "no log",
        "routing",
        "no manifest.json",
        "missing: success not evaluated at k=0 j=1",
    ):
        assert word in page, word


def test_a_damaged_log_is_said_and_a_torn_one_read(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    with (path / "log.jsonl").open("a") as f:
        f.write('{"event": "st')
    assert images(build_report([path]).read_text()) == 5
    with (path / "log.jsonl").open("a") as f:
        f.write("\n{}\n")
    page = build_report([path]).read_text()
    assert images(page) == 3 and "training log is left out" in page


HOSTILE = """<script>alert("x")</script>' onload=a & $\\frac$ _%#{}~^ | `b` [c](javascript:d) \x1b[31m"""


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    path = write_run(tmp_path, tasks=[HOSTILE, "</title><img src=x onerror=a>"])
    manifest = json.loads((path / "manifest.json").read_text())
    manifest |= {"algorithm": HOSTILE, "policy": HOSTILE, "dataset": "../../etc", "git_revision": HOSTILE}
    manifest["versions"] = {HOSTILE: HOSTILE}
    (path / "manifest.json").write_text(json.dumps(manifest))
    other = write_run(tmp_path, "naive", tasks=[HOSTILE, "</title><img src=x onerror=a>"])
    index = build_report([path, other])
    assert index.parent.parent == tmp_path / "reports"  # the data set's name is no path
    page = index.read_text()
    assert "<script" not in page and "<img src=x" not in page and "&lt;script&gt;" in page
    assert set(re.findall(r"<([a-z]+[0-9]?)", page)) <= {
        *(
            "html",
            "head",
            "meta",
            "title",
            "style",
            "body",
            "h1",
            "h2",
            "p",
            "div",
            "table",
            "thead",
            "tr",
            "th",
        ),
        *("tbody", "td", "figure", "img", "figcaption", "ul", "li", "b", "details", "summary", "pre"),
    }
    latex = (index.parent / "table.tex").read_text()
    assert r"\textbackslash{}frac\$" in latex and "\x1b" not in latex
    assert "<script" not in (index.parent / "table.md").read_text()


def test_runs_that_do_not_compare(tmp_path: Path) -> None:
    one, other = write_run(tmp_path), write_run(tmp_path, "naive", tasks=TASKS[::-1])
    with pytest.raises(UserError, match="another order"):
        build_report([one, other])
    with pytest.raises(UserError, match="given twice"):
        build_report([one, one / ".." / one.name])
    with pytest.raises(UserError, match="not a run folder"):
        build_report([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="at least one"):
        build_report([])
    joint = write_run(tmp_path, "multitask", mode="multitask", tasks=TASKS[::-1])
    build_report([one, joint], bootstrap=0)  # joint training has no order


@pytest.mark.usefixtures("no_pictures")
def test_the_simulator_behind_the_numbers_is_shown_and_two_are_not_averaged(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, seed=s) for s in (0, 1)]
    for folder, mujoco in zip(runs, ("3.8.1", "3.3.7"), strict=True):
        played = {"simulators": {"metaworld": {"mujoco": mujoco}}}
        (folder / "eval/settings.json").write_text(json.dumps(played))
        manifest = json.loads((folder / "manifest.json").read_text()) | {"versions": {"mujoco": "3.8.1"}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    page = build_report(runs, bootstrap=0).read_text()
    assert "not averaged" in page and "metaworld on mujoco 3.8.1<" in page
    assert "metaworld on mujoco 3.3.7 (where the run was trained: mujoco 3.8.1)" in page
    (runs[1] / "eval/settings.json").unlink()  # made before versions were recorded
    assert "not averaged" not in build_report(runs, bootstrap=0).read_text()


@pytest.mark.usefixtures("no_pictures")
def test_same_seed_twice_is_not_averaged(tmp_path: Path) -> None:
    one = write_run(tmp_path)
    other = write_run(tmp_path / "b")
    with pytest.raises(UserError, match="same folder name"):
        build_report([one, other])
    other = other.rename(tmp_path / "er_other")
    page = build_report([one, other], bootstrap=50).read_text()
    assert "er [er_s0]" in page and "er [er_other]" in page and "not averaged" in page


@pytest.mark.usefixtures("no_pictures")
def test_runs_with_other_settings_are_not_averaged(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, seed=s) for s in (0, 1)]
    assert "not averaged" not in build_report(runs, bootstrap=0).read_text()
    for folder, settings in zip(runs, ({"lambda": 1}, {"lambda": 1, "came_later": 3}), strict=True):
        manifest = json.loads((folder / "manifest.json").read_text()) | {"algorithm_config": settings}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "not averaged" not in build_report(runs, bootstrap=0).read_text()
    (runs[1] / "manifest.json").write_text(json.dumps(manifest | {"algorithm_config": {"lambda": 2}}))
    page = build_report(runs, bootstrap=0).read_text()
    assert "its runs differ in algorithm.lambda (1, 2), so" in page and "er [er_s1]" in page


CONFIG = """seed: 0
model: dit_dec_tiny
policy: {type: dit_dec, d_model: 128}
algorithm: {name: er}
dataset: {name: metaworld_quick, data: metaworld_quick, tasks: [a]}
train: {steps: 300, threads: 1, optimizer: {lr: 1e-3}}
"""
BASE = {
    "kind": "pretrained",
    "path": "/somewhere/bases/x",
    "policy": {"type": "dit_dec", "d_model": 128},
    "pretrain": {"steps": 2500, "optimizer": {"lr": 1e-3}},
    "data_fingerprint": "f",
}


def two_seeds(root: Path) -> list[Path]:
    runs = [write_run(root, seed=s) for s in (0, 1)]
    for path in runs:
        (path / "config.yaml").write_text(CONFIG)
        change(path, base=BASE)
        played = {"seed": 0, "steps_after_success": 10, "max_steps": [200] * 4}
        (path / "eval/settings.json").write_text(json.dumps(played))
    return runs


def change(path: Path, **values: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text()) | values
    (path / "manifest.json").write_text(json.dumps(manifest))


def why_not_averaged(runs: list[Path]) -> str:
    """What the report says of it; "" when the runs were averaged."""
    _, notes = group_runs(load_runs(runs, bootstrap=0))
    return " ".join(notes)


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("steps: 300", "steps: 8", "train.steps (300, 8)"),
        ("lr: 1e-3", "lr: 3e-4", "train.optimizer.lr (0.001, 0.0003)"),
        ("train: {", "train: {batch_size: 64, ", "train.batch_size (128, 64)"),
        ("train: {", "train: {mixed_precision: bf16, ", "train.mixed_precision"),
        ("d_model: 128", "d_model: 256", "policy.d_model (128, 256)"),
        ("d_model: 128", "d_model: 128, chunk_size: 4", "policy.chunk_size"),
        ("name: metaworld_quick,", "name: metaworld_quick, fresh_on_revisit: true,", "dataset.fresh_on_revisit"),
    ],
)
def test_runs_of_other_configurations_are_not_averaged(tmp_path: Path, old: str, new: str, key: str) -> None:
    runs = two_seeds(tmp_path)
    (runs[1] / "config.yaml").write_text(CONFIG.replace(old, new))
    assert f"its runs differ in {key}" in why_not_averaged(runs)


def test_runs_of_other_bases_and_evaluations_are_not_averaged(tmp_path: Path) -> None:
    runs = two_seeds(tmp_path)
    assert why_not_averaged(runs) == ""
    for base, key in (
        (BASE | {"pretrain": {"steps": 8, "optimizer": {"lr": 1e-3}}}, "pretrain.steps (2500, 8)"),
        (BASE | {"data_fingerprint": "g"}, "base.data_fingerprint"),
        ({"kind": "given", "path": "/models/other"}, "base.name"),
    ):
        change(runs[0], base=BASE if base["kind"] == "pretrained" else {"kind": "given", "path": "/models/one"})
        change(runs[1], base=base)
        assert key in why_not_averaged(runs)
    for path, name in zip(runs, ("one", "moved"), strict=True):
        change(path, base={"kind": "given", "path": f"/models/{name}", "sha256": "0" * 64})
    assert why_not_averaged(runs) == ""
    for path in runs:
        change(path, base=BASE)
    played = json.loads((runs[0] / "eval/settings.json").read_text())
    for key, value in (("steps_after_success", 0), ("max_steps", [60] * 4)):
        (runs[1] / "eval/settings.json").write_text(json.dumps(played | {key: value}))
        assert f"{key} (" in why_not_averaged(runs)
    (runs[1] / "eval/settings.json").write_text(json.dumps(played))
    change(runs[1], sessions=[{"k": 2, "changed": {"train.optimizer.lr": [1e-3, 1e-4], "train.threads": [1, 2]}}])
    assert "changed at --resume ([], [[2, 'train.optimizer.lr', 0.0001]])" in why_not_averaged(runs)
    change(runs[1], sessions=[])
    shutil.rmtree(runs[1])
    write_run(tmp_path, seed=1, episodes=5)
    assert "eval.episodes (10, 5)" in why_not_averaged(runs)
    shutil.rmtree(runs[1])
    write_run(tmp_path, seed=1, first=500)
    (runs[1] / "eval/settings.json").write_text(json.dumps(played | {"seed": 500}))
    assert "eval.seed (0, 500)" in why_not_averaged(runs)


def test_what_changes_no_result_does_not_keep_seeds_apart(tmp_path: Path) -> None:
    """Threads, devices, paths, logs, the order of cells; keys that an earlier version did not have; fewer cells."""
    runs = two_seeds(tmp_path)
    (runs[1] / "config.yaml").write_text(
        CONFIG.replace("seed: 0", "seed: 1\noutput_dir: /elsewhere\neval: {cells: lower, workers: 4}")
        .replace("data: metaworld_quick", "data: /copied/metaworld_quick")
        .replace("threads: 1", "threads: 8, device: cuda, num_workers: 0, log_every: 5, tf32: false")
    )
    sessions = [{"k": 1, "changed": {"train.threads": [1, 2]}}]
    change(runs[1], base=BASE | {"path": "/home/other/bases/x"}, sessions=sessions)
    default = ER.Config().buffer_size_per_task
    change(runs[0], algorithm_config={"storage": "reference"})  # made before the other option
    change(runs[1], algorithm_config={"buffer_size_per_task": default})
    matrix = json.loads((runs[1] / "eval/matrix.json").read_text())
    matrix["success"] = [[v if j <= k else None for j, v in enumerate(row)] for k, row in enumerate(matrix["success"])]
    (runs[1] / "eval/matrix.json").write_text(json.dumps(matrix))
    assert why_not_averaged(runs) == ""
    change(runs[1], algorithm_config={"buffer_size_per_task": 16})
    assert f"algorithm.buffer_size_per_task ({default}, 16)" in why_not_averaged(runs)


def test_a_joint_run_on_another_base_is_no_reference(tmp_path: Path) -> None:
    one, joint = write_run(tmp_path), write_run(tmp_path, "multitask", mode="multitask")
    for path in (one, joint):
        change(path, base=BASE)
    measured = load_runs([one, joint], bootstrap=0)[0]
    assert measured.metrics["intransigence"]["value"] is not None
    change(joint, base=BASE | {"pretrain": {"steps": 8}})
    measured = load_runs([one, joint], bootstrap=0)[0]
    assert measured.metrics["intransigence"]["value"] is None
    assert "not measured against multitask_s0: they differ in pretrain.steps (2500, 8)" in measured.notes


def test_no_two_runs_share_a_file(tmp_path: Path) -> None:
    alike = ["replay é", "replay ü", "a b", "a_b", "ER", "er", "抓取", "Ω 🤖", "..", "x" * 180, "x" * 181, "a/b", "CON"]
    files = file_names(alike)
    assert len({name.casefold() for name in files}) == len(alike) and all(name.isascii() for name in files)
    assert files[3].startswith("a_b-") and max(map(len, files)) < 120 and file_names(["ER_s0"]) == ["ER_s0"]
    runs = [write_run(tmp_path, a).rename(tmp_path / name) for a, name in (("er", "replay é"), ("naive", "replay ü"))]
    index = build_report(runs, bootstrap=0)
    for kind in ("matrix", "loss"):
        assert len({path.read_bytes() for path in index.parent.glob(f"{kind}_*.png")}) == 2


def test_reports_of_other_names_are_in_other_folders() -> None:
    names = ["cw10", "CW10", "a b", "a_b", "é", "ü", "..", "x" * 300, ""]
    folders = [folder_name(name).casefold() for name in names]
    assert len(set(folders)) == len(names) and all(folders) and folders[0] == "cw10" and folders[3] == "a_b"
    assert all(len(name) < 130 and not name.startswith(".") for name in folders)


def test_a_run_and_a_view_of_one_name_are_refused(tmp_path: Path) -> None:
    one, other = write_run(tmp_path), write_run(tmp_path, "naive").rename(tmp_path / "er_s0-task_id")
    shutil.copytree(one / "eval", tmp_path / "copy")
    (one / "eval/views").mkdir()
    (tmp_path / "copy").rename(one / "eval/views/task_id")
    with pytest.raises(UserError, match="called er_s0-task_id"):
        build_report([one, other])


@pytest.mark.filterwarnings("error")
def test_pictures_show_characters_that_no_font_has_by_their_numbers(tmp_path: Path) -> None:
    from clbench.report.figures import distinct, short

    tasks = ["抓取杯子", "поставить Ω", "\U00013000", "é $x$"]
    path = write_run(tmp_path, tasks=tasks)
    change(path, privileged="$\\frac$ ü \U00013001")
    page = build_report([path], bootstrap=0).read_text()
    assert short("\U00013000") == "\\U00013000" and short("поставить Ω é") == "поставить Ω é"
    assert "no font on this machine has" in page and "\U00013000" in page and "抓取杯子" in page
    long = [f"replay with a {size} memory of exemplars" for size in ("small", "large")]
    assert len(set(distinct(long, 22))) == 2


@pytest.mark.usefixtures("no_pictures")
def test_the_page_and_metrics_tell_nothing_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [write_run(tmp_path / "my results", a) for a in ("er", "naive")]
    command = ["clbench", "train", "--yaml", "/home/me/a b/c.yaml", "dataset.data=/data sets/x", "and=/srv/data/y"]
    for path in runs:
        change(path, base=BASE | {"path": str(tmp_path / "bases/mine")}, command=command)
        (path / "log.jsonl").write_text("{\n{}\n")  # a note with its path
    monkeypatch.setattr("sys.argv", ["/opt/bin/clbench", "report", *map(str, runs), f"--out={tmp_path}/out"])
    for out in (None, tmp_path / "out"):
        index = build_report(runs, out, bootstrap=0)
        for file in ("index.html", "metrics.json", "table.md", "table.tex"):
            text = (index.parent / file).read_text()
            for place in (str(tmp_path), "my results", "/home", "/data sets", "/srv", "/somewhere", "/opt"):
                assert place not in text, (file, place)
        data = json.loads((index.parent / "metrics.json").read_text())
        assert data["runs"]["er_s0"]["path"] == ("er_s0" if out else "../../er_s0")
    page = index.read_text()
    assert "clbench report er_s0 naive_s0 --out=out" in page and "mine" in page and "c.yaml" in page
    assert "log.jsonl" in page


@pytest.mark.usefixtures("no_pictures")
def test_a_run_on_lora_has_a_row_of_its_own(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, seed=s) for s in (0, 1, 2, 3)]
    for folder, lora in zip(runs, ({}, {"enabled": False}, {"enabled": True}, {"enabled": True}), strict=True):
        manifest = json.loads((folder / "manifest.json").read_text()) | {"lora": lora}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    index = build_report(runs, bootstrap=0)
    assert "not averaged" not in index.read_text()
    table = table_lines(index)
    assert [[c.strip() for c in r.split("|")[1:3]] for r in table[2:]] == [["er", "2"], ["er on LoRA", "2"]]
    assert "er on LoRA" in (index.parent / "table.tex").read_text()


def test_one_task_and_a_joint_run_alone(tmp_path: Path) -> None:
    build_report([write_run(tmp_path, tasks=["only"])])
    page = build_report([write_run(tmp_path, "multitask", mode="multitask")]).read_text()
    assert "trained on all tasks at once" in page


def test_unfinished_repeated_and_independent_runs(tmp_path: Path) -> None:
    path = write_run(tmp_path, tasks=["a", "b", "a"])
    matrix = json.loads((path / "eval/matrix.json").read_text())
    for success in (matrix["success"][:2], [[None] * 3] * 3):
        matrix |= {"success": success, "episodes": matrix["episodes"][: len(success)]}
        (path / "eval/matrix.json").write_text(json.dumps(matrix))
        assert "missing: " in build_report([path]).read_text()
        matrix["episodes"] = [[0] * 3] * 3
    single = write_run(tmp_path, "singletask", mode="singletask", tasks=["a", "b", "a"])
    assert "independent policy" in build_report([single]).read_text()
    build_report([path, single], bootstrap=0)


def test_cli(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "results")
    write_run(tmp_path / "results", "naive")
    monkeypatch.setenv("CLBENCH_RESULTS_ROOT", str(tmp_path / "results"))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert (
        run(parser.parse_args(["er_s0", str(tmp_path / "results/naive_s0"), "--name", "my cmp", "--bootstrap", "20"]))
        == 0
    )
    index = Path(capsys.readouterr().out.strip())
    assert index.parent.parent == tmp_path / "results/reports" and index.parent.name.startswith("my_cmp-")


def test_what_was_privileged_stands_in_every_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    seen: list[str] = []
    draw = Figure.savefig

    def looking(fig: Figure, *args: Any, **kwargs: Any) -> None:
        seen.append(fig.get_suptitle())
        draw(fig, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", looking)
    path = write_run(tmp_path, "clare", routing=True)
    build_report([path], out=tmp_path / "plain")
    assert seen and not any("privileged" in title for title in seen)
    plain = len(seen)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "privileged": "object poses"}))
    build_report([path], out=tmp_path / "labelled")
    assert len(seen) == 2 * plain
    assert all("privileged observations: object poses" in title for title in seen[plain:])
    data = json.loads((tmp_path / "labelled/metrics.json").read_text())
    assert data["about"]["privileged"] == "object poses" and data["about"]["algorithm"] == "clare"
    other = write_run(tmp_path, "er")
    build_report([path, other], out=tmp_path / "several", bootstrap=0)
    data = json.loads((tmp_path / "several/metrics.json").read_text())
    assert data["runs"][path.name]["about"]["privileged"] == "object poses"
    assert [g["notes"] for g in data["groups"]] == [["privileged observations: object poses"], []]


@pytest.mark.usefixtures("no_pictures")
def test_a_report_of_validation_episodes_is_apart_and_says_so(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, a) for a in ("er", "naive")]
    with pytest.raises(UserError, match=r"no validation episodes: evaluate it with -- eval\.split=validation"):
        build_report(runs, split="validation")
    for path in runs:
        shutil.copytree(path / "eval", tmp_path / "other")
        matrix = json.loads((path / "eval/matrix.json").read_text()) | {"split": "validation"}
        (tmp_path / "other/matrix.json").write_text(json.dumps(matrix))
        (tmp_path / "other").rename(path / "eval/validation")
        shutil.copytree(path / "eval/validation", path / "eval/validation/views/task_id")
    plain = build_report(runs, bootstrap=0)
    assert "validation episodes" not in plain.read_text()
    index = build_report(runs, bootstrap=0, split="validation")
    assert index == plain.parent / "validation/index.html"
    page = index.read_text()
    assert "· validation episodes ·" in page and "seed 0" in page and "er (task id)" in page
    assert "validation episodes" in (index.parent / "table.md").read_text()
    data = json.loads((index.parent / "metrics.json").read_text())
    assert data["runs"]["er_s0"]["about"]["split"] == "validation"
    assert data["groups"][0]["notes"] == ["validation episodes"]
    test, validation = load_record(runs[0]), load_record(write_run(tmp_path, "multitask", mode="multitask"))
    validation.split = "validation"
    with pytest.raises(UserError, match="it has validation episodes, and this run test ones"):
        compute_metrics(test, joint=validation)
    (runs[0] / "eval/matrix.json").write_text(json.dumps(matrix | {"split": "train"}))
    with pytest.raises(UserError, match='"split"'):
        load_record(runs[0])


def test_texts() -> None:
    assert [count_text(x) for x in (None, 0, 999, 1234, 1_234_567)] == ["–", "0", "999", "1.23 k", "1.23 M"]
    assert [bytes_text(x) for x in (None, 0, 12, 12_345_678)] == ["–", "0", "12 B", "12.3 MB"]
    assert escape_latex("a_b ± 5%") == r"a\_b $\pm$ 5\%"
    head = ["algorithm", "seeds", *["m"] * 11]
    assert "xelatex" in to_latex(head, [["клэр", *["1"] * 12]])
    assert "xelatex" not in to_latex(head, [["é", *["±"] * 12]])


def test_what_rows_differ_in_beyond_their_method_is_said(tmp_path: Path) -> None:
    """Steps, phases and settings, under every table; joint training aside. Nothing is said where nothing differs."""
    runs = [write_run(tmp_path, name) for name in ("seqfft", "clare", "packnet", "multitask")]
    for path in runs:
        (path / "config.yaml").write_text(CONFIG.replace("lr: 1e-3", "lr: 3e-4") if "clare" in path.name else CONFIG)
        change(path, base=BASE)
    change(runs[2], algorithm_config={"eval_with_task_id": True})
    change(runs[3], mode="multitask")
    more = {
        "clare": [("batch", "detect", 49), ("step", "discriminators", 399)],
        "packnet": [("step", "train", 299), ("step", "retrain", 149)],
    }
    for name, rows in more.items():
        with (tmp_path / f"{name}_s0" / "log.jsonl").open("a") as f:
            for event, phase, step in rows:
                f.write(json.dumps({"event": event, "k": 1, "phase": phase, "step": step, "loss": 0.1}) + "\n")
    joint = read_record(runs[3])
    joint["success"], joint["episodes"] = joint["success"][:1], joint["episodes"][:1]
    (runs[3] / "eval/matrix.json").write_text(json.dumps(joint))
    groups, _ = group_runs(load_runs(runs, bootstrap=0))
    said = beyond_the_method(groups)
    steps = {g.label: g.runs[0].phases["train"][0] for g in groups}
    assert said == (
        f"Beyond the method, rows differ in training per task (seqfft: {steps['seqfft']} steps; clare: "
        f"{steps['clare']} steps, 50 detect batches, 400 discriminators steps; packnet (task id): 300 steps, "
        "150 retrain steps); in the task's identity at test time (given to packnet (task id)); in settings: "
        "train.optimizer.lr (0.001, 0.0003)."
    )
    page = build_report(runs, tmp_path / "report", bootstrap=0)
    assert "400 discriminators steps" in page.read_text() and "400 discriminators steps" in (
        tmp_path / "report/table.md"
    ).read_text()
    seqfft = [write_run(tmp_path / "more", name) for name in ("seqfft", "ewc")]
    assert beyond_the_method(group_runs(load_runs(seqfft, bootstrap=0))[0]) == ""


def read_record(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "eval/matrix.json").read_text())
    return found


def test_joint_training_on_the_first_tasks_is_a_reference_and_no_row(
    tmp_path: Path, no_pictures: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """For each k the run on tasks 0…k; by `--joint` the same number. One that lacks leaves the metric missing."""
    sequential = write_run(tmp_path, "seqfft")
    joint = []
    for k in range(1, len(TASKS) + 1):
        run = write_run(tmp_path / str(k), "multitask", tasks=TASKS[:k], mode="multitask", episodes=10 + k)
        joint.append(run.rename(tmp_path / f"multitask_first{k}_s0"))
    r = read_record(sequential)["success"]
    last = [read_record(run)["success"][0][-1] for run in joint]  # on task k-1 of the run on k tasks
    want = np.mean([last[k] - r[k][k] for k in range(len(TASKS))])
    found = load_runs([sequential, *joint], bootstrap=50)
    assert [run.name for run in found] == ["seqfft_s0", f"multitask_first{len(TASKS)}_s0"]
    measured = found[0].metrics["intransigence_prefixes"]
    assert measured["value"] == pytest.approx(want) and measured["low"] < want < measured["high"]
    assert "intransigence_prefixes" in found[0].draws
    assert any("multitask_first1_s0, multitask_first2_s0" in note for note in found[0].notes)
    flags = [flag for run in joint for flag in ("--joint", str(run))]
    assert main(["metrics", str(sequential), "--json", "--bootstrap", "0", *flags]) == 0
    printed = json.loads(capsys.readouterr().out)["metrics"]
    assert printed["intransigence_prefixes"]["value"] == pytest.approx(want)
    assert main(["metrics", str(sequential), "--json", "--bootstrap", "0", *flags[2:]]) == 0
    printed = json.loads(capsys.readouterr().out)["metrics"]
    assert "here on task 0 alone" in printed["intransigence_prefixes"]["missing"]
    assert printed["intransigence"]["value"] is not None
    assert main(["metrics", str(sequential), *flags, "--joint", str(joint[-1])]) == 2
    assert "several of the runs that --joint names are on all tasks" in capsys.readouterr().err
    page = build_report([sequential, *joint], tmp_path / "report", bootstrap=0).read_text()
    assert "multitask_first1_s0" in page and "<th>multitask" in page
