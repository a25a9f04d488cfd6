"""Hyperparameters in the notation of RL Zoo's files: made from the presets of the algorithms, and read back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from stable_baselines3.common.utils import LinearSchedule

from sb3_diffusion.common.base_class import OfflineAlgorithm
from sb3_diffusion.common.utils import CosineSchedule
from sb3_diffusion.diffuser import PDTracker


def expand(algorithm: type[OfflineAlgorithm], section: Mapping[str, Any]) -> dict[str, Any]:
    """
    Put the settings of a preset in the place of its name, and the length of the published runs where no other is given.

    :param algorithm: whose ``presets``
    :param section: of a hyperparameter file; ``preset`` names published settings, everything else wins over them
    :return: the section without ``preset``, in RL Zoo's notation: plain values, and text where an object is meant
    :raises ValueError: if there is no such preset
    """
    own = dict(section)
    name = own.pop("preset", None)
    preset = {} if name is None else dict(algorithm.preset(name))
    n_timesteps = preset.pop("default_total_timesteps", algorithm.default_total_timesteps)
    settings = {key: _to_text(key, value) for key, value in preset.items()}
    return {"n_timesteps": n_timesteps, **settings, **own}


def sections(algorithm: type[OfflineAlgorithm]) -> dict[str, dict[str, Any]]:
    """
    All presets of an algorithm, to be written as a YAML file.

    :param algorithm: whose ``presets``
    :return: hyperparameters by the name of the preset, and ``default``, the section of environments without one
    """
    return {"default": expand(algorithm, {}), **{name: expand(algorithm, {"preset": name}) for name in algorithm.presets}}


def parse_texts(section: Mapping[str, Any]) -> dict[str, Any]:
    """
    Turn what is written as text into objects. Learning rates, in each entry whose name ends in ``learning_rate``: ``lin_3e-4``
    or ``linear_3e-4`` falls to 0 over the run, ``linear_3e-4_0.25`` within its first quarter, ``cosine_3e-4`` along half a
    cosine. ``tracker: pd`` is a ``PDTracker()``.

    :param section: of a hyperparameter file
    :return: the same with objects
    :raises ValueError: if a text cannot be read
    """
    return {key: _parse(key, value) if isinstance(value, str) else value for key, value in section.items()}


def _parse(key: str, text: str) -> Any:
    if key.endswith("learning_rate"):
        return _parse_schedule(key, text)
    if key == "tracker":
        if text != "pd":
            raise ValueError(f"`tracker` must be 'pd': got {text!r}. Give others in Python.")
        return PDTracker()
    return text


def _parse_schedule(key: str, text: str) -> Callable[[float], float]:
    kind, *numbers = text.split("_")
    try:
        values = [float(number) for number in numbers]
    except ValueError:
        values = []
    if kind == "cosine" and len(values) == 1:
        return CosineSchedule(values[0])
    if kind in ("lin", "linear") and 1 <= len(values) <= 2:
        return LinearSchedule(values[0], 0.0, values[1] if len(values) == 2 else 1.0)
    raise ValueError(f"`{key}` must be a number, 'lin_3e-4', 'linear_3e-4_0.25' or 'cosine_3e-4': got {text!r}.")


def _to_text(key: str, value: Any) -> Any:
    if isinstance(value, CosineSchedule):
        return f"cosine_{value.initial}"
    if isinstance(value, LinearSchedule) and value.end == 0.0:
        return f"linear_{value.start}_{value.end_fraction}"
    if isinstance(value, PDTracker) and vars(value) == vars(PDTracker()):
        return "pd"
    if key.endswith("_kwargs"):
        return _to_python(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"RL Zoo has no notation for {key}={value!r}.")


def _to_python(value: Any) -> str:
    """As RL Zoo evaluates it, with ``nn`` for ``torch.nn`` and ``th`` for ``torch``."""
    if isinstance(value, Mapping):
        return f"dict({', '.join(f'{key}={_to_python(item)}' for key, item in value.items())})"
    if isinstance(value, type) and value.__module__.startswith("torch.nn."):
        return f"nn.{value.__name__}"
    if isinstance(value, type) and value.__module__.startswith("torch.optim."):
        return f"th.optim.{value.__name__}"
    return repr(value)
