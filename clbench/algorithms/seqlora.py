"""SeqLoRA: sequential low-rank fine-tuning (LoRA: Hu et al. 2021, arXiv 2106.09685; a baseline of CLARE's paper,
arXiv 2601.09512).

Before each task a fresh LoRA adapter is added; it alone trains, and after the task it is merged:

    W ← W + (α / r) · B A.

With `merge: false` a single adapter is trained through all tasks instead, and checkpoints hold that adapter.
`lora.*` sets rank, α, dropout and the layers. Nothing protects earlier tasks: a lower bound, like seqfft.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from clbench.adapters import lora
from clbench.algorithms.hooks import CLAlgorithm, Context
from clbench.config.schema import LoraConfig
from clbench.errors import UserError
from clbench.seeding import seeded

UNMERGED = "unmerged"  # folder of a training state with the adapter that is being trained


class SeqLoRA(CLAlgorithm):
    """Train low-rank adapters one after the other, merging each."""

    name = "seqlora"
    claims = frozenset({"structure"})

    @dataclass
    class Config:
        """Keys of `algorithm`; the adapter's own are in the `lora` section.

        Attributes:
            merge: true = a fresh adapter per task, merged after it; false = one adapter carried through all tasks.
        """

        merge: bool = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._lora = LoraConfig()

    @property
    def trains_new_parameters(self) -> bool:
        return bool(self.config.merge)

    def check(self, config: Any) -> None:
        self._lora = config.lora
        if self.config.merge and config.train.optimizer_across_tasks == "carried":
            raise UserError("seqlora trains a fresh adapter per task: train.optimizer_across_tasks must be fresh.")

    def on_task_start(self, ctx: Context) -> None:
        if not lora.lora_layers(ctx.policy):
            with seeded("seqlora", ctx.seed, ctx.k):
                lora.inject(ctx.policy, self._lora)

    def on_task_end(self, ctx: Context) -> None:
        if self.config.merge:
            lora.merge(ctx.policy)

    def save_policy(self, policy: nn.Module, folder: Any, base_path: str) -> bool:
        if not self.config.merge:
            lora.save(policy, Path(folder), base_path)
            return True
        if lora.lora_layers(policy):  # in the middle of a task: the weights under the adapter are no longer the base's
            lora.save(policy, Path(folder) / UNMERGED, base_path)
        return False

    def restore_structure(self, policy: nn.Module, folder: Any) -> None:
        if (Path(folder) / UNMERGED).is_dir():
            lora.load(policy, Path(folder) / UNMERGED)
