"""Diffusion Trusted Q-Learning."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch as th
import torch.nn.functional as F
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, Schedule

from sb3_diffusion.buffers import Batch
from sb3_diffusion.common.actor_critic import ActorCriticAlgorithm
from sb3_diffusion.common.compilation import accelerated, accelerated_actor_loss
from sb3_diffusion.common.distributed import average, standard_deviation
from sb3_diffusion.common.policies import ActionDenoiser, QCritic
from sb3_diffusion.common.schedules import log_logistic_sigmas
from sb3_diffusion.common.utils import MIN_SCALE, check_choice, check_range, expectile_loss, warmed_up_decay
from sb3_diffusion.dtql.policies import (
    CnnPolicy,
    DTQLPolicy,
    GaussianActor,
    ImplicitActor,
    IQLCritic,
    MlpPolicy,
    MultiInputPolicy,
)
from sb3_diffusion.dtql.presets import PRESETS


class DTQL(ActorCriticAlgorithm):
    r"""
    Diffusion Trusted Q-Learning (DTQL): a one-step policy inside a trust region that a diffusion model draws.

    Paper: https://arxiv.org/abs/2405.19690v2 (Chen, Wang, Zhou, NeurIPS 2024); authors' code:
    TianyuCodings/Diffusion_Trusted_Q_Learning. A diffusion model $\mu_\phi$ of the data's actions is trained and never
    sampled. The one-step policy $\pi_\theta$ maximises the action value of an IQL critic, while $\mu_\phi$ penalises
    actions that it would denoise to somewhere else.

    Departures, and why:

    * ``q_normalization="advantage"`` divides the action values by the standard deviation of the advantages of the data's
      actions: ``trust_region_coef`` then does not carry the scale of the rewards (published values run from 0.5 to 1500),
      and a critic that knows nothing yet cannot push the actor far. The value's weight is then 0.5 (``q_coef``; paper and
      code: 1). Published presets have it off.
    * The policy acts with a moving average of the actor's weights (``ema_decay``); the authors' code keeps one and never
      uses it. Published presets have it off.
    * Offline, the actor first imitates the data (``n_imitation_steps``): the trust region seeks the nearest mode, and from a
      random start that is often the edge of the box, where the hyperbolic tangent lets no gradient through. Published
      presets have it off.
    * Online without logged data the trust region is weaker (``online_trust_region_coef``), and noise is added to the actions
      that are tried (``exploration_noise``): the paper and its code are offline only.
    * Vector observations are normalised (``normalize_observations``). Published presets have it off.
    * With pretraining, the actor is pretrained too (``pretrain_actor``), and the target critic is copied from the critic
      at its end (``sync_target_after_pretraining``); in the authors' code it is still the random initial one.
    * ``n_action_samples=1`` by default; the authors' code draws one of 1024 candidates by a softmax of target values, which
      the paper's Algorithm 1 does not contain. Published presets have 1024.
    * ``n_pretrain_steps=0`` by default; the authors' code trains $\mu_\phi$ and the critic for 50,000 steps first,
      Algorithm 1 does not. Published presets have 50,000.
    * The value function learns from the online critics, as in the authors' code; ``value_from_target=True`` is the paper.
    * The trust-region loss is a mean over action dimensions, as in the code; the paper sums.
    * The implicit actor is one preconditioned denoising step bounded by a hyperbolic tangent; the authors' is the network's
      raw output, without bounds.

    :param policy: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"`` or a policy class
    :param env: Gymnasium env, VecEnv, id or None; with None it comes from the dataset
    :param learning_rate: learning rate of actor and diffusion model; a float or a function of the remaining progress
    :param buffer_size: capacity of the replay buffer of online transitions
    :param learning_starts: env steps before the first online update
    :param batch_size: transitions per update
    :param tau: Polyak coefficient of the target critic
    :param gamma: discount
    :param train_freq: env steps (or ``(n, "episode")``) between updates online
    :param gradient_steps: updates after each rollout online; -1 for as many as env steps
    :param action_noise: noise added to the actions when exploring
    :param replay_buffer_class: class of the replay buffer of online transitions
    :param replay_buffer_kwargs: its further arguments
    :param optimize_memory_usage: do not store next observations
    :param n_steps: length of the n-step returns
    :param dataset: logged data, see [load_dataset][sb3_diffusion.load_dataset]
    :param offline_fraction: share of each batch that comes from the dataset while fine-tuning, in [0, 1]
    :param n_pretrain_steps: gradient steps that train diffusion model and critic (and actor) before the main loop, offline
    :param reward_transform: None, ``"normalize"``, ``"iql_locomotion"``, ``"iql_antmaze"``, ``"cql_antmaze"`` or ``"antmaze"``
    :param trust_region_coef: $\alpha$, weight of the trust-region (or KL) loss
    :param online_trust_region_coef: the same while learning online without logged data, where the behaviour is the agent's
        own past
    :param q_coef: weight of the action value; 0 makes the actor a mode-seeking clone of the behaviour
    :param nll_coef: weight of the negative log-likelihood of the data's actions, the paper's entropy term; Gaussian actor only
    :param nll_jacobian: take the likelihood of the action itself; without it that of its inverse hyperbolic tangent
    :param regularizer: ``"trust_region"``, or ``"kl"`` for distillation by a second diffusion model of the actor's actions
    :param actor_type: ``"gaussian"`` (tanh-Gaussian) or ``"implicit"`` (a network of noise and observation)
    :param q_normalization: what the action values in the actor's loss are divided by: ``"advantage"``, the running standard
        deviation of the advantages of the data's actions; ``"magnitude"``, their own mean absolute value; None, nothing
    :param expectile: $\tau$ of the expectile regression of the state value, in (0, 1)
    :param value_from_target: regress the state value on the target critics instead of the online ones
    :param sync_target_after_pretraining: copy the critic into its target when pretraining ends
    :param pretrain_actor: pretraining prepares the actor too: a Gaussian one imitates, an implicit one starts from the weights
        of the diffusion model
    :param n_imitation_steps: offline updates, counted from the first, in which the actor imitates the data before it follows
        the action values; those of a pretraining without the actor do not count
    :param critic_learning_rate: learning rate of critics and state value; a float or a function of the remaining progress,
        None for ``learning_rate``
    :param sigma_data: scale on which the trust region sees the actions, scaled to [-1, 1], and the median of the noise levels:
        about the width of one mode, not the spread of all actions
    :param sigma_min: smallest noise level
    :param sigma_max: largest noise level
    :param n_action_samples: candidates per observation when acting
    :param candidate_choice: how one of several candidates is chosen: ``"softmax"`` draws by the softmax of target values,
        ``"argmax"`` takes the best
    :param ema_decay: decay of the moving average of the actor's weights that the policy acts with; 0 acts with the
        weights themselves
    :param exploration_noise: standard deviation of the normal noise on actions, scaled to [-1, 1], while collecting
        transitions; ``action_noise`` replaces it
    :param max_grad_norm: largest norm of the gradient of each network; None for no bound
    :param normalize_observations: normalise vector observations by frozen statistics of the data, kept in the policy; None
        means yes, unless the environment is a ``VecNormalize`` that does it. Without data they stay as they are: wrap the
        environment in ``VecNormalize``
    :param compile: run the losses compiled by ``torch.compile``; ``"cuda_graphs"`` also replays them as CUDA graphs on a GPU
    :param precision: of losses and actions, ``"float32"`` or ``"bfloat16"`` (matrix products by autocast, weights in float32)
    :param stats_window_size: number of episodes that logged returns are averaged over
    :param tensorboard_log: folder of the TensorBoard log
    :param policy_kwargs: arguments of [DTQLPolicy][sb3_diffusion.dtql.policies.DTQLPolicy]
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
    policy: DTQLPolicy
    actor: GaussianActor | ImplicitActor  # pi_theta: the one-step policy that acts
    behavior: ActionDenoiser  # mu_phi: diffusion model of the data's actions
    fake_behavior: ActionDenoiser  # diffusion model of the actor's actions; only for KL distillation
    critic: IQLCritic  # Q_eta and V_psi
    critic_target: QCritic  # Q_eta'

    def __init__(
        self,
        policy: str | type[DTQLPolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule = 3e-4,
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
        trust_region_coef: float = 1.0,
        online_trust_region_coef: float = 0.05,
        q_coef: float = 0.5,
        nll_coef: float = 0.0,
        nll_jacobian: bool = False,
        regularizer: str = "trust_region",
        actor_type: str = "gaussian",
        q_normalization: str | None = "advantage",
        expectile: float = 0.7,
        value_from_target: bool = False,
        sync_target_after_pretraining: bool = True,
        pretrain_actor: bool = True,
        n_imitation_steps: int = 1_000,
        critic_learning_rate: float | Schedule | None = None,
        sigma_data: float = 0.5,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        n_action_samples: int = 1,
        candidate_choice: str = "softmax",
        ema_decay: float = 0.999,
        exploration_noise: float = 0.2,
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
        check_range("trust_region_coef", trust_region_coef, 0.0)
        check_range("online_trust_region_coef", online_trust_region_coef, 0.0)
        check_range("q_coef", q_coef, 0.0)
        check_range("nll_coef", nll_coef, 0.0)
        if not 0.0 < expectile < 1.0:
            raise ValueError(f"`expectile` must lie in (0, 1): got {expectile}.")
        if not 0.0 < sigma_min <= sigma_max < float("inf"):
            raise ValueError(
                f"`sigma_min` must be positive and at most `sigma_max`, which must be finite: got {sigma_min} and {sigma_max}."
            )
        check_choice("regularizer", regularizer, ("trust_region", "kl"))
        check_choice("actor_type", actor_type, ("gaussian", "implicit"))
        check_choice("q_normalization", q_normalization, ("advantage", "magnitude", None))
        if nll_coef > 0.0 and actor_type == "implicit":
            raise ValueError(f"`nll_coef` needs a likelihood, which an implicit actor lacks: got {nll_coef}; set it to 0.")
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
            n_imitation_steps=n_imitation_steps,
            critic_learning_rate=critic_learning_rate,
            n_action_samples=n_action_samples,
            candidate_choice=candidate_choice,
            ema_decay=ema_decay,
            exploration_noise=exploration_noise,
            max_grad_norm=max_grad_norm,
            policy_kwargs=policy_kwargs,
            compile=compile,
            precision=precision,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            seed=seed,
            device=device,
        )
        self.trust_region_coef = trust_region_coef
        self.online_trust_region_coef = online_trust_region_coef
        self.q_coef = q_coef
        self.nll_coef = nll_coef
        self.nll_jacobian = nll_jacobian
        self.regularizer = regularizer
        self.actor_type = actor_type
        self.q_normalization = q_normalization
        self.expectile = expectile
        self.value_from_target = value_from_target
        self.sync_target_after_pretraining = sync_target_after_pretraining
        self.pretrain_actor = pretrain_actor
        self.sigma_data = sigma_data
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        if _init_setup_model:
            self._setup_model()

    def _policy_arguments(self) -> dict[str, Any]:
        return dict(
            super()._policy_arguments(),
            actor_type=self.actor_type,
            fake_behavior=self.regularizer == "kl",
            sigma_data=self.sigma_data,
            average_actor=self.ema_decay > 0.0,
        )

    def _create_aliases(self) -> None:
        super()._create_aliases()
        self.behavior = self.policy.behavior
        if self.regularizer == "kl":
            self.fake_behavior = self.policy.fake_behavior

    def _trained_networks(self) -> list[str]:
        return ["actor", "behavior", *(["fake_behavior"] if self.regularizer == "kl" else []), "critic"]

    @property
    def imitating(self) -> bool:
        """Pretraining without the actor leaves its imitation for later."""
        n_updates = self._n_updates if self.pretrain_actor else self._n_updates - self._n_pretrain_updates
        return self._offline and n_updates < self.n_imitation_steps

    # ---------------------------------------------------------------- Algorithm 1

    def train(self, gradient_steps: int, batch_size: int | None = None) -> None:
        """
        Run ``gradient_steps`` passes of the loop of Algorithm 1, or of the pretraining before it.

        :param gradient_steps: number of passes
        :param batch_size: transitions per pass; None for the model's ``batch_size``
        """
        batch_size = self.batch_size if batch_size is None else batch_size
        self.policy.set_training_mode(True)
        self._update_learning_rates()
        for _ in range(gradient_steps):
            batch = self.sample_batch(batch_size)
            critic_loss, advantages, targets = self._critic_loss(batch)
            self._watch_targets(targets, batch.rewards)
            self._minimize("critic_loss", self.critic.optimizer, critic_loss)
            self._track_advantages(advantages)
            behavior_loss = self._behavior_loss(batch.observations, batch.actions, *self._draw_corruption(batch))
            self._minimize("behavior_loss", self.behavior.optimizer, behavior_loss)
            if self.pretraining:
                if self.pretrain_actor and isinstance(self.actor, GaussianActor):
                    self._minimize("imitation_loss", self.actor.optimizer, self._nll_loss(batch))
                self._count_pretraining_step()
            else:
                loss = self._imitation_loss if self.imitating else self._actor_loss
                actor_loss = loss(batch, self._draw_action_noise(batch.observations), *self._draw_corruption(batch))
                self._minimize("actor_loss", self.actor.optimizer, actor_loss)
                if self.regularizer == "kl":
                    drawn = self._draw_action_noise(batch.observations), *self._draw_corruption(batch)
                    fake_loss = self._fake_behavior_loss(batch.observations, *drawn)
                    self._minimize("fake_behavior_loss", self.fake_behavior.optimizer, fake_loss)
                self._update_critic_target()
            self._n_updates += 1
            if self.ema_decay > 0.0:  # from the start an average over the updates so far
                self.actor.update_average(warmed_up_decay(self.ema_decay, self._n_updates))
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _count_pretraining_step(self) -> None:
        super()._count_pretraining_step()
        if self._n_pretrain_updates < self.n_pretrain_steps:
            return
        if self.sync_target_after_pretraining:
            self.policy.copy_critic_to_target()
        if self.regularizer == "kl":
            self.fake_behavior.load_state_dict(self.behavior.state_dict())
        if self.pretrain_actor and isinstance(self.actor, ImplicitActor):
            self.actor.start_from(self.behavior)

    def _track_advantages(self, advantages: th.Tensor) -> None:
        """Running standard deviation of the advantages, from the start an average over the updates so far."""
        weight = max(0.01, 1.0 / (self._n_updates + 1))
        self.policy.advantage_scale.lerp_(standard_deviation(advantages), weight)

    def _draw_sigma(self, n: int) -> th.Tensor:
        return log_logistic_sigmas(self._draw_uniform(n), self.sigma_data, self.sigma_min, self.sigma_max)

    def _draw_corruption(self, batch: Batch) -> tuple[th.Tensor, th.Tensor]:
        r""":return: $\epsilon$ and $\sigma$ of each row"""
        return self._draw_action_noise(batch.observations), self._draw_sigma(len(batch.actions))

    # ---------------------------------------------------------------- losses

    @accelerated
    def _critic_loss(self, batch: Batch) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        r"""
        $L_V + L_Q$ (eqs. 6 and 7): $L_V = E[L_2^\tau(\min_i Q_i(s, a) - V(s))]$ and
        $L_Q = \sum_i E[(r + \gamma V(s') - Q_i(s, a))^2]$.

        :return: the loss; the advantages $\min_i Q_i(s, a) - V(s)$ and the targets of $Q$, both ``(batch_size, 1)``
        """
        features = self.critic.features(batch.observations)
        q_values, values = self.critic.q_values(features, batch.actions), self.critic.values(features)
        with th.no_grad():
            q_data = self.critic_target(batch.observations, batch.actions) if self.value_from_target else q_values
            next_values = self.critic.values(self.critic.features(batch.next_observations))
            discounts = self.gamma if batch.discounts is None else batch.discounts
            targets = batch.rewards + (1.0 - batch.dones) * discounts * next_values
        advantages = q_data.detach().amin(dim=0) - values
        value_loss = expectile_loss(advantages, self.expectile).mean()
        q_loss = (q_values - targets).square().mean(dim=(1, 2)).sum()
        return value_loss + q_loss, advantages.detach(), targets

    @accelerated
    def _behavior_loss(self, observations: PyTorchObs, actions: th.Tensor, noise: th.Tensor, sigma: th.Tensor) -> th.Tensor:
        r"""$L(\phi) = E[w(\sigma) \|\mu_\phi(a + \sigma\epsilon, \sigma | s) - a\|^2]$ (eq. 2), a mean over dimensions."""
        return self.behavior.loss(observations, actions, noise, sigma).mean()

    def _trust_region_loss(
        self, observations: PyTorchObs, actions: th.Tensor, noise: th.Tensor, sigma: th.Tensor
    ) -> th.Tensor:
        r"""$L_{TR}(\theta)$ (eq. 4): eq. 2 at the actor's own ``actions``, minimised over $\theta$ instead of $\phi$."""
        return self._behavior_loss(observations, actions, noise, sigma)

    def _kl_loss(self, observations: PyTorchObs, actions: th.Tensor, noise: th.Tensor, sigma: th.Tensor) -> th.Tensor:
        r"""
        A loss whose gradient is that of $D_{KL}[\pi_\theta(\cdot|s) \| \mu_\phi(\cdot|s)]$ (section 3), estimated as in
        distribution matching distillation (arXiv 2311.18828, eqs. 7 and 8).
        """
        with th.no_grad():
            noisy = self.behavior.denoiser.corrupt(actions, noise, sigma)
            real = self.behavior(observations, noisy, sigma)
            fake = self.fake_behavior(observations, noisy, sigma)
            direction = (fake - real) / (actions - real).abs().mean(dim=-1, keepdim=True).clamp(min=1e-6)
        return 0.5 * F.mse_loss(actions, (actions - direction).detach())

    @accelerated
    def _fake_behavior_loss(
        self, observations: PyTorchObs, latents: th.Tensor, noise: th.Tensor, sigma: th.Tensor
    ) -> th.Tensor:
        """Eq. 2 for the diffusion model of the actor's actions, drawn by ``latents``."""
        with th.no_grad():
            actions = self.actor(observations, latents)
        return self.fake_behavior.loss(observations, actions, noise, sigma).mean()

    @accelerated_actor_loss
    def _actor_loss(self, batch: Batch, latents: th.Tensor, noise: th.Tensor, sigma: th.Tensor) -> th.Tensor:
        r"""$L_\pi(\theta) = \alpha L_{TR}(\theta) - E[\min_i Q_i(s, a_\theta)]$ (eq. 5), and the entropy term if asked for."""
        actions = self.actor(batch.observations, latents)
        q_values = self.critic(batch.observations, actions).amin(dim=0)
        q_loss = -q_values.mean() / self._q_scale(q_values.detach())
        regularize = self._kl_loss if self.regularizer == "kl" else self._trust_region_loss
        coef = self.online_trust_region_coef if self.dataset is None else self.trust_region_coef
        loss = coef * regularize(batch.observations, actions, noise, sigma) + self.q_coef * q_loss
        return loss + self.nll_coef * self._nll_loss(batch) if self.nll_coef > 0.0 else loss

    def _q_scale(self, q_values: th.Tensor) -> th.Tensor | float:
        """What action values are divided by in the actor's loss."""
        if self.q_normalization == "advantage":
            return self.policy.advantage_scale.clamp(min=MIN_SCALE)
        if self.q_normalization == "magnitude":
            return average(q_values.abs().mean()).clamp(min=MIN_SCALE)
        return 1.0

    @accelerated
    def _nll_loss(self, batch: Batch) -> th.Tensor:
        r"""$-E[\log \pi_\theta(a | s)]$ over the data, the entropy term of section 2."""
        assert isinstance(self.actor, GaussianActor)
        return -self.actor.log_prob(batch.observations, batch.actions, self.nll_jacobian).mean()

    @accelerated
    def _imitation_loss(self, batch: Batch, latents: th.Tensor, noise: th.Tensor, sigma: th.Tensor) -> th.Tensor:
        """What an imitating actor learns: the data's actions if it has a likelihood, else the trust region alone."""
        if isinstance(self.actor, GaussianActor):
            return self._nll_loss(batch)
        return self._trust_region_loss(batch.observations, self.actor(batch.observations, latents), noise, sigma)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "behavior", "fake_behavior"]
