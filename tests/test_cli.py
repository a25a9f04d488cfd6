"""The commands, run in this process as the shell would run them."""

import copy
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import sys
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch as th
from envs import PointGoalEnv

import sb3_diffusion
import sb3_diffusion.cli as cli
from sb3_diffusion import DTQL, Diffuser, OfflineDataset, load_dataset
from sb3_diffusion.cli.shared import make_model, read_changes
from sb3_diffusion.datasets import write_dataset

ENV_ID = "Pendulum-v1"
FILM_ENV = "SB3DiffusionFilm-v0"


class FilmEnv(PointGoalEnv):
    """Shows where the point is, as a white square."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def render(self) -> np.ndarray:
        frame = np.zeros((64, 48, 3), np.uint8)
        row, column = (20 * (1.0 + self.position)).astype(int)
        frame[row : row + 8, column : column + 8] = 255
        return frame


gym.register(FILM_ENV, FilmEnv, max_episode_steps=9, kwargs={"as_dict": False})


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))


@pytest.fixture
def log_file(tmp_path: Path) -> Path:
    """A log of random actions in the pendulum, in D4RL's layout."""
    env = gym.make(ENV_ID)
    env.action_space.seed(0)
    keys = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    columns: dict[str, list] = {key: [] for key in keys}
    for episode in range(2):
        observation, _ = env.reset(seed=episode)
        done = False
        while not done:
            action = env.action_space.sample()
            next_observation, reward, terminated, truncated, _ = env.step(action)
            for key, value in zip(
                columns, (observation, action, reward, next_observation, terminated, truncated), strict=True
            ):
                columns[key].append(value)
            observation, done = next_observation, terminated or truncated
    path = tmp_path / "pendulum.hdf5"
    with h5py.File(path, "w") as file:
        for key, values in columns.items():
            file[key] = np.asarray(values)
    return path


@pytest.fixture
def recorded_file(log_file: Path, tmp_path: Path) -> Path:
    """The same log, which says that it was recorded in episodes of 5 steps at half the gravity."""
    env = gym.make(ENV_ID)
    spec = copy.deepcopy(env.spec)
    spec.max_episode_steps, spec.kwargs = 5, {"g": 5.0}
    spaces = dict(observation_space=env.observation_space, action_space=env.action_space)
    write_dataset(load_dataset(str(log_file), env_spec=spec, **spaces), tmp_path / "recorded.npz")
    return tmp_path / "recorded.npz"


def run(*args: object) -> int:
    return cli.main([str(arg) for arg in args])


def train(log_file: Path, *args: object) -> int:
    return run("train", "--dataset", log_file, "--env", ENV_ID, "--seed", 0, "--device", "cpu", "--episodes", 0, *args)


def parameters(path: Path) -> dict[str, th.Tensor]:
    return {f"{name}.{key}": value for name, state in DTQL.load(path, device="cpu").get_parameters().items()
            for key, value in state.items() if isinstance(value, th.Tensor)}  # fmt: skip


def test_train_and_evaluate(log_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "run"
    assert train(log_file, "--steps", 4, "--out", out, "--episodes", 1, "--eval-every", 2) == 0
    assert "DTQL after 4 steps" in capsys.readouterr().out
    assert np.load(out / "evaluations.npz")["timesteps"].tolist() == [2, 4]
    assert (out / "best_model.zip").is_file()
    assert DTQL.load(out / "model").num_timesteps == 4

    assert run("evaluate", out / "model.zip", "--env", ENV_ID, "--episodes", 2, "--seed", 1, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["lengths"] == [200, 200]
    assert report["mean"] == pytest.approx(np.mean(report["returns"]))
    low, high = report["mean_interval_95"]
    assert low <= report["mean"] <= high
    # The environment is known from the file beside the model; equal seeds give equal episodes.
    assert run("evaluate", out / "model.zip", "--episodes", 1, "--seed", 1, "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["returns"][0] == pytest.approx(report["returns"][0], rel=1e-5)
    assert again["mean_interval_95"] is None


def test_evaluate_knows_the_dataset_of_the_training(log_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    env = gym.make(ENV_ID)
    spaces = dict(observation_space=env.observation_space, action_space=env.action_space)
    data = load_dataset(str(log_file), env_spec=env.spec, **spaces)
    data.ref_min_score, data.ref_max_score = -1600.0, 0.0
    write_dataset(data, tmp_path / "log.npz")
    out = tmp_path / "run"
    options = ("--steps", 1, "--seed", 0, "--device", "cpu", "--episodes", 0, "--out", out)
    assert run("train", "--dataset", tmp_path / "log.npz", *options) == 0
    capsys.readouterr()
    evaluate = ("evaluate", out / "model.zip", "--episodes", 1, "--seed", 1)
    assert run(*evaluate, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["dataset"], report["env"]) == (load_dataset(str(tmp_path / "log.npz")).name, ENV_ID)
    assert report["normalized_scores"] == pytest.approx([100.0 * (report["mean"] + 1600.0) / 1600.0])
    assert run(*evaluate) == 0
    assert "behaviour (the data)" in capsys.readouterr().out

    (tmp_path / "log.npz").unlink()
    assert run(*evaluate, "--env", ENV_ID, "--json") == 0
    output = capsys.readouterr()
    report = json.loads(output.out)
    assert report["dataset"] is None and report["normalized_scores"] is None
    (line,) = output.err.strip().splitlines()
    assert line.startswith("Without the dataset of the training") and "log.npz" in line
    assert run(*evaluate) == 1  # the environment is that of the dataset
    assert "log.npz" in capsys.readouterr().err
    assert run(*evaluate, "--env", ENV_ID, "--dataset", "other.npz") == 1  # what was asked for is not left out


def test_environments_are_played_as_recorded(
    recorded_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Unless the user names one: with the recorded settings and length of episodes, as the model's own environment."""
    gravity: list[float] = []
    pendulum = gym.envs.classic_control.PendulumEnv
    make = pendulum.__init__

    def make_and_look(self, *args, **kwargs) -> None:
        make(self, *args, **kwargs)
        gravity.append(self.g)

    monkeypatch.setattr(pendulum, "__init__", make_and_look)
    small = ("--device", "cpu", "--set", "policy_kwargs.net_arch=[8]", "batch_size=4")
    once = ("--dataset", recorded_file, "--steps", 1, *small, "--episodes", 1)
    assert run("train", *once, "--eval-every", 1, "--out", "run") == 0
    assert np.load("run/evaluations.npz")["ep_lengths"].tolist() == [[5]]
    capsys.readouterr()
    for named in ((), ("--dataset", recorded_file)):
        assert run("evaluate", "run/model.zip", *named, "--episodes", 2, "--json") == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["lengths"], report["env"]) == ([5, 5], ENV_ID)
    assert run("benchmark", *once, "--evaluations", 1, "--seeds", 0, "--out", "b") == 0
    (record,) = json.loads(Path("b/results.json").read_text())["runs"].values()
    assert (record["evaluations"][0]["lengths"], record["env"]) == ([5], ENV_ID)
    assert run("benchmark", "speed", *once, "--out", "b") == 0
    assert run("demo", "--dataset", recorded_file, "--steps", 8, "--episodes", 1, "--out", "demo") == 0
    assert set(np.load("demo/evaluations.npz")["ep_lengths"].flat) == {5}
    assert len(gravity) > 0 and set(gravity) == {5.0}

    assert run("evaluate", "run/model.zip", "--env", ENV_ID, "--episodes", 1, "--json") == 0
    assert gravity[-1] == 10.0


def test_packages_are_measured_as_recorded(recorded_file: Path, tmp_path: Path):
    pytest.importorskip("huggingface_hub")
    assert run("train", "--dataset", recorded_file, "--steps", 1, "--episodes", 0, "--out", "run") == 0
    assert run("package", "run/model.zip", "hub", "--episodes", 1) == 0
    results = json.loads(Path("hub/results.json").read_text())
    assert (results["evaluation"]["lengths"], results["env"]) == ([5], ENV_ID)


def test_films_are_made_as_recorded(recorded_file: Path, capsys: pytest.CaptureFixture):
    pytest.importorskip("imageio")
    pytest.importorskip("pygame")
    assert run("train", "--dataset", recorded_file, "--steps", 1, "--episodes", 0, "--out", "run") == 0
    capsys.readouterr()
    assert run("record", "run/model.zip", "--out", "film.gif") == 0
    assert capsys.readouterr().out.startswith("5 steps, return")


def test_settings_as_dotted_names_and_schedules(tmp_path: Path):
    changes = ("policy_kwargs.net_arch=[8]", "batch_size=4", "learning_rate=lin_3e-4")
    assert run("train", "--env", ENV_ID, "--steps", 1, "--episodes", 0, "--out", tmp_path / "run", "--set", *changes) == 0
    model = DTQL.load(tmp_path / "run" / "model")
    assert (model.policy_kwargs["net_arch"], model.batch_size) == ([8], 4)
    assert [model.learning_rate(progress) for progress in (1.0, 0.5, 0.0)] == pytest.approx([3e-4, 1.5e-4, 0.0])


def test_dotted_names_add_to_a_preset():
    changes = read_changes(["policy_kwargs.net_kwargs.multipliers=[1]"])
    model = make_model(Diffuser, "MlpPolicy", ENV_ID, "halfcheetah-medium", changes, device="cpu")
    assert model.policy_kwargs["net_kwargs"] == {**Diffuser.preset("halfcheetah-medium")["policy_kwargs"]["net_kwargs"],
                                                 "multipliers": [1]}  # fmt: skip


def test_stochastic_evaluations(log_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Asked for, they are sampled on the way, at the end, in what is resumed and in benchmarks."""
    asked: list[bool] = []
    predict = DTQL.predict

    def predict_and_look(self: DTQL, *args, deterministic: bool = False, **kwargs):
        asked.append(deterministic)
        return predict(self, *args, deterministic=deterministic, **kwargs)

    monkeypatch.setattr(DTQL, "predict", predict_and_look)
    small = ("--set", "policy_kwargs.net_arch=[8]", "batch_size=4")
    options = ("--steps", 1, "--episodes", 1, "--eval-every", 1, *small)
    for sampled in ((), ("--stochastic",)):
        out = tmp_path / f"run{len(sampled)}"
        assert train(log_file, *options, *sampled, "--out", out) == 0
        assert run("train", "--resume", out / "model.zip", "--steps", 2, "--device", "cpu") == 0
        assert set(asked) == {not sampled} and len(asked) == 4 * 200
        asked.clear()
    benchmark = ("--dataset", log_file, "--env", ENV_ID, "--device", "cpu", "--out", "b", "--steps", 1, "--evaluations", 1)
    assert run("benchmark", *benchmark, "--episodes", 1, "--seeds", 0, *small, "--stochastic") == 0
    assert set(asked) == {False}
    (record,) = json.loads(Path("b/results.json").read_text())["runs"].values()
    assert record["name"].endswith(", stochastic") and record["deterministic"] is False


def test_interrupted_run_goes_on_exactly(log_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    assert train(log_file, "--steps", 9, "--out", tmp_path / "whole") == 0

    one_step = DTQL.train

    def train_until_signal(self: DTQL, *args, **kwargs) -> None:
        one_step(self, *args, **kwargs)
        if self.num_timesteps == 4:  # while step 5 is under way
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(DTQL, "train", train_until_signal)
        assert train(log_file, "--steps", 9, "--out", tmp_path / "parts") == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (tmp_path / "parts" / "model.zip").exists()
    output = capsys.readouterr().out
    assert "Interrupted at 5 of 9 timesteps" in output
    resumed = tmp_path / "parts" / "interrupted.zip"
    assert " ".join(output.split()).endswith(f"sb3-diffusion train --resume {resumed}")

    # Nothing is said again: dataset, env, algorithm and length come from the file beside the model.
    assert run("train", "--resume", resumed, "--device", "cpu") == 0
    whole, parts = parameters(tmp_path / "whole" / "model"), parameters(tmp_path / "parts" / "model")
    assert whole.keys() == parts.keys() and len(whole) > 10
    for name, value in whole.items():
        assert th.equal(value, parts[name]), name


def interrupt_predictions_at(timesteps: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the first evaluation of a model of that seed with so many timesteps."""
    predict, sent = DTQL.predict, []

    def predict_and_signal(self: DTQL, *args, **kwargs):
        if (self.num_timesteps, self.seed) == (timesteps, seed) and not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return predict(self, *args, **kwargs)

    monkeypatch.setattr(DTQL, "predict", predict_and_signal)


@pytest.mark.parametrize(("episodes", "status"), [(0, 0), (1, 130)])
def test_interrupted_after_the_last_step(
    episodes: int, status: int, recorded_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """All steps are done, so that the run is finished; what is left is the evaluation at the end, if there is one."""
    interrupt_predictions_at(2, 0, monkeypatch)
    options = ("--steps", 2, "--seed", 0, "--device", "cpu", "--eval-every", 2, "--episodes", episodes, "--out", "run")
    assert run("train", "--dataset", recorded_file, *options) == status
    assert DTQL.load("run/model").num_timesteps == 2 and not Path("run/interrupted.zip").exists()
    output = capsys.readouterr().out
    assert ("sb3-diffusion evaluate run/model.zip" in output) == (episodes > 0)
    assert "Return per episode" not in output


def test_interrupted_last_evaluation_of_a_benchmark_run(recorded_file: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """The next seed is not begun; after the last one nothing is left that could be stopped."""
    small = ("--device", "cpu", "--out", "b", "--set", "policy_kwargs.net_arch=[8]", "batch_size=4")
    curve = ("benchmark", "--dataset", recorded_file, "--steps", 2, "--evaluations", 2, "--episodes", 1, "--seeds", 0, 1)

    def finished() -> list[int]:
        return [record["seed"] for record in json.loads(Path("b/results.json").read_text())["runs"].values()]

    with monkeypatch.context() as patch:
        interrupt_predictions_at(2, 0, patch)
        assert run(*curve, *small) == 130
    assert "The same command goes on from here" in capsys.readouterr().out
    assert finished() == [0] and not list(Path("b/work/results").glob("*seed1"))
    with monkeypatch.context() as patch:
        interrupt_predictions_at(2, 1, patch)
        assert run(*curve, *small) == 0
    assert finished() == [0, 1] and Path("b/report.html").is_file()


def test_online_run_keeps_its_replay_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    collect = DTQL.collect_rollouts

    def collect_until_signal(self: DTQL, *args, **kwargs):
        if self.num_timesteps == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return collect(self, *args, **kwargs)

    options = ("--seed", 0, "--device", "cpu", "--episodes", 0, "--steps", 12)
    with monkeypatch.context() as patch:
        patch.setattr(DTQL, "collect_rollouts", collect_until_signal)
        assert run("train", "--env", ENV_ID, *options, "--out", tmp_path) == 130
    stopped_at = DTQL.load(tmp_path / "interrupted").num_timesteps
    sizes = []
    load_replay_buffer = DTQL.load_replay_buffer

    def load_and_look(self: DTQL, *args, **kwargs) -> None:
        load_replay_buffer(self, *args, **kwargs)
        sizes.append(self.replay_buffer.size())

    monkeypatch.setattr(DTQL, "load_replay_buffer", load_and_look)
    assert run("train", "--resume", tmp_path / "interrupted", "--device", "cpu") == 0  # with or without .zip, as load()
    assert sizes == [stopped_at]
    assert DTQL.load(tmp_path / "model").num_timesteps == 12


def test_fine_tuning_from_a_finished_model(log_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert train(log_file, "--steps", 2, "--out", tmp_path / "offline") == 0
    model, out = tmp_path / "offline" / "model.zip", tmp_path / "online"
    collect, online_at = DTQL.collect_rollouts, []

    def collect_until_signal(self: DTQL, *args, **kwargs):
        online_at.append(self.num_timesteps)
        if self.num_timesteps == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return collect(self, *args, **kwargs)

    monkeypatch.setattr(DTQL, "collect_rollouts", collect_until_signal)
    assert run("train", "--resume", model, "--online", "--steps", 6, "--out", out, "--episodes", 0) == 130
    assert run("train", "--resume", out / "interrupted.zip", "--device", "cpu") == 0  # it stays online
    assert online_at == [2, 3, 4, 5]
    assert DTQL.load(out / "model").num_timesteps == 6
    assert DTQL.load(model).num_timesteps == 2


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert run("demo", "--steps", 8, "--episodes", 2, "--out", tmp_path / "demo") == 0
    output = capsys.readouterr().out
    assert "behaviour (the data)" in output and "DTQL after 8 steps" in output
    assert (tmp_path / "demo" / "demo_learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert np.load(tmp_path / "demo" / "evaluations.npz")["results"].shape == (cli.training.DEMO_EVALUATIONS, 10)
    assert DTQL.load(tmp_path / "demo" / "model").num_timesteps == 8


def test_dataset_commands(log_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert run("dataset", "summary", log_file, "--json") == 1  # actions beyond the [-1, 1] that such files have by custom
    capsys.readouterr()
    with h5py.File(log_file, "a") as file:
        file["actions"][...] = file["actions"][...] / 2
    assert run("dataset", "summary", log_file, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["n_episodes"], summary["n_steps"]) == (2, 400)
    assert run("dataset", "summary", log_file) == 0
    assert "2 episodes, 400 steps" in capsys.readouterr().out
    assert run("dataset", "plot", log_file, "--out", tmp_path / "picture.png") == 0
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_dataset_convert(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert run("dataset", "make", "sb3-diffusion/pendulum/mixed-v0") == 0
    chain = ["sb3-diffusion/pendulum/mixed-v0", "log.hdf5", "log.npz", "my/log-v0"]
    for source, target in itertools.pairwise(chain):
        assert run("dataset", "convert", source, target) == 0
    assert "150 episodes, 30000 steps: my/log-v0" in capsys.readouterr().out
    first, last = (load_dataset(name) for name in (chain[0], chain[-1]))
    for field in ("observations", "actions", "rewards", "next_observations", "terminations", "truncations"):
        np.testing.assert_array_equal(getattr(first, field), getattr(last, field))
    assert last.env_spec == first.env_spec and last.ref_max_score == first.ref_max_score
    assert run("dataset", "convert", chain[-1], "log.mmap") == 0
    assert "150 episodes, 30000 steps: log.mmap" in capsys.readouterr().out
    np.testing.assert_array_equal(load_dataset("log.mmap").observations, first.observations)
    assert run("dataset", "convert", chain[0], "log.npz") == 1
    assert "log.npz exists" in capsys.readouterr().err


def test_evaluations_and_log_of_a_resumed_run(log_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = ("--eval-every", 2, "--episodes", 1, "--save-every", 3, "--log", "csv", "tensorboard")
    small = ("--set", "policy_kwargs={'net_arch': [8]}", "batch_size=4")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(log_file, "--steps", 7, "--out", whole, *options, *small) == 0
    one_step = DTQL.train

    def train_until_signal(self: DTQL, *args, **kwargs) -> None:
        one_step(self, *args, **kwargs)
        if self.num_timesteps == 4:  # while step 5 is under way
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(DTQL, "train", train_until_signal)
        assert train(log_file, "--steps", 7, "--out", parts, *options, *small) == 130
    assert DTQL.load(parts / "checkpoint").num_timesteps == 3
    assert run("train", "--resume", parts / "interrupted.zip", "--device", "cpu") == 0
    found, expected = (np.load(folder / "evaluations.npz") for folder in (parts, whole))
    assert found["timesteps"].tolist() == expected["timesteps"].tolist() == [2, 4, 6]
    assert DTQL.load(parts / "model").batch_size == 4
    assert {path.name for path in parts.glob("log_from_*")} == {"log_from_0", "log_from_5"}
    assert (parts / "log_from_5" / "progress.csv").is_file() and list((parts / "log_from_0").glob("events.out.tfevents*"))
    assert run("train", "--resume", parts / "interrupted.zip", "--steps", 9, "--set", "gamma=0.9") == 1


def test_successes_of_a_resumed_run(box_dataset: OfflineDataset, tmp_path: Path):
    """They are kept with the other numbers, also where only the last evaluations have them."""
    write_dataset(box_dataset, tmp_path / "log.npz")
    options = ("--seed", 0, "--device", "cpu", "--eval-every", 1, "--episodes", 2, "--out", "run")
    assert run("train", "--dataset", tmp_path / "log.npz", "--steps", 2, *options) == 0
    before = dict(np.load("run/evaluations.npz"))
    assert run("train", "--resume", "run/model.zip", "--steps", 3, "--device", "cpu") == 0
    after = dict(np.load("run/evaluations.npz"))
    assert after["successes"].shape == after["results"].shape == (3, 2)
    np.testing.assert_array_equal(after["successes"][:2], before["successes"])
    np.savez("run/evaluations.npz", **{**after, "successes": after["successes"][1:]})
    assert run("train", "--resume", "run/model.zip", "--steps", 4, "--device", "cpu") == 0
    assert np.load("run/evaluations.npz")["successes"].shape == (3, 2)


def test_films_beside_models_with_a_dot_in_the_name(tmp_path: Path):
    pytest.importorskip("imageio")
    DTQL("MlpPolicy", FILM_ENV, policy_kwargs=dict(net_arch=[8]), device="cpu").save(tmp_path / "dtql_lr0.001.zip")
    for name in ("dtql_lr0.001.zip", "dtql_lr0.001"):
        assert run("record", name, "--env", FILM_ENV, "--max-steps", 2) == 0
        for suffix in (".mp4", ".gif"):
            (tmp_path / f"dtql_lr0.001{suffix}").unlink()


def test_record(tmp_path: Path, capsys: pytest.CaptureFixture):
    iio = pytest.importorskip("imageio.v3")
    model = DTQL("MlpPolicy", FILM_ENV, policy_kwargs=dict(net_arch=[8]), device="cpu", seed=0)
    model.save(tmp_path / "model")
    file = tmp_path / "model.zip"
    assert run("record", file, "--env", FILM_ENV, "--episodes", 2, "--max-steps", 6, "--seed", 0) == 0
    assert "6 steps, return" in capsys.readouterr().out
    # The films show where the policy really went.
    env = gym.make(FILM_ENV, render_mode="rgb_array")
    observation, _ = env.reset(seed=0)
    for frame, still in zip(iio.imread(tmp_path / "model.mp4"), iio.imread(tmp_path / "model.gif"), strict=True):
        shown = env.render()
        assert frame.shape == still.shape == shown.shape
        assert np.abs(frame.astype(int) - shown).mean() < 5.0 and np.abs(still.astype(int) - shown).mean() < 5.0
        observation = env.step(model.predict(observation, deterministic=True)[0])[0]
    assert run("record", file, "--env", FILM_ENV, "--out", tmp_path / "new" / "film.gif") == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["film.gif"]
    assert run("record", file, "--env", FILM_ENV, "--out", "film.avi") == 1
    assert "end in .mp4 or .gif" in capsys.readouterr().err
    assert run("record", file) == 1
    assert "Which environment?" in capsys.readouterr().err


def test_benchmark(log_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    options = ("--dataset", log_file, "--env", ENV_ID, "--device", "cpu", "--out", tmp_path / "b")
    small = ("--set", "policy_kwargs={'net_arch': [8]}", "batch_size=4")
    curve = ("--steps", 6, "--evaluations", 3, "--episodes", 1, "--seeds", 0, 1)

    one_step = DTQL.train

    def train_until_signal(self: DTQL, *args, **kwargs) -> None:
        one_step(self, *args, **kwargs)
        if self.seed == 1 and self.num_timesteps == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(DTQL, "train", train_until_signal)
        assert run("benchmark", *options, *curve, *small) == 130
    capsys.readouterr()
    assert run("benchmark", *options, *curve, *small, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    (entry,) = summary.values()
    assert entry["seeds"] == [0, 1] and entry["unit"] == "return"
    low, value, high = (entry["last"]["iqm"][key] for key in ("low", "value", "high"))
    assert low <= value <= high and value == pytest.approx(np.mean(entry["last"]["scores"]))
    assert json.loads((tmp_path / "b" / "summary.json").read_text()) == summary
    assert (tmp_path / "b" / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64," in (tmp_path / "b" / "report.html").read_text()
    records = json.loads((tmp_path / "b" / "results.json").read_text())["runs"].values()
    assert [[e["timestep"] for e in record["evaluations"]] for record in records] == [[2, 4, 6]] * 2

    assert run("benchmark", "speed", *options, *small) == 0
    speed = json.loads((tmp_path / "b" / "speed.json").read_text())
    assert set(speed["milliseconds"]) == {"matrix_product", "update", "1_action", "64_actions", "batch"}
    assert min(speed["milliseconds"].values()) > 0.0 and speed["batch_size"] == 4
    assert 0.0 < speed["share_of_ceiling"]["64_actions"] < 1.0 and speed["share_of_ceiling"]["batch"] == 0.0


def test_benchmark_of_another_task_is_refused(log_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Nothing that the folder holds is changed, also where its files do not name their task."""
    other = tmp_path / "other.hdf5"
    shutil.copyfile(log_file, other)
    out = tmp_path / "b"
    settings = ("--steps", 2, "--evaluations", 1, "--episodes", 1, "--seeds", 0, "--set", "policy_kwargs.net_arch=[8]")
    options = ("--device", "cpu", "--out", out, *settings)
    on_log, on_other = (("benchmark", "--dataset", file, "--env", ENV_ID, *options) for file in (log_file, other))
    assert run(*on_log) == 0

    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in out.rglob("*.json")}

    def is_refused(*args: object) -> bool:
        before = content()
        capsys.readouterr()
        status, error = run(*args), capsys.readouterr().err
        return status == 1 and content() == before and "results.json" in error and "another folder (--out)" in error

    assert is_refused(*on_other)
    assert is_refused("benchmark", "--env", ENV_ID, *options)
    assert is_refused(*on_other[:4], ENV_ID, "--algo", "diffusion_ql", *options)  # has no run in the folder
    results, (progress,) = out / "results.json", out.glob("work/results/*/progress.json")
    for file, entries in ((results, lambda data: data), (progress, lambda data: data["protocol"])):
        data = json.loads(file.read_text())
        for key in ("task", "dataset", "env", "deterministic"):
            entries(data).pop(key, None)
        file.write_text(json.dumps(data))
    assert is_refused(*on_other)
    assert run(*on_log) == 0
    assert "finished before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train"], "pass --dataset, --env or both"),
        (["train", "--algo", "ppo", "--env", ENV_ID], "There is no algorithm 'ppo'; there are:"),
        (["train", "--env", "NoSuchEnv-v0"], "NoSuchEnv"),
        (["train", "--env", "CartPole-v1"], "got Discrete(2)"),
        (["train", "--dataset", "no/such-v0"], "no/such-v0"),
        (["train", "--resume", "nothing.zip"], "There is no model file nothing.zip"),
        (["evaluate", "nothing.zip", "--env", ENV_ID], "There is no model file nothing.zip"),
        (["dataset", "make", "no/such-v0"], "There is no embedded dataset"),
        (["train", "--env", ENV_ID, "--set", "no_such=1"], "has no hyperparameter 'no_such'; there are: action_noise, "),
        (["train", "--env", ENV_ID, "--set", "q_coeff=1"], "has no hyperparameter 'q_coeff'; did you mean q_coef"),
        (["train", "--env", ENV_ID, "--set", "gamma.x=1"], "which is no dict"),
        (
            ["train", "--env", ENV_ID, "--set", "policy_kwargs=dict(net_arch=[32])"],
            "`policy_kwargs`: expected a Python literal",
        ),
        (["train", "--env", ENV_ID, "--set", "policy_kwargs=5"], "does not take what --set says"),
        (["train", "--env", ENV_ID, "--set", "gamma=high"], "`gamma` must lie in [0.0, 1.0]: got 'high'"),
        (["train", "--env", ENV_ID, "--set", "learning_rate=falls_3e-4"], "'cosine_3e-4': got 'falls_3e-4'"),
        (["train", "--env", ENV_ID, "--policy", "Foo"], "DTQL has no policy 'Foo'; there are: MlpPolicy, CnnPolicy"),
        (["train", "--env", ENV_ID, "--eval-every", "-5"], "`--eval-every` must lie in [0"),
        (["train", "--env", ENV_ID, "--save-every", "-5"], "`--save-every` must lie in [0"),
        (["train", "--env", ENV_ID, "--episodes", "-1"], "`--episodes` must lie in [0"),
        (["demo", "--steps", "0"], "`--steps` must lie in [1"),
        (["demo", "--episodes", "0"], "`--episodes` must lie in [1"),
        (["benchmark", "--env", ENV_ID, "--episodes", "0"], "`--episodes` must lie in [1"),
        (["benchmark", "--env", ENV_ID, "--seeds"], "`--seeds` must hold at least one"),
        (["train", "--env", ENV_ID, "--set", "gamma"], "as name=value"),
        (["dataset", "summary", "nothing.hdf5"], "nothing.hdf5"),
    ],
)
def test_mistakes_are_told_in_one_line(args: list[str], message: str, capsys: pytest.CaptureFixture):
    assert run(*args) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not list(Path().iterdir())


def test_unknown_log_format(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        run("train", "--env", ENV_ID, "--log", "xml")
    assert stop.value.code == 2
    assert "tensorboard" in capsys.readouterr().err


def test_foreign_model_file(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "model.zip").write_bytes(b"not a zip file")
    assert run("evaluate", tmp_path / "model.zip", "--env", ENV_ID) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_finished_model_is_not_overwritten(log_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert train(log_file, "--steps", 1, "--out", tmp_path / "run") == 0
    before = (tmp_path / "run" / "model.zip").read_bytes()
    assert train(log_file, "--steps", 1, "--out", tmp_path / "run") == 1
    assert "already holds a finished model.zip" in capsys.readouterr().err
    assert (tmp_path / "run" / "model.zip").read_bytes() == before
    assert run("demo", "--out", tmp_path / "run") == 1
    assert "already holds a finished model.zip" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"model.zip", "train.json"}
    assert run("train", "--resume", tmp_path / "run" / "model.zip", "--steps", 1) == 1
    assert "more than the 1 timesteps" in capsys.readouterr().err
    assert run("train", "--resume", tmp_path / "run" / "model.zip", "--steps", 2, "--policy", "CnnPolicy") == 1
    assert "--policy, --preset and --set are for new models" in capsys.readouterr().err


def test_keyboard_interrupt_outside_of_training(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    def interrupt(source: str, env_id: str | None = None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.dataset, "load_data", interrupt)
    assert run("dataset", "summary", "anything") == 130


@pytest.mark.parametrize(
    "command", [["demo"], ["train"], ["evaluate"], ["record"], ["benchmark"], ["sweep"], ["dataset", "convert"]], ids=" ".join
)
def test_help_has_examples(command: list[str], capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        run(*command, "--help")
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert f"sb3-diffusion {' '.join(command)}" in output.split("usage:", 1)[1].split("\n", 1)[1]
    assert "None" not in output and "(default: )" not in output and "False" not in output


def test_version(capsys: pytest.CaptureFixture):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"{sb3_diffusion.__version__}\n"


@pytest.mark.parametrize(
    "script", sorted((Path(__file__).parent.parent / "examples").glob("*.py")), ids=lambda path: path.stem
)
def test_help_of_the_examples(script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """They say what they are, and in a line of its own how they are called."""
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    assert stop.value.code == 0
    call = re.compile(rf"^    (python|torchrun .*) examples/{script.name} --", re.MULTILINE)
    assert call.search(capsys.readouterr().out)


def test_without_tyro(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert run("demo") == 1
    assert "sb3-diffusion[cli]" in capsys.readouterr().err
