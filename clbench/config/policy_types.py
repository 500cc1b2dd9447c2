"""Policy types that `--model` can name besides presets: what is known of them and their needs without LeRobot."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.metadata import requires
from typing import Any

from packaging.requirements import Requirement

from clbench import registry
from clbench.config import folders
from clbench.config.schema import BASE_KEYS, Config
from clbench.errors import UserError, nearest
from clbench.io import read_json
from clbench.paths import model_root, named_folder

CODE = "runs Python files of the model that its settings name"
HUB = "fetches models or tokenizers from a hub that no configuration has to name"


@dataclass(frozen=True)
class Facts:
    """What is known of a policy type of LeRobot without importing it. tests/test_policy_types.py compares it with the
    installed LeRobot.

    Attributes:
        extra: LeRobot's extra with what the type imports beyond LeRobot's core; "" = nothing.
        risk: CODE | HUB, why it is not built without the user's consent; "" = building it runs and fetches nothing.
        null: settings that must be null for that to hold.
        cameras: it cannot be built, or cannot run, without camera images (its validate_features and forward).
        dtype: `policy.dtype` is a setting of its own; otherwise it is clbench's (policies/precision.py).
        rewards: why it cannot learn from demonstrations, which have no rewards; "" = it can.
        one_pass: the losses of single samples come from one pass, under a draw from outside (policies/draws.py);
            otherwise from one pass for each, under a seed of its own.
        unless: settings with which they do not.
        lora: regular expression of the layers that LoRA adapts by default: LeRobot's own where it has any; "" = none.
        also_train: regular expression of the modules that train completely beside a LoRA adapter by default.
        clare: regular expression of CLARE's layers by default: where what is seen and the instruction have met, but no
            noisy action has yet; "" = none.
        time_first: those layers see (L, B, D).
    """

    extra: str = ""
    risk: str = ""
    null: tuple[str, ...] = ()
    cameras: bool = True
    dtype: bool = False
    rewards: str = ""
    one_pass: bool = False
    unless: str = ""
    lora: str = ""
    also_train: str = ""
    clare: str = ""
    time_first: bool = False


# Where π0's and π0.5's action expert reads what image and language make of each other: it never sees the last layer's
# output, and in the first half language has met little of the images yet.
_PALIGEMMA_LORA = (
    r"(.*\.gemma_expert\..*\.self_attn\.(q|v)_proj|"
    r"model\.(state_proj|action_in_proj|action_out_proj|action_time_mlp_in|action_time_mlp_out))"
)
_PALIGEMMA = r"model\.paligemma_with_expert\.paligemma\.model\.language_model\.layers\.(9|1[0-6])\.mlp"

LEROBOT: dict[str, Facts] = {
    "act": Facts(
        one_pass=True,
        lora=r"model\.(encoder|decoder)\.layers\.\d+\.linear[12]",
        also_train=r"model\.action_head",
        clare=r"model\.encoder\.layers\.\d+\.linear1",
        time_first=True,
    ),
    "diffusion": Facts(
        "diffusion",
        one_pass=True,
        unless="use_group_norm=false, or crops are random",
        lora=r"diffusion\.unet\..*\.(cond_encoder\.1|conv[12]\.block\.0)",
        also_train=r"diffusion\.unet\.final_conv",
        clare=r"diffusion\.unet\..*\.cond_encoder\.1",
    ),
    "eo1": Facts("eo1", HUB, dtype=True),
    "evo1": Facts("evo1", HUB),
    "fastwam": Facts("fastwam", HUB),
    "gaussian_actor": Facts(
        "", CODE, ("vision_encoder_name",), cameras=False, rewards="is the actor of a reinforcement learner"
    ),
    "groot": Facts("groot", CODE),
    "lingbot_va": Facts("lingbot-va", HUB, dtype=True),
    "molmoact2": Facts(
        "molmoact2",
        HUB,
        lora=r"model\.model\.(transformer|vision_backbone)\.(?:.*\.)?"
        r"(w1|w2|w3|wq|wk|wv|wo|att_proj|attn_out|ff_proj|ff_out|patch_embedding)$",
    ),
    "multi_task_dit": Facts(
        "multi-task-dit",
        HUB,
        cameras=False,
        one_pass=True,
        unless="crops are random",
        lora=r"noise_predictor\.transformer_blocks\.\d+\.(attn\.(qkv|out)_proj|mlp\.[02])",
        also_train=r"noise_predictor\.output_proj",
        clare=r"noise_predictor\.transformer_blocks\.\d+\.adaLN_modulation\.1",
    ),
    "pi0": Facts("pi", HUB, dtype=True, one_pass=True, lora=_PALIGEMMA_LORA, clare=_PALIGEMMA),
    "pi05": Facts("pi", HUB, dtype=True, one_pass=True, lora=_PALIGEMMA_LORA, clare=_PALIGEMMA),
    "pi0_fast": Facts("pi", CODE, dtype=True),
    "smolvla": Facts(
        "smolvla",
        HUB,
        one_pass=True,
        lora=r"(model\.vlm_with_expert\.lm_expert\..*\.(q|v)_proj|"
        r"model\.(state_proj|action_in_proj|action_out_proj|action_time_mlp_in|action_time_mlp_out))",
        clare=r".*vlm.*text_model\.layers\.(\d|1[0-4])\.mlp",  # of 16; the last one's output is not read
    ),
    "tdmpc": Facts(cameras=False, rewards="learns a model of rewards"),
    "vla_jepa": Facts("vla-jepa", HUB),
    "vqbet": Facts(
        lora=r"vqbet\.policy\.transformer\.h\.\d+\.(attn\.c_(attn|proj)|mlp\.[02])",
        also_train=r"vqbet\.action_head\.map_to_cbet_preds_\w+",
        clare=r"vqbet\.policy\.transformer\.h\.\d+\.mlp",
    ),
    "wall_x": Facts("wallx", CODE),
    "xvla": Facts("xvla", HUB, dtype=True),
}
OWN = ("dit_dec", "dit_encdec")

# Built from any file, as long as these settings are null. (A configuration may set those of dit_dec and dit_encdec:
# there only safetensors are read.)
BUILT: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(OWN, ("image_encoder_path", "text_encoder_path")),
    **{kind: facts.null for kind, facts in LEROBOT.items() if not facts.risk or facts.null},
}
# Types that are not built, or not with the settings in BUILT, without the user's consent, and why.
RISKS: dict[str, str] = {kind: facts.risk for kind, facts in LEROBOT.items() if facts.risk}
# CLARE's layers in clbench's own policies: the paper's placements, encoder side.
OWN_CLARE = {
    "dit_dec": r".*(obs_encoder\.layers\.\d+\.ffn|velocity_net\.cond_proj)",
    "dit_encdec": r".*obs_encoder\.layers\.\d+\.ffn",
}
CLARE_TARGETS = "clare_targets"  # class attribute of a package's policy configuration: CLARE's layers by default
FP32, BF16 = "float32", "bfloat16"
FROM_FILES = "from_files"  # class attribute of a package's policy configuration: building one runs and fetches nothing


def types() -> list[str]:
    """Every policy type that a name can mean: clbench's own, LeRobot's, and those of installed packages."""
    return sorted({*BUILT, *RISKS, *registry.names("policies")})


def wants_trust(kind: str) -> bool:
    """Whether a fresh policy of this type is built only with `--trust TYPE`."""
    return kind not in BUILT and risk(kind) is not None


def risk(kind: str) -> str | None:
    """Why a type is not built from a file, or not with some of its settings, without the user's consent.

    None: it may be built from any file. A type of an installed package may if its configuration class says so
    (FROM_FILES).
    """
    if kind in BUILT or kind in RISKS:
        return RISKS.get(kind)
    entry = registry.entries("policies").get(kind)
    if entry is None:
        return "is not one that clbench knows"
    if registry.declared(entry, FROM_FILES) is True:
        return None
    return f"comes from {entry.origin}, which does not say that any file may describe one ({FROM_FILES})"


def unknown(name: str) -> UserError:
    """The message for a model that is neither a preset nor a type."""
    presets = folders.names("models")
    known = types()
    return UserError(
        f"unknown model '{name}'.{nearest(name, {*presets, *known}) if _close(name, {*presets, *known}) else ''} "
        f"Presets: {', '.join(presets)}. Policy types with their own defaults: "
        f"{', '.join(k for k in known if not wants_trust(k))}; with --trust TYPE as well (docs/security.md): "
        f"{', '.join(k for k in known if wants_trust(k))}. A checkpoint: --model checkpoint -- policy.path=FOLDER."
    )


def _close(name: str, known: set[str]) -> bool:
    return "Did you mean" in nearest(name, known)


def rounds(kind: str) -> bool:
    """Whether `policy.dtype` is clbench's setting for this type: what weights that do not train are kept in."""
    return kind in OWN or (kind in LEROBOT and not LEROBOT[kind].dtype)


def kept_in(config: Config) -> str:
    """What the weights of a run's policy that do not train are kept in: float32 | bfloat16."""
    kind = type_of(config.policy)
    return str(config.policy.get("dtype", FP32)) if kind is not None and rounds(kind) else FP32


def own_keys(section: dict[str, Any]) -> dict[str, Any]:
    """A `policy` section without the keys that are clbench's: those of the policy's own configuration, and its type."""
    ours = BASE_KEYS if not rounds(str(section.get("type"))) else (*BASE_KEYS, "dtype")
    return {k: v for k, v in section.items() if k not in ours}


def _check_dtype(config: Config) -> None:
    """Raise UserError if weights shall be kept in bf16 that a run trains, or merges something into."""
    kept, algorithm = kept_in(config), config.algorithm
    if kept not in (FP32, BF16):
        raise UserError(f"policy.dtype is {kept!r} but must be {FP32} or {BF16}.")
    name = algorithm.get("name")
    names = [name] if isinstance(name, str) else list(name or ())
    adapters = config.lora.enabled or "clare" in names or ("seqlora" in names and algorithm.get("merge") is False)
    if kept == BF16 and not adapters:
        raise UserError(
            f"policy.dtype={BF16} is for weights that do not train, below adapters, and {'+'.join(names)} trains or "
            "changes them all: add lora.enabled=true, use clare, or seqlora with algorithm.merge=false. "
            f"train.mixed_precision=bf16 computes in bf16 and keeps weights in {FP32}."
        )


def clare_targets(kind: str) -> str:
    """Regular expression of CLARE's layers in a policy of this type by default; "" = it has none."""
    if kind in LEROBOT or kind in OWN_CLARE:
        return OWN_CLARE[kind] if kind in OWN_CLARE else LEROBOT[kind].clare
    entry = registry.entries("policies").get(kind)
    return str(registry.declared(entry, CLARE_TARGETS) or "") if entry is not None else ""


def time_first(kind: str) -> bool:
    """Whether CLARE's default layers see time before the batch, (L, B, D)."""
    return kind in LEROBOT and LEROBOT[kind].time_first


def with_clare() -> list[str]:
    """The types that have default layers for CLARE."""
    return [kind for kind in types() if clare_targets(kind)]


def _extra(kind: str) -> str:
    return LEROBOT[kind].extra if kind in LEROBOT else ""


def wants_cameras(kind: str) -> bool:
    """Whether a type cannot be built, or cannot run, without camera images; of other packages' types: False."""
    return kind in LEROBOT and LEROBOT[kind].cameras


@cache
def _of_extras() -> tuple[Requirement, ...]:
    """What LeRobot requires for one of its extras alone."""
    wanted = [Requirement(text) for text in requires("lerobot") or ()]
    return tuple(w for w in wanted if w.marker is not None and not w.marker.evaluate({"extra": ""}))


@cache
def missing(kind: str) -> tuple[str, ...]:
    """Distributions that a type needs and that are not installed."""
    found: list[str] = []
    if kind not in LEROBOT:
        entry = registry.entries("policies").get(kind)
        return () if entry is None else registry.describe(entry).missing
    extras, seen = [extra] if (extra := _extra(kind)) else [], set[str]()
    while extras:
        extra = extras.pop()
        seen.add(extra)
        for wanted in _of_extras():
            assert wanted.marker is not None
            if not wanted.marker.evaluate({"extra": extra}):
                continue
            if wanted.name == "lerobot":
                extras += wanted.extras - seen
            elif not registry.installed(wanted.name):
                found.append(wanted.name)
    return tuple(sorted(set(found)))


def check_fits(config: Config) -> None:
    """Raise UserError if the policy's type needs packages that are not installed, or images that the stream lacks, or
    cannot be trained as the run does."""
    kind = type_of(config.policy)
    if kind is None:
        return
    lacking = missing(kind)
    if lacking:
        what = f"'lerobot[{_extra(kind)}]'" if kind in LEROBOT else " ".join(lacking)
        raise UserError(
            f"policy type '{kind}' needs {', '.join(lacking)}, which {'is' if len(lacking) == 1 else 'are'} not "
            f"installed: pip install {what}"
        )
    if kind in LEROBOT and LEROBOT[kind].rewards:
        raise UserError(
            f"policy type '{kind}' {LEROBOT[kind].rewards}, and demonstrations have no rewards: it cannot be trained "
            "here. Policies that learn from demonstrations: clbench list policies."
        )
    _check_dtype(config)
    if "action" in config.dataset.pad and kind not in registry.OWN["policies"]:
        raise UserError(
            f"dataset.pad lengthens actions, and the loss of policy type '{kind}' would count what is added: use "
            f"{' or '.join(registry.OWN['policies'])}, whose loss leaves it out."
        )
    from clbench.envs.making import family

    env = config.dataset.env  # without one only the data show it
    if wants_cameras(kind) and env is not None and not family(env.type).cameras:
        raise UserError(
            f"policy type '{kind}' needs camera images, but the stream '{config.dataset.name}' ({env.type}) has only "
            "states. Use a stream with cameras (clbench list streams), or a policy for states: dit_dec_tiny, "
            "dit_encdec_tiny."
        )


def type_of(policy: dict[str, Any]) -> str | None:
    """The type of a `policy` section; for a checkpoint, the one that its folder states."""
    if not policy.get("path"):
        return str(policy["type"]) if policy.get("type") else None
    try:
        described = read_json(named_folder(str(policy["path"]), model_root()) / "config.json")
    except (UserError, OSError, ValueError):  # problems with a checkpoint are reported where it is opened
        return None
    kind = described.get("type") if isinstance(described, dict) else None
    return kind if isinstance(kind, str) else None
