"""Policy types that `--model` can name besides presets: what is known of them and their needs without LeRobot."""

from __future__ import annotations

from functools import cache
from importlib.metadata import requires
from typing import Any

from packaging.requirements import Requirement

from clbench import registry
from clbench.config import folders
from clbench.config.schema import Config
from clbench.errors import UserError, nearest
from clbench.io import read_json
from clbench.paths import model_root, named_folder

# Built from any file, as long as these settings are null. (A configuration may set those of dit_dec and dit_encdec:
# there only safetensors are read.)
BUILT: dict[str, tuple[str, ...]] = {
    "dit_dec": ("image_encoder_path", "text_encoder_path"),
    "dit_encdec": ("image_encoder_path", "text_encoder_path"),
    "act": (),
    "diffusion": (),
    "gaussian_actor": ("vision_encoder_name",),
    "tdmpc": (),
    "vqbet": (),
}

CODE = "runs Python files of the model that its settings name"
HUB = "fetches models or tokenizers from a hub that no configuration has to name"

# LeRobot's other types, and why they are not built without the user's consent.
RISKS: dict[str, str] = {
    "eo1": HUB,
    "evo1": HUB,
    "fastwam": HUB,
    "gaussian_actor": CODE,
    "groot": CODE,
    "lingbot_va": HUB,
    "molmoact2": HUB,
    "multi_task_dit": HUB,
    "pi0": HUB,
    "pi05": HUB,
    "pi0_fast": CODE,
    "smolvla": HUB,
    "vla_jepa": HUB,
    "wall_x": CODE,
    "xvla": HUB,
}

# LeRobot's types that cannot be built, or cannot run, without camera images (their validate_features and forward).
WANT_CAMERAS = frozenset(
    "act diffusion eo1 evo1 fastwam groot lingbot_va molmoact2 pi0 pi05 pi0_fast smolvla vla_jepa vqbet wall_x "
    "xvla".split()
)
# LeRobot's types → the LeRobot extra with what they import beyond its core.
EXTRAS = {
    "diffusion": "diffusion", "eo1": "eo1", "evo1": "evo1", "fastwam": "fastwam", "groot": "groot",
    "lingbot_va": "lingbot-va", "molmoact2": "molmoact2", "multi_task_dit": "multi-task-dit", "pi0": "pi", "pi05": "pi",
    "pi0_fast": "pi", "smolvla": "smolvla", "vla_jepa": "vla-jepa", "wall_x": "wallx", "xvla": "xvla",
}  # fmt: skip


def types() -> list[str]:
    """Every policy type that a name can mean: clbench's own, LeRobot's, installed packages'."""
    return sorted({*BUILT, *RISKS, *registry.names("policies")})


def wants_trust(kind: str) -> bool:
    """Whether a fresh policy of this type is built only with `--trust TYPE`."""
    return kind in RISKS and kind not in BUILT


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


@cache
def missing(kind: str) -> tuple[str, ...]:
    """Distributions that a LeRobot type needs and that are not installed."""
    found: list[str] = []
    extras, seen = [EXTRAS[kind]] if kind in EXTRAS else [], set[str]()
    while extras:
        extra = extras.pop()
        seen.add(extra)
        for text in requires("lerobot") or ():
            wanted = Requirement(text)
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                continue
            if not wanted.marker.evaluate({"extra": extra}):
                continue
            if wanted.name == "lerobot":
                extras += wanted.extras - seen
            elif not registry.installed(wanted.name):
                found.append(wanted.name)
    return tuple(sorted(set(found)))


def check_fits(config: Config) -> None:
    """Raise UserError if the policy's type needs packages that are not installed, or images that the stream lacks."""
    kind = _type(config.policy)
    if kind is None:
        return
    lacking = missing(kind)
    if lacking:
        raise UserError(
            f"policy type '{kind}' needs {', '.join(lacking)}, which {'is' if len(lacking) == 1 else 'are'} not "
            f"installed: pip install 'lerobot[{EXTRAS[kind]}]'"
        )
    from clbench.envs.making import family

    env = config.dataset.env  # without one only the data show it
    if kind in WANT_CAMERAS and env is not None and not family(env.type).cameras:
        raise UserError(
            f"policy type '{kind}' needs camera images, but the stream '{config.dataset.name}' ({env.type}) has only "
            "states. Use a stream with cameras (clbench list streams), or a policy for states: dit_dec_tiny, "
            "dit_encdec_tiny, tdmpc."
        )


def _type(policy: dict[str, Any]) -> str | None:
    """The type of a `policy` section; for a checkpoint, the one that its folder states."""
    if not policy.get("path"):
        return str(policy["type"]) if policy.get("type") else None
    try:
        described = read_json(named_folder(str(policy["path"]), model_root()) / "config.json")
    except (UserError, OSError, ValueError):  # problems with a checkpoint are reported where it is opened
        return None
    kind = described.get("type") if isinstance(described, dict) else None
    return kind if isinstance(kind, str) else None
