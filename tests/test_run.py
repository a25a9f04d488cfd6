"""Learning in all its forms: offline, online, fine-tuning; envs, policies, spaces, callbacks, logs."""

import inspect
import os
import warnings
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from algos import ALGOS, AlgoSpec
from conftest import image_env
from envs import EPISODE_LENGTH, POINT_ENV, POINT_GOAL_ENV, CountingWrapper, PointGoalEnv, RandomEnv
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv, IdentityEnvBox
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import KVWriter, Logger, configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
    is_vecenv_wrapped,
)
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_diffusion import DTQL, FutureStateReplayBuffer, OfflineDataset, TrajectoryReplayBuffer, load_dataset, make_env
from sb3_diffusion.datasets import SpacesEnv
from sb3_diffusion.evaluation import evaluate


def parameters(model: Any) -> list[th.Tensor]:
    return [tensor.clone() for tensor in model.policy.state_dict().values()]


def changed(model: Any, before: list[th.Tensor]) -> bool:
    return any(not th.equal(a, b) for a, b in zip(before, parameters(model), strict=True))


class Recorder(KVWriter):
    """Keeps what was logged: a list of (step, values)."""

    def __init__(self) -> None:
        self.dumps: list[tuple[int, dict[str, Any]]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
        self.dumps.append((step, dict(key_values)))

    def close(self) -> None:
        pass


def recorded(model: Any) -> list[tuple[int, dict[str, Any]]]:
    """Make the model log into the list that is returned."""
    recorder = Recorder()
    model.set_logger(Logger(None, [recorder]))
    return recorder.dumps


def count_draws(model: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Count what each of the two buffers is asked for."""
    draws: dict[str, list[int]] = {"dataset": [], "replay": []}
    for name, buffer in (("dataset", model.dataset_buffer), ("replay", model.replay_buffer)):

        def sample(batch_size: int, *args: Any, _name: str = name, _sample: Callable = buffer.sample, **kwargs: Any) -> Any:
            draws[_name].append(batch_size)
            return _sample(batch_size, *args, **kwargs)

        monkeypatch.setattr(buffer, "sample", sample)
    return draws


# The three ways to learn ----------------------------------------------------------------------------------------------


def test_offline(variant: AlgoSpec, box_dataset: OfflineDataset) -> None:
    model = variant.make(dataset=box_dataset)
    before = parameters(model)
    assert model.learn(5) is model
    assert model.num_timesteps == model._n_updates == 5
    assert changed(model, before) and all(th.isfinite(tensor).all() for tensor in parameters(model))
    model.learn(3)
    assert (model.num_timesteps, model._n_updates) == (3, 8)
    model.learn(3, reset_num_timesteps=False)
    assert (model.num_timesteps, model._n_updates) == (6, 11)


def test_online(variant: AlgoSpec) -> None:
    model = variant.make(POINT_ENV)
    before = parameters(model)
    model.learn(10)
    assert model._n_updates == 0 and not changed(model, before), "learning_starts"
    model.learn(20, reset_num_timesteps=False)
    assert (model.num_timesteps, model._n_updates) == (30, 20)
    assert model.replay_buffer.size() == 30 and changed(model, before)


def test_fine_tuning(variant: AlgoSpec, box_dataset: OfflineDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    model = variant.make(POINT_ENV, dataset=box_dataset, offline_fraction=0.25).learn(4)
    draws = count_draws(model, monkeypatch)
    before = parameters(model)
    model.learn(10, offline=False, reset_num_timesteps=False)
    assert model._n_updates == 4 and not changed(model, before), "learning_starts counts from the beginning of the phase"
    assert model.replay_buffer.size() == 10
    model.learn(20, offline=False, reset_num_timesteps=False)
    assert (model.num_timesteps, model._n_updates) == (34, 24), "and the phase goes on"
    assert draws == {"dataset": [2] * 20, "replay": [6] * 20}
    model.learn(2, reset_num_timesteps=False)
    assert draws["dataset"][20:] == [8, 8], "offline again"
    model.learn(12, offline=False, reset_num_timesteps=False)
    assert model._n_updates == 24 + 2 + 2, "a new online phase has its own learning_starts"


@pytest.mark.parametrize(("fraction", "n_offline"), [(0.0, 0), (1.0, 8)])
def test_fine_tuning_at_the_ends(
    spec: AlgoSpec, fraction: float, n_offline: int, box_dataset: OfflineDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = spec.make(POINT_ENV, dataset=box_dataset, offline_fraction=fraction)
    draws = count_draws(model, monkeypatch)
    model.learn(15, offline=False)
    assert sum(draws["dataset"]) == 5 * n_offline and sum(draws["replay"]) == 5 * (8 - n_offline)


def test_fine_tuning_from_a_buffer_of_another_class(spec: AlgoSpec, box_dataset: OfflineDataset) -> None:
    """Of states further on, which these methods do not look at; and of SB3's n-step returns, beside logged single steps."""
    spec.need("n_steps")
    model = spec.make(POINT_ENV, dataset=box_dataset, replay_buffer_class=FutureStateReplayBuffer).learn(30, offline=False)
    assert model._n_updates > 0 and len(model.sample_batch(8).rewards) == 8

    settings = dict(replay_buffer_class=NStepReplayBuffer, replay_buffer_kwargs=dict(n_steps=3, gamma=0.9), gamma=0.9)
    model = spec.make(POINT_ENV, dataset=box_dataset, **settings).learn(30, offline=False)
    discounts = th.stack([model.sample_batch(30).discounts[:, 0] for _ in range(10)])
    assert discounts[:, :15].numpy() == pytest.approx(0.9), "logged steps are single ones"
    np.testing.assert_allclose(discounts[:, 15:].unique().numpy(), [0.729, 0.81, 0.9], rtol=1e-5)


def test_a_buffer_of_windows_is_refused_by_what_learns_from_transitions(spec: AlgoSpec) -> None:
    spec.need("n_steps")
    with pytest.raises(ValueError, match=f"{spec.cls.__name__} learns from transitions.*TrajectoryReplayBuffer"):
        spec.make(POINT_ENV, replay_buffer_class=TrajectoryReplayBuffer, replay_buffer_kwargs=dict(horizon=4))


def test_batches_come_from_the_dataset_until_the_buffer_holds_one(
    spec: AlgoSpec, box_dataset: OfflineDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = spec.make(POINT_ENV, dataset=box_dataset, learning_starts=0)
    draws = count_draws(model, monkeypatch)
    model.learn(12, offline=False)
    assert draws == {"dataset": [8] * 7 + [4] * 5, "replay": [4] * 5}


def test_a_trained_model_acts_while_the_phase_waits(
    spec: AlgoSpec, box_dataset: OfflineDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before ``learning_starts`` an untrained model draws random actions, a trained one acts with its policy."""
    for n_offline in (0, 3):
        model = spec.make(POINT_ENV, dataset=box_dataset, learning_starts=100)
        if n_offline:
            model.learn(n_offline)
        calls = []
        predict = model.predict
        monkeypatch.setattr(model, "predict", lambda *a, _p=predict, _c=calls, **k: (_c.append(1), _p(*a, **k))[1])
        model.learn(9, offline=False, reset_num_timesteps=False)
        assert len(calls) == (9 if n_offline else 0)


def test_a_schedule_that_ended_before_the_online_phase(spec: AlgoSpec, box_dataset: OfflineDataset) -> None:
    """Counting on, it stays at 0, and says so; the count that begins anew takes the schedule with it."""
    schedule = LinearSchedule(1e-3, 0.0, end_fraction=0.25)
    model = spec.make(POINT_ENV, dataset=box_dataset, learning_starts=0, learning_rate=schedule).learn(6)
    with pytest.warns(UserWarning, match="come to 0"):
        model.learn(6, offline=False, reset_num_timesteps=False)
    assert model.policy.actor.optimizer.param_groups[0]["lr"] == 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(4, offline=False)
    assert model.num_timesteps == 4


def test_going_on_offline_where_the_schedule_has_ended(spec: AlgoSpec, box_dataset: OfflineDataset, tmp_path: Path) -> None:
    """It says so, unless it finishes a call that was broken off."""
    schedule = LinearSchedule(1e-3, 0.0, end_fraction=0.25)
    model = spec.make(dataset=box_dataset, learning_rate=schedule).learn(4)
    with pytest.warns(UserWarning, match="come to 0"):
        model.learn(4, reset_num_timesteps=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(8, callback=lambda variables, _: variables["self"].num_timesteps < 4)
        model.learn(4, reset_num_timesteps=False)
    assert model.num_timesteps == 8


def test_the_environment_is_left_alone_offline(spec: AlgoSpec, box_dataset: OfflineDataset) -> None:
    env = CountingWrapper(gym.make(POINT_ENV))
    model = spec.make(env, dataset=box_dataset)
    model.learn(6, callback=lambda _locals, _globals: True, log_interval=1)
    assert (env.n_resets, env.n_steps) == (0, 0)
    model.learn(6, offline=False)
    assert (env.n_resets, env.n_steps) == (1, 6)


def test_nothing_to_learn_from(spec: AlgoSpec, box_dataset: OfflineDataset) -> None:
    with pytest.raises(ValueError, match="set_dataset"):
        spec.make(POINT_ENV).learn(5, offline=True)
    model = spec.make(dataset=box_dataset)
    model.env = None
    model.set_dataset(None)
    with pytest.raises(ValueError, match="neither a dataset nor an environment"):
        model.learn(5)
    with pytest.raises(ValueError):
        spec.make(policy="MlpPolicy")


def test_default_length(spec: AlgoSpec, box_dataset: OfflineDataset) -> None:
    assert spec.cls.default_total_timesteps > 1_000
    model = spec.make(dataset=box_dataset)
    model.default_total_timesteps = 3
    assert model.learn().num_timesteps == 3


def test_pretraining_counts_as_timesteps(variant: AlgoSpec, box_dataset: OfflineDataset) -> None:
    variant.need("pretraining")
    assert variant.make(dataset=box_dataset).n_pretrain_steps == 0, "no hidden phase by default"
    model = variant.make(POINT_ENV, dataset=box_dataset, n_pretrain_steps=5)
    assert model.pretraining
    model.learn(3)
    assert model.pretraining and model.num_timesteps == 3
    model.learn(4, reset_num_timesteps=False)
    assert not model.pretraining and (model.num_timesteps, model._n_updates) == (7, 7)
    model = variant.make(POINT_ENV, dataset=box_dataset, n_pretrain_steps=5)
    model.learn(12, offline=False)
    assert not model.pretraining, "online there is none"


@pytest.mark.parametrize("transform", ["normalize", "iql_locomotion", "iql_antmaze", "cql_antmaze", "antmaze"])
def test_reward_transforms(spec: AlgoSpec, transform: str, box_dataset: OfflineDataset) -> None:
    spec.need("reward_transform")
    model = spec.make(dataset=box_dataset, reward_transform=transform)
    rewards = model.sample_batch(2_000).rewards.numpy()
    raw = box_dataset.rewards
    scale, shift = {
        "normalize": (1 / raw.std(), -raw.mean() / raw.std()),
        "iql_locomotion": (1000 / np.ptp(box_dataset.episode_returns), 0.0),
        "iql_antmaze": (1.0, -1.0),
        "cql_antmaze": (4.0, -2.0),
        "antmaze": (2.0, -0.5),
    }[transform]
    np.testing.assert_allclose(np.unique(rewards), np.unique(raw * scale + shift), rtol=1e-5, atol=1e-5)
    model.learn(2)


def test_arguments_that_the_policy_does_not_take(spec: AlgoSpec) -> None:
    with pytest.raises(TypeError, match=r"`policy_kwargs` must be arguments of \w+, .*optimizer_class.*: got no_such_layer"):
        spec.make(POINT_ENV, policy_kwargs=dict(no_such_layer=3))
    with pytest.raises(TypeError, match=r"arguments of \w+, .*optimizer_class.*: got no_such_layer"):
        spec.make(POINT_GOAL_ENV, policy="MultiInputPolicy", policy_kwargs=dict(no_such_layer=3))

    class OwnPolicy(spec.cls.policy_aliases["MlpPolicy"]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.own = kwargs.pop("own")
            super().__init__(*args, **kwargs)

    assert spec.make(POINT_ENV, policy=OwnPolicy, policy_kwargs=dict(own=3)).policy.own == 3


def test_rewards_are_not_changed_twice(box_dataset: OfflineDataset) -> None:
    small = dict(dataset=box_dataset, normalize_observations=False, policy_kwargs=dict(net_arch=[8]), device="cpu")
    with pytest.raises(ValueError, match=r'reward_transform="normalize".*norm_reward=False'):
        DTQL("MlpPolicy", VecNormalize(make_vec_env(POINT_ENV)), reward_transform="normalize", **small)
    model = DTQL("MlpPolicy", make_vec_env(POINT_ENV), reward_transform="normalize", **small)
    with pytest.raises(ValueError, match="norm_reward=False"):
        model.set_env(VecNormalize(make_vec_env(POINT_ENV)))
    model.set_env(VecNormalize(make_vec_env(POINT_ENV), norm_reward=False))
    assert abs(model.sample_batch(4096).rewards.std().item() - 1.0) < 0.1


def test_a_trained_model_keeps_the_scale_of_its_rewards(box_dataset: OfflineDataset) -> None:
    """Its action values are in it."""
    small = dict(reward_transform="normalize", policy_kwargs=dict(net_arch=[8]), device="cpu")
    model = DTQL("MlpPolicy", None, dataset=box_dataset, **small)
    scale, larger = model.reward_scale, copy(box_dataset)
    larger.rewards = 10.0 * box_dataset.rewards
    model.set_dataset(larger)
    assert model.reward_scale == pytest.approx(0.1 * scale, rel=1e-5)
    model.learn(1)
    model.set_dataset(box_dataset)
    assert model.reward_scale == pytest.approx(0.1 * scale, rel=1e-5)


# Data and environments ------------------------------------------------------------------------------------------------


def test_env_from_the_dataset(spec: AlgoSpec, minari_ids: tuple[str, str]) -> None:
    for dataset_id, policy in zip(minari_ids, ("MlpPolicy", "MultiInputPolicy"), strict=True):
        model = spec.make(dataset=dataset_id, policy=policy)
        env = model.get_env()
        assert env is not None and env.num_envs == 1
        assert env.envs[0].spec.id in (POINT_ENV, POINT_GOAL_ENV) and env.render_mode == "rgb_array"
        model.learn(2)
        evaluate_policy(model, env, n_eval_episodes=1)
        model.learn(12, offline=False)


def test_env_without_known_environment(spec: AlgoSpec, random_dataset: Callable[..., OfflineDataset]) -> None:
    data = random_dataset(spaces.Box(-1.0, 1.0, (3,)), spaces.Box(-1.0, 1.0, (2,)))
    model = spec.make(dataset=data)
    assert isinstance(model.get_env().envs[0].unwrapped, SpacesEnv)
    model.learn(3, callback=StopTrainingOnMaxEpisodes(1))
    assert model.num_timesteps == 3
    with pytest.raises(ValueError, match="set_env"):
        model.learn(3, offline=False)
    with pytest.raises(RuntimeError, match="No environment is known"):
        evaluate_policy(model, model.get_env(), n_eval_episodes=1)
    model.set_env(RandomEnv(data.observation_space, data.action_space))
    model.learn(12, offline=False)


def pendulum_rows(n_episodes: int = 3, timeouts: bool = True) -> dict[str, np.ndarray]:
    """Episodes of 200 steps in Pendulum-v1's spaces, actions between -2 and 2."""
    rng = np.random.default_rng(0)
    n = 200 * n_episodes
    rows = dict(
        observations=rng.uniform(-1, 1, (n, 3)).astype(np.float32),
        actions=rng.uniform(-2, 2, (n, 1)).astype(np.float32),
        rewards=rng.normal(size=n).astype(np.float32),
        terminals=np.zeros(n, bool),
    )
    return rows | ({"timeouts": np.arange(n) % 200 == 199} if timeouts else {})


@pytest.mark.parametrize("suffix", [".hdf5", ".npz"])
def test_a_bare_file_takes_what_it_does_not_tell_from_the_environment(suffix: str, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    path = tmp_path / f"rows{suffix}"
    if suffix == ".npz":
        np.savez(path, **pendulum_rows(timeouts=False))
    else:
        with h5py.File(path, "w") as file:
            for name, column in pendulum_rows(timeouts=False).items():
                file[name] = column
    make = ALGOS[0].make
    models = [make("Pendulum-v1", dataset=path), make(make_vec_env("Pendulum-v1", 2), dataset=str(path)), make("Pendulum-v1")]
    models[2].set_dataset(path)
    datasets = [model.dataset for model in models] + [load_dataset(path, env_spec="Pendulum-v1")]
    for dataset in datasets:
        assert dataset.action_space == spaces.Box(-2.0, 2.0, (1,))
        assert list(dataset.episode_lengths) == [199] * 3  # cut by the time limit; the last row has no successor
    with pytest.raises(ValueError, match="range"):
        load_dataset(path)


def test_arrays_without_timeouts_are_cut_by_the_time_limit_of_the_environment() -> None:
    rows, make = pendulum_rows(timeouts=False), ALGOS[0].make
    for env in (
        "Pendulum-v1",
        gym.make("Pendulum-v1"),
        make_vec_env("Pendulum-v1", 2),
        VecNormalize(make_vec_env("Pendulum-v1")),
    ):
        assert list(make(env, dataset=rows).dataset.episode_lengths) == [199] * 3
    longer = gym.make("Pendulum-v1", max_episode_steps=300)
    assert list(make(longer, dataset=rows).dataset.episode_lengths) == [299, 299]


def test_a_small_buffer_counts_when_it_is_full(
    spec: AlgoSpec, box_dataset: OfflineDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay buffer that never holds a whole batch is drawn from once it is full."""
    spec.need("learns_online")
    model = spec.make(POINT_ENV, dataset=box_dataset, buffer_size=12, batch_size=16).learn(1)
    drawn = []
    sample = model.replay_buffer.sample
    monkeypatch.setattr(model.replay_buffer, "sample", lambda n, **kwargs: drawn.append(n) or sample(n, **kwargs))
    model.learn(40, offline=False)
    assert drawn and set(drawn) == {8}


def test_data_bring_an_env_to_a_model_without_one(spec: AlgoSpec, box_dataset: OfflineDataset, tmp_path: Path) -> None:
    """A model that was loaded by itself gets data, and with them the environment that callbacks ask for."""
    spec.make(make_vec_env(POINT_ENV, 2), dataset=box_dataset).save(tmp_path / "model")
    model = spec.cls.load(tmp_path / "model", device="cpu")
    assert model.get_env() is None
    model.set_dataset(box_dataset)
    assert model.get_env().num_envs == 2
    model.learn(3, callback=[ProgressBarCallback(), StopTrainingOnMaxEpisodes(100)])
    if "learns_online" not in spec.lacks:
        model.learn(12, offline=False)


def test_another_env_brings_its_data(spec: AlgoSpec, minari_ids: tuple[str, str], tmp_path: Path) -> None:
    spec.make(POINT_ENV).save(tmp_path / "model")
    model = spec.cls.load(tmp_path / "model", device="cpu")
    model.set_env(make_env(minari_ids[0]))
    assert model.dataset is not None
    model.learn(2)
    own = model.dataset
    model.set_env(make_env(minari_ids[0]))
    assert model.dataset is own  # what is attached stays


def test_env_of_stacked_data(spec: AlgoSpec, minari_ids: tuple[str, str]) -> None:
    """The environment that data bring stacks observations as the data do."""
    stacked = load_dataset(minari_ids[0]).stack(3)
    kwargs = {"n_stack": 3} if spec.name == "DiffSR" else {}
    model = spec.make(dataset=stacked, **kwargs).learn(2)
    assert is_vecenv_wrapped(model.get_env(), VecFrameStack)
    assert model.get_env().observation_space == stacked.observation_space
    evaluate_policy(model, model.get_env(), 1, warn=False)
    with pytest.raises(ValueError, match="already"):
        stacked.stack(2)


def test_evaluation_in_the_training_env_begins_a_new_episode(spec: AlgoSpec) -> None:
    """No transition joins the state before an evaluation with one after it."""
    spec.need("learns_online")
    env = gym.make(POINT_ENV)
    for given in (None, env):
        model = spec.make(env, learning_starts=10_000).learn(EPISODE_LENGTH // 2)
        n_before = model.replay_buffer.size()
        evaluate(model, given or model.get_env(), 1)
        model.learn(EPISODE_LENGTH // 2, reset_num_timesteps=False)
        buffer = model.replay_buffer
        here, then = buffer.observations[:, 0], buffer.next_observations[:, 0]
        inside = [np.allclose(then[i], here[i + 1]) for i in range(buffer.size() - 1)]
        assert not inside[n_before - 1] and sum(inside) >= buffer.size() - 3


def test_env_that_brings_its_data(spec: AlgoSpec, minari_ids: tuple[str, str]) -> None:
    env = make_env(minari_ids[0])
    for wrapped in (env, gym.wrappers.TimeLimit(env, 5), DummyVecEnv([lambda: env]), VecNormalize(DummyVecEnv([lambda: env]))):
        model = spec.make(wrapped)
        assert model.dataset is env.get_dataset()
        assert model.learn(2)._n_updates == 2
        assert model.replay_buffer.size() == 0
    explicit = make_env(minari_ids[0]).get_dataset()
    assert spec.make(env, dataset=explicit).dataset is explicit, "an explicit dataset wins"


def test_env_id(spec: AlgoSpec) -> None:
    model = spec.make(POINT_ENV)
    assert model.get_env().render_mode == "rgb_array"
    assert model.learn(12).num_timesteps == 12


def test_set_dataset(spec: AlgoSpec, box_dataset: OfflineDataset, goal_dataset: OfflineDataset) -> None:
    model = spec.make(POINT_ENV)
    model.learn(12)
    model.set_dataset(box_dataset)
    assert model.learn(3).num_timesteps == 3
    with pytest.raises(ValueError, match="[Oo]bservation"):
        model.set_dataset(goal_dataset)
    assert model.dataset is box_dataset, "the old one stays"
    arrays = dict(
        observations=box_dataset.observations,
        actions=box_dataset.actions,
        rewards=box_dataset.rewards,
        terminals=box_dataset.terminations,
        timeouts=box_dataset.truncations,
        next_observations=box_dataset.next_observations,
    )
    model.set_dataset(arrays)
    assert len(model.dataset) == len(box_dataset)
    model.learn(3)
    model.set_dataset(None)
    assert model.learn(3).replay_buffer.size() > 0


@pytest.mark.parametrize("wrapper", [None, VecMonitor, VecNormalize])
def test_several_envs(spec: AlgoSpec, wrapper: Any, box_dataset: OfflineDataset) -> None:
    env: Any = make_vec_env(POINT_ENV, n_envs=3)
    env = env if wrapper is None else wrapper(env)
    model = spec.make(env, dataset=box_dataset)
    assert model.learn(4).num_timesteps == model._n_updates == 4, "offline, whatever n_envs"
    model.learn(30, offline=False)
    assert model.num_timesteps == 30 and model.replay_buffer.size() == 10
    model = spec.make(env, gradient_steps=-1, train_freq=2, learning_starts=0).learn(12)
    assert model._n_updates == 12


def test_subprocesses(spec: AlgoSpec) -> None:
    env = make_vec_env(PointGoalEnv, n_envs=2, vec_env_cls=SubprocVecEnv, env_kwargs={"as_dict": False})
    assert spec.make(env).learn(20).num_timesteps == 20
    env.close()


@pytest.mark.parametrize("train_freq", [3, (2, "step"), (1, "episode")])
@pytest.mark.parametrize("gradient_steps", [2, -1])
def test_train_freq_and_gradient_steps(spec: AlgoSpec, train_freq: Any, gradient_steps: int) -> None:
    model = spec.make(gym.wrappers.TimeLimit(gym.make("Pendulum-v1"), 5), train_freq=train_freq, gradient_steps=gradient_steps)
    model.learn(30)
    n_steps = {3: 3, (2, "step"): 2, (1, "episode"): 5}[train_freq]
    n_rollouts = sum(steps > 10 for steps in range(n_steps, 31, n_steps))
    assert model._n_updates == n_rollouts * (n_steps if gradient_steps == -1 else 2)


@pytest.mark.parametrize("train_freq", ["4", ("1", "episode"), (1, "close")])
def test_bad_train_freq(spec: AlgoSpec, train_freq: Any) -> None:
    with pytest.raises(ValueError):
        spec.make(POINT_ENV, train_freq=train_freq)


@pytest.mark.parametrize("noise", [NormalActionNoise, OrnsteinUhlenbeckActionNoise])
def test_action_noise(spec: AlgoSpec, noise: Any) -> None:
    spec.make(make_vec_env(POINT_ENV, n_envs=2), action_noise=noise(np.zeros(2), 0.1 * np.ones(2))).learn(16)


def test_n_steps(spec: AlgoSpec, box_dataset: OfflineDataset) -> None:
    spec.need("n_steps")
    model = spec.make(POINT_ENV, dataset=box_dataset, n_steps=3, gamma=0.9)
    assert model.replay_buffer.n_steps == model.dataset_buffer.n_steps == 3
    discounts = model.sample_batch(200).discounts
    np.testing.assert_allclose(discounts.unique().numpy(), [0.729, 0.81, 0.9], rtol=1e-5)
    model.learn(3)
    model.learn(20, offline=False)


@pytest.mark.parametrize("transform", ["antmaze", "normalize"])
def test_every_reward_of_an_n_step_return_is_transformed(spec: AlgoSpec, box_dataset: OfflineDataset, transform: str) -> None:
    spec.need("n_steps")
    spec.need("reward_transform")
    model = spec.make(POINT_ENV, dataset=box_dataset, n_steps=3, gamma=0.9, reward_transform=transform)
    std = box_dataset.rewards.std()
    scale, shift = (2.0, -0.5) if transform == "antmaze" else (1.0 / std, -box_dataset.rewards.mean() / std)
    rewards = scale * box_dataset.rewards + shift
    for batch in (model.sample_batch(100) for _ in range(3)):
        for observation, action, result, discount in zip(
            batch.observations.numpy(), batch.actions.numpy(), batch.rewards[:, 0], batch.discounts[:, 0], strict=True
        ):
            distances = np.abs(box_dataset.observations - observation).sum(1)
            first = int((distances + np.abs(box_dataset.actions - model.policy.unscale_action(action)).sum(1)).argmin())
            n = round(np.log(float(discount)) / np.log(0.9))
            expected = sum(0.9**i * rewards[first + i] for i in range(n))
            assert float(result) == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="n_steps=1"):
        spec.make(POINT_ENV, n_steps=3, gamma=1.0, reward_transform=transform)


# VecNormalize ---------------------------------------------------------------------------------------------------------


def test_statistics_of_an_unused_vec_normalize_are_fitted(spec: AlgoSpec, box_dataset: OfflineDataset) -> None:
    env = VecNormalize(make_vec_env(POINT_ENV, n_envs=2), gamma=0.9)
    model = spec.make(env, dataset=box_dataset)
    np.testing.assert_allclose(env.obs_rms.mean, box_dataset.observations.mean(axis=0, dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(env.obs_rms.var, box_dataset.observations.var(axis=0, dtype=np.float64), rtol=1e-6)
    returns = []
    for episode in box_dataset.episodes:
        running = 0.0
        for reward in episode.rewards:
            running = 0.9 * running + float(reward)
            returns.append(running)
    np.testing.assert_allclose(env.ret_rms.var, np.var(returns), rtol=1e-6)
    batch = model.sample_batch(300)
    np.testing.assert_allclose(batch.observations.mean(0), 0.0, atol=0.3)
    np.testing.assert_allclose(batch.observations.std(0), 1.0, atol=0.2)
    model.learn(3)
    model.learn(20, offline=False)


def test_statistics_of_a_used_vec_normalize_stay(spec: AlgoSpec, box_dataset: OfflineDataset) -> None:
    env = VecNormalize(make_vec_env(POINT_ENV))
    env.reset()
    for _ in range(5):
        env.step(np.array([env.action_space.sample()]))
    mean = env.obs_rms.mean.copy()
    spec.make(env, dataset=box_dataset).learn(3)
    np.testing.assert_array_equal(env.obs_rms.mean, mean)


def test_vec_normalize_of_dict_observations(spec: AlgoSpec, goal_dataset: OfflineDataset) -> None:
    env = VecNormalize(make_vec_env(POINT_GOAL_ENV), norm_obs_keys=["observation"], norm_reward=False)
    model = spec.make(env, dataset=goal_dataset)
    expected = goal_dataset.observations["observation"].mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(env.obs_rms["observation"].mean, expected, rtol=1e-6)
    model.learn(2)
    model.learn(12, offline=False)


def test_evaluation_env_gets_the_statistics(spec: AlgoSpec, box_dataset: OfflineDataset, tmp_path: Path) -> None:
    """EvalCallback copies the statistics of training into those of evaluation, offline as well."""
    env = VecNormalize(make_vec_env(POINT_ENV))
    eval_env = VecNormalize(make_vec_env(POINT_ENV), training=False, norm_reward=False)
    model = spec.make(env, dataset=box_dataset)
    model.learn(4, callback=EvalCallback(eval_env, eval_freq=2, n_eval_episodes=1, verbose=0))
    np.testing.assert_array_equal(eval_env.obs_rms.mean, env.obs_rms.mean)
    assert eval_env.obs_rms.count == len(box_dataset)


# Policies -------------------------------------------------------------------------------------------------------------


def test_multi_input_policy(variant: AlgoSpec, goal_dataset: OfflineDataset) -> None:
    model = variant.make(POINT_GOAL_ENV, dataset=goal_dataset, policy="MultiInputPolicy").learn(3)
    model.learn(15, offline=False)
    evaluate_policy(model, model.get_env(), n_eval_episodes=1)


def test_cnn_policy(spec: AlgoSpec, image_dataset: OfflineDataset) -> None:
    """Images are recorded with the channels last and seen with the channels first."""
    spec.need("images")
    kwargs: dict[str, Any] = dict(buffer_size=40, policy_kwargs=dict(features_extractor_kwargs=dict(features_dim=8)))
    model = spec.make(image_env(), dataset=image_dataset, **kwargs)
    assert is_vecenv_wrapped(model.get_env(), VecTransposeImage)
    batch = model.sample_batch(4)
    assert batch.observations.shape == (4, 1, 36, 36) and batch.observations.dtype == th.uint8
    model.learn(2)
    model.learn(14, offline=False)
    observation, _ = image_env().reset()
    assert model.predict(observation)[0].shape == model.action_space.shape
    assert spec.make(dataset=image_dataset, **kwargs).learn(2).num_timesteps == 2


@pytest.mark.parametrize("name", ["batch_size", "buffer_size", "n_steps", "n_pretrain_steps", "n_diffusion_steps"])
def test_counts_are_integers(spec: AlgoSpec, name: str) -> None:
    names = set(inspect.signature(spec.cls).parameters)
    if name not in names:
        pytest.skip(f"{spec.name} has no {name}")
    for wrong in (2.5, 8.0):
        with pytest.raises(ValueError, match=rf"`{name}` must be an integer in \[\d, inf\]: got {wrong}"):
            spec.make(POINT_ENV, **{name: wrong})


def test_counts_of_numpy(spec: AlgoSpec) -> None:
    assert spec.make(POINT_ENV, batch_size=np.int64(4), buffer_size=np.int32(50)).learn(12)._n_updates > 0


def test_policy_kwargs_are_a_dict(spec: AlgoSpec) -> None:
    with pytest.raises(TypeError, match=r"`policy_kwargs` must be a dict .*: got 'dict\(net_arch=\[8\]\)'"):
        spec.cls("MlpPolicy", POINT_ENV, policy_kwargs="dict(net_arch=[8])")


def test_cnn_policy_refuses_vectors(spec: AlgoSpec) -> None:
    with pytest.raises((AssertionError, ValueError), match=r"images.*got Box|images not with Box"):
        spec.make(POINT_ENV, policy="CnnPolicy")


def test_wrong_policy_for_the_observations(spec: AlgoSpec, goal_dataset: OfflineDataset) -> None:
    for policy in ("MlpPolicy", "CnnPolicy"):
        with pytest.raises(ValueError, match="MultiInputPolicy"):
            spec.make(POINT_GOAL_ENV, policy=policy)
    with pytest.raises(ValueError, match="unknown"):
        spec.make(POINT_ENV, policy="NoPolicy")


def test_her(spec: AlgoSpec, goal_dataset: OfflineDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    spec.need("her")
    kwargs: dict[str, Any] = dict(
        replay_buffer_class=HerReplayBuffer, replay_buffer_kwargs=dict(n_sampled_goal=4), learning_starts=30
    )
    for env in (BitFlippingEnv(n_bits=4, continuous=True), make_vec_env(POINT_GOAL_ENV, n_envs=2)):
        assert spec.make(env, policy="MultiInputPolicy", **kwargs).learn(40)._n_updates > 0
    model = spec.make(POINT_GOAL_ENV, dataset=goal_dataset, policy="MultiInputPolicy", **{**kwargs, "learning_starts": 0})
    draws = count_draws(model, monkeypatch)
    model.learn(3)
    model.learn(30, offline=False, reset_num_timesteps=False)
    assert draws["dataset"][:3] == [8] * 3 and draws["dataset"][-1] == draws["replay"][-1] == 4
    with pytest.raises(ValueError, match="n_steps"):
        spec.make(POINT_GOAL_ENV, policy="MultiInputPolicy", n_steps=3, **kwargs)


def test_history_stacking(spec: AlgoSpec, box_dataset: OfflineDataset) -> None:
    env = VecFrameStack(make_vec_env(POINT_ENV), n_stack=3)
    model = spec.make(env, dataset=box_dataset.stack(3)).learn(3)
    model.learn(12, offline=False)
    evaluate_policy(model, env, n_eval_episodes=1)


@pytest.mark.parametrize("arch", [[], [4], dict(pi=[4], qf=[8, 4])])
def test_network_sizes(spec: AlgoSpec, arch: Any, box_dataset: OfflineDataset) -> None:
    spec.need("extractors")
    spec.make(dataset=box_dataset, policy_kwargs=dict(net_arch=arch)).learn(2)


def test_optimizer_and_activation(spec: AlgoSpec, box_dataset: OfflineDataset) -> None:
    kwargs: dict[str, Any] = dict(optimizer_class=th.optim.AdamW, optimizer_kwargs=dict(weight_decay=0.1))
    if "extractors" not in spec.lacks:
        kwargs["activation_fn"] = th.nn.Tanh
    model = spec.make(dataset=box_dataset, policy_kwargs=kwargs).learn(2)
    assert isinstance(model.policy.actor.optimizer, th.optim.AdamW)
    assert model.policy.actor.optimizer.param_groups[0]["weight_decay"] == 0.1


def test_learning_rate_schedule(spec: AlgoSpec, box_dataset: OfflineDataset) -> None:
    """The rate of an update is that of the progress before it; it stands still during pretraining."""
    rates: list[float] = []

    def callback(local: dict[str, Any], _globals: dict[str, Any]) -> bool:
        rates.append(local["self"].policy.actor.optimizer.param_groups[0]["lr"])
        return True

    spec.make(dataset=box_dataset, learning_rate=lambda progress: progress).learn(4, callback=callback)
    np.testing.assert_allclose(rates, [1.0, 0.75, 0.5, 0.25])
    rates.clear()
    spec.need("pretraining")
    spec.make(dataset=box_dataset, learning_rate=lambda progress: progress, n_pretrain_steps=3).learn(7, callback=callback)
    np.testing.assert_allclose(rates, [1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("gamma", 1.1), ("tau", -0.1), ("offline_fraction", 1.5), ("n_pretrain_steps", -1), ("n_steps", 0)],
)
def test_bad_arguments(spec: AlgoSpec, name: str, value: float) -> None:
    spec.need(*{"n_pretrain_steps": ["pretraining"], "n_steps": ["n_steps"]}.get(name, []))
    with pytest.raises(ValueError, match=name):
        spec.make(POINT_ENV, **{name: value})


# Callbacks ------------------------------------------------------------------------------------------------------------


class Order(BaseCallback):
    """Writes down what is called."""

    def __init__(self, stop_at: int | None = None, answer: Any = False) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.stop_at, self.answer = stop_at, answer

    def _on_training_start(self) -> None:
        self.calls.append("training_start")

    def _on_rollout_start(self) -> None:
        self.calls.append("rollout_start")

    def _on_step(self) -> Any:
        self.calls.append("step")
        n_envs = self.training_env.num_envs
        assert self.locals["total_timesteps"] > 0 and isinstance(self.locals["tb_log_name"], str)
        for name, kind in (("dones", bool), ("rewards", np.floating)):
            value = self.locals[name]
            assert value.shape == (n_envs,) and np.issubdtype(value.dtype, kind), name
        assert len(self.locals["infos"]) == n_envs and isinstance(self.locals["infos"][0], dict)
        new_obs = self.locals["new_obs"]
        for part in new_obs.values() if isinstance(new_obs, dict) else [new_obs]:
            assert len(part) == n_envs
        assert self.num_timesteps == self.model.num_timesteps
        return self.answer if self.n_calls == self.stop_at else True

    def _on_rollout_end(self) -> None:
        self.calls.append("rollout_end")

    def _on_training_end(self) -> None:
        self.calls.append("training_end")


def phases(spec: AlgoSpec, data: OfflineDataset, offline: bool, env: Any = POINT_ENV, **kwargs: Any) -> Any:
    """A model that learns offline or online."""
    return spec.make(env, dataset=data if offline else None, **kwargs)


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("n_envs", [1, 2])
def test_order_of_calls(spec: AlgoSpec, offline: bool, n_envs: int, box_dataset: OfflineDataset) -> None:
    callback = Order()
    phases(spec, box_dataset, offline, make_vec_env(POINT_ENV, n_envs)).learn(4, callback=callback)
    rollout = ["rollout_start", "step", "rollout_end"]
    expected = ["rollout_start", *["step"] * 4, "rollout_end"] if offline else rollout * (4 // n_envs)
    assert callback.calls == ["training_start", *expected, "training_end"]


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("answer", [False, np.bool_(0), th.tensor(False)])
def test_any_false_answer_stops(
    spec: AlgoSpec, offline: bool, answer: Any, box_dataset: OfflineDataset, tmp_path: Path
) -> None:
    callback = Order(stop_at=3, answer=answer)
    model = phases(spec, box_dataset, offline)
    model.learn(9, callback=callback)
    assert model.num_timesteps == callback.n_calls == 3
    assert callback.calls[-1] == "training_end"
    model.save(tmp_path / "model")
    model.learn(2, reset_num_timesteps=False)


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("n_envs", [1, 2])
def test_callbacks_of_sb3(spec: AlgoSpec, offline: bool, n_envs: int, box_dataset: OfflineDataset, tmp_path: Path) -> None:
    env = VecNormalize(make_vec_env(POINT_ENV, n_envs))
    model = phases(spec, box_dataset, offline, env)
    n_steps = 24
    n_calls = n_steps if offline else n_steps // n_envs
    checkpoint = CheckpointCallback(8, str(tmp_path), save_replay_buffer=True, save_vecnormalize=True)
    eval_env = VecNormalize(make_vec_env(POINT_ENV, 2), training=False)
    evaluation = EvalCallback(
        eval_env,
        callback_on_new_best=StopTrainingOnRewardThreshold(1e6),
        callback_after_eval=StopTrainingOnNoModelImprovement(100),
        n_eval_episodes=2,
        eval_freq=6,
        log_path=str(tmp_path),
        best_model_save_path=str(tmp_path),
        verbose=0,
    )
    event = EveryNTimesteps(10, CheckpointCallback(1, str(tmp_path), name_prefix="event"))
    episodes = StopTrainingOnMaxEpisodes(100)
    callback = CallbackList([checkpoint, evaluation, event, LogEveryNTimesteps(6), episodes, Order()])
    logs = recorded(model)
    model.learn(n_steps, callback=callback)
    assert model.num_timesteps == n_steps and callback.n_calls == n_calls
    assert episodes.n_episodes == model._episode_num, "offline no episode ends"
    assert offline is (model._episode_num == 0)
    per_call = 1 if offline else n_envs
    for call in range(8, n_calls + 1, 8):
        steps = call * per_call
        assert (tmp_path / f"rl_model_{steps}_steps.zip").is_file()
        assert (tmp_path / f"rl_model_replay_buffer_{steps}_steps.pkl").is_file()
        assert (tmp_path / f"rl_model_vecnormalize_{steps}_steps.pkl").is_file()
    steps = 8 * per_call
    loaded = spec.cls.load(tmp_path / f"rl_model_{steps}_steps", env=make_vec_env(POINT_ENV, n_envs))
    assert loaded.num_timesteps == steps and loaded.get_vec_normalize_env() is not None
    loaded.load_replay_buffer(tmp_path / f"rl_model_replay_buffer_{steps}_steps.pkl")
    spec.cls.load(tmp_path / "best_model")
    evaluations = np.load(tmp_path / "evaluations.npz")
    assert evaluations["timesteps"].tolist() == [6 * per_call * i for i in range(1, n_calls // 6 + 1)]
    assert evaluations["results"].shape == (n_calls // 6, 2)
    assert {path.name for path in tmp_path.glob("event*")} == {f"event_{s}_steps.zip" for s in (10, 20)}
    keys = set().union(*(values for _, values in logs))
    assert {"eval/mean_reward", "eval/mean_ep_length", "time/total_timesteps", "train/n_updates"} <= keys
    eval_steps = [step for step, values in logs if "eval/mean_reward" in values]
    assert eval_steps == evaluations["timesteps"].tolist()


@pytest.mark.parametrize("offline", [True, False])
def test_function_and_list_as_callback(spec: AlgoSpec, offline: bool, box_dataset: OfflineDataset) -> None:
    seen: list[int] = []

    def function(local: dict[str, Any], _globals: dict[str, Any]) -> bool:
        seen.append(local["self"].num_timesteps)
        return len(seen) < 5

    model = phases(spec, box_dataset, offline)
    model.learn(3, callback=function)
    assert seen == [1, 2, 3]
    callback = Order()
    model.learn(3, callback=[callback, Order()])
    assert callback.n_calls == 3
    model.learn(9, callback=function)
    assert model.num_timesteps == 2, "a function can stop as well"


def test_max_episodes_stops_online(spec: AlgoSpec) -> None:
    env = make_vec_env(lambda: gym.wrappers.TimeLimit(gym.make("Pendulum-v1"), 10), n_envs=2)
    model = spec.make(env).learn(200, callback=StopTrainingOnMaxEpisodes(1))
    assert model.num_timesteps == 20


@pytest.mark.parametrize("offline", [True, False])
def test_no_improvement_stops(spec: AlgoSpec, offline: bool, box_dataset: OfflineDataset) -> None:
    env = Monitor(RandomEnv(spaces.Box(-1.0, 1.0, (4,)), gym.make(POINT_ENV).action_space, length=1))
    env.env.step = lambda action: (np.zeros(4, np.float32), 0.0, True, False, {})  # type: ignore[method-assign]
    stop = StopTrainingOnNoModelImprovement(max_no_improvement_evals=1)
    model = phases(spec, box_dataset, offline)
    model.learn(50, callback=EvalCallback(env, callback_after_eval=stop, eval_freq=2, n_eval_episodes=1, verbose=0))
    assert model.num_timesteps == 6


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("as_callback", [True, False])
def test_progress_bar(spec: AlgoSpec, offline: bool, as_callback: bool, box_dataset: OfflineDataset) -> None:
    env = make_vec_env(POINT_ENV, n_envs=2)
    model = phases(spec, box_dataset, offline, env)
    bars: list[Any] = []
    from sb3_diffusion.common import base_class

    original = base_class.TimestepProgressBar._on_training_end

    def end(self: Any) -> None:
        bars.append((self.pbar.n, self.pbar.total))
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_class.TimestepProgressBar, "_on_training_end", end)
        kwargs: Any = {"callback": CallbackList([ProgressBarCallback()])} if as_callback else {"progress_bar": True}
        model.learn(6, **kwargs)
        kwargs = {"callback": ProgressBarCallback()} if as_callback else {"progress_bar": True}
        model.learn(4, reset_num_timesteps=False, **kwargs)
    assert bars == [(6, 6), (4, 4)], "timesteps, whatever n_envs"


def test_callbacks_are_initialised_once(spec: AlgoSpec, box_dataset: OfflineDataset) -> None:
    class Counter(BaseCallback):
        n_initialised = 0

        def _init_callback(self) -> None:
            self.n_initialised += 1

        def _on_step(self) -> bool:
            return True

    model = spec.make(dataset=box_dataset)
    for kwargs in ({}, {"progress_bar": True}):
        counters = Counter(), Counter(), Counter()
        model.learn(1, callback=counters[0], **kwargs)
        model.learn(1, callback=[counters[1], ProgressBarCallback()], **kwargs)
        model.learn(1, callback=CallbackList([counters[2], CallbackList([ProgressBarCallback()])]), **kwargs)
        assert [counter.n_initialised for counter in counters] == [1, 1, 1]
        model.learn(1, callback=lambda *_: True, **kwargs)


# Logs -----------------------------------------------------------------------------------------------------------------


def test_log_interval_offline(spec: AlgoSpec, box_dataset: OfflineDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """One unit stands for 1,000 gradient steps, whatever the number of envs; None logs nothing."""
    for n_envs in (1, 3):
        model = spec.make(make_vec_env(POINT_ENV, n_envs), dataset=box_dataset)
        logs = recorded(model)
        monkeypatch.setattr(model, "train", lambda gradient_steps, batch_size: None)
        model.learn(4_500, log_interval=2)
        assert [step for step, _ in logs] == [2_000, 4_000]
        model.learn(2_500, log_interval=1, reset_num_timesteps=False)
        assert [step for step, _ in logs][2:] == [5_000, 6_000, 7_000]
        model.learn(4_500, log_interval=None)
        assert len(logs) == 5


def test_log_interval_online_counts_episodes(spec: AlgoSpec) -> None:
    model = spec.make(gym.wrappers.TimeLimit(gym.make("Pendulum-v1"), 5))
    logs = recorded(model)
    model.learn(20, log_interval=2)
    assert [step for step, _ in logs] == [10, 20]
    model.learn(20, log_interval=None)
    assert len(logs) == 2
    assert {"rollout/ep_rew_mean", "rollout/ep_len_mean", "time/episodes", "time/fps"} <= set(logs[-1][1])


@pytest.mark.parametrize("offline", [True, False])
def test_logged_values(spec: AlgoSpec, offline: bool, box_dataset: OfflineDataset) -> None:
    model = phases(spec, box_dataset, offline)
    logs = recorded(model)
    model.learn(30, callback=LogEveryNTimesteps(30), log_interval=None)
    step, values = logs[-1]
    assert step == values["time/total_timesteps"] == 30
    assert values["train/n_updates"] == (30 if offline else 19), "online a step is logged before its update"
    assert values["train/learning_rate"] == pytest.approx(model.learning_rate)
    losses = [name for name in values if name.endswith("_loss")]
    assert losses and all(isinstance(values[name], float) and np.isfinite(values[name]) for name in losses)
    assert all(len(name) < 36 for name in values), "longer keys clash"


def test_losses_are_means_over_the_interval(spec: AlgoSpec, box_dataset: OfflineDataset) -> None:
    """Logged every step, the losses average to what is logged once."""
    fine, coarse = spec.make(dataset=box_dataset), spec.make(dataset=box_dataset)
    logs_fine, logs_coarse = recorded(fine), recorded(coarse)
    fine.learn(6, callback=LogEveryNTimesteps(1))
    coarse.learn(6, callback=LogEveryNTimesteps(6))
    name = next(name for name in logs_coarse[-1][1] if name.endswith("_loss"))
    mean = np.mean([values[name] for _, values in logs_fine])
    assert logs_coarse[-1][1][name] == pytest.approx(mean, rel=1e-4)


def test_own_logger_and_silence(
    spec: AlgoSpec, box_dataset: OfflineDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = spec.make(dataset=box_dataset, verbose=0)
    model.set_logger(configure(str(tmp_path), ["csv", "json", "log"]))
    model.learn(5, callback=LogEveryNTimesteps(5))
    assert {"progress.csv", "progress.json", "log.txt"} <= set(os.listdir(tmp_path))
    assert "train/n_updates" in (tmp_path / "progress.csv").read_text()
    spec.make(POINT_ENV, verbose=0).learn(5)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == ""


def test_tensorboard(spec: AlgoSpec, box_dataset: OfflineDataset, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = spec.make(POINT_ENV, dataset=box_dataset, tensorboard_log=str(tmp_path))
    model.learn(4, callback=LogEveryNTimesteps(2))
    model.learn(4, callback=LogEveryNTimesteps(2), reset_num_timesteps=False, offline=False)
    model.learn(2, callback=LogEveryNTimesteps(2), tb_log_name="other")
    name = spec.cls.__name__
    assert set(os.listdir(tmp_path)) == {f"{name}_1", "other_1"}
    # Two files of the same second are read in the order of their names, whose last part is a running number: 10 before 9
    events = EventAccumulator(str(tmp_path / f"{name}_1"), purge_orphaned_data=False).Reload()
    assert sorted(event.step for event in events.Scalars("time/fps")) == [2, 4, 5, 7], "a new callback starts at once"


@pytest.mark.parametrize("offline", [True, False])
def test_fps(spec: AlgoSpec, offline: bool, box_dataset: OfflineDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames per second count from the beginning of the call; a clock that stands still is no problem."""
    model = phases(spec, box_dataset, offline)
    logs = recorded(model)
    monkeypatch.setattr("time.time_ns", lambda: 42)
    monkeypatch.setattr("time.time", lambda: 42.0)
    model.learn(4, callback=LogEveryNTimesteps(4))
    assert np.isfinite(logs[-1][1]["time/fps"])
    clock = iter(range(0, 10**15, 10**9))
    monkeypatch.setattr("time.time_ns", lambda: next(clock))
    model.num_timesteps = 20_000
    model.learn(4, callback=LogEveryNTimesteps(4), reset_num_timesteps=False)
    assert logs[-1][1]["time/fps"] <= 4


@pytest.mark.parametrize("size", [1, 42])
def test_stats_window_size(spec: AlgoSpec, size: int, box_dataset: OfflineDataset) -> None:
    for offline in (True, False):
        model = phases(spec, box_dataset, offline, stats_window_size=size).learn(3)
        assert model.ep_info_buffer.maxlen == model.ep_success_buffer.maxlen == size


def test_success_rate(spec: AlgoSpec, tmp_path: Path) -> None:
    model = spec.make(POINT_GOAL_ENV, policy="MultiInputPolicy")
    logs = recorded(model)
    eval_env = make_vec_env(POINT_GOAL_ENV, 2)
    callback = EvalCallback(eval_env, eval_freq=15, n_eval_episodes=2, log_path=str(tmp_path), verbose=0)
    model.learn(3 * EPISODE_LENGTH, callback=callback, log_interval=1)
    keys = set().union(*(values for _, values in logs))
    assert {"eval/success_rate", "rollout/success_rate"} <= keys
    assert "successes" in np.load(tmp_path / "evaluations.npz")


def test_identity_env_runs(spec: AlgoSpec) -> None:
    """An env that truncates: the buffer tells it from a termination."""
    model = spec.make(IdentityEnvBox(low=-3.0, high=5.0, ep_length=6)).learn(18)
    buffer = model.replay_buffer
    assert buffer.dones[:18].sum() == buffer.timeouts[:18].sum() == 3
    assert buffer.actions[:18].min() >= -1.0 and buffer.actions[:18].max() <= 1.0
