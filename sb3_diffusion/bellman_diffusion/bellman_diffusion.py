"""Bellman diffusion."""

from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, PolicyPredictor, PyTorchObs, Schedule

from sb3_diffusion.bellman_diffusion.policies import (
    BellmanDiffusionPolicy,
    CnnPolicy,
    GaussianActor,
    MeasureNetwork,
    MlpPolicy,
    MultiInputPolicy,
    RewardFunction,
    as_arrays,
    call_reward_fn,
    fit_scale,
)
from sb3_diffusion.buffers import EpisodeReplayBuffer, FutureStateReplayBuffer
from sb3_diffusion.buffers.samples import FutureStateSamples
from sb3_diffusion.common.base_class import OfflineAlgorithm
from sb3_diffusion.common.policies import take_rows
from sb3_diffusion.common.schedules import log_logistic_sigmas
from sb3_diffusion.common.utils import check_choice, check_range, minimize, warmed_up_decay
from sb3_diffusion.datasets import OfflineDataset

MIN_ADVANTAGE_SCALE = 1e-3
"""Smallest number that advantages are divided by."""


class Chain(NamedTuple):
    """
    Futures of next observations, drawn from the target.

    :ivar rows: of the batch, one per chain, shape ``(n_chains,)``
    :ivar condition: of the target, one per chain, shape ``(n_chains, condition_dim)``
    :ivar noisy: states at some levels of each chain, shape ``(n_levels * n_chains, dim)``
    :ivar levels: these levels, shape ``(n_levels * n_chains,)``
    :ivar clean: where the chains end, shape ``(n_chains, dim)``
    """

    rows: th.Tensor
    condition: th.Tensor
    noisy: th.Tensor
    levels: th.Tensor
    clean: th.Tensor


class BellmanDiffusion(OfflineAlgorithm):
    r"""
    Bellman diffusion: the successor measure of a policy as a diffusion model, which values any reward after training.

    Paper: https://arxiv.org/abs/2407.12163v1 (Schramm, Boularias, 2024); authors' code:
    schrammlb2/Bellman-Diffusion-Offline-RL. The measure
    $d(x | s, a) = (1 - \gamma) \sum_{k \ge 1} \gamma^{k-1} P(s_{t+k} = x)$ obeys a Bellman equation,
    $d(\cdot | s, a) = (1 - \gamma) P(\cdot | s, a) + \gamma E[d(\cdot | s', a')]$, and so do its noisy versions; a diffusion
    model learns them from single transitions. Values are means of rewards over its samples.

    Departures, and why:

    * The noisy states of the bootstrapped loss come from the target's reverse chain, stopped at their level, as in TD$^2$
      (arXiv 2503.09817); in the paper they are noised states of the log (``scheme="logged"``), which is right for the policy
      of the log alone, in the code noised samples of the target (``"renoised"``).
    * What is printed in the paper is read as follows. Both losses train the network at $(s, a)$, not at the next pair,
      where it would collapse to the present state; noise has the scales $\sqrt{\bar\alpha_i}$ and
      $\sqrt{1 - \bar\alpha_i}$; branches are told apart by the offset, not by comparing states; the next action is the one
      that the future was drawn with; the remaining steps of the next state are $n - 1$; values are divided by
      $1 - \gamma$, or multiplied by $n$.
    * The level weights are uniform; ``level_weighting="ddpm"`` has those of the bound on the likelihood. The printed ones
      have a factor in the numerator that belongs in the denominator.
    * States carry an "alive" flag: after a termination comes the last state, no longer alive, and earns nothing. Paper and
      code have no episode ends.
    * The network tells $v$ on a cosine schedule, and the chain is run by DDIM. The code has ten steps and follows their means
      alone, which gives a conditional mean rather than a sample.
    * The target's average follows by ``tau=0.05`` (code: 0.005 every second step): a bootstrapped measure settles no faster
      than its target.
    * The agent is ours; version 1 has none. A value is distilled from single futures of the chains that the measure's loss
      runs anyway, and an actor from it by advantage-weighted regression (arXiv 1910.00177). Candidates of a diffusion
      model of the data's actions, ranked by the measure itself, act for any reward at once.
    * The penalty on a ReBRAC critic of the paper's version 2 is not there.

    :param policy: ``"MlpPolicy"``, ``"MultiInputPolicy"`` or a policy class
    :param env: Gymnasium env, VecEnv, id or None; with None it comes from the dataset
    :param learning_rate: a float or a function of the remaining progress
    :param buffer_size: capacity of the replay buffer of online transitions
    :param learning_starts: env steps before the first online update
    :param batch_size: transitions per update
    :param tau: Polyak coefficient of the target measure
    :param gamma: discount of measure and values, below 1
    :param train_freq: env steps (or ``(n, "episode")``) between updates online
    :param gradient_steps: updates after each rollout online; -1 for as many as env steps
    :param action_noise: noise added to the actions when exploring
    :param replay_buffer_class: class of the replay buffer of online transitions, a ``FutureStateReplayBuffer``
    :param replay_buffer_kwargs: its further arguments
    :param optimize_memory_usage: must be False
    :param dataset: logged data, see [load_dataset][sb3_diffusion.load_dataset]
    :param offline_fraction: share of each batch that comes from the dataset while fine-tuning, in [0, 1]
    :param n_pretrain_steps: gradient steps in which the actor imitates the data before it follows the value, offline
    :param horizon: None learns the discounted measure; a number learns that of Algorithm 1, uniform over the states that
        remain, told how many, from logged futures. Values are then sums over ``horizon`` steps without discount
    :param measured_policy: whose futures: ``"data"`` takes the logged next actions, the policy that made the data;
        ``"actor"`` those of the distilled actor, which improves while it learns (policy iteration)
    :param scheme: where the noisy states of the bootstrapped loss come from: ``"stopped"``, the target's reverse chain;
        ``"renoised"``, its samples, noised again; ``"logged"``, states of the log (needs ``measured_policy="data"``). None is
        ``"stopped"``, or ``"logged"`` with a ``horizon``
    :param n_chain_levels: levels learned from along each chain; ``batch_size / n_chain_levels`` chains are run per update
    :param n_diffusion_steps: length of the chain
    :param noise_schedule: ``"cosine"``, ``"linear"`` or ``"vp"``
    :param prediction_type: what the measure's network tells, ``"v"``, ``"noise"`` or ``"sample"``
    :param sampler: ``"ddim"``, ``"dpm_solver"`` or ``"heun"``
    :param n_sampling_steps: steps of the sampler, at most ``n_diffusion_steps``; None for all. Only its levels are trained
    :param level_weighting: ``"uniform"`` or ``"ddpm"``
    :param alive_flag: model whether the episode still runs; without it a terminal state counts for ever
    :param reward_fn: rewards of states that are reached, vectorised, see `set_reward_fn`; None for a reward model that is
        learned from the logged rewards
    :param n_action_samples: 1 acts with the distilled actor; above, the best of so many candidates under the measure
    :param n_future_samples: futures per candidate
    :param train_agent: learn behaviour, value and actor; False learns the measure and the rewards alone
    :param temperature: of the weights of the actor's regression, relative to the spread of advantages
    :param max_weight: largest weight of the actor's regression
    :param max_grad_norm: largest norm of the gradient of each network; None for no bound
    :param normalize_observations: normalise vector observations by frozen statistics of the data, kept in the policy; None
        means yes, unless the environment is a ``VecNormalize`` that does it. Modelled states are normalised in any case
    :param stats_window_size: number of episodes that logged returns are averaged over
    :param tensorboard_log: folder of the TensorBoard log
    :param policy_kwargs: arguments of
        [BellmanDiffusionPolicy][sb3_diffusion.bellman_diffusion.policies.BellmanDiffusionPolicy]
    :param verbose: 0 silent, 1 information, 2 debug
    :param seed: seed of all random generators; None for a random one
    :param device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...
    :param _init_setup_model: build the networks now
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    buffer_class: ClassVar[type[EpisodeReplayBuffer]] = FutureStateReplayBuffer
    default_total_timesteps = 1_000_000
    policy: BellmanDiffusionPolicy
    actor: GaussianActor
    measure: MeasureNetwork  # f_theta; its average is f_theta-bar

    def __init__(
        self,
        policy: str | type[BellmanDiffusionPolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int = 100,
        batch_size: int = 256,
        tau: float = 0.05,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        *,
        dataset: Any = None,
        offline_fraction: float = 0.5,
        n_pretrain_steps: int = 0,
        horizon: int | None = None,
        measured_policy: str = "data",
        scheme: str | None = None,
        n_chain_levels: int = 4,
        n_diffusion_steps: int = 20,
        noise_schedule: str = "cosine",
        prediction_type: str = "v",
        sampler: str = "ddim",
        n_sampling_steps: int | None = None,
        level_weighting: str = "uniform",
        alive_flag: bool = True,
        reward_fn: RewardFunction | None = None,
        n_action_samples: int = 1,
        n_future_samples: int = 32,
        train_agent: bool = True,
        temperature: float = 0.3,
        max_weight: float = 100.0,
        max_grad_norm: float | None = None,
        normalize_observations: bool | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        if scheme is None:
            scheme = "stopped" if horizon is None else "logged"
        check_choice("measured_policy", measured_policy, ("data", "actor"))
        check_choice("scheme", scheme, ("stopped", "renoised", "logged"))
        check_range("n_chain_levels", n_chain_levels, 1)
        check_range("n_diffusion_steps", n_diffusion_steps, 1)
        check_range("n_action_samples", n_action_samples, 1)
        check_range("n_future_samples", n_future_samples, 1)
        if not 0.0 <= gamma < 1.0:
            raise ValueError(
                f"`gamma` must lie in [0, 1): got {gamma}; for sums without discount set `horizon` to a number of steps."
            )
        if horizon is not None and horizon < 1:
            raise ValueError(f"`horizon` must be at least 1, or None for the discounted measure: got {horizon}.")
        if horizon is not None and scheme != "logged":
            raise ValueError(f'A finite `horizon` learns from logged futures: set `scheme="logged"` or None, got {scheme!r}.')
        if scheme == "logged" and measured_policy != "data":
            raise ValueError(
                f'Logged futures are those of the policy that made the data: set `measured_policy="data"`, or another '
                f"`scheme` for {measured_policy!r}."
            )
        for name, value in (("temperature", temperature), ("max_weight", max_weight), ("max_grad_norm", max_grad_norm)):
            if value is not None and not value > 0.0:
                raise ValueError(f"`{name}` must be positive: got {value}.")
        if replay_buffer_class is not None and not issubclass(replay_buffer_class, FutureStateReplayBuffer):
            raise ValueError(
                f"BellmanDiffusion needs the next action and later states of each step: `replay_buffer_class` must be a "
                f"FutureStateReplayBuffer, got {replay_buffer_class.__name__}. Any goal can be set as a reward after training."
            )
        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
            tau,
            gamma,
            train_freq,
            gradient_steps,
            action_noise,
            replay_buffer_class,
            replay_buffer_kwargs,
            optimize_memory_usage,
            dataset=dataset,
            offline_fraction=offline_fraction,
            n_pretrain_steps=n_pretrain_steps,
            normalize_observations=normalize_observations,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            seed=seed,
            device=device,
        )
        self.horizon = horizon
        self.measured_policy = measured_policy
        self.scheme = scheme
        self.n_chain_levels = n_chain_levels
        self.n_diffusion_steps = n_diffusion_steps
        self.noise_schedule = noise_schedule
        self.prediction_type = prediction_type
        self.sampler = sampler
        self.n_sampling_steps = n_sampling_steps
        self.level_weighting = level_weighting
        self.alive_flag = alive_flag
        self.reward_fn = reward_fn
        self.n_action_samples = n_action_samples
        self.n_future_samples = n_future_samples
        self.train_agent = train_agent
        self.temperature = temperature
        self.max_weight = max_weight
        self.max_grad_norm = max_grad_norm
        if _init_setup_model:
            self._setup_model()

    # ---------------------------------------------------------------- construction

    def _policy_arguments(self) -> dict[str, Any]:
        return dict(
            noise_schedule=self.noise_schedule,
            n_diffusion_steps=self.n_diffusion_steps,
            prediction_type=self.prediction_type,
            sampler=self.sampler,
            n_sampling_steps=self.n_sampling_steps,
            level_weighting=self.level_weighting,
            alive_flag=self.alive_flag,
            horizon=self.horizon,
            gamma=self.gamma,
            rewards_of=self.measured_policy,
            reward_fn=self.reward_fn,
            n_action_samples=self.n_action_samples,
            n_future_samples=self.n_future_samples,
            normalize_observations=self.normalize_observations,
        )

    def _create_aliases(self) -> None:
        self.actor = self.policy.actor
        self.measure = self.policy.measure

    def _buffer_arguments(self) -> dict[str, Any]:
        distribution = "geometric" if self.horizon is None else "uniform"
        return dict(gamma=self.gamma, generator=self.generator, offset_distribution=distribution)

    def set_reward_fn(self, reward_fn: RewardFunction | None, n_action_samples: int = 32) -> None:
        """
        Change the rewards of a model, trained or not; the measure stays as it is and needs no training.

        Value and actor of a trained model are still those of the old rewards. It therefore acts with the best of several
        candidates from now on; further training distils value and actor anew, and ``set_acting(1)`` goes back to the actor.

        ```python
        model.set_reward_fn(lambda states: -np.linalg.norm(states[:, :2] - goal, axis=1))
        ```

        :param reward_fn: ``reward_fn(states) -> rewards``, from ``(n, *obs_shape)`` (a dict of such arrays for ``Dict``
            observations), as the environment gives them, to ``(n,)``: the reward for reaching each state. None goes back to
            the learned rewards
        :param n_action_samples: candidates that a trained model chooses from
        """
        self.reward_fn = self.policy.reward_fn = reward_fn
        if self.dataset_buffer is not None:
            self._fit_value_scale(self.dataset_buffer)
        if self._n_updates > 0:
            self.set_acting(n_action_samples)

    def set_acting(self, n_action_samples: int, n_future_samples: int | None = None) -> None:
        """
        Choose how the model acts from now on; a saved model remembers it.

        :param n_action_samples: 1 for the distilled actor; above, the best of so many candidates
        :param n_future_samples: futures per candidate; None leaves it as it is
        """
        n_future_samples = self.n_future_samples if n_future_samples is None else n_future_samples
        check_range("n_action_samples", n_action_samples, 1)
        check_range("n_future_samples", n_future_samples, 1)
        self.n_action_samples = self.policy.n_action_samples = n_action_samples
        self.n_future_samples = self.policy.n_future_samples = n_future_samples

    def set_measured_policy(self, policy: str | PolicyPredictor) -> None:
        """
        Choose whose futures are learned from now on; rewards of future states are then those of its actions.

        :param policy: ``"data"``, ``"actor"``, or anything with SB3's ``predict``: a policy to evaluate from logged data. Its
            actions are drawn with ``deterministic=False``; it is no part of a saved model, give it again after loading
        :raises ValueError: for another policy than that of the data if the model learns from logged futures
        """
        if self.scheme == "logged" and policy != "data":
            raise ValueError(
                'Logged futures are those of the policy that made the data: build the model with `scheme="stopped"`.'
            )
        if isinstance(policy, str):
            check_choice("policy", policy, ("data", "actor"))
            self.measured_policy = self.policy.rewards_of = policy
            self.policy.measured_actions = None
        else:
            self.policy.measured_actions = lambda observations: self._predicted_actions(policy, observations)

    def _predicted_actions(self, policy: PolicyPredictor, observations: PyTorchObs) -> th.Tensor:
        """Actions of a policy of SB3 in [-1, 1], shape ``(batch_size, action_dim)``."""
        actions, _ = policy.predict(as_arrays(observations))
        return self._scaled(actions)

    def _scaled(self, actions: np.ndarray) -> th.Tensor:
        scaled = self.policy.scale_action(actions).reshape(len(actions), -1)
        return th.as_tensor(scaled, dtype=th.float32, device=self.device)

    # ---------------------------------------------------------------- data

    def _fit_statistics(self, data: OfflineDataset) -> None:
        super()._fit_statistics(data)
        assert self.dataset_buffer is not None
        self._fit_to_buffer(self.dataset_buffer)

    def _fit_to_buffer(self, buffer: EpisodeReplayBuffer) -> None:
        """Take the frozen statistics of modelled states and rewards from all stored steps."""
        index = th.arange(buffer.size() * buffer.n_envs, device=buffer.device)
        rewards = buffer.gather("rewards", index, self._vec_normalize_env)
        assert isinstance(rewards, th.Tensor)
        self.policy.fit_states(buffer.gather("next_observations", index, self._vec_normalize_env))
        fit_scale(self.policy.reward_model, rewards)
        self._fit_value_scale(buffer)

    def _fit_value_scale(self, buffer: EpisodeReplayBuffer) -> None:
        """Take the scale of values per step from the rewards of all stored steps."""
        index = th.arange(buffer.size() * buffer.n_envs, device=buffer.device)
        if self.reward_fn is None:
            rewards = buffer.gather("rewards", index, self._vec_normalize_env)
            assert isinstance(rewards, th.Tensor)
        else:
            rewards = call_reward_fn(self.reward_fn, buffer.gather("next_observations", index, self._vec_normalize_env))
        fit_scale(self.policy.value, rewards)

    def sample_batch(self, batch_size: int) -> FutureStateSamples:  # type: ignore[override]
        """
        Transitions to learn from: of the dataset, of the replay buffer, or of both, depending on the phase.

        :param batch_size: number of transitions
        :return: transitions, each with a state of its future
        """
        return self._draw_batch(batch_size)  # type: ignore[return-value]

    # ---------------------------------------------------------------- learning

    def train(self, gradient_steps: int, batch_size: int | None = None) -> None:
        """
        Train the measure, the rewards, and what is distilled from them.

        :param gradient_steps: number of updates
        :param batch_size: transitions per update; None for the model's ``batch_size``
        """
        batch_size = self.batch_size if batch_size is None else batch_size
        if self._n_updates == 0 and self.dataset is None:
            assert isinstance(self.replay_buffer, FutureStateReplayBuffer)
            self._fit_to_buffer(self.replay_buffer)
        self.policy.set_training_mode(True)
        self._update_learning_rate([network.optimizer for network in self.policy.trained_networks.values()])
        for _ in range(gradient_steps):
            batch = self.sample_batch(batch_size)
            if self.scheme == "logged":
                futures = self._logged_futures(batch)
                self._minimize("measure", self._logged_loss(batch, futures))
                rows, means = th.arange(len(futures), device=self.device), self._logged_means(futures)
            else:
                chain = self._draw_chain(batch)
                self._minimize("measure", self._measure_loss(batch, chain))
                rows, means = chain.rows, self._flow_means(batch, chain)
            self._minimize("reward_model", self._reward_loss(batch))
            if self.train_agent:
                self._minimize("behavior", self._behavior_loss(batch))
                self._minimize("value", self._value_loss(batch, rows, means))
                self._minimize("actor", self._actor_loss(batch))
            self.measure.update_average(warmed_up_decay(1.0 - self.tau, self._n_updates + 1))
            if self.pretraining:
                self._count_pretraining_step()
            self._n_updates += 1
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _minimize(self, name: str, loss: th.Tensor) -> None:
        optimizer = self.policy.trained_networks[name].optimizer
        self._add_loss(f"{name}_loss", minimize(optimizer, loss, self.max_grad_norm))

    def _draw_normal(self, *shape: int) -> th.Tensor:
        return th.randn(shape, generator=self.generator, device=self.device)

    def _draw_levels(self, *shape: int) -> th.Tensor:
        """Sampling levels with equal probability: the same law in both losses, or their shares would not be kept."""
        levels = self.measure.sampling_levels
        return levels[th.randint(len(levels), shape, generator=self.generator, device=self.device)]

    def _next_actions(self, batch: FutureStateSamples) -> th.Tensor:
        """$a'$: the measured policy's; of the data the logged action, or the actor's where the log has none."""
        if self.policy.measured_actions is not None:
            return self.policy.measured_actions(batch.next_observations)
        latents = self._draw_normal(len(batch.actions), *self.actor.latent_shape)
        with th.no_grad():
            acted = self.actor(batch.next_observations, latents)
        if self.measured_policy == "actor":
            return acted
        return th.where(batch.has_next_actions > 0.0, batch.next_actions, acted)

    # ---------------------------------------------------------------- the measure, from the target's chain

    @th.no_grad()
    def _draw_chain(self, batch: FutureStateSamples) -> Chain:
        r"""Draw futures of some $(s', a')$ from the target, and their noisy states $y$ at ``n_chain_levels`` levels each."""
        target, n_levels = self.measure.target, self.n_chain_levels
        n_chains = max(1, len(batch.actions) // n_levels)
        rows = th.randperm(len(batch.actions), generator=self.generator, device=self.device)[:n_chains]
        next_observations = take_rows(batch.next_observations, rows)
        condition = target.condition(next_observations, self._next_actions(batch)[rows])
        path, clean = target.run(condition, self._draw_normal(n_chains, target.coder.dim))
        stops = th.randint(len(path), (n_levels, n_chains), generator=self.generator, device=self.device)
        levels = target.sampling_levels[stops].flatten()
        if self.scheme == "stopped":
            noisy = path[stops, th.arange(n_chains, device=self.device)].flatten(0, 1)
        else:
            repeated = clean.repeat(n_levels, 1)
            noisy = target.denoiser.corrupt(repeated, self._draw_normal(*repeated.shape), levels)
        return Chain(rows, condition, noisy, levels, clean)

    def _measure_loss(self, batch: FutureStateSamples, chain: Chain) -> th.Tensor:
        r"""$(1 - \gamma) L_1 + \gamma L_2$: both branches of the Bellman equation in their shares (arXiv 2407.12163v1)."""
        n, dim = len(batch.actions), self.measure.coder.dim
        next_loss = self._next_state_loss(batch, self._draw_normal(n, dim), self._draw_levels(n))
        bootstrap_loss = self._bootstrap_loss(batch, chain, self._draw_normal(*chain.noisy.shape))
        return (1.0 - self.gamma) * next_loss + self.gamma * bootstrap_loss

    def _next_state_loss(self, batch: FutureStateSamples, noise: th.Tensor, levels: th.Tensor) -> th.Tensor:
        r"""$L_1 = E[\eta_i \|\epsilon - f_\theta(\sqrt{\bar\alpha_i} s' + \sqrt{1 - \bar\alpha_i} \epsilon, s, a, i)\|^2]$."""
        measure = self.measure
        condition = measure.condition(batch.observations, batch.actions)
        errors = measure.denoiser.loss(measure.coder(batch.next_observations), noise, levels, condition)
        return (measure.level_weights[levels] * errors.mean(dim=1)).mean()

    def _bootstrap_loss(self, batch: FutureStateSamples, chain: Chain, noise: th.Tensor) -> th.Tensor:
        r"""
        $L_2 = E[\eta_i \|f_{\bar\theta}(y, s', a', i) - f_\theta(y, s, a, i)\|^2]$ with $y$ of the same $(s', a')$; where the
        episode ended, $L_1$ towards its last state, no longer alive.
        """
        measure, target, n_levels = self.measure, self.measure.target, self.n_chain_levels
        observations = take_rows(batch.observations, chain.rows)
        condition = measure.condition(observations, batch.actions[chain.rows]).repeat(n_levels, 1)
        with th.no_grad():
            absorbed = measure.coder(take_rows(batch.next_observations, chain.rows), alive=0.0).repeat(n_levels, 1)
            ended = batch.dones[chain.rows].repeat(n_levels, 1) > 0.0
            noisy = th.where(ended, target.denoiser.corrupt(absorbed, noise, chain.levels), chain.noisy)
            told = target.denoiser.net(noisy, chain.condition.repeat(n_levels, 1), chain.levels)
            goals = th.where(ended, target.denoiser.target(absorbed, noise, chain.levels), told)
        errors = (measure.denoiser.net(noisy, condition, chain.levels) - goals).square()
        return (measure.level_weights[chain.levels] * errors.mean(dim=1)).mean()

    # ---------------------------------------------------------------- the measure, from logged futures

    @th.no_grad()
    def _logged_futures(self, batch: FutureStateSamples) -> th.Tensor:
        r"""
        The coded states $s_{t+k}$ of the log. Beyond a truncated end, which only happens with geometric offsets, they are
        drawn from the target at the last state, as these offsets have no memory.
        """
        target = self.measure.target
        futures = target.coder(batch.future_observations, alive=1.0 - batch.absorbed)
        if self.horizon is not None:
            return futures
        actions = self.actor(batch.future_observations, self._draw_normal(len(futures), *self.actor.latent_shape))
        condition = target.condition(batch.future_observations, actions)
        return th.where(batch.unknown > 0.0, target(condition, self._draw_normal(*futures.shape)), futures)

    def _logged_loss(self, batch: FutureStateSamples, futures: th.Tensor) -> th.Tensor:
        """Algorithm 1 of arXiv 2407.12163v1, with noise and levels drawn here."""
        return self._offset_loss(batch, futures, self._draw_normal(*futures.shape), self._draw_levels(len(futures)))

    def _offset_loss(self, batch: FutureStateSamples, futures: th.Tensor, noise: th.Tensor, levels: th.Tensor) -> th.Tensor:
        r"""
        At the noised future $x_i$ of offset $k$: $\eta_i \|\epsilon - f_\theta(x_i, s, a, i, n)\|^2$ for $k = 1$, and
        $\eta_i \|f_{\bar\theta}(x_i, s', a', i, n - 1) - f_\theta(x_i, s, a, i, n)\|^2$ above. The branches get their
        shares from the law of the offsets.
        """
        measure, target, steps = self.measure, self.measure.target, batch.steps_remaining
        condition = measure.condition(batch.observations, batch.actions, steps)
        with th.no_grad():
            noisy = measure.denoiser.corrupt(futures, noise, levels)
            next_condition = target.condition(batch.next_observations, self._next_actions(batch), steps - 1)
            told = target.denoiser.net(noisy, next_condition, levels)
            direct = (batch.offsets == 1) | (batch.dones > 0.0)
            goals = th.where(direct, target.denoiser.target(futures, noise, levels), told)
        errors = (measure.denoiser.net(noisy, condition, levels) - goals).square()
        return (measure.level_weights[levels] * errors.mean(dim=1)).mean()

    # ---------------------------------------------------------------- rewards and the agent

    def _reward_loss(self, batch: FutureStateSamples) -> th.Tensor:
        r"""$E[(\hat r(s, a) - r)^2] + E[(\bar r(s) - r)^2]$, and $\bar r = 0$ in terminal states, in units of their spread."""
        model, coder = self.policy.reward_model, self.measure.coder
        states = coder.standardized(coder(batch.observations))
        terminal = coder.standardized(coder(batch.next_observations))
        of_action = (model.of_action(states, batch.actions) - batch.rewards).square()
        of_state = (model(states) - batch.rewards).square() + batch.dones * model(terminal).square()
        return (of_action + of_state).mean() / model.std.square()

    def _behavior_loss(self, batch: FutureStateSamples) -> th.Tensor:
        r"""$E[w(\sigma) \|D(a + \sigma \epsilon, \sigma | s) - a\|^2]$ (arXiv 2206.00364, eq. 2)."""
        uniform = th.rand(len(batch.actions), generator=self.generator, device=self.device)
        noise, sigmas = self._draw_normal(*batch.actions.shape), log_logistic_sigmas(uniform)
        return self.policy.behavior.loss(batch.observations, batch.actions, noise, sigmas).mean()

    @th.no_grad()
    def _flow_means(self, batch: FutureStateSamples, chain: Chain) -> th.Tensor:
        r"""
        $(1 - \gamma) R(s') + \gamma R(x')$ with $x' \sim \bar d(\cdot | s', a')$: one sample of $E_{d(\cdot | s, a)}[R]$ per
        chain.
        """
        policy, rows = self.policy, chain.rows
        going_on = 1.0 - batch.dones[rows]
        next_states = self.measure.coder(take_rows(batch.next_observations, rows))
        next_rewards = policy.state_rewards(next_states, self.reward_fn)
        if self.reward_fn is None:  # no action is taken in a terminal state
            next_rewards = going_on * next_rewards
        later_rewards = going_on * policy.state_rewards(chain.clean, self.reward_fn)
        return (1.0 - self.gamma) * next_rewards + self.gamma * later_rewards

    @th.no_grad()
    def _logged_means(self, futures: th.Tensor) -> th.Tensor:
        r"""$R(s_{t+k})$: one sample of $E_{d(\cdot | s, a)}[R]$ per row."""
        return self.policy.state_rewards(futures, self.reward_fn)

    def _value_loss(self, batch: FutureStateSamples, rows: th.Tensor, means: th.Tensor) -> th.Tensor:
        r"""
        $E[(q(s, a) - q)^2] + E[(v(s) - q)^2]$, with $q$ the value per step that a sample of the measure gives, standardised.

        :param batch: transitions
        :param rows: which of them, shape ``(n,)``
        :param means: samples of the mean reward over the measure, shape ``(n, 1)``
        """
        value = self.policy.value
        mixture = self.policy.mixture(self.reward_fn is None, batch.steps_remaining[rows])
        targets = (mixture.first * batch.rewards[rows] + mixture.rest * means - value.mean) / value.std
        q, v = value(take_rows(batch.observations, rows), batch.actions[rows])
        return ((q - targets).square() + (v - targets).square()).mean()

    def _actor_loss(self, batch: FutureStateSamples) -> th.Tensor:
        r"""
        $-E[\min(e^{(q(s, a) - v(s)) / \lambda}, w_{max}) \log \pi(a | s)]$ (arXiv 1910.00177, algorithm 1), the weights
        divided by their mean; while pretraining they are all 1.
        """
        mean, log_std = self.actor.moments(batch.observations)
        nll = 0.5 * ((batch.actions - mean) / log_std.exp()).square() + log_std
        if self.pretraining:
            return nll.mean()
        with th.no_grad():
            q, v = self.policy.value(batch.observations, batch.actions)
            advantages = q - v
            scale = advantages.std(correction=0).clamp(min=MIN_ADVANTAGE_SCALE)
            weights = (advantages / (self.temperature * scale)).exp().clamp(max=self.max_weight)
        return (weights / weights.mean() * nll).mean()

    # ---------------------------------------------------------------- using the measure

    def _to_tensors(self, observations: Any, actions: Any) -> tuple[PyTorchObs, th.Tensor, bool]:
        """Observations and actions in [-1, 1] as batches, and whether they came as such."""
        self.policy.set_training_mode(False)
        tensors, vectorized = self.policy.obs_to_tensor(observations)
        n, shape = len(next(iter(tensors.values())) if isinstance(tensors, dict) else tensors), self.action_space.shape
        assert shape is not None
        actions = np.asarray(actions)
        try:
            actions = np.broadcast_to(actions, (n, *shape))
        except ValueError as error:
            raise ValueError(
                f"There must be one action of shape {shape} per observation, or one for all: got {actions.shape} for {n} "
                "observation(s)."
            ) from error
        return tensors, self._scaled(actions), vectorized

    @th.no_grad()
    def sample_future(self, observations: Any, actions: Any, n_samples: int = 64, seed: int | None = None) -> Any:
        r"""
        Draw states of the future from the measure, each a state $k \ge 1$ steps on, $k$ geometric (with ``horizon`` uniform).

        After a termination that is the last state. With a ``VecNormalize`` that normalises observations, states are in its
        units, as all that the model is given.

        :param observations: one observation or a batch of them
        :param actions: the actions taken there, in env units, or one for all
        :param n_samples: states per observation
        :param seed: of the random numbers of this call; None goes on with the model's own
        :return: shape ``(batch_size, n_samples, *obs_shape)``, a dict of such arrays for ``Dict`` observations; without the
            axis of the batch for a single observation
        """
        check_range("n_samples", n_samples, 1)
        tensors, scaled, vectorized = self._to_tensors(observations, actions)
        generator = self.acting_generator if seed is None else th.Generator().manual_seed(seed)
        noise = th.randn(len(scaled), n_samples, self.measure.coder.dim, generator=generator).to(self.device)
        states = self.measure.coder.decode(self.policy.futures(tensors, scaled, noise))

        def rows(values: th.Tensor) -> np.ndarray:
            array = values.reshape(len(scaled), n_samples, *values.shape[1:]).cpu().numpy()
            return array if vectorized else array[0]

        return {key: rows(values) for key, values in states.items()} if isinstance(states, dict) else rows(states)

    @th.no_grad()
    def value(
        self, observations: Any, actions: Any, reward_fn: RewardFunction | None = None, n_samples: int = 256
    ) -> np.ndarray:
        r"""
        Values of actions, $\frac{1}{1 - \gamma} E_d[R]$ (with ``horizon`` $n E_{d_n}[R]$), or with learned rewards
        $r(s, a) + \frac{\gamma}{1 - \gamma} E_d[\bar r]$. States after a termination earn nothing.

        All rows and calls draw futures from the same noises: values of several actions differ by the actions alone.

        :param observations: one observation or a batch of them
        :param actions: the actions taken there, in env units, or one for all
        :param reward_fn: rewards of reached states as in `set_reward_fn`; None for the model's
        :param n_samples: futures per observation
        :return: shape ``(batch_size,)``; a single number for a single observation
        """
        check_range("n_samples", n_samples, 1)
        tensors, scaled, vectorized = self._to_tensors(observations, actions)
        reward_fn = self.reward_fn if reward_fn is None else reward_fn
        values = self.policy.values(tensors, scaled, self.policy.shared_noise(n_samples), reward_fn).cpu().numpy()
        return values if vectorized else values[0]

    @th.no_grad()
    def start_values(self, n_samples: int = 256) -> np.ndarray:
        """
        Values of the measured policy where the logged episodes start: an estimate of its return without acting.

        Their mean and [bootstrap_interval][sb3_diffusion.evaluation.bootstrap_interval] tell how the value varies with the
        start; errors of the measure and of the learned rewards come on top.

        ```python
        model.set_measured_policy(SAC.load("candidate"))
        model.learn(50_000)
        values = model.start_values()
        low, high = bootstrap_interval(values, statistic="mean")
        ```

        :param n_samples: futures per start
        :return: shape ``(n_episodes,)``
        :raises RuntimeError: without a dataset
        """
        if self.dataset is None or self.dataset_buffer is None:
            raise RuntimeError("Values at the starts of episodes need logged data: call `set_dataset()` first.")
        self.policy.set_training_mode(False)
        buffer, index = self.dataset_buffer, th.as_tensor(self.dataset.episode_starts, device=self.device)
        observations = buffer.gather("observations", index, self._vec_normalize_env)
        actions = buffer.gather("actions", index)
        assert isinstance(actions, th.Tensor)
        if self.policy.measured_actions is not None:
            actions = self.policy.measured_actions(observations)
        elif self.measured_policy == "actor":
            actions = self.actor.act(observations, self.actor.latents(len(actions), deterministic=True))
        noise = self.policy.shared_noise(n_samples)
        return self.policy.values(observations, actions, noise, self.reward_fn).cpu().numpy()

    # ---------------------------------------------------------------- files

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "actor", "measure"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", *[f"policy.{name}.optimizer" for name in self.policy.trained_networks]], []
