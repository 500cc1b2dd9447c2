"""The command line against bad input: exit status 2, one line that says what to fix, no traceback, no heavy work.

Black box: every test calls `clbench.cli.main` (or the installed command) and looks at its status and messages only.
The data set of these tests is a record without frames: whatever reads frames comes too late to report a mistake.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clbench.checkpoints.run_folder import save_checkpoint
from clbench.cli import main
from clbench.evaluation.records import CellFile
from clbench.evaluation.seeds import RULE, EpisodeSeeds

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "compute_cl_matrix_metrics.py"
TASKS = ["hammer-v3", "push-v3", "window-close-v3"]
PRETRAIN = ["reach-v3", "door-open-v3"]

RUN_YAML = f"""
model: toy
policy: {{type: dit_dec, d_model: 16, n_heads: 2, encoder_layers: 1, decoder_layers: 1}}
algorithm: {{name: seqfft}}
dataset:
  name: toy
  data: stream
  env: {{type: metaworld, max_steps: 20}}
  tasks: [{", ".join(TASKS)}]
  pretrain: {{data: pretrain, tasks: [{", ".join(PRETRAIN)}]}}
train: {{steps: 2, batch_size: 8, device: cpu}}
pretrain: {{steps: 2, batch_size: 8}}
"""

Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has data, results and cache of its own, and no debugging left over from another."""
    for name in ("DATA", "RESULTS", "CACHE"):
        monkeypatch.setenv(f"CLBENCH_{name}_ROOT", str(tmp_path / name.lower()))
    monkeypatch.setenv("CLBENCH_DEBUG", "")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Iterator[Refused]:
    """Call the command line, check that it refuses as it should, and return its message."""

    def call(*argv: str | Path) -> str:
        status = main([str(a) for a in argv])
        return check(status, capsys.readouterr().err)

    yield call


def check(status: int, stderr: str) -> str:
    """Status 2; on stderr one line of ours, beside at most the configuration's files and what is being loaded."""
    assert "Traceback" not in stderr, stderr
    lines = [line for line in stderr.splitlines() if not line.startswith(("configuration: ", "loading "))]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("clbench: "), stderr
    assert status == 2, stderr
    assert len(lines[0]) > len("clbench: ") + 10, "the message says nothing"
    return lines[0]


def write_record(root: Path, tasks: list[str]) -> None:
    """Write what clbench says of a data set it made (meta/clbench.json), without the frames."""
    record = {
        "format": 1, "name": root.name, "env_type": "metaworld", "seed": 0, "action_noise": 0.1, "tail_steps": 0,
        "max_steps": 200, "demos_per_task": 1, "ceiling_episodes": 0, "fingerprint": "0" * 64, "versions": {},
        "tasks": [
            {
                "name": name, "instruction": f"do {name}", "task_index": i, "episodes": [i], "frames": 10,
                "expert_attempts": 0, "expert_successes": 0, "expert_success_rate": None, "demo_attempts": 1,
                "demo_successes": 1, "demo_success_rate": 1.0,
            }
            for i, name in enumerate(tasks)
        ],
    }  # fmt: skip
    (root / "meta").mkdir(parents=True)
    (root / "meta" / "clbench.json").write_text(json.dumps(record))


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    """A complete small configuration, whose two data sets have a record."""
    write_record(tmp_path / "data" / "stream", TASKS)
    write_record(tmp_path / "data" / "pretrain", PRETRAIN)
    path = tmp_path / "run.yaml"
    path.write_text(RUN_YAML)
    return path


@pytest.fixture
def make_run(tmp_path: Path, run_yaml: Path) -> Callable[..., Path]:
    """Write a run folder with a manifest, its configuration and `done` checkpoints (without weights)."""

    def make(run_id: str = "toy", done: int = 0) -> Path:
        from clbench.config.compose import compose_files, to_yaml

        folder = tmp_path / "results" / run_id
        folder.mkdir(parents=True)
        config, _ = compose_files([str(run_yaml)])
        (folder / "config.yaml").write_text(to_yaml(config))
        visits = [
            {"k": j, "task": t, "instruction": t, "env": {"type": "metaworld", "task": t, "max_steps": 20}}
            for j, t in enumerate(TASKS)
        ]
        manifest = {
            "format": 1, "run_id": run_id, "algorithm": "seqfft", "policy": "toy", "dataset": "toy", "seed": 0,
            "mode": "sequential", "visits": visits, "checkpoints": TASKS, "base": {"path": str(tmp_path / "base")},
            "data_fingerprint": "0" * 64,
        }  # fmt: skip
        (folder / "manifest.json").write_text(json.dumps(manifest))
        for k in range(done):
            save_checkpoint(folder, k, lambda _: {}, lambda: 0)
        return folder

    return make


# ---------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (["--algo", "clar"], "clare"),
        (["--algo", "er,seqftt"], "seqfft"),
        (["--model", "dit_dec_tini"], "dit_dec_tiny"),
        (["--dataset", "metaworld_quik"], "metaworld_quick"),
        (["--", "train.stepz=5"], "steps"),
        (["--", "trian.steps=5"], "train"),
        (["--", "--train.optimiser.lr=1"], "optimizer"),
        (["--", "dataset.pretrain.make.demos_per_tasks=5"], "demos_per_task"),
    ],
)
def test_unknown_name_suggests_the_nearest(refused: Refused, arguments: list[str], suggestion: str) -> None:
    assert f"Did you mean '{suggestion}'?" in refused("train", *arguments)


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("algorithm.name=clar", "clare"),
        ("algorithm.bufer_size_per_task=5", "buffer_size_per_task"),
        ("policy.type=dit_deck", "dit_dec"),
        ("policy.d_modell=16", "d_model"),
        ("dataset.task_order=[0,pusch-v3]", "push-v3"),
        ("dataset.tasks=[hammer-v3,pusch-v3]", "push-v3"),
        ("dataset.env.type=metawrold", "metaworld"),
    ],
)
def test_unknown_name_inside_a_section(refused: Refused, run_yaml: Path, override: str, suggestion: str) -> None:
    name = ["algorithm.name=er"] if "bufer" in override else []
    message = refused("train", "--yaml", run_yaml, "--", *name, override)
    assert f"Did you mean '{suggestion}'?" in message


@pytest.mark.parametrize(
    "arguments", [["eval", "--run-id"], ["train", "--resume"], ["train", "--init-from"]], ids=lambda a: a[-1]
)
def test_unknown_run(refused: Refused, make_run: Callable[..., Path], arguments: list[str]) -> None:
    make_run("quickstart_er_s0")
    assert "Did you mean 'quickstart_er_s0'?" in refused(*arguments, "quickstart_er_s1")


def test_unknown_stream_of_data_make(refused: Refused) -> None:
    assert "Did you mean 'metaworld_quick'?" in refused("data", "make", "metaworld_quik")


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["trian"],
        ["train", "--steps", "5"],
        ["train", "train.steps=5"],
        ["train", "--seed", "x"],
        ["eval"],
        ["eval", "--run-id", "x", "--cells", "upper"],
        ["train", "--strategy", "fsdp"],
    ],
    ids=" ".join,
)
def test_unknown_flags(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.splitlines()[-1].startswith("clbench")
    assert "Traceback" not in err


# ---------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    "override",
    [
        "train.steps=abc",
        "train.steps=1.5",
        "train.steps=0",
        "train.steps=",
        "train.batch_size=-8",
        "train.optimizer.lr=fast",
        "train.optimizer.lr=0",
        "train.optimizer.lr=nan",
        "train.optimizer.lr=inf",
        "train.optimizer.betas=[0.9]",
        "train.optimizer.betas=[0.9,1.0]",
        "train.optimizer.schedule=linear",
        "train.optimizer_across_tasks=kept",
        "train.mixed_precision=fp8",
        "train.device=tpu",
        "eval.episodes=0",
        "eval.cells=upper",
        "eval.slots=0",
        "eval.split=train",
        "eval.seed=999999",
        "eval.seed=-1",
        "log.progress=loud",
        "dataset.env.max_steps=0",
        "dataset.make.action_noise=-1",
        "seed=-1",
        "seed=true",
        "train=5",
        "policy=5",
        "algorithm=er",
        "train.steps=${nowhere}",
        "algorithm.name={a: b}",
    ],
)
def test_wrong_type_or_range(refused: Refused, run_yaml: Path, override: str) -> None:
    key = override.partition("=")[0]
    message = refused("train", "--yaml", run_yaml, "--", override)
    assert key in message or "${" in override


@pytest.mark.parametrize(
    ("algorithm", "override"),
    [
        ("er", "buffer_size_per_task=many"),
        ("er", "buffer_size_per_task=0"),
        ("er", "replay_batch_ratio=1.5"),
        ("er", "mode=mix"),
        ("er", "memory_unit=seconds"),
        ("clare", "detect_steps=0"),
        ("clare", "force_expand=sideways"),
        ("clare", "maximum_expand=0"),  # below at_least_expand
        ("clare", "discriminator_hidden=0"),
        ("clare", "discriminator_momentum=0"),
        ("clare", "adapter_steps=0"),
        ("clare", "adapter_steps=-3"),
        ("clare", "adapter_lr=-1"),
        ("clare", "discriminator_lr=-1"),
        ("clare", "discriminator_batch_size=-3"),
        ("clare", "detect_batch_size=0"),
        ("multitask", "steps_per_task=0"),
        ("multitask", "steps_per_task=-1"),
    ],
)
def test_wrong_value_of_an_algorithm(refused: Refused, run_yaml: Path, algorithm: str, override: str) -> None:
    key = override.partition("=")[0].removeprefix("discriminator_")
    message = refused("train", "--yaml", run_yaml, "--", f"algorithm.name={algorithm}", f"algorithm.{override}")
    assert key in message


@pytest.mark.parametrize("override", ["n_heads=0", "d_model=-4", "d_model=wide", "chunk_size=7", "n_action_steps=99"])
def test_wrong_value_of_a_policy(refused: Refused, run_yaml: Path, override: str) -> None:
    assert override.partition("=")[0] in refused("train", "--yaml", run_yaml, "--", f"policy.{override}")


def test_er_must_leave_some_of_the_current_task(refused: Refused, run_yaml: Path) -> None:
    message = refused("train", "--yaml", run_yaml, "--", "algorithm.name=er", "train.batch_size=2")
    assert "replay_batch_ratio" in message and "train.batch_size" in message


def test_batch_must_be_a_multiple_of_the_accumulation(refused: Refused) -> None:
    message = refused("train", "--", "train.batch_size=10", "train.gradient_accumulation=3")
    assert "train.batch_size" in message and "train.gradient_accumulation" in message


def test_clare_refuses_a_carried_optimizer(refused: Refused, run_yaml: Path) -> None:
    overrides = ("algorithm.name=clare", "train.optimizer_across_tasks=carried")
    assert "optimizer_across_tasks" in refused("train", "--yaml", run_yaml, "--", *overrides)


@pytest.mark.parametrize("names", ["[er,er]", "[multitask,singletask]", "[clare,multitask]", "[]"])
def test_algorithms_that_do_not_go_together(refused: Refused, run_yaml: Path, names: str) -> None:
    message = refused("train", "--yaml", run_yaml, "--", f"algorithm.name={names}")
    assert all(n in message for n in names.strip("[]").split(",")) or "algorithm.name" in message


def test_pretraining_tasks_must_not_be_in_the_stream(refused: Refused, run_yaml: Path) -> None:
    assert "push-v3" in refused("train", "--yaml", run_yaml, "--", "dataset.pretrain.tasks=[push-v3]")


@pytest.mark.parametrize(
    "content",
    [
        "[1]",
        "{",
        '{"peft_type": "LORA"}',
        '{"peft_type": "CLARE", "target_modules": ".*ffn", "use_trainable_copy": "yes"}',
        '{"peft_type": "CLARE", "target_modules": ".*ffn", "discriminator_cfg": {"kind": "vae"}}',
        '{"peft_type": "CLARE", "target_modules": ".*ffn", "discriminator_cfg": null}',
        '{"peft_type": "CLARE", "target_modules": ".*ffn", "discriminator_cfg": {"momentum": "slow"}}',
        '{"peft_type": "CLARE", "target_modules": null}',
    ],
)
def test_wrong_clare_json(refused: Refused, run_yaml: Path, tmp_path: Path, content: str) -> None:
    path = tmp_path / "clare.json"
    path.write_text(content)
    message = refused("train", "--yaml", run_yaml, "--", "algorithm.name=clare", f"algorithm.peft_cfg_path={path}")
    assert "clare.json" in message or "CLARE" in message


# ---------------------------------------------------------------------------------------------- files


def test_missing_data_set_names_the_command_that_makes_it(refused: Refused) -> None:
    message = refused("train", "--algo", "seqfft", "--dataset", "metaworld_quick")
    assert "clbench data make metaworld_quick" in message


def test_missing_pretraining_data(refused: Refused, run_yaml: Path) -> None:
    message = refused("train", "--yaml", run_yaml, "--", "dataset.pretrain.data=elsewhere")
    assert "clbench data make" in message and "elsewhere" in message


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 99}', '{"format": 1}'])
def test_damaged_data_record(refused: Refused, run_yaml: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "data" / "stream" / "meta" / "clbench.json").write_text(content)
    assert "clbench.json" in refused("train", "--yaml", run_yaml)


def test_base_that_is_no_checkpoint(refused: Refused, run_yaml: Path, tmp_path: Path) -> None:
    message = refused("train", "--yaml", run_yaml, "--", f"policy.path={tmp_path / 'nothing'}")
    assert "policy.path" in message and "config.json" in message


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["policy.init=zeros"], "policy.init must be random (or null) but is 'zeros'"),
        (["policy.init=random", "policy.path=somewhere"], "exclude each other"),
        (["policy.init=random", "eval.heldout_episodes=2"], "a given or random base has none"),
    ],
)
def test_impossible_bases(refused: Refused, run_yaml: Path, overrides: list[str], says: str) -> None:
    assert says in refused("train", "--yaml", run_yaml, "--", *overrides)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("dataset.tasks=[]", "dataset.tasks is empty"),
        ("dataset.task_order=[]", "dataset.task_order is empty"),
        ("dataset.task_order=[1]", "one task"),
        ("dataset.tasks=[push-v3,push-v3]", "more than once"),
        ("dataset.task_order=[0,3]", "index 3"),
        ("dataset.task_order=[0,-1]", "index -1"),
        ("dataset.task_order=[0,true]", "names 'true'"),
        ("dataset.task_order=push-v3", "dataset.task_order"),
    ],
)
def test_impossible_stream(refused: Refused, run_yaml: Path, override: str, says: str) -> None:
    assert says in refused("train", "--yaml", run_yaml, "--", override)


def test_run_that_exists(refused: Refused, run_yaml: Path, make_run: Callable[..., Path]) -> None:
    make_run("mine")
    message = refused("train", "--yaml", run_yaml, "--run-id", "mine")
    assert "--resume" in message and "--run-id" in message


def test_resumed_with_other_settings(refused: Refused, run_yaml: Path, make_run: Callable[..., Path]) -> None:
    make_run("mine", done=1)
    message = refused("train", "--yaml", run_yaml, "--run-id", "mine", "--resume", "--", "train.steps=9")
    assert "train.steps" in message


def test_resume_by_name_does_not_swallow_overrides(refused: Refused, make_run: Callable[..., Path]) -> None:
    make_run("mine", done=len(TASKS))
    assert "train.steps" in refused("train", "--resume", "mine", "--", "train.steps=9")


def test_a_refused_start_leaves_no_run(refused: Refused, run_yaml: Path, tmp_path: Path) -> None:
    for override in ("log.trackio=true", "policy.d_model=wide", "policy.d_modle=3", "lora.rank=0"):
        refused("train", "--yaml", run_yaml, "--run-id", "mine", "--", override)
        assert not (tmp_path / "results" / "mine").exists(), override


@pytest.mark.parametrize("run_id", ["../mine", "a/b", ".", ".."])
def test_run_id_that_is_no_folder_name(refused: Refused, run_yaml: Path, run_id: str) -> None:
    assert "plain folder name" in refused("train", "--yaml", run_yaml, "--run-id", run_id)


def test_output_folder_that_is_a_file(refused: Refused, run_yaml: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    message = refused("train", "--yaml", run_yaml, "--", f"output_dir={tmp_path / 'taken'}")
    assert str(tmp_path / "taken") in message


def test_run_folder_that_is_a_file(refused: Refused, run_yaml: Path, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "mine").write_text("")
    assert "mine" in refused("train", "--yaml", run_yaml, "--run-id", "mine")


def test_unwritable_output_folder(refused: Refused, run_yaml: Path, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write anywhere")
    assert "cannot write" in refused("train", "--yaml", run_yaml, "--", f"output_dir={folder}")


def test_eval_without_checkpoints(refused: Refused, make_run: Callable[..., Path]) -> None:
    make_run("mine")
    assert "no whole checkpoint" in refused("eval", "--run-id", "mine")


@pytest.mark.parametrize("arguments", [["--trials", "0"], ["--workers", "0"], ["--", "eval.slotz=3"]], ids=" ".join)
def test_eval_with_wrong_settings(refused: Refused, make_run: Callable[..., Path], arguments: list[str]) -> None:
    make_run("mine", done=3)
    assert "eval." in refused("eval", "--run-id", "mine", *arguments)


def test_eval_writes_and_prints_whose_matrix_it_is(
    make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its label, too, also where the manifest is older than labels; nothing has to be played for it."""
    folder = make_run("mine", done=3)
    manifest = json.loads((folder / "manifest.json").read_text())
    for column in manifest["visits"]:
        column["env"]["type"] = "libero_state"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    out = tmp_path / "out"
    for j in range(3):
        cell = CellFile(out / "mine/eval", 2, j)
        seed = EpisodeSeeds(RULE, "test", 0, manifest["visits"][j]["task"]).of(0)
        cell.append({"k": 2, "j": j, "episode": 0, "seed": seed, "success_once": True, "success_at_end": True})
    assert main(["eval", "--run-id", "mine", "--trials", "1", "--last-only", "--output-base", str(out)]) == 0
    label = "object poses instead of camera images"
    assert f"privileged observations: {label}\n" in capsys.readouterr().out
    run = json.loads((out / "mine/eval/matrix.json").read_text())["run"]
    assert (run["run_id"], run["algorithm"], run["seed"], run["privileged"]) == ("mine", "seqfft", 0, label)
    settings = json.loads((out / "mine/eval/settings.json").read_text())
    assert settings["run"] == str(folder.resolve()) and "simulators" not in settings
    assert main(["metrics", str(out / "mine"), "--bootstrap", "0"]) == 0
    assert f"toy, seqfft, toy, seed 0, privileged observations ({label})" in capsys.readouterr().out


def test_eval_output_that_is_a_file(refused: Refused, make_run: Callable[..., Path], tmp_path: Path) -> None:
    make_run("mine", done=3)
    (tmp_path / "taken").write_text("")
    assert "taken" in refused("eval", "--run-id", "mine", "--output-base", tmp_path / "taken")


@pytest.mark.parametrize(
    ("file", "content"),
    [("manifest.json", "{"), ("manifest.json", "[]"), ("config.yaml", "a: [1"), ("config.yaml", "old_key: 1\n")],
)
def test_eval_of_a_damaged_run(refused: Refused, make_run: Callable[..., Path], file: str, content: str) -> None:
    folder = make_run("mine", done=3)
    (folder / file).write_text(content)
    assert file in refused("eval", "--run-id", "mine")


def test_a_damaged_checkpoint_is_told_with_the_command_that_makes_it_again(
    refused: Refused, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = make_run("mine", done=3)
    (run / "checkpoints" / "task_02" / "more").write_text("")
    assert refused("eval", "--run-id", "mine", "--last-only").endswith("clbench train --resume mine")
    run.rename(tmp_path / "elsewhere")
    message = refused("eval", "--run-id", tmp_path / "elsewhere", "--last-only")
    assert message.endswith(f"clbench train --resume {tmp_path / 'elsewhere'}")


@pytest.mark.parametrize("which", ["9", "-1", "x", "²"])
def test_init_from_a_checkpoint_that_is_not_there(refused: Refused, make_run: Callable[..., Path], which: str) -> None:
    make_run("mine", done=2)
    assert "0 to 1" in refused("train", "--init-from", f"mine:{which}")


# ---------------------------------------------------------------------------------------------- YAML and overrides


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("train: {stepz: 5}\n", "Did you mean 'steps'?"),
        ("trian: {steps: 5}\n", "Did you mean 'train'?"),
        ("train: {steps: [1\n", "not valid YAML"),
        ("train: {steps: 5}\ntrain: {steps: 6}\n", "not valid YAML"),
        ("train: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("- train\n", "mapping"),
        ("algorithm: er\n", "algorithm"),
        ("algorithm: {name: 5}\n", "algorithm"),
        ("train: 5\n", "train"),
        ("\x00", "YAML"),
    ],
)
@pytest.mark.parametrize("smoke", [[], ["--smoke"]], ids=["", "smoke"])
def test_wrong_yaml(
    refused: Refused, run_yaml: Path, tmp_path: Path, content: str, says: str, smoke: list[str]
) -> None:
    extra = tmp_path / "extra.yaml"
    extra.write_text(content)
    assert says in refused("train", "--yaml", run_yaml, extra, *smoke)


def test_yaml_that_is_missing_or_a_folder(refused: Refused, run_yaml: Path, tmp_path: Path) -> None:
    assert "does not exist" in refused("train", "--yaml", run_yaml, tmp_path / "none.yaml")
    assert str(tmp_path) in refused("train", "--yaml", run_yaml, tmp_path)


def test_yaml_alone_must_be_complete(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "part.yaml").write_text("train: {steps: 5}\n")
    assert "dataset." in refused("train", "--yaml", tmp_path / "part.yaml")


@pytest.mark.parametrize("override", ["train.steps", "5", "--train.steps", "train.steps 5"])
def test_override_that_is_no_assignment(refused: Refused, override: str) -> None:
    assert "key=value" in refused("train", "--", override)


@pytest.mark.parametrize("override", ["=5", "train..steps=5", "[=5", "train.steps=[1", "train.steps={a"])
def test_override_that_cannot_be_read(refused: Refused, override: str) -> None:
    refused("train", "--", override)


@pytest.mark.parametrize(
    "command", [["list"], ["metrics", "x"], ["report", "x"], ["sweep", "quickstart"]], ids="-".join
)
def test_commands_without_overrides(refused: Refused, command: list[str]) -> None:
    assert "overrides" in refused(*command, "--", "a=b")


@pytest.mark.parametrize("arguments", [["train", "--seed", "1_0"], ["data", "make", "x", "--demos", "٣"],
                                       ["metrics", "x", "--bootstrap", "1_000"]], ids=" ".join)  # fmt: skip
def test_numbers_of_flags_are_decimal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert f"{arguments[-1]!r} is not a whole number" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- processes, sweeps


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--nproc", "0"], "at least 1"),
        (["--gpus", "one"], "neither a count nor a list"),
        (["--gpus", "1,1"], "neither a count nor a list"),
        (["--gpus", "²"], "neither a count nor a list"),
        (["--gpus", "2", "--nproc", "2"], "--gpus alone says"),
        (["--strategy", "zero2"], "zero2 needs several processes"),
        (["--nproc", "3"], "cannot be shared equally by 3 processes"),
        (["--nproc", "2", "--port", "70000"], "no port number"),
    ],
)
def test_impossible_processes_are_refused(refused: Refused, arguments: list[str], says: str) -> None:
    assert says in refused("train", *arguments)


def test_a_launcher_must_have_started_what_is_asked_for(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "the launcher started 4" in refused("train", "--nproc", "2")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("algorithms: []\n", "empty"),
        ("algorithms: [seqfft]\nseedz: [0]\n", "Did you mean 'seeds'?"),
        ("algorithms: [seqfft]\nseeds: zero\n", "seeds"),
        ("algorithms: [seqfft]\nmodel: dit_dec_tini\n", "Did you mean 'dit_dec_tiny'?"),
        ("algorithms: [seqfft]\ndataset: metaworld_quik\n", "Did you mean 'metaworld_quick'?"),
        ("algorithms: [{label: x}]\n", "algo"),
        ("algorithms: [5]\n", "algorithm"),
        ("algorithms: [seqftt]\n", "Did you mean 'seqfft'?"),
        ("algorithms: [seqfft]\noverrides: [train.stepz=5]\n", "Did you mean 'steps'?"),
        ("algorithms: [{algo: er, overrides: [train.steps=0]}]\n", "train.steps"),
    ],
)
def test_wrong_experiment(refused: Refused, tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text(content)
    assert says in refused("sweep", path, "--dry-run")


def test_unknown_experiment(refused: Refused) -> None:
    assert "Did you mean 'quickstart'?" in refused("sweep", "quickstrt")


# ---------------------------------------------------------------------------------------------- matrices


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ragged.json", "[[1, 0], [1]]"),
        ("words.json", '[[1, "x"], [0, 1]]'),
        ("percent.json", "[[50, 0], [0, 100]]"),
        ("empty.json", "[]"),
        ("ragged.csv", "1,0\n1\n"),
        ("words.csv", "1,x\n0,y\n"),
        ("empty.csv", ""),
    ],
)
def test_wrong_matrix(refused: Refused, tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert name in refused("metrics", path)


def test_missing_matrix_and_run(refused: Refused, tmp_path: Path) -> None:
    assert "none.json" in refused("metrics", tmp_path / "none.json")
    assert "none" in refused("report", tmp_path / "none")


# ---------------------------------------------------------------------------------------------- the process


def command(*argv: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, argv)], capture_output=True, text=True, timeout=120, env={**os.environ, **env}
    )


def test_status_and_message_of_the_command() -> None:
    run = command("-m", "clbench.cli", "train", "--algo", "clar")
    assert "clare" in check(run.returncode, run.stderr)
    assert run.stdout == ""


def test_debug_shows_the_traceback() -> None:
    run = command("-m", "clbench.cli", "train", "--debug", "--algo", "clar")
    assert run.returncode == 2
    assert "Traceback" in run.stderr
    assert run.stderr.splitlines()[-1].startswith("clbench: unknown algorithm")


def test_metrics_script_says_one_line(tmp_path: Path) -> None:
    path = tmp_path / "ragged.csv"
    path.write_text("1,0\n1\n")
    run = command(SCRIPT, path)
    assert run.returncode == 2
    lines = [line for line in run.stderr.splitlines() if not line.startswith("reading runs and computing … ")]
    assert len(lines) == 1 and "ragged.csv" in lines[0]
    assert "Traceback" not in run.stderr


def test_help_and_mistakes_in_a_configuration_need_no_torch(run_yaml: Path, make_run: Callable[..., Path]) -> None:
    """Nothing heavy is imported for help, nor to find a mistake that the configuration alone shows."""
    make_run("mine")
    make_run("begun", done=1)
    begun = ["train", "--resume", "begun"]
    own = ["train", "--yaml", str(run_yaml), "--run-id", "begun", "--resume"]
    calls = [
        ["--help"],
        ["train", "--help"],
        ["list"],
        ["train", "--algo", "clar"],
        ["train", "--model", "nothing"],
        ["train", "--", "train.stepz=5"],
        ["train", "--", "train.steps=0"],
        ["train", "--", "train.batch_size=10", "train.gradient_accumulation=3"],
        ["train", "--yaml", f"{run_yaml}.none"],
        ["train", "--nproc", "2"],
        ["train", "--resume", "nothing"],
        [*begun, "--seed", "3"],
        [*begun, "--allow-change", "train.stepz"],
        [*begun, "--allow-change", "seed", "--seed", "3", "--", "train.steps=9"],
        [*own, "--", "policy.d_model=96"],
        ["train", "--", "policy.d_modell=4"],
        ["train", "--", "policy.d_model=wide"],
        ["train", "--", "policy.n_heads=0"],
        ["train", "--", "policy.chunk_size=7"],
        ["pretrain", "--", "policy.d_model=-4"],
        ["train", "--yaml", str(run_yaml), "--run-id", "a/b"],
        ["train", "--yaml", str(run_yaml), "--run-id", "mine"],
        ["eval", "--run-id", "nothing"],
        ["eval", "--run-id", "mine"],
        ["data", "make", "nothing"],
        ["sweep", "nothing"],
        ["metrics", "nothing"],
    ]
    code = """if True:
        import contextlib, io, json, sys
        from clbench.cli import main
        for argv in json.loads(sys.argv[1]):
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                try:
                    status = main(argv)
                except SystemExit as stop:
                    status = stop.code
            heavy = sorted({"torch", "lerobot", "matplotlib", "accelerate", "mujoco"} & set(sys.modules))
            print(json.dumps([argv, status, heavy]), flush=True)
    """
    run = command("-c", code, json.dumps(calls))
    assert run.returncode == 0, run.stderr
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert [argv for argv, _, heavy in results if heavy] == []
    assert [s for _, s, _ in results] == [0 if "--help" in c or c == ["list"] else 2 for c in calls]
