"""Diffusion Spectral Representation."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch as th
import torch.nn.functional as F
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, Schedule
from stable_baselines3.common.utils import FloatSchedule, update_learning_rate

from sb3_diffusion.buffers import Batch
from sb3_diffusion.common.base_class import OfflineAlgorithm
from sb3_diffusion.common.compilation import accelerated, accelerated_actor_loss
from sb3_diffusion.common.distributed import average, take_from_first
from sb3_diffusion.common.utils import MIN_SCALE, check_bound, check_choice, check_integer, check_range
from sb3_diffusion.datasets import OfflineDataset
from sb3_diffusion.diffsr.linear import LinearFit, fit_linear
from sb3_diffusion.diffsr.networks import (
    FEATURE_LOSSES,
    decorrelation_penalty,
    elliptical_bonus,
    feature_errors,
    unit_features,
)
from sb3_diffusion.diffsr.policies import (
    CnnPolicy,
    DeterministicActor,
    DiffSRPolicy,
    MlpPolicy,
    MultiInputPolicy,
    SpectralCritic,
    SquashedGaussianActor,
)
from sb3_diffusion.diffsr.presets import PRESETS


class DiffSR(OfflineAlgorithm):
    r"""
    Diffusion Spectral Representation (Diff-SR): TD3 or SAC on features that a diffusion model of the next state teaches.

    Paper: https://arxiv.org/abs/2406.16121 (Shribak, Gao, Li, Xiao, Dai, NeurIPS 2024), followed up by
    https://arxiv.org/abs/2512.15036; authors' code: haotiansun14/rl-rep (SAC on MuJoCo, DrQ-v2 on images),
    typoverflow/spectral-rl2 (TD3). If the next state's law is $\exp(\psi(s, a)^\top \nu(s'))$ up to normalisation, every
    action value is linear in the Fourier features of $\psi(s, a)$. The score of the perturbed next state is then
    $\psi(s, a)^\top \zeta(\tilde s, k)$ at noise level $k$, and denoising teaches $\psi$. Nothing is ever sampled from the
    model: acting and learning cost no reverse chain.

    The defaults follow the authors' TD3. Departures, and why:

    * The loss is that of the noise, as in the code for TD3, where the paper has the score itself, whose errors at the
      smallest noise outweigh all others; ``feature_loss`` offers all published forms.
    * A head on $\psi$ learns the reward (``reward_coef``), as in the code for TD3: the theory takes the reward to be known and
      linear in the features.
    * The critic sees the moving average of $\psi$ on both sides of its error (``target_features``), as in the code for TD3,
      also with SAC, whose code has the features just trained: these move under the critic.
    * Both actors have the heads of TD3 on $\psi$: normalisation, sines and cosines. The code for SAC has sines only, and no
      normalisation.
    * Fixed frequencies are drawn from $N(0, I / d)$ and not from $N(0, I)$: $\psi$ is normalised to length $\sqrt{d}$.
    * Networks are residual perceptrons of layers of normalisation, activation and linear map; $\psi$ has no embeddings of
      state and action before it.
    * Online, the statistics that observations are normalised by are those of all stored ones, taken before the first update
      and whenever their number has doubled, where the authors' move with each step. Both are applied when batches are drawn.
    * Offline, which the authors do not treat, the actor also imitates the data (``bc_coef``), as in TD3+BC (arXiv
      2106.06860): values of actions that are not in the data are free to rise.
    * With ``n_steps`` above 1 the features learn from single steps of their own batch: the law of several steps is that of the
      behaviour.
    * Images: the state is what the critic's features extractor makes of them. What is diffused is the next state by the
      moving average of the extractor, without gradient and normalised over its entries; the authors' is the code of an
      autoencoder. The critic's loss trains a learned extractor too (``critic_trains_features``), as the authors' does.
      There is no augmentation of images.
    * The elliptical bonus (``exploration_coef``) stands in the paper's theory and in no published code.
    * The noise level is told by the embedding of its index, as in the code for TD3; the one for SAC gives
      $\bar\alpha_k$ itself.

    :param policy: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"`` or a policy class
    :param env: Gymnasium env, VecEnv, id or None; with None it comes from the dataset
    :param learning_rate: learning rate of the actor; a float or a function of the remaining progress
    :param buffer_size: capacity of the replay buffer of online transitions
    :param learning_starts: env steps before the first online update; 5,000 to 25,000 in the authors' runs
    :param batch_size: transitions per update
    :param tau: Polyak coefficient of all targets
    :param gamma: discount
    :param train_freq: env steps (or ``(n, "episode")``) between updates online
    :param gradient_steps: updates after each rollout online; -1 for as many as env steps
    :param action_noise: noise added to the actions when exploring, in the place of ``exploration_noise``
    :param replay_buffer_class: class of the replay buffer of online transitions
    :param replay_buffer_kwargs: its further arguments
    :param optimize_memory_usage: do not store next observations
    :param n_steps: length of the n-step returns
    :param dataset: logged data, see [load_dataset][sb3_diffusion.load_dataset]
    :param offline_fraction: share of each batch that comes from the dataset while fine-tuning, in [0, 1]
    :param n_pretrain_steps: gradient steps before the main loop, offline, in which the actor imitates the data alone while
        features and critic learn
    :param reward_transform: None, ``"normalize"``, ``"iql_locomotion"``, ``"iql_antmaze"``, ``"cql_antmaze"`` or ``"antmaze"``
    :param actor_type: ``"td3"``, deterministic with exploration noise, or ``"sac"``, stochastic with an entropy bonus
    :param feature_dim: size of the features, $d$
    :param score_net_width: width of the second network, $\zeta$; its last layer has ``score_net_width * feature_dim`` times
        the size of the state weights
    :param n_frequencies: Fourier frequencies of each head on the features
    :param trainable_frequencies: learn the frequencies; otherwise they stay random
    :param n_feature_steps: batches that the features learn from in each update; the critic learns from the last
    :param feature_loss: ``"noise"``, ``"score"``, ``"weighted_score"`` or ``"displacement"``, see
        [feature_errors][sb3_diffusion.diffsr.networks.feature_errors]
    :param noise_scale: standard deviation of what next states are mixed with
    :param noise_schedule: ``"vp"``, ``"linear"``, ``"cosine"`` or ``"beta_law"``, see
        [feature_noise_betas][sb3_diffusion.diffsr.networks.feature_noise_betas]
    :param n_diffusion_steps: number of noise levels
    :param n_stack: length of the history that an observation is, as ``VecFrameStack`` or ``OfflineDataset.stack`` makes it of
        vectors: the features learn to tell the newest observation of the next history, the rest of which is known
    :param reward_coef: weight of the reward head's loss
    :param decorrelation_coef: weight of a penalty on correlated hidden features in the critic's heads
    :param target_features: critic and actor see the moving average of $\psi$; False for $\psi$ as it is
    :param critic_trains_features: the critic's loss reaches $\psi$ and the features extractor; None means only where the
        extractor has weights
    :param exploration_coef: weight of the elliptical bonus added to rewards online
    :param policy_delay: updates of the critic between two of the actor
    :param target_update_interval: updates between two moves of the targets
    :param target_policy_noise: standard deviation of the noise on the target's actions (TD3)
    :param target_noise_clip: bound of that noise (TD3)
    :param q_reduction: what the actor climbs: ``"mean"`` or ``"min"`` of the action values; None is the mean for TD3 and
        the minimum for SAC
    :param ent_coef: temperature of SAC: a number, ``"auto"`` to learn it from 1, or ``"auto_0.1"`` to learn it from 0.1
    :param target_entropy: of the learned temperature; ``"auto"`` is minus the number of action dimensions
    :param bc_coef: weight of imitation offline, beside the action value divided by its mean size; the default is TD3+BC's
    :param exploration_noise: standard deviation of the normal noise on the actions of TD3, scaled to [-1, 1], whenever it
        does not act deterministically
    :param critic_learning_rate: learning rate of the action values; a float or a function of the remaining progress, None for
        ``learning_rate``
    :param feature_learning_rate: learning rate of $\psi$, $\zeta$ and the reward head; likewise
    :param max_grad_norm: largest norm of the gradient of each optimiser; None for no bound
    :param normalize_observations: normalise vector observations by statistics of the data, kept in the policy; None means yes,
        unless the environment is a ``VecNormalize`` that does it. Without data the statistics are those of the replay buffer,
        taken anew whenever it has doubled
    :param compile: run the losses compiled by ``torch.compile``; ``"cuda_graphs"`` also replays them as CUDA graphs on a GPU
    :param precision: of losses and actions, ``"float32"`` or ``"bfloat16"`` (matrix products by autocast, weights in float32)
    :param stats_window_size: number of episodes that logged returns are averaged over
    :param tensorboard_log: folder of the TensorBoard log
    :param policy_kwargs: arguments of [DiffSRPolicy][sb3_diffusion.diffsr.policies.DiffSRPolicy]
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
    policy: DiffSRPolicy
    actor: DeterministicActor | SquashedGaussianActor  # pi
    critic: SpectralCritic  # psi, zeta, reward head, Q_i
    critic_target: SpectralCritic  # their averages: psi bar, Q bar_i

    def __init__(
        self,
        policy: str | type[DiffSRPolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int = 100,
        batch_size: int = 512,
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
        actor_type: str = "td3",
        feature_dim: int = 512,
        score_net_width: int = 512,
        n_frequencies: int = 512,
        trainable_frequencies: bool = True,
        n_feature_steps: int = 1,
        feature_loss: str = "noise",
        noise_scale: float = 1.0,
        noise_schedule: str = "vp",
        n_diffusion_steps: int = 50,
        n_stack: int = 1,
        reward_coef: float = 0.1,
        decorrelation_coef: float = 0.0,
        target_features: bool = True,
        critic_trains_features: bool | None = None,
        exploration_coef: float = 0.0,
        policy_delay: int = 1,
        target_update_interval: int = 1,
        target_policy_noise: float = 0.2,
        target_noise_clip: float = 0.3,
        q_reduction: str | None = None,
        ent_coef: float | str = "auto_0.1",
        target_entropy: float | str = "auto",
        bc_coef: float = 0.4,
        exploration_noise: float = 0.2,
        critic_learning_rate: float | Schedule | None = None,
        feature_learning_rate: float | Schedule | None = 1e-4,
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
        check_choice("actor_type", actor_type, ("td3", "sac"))
        check_choice("feature_loss", feature_loss, FEATURE_LOSSES)
        check_choice("q_reduction", q_reduction, ("mean", "min", None))
        for name, value in dict(
            feature_dim=feature_dim,
            score_net_width=score_net_width,
            n_frequencies=n_frequencies,
            n_feature_steps=n_feature_steps,
            n_diffusion_steps=n_diffusion_steps,
            n_stack=n_stack,
            policy_delay=policy_delay,
            target_update_interval=target_update_interval,
        ).items():
            check_integer(name, value, 1)
        for name, number in dict(
            reward_coef=reward_coef,
            decorrelation_coef=decorrelation_coef,
            exploration_coef=exploration_coef,
            target_policy_noise=target_policy_noise,
            target_noise_clip=target_noise_clip,
            bc_coef=bc_coef,
            exploration_noise=exploration_noise,
        ).items():
            check_range(name, number, 0.0)
        if not noise_scale > 0.0:
            raise ValueError(f"`noise_scale` must be positive: got {noise_scale}.")
        check_bound("max_grad_norm", max_grad_norm)
        if decorrelation_coef > 0.0 and batch_size < 2:
            raise ValueError(f"`decorrelation_coef` compares rows: `batch_size` must be at least 2, got {batch_size}.")
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
            dataset=dataset,
            offline_fraction=offline_fraction,
            n_pretrain_steps=n_pretrain_steps,
            reward_transform=reward_transform,
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
        self.actor_type = actor_type
        self.feature_dim = feature_dim
        self.score_net_width = score_net_width
        self.n_frequencies = n_frequencies
        self.trainable_frequencies = trainable_frequencies
        self.n_feature_steps = n_feature_steps
        self.feature_loss = feature_loss
        self.noise_scale = noise_scale
        self.noise_schedule = noise_schedule
        self.n_diffusion_steps = n_diffusion_steps
        self.n_stack = n_stack
        self.reward_coef = reward_coef
        self.decorrelation_coef = decorrelation_coef
        self.target_features = target_features
        self.critic_trains_features = critic_trains_features
        self.exploration_coef = exploration_coef
        self.policy_delay = policy_delay
        self.target_update_interval = target_update_interval
        self.target_policy_noise = target_policy_noise
        self.target_noise_clip = target_noise_clip
        self.q_reduction = q_reduction
        self.ent_coef = ent_coef
        self.target_entropy = target_entropy
        self.bc_coef = bc_coef
        self.exploration_noise = exploration_noise
        self.critic_learning_rate = critic_learning_rate
        self.feature_learning_rate = feature_learning_rate
        self.max_grad_norm = max_grad_norm
        self._n_steps_fitted: int | None = 0  # stored steps that the statistics come from; None once they are a dataset's
        _initial_ent_coef(ent_coef)
        if _init_setup_model:
            self._setup_model()

    # ---------------------------------------------------------------- construction

    def _policy_arguments(self) -> dict[str, Any]:
        return dict(
            actor_type=self.actor_type,
            noise_std=self.exploration_noise if self.action_noise is None else 0.0,
            feature_dim=self.feature_dim,
            score_net_width=self.score_net_width,
            n_frequencies=self.n_frequencies,
            trainable_frequencies=self.trainable_frequencies,
            noise_schedule=self.noise_schedule,
            n_diffusion_steps=self.n_diffusion_steps,
            n_stack=self.n_stack,
            initial_ent_coef=_initial_ent_coef(self.ent_coef) if self.actor_type == "sac" else None,
            with_covariance=self.exploration_coef > 0.0,
            normalize_observations=self.normalize_observations,
            critic_learning_rate=self.critic_lr_schedule(1.0),
            feature_learning_rate=self.feature_lr_schedule(1.0),
        )

    def _create_aliases(self) -> None:
        self.actor = self.policy.actor
        self.critic = self.policy.critic
        self.critic_target = self.policy.critic_target
        self.actor_target = self.policy.actor_target if self.actor_type == "td3" else None
        self.log_ent_coef = self.policy.log_ent_coef

    def _setup_lr_schedule(self) -> None:
        super()._setup_lr_schedule()
        rates = (self.critic_learning_rate, self.feature_learning_rate)
        critic_rate, feature_rate = (self.learning_rate if rate is None else rate for rate in rates)
        self.critic_lr_schedule, self.feature_lr_schedule = FloatSchedule(critic_rate), FloatSchedule(feature_rate)

    # ---------------------------------------------------------------- data

    def _fit_statistics(self, data: OfflineDataset) -> None:
        super()._fit_statistics(data)
        self._n_steps_fitted = None

    def _refit_statistics(self) -> None:
        """Take the statistics of observations from the replay buffer, if it has doubled since they were taken last."""
        buffer = self.replay_buffer
        assert buffer is not None
        n_steps = buffer.size() * buffer.n_envs
        if not self.normalize_observations or self._n_steps_fitted is None or n_steps < max(1, 2 * self._n_steps_fitted):
            return

        def stored(array: np.ndarray) -> np.ndarray:
            return array[: buffer.size()].reshape(-1, *array.shape[2:])

        observations: Any = buffer.observations
        is_dict = isinstance(observations, dict)
        self.policy.fit_normalizer(
            {key: stored(array) for key, array in observations.items()} if is_dict else stored(observations)
        )
        take_from_first(self.policy.buffers(), self.device)  # several processes have replay buffers of their own
        self._n_steps_fitted = n_steps

    def _sample_single_steps(self, batch_size: int) -> Batch:
        """Transitions of one step each, also where ``n_steps`` is larger."""
        buffers: list[Any] = [b for b in (self.dataset_buffer, self.replay_buffer) if hasattr(b, "n_steps")]
        lengths = [buffer.n_steps for buffer in buffers]
        for buffer in buffers:
            buffer.n_steps = 1
        try:
            return self.sample_batch(batch_size)
        finally:
            for buffer, length in zip(buffers, lengths, strict=True):
                buffer.n_steps = length

    # ---------------------------------------------------------------- Algorithm 2

    def train(self, gradient_steps: int, batch_size: int | None = None) -> None:
        """
        Run ``gradient_steps`` passes of the inner loop of Algorithm 2: features, critic, actor, targets.

        :param gradient_steps: number of passes
        :param batch_size: transitions per pass; None for the model's ``batch_size``
        """
        batch_size = self.batch_size if batch_size is None else batch_size
        if self.dataset is None:
            self._refit_statistics()
        self.policy.set_training_mode(True)
        self._update_learning_rates()
        for _ in range(gradient_steps):
            for _ in range(self.n_feature_steps):
                batch = self.sample_batch(batch_size)
                self._train_features(batch)
            if self._explores:
                self._move_feature_covariance(batch)
            critic_loss, targets, parts = self._critic_loss(batch, self._draw_normal(*batch.actions.shape))
            self._watch_targets(targets, batch.rewards)
            self._minimize("critic_loss", self.critic.optimizer, critic_loss, parts)
            if self._n_updates % self.policy_delay == 0:
                self._train_actor(batch)
            if self._n_updates % self.target_update_interval == 0:
                self.policy.update_targets(self.tau)
            if self.pretraining:
                self._count_pretraining_step()
            self._n_updates += 1
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _train_features(self, batch: Batch) -> None:
        """One step on the features, Algorithm 1."""
        transitions = batch if batch.discounts is None else self._sample_single_steps(len(batch.rewards))
        n = len(transitions.rewards)
        level = self._draw_integers(self.n_diffusion_steps, n)
        noise = self._draw_normal(n, self.critic.diffused_dim)
        loss, parts = self._feature_loss(transitions, noise, level)
        if self._critic_reaches_features:
            loss = loss + self._critic_loss(batch, self._draw_normal(*batch.actions.shape))[0]
        self._minimize("feature_loss", self.critic.feature_optimizer, loss, parts)
        self._last_batch = batch  # the critic's, which its errors are described by

    @property
    def _explores(self) -> bool:
        """Whether rewards have a bonus, which only happens online."""
        return self.exploration_coef > 0.0 and not self._offline

    def _move_feature_covariance(self, batch: Batch) -> None:
        """Move the covariance of the features towards that of the batch; it starts from 0, as if nothing had been seen."""
        self.policy.feature_covariance.lerp_(average(self._second_moment(batch)), self.tau)

    def _train_actor(self, batch: Batch) -> None:
        """One step on the actor, and on the temperature if it is learned."""
        actions, log_prob = self.actor.sample(batch.observations, self._draw_normal(*batch.actions.shape))
        self._minimize("actor_loss", self.actor.optimizer, *self._actor_loss(batch, actions, log_prob))
        if self.log_ent_coef is not None and log_prob is not None and not self.pretraining:
            self._add_loss("ent_coef", self.log_ent_coef.detach().exp().squeeze())
            self._minimize("ent_coef_loss", self.policy.ent_coef_optimizer, self._ent_coef_loss(log_prob.detach()))

    def _update_learning_rates(self) -> None:
        others = [] if self.log_ent_coef is None else [self.policy.ent_coef_optimizer]
        self._update_learning_rate([self.actor.optimizer, *others])
        critic_schedule = self.lr_schedule if self.critic_learning_rate is None else self.critic_lr_schedule
        feature_schedule = self.lr_schedule if self.feature_learning_rate is None else self.feature_lr_schedule
        update_learning_rate(self.critic.optimizer, critic_schedule(self._current_progress_remaining))
        update_learning_rate(self.critic.feature_optimizer, feature_schedule(self._current_progress_remaining))

    @property
    def _critic_reaches_features(self) -> bool:
        return self.critic.learns_states if self.critic_trains_features is None else self.critic_trains_features

    def _temperature(self) -> th.Tensor | float:
        r"""$\alpha$, without gradient; 0 for TD3."""
        if self.actor_type == "td3":
            return 0.0
        return float(self.ent_coef) if self.log_ent_coef is None else self.log_ent_coef.detach().exp()

    # ---------------------------------------------------------------- losses

    @accelerated
    def _feature_loss(self, batch: Batch, noise: th.Tensor, level: th.Tensor) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        r"""
        $E[\|\psi(s, a)^\top \zeta(\tilde s, k) - \epsilon\|^2] + c_r E[(\hat r(\psi(s, a)) - r)^2]$ with
        $\tilde s = \sqrt{\bar\alpha_k} s' + \sqrt{1 - \bar\alpha_k} \epsilon$ (Algorithm 1; other forms of the first term by
        ``feature_loss``). The next state $s'$ is the target's, without gradient.

        :return: the loss, and its parts
        """
        psi = self.critic.spectral_features(batch.observations, batch.actions)
        with th.no_grad():
            next_states = self.critic_target.diffused(batch.next_observations)
        score_loss = self._score_loss(psi, next_states, noise, level)
        if self.reward_coef == 0.0:
            return score_loss, {"score_loss": score_loss}
        reward_loss = F.mse_loss(self.critic.reward_net(psi).squeeze(0), batch.rewards)
        return score_loss + self.reward_coef * reward_loss, {"score_loss": score_loss, "reward_loss": reward_loss}

    def _score_loss(self, psi: th.Tensor, next_states: th.Tensor, noise: th.Tensor, level: th.Tensor) -> th.Tensor:
        """The first term of the feature loss, a sum over entries of the state and a mean over rows."""
        noisy = self.critic.denoiser.corrupt(next_states, self.noise_scale * noise, level)
        f = self.critic.denoiser.net(noisy, psi, level)
        sigma = self.critic.denoiser.scales(level)[1].unsqueeze(1)
        errors = feature_errors(self.feature_loss, f, noise, sigma, self.noise_scale, self.feature_dim)
        return errors.sum(dim=1).mean()

    @accelerated
    def _critic_loss(self, batch: Batch, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor, dict[str, th.Tensor]]:
        r"""
        $\sum_i E[(Q_i(\bar\psi(s, a)) - r - \gamma (\min_j \bar Q_j(\bar\psi(s', a')) - \alpha \log \pi(a'|s')))^2]$, and the
        penalty on correlated hidden features.

        :return: the loss, the targets, shape ``(batch_size, 1)``, and what else is logged
        """
        parts: dict[str, th.Tensor] = {}
        with th.no_grad():
            fixed = self._value_features(batch.observations, batch.actions)
            discounts = self.gamma if batch.discounts is None else batch.discounts
            next_values = self._next_values(batch, noise)
            targets = batch.rewards + (1.0 - batch.dones) * discounts * next_values
            if self._explores:
                bonus = self._bonus(fixed)
                targets, parts["exploration_bonus"] = targets + bonus, bonus.mean()
        psi = fixed
        if self._critic_reaches_features:
            psi = self.critic.spectral_features(batch.observations, batch.actions)
        hidden = self.critic.q_net.hidden(psi)
        loss = (self.critic.q_net.rest(hidden) - targets).square().mean(dim=(1, 2)).sum()
        if self.decorrelation_coef > 0.0:
            loss = loss + self.decorrelation_coef * decorrelation_penalty(hidden).sum()
        return loss, targets, parts

    def _next_values(self, batch: Batch, noise: th.Tensor) -> th.Tensor:
        r"""
        $\min_j \bar Q_j(\bar\psi(s', a')) - \alpha \log \pi(a'|s')$, shape ``(batch_size, 1)``. For TD3 $a'$ is the target
        actor's with clipped noise and $\alpha$ is 0, for SAC it is drawn from the actor.
        """
        if self.actor_target is not None:
            smoothing = (self.target_policy_noise * noise).clamp(-self.target_noise_clip, self.target_noise_clip)
            actions = (self.actor_target.mean(batch.next_observations) + smoothing).clamp(-1.0, 1.0)
            entropy: th.Tensor | float = 0.0
        else:
            actions, log_prob = self.actor.sample(batch.next_observations, noise)
            assert log_prob is not None
            entropy = -self._temperature() * log_prob
        psi = self._value_features(batch.next_observations, actions)
        return self.critic_target.q_net(psi).amin(dim=0) + entropy

    def _value_features(self, observations: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        r"""What action values are built on: $\bar\psi(s, a)$, or $\psi(s, a)$ without ``target_features``."""
        network = self.critic_target if self.target_features else self.critic
        return network.spectral_features(observations, actions)

    @accelerated
    def _second_moment(self, batch: Batch) -> th.Tensor:
        r"""$E[\phi \phi^\top]$ of the batch, $\phi$ being normalised features, shape ``(feature_dim, feature_dim)``."""
        with th.no_grad():
            phi = unit_features(self._value_features(batch.observations, batch.actions))
            return phi.T @ phi / len(phi)

    def _bonus(self, psi: th.Tensor) -> th.Tensor:
        r"""$b \sqrt{\phi^\top (n C + I)^{-1} \phi}$, $\phi$ being normalised features and $C$ their covariance."""
        assert self.replay_buffer is not None
        n_samples = self.replay_buffer.size() * self.replay_buffer.n_envs
        return self.exploration_coef * elliptical_bonus(unit_features(psi), self.policy.feature_covariance, n_samples)

    @accelerated_actor_loss
    def _actor_loss(
        self, batch: Batch, actions: th.Tensor, log_prob: th.Tensor | None
    ) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        r"""
        $E[\alpha \log \pi(a|s) - Q(\bar\psi(s, a))]$ at the actor's $a$; $Q$ is the mean (TD3) or minimum (SAC) of the $Q_i$.
        Offline it is divided by $E|Q|$, and imitation is added (arXiv 2106.06860, eq. 5); pretraining imitates alone.

        :return: the loss, and its parts
        """
        if self.pretraining:
            bc_loss = self._bc_loss(batch, actions)
            return bc_loss, {"bc_loss": bc_loss}
        q_values = self.critic.q_net(self._value_features(batch.observations, actions))
        reduction = self.q_reduction or ("mean" if self.actor_type == "td3" else "min")
        q_value = q_values.mean(dim=0) if reduction == "mean" else q_values.amin(dim=0)
        loss = -q_value.mean()
        if log_prob is not None:
            loss = loss + (self._temperature() * log_prob).mean()
        if self._offline and self.bc_coef > 0.0:
            scale = average(q_value.detach().abs().mean()).clamp(min=MIN_SCALE)
            bc_loss = self._bc_loss(batch, actions)
            return loss / scale + self.bc_coef * bc_loss, {"bc_loss": bc_loss}
        return loss, {}

    def _bc_loss(self, batch: Batch, actions: th.Tensor) -> th.Tensor:
        r"""$E\|a_\theta - a\|^2$, a mean over dimensions."""
        return F.mse_loss(actions, batch.actions)

    def _ent_coef_loss(self, log_prob: th.Tensor) -> th.Tensor:
        r"""$-\log\alpha\, E[\log \pi(a|s) + \bar H]$ (arXiv 1812.05905, eq. 18, of the logarithm)."""
        assert self.log_ent_coef is not None
        target = -float(self.actor.action_dim) if self.target_entropy == "auto" else float(self.target_entropy)
        return -(self.log_ent_coef * (log_prob + target)).mean()

    # ---------------------------------------------------------------- features

    def features(self, observations: Any, actions: Any) -> Any:
        r"""
        The features that the critic is built on: $\bar\psi(s, a)$, or $\psi(s, a)$ without ``target_features``.

        :param observations: as for ``predict``, array or tensor ``(batch_size, *obs_shape)``, or a dict of such
        :param actions: in env units, shape ``(batch_size, *action_shape)``
        :return: shape ``(batch_size, feature_dim)``: a tensor if ``actions`` is one, otherwise an array
        """
        self.policy.set_training_mode(False)
        space: Any = self.action_space
        low, high = (th.as_tensor(bound, device=self.device).float() for bound in (space.low, space.high))
        given = th.as_tensor(actions, device=self.device).float().reshape(-1, *space.shape)
        scaled = (2.0 * (given - low) / (high - low) - 1.0).flatten(1)
        with th.no_grad():
            features = self._value_features(self._as_tensors(observations), scaled)
        return features if isinstance(actions, th.Tensor) else features.cpu().numpy()

    def _as_tensors(self, observations: Any) -> Any:
        values = list(observations.values()) if isinstance(observations, dict) else [observations]
        if not all(isinstance(value, th.Tensor) for value in values):
            return self.policy.obs_to_tensor(observations)[0]
        if isinstance(observations, dict):
            return {key: value.to(self.device) for key, value in observations.items()}
        return observations.to(self.device)

    def fit_linear(
        self, observations: Any, actions: Any, targets: Any, ridge: float = 1e-6, n_frequencies: int = 0, seed: int = 0
    ) -> LinearFit:
        """
        Fit a reward, or any function of state and action, linearly on the features.

        ```python
        fit = model.fit_linear(observations, actions, rewards, n_frequencies=512)
        predicted = fit.predict(th.as_tensor(model.features(observations, actions)))
        ```

        :param observations: as for ``features``
        :param actions: as for ``features``
        :param targets: what to fit, shape ``(batch_size,)``
        :param ridge: see [fit_linear][sb3_diffusion.diffsr.fit_linear]
        :param n_frequencies: see there; 0 is linear in the features themselves
        :param seed: of the frequencies
        :return: the fit
        """
        features = self.features(observations, th.as_tensor(actions))
        return fit_linear(features, th.as_tensor(targets, device=self.device), ridge, n_frequencies, seed=seed)

    # ---------------------------------------------------------------- files

    def _excluded_save_params(self) -> list[str]:
        aliases = ["actor", "actor_target", "critic", "critic_target", "log_ent_coef"]
        return [*super()._excluded_save_params(), *aliases, "critic_lr_schedule", "feature_lr_schedule"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        optimizers = ["actor.optimizer", "critic.optimizer", "critic.feature_optimizer"]
        if self.log_ent_coef is not None:
            optimizers.append("policy.ent_coef_optimizer")
        return ["policy", *optimizers], []


def _initial_ent_coef(ent_coef: float | str) -> float | None:
    """Where a learned temperature starts; None for a fixed one."""
    if not isinstance(ent_coef, str):
        check_range("ent_coef", ent_coef, 0.0)
        return None
    kind, _, start = ent_coef.partition("_")
    try:
        value = float(start) if start else 1.0
    except ValueError:
        value = 0.0
    if kind != "auto" or not value > 0.0:
        raise ValueError(f'`ent_coef` must be a number, "auto", or "auto_" and a positive number: got {ent_coef!r}.')
    return value
