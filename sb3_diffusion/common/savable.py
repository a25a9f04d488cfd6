"""Files of algorithms: models and replay buffers without pickle, loaded without touching the process."""

import inspect
import os
import warnings
from collections.abc import Iterable
from copy import deepcopy
from difflib import get_close_matches
from typing import Any, TypeVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, unwrap_vec_normalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_diffusion.buffers import EpisodeReplayBuffer
from sb3_diffusion.common.allowlist import full_name
from sb3_diffusion.common.archive import with_suffix
from sb3_diffusion.common.model_file import described_by, read_model, read_parameters, write_model
from sb3_diffusion.common.serialization import PathOrFile, load_replay_buffer, save_replay_buffer
from sb3_diffusion.common.utils import process_randomness_kept
from sb3_diffusion.common.vec_normalize import vec_normalize_state, wrap_vec_normalize
from sb3_diffusion.datasets import SpacesEnv, load_dataset_for
from sb3_diffusion.datasets.env_specs import register_robotics

SelfSavableAlgorithm = TypeVar("SelfSavableAlgorithm", bound="SavableAlgorithm")


def made_env(env: GymEnv | str, verbose: int) -> GymEnv:
    """SB3's ``maybe_make_env``; the environments of gymnasium-robotics are known by their ids too."""
    if isinstance(env, str):
        register_robotics(env)
    made = maybe_make_env(env, verbose)
    assert made is not None
    return made


def check_spaces(observation_space: spaces.Space, action_space: spaces.Space, env: VecEnv, source: str) -> None:
    """
    SB3's ``check_for_correct_spaces``, which also says whose spaces are which.

    :param observation_space: of the model
    :param action_space: of the model
    :param env: to compare with
    :param source: what ``env`` comes from, for the message
    :raises ValueError: if the spaces differ
    """
    compared = ("Observation", observation_space, env.observation_space), ("Action", action_space, env.action_space)
    for kind, ours, theirs in compared:
        if ours != theirs:
            raise ValueError(
                f"{kind} spaces do not match: the model has {ours}, the {source} {theirs}. Give one with the model's spaces, "
                "or build a new model."
            )


def _warn_of_unknown(model: OffPolicyAlgorithm, names: Iterable[str]) -> None:
    """Warn of names that the model does not have, which are probably misspelt."""
    for name in names:
        if not hasattr(model, name):
            nearest = get_close_matches(name, vars(model), n=1)
            meant = f"; `{nearest[0]}` may be meant" if nearest else ""
            warnings.warn(f"{type(model).__name__} has no attribute `{name}` to change{meant}.", stacklevel=3)


class SavableAlgorithm(OffPolicyAlgorithm):
    """
    SB3's off-policy algorithm with files of JSON and safetensors in the place of pickle.

    A model's file holds its configuration, networks, optimisers, its own random generators and the statistics of
    ``VecNormalize``; what is loaded goes on exactly where it was saved.
    """

    generator: th.Generator  # of the updates
    acting_generator: th.Generator  # of the actions
    _last_saved: str | None = None  # path, in this process

    def generators(self) -> dict[str, th.Generator]:
        """:return: the model's own random generators by name"""
        return dict(generator=self.generator, acting_generator=self.acting_generator)

    def set_env(self, env: GymEnv | str, force_reset: bool = True) -> None:
        """
        Give the model another environment with the same spaces and number of copies.

        Statistics of ``VecNormalize`` in the file that the model came from are put around an environment without any.

        :param env: Gymnasium env, VecEnv or id
        :param force_reset: reset it before the next rollout
        :raises ValueError: if its spaces are others
        """
        wrapped = self._wrap_env(made_env(env, self.verbose), self.verbose)
        if self.env is None and self._vec_normalize_env is not None:
            wrapped = wrap_vec_normalize(wrapped, vec_normalize_state(self._vec_normalize_env))
        check_spaces(self.observation_space, self.action_space, wrapped, "environment")
        super().set_env(wrapped, force_reset)

    def _excluded_save_params(self) -> list[str]:
        return [
            *super()._excluded_save_params(),
            "generator",
            "acting_generator",
            "lr_schedule",  # made from learning_rate
            "_last_saved",
        ]

    def save(self, path: PathOrFile, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None) -> None:  # type: ignore[override]
        """
        Save the model to one zip of JSON and safetensors, without pickle. Writing is atomic.

        Datasets and replay buffers are not part of it, statistics of ``VecNormalize`` are. What cannot be written, a lambda
        for instance, is recorded by name with one warning, and ``load`` asks for it through ``custom_objects``.

        :param path: path, ``.zip`` is added to one without suffix, or a binary file object
        :param exclude: names of further attributes to leave out
        :param include: names of attributes that are left out by default and shall be saved
        :raises NonFiniteError: if weights are not finite; the file is then as it was
        """
        self._check_before_saving(path)
        excluded = (set(self._excluded_save_params()) | set(exclude or ())) - set(include or ())
        normalizer = self._vec_normalize_env
        write_model(self, path, excluded, None if normalizer is None else vec_normalize_state(normalizer))
        if isinstance(path, (str, os.PathLike)):
            self._last_saved = str(with_suffix(path))

    def _check_before_saving(self, path: PathOrFile) -> None:
        """Raise an error where the model must not take the place of what is at ``path``."""

    @classmethod
    def load(  # type: ignore[override]
        cls: type[SelfSavableAlgorithm],
        path: PathOrFile,
        env: GymEnv | str | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        *,
        dataset: Any = None,
        **kwargs: Any,
    ) -> SelfSavableAlgorithm:
        """
        Load a model. Nothing in the file is executed, and the random generators of the process are left alone.

        :param path: path, with or without ``.zip``, or a binary file object
        :param env: environment to go on with: Gymnasium env, VecEnv or id; None takes that of ``dataset``, if given
        :param device: device of the networks
        :param custom_objects: replacements of attributes by name, and what the file holds by name only
        :param print_system_info: print the versions of the libraries now and then
        :param force_reset: reset the environment before the next rollout
        :param dataset: logged data to attach, see [load_dataset][sb3_diffusion.load_dataset]
        :param kwargs: attributes to change; a name that the model does not have is set too, with a warning
        :return: the model
        :raises FileFormatError: if the file is damaged, foreign, of a newer schema or of another class, or does not describe a
            model
        :raises ValueError: if spaces or ``policy_kwargs`` differ from the saved ones, or the constructor refuses a setting
        """
        file = read_model(cls, path, custom_objects, print_system_info)
        data = file.data
        verbose = data.get("verbose", 0)
        saved_policy_kwargs = data.get("policy_kwargs", {})
        if kwargs.get("policy_kwargs", saved_policy_kwargs) != saved_policy_kwargs:
            raise ValueError(
                f"`policy_kwargs` must equal the saved ones, {saved_policy_kwargs}: got {kwargs['policy_kwargs']}. "
                "Leave them out, or build a new model and take the parameters over by `set_parameters`."
            )
        if dataset is not None and env is None:
            dataset = load_dataset_for(dataset, data["observation_space"], data["action_space"])
        if env is not None:
            env = cls._wrap_env(made_env(env, verbose), verbose)
            check_spaces(data["observation_space"], data["action_space"], env, "environment")
            if file.vec_normalize is not None:
                env = wrap_vec_normalize(env, file.vec_normalize)
        with process_randomness_kept():
            with described_by():
                cls._check_settings({**data, **kwargs})
            model = cls(data["policy_class"], env, device=device, dataset=dataset, _init_setup_model=False)  # type: ignore[call-arg,arg-type]
            if model.env is not None:
                source = "dataset" if env is None else "environment"
                check_spaces(data["observation_space"], data["action_space"], model.env, source)
                data["n_envs"] = model.env.num_envs
                if force_reset:
                    data["_last_obs"] = None
            if file.vec_normalize is not None and model._vec_normalize_env is None:
                model._carry_vec_normalize(file.vec_normalize, data["observation_space"], data["action_space"])
            vars(model).update(data)
            _warn_of_unknown(model, kwargs)
            vars(model).update(kwargs)
            sampled_from = deepcopy(model.action_space)
            with described_by():
                model._setup_model()
            model.action_space = sampled_from  # its generator stands where it was saved, and not at the seed
        with described_by():
            model.set_parameters(file.parameters, exact_match=True, device=device)
            for name, generator in model.generators().items():
                state = file.generators.get(name)
                if state is not None and state.numel() == generator.get_state().numel():  # of the same kind of device
                    generator.set_state(state)
        return model

    @classmethod
    def _check_settings(cls, settings: dict[str, Any]) -> None:
        """
        :param settings: attributes of a model, those of its constructor's arguments among them
        :raises ValueError: if the constructor refuses one of them
        """
        names = inspect.signature(cls.__init__).parameters.keys() - {"self", "policy", "env", "dataset", "device", "verbose"}
        arguments = {name: value for name, value in settings.items() if name in names}
        cls(settings["policy_class"], None, device="cpu", _init_setup_model=False, **arguments)  # type: ignore[call-arg,arg-type]

    def _carry_vec_normalize(self, state: dict[str, Any], observation_space: spaces.Space, action_space: spaces.Space) -> None:
        """
        Put the saved ``VecNormalize`` around the environment that the data brought; without one around an environment that
        has spaces alone, so that data and evaluations are normalised as in training.
        """
        env = self.env or DummyVecEnv([lambda: SpacesEnv(observation_space, action_space)])
        env = wrap_vec_normalize(env, state)
        self._vec_normalize_env = unwrap_vec_normalize(env)
        if self.env is not None:
            self.env = env

    def set_parameters(  # type: ignore[override]
        self,
        load_path_or_dict: PathOrFile | dict[str, Any],
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """
        Take over parameters of networks and optimisers.

        :param load_path_or_dict: a model's file, or a dict as ``get_parameters()`` returns it
        :param exact_match: require every network and each of its tensors
        :param device: not needed, tensors go where the networks are
        :raises ValueError: if names do not match; as with all other errors, the model is then as it was
        """
        parameters = load_path_or_dict if isinstance(load_path_or_dict, dict) else read_parameters(load_path_or_dict)
        before = deepcopy(self.get_parameters())
        try:
            super().set_parameters(parameters, exact_match, device)  # type: ignore[arg-type]
        except BaseException:
            super().set_parameters(before, exact_match=True, device=device)  # type: ignore[arg-type]
            raise

    def _make_replay_buffer(self) -> ReplayBuffer:
        """:return: a new buffer of online transitions"""
        raise NotImplementedError

    def save_replay_buffer(self, path: PathOrFile) -> None:  # type: ignore[override]
        """
        Save the replay buffer of online transitions to one zip of JSON and safetensors, atomically and without pickle.

        :param path: exactly this path, whatever its suffix, or a binary file object
        """
        assert self.replay_buffer is not None
        save_replay_buffer(self.replay_buffer, path)

    def load_replay_buffer(self, path: PathOrFile, truncate_last_traj: bool = True) -> None:  # type: ignore[override]
        """
        Load a replay buffer of online transitions, in place of the model's. What is drawn from the stored steps is as the
        model has it, whatever the file says: ``n_steps``, ``gamma``, ``horizon``, ...

        :param path: path or binary file object, as given to ``save_replay_buffer``
        :param truncate_last_traj: take the last trajectory as ended (``HerReplayBuffer``; the default buffer's ends when
            ``learn`` resets the environment)
        :raises ValueError: if it is of another class than the model's, was filled from other spaces or another number of
            environments
        """
        own = self.replay_buffer_class
        assert own is not None
        buffer = load_replay_buffer(path, device=self.device, custom_objects={full_name(own): own})
        if type(buffer) is not own:
            raise ValueError(
                f"The replay buffer must be a {own.__name__}, as the model's: the file holds a {type(buffer).__name__}. Build "
                f"the model with `replay_buffer_class={type(buffer).__name__}`."
            )
        if (buffer.observation_space, buffer.action_space) != (self.observation_space, self.action_space):
            raise ValueError(
                f"The replay buffer must hold {self.observation_space} and {self.action_space}, as the model: it holds "
                f"{buffer.observation_space} and {buffer.action_space}."
            )
        if buffer.n_envs != self.n_envs:
            raise ValueError(
                f"The replay buffer must come from {self.n_envs} environment(s), as the model: got {buffer.n_envs}."
            )
        buffer.device = self.device
        if isinstance(buffer, EpisodeReplayBuffer):
            ours = getattr(self, "replay_buffer", None)
            ours = self._make_replay_buffer() if ours is None else ours
            sampling = {name: getattr(ours, name) for name in buffer.sampling_options}
            if any(getattr(buffer, name) != value for name, value in sampling.items()):
                buffer.set_state({**buffer.get_state(), **sampling})
            buffer.generator = self.generator
        if isinstance(buffer, HerReplayBuffer):
            if self.env is None:
                raise ValueError(
                    "HerReplayBuffer computes rewards with the environment: pass `env` to load(), or call set_env()."
                )
            buffer.set_env(self.env)
            if truncate_last_traj:
                buffer.truncate_last_trajectory()
        self.replay_buffer = buffer
