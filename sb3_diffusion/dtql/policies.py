"""Networks of DTQL: one-step actors, the IQL critic, the diffusion model of the behaviour."""

from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    FlattenExtractor,
    NatureCNN,
    create_mlp,
    get_actor_critic_arch,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_diffusion.common.denoisers import EDMDenoiser
from sb3_diffusion.common.observations import CombinedExtractor
from sb3_diffusion.common.policies import ActionDenoiser, Actor, ActorCriticPolicy, QCritic
from sb3_diffusion.common.torch_layers import ConditionalMLP, Mish

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0
ATANH_MARGIN = 1e-3
IMPLICIT_SIGMA = 2.5


class GaussianActor(Actor):
    r"""
    $a = \tanh(\mu_\theta(s) + \sigma_\theta(s) z)$, $z \sim N(0, I)$.

    :param net_arch: sizes of the hidden layers
    :param activation_fn: activation after each of them
    :param average: act with a moving average of the weights
    :param kwargs: arguments of [Network][sb3_diffusion.common.policies.Network]
    """

    def __init__(
        self,
        *args: Any,
        net_arch: list[int],
        activation_fn: type[nn.Module] = nn.ReLU,
        average: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._own_arguments = dict(net_arch=net_arch, activation_fn=activation_fn)
        layers = create_mlp(self.features_extractor.features_dim, 2 * self.action_dim, net_arch, activation_fn)
        self.net = nn.Sequential(*layers).apply(self.init_weights)
        if average:
            self.add_average()

    def moments(self, observations: PyTorchObs) -> tuple[th.Tensor, th.Tensor]:
        """
        :param observations: batch of observations
        :return: mean and standard deviation of the action before the hyperbolic tangent, each ``(batch_size, action_dim)``
        """
        mean, log_std = self.net(self.features(observations)).chunk(2, dim=-1)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX).exp()

    def distribution(self, observations: PyTorchObs) -> th.distributions.Normal:
        """
        :param observations: batch of observations
        :return: law of the action before the hyperbolic tangent, shape ``(batch_size, action_dim)``
        """
        return th.distributions.Normal(*self.moments(observations), validate_args=False)

    def forward(self, observations: PyTorchObs, latents: th.Tensor) -> th.Tensor:
        """
        :param observations: batch of observations
        :param latents: $z$, shape ``(batch_size, action_dim)``
        :return: actions in [-1, 1], shape ``(batch_size, action_dim)``
        """
        mean, std = self.moments(observations)
        return th.tanh(mean + std * latents)

    def log_prob(self, observations: PyTorchObs, actions: th.Tensor, jacobian: bool = False) -> th.Tensor:
        r"""
        Log-likelihood of actions; ``atanh`` is taken of $a / (1 + 10^{-3})$, which is finite at the edge of the box.

        :param observations: batch of observations
        :param actions: in [-1, 1], shape ``(batch_size, action_dim)``
        :param jacobian: the density of the action itself; without it that of $\mathrm{atanh}(a)$, as in the authors' code
        :return: shape ``(batch_size,)``
        """
        squashed = actions / (1.0 + ATANH_MARGIN)
        log_prob = self.distribution(observations).log_prob(squashed.atanh()).sum(dim=-1)
        if jacobian:
            log_prob = log_prob - (1.0 - squashed.square()).log().sum(dim=-1)
        return log_prob

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return dict(super()._get_constructor_parameters(), **self._own_arguments)


class ImplicitActor(Actor):
    r"""
    $a = \tanh(D_\theta(\sigma_0 z, \sigma_0 | s))$ with $\sigma_0 = 2.5$: one denoising step from noise.

    The network is that of the behaviour model, so that it can start from its weights (``start_from``).

    :param net_arch: sizes of the hidden layers
    :param activation_fn: activation after each of them
    :param time_embedding_dim: size of the embedding of the noise level
    :param sigma_data: that of the behaviour model
    :param average: act with a moving average of the weights
    :param kwargs: arguments of [Network][sb3_diffusion.common.policies.Network]
    """

    def __init__(
        self,
        *args: Any,
        net_arch: list[int],
        activation_fn: type[nn.Module] = Mish,
        time_embedding_dim: int = 16,
        sigma_data: float = 0.5,
        average: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._own_arguments = dict(
            net_arch=net_arch, activation_fn=activation_fn, time_embedding_dim=time_embedding_dim, sigma_data=sigma_data
        )
        net = ConditionalMLP(
            self.action_dim,
            self.features_extractor.features_dim,
            net_arch,
            activation_fn,
            time_embedding_dim,
            linear_first_layer=True,
        )
        self.denoiser = EDMDenoiser(net, sigma_data)
        if average:
            self.add_average()

    def forward(self, observations: PyTorchObs, latents: th.Tensor) -> th.Tensor:
        """
        :param observations: batch of observations
        :param latents: $z$, shape ``(batch_size, action_dim)``
        :return: actions in [-1, 1], shape ``(batch_size, action_dim)``
        """
        sigma = th.full_like(latents[:, 0], IMPLICIT_SIGMA)
        return th.tanh(self.denoiser(IMPLICIT_SIGMA * latents, sigma, self.features(observations)))

    def start_from(self, behavior: ActionDenoiser) -> None:
        """
        Take over the weights of the diffusion model of the behaviour.

        :param behavior: model with the same layers
        """
        self.denoiser.load_state_dict(behavior.denoiser.state_dict())
        self.features_extractor.load_state_dict(behavior.features_extractor.state_dict())
        if self.averaged is not None:
            self.update_average(0.0)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return dict(super()._get_constructor_parameters(), **self._own_arguments)


class IQLCritic(QCritic):
    """
    Action values and a state value (arXiv 2110.06169).

    :param net_arch: sizes of the hidden layers, of both
    :param activation_fn: activation after each of them
    :param kwargs: arguments of [QCritic][sb3_diffusion.common.policies.QCritic]
    """

    def __init__(self, *args: Any, net_arch: list[int], activation_fn: type[nn.Module] = Mish, **kwargs: Any) -> None:
        super().__init__(*args, net_arch=net_arch, activation_fn=activation_fn, **kwargs)
        self.value_net = nn.Sequential(*create_mlp(self.features_extractor.features_dim, 1, net_arch, activation_fn))

    def values(self, features: th.Tensor) -> th.Tensor:
        """
        :param features: shape ``(batch_size, features_dim)``
        :return: state values, shape ``(batch_size, 1)``
        """
        return self.value_net(features)


class DTQLPolicy(ActorCriticPolicy):
    """
    Policy of DTQL: ``actor`` acts, ``behavior`` is the diffusion model of the data's actions, ``critic`` holds the
    action values and the state value, ``critic_target`` averages the action values.

    ``deterministic=True`` acts with the latent 0; among several candidates with latents shared by all rows, taking the
    candidate of the highest target value. It is the centre of the one-step policy, not a draw from it.

    :param observation_space: observation space
    :param action_space: action space
    :param lr_schedule: learning rate as a function of the remaining progress
    :param net_arch: hidden layers of all networks, or a dict with ``pi``, ``qf`` and optionally ``behavior``; by default
        three layers of 256 for the actor and the critics, four for the diffusion model, of which the first is linear
    :param activation_fn: activation of all networks; by default ReLU in the Gaussian actor and Mish elsewhere
    :param features_extractor_class: class of the features extractor
    :param features_extractor_kwargs: its arguments
    :param normalize_images: divide images by 255
    :param optimizer_class: class of the optimisers
    :param optimizer_kwargs: their arguments except the learning rate
    :param n_critics: number of action values
    :param critic_layer_norm: layer normalisation in the action values
    :param share_features_extractor: one features extractor for all networks, learned with the actor
    :param time_embedding_dim: size of the embedding of the noise level
    :param actor_type: ``"gaussian"`` or ``"implicit"``
    :param fake_behavior: add the diffusion model of the actor's own actions, which KL distillation needs
    :param sigma_data: scale on which the diffusion model sees the actions, scaled to [-1, 1]: about the width of one mode, not
        the spread of all actions
    :param clip_denoised: bound the denoised actions to [-1, 1]
    :param n_action_samples: number of candidates drawn per observation when acting
    :param candidate_choice: ``"softmax"`` draws one of several candidates by the softmax of target values, ``"argmax"`` takes
        the best
    :param normalize_observations: normalise vector observations by frozen statistics of the data
    :param average_actor: act with a moving average of the actor's weights
    :param critic_learning_rate: learning rate of the critic's optimiser at the start
    """

    actor: GaussianActor | ImplicitActor  # type: ignore[assignment]
    advantage_scale: th.Tensor
    """Running standard deviation of the advantages of the data's actions, shape ``()``."""

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] | None = None,
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        n_critics: int = 2,
        critic_layer_norm: bool = True,
        share_features_extractor: bool = False,
        time_embedding_dim: int = 16,
        actor_type: str = "gaussian",
        fake_behavior: bool = False,
        sigma_data: float = 0.5,
        clip_denoised: bool = True,
        n_action_samples: int = 1,
        candidate_choice: str = "softmax",
        normalize_observations: bool = False,
        average_actor: bool = False,
        critic_learning_rate: float | None = None,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class=features_extractor_class,
            features_extractor_kwargs=features_extractor_kwargs,
            normalize_images=normalize_images,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            share_features_extractor=share_features_extractor,
            n_action_samples=n_action_samples,
            candidate_choice=candidate_choice,
            normalize_observations=normalize_observations,
        )
        if actor_type not in ("gaussian", "implicit"):
            raise ValueError(f'`actor_type` must be "gaussian" or "implicit": got {actor_type!r}.')
        self._own_arguments.update(
            net_arch=net_arch,
            activation_fn=activation_fn,
            n_critics=n_critics,
            critic_layer_norm=critic_layer_norm,
            time_embedding_dim=time_embedding_dim,
            actor_type=actor_type,
            fake_behavior=fake_behavior,
            sigma_data=sigma_data,
            clip_denoised=clip_denoised,
            average_actor=average_actor,
        )

        arch: dict[str, list[int]] = dict(pi=[256] * 3, qf=[256] * 3, behavior=[256] * 4)
        if net_arch is not None:
            pi, qf = get_actor_critic_arch(net_arch)
            arch = dict(pi=pi, qf=qf, behavior=net_arch.get("behavior", pi) if isinstance(net_arch, dict) else pi)
        self.net_arch = arch
        denoiser_arguments = dict(
            net_arch=arch["behavior"],
            activation_fn=activation_fn or Mish,
            time_embedding_dim=time_embedding_dim,
            sigma_data=sigma_data,
        )
        self._behavior_arguments: dict[str, Any] = dict(
            denoiser_arguments, linear_first_layer=True, clip=1.0 if clip_denoised else None
        )
        self._actor_arguments: dict[str, Any] = (
            dict(net_arch=arch["pi"], activation_fn=activation_fn or nn.ReLU)
            if actor_type == "gaussian"
            else denoiser_arguments
        )
        self._actor_arguments = dict(self._actor_arguments, average=average_actor)
        self.register_buffer("advantage_scale", th.ones(()))
        self._critic_arguments: dict[str, Any] = dict(
            net_arch=arch["qf"], activation_fn=activation_fn or Mish, n_critics=n_critics, layer_norm=critic_layer_norm
        )
        self._build(lr_schedule(1.0), critic_learning_rate)

    def _build(self, learning_rate: float, critic_learning_rate: float | None) -> None:
        actor_class = GaussianActor if self._own_arguments["actor_type"] == "gaussian" else ImplicitActor
        self.actor = actor_class(**self._network_arguments, **self._actor_arguments)
        shared = self.actor.features_extractor if self.share_features_extractor else None
        arguments = dict(self._network_arguments, features_extractor=shared)
        self.behavior = ActionDenoiser(**arguments, **self._behavior_arguments)
        self.critic = IQLCritic(**arguments, **self._critic_arguments)
        self.critic_target = QCritic(**self._network_arguments, **self._critic_arguments)
        self.critic_target.requires_grad_(False)
        self.copy_critic_to_target()

        self.actor.optimizer = self.make_optimizer(self.actor, learning_rate)
        self.behavior.optimizer = self.make_optimizer(self.behavior, learning_rate)
        self.critic.optimizer = self.make_optimizer(self.critic, critic_learning_rate or learning_rate)
        if self._own_arguments["fake_behavior"]:
            self.fake_behavior = ActionDenoiser(**arguments, **self._behavior_arguments)
            self.fake_behavior.optimizer = self.make_optimizer(self.fake_behavior, learning_rate)
        self.set_training_mode(False)


MlpPolicy = DTQLPolicy


class CnnPolicy(DTQLPolicy):
    """[DTQLPolicy][sb3_diffusion.dtql.policies.DTQLPolicy] on images: the features extractor is SB3's ``NatureCNN``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("features_extractor_class", NatureCNN)
        super().__init__(*args, **kwargs)


class MultiInputPolicy(DTQLPolicy):
    """[DTQLPolicy][sb3_diffusion.dtql.policies.DTQLPolicy] on ``Dict`` observations: SB3's ``CombinedExtractor``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("features_extractor_class", CombinedExtractor)
        super().__init__(*args, **kwargs)
