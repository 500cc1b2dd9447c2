"""The trainer: accumulation, schedules, carried optimizers, precision, resuming, and runs that go wrong."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from clbench.algorithms.hooks import CLAlgorithm
from clbench.checkpoints.policy_io import load_policy
from clbench.checkpoints.run_folder import checkpoint_folder, finished_visits
from clbench.checkpoints.state import load_state, save_state
from clbench.checkpoints.whole import write_whole
from clbench.config.schema import LoraConfig, OptimizerConfig
from clbench.data import verify
from clbench.data.frames import SampleOrder, StreamFrames
from clbench.errors import Interrupted, UserError
from clbench.io import read_json, read_jsonl, write_json
from clbench.registry import ALGORITHMS
from clbench.seeding import generator
from clbench.stopping import Stop
from clbench.streams.stream import build_stream
from clbench.testing.toy import STREAM, toy_config
from clbench.training import pretrain
from clbench.training.loop import PhaseRunner, schedule_factor
from clbench.training.trainer import train
from tests.algorithm_cases import SMALL_CLARE, SMALL_MIR


def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint_folder(folder, finished_visits(folder) - 1) / "policy" / "model.safetensors")


def largest_difference(a: Path, b: Path) -> float:
    x, y = final(a), final(b)
    assert x.keys() == y.keys()
    return max(float((x[k] - y[k]).abs().max()) for k in x)


@pytest.mark.parametrize(
    "algorithm",
    [
        {"name": "er", "buffer_size_per_task": 10},
        {"name": "er", "mode": "append"},
        {"name": "mir", **SMALL_MIR, "mode": "append", "mir_refresh_interval": 2},
        {"name": ["mir", "ewc"], **SMALL_MIR, "mir_refresh_interval": 1, "ewc_lambda": 10.0, "fisher_batches": 2},
        {"name": "packnet"},
    ],
    ids=lambda a: str(a["name"]),
)
def test_accumulation_changes_nothing_but_rounding(toy_data: Path, tmp_path: Path, algorithm: dict[str, Any]) -> None:
    """The same samples, replayed samples, noise and timesteps, whether a batch is split or not (plain SGD, fp32)."""
    sgd = ("train.optimizer.name=sgd", "train.optimizer.lr=0.01", "train.optimizer.weight_decay=0")
    runs = [
        train(
            toy_config(toy_data, algorithm, f"output_dir={tmp_path}", f"train.gradient_accumulation={n}", *sgd), f"a{n}"
        )
        for n in (1, 2, 4)
    ]
    base = load_file(Path(read_json(runs[0] / "manifest.json")["base"]["path"]) / "model.safetensors")
    assert max(float((final(runs[0])[k] - base[k]).abs().max()) for k in base) > 1e-3
    assert largest_difference(runs[0], runs[1]) < 2e-6
    assert largest_difference(runs[0], runs[2]) < 2e-6


def test_fine_tuning_is_a_plain_pytorch_loop(toy_data: Path, tmp_path: Path) -> None:
    """seqfft against a loop written out: AdamW, clipping, cosine, the samples and draws that the seed gives."""
    config = toy_config(toy_data, {"name": "seqfft"}, f"output_dir={tmp_path}", "dataset.task_order=[0,1]", "seed=3")
    folder = train(config, "r")
    loaded = load_policy(read_json(folder / "manifest.json")["base"]["path"])
    policy = loaded.policy.train()
    frames = StreamFrames([v.tasks for v in build_stream(config.dataset).visits], policy.config)
    t = config.train
    for k in range(2):
        optimizer = torch.optim.AdamW(policy.parameters(), lr=t.optimizer.lr, weight_decay=t.optimizer.weight_decay)
        order = SampleOrder(frames.length(k), 3, k, "train")
        for step in range(t.steps):
            for group in optimizer.param_groups:
                group["lr"] = t.optimizer.lr * schedule_factor(t.optimizer, step, t.steps)
            index = order.take(step * t.batch_size, t.batch_size)
            batch = frames.fetch(torch.stack([torch.full_like(index, k), index], 1))
            draw = policy.sample_draw(t.batch_size, generator(3, k, "train", "draw", step))
            policy.per_sample_loss(loaded.preprocessor(batch), draw).mean().backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), t.optimizer.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
    trained = final(folder)
    for name, value in policy.state_dict().items():
        assert torch.allclose(trained[name], value, atol=1e-6), name


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_run_trains_the_same(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """torch.compile, with replay and with layers that grow from task to task: equal to rounding (plain SGD).

    "eager" traces and runs what was traced; "inductor" (minutes) also generates and compiles code.
    """
    asked = []
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: asked.append(f) or compile_(f, backend=backend))
    section = {"name": ["er", "clare"], "buffer_size_per_task": 10, **SMALL_CLARE}
    sgd = ("train.optimizer.name=sgd", "train.optimizer.lr=0.01", "train.optimizer.weight_decay=0", "train.steps=2")
    two = ("dataset.task_order=[0,1]", f"output_dir={tmp_path}")
    runs = [train(toy_config(toy_data, section, *sgd, *two, f"train.compile={c}"), c) for c in ("true", "false")]
    assert sum(isinstance(f, torch.nn.Module) for f in asked) == 2  # once a task
    a, b = (load_policy(checkpoint_folder(r, 1) / "policy").policy.state_dict() for r in runs)
    assert a.keys() == b.keys()
    assert max(float((a[n] - b[n]).abs().max()) for n in a) < 1e-5


def test_compiling_without_a_compiler_is_said_at_once(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no working C++ compiler\nlong explanation")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UserError, match=r"torch\.compile does not work here \(no working C\+\+ compiler\)"):
        train(toy_config(toy_data, {"name": "seqfft"}, "train.compile=true", f"output_dir={tmp_path}"), "r")
    assert not (tmp_path / "r" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("section", "overrides", "says"),
    [
        ({"name": "seqfft"}, {"policy": {"type": "act"}}, "policy.type=act cannot be built for this stream's data"),
        ({"name": "seqfft"}, {"policy": {"type": ["act"]}}, "unknown policy type"),
        ({"name": "seqlora"}, {"lora": LoraConfig(target_modules="nope.*")}, "lora.target_modules 'nope.*' matches no"),
        ({"name": "clare", "target_modules": "ffn"}, {}, "algorithm.target_modules 'ffn' matches no module"),
    ],
    ids=lambda a: str(a)[:30],
)
def test_a_start_that_fails_makes_neither_a_base_nor_a_run(
    toy_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    section: dict[str, Any],
    overrides: dict[str, Any],
    says: str,
) -> None:
    monkeypatch.setenv("CLBENCH_CACHE_ROOT", str(tmp_path / "cache"))
    config = replace(toy_config(toy_data, section, f"output_dir={tmp_path}/runs"), **overrides)
    with pytest.raises(UserError, match=re.escape(says)):
        train(config, "r")
    assert not (tmp_path / "runs" / "r").exists() and not list(tmp_path.glob("cache/bases/dit*"))
    assert "pretraining" not in capsys.readouterr().err


def test_what_the_machine_is_short_of_is_not_blamed_on_the_data(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def big(_: str) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setenv("CLBENCH_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setattr(pretrain, "get_policy_class", big)
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        train(toy_config(toy_data, {"name": "seqfft"}, f"output_dir={tmp_path}/runs"), "r")


def test_a_run_that_never_made_a_step_can_be_started_again(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unfit(*_: Any) -> None:
        raise UserError("it does not fit")

    config = toy_config(toy_data, {"name": "seqfft"}, f"output_dir={tmp_path}", "dataset.task_order=[0,1]")
    with monkeypatch.context() as patch:
        patch.setattr(CLAlgorithm, "on_task_start", unfit)
        with pytest.raises(UserError, match="does not fit"):
            train(config, "r")
    assert not (tmp_path / "r").exists()
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "notes.txt").write_text("mine")  # others' files are no run
    assert finished_visits(train(config, "r")) == 2
    assert (tmp_path / "r" / "notes.txt").read_text() == "mine"


def test_schedule() -> None:
    cosine = OptimizerConfig(warmup_steps=10, final_lr_ratio=0.1)
    assert schedule_factor(cosine, 0, 110) == pytest.approx(1 / 11)
    assert schedule_factor(cosine, 10, 110) == pytest.approx(1.0)
    assert schedule_factor(cosine, 60, 110) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert schedule_factor(cosine, 110, 110) == pytest.approx(0.1)
    assert schedule_factor(OptimizerConfig(schedule="constant", warmup_steps=0), 99, 100) == 1.0


def test_learning_rate_starts_again_with_every_task(toy_data: Path, tmp_path: Path) -> None:
    config = toy_config(toy_data, {"name": "seqfft"}, f"output_dir={tmp_path}", "train.optimizer.warmup_steps=1")
    rows = [r for r in read_jsonl(train(config, "r") / "log.jsonl") if r["event"] == "step"]
    rates = [[r["lr"] for r in rows if r["k"] == k] for k in range(3)]
    assert rates[0] == rates[1] == rates[2] and len(set(rates[0])) > 2


def test_optimizer_can_be_carried_and_resumed(toy_data: Path, tmp_path: Path) -> None:
    carried = "train.optimizer_across_tasks=carried"
    config = toy_config(toy_data, {"name": "seqfft"}, f"output_dir={tmp_path}", carried)
    whole, fresh = (
        train(config, "whole"),
        train(toy_config(toy_data, {"name": "seqfft"}, f"output_dir={tmp_path}"), "f"),
    )
    assert largest_difference(whole, fresh) > 1e-4
    shutil.copytree(whole, tmp_path / "part")
    for k in (1, 2):
        shutil.rmtree(checkpoint_folder(tmp_path / "part", k))
    assert largest_difference(whole, train(config, "part", resume=True)) == 0.0


def test_bf16_trains_and_keeps_fp32_weights(toy_data: Path, tmp_path: Path) -> None:
    folder = train(
        toy_config(toy_data, {"name": "seqfft"}, f"output_dir={tmp_path}", "train.mixed_precision=bf16"), "r"
    )
    weights = final(folder)
    assert all(v.dtype == torch.float32 and torch.isfinite(v).all() for v in weights.values())
    losses = [r["loss"] for r in read_jsonl(folder / "log.jsonl") if r["event"] == "step"]
    assert all(math.isfinite(v) for v in losses)


def test_another_seed_is_another_run(toy_data: Path, tmp_path: Path) -> None:
    a = train(toy_config(toy_data, {"name": "seqfft"}, f"output_dir={tmp_path}"), "a")
    b = train(toy_config(toy_data, {"name": "seqfft"}, f"output_dir={tmp_path}", "seed=1"), "b")
    assert read_json(a / "manifest.json")["base"] == read_json(b / "manifest.json")["base"]  # one base for all seeds
    assert largest_difference(a, b) > 1e-4


class Poison(CLAlgorithm):
    """A penalty that is NaN on the second task."""

    name = "poison"

    def compute_penalty(self, model: torch.nn.Module) -> torch.Tensor | None:
        return torch.tensor(float("nan")) if self.ctx.k == 1 and self.ctx.step == 2 else None


def test_a_nan_loss_stops_and_keeps_what_was_earned(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ALGORITHMS, "poison", f"{__name__}:Poison")
    config = toy_config(toy_data, {"name": "poison"}, f"output_dir={tmp_path}")
    with pytest.raises(ValueError, match=r"loss is nan at task 2 \(push-v3\), phase train, step 2"):
        train(config, "r")
    assert finished_visits(tmp_path / "r") == 1
    assert all(torch.isfinite(v).all() for v in final(tmp_path / "r").values())


def test_an_existing_run_is_refused_or_resumed(
    toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = toy_config(toy_data, {"name": "seqfft"}, f"output_dir={tmp_path}")
    train(config, "r", resume=True)
    assert "there is nothing to resume" in capsys.readouterr().err
    before = final(tmp_path / "r")
    with pytest.raises(ValueError, match="exists already"):
        train(config, "r")
    train(config, "r", resume=True)
    assert "is complete" in capsys.readouterr().err
    other = toy_config(
        toy_data, {"name": "seqfft"}, f"output_dir={tmp_path}", "train.optimizer.lr=0.5", "eval.episodes=9"
    )
    with pytest.raises(ValueError, match=r"other settings: train\.optimizer\.lr \(was 0\.001, is 0\.5\)\. Use"):
        train(other, "r", resume=True)
    assert all(torch.equal(v, before[k]) for k, v in final(tmp_path / "r").items())


def test_bases_are_kept_apart_by_everything_they_depend_on(toy_data: Path, tmp_path: Path) -> None:
    def base(*overrides: str) -> str:
        config = toy_config(toy_data, {"name": "seqfft"}, f"output_dir={tmp_path}", "train.steps=1", *overrides)
        folder = train(config, f"r{len(list(tmp_path.iterdir()))}")
        return str(read_json(folder / "manifest.json")["base"]["path"])

    same = base()
    assert base("seed=5", "train.batch_size=4") == same
    others = {
        base("pretrain.steps=3"),
        base("policy.d_model=8"),
        base("dataset.pretrain.tasks=[reach-v3]"),
        base("pretrain.seed=1"),
    }
    assert len(others) == 4 and same not in others


def test_any_lerobot_folder_can_be_the_base(toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(toy_config(toy_data, {"name": "seqfft"}, f"output_dir={tmp_path}"), "first")
    path = checkpoint_folder(first, 2) / "policy"
    second = train(
        toy_config(toy_data, {"name": "seqfft"}, f"output_dir={tmp_path}", f"policy.path={path}", "train.steps=1"),
        "second",
    )
    digest = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    base = {"path": str(path), "kind": "given", "name": "policy", "sha256": digest}
    assert read_json(second / "manifest.json")["base"] == base
    monkeypatch.setenv("CLBENCH_MODEL_ROOT", str(path.parent))
    named = toy_config(toy_data, {"name": "seqfft"}, f"output_dir={tmp_path}", "policy.path=policy", "train.steps=1")
    assert read_json(train(named, "third") / "manifest.json")["base"] == base
    with pytest.raises(ValueError, match="not a LeRobot checkpoint folder"):
        train(toy_config(toy_data, {"name": "seqfft"}, f"output_dir={tmp_path}", "policy.path=/nowhere"), "fourth")


def test_state_files_round_trip_and_damage_is_named(tmp_path: Path) -> None:
    state = {"a": torch.arange(3), "b": {1: [1.5, "x", None, True], "t": torch.zeros(0, 2)}, "c": []}
    save_state(tmp_path, "s", state)
    back = load_state(tmp_path, "s")
    assert back["b"][1] == [1.5, "x", None, True] and torch.equal(back["a"], state["a"]) and back["c"] == []  # type: ignore[arg-type]
    assert back["b"]["t"].shape == (0, 2)
    with pytest.raises(TypeError, match="only tensors, numbers and strings"):
        save_state(tmp_path, "bad", {"x": object()})
    data = (tmp_path / "s.safetensors").read_bytes()
    (tmp_path / "s.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"s\.json and s\.safetensors do not match"):
        load_state(tmp_path, "s")


def test_tensorboard_gets_the_numbers(toy_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train(toy_config(toy_data, {"name": "seqfft"}, f"output_dir={tmp_path}", "log.tensorboard=true"), "r")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    rows = [r for r in read_jsonl(folder / "log.jsonl") if r["event"] == "step"]
    assert [s.value for s in events.Scalars("loss")] == pytest.approx([r["loss"] for r in rows], rel=1e-5)


def test_a_given_base_must_be_what_the_configuration_says(toy_data: Path, tmp_path: Path) -> None:
    first = train(
        toy_config(toy_data, {"name": "clare", **SMALL_CLARE}, f"output_dir={tmp_path}", "train.steps=1"), "c"
    )
    base = read_json(first / "manifest.json")["base"]["path"]
    common = (f"output_dir={tmp_path}", f"policy.path={base}", "train.steps=1")
    for changes, message in (
        ("policy.n_heads=4", "has n_heads 2, but the configuration says 4"),
        ("policy.type=dit_encdec", "has type 'dit_dec'"),
        ("policy.n_action_steps=99", "n_action_steps"),
    ):
        with pytest.raises(ValueError, match=message):
            train(toy_config(toy_data, {"name": "seqfft"}, *common, changes), f"x{changes[-2:]}")
    adapter = checkpoint_folder(first, 2) / "policy"
    with pytest.raises(ValueError, match="is an adapter"):
        train(toy_config(toy_data, {"name": "seqfft"}, f"output_dir={tmp_path}", f"policy.path={adapter}"), "y")


def test_what_a_policy_froze_stays_frozen(toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clbench.policies.dit_dec.modeling_dit_dec import DitDecPolicy

    build = DitDecPolicy.build_model

    def frozen(self: DitDecPolicy) -> Any:
        model = build(self)
        model.obs_encoder.requires_grad_(False)
        return model

    monkeypatch.setattr(DitDecPolicy, "build_model", frozen)
    folder = train(toy_config(toy_data, {"name": "seqfft"}, f"output_dir={tmp_path}", "pretrain.seed=77"), "r")
    base = load_file(Path(read_json(folder / "manifest.json")["base"]["path"]) / "model.safetensors")
    for name, value in final(folder).items():
        assert torch.equal(value, base[name]) == ("obs_encoder" in name), name


def test_resuming_on_other_data_is_refused(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path(shutil.copytree(toy_data, tmp_path / "data"))
    config = toy_config(data, {"name": "er"}, f"output_dir={tmp_path}")
    folder = train(config, "r")
    shutil.rmtree(checkpoint_folder(folder, 2))
    table = next((data / "stream").glob("data/*/*.parquet"))
    good = table.read_bytes()
    other = pq.read_table(table)
    at = other.column_names.index("action")
    pq.write_table(other.set_column(at, "action", other["action"].take([*range(1, len(other)), 0])), table)
    monkeypatch.setattr(verify, "START_BYTES", 0)  # as for a set that is too large for all starts
    with pytest.raises(ValueError, match="its frames are not those that were made"):
        train(config, "r", resume=True)
    table.write_bytes(good)
    manifest = read_json(folder / "manifest.json")
    manifest["data_fingerprint"] = "0" * 64
    write_json(folder / "manifest.json", manifest)
    with pytest.raises(ValueError, match=r"dataset\.data \(was 'data 0000"):
        train(config, "r", resume=True)


def test_an_interrupted_first_task_leaves_no_double_log(toy_data: Path, tmp_path: Path) -> None:
    config = toy_config(toy_data, {"name": "seqfft"}, f"output_dir={tmp_path}")
    whole = train(config, "whole")
    shutil.copytree(whole, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints")
    train(config, "again", resume=True)

    def steps(folder: Path) -> list[tuple[int, int, float]]:
        return [(r["k"], r["step"], r["loss"]) for r in read_jsonl(folder / "log.jsonl") if r["event"] == "step"]

    assert steps(whole) == steps(tmp_path / "again")


@pytest.mark.parametrize("how", ["policy.init=random", "dataset.pretrain=null"])
def test_a_base_of_random_weights(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    """Nothing is pretrained: weights drawn from pretrain.seed, statistics of the stream's own demonstrations."""
    monkeypatch.setenv("CLBENCH_CACHE_ROOT", str(tmp_path / "cache"))
    config = toy_config(toy_data, {"name": "seqfft"}, f"output_dir={tmp_path}", how, "log.progress=lines")
    folder = train(config, "r")
    said = capsys.readouterr()
    assert "the base's weights are random" in said.out + said.err and "pretraining" not in said.out
    base = read_json(folder / "manifest.json")["base"]
    assert base["kind"] == "random" and base["init"] == "random" and base["tasks"] == STREAM
    assert read_json(folder / "manifest.json")["heldout"] == []
    again = train(replace(config, seed=1), "s")  # another run's seed: the same base
    assert read_json(again / "manifest.json")["base"] == base
    loaded = load_policy(base["path"])
    other = replace(config, pretrain=replace(config.pretrain, seed=5))
    drawn = load_policy(read_json(train(other, "t") / "manifest.json")["base"]["path"])
    first = dict(loaded.policy.named_parameters())
    assert any(not torch.equal(first[n], p) for n, p in drawn.policy.named_parameters())
    tasks = build_stream(config.dataset).columns
    parts = StreamFrames([tasks], loaded.policy.config).parts(0)
    actions = torch.cat([p.table.columns["action"][p.frames] for p in parts])
    (normalizer,) = (s for s in loaded.preprocessor.steps if "Normalizer" in type(s).__name__)
    assert torch.allclose(torch.as_tensor(normalizer.stats["action"]["mean"]), actions.mean(0), atol=1e-6)


def test_an_unfinished_pretraining_of_an_earlier_version_starts_again(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLBENCH_CACHE_ROOT", str(tmp_path / "cache"))
    config = toy_config(toy_data, {"name": "seqfft"}, f"output_dir={tmp_path}", "train.save_every_steps=10")
    whole = read_json(train(config, "r") / "manifest.json")["base"]["sha256"]
    (base,) = (tmp_path / "cache" / "bases").glob("dit_dec-*")
    shutil.rmtree(base)
    asked = itertools.chain([""] * 12, itertools.repeat("a test"))
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="in pretraining, after step 13; saved"):
        patch.setattr(Stop, "reason", property(lambda self: next(asked)))
        train(config, "s")
    state = sorted((tmp_path / "cache" / "bases").glob(".*.training/training_state/0*"))[-1]
    save_state(state, "training", {"optimizer": None, "skipped": 0})  # as it was written before
    described = {k: v for k, v in read_json(state / "checkpoint.json").items() if k not in ("digest", "files", "seal")}
    shutil.copytree(state, tmp_path / "copy")

    def fill(folder: Path) -> dict[str, Any]:
        shutil.copytree(tmp_path / "copy", folder, dirs_exist_ok=True)
        (folder / "checkpoint.json").unlink()
        return described

    write_whole(state, fill, lambda: 0)
    folder = train(config, "s", resume=True)
    assert "is from an earlier version of clbench; pretraining starts again" in capsys.readouterr().err
    assert read_json(folder / "manifest.json")["base"]["sha256"] == whole


def test_the_number_of_threads_does_not_depend_on_the_machine(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for a run and two for its base, however many there were before; recorded. `train.threads` sets both."""
    monkeypatch.setenv("CLBENCH_CACHE_ROOT", str(tmp_path / "cache"))
    used: dict[str, set[int]] = {}
    step = PhaseRunner._train_step

    def noting(self: PhaseRunner, *a: Any, **k: Any) -> dict[str, float]:
        used.setdefault(self.ctx.stream.name.split()[0], set()).add(torch.get_num_threads())
        return step(self, *a, **k)

    monkeypatch.setattr(PhaseRunner, "_train_step", noting)
    before = torch.get_num_threads()
    try:
        for threads, name, want in (("null", "a", {"pretraining": {2}, "toy": {1}}), ("3", "b", {"toy": {3}})):
            torch.set_num_threads(4)
            used.clear()
            own = (f"output_dir={tmp_path}", f"train.threads={threads}", "pretrain.steps=3")
            folder = train(toy_config(toy_data, {"name": "seqfft"}, *own), name)
            assert used == want
            assert read_json(folder / "manifest.json")["sessions"][0]["threads"] == max(want["toy"])
    finally:
        torch.set_num_threads(before)
