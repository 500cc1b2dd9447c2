"""Faults that published code of these methods has had, each as a small patch: some test must turn red for every one.

A fault replaces one piece of a file's text by another. tests/test_planted_faults.py checks that each piece is there
once, and, among the slow tests, applies each to a copy of the package and runs the tests that it names.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One planted fault.

    Attributes:
        method: the algorithm that it is of.
        what: the fault, in words.
        file: under clbench/.
        right, wrong: the text that is there once, and what takes its place.
        tests: arguments of pytest: at least one of these tests must fail.
    """

    method: str
    what: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"{self.method}: {self.what}"


def _table(method: str) -> tuple[str, ...]:
    return ("tests/test_algorithms.py", "-k", f"TestAlgorithms and {method}- or TestAlgorithms and {method}]")


REPLAY = ("tests/test_replay.py", "tests/test_learner.py")
MIR = ("tests/test_mir.py",)
AGEM = ("tests/test_agem.py",)
EWC = ("tests/test_ewc.py",)
PACKNET = ("tests/test_packnet.py",)
CLARE = ("tests/test_clare.py",)
LORA = ("tests/test_lora.py",)
TRAINER = ("tests/test_trainer.py",)
REFERENCES = ("tests/test_references.py",)
RANKS = ("tests/test_ranks.py", "-k", "one_process_trains and ddp")

FAULTS = [
    Fault("er", "the current task is replayed, too", "algorithms/memory.py",
          "return [v.k for v in ctx.stream.visits if v.task == ctx.visit.task]", "return []", REPLAY),
    Fault("er", "samples are drawn with replacement", "data/replay.py",
          "rounds = [torch.randperm(pool, generator=generator) for _ in range(-(-n // pool))]",
          "rounds = [torch.randint(pool, (n,), generator=generator)]", REPLAY),
    Fault("er", "every step replays the same samples", "algorithms/er.py",
          "return generator(purpose, self.ctx.seed, self.ctx.k, step, *phase)",
          "return generator(purpose, self.ctx.seed, self.ctx.k, *phase)", REPLAY),
    Fault("er", "the first positions of a batch are replaced, so ranks replay unequal shares", "algorithms/er.py",
          "edge = torch.arange(batch + 1) * m // batch", "edge = torch.arange(batch + 1).clamp(max=m)", REPLAY),
    Fault("er", "the reservoir favours late samples", "data/replay.py",
          "dtype=torch.float64) * (t + 1)).long()", "dtype=torch.float64) * (t * 0 + self.capacity)).long()", REPLAY),
    Fault("mir", "the least interfered samples are chosen", "algorithms/mir.py",
          "return (after - before).float()", "return (before - after).float()", MIR),
    Fault("mir", "the two losses of a candidate have different noise", "algorithms/mir.py",
          "                        after = ctx.loss(candidates, draw)",
          "                        other = ctx.draw(batch_size(candidates), ctx.generator('other', ctx.step))\n"
          "                        after = ctx.loss(candidates, other)", MIR),
    Fault("mir", "the virtual step is taken back by arithmetic, not from a copy", "algorithms/mir.py",
          "                p.copy_(kept[n])", "                p.add_(gradient[n].to(p.dtype), alpha=lr)", MIR),
    Fault("mir", "the virtual step follows one rank's gradient", "algorithms/context.py",
          "            if self.collective is not None:\n"
          "                self.collective.sum(list(found.values()))\n"
          "            return {n: g / self.world_size for n, g in found.items()}",
          "            return found", RANKS),
    Fault("agem", "the projection has the wrong sign", "algorithms/agem.py",
          "return product / norm if product < 0", "return -product / norm if product < 0", AGEM),
    Fault("agem", "gradients that agree are projected, too", "algorithms/agem.py",
          "if product < 0 else 0.0", "if product else 0.0", AGEM),
    Fault("agem", "the reference is the current samples' gradient", "algorithms/agem.py",
          "parameters, refs=refs)", "parameters)", AGEM),
    Fault("agem", "every step has the same reference batch", "algorithms/agem.py",
          'ctx.generator("agem-reference", ctx.step)', 'ctx.generator("agem-reference")',
          ("tests/test_agem.py",)),
    Fault("ewc", "the batch's gradient is squared, not each sample's", "policies/view.py",
          "total[name] += g.float().square().sum(0)", "total[name] += g.float().sum(0).square()", EWC),
    Fault("ewc", "the online anchor stays at the first task", "algorithms/ewc.py",
          "            self.center = anchor\n        else:", "            pass\n        else:", EWC),
    Fault("ewc", "the penalty lacks its factor of one half", "algorithms/ewc.py",
          "return 0.5 * scale * torch.dot(pull, move)", "return scale * torch.dot(pull, move)", EWC),
    Fault("ewc", "the Fisher is that of the task before", "algorithms/ewc.py",
          "refs = torch.stack([torch.full_like(index, ctx.k), index], 1)",
          "refs = torch.stack([torch.full_like(index, max(0, ctx.k - 1)), index], 1)", EWC),
    Fault("ewc", "γ discounts the new Fisher instead of the old", "algorithms/ewc.py",
          "self.config.ewc_gamma * self.fisher[n] + f for n, f", "self.fisher[n] + self.config.ewc_gamma * f for n, f",
          EWC),
    Fault("packnet", "frozen weights drift: they are not written back after a step", "algorithms/packnet.py",
          "            weights.set_where(name, frozen, self._values[name])", "            pass", PACKNET),
    Fault("packnet", "the smallest weights are kept", "algorithms/packnet.py",
          "magnitude.sort(descending=True, stable=True)", "magnitude.sort(descending=False, stable=True)", PACKNET),
    Fault("packnet", "the mask of a task lets the next one's weights through", "algorithms/packnet.py",
          "masked_fill_(owner > newest + 1, 0.0)", "masked_fill_(owner > newest + 2, 0.0)", PACKNET),
    Fault("packnet", "gradients of frozen weights reach clipping and moments", "algorithms/packnet.py",
          "grads.set(name, gradient.masked_fill_(frozen, 0.0))", "grads.set(name, gradient)", PACKNET),
    Fault("clare", "a sample is routed to the worst autoencoder", "adapters/clare.py",
          "self.errors(x).argmin(0)", "self.errors(x).argmax(0)", CLARE),
    Fault("clare", "novelty is not divided by the deviation", "adapters/clare.py",
          "/ std_J.clamp(min=1e-12)[:, None]).mean(1)", ").mean(1)", CLARE),
    Fault("clare", "one novel autoencoder is enough for a layer to expand", "algorithms/clare.py",
          "novelty = [float(v.min()) if len(v)", "novelty = [float(v.max()) if len(v)", CLARE),
    Fault("clare", "the momentum of μ and σ is the wrong way round", "adapters/clare_parts.py",
          "int(self.batches) == 1 else self.momentum", "int(self.batches) == 1 else 1 - self.momentum", CLARE),
    Fault("seqlora", "every task's adapter starts from the same random numbers", "algorithms/seqlora.py",
          'with seeded("seqlora", ctx.seed, ctx.k):', 'with seeded("seqlora", ctx.seed):', LORA),
    Fault("seqlora", "the adapter is dropped instead of merged", "adapters/lora.py",
          "        layer.merge(safe_merge=True)  # type: ignore[operator]\n", "", LORA),
    Fault("seqlora", "an adapter in the middle of a task is not saved", "algorithms/seqlora.py",
          "            lora.save(policy, Path(folder) / UNMERGED, base_path)", "            pass",
          _table("seqlora")),
    Fault("seqfft", "every task trains on the first one's demonstrations", "algorithms/sources.py",
          "        return torch.stack([torch.full_like(index, ctx.k), index], 1)",
          "        return torch.stack([torch.full_like(index, 0), index], 1)", TRAINER),
    Fault("seqfft", "the schedule never decays", "training/loop.py",
          "0.5 * (1 + math.cos(math.pi * progress))", "0.5 * (1 + math.cos(0.0 * progress))", TRAINER),
    Fault("seqfft", "micro-batches are summed, not averaged", "training/loop.py",
          "                loss = loss * ctx.world_size / samples",
          "                loss = loss * ctx.world_size * parts / samples", TRAINER),
    Fault("multitask", "it takes one task's steps for all of them", "algorithms/multitask.py",
          "steps=per_task * len(ctx.stream.columns)", "steps=per_task",
          REFERENCES),
    Fault("multitask", "a task that comes back counts twice", "streams/stream.py",
          "distinct = {t.name: t for t in _union_episodes(self.columns)}.values()",
          "distinct = _union_episodes(self.columns)",
          ("tests/test_streams.py",)),
    Fault("multitask", "the joint visit has the last visit's episodes alone", "streams/stream.py",
          "episodes.setdefault(t.name, set()).update(t.episodes)", "episodes[t.name] = set(t.episodes)",
          ("tests/test_streams.py",)),
    Fault("singletask", "visits go on from each other", "training/visits.py",
          '                if self.stream.mode == "singletask" and k != start.k:', "                if False:",
          REFERENCES),
    Fault("singletask", "a resumed visit starts from its checkpoint", "training/visits.py",
          'fresh = source is None or (self.stream.mode == "singletask" and not within)', "fresh = source is None",
          _table("singletask")),
    Fault("singletask", "the transform leaves the sequence as it is", "algorithms/singletask.py",
          "return stream.independent()", "return stream", REFERENCES),
]  # fmt: skip


def table() -> str:
    """The faults as a table, for docs/REPRODUCIBILITY.md."""
    rows = [f"| {f.method} | {f.what} | `clbench/{f.file}` |" for f in FAULTS]
    return "\n".join(["| method | planted fault | in |", "|---|---|---|", *rows]) + "\n"
