"""Every call in the installed LeRobot and PEFT that loads, fetches or imports what a name says, and its guard.

The calls are found in the sources, so that a new version with a new loader turns this red: find out whether a file from
somebody else reaches it (clbench/checkpoints/trusted.py decides what is built), then write down here what is in the
way. Inside transformers, diffusers and torchvision nothing is listed: they are entered through these calls alone.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from clbench.config.policy_types import BUILT, RISKS

NAMES = {
    "HfApi", "HfFileSystem", "Popen", "__import__", "cached_file", "check_call", "check_file_exists_on_hf_hub",
    "check_output", "create_model", "eval", "exec", "file_exists", "from_pretrained", "get_class_from_dynamic_module",
    "hf_hub_download", "import_module", "load_dataset", "load_peft_weights", "load_state_dict_from_url", "run_path",
    "snapshot_download", "spec_from_file_location", "torch_load", "urlopen", "urlretrieve",
}  # fmt: skip
OWNED = {  # object: its methods
    "torch": {"load"}, "hub": {"load"}, "pickle": {"load", "loads", "Unpickler"}, "dill": {"load", "loads"},
    "joblib": {"load"}, "marshal": {"load", "loads"}, "np": {"load"}, "numpy": {"load"}, "os": {"system", "popen"},
    "subprocess": {"run"}, "requests": {"get"}, "httpx": {"get"},
}  # fmt: skip
WORDS = [
    *sorted(NAMES - {"eval", "exec"}), *(f"{o}.{m}" for o in OWNED for m in OWNED[o]), "trust_remote_code", "weights=",
]  # fmt: skip
SCANNED = {
    "lerobot": ("policies", "processor", "configs", "optim", "utils"),
    "peft": ("config.py", "mapping.py", "mapping_func.py", "peft_model.py", "utils", "tuners"),
    "clbench": ("adapters", "checkpoints/policy_io.py", "policies"),
}

TYPE = "the policy type is not built from a file: --trust"
SETTING = "the policy type is not built from a file with the setting that leads here: --trust"
WEIGHTS = "loading: no_backbone_weights; a fresh policy: trusted.fetched"
STEP = "no policy type that is built makes this step, so check_steps refuses it"
FOLDER = "asked with the path of a folder that is there and has the file: the hub is asked for other names alone"
CLASS = "a step with a class is refused before (policy_io._processors)"
REGISTERED = "imports a module beside the configuration class of a registered type, which is installed"
ADAPTER = "check_checkpoint refuses the adapter's type or setting that leads here: --trust"
OFF = "switched off by the caller (save_embedding_layers=False), and load_peft_weights has its file"
OWN_NAME = "imports a package that LeRobot's own code names"
COMMAND = "LeRobot's or PEFT's own commands and helpers, which clbench does not call"
CHECKED = "clbench's call, behind check_checkpoint"
HASHED = "clbench's call for a file of an installed package, whose sha256 is in clbench's code"
NAMED = "clbench's call for a path that a configuration gives; check_checkpoint refuses a checkpoint with one: --trust"

GUARDS = {
    "lerobot/configs/eval.py:EvalPipelineConfig.__post_init__": COMMAND,
    "lerobot/configs/parser.py:load_plugin": COMMAND,
    "lerobot/configs/parser.py:wrap.wrapper_outer.wrapper_inner": COMMAND,
    "lerobot/configs/policies.py:PreTrainedConfig.from_pretrained": COMMAND,
    "lerobot/configs/rewards.py:RewardModelConfig.from_pretrained": COMMAND,
    "lerobot/configs/train.py:TrainPipelineConfig._resolve_pretrained_from_cli": COMMAND,
    "lerobot/configs/train.py:TrainPipelineConfig.from_pretrained": COMMAND,
    "lerobot/policies/act/modeling_act.py:ACT.__init__": WEIGHTS,
    "lerobot/policies/diffusion/modeling_diffusion.py:DiffusionRgbEncoder.__init__": WEIGHTS,
    "lerobot/policies/eo1/configuration_eo1.py:EO1Config.__post_init__": TYPE,
    "lerobot/policies/eo1/modeling_eo1.py:EO1Policy.__init__": TYPE,
    "lerobot/policies/eo1/processor_eo1.py:EO1QwenProcessorStep.__post_init__": TYPE,
    "lerobot/policies/evo1/internvl3_embedder.py:InternVL3Embedder.__init__": TYPE,
    "lerobot/policies/evo1/modeling_evo1.py:Evo1Policy.from_pretrained": TYPE,
    "lerobot/policies/factory.py:_get_policy_cls_from_policy_name": REGISTERED,
    "lerobot/policies/factory.py:_make_processors_from_policy_config": REGISTERED,
    "lerobot/policies/factory.py:make_policy": COMMAND,
    "lerobot/policies/factory.py:make_pre_post_processors": FOLDER,
    "lerobot/policies/fastwam/wan/components.py:WanTokenizer.__init__": TYPE,
    "lerobot/policies/fastwam/wan/components.py:load_pretrained_wan_text_encoder": TYPE,
    "lerobot/policies/fastwam/wan/components.py:load_pretrained_wan_vae": TYPE,
    "lerobot/policies/fastwam/wan/components.py:resolve_wan_dit_paths": TYPE,
    "lerobot/policies/gaussian_actor/modeling_gaussian_actor.py:PretrainedImageEncoder._load_pretrained_vision_encoder":
        SETTING,
    "lerobot/policies/groot/groot_n1_7.py:GR00TN17.from_pretrained": TYPE,
    "lerobot/policies/groot/groot_n1_7.py:Qwen3Backbone.__init__": TYPE,
    "lerobot/policies/groot/groot_n1_7.py:Qwen3Backbone._from_backbone_config": TYPE,
    "lerobot/policies/groot/modeling_groot.py:GrootPolicy._create_groot_model": TYPE,
    "lerobot/policies/groot/modeling_groot.py:GrootPolicy.from_pretrained": TYPE,
    "lerobot/policies/groot/processor_groot.py:_build_n1_7_processor": TYPE,
    "lerobot/policies/groot/processor_groot.py:_load_groot_processor_pipelines": TYPE,
    "lerobot/policies/lingbot_va/utils.py:load_text_encoder": TYPE,
    "lerobot/policies/lingbot_va/utils.py:load_tokenizer": TYPE,
    "lerobot/policies/lingbot_va/utils.py:load_vae": TYPE,
    "lerobot/policies/molmoact2/modeling_molmoact2.py:MolmoAct2Policy._load_hf_model": TYPE,
    "lerobot/policies/molmoact2/modeling_molmoact2.py:_resolve_checkpoint_location": TYPE,
    "lerobot/policies/molmoact2/molmoact2_hf_model/action_tokenizer.py:UniversalActionProcessor.from_pretrained_local":
        TYPE,
    "lerobot/policies/molmoact2/molmoact2_hf_model/action_tokenizer.py:_resolve_tokenizer_location": TYPE,
    "lerobot/policies/molmoact2/molmoact2_hf_model/modeling_molmoact2.py:MolmoAct2ForConditionalGeneration._get_robot_stats":
        TYPE,
    "lerobot/policies/molmoact2/molmoact2_hf_model/video_processing_molmoact2.py:load_video": TYPE,
    "lerobot/policies/molmoact2/molmoact2_hf_model/video_processing_molmoact2.py:read_video_decord": TYPE,
    "lerobot/policies/molmoact2/molmoact2_hf_model/video_processing_molmoact2.py:read_video_pyav": TYPE,
    "lerobot/policies/molmoact2/molmoact2_hf_model/video_processing_molmoact2.py:read_video_torchcodec": TYPE,
    "lerobot/policies/molmoact2/processor_molmoact2.py:_load_local_molmoact2_processor": TYPE,
    "lerobot/policies/multi_task_dit/modeling_multi_task_dit.py:CLIPTextEncoder.__init__": TYPE,
    "lerobot/policies/multi_task_dit/modeling_multi_task_dit.py:CLIPVisionEncoder.__init__": TYPE,
    "lerobot/policies/pi0/modeling_pi0.py:PI0Policy.from_pretrained": TYPE,
    "lerobot/policies/pi05/modeling_pi05.py:PI05Policy.from_pretrained": TYPE,
    "lerobot/policies/pi0_fast/modeling_pi0_fast.py:PI0FastPolicy.__init__": TYPE,
    "lerobot/policies/pi0_fast/modeling_pi0_fast.py:PI0FastPolicy.from_pretrained": TYPE,
    "lerobot/policies/pretrained.py:PreTrainedPolicy.from_pretrained": FOLDER,
    "lerobot/policies/pretrained.py:PreTrainedPolicy.push_model_to_hub": COMMAND,
    "lerobot/policies/smolvla/smolvlm_with_expert.py:SmolVLMWithExpertModel.__init__": TYPE,
    "lerobot/policies/vla_jepa/modeling_vla_jepa.py:VLAJEPAModel.__init__": TYPE,
    "lerobot/policies/vla_jepa/modeling_vla_jepa.py:VLAJEPAPolicy.from_pretrained": TYPE,
    "lerobot/policies/vla_jepa/qwen_interface.py:Qwen3VLInterface.__init__": TYPE,
    "lerobot/policies/vqbet/modeling_vqbet.py:VQBeTRgbEncoder.__init__": WEIGHTS,
    "lerobot/policies/wall_x/modeling_wall_x.py:Qwen2_5_VLMoEForAction.from_pretrained": TYPE,
    "lerobot/policies/wall_x/modeling_wall_x.py:WallXPolicy.__init__": TYPE,
    "lerobot/policies/xvla/modeling_xvla.py:XVLAPolicy.from_pretrained": TYPE,
    "lerobot/processor/hil_processor.py:RewardClassifierProcessorStep.__post_init__": STEP,
    "lerobot/processor/migrate_policy_normalization.py:load_model_from_hub": COMMAND,
    "lerobot/processor/migrate_policy_normalization.py:main": COMMAND,
    "lerobot/processor/pipeline.py:DataProcessorPipeline._hub_model_requires_migration": FOLDER,
    "lerobot/processor/pipeline.py:DataProcessorPipeline._load_config": FOLDER,
    "lerobot/processor/pipeline.py:DataProcessorPipeline._load_step_state": FOLDER,
    "lerobot/processor/pipeline.py:DataProcessorPipeline._resolve_step_class": CLASS,
    "lerobot/processor/tokenizer_processor.py:ActionTokenizerProcessorStep.__post_init__": STEP,
    "lerobot/processor/tokenizer_processor.py:TokenizerProcessorStep.__post_init__": STEP,
    "lerobot/utils/hub.py:HubMixin.push_to_hub": COMMAND,
    "lerobot/utils/hub.py:find_latest_hub_checkpoint": COMMAND,
    "lerobot/utils/import_utils.py:get_safe_default_video_backend": OWN_NAME,
    "lerobot/utils/import_utils.py:is_package_available": OWN_NAME,
    "lerobot/utils/import_utils.py:make_device_from_device_class": COMMAND,
    "lerobot/utils/import_utils.py:register_third_party_plugins.attempt_import": COMMAND,
    "lerobot/utils/utils.py:say": COMMAND,
    "peft/config.py:PeftConfigMixin._get_peft_type": FOLDER,
    "peft/config.py:PeftConfigMixin.from_pretrained": FOLDER,
    "peft/peft_model.py:PeftModel.from_pretrained": FOLDER,
    "peft/peft_model.py:PeftModel.load_adapter": FOLDER,
    "peft/tuners/cartridge/utils.py:compose_cartridge_adapters": COMMAND,
    "peft/tuners/lora/arrow.py:create_arrow_model": COMMAND,
    "peft/tuners/lora/corda.py:calib_cov_distribution": ADAPTER,
    "peft/tuners/lora/corda.py:preprocess_corda": ADAPTER,
    "peft/tuners/lora/loraga.py:preprocess_loraga": ADAPTER,
    "peft/tuners/lora/tp_layer.py:dispatch_megatron": ADAPTER,
    "peft/tuners/multitask_prompt_tuning/model.py:MultitaskPromptEmbedding.__init__": ADAPTER,
    "peft/tuners/prompt_tuning/model.py:PromptEmbedding.__init__": ADAPTER,
    "peft/tuners/shadow/diffusion_models.py:Flux2ShadowBackend.load_pretrained": ADAPTER,
    "peft/tuners/shadow/model.py:ShadowModel._load_projected_shadow_backbone": ADAPTER,
    "peft/tuners/shadow/model.py:ShadowModel._load_shadow_backbone": ADAPTER,
    "peft/tuners/xlora/model.py:_load_adapter_into_lora_model": ADAPTER,
    "peft/utils/hotswap.py:hotswap_adapter": COMMAND,
    "peft/utils/loftq_utils.py:_SafetensorLoader.__init__": COMMAND,
    "peft/utils/other.py:check_file_exists_on_hf_hub": OFF,
    "peft/utils/save_and_load.py:get_peft_model_state_dict": OFF,
    "peft/utils/save_and_load.py:load_peft_weights": FOLDER,
    "peft/utils/save_and_load.py:torch_load": FOLDER,
    "clbench/adapters/clare.py:load_adapter": CHECKED,
    "clbench/adapters/lora.py:load": CHECKED,
    "clbench/checkpoints/policy_io.py:_load_adapter": CHECKED,
    "clbench/checkpoints/policy_io.py:_load_weights": CHECKED,
    "clbench/checkpoints/policy_io.py:_no_flash": OWN_NAME,
    "clbench/policies/dit/encoders.py:build_model": NAMED,
    "clbench/policies/dit/packaged.py:load_weights": HASHED,
    "clbench/policies/dit/encoders.py:read_colours": NAMED,
    "clbench/policies/dit/encoders.py:read_description": NAMED,
    "clbench/policies/dit/encoders.py:read_tokenizer": NAMED,
}


def calls(node: ast.AST, scope: tuple[str, ...] = ()) -> Iterator[tuple[str, ast.Call]]:
    """All calls below a node with the qualified name of the function that they stand in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from calls(child, (*scope, child.name))
            continue
        if isinstance(child, ast.Call):
            yield ".".join(scope), child
        yield from calls(child, scope)


def named(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def loads(call: ast.Call) -> bool:
    """Whether a call may load, fetch or import what it is given; methods called `eval` are no such."""
    f = call.func
    owner, keywords = named(f.value) if isinstance(f, ast.Attribute) else "", {k.arg for k in call.keywords}
    if named(f) in OWNED.get(owner, ()) or "trust_remote_code" in keywords:
        return True
    if isinstance(f, ast.Call):  # getattr(torchvision.models, name)(weights=…)
        return named(f.func) == "getattr" and "weights" in keywords
    return named(f) in NAMES and not (isinstance(f, ast.Attribute) and f.attr == "eval")


def loaders(package: str) -> set[str]:
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    found = set()
    for place in SCANNED[package]:
        files = sorted((root / place).rglob("*.py")) if (root / place).is_dir() else [root / place]
        assert files, place
        for file in files:
            text = file.read_text(encoding="utf-8")
            if any(w in text for w in WORDS) or re.search(r"(?<![.\w])(eval|exec)\(", text):  # parsing takes long
                name = f"{package}/{file.relative_to(root)}"
                found |= {f"{name}:{scope}" for scope, call in calls(ast.parse(text)) if loads(call)}
    return found


@pytest.mark.parametrize("package", SCANNED)
def test_every_loader_has_a_guard(package: str) -> None:
    listed = {place for place in GUARDS if place.startswith(f"{package}/")}
    found = loaders(package)
    assert not found - listed, "new loaders: what keeps a file from reaching them?"
    assert not listed - found, "these are gone: remove their lines"


def test_the_guards_of_policy_types_hold() -> None:
    """A loader in the folder of a type that is built is guarded by more than the type."""
    for place, guard in GUARDS.items():
        parts = place.split("/")
        if guard in (TYPE, SETTING):
            assert parts[:2] == ["lerobot", "policies"] and parts[2] in RISKS, place
            assert (guard == SETTING) == (parts[2] in BUILT), place


def test_every_policy_type_of_lerobot_is_known() -> None:
    """In the sources: @PreTrainedConfig.register_subclass("name"), also with name="name"."""
    spec = find_spec("lerobot")
    assert spec is not None and spec.submodule_search_locations
    types = set()
    for file in (Path(spec.submodule_search_locations[0]) / "policies").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        for call in (c for _, c in calls(ast.parse(text))) if "PreTrainedConfig.register_subclass" in text else ():
            if isinstance(call.func, ast.Attribute) and call.func.attr == "register_subclass":
                given = [*call.args, *(k.value for k in call.keywords)]
                types |= {v.value for v in given if isinstance(v, ast.Constant)}
    assert len(types) > 15
    assert types == ({*BUILT, *RISKS} - {"dit_dec", "dit_encdec"}), "may its construction run or fetch anything?"
