"""The scripts as a user runs them: the pipeline with --smoke, help, arguments, and the README's example."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from clbench.envs.rendering import libraries
from clbench.io import read_json
from clbench.registry import ALGORITHMS
from clbench.testing.toy import toy_config
from tests.readme import example

ROOT = Path(__file__).parent.parent


def script(name: str, *arguments: str, folders: Path, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "CLBENCH_DATA_ROOT": str(folders / "data"),
        "CLBENCH_RESULTS_ROOT": str(folders / "results"),
        "CLBENCH_CACHE_ROOT": str(folders / "cache"),
    }
    command = [str(ROOT / "scripts" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout, check=False)


def succeeded(run: subprocess.CompletedProcess[str]) -> str:
    assert run.returncode == 0, f"{run.args}\n{run.stdout[-3000:]}\n{run.stderr[-3000:]}"
    return run.stdout


def test_the_whole_pipeline_through_the_scripts(tmp_path: Path) -> None:
    """Real demonstrations, base, a run, its matrix in the simulator, metrics, report."""
    from clbench.cli import main

    few = [f"{part}.make.{key}" for part in ("dataset", "dataset.pretrain")
           for key in ("demos_per_task=2", "ceiling_episodes=1")]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLBENCH_DATA_ROOT", str(tmp_path / "data"))
        patch.setenv("CLBENCH_RESULTS_ROOT", str(tmp_path / "results"))
        patch.setenv("CLBENCH_CACHE_ROOT", str(tmp_path / "cache"))
        assert main(["data", "make", "metaworld_quick", "--", *few, "log.progress=quiet"]) == 0

        smoke = ("--smoke", "--model", "dit_encdec_tiny", "--dataset", "metaworld_quick")
        common = (*smoke, "--algo", "clare", "--run-id", "clare", "--", "--train.steps=3", "--pretrain.steps=5")
        succeeded(script("run_cl_train.sh", *common, folders=tmp_path))
        played = ("--trials", "1", "--workers", "1")
        assert "matrix:" in succeeded(script("run_cl_eval.sh", "--run-id", "clare", *played, folders=tmp_path))
        run = tmp_path / "results" / "clare"
        matrix = read_json(run / "eval" / "matrix.json")
        assert len(matrix["success"]) == 4 and all(v is not None for row in matrix["success"] for v in row)
        cell = (run / "eval" / "cells" / "k03_j00.jsonl").read_text()
        assert "routing" in json.loads(cell)

        printed = succeeded(script("compute_cl_matrix_metrics.py", str(run), "--json", folders=tmp_path))
        metrics = json.loads(printed)["metrics"]
        assert 0 <= metrics["auc_clare"]["value"] <= 1 and "missing" in metrics["fwt_gem"]

        assert main(["report", str(run)]) == 0
        assert "clare" in (run / "report" / "index.html").read_text()

        again = script(
            "run_cl_train.sh",
            *("--smoke", "--model", "dit_encdec_tiny", "--algo", "clare", "--run-id", "clare"),
            folders=tmp_path,
        )
        assert again.returncode == 2 and "exists already" in again.stderr and "Traceback" not in again.stderr


@pytest.mark.parametrize("name", ["run_cl_train.sh", "run_cl_eval.sh", "quickstart.sh", "test.sh"])
def test_help_lists_every_flag(name: str, tmp_path: Path) -> None:
    out = succeeded(script(name, "-h", folders=tmp_path))
    assert name in out or "scripts/" in out
    command = {"run_cl_train.sh": "train", "run_cl_eval.sh": "eval"}.get(name)
    if command:
        from clbench.cli import parser

        sub = next(a for a in parser()._actions if a.dest == "command")
        flags = {o for a in sub.choices[command]._actions for o in a.option_strings if o.startswith("--")}  # type: ignore[index]
        assert [f for f in sorted(flags) if f not in out] == []


def test_quickstart_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    run = script("quickstart.sh", "--fast", folders=tmp_path)
    assert run.returncode == 2 and "unknown argument '--fast'" in run.stderr


@pytest.mark.slow  # makes twelve tasks' demonstrations on camera images
@pytest.mark.skipif(not libraries(), reason="nothing can draw here: neither EGL nor OSMesa is installed")
def test_the_quickstart_on_camera_images_runs(tmp_path: Path) -> None:
    succeeded(script("quickstart.sh", "--pixels", "--smoke", folders=tmp_path))
    for algorithm in ("seqfft", "er", "clare"):
        run = tmp_path / "results" / f"quickstart_pixels_smoke_{algorithm}_s0"
        assert len(read_json(run / "eval" / "matrix.json")["success"]) == 4
        assert (run / "mean_images.safetensors").is_file()


def test_the_readmes_algorithm_works(toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code block of the README is run as it stands there."""
    from clbench.io import read_jsonl
    from clbench.training.trainer import train

    example()
    monkeypatch.setitem(ALGORITHMS, "l2anchor", "readme_example:L2Anchor")
    strong = train(toy_config(toy_data, {"name": "l2anchor", "strength": 10.0}, f"output_dir={tmp_path}"), "strong")
    weak = train(toy_config(toy_data, {"name": "l2anchor", "strength": 0.0}, f"output_dir={tmp_path}"), "weak")

    def drift(folder: Path) -> float:
        from safetensors.torch import load_file

        a, b = (load_file(folder / "checkpoints" / f"task_{k:02d}" / "policy" / "model.safetensors") for k in (0, 2))
        return float(sum((a[n] - b[n]).square().sum() for n in a))

    assert 0 < drift(strong) < drift(weak)
    rows = [r for r in read_jsonl(strong / "log.jsonl") if r["event"] == "step" and r["k"] == 2]
    assert all(r["loss/l2anchor"] >= 0 for r in rows) and rows[-1]["loss/l2anchor"] > 0
