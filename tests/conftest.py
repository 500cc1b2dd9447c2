"""What every test gets: no network, no trackers, one thread, and folders for data, runs and bases."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Before torch, the Hugging Face libraries and matplotlib are imported, which read these once.
for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    "CLBENCH_ENV_FILE": "",  # no test, and no command that one starts, reads a developer's .env
}.items():
    os.environ[_name] = _value
os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # under nohup, as a script's background job: children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.pop("CLBENCH_CONFIG_PATH", None)  # a developer's own presets play no part
LIBERO_PYTHON = os.environ.pop("LIBERO_PYTHON", None)  # for the tests that are about it; others look into simulators

import pytest  # noqa: E402

from clbench import patience  # noqa: E402
from clbench.envs.libero import assets as libero_assets  # noqa: E402
from clbench.errors import UserError  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
# Files of tests that train, play in simulators or try many inputs: what `scripts/test.sh --quick` leaves out.
LONG = set(
    "add_a_policy add_a_simulator add_a_stream agem algorithms augment clare curves data_make draws encoders envs "
    "eval_faults ewc example_plugin faults feature_cache frames fuzz hooks hub_data interval_coverage kills "
    "learner libero libero_expert libero_images lora lora_heads metaworld_pixels mir moving_runs odd_sets offline "
    "packaged_encoders packnet paired policies policy_table policy_types precision ranks remote_simulator replay "
    "report rollout scripts several_sets statistics sweep trainer untrusted wheel".split()
)
LIBERO_ARCHIVE = ROOT.parent / "shared" / "libero" / "libero-assets.tar.xz"  # where there is one, e.g. under CI


def pytest_configure(config: pytest.Config) -> None:
    """Settle where LIBERO's assets are, once, before xdist's workers start and before the cache moves."""
    if hasattr(config, "workerinput"):
        return
    if not libero_is_ready() and LIBERO_ARCHIVE.is_file():
        os.environ["CLBENCH_LIBERO_ROOT"] = str(ROOT / ".cache" / "libero_tests")
        if not libero_is_ready():
            libero_assets.install(str(LIBERO_ARCHIVE))
    os.environ["CLBENCH_LIBERO_ROOT"] = str(libero_assets.root())


def libero_is_ready() -> bool:
    """Whether LIBERO is installed with its assets; nothing of it is imported, which could block on `input()`."""
    try:
        libero_assets.package()
        libero_assets.installed()
    except UserError:
        return False
    return True


def gpu_is_ready() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need what this machine lacks are skipped with the reason; what `slow_for` names is slow."""
    for item in items:
        marker = item.get_closest_marker("slow_for")
        labels = {getattr(v, "label", None) for v in item.callspec.params.values()} if marker is not None else set()
        if marker is not None and labels & set(marker.args):
            item.add_marker(pytest.mark.slow)
        if item.path.stem.removeprefix("test_") in LONG:
            item.add_marker(pytest.mark.long)
    needs = {
        "libero": (libero_is_ready, "LIBERO or its assets are not installed (docs/libero.md)"),
        "gpu": (gpu_is_ready, "no CUDA device"),
    }
    for marker, (is_ready, reason) in needs.items():
        marked = [item for item in items if item.get_closest_marker(marker) is not None]
        if marked and not is_ready():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Data, runs and cached bases of tests go to temporary folders, whatever .env says."""
    root = tmp_path_factory.mktemp("clbench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patience, "FIRST_S", 1e6)  # what is printed does not depend on the machine's speed
        for name in ("DATA", "RESULTS", "CACHE"):
            patch.setenv(f"CLBENCH_{name}_ROOT", str(root / name.lower()))
        yield


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two small data sets: stream/ (three tasks) and pretrain/ (two)."""
    from clbench.testing.toy import make_toy_root

    return make_toy_root(tmp_path_factory.mktemp("toy"))
