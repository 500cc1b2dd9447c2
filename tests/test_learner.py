"""What stands between loop and policy: outputs, gradients of any samples, weights, memory, claims, state."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clbench import registry
from clbench.algorithms import memory as memory_module
from clbench.algorithms.build import ComposedAlgorithm
from clbench.algorithms.checks import HOOKS
from clbench.algorithms.hooks import CLAlgorithm, Context, GradientView, Plan, WeightView
from clbench.algorithms.memory import Memory
from clbench.algorithms.state import restore_state
from clbench.checkpoints.policy_io import LoadedPolicy
from clbench.data.frames import Batch, StreamFrames, concat
from clbench.errors import UserError
from clbench.policies.view import PolicyView
from clbench.seeding import generator
from clbench.streams.stream import build_stream
from clbench.testing.toy import toy_config
from clbench.training.loop import _shares
from clbench.training.pretrain import new_policy
from clbench.training.trainer import train
from tests import learners


def context(toy_data: Path, kind: str = "dit_dec", k: int = 0) -> Context:
    config = toy_config(toy_data, {"name": "seqfft"}, f"policy.type={kind}")
    stream = build_stream(config.dataset)
    frames = StreamFrames([v.tasks for v in stream.visits], _untrained(toy_data, kind).policy.config)
    loaded = _untrained(toy_data, kind)
    view = PolicyView(loaded.policy, loaded.policy, loaded.preprocessor, nullcontext)
    return Context(
        stream=stream, policy=loaded.policy, frames=frames, train=config.train, seed=0, device=torch.device("cpu"),
        view=view, log=lambda *a, **k: None, k=k, phase="train",
    )  # fmt: skip


def _untrained(toy_data: Path, kind: str) -> LoadedPolicy:
    config = toy_config(toy_data, {"name": "seqfft"}, f"policy.type={kind}")
    from clbench.checkpoints.policy_io import policy_config

    tasks = build_stream(config.dataset).columns
    frames = StreamFrames([tuple(tasks)], policy_config(dict(config.policy), "cpu"))
    return new_policy(dict(config.policy), frames, "cpu", 0)


def some(ctx: Context, n: int = 6) -> tuple[Batch, dict[str, Tensor]]:
    refs = torch.tensor([[0, 19 - 3 * i] for i in range(n)])
    return ctx.frames.fetch(refs), ctx.draw(n, generator("test"))


# ---- outputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dit_dec", "dit_encdec"])
def test_outputs_are_what_the_loss_compares(toy_data: Path, kind: str) -> None:
    ctx = context(toy_data, kind)
    batch, draw = some(ctx)
    found = ctx.outputs(batch, draw, ("loss", "prediction", "target", "mask", "features"))
    assert torch.equal(found.loss, ctx.loss(batch, draw))
    assert found.prediction.shape == found.target.shape == (6, 4, 4) and found.mask.shape == (6, 4)
    error = (found.prediction - found.target).square().mean(-1)
    by_hand = (error * found.mask).sum(1) / found.mask.sum(1)
    assert torch.allclose(by_hand, found.loss, rtol=1e-6)
    assert not bool(found.mask.all()), "no chunk reaches past its episode's end: take other samples"
    assert found.features.shape == (6, 16)
    grads = torch.autograd.grad(found.prediction.sum(), list(ctx.policy.parameters()), allow_unused=True)
    assert sum(float(g.abs().sum()) for g in grads if g is not None) > 0


def test_nothing_is_computed_that_is_not_asked_for(toy_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = context(toy_data)
    batch, draw = some(ctx)
    whole = ctx.outputs(batch, draw, ("features", "target"))
    model = ctx.policy.model
    monkeypatch.setattr(model, "velocity", lambda *a: pytest.fail("an action was predicted"))
    again = ctx.outputs(batch, draw, ("features", "target"))
    assert torch.equal(whole.features, again.features) and torch.equal(whole.target, again.target)
    assert again.loss is None and again.prediction is None and again.mask is None


def test_a_policy_without_outputs_is_refused_by_name() -> None:
    class Plain(nn.Module):
        config = type("C", (), {"type": "plain"})()

    view = PolicyView(Plain(), Plain(), lambda b: b, nullcontext)
    with pytest.raises(UserError, match="policy 'plain' has no prediction that a method could use: it gives only"):
        view.outputs({}, {}, ("loss", "prediction"))
    with pytest.raises(ValueError, match="no output 'logits'"):
        view.outputs({}, {}, ("logits",))


# ---- gradients of any samples --------------------------------------------------------------------


def test_mean_gradient_of_references_and_of_a_batch(toy_data: Path) -> None:
    ctx = context(toy_data)
    parameters = dict(ctx.policy.named_parameters())
    refs = torch.tensor([[1, 4], [0, 7], [2, 1], [0, 2], [1, 9]])
    by_refs = ctx.mean_gradient(generator("g"), parameters, refs=refs)
    by_batch = ctx.mean_gradient(generator("g"), parameters, batch=ctx.frames.fetch(refs))
    loss = ctx.loss(ctx.frames.fetch(refs), ctx.draw(5, generator("g"))).mean()
    by_hand = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for (name, _), want in zip(parameters.items(), by_hand, strict=True):
        want = torch.zeros_like(by_refs[name]) if want is None else want
        assert torch.allclose(by_refs[name], want, atol=1e-7) and torch.equal(by_refs[name], by_batch[name])
    assert all(p.grad is None for p in parameters.values())
    with pytest.raises(ValueError, match="not both"):
        ctx.mean_gradient(generator("g"), parameters, refs=refs, batch={})


def test_mean_gradient_over_ranks_is_that_of_all_samples(toy_data: Path) -> None:
    """Ranks hold 3 and 2 of five samples; what they add up is the one process's gradient."""
    ctx = context(toy_data)
    parameters = dict(ctx.policy.named_parameters())
    refs = torch.tensor([[1, 4], [0, 7], [2, 1], [0, 2], [1, 9]])
    alone = ctx.mean_gradient(generator("g"), parameters, refs=refs)

    class Two:
        def sum(self, tensors: list[Tensor]) -> None:
            parts.append([t.clone() for t in tensors])

        def gather(self, tensor: Tensor) -> Tensor:
            return torch.tensor([3, 2])

    ctx.collective, ctx.world_size = Two(), 2
    for by in ("batch", "refs"):
        parts: list[list[Tensor]] = []
        for rank, rows in ((0, slice(0, 3)), (1, slice(3, 5))):
            ctx.rank = rank
            given = {"batch": ctx.frames.fetch(refs[rows])} if by == "batch" else {"refs": refs}
            ctx.mean_gradient(generator("g"), parameters, **given)  # type: ignore[arg-type]
        for i, name in enumerate(parameters):
            assert torch.allclose(parts[0][i] + parts[1][i], alone[name], atol=1e-7), (by, name)


# ---- weighted planned samples --------------------------------------------------------------------


def test_weights_make_the_loss_a_sum_of_two_means() -> None:
    refs = torch.zeros(2, 2, dtype=torch.int64)
    losses = torch.tensor([1.0, 2.0, 3.0, 6.0, 10.0, 20.0])  # four current samples, two planned ones
    slots = torch.tensor([0, 1, 2, 3, 5, 4])
    shares = _shares(Plan(refs, added=2, weight=torch.tensor([0.5, 3.0])), slots, 4)
    assert float((losses * shares).sum()) == pytest.approx(12 / 4 + (3.0 * 10 + 0.5 * 20) / 2)
    assert float((losses * _shares(Plan(refs, added=2, weight=2.0), slots, 4)).sum()) == pytest.approx(3 + 2 * 15)
    for wrong in ({"added": 0}, {"added": 2, "shared": True}):
        with pytest.raises(ValueError, match="must be added, each by its own rank"):
            Plan(refs, weight=1.0, **wrong)
    with pytest.raises(ValueError, match="weights of shape"):
        Plan(refs, added=2, weight=torch.ones(3))


def test_planned_samples_live_until_after_backward(toy_data: Path, tmp_path: Path) -> None:
    learners.Weighted.seen.clear()
    with learners.registered():
        halves = "train.gradient_accumulation=2"
        train(toy_config(toy_data, {"name": "weighted"}, f"output_dir={tmp_path}", halves), "w")
    # Of the whole step, though it was trained in two micro-batches: 4 planned, 8 current ones, slots behind theirs.
    assert learners.Weighted.seen == [(4, 8, 8, 9, 10, 11)] * 8


# ---- one context ---------------------------------------------------------------------------------


def test_every_hook_sees_one_and_the_same_context(toy_data: Path, tmp_path: Path) -> None:
    seen: dict[str, set[int]] = {}

    class Watcher(CLAlgorithm):
        """Notes the contexts that its hooks see."""

        name = "watcher"
        claims = frozenset({"phases", "batch_mix"})

    def watch(hook: str) -> Any:
        original = getattr(CLAlgorithm, hook)

        def call(self: CLAlgorithm, *args: Any) -> Any:
            passed = [a for a in args if isinstance(a, Context)]
            seen.setdefault(hook, set()).update(id(c) for c in [self.ctx, *passed])
            return original(self, *args)

        call.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
        return call

    hooks = ("on_task_start", "phases", "plan_batch", "observe", "modify_batch", "compute_penalty", "after_backward",
             "after_step", "on_task_end", "parameter_groups")  # fmt: skip
    assert set(hooks) <= HOOKS
    for hook in hooks:
        setattr(Watcher, hook, watch(hook))
    registry.register("algorithms", "watcher", Watcher)
    try:
        train(toy_config(toy_data, {"name": "watcher"}, f"output_dir={tmp_path}"), "r")
    finally:
        registry.register("algorithms", "watcher", None)
    assert set(seen) == set(hooks)
    assert len(set.union(*seen.values())) == 1


# ---- claims --------------------------------------------------------------------------------------


class Edits(CLAlgorithm):
    """Writes what it has not claimed."""

    name = "edits"
    where = "grads"

    def after_backward(self, model: nn.Module, grads: GradientView) -> None:
        if self.where == "grads":
            name = grads.names()[0]
            value = grads.get(name)
            assert value is not None
            if "gradient_edits" not in self.claims:
                value.mul_(0.0)  # a copy
                assert float(grads.get(name).abs().sum()) > 0  # type: ignore[union-attr]
            grads.set(name, value)

    def after_step(self, model: nn.Module, weights: WeightView) -> None:
        if self.where == "weights":
            name = weights.names()[0]
            weights.set_where(name, torch.ones_like(weights.get(name), dtype=torch.bool), weights.get(name))


@pytest.mark.parametrize(("where", "claim"), [("grads", "gradient_edits"), ("weights", "weight_edits")])
@pytest.mark.parametrize("names", ["edits", ["er", "edits"]])
def test_writing_without_the_claim_is_refused(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, claim: str, names: Any
) -> None:
    monkeypatch.setattr(Edits, "where", where)
    registry.register("algorithms", "edits", Edits)
    try:
        with pytest.raises(UserError, match=f"edits writes .* and so must claim '{claim}'"):
            train(toy_config(toy_data, {"name": names}, f"output_dir={tmp_path}"), "r")
        monkeypatch.setattr(Edits, "claims", frozenset({claim}))
        assert train(toy_config(toy_data, {"name": names}, f"output_dir={tmp_path}"), "s").is_dir()
    finally:
        registry.register("algorithms", "edits", None)


# ---- state ---------------------------------------------------------------------------------------


class Anchored(CLAlgorithm):
    """Keeps something for each parameter, in the way of an earlier version."""

    name = "anchored"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.anchor: dict[str, Tensor] = {}
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"anchor": self.anchor, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.anchor, self.count = state["anchor"], state["count"]


class Declared(Anchored):
    """The same, declared."""

    name = "declared"
    state = ("anchor", "count")
    state_dict, load_state_dict = CLAlgorithm.state_dict, CLAlgorithm.load_state_dict


@pytest.mark.parametrize("cls", [Anchored, Declared])
@pytest.mark.parametrize("composed", [False, True])
def test_the_framework_moves_and_checks_state(cls: type[Anchored], composed: bool) -> None:
    policy = nn.Linear(3, 2).to("meta")
    part = cls(None)
    algorithm = ComposedAlgorithm([part]) if composed else part

    def restored(own: dict[str, Any]) -> None:
        restore_state(algorithm, {part.name: own} if composed else own, policy)

    anchor = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    restored({"anchor": anchor, "count": 4})
    assert part.count == 4 and part.anchor["weight"].device.type == "meta"  # where the parameter is
    restored({"anchor": {}, "count": 0})
    with pytest.raises(UserError, match=r"has weight of shape \(3, 2\), but the policy's has shape \(2, 3\)"):
        restored({"anchor": {**anchor, "weight": torch.ones(3, 2)}, "count": 4})
    with pytest.raises(UserError, match=r"state of .*(anchor|should hold)"):
        restored({"count": 4})
    with pytest.raises(UserError, match="state of "):
        restored({"anchor": anchor, "count": 4, "more": 1})


def test_what_is_not_kept_for_parameters_stays_where_it_is() -> None:
    policy = nn.Linear(3, 2).to("meta")
    algorithm = Declared(None)
    restore_state(algorithm, {"anchor": {"weight of another": torch.ones(2)}, "count": 1}, policy)
    assert algorithm.anchor["weight of another"].device.type == "cpu"


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", ["per_task", "reservoir"])
def test_values_stay_with_their_samples(toy_data: Path, selection: str) -> None:
    ctx = context(toy_data)
    memory = Memory(8, selection=selection, size=12 if selection == "reservoir" else None)
    memory.bind(ctx)
    for k in range(3):
        ctx.k = k
        memory.store(ctx)
        memory.put("sum", memory.references(k), memory.references(k).double() @ torch.tensor([100.0, 1.0]).double())
    refs = torch.cat([memory.references(k) for k in range(3)])
    if selection == "reservoir":  # what was let go has no value either
        assert len(refs) == 12 and sum(len(i) for i, _ in memory.values["sum"].values()) == 12
    refs = refs[torch.randperm(len(refs), generator=generator("order"))]
    assert torch.equal(memory.get("sum", refs), refs.double() @ torch.tensor([100.0, 1.0]).double())
    again = Memory(8, selection=selection, size=12 if selection == "reservoir" else None)
    again.load_state_dict(memory.state_dict())
    assert torch.equal(again.get("sum", refs), memory.get("sum", refs))
    free = next(i for i in range(60) if i not in memory.references(2)[:, 1].tolist())
    with pytest.raises(KeyError, match="no 'sum' is kept for a sample of visit 2"):
        memory.get("sum", torch.tensor([[2, free]]))


def test_the_current_task_is_never_drawn(toy_data: Path) -> None:
    ctx = context(toy_data)
    memory = Memory(8)
    memory.bind(ctx)
    memory.store(ctx)
    assert memory.available(ctx) == 0
    ctx.k = 1
    memory.store(ctx)
    assert memory.available(ctx) == 8
    assert set(memory.sample(ctx, 30, generator("x"))[:, 0].tolist()) == {0}
    assert memory.exemplar_bytes() == 16 * ctx.frames.parts(0)[0].sample_bytes()


def test_the_example_of_the_documentation_replays(toy_data: Path, tmp_path: Path) -> None:
    """The class in the module's docstring, as it stands there."""
    doc = inspect.getdoc(memory_module)
    assert doc is not None
    source = doc[doc.index("    class Replay") : doc.index("Samples are referred to")]
    names: dict[str, Any] = {"CLAlgorithm": CLAlgorithm, "Memory": Memory, "Plan": Plan, "concat": concat}
    exec(compile(textwrap.dedent(source), "memory.py", "exec"), names)
    replay = type("Replay", (names["Replay"],), {"name": "replay", "claims": frozenset({"batch_mix"})})
    registry.register("algorithms", "replay", replay)
    try:
        folder = train(toy_config(toy_data, {"name": "replay"}, f"output_dir={tmp_path}"), "r")
    finally:
        registry.register("algorithms", "replay", None)
    assert (folder / "checkpoints" / "task_02").is_dir()
