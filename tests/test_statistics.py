"""Statistics of data sets: the values, data sets that differ, runs whose statistics are wrong and their repair."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from clbench.checkpoints.statistics import fault, normalizers
from clbench.checkpoints.whole import damage, write_whole
from clbench.config.schema import Config
from clbench.data.statistics import QUANTILES, Stats, compute, of_tasks
from clbench.data.task import Task
from clbench.errors import UserError
from clbench.evaluation.evaluate import evaluate
from clbench.io import read_json, write_json, write_text
from clbench.testing.toy import toy_config
from clbench.training.statistics import main
from clbench.training.trainer import train
from tests.conftest import ROOT


def odd_values(n: int) -> np.ndarray:
    """(n, 6): normal, constant, two values, zeros of both signs, ties, values far apart."""
    rng = np.random.default_rng(n)
    columns = [
        rng.normal(size=n), np.full(n, -0.3), np.where(rng.random(n) > 0.5, 1.0, -1.0), rng.choice([0.0, -0.0], n),
        rng.integers(-3, 3, n) * 1e-3, rng.normal(size=n) * 10.0 ** rng.integers(-30, 30, n),
    ]  # fmt: skip
    return np.stack(columns, 1).astype(np.float32)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("size", [1, 7, 300])
def test_values_are_numpys_however_the_frames_come(n: int, size: int) -> None:
    values = odd_values(n)
    found = compute(lambda: ({"x": values[i : i + size]} for i in range(0, n, size)))["x"]
    exact = values.astype(np.float64)
    scale = np.abs(exact).max(0)
    for name, want in {
        "mean": exact.mean(0), "std": exact.std(0), "min": exact.min(0), "max": exact.max(0),
        **{name: np.quantile(exact, q, axis=0) for name, q in QUANTILES.items()},
    }.items():  # fmt: skip
        assert found[name].shape == (6,)
        assert (np.abs(found[name] - want) <= 1e-12 * scale).all(), name
    assert found["count"].tolist() == [n]
    assert found["binary"].tolist() == [len(np.unique(column)) == 2 for column in values.T]


def test_one_number_a_frame_has_statistics_of_one_number() -> None:
    found = compute(lambda: [{"x": np.arange(5.0)}], quantiles=False)["x"]
    assert {name: v.tolist() for name, v in found.items()} == {
        "mean": [2.0], "std": [pytest.approx(2**0.5)], "min": [0.0], "max": [4.0], "count": [5],
    }  # fmt: skip


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(UserError, match="feature 'x' has values that are not finite"):
        compute(lambda: [{"x": np.array([[0.0], [bad]])}])


def task(root: Path, episodes: tuple[int, ...], features: dict[str, str] | None = None) -> Task:
    return Task("t", "do it", root, episodes, None, 0, features=features)


def test_episodes_of_several_sets_count_once_each(toy_data: Path) -> None:
    """The tasks' episodes and no others, whichever task they are listed for."""
    from clbench.data.lerobot_set import read_columns

    tasks = [task(toy_data / "stream", (0, 1)), task(toy_data / "stream", (1, 4)), task(toy_data / "pretrain", (3,))]
    found = of_tasks(tasks)
    assert set(found) == {"observation.state", "action"}
    values = []
    for name, episodes in (("stream", (0, 1, 4)), ("pretrain", (3,))):
        columns = read_columns(
            sorted((toy_data / name / "data").rglob("*.parquet")), {"action": (4,), "episode_index": ()}
        )
        values.append(columns["action"][np.isin(columns["episode_index"], episodes)])
    every = np.concatenate(values).astype(np.float64)
    assert found["action"]["count"].tolist() == [len(every)] == [80]
    np.testing.assert_allclose(found["action"]["mean"], every.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found["action"]["q10"], np.quantile(every, 0.1, axis=0), rtol=1e-12)


def test_sets_that_differ_are_named_with_both_shapes(toy_data: Path) -> None:
    only_state = {"observation.state": "action"}
    with pytest.raises(UserError, match=r"differ in the feature 'action': .*stream has \(4,\), .*pretrain has \(39,\)"):
        of_tasks([task(toy_data / "stream", (0,), {"action": "action"}), task(toy_data / "pretrain", (0,), only_state)])
    with pytest.raises(UserError, match=r"'observation.state': .*stream has none, .*pretrain has \(39,\)"):
        of_tasks([task(toy_data / "stream", (0,), {"action": "action"}), task(toy_data / "pretrain", (0,))])


# ------------------------------------------------------------------------------------------------ what is wrong

RUN_ARGUMENTS = ("train.steps=1", "pretrain.steps=2", "eval.cells=last")
STATE = "policy_preprocessor_step_4_normalizer_processor.safetensors"
UNSTATE = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"


def run_of(data: Path, results: Path, *more: str, name: str = "r", algo: str = "seqfft") -> tuple[Path, Config]:
    config = toy_config(data, {"name": algo}, f"output_dir={results}", *RUN_ARGUMENTS, *more)
    return train(config, name), config


@pytest.fixture(scope="module")
def trained(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    return run_of(toy_data, tmp_path_factory.mktemp("trained"))


@pytest.fixture
def run(trained: tuple[Path, Config], tmp_path: Path) -> tuple[Path, Config]:
    """A copy of a run that may be spoilt."""
    folder = tmp_path / "r"
    shutil.copytree(trained[0], folder)
    return folder, trained[1]


def policies(folder: Path) -> list[Path]:
    return sorted(p / "policy" for p in (folder / "checkpoints").glob("task_*"))


def sealed(holder: Path, change: Callable[[Path], None]) -> None:
    """Change a checkpoint's files, and make its sums those of the changed ones."""
    described = {k: v for k, v in read_json(holder / "checkpoint.json").items() if k not in ("files", "digest", "seal")}

    def fill(temporary: Path) -> dict[str, Any]:
        shutil.copytree(holder, temporary, dirs_exist_ok=True)
        (temporary / "checkpoint.json").unlink()
        change(temporary)
        return described

    write_whole(holder, fill, lambda: 0)


def without_statistics(holder: Path) -> None:
    """As LeRobot saves processors that were made without statistics: no states, and none named."""
    for name, state, place in (("preprocessor", STATE, 4), ("postprocessor", UNSTATE, 0)):
        path = holder / "policy" / f"policy_{name}.json"
        described = read_json(path)
        assert described["steps"][place].pop("state_file") == state
        write_json(path, described)
        (holder / "policy" / state).unlink()


def moved_by(amount: float) -> Callable[[Path], None]:
    def change(holder: Path) -> None:
        for state in (STATE, UNSTATE):
            values = load_file(holder / "policy" / state)
            save_file({k: v + amount if "action" in k else v for k, v in values.items()}, holder / "policy" / state)

    return change


def digest(folder: Path) -> list[str]:
    return [read_json(p.parent / "checkpoint.json")["digest"] for p in policies(folder)]


def repair(folder: Path, *more: str) -> int:
    return main(["--config", str(folder), "--repair", *more])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_statistics, r"'observation.state' \(39,\) has no mean and no std .* statistics of nothing"),
        (moved_by(0.1), r"the statistics of 'action' \(4,\) are another set's: dimension \d goes from "),
    ],
)
def test_a_run_with_wrong_statistics_is_refused_repaired_and_evaluated(
    run: tuple[Path, Config], change: Callable[[Path], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, config = run
    before = digest(folder)
    for policy in policies(folder):
        sealed(policy.parent, change)
        assert damage(policy.parent) is None
    assert digest(folder) != before
    with pytest.raises(UserError, match=message) as refused:
        evaluate(folder, config, progress=False)
    assert f"--config {folder} --repair" in str(refused.value)
    assert not (folder / "eval").exists()
    assert repair(folder) == 0
    assert "repaired: 3 of 4 policies" in capsys.readouterr().out
    assert digest(folder) == before  # every byte is again what training wrote
    assert all(damage(policy.parent) is None for policy in policies(folder))
    kept = folder / "statistics_before" / "checkpoints" / "task_02"
    assert (kept / "checkpoint.json").is_file() and (kept / "policy" / STATE).is_file() == (
        change is not without_statistics
    )
    assert evaluate(folder, config, progress=False)["episodes"][-1] == [1, 1, 1]
    assert repair(folder) == 0
    assert "nothing to repair" in capsys.readouterr().out


def test_statistics_that_were_lost_are_named_before_the_damage_and_repaired(
    run: tuple[Path, Config], capsys: pytest.CaptureFixture[str]
) -> None:
    """The sums still list the file that is gone."""
    folder, config = run
    before = digest(folder)
    (policies(folder)[-1] / STATE).unlink()
    with pytest.raises(UserError, match="task_02/policy cannot be evaluated with the statistics"):
        evaluate(folder, config, progress=False)
    assert repair(folder) == 0
    assert "repaired: 1 of 4 policies" in capsys.readouterr().out
    assert digest(folder) == before and damage(policies(folder)[-1].parent) is None


def test_a_checkpoint_that_is_damaged_elsewhere_is_not_given_new_sums(
    run: tuple[Path, Config], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run
    last = policies(folder)[-1]
    (last / STATE).unlink()
    write_text(last / "config.json", (last / "config.json").read_text() + " ")
    assert repair(folder) == 2
    assert "is damaged beside its statistics (policy/config.json has" in capsys.readouterr().err
    assert not (folder / "statistics_before").exists() and not (last / STATE).exists()


def test_a_run_is_evaluated_where_its_data_is_not(run: tuple[Path, Config], tmp_path: Path, toy_data: Path) -> None:
    """Then statistics can only be compared with the policy itself."""
    folder, _ = run
    text = (folder / "config.yaml").read_text().replace(str(toy_data), str(tmp_path / "elsewhere"))
    write_text(folder / "config.yaml", text)
    away = toy_config(tmp_path / "elsewhere", {"name": "seqfft"}, *RUN_ARGUMENTS)
    sealed(policies(folder)[-1].parent, moved_by(0.1))
    assert evaluate(folder, away, progress=False)["episodes"][-1] == [1, 1, 1]
    sealed(policies(folder)[-1].parent, without_statistics)
    with pytest.raises(UserError, match="has no mean and no std"):
        evaluate(folder, away, tmp_path / "out", progress=False)


@pytest.mark.parametrize("normalization", ["quantiles", "min_max"])
def test_ranges_are_repaired_to_the_byte_too(
    toy_data: Path, tmp_path: Path, normalization: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run_of(toy_data, tmp_path, f"policy.normalization={normalization}", algo="seqlora")
    before = digest(folder)
    (step,) = {s.state_file for s in normalizers(policies(folder)[0]) if s.name == "clbench_normalizer"}
    for policy in policies(folder):
        (policy / str(step)).unlink()
    assert "'observation.state' (39,) has no " in str(fault(policies(folder)[0]))
    assert repair(folder) == 0, capsys.readouterr().err
    assert digest(folder) == before


def test_a_given_base_that_does_not_fit_is_refused_and_repaired(
    trained: tuple[Path, Config], toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(policies(trained[0])[-1], base)
    before = (base / STATE).read_bytes()
    values = load_file(base / STATE)
    save_file({k: v * 57.3 + 1000 if "state" in k else v for k, v in values.items()}, base / STATE)  # other units
    with pytest.raises(UserError, match=r"statistics of 'observation.state' \(39,\) are far from the data") as refused:
        run_of(toy_data, tmp_path, f"policy.path={base}", name="q")
    assert "--tasks stream --repair" in str(refused.value) and not (tmp_path / "q").exists()
    file = tmp_path / "c.yaml"
    from clbench.config.compose import to_yaml

    write_text(file, to_yaml(trained[1]))
    assert main(["--config", str(file), "--tasks", "stream", "--repair", str(base)]) == 0, capsys.readouterr().err
    assert (base / STATE).read_bytes() != before
    assert (tmp_path / "statistics_before" / "base" / STATE).is_file()
    folder, config = run_of(toy_data, tmp_path, f"policy.path={base}", name="q")
    right = (base / STATE).read_bytes()
    sealed(policies(folder)[-1].parent, without_statistics)
    assert repair(folder) == 0  # the given base's own, which is sound
    assert (policies(folder)[-1] / STATE).read_bytes() == right
    assert evaluate(folder, config, progress=False)["episodes"][-1] == [1, 1, 1]


def test_the_dimensions_of_a_step_and_of_the_policy_must_agree(run: tuple[Path, Config]) -> None:
    policy = policies(run[0])[-1]
    state = load_file(policy / STATE)
    save_file({**state, "action.std": state["action.std"][:3].clone()}, policy / STATE)
    assert fault(policy) == "'action' has shape (4,), and its std has shape (3,)"
    save_file({**state, "action.mean": torch.full((4,), torch.nan)}, policy / STATE)
    assert fault(policy) == "the mean of 'action' (4,) has values that are not finite"
    save_file({k.replace("observation.state", "state"): v for k, v in state.items()}, policy / STATE)
    assert "'observation.state' (39,) has no mean and no std (normalizer_processor has statistics of" in str(
        fault(policy)
    )
    save_file(state, policy / STATE)
    assert fault(policy) is None
    described = read_json(policy / "policy_preprocessor.json")
    features = described["steps"][4]["config"]["features"]
    features["observation.joints"] = features.pop("observation.state")
    write_json(policy / "policy_preprocessor.json", described)
    assert str(fault(policy)).startswith("the policy has 'observation.state' (39,), and its processor normalises ")


def around(middle: float, half: float, n: int = 6) -> Stats:
    ends = {"min": np.full(n, middle - half), "max": np.full(n, middle + half)}
    return {"action": {**ends, "mean": np.full(n, middle), "std": np.full(n, half / 3)}}


@pytest.mark.parametrize(
    ("middle", "half", "wrong"),
    [
        (0, 1, None), (3, 2, None), (0, 9, None), (0, 0.1, None), (0, 57.3, "far from"), (1000, 1, "far from"),
        (0, 1 / 57.3, "wider"),
    ],
)  # fmt: skip
def test_only_data_that_is_far_outside_is_refused(
    run: tuple[Path, Config], middle: float, half: float, wrong: str | None
) -> None:
    """Degrees for radians, a place far away; but tasks may lie outside of those that the statistics are of."""
    policy = policies(run[0])[-1]
    for file in (STATE, UNSTATE):
        state = {k: v for k, v in load_file(policy / file).items() if not k.startswith("action.")}
        ends = {"mean": torch.zeros(4), "std": torch.ones(4) / 3, "min": -torch.ones(4), "max": torch.ones(4)}
        save_file({**state, **{f"action.{name}": v for name, v in ends.items()}}, policy / file)
    data = around(middle, half, 4)
    for values in data["action"].values():
        values[0] = 5000.0 if wrong is None else 0.0  # one dimension alone decides nothing
    found = fault(policy, data)
    assert found is None if wrong is None else wrong in str(found)


# ------------------------------------------------------------------------------------------------ the command


def test_the_script_writes_what_lerobot_reads(toy_data: Path, tmp_path: Path) -> None:
    from lerobot.datasets import LeRobotDatasetMetadata

    from clbench.config.compose import to_yaml

    config = tmp_path / "c.yaml"
    write_text(config, to_yaml(toy_config(toy_data, {"name": "seqfft"})))
    script = ROOT / "scripts" / "compute_dataset_statistics.py"
    command = [
        sys.executable,
        str(script),
        "--config",
        str(config),
        "--tasks",
        "stream",
        "--out",
        str(tmp_path / "s.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "9 episodes, 180 frames" in done.stdout
    shutil.copytree(toy_data / "stream", tmp_path / "set")
    shutil.copyfile(tmp_path / "s.json", tmp_path / "set" / "meta" / "stats.json")
    meta = LeRobotDatasetMetadata("local/set", root=tmp_path / "set")
    own = LeRobotDatasetMetadata("local/set", root=toy_data / "stream")
    for key in ("observation.state", "action"):
        assert set(own.stats[key]) <= set(meta.stats[key])
        for name in ("mean", "std", "min", "max", "count"):
            np.testing.assert_allclose(meta.stats[key][name], own.stats[key][name], rtol=1e-4, atol=1e-6)


def test_images_are_decoded_only_when_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lerobot.datasets import LeRobotDataset

    from clbench.testing.toy import make_toy_data
    from clbench.training.statistics import image_statistics

    root = make_toy_data(tmp_path / "images", ["push-v3"], episodes=2, length=5, images=True)
    tasks = [Task("push-v3", "push", root, (0, 1), None, 0)]
    key = "observation.images.top"
    assert key not in of_tasks(tasks)
    found = image_statistics(tasks)[key]
    whole = LeRobotDataset("local/images", root=root)
    pixels = torch.stack([whole[i][key] for i in range(10)]).double().numpy().transpose(1, 0, 2, 3).reshape(3, -1)
    for name, want in {
        "mean": pixels.mean(1), "std": pixels.std(1), "min": pixels.min(1), "max": pixels.max(1),
        **{name: np.quantile(pixels, q, axis=1) for name, q in QUANTILES.items()},
    }.items():  # fmt: skip
        np.testing.assert_allclose(found[name], want.reshape(3, 1, 1), rtol=1e-6, atol=1e-7, err_msg=name)
    assert found["count"].tolist() == [10]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nothing"], "unknown dataset 'nothing'"),
        (["--config", "nothing.yaml"], "there is no such file"),
        (["--config", "a/b"], "neither a .yaml file nor the folder of a run"),
        (["--config", "metaworld_quick", "--repair"], "--repair without a name is for --config RUN"),
        (["--config", "metaworld_quick", "--repair", "nowhere"], "no run 'nowhere' under"),
        (["--config", "metaworld_quick"], "there is no data set in"),
    ],
)
def test_mistakes_end_in_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out
