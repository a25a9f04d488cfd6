"""Networks of Diffusion-QL: an actor that denoises, and a critic."""

from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    FlattenExtractor,
    NatureCNN,
    get_actor_critic_arch,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_diffusion.common.denoisers import DiscreteDenoiser
from sb3_diffusion.common.observations import CombinedExtractor
from sb3_diffusion.common.policies import ActorCriticPolicy, ChainActor, QCritic
from sb3_diffusion.common.samplers import SAMPLERS
from sb3_diffusion.common.schedules import noise_schedule_betas
from sb3_diffusion.common.torch_layers import ConditionalMLP, Mish


class DiffusionActor(ChainActor):
    r"""
    A policy that is a diffusion model of actions given the observation: it acts by running the reverse chain.

    Its latents have the shape ``(n_draws, action_dim)``.

    :param net_arch: sizes of the hidden layers
    :param activation_fn: activation after each of them
    :param time_embedding_dim: size of the embedding of the diffusion step
    :param noise_schedule: ``"linear"``, ``"cosine"`` or ``"vp"``
    :param n_diffusion_steps: length of the chain
    :param prediction_type: what the network tells, ``"noise"``, ``"sample"`` or ``"v"``
    :param clip: largest absolute value of a denoised action; None for no bound on the way (the result is always bounded to 1)
    :param sampler: ``"ddpm"``, ``"ddim"``, ``"dpm_solver"`` or ``"heun"``
    :param n_sampling_steps: steps of the sampler; None for the whole chain
    :param average: keep a moving average of the weights
    :param kwargs: arguments of [Network][sb3_diffusion.common.policies.Network]
    """

    def __init__(
        self,
        *args: Any,
        net_arch: list[int],
        activation_fn: type[nn.Module] = Mish,
        time_embedding_dim: int = 16,
        noise_schedule: str = "vp",
        n_diffusion_steps: int = 5,
        prediction_type: str = "noise",
        clip: float | None = 1.0,
        sampler: str = "ddpm",
        n_sampling_steps: int | None = None,
        average: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._own_arguments = dict(
            net_arch=net_arch,
            activation_fn=activation_fn,
            time_embedding_dim=time_embedding_dim,
            noise_schedule=noise_schedule,
            n_diffusion_steps=n_diffusion_steps,
            prediction_type=prediction_type,
            clip=clip,
        )
        net = ConditionalMLP(
            self.action_dim, self.features_extractor.features_dim, net_arch, activation_fn, time_embedding_dim
        )
        betas = noise_schedule_betas(noise_schedule, n_diffusion_steps)
        self.denoiser = DiscreteDenoiser(net, betas, prediction_type, clip)
        self.set_sampler(sampler, n_sampling_steps)
        if average:
            self.add_average()

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (self.n_draws, self.action_dim)

    def sample(self, features: th.Tensor, latents: th.Tensor) -> th.Tensor:
        """
        Run the reverse chain; the gradient flows through all of it.

        :param features: of the observations, shape ``(batch_size, features_dim)``
        :param latents: what the chain draws, shape ``(batch_size, *latent_shape)``
        :return: actions in [-1, 1], shape ``(batch_size, action_dim)``
        """
        levels = self.sampling_levels
        start, *noises = latents.unbind(dim=1)
        actions = SAMPLERS[self.sampler](
            self.denoiser, self.denoiser.prior(start, levels[:1]), levels, features, noises or None
        )
        return actions.clamp(-1.0, 1.0)

    def forward(self, observations: PyTorchObs, latents: th.Tensor) -> th.Tensor:
        """
        :param observations: batch of observations
        :param latents: what the chain draws, shape ``(batch_size, *latent_shape)``
        :return: actions in [-1, 1], shape ``(batch_size, action_dim)``
        """
        return self.sample(self.features(observations), latents)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return dict(
            super()._get_constructor_parameters(),
            sampler=self.sampler,
            n_sampling_steps=self.n_sampling_steps,
            **self._own_arguments,
        )


class DiffusionQLPolicy(ActorCriticPolicy):
    """
    Policy of Diffusion-QL: ``actor`` denoises, ``critic`` holds the action values, ``critic_target`` averages them. The
    target of the actor is its moving average, ``actor.averaged``.

    ``deterministic=True`` follows the means of the reverse chain from the noise 0; among several candidates, whose latents
    all rows share, it takes the one of the highest target value. It is no draw from the policy.

    :param observation_space: observation space
    :param action_space: action space
    :param lr_schedule: learning rate as a function of the remaining progress
    :param net_arch: hidden layers of all networks, or a dict with ``pi`` and ``qf``; by default three layers of 256
    :param activation_fn: activation of all networks
    :param features_extractor_class: class of the features extractor
    :param features_extractor_kwargs: its arguments
    :param normalize_images: divide images by 255
    :param optimizer_class: class of the optimisers
    :param optimizer_kwargs: their arguments except the learning rate
    :param n_critics: number of action values
    :param critic_layer_norm: layer normalisation in the action values
    :param share_features_extractor: one features extractor for all networks, learned with the actor
    :param time_embedding_dim: size of the embedding of the diffusion step
    :param noise_schedule: ``"linear"``, ``"cosine"`` or ``"vp"``
    :param n_diffusion_steps: length of the chain
    :param prediction_type: what the actor's network tells, ``"noise"``, ``"sample"`` or ``"v"``
    :param clip_denoised: bound the denoised actions to [-1, 1] in each step
    :param sampler: ``"ddpm"``, ``"ddim"``, ``"dpm_solver"`` or ``"heun"``
    :param n_sampling_steps: steps of the sampler; None for the whole chain
    :param acts_with_average: act with the moving average of the actor's weights
    :param n_action_samples: number of candidates drawn per observation when acting
    :param candidate_choice: ``"softmax"`` draws one of several candidates by the softmax of target values, ``"argmax"`` takes
        the best
    :param normalize_observations: normalise vector observations by frozen statistics of the data
    :param critic_learning_rate: learning rate of the critic's optimiser at the start
    """

    actor: DiffusionActor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = Mish,
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        n_critics: int = 2,
        critic_layer_norm: bool = True,
        share_features_extractor: bool = False,
        time_embedding_dim: int = 16,
        noise_schedule: str = "vp",
        n_diffusion_steps: int = 5,
        prediction_type: str = "noise",
        clip_denoised: bool = True,
        sampler: str = "ddpm",
        n_sampling_steps: int | None = None,
        acts_with_average: bool = True,
        n_action_samples: int = 1,
        candidate_choice: str = "softmax",
        normalize_observations: bool = False,
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
        own_arguments = dict(
            net_arch=net_arch,
            activation_fn=activation_fn,
            n_critics=n_critics,
            critic_layer_norm=critic_layer_norm,
            time_embedding_dim=time_embedding_dim,
            noise_schedule=noise_schedule,
            n_diffusion_steps=n_diffusion_steps,
            prediction_type=prediction_type,
            clip_denoised=clip_denoised,
            sampler=sampler,
            n_sampling_steps=n_sampling_steps,
            acts_with_average=acts_with_average,
        )
        self._own_arguments.update(own_arguments)
        pi, qf = ([256] * 3, [256] * 3) if net_arch is None else get_actor_critic_arch(net_arch)
        self.net_arch = dict(pi=pi, qf=qf)
        self.actor = DiffusionActor(
            **self._network_arguments,
            net_arch=pi,
            activation_fn=activation_fn,
            time_embedding_dim=time_embedding_dim,
            noise_schedule=noise_schedule,
            n_diffusion_steps=n_diffusion_steps,
            prediction_type=prediction_type,
            clip=1.0 if clip_denoised else None,
            sampler=sampler,
            n_sampling_steps=n_sampling_steps,
            average=True,
            acts_with_average=acts_with_average,
        )
        shared = self.actor.features_extractor if share_features_extractor else None
        critic_arguments: dict[str, Any] = dict(
            net_arch=qf, activation_fn=activation_fn, n_critics=n_critics, layer_norm=critic_layer_norm
        )
        self.critic = QCritic(**self._network_arguments, features_extractor=shared, **critic_arguments)
        self.critic_target = QCritic(**self._network_arguments, **critic_arguments)
        self.critic_target.requires_grad_(False)
        self.copy_critic_to_target()
        self.actor.optimizer = self.make_optimizer(self.actor, lr_schedule(1.0))
        self.critic.optimizer = self.make_optimizer(self.critic, critic_learning_rate or lr_schedule(1.0))
        self.set_training_mode(False)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        chosen = dict(
            sampler=self.actor.sampler,
            n_sampling_steps=self.actor.n_sampling_steps,
            acts_with_average=self.actor.acts_with_average,
        )
        return dict(super()._get_constructor_parameters(), **chosen)


MlpPolicy = DiffusionQLPolicy


class CnnPolicy(DiffusionQLPolicy):
    """[DiffusionQLPolicy][sb3_diffusion.diffusion_ql.policies.DiffusionQLPolicy] on images, through SB3's ``NatureCNN``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("features_extractor_class", NatureCNN)
        super().__init__(*args, **kwargs)


class MultiInputPolicy(DiffusionQLPolicy):
    """
    [DiffusionQLPolicy][sb3_diffusion.diffusion_ql.policies.DiffusionQLPolicy] on ``Dict`` observations, through SB3's
    ``CombinedExtractor``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("features_extractor_class", CombinedExtractor)
        super().__init__(*args, **kwargs)
