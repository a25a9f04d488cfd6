"""The package as a whole: what it needs, what it offers, how it is started."""

import ast
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sb3_diffusion

ROOT = Path(sb3_diffusion.__file__).parent

CORE_ONLY = """
import sys, warnings
warnings.simplefilter("ignore")
EXTRAS = ("minari", "h5py", "matplotlib", "scipy", "tyro", "gymnasium_robotics", "mujoco", "rl_zoo3", "optuna", "ray",
          "huggingface_hub", "tensorboard", "cv2", "wandb", "psutil", "imageio", "onnx", "onnxruntime", "onnxscript")

import torch._dynamo  # torch asks which packages there are; building an optimiser imports it

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import numpy as np
import sb3_diffusion
from sb3_diffusion import ALGORITHMS, OfflineDataset, load_dataset
import sb3_diffusion.buffers, sb3_diffusion.datasets, sb3_diffusion.evaluation
loaded = [name for name in EXTRAS if name in sys.modules]
assert not loaded, loaded
n = 40
rng = np.random.default_rng(0)
data = dict(observations=rng.normal(size=(n, 3)), actions=rng.uniform(-1, 1, (n, 1)), rewards=np.zeros(n),
            terminals=np.arange(n) % 10 == 9)
for cls in ALGORITHMS.values():
    model = cls("MlpPolicy", dataset=data, env=None, batch_size=4, buffer_size=10, device="cpu")
    model.learn(2)
    model.save("model")
    model = cls.load("model")
    assert model.predict(np.zeros(3, np.float32))[0].shape == (1,)
for source, extra in (("x.hdf5", "d4rl|minari"), ("a/b/c-v0", "minari")):
    open("x.hdf5", "wb").write(b"0")
    try:
        load_dataset(source)
    except ImportError as error:
        assert "sb3-diffusion[" in str(error), error
    else:
        raise AssertionError(source)
print("done")
"""


def run(code: str, folder: Path) -> str:
    environ = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=environ, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_core_only(tmp_path: Path) -> None:
    """Import, training and files need none of the extras; a source that needs one names it."""
    assert run(CORE_ONLY, tmp_path).endswith("done\n")


def test_public_names() -> None:
    for name in sb3_diffusion.__all__:
        assert hasattr(sb3_diffusion, name), name
    expected = {"ALGORITHMS", "OfflineDataset", "load_dataset", "make_env", "EpisodeReplayBuffer", "OfflineAlgorithm"}
    assert expected <= set(sb3_diffusion.__all__)
    for name, cls in sb3_diffusion.ALGORITHMS.items():
        assert name == name.lower() and cls.__name__ in sb3_diffusion.__all__
        assert {"MlpPolicy"} <= set(cls.policy_aliases)


def test_types_are_shipped() -> None:
    assert (ROOT / "py.typed").is_file()


def test_version() -> None:
    try:
        installed = importlib.metadata.version("sb3-diffusion")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed")
    assert installed == sb3_diffusion.__version__


def test_console_script(tmp_path: Path) -> None:
    pytest.importorskip("tyro")
    environ = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    command = [sys.executable, "-m", "sb3_diffusion", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environ, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout and "evaluate" in done.stdout
    scripts = importlib.metadata.entry_points(group="console_scripts", name="sb3-diffusion")
    for script in scripts:
        assert callable(script.load())


def test_nothing_prints_or_warns_when_imported(tmp_path: Path) -> None:
    assert run("import warnings; warnings.simplefilter('error', UserWarning); import sb3_diffusion", tmp_path) == ""


FOR_ALL = {"sb3_diffusion.common.utils", "sb3_diffusion.common.distributed"}


def imports_of(file: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in it; names taken from the package itself count as its."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("sb3_diffusion.")} - FOR_ALL


def test_imports_go_one_way() -> None:
    """The map in the documentation lists all there is, in an order in which each part knows only those above it."""
    text = (ROOT.parent / "docs" / "developer.md").read_text("utf-8").partition("```text\n")[2].partition("```")[0]
    lines = re.findall(r"^  ((?:\w+(?:/|\.py)(?:, |\s|$))+)", text, flags=re.MULTILINE)
    ranks = {name: rank for rank, line in enumerate(lines) for name in re.findall(r"\w+(?=/|\.py)", line)}
    parts = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert parts - {"__init__", "__main__"} == set(ranks)
    for name, rank in ranks.items():
        files = [ROOT / f"{name}.py"] if (ROOT / f"{name}.py").is_file() else (ROOT / name).rglob("*.py")
        for file in files:
            for module in imports_of(file):
                other = module.split(".")[1]
                assert other == name or ranks[other] < rank, f"{file.relative_to(ROOT)} imports {module}"
