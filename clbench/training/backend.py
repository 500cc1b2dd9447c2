"""Devices, processes, precision, backward and step. The only file that imports Accelerate and DeepSpeed.

One process, or one per rank (`accelerate launch`, torchrun, srun). Every rank has the full policy and its share of
each global batch. Two strategies:

    ddp     gradients are averaged over ranks, in buckets, after a step's last micro-batch; every rank steps
    zero2   DeepSpeed ZeRO-2: gradients and optimizer moments are spread over ranks

Both give algorithms the same view: mean gradients between backward and step, weights after it. What a phase trains may
change from phase to phase, so a phase is prepared when it starts and released when it ends.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import resource
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from clbench.config.folders import shipped
from clbench.config.schema import TrainConfig
from clbench.errors import RankLost, UserError
from clbench.io import read_json
from clbench.launch import EXPECTED_RANKS, launched, world_size
from clbench.patience import patience
from clbench.terminal import tell

ZERO2_FILE = shipped("accelerate", "zero2.json")
MASTER = "master"  # key of a low-precision parameter's fp32 value in a saved optimizer state
BUCKET_NUMBERS = 2**23  # gradients averaged in one collective call (32 MB in fp32)


def autocast_precision(config: TrainConfig) -> str:
    """Accelerate's name for `train.mixed_precision`."""
    return "no" if config.mixed_precision == "fp32" else config.mixed_precision


class LocalGradients:
    """GradientView over `.grad`, which is the same on every rank."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters

    def names(self) -> Sequence[str]:
        return list(self._parameters)

    def get(self, name: str) -> Tensor | None:
        return self._parameters[name].grad

    def set(self, name: str, value: Tensor) -> None:
        p = self._parameters[name]
        if p.grad is None:
            p.grad = value.to(p).clone()
        else:
            p.grad.copy_(value)


class LocalWeights:
    """WeightView over the parameters, which are the same on every rank."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters

    def names(self) -> Sequence[str]:
        return list(self._parameters)

    def get(self, name: str) -> Tensor:
        return self._parameters[name].detach()

    @torch.no_grad()
    def set(self, name: str, value: Tensor) -> None:
        self._parameters[name].copy_(value)

    @torch.no_grad()
    def set_where(self, name: str, mask: Tensor, value: Tensor) -> None:
        p = self._parameters[name]
        torch.where(mask, value, p, out=p)


class ZeroGradients:
    """GradientView over ZeRO-2's partitions: every access is a collective call."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters

    def names(self) -> Sequence[str]:
        return list(self._parameters)

    def get(self, name: str) -> Tensor | None:
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(self._parameters[name])

    def set(self, name: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_grad

        safe_set_full_grad(self._parameters[name], value)


class ZeroWeights:
    """WeightView over ZeRO-2: the fp32 master, and the copy that the forward pass uses."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters

    def names(self) -> Sequence[str]:
        return list(self._parameters)

    def get(self, name: str) -> Tensor:
        p = self._parameters[name]
        if p.dtype == torch.float32:
            return p.detach()  # every rank has all of them, with the masters' values
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(p)

    @torch.no_grad()
    def set(self, name: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        p = self._parameters[name]
        p.copy_(value)
        safe_set_full_fp32_param(p, value.float())

    def set_where(self, name: str, mask: Tensor, value: Tensor) -> None:
        self.set(name, torch.where(mask, value.float(), self.get(name).float()))


# Without train.threads, on the CPU. Fixed, whatever the machine has: the number decides how sums are rounded.
CPU_THREADS = 1  # runs go side by side in sweeps
BASE_THREADS = 2  # a base is trained alone, before them


class Backend:
    """Accelerate (and DeepSpeed) behind the few operations that training needs."""

    def __init__(self, config: TrainConfig) -> None:
        if config.device == "cuda" and not torch.cuda.is_available():
            raise UserError("train.device is cuda, but torch sees no CUDA device. Use train.device=cpu or auto.")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
        cpu = config.device == "cpu" or not torch.cuda.is_available()
        threads = CPU_THREADS if cpu and config.threads is None else config.threads
        self.base_threads = BASE_THREADS if cpu and config.threads is None else config.threads
        if threads is not None:
            torch.set_num_threads(threads)
        self.strategy = config.strategy
        started = world_size()
        if started > 1:
            _join(cpu, config)
        # A process may train several runs, each with its own precision and, unless it is a rank, its own device.
        AcceleratorState._reset_state(reset_partial_state=started == 1 and not torch.distributed.is_initialized())
        self.accelerator = Accelerator(mixed_precision=autocast_precision(config), cpu=cpu)
        asked = int(os.environ.get(EXPECTED_RANKS, str(started)))
        if self.accelerator.num_processes != asked or started != asked:
            raise UserError(
                f"{asked} processes were requested, {started} were launched, and this one sees "
                f"{self.accelerator.num_processes}. Each would train alone; nothing was started."
            )
        if self.strategy == "zero2" and started == 1:
            raise UserError("train.strategy zero2 needs several processes: give --nproc or --gpus, or use ddp.")
        if self.strategy == "zero2" and config.optimizer_across_tasks == "carried":
            raise UserError("train.strategy zero2 rebuilds its optimizer: train.optimizer_across_tasks must be fresh.")
        self.device = self.accelerator.device
        self.parameters: Mapping[str, nn.Parameter] = {}
        self._engine: Any = None
        if config.compile:
            _check_compiler(self.device)

    # ---- processes ------------------------------------------------------------------------------
    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world_size(self) -> int:
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def barrier(self) -> None:
        """Wait until every rank gets here."""
        self.accelerator.wait_for_everyone()

    def agree(self, value: bool) -> bool:
        """Rank 0's `value`, on every rank."""
        if self.world_size == 1:
            return value
        flag = torch.tensor([int(value)], device=self.device)
        dist.broadcast(flag, 0)
        return bool(flag.item())

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on any rank."""
        if self.world_size == 1:
            return list(flags)
        found = torch.tensor([int(f) for f in flags], device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return [bool(f) for f in found.tolist()]

    def tell(self, value: Any) -> Any:
        """Rank 0's `value` (anything JSON can hold), on every rank."""
        if self.world_size == 1:
            return value
        text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=self.device)
        size = torch.tensor([len(text)], device=self.device)
        dist.broadcast(size, 0)
        if not self.is_main:
            text = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        dist.broadcast(text, 0)
        return json.loads(bytes(text.tolist()))

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Add tensors over all ranks, in place."""
        if self.world_size > 1:
            for bucket in _buckets(tensors):
                flat = torch.cat([t.reshape(-1) for t in bucket])
                dist.all_reduce(flat)
                for t, v in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                    t.copy_(v.view_as(t))

    def gather(self, tensor: Tensor) -> Tensor:
        """All ranks' tensors (of equal shapes), joined along dimension 0 in the order of ranks."""
        if self.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def mean_numbers(self, numbers: dict[str, float]) -> dict[str, float]:
        """Each number's mean over ranks."""
        if self.world_size == 1:
            return numbers
        values = torch.tensor(list(numbers.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(values)
        return dict(zip(numbers, (values / self.world_size).tolist(), strict=True))

    # ---- training -------------------------------------------------------------------------------
    def autocast(self) -> AbstractContextManager[Any]:
        return self.accelerator.autocast()

    def compiled(self, policy: nn.Module) -> nn.Module:
        """The policy, compiled afresh: its structure may have changed since the last phase."""
        torch.compiler.reset()
        return torch.compile(policy)  # type: ignore[return-value]

    def prepare(
        self, policy: nn.Module, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        """Set what the coming phase trains and with which optimizer."""
        self.parameters = parameters
        if self.strategy == "zero2":
            self._engine = _zero2_engine(policy, optimizer, self.world_size)

    def release(self) -> None:
        """The phase is over."""
        if self._engine is not None:
            self._engine.destroy()
            self._engine = None
            for p in self.parameters.values():  # they are views into the engine's buffer: give them their own memory
                p.data = p.data.clone()
                p.grad = None
        self.parameters = {}

    @contextmanager
    def making_a_base(self) -> Iterator[None]:
        """Inside the block, torch uses the number of threads for training a base."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.base_threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Add the loss's gradient. `last`: this is the step's last micro-batch, after which gradients are averaged."""
        if self._engine is not None:
            self._engine.set_gradient_accumulation_boundary(last)
            self._engine.backward(loss, scale_wrt_gas=False)
            return
        loss.backward()
        if last and self.world_size > 1:
            for p in self.parameters.values():  # a rank whose share does not use a parameter has no gradient for it
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
            self.sum(gradients)
            torch._foreach_div_(gradients, self.world_size)

    def gradients(self) -> LocalGradients | ZeroGradients:
        return LocalGradients(self.parameters) if self._engine is None else ZeroGradients(self.parameters)

    def weights(self) -> LocalWeights | ZeroWeights:
        return LocalWeights(self.parameters) if self._engine is None else ZeroWeights(self.parameters)

    def clip(self, max_norm: float) -> float:
        """Clip the global gradient norm to `max_norm` (0 = only measure it); returns the norm before."""
        if self._engine is not None:
            optimizer = self._engine.optimizer
            optimizer.clip_grad = max_norm
            return float(optimizer.scaled_global_norm())
        limit = max_norm if max_norm > 0 else float("inf")
        return float(torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), limit))

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._engine is not None:
            self._engine.step()
            return
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def skip(self, optimizer: torch.optim.Optimizer) -> None:
        """Skip the step: drop its gradients."""
        if self._engine is not None:
            # DeepSpeed skips a step whose gradients are not finite, if it checks: let it check and find one.
            first = next(iter(self.parameters))
            poison = torch.full_like(self.parameters[first], float("nan"), dtype=torch.float32)
            ZeroGradients(self.parameters).set(first, poison)
            before = self._engine.optimizer.check_grad_overflow
            self._engine.optimizer.check_grad_overflow = True
            self._engine.step()
            self._engine.optimizer.check_grad_overflow = before
            return
        optimizer.zero_grad(set_to_none=True)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimizer's full state_dict, on every rank, in torch's form whatever the strategy.

        Under ZeRO-2 with low-precision parameters it includes their fp32 masters. Every rank must call this.
        """
        if self._engine is None:
            return optimizer.state_dict()
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        inner = self._engine.optimizer.optimizer
        state: dict[int, dict[str, Any]] = {}
        numbers = itertools.count()
        for parameters, group in zip(self._engine.optimizer.bit16_groups, inner.param_groups, strict=True):
            flat = inner.state.get(group["params"][0], {})
            for p in parameters:
                own: dict[str, Any] = {
                    key: safe_get_full_optimizer_state(p, key) if _is_flat(v, group) else v for key, v in flat.items()
                }
                if p.dtype != torch.float32:
                    own[MASTER] = safe_get_full_fp32_param(p)
                state[next(numbers)] = own
        return {"state": state, "param_groups": _described(inner.param_groups, self._engine.optimizer.bit16_groups)}

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
        """Restore `optimizer_state`, saved under either strategy and any number of ranks; after `prepare`."""
        if self._engine is None:
            plain = {i: {k: v for k, v in s.items() if k != MASTER} for i, s in saved["state"].items()}
            optimizer.load_state_dict({"state": plain, "param_groups": saved["param_groups"]})
            return
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        zero = self._engine.optimizer
        inner = zero.optimizer
        states = iter([saved["state"].get(i, {}) for i in range(sum(len(g) for g in zero.bit16_groups))])
        todo: list[tuple[nn.Parameter, dict[str, Any]]] = []
        for parameters, group in zip(zero.bit16_groups, inner.param_groups, strict=True):
            flat = group["params"][0]
            pairs = [(p, next(states)) for p in parameters]
            todo += pairs
            for p, own in pairs:
                for key, value in own.items():
                    if key == MASTER:
                        continue
                    spread = torch.is_tensor(value) and value.shape == p.shape and value.ndim > 0
                    inner.state[flat][key] = torch.zeros_like(flat) if spread else value
        if any(own for _, own in todo):
            zero._lazy_init_hp_params_optimizer_state()
        for p, own in todo:
            for key, value in own.items():
                if key == MASTER:
                    safe_set_full_fp32_param(p, value.to(self.device))
                elif torch.is_tensor(value) and value.shape == p.shape and value.ndim > 0:
                    safe_set_full_optimizer_state(p, value.to(self.device), key)

    def peak_memory_mb(self) -> float:
        """Peak memory of this process so far: allocated on the device, else resident, in MB."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e6
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


@contextmanager
def ranks_together() -> Iterator[None]:
    """Raise RankLost where the block fails because another rank is gone or does not answer."""
    try:
        yield
    except RuntimeError as e:
        if not launched() or not (isinstance(e, dist.DistError) or _OF_RANKS.search(str(e))):
            raise
        waited = re.search(r"[Tt]imed? ?out", str(e)) is not None
        why = (
            "waited for another rank in vain: it hangs, or is slower by more than train.collective_timeout_s"
            if waited
            else "lost another rank, which has ended"
        )
        raise RankLost(
            f"rank {os.environ.get('RANK', '?')} {why}. What was saved is kept: fix the cause, then run the same "
            "command with --resume."
        ) from e


# How messages of gloo, NCCL and the ranks' key-value store begin when another rank is gone or late.
_OF_RANKS = re.compile(r"gloo/|NCCL|TCPStore|ProcessGroup")


def _join(cpu: bool, config: TrainConfig) -> None:
    """Join the other ranks: gloo between CPU processes, NCCL between GPUs. Collective calls have a bounded wait."""
    timeout = timedelta(seconds=config.collective_timeout_s)
    if config.strategy == "zero2" and cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    if not dist.is_initialized():
        _meet(cpu, timeout)
    if config.strategy == "zero2":
        with patience("loading DeepSpeed, which compiles part of itself the first time", _left_by_a_compiler):
            try:
                import deepspeed
            except ImportError as e:
                raise UserError(
                    f"train.strategy zero2 needs DeepSpeed, which cannot be imported ({e}): install the extra "
                    "'deepspeed'."
                ) from e
            backend = "gloo" if cpu else "nccl"
            deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timeout)


def _left_by_a_compiler() -> str:
    """What to do when compiling waits for a killed compiler: its lock is a file, which nobody removes."""
    from torch.utils.cpp_extension import get_default_build_root  # it looks for CUDA, and prints so

    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    locks = {str(path.resolve()): path for path in folder.glob("**/lock")}
    for descriptor in Path("/proc").glob("[0-9]*/fd/*") if locks else ():
        with suppress(OSError):  # gone by now, or another user's
            locks.pop(os.readlink(descriptor), None)
    if not locks:
        return ""
    path = next(iter(locks.values()))
    return f"no process here holds its lock {path}; if none compiles elsewhere, remove it: rm {shlex.quote(str(path))}"


def _meet(cpu: bool, timeout: timedelta) -> None:
    """Wait for all ranks to meet at MASTER_ADDR and MASTER_PORT."""
    found = {n: os.environ.get(n, "") for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    wrong = [f"{n}={v}" if v else f"{n} is not set" for n, v in found.items() if not v.isdecimal()]
    wrong += [] if os.environ.get("MASTER_ADDR") else ["MASTER_ADDR is not set"]
    if not wrong and int(found["RANK"]) >= int(found["WORLD_SIZE"]):
        wrong = [f"RANK={found['RANK']} is not below WORLD_SIZE={found['WORLD_SIZE']}"]
    if wrong:
        raise UserError(
            f"this should be one of several ranks, but {', '.join(wrong)} in the environment. Start ranks with --nproc "
            "or --gpus, or with a launcher that sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."
        )
    rank, ranks = found["RANK"], found["WORLD_SIZE"]
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        with patience(f"waiting for {ranks} ranks to meet at {place}"):
            PartialState(cpu=cpu, timeout=timeout)
    except dist.DistError as e:
        if "EADDRINUSE" in str(e) or "address already in use" in str(e):
            raise UserError(
                f"the port where the ranks meet, {place}, is in use by another program. Choose another (--port, or "
                "MASTER_PORT with another launcher)."
            ) from e
        raise UserError(
            f"rank {rank} did not meet the other {int(ranks) - 1} at {place} (MASTER_ADDR, MASTER_PORT) within "
            f"{timeout.total_seconds():g} s (train.collective_timeout_s). Check that all were started, each with its "
            "own RANK, and that rank 0's machine can be reached there."
        ) from e


def _check_compiler(device: torch.device) -> None:
    """Raise UserError unless torch.compile works here, before any long work starts."""
    try:
        torch.compile(lambda x: (x + 1).sin())(torch.zeros(2, device=device))
    except Exception as e:  # whatever is wrong with the compiler
        reason = str(e).strip().splitlines()[0][:200] if str(e).strip() else type(e).__name__
        raise UserError(
            f"train.compile is on, but torch.compile does not work here ({reason}). On the CPU it needs a C++ compiler "
            "(g++); or set train.compile=false."
        ) from e


def _zero2_engine(policy: nn.Module, optimizer: torch.optim.Optimizer, ranks: int) -> Any:
    """A DeepSpeed engine over the parameters of `optimizer`.

    Bucket sizes and the like are in configs/accelerate/zero2.json. The training loop splits micro-batches, so the
    engine gets one; clipping is set at each step.
    """
    import deepspeed

    trained = [p for g in optimizer.param_groups for p in g["params"]]
    low = {p.dtype for p in trained} == {torch.bfloat16}
    settings = {
        **read_json(ZERO2_FILE),
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": ranks,
        "bf16": {"enabled": low},
        "gradient_clipping": 0.0,
    }
    engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine


def _is_flat(value: Any, group: dict[str, Any]) -> bool:
    return torch.is_tensor(value) and value.shape == group["params"][0].shape and value.ndim > 0


def _described(groups: Sequence[dict[str, Any]], parameters: Sequence[Sequence[nn.Parameter]]) -> list[dict[str, Any]]:
    """param_groups of a state_dict: settings, and parameters by number."""
    out, start = [], 0
    for group, own in zip(groups, parameters, strict=True):
        settings = {k: v for k, v in group.items() if k != "params"}
        out.append({**settings, "params": list(range(start, start + len(own)))})
        start += len(own)
    return out


def _buckets(tensors: Sequence[Tensor]) -> Iterable[list[Tensor]]:
    """Tensors of one type, in their order, in groups of about BUCKET_NUMBERS numbers."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for t in tensors:
        kinds.setdefault((t.dtype, t.device), []).append(t)
    for group in kinds.values():
        bucket: list[Tensor] = []
        for t in group:
            bucket.append(t)
            if sum(b.numel() for b in bucket) >= BUCKET_NUMBERS:
                yield bucket
                bucket = []
        if bucket:
            yield bucket


def count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def say(backend: Backend, text: str) -> None:
    """Print to stderr once, not once per rank."""
    if backend.is_main:
        tell(text)
