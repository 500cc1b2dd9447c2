"""Evaluation without a simulator: held-out episodes, errors by hand, signs of metrics, intervals, resuming."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from clbench import cli
from clbench.config.compose import compose, read_config
from clbench.config.schema import Config
from clbench.data.frames import StreamFrames
from clbench.errors import Interrupted, UserError
from clbench.evaluation import offline
from clbench.evaluation.evaluate import evaluate
from clbench.evaluation.offline import action_scale, held_out_episodes, measure
from clbench.evaluation.records import OFFLINE
from clbench.io import read_json, read_jsonl
from clbench.metrics import Record, compare, compute_metrics, load_record
from clbench.metrics.compute import _student
from clbench.rollout.actors import PolicyActor
from clbench.streams.stream import build_stream, stream_tasks
from clbench.sweep import load_experiment, units
from clbench.testing import toy_config
from clbench.training.trainer import train
from tests import tiny_policies
from tests.algorithm_cases import SMALL_CLARE
from tests.lab_sets import lab_config, make_lab_set

LEFT = ["left"] * 5 + ["right"] * 12


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lab")
    make_lab_set(root / "one", LEFT)
    make_lab_set(root / "two", ["lift", "press"] * 4)
    return root


def lab_run(lab: Path, out: Path, algorithm: str = "seqfft", *overrides: str) -> Config:
    path = out / "lab.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    mapping = lab_config(lab / "one", lab / "two", partition="by_dataset", holdout=0.25)
    path.write_text(json.dumps(mapping))
    own = compose(model="dit_dec_tiny", algorithms=["seqfft"], dataset=str(path), registered=["seqfft"])[0]
    config = toy_config(out, {"name": algorithm}, f"output_dir={out}", "eval.episodes=20", *overrides)
    config.dataset = own.dataset
    return config


# ------------------------------------------------------------------------------------------------ what is held out


@pytest.mark.parametrize(("share", "counts"), [(0.1, [2, 2]), (0.25, [2, 3]), (0.5, [2, 6])])
def test_a_share_of_every_task_is_held_out(lab: Path, share: float, counts: list[int]) -> None:
    path = lab / f"share{share}.yaml"
    path.write_text(json.dumps(lab_config(lab / "one", holdout=share)))
    config = compose(model="dit_dec_tiny", algorithms=["seqfft"], dataset=str(path), registered=["seqfft"])[0].dataset
    stream = build_stream(config)
    held = [{e for p in t.held_out for e in p.episodes} for t in stream.columns]
    assert [len(h) for h in held] == counts
    for task, episodes, every in zip(stream.columns, held, (set(range(5)), set(range(5, 17))), strict=True):
        assert episodes.isdisjoint(task.episodes) and episodes | set(task.episodes) == every
    learned = {e for v in stream.visits for p in v.tasks for e in p.episodes}
    assert learned.isdisjoint(set.union(*held))
    assert {e for p in stream_tasks(config)[0] for e in p.episodes} == learned  # of which statistics are made
    again, other = build_stream(config), config.holdout_seed
    assert again == stream
    config.holdout_seed = other + 1
    assert build_stream(config).columns != stream.columns


def test_streams_without_a_simulator_hold_out_a_tenth_unless_they_say_so(lab: Path, toy_data: Path) -> None:
    mapping = lab_config(lab / "one")
    del mapping["dataset"]["holdout"]
    (lab / "plain.yaml").write_text(json.dumps(mapping))
    made = compose(model="dit_dec_tiny", algorithms=["seqfft"], dataset=str(lab / "plain.yaml"), registered=["seqfft"])
    assert made[0].dataset.holdout == 0.1
    quick = compose(model="dit_dec_tiny", algorithms=["seqfft"], dataset="metaworld_quick", registered=["seqfft"])
    assert quick[0].dataset.holdout == 0.0
    make_lab_set(lab / "single", ["a", "b", "b"])
    (lab / "single.yaml").write_text(json.dumps(lab_config(lab / "single", holdout=0.1)))
    single = compose(model="dit_dec_tiny", algorithms=["seqfft"], dataset=str(lab / "single.yaml"), registered=[])[0]
    with pytest.raises(UserError, match=r"task 'a' has one episode.*dataset\.holdout=0"):
        build_stream(single.dataset)


# ------------------------------------------------------------------------------------------------ errors


class Zero(torch.nn.Module):
    """Predicts the action 0, two steps ahead; its loss is the mean of the first action's first dimension."""

    config = SimpleNamespace(action_delta_indices=[0, 1], observation_delta_indices=None, n_obs_steps=1, type="zero")

    def reset(self) -> None:
        pass

    def predict_action_chunk(self, batch: dict[str, Any]) -> torch.Tensor:
        assert "action" not in batch
        return torch.zeros(len(batch["observation.state"]), 2, 3)

    def forward(self, batch: dict[str, Any]) -> tuple[torch.Tensor, None]:
        return batch["action"][:, 0, 0].mean(), None


def zero() -> Any:
    policy = Zero()
    same = lambda x: x  # noqa: E731
    return PolicyActor(SimpleNamespace(policy=policy, preprocessor=same, postprocessor=same), 8)


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Episodes of three frames; the action of frame t in episode e is (t, 2 t, 5) + e."""
    root = tmp_path_factory.mktemp("counted") / "counted"
    return make_lab_set(
        root, ["a"] * 4 + ["b"] * 4, lengths=3, actions=lambda e, t: np.array([t + e, 2 * t + e, 5 + e], np.float32)
    )


def test_errors_by_hand(counted: Path) -> None:
    """Steps within the episode: a0 a1, a1 a2, a2: Σ of dimension 0 is 6, of five."""
    config = lab_config(counted, holdout=0.25)
    (counted.parent / "c.yaml").write_text(json.dumps(config))
    made = compose(model="dit_dec_tiny", algorithms=["seqfft"], dataset=str(counted.parent / "c.yaml"), registered=[])
    task = build_stream(made[0].dataset).columns[0]
    episode = next(p for p in [*task.pieces, *task.held_out] if 0 in p.episodes)
    frames = StreamFrames([(replace(episode, episodes=(0,)),)], Zero.config)  # type: ignore[arg-type]
    scale = np.array([2.0, 1.0, 1.0])
    found = measure(zero(), frames, 0, 1, scale, 1)
    assert found["dimensions"]["chunk_error"]["data"] == pytest.approx([1.2, 2.4, 5])
    assert found["dimensions"]["chunk_error"]["normalised"] == pytest.approx([0.6, 2.4, 5])
    assert found["dimensions"]["first_error"]["data"] == pytest.approx([1, 2, 5])
    assert found["chunk_error"] == pytest.approx(8 / 3) and found["first_error"] == pytest.approx(7.5 / 3)
    assert found["loss"] == pytest.approx(1.0) and found["frames"] == 3
    every_second = measure(zero(), frames, 0, 1, scale, 2)  # frames 0 and 2: a0 a1, a2
    assert every_second["dimensions"]["chunk_error"]["data"] == pytest.approx([1, 2, 5])
    assert every_second["frames"] == 2


def test_the_unit_is_the_spread_of_what_was_trained_on(tmp_path: Path) -> None:
    make_lab_set(tmp_path / "s", ["a"] * 3 + ["b"] * 3, lengths=2,
                 actions=lambda e, t: np.array([e, 10 * t, 7], np.float32))  # fmt: skip
    (tmp_path / "s.yaml").write_text(json.dumps(lab_config(tmp_path / "s", holdout=0.1)))
    made = compose(model="dit_dec_tiny", algorithms=["seqfft"], dataset=str(tmp_path / "s.yaml"), registered=[])
    stream = build_stream(made[0].dataset)
    trained = [e for t in stream.columns for e in t.episodes]
    assert len(trained) == 4
    assert action_scale(stream.columns) == pytest.approx([np.std(trained), 5, 1])


# ------------------------------------------------------------------------------------------------ metrics


def matrix(tmp_path: Path, **more: Any) -> Record:
    """By hand: task 0 goes 0.2, 0.4, 0.6, task 1 goes 0.1, 0.5, and task 2 is at 0.3."""
    path = tmp_path / "errors.json"
    errors = [[0.2, 0.9, 1.0], [0.4, 0.1, 0.8], [0.6, 0.5, 0.3]]
    path.write_text(json.dumps({"quantity": OFFLINE.name, "error": errors, "base": [1.0, 1.0, 3.0], **more}))
    return load_record(path)


HAND = {
    "auc_clare": (0.4 + 0.3 + 0.3) / 3,
    "fwt_clare": (0.2 + 0.1 + 0.3) / 3,
    "nbt_clare": ((0.2 + 0.4) / 2 + 0.4) / 2,
    "nbt_libero": 0.35 * 2 / 3,
    "asr": (0.6 + 0.5 + 0.3) / 3,
    "bwt_gem": -0.4,
    "nbt_final": 0.4,
    "forgetting": ((0.6 - 0.2) + (0.5 - 0.1)) / 2,
    "zero_shot": (0.9 + 1.0 + 0.8) / 3,
    "fwt_gem": ((1 - 0.9) + (3 - 0.8)) / 2,
}
BETTER = {"bwt_gem": "higher", "fwt_gem": "higher"}


def test_signs_and_directions_by_hand(tmp_path: Path) -> None:
    found = compute_metrics(matrix(tmp_path))
    assert {n: found[n]["value"] for n in HAND} == pytest.approx(HAND)
    for name, m in found.items():
        assert m["quantity"].startswith("offline action error") and m["unit"] == OFFLINE.unit
        if name in HAND:
            assert m["direction"] == f"{BETTER.get(name, 'lower')} is better", name
    assert found["nbt_clare"]["value"] > 0  # errors rise: forgetting
    assert "rates in [0, 1] alone" in found["ft_cw"]["missing"]
    assert "not evaluated before" not in str(found) and "success" not in json.dumps(found)
    joint = tmp_path / "joint.json"
    joint.write_text(json.dumps({"quantity": OFFLINE.name, "error": [[0.1, 0.1, 0.1]]}))
    with_joint = compute_metrics(matrix(tmp_path), joint=load_record(joint))
    assert with_joint["intransigence"]["value"] == pytest.approx(0.1)  # learned in turn: errors 0.1 higher
    with pytest.raises(UserError, match="an error is not 0"):
        compute_metrics(matrix(tmp_path), assume_zero_base=True)
    assert "clbench eval --base" in compute_metrics(matrix(tmp_path, base=None))["fwt_gem"]["missing"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quantity": "distance"}, "known: success rate, offline action error"),
        ({"error": [[-0.1]], "base": None}, "an error is not negative"),
        ({"error": [[0.1, 0.2], [0.1]], "base": None}, "ragged"),
        ({"criterion": "success_once"}, "known: chunk_error"),
    ],
)
def test_matrices_of_errors_that_cannot_be(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        matrix(tmp_path, **change)


def test_students_quantiles() -> None:
    for degrees, t in ((1, 12.7062), (2, 4.30265), (5, 2.57058), (30, 2.04227), (300, 1.96790)):
        assert _student(degrees) * 1.959964 == pytest.approx(t, rel=1e-3)
    assert _student(5000) == 1.0


@pytest.mark.parametrize("episodes", [2, 4, 12])
def test_intervals_hold_what_they_promise(episodes: int) -> None:
    """Errors of three tasks, skewed, with each episode's difficulty common to all checkpoints, as they are."""
    level = np.array([[0.3, 0.9, 0.9], [0.6, 0.3, 0.9], [0.7, 0.5, 0.3]])
    truth = compute_metrics(Record(list("abc"), level, [0, 1, 2], quantity=OFFLINE, criterion="chunk_error"))
    names, runs = ("auc_clare", "nbt_clare", "asr", "zero_shot"), 120
    inside = dict.fromkeys(names, 0)
    for run in range(runs):
        rng = np.random.default_rng([episodes, run])
        outcomes = {}
        for j in range(3):
            difficulty = rng.gamma(4, 1 / 4, episodes)  # of mean 1
            for k in range(3):
                own = rng.gamma(8, 1 / 8, episodes)
                outcomes[k, j] = {100 * j + i: float(level[k, j] * difficulty[i] * own[i]) for i in range(episodes)}
        means = np.array([[np.mean(list(outcomes[k, j].values())) for j in range(3)] for k in range(3)])
        record = Record(list("abc"), means, [0, 1, 2], outcomes=outcomes, quantity=OFFLINE, criterion="chunk_error",
                        source=Path(f"run{run}"))  # fmt: skip
        found = compute_metrics(record, bootstrap=200, seed=run)
        for name in names:
            inside[name] += found[name]["low"] <= truth[name]["value"] <= found[name]["high"]
    for name in names:
        assert 0.88 <= inside[name] / runs <= 1.0, (name, inside[name] / runs)


# ------------------------------------------------------------------------------------------------ end to end


@pytest.fixture(scope="module")
def runs(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trained runs on the same sets: seqfft and er, evaluated."""
    out = tmp_path_factory.mktemp("runs")
    for name in ("seqfft", "er"):
        config = lab_run(lab, out, name, "train.steps=30", "eval.base_row=true")
        evaluate(train(config, name), config, progress=False)
    return out


def without_times(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.json*")):
        rows = read_jsonl(path) if path.suffix == ".jsonl" else [read_json(path)]
        if path.name != "summary.json":
            found[str(path.relative_to(folder))] = [{k: v for k, v in r.items() if k != "seconds"} for r in rows]
    return found


def test_a_run_is_evaluated_and_reported(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs / "seqfft"
    manifest = read_json(folder / "manifest.json")
    held = [[e for p in v["held_out"] for e in p["episodes"]] for v in manifest["visits"]]
    assert [len(h) for h in held] == [5, 2]
    matrix = read_json(folder / "eval" / "matrix.json")
    assert (matrix["quantity"], matrix["direction"]) == ("offline action error", "lower is better")
    rows = read_jsonl(folder / "eval" / "cells" / "k01_j00.jsonl")
    assert [r["data_episode"] for r in rows] == held[0]
    assert matrix["error"][1][0] == pytest.approx(np.mean([r["chunk_error"] for r in rows]))
    assert matrix["others"]["loss"][1][0] == pytest.approx(np.mean([r["loss"] for r in rows]))
    each = np.mean([r["dimensions"]["first_error"]["data"] for r in rows], axis=0)
    assert matrix["dimensions"]["first_error"]["data"][1][0] == pytest.approx(each.tolist())
    assert matrix["base"] is not None and matrix["error"][0][0] < matrix["base"][0]
    assert cli.main(["metrics", str(folder), "--json"]) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed)
    assert found["about"]["direction"] == "lower is better" and found["about"]["unit"] == OFFLINE.unit
    assert found["metrics"]["nbt_clare"]["low"] is not None
    assert cli.main(["metrics", str(folder)]) == 0
    printed += capsys.readouterr().out
    assert cli.main(["metrics", str(folder), "--quantity", "loss"]) == 0
    printed += capsys.readouterr().out
    assert cli.main(["metrics", str(folder), str(runs / "er")]) == 0
    printed += capsys.readouterr().out
    assert "paired differences over the same episodes" in printed
    assert cli.main(["eval", "--run-id", str(folder)]) == 0
    printed += capsys.readouterr().out
    assert "offline action error in standard deviations of the actions, lower is better" in printed
    assert "success" not in printed
    for names in ([folder], [folder, runs / "er"]):
        out = runs / f"report{len(names)}"
        assert cli.main(["report", *map(str, names), "--out", str(out)]) == 0
        texts = [p for p in out.iterdir() if p.suffix in (".html", ".json", ".md", ".tex")]
        assert len(texts) >= 4 and (out / "error.png").is_file()
        for path in texts:
            assert "success" not in path.read_text().lower(), path
        assert "offline action error" in (out / "index.html").read_text()
        assert "lower is better" in (out / "table.md").read_text()
    for path in (folder / "eval").rglob("*.json*"):
        assert "success" not in path.read_text(), path


def test_an_evaluation_that_was_cut_off_goes_on(
    runs: Path, lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(runs / "er", tmp_path / "er")
    config = read_config(folder / "config.yaml")
    whole = without_times(folder / "eval")
    shutil.rmtree(folder / "eval")
    real, calls = measure, []

    def stops(*args: Any) -> dict[str, Any]:
        calls.append(args)
        if len(calls) == 9:
            raise Interrupted("stopped")
        return real(*args)

    monkeypatch.setattr(offline, "measure", stops)
    with pytest.raises(Interrupted):
        evaluate(folder, config, progress=False)
    assert len(list((folder / "eval" / "cells").glob("*.jsonl"))) >= 2
    assert not (folder / "eval" / "matrix.json").exists()
    first, calls[:] = len(calls), [()] * 100
    evaluate(folder, config, progress=False)
    assert len(calls) - 100 == 21 - (first - 1)
    again = without_times(folder / "eval")
    again["settings.json"][0]["run"] = whole["settings.json"][0]["run"]
    assert again == whole
    calls[:] = []
    evaluate(folder, config, progress=False)
    assert not calls


def test_other_weights_settings_or_data_do_not_mix(runs: Path, lab: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(runs / "seqfft", tmp_path / "seqfft")
    config = read_config(folder / "config.yaml")
    for key, value, words in (
        ("stride", 2, "other settings or weights"), ("views", ["deaf"], "views is for streams with a simulator"),
        ("split", "validation", "with a simulator"), ("random_row", True, "with a simulator"),
    ):  # fmt: skip
        before = getattr(config.eval, key)
        setattr(config.eval, key, value)
        with pytest.raises(UserError, match=words):
            evaluate(folder, config, progress=False)
        setattr(config.eval, key, before)
    config.dataset.holdout = 0.0
    with pytest.raises(UserError, match=r"held out no episodes.*dataset\.holdout=0\.1"):
        evaluate(folder, config, progress=False)
    config.dataset.holdout = 0.25
    config.dataset.sets[0].exclude_episodes = [0]
    with pytest.raises(UserError, match="fingerprints differ"):
        evaluate(folder, config, progress=False)
    for arguments in (["--rows", "0"], ["--curves"], ["--step", "3"]):
        assert cli.main(["eval", "--run-id", str(folder), *arguments]) == 2


def test_methods_are_compared_on_the_same_episodes(runs: Path) -> None:
    records = {name: [load_record(runs / name)] for name in ("seqfft", "er")}
    found = {d.metric: d for d in compare(records, bootstrap=200)}
    level = found["asr"]
    assert level.value == pytest.approx(
        np.mean(records["seqfft"][0].success[-1]) - np.mean(records["er"][0].success[-1])
    )
    assert not level.higher_is_better and found["nbt_clare"].low <= found["nbt_clare"].value <= found["nbt_clare"].high
    same = {d.metric: d for d in compare({"a": records["er"], "b": records["er"]}, bootstrap=50)}
    assert all(d.value == d.low == d.high == 0 for d in same.values())
    rates = Record(["one", "two"], np.eye(2), [0, 1])
    with pytest.raises(UserError, match="cannot be compared"):
        compare({"a": records["er"], "b": [rates]}, bootstrap=50)


def test_joint_and_independent_runs_and_adapters(lab: Path, tmp_path: Path) -> None:
    for name in ("multitask", "singletask", "clare"):
        config = lab_run(lab, tmp_path, name, "train.steps=3")
        config.algorithm |= SMALL_CLARE if name == "clare" else {}
        matrix = evaluate(train(config, name), config, progress=False)
        rows = np.array([[math.nan if v is None else v for v in row] for row in matrix["error"]])
        assert rows.shape == ((1, 2) if name == "multitask" else (2, 2))
        assert np.isnan(rows).sum() == (2 if name == "singletask" else 0)


def test_a_sweep_evaluates(lab: Path, tmp_path: Path) -> None:
    (tmp_path / "lab.yaml").write_text(json.dumps(lab_config(lab / "one", holdout=0.1)))
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\ndataset: {tmp_path}/lab.yaml\nalgorithms: [seqfft]\noverrides: [train.steps=2]\n")
    experiment, planned = load_experiment(str(path))
    graph = units(experiment, planned, tmp_path, (), str(path))
    assert [u.kind for u in graph] == ["base", "train", "evaluate", "report"]


def test_held_out_episodes_are_named_alike_wherever_the_data_are(lab: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(lab, tmp_path / "moved")
    here, there = (build_stream(lab_run(root, tmp_path / "x").dataset).columns for root in (lab, moved))
    found = [[(h.j, h.number, h.seed, h.piece.episodes) for h in held_out_episodes(c, 99)] for c in (here, there)]
    assert found[0] == found[1] and len({seed for _, _, seed, _ in found[0]}) == len(found[0]) == 7


def test_a_held_out_episode_is_the_same_at_every_visit(lab: Path, tmp_path: Path) -> None:
    """Whichever sets are left to train on at a visit: its seed is a hash of the set's place."""
    (tmp_path / "both.yaml").write_text(json.dumps(lab_config(lab / "one", lab / "copy", holdout=0.5)))
    make_lab_set(lab / "copy", LEFT)
    config = compose(
        model="dit_dec_tiny", algorithms=["seqfft"], dataset=str(tmp_path / "both.yaml"), registered=["seqfft"]
    )[0]
    task = build_stream(config.dataset).columns[0]
    assert len({p.root for p in task.held_out}) == 2
    again = replace(task, parts=task.parts[::-1])
    first, second = ([(h.number, h.seed) for h in held_out_episodes([c], 99)] for c in (task, again))
    assert first == second


@pytest.mark.parametrize("kind", tiny_policies.BUILT)
def test_lerobots_policies_predict_from_what_was_seen(kind: str, tmp_path: Path) -> None:
    """Also those that keep the last observations in queues: what was seen before the present frame counts."""
    loaded = tiny_policies.load(kind, tmp_path)
    actor = PolicyActor(loaded, 3)
    config = loaded.policy.config
    batch = tiny_policies.batch(config, 3)
    frames = torch.arange(3)
    with torch.no_grad():
        for p in loaded.policy.parameters():  # away from zero: some layers start there and ignore what is seen
            p.add_(0.05 * torch.randn_like(p))
    with torch.inference_mode():
        chunk = offline._chunks(actor, batch, 1, frames)
        assert chunk.shape[0] == 3 and chunk.shape[2] == 4 and chunk.isfinite().all()
        assert torch.equal(offline._chunks(actor, batch, 1, frames), chunk)
        if config.n_obs_steps == 1:
            return
        before = {**batch, "observation.state": batch["observation.state"].clone()}
        before["observation.state"][:, 0] += 5
        assert not torch.equal(offline._chunks(actor, before, 1, frames), chunk)


def test_a_mean_over_time_has_no_part_in_errors_on_frames(tmp_path: Path) -> None:
    """ACT's mean over earlier chunks is of an episode that runs: frames are predicted each by itself."""
    plain = tiny_policies.load("act", tmp_path)
    averaging = tiny_policies.load("act", tmp_path, temporal_ensemble_coeff=0.01, n_action_steps=1)
    averaging.policy.load_state_dict(plain.policy.state_dict())
    batch, frames = tiny_policies.batch(plain.policy.config, 3), torch.arange(3)
    with torch.inference_mode():
        want = offline._chunks(PolicyActor(plain, 3), batch, 1, frames)
        actor = PolicyActor(averaging, 3)
        for some in (frames, frames[:2], frames):
            part = {k: v[: len(some)] for k, v in batch.items()}
            assert torch.allclose(offline._chunks(actor, part, 1, some), want[: len(some)], atol=1e-6)


def test_a_loss_that_would_change_the_policy_is_left_out(counted: Path) -> None:
    policy = Zero()
    policy.config = SimpleNamespace(**{**vars(policy.config), "type": "vqbet"})
    policy.vqbet = SimpleNamespace(  # type: ignore[assignment]
        action_head=SimpleNamespace(vqvae_model=SimpleNamespace(discretized=False)), n_vqvae_training_steps=9
    )
    policy.config.n_vqvae_training_steps = 9
    (counted.parent / "v.yaml").write_text(json.dumps(lab_config(counted, holdout=0.25)))
    made = compose(model="dit_dec_tiny", algorithms=["seqfft"], dataset=str(counted.parent / "v.yaml"), registered=[])
    piece = build_stream(made[0].dataset).columns[0].held_out[0]
    frames = StreamFrames([(piece,)], policy.config, 0)
    loaded = SimpleNamespace(policy=policy, preprocessor=lambda x: x, postprocessor=lambda x: x)
    found = measure(PolicyActor(loaded, 3), frames, 0, 1, np.ones(3), 1)
    assert found["loss"] is None and found["horizon"] == 2 and found["chunk_error"] > 0


@pytest.mark.parametrize(
    ("changed", "quantity", "words"),
    [
        ({"stride": 3}, None, r"another stride \(1 and 3\)"),
        ({"scale": [1.0, 1.0, 1.0]}, None, "another scale: their data differ"),
        ({"horizon": 99}, None, r"another horizon \(\d+ and 99\): action chunks of different lengths"),
        ({"horizon": 99}, "first_error", None),
        ({"policy": "other"}, "loss", "different policies, whose losses are not the same function"),
        ({"episode": 1}, None, "same data, dataset.holdout, dataset.holdout_seed and eval.episodes"),
    ],
)
def test_errors_that_do_not_measure_the_same_are_not_compared(
    runs: Path, tmp_path: Path, changed: dict[str, Any], quantity: str | None, words: str | None
) -> None:
    other = shutil.copytree(runs / "er", tmp_path / "er")
    for path, keys in (("eval/settings.json", ("stride", "scale")), ("eval/matrix.json", ("horizon",)),
                       ("manifest.json", ("policy",))):  # fmt: skip
        values = read_json(other / path)
        assert set(keys) <= values.keys()
        (other / path).write_text(json.dumps(values | {k: v for k, v in changed.items() if k in keys}))
    if "episode" in changed:
        cell = other / "eval" / "cells" / "k00_j00.jsonl"
        cell.write_text("".join(cell.read_text().splitlines(keepends=True)[:-1]))
    pair = {"a": [load_record(runs / "seqfft", criterion=quantity)], "b": [load_record(other, criterion=quantity)]}
    if words is None:
        assert compare(pair, bootstrap=50)
    else:
        with pytest.raises(UserError, match=words):
            compare(pair, bootstrap=50)


def test_a_loss_may_be_negative(runs: Path, tmp_path: Path) -> None:
    other = shutil.copytree(runs / "er", tmp_path / "er")
    for cell in (other / "eval" / "cells").glob("*.jsonl"):
        rows = [{**r, "loss": r["loss"] - 10} for r in read_jsonl(cell)]
        cell.write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = compute_metrics(load_record(other, criterion="loss"), bootstrap=200)["asr"]
    assert found["low"] <= found["value"] <= found["high"] < 0
