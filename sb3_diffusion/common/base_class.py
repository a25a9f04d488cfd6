"""The common base of all algorithms: offline, online and fine-tuning runs, files, randomness."""

import time
import warnings
from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback, ProgressBarCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.type_aliases import (
    GymEnv,
    MaybeCallback,
    Schedule,
    TrainFreq,
    TrainFrequencyUnit,
)
from stable_baselines3.common.utils import configure_logger, should_collect_more_steps
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_diffusion.buffers import Batch, EpisodeReplayBuffer, TrajectoryReplayBuffer, concat_samples
from sb3_diffusion.common.compilation import COMPILE_CHOICES, PRECISIONS, autocast
from sb3_diffusion.common.distributed import n_processes, own_rows, own_share, process_rank, take_from_first
from sb3_diffusion.common.policies import DiffusionPolicy
from sb3_diffusion.common.savable import made_env
from sb3_diffusion.common.utils import check_action_space, check_arguments, check_choice, check_integer, check_range
from sb3_diffusion.common.vec_normalize import fit_vec_normalize, is_unused
from sb3_diffusion.common.watched import WatchedAlgorithm
from sb3_diffusion.datasets import (
    OfflineDataset,
    SpacesEnv,
    find_dataset,
    load_dataset,
    load_dataset_for,
    make_dataset_env,
    time_limit,
)

SelfOfflineAlgorithm = TypeVar("SelfOfflineAlgorithm", bound="OfflineAlgorithm")

OFFLINE_STEPS_PER_LOG_UNIT = 1_000
"""Gradient steps that one unit of ``log_interval`` stands for while learning offline."""

REWARD_TRANSFORMS: dict[str, tuple[float, float]] = {
    "iql_antmaze": (1.0, -1.0),
    "cql_antmaze": (4.0, -2.0),
    "antmaze": (2.0, -0.5),
}
"""Fixed reward transforms of the offline literature as (scale, shift); two more follow from the data."""


class TimestepProgressBar(ProgressBarCallback):
    """SB3's progress bar, counting timesteps of either phase, whatever the number of environments."""

    def _on_training_start(self) -> None:
        super()._on_training_start()
        self._shown = self.model.num_timesteps

    def _on_step(self) -> bool:
        self.pbar.update(self.num_timesteps - self._shown)
        self._shown = self.num_timesteps
        return True


def _counting_timesteps(callback: Any) -> Any:
    """SB3's own progress bar, which adds ``n_envs`` at each step, is replaced, in lists too; all else stays."""
    if isinstance(callback, list):
        return [_counting_timesteps(each) for each in callback]
    if isinstance(callback, CallbackList):
        callback.callbacks = [_counting_timesteps(each) for each in callback.callbacks]
    return TimestepProgressBar() if type(callback) is ProgressBarCallback else callback


def _vec_env_of(dataset: OfflineDataset, n_envs: int = 1) -> VecEnv:
    """The environment of logged data, that many times; observations are stacked as in the data."""
    env = make_vec_env(lambda: make_dataset_env(dataset), n_envs)
    return env if dataset.n_stack == 1 else VecFrameStack(env, dataset.n_stack)


class OfflineAlgorithm(WatchedAlgorithm):
    r"""
    Base of all algorithms of this package: SB3's off-policy algorithm that also learns from logged data.

    Three ways to learn, in any order, on the same object:

    * offline (``offline=True``, the default with a dataset): one timestep is one gradient step on the dataset; the
      environment is neither stepped nor reset;
    * online (``offline=False``, the default without a dataset): one timestep is one environment step, as in SB3;
    * fine-tuning (``offline=False`` with a dataset): as online, and ``offline_fraction`` of each batch comes from the
      dataset. ``learning_starts`` counts steps since that phase began; a model that has been trained acts with its
      policy meanwhile, and batches come from the dataset until the replay buffer holds one.

    Updates draw from the model's ``generator``, acting from ``acting_generator``; both are in the saved file.

    :param policy: policy class or alias
    :param env: Gymnasium env, VecEnv, id or None; with None it comes from the dataset
    :param learning_rate: float or function of the remaining progress, from 1 to 0
    :param buffer_size: capacity of the replay buffer of online transitions
    :param learning_starts: env steps before the first online update
    :param batch_size: transitions per update
    :param tau: Polyak coefficient of target networks
    :param gamma: discount
    :param train_freq: how many env steps (or episodes) between updates online
    :param gradient_steps: updates after each rollout online; -1 for as many as env steps
    :param action_noise: noise added to the actions when exploring
    :param replay_buffer_class: class of the replay buffer of online transitions
    :param replay_buffer_kwargs: its further arguments
    :param optimize_memory_usage: do not store next observations
    :param n_steps: length of the n-step returns
    :param dataset: logged data, see [load_dataset][sb3_diffusion.load_dataset]; without it an env with ``get_dataset()``
        brings its own
    :param offline_fraction: share of each batch that comes from the dataset while fine-tuning, in [0, 1]
    :param n_pretrain_steps: gradient steps of the pretraining phase; they count as offline timesteps
    :param reward_transform: None, ``"normalize"``, ``"iql_locomotion"``, ``"iql_antmaze"``, ``"cql_antmaze"`` or
        ``"antmaze"``; fitted to the dataset where it needs statistics and applied to all rewards that are learned from. A
        ``VecNormalize`` must then leave rewards alone (``norm_reward=False``)
    :param normalize_observations: normalise vector observations by frozen statistics of the data, kept in the policy; None
        means yes, unless the environment is a ``VecNormalize`` that does it. Without data they stay as they are, unless an
        algorithm says otherwise: wrap the environment in ``VecNormalize``
    :param policy_kwargs: arguments of the policy
    :param compile: run the losses compiled by ``torch.compile``; ``"cuda_graphs"`` also replays them as CUDA graphs on a GPU
    :param precision: of losses and actions, ``"float32"`` or ``"bfloat16"`` (matrix products by autocast, weights in float32)
    :param stats_window_size: number of episodes that logged returns are averaged over
    :param tensorboard_log: folder of the TensorBoard log
    :param verbose: 0 silent, 1 information, 2 debug
    :param seed: seed of all random generators; None for a random one
    :param device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...
    """

    policy: DiffusionPolicy  # type: ignore[assignment]
    default_total_timesteps: int = 1_000_000
    """Length of a run that ``learn()`` is not told; a preset brings the published one."""
    buffer_class: ClassVar[type[EpisodeReplayBuffer]] = EpisodeReplayBuffer
    """Class of the buffer of logged data, and by default of that of online transitions."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Published settings by task, see [from_preset][sb3_diffusion.common.base_class.OfflineAlgorithm.from_preset]."""

    def __init__(
        self,
        policy: str | type[DiffusionPolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule,
        buffer_size: int = 1_000_000,
        learning_starts: int = 100,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        *,
        dataset: Any = None,
        offline_fraction: float = 0.5,
        n_pretrain_steps: int = 0,
        reward_transform: str | None = None,
        normalize_observations: bool | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        compile: bool | str = False,
        precision: str = "float32",
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
    ) -> None:
        check_integer("batch_size", batch_size, 1)
        check_integer("buffer_size", buffer_size, 1)
        check_integer("n_steps", n_steps, 1)
        check_range("gamma", gamma, 0.0, 1.0)
        check_range("tau", tau, 0.0, 1.0)
        check_range("offline_fraction", offline_fraction, 0.0, 1.0)
        check_integer("n_pretrain_steps", n_pretrain_steps, 0)
        check_integer("train_freq", train_freq[0] if isinstance(train_freq, tuple) else train_freq, 1)
        check_choice("reward_transform", reward_transform, (None, "normalize", "iql_locomotion", *REWARD_TRANSFORMS))
        if n_steps > 1 and gamma == 1.0 and reward_transform not in (None, "iql_locomotion"):
            raise ValueError(
                "Without discount, n-step returns do not tell of how many rewards they are: with `gamma=1.0`, set `n_steps=1` "
                f"or another `reward_transform` than {reward_transform!r}, which shifts rewards; got `n_steps={n_steps}`."
            )
        check_choice("compile", compile, COMPILE_CHOICES)
        check_choice("precision", precision, PRECISIONS)
        if policy_kwargs is not None and not isinstance(policy_kwargs, Mapping):
            raise TypeError(f"`policy_kwargs` must be a dict of arguments of the policy: got {policy_kwargs!r}.")
        if env is not None:
            env = made_env(env, verbose)
            check_action_space(type(self).__name__, env.action_space)
            if dataset is None:
                data = find_dataset(env)
            else:
                data = load_dataset_for(dataset, env.observation_space, env.action_space, time_limit(env))
        else:
            data = load_dataset(dataset) if dataset is not None else None
            env = _vec_env_of(data) if data is not None else None
        super().__init__(
            policy=policy,
            env=env,  # type: ignore[arg-type]
            learning_rate=learning_rate,
            buffer_size=buffer_size,
            learning_starts=learning_starts,
            batch_size=batch_size,
            tau=tau,
            gamma=gamma,
            train_freq=train_freq,
            gradient_steps=gradient_steps,
            action_noise=action_noise,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            n_steps=n_steps,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            support_multi_env=True,
            seed=seed,
            sde_support=False,
            supported_action_spaces=(spaces.Box,),
        )
        self.offline_fraction = offline_fraction
        self.n_pretrain_steps = n_pretrain_steps
        self.reward_transform = reward_transform
        self.compile = compile
        self.precision = precision
        self._compiler_failed = False  # tells of this machine, not of the model
        if normalize_observations is None:
            normalize_observations = not self._observations_come_normalized()
        self.normalize_observations = normalize_observations
        self.reward_scale, self.reward_shift = REWARD_TRANSFORMS.get(reward_transform or "", (1.0, 0.0))
        self.dataset: OfflineDataset | None = data
        self.dataset_buffer: EpisodeReplayBuffer | None = None
        self._offline = data is not None  # where batches come from
        self._online_start = 0  # num_timesteps at which the running online phase began
        self._rollout_steps = self._rollout_episodes = 0  # of a rollout that a callback stopped
        self._n_pretrain_updates = 0
        self._pretrain_timesteps = 0  # how many of num_timesteps were pretraining

    # ---------------------------------------------------------------- construction

    @classmethod
    def from_preset(
        cls: type[SelfOfflineAlgorithm],
        name: str,
        env: GymEnv | str | None = None,
        policy: str | type[DiffusionPolicy] = "MlpPolicy",
        **kwargs: Any,
    ) -> SelfOfflineAlgorithm:
        """
        Build a model with the published settings of a task.

        :param name: a key of ``presets``, such as ``"hopper-medium"``; a version suffix (``-v2``) is ignored
        :param env: as in the constructor
        :param policy: as in the constructor
        :param kwargs: further constructor arguments; they win over the preset's
        :return: the model
        :raises ValueError: if there is no such preset
        """
        settings = {**cls.preset(name), **kwargs}
        total_timesteps = settings.pop("default_total_timesteps", cls.default_total_timesteps)
        model = cls(policy, env, **settings)
        model.default_total_timesteps = total_timesteps
        return model

    @classmethod
    def preset(cls, name: str) -> Mapping[str, Any]:
        """
        Look up the published settings of a task.

        :param name: a key of ``presets``, such as ``"hopper-medium"``; a version suffix (``-v2``) is ignored
        :return: constructor arguments, and ``default_total_timesteps`` where the length of the runs was published
        :raises ValueError: if there is no such preset
        """
        stem, _, version = name.rpartition("-v")
        key = stem if version.isdigit() else name
        if key not in cls.presets:
            raise ValueError(f"{cls.__name__} has no preset {name!r}; there are: {', '.join(sorted(cls.presets)) or 'none'}.")
        return cls.presets[key]

    def _observations_come_normalized(self) -> bool:
        return self._vec_normalize_env is not None and self._vec_normalize_env.norm_obs

    def _check_single_normalization(self) -> None:
        if self.normalize_observations and self._observations_come_normalized():
            raise ValueError(
                "Observations would be normalised twice, by VecNormalize and by `normalize_observations=True`: "
                "set the latter to False, or build VecNormalize with norm_obs=False."
            )
        if self.reward_transform is not None and self._vec_normalize_env is not None and self._vec_normalize_env.norm_reward:
            raise ValueError(
                f'Rewards would be changed twice, by VecNormalize and by `reward_transform="{self.reward_transform}"`: set '
                "the latter to None, or build VecNormalize with norm_reward=False."
            )

    def set_env(self, env: GymEnv | str, force_reset: bool = True) -> None:
        super().set_env(env, force_reset)
        self._check_single_normalization()
        if self.dataset is None and (data := find_dataset(self.env)) is not None:
            self.set_dataset(data)

    def _setup_model(self) -> None:
        if not hasattr(self, "observation_space"):
            raise ValueError(
                f"{type(self).__name__} needs to know the spaces: pass an environment as `env`, or logged data as `dataset`."
            )
        self._check_single_normalization()
        if self.compile == "cuda_graphs" and self.device.type != "cuda":
            warnings.warn(
                f"There are no CUDA graphs on {self.device.type}: losses are compiled without them, as with `compile=True`.",
                stacklevel=3,
            )
        self._setup_lr_schedule()
        self.generator = th.Generator(device=self.device)
        self.acting_generator = th.Generator()
        self.set_random_seed(self.seed)
        if self.replay_buffer is None:
            self.replay_buffer = self._make_replay_buffer()
        check_arguments("policy_kwargs", self.policy_kwargs, self.policy_class)
        self.policy = self.policy_class(  # type: ignore[assignment]
            self.observation_space,
            self.action_space,
            self.lr_schedule,
            **{**self._policy_arguments(), **self.policy_kwargs},
        ).to(self.device)
        self.policy.set_generator(self.acting_generator)
        self._convert_train_freq()
        self._create_aliases()
        if self.dataset is not None:
            self.set_dataset(self.dataset)

    def _policy_arguments(self) -> dict[str, Any]:
        """:return: arguments of the policy that are arguments of the algorithm; ``policy_kwargs`` win over them"""
        return {}

    def _create_aliases(self) -> None:
        """Short names of the policy's networks on the algorithm."""

    def _make_replay_buffer(self) -> ReplayBuffer:
        buffer_class = self.replay_buffer_class = self.replay_buffer_class or self.buffer_class
        if issubclass(buffer_class, TrajectoryReplayBuffer) and not issubclass(self.buffer_class, TrajectoryReplayBuffer):
            raise ValueError(
                f"{type(self).__name__} learns from transitions: got `replay_buffer_class={buffer_class.__name__}`, which "
                f"samples windows; take {self.buffer_class.__name__}, or leave it out."
            )
        kwargs = dict(self.replay_buffer_kwargs)
        if issubclass(buffer_class, EpisodeReplayBuffer):
            kwargs = {**self._buffer_arguments(), **kwargs}
        elif self.n_steps > 1 and "n_steps" not in kwargs:
            raise ValueError(
                f"`n_steps={self.n_steps}` is for the default replay buffer; give {buffer_class.__name__} its own through "
                "`replay_buffer_kwargs`."
            )
        if issubclass(buffer_class, HerReplayBuffer):
            if self.env is None:
                raise ValueError("HerReplayBuffer computes rewards with the environment: pass `env`.")
            kwargs["env"] = self.env
        return buffer_class(
            self.buffer_size,
            self.observation_space,
            self.action_space,
            device=self.device,
            n_envs=self.n_envs,
            optimize_memory_usage=self.optimize_memory_usage,
            **kwargs,
        )

    def _buffer_arguments(self) -> dict[str, Any]:
        """:return: arguments of the buffers of logged data and of online transitions that follow from the algorithm's own"""
        return {"n_steps": self.n_steps, "gamma": self.gamma, "generator": self.generator}

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Seed Python, NumPy, torch, the spaces, the environment and the model's own generators.

        :param seed: None leaves all but the model's own generators as they are; these are then seeded from torch's
        """
        super().set_random_seed(seed)
        own_seed = int(th.randint(2**62, (1,)).item()) if seed is None else seed
        self.generator.manual_seed(own_seed)
        self.acting_generator.manual_seed(own_seed + 1)

    # What an update draws; where several processes train together, each keeps its rows of what all draw alike

    @th.compiler.disable
    def _draw_normal(self, *shape: int) -> th.Tensor:
        def draw(n: int) -> th.Tensor:
            return th.randn(n, *shape[1:], generator=self.generator, device=self.device)

        return own_rows(draw, shape[0])

    @th.compiler.disable
    def _draw_uniform(self, n: int) -> th.Tensor:
        return own_rows(lambda n: th.rand(n, generator=self.generator, device=self.device), n)

    @th.compiler.disable
    def _draw_integers(self, high: int, n: int) -> th.Tensor:
        return own_rows(lambda n: th.randint(high, (n,), generator=self.generator, device=self.device), n)

    # ---------------------------------------------------------------- data

    def set_dataset(self, dataset: Any) -> None:
        """
        Attach logged data, in place of any attached before.

        Frozen normalisation statistics and the ``reward_transform`` of a model without updates, and the statistics of a
        ``VecNormalize`` that has seen no step, are fitted to the data. A model without an environment gets that of the data.

        :param dataset: any source of [load_dataset][sb3_diffusion.load_dataset]; None detaches
        :raises ValueError: if its spaces do not match the model's
        """
        if dataset is None:
            self.dataset = self.dataset_buffer = None
            self._offline = False
            return
        data = load_dataset_for(dataset, self.observation_space, self.action_space, time_limit(self.env))
        data.check_spaces(self.observation_space, self.action_space)
        self.dataset_buffer = self.buffer_class.from_dataset(
            data, self.observation_space, self.action_space, device=self.device, **self._buffer_arguments()
        )
        self.dataset = data
        self._offline = True
        if self.env is None:
            self.set_env(_vec_env_of(data, self.n_envs))
        if self._vec_normalize_env is not None and is_unused(self._vec_normalize_env):
            fit_vec_normalize(self._vec_normalize_env, data)
        if self._n_updates == 0:
            self._fit_reward_transform(data)
            self._fit_statistics(data)

    def _fit_statistics(self, data: OfflineDataset) -> None:
        """Take the policy's frozen statistics from the data."""
        self.policy.fit_normalizer(data.observations)

    def _fit_to_first_transitions(self) -> None:
        """Before the first update of a model without data, take statistics from what the replay buffer holds."""
        if self._n_updates > 0 or self.dataset is not None:
            return
        assert self.replay_buffer is not None
        self._fit_to_buffer(self.replay_buffer)
        take_from_first(self.policy.buffers(), self.device)  # several processes have replay buffers of their own

    def _fit_to_buffer(self, buffer: Any) -> None:
        """Take statistics from all stored steps."""

    def _fit_reward_transform(self, data: OfflineDataset) -> None:
        if self.reward_transform == "normalize":
            std = float(data.rewards.std())
            self.reward_scale = 1.0 / std if std > 0.0 else 1.0
            self.reward_shift = -float(data.rewards.mean()) * self.reward_scale
        elif self.reward_transform == "iql_locomotion":
            spread = float(np.ptp(data.episode_returns))
            self.reward_scale = 1000.0 / spread if spread > 0.0 else 1.0

    def sample_batch(self, batch_size: int) -> Batch:
        """
        Transitions to learn from: of the dataset, of the replay buffer, or of both, depending on the phase.

        :param batch_size: number of transitions
        :return: SB3's samples, rewards transformed
        """
        batch = self._draw_batch(batch_size)
        if self.reward_scale == 1.0 and self.reward_shift == 0.0:
            return batch
        return batch._replace(rewards=self.reward_scale * batch.rewards + self.reward_shift * self._shifts(batch))

    def _shifts(self, batch: Batch) -> th.Tensor | float:
        r"""How often a shift counts in a return of $k$ steps, $\sum_{i<k} \gamma^i = (1 - \gamma^k) / (1 - \gamma)$."""
        if batch.discounts is None:
            return 1.0
        return (1.0 - batch.discounts) / (1.0 - self.gamma)

    def _draw_batch(self, batch_size: int) -> Batch:
        n_offline = 0
        if self.dataset_buffer is not None:
            from_dataset = self._offline or not self._buffer_holds(batch_size)
            n_offline = batch_size if from_dataset else round(self.offline_fraction * batch_size)
        sources = (self.dataset_buffer, n_offline), (self.replay_buffer, batch_size - n_offline)
        parts = [buffer.sample(n, env=self._vec_normalize_env) for buffer, n in sources if buffer is not None and n > 0]
        self._last_batch = parts[0] if len(parts) == 1 else self._joined(*parts)
        return self._last_batch

    def _joined(self, logged: Batch, own: Batch) -> Batch:
        """
        One batch of both. Of a replay buffer of another class it has the fields that logged data have too; where one part
        is of single steps and the other of n-step returns, each row keeps its discount.
        """
        if set(logged._fields) <= set(own._fields):
            own = type(logged)(**{name: getattr(own, name) for name in logged._fields})
        parts = [logged, own]
        single_steps = [getattr(part, "discounts", None) is None for part in parts]
        if any(single_steps) and not all(single_steps):
            i = single_steps.index(True)
            parts[i] = parts[i]._replace(discounts=th.full_like(parts[i].rewards, self.gamma))
        return concat_samples(*parts)

    def _buffer_holds(self, batch_size: int) -> bool:
        buffer = self.replay_buffer
        assert buffer is not None
        if isinstance(buffer, HerReplayBuffer) and not np.any(buffer.ep_length > 0):
            return False
        return buffer.full or buffer.size() * buffer.n_envs >= batch_size

    # ---------------------------------------------------------------- learning

    def learn(  # type: ignore[override]
        self: SelfOfflineAlgorithm,
        total_timesteps: int | None = None,
        callback: MaybeCallback = None,
        log_interval: int | None = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
        offline: bool | None = None,
    ) -> SelfOfflineAlgorithm:
        """
        Learn from the dataset, from the environment, or from both.

        :param total_timesteps: gradient steps offline, env steps online, where it is a lower bound; None means
            ``default_total_timesteps``, the length of the published runs
        :param callback: SB3 callback(s), called after each timestep (offline) or each step of the envs (online)
        :param log_interval: episodes between logs online; offline one unit stands for 1,000 gradient steps. None: no logs
        :param tb_log_name: name of the TensorBoard run; None means the name of the class
        :param reset_num_timesteps: count timesteps from 0; False goes on counting
        :param progress_bar: show a progress bar
        :param offline: learn from the dataset alone; None means exactly when one is attached
        :return: the model
        :raises ValueError: without data and environment
        """
        total_timesteps = self.default_total_timesteps if total_timesteps is None else total_timesteps
        tb_log_name = type(self).__name__ if tb_log_name is None else tb_log_name
        self._offline = self.dataset is not None if offline is None else offline
        if self._offline and self.dataset is None:
            raise ValueError("Learning offline needs data: pass `dataset` to the constructor or call `set_dataset()`.")
        if not self._offline and self.env is None:
            raise ValueError(
                "There is nothing to learn from: neither a dataset nor an environment. Pass `dataset` to the constructor "
                "or call `set_dataset()` to learn from logged data, `set_env()` to learn online."
            )
        if reset_num_timesteps:
            self._pretrain_timesteps = 0
        if n_processes() > 1:
            self._join_processes()
            progress_bar = progress_bar and process_rank() == 0
        if self._offline:
            self._learn_offline(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
        else:
            self._learn_online(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
        self._record_losses()
        return self

    def _join_processes(self) -> None:
        """Begin where the first of several processes is, which alone writes a log; each steps its own environments."""
        own_share(self.batch_size)
        states = {name: generator.get_state() for name, generator in self.generators().items()}
        take_from_first([*self.policy.state_dict().values(), *states.values()], self.device)
        for name, generator in self.generators().items():
            generator.set_state(states[name])
        if process_rank() > 0:
            self.set_logger(Logger(folder=None, output_formats=[]))
        if not self._offline:
            self._seed_apart()

    def _seed_apart(self) -> None:
        """Online, what the processes collect must differ, while what they draw for their updates must not."""
        if self.train_freq.unit == TrainFrequencyUnit.EPISODE:  # type: ignore[union-attr]
            raise ValueError("Several processes make their updates together: `train_freq` must count steps, not episodes.")
        seed = int(th.randint(2**31, (1,), generator=self.acting_generator).item()) + process_rank()
        self.acting_generator.manual_seed(seed)
        self.action_space.seed(seed)
        assert self.env is not None
        self.env.seed(seed + process_rank() * self.env.num_envs)

    def _learn_offline(
        self,
        total_timesteps: int,
        callback: MaybeCallback,
        log_interval: int | None,
        tb_log_name: str,
        reset_num_timesteps: bool,
        progress_bar: bool,
    ) -> None:
        goes_on = not reset_num_timesteps and 0 < self._total_timesteps <= self.num_timesteps  # after a call that was finished
        total_timesteps, callback = self._setup_learn_offline(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        if goes_on:
            self._warn_of_ended_schedule()
        self._online_start = -1  # the next online phase is a new one
        # What callbacks look for in the locals of a rollout; no environment is stepped, so that nothing ever ends
        n_envs = self.n_envs
        dones = np.zeros(n_envs, dtype=bool)
        rewards = np.zeros(n_envs, dtype=np.float32)
        infos: list[dict[str, Any]] = [{} for _ in range(n_envs)]
        new_obs = self._placeholder_observations()
        log_every = None if log_interval is None else log_interval * OFFLINE_STEPS_PER_LOG_UNIT

        callback.on_training_start(locals(), globals())
        callback.on_rollout_start()
        while self.num_timesteps < total_timesteps:
            self.train(gradient_steps=1, batch_size=own_share(self.batch_size))
            self.num_timesteps += 1
            self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
            callback.update_locals(locals())
            if not callback.on_step():
                break
            if log_every is not None and self.num_timesteps % log_every == 0:
                self.dump_logs()
        else:
            callback.on_rollout_end()
        callback.on_training_end()

    def _learn_online(
        self,
        total_timesteps: int,
        callback: MaybeCallback,
        log_interval: int | None,
        tb_log_name: str,
        reset_num_timesteps: bool,
        progress_bar: bool,
    ) -> None:
        assert self.env is not None
        if any(isinstance(env, SpacesEnv) for env in self._unwrapped_envs()):
            raise ValueError(
                "Learning online needs an environment to step, and the dataset names none: pass `env` to the constructor "
                "or call `set_env()`."
            )
        env_is_reset = reset_num_timesteps or self._last_obs is None
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        if env_is_reset and isinstance(self.replay_buffer, EpisodeReplayBuffer):
            self.replay_buffer.truncate_last_trajectory()
        if reset_num_timesteps or self._online_start < 0:
            self._rollout_steps = self._rollout_episodes = 0
            self._online_start = self.num_timesteps
            self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
            self._warn_of_ended_schedule()
        callback.on_training_start(locals(), globals())
        while self.num_timesteps < total_timesteps:
            first_update = self._online_start + self.learning_starts
            try:
                rollout = self.collect_rollouts(
                    self.env,
                    train_freq=self._rest_of_rollout(),
                    action_noise=self.action_noise,
                    callback=callback,
                    learning_starts=first_update if self._n_updates == 0 else 0,
                    replay_buffer=self.replay_buffer,  # type: ignore[arg-type]
                    log_interval=log_interval,
                )
            except BaseException:
                self._last_obs = None  # nobody knows where the environment stands: what goes on later resets it
                raise
            if not rollout.continue_training and not self._finish_step(callback.locals):
                break
            n_collected = rollout.episode_timesteps + self._rollout_steps * self.n_envs
            self._rollout_steps = self._rollout_episodes = 0
            n_updates = self.gradient_steps if self.gradient_steps >= 0 else n_collected
            if n_updates > 0 and self.num_timesteps > first_update:
                self.train(gradient_steps=n_updates, batch_size=own_share(self.batch_size))
            if not rollout.continue_training:
                break
        callback.on_training_end()

    def _warn_of_ended_schedule(self) -> None:
        if self.lr_schedule(self._current_progress_remaining) == 0.0:
            warnings.warn(
                "This phase begins where the schedule of the learning rate has already come to 0, so that it would learn "
                "nothing: leave `reset_num_timesteps` at True to begin the schedule anew.",
                stacklevel=4,
            )

    def _finish_step(self, rollout: dict[str, Any]) -> bool:
        """
        SB3 leaves a rollout that a callback stops before it stores the step that was just made. Store it, so that what goes
        on later begins where the environment stands.

        :param rollout: what the callback was told of it
        :return: whether the rollout had come to its end with this step, and its updates are due
        """
        infos, dones = rollout["infos"], rollout["dones"]
        self._update_info_buffer(infos, dones)
        self._store_transition(
            rollout["replay_buffer"], rollout["buffer_actions"], rollout["new_obs"], rollout["rewards"], dones, infos
        )
        self._update_current_progress_remaining(self.num_timesteps, self._total_timesteps)
        ended = np.flatnonzero(dones)
        self._episode_num += len(ended)
        if self.action_noise is not None and len(ended):
            self.action_noise.reset(**({"indices": ended} if self.n_envs > 1 else {}))
        n_steps, n_episodes = rollout["num_collected_steps"], rollout["num_collected_episodes"] + len(ended)
        if not should_collect_more_steps(rollout["train_freq"], n_steps, n_episodes):
            return True
        self._rollout_steps += n_steps
        self._rollout_episodes += n_episodes
        return False

    def _rest_of_rollout(self) -> TrainFreq:
        """What is left to collect before the next updates, where a callback stopped the rollout that goes on now."""
        assert isinstance(self.train_freq, TrainFreq)
        in_steps = self.train_freq.unit == TrainFrequencyUnit.STEP
        done = self._rollout_steps if in_steps else self._rollout_episodes
        return self.train_freq._replace(frequency=max(1, self.train_freq.frequency - done))

    def _setup_learn_offline(
        self,
        total_timesteps: int,
        callback: MaybeCallback,
        reset_num_timesteps: bool,
        tb_log_name: str,
        progress_bar: bool,
    ) -> tuple[int, BaseCallback]:
        """What ``_setup_learn`` does, without touching the environment."""
        self.start_time = time.time_ns()
        if self.ep_info_buffer is None or reset_num_timesteps:
            self.ep_info_buffer = deque(maxlen=self._stats_window_size)
            self.ep_success_buffer = deque(maxlen=self._stats_window_size)
        if reset_num_timesteps:
            self.num_timesteps = 0
            self._episode_num = 0
        else:
            total_timesteps += self.num_timesteps
        self._total_timesteps = total_timesteps
        self._num_timesteps_at_start = self.num_timesteps
        self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
        if not self._custom_logger:
            self._logger = configure_logger(self.verbose, self.tensorboard_log, tb_log_name, reset_num_timesteps)
        return total_timesteps, self._init_callback(callback, progress_bar)

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        callback = _counting_timesteps(callback)
        if progress_bar:
            given = CallbackList(callback) if isinstance(callback, list) else callback
            callback = [given if isinstance(given, BaseCallback) else ConvertCallback(given), TimestepProgressBar()]
        return super()._init_callback(callback)

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        """Progress of the main phase: learning-rate schedules stand still during pretraining."""
        to_come = self.n_pretrain_steps - self._n_pretrain_updates if self._offline else 0
        pretraining = self._pretrain_timesteps + max(0, to_come)
        main = max(1, total_timesteps - pretraining)
        self._current_progress_remaining = min(1.0, 1.0 - (num_timesteps - pretraining) / main)

    @property
    def pretraining(self) -> bool:
        """Whether the next update belongs to the pretraining phase, which only happens offline."""
        return self._offline and self._n_pretrain_updates < self.n_pretrain_steps

    def _count_pretraining_step(self) -> None:
        self._n_pretrain_updates += 1
        self._pretrain_timesteps += 1

    def _placeholder_observations(self) -> np.ndarray | dict[str, np.ndarray]:
        space = self.observation_space
        if isinstance(space, spaces.Dict):
            return {k: np.zeros((self.n_envs, *(s.shape or ())), s.dtype) for k, s in space.spaces.items()}
        return np.zeros((self.n_envs, *(space.shape or ())), space.dtype)

    def _unwrapped_envs(self) -> list[gym.Env]:
        """The innermost environments, where they live in this process."""
        env: Any = self.env
        while hasattr(env, "venv"):
            env = env.venv
        return [e.unwrapped for e in getattr(env, "envs", [])]

    # ---------------------------------------------------------------- acting

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        Act as the policy does, in the model's ``precision``.

        :param observation: one observation, shape ``obs_shape``, or a batch, ``(n, *obs_shape)``; a dict of such arrays for
            ``Dict`` observations
        :param state: what the last call returned, of policies that have a state
        :param episode_start: which rows begin an episode, shape ``(n,)``
        :param deterministic: draw nothing at random
        :return: actions in env units, shape ``(action_dim,)`` or ``(n, action_dim)``, and the next state
        """
        with autocast(self.precision, self.device):
            return super().predict(observation, state, episode_start, deterministic)

    # ---------------------------------------------------------------- files

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "dataset", "dataset_buffer", "_compiler_failed"]
