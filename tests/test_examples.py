"""Each example runs, with few steps."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from sb3_diffusion import DTQL

EXAMPLES = Path(__file__).parent.parent / "examples"
ARGUMENTS: dict[str, list[str]] = {
    "dtql_offline_to_online": ["--offline-steps", "5", "--online-steps", "120", "--episodes", "1"],
    "diffusion_ql_samplers": ["--steps", "5", "--episodes", "1"],
    "diffuser_planning": ["--steps", "3", "--episodes", "1"],
    "bellman_diffusion_rewards": ["--steps", "3", "--episodes", "1", "--candidates", "2"],
    "several_processes": ["--steps", "5", "--episodes", "1"],
    "diffsr_features": ["--steps", "110", "--episodes", "1"],
}
SLOW = ("diffuser_planning",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the data that the examples record on first use."""
    pytest.importorskip("minari")
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(autouse=True)
def somewhere_else(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder))
    monkeypatch.chdir(tmp_path)


def test_none_is_forgotten() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"quickstart", *ARGUMENTS}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.expensive if n in SLOW else ()) for n in ARGUMENTS])
def test_example(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", [name, *ARGUMENTS[name]])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out


def test_several_processes() -> None:
    script, options = str(EXAMPLES / "several_processes.py"), ARGUMENTS["several_processes"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, *options]
    printed = subprocess.run(torchrun, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert printed.count("2 process(es), 5 steps") == 1
    assert DTQL.load("together")._n_updates == 5


def test_quickstart(capsys: pytest.CaptureFixture) -> None:
    runpy.run_path(str(EXAMPLES / "quickstart.py"))["main"](n_offline=5, n_online=120)
    assert "after    120 env steps more" in capsys.readouterr().out
