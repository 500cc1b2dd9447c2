"""One row per algorithm that clbench brings, without exception; tests/test_algorithms.py runs each through all."""

from __future__ import annotations

from clbench.testing import Case

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
    Case("agem", {"buffer_size_per_task": 10, "reference_batch_size": 6}, stores_exemplars=True),
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
