"""Every test sees 8 virtual CPU devices, strict dtype and rank promotion, and says why it skips."""

import importlib.metadata
import importlib.util
import os
import pathlib
import sys
import time

# Before JAX is imported: the backend reads these once. GPU tests run with JAXLM_TEST_PLATFORM=cuda.
PLATFORM = os.environ.get("JAXLM_TEST_PLATFORM", "cpu")
os.environ["JAX_PLATFORMS"] = PLATFORM
if PLATFORM == "cpu" and not os.environ.get("XLA_FLAGS"):
    # Tests compile far more than they compute: the quick way to machine code takes a ninth of the time.
    flags = ["force_host_platform_device_count=8", "backend_optimization_level=0", "llvm_disable_expensive_passes=true"]
    if importlib.metadata.version("jax") < "0.12":  # later ones no longer know the flag
        flags.append("cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(f"--xla_{flag}" for flag in flags)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network should fail at once
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = pathlib.Path(__file__).resolve().parent.parent
DATA = pathlib.Path(os.environ.get("JAXLM_DATA", ROOT.parent / "shared" / "data"))


def _missing_parity() -> str | None:
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not installed: pip install -e '.[parity]'"
    if importlib.util.find_spec("lm_eval") is None:
        return "lm-eval is not installed: pip install -e '.[parity]'"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("realdata") and not DATA.is_dir():
        pytest.skip(f"no real data at {DATA}: set JAXLM_DATA")
    if item.get_closest_marker("parity") and (why := _missing_parity()):
        # CI sets this, so that a missing oracle is a failure there and not a silent skip.
        (pytest.fail if os.environ.get("JAXLM_REQUIRE_PARITY") else pytest.skip)(why)
    if item.get_closest_marker("slow") and time.time() > float(os.environ.get("JAXLM_UNTIL", "inf")):
        pytest.skip("no time is left for more slow proofs (JAXLM_UNTIL)")
    if item.get_closest_marker("gpu") and PLATFORM == "cpu":
        pytest.skip("no GPU: run with JAXLM_TEST_PLATFORM=cuda on a machine that has one")


@pytest.fixture(autouse=True)
def no_mesh_is_left():
    """Under a mesh that one test leaves set, others would fail by their order alone."""
    yield
    assert jax.sharding.get_abstract_mesh().empty, "a mesh is left set: is there a yield within jax.set_mesh?"


@pytest.fixture
def data() -> pathlib.Path:
    """The folder of the real data sets; for tests marked `realdata`."""
    return DATA


@pytest.fixture
def command(tmp_path):
    """Run a command as a user would, in a folder of its own: `command("train.py", "--train.steps", 2)`.

    Returns the finished process with its output as text. The environment is a user's: one device,
    no test switches; the data cache lies in the test's folder unless `cache` says otherwise.
    """
    import subprocess

    def run(*words: object, devices: int = 1, cwd: pathlib.Path = tmp_path, timeout: float = 300, **extra: str):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "PYTEST", "COLUMNS"))}
        env |= {"JAXLM_CACHE": str(tmp_path / "cache"), "JAX_PLATFORMS": PLATFORM, "JAXLM_DATA": str(DATA), **extra}
        if devices > 1:
            env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
        texts = [str(word) for word in words]
        head = [sys.executable, str(ROOT / "train.py")] if texts[0] == "train.py" else [sys.executable, "-m", "jaxlm", texts[0]]
        return subprocess.run(
            [*head, *texts[1:]], cwd=cwd, env=env, timeout=timeout, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )

    return run
