"""RL Zoo with our algorithms: presets, search spaces, and the real commands of rl_zoo3, each in a process of its own."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from algos import AlgoSpec
from envs import POINT_ENV

import sb3_diffusion
from sb3_diffusion import ALGORITHMS, DTQL, Diffuser, PDTracker
from sb3_diffusion.common.utils import CosineSchedule, policy_alias
from sb3_diffusion.search_spaces import suggest, to_arguments
from sb3_diffusion.zoo.__main__ import main
from sb3_diffusion.zoo.presets import expand, parse_texts

needs_zoo = pytest.mark.skipif(importlib.util.find_spec("rl_zoo3") is None, reason="rl_zoo3 is not installed")
DATASET = "sb3-diffusion/pendulum/mixed-v0"
SMALL = ("policy_kwargs:dict(net_arch=[16])", "batch_size:8")

COMPARE_PRESETS = """
import argparse, json, sys, tempfile
import numpy as np, yaml
from sb3_diffusion import ALGORITHMS
from sb3_diffusion.zoo import register
from sb3_diffusion.zoo.presets import sections
register()
from rl_zoo3.train import ExperimentManager

def plain(value):
    return {"type": type(value).__name__, **vars(value)} if hasattr(value, "__call__") and hasattr(value, "__dict__") \
        and not isinstance(value, type) else value

differences, n_presets = [], 0
for name, cls in ALGORITHMS.items():
    file = tempfile.NamedTemporaryFile("w", suffix=".yml")
    written = yaml.safe_dump(sections(cls))
    for preset, expected in cls.presets.items():
        n_presets += 1
        # By name, and from the file of all presets, with the section of this one under the name of the environment.
        section = yaml.safe_load(written)[preset]
        file.seek(0), file.truncate(), file.write(yaml.safe_dump({"Pendulum-v1": section})), file.flush()
        for config, own in ((None, {"preset": preset}), (file.name, None)):
            manager = ExperimentManager(argparse.Namespace(), name, "Pendulum-v1", "logs", hyperparams=own, config=config)
            arguments = manager._preprocess_hyperparams(manager.read_hyperparameters()[0])[0]
            wanted = {**expected}
            n_timesteps = wanted.pop("default_total_timesteps", cls.default_total_timesteps)
            rate = wanted.get("learning_rate")
            if isinstance(rate, float):  # RL Zoo's own form of a constant
                assert arguments["learning_rate"](0.5) == rate
                arguments["learning_rate"] = rate
            if manager.n_timesteps != n_timesteps or {k: plain(v) for k, v in arguments.items()} != {
                k: plain(v) for k, v in wanted.items()
            }:
                differences.append((name, preset, str(arguments), str(wanted)))
print(json.dumps([n_presets, differences]))
"""

SEVERAL_COMMANDS = """
import json, sys
from sb3_diffusion.zoo.__main__ import main
for args in json.loads(sys.argv[1]):
    print("$", *args, flush=True)
    assert main(args) == 0
"""


@pytest.fixture(scope="module", autouse=True)
def minari(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder of Minari that all commands share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        yield


def run(folder: Path, *args: str) -> str:
    environ = {**os.environ, "PYTHONPATH": str(Path(sb3_diffusion.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=folder, env=environ, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_zoo
def test_presets_agree_with_the_classes(tmp_path: Path) -> None:
    """RL Zoo ends with the constructor arguments that the class's own presets hold, by name and from the printed file."""
    n_presets, differences = json.loads(run(tmp_path, "-c", COMPARE_PRESETS).splitlines()[-1])
    assert n_presets == sum(len(cls.presets) for cls in ALGORITHMS.values()) > 40
    assert differences == []


@needs_zoo
def test_train_offline_enjoy_and_go_on_online(tmp_path: Path) -> None:
    options = ["--algo", "dtql", "--env", "Pendulum-v1", "--seed", "1"]
    few = ["-n", "30", "--eval-freq", "15", "--eval-episodes", "1"]
    output = run(
        *(tmp_path, "-m", "sb3_diffusion.zoo", "train", *options, *few, "--dataset", DATASET),
        *("--preset", "hopper-medium", "-params", *SMALL, "n_action_samples:4"),
    )
    assert "'trust_region_coef': 5.0" in output
    folder = tmp_path / "logs" / "dtql" / "Pendulum-v1_1"
    model = DTQL.load(folder / "Pendulum-v1")
    assert model._n_updates == model.num_timesteps == 30
    assert (model.trust_region_coef, model.n_action_samples, model.n_pretrain_steps) == (5.0, 4, 50_000)
    assert isinstance(model.learning_rate, CosineSchedule)
    assert len((folder / "0.monitor.csv").read_text().splitlines()) == 2  # a heading, no episode: the env was not stepped
    assert np.load(folder / "evaluations.npz")["timesteps"].tolist() == [15, 30]

    enjoy = ["enjoy", *options, "-f", "logs", "--no-render", "-n", "200"]
    agent = str(folder / "Pendulum-v1.zip")
    online = ["train", *options, "-n", "120", "--eval-freq", "-1", "-i", agent, "-params", *SMALL, "learning_rate:'lin_1e-3'"]
    commands = [enjoy, [*enjoy, "--load-best"], online, enjoy]
    output = run(tmp_path, "-c", SEVERAL_COMMANDS, json.dumps(commands))
    assert output.count("Mean reward") == 3
    model = DTQL.load(tmp_path / "logs" / "dtql" / "Pendulum-v1_2" / "Pendulum-v1")
    assert model.num_timesteps == 120  # env steps this time
    assert model.trust_region_coef == 5.0


@needs_zoo
def test_hyperparameter_search(tmp_path: Path) -> None:
    """Trials offline; another run takes the hyperparameters of one of them from the study."""
    study = ["--storage", "studies/pendulum.log", "--study-name", "dtql"]
    options = ["train", "--algo", "dtql", "--env", "Pendulum-v1", "--seed", "1", "-n", "4", "--eval-episodes", "1"]
    search = [*options, "-optimize", "--n-trials", "2", "--n-evaluations", "2", "--no-optim-plots", *study]
    again = [*options, "--eval-freq", "-1", *study, "--trial-id", "1", "--dataset", DATASET]
    output = run(tmp_path, "-c", SEVERAL_COMMANDS, json.dumps([[*search, "--dataset", DATASET], again]))
    assert "Number of finished trials:  2" in output
    import optuna

    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "studies/pendulum.log"))
    )
    trial = optuna.load_study(study_name="dtql", storage=storage).trials[1]
    assert trial.state == optuna.trial.TrialState.COMPLETE and trial.value < 0.0
    model = DTQL.load(tmp_path / "logs" / "dtql" / "Pendulum-v1_2" / "Pendulum-v1")
    wanted = to_arguments(trial.params)
    assert model._n_updates == 4
    assert {name: getattr(model, name) for name in ("tau", "gamma", "batch_size", "policy_kwargs", "q_coef")} == {
        name: wanted[name] for name in ("tau", "gamma", "batch_size", "policy_kwargs", "q_coef")
    }


def test_search_spaces_give_models(spec: AlgoSpec) -> None:
    """Whatever is drawn can be built, and a stored trial gives the same arguments again."""
    optuna = pytest.importorskip("optuna")
    (name,) = [name for name, cls in ALGORITHMS.items() if cls is spec.cls]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = []
    for _ in range(3):
        trial = study.ask()
        arguments = suggest(name, trial)
        assert arguments == to_arguments(trial.params)
        model = spec.cls("MlpPolicy", gym.make(POINT_ENV), buffer_size=10, device="cpu", **arguments)
        assert model.batch_size == arguments["batch_size"]
        drawn.append(arguments)
    assert drawn[0] != drawn[1] != drawn[2]
    with pytest.raises(ValueError, match="There is no search space for 'ppo'; there are: dtql"):
        suggest("ppo", study.ask())


def test_schedules_from_text() -> None:
    parsed: dict[str, Any] = parse_texts(
        dict(
            learning_rate="cosine_3e-4", critic_learning_rate="lin_1e-3", value_learning_rate="linear_1e-3_0.25", policy="a_b"
        )
    )
    assert isinstance(parsed["learning_rate"], CosineSchedule) and parsed["learning_rate"].initial == 3e-4
    assert [parsed["critic_learning_rate"](p) for p in (1.0, 0.5, 0.0)] == pytest.approx([1e-3, 5e-4, 0.0])
    assert [parsed["value_learning_rate"](p) for p in (1.0, 0.875, 0.5)] == pytest.approx([1e-3, 5e-4, 0.0])
    assert parsed["policy"] == "a_b"
    for text in ("cosin_3e-4", "cosine_fast", "linear_1_2_3", "1e-3"):
        with pytest.raises(ValueError, match="`learning_rate` must be a number"):
            parse_texts(dict(learning_rate=text))


def test_tracker_from_text() -> None:
    assert vars(parse_texts(dict(tracker="pd"))["tracker"]) == vars(PDTracker())
    assert expand(Diffuser, dict(preset="maze2d-umaze"))["tracker"] == "pd"
    with pytest.raises(ValueError, match="`tracker` must be 'pd'"):
        parse_texts(dict(tracker="pid"))


def test_what_stands_beside_a_preset_wins() -> None:
    section = expand(DTQL, dict(preset="hopper-medium-v2", batch_size=7, n_timesteps=10))
    assert (section["batch_size"], section["n_timesteps"], section["trust_region_coef"]) == (7, 10, 5.0)
    assert "preset" not in section
    with pytest.raises(ValueError, match="DTQL has no preset 'nothing'; there are: antmaze"):
        expand(DTQL, dict(preset="nothing"))


def test_policy_alias() -> None:
    box = gym.spaces.Box(-1.0, 1.0, (3,))
    image = gym.spaces.Box(0, 255, (36, 36, 3), np.uint8)
    assert [policy_alias(space) for space in (box, image, gym.spaces.Dict(a=box))] == [
        "MlpPolicy",
        "CnnPolicy",
        "MultiInputPolicy",
    ]


def test_without_rl_zoo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "rl_zoo3.train", None)
    monkeypatch.setitem(sys.modules, "rl_zoo3", None)
    assert main(["train", "--algo", "dtql"]) == 1
    assert "sb3-diffusion[zoo]" in capsys.readouterr().err
