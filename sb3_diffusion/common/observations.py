"""Observations between spaces and tensors: their parts, statistics, place in one vector, and rows of batches."""

import math
from collections import OrderedDict
from collections.abc import Mapping
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common import torch_layers
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_diffusion.common.utils import MIN_SCALE
from sb3_diffusion.datasets.arrays import column_moments

ArrayT = TypeVar("ArrayT", np.ndarray, th.Tensor)
PartT = TypeVar("PartT")

FLAT_KEY = "observation"
"""Key of the one part of a space that is not a ``Dict``."""


def subspaces(space: spaces.Space) -> dict[str, spaces.Space]:
    """
    :param space: of observations
    :return: its parts by key
    """
    return dict(space.spaces) if isinstance(space, spaces.Dict) else {FLAT_KEY: space}


def as_parts(observations: PartT | dict[str, PartT]) -> dict[str, PartT]:
    """
    :param observations: of any space
    :return: its parts by key
    """
    return observations if isinstance(observations, dict) else {FLAT_KEY: observations}


class ObservationNormalizer(nn.Module):
    """
    Shifts and scales vector observations to mean 0 and standard deviation 1 by frozen statistics.

    Images and discrete observations pass unchanged. Dimensions that hardly vary in the data keep their scale.

    :param observation_space: space of the observations, ``Dict`` included
    """

    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__()
        self.keys = [
            key
            for key, space in subspaces(observation_space).items()
            if isinstance(space, spaces.Box) and not is_image_space(space)
        ]
        for i, key in enumerate(self.keys):  # a key may hold characters that a buffer's name may not
            shape = subspaces(observation_space)[key].shape or ()
            self.register_buffer(f"mean_{i}", th.zeros(shape))
            self.register_buffer(f"std_{i}", th.ones(shape))

    def fit(self, observations: np.ndarray | dict[str, np.ndarray]) -> None:
        """
        Take the statistics from data.

        :param observations: shape ``(n_steps, *obs_shape)``, or a dict of such arrays
        """
        arrays = as_parts(observations)
        for i, key in enumerate(self.keys):
            mean, variance = column_moments(arrays[key])
            std = np.sqrt(variance)
            scale = np.where(std > MIN_SCALE, std, 1.0)
            getattr(self, f"mean_{i}").copy_(th.as_tensor(mean))
            getattr(self, f"std_{i}").copy_(th.as_tensor(scale))

    def forward(self, observations: PyTorchObs) -> PyTorchObs:
        """
        :param observations: tensor ``(batch_size, *obs_shape)`` or a dict of such tensors, preprocessed to floats
        :return: the same with vectors normalised
        """
        if isinstance(observations, dict):
            return {key: self._normalize(key, value) for key, value in observations.items()}
        return self._normalize(FLAT_KEY, observations)

    def _normalize(self, key: str, value: th.Tensor) -> th.Tensor:
        if key not in self.keys:
            return value
        i = self.keys.index(key)
        return (value - getattr(self, f"mean_{i}")) / getattr(self, f"std_{i}")


class CombinedExtractor(torch_layers.CombinedExtractor):
    """
    SB3's features extractor of ``Dict`` observations, for keys with dots too, as flattened nested observations have them: the
    names of modules may hold none.

    :param observation_space: of the observations
    :param cnn_output_dim: outputs for each image
    :param normalized_image: whether images are normalised already
    """

    def __init__(self, observation_space: spaces.Dict, cnn_output_dim: int = 256, normalized_image: bool = False) -> None:
        names = {key: key.replace(".", "/") for key in observation_space.spaces}
        renamed = spaces.Dict(OrderedDict((names[key], space) for key, space in observation_space.spaces.items()))
        super().__init__(renamed, cnn_output_dim, normalized_image)
        self.names = names

    def forward(self, observations: dict[str, th.Tensor]) -> th.Tensor:
        """
        :param observations: batch of observations by key
        :return: features, shape ``(batch_size, features_dim)``
        """
        return super().forward({name: observations[key] for key, name in self.names.items()})


class VectorLayout:
    """
    Where the parts of an observation lie in one vector.

    :param parts: spaces of the parts by key, in their order; of a space that is no ``Dict`` one part
    :param model: what the model does with them, for the message
    :raises ValueError: if one of them is no Box, or an image
    """

    def __init__(self, parts: Mapping[str, spaces.Space], model: str) -> None:
        for key, part in parts.items():
            if not isinstance(part, spaces.Box) or is_image_space(part):
                raise ValueError(
                    f"{model}: observations must be a Box that is no image, or a Dict of such Boxes, got {part} for {key!r}. "
                    "DTQL, DiffusionQL and DiffSR take images and discrete observations."
                )
        self.shapes: dict[str, tuple[int, ...]] = {key: part.shape or () for key, part in parts.items()}
        ends = np.cumsum([0, *(math.prod(shape) for shape in self.shapes.values())]).tolist()
        self.slices = {key: slice(*pair) for key, pair in zip(self.shapes, pairwise(ends), strict=True)}
        self.dim: int = ends[-1]

    def join(self, observations: PyTorchObs) -> th.Tensor:
        """
        :param observations: tensor ``(*batch_shape, *obs_shape)``, or a dict of such tensors
        :return: shape ``(*batch_shape, dim)``
        """
        parts = as_parts(observations)
        flat = [
            parts[key].float().flatten(-len(shape)) if shape else parts[key].float().unsqueeze(-1)
            for key, shape in self.shapes.items()
        ]
        return th.cat(flat, dim=-1)

    def split(self, vectors: ArrayT) -> dict[str, ArrayT]:
        """
        :param vectors: shape ``(*batch_shape, dim)``
        :return: the parts by key, shape ``(*batch_shape, *obs_shape)``
        """
        batch_shape = vectors.shape[:-1]
        return {key: vectors[..., self.slices[key]].reshape(*batch_shape, *shape) for key, shape in self.shapes.items()}


def check_image(observation_space: spaces.Space) -> None:
    """
    :param observation_space: given to a ``CnnPolicy``
    :raises ValueError: if it is no image
    """
    if not is_image_space(observation_space):
        raise ValueError(f"`CnnPolicy` takes images: got {observation_space}; use `MlpPolicy`.")


def repeat_rows(observations: PyTorchObs, n: int) -> PyTorchObs:
    """
    :param observations: batch of observations
    :param n: how often each row is repeated
    :return: ``n`` times as many rows, copies of a row side by side
    """
    if isinstance(observations, dict):
        return {key: value.repeat_interleave(n, dim=0) for key, value in observations.items()}
    return observations.repeat_interleave(n, dim=0)


def take_rows(observations: PyTorchObs, rows: th.Tensor | slice) -> PyTorchObs:
    """
    :param observations: batch of observations
    :param rows: indices, shape ``(n,)``, or a slice
    :return: these rows
    """
    if isinstance(observations, dict):
        return {key: value[rows] for key, value in observations.items()}
    return observations[rows]


def n_rows(observations: PyTorchObs) -> int:
    """
    :param observations: batch of observations
    :return: number of rows
    """
    tensor = next(iter(observations.values())) if isinstance(observations, dict) else observations
    return tensor.shape[0]
