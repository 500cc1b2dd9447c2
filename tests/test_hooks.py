"""The protocol: order of calls, misspelt hooks, claims, composition, plugins through entry points."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clbench import registry
from clbench.algorithms.build import ComposedAlgorithm, build_algorithm
from clbench.algorithms.hooks import CLAlgorithm, Context, GradientView, Phase, WeightView, check_hooks, training_phase
from clbench.checkpoints.policy_io import policy_config
from clbench.config.compose import available, compose, load_yaml
from clbench.config.folders import SHIPPED
from clbench.data.frames import Batch
from clbench.io import read_jsonl
from clbench.registry import ALGORITHMS, algorithm_class
from clbench.testing.toy import toy_config
from clbench.training.trainer import train

CALLS: list[tuple[Any, ...]] = []


class Recorder(CLAlgorithm):
    """Writes down every call, halves gradients, adds a penalty, and clamps a weight after the step."""

    name = "recorder"
    claims = frozenset({"phases", "gradient_edits", "weight_edits"})

    def on_task_start(self, ctx: Context) -> None:
        CALLS.append(("on_task_start", ctx.k, ctx.visit.task))

    def phases(self, ctx: Context) -> list[Phase]:
        def enter(c: Context) -> None:
            CALLS.append(("on_enter", c.phase))

        def look(c: Context, batch: Batch, draw: dict[str, Tensor]) -> None:
            assert not torch.is_grad_enabled() and not c.policy.training
            CALLS.append(("on_batch", c.step, len(batch["task"])))

        return [
            Phase("look", 2, 4, None, policy_training=False, on_batch=look, on_enter=enter),
            dataclasses.replace(training_phase(ctx), steps=2, on_enter=enter),
        ]

    def observe(self, batch: Batch, task_id: int) -> None:
        CALLS.append(("observe", task_id, len(batch["task"])))

    def modify_batch(self, batch: Batch, task_id: int) -> Batch:
        CALLS.append(("modify_batch", task_id))
        return batch

    def compute_penalty(self, model: nn.Module) -> Tensor:
        CALLS.append(("compute_penalty",))
        return 0.001 * sum(p.square().sum() for p in model.parameters())

    def after_backward(self, model: nn.Module, grads: GradientView) -> None:
        CALLS.append(("after_backward",))
        for name in grads.names():
            value = grads.get(name)
            if value is not None:
                grads.set(name, torch.zeros_like(value))

    def after_step(self, model: nn.Module, weights: WeightView) -> None:
        CALLS.append(("after_step",))
        weights.set(weights.names()[0], torch.full_like(weights.get(weights.names()[0]), 7.0))

    def on_task_end(self, ctx: Context) -> None:
        CALLS.append(("on_task_end", ctx.k))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    monkeypatch.setitem(ALGORITHMS, "recorder", f"{__name__}:Recorder")


def test_hooks_are_called_in_the_documented_order(recorder: None, toy_data: Path, tmp_path: Path) -> None:
    config = toy_config(
        toy_data, {"name": "recorder"}, f"output_dir={tmp_path}", "train.gradient_accumulation=2",
        "train.optimizer.weight_decay=0", "dataset.task_order=[0,1]",
    )  # fmt: skip
    folder = train(config, "r")
    micro = [("observe", 0, 4), ("modify_batch", 0)]
    step = [*micro, *micro, ("compute_penalty",), ("after_backward",), ("after_step",)]
    expected = [
        ("on_task_start", 0, "hammer-v3"),
        ("on_enter", "look"), ("on_batch", 0, 4), ("on_batch", 1, 4),
        ("on_enter", "train"), *step, *step,
        ("on_task_end", 0),
    ]  # fmt: skip
    assert CALLS[: len(expected)] == expected
    assert CALLS[len(expected)] == ("on_task_start", 1, "push-v3")
    rows = [r for r in read_jsonl(folder / "log.jsonl") if r["event"] == "step"]
    assert rows and all(r["loss/recorder"] > 0 and r["grad_norm"] == 0 for r in rows)
    assert all(abs(r["loss"] - r["loss/policy"] - r["loss/recorder"]) < 1e-6 for r in rows)

    from clbench.checkpoints.policy_io import load_policy
    from clbench.io import read_json

    base = load_policy(read_json(folder / "manifest.json")["base"]["path"]).policy
    after = load_policy(folder / "checkpoints" / "task_01" / "policy").policy
    moved = [n for (n, a), b in zip(base.named_parameters(), after.parameters(), strict=True) if not torch.equal(a, b)]
    first = next(n for n, _ in base.named_parameters())
    assert moved == [first]  # zeroed gradients moved nothing; after_step set the first tensor
    assert (dict(after.named_parameters())[first] == 7.0).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("on_task_strat", "Did you mean 'on_task_start'"),
        ("after_backwards", "Did you mean 'after_backward'"),
        ("compute_penalties", "Did you mean 'compute_penalty'"),
        ("on_epoch_end", "is not a hook"),
        ("before_step", "is not a hook"),
    ],
)
def test_a_misspelt_hook_is_refused(name: str, message: str) -> None:
    cls = type("Typo", (CLAlgorithm,), {name: lambda self, ctx: None})
    with pytest.raises(ValueError, match=message):
        check_hooks(cls)


def test_a_hook_with_other_parameters_is_refused() -> None:
    cls = type("Args", (CLAlgorithm,), {"observe": lambda self, batch: None})
    with pytest.raises(ValueError, match=r"observe\(self, batch\) must take \(self, batch, task_id\)"):
        check_hooks(cls)
    check_hooks(type("Fine", (CLAlgorithm,), {"helper": lambda self: None, "_on_thing": lambda self: None}))


def test_two_claimants_are_named(toy_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALGORITHMS, "recorder", f"{__name__}:Recorder")
    with pytest.raises(ValueError, match="clare and recorder cannot be combined: both claim 'phases'"):
        build_algorithm(toy_config(toy_data, {"name": ["clare", "recorder"]}))


def test_composition_runs_in_order_and_after_hooks_in_reverse() -> None:
    calls: list[str] = []

    def part(label: str, penalty: float | None) -> CLAlgorithm:
        value = None if penalty is None else torch.tensor(penalty)
        cls = type(
            label,
            (CLAlgorithm,),
            {
                "name": label,
                "on_task_end": lambda self, ctx: calls.append(f"end {label}"),
                "after_step": lambda self, model, weights: calls.append(f"after {label}"),
                "compute_penalty": lambda self, model: value,
                "state_dict": lambda self: {"x": label},
            },
        )
        return cls(None)

    both = ComposedAlgorithm([part("a", 1.5), part("b", None), part("c", 2.0)])
    both.on_task_end(None)  # type: ignore[arg-type]
    both.after_step(None, None)  # type: ignore[arg-type]
    assert calls == ["end a", "end b", "end c", "after c", "after b", "after a"]
    assert float(both.compute_penalty(nn.Identity())) == 3.5  # type: ignore[arg-type]
    assert both.penalties(nn.Identity()).keys() == {"a", "c"}
    assert both.state_dict() == {"a": {"x": "a"}, "b": {"x": "b"}, "c": {"x": "c"}}
    with pytest.raises(ValueError, match="composed of"):
        both.load_state_dict({"a": {}})


@pytest.mark.parametrize("name", available("algorithms"))
def test_algorithm_files_show_the_real_defaults(name: str) -> None:
    section = load_yaml(SHIPPED / "algorithms" / f"{name}.yaml")["algorithm"]
    assert section.pop("name") == name
    assert section == dataclasses.asdict(algorithm_class(name).Config())


def test_every_algorithm_has_its_file() -> None:
    assert set(available("algorithms")) == set(ALGORITHMS)


def test_a_plugin_must_not_take_a_used_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    point = EntryPoint("er", "somewhere:ER", "clbench.algorithms")
    monkeypatch.setattr(registry, "_points", lambda axis: [point])
    with pytest.raises(ValueError, match="already taken"):
        registry.algorithm_names()


def test_keys_of_open_sections_take_the_types_of_their_classes() -> None:
    def composed(*overrides: str) -> Any:
        return compose(model="dit_dec_tiny", algorithms=["er"], dataset="metaworld_quick", overrides=overrides)[0]

    def er(*overrides: str) -> Any:
        return build_algorithm(composed(*overrides)).config

    assert er("algorithm.buffer_size_per_task=010").buffer_size_per_task == 10
    assert er("algorithm.replay_batch_ratio=00.5").replay_batch_ratio == 0.5
    for wrong, says in (
        ("algorithm.buffer_size_per_task=1_0", "must be a whole number"),
        ("algorithm.buffer_size_per_task=1e3", "must be a whole number"),
        ("algorithm.balanced_sampling=7", "must be true or false"),
        ("algorithm.mode=7e5", "must be a string, .*; the form is 'algorithm.mode=\"TEXT\"'"),
    ):
        with pytest.raises(ValueError, match=f"{wrong.partition('=')[0]} {says}"):
            er(wrong)
    policy = composed("policy.chunk_size=010", "policy.d_model=0128").policy
    assert policy_config(policy, "cpu").chunk_size == 10
    with pytest.raises(ValueError, match=r"policy\.chunk_size must be a whole number"):
        policy_config(composed("policy.chunk_size=1_0").policy, "cpu")
