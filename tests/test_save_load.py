"""Files: exact resume in another process, everything that travels, everything that is refused."""

import inspect
import io
import json
import os
import random
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from algos import ALGOS, AlgoSpec
from conftest import BOX_ID
from envs import POINT_ENV, POINT_GOAL_ENV, BanditEnv, RandomEnv
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.noise import NormalActionNoise, VectorizedActionNoise
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_diffusion import DTQL, CosineSchedule, OfflineDataset
from sb3_diffusion.common.serialization import FileFormatError, MissingObjectError, read_archive, write_archive
from sb3_diffusion.evaluation import evaluate

TESTS = Path(__file__).parent


def tensors(value: Any, prefix: str = "") -> Iterator[tuple[str, th.Tensor]]:
    """All tensors in nested dicts and lists, by path."""
    if isinstance(value, th.Tensor):
        yield prefix, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from tensors(part, f"{prefix}/{key}")
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from tensors(part, f"{prefix}/{i}")


def assert_equal_models(a: Any, b: Any) -> None:
    """Equal bit for bit: networks, optimisers, generators, counters."""
    ours, theirs = dict(tensors(a.get_parameters())), dict(tensors(b.get_parameters()))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert th.equal(tensor, theirs[name]), name
    for name, generator in a.generators().items():
        assert th.equal(generator.get_state(), b.generators()[name].get_state()), name
    assert (a.num_timesteps, a._n_updates) == (b.num_timesteps, b._n_updates)
    for group_a, group_b in zip(optimizer_groups(a), optimizer_groups(b), strict=True):
        assert group_a == group_b


def optimizer_groups(model: Any) -> list[Any]:
    """Settings of all optimisers, the learning rate among them."""
    return [params["param_groups"] for name, params in model.get_parameters().items() if name.endswith("optimizer")]


def process_state() -> tuple:
    """States of the process's own random generators."""
    return th.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


def in_new_process(code: str, folder: Path, **environment: str) -> str:
    """Run Python code in a new process, in ``folder``, with as many threads as here: other ones add in another order."""
    threads = {"OMP_NUM_THREADS": str(th.get_num_threads())}
    environ = {**os.environ, **threads, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]), **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=environ, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


RESUME = """
import warnings; warnings.simplefilter("error", ResourceWarning)
import random, numpy as np, torch as th
from algos import ALGOS
spec = next(s for s in ALGOS if s.name == "{name}")
model = spec.cls.load("half.zip", dataset="{dataset}", device="cpu")
model.learn({steps}, reset_num_timesteps=False)
model.save("resumed")
"""


# Exact resume ---------------------------------------------------------------------------------------------------------


SCHEDULES = {"constant": 1e-3, "linear": LinearSchedule(1e-3, 1e-4, 0.8), "cosine": CosineSchedule(1e-3)}


def test_offline_resume_in_a_new_process(
    spec: AlgoSpec, minari_ids: tuple[str, str], minari_folder: Path, tmp_path: Path
) -> None:
    def make() -> Any:
        return spec.make(dataset=minari_ids[0], learning_rate=1e-3, **spec.pretraining(4))

    whole = make().learn(14)
    half = make().learn(8)
    half.save(tmp_path / "half")
    code = RESUME.format(name=spec.name, dataset=BOX_ID, steps=6)
    in_new_process(code, tmp_path, MINARI_DATASETS_PATH=str(minari_folder))
    assert_equal_models(spec.cls.load(tmp_path / "resumed", device="cpu"), whole)
    # what it would have drawn next is the same as well
    observation = whole.observation_space.sample()
    resumed = spec.cls.load(tmp_path / "resumed", device="cpu")
    np.testing.assert_array_equal(whole.predict(observation)[0], resumed.predict(observation)[0])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("saved_at", [3, 9])
def test_offline_resume_of_a_run_that_a_callback_stopped(
    spec: AlgoSpec, schedule: str, saved_at: int, box_dataset: OfflineDataset, tmp_path: Path
) -> None:
    """The first run is ``learn(N + M)``, stopped after N; the second one goes on under the same schedule."""

    def make() -> Any:
        return spec.make(dataset=box_dataset, learning_rate=SCHEDULES[schedule], **spec.pretraining(5))

    whole = make().learn(14)
    half = make()
    half.learn(14, callback=lambda _locals, _globals: half.num_timesteps < saved_at)
    assert half.num_timesteps == saved_at
    half.save(tmp_path / "half")
    resumed = spec.cls.load(tmp_path / "half", dataset=box_dataset, device="cpu")
    resumed.learn(14 - saved_at, reset_num_timesteps=False)
    assert_equal_models(resumed, whole)


def test_a_checkpoint_resumes_exactly(variant: AlgoSpec, box_dataset: OfflineDataset, tmp_path: Path) -> None:
    whole = variant.make(dataset=box_dataset, **variant.pretraining(2))
    whole.learn(12, callback=CheckpointCallback(5, str(tmp_path)))
    resumed = variant.cls.load(tmp_path / "rl_model_5_steps", dataset=box_dataset, device="cpu")
    resumed.learn(7, reset_num_timesteps=False)
    assert_equal_models(resumed, whole)


def test_the_exact_resume_depends_on_the_generators(spec: AlgoSpec, box_dataset: OfflineDataset, tmp_path: Path) -> None:
    """The comparison can fail: another seed of the updates leads elsewhere."""
    whole = spec.make(dataset=box_dataset).learn(8)
    spec.make(dataset=box_dataset).learn(4).save(tmp_path / "half")
    resumed = spec.cls.load(tmp_path / "half", dataset=box_dataset, device="cpu")
    resumed.generator.manual_seed(1)
    resumed.learn(4, reset_num_timesteps=False)
    with pytest.raises(AssertionError):
        assert_equal_models(resumed, whole)


def test_saving_and_loading_leave_the_process_alone(spec: AlgoSpec, box_dataset: OfflineDataset, tmp_path: Path) -> None:
    """Neither is the process touched, nor does a save change what the saved model does next."""
    model = spec.make(dataset=box_dataset, seed=7).learn(4)
    undisturbed = spec.make(dataset=box_dataset, seed=7).learn(8)
    random.seed(99), np.random.seed(99), th.manual_seed(99)  # others than the model's
    before = process_state()
    model.save(tmp_path / "model")
    assert process_state() == before
    for kwargs in ({}, {"env": POINT_ENV}, {"dataset": box_dataset}):
        spec.cls.load(tmp_path / "model", **kwargs)
        assert process_state() == before, kwargs
    model.learn(4, reset_num_timesteps=False)
    assert_equal_models(model, undisturbed)


def test_fine_tuned_model(spec: AlgoSpec, box_dataset: OfflineDataset, tmp_path: Path) -> None:
    model = spec.make(POINT_ENV, dataset=box_dataset).learn(6)
    model.learn(30, offline=False, reset_num_timesteps=False)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    loaded = spec.cls.load(tmp_path / "model", env=POINT_ENV, dataset=box_dataset, device="cpu")
    assert_equal_models(loaded, model)
    loaded.load_replay_buffer(tmp_path / "buffer.pkl")
    assert loaded.replay_buffer.size() == model.replay_buffer.size() == 30
    # the updates that follow are the same, the env starts anew
    for going_on in (model, loaded):
        going_on._offline = False
        going_on.set_logger(configure(None, []))
        going_on.train(gradient_steps=3, batch_size=8)
    assert_equal_models(loaded, model)
    loaded.learn(15, offline=False, reset_num_timesteps=False)
    assert loaded.num_timesteps == 51 and loaded.replay_buffer.size() == 45


# What travels ---------------------------------------------------------------------------------------------------------


def test_parameters_counters_and_actions_travel(variant: AlgoSpec, box_dataset: OfflineDataset, tmp_path: Path) -> None:
    model = variant.make(dataset=box_dataset, gamma=0.9).learn(5)
    model.save(tmp_path / "model")
    loaded = variant.cls.load(tmp_path / "model")
    assert_equal_models(loaded, model)
    assert loaded.dataset is None and loaded.get_env() is None
    assert (loaded.gamma, loaded.batch_size, loaded.policy_kwargs) == (0.9, 8, model.policy_kwargs)
    assert loaded.observation_space == model.observation_space and loaded.action_space == model.action_space
    observations = box_dataset.observations[:5]
    for deterministic in (True, False):
        ours, theirs = (m.predict(observations, deterministic=deterministic)[0] for m in (model, loaded))
        np.testing.assert_array_equal(ours, theirs)
    loaded.set_env(POINT_ENV)
    loaded.learn(12)
    loaded.set_dataset(box_dataset)
    loaded.learn(2)


@pytest.mark.parametrize("where", ["str", "path", "bytes", "open file"])
def test_places_to_save_to(spec: AlgoSpec, where: str, tmp_path: Path) -> None:
    model = spec.make(POINT_ENV)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no file is left open
        if where in ("str", "path"):
            path = str(tmp_path / "a" / "model") if where == "str" else tmp_path / "a" / "model"
            model.save(path)
            assert (tmp_path / "a" / "model.zip").is_file()
            loaded = spec.cls.load(path)
        else:
            file = io.BytesIO() if where == "bytes" else open(tmp_path / "model.zip", "w+b")
            with file:
                model.save(file)
                file.seek(0)
                loaded = spec.cls.load(file)
                assert not file.closed
    assert_equal_models(loaded, model)


def test_no_pickle_in_any_file(spec: AlgoSpec, tmp_path: Path) -> None:
    model = spec.make(POINT_ENV).learn(12)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    model.policy.save(tmp_path / "policy.pkl")
    model.policy.actor.save(tmp_path / "actor.pkl")
    assert {path.name for path in tmp_path.iterdir()} == {"model.zip", "buffer.pkl", "policy.pkl", "actor.pkl"}
    for path in tmp_path.iterdir():
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                assert member.endswith((".json", ".safetensors")), (path, member)
                if member.endswith(".json"):
                    json.loads(archive.read(member))


def test_load_with_other_settings(spec: AlgoSpec, box_dataset: OfflineDataset, tmp_path: Path) -> None:
    spec.make(dataset=box_dataset, learning_rate=1e-3).learn(4).save(tmp_path / "model")
    model = spec.cls.load(tmp_path / "model", dataset=box_dataset, learning_rate=5e-4, batch_size=4, verbose=0)
    assert model.learning_rate == 5e-4 and model.batch_size == 4
    model.learn(2)
    assert model.policy.actor.optimizer.param_groups[0]["lr"] == 5e-4
    with pytest.raises(ValueError, match="policy_kwargs"):
        spec.cls.load(tmp_path / "model", policy_kwargs=dict(net_arch=[3]))


def test_load_warns_of_settings_that_there_are_not(spec: AlgoSpec, tmp_path: Path) -> None:
    spec.make(POINT_ENV).save(tmp_path / "model")
    meant = rf"{spec.cls.__name__} has no attribute `learning_rte` to change; `learning_rate` may be meant"
    with pytest.warns(UserWarning, match=meant) as caught:
        spec.cls.load(tmp_path / "model", learning_rte=1e-4)
    assert len(caught) == 1 and Path(caught[0].filename) == Path(__file__)
    with pytest.warns(UserWarning, match=r"no attribute `zzz` to change\.$"):
        spec.cls.load(tmp_path / "model", zzz=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what RL Zoo passes
        spec.cls.load(tmp_path / "model", env=POINT_ENV, seed=1, buffer_size=1, optimize_memory_usage=False)


def test_set_env_takes_an_id(spec: AlgoSpec, tmp_path: Path) -> None:
    spec.make(POINT_ENV).save(tmp_path / "model")
    model = spec.cls.load(tmp_path / "model")
    assert model.get_env() is None
    model.set_env(POINT_ENV)
    model.learn(12)
    assert spec.cls.load(tmp_path / "model", env=POINT_ENV).learn(12).num_timesteps == 12


def test_another_number_of_envs(spec: AlgoSpec, tmp_path: Path) -> None:
    spec.make(POINT_ENV).learn(15).save(tmp_path / "model")
    two = DummyVecEnv([lambda: gym.make(POINT_ENV)] * 2)
    model = spec.cls.load(tmp_path / "model", env=two)
    assert model.n_envs == model.replay_buffer.n_envs == 2
    assert model.learn(16).num_timesteps == 16


def test_include_and_exclude(spec: AlgoSpec, tmp_path: Path) -> None:
    model = spec.make(POINT_ENV, verbose=0)
    default = model.gamma
    model.note, model.verbose = "kept", 2
    model.save(tmp_path / "model", exclude=["gamma", "verbose"])
    loaded = spec.cls.load(tmp_path / "model", env=POINT_ENV)
    assert loaded.note == "kept" and loaded.gamma == default and loaded.verbose == 0
    model.gamma = 0.5
    model.save(tmp_path / "model", exclude=["gamma"], include=["gamma"])
    assert spec.cls.load(tmp_path / "model").gamma == 0.5


def test_vec_normalize_travels(spec: AlgoSpec, tmp_path: Path) -> None:
    env = VecNormalize(DummyVecEnv([lambda: gym.make(POINT_ENV)]), clip_obs=3.0, gamma=0.9)
    model = spec.make(env).learn(24)
    observation = env.reset()
    model.save(tmp_path / "model")
    for later in (False, True):
        if later:
            loaded = spec.cls.load(tmp_path / "model")
            loaded.set_env(POINT_ENV)
        else:
            loaded = spec.cls.load(tmp_path / "model", env=POINT_ENV)
        theirs = loaded.get_vec_normalize_env()
        assert theirs is not None and theirs is not env
        np.testing.assert_array_equal(theirs.obs_rms.mean, env.obs_rms.mean)
        np.testing.assert_array_equal(theirs.ret_rms.var, env.ret_rms.var)
        assert (theirs.clip_obs, theirs.gamma, theirs.obs_rms.count) == (3.0, 0.9, env.obs_rms.count)
        raw = env.get_original_obs()
        np.testing.assert_array_equal(theirs.normalize_obs(raw), env.normalize_obs(raw))
        np.testing.assert_array_equal(
            loaded.predict(observation, deterministic=True)[0], model.predict(observation, deterministic=True)[0]
        )
        loaded.learn(12, reset_num_timesteps=False)
    # saved again without an env, they are still there; the user's own statistics win
    spec.cls.load(tmp_path / "model").save(tmp_path / "again")
    assert spec.cls.load(tmp_path / "again", env=POINT_ENV).get_vec_normalize_env() is not None
    own = VecNormalize(DummyVecEnv([lambda: gym.make(POINT_ENV)]))
    own.reset()
    assert spec.cls.load(tmp_path / "again", env=own).get_vec_normalize_env().obs_rms.count < 2


def test_vec_normalize_travels_without_an_env(spec: AlgoSpec, box_dataset: OfflineDataset, tmp_path: Path) -> None:
    """The data, or nothing, in the place of the environment: training and evaluation are normalised as before."""

    def make() -> Any:
        env = VecNormalize(DummyVecEnv([lambda: gym.make(POINT_ENV)]))
        return spec.make(env, dataset=box_dataset, seed=3)

    whole, model = make().learn(8), make().learn(4)
    model.save(tmp_path / "model")
    env = model.get_vec_normalize_env()
    for kwargs in ({}, {"dataset": box_dataset}):
        loaded = spec.cls.load(tmp_path / "model", **kwargs)
        theirs = loaded.get_vec_normalize_env()
        np.testing.assert_array_equal(theirs.obs_rms.mean, env.obs_rms.mean)
        expected = evaluate(model, POINT_ENV, 2, seed=0).returns
        np.testing.assert_array_equal(evaluate(loaded, POINT_ENV, 2, seed=0).returns, expected)
    resumed = spec.cls.load(tmp_path / "model", dataset=box_dataset, device="cpu")
    resumed.learn(4, reset_num_timesteps=False)
    assert_equal_models(resumed, whole)


def test_action_noise_and_schedules_travel(spec: AlgoSpec, tmp_path: Path) -> None:
    noise = NormalActionNoise(np.zeros(2), 0.1 * np.ones(2))
    env = DummyVecEnv([lambda: gym.make(POINT_ENV)] * 2)
    model = spec.make(env, action_noise=noise, learning_rate=LinearSchedule(1e-3, 1e-4, 0.5), train_freq=(3, "step")).learn(24)
    assert isinstance(model.action_noise, VectorizedActionNoise)
    model.save(tmp_path / "model")
    loaded = spec.cls.load(tmp_path / "model", env=env)
    assert isinstance(loaded.action_noise, VectorizedActionNoise) and loaded.action_noise.n_envs == 2
    assert loaded.lr_schedule(0.75) == model.lr_schedule(0.75) == pytest.approx(5.5e-4)
    assert loaded.train_freq == model.train_freq
    loaded.learn(24)


def test_net_arch_none(spec: AlgoSpec, tmp_path: Path) -> None:
    spec.need("extractors")
    model = spec.cls("MlpPolicy", BanditEnv(), policy_kwargs=dict(net_arch=None), buffer_size=10, device="cpu")
    model.save(tmp_path / "model")
    loaded = spec.cls.load(tmp_path / "model")
    assert loaded.policy.net_arch is not None, "replaced by the default"
    assert_equal_models(loaded, model)


def test_policy_and_actor_files(variant: AlgoSpec, box_dataset: OfflineDataset, tmp_path: Path) -> None:
    model = variant.make(dataset=box_dataset).learn(3)
    model.policy.save(tmp_path / "policy.pkl")
    model.policy.actor.save(tmp_path / "actor.pkl")
    before = process_state()
    policy = type(model.policy).load(tmp_path / "policy.pkl", device="cpu")
    actor = type(model.policy.actor).load(tmp_path / "actor.pkl", device="cpu")
    assert len(before) == 3
    observations = box_dataset.observations[:4]
    for loaded, original in ((policy, model.policy), (actor, model.policy.actor)):
        assert dict(tensors(loaded.state_dict())).keys() == dict(tensors(original.state_dict())).keys()
        for name, tensor in tensors(loaded.state_dict()):
            assert th.equal(tensor, dict(tensors(original.state_dict()))[name])
        ours, theirs = (p.predict(observations, deterministic=True)[0] for p in (loaded, original))
        np.testing.assert_array_equal(ours, theirs)
        assert ours.shape == (4, 2)
    with pytest.raises(FileFormatError, match=r"load it with its own class|neither"):
        type(model.policy).load(tmp_path / "actor.pkl")


def test_set_parameters(spec: AlgoSpec, box_dataset: OfflineDataset, tmp_path: Path) -> None:
    model = spec.make(dataset=box_dataset).learn(4)
    model.save(tmp_path / "model")
    for source in (tmp_path / "model", str(tmp_path / "model.zip"), model.get_parameters()):
        other = spec.make(POINT_ENV, seed=7)
        other.set_parameters(source)
        for name, tensor in tensors(other.get_parameters()):
            assert th.equal(tensor, dict(tensors(model.get_parameters()))[name]), name
    with pytest.raises(ValueError, match="nonsense"):
        model.set_parameters({**model.get_parameters(), "nonsense": {}})
    with pytest.raises(ValueError, match="policy"):
        model.set_parameters({k: v for k, v in model.get_parameters().items() if k != "policy"})
    model.set_parameters({"policy": model.get_parameters()["policy"]}, exact_match=False)


def test_state_dict_holds_floats_only(variant: AlgoSpec, box_dataset: OfflineDataset) -> None:
    for name, tensor in variant.make(dataset=box_dataset).policy.state_dict().items():
        assert tensor.is_floating_point(), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(tau=50.0), "tau"),
        (dict(gamma=-1.0), "gamma"),
        (dict(offline_fraction=7.0), "offline_fraction"),
        (dict(batch_size=0), "batch_size"),
        (dict(buffer_size=-4), "buffer_size"),
        (dict(train_freq=0), "train_freq"),
        (dict(train_freq=(0, "step")), "train_freq"),
        (dict(tau=None), "tau"),
        (dict(num_timesteps="a"), "num_timesteps"),
        (dict(_n_updates="x"), "_n_updates"),
        (dict(ep_info_buffer=3), "ep_info_buffer"),
        (dict(action_noise=5), "action_noise"),
    ],
)
def test_settings_of_a_file_are_checked_as_arguments_are(
    spec: AlgoSpec, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = spec.make(POINT_ENV)
    model.save(tmp_path / "good")
    if next(iter(settings)) in inspect.signature(spec.cls.__init__).parameters and "action_noise" not in settings:
        with pytest.raises(ValueError, match=message):
            spec.cls.load(tmp_path / "good", **settings)
        with pytest.raises((ValueError, TypeError), match=message):
            spec.make(POINT_ENV, **settings)
    vars(model).update(settings)
    model.save(tmp_path / "bad")
    with pytest.raises(ValueError, match=message):
        spec.cls.load(tmp_path / "bad")


def test_parameters_that_do_not_fit_leave_the_model_as_it_was(spec: AlgoSpec) -> None:
    model, other = spec.make(POINT_ENV), spec.make("Pendulum-v1")
    before = deepcopy(model.get_parameters())
    for parameters in (other.get_parameters(), {**other.get_parameters(), "nonsense": {}}):
        with pytest.raises((RuntimeError, ValueError)):
            model.set_parameters(parameters)
        for name, tensor in tensors(before):
            assert th.equal(tensor, dict(tensors(model.get_parameters()))[name]), name


# Replay buffers -------------------------------------------------------------------------------------------------------


def test_replay_buffer_file(spec: AlgoSpec, tmp_path: Path) -> None:
    env = DummyVecEnv([lambda: gym.make(POINT_ENV)] * 2)
    model = spec.make(env, buffer_size=30).learn(40)  # it has gone round
    path = tmp_path / "rl_model_replay_buffer_40_steps.pkl"
    model.save_replay_buffer(path)
    assert path.is_file() and len(list(tmp_path.iterdir())) == 1, "exactly the path given"
    other = spec.make(env, buffer_size=30)
    other.load_replay_buffer(path)
    ours, theirs = model.replay_buffer, other.replay_buffer
    for name in ("observations", "next_observations", "actions", "rewards", "dones", "timeouts"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    assert (ours.pos, ours.full, ours.size()) == (theirs.pos, theirs.full, theirs.size())
    assert theirs.generator is other.generator, "batches come from the model's own generator"
    other.learn(20, reset_num_timesteps=False)
    with pytest.raises(ValueError, match="environment"):
        spec.make(POINT_ENV).load_replay_buffer(path)
    with pytest.raises(ValueError, match="replay buffer must hold"):
        spec.make(BanditEnv()).load_replay_buffer(path)
    with pytest.raises(FileFormatError):
        spec.cls.load(path)


@pytest.mark.parametrize("truncate", [True, False])
def test_her_replay_buffer_file(spec: AlgoSpec, truncate: bool, tmp_path: Path) -> None:
    spec.need("her")
    kwargs: dict[str, Any] = dict(
        replay_buffer_class=HerReplayBuffer, replay_buffer_kwargs=dict(n_sampled_goal=2), learning_starts=30
    )
    model = spec.make(gym.make(POINT_GOAL_ENV), **kwargs).learn(41)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    loaded = spec.cls.load(tmp_path / "model", env=POINT_GOAL_ENV, device="cpu")
    assert isinstance(loaded.replay_buffer, HerReplayBuffer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the last trajectory is cut
        loaded.load_replay_buffer(tmp_path / "buffer.pkl", truncate_last_traj=truncate)
    np.testing.assert_array_equal(
        loaded.replay_buffer.observations["observation"], model.replay_buffer.observations["observation"]
    )
    assert loaded.replay_buffer.env is loaded.env
    loaded.learn(30, reset_num_timesteps=False)
    with pytest.raises(ValueError, match="pass `env`"):
        spec.cls.load(tmp_path / "model")


# What cannot be written by its import path ----------------------------------------------------------------------------


def test_a_lambda_is_asked_for(spec: AlgoSpec, box_dataset: OfflineDataset, tmp_path: Path) -> None:
    model = spec.make(dataset=box_dataset, learning_rate=lambda progress: 1e-3 * progress).learn(3)
    with pytest.warns(UserWarning, match="learning_rate") as caught:
        model.save(tmp_path / "model")
    assert len(caught) == 1 and Path(caught[0].filename) == Path(__file__), "it points to the call of save"
    with pytest.raises(MissingObjectError, match=r"custom_objects=\{'learning_rate': \.\.\.\}\."):
        spec.cls.load(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = spec.cls.load(tmp_path / "model", custom_objects={"learning_rate": lambda progress: 2e-3 * progress})
    assert loaded.lr_schedule(0.5) == 1e-3
    assert type(loaded.lr_schedule(1.0)) is float


def test_a_local_features_extractor_is_asked_for(spec: AlgoSpec, tmp_path: Path) -> None:
    spec.need("extractors")

    class Doubling(BaseFeaturesExtractor):
        def __init__(self, observation_space: spaces.Space) -> None:
            super().__init__(observation_space, 4)

        def forward(self, observations: th.Tensor) -> th.Tensor:
            return 2.0 * observations

    model = spec.make(POINT_ENV, policy_kwargs=dict(features_extractor_class=Doubling))
    with pytest.warns(UserWarning, match="Doubling"):
        model.save(tmp_path / "model")
    with pytest.raises(MissingObjectError, match="Doubling"):
        spec.cls.load(tmp_path / "model")
    loaded = spec.cls.load(tmp_path / "model", custom_objects={"features_extractor_class": Doubling})
    observation = np.full(4, 0.5, np.float32)
    np.testing.assert_array_equal(
        loaded.predict(observation, deterministic=True)[0], model.predict(observation, deterministic=True)[0]
    )
    with pytest.raises((ValueError, TypeError)):
        spec.cls.load(tmp_path / "model", custom_objects={"features_extractor_class": dict})


def test_custom_objects_replace_attributes(spec: AlgoSpec, tmp_path: Path) -> None:
    spec.make(POINT_ENV).save(tmp_path / "model")
    loaded = spec.cls.load(tmp_path / "model", custom_objects=dict(learning_rate=2e-5, dummy=1.0))
    assert loaded.learning_rate == 2e-5 and not hasattr(loaded, "dummy")


# What is refused ------------------------------------------------------------------------------------------------------


def rewrite(path: Path, target: Path, **changes: Any) -> None:
    """Copy a model's file with other entries in its configuration."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as copy:
        for member in source.namelist():
            content = source.read(member)
            if member == "config.json":
                content = json.dumps({**json.loads(content), **changes}).encode()
            copy.writestr(member, content)


def test_newer_schema_and_wrong_class_are_refused(spec: AlgoSpec, tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    spec.make(POINT_ENV).save(path)
    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read("config.json"))
    rewrite(path, tmp_path / "newer.zip", schema_version=config["schema_version"] + 1)
    with pytest.raises(FileFormatError, match="newer"):
        spec.cls.load(tmp_path / "newer.zip")

    class Other(spec.cls):  # type: ignore[name-defined,misc]
        pass

    other = type("Stranger", spec.cls.__bases__, {})
    with pytest.raises(FileFormatError, match=spec.cls.__name__):
        other.load(path)
    assert isinstance(Other.load(path), Other), "a subclass may take over its base's models"


def test_wrong_spaces_are_refused(spec: AlgoSpec, tmp_path: Path, goal_dataset: OfflineDataset) -> None:
    spec.make(POINT_ENV).save(tmp_path / "model")
    named = r"spaces do not match: the model has Box\(.*, \({}.* the {} {}\(.*model's spaces"
    with pytest.raises(ValueError, match="Observation " + named.format(4, "environment", "Box")):
        spec.cls.load(tmp_path / "model", env=BanditEnv())
    env = RandomEnv(gym.make(POINT_ENV).observation_space, spaces.Box(-1.0, 1.0, (3,), np.float32))
    with pytest.raises(ValueError, match="Action " + named.format(2, "environment", "Box")):
        spec.cls.load(tmp_path / "model", env=env)
    with pytest.raises(ValueError, match="Observation " + named.format(4, "dataset", "Dict")):
        spec.cls.load(tmp_path / "model", dataset=goal_dataset)
    model = spec.cls.load(tmp_path / "model")
    with pytest.raises(ValueError, match="Observation " + named.format(4, "environment", "Box")):
        model.set_env(BanditEnv())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_files_are_refused(spec: AlgoSpec, share: float, tmp_path: Path) -> None:
    spec.make(POINT_ENV).save(tmp_path / "model.zip")
    content = (tmp_path / "model.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(content[: int(share * len(content))])
    with pytest.raises(FileFormatError):
        spec.cls.load(tmp_path / "cut.zip")


def test_foreign_and_hostile_files_are_refused(spec: AlgoSpec, tmp_path: Path) -> None:
    """A file of SB3 holds pickles; nothing in it runs."""

    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "exploded",))

    sb3 = SAC("MlpPolicy", POINT_ENV, buffer_size=10, policy_kwargs=dict(net_arch=[4]), device="cpu")
    sb3.bomb = Bomb()  # type: ignore[attr-defined]
    sb3.save(tmp_path / "sac.zip")
    with pytest.raises(FileFormatError, match="(?i)stable.baselines|SB3|pickle"):
        spec.cls.load(tmp_path / "sac.zip")
    model = spec.make(POINT_ENV)
    with pytest.raises(FileFormatError):
        model.set_parameters(tmp_path / "sac.zip")
    th.save({"bomb": Bomb()}, tmp_path / "policy.pkl")
    with pytest.raises(FileFormatError):
        type(model.policy).load(tmp_path / "policy.pkl")
    sb3.save_replay_buffer(tmp_path / "sac.pkl")
    with pytest.raises(FileFormatError):
        model.load_replay_buffer(tmp_path / "sac.pkl")
    model.save(tmp_path / "model.zip")
    for slot, path in (("policy_class", "os:system"), ("policy_class", "subprocess:Popen"), ("policy_class", "builtins:dict")):
        with zipfile.ZipFile(tmp_path / "model.zip") as archive:
            config = json.loads(archive.read("config.json"))["config"]
        entry = config["data"][slot]
        assert "sb3_diffusion" in json.dumps(entry), entry
        known = next(part for part in json.dumps(entry).split('"') if part.startswith("sb3_diffusion"))
        data = {**config["data"], slot: json.loads(json.dumps(entry).replace(known, path))}
        rewrite(tmp_path / "model.zip", tmp_path / "hostile.zip", config={**config, "data": data})
        with pytest.raises(FileFormatError, match="refused|no subclass"):
            spec.cls.load(tmp_path / "hostile.zip")
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(FileNotFoundError):
        spec.cls.load(tmp_path / "nothing")


def test_a_disk_error_leaves_the_old_file_whole(spec: AlgoSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = spec.make(POINT_ENV)
    model.save(tmp_path / "model")
    content, gamma = (tmp_path / "model.zip").read_bytes(), model.gamma
    model.gamma = 0.5

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        model.save(tmp_path / "model")
    monkeypatch.undo()
    assert (tmp_path / "model.zip").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["model.zip"], "and no litter"
    assert spec.cls.load(tmp_path / "model").gamma == gamma


def test_every_algorithm_is_in_the_registry() -> None:
    from sb3_diffusion import ALGORITHMS

    assert set(ALGORITHMS.values()) == {spec.cls for spec in ALGOS}


# Files whose values do not make what they say ----------------------------------------------------------------------------


def change_file(path: Path, kind: str, change: Callable[[dict[str, Any]], object]) -> None:
    archive = read_archive(path, kind)
    change(archive.config)
    write_archive(path, kind, archive.config, archive.tensors)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["data"].pop("policy_class"),
        lambda config: config["data"].pop("action_space"),
        lambda config: config["data"].update(learning_rate=[1]),
        lambda config: config["data"].update(policy_kwargs={"net_arch": {"pi": "wide"}}),
        lambda config: config.update(parameters={"policy": 3}),
        lambda config: config.update(parameters="model.zip"),
        lambda config: config["data"].update(observation_space="wide"),
        lambda config: config["data"].update(predict=1),
        lambda config: config.update(generators={"generator": 1}),
        lambda config: config.update(vec_normalize="on"),
        lambda config: config["vec_normalize"].pop("norm_obs"),
        lambda config: config["vec_normalize"].update(venv=1),
        lambda config: config["vec_normalize"].update(obs_rms=5),
        lambda config: config["vec_normalize"].update(clip_obs="x"),
        lambda config: config["vec_normalize"].update(ret_rms=None),
    ],
)
@pytest.mark.parametrize("env", [None, "Pendulum-v1"])
def test_a_file_that_makes_no_model(
    change: Callable[[dict[str, Any]], object], env: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among them one that names another file, itself, in the place of its parameters."""
    normalized = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]))
    model = DTQL("MlpPolicy", normalized, policy_kwargs=dict(net_arch=[8]), buffer_size=10, device="cpu")
    monkeypatch.chdir(tmp_path)
    model.save("model.zip")
    change_file(tmp_path / "model.zip", "model", change)
    with pytest.raises(FileFormatError):
        DTQL.load("model.zip", env=env)


class BreakingEnv(gym.Wrapper):
    """Its third episode breaks off."""

    n_steps = 0

    def step(self, action: Any) -> Any:
        self.n_steps += 1
        if self.n_steps == 25:
            raise OSError("the motor does not answer")
        return self.env.step(action)


def test_a_broken_environment_leaves_a_model_that_can_be_saved(spec: AlgoSpec, tmp_path: Path) -> None:
    env = BreakingEnv(gym.make(POINT_ENV))
    model = spec.make(env, gradient_steps=1)
    with pytest.raises(OSError, match="motor"):
        model.learn(40)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = spec.cls.load(tmp_path / "model", env=POINT_ENV, device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert loaded.replay_buffer.size() == 24
    assert_equal_models(loaded, model)
    loaded.learn(5, reset_num_timesteps=False)
    n_before = model.replay_buffer.size()
    model.learn(12, reset_num_timesteps=False)  # the same environment, mended: a new episode begins
    buffer = model.replay_buffer
    assert not np.allclose(buffer.next_observations[n_before - 1], buffer.observations[n_before])


@pytest.mark.parametrize("offline", [True, False])
def test_a_broken_callback_leaves_a_model_that_can_be_saved(
    spec: AlgoSpec, offline: bool, box_dataset: OfflineDataset, tmp_path: Path
) -> None:
    def break_off(variables: dict[str, Any], _: Any) -> bool:
        if variables["self"].num_timesteps >= 14:
            raise KeyError("no such plot")
        return True

    model = spec.make(POINT_ENV, dataset=box_dataset if offline else None)
    with pytest.raises(KeyError, match="plot"):
        model.learn(20, callback=break_off)
    model.save(tmp_path / "model")
    loaded = spec.cls.load(tmp_path / "model", env=POINT_ENV, dataset=box_dataset if offline else None, device="cpu")
    assert_equal_models(loaded, model)
    model.learn(4, reset_num_timesteps=False)
    assert loaded.learn(4, reset_num_timesteps=False).num_timesteps == 18


def test_a_replay_file_of_another_kind_of_buffer(tmp_path: Path) -> None:
    """A file's own class decides; it has to be the model's."""
    small = dict(policy_kwargs=dict(net_arch=[8]), buffer_size=10, device="cpu")
    model = DTQL("MlpPolicy", "Pendulum-v1", **small)
    DTQL("MlpPolicy", "Pendulum-v1", replay_buffer_class=ReplayBuffer, **small).save_replay_buffer(tmp_path / "sb3.zip")
    with pytest.raises(ValueError, match="must be a EpisodeReplayBuffer.*holds a ReplayBuffer"):
        model.load_replay_buffer(tmp_path / "sb3.zip")
    model.save_replay_buffer(tmp_path / "buffer.zip")
    change_file(tmp_path / "buffer.zip", "replay_buffer", lambda c: c.update(replay_buffer_class={"$class": "os:system"}))
    with pytest.raises(FileFormatError, match="os:system"):
        model.load_replay_buffer(tmp_path / "buffer.zip")


@pytest.mark.parametrize(
    ("name", "now"),
    [
        ("DTQL", dict(gamma=0.5, n_steps=3)),
        ("BellmanDiffusion", dict(gamma=0.5, n_steps=2)),
        ("BellmanDiffusion", dict(gamma=0.5, horizon=4)),
        ("Diffuser", dict(gamma=0.5, horizon=8, padding="zeros", termination_penalty=-3.0)),
    ],
)
@pytest.mark.parametrize("without_buffer", [False, True])
def test_what_is_drawn_from_a_replay_file_is_as_the_model_has_it(
    without_buffer: bool, name: str, now: dict[str, Any], tmp_path: Path
) -> None:
    """The stored steps come from the file, and all else is as if this model had collected them."""
    spec = next(spec for spec in ALGOS if spec.name == name)
    kwargs: dict[str, Any] = dict(buffer_size=50, learning_starts=100)  # all actions are random ones, from the seed
    spec.make(POINT_ENV, **kwargs).learn(70).save_replay_buffer(tmp_path / "steps.zip")
    expected = spec.make(POINT_ENV, **kwargs, **now).learn(70)
    other = spec.make(POINT_ENV, **kwargs, **now)
    if without_buffer:  # as SB3's users do before they load
        del other.replay_buffer
    other.load_replay_buffer(tmp_path / "steps.zip")
    for name in expected.replay_buffer.sampling_options:
        assert getattr(other.replay_buffer, name) == getattr(expected.replay_buffer, name), name
    for model in (other, expected):
        model.generator.manual_seed(1)
    batches = other.sample_batch(32), expected.sample_batch(32)
    for field, ours, theirs in zip(batches[0]._fields, *batches, strict=True):
        assert (ours is None and theirs is None) or th.equal(ours, theirs), field


def test_action_noise_has_to_be_given_back_as_an_object(tmp_path: Path) -> None:
    class OwnNoise(NormalActionNoise):
        pass

    noise = OwnNoise(np.zeros(1), np.ones(1))
    model = DTQL(
        "MlpPolicy", "Pendulum-v1", policy_kwargs=dict(net_arch=[8]), buffer_size=10, action_noise=noise, device="cpu"
    )
    with pytest.warns(UserWarning, match="OwnNoise"):
        model.save(tmp_path / "model")
    with pytest.raises(MissingObjectError, match=r"'action_noise': OwnNoise\(\.\.\.\)"):
        DTQL.load(tmp_path / "model")
    for wrong in (OwnNoise, 5):
        with pytest.raises(TypeError, match="must be an ActionNoise object"):
            DTQL.load(tmp_path / "model", custom_objects={"action_noise": wrong})
    assert DTQL.load(tmp_path / "model", custom_objects={"action_noise": noise}).action_noise is noise


def test_bare_arrays_take_their_spaces_from_the_file(spec: AlgoSpec, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = dict(
        observations=rng.normal(size=(60, 3)).astype(np.float32),
        actions=rng.uniform(-2.0, 2.0, (60, 1)).astype(np.float32),
        rewards=np.zeros(60, np.float32),
        terminals=np.arange(60) % 20 == 19,
    )
    spec.make("Pendulum-v1").save(tmp_path / "model")
    loaded = spec.cls.load(tmp_path / "model", env=gym.make("Pendulum-v1", max_episode_steps=10), dataset=rows, device="cpu")
    assert set(loaded.dataset.episode_lengths) == {9, 10}  # cut by the time limit of the environment, or terminated
    loaded = spec.cls.load(tmp_path / "model", dataset=rows, device="cpu")
    assert loaded.dataset.action_space == spaces.Box(-2.0, 2.0, (1,))
    loaded.learn(1)


@pytest.mark.parametrize(
    ("n_first", "rollouts"),
    [
        (4, {}),
        (8, {}),
        (20, {}),
        (18, dict(train_freq=4, gradient_steps=2)),
        (19, dict(train_freq=4, gradient_steps=-1)),
        (17, dict(train_freq=(2, "episode"), gradient_steps=-1)),
    ],
)
def test_exact_resume_online_of_a_run_that_a_callback_stopped(
    spec: AlgoSpec, n_first: int, rollouts: dict[str, Any], tmp_path: Path
) -> None:
    """
    While actions are random still, and after; the step at which the callback stops is learned from, and a rollout that it
    stops is collected to its end.
    """

    def make() -> Any:
        return spec.make(DummyVecEnv([lambda: gym.make(POINT_ENV)]), seed=5, **rollouts)

    whole = make().learn(30)
    stopped = make()
    stopped.learn(30, callback=lambda local, _: stopped.num_timesteps < n_first)
    assert stopped.num_timesteps == stopped.replay_buffer.size() == n_first
    stopped.save(tmp_path / "model")
    stopped.save_replay_buffer(tmp_path / "buffer")
    resumed = spec.cls.load(tmp_path / "model", env=stopped.get_env(), force_reset=False, device="cpu")
    resumed.load_replay_buffer(tmp_path / "buffer")
    resumed.learn(30 - n_first, reset_num_timesteps=False)
    assert resumed.num_timesteps == whole.num_timesteps >= 30
    np.testing.assert_array_equal(resumed.replay_buffer.actions[:30], whole.replay_buffer.actions[:30])
    assert_equal_models(resumed, whole)


def test_a_replay_file_that_makes_no_buffer(tmp_path: Path) -> None:
    model = DTQL("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(net_arch=[8]), buffer_size=10, device="cpu")
    model.save_replay_buffer(tmp_path / "buffer.zip")
    change_file(tmp_path / "buffer.zip", "replay_buffer", lambda config: config["values"].update(action_space={"a": 1}))
    with pytest.raises(FileFormatError, match="does not fit"):
        model.load_replay_buffer(tmp_path / "buffer.zip")


LOADS_AND_LISTS_IMPORTS = """
import json, re, sys, zipfile
import sb3_diffusion
from sb3_diffusion.common.serialization import FileFormatError

path, hostile, name = sys.argv[1:]
imported = []
sys.addaudithook(lambda event, args: imported.append(args[0]) if event == "import" else None)
getattr(sb3_diffusion, name).load(path, device="cpu")
with zipfile.ZipFile(path) as archive:
    members = {member: archive.read(member) for member in archive.namelist()}
config = members["config.json"].decode()
refused = 0
for known in sorted(set(re.findall(r'"([a-z0-9_.]+:[A-Za-z_.]+)"', config))):
    with zipfile.ZipFile(hostile, "w") as archive:
        for member, content in members.items():
            changed = config.replace(json.dumps(known), json.dumps("wsgiref.validate:validator"))
            archive.writestr(member, changed if member == "config.json" else content)
    try:
        getattr(sb3_diffusion, name).load(hostile, device="cpu")
    except FileFormatError:
        refused += 1
print(json.dumps({"imported": imported, "refused": refused, "hostile": "wsgiref" in sys.modules}))
"""


def test_loading_imports_nothing_outside_of_the_allow_list(spec: AlgoSpec, tmp_path: Path) -> None:
    """Neither from a good file nor from one in which any of its class paths has become that of another module."""
    spec.make(POINT_ENV).save(tmp_path / "model.zip")
    script = [sys.executable, "-c", LOADS_AND_LISTS_IMPORTS]
    arguments = [str(tmp_path / "model.zip"), str(tmp_path / "hostile.zip"), spec.cls.__name__]
    printed = subprocess.run([*script, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout
    found = json.loads(printed.splitlines()[-1])
    allowed = {"sb3_diffusion", "stable_baselines3", "torch", "numpy", "gymnasium", "safetensors", *sys.stdlib_module_names}
    assert {name.split(".")[0] for name in found["imported"]} <= allowed
    assert not any(name.startswith("wsgiref") for name in found["imported"]) and not found["hostile"]
    assert found["refused"] >= 2
