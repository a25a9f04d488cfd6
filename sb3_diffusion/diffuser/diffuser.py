"""Diffuser."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import FloatSchedule, update_learning_rate

from sb3_diffusion.buffers import EpisodeReplayBuffer, TrajectoryReplayBuffer, TrajectorySamples
from sb3_diffusion.common.base_class import OfflineAlgorithm
from sb3_diffusion.common.compilation import CompiledInference, accelerated, autocast
from sb3_diffusion.common.distributed import average
from sb3_diffusion.common.utils import check_bound, check_choice, check_integer, check_range, warmed_up_decay
from sb3_diffusion.datasets import OfflineDataset
from sb3_diffusion.diffuser.policies import (
    CnnPolicy,
    DiffuserPolicy,
    MlpPolicy,
    MultiInputPolicy,
    Plan,
    TrajectoryActor,
    TrajectoryValue,
)
from sb3_diffusion.diffuser.presets import PRESETS
from sb3_diffusion.diffuser.windows import GOAL_KEY

PLANNING = (
    "n_candidates",
    "guidance_scale",
    "guidance_scaling",
    "n_guidance_steps",
    "t_stopgrad",
    "n_action_steps",
    "warm_start",
    "tracker",
)
"""Arguments that say how plans are made and followed; they may change after training."""


def _check_planning(
    n_steps: int,
    has_value: bool,
    n_candidates: int,
    guidance_scale: float,
    guidance_scaling: str | None,
    n_guidance_steps: int,
    t_stopgrad: int,
    n_action_steps: int,
    warm_start: float,
    tracker: Any,
) -> None:
    """Raise if settings of ``PLANNING`` do not fit, for plans of ``n_steps`` env steps."""
    check_integer("n_candidates", n_candidates, 1)
    check_choice("guidance_scaling", guidance_scaling, ("variance", "std", None))
    check_integer("n_guidance_steps", n_guidance_steps, 0)
    check_integer("t_stopgrad", t_stopgrad, 0)
    check_integer("n_action_steps", n_action_steps, 1, n_steps)
    check_range("warm_start", warm_start, 0.0, 1.0)
    if tracker is not None and not callable(tracker):
        raise ValueError(f"`tracker` must be callable, for instance a PDTracker: got {tracker!r}.")
    if not has_value and (n_candidates > 1 or guidance_scale != 0.0):
        raise ValueError(
            "Choosing among several plans, and guiding them, needs a value, and with `train_value=False` there is none: set "
            f"`train_value=True`, or `n_candidates=1` and `guidance_scale=0`; got {n_candidates} and {guidance_scale}."
        )


class Diffuser(OfflineAlgorithm):
    r"""
    Diffuser: planning by a diffusion model of whole trajectory windows.

    Paper: https://arxiv.org/abs/2205.09991v2 (Janner, Du, Tenenbaum, Levine, ICML 2022); authors' code: jannerm/diffuser. A
    diffusion model learns windows of states and actions. To act, windows are drawn that begin at the present state, are drawn
    towards a high return by the gradient of a value of noisy windows, or end at a goal; the best one is followed for
    ``n_action_steps`` steps before the next plan.

    Departures, and why:

    * As in the authors' code and not the paper: the network tells the clean window, the error of the first action counts
      tenfold, guidance comes before each denoising step, twice, and stops at the last ones.
    * Guidance is scaled by the posterior variance, as the code does since October 2022 under the name of the standard
      deviation; ``guidance_scaling`` has the others.
    * Plans are ranked by the value of the finished window. The authors' code takes the value that guided the last step.
    * The value's network tells returns normalised by statistics of the data; its gradient is in units of the rewards all the
      same. The size of its last layer follows from the convolutions, so that any horizon works.
    * The last window of each episode is drawn too. Behind the end of an episode its last state is repeated; these rows count
      in the loss after a termination, where they tell that nothing more comes, and not after a truncation. The authors'
      presets for locomotion pad with zeros, which always count; those for mazes draw no such windows.
    * The averages of the weights follow every update by a tenth of the published ``tau``, and are averages over all updates so
      far at first. The authors' presets do as the code (``ema_start``, ``ema_interval``): a copy for 2,000 updates, then every
      tenth.
    * Planned actions are clipped to the action space.
    * Observations that are no part of a plan (``desired_goal`` of goal environments) are given back as they came.

    :param policy: ``"MlpPolicy"``, ``"MultiInputPolicy"`` or a policy class
    :param env: Gymnasium env, VecEnv, id or None; with None it comes from the dataset
    :param learning_rate: a float or a function of the remaining progress
    :param buffer_size: capacity of the replay buffer of online transitions
    :param learning_starts: env steps before the first online update
    :param batch_size: windows per update
    :param tau: share of the trained weights that goes into the moving averages, which plan
    :param gamma: discount of the returns that the value tells
    :param train_freq: env steps (or ``(n, "episode")``) between updates online
    :param gradient_steps: updates after each rollout online; -1 for as many as env steps
    :param action_noise: noise added to the actions when exploring
    :param replay_buffer_class: class of the replay buffer of online transitions, a ``TrajectoryReplayBuffer``
    :param replay_buffer_kwargs: its further arguments
    :param optimize_memory_usage: do not store next observations
    :param dataset: logged data, see [load_dataset][sb3_diffusion.load_dataset]
    :param offline_fraction: share of each batch that comes from the dataset while fine-tuning, in [0, 1]
    :param horizon: rows of a window; for a U-Net a multiple of 2 to the number of its levels less one
    :param stride: env steps from row to row (jump-step planning); a row holds the actions up to the next one
    :param n_diffusion_steps: length of the chain
    :param noise_schedule: ``"cosine"``, ``"linear"`` or ``"vp"``
    :param prediction_type: what the network tells, ``"sample"``, ``"noise"`` or ``"v"``
    :param sampler: ``"ddpm"``, ``"ddim"``, ``"dpm_solver"`` or ``"heun"``
    :param n_sampling_steps: steps of the sampler, at most ``n_diffusion_steps``; None for all
    :param clip_denoised: largest absolute value of a denoised entry, normalised; None for no bound
    :param normalization: of observations and actions by frozen statistics of the data, kept in the policy: ``"gaussian"``
        (mean 0, standard deviation 1) or ``"limits"`` (from the range to [-1, 1])
    :param backbone: ``"unet"`` or ``"transformer"``
    :param goal_conditioned: train and plan with both ends of a window given. Of ``Dict`` observations with goals the end is
        the ``achieved_goal``, otherwise the whole last observation
    :param n_candidates: plans per decision, of which the value chooses the best; None is 64, or 1 if ``goal_conditioned``
    :param guidance_scale: size of a step along the value's gradient, 0 for none; None is 0.1, or 0 if ``goal_conditioned``
    :param guidance_scaling: ``"variance"``, ``"std"`` or None
    :param n_guidance_steps: gradient steps before each denoising step
    :param t_stopgrad: no guidance at diffusion steps below this one
    :param n_action_steps: env steps that a plan is followed for
    :param warm_start: share of the chain, in [0, 1], that refines the previous plan instead of planning from noise; 0 is off
    :param tracker: makes actions from planned states, for instance [PDTracker][sb3_diffusion.diffuser.PDTracker]
    :param train_planner: train the diffusion model
    :param train_value: train the value; None means unless ``goal_conditioned`` with one plan and no guidance. A model built
        with False has none
    :param n_value_steps: updates after which the value is left as it is; None for no end
    :param value_learning_rate: a float or a function of the remaining progress; None for ``learning_rate``
    :param action_weight: weight of the first action in the loss
    :param loss_discount: weight of each row in the loss relative to the one before
    :param padding: what follows the end of an episode in a window, ``"repeat"`` or ``"zeros"``; None draws no such windows
    :param count_padding: padding counts in the loss whatever ended the episode; False: after terminations alone
    :param termination_penalty: added to the last reward of an episode that terminated, in what the value learns
    :param ema_start: updates for which the averages are copies; 0 makes them averages over the updates so far at first
    :param ema_interval: updates between two moves of the averages
    :param max_grad_norm: largest norm of the gradient of each network; None for no bound
    :param normalize_observations: normalise observations in the policy; None means yes, unless the environment is a
        ``VecNormalize`` that does it. Actions are normalised in any case. The statistics are frozen: those of the data,
        without data of what the replay buffer holds at the first update
    :param compile: run the losses compiled by ``torch.compile``; ``"cuda_graphs"`` also replays them as CUDA graphs on a GPU
    :param precision: of losses and actions, ``"float32"`` or ``"bfloat16"`` (matrix products by autocast, weights in float32)
    :param stats_window_size: number of episodes that logged returns are averaged over
    :param tensorboard_log: folder of the TensorBoard log
    :param policy_kwargs: arguments of [DiffuserPolicy][sb3_diffusion.diffuser.policies.DiffuserPolicy]
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
    buffer_class: ClassVar[type[EpisodeReplayBuffer]] = TrajectoryReplayBuffer
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS
    default_total_timesteps = 1_000_000
    policy: DiffuserPolicy
    n_candidates: int
    guidance_scale: float
    guidance_scaling: str | None
    n_guidance_steps: int
    t_stopgrad: int
    n_action_steps: int
    warm_start: float
    tracker: Any
    actor: TrajectoryActor  # the planner, epsilon_theta of the paper
    value: TrajectoryValue | None  # J_phi

    def __init__(
        self,
        policy: str | type[DiffuserPolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule = 2e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int = 1_000,
        batch_size: int = 64,
        tau: float = 0.0005,
        gamma: float = 0.997,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        *,
        dataset: Any = None,
        offline_fraction: float = 0.5,
        horizon: int = 32,
        stride: int = 1,
        n_diffusion_steps: int = 20,
        noise_schedule: str = "cosine",
        prediction_type: str = "sample",
        sampler: str = "ddpm",
        n_sampling_steps: int | None = None,
        clip_denoised: float | None = None,
        normalization: str = "gaussian",
        backbone: str = "unet",
        goal_conditioned: bool = False,
        n_candidates: int | None = None,
        guidance_scale: float | None = None,
        guidance_scaling: str | None = "variance",
        n_guidance_steps: int = 2,
        t_stopgrad: int = 2,
        n_action_steps: int = 1,
        warm_start: float = 0.0,
        tracker: Any = None,
        train_planner: bool = True,
        train_value: bool | None = None,
        n_value_steps: int | None = None,
        value_learning_rate: float | Schedule | None = None,
        action_weight: float = 10.0,
        loss_discount: float = 1.0,
        padding: str | None = "repeat",
        count_padding: bool = False,
        termination_penalty: float = -100.0,
        ema_start: int = 0,
        ema_interval: int = 1,
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
        if train_value is None:
            train_value = not goal_conditioned or (n_candidates or 1) > 1 or bool(guidance_scale)
        if n_candidates is None:
            n_candidates = 64 if train_value else 1
        if guidance_scale is None:
            guidance_scale = 0.1 if train_value and not goal_conditioned else 0.0
        check_integer("horizon", horizon, 1)
        check_integer("stride", stride, 1)
        check_integer("n_diffusion_steps", n_diffusion_steps, 1)
        check_range("action_weight", action_weight, 0.0)
        check_range("loss_discount", loss_discount, 0.0)
        check_integer("ema_start", ema_start, 0)
        check_integer("ema_interval", ema_interval, 1)
        check_bound("max_grad_norm", max_grad_norm)
        if replay_buffer_class is not None and not issubclass(replay_buffer_class, TrajectoryReplayBuffer):
            raise ValueError(
                f"Diffuser learns from windows: `replay_buffer_class` must be a TrajectoryReplayBuffer, got "
                f"{replay_buffer_class.__name__}. To plan towards goals, set `goal_conditioned=True`."
            )
        planning = dict(
            n_candidates=n_candidates,
            guidance_scale=guidance_scale,
            guidance_scaling=guidance_scaling,
            n_guidance_steps=n_guidance_steps,
            t_stopgrad=t_stopgrad,
            n_action_steps=n_action_steps,
            warm_start=warm_start,
            tracker=tracker,
        )
        _check_planning(horizon * stride, train_value, **planning)
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
        self.horizon = horizon
        self.stride = stride
        self.n_diffusion_steps = n_diffusion_steps
        self.noise_schedule = noise_schedule
        self.prediction_type = prediction_type
        self.sampler = sampler
        self.n_sampling_steps = n_sampling_steps
        self.clip_denoised = clip_denoised
        self.normalization = normalization
        self.backbone = backbone
        self.goal_conditioned = goal_conditioned
        for name, value in planning.items():
            setattr(self, name, value)
        self.train_planner = train_planner
        self.train_value = train_value
        self.n_value_steps = n_value_steps
        self.value_learning_rate = value_learning_rate
        self.action_weight = action_weight
        self.loss_discount = loss_discount
        self.padding = padding
        self.count_padding = count_padding
        self.termination_penalty = termination_penalty
        self.ema_start = ema_start
        self.ema_interval = ema_interval
        self.max_grad_norm = max_grad_norm
        self._plan_state: tuple[np.ndarray, ...] | None = None  # of the environments while collecting transitions
        if _init_setup_model:
            self._setup_model()

    # ---------------------------------------------------------------- construction

    def _setup_model(self) -> None:
        super()._setup_model()
        rows = th.tensor(self.loss_discount, dtype=th.float64) ** th.arange(self.horizon)
        weights = (rows / rows.mean()).float().unsqueeze(1).repeat(1, self.actor.layout.dim)
        weights[0, : self.actor.layout.action_dim] = self.action_weight
        self._loss_weights = weights.to(self.device)

    def _policy_arguments(self) -> dict[str, Any]:
        return dict(
            horizon=self.horizon,
            stride=self.stride,
            goal_conditioned=self.goal_conditioned,
            normalization=self.normalization,
            backbone=self.backbone,
            noise_schedule=self.noise_schedule,
            n_diffusion_steps=self.n_diffusion_steps,
            prediction_type=self.prediction_type,
            clip=self.clip_denoised,
            sampler=self.sampler,
            n_sampling_steps=self.n_sampling_steps,
            with_value=self.train_value,
            **self._planning,
        )

    @property
    def _planning(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in PLANNING}

    def _create_aliases(self) -> None:
        self.actor = self.policy.actor
        self.value = self.policy.value
        for module in self.policy.modules():
            if isinstance(module, CompiledInference):
                module.use_compiler = bool(self.compile)

    def _setup_lr_schedule(self) -> None:
        super()._setup_lr_schedule()
        rate = self.learning_rate if self.value_learning_rate is None else self.value_learning_rate
        self.value_lr_schedule = FloatSchedule(rate)

    def _buffer_arguments(self) -> dict[str, Any]:
        return dict(
            horizon=self.horizon,
            stride=self.stride,
            padding=self.padding,
            gamma=self.gamma,
            termination_penalty=self.termination_penalty,
            generator=self.generator,
        )

    def set_sampler(self, sampler: str, n_sampling_steps: int | None = None) -> None:
        """
        Choose how the reverse chain is run from now on; a saved model remembers it.

        :param sampler: ``"ddpm"``, ``"ddim"``, ``"dpm_solver"`` or ``"heun"``
        :param n_sampling_steps: at most ``n_diffusion_steps``; None for all
        :raises ValueError: if there is no such sampler, or the chain is shorter
        """
        self.actor.set_sampler(sampler, n_sampling_steps)
        self.sampler, self.n_sampling_steps = sampler, n_sampling_steps

    def set_planning(self, **settings: Any) -> None:
        """
        Change how plans are made and followed from now on; a saved model remembers it.

        :param settings: any of ``n_candidates``, ``guidance_scale``, ``guidance_scaling``, ``n_guidance_steps``,
            ``t_stopgrad``, ``n_action_steps``, ``warm_start`` and ``tracker``, as in the constructor
        :raises ValueError: if there is no such setting, or it does not fit
        """
        for name in settings:
            check_choice("setting", name, PLANNING)
        _check_planning(self.horizon * self.stride, self.value is not None, **{**self._planning, **settings})
        for name, value in settings.items():
            setattr(self, name, value)
            setattr(self.policy, name, value)

    # ---------------------------------------------------------------- data

    def _fit_statistics(self, data: OfflineDataset) -> None:
        buffer = self.dataset_buffer
        assert isinstance(buffer, TrajectoryReplayBuffer)
        self._fit_to_buffer(buffer)

    def _fit_to_buffer(self, buffer: TrajectoryReplayBuffer) -> None:
        """Take the frozen statistics of windows and returns from all stored steps."""
        index = th.arange(buffer.size() * buffer.n_envs, device=buffer.device)
        env = self._vec_normalize_env
        layout = self.actor.layout
        states = layout.states(buffer.gather("observations", index, env)).cpu().numpy()
        actions = buffer.gather("actions", index)
        assert isinstance(actions, th.Tensor)
        for normalizer in self.policy.window_normalizers:
            normalizer.fit(slice(0, layout.action_dim), np.tile(actions.cpu().numpy(), self.stride))
            normalizer.fit(slice(layout.action_dim, None), states, normalize=self.normalize_observations)
        for value in () if self.value is None else (self.value, self.value.guide):
            value.fit_returns(buffer.returns_to_go(buffer.all_starts()))

    def sample_batch(self, batch_size: int) -> TrajectorySamples:  # type: ignore[override]
        """
        Windows to learn from: of the dataset, of the replay buffer, or of both, depending on the phase.

        :param batch_size: number of windows
        :return: the windows
        """
        return self._draw_batch(batch_size)  # type: ignore[return-value]

    # ---------------------------------------------------------------- learning

    def train(self, gradient_steps: int, batch_size: int | None = None) -> None:
        """
        Train the diffusion model and the value, each on the same windows.

        :param gradient_steps: number of updates
        :param batch_size: windows per update; None for the model's ``batch_size``
        """
        batch_size = self.batch_size if batch_size is None else batch_size
        self._fit_to_first_transitions()
        self.policy.set_training_mode(True)
        self._update_learning_rates()
        for _ in range(gradient_steps):
            batch = self.sample_batch(batch_size)
            windows = self._normalized_windows(batch)
            if self.train_planner:
                planner_loss = self._planner_loss(windows, batch, self._draw_noise(windows), self._draw_levels(len(windows)))
                self._minimize("planner_loss", self.actor.optimizer, planner_loss)
                self._update_average(self.actor)
            if self.value is not None and self._value_learns:
                level, noise = self._draw_levels(len(windows)), self._draw_noise(windows)
                value_loss = self._value_loss(self.value, windows, batch, noise, level)
                self._minimize("value_loss", self.value.optimizer, value_loss)
                self._update_average(self.value)
            self._n_updates += 1
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    @property
    def _value_learns(self) -> bool:
        return self.n_value_steps is None or self._n_updates < self.n_value_steps

    def _update_learning_rates(self) -> None:
        self._update_learning_rate(self.actor.optimizer)
        if self.value is not None:
            update_learning_rate(self.value.optimizer, self.value_lr_schedule(self._current_progress_remaining))

    def _update_average(self, network: TrajectoryActor | TrajectoryValue) -> None:
        n = self._n_updates + 1
        if n <= self.ema_start:
            decay = 0.0
        elif self._n_updates % self.ema_interval:
            return
        else:
            decay = 1.0 - self.tau if self.ema_start > 0 else warmed_up_decay(1.0 - self.tau, n)
        network.update_average(decay)

    def _normalized_windows(self, batch: TrajectorySamples) -> th.Tensor:
        """Actions and states side by side, normalised, shape ``(batch_size, horizon, dim)``."""
        states = self.actor.layout.states(batch.observations)
        return self.actor.window_normalizer(th.cat([batch.actions, states], dim=-1))

    def _draw_levels(self, n: int) -> th.Tensor:
        return self._draw_integers(self.n_diffusion_steps, n)

    def _draw_noise(self, windows: th.Tensor) -> th.Tensor:
        return self._draw_normal(*windows.shape)

    @accelerated
    def _planner_loss(self, windows: th.Tensor, batch: TrajectorySamples, noise: th.Tensor, level: th.Tensor) -> th.Tensor:
        r"""$E[w_{hc} \|\epsilon_\theta(x_i, i) - \mathrm{target}\|^2]$ with the given entries clean (section 3.1)."""
        errors = self.actor.loss(windows, noise, level)
        counts = th.ones_like(batch.mask) if self.count_padding else th.maximum(batch.mask, batch.terminated)
        return (errors * self._loss_weights).mean(dim=-1).mul(counts).sum() / average(counts.sum())

    @accelerated
    def _value_loss(
        self,
        value: TrajectoryValue,
        windows: th.Tensor,
        batch: TrajectorySamples,
        noise: th.Tensor,
        level: th.Tensor,
    ) -> th.Tensor:
        r"""$E[(J_\phi(x_i, i) - \sum_t \gamma^t r_t)^2]$, the returns being normalised (section 3.2)."""
        noisy = self.actor.denoiser.corrupt(windows, noise, level)
        return value.loss(noisy, windows, level, batch.returns).mean()

    # ---------------------------------------------------------------- acting

    def plan(
        self,
        obs: Any,
        goal: Any = None,
        n_candidates: int | None = None,
        deterministic: bool = False,
        seed: int | None = None,
    ) -> Plan:
        """
        Plan from each observation of a batch.

        :param obs: one observation, shape ``obs_shape``, or a batch, ``(n, *obs_shape)``; a dict of such arrays for ``Dict``
            observations
        :param goal: where the windows end, shape ``goal_shape``, or ``(n, *goal_shape)`` with one per observation; only if
            ``goal_conditioned``. None takes ``desired_goal``
        :param n_candidates: plans drawn per observation; None for the model's
        :param deterministic: draw nothing at random, see [DiffuserPolicy][sb3_diffusion.diffuser.policies.DiffuserPolicy]
        :param seed: of the random numbers of this call; None goes on with the model's own
        :return: the best plan of each observation: ``observations`` ``(n, horizon, *obs_shape)`` and ``actions``
            ``(n, horizon, action_dim)`` in env units, ``values`` ``(n,)``; of a single observation, without
            the axis of the batch
        :raises ValueError: if there is a goal and no place for it, or the other way round, or no value to choose by
        """
        n_candidates = self.n_candidates if n_candidates is None else n_candidates
        check_integer("n_candidates", n_candidates, 1)
        if n_candidates > 1 and self.value is None:
            raise ValueError(
                f"Choosing among {n_candidates} plans needs a value: this model was built with `train_value=False`."
            )
        if goal is not None and not self.goal_conditioned:
            raise ValueError(
                "`goal` needs a model that was trained with the end of its windows given: `goal_conditioned=True`."
            )
        policy, layout = self.policy, self.actor.layout
        policy.set_training_mode(False)
        tensors, vectorized = policy.obs_to_tensor(obs)
        n = len(layout.states(tensors))
        if goal is not None:
            shape, goal = layout.goal_shape, np.asarray(goal, dtype=np.float32)
            if goal.shape not in (shape, (1, *shape), (n, *shape)):
                raise ValueError(
                    f"`goal` must have the shape {shape}, or {(n, *shape)} with one for each observation: got {goal.shape}."
                )
            goal = np.broadcast_to(goal, (n, *shape)).copy()
        seeds = policy.draw_seeds(n) if seed is None else np.random.default_rng(seed).integers(2**62, size=n)
        with th.no_grad(), autocast(self.precision, self.device):
            condition = self.actor.condition(tensors, None if goal is None else th.as_tensor(goal, device=self.device))
            latents = policy.latents(seeds, n_candidates, deterministic)
            windows, values = policy.plan_windows(condition, latents)
        if layout.has_goal_key and goal is None:
            goal = tensors[GOAL_KEY].cpu().numpy()  # type: ignore[index]
        plan = policy.decode(windows, values, goal if layout.has_goal_key else None)
        if vectorized:
            return plan
        rows = plan.observations
        first = {key: value[0] for key, value in rows.items()} if isinstance(rows, dict) else rows[0]
        return Plan(first, plan.actions[0], plan.values[0])

    @property
    def goal_space(self) -> spaces.Box:
        """
        Where goals lie: the range of the training data. What is constant there may move by a thousandth, as no agent can
        scale its actions to an interval without width.
        """
        layout, normalizer = self.actor.layout, self.actor.window_normalizer
        low, high = (
            bound[layout.goal_channels].cpu().numpy().reshape(layout.goal_shape) for bound in (normalizer.low, normalizer.high)
        )
        margin = np.where(low == high, 1e-3 * np.maximum(1.0, np.abs(low)), 0.0)
        return spaces.Box((low - margin).astype(np.float32), (high + margin).astype(np.float32), dtype=np.float32)

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """Plans are followed for ``n_action_steps`` while collecting transitions too."""
        if self.num_timesteps < learning_starts:
            return super()._sample_action(learning_starts, action_noise, n_envs)
        assert self._last_obs is not None
        begins = self._last_episode_starts
        state = None if begins is None or np.all(begins) else self._plan_state
        action, self._plan_state = self.predict(self._last_obs, state, begins)
        scaled_action = self.policy.scale_action(action)
        if action_noise is not None:
            scaled_action = np.clip(scaled_action + action_noise(), -1.0, 1.0)
        return self.policy.unscale_action(scaled_action), scaled_action

    def _store_transition(
        self, replay_buffer: Any, buffer_action: Any, new_obs: Any, reward: Any, dones: np.ndarray, infos: Any
    ) -> None:
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        self._last_episode_starts = dones

    # ---------------------------------------------------------------- files

    def _excluded_save_params(self) -> list[str]:
        own = ["actor", "value", "value_lr_schedule", "_loss_weights"]
        return [*super()._excluded_save_params(), *own]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        names = ["actor"] if self.value is None else ["actor", "value"]
        return ["policy", *[f"{name}.optimizer" for name in names]], []
