"""Sweeps on a real, local Ray with two workers: tables, killed trials, killed sweeps, search, a cluster of two nodes."""

import copy
import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from envs import POINT_ENV, RandomEnv
from gymnasium import spaces

import sb3_diffusion
from sb3_diffusion import DTQL, OfflineDataset, load_dataset
from sb3_diffusion.cli import main
from sb3_diffusion.datasets import write_dataset
from sb3_diffusion.sweep import SweepResults, SweepSettings, resume_sweep, run_sweep
from sb3_diffusion.sweep.arguments import read_values
from sb3_diffusion.sweep.running import source_of

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray[tune] is not installed")
BOX_ID = "tests/point/random-v0"
DATA = ("--dataset", BOX_ID, "--env", f"envs:{POINT_ENV}")
SMALL = ("--params", "policy_kwargs.net_arch=[16]", "batch_size=8")
FEW = ("--evaluations", "4", "--episodes", "1", "--workers", "2", "--device", "cpu")


@pytest.fixture
def environ(minari_folder: Path) -> dict[str, str]:
    """Of the processes: our package and the environments of the tests, one thread, workers as quick as others."""
    root = Path(sb3_diffusion.__file__).parents[1]
    return {
        **os.environ,
        "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}",
        "MINARI_DATASETS_PATH": str(minari_folder),
        "OMP_NUM_THREADS": "1",
        "RAY_worker_niceness": "0",
    }


def start(environ: dict[str, str], folder: Path, *args: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *args], cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output = process.communicate(timeout=400)[0].decode()
    assert process.returncode == code, output
    return output


def wait_for(find: Callable[[], Any], process: subprocess.Popen | None = None, seconds: float = 200.0) -> Any:
    """What ``find`` returns once that is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := find():
            return found
        assert process is None or process.poll() is None, process.communicate()[0].decode()
        time.sleep(0.05)
    raise TimeoutError


def reports(out: Path, seed: int) -> list[dict[str, Any]]:
    """What the trial of a seed has reported so far."""
    lines = [line for file in out.glob(f"trials/*_seed{seed}_*/result.json") for line in file.read_text().splitlines()]
    return [json.loads(line) for line in lines if line.endswith("}")]


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def straight(seed: int, steps: int, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> DTQL:
    """The model of an uninterrupted run without Ray."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", environ["MINARI_DATASETS_PATH"])
    model = DTQL("MlpPolicy", None, dataset=BOX_ID, batch_size=8, policy_kwargs=dict(net_arch=[16]), seed=seed, device="cpu")
    return model.learn(steps)


def assert_same_parameters(one: DTQL, other: DTQL) -> None:
    for name, state in one.get_parameters().items():
        for key, value in other.get_parameters()[name].items():
            if isinstance(value, th.Tensor):
                assert th.equal(state[key], value), (name, key)


@needs_ray
def test_killed_trial_goes_on_exactly(environ: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trials at once; the process of one is killed, and ends with the model of an uninterrupted run all the same."""
    out, steps = tmp_path / "sweep", 400
    command = (
        "-m",
        "sb3_diffusion",
        "sweep",
        str(out),
        *DATA,
        "--seeds",
        "2",
        "--steps",
        str(steps),
    )
    driver = start(environ, tmp_path, *command, *FEW, *SMALL)
    first = wait_for(lambda: reports(out, 1), driver)[0]
    os.kill(first["pid"], signal.SIGKILL)
    output = finish(driver)
    assert f"{BOX_ID}: returns" in output

    results = SweepResults.load(out)
    assert [(row["seed"], row["status"], row["timesteps"], row["restarts"]) for row in results.trials] == [
        (0, "finished", steps, 0),
        (1, "finished", steps, 1),
    ]
    assert [point["timesteps"] for point in results.curves] == 2 * [100, 200, 300, 400]
    for row in results.trials:
        assert_same_parameters(DTQL.load(row["model"]), straight(row["seed"], steps, environ, monkeypatch))
        curve = [point for point in results.curves if point["trial"] == row["trial"]]
        assert row["score"] == curve[-1]["score"] and row["best_score"] == max(point["score"] for point in curve)
    with open(out / "results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["params.batch_size"] for row in table] == ["8", "8"]
    assert [float(row["score"]) for row in table] == [row["score"] for row in results.trials]
    (summary,) = results.summary()
    assert (summary["n"], summary["timesteps"]) == (2, steps)
    assert summary["low"] <= summary["score"] <= summary["high"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FileExistsError, match="already holds a sweep"):
        run_sweep(SweepSettings(["dtql"], [BOX_ID]), out)


@needs_ray
@pytest.mark.expensive
def test_killed_sweep_is_resumed_exactly(environ: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver is killed while the second pair of four trials runs; a new process ends the sweep."""
    out, steps = tmp_path / "sweep", 2_000
    command = ("-m", "sb3_diffusion", "sweep", str(out))
    options = (*DATA, "--seeds", "4", "--steps", str(steps))
    driver = start(environ, tmp_path, *command, *options, *FEW, *SMALL)
    wait_for(lambda: reports(out, 2) and reports(out, 3), driver)
    before = {seed: reports(out, seed) for seed in range(4)}
    driver.kill()
    driver.wait()
    pids = {report["pid"] for rows in before.values() for report in rows}
    wait_for(lambda: not any(is_alive(pid) for pid in pids), seconds=60)  # Ray ends with its driver
    assert not (out / "results.json").exists()
    assert before[3][-1]["timesteps"] < steps

    finish(start(environ, tmp_path, *command, "--resume"))
    results = SweepResults.load(out)
    assert [(row["seed"], row["status"]) for row in results.trials] == [(seed, "finished") for seed in range(4)]
    assert {report["pid"] for report in reports(out, 0)} == {report["pid"] for report in before[0]}  # was not run again
    assert {report["pid"] for report in reports(out, 3)} > {before[3][0]["pid"]}
    assert results.trials[3]["restarts"] == 1
    assert [report["timesteps"] for report in reports(out, 3)].count(500) == 1  # and not from the beginning
    for row in results.trials[2:]:
        assert_same_parameters(DTQL.load(row["model"]), straight(row["seed"], steps, environ, monkeypatch))


@needs_ray
@pytest.mark.expensive
def test_search_with_early_stopping(environ: dict, tmp_path: Path) -> None:
    """A study for each algorithm, also after a kill; trials stop early, but the best of each algorithm does not."""
    out = tmp_path / "sweep"
    command = (
        "-m",
        "sb3_diffusion",
        "sweep",
        str(out),
        "--algo",
        "dtql",
        "bellman_diffusion",
        *DATA,
    )
    search = ("--samples", "5", "--early-stopping", "--seeds", "2", "--steps", "90")
    fixed = ("--params", "policy_kwargs.net_arch=[16]", "batch_size=8", "learning_rate=3e-4")
    driver = start(environ, tmp_path, *command, *search, "--evaluations", "9", *FEW[2:], *fixed)
    wait_for(lambda: len(list(out.glob("trials/*/result.json"))) >= 4 and len(reports(out, 0) + reports(out, 1)) >= 20, driver)
    driver.kill()
    driver.wait()
    finish(start(environ, tmp_path, "-m", "sb3_diffusion", "sweep", str(out), "--resume"))
    results = SweepResults.load(out)
    assert results.searched
    for algo in ("dtql", "bellman_diffusion"):
        rows = [row for row in results.trials if row["algo"] == algo]
        assert [row["seed"] for row in rows].count(0) == 3 and len(rows) == 5
        assert {row["status"] for row in rows} <= {"finished", "stopped early"}
        assert any(row["status"] == "finished" for row in rows)
        assert len({row["params"]["tau"] for row in rows}) == 5
        assert {row["params"]["learning_rate"] for row in rows} == {3e-4}
        for row in rows:
            model = sb3_diffusion.ALGORITHMS[algo].load(row["model"])
            assert (model.tau, model.batch_size) == (row["params"]["tau"], 8)
            assert model.policy_kwargs["net_arch"] == [16]
    assert any(row["status"] == "stopped early" and row["timesteps"] < 90 for row in results.trials)
    assert (out / "hyperparameters.png").read_bytes().startswith(b"\x89PNG")


CLUSTER = """
import sys
from ray.cluster_utils import Cluster
from sb3_diffusion.sweep import SweepSettings, run_sweep

cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False, object_store_memory=10**8))
cluster.add_node(num_cpus=1, object_store_memory=10**8)
try:
    settings = SweepSettings(["diffsr"], [None], env="Pendulum-v1", seeds=[0, 1], steps=120, evaluations=2, episodes=1,
                             retries=0, device="cpu",
                             params={"learning_starts": [20], "batch_size": [8, 0], "feature_dim": [8]})
    results = run_sweep(settings, sys.argv[1], address=cluster.address)
finally:
    cluster.shutdown()
"""


@needs_ray
@pytest.mark.expensive
def test_cluster_of_two_nodes_online(environ: dict, tmp_path: Path) -> None:
    """Trials run online on both nodes; hyperparameters that cannot be are told, and do not disturb the others."""
    out = tmp_path / "sweep"
    finish(start(environ, tmp_path, "-c", CLUSTER, str(out)))
    results = SweepResults.load(out)
    done = [row for row in results.trials if row["params"]["batch_size"] == 8]
    assert [(row["seed"], row["status"], row["timesteps"]) for row in done] == [(0, "finished", 120), (1, "finished", 120)]
    failed = [row for row in results.trials if row["params"]["batch_size"] == 0]
    assert [(row["status"], row["score"], row["model"]) for row in failed] == 2 * [("failed", None, None)]
    assert all("`batch_size` must lie in" in row["error"] for row in failed)
    assert [(row["n"], row["params"]["batch_size"]) for row in results.summary()] == [(2, 8)]
    assert len({report["node_ip"] + str(report["pid"]) for seed in (0, 1) for report in reports(out, seed)}) == 2
    assert all(Path(row["model"]).with_name("replay_buffer.zip").is_file() for row in done)


def test_grid() -> None:
    settings = SweepSettings(
        ["dtql", "diffsr"], ["a/b-v0", "c/d-v0"], seeds=[3, 4], params={"tau": [0.1, 0.2], "gamma": [0.9]}
    )
    grid = settings.grid()
    assert len(grid) == 2 * 2 * 2 * 2
    assert grid[0] == {"algo": "dtql", "dataset": "a/b-v0", "seed": 3, "params": {"tau": 0.1, "gamma": 0.9}}
    assert len({json.dumps(trial) for trial in grid}) == len(grid)


def test_hyperparameters_from_text() -> None:
    texts = [
        "tau=0.1,0.2",
        "policy_kwargs.net_arch=[64,64],[256]",
        "actor_type=gaussian,implicit",
        "q_normalization=None,cross_critic",
    ]
    assert read_values(texts) == {
        "tau": [0.1, 0.2],
        "policy_kwargs.net_arch": [[64, 64], [256]],
        "actor_type": ["gaussian", "implicit"],
        "q_normalization": [None, "cross_critic"],
    }
    for text in ("tau", "tau=", "=1"):
        with pytest.raises(ValueError, match="name=value,value"):
            read_values([text])
    with pytest.raises(ValueError, match="`policy_kwargs`: expected a Python literal"):
        read_values(["policy_kwargs=dict(net_arch=[64])"])


@needs_ray
def test_constructor_arguments_of_a_trial() -> None:
    from sb3_diffusion.sweep.ray_tune import constructor_arguments

    params = {"preset": "maze2d-umaze", "policy_kwargs.net_kwargs.multipliers": [1], "learning_rate": "lin_3e-4"}
    preset = sb3_diffusion.Diffuser.preset("maze2d-umaze")
    arguments = constructor_arguments(sb3_diffusion.Diffuser, {"params": params})
    assert arguments["policy_kwargs"]["net_kwargs"] == {**preset["policy_kwargs"]["net_kwargs"], "multipliers": [1]}
    assert arguments["learning_rate"](0.5) == pytest.approx(1.5e-4)
    assert arguments["horizon"] == preset["horizon"]


@needs_ray
def test_search_leaves_the_rest_of_policy_kwargs(monkeypatch: pytest.MonkeyPatch) -> None:
    from sb3_diffusion.sweep.ray_tune import constructor_arguments

    preset = {"tau": 0.01, "policy_kwargs": {"net_arch": [8], "activation": "mish"}}
    monkeypatch.setattr(DTQL, "preset", lambda name: copy.deepcopy(preset))
    trial = {"params": {"preset": "any"}, "search": {"net_arch": "small", "batch_size_pow": 5}}
    expected = {"tau": 0.01, "batch_size": 32, "policy_kwargs": {"net_arch": [64, 64], "activation": "mish"}}
    assert constructor_arguments(DTQL, trial) == expected


FIXED = [
    ({"batch_size": 8, "gamma": 0.9, "learning_rate": 1e-3}, {"batch_size_pow", "one_minus_gamma", "learning_rate"}),
    ({"policy_kwargs.net_arch": [16], "tau": 0.1, "ema_decay": 0.0}, {"net_arch", "tau", "ema_decay"}),
    ({"policy_kwargs": {"net_arch": [16]}}, {"net_arch"}),
    ({"policy_kwargs.net_arch.pi": [16]}, {"net_arch"}),
    ({"policy_kwargs.n_critics": 3, "preset": None}, set()),
]


@needs_ray
@pytest.mark.parametrize(("params", "absent"), FIXED)
def test_fixed_values_are_not_searched(params: dict[str, Any], absent: set[str]) -> None:
    """What is told of a trial is what it is made with."""
    from sb3_diffusion.sweep.ray_tune import SearchByGroup, constructor_arguments

    def drawn(params: dict[str, Any]) -> dict[str, Any]:
        return SearchByGroup([("dtql", None)], [0], params).suggest("a")["trial"]

    trial = drawn(params)
    assert drawn({})["search"].keys() - trial["search"].keys() == absent
    arguments = constructor_arguments(DTQL, trial)
    for name, value in params.items():
        if "." not in name and name != "preset":
            assert arguments[name] == value


def test_summary_leaves_out_what_is_incomplete() -> None:
    row = {"algo": "dtql", "dataset": None, "params": {}, "normalized": False, "timesteps": 10, "best_score": 9.0}
    scores = {"finished": 1.0, "stopped early": 3.0, "failed": 100.0, "unfinished": 100.0}
    trials = [{**row, "trial": status, "status": status, "score": score} for status, score in scores.items()]
    (summary,) = SweepResults(trials, []).summary()
    assert (summary["n"], summary["score"]) == (2, 2.0)


LONG_SPACES = {
    "SB3DiffusionLong-v0": spaces.Box(-1, 1, (2,)),
    "SB3DiffusionLongNested-v0": spaces.Dict(
        {"state": spaces.Box(-1, 1, (2,)), "goal": spaces.Dict({"place": spaces.Box(-1, 1, (1,))})}
    ),
}
for name, space in LONG_SPACES.items():
    of_env = {"observation_space": space, "action_space": spaces.Box(-1.0, 1.0, (2,)), "length": 10**9}
    gym.register(name, RandomEnv, max_episode_steps=1_000_000, kwargs=of_env)


def long_data(name: str) -> OfflineDataset:
    """Two episodes of 6 steps of an environment that never ends, and whose time limit is a million steps."""
    space = LONG_SPACES[name]
    arrays: dict[str, Any] = {
        "actions": np.random.default_rng(0).uniform(-1, 1, (12, 2)),
        "rewards": np.ones(12),
        "terminals": np.zeros(12, bool),
        "timeouts": np.arange(12) % 6 == 5,
    }
    for seed, key in enumerate(("observations", "next_observations")):
        space.seed(seed)
        samples = [space.sample() for _ in range(12)]
        arrays[key] = np.stack(samples) if isinstance(space, spaces.Box) else {
            "state": np.stack([sample["state"] for sample in samples]),
            "goal": {"place": np.stack([sample["goal"]["place"] for sample in samples])},
        }  # fmt: skip
    return load_dataset(arrays, env_spec=gym.spec(name))


@needs_ray
@pytest.mark.filterwarnings("ignore:No episode of")
def test_trials_play_the_environment_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was recorded: episodes are cut as in the data."""
    from sb3_diffusion.sweep import ray_tune

    reported: list[dict[str, Any]] = []
    monkeypatch.setattr(ray_tune.tune, "get_checkpoint", lambda: None)
    monkeypatch.setattr(ray_tune.tune, "report", lambda metrics, checkpoint: reported.append(metrics))
    monkeypatch.setattr("sb3_diffusion.sweep.running.load_dataset", long_data)
    params = {"policy_kwargs.net_arch": [8], "batch_size": 4}
    trial = {"algo": "dtql", "dataset": "SB3DiffusionLong-v0", "seed": 0, "params": params}
    config = {"env": None, "steps": 2, "evaluations": 1, "episodes": 1, "cpus": 1, "device": "cpu", "trial": trial}
    ray_tune.run_trial(config)
    assert [(metrics["timesteps"], metrics["length_mean"]) for metrics in reported] == [(2, 6.0)]


@pytest.mark.filterwarnings("ignore:No episode of")
def test_nested_environment_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_diffusion.sweep.running.load_dataset", long_data)
    data, make_env = source_of("SB3DiffusionLongNested-v0", None)
    assert data is not None and make_env().observation_space == data.observation_space


def test_environments_of_robotics_are_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("sb3_diffusion.sweep.running.register_robotics", asked.append)
    _, make_env = source_of(None, "Pendulum-v1")
    assert asked == ["Pendulum-v1"] and make_env().spec.id == "Pendulum-v1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(algos=["ppo"]), "There is no algorithm 'ppo'"),
        (dict(params={"q_coeff": [1.0]}), "DTQL has no hyperparameter 'q_coeff'; did you mean q_coef"),
        (dict(algos=["dtql", "diffsr"], params={"q_coef": [1.0]}), "DiffSR has no hyperparameter 'q_coef'"),
        (dict(params={"gamma.x": [1.0]}), "which is no dict"),
        (dict(params={"preset": [None, "no-such"]}), "DTQL has no preset 'no-such'"),
        (dict(params={"learning_rate": [1e-3, "falls_3e-4"]}), "'cosine_3e-4': got 'falls_3e-4'"),
        (dict(seeds=[]), "`seeds` must hold at least one"),
        (dict(evaluations=20), "`evaluations` must lie in"),
        (dict(samples=2, params={"tau": [0.1, 0.2]}), "got several for tau"),
        (dict(datasets=[None]), "nothing to learn from"),
        (dict(env="NoSuchEnv-v0"), "The environment 'NoSuchEnv-v0' is unknown: .*NoSuchEnv"),
        (dict(env="Pendulum-v0"), "The environment 'Pendulum-v0' is unknown: .*Pendulum-v1"),
    ],
)
def test_mistakes_show_before_anything_runs(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run_sweep(SweepSettings(**{"algos": ["dtql"], "datasets": [None], "steps": 10, **change}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_paths_are_whole_for_trials_in_other_folders(
    box_dataset: OfflineDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files and memory-mapped folders; an id stays one, even where a folder of that name lies."""
    monkeypatch.chdir(tmp_path)
    write_dataset(box_dataset, "log.npz")
    write_dataset(box_dataset, "log.mmap")
    (tmp_path / "minari").mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    write_dataset(box_dataset, "minari/log-v0")
    started: list[SweepSettings] = []

    class Tune:
        @staticmethod
        def fit(settings: SweepSettings, *args: Any) -> SweepResults:
            started.append(settings)
            return SweepResults([], [])

    monkeypatch.setattr("sb3_diffusion.sweep.running._ray_tune", lambda: Tune)
    run_sweep(
        SweepSettings(["DTQL", "Diffusion-QL"], ["log.npz", "log.mmap", "minari/log-v0"], env=f"envs:{POINT_ENV}"), "out"
    )
    assert started[0].algos == ["dtql", "diffusion_ql"]  # in any spelling
    assert started[0].datasets == [str(tmp_path / "log.npz"), str(tmp_path / "log.mmap"), "minari/log-v0"]
    assert json.loads(Path("out/sweep.json").read_text())["datasets"] == started[0].datasets


def test_resume_without_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(FileNotFoundError, match="There is no sweep in"):
        resume_sweep(tmp_path)
    assert main(["sweep", str(tmp_path), "--resume"]) == 1
    assert "There is no sweep in" in capsys.readouterr().err


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "sb3_diffusion.sweep.ray_tune", raising=False)
    monkeypatch.delattr(sb3_diffusion.sweep, "ray_tune", raising=False)
    settings = SweepSettings(["dtql"], [None], env="Pendulum-v1", steps=10)
    with pytest.raises(ImportError, match=r"sb3-diffusion\[ray\]"):
        run_sweep(settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()
