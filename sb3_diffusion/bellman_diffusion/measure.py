"""Learning a successor measure by diffusion, and using it: samples of the future, values, off-policy evaluation."""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import PolicyPredictor, PyTorchObs

from sb3_diffusion.bellman_diffusion.networks import ClippedGaussianActor, MeasureNetwork, fit_scale
from sb3_diffusion.bellman_diffusion.policies import BellmanDiffusionPolicy, RewardFunction, as_arrays, check_reward_fn
from sb3_diffusion.buffers import EpisodeReplayBuffer, FutureStateReplayBuffer
from sb3_diffusion.buffers.samples import FutureStateSamples
from sb3_diffusion.common.base_class import OfflineAlgorithm
from sb3_diffusion.common.compilation import accelerated
from sb3_diffusion.common.distributed import own_rows
from sb3_diffusion.common.observations import take_rows
from sb3_diffusion.common.utils import check_bound, check_choice, check_integer
from sb3_diffusion.datasets import OfflineDataset
from sb3_diffusion.evaluation import bootstrap_interval


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


class ValueEstimate(NamedTuple):
    """
    What a policy is expected to earn, from logged data.

    :ivar mean: over the starts of the logged episodes
    :ivar low: lower end of the bootstrap interval of the mean
    :ivar high: its upper end
    :ivar values: one per start, shape ``(n_episodes,)``
    """

    mean: float
    low: float
    high: float
    values: np.ndarray


class MeasureAlgorithm(OfflineAlgorithm):
    """
    Base of Bellman diffusion: everything about the measure, and nothing about how an agent learns to act.

    :param args: positional arguments of [OfflineAlgorithm][sb3_diffusion.OfflineAlgorithm]
    :param horizon: see [BellmanDiffusion][sb3_diffusion.BellmanDiffusion], as all that follow
    :param measured_policy: whose futures
    :param scheme: where the noisy states of the bootstrapped loss come from
    :param n_chain_levels: levels learned from along each chain
    :param reward_fn: rewards of states that are reached
    :param max_grad_norm: largest norm of the gradient of each network
    :param kwargs: further arguments of [OfflineAlgorithm][sb3_diffusion.OfflineAlgorithm]
    """

    buffer_class: ClassVar[type[EpisodeReplayBuffer]] = FutureStateReplayBuffer
    policy: BellmanDiffusionPolicy
    actor: ClippedGaussianActor
    train_agent: bool  # whether the actor learns
    measure: MeasureNetwork  # f_theta; its average is f_theta-bar

    def __init__(
        self,
        *args: Any,
        horizon: int | None,
        measured_policy: str,
        scheme: str | None,
        n_chain_levels: int,
        reward_fn: RewardFunction | None,
        max_grad_norm: float | None,
        **kwargs: Any,
    ) -> None:
        if scheme is None:
            scheme = "stopped" if horizon is None else "logged"
        check_choice("measured_policy", measured_policy, ("data", "actor"))
        check_choice("scheme", scheme, ("stopped", "renoised", "logged"))
        check_integer("n_chain_levels", n_chain_levels, 1)
        check_bound("max_grad_norm", max_grad_norm)
        check_reward_fn(reward_fn)
        if horizon is not None:
            check_integer("horizon", horizon, 1)
        if horizon is not None and scheme != "logged":
            raise ValueError(f'A finite `horizon` learns from logged futures: set `scheme="logged"` or None, got {scheme!r}.')
        if scheme == "logged" and measured_policy != "data":
            raise ValueError(
                f'Logged futures are those of the policy that made the data: set `measured_policy="data"`, or another '
                f"`scheme` for {measured_policy!r}."
            )
        super().__init__(*args, **kwargs)
        if not self.gamma < 1.0:
            raise ValueError(
                f"`gamma` must lie in [0, 1): got {self.gamma}; for sums without discount set `horizon` to a number of steps."
            )
        if self.n_steps > 1 and scheme == "logged":
            raise ValueError(
                f'`n_steps` must be 1 with `scheme="logged"`, which takes whole futures from the log: got {self.n_steps}.'
            )
        if self.n_steps > 1 and measured_policy != "data":
            raise ValueError(
                f"The first `n_steps` states are those of the policy that made the data: set `n_steps=1` for "
                f"`measured_policy={measured_policy!r}`, got {self.n_steps}."
            )
        self.horizon = horizon
        self.measured_policy = measured_policy
        self.scheme = scheme
        self.n_chain_levels = n_chain_levels
        self.reward_fn = reward_fn
        self.max_grad_norm = max_grad_norm

    # ---------------------------------------------------------------- construction and data

    def _create_aliases(self) -> None:
        self.actor = self.policy.actor
        self.measure = self.policy.measure

    def _buffer_arguments(self) -> dict[str, Any]:
        arguments = super()._buffer_arguments()
        if self.horizon is not None:
            return dict(arguments, offset_distribution="uniform", horizon=self.horizon)
        return dict(arguments, offset_distribution="geometric" if self.n_steps == 1 else "n_step")

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

    def set_measured_policy(self, policy: str | PolicyPredictor) -> None:
        """
        Choose whose futures are learned from now on; rewards of future states are then those of its actions.

        :param policy: ``"data"``, ``"actor"``, or anything with SB3's ``predict``: a policy to evaluate from logged data. Its
            actions are drawn with ``deterministic=False``; it is no part of a saved model, give it again after loading
        :raises ValueError: for another policy than that of the data if the model learns from logged futures, be it only of
            ``n_steps`` above 1
        """
        if (self.scheme == "logged" or self.n_steps > 1) and policy != "data":
            raise ValueError(
                "Logged futures are those of the policy that made the data: build the model with "
                '`scheme="stopped"` and `n_steps=1`.'
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

    def sample_batch(self, batch_size: int) -> FutureStateSamples:  # type: ignore[override]
        """
        Transitions to learn from: of the dataset, of the replay buffer, or of both, depending on the phase.

        :param batch_size: number of transitions
        :return: transitions, each with a state of its future
        """
        return self._draw_batch(batch_size)  # type: ignore[return-value]

    # ---------------------------------------------------------------- an update

    def _step(self, name: str, loss: th.Tensor, parts: Mapping[str, th.Tensor] | None = None) -> None:
        """One step of the network of that name in the policy, and the loss with its ``parts`` to the log."""
        self._minimize(f"{name}_loss", self.policy.trained_networks[name].optimizer, loss, parts)

    def _draw_levels(self, n: int) -> th.Tensor:
        """Sampling levels with equal probability: the same law in both losses, or their shares would not be kept."""
        levels = self.measure.sampling_levels
        return levels[self._draw_integers(len(levels), n)]

    def _draw_latents(self, n: int) -> th.Tensor:
        """What ``n`` actions of the actor are made of."""
        return self._draw_normal(n, *self.actor.latent_shape)

    def _next_actions(self, batch: FutureStateSamples, rows: th.Tensor | slice, latents: th.Tensor | None = None) -> th.Tensor:
        """$a'$ of these rows: the measured policy's; of the data the logged action, or the actor's where the log has none."""
        next_observations = take_rows(batch.next_observations, rows)
        if self.policy.measured_actions is not None:
            return self.policy.measured_actions(next_observations)
        latents = self._draw_latents(len(batch.actions)) if latents is None else latents
        with th.no_grad():
            acted = self.actor(next_observations, latents[rows])
        if self.measured_policy == "actor":
            return acted
        return th.where(batch.has_next_actions[rows] > 0.0, batch.next_actions[rows], acted)

    def _known(self, batch: FutureStateSamples) -> th.Tensor:
        """
        1, or 0 for rows that count for nothing, as the log ends before the action that they need and there is no actor to
        stand in, shape ``(batch_size,)``.
        """
        if self.train_agent or self.measured_policy == "actor" or self.policy.measured_actions is not None:
            return th.ones_like(batch.dones).squeeze(1)
        known = 1.0 - batch.unknown if self.scheme == "logged" else th.maximum(batch.has_next_actions, batch.dones)
        return known.squeeze(1)

    # ---------------------------------------------------------------- the measure, from the target's chain

    @th.no_grad()
    def _draw_chain(self, batch: FutureStateSamples) -> Chain:
        r"""Draw futures of some $(s', a')$ from the target, and their noisy states $y$ at ``n_chain_levels`` levels each."""
        target, n_levels = self.measure.target, self.n_chain_levels
        n_chains = max(1, len(batch.actions) // n_levels)
        rows = th.randperm(len(batch.actions), generator=self.generator, device=self.device)[:n_chains]
        next_observations = take_rows(batch.next_observations, rows)
        condition = target.condition(next_observations, self._next_actions(batch, rows))
        path, clean = target.run(condition, self._draw_normal(n_chains, target.coder.dim))
        stops = own_rows(
            lambda n: th.randint(len(path), (n_levels, n), generator=self.generator, device=self.device), n_chains, dim=1
        )
        levels = target.sampling_levels[stops].flatten()
        if self.scheme == "stopped":
            noisy = path[stops, th.arange(n_chains, device=self.device)].flatten(0, 1)
        else:
            repeated = clean.repeat(n_levels, 1)
            noisy = target.denoiser.corrupt(repeated, self._draw_normal(*repeated.shape), levels)
        return Chain(rows, condition, noisy, levels, clean)

    def _draw_for_measure_loss(self, chain: Chain, n: int) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """:return: noise and levels of both branches: of the next states, and of the last states of episodes in the chains"""
        return self._draw_normal(n, self.measure.coder.dim), self._draw_levels(n), self._draw_normal(*chain.noisy.shape)

    @accelerated
    def _measure_loss(
        self, batch: FutureStateSamples, chain: Chain, noise: th.Tensor, levels: th.Tensor, chain_noise: th.Tensor
    ) -> th.Tensor:
        r"""
        $(1 - \gamma) L_1 + \gamma L_2$: both branches of the Bellman equation in their shares (arXiv 2407.12163v1), after
        $l$ steps of the log $(1 - \gamma^l) L_1 + \gamma^l L_2$ (arXiv 2402.08530, n-step targets).
        """
        discounts = self._discounts(batch)
        next_losses = self._next_state_loss(batch, noise, levels)
        bootstrap_losses = self._bootstrap_loss(batch, chain, chain_noise)
        known = self._known(batch)
        shares = (known * discounts)[chain.rows].repeat(self.n_chain_levels)
        return (known * (1.0 - discounts) * next_losses).mean() + (shares * bootstrap_losses).mean()

    def _discounts(self, batch: FutureStateSamples) -> th.Tensor:
        r"""$\gamma^l$ of the $l$ steps from ``observations`` to ``next_observations``, shape ``(batch_size,)``."""
        if batch.discounts is None:
            return batch.actions.new_full((len(batch.actions),), self.gamma)
        return batch.discounts.squeeze(1)

    def _seen_states(self, batch: FutureStateSamples) -> PyTorchObs:
        r"""$s_{t+k}$ with $k$ up to ``n_steps``, geometric: the part of the measure that the log tells."""
        return batch.next_observations if self.n_steps == 1 else batch.future_observations

    def _next_state_loss(self, batch: FutureStateSamples, noise: th.Tensor, levels: th.Tensor) -> th.Tensor:
        r"""
        $L_1 = E[\eta_i \|\epsilon - f_\theta(\sqrt{\bar\alpha_i} s' + \sqrt{1 - \bar\alpha_i} \epsilon, s, a, i)\|^2]$
        of each row.
        """
        measure = self.measure
        condition = measure.condition(batch.observations, batch.actions)
        errors = measure.denoiser.loss(measure.coder(self._seen_states(batch)), noise, levels, condition)
        return measure.level_weights[levels] * errors.mean(dim=1)

    def _bootstrap_loss(self, batch: FutureStateSamples, chain: Chain, noise: th.Tensor) -> th.Tensor:
        r"""
        $L_2 = E[\eta_i \|f_{\bar\theta}(y, s', a', i) - f_\theta(y, s, a, i)\|^2]$ of each noisy state of the chains, with
        $y$ of the same $(s', a')$; where the episode ended, $L_1$ towards its last state, no longer alive.
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
        return measure.level_weights[chain.levels] * errors.mean(dim=1)

    # ---------------------------------------------------------------- the measure, from logged futures

    @th.no_grad()
    def _logged_futures(self, batch: FutureStateSamples, latents: th.Tensor) -> th.Tensor:
        r"""
        The coded states $s_{t+k}$ of the log. Beyond a truncated end, which only happens with geometric offsets, they are
        drawn from the target at the last state, as these offsets have no memory, and at the actor's action of ``latents``.
        """
        target = self.measure.target
        futures = target.coder(batch.future_observations, alive=1.0 - batch.absorbed)
        if self.horizon is not None:
            return futures
        condition = target.condition(batch.future_observations, self.actor(batch.future_observations, latents))
        return th.where(batch.unknown > 0.0, target(condition, self._draw_normal(*futures.shape)), futures)

    def _logged_loss(self, batch: FutureStateSamples, futures: th.Tensor, latents: th.Tensor) -> th.Tensor:
        r"""
        Algorithm 1 of arXiv 2407.12163v1, with noise and levels drawn here. At the last step of a truncated episode $s'$ is
        the state that the future was drawn at: the same latents give the same $a'$, as $x$ and target must share both.
        """
        noise, levels = self._draw_normal(*futures.shape), self._draw_levels(len(futures))
        return self._offset_loss(batch, futures, noise, levels, self._next_actions(batch, slice(None), latents))

    @accelerated
    def _offset_loss(
        self,
        batch: FutureStateSamples,
        futures: th.Tensor,
        noise: th.Tensor,
        levels: th.Tensor,
        next_actions: th.Tensor,
    ) -> th.Tensor:
        r"""
        At the noised future $x_i$ of offset $k$: $\eta_i \|\epsilon - f_\theta(x_i, s, a, i, n)\|^2$ for $k = 1$, and
        $\eta_i \|f_{\bar\theta}(x_i, s', a', i, n - 1) - f_\theta(x_i, s, a, i, n)\|^2$ above. The branches get their
        shares from the law of the offsets.
        """
        measure, target, steps = self.measure, self.measure.target, batch.n_future
        condition = measure.condition(batch.observations, batch.actions, steps)
        with th.no_grad():
            noisy = measure.denoiser.corrupt(futures, noise, levels)
            next_condition = target.condition(batch.next_observations, next_actions, steps - 1)
            told = target.denoiser.net(noisy, next_condition, levels)
            direct = (batch.offsets == 1) | (batch.dones > 0.0)
            goals = th.where(direct, target.denoiser.target(futures, noise, levels), told)
        errors = (measure.denoiser.net(noisy, condition, levels) - goals).square()
        return (self._known(batch) * measure.level_weights[levels] * errors.mean(dim=1)).mean()

    # ---------------------------------------------------------------- rewards

    @accelerated
    def _reward_loss(self, batch: FutureStateSamples) -> th.Tensor:
        r"""$E[(\hat r(s, a) - r)^2] + E[(\bar r(s) - r)^2]$, and $\bar r = 0$ in terminal states, in units of their spread."""
        model, coder = self.policy.reward_model, self.measure.coder
        states = coder.standardized(coder(batch.observations))
        terminal = coder.standardized(coder(batch.next_observations))
        of_action = (model.of_action(states, batch.actions) - batch.step_rewards).square()
        of_state = (model(states) - batch.step_rewards).square() + batch.dones * model(terminal).square()
        return (of_action + of_state).mean() / model.std.square()

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

    def _steps_left(self, horizon: int | None, n: int) -> th.Tensor | None:
        """:return: ``horizon`` for each of ``n`` rows, shape ``(n, 1)``"""
        if horizon is None:
            return None
        if self.horizon is None:
            raise ValueError(f"`horizon` is for models that are built with one: got {horizon}.")
        check_integer("horizon", horizon, 1, self.horizon)
        return th.full((n, 1), horizon, device=self.device)

    @th.no_grad()
    def sample_future(
        self,
        obs: Any,
        action: Any,
        n_samples: int = 64,
        seed: int | None = None,
        horizon: int | None = None,
    ) -> Any:
        r"""
        Draw states of the future from the measure, each a state $k \ge 1$ steps on, $k$ geometric (with ``horizon`` uniform).

        After a termination that is the last state. With a ``VecNormalize`` that normalises observations, states are in its
        units, as all that the model is given.

        :param obs: one observation or a batch of them
        :param action: the actions taken there, in env units, or one for all
        :param n_samples: states per observation
        :param seed: of the random numbers of this call; None goes on with the model's own
        :param horizon: number of states that are left, at most the model's own, which None takes; for a model with one
        :return: shape ``(batch_size, n_samples, *obs_shape)``, a dict of such arrays for ``Dict`` observations; without the
            axis of the batch for a single observation
        """
        check_integer("n_samples", n_samples, 1)
        tensors, scaled, vectorized = self._to_tensors(obs, action)
        steps = self._steps_left(horizon, len(scaled))
        generator = self.acting_generator if seed is None else th.Generator().manual_seed(seed)
        noise = th.randn(len(scaled), n_samples, self.measure.coder.dim, generator=generator).to(self.device)
        states = self.measure.coder.decode(self.policy.futures(tensors, scaled, noise, steps))

        def rows(values: th.Tensor) -> np.ndarray:
            array = values.reshape(len(scaled), n_samples, *values.shape[1:]).cpu().numpy()
            return array if vectorized else array[0]

        return {key: rows(values) for key, values in states.items()} if isinstance(states, dict) else rows(states)

    @th.no_grad()
    def value(
        self,
        obs: Any,
        action: Any,
        reward_fn: RewardFunction | None = None,
        n_samples: int = 256,
        horizon: int | None = None,
    ) -> np.ndarray:
        r"""
        Values of actions, $\frac{1}{1 - \gamma} E_d[R]$, or with learned rewards
        $r(s, a) + \frac{\gamma}{1 - \gamma} E_d[\bar r]$. States after a termination earn nothing; without an
        alive flag there are none, as the terminal state lasts.

        Of a model with a ``horizon`` they are sums over $n$ steps without discount, $n E_{d_n}[R]$ or
        $r(s, a) + (n - 1) E_{d_{n-1}}[\bar r]$.

        All rows and calls draw futures from the same noises: values of several actions differ by the actions alone.

        :param obs: one observation or a batch of them
        :param action: the actions taken there, in env units, or one for all
        :param reward_fn: rewards of reached states as in `set_reward_fn`; None for the model's
        :param n_samples: futures per observation
        :param horizon: $n$, at most the model's own, which None takes; for a model with one
        :return: shape ``(batch_size,)``; a single number for a single observation
        """
        check_integer("n_samples", n_samples, 1)
        tensors, scaled, vectorized = self._to_tensors(obs, action)
        reward_fn = self.reward_fn if reward_fn is None else reward_fn
        noise, steps = self.policy.shared_noise(n_samples), self._steps_left(horizon, len(scaled))
        values = self.policy.values(tensors, scaled, noise, reward_fn, steps).cpu().numpy()
        return values if vectorized else values[0]

    @th.no_grad()
    def start_values(self, n_samples: int = 256) -> np.ndarray:
        """
        Values of the measured policy where the logged episodes start.

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

    def estimate_value(self, n_samples: int = 256, confidence: float = 0.95) -> ValueEstimate:
        """
        Estimate what the measured policy earns from where the logged episodes start, without acting (off-policy evaluation).

        The interval tells how the mean would vary with other starts; errors of the measure and of the learned rewards come
        on top, and are not in it.

        ```python
        model.set_measured_policy(SAC.load("candidate"))
        model.learn(50_000)
        print(model.estimate_value())
        ```

        :param n_samples: futures per start
        :param confidence: of the bootstrap interval
        :return: the mean value, its interval, and the values it is made of: discounted by ``gamma``, or of a model with a
            ``horizon`` sums over so many steps
        :raises RuntimeError: without a dataset
        """
        values = self.start_values(n_samples)
        low, high = bootstrap_interval(values, statistic="mean", level=confidence)
        return ValueEstimate(float(values.mean()), low, high, values)

    # ---------------------------------------------------------------- files

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "actor", "measure"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", *[f"policy.{name}.optimizer" for name in self.policy.trained_networks]], []
