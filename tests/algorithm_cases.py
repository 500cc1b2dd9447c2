"""One row per algorithm. Every registered algorithm must have one; tests/test_algorithms.py runs each through all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """An algorithm on the toy stream.

    Attributes:
        trains: which parameters move during a task: all that match, and none else.
        keeps_old: what one task trained, no later task changes.
        overrides: of the rest of the configuration.
        label: the test's name; "" = the algorithm's.
    """

    name: str | list[str]
    config: dict[str, Any] = field(default_factory=dict)
    trains: str = ".*"
    stores_exemplars: bool = False
    adds_parameters: bool = False
    visits: int = 3
    keeps_old: bool = False
    overrides: tuple[str, ...] = ()
    label: str = ""

    def __post_init__(self) -> None:
        if not self.label:
            object.__setattr__(self, "label", self.name if isinstance(self.name, str) else "+".join(self.name))

    @property
    def section(self) -> dict[str, Any]:
        return {"name": self.name, **self.config}


SMALL_CLARE = {
    "adapter_hidden": 8,
    "discriminator_hidden": 8,
    "discriminator_latent": 4,
    "discriminator_steps": 6,
    "detect_steps": 3,
    "adapter_lr": 3e-3,
}

CLARE_PARTS = r".*\.clare_(adapters|discriminators)\..*"
LORA_TARGETS = r".*\.(q|kv|out|up|down|cond_proj)\.weight"
LORA_PARTS = r".*\.lora_[AB]\..*"
MEMORY = {"buffer_size_per_task": 10}
SMALL_MIR = {**MEMORY, "mir_candidate_size": 6, "mir_top_k": 3}

CASES = [
    Case("seqfft"),
    Case("seqlora", trains=LORA_TARGETS, overrides=("lora.rank=2", "train.optimizer.lr=1e-2")),
    Case("er", MEMORY, stores_exemplars=True),
    Case("mir", {**SMALL_MIR, "mir_refresh_interval": 2}, stores_exemplars=True),
    Case("ewc", {"ewc_lambda": 10.0, "fisher_batches": 2}),
    Case("packnet", {"prune_ratio": 0.5}),
    Case("clare", SMALL_CLARE, trains=CLARE_PARTS, adds_parameters=True, keeps_old=True),
    Case("multitask", visits=1),
    Case("singletask"),
    # variants and compositions
    Case("seqlora", {"merge": False}, trains=LORA_PARTS, adds_parameters=True, label="seqlora-carried",
         overrides=("lora.rank=2", "train.optimizer.lr=1e-2")),
    Case("er", {**MEMORY, "storage": "copy", "selection": "reservoir", "mode": "append"}, stores_exemplars=True,
         label="er-reservoir-copy-append"),
    Case("ewc", {"ewc_lambda": 10.0, "fisher_batches": 2, "ewc_online": False}, trains=LORA_PARTS, label="ewc-lora",
         adds_parameters=True, overrides=("lora.enabled=true", "lora.rank=2", "train.optimizer.lr=1e-2")),
    Case("packnet", {"capacity": "equal", "retrain_steps": 3, "eval_with_task_id": True}, trains=LORA_PARTS,
         label="packnet-lora", adds_parameters=True,
         overrides=("lora.enabled=true", "lora.rank=2", "train.optimizer.lr=1e-2")),
    Case("mir", {**SMALL_MIR, "mir_refresh_interval": 1}, stores_exemplars=True, trains=LORA_PARTS, label="mir-lora",
         adds_parameters=True, overrides=("lora.enabled=true", "lora.rank=2", "train.optimizer.lr=1e-2")),
    Case(["er", "ewc"], {**MEMORY, "ewc_lambda": 10.0, "fisher_batches": 2}, stores_exemplars=True),
    Case(["packnet", "seqlora"], {"merge": False}, trains=LORA_PARTS, adds_parameters=True,
         overrides=("lora.rank=2", "train.optimizer.lr=1e-2")),
    Case(["er", "clare"], {**MEMORY, **SMALL_CLARE}, stores_exemplars=True, adds_parameters=True, trains=CLARE_PARTS,
         keeps_old=True),
]  # fmt: skip
