"""Bellman diffusion."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from sb3_diffusion.bellman_diffusion.measure import Chain, MeasureAlgorithm
from sb3_diffusion.bellman_diffusion.networks import fit_scale
from sb3_diffusion.bellman_diffusion.policies import (
    BellmanDiffusionPolicy,
    CnnPolicy,
    MlpPolicy,
    MultiInputPolicy,
    RewardFunction,
    call_reward_fn,
    check_reward_fn,
)
from sb3_diffusion.bellman_diffusion.presets import PRESETS
from sb3_diffusion.buffers import EpisodeReplayBuffer, FutureStateReplayBuffer
from sb3_diffusion.buffers.samples import FutureStateSamples
from sb3_diffusion.common.compilation import accelerated, accelerated_actor_loss
from sb3_diffusion.common.distributed import average, standard_deviation
from sb3_diffusion.common.observations import take_rows
from sb3_diffusion.common.schedules import log_logistic_sigmas
from sb3_diffusion.common.utils import MIN_SCALE, check_choice, check_integer, check_range, warmed_up_decay


class BellmanDiffusion(MeasureAlgorithm):
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
    * The network has layer normalisation. Without it the losses hardly see states that are narrow beside the spread of all
      states, and the bootstrap keeps the blur that the network starts with.
    * ``n_steps`` takes the first states from the log, as n-step targets do (arXiv 2402.08530).
    * The target's average follows by ``tau=0.05`` (code: 0.005 every second step): a bootstrapped measure settles no faster
      than its target.
    * The distilled agent is ours; version 1 has none. A value is distilled from single futures of the chains that the
      measure's loss runs anyway, and an actor from it by advantage-weighted regression (arXiv 1910.00177). Candidates of a
      diffusion model of the data's actions, ranked by the measure itself, act for any reward at once.
    * ``agent="rebrac"`` is that of the paper's version 2, ReBRAC (arXiv 2305.09836) with a penalty on the measure, in both
      forms that the authors' code has. Errors are weighted row by row; shapes in the code average the weights away. Where that
      code draws 16 futures per row, one is drawn here.

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
    :param n_steps: states of the log before the measure is bootstrapped, above 1 for ``measured_policy="data"`` alone
    :param dataset: logged data, see [load_dataset][sb3_diffusion.load_dataset]
    :param offline_fraction: share of each batch that comes from the dataset while fine-tuning, in [0, 1]
    :param n_pretrain_steps: gradient steps in which the actor imitates the data before it follows the value, offline
    :param horizon: None learns the discounted measure; a number learns that of Algorithm 1 from logged futures, uniform over
        the next $n$ states, for all $n$ from 1 to ``horizon`` in equal shares. Values are then sums over ``horizon`` steps
        without discount, of the rewards of the states that these reach, or of learned rewards that of the action's own step
        and of the ``horizon - 1`` after it; value and actor are distilled from the mean over all $n$
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
    :param alive_flag: model whether the episode still runs; without it a terminal state counts for ever, but
        for ReBRAC's critics
    :param reward_fn: rewards of states that are reached, vectorised, see `set_reward_fn`; None for a reward model that is
        learned from the logged rewards
    :param n_action_samples: 1 acts with the distilled actor; above, the best of so many candidates under the measure
    :param n_future_samples: futures per candidate
    :param train_agent: learn behaviour, value and actor; False learns the measure and the rewards alone
    :param agent: ``"distilled"``, an actor by weighted regression on values of the measure, or ``"rebrac"``, an actor with
        critics of its own that the measure holds to the data's futures
    :param actor_bc_coef: ReBRAC's weight of the actor's distance from the data, the penalty on the measure included
    :param critic_bc_coef: ReBRAC's weight of the next action's distance from the data
    :param measure_coef: weight of the penalty on the measure beside the distance of actions
    :param measure_penalty: ``"futures"`` holds logged futures likely under the measure at the actor's action; ``"states"``
        holds that measure near the law of all states in the data
    :param critic_tau: Polyak coefficient of ReBRAC's targets
    :param policy_delay: updates of ReBRAC's critics for each one of its actor
    :param target_policy_noise: standard deviation of the noise on ReBRAC's next actions
    :param target_noise_clip: its bound
    :param temperature: of the weights of the actor's regression, relative to the spread of advantages; lower is greedier
    :param max_weight: largest weight of the actor's regression; the largest advantages are the most overrated ones
    :param max_grad_norm: largest norm of the gradient of each network; None for no bound
    :param normalize_observations: normalise vector observations by frozen statistics of the data, kept in the policy; None
        means yes, unless the environment is a ``VecNormalize`` that does it. Without data they stay as they are: wrap the
        environment in ``VecNormalize``. Modelled states are normalised in any case, without data by what the replay buffer
        holds at the first update
    :param compile: run the losses compiled by ``torch.compile``; ``"cuda_graphs"`` also replays them as CUDA graphs on a GPU
    :param precision: of losses and actions, ``"float32"`` or ``"bfloat16"`` (matrix products by autocast, weights in float32)
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
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS
    default_total_timesteps = 1_000_000

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
        n_steps: int = 1,
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
        agent: str = "distilled",
        actor_bc_coef: float = 0.01,
        critic_bc_coef: float = 0.01,
        measure_coef: float = 0.1,
        measure_penalty: str = "futures",
        critic_tau: float = 0.005,
        policy_delay: int = 2,
        target_policy_noise: float = 0.2,
        target_noise_clip: float = 0.5,
        temperature: float = 1.0,
        max_weight: float = 2.0,
        max_grad_norm: float | None = None,
        normalize_observations: bool | None = None,
        compile: bool | str = False,
        precision: str = "float32",
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        check_integer("n_diffusion_steps", n_diffusion_steps, 1)
        check_integer("n_action_samples", n_action_samples, 1)
        check_integer("n_future_samples", n_future_samples, 1)
        check_choice("agent", agent, ("distilled", "rebrac"))
        check_choice("measure_penalty", measure_penalty, ("futures", "states"))
        check_integer("policy_delay", policy_delay, 1)
        for name, value in (
            ("actor_bc_coef", actor_bc_coef),
            ("critic_bc_coef", critic_bc_coef),
            ("measure_coef", measure_coef),
            ("target_policy_noise", target_policy_noise),
            ("target_noise_clip", target_noise_clip),
        ):
            check_range(name, value, 0.0)
        check_range("critic_tau", critic_tau, 0.0, 1.0)
        if agent == "rebrac" and (horizon is not None or n_steps > 1):
            raise ValueError(
                f'`agent="rebrac"` learns discounted values from single steps: got horizon={horizon}, n_steps={n_steps}; '
                'leave them at None and 1, or set `agent="distilled"`.'
            )
        for name, value in (("temperature", temperature), ("max_weight", max_weight)):
            if not value > 0.0:
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
            n_steps,
            horizon=horizon,
            measured_policy=measured_policy,
            scheme=scheme,
            n_chain_levels=n_chain_levels,
            reward_fn=reward_fn,
            max_grad_norm=max_grad_norm,
            dataset=dataset,
            offline_fraction=offline_fraction,
            n_pretrain_steps=n_pretrain_steps,
            normalize_observations=normalize_observations,
            policy_kwargs=policy_kwargs,
            compile=compile,
            precision=precision,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            seed=seed,
            device=device,
        )
        self.n_diffusion_steps = n_diffusion_steps
        self.noise_schedule = noise_schedule
        self.prediction_type = prediction_type
        self.sampler = sampler
        self.n_sampling_steps = n_sampling_steps
        self.level_weighting = level_weighting
        self.alive_flag = alive_flag
        self.n_action_samples = n_action_samples
        self.n_future_samples = n_future_samples
        self.train_agent = train_agent
        self.agent = agent
        self.actor_bc_coef = actor_bc_coef
        self.critic_bc_coef = critic_bc_coef
        self.measure_coef = measure_coef
        self.measure_penalty = measure_penalty
        self.critic_tau = critic_tau
        self.policy_delay = policy_delay
        self.target_policy_noise = target_policy_noise
        self.target_noise_clip = target_noise_clip
        self.temperature = temperature
        self.max_weight = max_weight
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
            agent=self.agent,
            horizon=self.horizon,
            gamma=self.gamma,
            rewards_of=self.measured_policy,
            reward_fn=self.reward_fn,
            n_action_samples=self.n_action_samples,
            n_future_samples=self.n_future_samples,
            normalize_observations=self.normalize_observations,
        )

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
        :raises ValueError: if ``reward_fn`` is no function
        """
        check_reward_fn(reward_fn)
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
        check_integer("n_action_samples", n_action_samples, 1)
        check_integer("n_future_samples", n_future_samples, 1)
        self.n_action_samples = self.policy.n_action_samples = n_action_samples
        self.n_future_samples = self.policy.n_future_samples = n_future_samples

    # ---------------------------------------------------------------- data

    def _fit_to_buffer(self, buffer: EpisodeReplayBuffer) -> None:
        super()._fit_to_buffer(buffer)
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

    # ---------------------------------------------------------------- learning

    def train(self, gradient_steps: int, batch_size: int | None = None) -> None:
        """
        Train the measure, the rewards, and what is distilled from them.

        :param gradient_steps: number of updates
        :param batch_size: transitions per update; None for the model's ``batch_size``
        """
        batch_size = self.batch_size if batch_size is None else batch_size
        self._fit_to_first_transitions()
        self.policy.set_training_mode(True)
        self._update_learning_rate([network.optimizer for network in self.policy.trained_networks.values()])
        distills = self.train_agent and self.agent == "distilled"
        for _ in range(gradient_steps):
            batch = self.sample_batch(batch_size)
            if self.scheme == "logged":
                latents = self._draw_latents(len(batch.actions))
                futures = self._logged_futures(batch, latents)
                self._step("measure", self._logged_loss(batch, futures, latents))
                rows = th.arange(len(futures), device=self.device)
                means = self._logged_means(batch, futures) if distills else None
            else:
                chain = self._draw_chain(batch)
                drawn = self._draw_for_measure_loss(chain, len(batch.actions))
                self._step("measure", self._measure_loss(batch, chain, *drawn))
                rows, means = chain.rows, self._flow_means(batch, chain) if distills else None
            self._step("reward_model", self._reward_loss(batch))
            if self.train_agent:
                sigmas = log_logistic_sigmas(self._draw_uniform(len(batch.actions)))
                self._step("behavior", self._behavior_loss(batch, self._draw_normal(*batch.actions.shape), sigmas))
                if means is None:
                    self._train_rebrac(batch)
                else:
                    self._step("value", self._value_loss(batch, rows, means))
                    self._step("actor", *self._actor_loss(batch))
            self.measure.update_average(warmed_up_decay(1.0 - self.tau, self._n_updates + 1))
            if self.pretraining:
                self._count_pretraining_step()
            self._n_updates += 1
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    # ---------------------------------------------------------------- the distilled agent

    @accelerated
    def _behavior_loss(self, batch: FutureStateSamples, noise: th.Tensor, sigmas: th.Tensor) -> th.Tensor:
        r"""$E[w(\sigma) \|D(a + \sigma \epsilon, \sigma | s) - a\|^2]$ (arXiv 2206.00364, eq. 2)."""
        return self.policy.behavior.loss(batch.observations, batch.actions, noise, sigmas).mean()

    @th.no_grad()
    def _flow_means(self, batch: FutureStateSamples, chain: Chain) -> th.Tensor:
        r"""
        $(1 - \gamma) R(s') + \gamma R(x')$ with $x' \sim \bar d(\cdot | s', a')$: one sample of $E_{d(\cdot | s, a)}[R]$ per
        chain. Where the episode ended, $x'$ is its last state, no longer alive.
        """
        policy, rows = self.policy, chain.rows
        discounts = self._discounts(batch)[rows].unsqueeze(1)
        ended = batch.dones[rows]
        at_end = ended if self.n_steps == 1 else ended * (batch.offsets == batch.steps_remaining)[rows]
        seen_rewards = policy.state_rewards(self.measure.coder(take_rows(self._seen_states(batch), rows)), self.reward_fn)
        absorbed = self.measure.coder(take_rows(batch.next_observations, rows), alive=0.0)
        later_rewards = policy.state_rewards(th.where(ended > 0.0, absorbed, chain.clean), self.reward_fn)
        if self.reward_fn is None:  # no action is taken in a terminal state
            seen_rewards, later_rewards = (1.0 - at_end) * seen_rewards, (1.0 - ended) * later_rewards
        return (1.0 - discounts) * seen_rewards + discounts * later_rewards

    @th.no_grad()
    def _logged_means(self, batch: FutureStateSamples, futures: th.Tensor) -> th.Tensor:
        r"""
        $R(s_{t+k})$: one sample of $E_{d(\cdot | s, a)}[R]$ per row. Over $n$ steps with learned rewards, the first of which
        is the action's own, one of $E_{d_{n-1}}[\bar r]$: $\frac{n}{n-1} \bar r(s_{t+k})$ for $k < n$, and 0 for $k = n$.
        """
        means = self.policy.state_rewards(futures, self.reward_fn)
        if self.horizon is None or self.reward_fn is not None:
            return means
        n = batch.n_future
        return (batch.offsets < n) * n / (n - 1).clamp(min=1) * means

    @accelerated
    def _value_loss(self, batch: FutureStateSamples, rows: th.Tensor, means: th.Tensor) -> th.Tensor:
        r"""
        $E[(q(s, a) - q)^2] + E[(v(s) - q)^2]$, with $q$ the value per step that a sample of the measure gives, standardised.

        :param batch: transitions
        :param rows: which of them, shape ``(n,)``
        :param means: samples of the mean reward over the measure, shape ``(n, 1)``
        """
        value = self.policy.value
        mixture = self.policy.mixture(self.reward_fn is None, batch.n_future[rows])
        targets = (mixture.first * batch.step_rewards[rows] + mixture.rest * means - value.mean) / value.std
        q, v = value(take_rows(batch.observations, rows), batch.actions[rows])
        return ((q - targets).square() + (v - targets).square()).mean()

    @accelerated
    def _actor_loss(self, batch: FutureStateSamples) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        r"""
        $-E[\min(e^{(q(s, a) - v(s)) / \lambda}, w_{max}) \log \pi(a | s)]$ (arXiv 1910.00177, algorithm 1), the weights
        divided by their mean; while pretraining they are all 1.

        :return: the loss, and the effective sample size of the weights, $(\sum w)^2 / \sum w^2$: how many actions of the
            batch it amounts to
        """
        mean, log_std = self.actor.mean_and_log_std(batch.observations)
        nll = 0.5 * ((batch.actions - mean) / log_std.exp()).square() + log_std
        if self.pretraining:
            return nll.mean(), {}
        with th.no_grad():
            q, v = self.policy.value(batch.observations, batch.actions)
            advantages = q - v
            scale = standard_deviation(advantages).clamp(min=MIN_SCALE)
            exponents = advantages / (self.temperature * scale)
            # Where all are far below 0 the largest is taken as 0, which the division undoes: no 0 / 0
            weights = (exponents - exponents.amax().clamp(max=0.0)).exp().clamp(max=self.max_weight)
        loss = (weights / weights.mean() * nll).mean()
        return loss, {"effective_sample_size": weights.sum().square() / weights.square().sum()}

    # ---------------------------------------------------------------- the agent of version 2

    def _train_rebrac(self, batch: FutureStateSamples) -> None:
        """One update of the critics, and after every ``policy_delay`` of them one of the actor and of all targets."""
        n, dim = len(batch.actions), self.measure.coder.dim
        noise = (self.target_policy_noise * self._draw_normal(*batch.actions.shape)).clamp(
            -self.target_noise_clip, self.target_noise_clip
        )
        critic_loss, targets, rewards = self._critic_loss(batch, noise)
        self._watch_targets(targets, rewards)
        self._step("critic", critic_loss)
        if self.measure_penalty == "states":
            self._step("state_model", self._state_model_loss(batch, self._draw_normal(n, dim), self._draw_levels(n)))
        if (self._n_updates + 1) % self.policy_delay == 0:
            drawn = self._draw_normal(n, dim), self._draw_normal(n, dim), self._draw_levels(n)
            self._step("actor", self._rebrac_actor_loss(batch, *drawn))
            self.policy.update_targets(self.critic_tau)

    @accelerated
    def _critic_loss(self, batch: FutureStateSamples, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        r"""
        $E[(Q_j(s, a) - r - \gamma (\min_j \bar Q_j(s', \tilde a) - \beta_2 \|\tilde a - a'\|^2))^2]$ with
        $\tilde a = \bar\pi(s') + \epsilon$ and the logged $a'$ (arXiv 2305.09836); without the distance
        where the log has no $a'$.

        :return: the loss, the targets and the rewards in them, both ``(batch_size, 1)``
        """
        policy = self.policy
        with th.no_grad():
            rewards = batch.rewards
            if self.reward_fn is not None:
                rewards = policy.state_rewards(self.measure.coder(batch.next_observations), self.reward_fn)
            mean, _ = policy.actor_target.mean_and_log_std(batch.next_observations)
            actions = (mean + noise).clamp(-1.0, 1.0)
            distances = (actions - batch.next_actions).square().sum(dim=1, keepdim=True) * batch.has_next_actions
            values = policy.critic_target(batch.next_observations, actions).amin(dim=0) - self.critic_bc_coef * distances
            targets = rewards + self.gamma * (1.0 - batch.dones) * values
        return (policy.critic(batch.observations, batch.actions) - targets).square().mean(), targets, rewards

    @accelerated_actor_loss
    def _rebrac_actor_loss(
        self, batch: FutureStateSamples, start: th.Tensor, noise: th.Tensor, levels: th.Tensor
    ) -> th.Tensor:
        r"""
        $E[-Q(s, \pi(s))] / E|Q| + \beta_1 E[\|\pi(s) - a\|^2 + \rho\, p]$ with the penalty $p$ on the measure (the authors'
        code of version 2); while pretraining the distance alone.
        """
        actions, _ = self.actor.mean_and_log_std(batch.observations)
        distances = (actions - batch.actions).square().sum(dim=1)
        if self.pretraining:
            return distances.mean()
        q_values = self.policy.critic(batch.observations, actions).amin(dim=0)
        scale = average(q_values.detach().abs().mean()).clamp(min=MIN_SCALE)
        penalty = self._measure_penalty(batch, actions, start, noise, levels)
        return -q_values.mean() / scale + self.actor_bc_coef * (distances + self.measure_coef * penalty).mean()

    def _measure_penalty(
        self, batch: FutureStateSamples, actions: th.Tensor, start: th.Tensor, noise: th.Tensor, levels: th.Tensor
    ) -> th.Tensor:
        r"""
        $\eta_i \|g(x_i, i) - f_{\bar\theta}(x_i, s, \pi(s), i)\|^2$ of each row, with a gradient through $\pi(s)$ alone.
        ``"futures"``: $x$ is a logged future of $s$ and $g$ tells its noise, so that the penalty is small where the measure at
        $\pi(s)$ holds the future likely; 0 where the future lies beyond the log. ``"states"``: $x$ is drawn from the
        measure at $\pi(s)$, and $g$ is a model of all states in the data.

        :param start: noise that $x$ is drawn from, shape ``(batch_size, dim)``
        :param noise: noise on $x$, same shape
        :param levels: of that noise, shape ``(batch_size,)``
        """
        target = self.measure.target
        condition = target.condition(batch.observations, actions)
        with th.no_grad():
            known: th.Tensor | float = 1.0
            if self.measure_penalty == "futures":
                x = target.coder(batch.future_observations, alive=1.0 - batch.absorbed)
                known = 1.0 - batch.unknown.squeeze(1)
            else:
                x = target(condition, start)
            noisy = target.denoiser.corrupt(x, noise, levels)
            if self.measure_penalty == "futures":
                goals = target.denoiser.target(x, noise, levels)
            else:
                goals = self.policy.state_model(noisy, levels)
        errors = (target.denoiser.net(noisy, condition, levels) - goals).square()
        return known * target.level_weights[levels] * errors.mean(dim=1)

    @accelerated
    def _state_model_loss(self, batch: FutureStateSamples, noise: th.Tensor, levels: th.Tensor) -> th.Tensor:
        r"""$E[\eta_i \|\epsilon - g(x_i, i)\|^2]$ with noise on all states $s'$ of the data."""
        measure = self.measure
        states = measure.coder(batch.next_observations)
        told = self.policy.state_model(measure.denoiser.corrupt(states, noise, levels), levels)
        errors = (told - measure.denoiser.target(states, noise, levels)).square()
        return (measure.level_weights[levels] * errors.mean(dim=1)).mean()
