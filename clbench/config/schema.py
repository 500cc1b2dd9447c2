"""Every key a configuration may have, with its type, default and meaning.

`policy` and `algorithm` are open here: their keys are the fields of the chosen policy's and algorithms' own
configuration dataclasses, and are checked against those when the run is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import MISSING


@dataclass
class OptimizerConfig:
    """How a phase takes optimizer steps.

    Attributes:
        name: adamw | sgd.
        lr: peak learning rate.
        weight_decay: decoupled weight decay (adamw) or L2 (sgd).
        betas: AdamW's moment decays.
        momentum: SGD's.
        schedule: cosine | constant, over the steps of one task (or phase).
        warmup_steps: linear warm-up from 0.
        final_lr_ratio: the cosine ends at this share of `lr`.
        grad_clip: clip the global gradient norm to this; 0 = off.
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    momentum: float = 0.0
    schedule: str = "cosine"
    warmup_steps: int = 20
    final_lr_ratio: float = 0.0
    grad_clip: float = 1.0


@dataclass
class TrainConfig:
    """Training of one task.

    Attributes:
        steps: optimizer steps per task.
        batch_size: samples per optimizer step, over all ranks and micro-batches.
        gradient_accumulation: micro-batches a step is split into.
        optimizer_across_tasks: fresh | carried (moments are kept from task to task).
        mixed_precision: fp32 | bf16 (autocast; weights stay fp32).
        tf32: let NVIDIA GPUs round the inputs of fp32 matrix products to TF32: faster, less exact.
        compile: torch.compile the policy for training on the stream; on the CPU this needs a C++ compiler.
        log_every: steps between log lines.
        num_workers: loader processes, for images that must be decoded again for every batch.
        frame_cache_gb: decoded camera images are kept on disk (in the cache root) while those of a stream take no more
            than this; otherwise, and with 0, they are decoded for every batch.
        feature_cache_gb: features of a frozen image encoder are kept on disk likewise, instead of being made in every
            step, unless images are augmented. They differ from those made in a step in the last bits.
        threads: torch threads; null = on the CPU 1 (2 for pretraining the base), however many cores there are, because
            another number changes the last bits of sums, and with them the run; on a GPU torch's default.
        device: cpu | cuda | auto.
        strategy: ddp | zero2, how several processes share the work (docs/multi_gpu.md).
        collective_timeout_s: seconds after which ranks give up waiting for one that is gone.
        save_every_steps, save_every_minutes: how often the state in the middle of a task is saved, by steps of the
            run and by the clock; null = not by that measure.
        on_nonfinite: stop | skip, what a NaN or infinite loss or gradient does: end the run, or skip the step.
        eval_during_training: measure a learning curve of every task: success on it before its training and after each
            of this many equal parts of the training (10: the eleven points of LIBERO's metrics); null = none. The
            weights are evaluated alongside training, in separate processes, and removed when that is done.
        keep_weights_every_steps: also keep the weights within a task, every this many steps of it, for `clbench eval
            --step` and `--curves`; null = none. They stay until they are removed by hand.
    """

    steps: int = 300
    batch_size: int = 128
    gradient_accumulation: int = 1
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    optimizer_across_tasks: str = "fresh"
    mixed_precision: str = "fp32"
    tf32: bool = False
    compile: bool = False
    log_every: int = 25
    num_workers: int = 2
    frame_cache_gb: float = 20.0
    feature_cache_gb: float = 20.0
    threads: Optional[int] = None  # noqa: UP045 (OmegaConf reads this form)
    device: str = "auto"
    strategy: str = "ddp"
    collective_timeout_s: float = 1800.0
    save_every_steps: Optional[int] = None  # noqa: UP045
    save_every_minutes: Optional[float] = 10.0  # noqa: UP045
    on_nonfinite: str = "stop"
    eval_during_training: Optional[int] = None  # noqa: UP045
    keep_weights_every_steps: Optional[int] = None  # noqa: UP045


@dataclass
class AugmentConfig:
    """Random changes of camera images in training, of the base as well (clbench/policies/augment.py has the equations).

    All 0 and `crop` 1: none. They are part of each sample's draw: fixed where a method compares losses.

    Attributes:
        shift: by up to this share of the width, along both axes.
        crop: share of the area that is seen, in (0, 1], at a random place; acting sees the middle of it.
        brightness, contrast, saturation: factors up to 1 ± this.
        hue: turned by up to this share of the circle.
    """

    shift: float = 0.0
    crop: float = 1.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    @property
    def active(self) -> bool:
        return self != AugmentConfig()


@dataclass
class PretrainConfig:
    """Training of the base, once, on tasks outside the stream. Its seed is its own: all runs share the base."""

    steps: int = 2500
    batch_size: int = 256
    seed: int = 0
    log_every: int = 100
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(warmup_steps=100))


@dataclass
class MakeConfig:
    """How demonstrations are made (see docs/data.md).

    Attributes:
        demos_per_task: successful episodes kept per task.
        seed: determines every episode, together with the task's name.
        action_noise: standard deviation of the noise on executed actions.
        tail_steps: steps kept after the first success.
        max_steps: an attempt not solved after this many steps is dropped.
        ceiling_episodes: noiseless episodes per task that measure the expert; 0 = none.
    """

    demos_per_task: int = 20
    seed: int = 0
    action_noise: float = 0.1
    tail_steps: int = 10
    max_steps: int = 200
    ceiling_episodes: int = 20


@dataclass
class SetConfig:
    """One of several data sets. `data`, `repo_id` and `revision` as in `DatasetConfig`.

    Attributes:
        name: what the set's task is called under `partition: by_dataset`; "" = the last part of `repo_id` or `data`.
        rename: as `dataset.rename`, for this set alone and before it.
        exclude_episodes: indices of its episodes that are left out.
        weight: how often each of its frames is drawn, relative to the other sets', where one visit (or the base) learns
            from several: 2 = twice as often. Within a visit to one set it has no effect.
    """

    name: str = ""
    data: str = ""
    repo_id: Optional[str] = None  # noqa: UP045
    revision: Optional[str] = None  # noqa: UP045
    rename: dict[str, str] = field(default_factory=dict)
    exclude_episodes: list[int] = field(default_factory=list)
    weight: float = 1.0


@dataclass
class PretrainDataConfig:
    """The tasks that a base is trained on: disjoint from the stream's. Data as in `DatasetConfig`.

    `dataset.pretrain: NAME` takes another stream's data and tasks, with `partial: true`.

    Attributes:
        stream: the name in that short form; the other keys are written out when a configuration is composed.
        partial: leave out tasks that the data set (one, not several) does not have. Where it does not say which of
            several scenes an instruction is for, the first task with this instruction has all its episodes.
    """

    data: str = ""
    repo_id: Optional[str] = None  # noqa: UP045
    revision: Optional[str] = None  # noqa: UP045
    rename: dict[str, str] = field(default_factory=dict)
    instructions: dict[str, str] = field(default_factory=dict)
    exclude_episodes: list[int] = field(default_factory=list)
    sets: list[SetConfig] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    make: MakeConfig = field(default_factory=MakeConfig)
    stream: Optional[str] = None  # noqa: UP045
    partial: bool = False


@dataclass
class EnvConfig:
    """The simulator: its type, and the number of steps after which an episode has failed."""

    type: str = MISSING
    max_steps: int = 200


@dataclass
class RenderConfig:
    """How a simulator with cameras draws their images, both for demonstrations and for evaluation.

    Attributes:
        fidelity: fast | full, see clbench/envs/rendering.py; both show the same physics. null = as the training data
            were drawn; fast when data are made.
        size: height and width in pixels; null = as in the training data; 256 when data are made.
        mismatch: refuse | allow, what to do about training data that were drawn differently.
    """

    fidelity: Optional[str] = None  # noqa: UP045
    size: Optional[int] = None  # noqa: UP045
    mismatch: str = "refuse"


@dataclass
class DatasetConfig:
    """A task stream.

    Attributes:
        name: shown in reports.
        data: data set folder: a name under the data root, or a path. With `repo_id`, a path is where that set is kept,
            and a name is ignored. A list, or the name of one of `mixtures`: several sets (they become `sets`).
        repo_id: a LeRobot data set on the Hugging Face hub, OWNER/NAME; null = nothing is fetched from a hub. A list:
            several sets.
        revision: its branch, tag or commit; null = the tag of LeRobot's data format.
        sets: several data sets, each with settings of its own; then `data` and `repo_id` are empty.
        mixtures: name → a list of sets, as in `sets`; `data: NAME` takes it.
        partition: what a task is, without a simulator: by_task_index (all episodes with one instruction) | by_dataset
            (all episodes of one set) | by_episodes (a range of episodes, counted over all sets) | auto (by_task_index;
            by_dataset where that gives fewer than two tasks). Also read as `task_stream_mode`.
        num_tasks: the stream ends after so many tasks of its order; with by_episodes and no `tasks`, the episodes are
            divided into so many equal ranges. null = all tasks.
        rename: feature names of a data set that clbench did not make → names that the simulator uses.
        instructions: instructions of a data set that clbench did not make → the simulator's tasks that they describe,
            where the wording differs from the simulator's; without a simulator, short names of the tasks.
        exclude_episodes: indices of episodes of the data set that are left out; of several sets, a list for each.
        resize: camera (its name here) → pixels: its images, of any size, are stretched to so many by so many. Without
            a simulator; of the base's data as well.
        pad: observation.state or action → numbers: shorter vectors get zeros at their end, which neither the loss nor
            action errors count. Without a simulator; of the base's data as well.
        holdout: share of every task's episodes that is never trained on, for evaluation without a simulator: rounded
            up, at least two, at most half. Where a stream without a simulator does not say, it is 0.1 (see HOLDOUT).
        holdout_seed: which episodes these are, together with the task's name; the same for all training seeds.
        env: the simulator; null = the stream has none: it is evaluated by action errors on held-out episodes.
        tasks: the stream's tasks, in order. Without a simulator: as the data or `instructions` name them, and empty =
            all that there are; with by_dataset the sets' names, with by_episodes ranges such as "0-9".
        task_order: null, or names or indices into `tasks`, also ranges of indices ("0-4"); may leave out, reorder and
            repeat tasks.
        libero_order: null, or the published LIBERO task order, 0 to 20, in which a suite of ten is visited; `tasks`
            must be that suite's, in its order 0.
        fresh_on_revisit: a task's visits split its demonstrations among themselves instead of each seeing all of them.
        make: how `clbench data make` makes the data.
        pretrain: the base's tasks and data; null = the stream has no base of its own; NAME = those of another stream.
        recipes: the stream's family, by which recipes know it besides its own name (docs/configuration.md). It is read
            from the stream's file; in a recorded configuration it no longer has any effect.
    """

    name: str = MISSING
    data: str = ""
    repo_id: Optional[str] = None  # noqa: UP045
    revision: Optional[str] = None  # noqa: UP045
    rename: dict[str, str] = field(default_factory=dict)
    instructions: dict[str, str] = field(default_factory=dict)
    exclude_episodes: list[int] = field(default_factory=list)
    sets: list[SetConfig] = field(default_factory=list)
    mixtures: dict[str, list[SetConfig]] = field(default_factory=dict)
    partition: str = "auto"
    resize: dict[str, int] = field(default_factory=dict)
    pad: dict[str, int] = field(default_factory=dict)
    holdout: float = 0.0
    holdout_seed: int = 0
    env: Optional[EnvConfig] = field(default_factory=EnvConfig)  # noqa: UP045
    tasks: list[str] = field(default_factory=list)
    num_tasks: Optional[int] = None  # noqa: UP045
    task_order: Optional[list[Any]] = None  # noqa: UP045
    libero_order: Optional[int] = None  # noqa: UP045
    fresh_on_revisit: bool = False
    make: MakeConfig = field(default_factory=MakeConfig)
    pretrain: Optional[PretrainDataConfig] = None  # noqa: UP045
    recipes: Optional[str] = None  # noqa: UP045

    @property
    def env_type(self) -> Optional[str]:  # noqa: UP045
        """The simulator's environment type; None: the stream has no simulator."""
        return None if self.env is None else self.env.type


def sets_of(part: DatasetConfig | PretrainDataConfig) -> Sequence[DatasetConfig | PretrainDataConfig | SetConfig]:
    """What says where the data sets of a stream or of its base are: the section itself, or each of its `sets`."""
    return part.sets or [part]


HOLDOUT = 0.1  # of streams without a simulator that do not say
PARTITIONS = ("auto", "by_task_index", "by_dataset", "by_episodes")
CONTROL_VIEWS = ("blind", "deaf")  # views of any policy, beside those that algorithms have


@dataclass
class EvalConfig:
    """Evaluation in the simulator.

    Attributes:
        episodes: episodes per cell.
        split: test | validation. Choose by validation episodes, report test ones: their seeds, and those of
            demonstrations, never coincide. Validation is stored in eval/validation.
        curve_split: validation | test, which episodes learning curves are made from (train.eval_during_training).
        seed: first of the consecutive episode seeds, counted from the start of the split's million; the same for
            every algorithm.
        cells: full (T×T) | lower (k ≥ j) | last (final row) | diagonal.
        steps_after_success: an episode goes on for this many steps after its first success (or to the step
            limit); success at the end is judged there.
        workers: processes; null = one per core, at most 2 on a small machine.
        slots: episodes that one process steps together (the policy's fixed batch size); it keeps up to three times as
            many simulators.
        base_row, random_row: also evaluate the base before the stream / uniformly random actions.
        views: other views of the same checkpoints, where the algorithm has any (packnet: task_id, no_task_id); each is
            stored in eval/views/NAME.
        heldout_episodes: episodes per pretraining task of the base, for the base and the last checkpoint (0 = none).
        step_timeout_s: a simulator that spends this long in one step or reset counts as hung (building it may take ten
            times as long); its process is replaced.
        stride: without a simulator, every so many frames of a held-out episode the policy is asked for a chunk.
        retries: how often episodes of one cell are played again because the simulator raised, died or hung, before
            the cell is abandoned.
    """

    episodes: int = 20
    split: str = "test"
    curve_split: str = "validation"
    seed: int = 0
    cells: str = "full"
    steps_after_success: int = 10
    workers: Optional[int] = None  # noqa: UP045
    slots: int = 32
    base_row: bool = False
    random_row: bool = False
    views: list[str] = field(default_factory=list)
    heldout_episodes: int = 0
    step_timeout_s: float = 120.0
    retries: int = 2
    stride: int = 1


@dataclass
class LoraConfig:
    """Low-rank adapters (clbench/adapters/lora.py).

    Attributes:
        enabled: train one LoRA adapter through all tasks instead of the policy's own weights. seqlora adds its
            adapters itself and only reads the other keys.
        rank, alpha: r and α; the product is scaled by α / r.
        dropout: on the adapter's input, in training.
        target_modules: regular expression of the layers; null = the policy's own default.
        also_train: regular expression of modules that train completely beside the adapter, such as heads; null = the
            policy's own default (`clbench list models`), "" = none. They are saved with the adapter.
    """

    enabled: bool = False
    rank: int = 32
    alpha: int = 32
    dropout: float = 0.0
    target_modules: Optional[str] = None  # noqa: UP045
    also_train: Optional[str] = None  # noqa: UP045


@dataclass
class WandbConfig:
    """Weights & Biases. `log.wandb=true` and `=false` set `enabled` alone; naming any other of these keys turns it on.

    Attributes:
        enabled: send the run there.
        project: project name there; null = log.project.
        entity: the user or team that it belongs to; null = the account's default.
        group: runs of the same group are shown together; null = none.
        tags: labels of the run.
        artifacts: also upload each task's checkpoint.
    """

    enabled: bool = False
    project: Optional[str] = None  # noqa: UP045
    entity: Optional[str] = None  # noqa: UP045
    group: Optional[str] = None  # noqa: UP045
    tags: list[str] = field(default_factory=list)
    artifacts: bool = False


@dataclass
class LogConfig:
    """log.jsonl is always written; these are in addition. `project` is the project's name in each of them.

    Attributes:
        loggers: plugins' loggers: name (clbench list loggers) → its settings.
    """

    tensorboard: bool = False
    wandb: WandbConfig = field(default_factory=WandbConfig)
    trackio: bool = False
    loggers: dict[str, Any] = field(default_factory=dict)
    project: str = "clbench"
    progress: str = "auto"  # auto | bar | lines | quiet


@dataclass
class Config:
    """A whole run.

    In `policy`, `type` names a LeRobot policy, `path` a LeRobot checkpoint folder to start from (a path, or a name
    under the model root) or a hub's model, `init: random` skips pretraining on the stream's pretraining tasks, and
    `dtype: bfloat16` keeps weights that do not train in bf16 (clbench/policies/precision.py).
    """

    seed: int = 0
    model: str = MISSING
    output_dir: Optional[str] = None  # noqa: UP045
    policy: dict[str, Any] = field(default_factory=dict)
    algorithm: dict[str, Any] = field(default_factory=dict)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    render: RenderConfig = field(default_factory=RenderConfig)
    log: LogConfig = field(default_factory=LogConfig)


BASE_KEYS = ("path", "init")  # keys of `policy` that say where the base comes from; the others belong to the policy


def base_origin(config: Config) -> str:
    """Where a run's base comes from: given (policy.path) | pretrained (on the stream's pretraining tasks) | random
    (policy.init=random, or the stream has no such tasks)."""
    if config.policy.get("path"):
        return "given"
    return "random" if config.policy.get("init") or config.dataset.pretrain is None else "pretrained"
