"""Networks on observations, and policies of them, that several algorithms share: actors, denoiser of actions, critic."""

from collections.abc import Iterable
from copy import deepcopy
from typing import Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel, BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim, preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.func import functional_call

from sb3_diffusion.common.denoisers import DiscreteDenoiser, EDMDenoiser
from sb3_diffusion.common.observations import ObservationNormalizer, n_rows, repeat_rows
from sb3_diffusion.common.samplers import SAMPLERS, STOCHASTIC_SAMPLERS
from sb3_diffusion.common.serialization import PickleFreeModule
from sb3_diffusion.common.torch_layers import ConditionalMLP, Mish, ensemble_mlp
from sb3_diffusion.common.utils import check_choice, check_integer, make_optimizer, move_average

SelfNetwork = TypeVar("SelfNetwork", bound="Network")

TensorPairs = list[tuple[th.Tensor, th.Tensor]]


class Network(PickleFreeModule, BaseModel):
    """
    A network on observations: features extractor, optional frozen normalisation and moving average, pickle-free files.

    :param observation_space: observation space
    :param action_space: action space
    :param features_extractor_class: class of the features extractor
    :param features_extractor_kwargs: its arguments
    :param features_extractor: an extractor to share; a new one is made if None
    :param normalize_images: divide images by 255
    :param normalize_observations: normalise vector observations by frozen statistics
    """

    features_extractor: BaseFeaturesExtractor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        features_extractor: BaseFeaturesExtractor | None = None,
        normalize_images: bool = True,
        normalize_observations: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class,
            features_extractor_kwargs,
            normalize_images=normalize_images,
            **kwargs,
        )
        self.shares_features_extractor = features_extractor is not None
        self.features_extractor = self.make_features_extractor() if features_extractor is None else features_extractor
        self.action_dim = get_action_dim(action_space)
        self.normalizer = ObservationNormalizer(observation_space) if normalize_observations else None
        self.averaged: Network | None = None
        self._followed: tuple[Network, TensorPairs, TensorPairs] | None = None  # the leader, weights, what is copied

    def features(self, observations: PyTorchObs) -> th.Tensor:
        """
        :param observations: batch of observations
        :return: features, shape ``(batch_size, features_dim)``
        """
        preprocessed = preprocess_obs(observations, self.observation_space, normalize_images=self.normalize_images)
        if self.normalizer is not None:
            preprocessed = self.normalizer(preprocessed)
        # A shared extractor is learned by its owner alone, as in SB3's ContinuousCritic
        with th.set_grad_enabled(th.is_grad_enabled() and not self.shares_features_extractor):
            return self.features_extractor(preprocessed)

    def add_average(self) -> None:
        """Keep a moving average of the weights; it starts from the present ones."""
        self.averaged = deepcopy(self).requires_grad_(False)

    def update_average(self, decay: float) -> None:
        """
        Move the averaged weights towards the present ones; running statistics of batch normalisation are copied.

        :param decay: share of the average that stays
        """
        assert self.averaged is not None
        self.averaged.follow(self, decay)

    def follow(self, leader: "Network", decay: float) -> None:
        """
        Move the weights of this network, a target or an average, towards those of another one. The buffers in its state are
        copied: running statistics of batch normalisation, fixed frequencies, frozen statistics.

        :param leader: has weights and buffers of the same names and shapes; what else it has is left out
        :param decay: share of the own weights that stays
        """
        if self._followed is None or self._followed[0] is not leader:  # to look for them takes as long as to move them
            parameters, buffers, kept = dict(leader.named_parameters()), dict(leader.named_buffers()), self.state_dict()
            self._followed = (
                leader,
                [(own, parameters[name]) for name, own in self.named_parameters()],
                [(own, buffers[name]) for name, own in self.named_buffers() if name in kept],
            )
        _, weights, copied = self._followed
        move_average([own for own, _ in weights], [its for _, its in weights], decay)
        for own, its in copied:
            own.copy_(its)

    def _apply(self: SelfNetwork, *args: Any, **kwargs: Any) -> SelfNetwork:
        self._followed = None  # on another device tensors may be others
        return super()._apply(*args, **kwargs)

    def train(self: SelfNetwork, mode: bool = True) -> SelfNetwork:
        super().train(mode)
        if self.averaged is not None:
            self.averaged.train(False)
        return self

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return dict(
            super()._get_constructor_parameters(),
            features_extractor_class=self.features_extractor_class,
            features_extractor_kwargs=self.features_extractor_kwargs,
            normalize_observations=self.normalizer is not None,
        )


class Actor(Network, BasePolicy):
    r"""
    A network that turns an observation and a latent $z \sim N(0, I)$ into an action in [-1, 1].

    ``predict`` acts with the ``averaged`` weights if there are any (unless ``acts_with_average`` is False), and with the
    trained ones otherwise. ``deterministic=True`` takes $z = 0$. Otherwise latents come from ``generator``, or from torch's
    global one if None.

    :param args: positional arguments of [Network][sb3_diffusion.common.policies.Network]
    :param acts_with_average: act with the averaged weights where there are any
    :param kwargs: further arguments of [Network][sb3_diffusion.common.policies.Network]
    """

    generator: th.Generator | None = None

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of $z$ for one row."""
        return (self.action_dim,)

    def __init__(self, *args: Any, acts_with_average: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, squash_output=True, **kwargs)
        self.acts_with_average = acts_with_average

    def latents(self, batch_size: int, deterministic: bool = False) -> th.Tensor:
        """
        :param batch_size: number of rows
        :param deterministic: zeros instead of draws
        :return: shape ``(batch_size, *latent_shape)``
        """
        if deterministic:
            return th.zeros(batch_size, *self.latent_shape, device=self.device)
        return th.randn(batch_size, *self.latent_shape, generator=self.generator).to(self.device)

    def act(self, observations: PyTorchObs, latents: th.Tensor) -> th.Tensor:
        """
        Actions of the policy that acts.

        :param observations: batch of observations
        :param latents: $z$, shape ``(batch_size, *latent_shape)``
        :return: actions in [-1, 1], shape ``(batch_size, action_dim)``
        """
        actor = self.averaged if self.averaged is not None and self.acts_with_average else self
        return actor(observations, latents).float()  # under autocast too

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self.act(observation, self.latents(n_rows(observation), deterministic))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        own = dict(average=self.averaged is not None, acts_with_average=self.acts_with_average)
        return dict(super()._get_constructor_parameters(), **own)


class ChainActor(Actor):
    """
    An actor that is a diffusion model of discrete steps: it acts by running the reverse chain.

    The latent of a row holds all that the chain draws: the noise that it starts from, and for a stochastic sampler the noise
    of each step but the last, shape ``(n_draws, ...)``.
    """

    denoiser: DiscreteDenoiser

    def set_sampler(self, sampler: str, n_sampling_steps: int | None = None) -> None:
        """
        Choose how the chain is run, also after training.

        :param sampler: ``"ddpm"``, ``"ddim"``, ``"dpm_solver"`` or ``"heun"``
        :param n_sampling_steps: at most the length of the chain; None for all of it
        :raises ValueError: if there is no such sampler, or the chain is shorter
        """
        check_choice("sampler", sampler, tuple(SAMPLERS))
        if n_sampling_steps is not None:
            check_integer("n_sampling_steps", n_sampling_steps, 1, self.denoiser.n_diffusion_steps)
        self.sampler = sampler
        self.n_sampling_steps = n_sampling_steps
        if isinstance(self.averaged, ChainActor):
            self.averaged.set_sampler(sampler, n_sampling_steps)

    @property
    def sampling_length(self) -> int:
        """Steps that the sampler takes."""
        return self.denoiser.n_diffusion_steps if self.n_sampling_steps is None else self.n_sampling_steps

    @property
    def sampling_levels(self) -> th.Tensor:
        """Noise levels of these steps, falling, shape ``(sampling_length,)``."""
        return self.denoiser.sampling_levels(self.sampling_length)

    @property
    def n_draws(self) -> int:
        """Noises that the sampler draws for a row."""
        return self.sampling_length if self.sampler in STOCHASTIC_SAMPLERS else 1


class ActionDenoiser(Network):
    r"""
    Diffusion model of the actions in the data given the observation: an EDM denoiser $D(a + \sigma\epsilon, \sigma | s)$.

    :param net_arch: sizes of the hidden layers
    :param activation_fn: activation after each of them
    :param time_embedding_dim: size of the embedding of the noise level
    :param linear_first_layer: no activation after the first hidden layer
    :param sigma_data: scale on which the model sees the actions, scaled to [-1, 1]: their standard deviation, or the width of
        one mode where several lie apart
    :param clip: largest absolute value of a denoised action; None for no bound
    :param kwargs: arguments of [Network][sb3_diffusion.common.policies.Network]
    """

    def __init__(
        self,
        *args: Any,
        net_arch: list[int],
        activation_fn: type[nn.Module] = Mish,
        time_embedding_dim: int = 16,
        linear_first_layer: bool = False,
        sigma_data: float = 0.5,
        clip: float | None = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._own_arguments = dict(
            net_arch=net_arch,
            activation_fn=activation_fn,
            time_embedding_dim=time_embedding_dim,
            linear_first_layer=linear_first_layer,
            sigma_data=sigma_data,
            clip=clip,
        )
        net = ConditionalMLP(
            self.action_dim,
            self.features_extractor.features_dim,
            net_arch,
            activation_fn,
            time_embedding_dim,
            linear_first_layer,
        )
        self.denoiser = EDMDenoiser(net, sigma_data, clip)

    def forward(self, observations: PyTorchObs, noisy_actions: th.Tensor, sigma: th.Tensor) -> th.Tensor:
        """
        :param observations: batch of observations
        :param noisy_actions: shape ``(batch_size, action_dim)``
        :param sigma: noise levels, shape ``(batch_size,)``
        :return: denoised actions, shape ``(batch_size, action_dim)``
        """
        return self.denoiser(noisy_actions, sigma, self.features(observations))

    def loss(self, observations: PyTorchObs, actions: th.Tensor, noise: th.Tensor, sigma: th.Tensor) -> th.Tensor:
        """
        Weighted squared error of denoising ``actions``, see [Denoiser.loss][sb3_diffusion.common.denoisers.Denoiser.loss].

        :param observations: batch of observations
        :param actions: clean actions, shape ``(batch_size, action_dim)``
        :param noise: standard normal, same shape
        :param sigma: noise levels, shape ``(batch_size,)``
        :return: shape ``(batch_size, action_dim)``
        """
        return self.denoiser.loss(actions, noise, sigma, self.features(observations))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return dict(super()._get_constructor_parameters(), **self._own_arguments)


class QCritic(Network):
    """
    ``n_critics`` action values, evaluated in one batched pass.

    :param net_arch: sizes of the hidden layers
    :param activation_fn: activation after each of them
    :param n_critics: number of critics
    :param layer_norm: layer normalisation before each activation
    :param kwargs: arguments of [Network][sb3_diffusion.common.policies.Network]
    """

    def __init__(
        self,
        *args: Any,
        net_arch: list[int],
        activation_fn: type[nn.Module] = Mish,
        n_critics: int = 2,
        layer_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if n_critics < 1:
            raise ValueError(f"`n_critics` must be at least 1: got {n_critics}.")
        self._own_arguments = dict(net_arch=net_arch, activation_fn=activation_fn, n_critics=n_critics, layer_norm=layer_norm)
        self.n_critics = n_critics
        in_features = self.features_extractor.features_dim + self.action_dim
        self.q_net = ensemble_mlp(n_critics, in_features, net_arch, activation_fn, layer_norm)

    def forward(self, observations: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        :param observations: batch of observations
        :param actions: shape ``(batch_size, action_dim)``, in [-1, 1]
        :return: values, shape ``(n_critics, batch_size, 1)``
        """
        return self.q_values(self.features(observations), actions)

    def q_values(self, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        :param features: shape ``(batch_size, features_dim)``
        :param actions: shape ``(batch_size, action_dim)``, in [-1, 1]
        :return: values, shape ``(n_critics, batch_size, 1)``
        """
        return self.q_net(th.cat([features, actions], dim=-1))

    def q_values_of(self, member: th.Tensor, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        One critic's values, without the cost of the others.

        :param member: number of the critic, shape ``(1,)``
        :param features: shape ``(batch_size, features_dim)``
        :param actions: shape ``(batch_size, action_dim)``, in [-1, 1]
        :return: values, shape ``(1, batch_size, 1)``
        """
        weights = {name: weight[member] for name, weight in self.q_net.named_parameters()}
        return functional_call(self.q_net, weights, (th.cat([features, actions], dim=-1),))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return dict(super()._get_constructor_parameters(), **self._own_arguments)


class DiffusionPolicy(PickleFreeModule, BasePolicy):
    """
    What the policies of all algorithms share: files without pickle, optimisers, frozen statistics, training mode.

    Sub-networks are attributes; those named in ``target_names`` always stay in evaluation mode.
    """

    target_names: tuple[str, ...] = ()
    actor: Actor

    def networks(self) -> Iterable[tuple[str, nn.Module]]:
        """:return: names and modules of the sub-networks"""
        return self.named_children()

    def fit_normalizer(self, observations: np.ndarray | dict[str, np.ndarray]) -> None:
        """
        Take the frozen statistics from data, in every network that normalises observations.

        :param observations: shape ``(n_steps, *obs_shape)``, or a dict of such arrays
        """
        for module in self.modules():
            if isinstance(module, ObservationNormalizer):
                module.fit(observations)

    def set_generator(self, generator: th.Generator | None) -> None:
        """
        :param generator: source of the draws when acting; None for torch's global generator
        """
        self.actor.generator = generator

    def make_optimizer(self, module: nn.Module, learning_rate: float) -> th.optim.Optimizer:
        """
        :param module: network to train
        :param learning_rate: initial learning rate
        :return: optimiser of ``optimizer_class`` over its parameters
        """
        return make_optimizer(self.optimizer_class, module.parameters(), learning_rate, self.optimizer_kwargs)

    def set_training_mode(self, mode: bool) -> None:
        for name, module in self.networks():
            wanted = mode and name not in self.target_names
            # Looking is cheap beside setting, which would be half of the time of an action
            if any(part.training != wanted for part in module.modules()):
                module.train(wanted)
        self.training = mode

    def forward(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self._predict(observation, deterministic)


class ActorCriticPolicy(DiffusionPolicy):
    """
    A policy whose ``actor`` acts, with a ``critic`` of its actions and a slowly following ``critic_target``.

    It acts with one action of the actor, or chooses one of several candidates by their target values, each the smallest of
    the critics'.
    ``deterministic=True`` takes the latent 0, or among several candidates, whose latents all rows share, the best one.

    :param observation_space: observation space
    :param action_space: action space
    :param features_extractor_class: class of the features extractor
    :param features_extractor_kwargs: its arguments
    :param normalize_images: divide images by 255
    :param optimizer_class: class of the optimisers
    :param optimizer_kwargs: their arguments except the learning rate
    :param share_features_extractor: one features extractor for all networks, learned with the actor
    :param n_action_samples: number of candidates drawn per observation when acting
    :param candidate_choice: ``"softmax"`` draws one of several candidates by the softmax of target values, ``"argmax"`` takes
        the best
    :param normalize_observations: normalise vector observations by frozen statistics of the data
    """

    target_names = ("critic_target",)
    critic: QCritic
    critic_target: QCritic

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        *,
        features_extractor_class: type[BaseFeaturesExtractor],
        features_extractor_kwargs: dict[str, Any] | None,
        normalize_images: bool,
        optimizer_class: type[th.optim.Optimizer],
        optimizer_kwargs: dict[str, Any] | None,
        share_features_extractor: bool,
        n_action_samples: int,
        candidate_choice: str,
        normalize_observations: bool,
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
        check_choice("candidate_choice", candidate_choice, ("softmax", "argmax"))
        self.n_action_samples = n_action_samples
        self.candidate_choice = candidate_choice
        self.share_features_extractor = share_features_extractor
        self._own_arguments: dict[str, Any] = dict(
            features_extractor_class=features_extractor_class,
            features_extractor_kwargs=self.features_extractor_kwargs,
            optimizer_class=optimizer_class,
            optimizer_kwargs=self.optimizer_kwargs,
            share_features_extractor=share_features_extractor,
            n_action_samples=n_action_samples,
            candidate_choice=candidate_choice,
            normalize_observations=normalize_observations,
        )
        self._network_arguments: dict[str, Any] = dict(
            observation_space=observation_space,
            action_space=action_space,
            features_extractor_class=features_extractor_class,
            features_extractor_kwargs=self.features_extractor_kwargs,
            normalize_images=normalize_images,
            normalize_observations=normalize_observations,
        )

    def copy_critic_to_target(self) -> None:
        """Make the target's action values equal to the critic's."""
        online = self.critic.state_dict()
        self.critic_target.load_state_dict({key: online[key] for key in self.critic_target.state_dict()})

    def update_critic_target(self, tau: float) -> None:
        """
        Move the target's weights, those of its features extractor included, towards the critic's; running statistics of
        batch normalisation are copied.

        :param tau: Polyak coefficient
        """
        self.critic_target.follow(self.critic, 1.0 - tau)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        if self.n_action_samples == 1:
            return self.actor._predict(observation, deterministic)
        return self._best_of_candidates(observation, deterministic)

    def _best_of_candidates(self, observation: PyTorchObs, deterministic: bool) -> th.Tensor:
        """One of ``n_action_samples`` candidates: a draw from softmax of the smallest target value, or the argmax."""
        n, batch_size = self.n_action_samples, n_rows(observation)
        repeated = repeat_rows(observation, n)
        if deterministic:
            shared = self._shared_latents.to(self.device)
            latents = shared.repeat(batch_size, *[1] * (shared.dim() - 1))
        else:
            latents = self.actor.latents(batch_size * n)
        candidates = self.actor.act(repeated, latents)
        q_values = self.critic_target(repeated, candidates).amin(dim=0).reshape(batch_size, n)
        if deterministic or self.candidate_choice == "argmax":
            chosen = q_values.argmax(dim=1)
        else:
            probabilities = q_values.softmax(dim=1).cpu()
            chosen = th.multinomial(probabilities, 1, generator=self.actor.generator).squeeze(1).to(self.device)
        return candidates.reshape(batch_size, n, -1)[th.arange(batch_size, device=self.device), chosen]

    @property
    def _shared_latents(self) -> th.Tensor:
        """The same latents for every row and every call, shape ``(n_action_samples, *latent_shape)``; the first is 0."""
        latents = th.randn(self.n_action_samples, *self.actor.latent_shape, generator=th.Generator().manual_seed(0))
        latents[0] = 0.0
        return latents

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return dict(super()._get_constructor_parameters(), lr_schedule=self._dummy_schedule, **self._own_arguments)
