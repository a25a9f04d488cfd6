"""Networks of Diff-SR between spaces and tensors: actors, and a critic on spectral features."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch as th
import torch.nn.functional as F
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
from sb3_diffusion.common.policies import Actor, DiffusionPolicy, Network
from sb3_diffusion.common.torch_layers import Mish
from sb3_diffusion.common.utils import check_choice, make_optimizer
from sb3_diffusion.diffsr.networks import FourierHeads, ResidualMLP, SpectralScore, feature_noise_betas

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0
IMAGE_STATE_DIM = 50
"""Entries of the state that an image becomes: SB3's 256 would make the last layer of the second network huge."""
LARGE_LAST_LAYER = 20_000_000
"""Weights in the last layer of the second network from which on there is a warning."""


class DeterministicActor(Actor):
    r"""
    The actor of TD3: $a = \tanh(\mu_\theta(s))$, and $\mathrm{clip}(a + \sigma z)$ with $z \sim N(0, I)$ when it explores.

    :param net_arch: sizes of the hidden layers
    :param activation_fn: activation of each of them
    :param noise_std: $\sigma$
    :param kwargs: arguments of [Network][sb3_diffusion.common.policies.Network]
    """

    def __init__(
        self,
        *args: Any,
        net_arch: list[int],
        activation_fn: type[nn.Module] = Mish,
        noise_std: float = 0.2,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._own_arguments = dict(net_arch=net_arch, activation_fn=activation_fn, noise_std=noise_std)
        self.noise_std = noise_std
        self.net = ResidualMLP(self.features_extractor.features_dim, self.action_dim, net_arch, activation_fn)

    def forward(self, observations: PyTorchObs, latents: th.Tensor) -> th.Tensor:
        """
        :param observations: batch of observations
        :param latents: $z$, shape ``(batch_size, action_dim)``
        :return: actions in [-1, 1], shape ``(batch_size, action_dim)``
        """
        return (self.mean(observations) + self.noise_std * latents).clamp(-1.0, 1.0)

    def mean(self, observations: PyTorchObs) -> th.Tensor:
        """
        :param observations: batch of observations
        :return: actions without noise, shape ``(batch_size, action_dim)``
        """
        return th.tanh(self.net(self.features(observations)))

    def sample(self, observations: PyTorchObs, latents: th.Tensor) -> tuple[th.Tensor, th.Tensor | None]:
        """
        :param observations: batch of observations
        :param latents: not used: what is trained is the action without noise
        :return: actions, shape ``(batch_size, action_dim)``, and no likelihood
        """
        return self.mean(observations), None

    def _get_constructor_parameters(self) -> dict[str, Any]:
        parameters = dict(super()._get_constructor_parameters(), **self._own_arguments)
        del parameters["average"]  # what averages it is a network of its own
        return parameters


class SquashedGaussianActor(Actor):
    r"""
    The actor of SAC: $a = \tanh(\mu_\theta(s) + \sigma_\theta(s) z)$ with $z \sim N(0, I)$.

    :param net_arch: sizes of the hidden layers
    :param activation_fn: activation of each of them
    :param kwargs: arguments of [Network][sb3_diffusion.common.policies.Network]
    """

    def __init__(
        self,
        *args: Any,
        net_arch: list[int],
        activation_fn: type[nn.Module] = Mish,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._own_arguments = dict(net_arch=net_arch, activation_fn=activation_fn)
        self.net = ResidualMLP(self.features_extractor.features_dim, 2 * self.action_dim, net_arch, activation_fn)

    def forward(self, observations: PyTorchObs, latents: th.Tensor) -> th.Tensor:
        """
        :param observations: batch of observations
        :param latents: $z$, shape ``(batch_size, action_dim)``
        :return: actions in [-1, 1], shape ``(batch_size, action_dim)``
        """
        return self.sample(observations, latents)[0]

    def sample(self, observations: PyTorchObs, latents: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param observations: batch of observations
        :param latents: $z$, shape ``(batch_size, action_dim)``
        :return: actions, shape ``(batch_size, action_dim)``, and the logarithm of their density, shape ``(batch_size, 1)``
        """
        mean, log_std = self.net(self.features(observations)).chunk(2, dim=-1)
        log_std = log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)
        raw = mean + log_std.exp() * latents
        log_normal = -0.5 * latents.square() - log_std - 0.5 * math.log(2.0 * math.pi)
        log_slope = 2.0 * (math.log(2.0) - raw - F.softplus(-2.0 * raw))  # of tanh
        return th.tanh(raw), (log_normal - log_slope).sum(dim=-1, keepdim=True)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        parameters = dict(super()._get_constructor_parameters(), **self._own_arguments)
        del parameters["average"]  # what averages it is a network of its own
        return parameters


class SpectralCritic(Network):
    r"""
    Spectral features $\psi(s, a)$ with what teaches them, the factor $\zeta(\tilde s, k)$ of the score and a head for the
    reward, and with the action values that are built on them.

    The state $s$ is what the features extractor makes of an observation. What is diffused is the next state: as it stands if
    the extractor has no weights, and normalised over its entries if it is learned, so that its scale can neither vanish nor
    grow. Of a stacked history, whose older part is known, only the newest observation is diffused.

    :param feature_dim: size of $\psi$, $d$
    :param feature_net_arch: hidden layers of $\psi$
    :param score_net_arch: hidden layers of $\zeta$; None for a critic that is a target and needs neither $\zeta$ nor reward
    :param net_arch: hidden layers of the heads above the Fourier features
    :param activation_fn: activation in $\psi$ and $\zeta$
    :param n_critics: number of action values
    :param n_frequencies: Fourier frequencies of each head
    :param trainable_frequencies: learn the frequencies
    :param time_embedding_dim: size of the embedding of the noise level
    :param noise_schedule: ``"vp"``, ``"linear"``, ``"cosine"`` or ``"beta_law"``
    :param n_diffusion_steps: number of noise levels
    :param n_stack: length of the history that an observation is
    :param kwargs: arguments of [Network][sb3_diffusion.common.policies.Network]
    """

    denoiser: DiscreteDenoiser
    reward_net: FourierHeads
    feature_optimizer: th.optim.Optimizer

    def __init__(
        self,
        *args: Any,
        feature_dim: int,
        feature_net_arch: Sequence[int],
        score_net_arch: Sequence[int] | None,
        net_arch: Sequence[int],
        activation_fn: type[nn.Module] = Mish,
        n_critics: int = 2,
        n_frequencies: int = 512,
        trainable_frequencies: bool = True,
        time_embedding_dim: int = 128,
        noise_schedule: str = "vp",
        n_diffusion_steps: int = 50,
        n_stack: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if n_critics < 1:
            raise ValueError(f"`n_critics` must be at least 1: got {n_critics}.")
        self._own_arguments = dict(
            feature_dim=feature_dim,
            feature_net_arch=feature_net_arch,
            score_net_arch=score_net_arch,
            net_arch=net_arch,
            activation_fn=activation_fn,
            n_critics=n_critics,
            n_frequencies=n_frequencies,
            trainable_frequencies=trainable_frequencies,
            time_embedding_dim=time_embedding_dim,
            noise_schedule=noise_schedule,
            n_diffusion_steps=n_diffusion_steps,
            n_stack=n_stack,
        )
        state_dim = self.features_extractor.features_dim
        self.learns_states = any(True for _ in self.features_extractor.parameters())
        self.diffused_dim = _newest_dim(self.observation_space, n_stack) if n_stack > 1 else state_dim
        self.psi = ResidualMLP(state_dim + self.action_dim, feature_dim, feature_net_arch, activation_fn)
        heads: tuple[Any, ...] = (feature_dim, n_frequencies, net_arch, trainable_frequencies)
        self.q_net = FourierHeads(n_critics, *heads)
        if score_net_arch is not None:
            _warn_if_large(score_net_arch, feature_dim, self.diffused_dim)
            score = SpectralScore(self.diffused_dim, feature_dim, score_net_arch, activation_fn, time_embedding_dim)
            self.denoiser = DiscreteDenoiser(score, feature_noise_betas(noise_schedule, n_diffusion_steps), "noise")
            self.reward_net = FourierHeads(1, *heads)

    def spectral_features(self, observations: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        r"""
        :param observations: batch of observations
        :param actions: in [-1, 1], shape ``(batch_size, action_dim)``
        :return: $\psi(s, a)$, shape ``(batch_size, feature_dim)``
        """
        return self.psi(th.cat([self.features(observations), actions], dim=-1))

    def diffused(self, observations: PyTorchObs) -> th.Tensor:
        """
        :param observations: batch of observations
        :return: their states as they are diffused, shape ``(batch_size, diffused_dim)``
        """
        states = self.features(observations)[:, -self.diffused_dim :]
        return F.layer_norm(states, states.shape[-1:]) if self.learns_states and states.shape[-1] > 1 else states

    def forward(self, observations: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        :param observations: batch of observations
        :param actions: in [-1, 1], shape ``(batch_size, action_dim)``
        :return: values, shape ``(n_critics, batch_size, 1)``
        """
        return self.q_net(self.spectral_features(observations, actions))

    def feature_parameters(self) -> list[nn.Parameter]:
        """:return: all parameters but those of the action values"""
        return [parameter for name, parameter in self.named_parameters() if not name.startswith("q_net.")]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return dict(super()._get_constructor_parameters(), **self._own_arguments)


def _newest_dim(observation_space: spaces.Space, n_stack: int) -> int:
    """Size of the newest of ``n_stack`` observations, which SB3's ``VecFrameStack`` puts last in a vector."""
    size = observation_space.shape[0] if isinstance(observation_space, spaces.Box) and len(observation_space.shape) == 1 else 0
    if size == 0 or size % n_stack:
        raise ValueError(
            f"`n_stack` must divide the size of the observation, a vector as VecFrameStack makes it of vectors: got {n_stack} "
            f"and {observation_space}. Leave it at 1 for other observations."
        )
    return size // n_stack


def _warn_if_large(score_net_arch: Sequence[int], feature_dim: int, state_dim: int) -> None:
    width = score_net_arch[-1] if score_net_arch else state_dim
    n_weights = width * feature_dim * state_dim
    if n_weights > LARGE_LAST_LAYER:
        warnings.warn(
            f"The last layer of the second network has {n_weights / 1e6:.0f} million weights: `score_net_width` {width} x "
            f"`feature_dim` {feature_dim} x {state_dim} entries of the state. Lower the first two, or the size of the state "
            "through `features_extractor_kwargs`.",
            stacklevel=2,
        )


class DiffSRPolicy(DiffusionPolicy):
    """
    Policy of Diff-SR: ``actor`` acts, ``critic`` holds the spectral features and the action values on them, and
    ``critic_target`` averages both; the actor of TD3 has an ``actor_target`` too.

    ``deterministic=True`` acts with the actor's mean. Otherwise the actor of SAC draws from its law, and that of TD3 adds its
    exploration noise.

    :param observation_space: observation space
    :param action_space: action space
    :param lr_schedule: learning rate of the actor as a function of the remaining progress
    :param net_arch: hidden layers of actor, features and heads, or a dict with ``pi`` (actor), ``qf`` (heads above the
        Fourier features), and optionally ``psi`` and ``zeta`` (the two networks of the features); by default three layers of
        512, and one in the heads. Those of ``zeta`` have the width ``score_net_width`` where they are not given.
    :param activation_fn: activation of all networks but the heads
    :param features_extractor_class: class of the features extractor; its output is the state
    :param features_extractor_kwargs: its arguments
    :param normalize_images: divide images by 255
    :param optimizer_class: class of the optimisers
    :param optimizer_kwargs: their arguments except the learning rate
    :param n_critics: number of action values
    :param share_features_extractor: the actor sees the critic's features extractor, which is learned with the features
    :param time_embedding_dim: size of the embedding of the noise level
    :param actor_type: ``"td3"`` or ``"sac"``
    :param noise_std: exploration noise of the actor of TD3
    :param feature_dim: size of the spectral features
    :param score_net_width: width of the second network of the features
    :param n_frequencies: Fourier frequencies of each head
    :param trainable_frequencies: learn the frequencies
    :param noise_schedule: ``"vp"``, ``"linear"``, ``"cosine"`` or ``"beta_law"``
    :param n_diffusion_steps: number of noise levels
    :param n_stack: length of the history that an observation is; the newest of the next one is diffused
    :param initial_ent_coef: where a learned temperature starts; None if it is not learned
    :param with_covariance: keep the covariance of the features, for the exploration bonus
    :param normalize_observations: normalise vector observations by statistics of the data
    :param critic_learning_rate: learning rate of the action values' optimiser at the start; None for the actor's
    :param feature_learning_rate: learning rate of the features' optimiser at the start; None for the actor's
    """

    actor: DeterministicActor | SquashedGaussianActor  # type: ignore[assignment]
    feature_covariance: th.Tensor
    """Moving average of the second moment of the features, shape ``(feature_dim, feature_dim)``."""

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
        share_features_extractor: bool = False,
        time_embedding_dim: int = 128,
        actor_type: str = "td3",
        noise_std: float = 0.2,
        feature_dim: int = 512,
        score_net_width: int = 512,
        n_frequencies: int = 512,
        trainable_frequencies: bool = True,
        noise_schedule: str = "vp",
        n_diffusion_steps: int = 50,
        n_stack: int = 1,
        initial_ent_coef: float | None = None,
        with_covariance: bool = False,
        normalize_observations: bool = False,
        critic_learning_rate: float | None = None,
        feature_learning_rate: float | None = None,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class,
            features_extractor_kwargs,
            normalize_images=normalize_images,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            squash_output=True,
        )
        check_choice("actor_type", actor_type, ("td3", "sac"))
        self._own_arguments: dict[str, Any] = dict(
            net_arch=net_arch,
            activation_fn=activation_fn,
            features_extractor_class=features_extractor_class,
            features_extractor_kwargs=self.features_extractor_kwargs,
            optimizer_class=optimizer_class,
            optimizer_kwargs=self.optimizer_kwargs,
            n_critics=n_critics,
            share_features_extractor=share_features_extractor,
            time_embedding_dim=time_embedding_dim,
            actor_type=actor_type,
            noise_std=noise_std,
            feature_dim=feature_dim,
            score_net_width=score_net_width,
            n_frequencies=n_frequencies,
            trainable_frequencies=trainable_frequencies,
            noise_schedule=noise_schedule,
            n_diffusion_steps=n_diffusion_steps,
            n_stack=n_stack,
            initial_ent_coef=initial_ent_coef,
            with_covariance=with_covariance,
            normalize_observations=normalize_observations,
        )
        arch: dict[str, list[int]] = dict(pi=[512] * 3, qf=[512], psi=[512] * 3, zeta=[score_net_width] * 3)
        if net_arch is not None:
            pi, qf = get_actor_critic_arch(net_arch)
            given = net_arch if isinstance(net_arch, dict) else {}
            arch = dict(pi=pi, qf=qf, psi=given.get("psi", pi), zeta=given.get("zeta", arch["zeta"]))
        self.net_arch = arch
        network_arguments: dict[str, Any] = dict(
            observation_space=observation_space,
            action_space=action_space,
            features_extractor_class=features_extractor_class,
            features_extractor_kwargs=self.features_extractor_kwargs,
            normalize_images=normalize_images,
            normalize_observations=normalize_observations,
        )
        critic_arguments: dict[str, Any] = dict(
            network_arguments,
            feature_dim=feature_dim,
            feature_net_arch=arch["psi"],
            net_arch=arch["qf"],
            activation_fn=activation_fn,
            n_critics=n_critics,
            n_frequencies=n_frequencies,
            trainable_frequencies=trainable_frequencies,
            time_embedding_dim=time_embedding_dim,
            noise_schedule=noise_schedule,
            n_diffusion_steps=n_diffusion_steps,
            n_stack=n_stack,
        )
        actor_arguments: dict[str, Any] = dict(network_arguments, net_arch=arch["pi"], activation_fn=activation_fn)
        if actor_type == "td3":
            actor_arguments["noise_std"] = noise_std
        actor_class = DeterministicActor if actor_type == "td3" else SquashedGaussianActor
        self.critic = SpectralCritic(**critic_arguments, score_net_arch=arch["zeta"])
        shared = self.critic.features_extractor if share_features_extractor else None
        self.actor = actor_class(**actor_arguments, features_extractor=shared)
        self.critic_target = SpectralCritic(**critic_arguments, score_net_arch=None)
        self.target_names = ("critic_target",)
        if actor_type == "td3":
            self.actor_target = DeterministicActor(**actor_arguments)
            self.target_names = ("critic_target", "actor_target")
        for target, online in self._targets():
            target.requires_grad_(False)
            target.load_state_dict({key: online.state_dict()[key] for key in target.state_dict()})

        learning_rate = lr_schedule(1.0)
        self.actor.optimizer = self.make_optimizer(self.actor, learning_rate)
        critic_rate = learning_rate if critic_learning_rate is None else critic_learning_rate
        self.critic.optimizer = self.make_optimizer(self.critic.q_net, critic_rate)
        self.critic.feature_optimizer = make_optimizer(
            optimizer_class,
            self.critic.feature_parameters(),
            learning_rate if feature_learning_rate is None else feature_learning_rate,
            self.optimizer_kwargs,
        )
        self.log_ent_coef: nn.Parameter | None = None
        if initial_ent_coef is not None:
            self.log_ent_coef = nn.Parameter(th.tensor([math.log(initial_ent_coef)]))
            self.ent_coef_optimizer = make_optimizer(th.optim.Adam, [self.log_ent_coef], learning_rate)
        if with_covariance:
            self.register_buffer("feature_covariance", th.zeros(feature_dim, feature_dim))
        self.set_training_mode(False)

    def _targets(self) -> list[tuple[Network, Network]]:
        """:return: each target with the network that it follows"""
        return [(getattr(self, name), getattr(self, name.removesuffix("_target"))) for name in self.target_names]

    def update_targets(self, tau: float) -> None:
        """
        Move the targets' weights towards those of the networks they follow; running statistics and fixed frequencies are
        copied.

        :param tau: Polyak coefficient
        """
        for target, online in self._targets():
            target.follow(online, 1.0 - tau)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self.actor._predict(observation, deterministic)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return dict(super()._get_constructor_parameters(), lr_schedule=self._dummy_schedule, **self._own_arguments)


MlpPolicy = DiffSRPolicy


class CnnPolicy(DiffSRPolicy):
    """
    [DiffSRPolicy][sb3_diffusion.diffsr.policies.DiffSRPolicy] on images, through SB3's ``NatureCNN`` with 50 outputs, which
    are the state.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_with_small_states(kwargs, NatureCNN, "features_dim"))


class MultiInputPolicy(DiffSRPolicy):
    """
    [DiffSRPolicy][sb3_diffusion.diffsr.policies.DiffSRPolicy] on ``Dict`` observations, through SB3's
    ``CombinedExtractor``, with 50 outputs for each image.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_with_small_states(kwargs, CombinedExtractor, "cnn_output_dim"))


def _with_small_states(kwargs: dict[str, Any], extractor: type[BaseFeaturesExtractor], size: str) -> dict[str, Any]:
    """Policy arguments whose ``extractor``, unless they name another, makes ``IMAGE_STATE_DIM`` numbers of an image."""
    if kwargs.setdefault("features_extractor_class", extractor) is extractor:
        kwargs["features_extractor_kwargs"] = {size: IMAGE_STATE_DIM, **(kwargs.get("features_extractor_kwargs") or {})}
    return kwargs
