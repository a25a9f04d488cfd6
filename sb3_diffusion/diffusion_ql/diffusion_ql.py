"""Diffusion Q-Learning."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from sb3_diffusion.buffers import Batch
from sb3_diffusion.common.actor_critic import ActorCriticAlgorithm
from sb3_diffusion.common.compilation import accelerated, accelerated_actor_loss
from sb3_diffusion.common.distributed import average
from sb3_diffusion.common.utils import MIN_SCALE, check_choice, check_integer, check_range, warmed_up_decay
from sb3_diffusion.diffusion_ql.policies import (
    CnnPolicy,
    DiffusionActor,
    DiffusionQLPolicy,
    MlpPolicy,
    MultiInputPolicy,
)
from sb3_diffusion.diffusion_ql.presets import PRESETS


class DiffusionQL(ActorCriticAlgorithm):
    r"""
    Diffusion Q-Learning (Diffusion-QL): a diffusion model of actions that is drawn to high action values.

    Paper: https://arxiv.org/abs/2208.06193v3 (Wang, Hunt, Zhou, ICLR 2023); authors' code:
    Zhendong-Wang/Diffusion-Policies-for-Offline-RL. The policy $\pi_\theta$ is a diffusion model of the data's actions given
    the observation. It minimises its denoising loss, which clones the behaviour, minus the action value of what it
    samples; the gradient flows back through the whole reverse chain. A twin critic learns by Q-learning from the actions of
    the policy's moving average.

    Departures, and why:

    * Offline, the policy first imitates the data alone (``n_imitation_steps``), while the critic learns the values of that
      imitation. Otherwise a critic that knows nothing yet leads the policy away from the data in the first thousands of
      updates. The published presets have it off.
    * The action values have layer normalisation (``critic_layer_norm``), which bounds how far they can rise away from the
      data (arXiv 2302.02948). The published presets have it off.
    * Vector observations are normalised (``normalize_observations``). The published presets have it off.
    * Online without logged data the policy clones less (``online_bc_coef``), and noise is added to the actions that are tried
      (``exploration_noise``): the paper and its code are offline only.
    * The moving average of the actor starts with the first update (``ema_start``) and follows every one (``ema_interval``),
      as in the paper; the authors' code waits for 1,000 updates, so that the first targets come from a random actor, and
      then follows every fifth. The published presets do as the code.
    * The policy acts with that average (``acts_with_average``). The authors' code acts with the weights just trained, as
      the published presets do.
    * ``n_action_samples=1`` by default; the authors' code draws one of 50 candidates by a softmax of target values, which
      the paper's algorithm does not contain. The published presets have 50.
    * The action value is divided by the mean absolute value of the other critic for the same actions, as in the code;
      ``q_normalization="data"`` takes the actions of the data, as the paper says.
    * Both losses are means over action dimensions, as in the code; the paper has norms.
    * The published presets decay the learning rates by a cosine to 0 at the end of training, as the paper says. The authors'
      scheduler is stepped once in 50 epochs, which leaves the rate as it is.
    * The reverse chain takes the posterior variance, as the code; the paper's equation 1 has the larger $\beta_i$.

    :param policy: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"`` or a policy class
    :param env: Gymnasium env, VecEnv, id or None; with None it comes from the dataset
    :param learning_rate: learning rate of the actor; a float or a function of the remaining progress
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
    :param n_pretrain_steps: gradient steps that train cloning and critic before the main loop, offline
    :param reward_transform: None, ``"normalize"``, ``"iql_locomotion"``, ``"iql_antmaze"``, ``"cql_antmaze"`` or ``"antmaze"``
    :param q_coef: $\eta$, weight of the action value; 0 is behaviour cloning by diffusion
    :param bc_coef: weight of the denoising loss
    :param online_bc_coef: the same while learning online without logged data, where the behaviour is the agent's own past
    :param q_normalization: what the action value in the actor's loss is divided by: ``"cross_critic"``, the mean absolute
        value of another critic for the same actions, one of the critics being drawn in each update; ``"data"``, the mean
        absolute value of the data's actions; None, nothing
    :param max_q_backup: the target is the value of the best of ``n_backup_actions`` actions
    :param n_backup_actions: actions per next observation if ``max_q_backup``
    :param n_diffusion_steps: length of the chain, $T$
    :param noise_schedule: ``"vp"``, ``"linear"`` or ``"cosine"``
    :param prediction_type: what the actor's network tells, ``"noise"``, ``"sample"`` or ``"v"``
    :param sampler: ``"ddpm"``, ``"ddim"``, ``"dpm_solver"`` or ``"heun"``, in training and when acting
    :param n_sampling_steps: steps of the sampler, at most ``n_diffusion_steps``; None for all
    :param n_imitation_steps: offline updates, counted from the first, in which the actor imitates the data before it follows
        the action values
    :param critic_learning_rate: learning rate of the critic; a float or a function of the remaining progress, None for
        ``learning_rate``
    :param critic_layer_norm: layer normalisation in the action values
    :param n_action_samples: candidates per observation when acting
    :param candidate_choice: how one of several candidates is chosen: ``"softmax"`` draws by the softmax of target values,
        ``"argmax"`` takes the best
    :param ema_decay: decay of the moving average of the actor's weights, whose actions the critic's targets take
    :param ema_start: updates before the average begins to move; 0 makes it an average over the updates so far at first
    :param ema_interval: updates between two moves of the average
    :param acts_with_average: act with the average too
    :param max_grad_norm: largest norm of the gradient of each network; None for no bound
    :param exploration_noise: standard deviation of the normal noise on actions, scaled to [-1, 1], while collecting
        transitions; ``action_noise`` replaces it
    :param normalize_observations: normalise vector observations by frozen statistics of the data, kept in the policy; None
        means yes, unless the environment is a ``VecNormalize`` that does it. Without data they stay as they are: wrap the
        environment in ``VecNormalize``
    :param compile: run the losses compiled by ``torch.compile``; ``"cuda_graphs"`` also replays them as CUDA graphs on a GPU
    :param precision: of losses and actions, ``"float32"`` or ``"bfloat16"`` (matrix products by autocast, weights in float32)
    :param stats_window_size: number of episodes that logged returns are averaged over
    :param tensorboard_log: folder of the TensorBoard log
    :param policy_kwargs: arguments of [DiffusionQLPolicy][sb3_diffusion.diffusion_ql.policies.DiffusionQLPolicy]
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
    default_total_timesteps = 2_000_000
    policy: DiffusionQLPolicy
    actor: DiffusionActor  # pi_theta
    actor_target: DiffusionActor  # pi_theta', its moving average

    def __init__(
        self,
        policy: str | type[DiffusionQLPolicy],
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
        q_coef: float = 1.0,
        bc_coef: float = 1.0,
        online_bc_coef: float = 0.1,
        q_normalization: str | None = "cross_critic",
        max_q_backup: bool = False,
        n_backup_actions: int = 10,
        n_diffusion_steps: int = 5,
        noise_schedule: str = "vp",
        prediction_type: str = "noise",
        sampler: str = "ddpm",
        n_sampling_steps: int | None = None,
        n_imitation_steps: int = 1_000,
        critic_learning_rate: float | Schedule | None = None,
        critic_layer_norm: bool = True,
        n_action_samples: int = 1,
        candidate_choice: str = "softmax",
        ema_decay: float = 0.995,
        ema_start: int = 0,
        ema_interval: int = 1,
        acts_with_average: bool = True,
        max_grad_norm: float | None = None,
        exploration_noise: float = 0.1,
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
        check_range("q_coef", q_coef, 0.0)
        check_range("bc_coef", bc_coef, 0.0)
        check_range("online_bc_coef", online_bc_coef, 0.0)
        check_choice("q_normalization", q_normalization, ("cross_critic", "data", None))
        check_integer("n_backup_actions", n_backup_actions, 1)
        check_integer("n_diffusion_steps", n_diffusion_steps, 1)
        check_integer("ema_start", ema_start, 0)
        check_integer("ema_interval", ema_interval, 1)
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
        self.q_coef = q_coef
        self.bc_coef = bc_coef
        self.online_bc_coef = online_bc_coef
        self.q_normalization = q_normalization
        self.max_q_backup = max_q_backup
        self.n_backup_actions = n_backup_actions
        self.n_diffusion_steps = n_diffusion_steps
        self.noise_schedule = noise_schedule
        self.prediction_type = prediction_type
        self.sampler = sampler
        self.n_sampling_steps = n_sampling_steps
        self.critic_layer_norm = critic_layer_norm
        self.ema_start = ema_start
        self.ema_interval = ema_interval
        self.acts_with_average = acts_with_average
        if _init_setup_model:
            self._setup_model()

    def _policy_arguments(self) -> dict[str, Any]:
        return dict(
            super()._policy_arguments(),
            critic_layer_norm=self.critic_layer_norm,
            noise_schedule=self.noise_schedule,
            n_diffusion_steps=self.n_diffusion_steps,
            prediction_type=self.prediction_type,
            sampler=self.sampler,
            n_sampling_steps=self.n_sampling_steps,
            acts_with_average=self.acts_with_average,
        )

    def _create_aliases(self) -> None:
        super()._create_aliases()
        assert isinstance(self.actor.averaged, DiffusionActor)
        self.actor_target = self.actor.averaged

    def set_sampler(self, sampler: str, n_sampling_steps: int | None = None) -> None:
        """
        Choose how the reverse chain is run from now on, when acting and in training; a saved model remembers it.

        :param sampler: ``"ddpm"``, ``"ddim"``, ``"dpm_solver"`` or ``"heun"``
        :param n_sampling_steps: at most ``n_diffusion_steps``; None for all
        :raises ValueError: if there is no such sampler, or the chain is shorter
        """
        self.actor.set_sampler(sampler, n_sampling_steps)
        self.sampler, self.n_sampling_steps = sampler, n_sampling_steps

    # ---------------------------------------------------------------- Algorithm 1

    def train(self, gradient_steps: int, batch_size: int | None = None) -> None:
        """
        Run ``gradient_steps`` passes of the loop of Algorithm 1.

        :param gradient_steps: number of passes
        :param batch_size: transitions per pass; None for the model's ``batch_size``
        """
        batch_size = self.batch_size if batch_size is None else batch_size
        self.policy.set_training_mode(True)
        self._update_learning_rates()
        for _ in range(gradient_steps):
            batch = self.sample_batch(batch_size)
            critic_loss, targets = self._critic_loss(batch, self._draw_next_latents(batch))
            self._watch_targets(targets, batch.rewards)
            self._minimize("critic_loss", self.critic.optimizer, critic_loss)
            loss, parts = self._actor_loss(batch, *self._draw_corruption(batch), *self._draw_for_q_loss(batch))
            self._minimize("actor_loss", self.actor.optimizer, loss, parts)
            self._update_actor_target()
            self._update_critic_target()
            if self.pretraining:
                self._count_pretraining_step()
            self._n_updates += 1
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _update_actor_target(self) -> None:
        if self._n_updates < self.ema_start or self._n_updates % self.ema_interval:
            return
        decay = self.ema_decay if self.ema_start > 0 else warmed_up_decay(self.ema_decay, self._n_updates + 1)
        self.actor.update_average(decay)

    def _draw_latents(self, n: int) -> th.Tensor:
        return self._draw_normal(n, *self.actor.latent_shape)

    def _draw_next_latents(self, batch: Batch) -> th.Tensor:
        """:return: latents of the actions at the next states, those of one state one after the other"""
        return self._draw_latents(len(batch.rewards) * (self.n_backup_actions if self.max_q_backup else 1))

    def _draw_corruption(self, batch: Batch) -> tuple[th.Tensor, th.Tensor]:
        r""":return: $\epsilon$ and the step $i$ of each row"""
        return self._draw_normal(*batch.actions.shape), self._draw_integers(self.n_diffusion_steps, len(batch.actions))

    def _draw_for_q_loss(self, batch: Batch) -> tuple[th.Tensor, th.Tensor] | tuple[()]:
        """:return: latents, and the number of the critic that is maximised; nothing where the actor only imitates"""
        if self.q_coef == 0.0 or self.pretraining or self.imitating:
            return ()
        first = th.randint(self.critic.n_critics, (1,), generator=self.generator, device=self.device)
        return self._draw_latents(len(batch.actions)), first

    # ---------------------------------------------------------------- losses

    @accelerated
    def _critic_loss(self, batch: Batch, latents: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        r"""
        $\sum_k E[(r + \gamma \min_k Q'_k(s', a') - Q_k(s, a))^2]$ with $a' \sim \pi_{\theta'}(\cdot | s')$ (eq. 4).

        :return: the loss, and the targets, shape ``(batch_size, 1)``
        """
        with th.no_grad():
            discounts = self.gamma if batch.discounts is None else batch.discounts
            targets = batch.rewards + (1.0 - batch.dones) * discounts * self._next_values(batch, latents)
        q_values = self.critic(batch.observations, batch.actions)
        return (q_values - targets).square().mean(dim=(1, 2)).sum(), targets

    def _next_values(self, batch: Batch, latents: th.Tensor) -> th.Tensor:
        r"""$\min_k Q'_k(s', a')$; with ``max_q_backup`` $\min_k \max_j Q'_k(s', a'_j)$. Shape ``(batch_size, 1)``."""
        n = self.n_backup_actions if self.max_q_backup else 1
        actor_features = self.actor_target.features(batch.next_observations).repeat_interleave(n, dim=0)
        critic_features = self.critic_target.features(batch.next_observations).repeat_interleave(n, dim=0)
        next_actions = self.actor_target.sample(actor_features, latents)
        q_values = self.critic_target.q_values(critic_features, next_actions)
        return q_values.unflatten(1, (-1, n)).amax(dim=2).amin(dim=0)

    def _bc_loss(self, features: th.Tensor, actions: th.Tensor, noise: th.Tensor, step: th.Tensor) -> th.Tensor:
        r"""
        $L_d(\theta) = E[\|\epsilon - \epsilon_\theta(\sqrt{\bar\alpha_i} a + \sqrt{1 - \bar\alpha_i} \epsilon, s, i)\|^2]$,
        eq. 2; a mean over dimensions.
        """
        return self.actor.denoiser.loss(actions, noise, step, features).mean()

    def _q_loss(self, batch: Batch, features: th.Tensor, latents: th.Tensor, first: th.Tensor) -> th.Tensor:
        r"""$-E[Q(s, a_0)] / E|Q|$ with $a_0 \sim \pi_\theta(\cdot | s)$ (eq. 3); the denominator is a constant."""
        actions = self.actor.sample(features, latents)
        with th.no_grad():
            critic_features = self.critic.features(batch.observations)
            scale = self._q_scale(batch, critic_features, actions, first)
        return -self.critic.q_values_of(first, critic_features, actions).mean() / scale

    def _q_scale(self, batch: Batch, features: th.Tensor, actions: th.Tensor, first: th.Tensor) -> th.Tensor | float:
        """What the value of the critic number ``first`` is divided by in the actor's loss; ``features`` are the critics'."""
        if self.q_normalization is None:
            return 1.0
        if self.q_normalization == "cross_critic":
            q_values = self.critic.q_values_of((first + 1) % self.critic.n_critics, features, actions)
        else:
            q_values = self.critic.q_values(features, batch.actions)
        return average(q_values.abs().mean()).clamp(min=MIN_SCALE)

    @accelerated_actor_loss
    def _actor_loss(
        self,
        batch: Batch,
        noise: th.Tensor,
        step: th.Tensor,
        latents: th.Tensor | None = None,
        first: th.Tensor | None = None,
    ) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        r"""
        $L(\theta) = L_d(\theta) + \eta L_q(\theta)$ (eq. 3); $L_d$ alone without ``latents``.

        :return: the loss, and its parts
        """
        features = self.actor.features(batch.observations)
        bc_loss = self._bc_loss(features, batch.actions, noise, step)
        loss = (self.online_bc_coef if self.dataset is None else self.bc_coef) * bc_loss
        if latents is None or first is None:
            return loss, {"bc_loss": bc_loss}
        q_loss = self._q_loss(batch, features, latents, first)
        return loss + self.q_coef * q_loss, {"bc_loss": bc_loss, "q_loss": q_loss}

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "actor_target"]
