"""Learning curves: what is kept within a task, that training does not notice, and what is played of it."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clbench import cli, sweep
from clbench.checkpoints.kept import curve_points, kept_folder, kept_steps, read_points
from clbench.checkpoints.run_folder import checkpoint_folder
from clbench.config.compose import to_dict
from clbench.config.schema import Config
from clbench.errors import Interrupted, UserError
from clbench.evaluation.curves import evaluate_step, play_curves
from clbench.evaluation.evaluate import evaluate, run_config
from clbench.evaluation.records import CellFile
from clbench.evaluation.rows import Weights
from clbench.evaluation.seeds import RULE, EpisodeSeeds
from clbench.evaluation.worker import Job, Settings, play
from clbench.io import read_json
from clbench.metrics import compute_metrics
from clbench.metrics.record import Curve, load_record
from clbench.rollout.rollout import SimulatorPool
from clbench.stopping import Stop
from clbench.testing import files, toy_config
from clbench.testing.toy import STREAM
from clbench.training.trainer import train

QUICK = ("train.steps=6", "eval.episodes=2", "train.eval_during_training=3")


@pytest.mark.parametrize(
    ("steps", "parts", "every", "points"),
    [
        (300, 10, None, [0, 30, 60, 90, 120, 150, 180, 210, 240, 270, 300]),
        (25, 10, None, [0, 3, 5, 8, 10, 13, 15, 18, 20, 23, 25]),  # halves are rounded up
        (3, 3, None, [0, 1, 2, 3]),
        (7, 1, None, [0, 7]),
        (10, None, 4, [0, 4, 8, 10]),
        (8, None, 4, [0, 4, 8]),
        (3, None, 4, [0, 3]),
        (300, 10, 7, [0, 30, 60, 90, 120, 150, 180, 210, 240, 270, 300]),  # both: the curve has the equal parts
    ],
)
def test_points(steps: int, parts: int | None, every: int | None, points: list[int]) -> None:
    assert curve_points(steps, parts, every) == points


@pytest.fixture(scope="module")
def run(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that kept its weights: its curves are not played yet."""
    out = tmp_path_factory.mktemp("curves")
    config = toy_config(toy_data, {"name": "seqfft"}, f"output_dir={out}", *QUICK, "train.keep_weights_every_steps=4")
    return train(config, "r", play_curves=False)


@pytest.fixture(scope="module")
def played(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with its curves played."""
    folder, config = copied(run, tmp_path_factory.mktemp("played"))
    states = play_curves(folder, config, Stop(), progress=False)
    assert [(s.k, s.points, s.played, s.absent) for s in states] == [(k, 4, 4, ()) for k in range(3)]
    return folder


def copied(run: Path, to: Path) -> tuple[Path, Config]:
    folder = Path(shutil.copytree(run, to / run.name))
    return folder, run_config(folder)


def test_training_does_not_notice(run: Path, toy_data: Path, tmp_path: Path) -> None:
    """The same bytes as without; the first two thirds of each task are kept for its curve, step 4 for good."""
    plain = train(toy_config(toy_data, {"name": "seqfft"}, f"output_dir={tmp_path}", "train.steps=6"), "r")
    assert files(run / "checkpoints") == files(plain / "checkpoints")
    assert not (plain / "weights").exists()
    assert all(read_points(run, k) == [0, 2, 4, 6] and kept_steps(run, k) == [2, 4] for k in range(3))


def test_a_run_that_was_stopped_keeps_the_same(
    run: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped again and again; what a session kept beyond its state is made again."""
    count = iter(range(1000))
    monkeypatch.setattr(Stop, "reason", property(lambda self: "a test" if next(count) % 8 == 7 else ""))
    settings = (f"output_dir={tmp_path}", *QUICK, "train.keep_weights_every_steps=4")
    config, stopped = toy_config(toy_data, {"name": "seqfft"}, *settings), 0
    while True:
        try:
            train(config, "r", resume=True, play_curves=False)
            break
        except Interrupted:
            stopped += 1
            later = kept_folder(tmp_path / "r", 2, 5)  # no session gets there before it is removed
            if stopped == 1:
                shutil.copytree(kept_folder(run, 2, 4), later)
    assert stopped > 1 and not later.exists()
    assert files(run / "weights") == files(tmp_path / "r" / "weights")


def test_what_is_trained_again_without_keeping_leaves_no_weights_of_before(
    run: Path, toy_data: Path, tmp_path: Path
) -> None:
    """A curve must not join weights of an earlier session with checkpoints of one that had other settings."""
    folder, _ = copied(run, tmp_path)
    for k in (1, 2):
        shutil.rmtree(checkpoint_folder(folder, k))
    other = (f"output_dir={tmp_path}", "train.steps=6", "train.optimizer.lr=1e-2")
    train(toy_config(toy_data, {"name": "seqfft"}, *other), "r", resume=True, allow_change=["train.optimizer.lr"])
    assert kept_steps(folder, 0) == [2, 4]
    assert [(kept_steps(folder, k), read_points(folder, k)) for k in (1, 2)] == [([], None)] * 2


def outcomes(folder: Path, name: str, row: int, j: int, split: str) -> list[dict[str, Any]]:
    seeds = EpisodeSeeds(RULE, split, 0, STREAM[j])
    rows = CellFile(folder / "eval" / name, row, j, seeds).rows
    return [{key: v for key, v in rows[e].items() if key not in ("k", "seconds")} for e in sorted(rows)]


def test_curves_are_played_from_what_was_kept(
    played: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, config = copied(played, tmp_path)
    assert all(kept_steps(folder, k) == [4] for k in range(3))  # step 2 was for the curve alone
    for k in range(3):
        curve = read_json(folder / f"eval/curves/k{k:02d}.json")
        points = [outcomes(folder, f"curves/task_{k:02d}", r, k, "validation") for r in range(4)]
        assert [len(rows) for rows in points] == curve["episodes"] == [2, 2, 2, 2]
        assert curve["success"] == [np.mean([row["success_once"] for row in rows]) for rows in points]
        assert curve["steps"] == [0, 2, 4, 6] and curve["fractions"] == [0, 1 / 3, 2 / 3, 1]
        assert curve["split"] == "validation" and curve["task"] == STREAM[k]
    # Point 0 of a task is the checkpoint before it, point 3 its own, points between what was kept: episode by episode.
    evaluate(folder, replace(config, eval=replace(config.eval, split="validation")), progress=False)
    for k in range(3):
        name = f"curves/task_{k:02d}"
        for row, checkpoint in ((0, k - 1), (3, k)):
            if checkpoint >= 0:
                there = outcomes(folder, "validation", checkpoint, k, "validation")
                assert outcomes(folder, name, row, k, "validation") == there
        returns = [tuple(e["return"] for e in outcomes(folder, name, row, k, "validation")) for row in range(4)]
        assert len(set(returns)) == 4  # four different policies
    states = play_curves(folder, config, Stop(), progress=False)  # nothing is left to play
    assert all(s.played == s.points for s in states)
    capsys.readouterr()
    assert cli.main(["eval", "--run-id", str(folder), "--curves", "--", "log.progress=quiet"]) == 0
    said = capsys.readouterr()
    assert "task 1 hammer-v3: 4 of 4 points" in said.out and "evaluating" not in said.err


def test_weights_within_a_task_are_played_as_they_are(played: Path) -> None:
    """The record of a point is that of an episode played with the kept policy by hand."""
    folder, config = played, run_config(played)
    column = read_json(folder / "manifest.json")["visits"][1]
    seed = EpisodeSeeds(RULE, "validation", 0, column["task"]).of(1)
    env = {n: v for n, v in column["env"].items() if n != "max_steps"}
    episode = {"j": 1, "task_id": 1, "episode": 1, "seed": seed, "env": env, "instruction": column["instruction"],
               "max_steps": column["env"]["max_steps"]}  # fmt: skip
    policy = Weights(str(kept_folder(folder, 1, 4) / "policy"))  # without its algorithm
    pool = SimulatorPool(max_idle=4)
    (record,) = play(Job(2, policy, (episode,)), Settings(config, 4, 10, "cpu", 1), pool)
    pool.close()
    got = {k: v for k, v in record.items() if k not in ("k", "seconds")}
    assert got == outcomes(folder, "curves/task_01", 2, 1, "validation")[1]


def test_one_step_of_every_task_as_a_matrix(run: Path, tmp_path: Path) -> None:
    folder, config = copied(run, tmp_path)
    matrix, path = evaluate_step(folder, config, 4, Stop(), progress=False)
    assert path == folder / "eval/steps/step_000004/matrix.json" and np.shape(matrix["success"]) == (3, 3)
    assert load_record(path.parent).manifest["run_id"] == "r"
    evaluate_step(folder, config, 6, Stop(), progress=False)  # all steps: the checkpoints
    evaluate(folder, config, progress=False)
    for k in range(3):
        for j in range(3):
            assert outcomes(folder, "steps/step_000006", k, j, "test") == outcomes(folder, "", k, j, "test")
    with pytest.raises(UserError, match="no weights of step 3 of task 1; it has: 2, 4, 6"):
        evaluate_step(folder, config, 3, Stop(), progress=False)


def test_points_whose_weights_are_gone_are_named(played: Path, tmp_path: Path) -> None:
    folder, config = copied(played, tmp_path)
    (folder / "eval/curves/k01.json").unlink()
    (folder / "eval/curves/task_01/cells/k01_j01.jsonl").unlink()  # and of step 2 the weights are removed
    (state,) = [s for s in play_curves(folder, config, Stop(), progress=False) if s.played < s.points]
    assert (state.k, state.played, state.absent) == (1, 3, (2,))
    assert not (folder / "eval/curves/k01.json").exists()
    missing = compute_metrics(load_matrix(folder, config))["fwt_libero"]["missing"]
    assert missing == "the curve of task k=1 was not measured"
    damaged = kept_folder(folder, 2, 4) / "policy" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    shutil.rmtree(folder / "eval/curves/task_02")
    with pytest.raises(UserError, match="step_000004 is damaged"):
        play_curves(folder, config, Stop(), progress=False)


def load_matrix(folder: Path, config: Config) -> Any:
    """The run's record, with a matrix that was not played."""
    tasks = list(STREAM)
    text = {"tasks": tasks, "success": [[0.5] * 3] * 3, "split": "test"}
    (folder / "eval").mkdir(exist_ok=True)
    (folder / "eval/matrix.json").write_text(json.dumps(text))
    return load_record(folder)


def test_other_weights_do_not_mix_with_a_curve(played: Path, tmp_path: Path) -> None:
    folder, config = copied(played, tmp_path)
    more = replace(config, eval=replace(config.eval, episodes=3))
    shutil.rmtree(kept_folder(folder, 0, 4))
    shutil.copytree(kept_folder(folder, 1, 4), kept_folder(folder, 0, 4))
    with pytest.raises(UserError, match="holds episodes of other settings or weights"):
        play_curves(folder, more, Stop(), progress=False)


def test_metrics_appear_with_what_they_are_made_of(played: Path, tmp_path: Path) -> None:
    """Three parts are not LIBERO's ten; the split is said; ft_cw has an interval, maxima of noisy points have none."""
    folder, config = copied(played, tmp_path)
    record = load_matrix(folder, config)
    assert "11 equal steps" in compute_metrics(record)["fwt_libero"]["missing"]
    assert record.notes == ["learning curves are of validation episodes (eval.curve_split)"]
    rng, steps = np.random.default_rng(0), np.linspace(0, 1, 11)

    def measured() -> dict[int, Curve]:
        each = [[{s: float(rng.random() < 0.6) for s in range(20)} for _ in steps] for _ in range(3)]
        return {k: Curve(steps, np.array([np.mean(list(o.values())) for o in p]), p) for k, p in enumerate(each)}

    record.curves = measured()
    single = replace(record, mode="singletask", curves=measured())
    metrics = compute_metrics(record, single=single)
    assert metrics["ft_cw"]["low"] < metrics["ft_cw"]["value"] < metrics["ft_cw"]["high"]
    for name in ("fwt_libero", "auc_libero"):
        assert metrics[name]["value"] is not None and metrics[name]["low"] is None
        assert "maximum of noisy rates" in metrics[name]["no_interval"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.eval_during_training=0"], "train.eval_during_training must be at least 1 (or null) but is 0"),
        (["train.keep_weights_every_steps=0"], "train.keep_weights_every_steps must be at least 1 (or null) but is 0"),
        (["train.eval_during_training=5", "train.steps=4"], "(5) divides a task's steps, but train.steps is 4"),
        (["eval.curve_split=train"], "eval.curve_split is 'train'"),
        (["dataset.env=null", "train.eval_during_training=2"], "the stream has no simulator"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(toy_data: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as e:
        toy_config(toy_data, {"name": "seqfft"}, *overrides)
    assert message in str(e.value)


def test_what_has_no_curve_is_refused(run: Path, toy_data: Path, tmp_path: Path) -> None:
    folder, _ = copied(run, tmp_path)
    shutil.rmtree(folder / "weights")
    text = (folder / "config.yaml").read_text().replace("eval_during_training: 3", "eval_during_training: null")
    (folder / "config.yaml").write_text(text)
    for arguments, message in (
        (["--curves"], "kept no weights within its tasks"),
        (["--step", "4"], "has no weights of step 4 of task 1; it has: none"),
        (["--follow"], "--follow belongs to --curves"),
        (["--curves", "--rows", "0"], "three kinds of evaluation"),
    ):
        with redirect_stderr(io.StringIO()) as said:
            assert cli.main(["eval", "--run-id", str(folder), *arguments]) == 2
        assert message in said.getvalue()


def test_joint_training_has_no_curve(toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = toy_config(toy_data, {"name": "multitask"}, f"output_dir={tmp_path}", *QUICK)
    folder = train(config, "joint")
    assert "joint training has no learning curves of tasks" in capsys.readouterr().err
    assert not (folder / "weights").exists() and not (folder / "curves.log").exists()


def test_sweeps_leave_curves_to_the_evaluation(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("dataset: metaworld_quick\nalgorithms: [seqfft]\noverrides: [train.eval_during_training=2]\n")
    experiment, runs = sweep.load_experiment(str(file))
    assert "--curves-later" in runs[0].train
    graph = sweep.units(experiment, runs, tmp_path, (), "mine")
    assert [u.arguments for u in graph if u.kind == "evaluate"] == [("eval", "--run-id", "mine_seqfft_s0")]
    file.write_text("dataset: metaworld_quick\nalgorithms: [seqfft]\n")
    assert "--curves-later" not in sweep.load_experiment(str(file))[1][0].train


def test_a_sweep_of_joint_training_on_first_tasks(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("dataset: metaworld_quick\nalgorithms: [seqfft, {algo: multitask, prefixes: true}]\n")
    _, runs = sweep.load_experiment(str(file))
    tasks = runs[0].config.dataset.tasks
    assert [r.run_id.removeprefix("mine_") for r in runs] == [
        "seqfft_s0", "multitask_s0", *(f"multitask_first{k}_s0" for k in range(1, len(tasks))),
    ]  # fmt: skip
    assert [to_dict(r.config)["dataset"]["task_order"] for r in runs[2:]] == [tasks[:k] for k in range(1, len(tasks))]


@pytest.mark.slow
def test_they_are_played_beside_the_training(toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One command trains and plays; killed at the end of a task, it goes on with the rest."""
    monkeypatch.setenv("CLBENCH_RESULTS_ROOT", str(tmp_path))
    config = toy_config(toy_data, {"name": "er"}, f"output_dir={tmp_path}", *QUICK)
    count = iter(range(1000))
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "reason", property(lambda self: "a test" if next(count) == 8 else ""))
        with pytest.raises(Interrupted):
            train(config, "r")
    folder = train(config, "r", resume=True)
    curves = [read_json(folder / f"eval/curves/k{k:02d}.json") for k in range(3)]
    assert [c["steps"] for c in curves] == [[0, 2, 4, 6]] * 3 and all(kept_steps(folder, k) == [] for k in range(3))
    assert "12 of 12 points of 3 tasks are measured" in (folder / "curves.log").read_text()
    plain = train(toy_config(toy_data, {"name": "er"}, f"output_dir={tmp_path / 'p'}", "train.steps=6"), "r")
    assert files(checkpoint_folder(plain, 2)) == files(checkpoint_folder(folder, 2))
    shutil.rmtree(folder / "eval")
    with pytest.raises(UserError, match="its learning curves are not"):  # the weights of its points are gone
        train(config, "r", resume=True)
