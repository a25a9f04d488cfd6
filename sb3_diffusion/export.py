"""Actors as ONNX graphs: raw observations in, actions in units of the environment out, without this package or torch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_diffusion.common.base_class import OfflineAlgorithm
from sb3_diffusion.common.policies import Actor

OBSERVATION, LATENTS, ACTION = "observation", "latents", "action"
"""Names of inputs and output. The observations of a Dict space are inputs by their keys instead."""


class ActingGraph(nn.Module):
    """
    What is exported: scaling of observations, the actor, scaling of its actions.

    :param actor: of the policy
    :param vec_normalize: whose statistics the actor expects its observations under, or None
    :param with_latents: take the latents as the last input; otherwise they are 0
    """

    low: th.Tensor
    high: th.Tensor

    def __init__(self, actor: Actor, vec_normalize: VecNormalize | None, with_latents: bool) -> None:
        super().__init__()
        assert isinstance(actor.action_space, spaces.Box)
        self.actor: Actor = actor
        self.with_latents = with_latents
        self.keys = list(actor.observation_space.spaces) if isinstance(actor.observation_space, spaces.Dict) else [OBSERVATION]
        self.register_buffer("low", th.as_tensor(actor.action_space.low.astype(np.float32)))
        self.register_buffer("high", th.as_tensor(actor.action_space.high.astype(np.float32)))
        self.clip_obs = 0.0 if vec_normalize is None else vec_normalize.clip_obs
        self.statistics: dict[str, tuple[th.Tensor, th.Tensor]] = {}
        if vec_normalize is not None and vec_normalize.norm_obs:
            known: Any = vec_normalize.obs_rms
            for key, rms in (known if isinstance(known, dict) else {OBSERVATION: known}).items():
                std = np.sqrt(rms.var + vec_normalize.epsilon)
                self.statistics[key] = (th.as_tensor(rms.mean).float(), th.as_tensor(std).float())

    def forward(self, *inputs: th.Tensor) -> th.Tensor:
        """
        :param inputs: observations, ``(batch_size, *obs_shape)`` each, and latents, if they are an input
        :return: actions, ``(batch_size, *action_shape)``
        """
        parts = {key: self._normalized(key, value) for key, value in zip(self.keys, inputs, strict=False)}
        first = inputs[0]
        latents = (
            inputs[-1] if self.with_latents else first.new_zeros((first.shape[0], *self.actor.latent_shape), dtype=th.float32)
        )
        observations = parts if isinstance(self.actor.observation_space, spaces.Dict) else parts[OBSERVATION]
        scaled = self.actor.act(observations, latents).reshape(-1, *self.low.shape)
        return th.clamp(self.low + 0.5 * (scaled + 1.0) * (self.high - self.low), self.low, self.high)

    def _normalized(self, key: str, value: th.Tensor) -> th.Tensor:
        if key not in self.statistics:
            return value
        mean, std = self.statistics[key]
        return ((value - mean) / std).clamp(-self.clip_obs, self.clip_obs)


def export_onnx(model: OfflineAlgorithm, path: str | PathLike[str], *, with_latents: bool = False) -> Path:
    """
    Write the actor of a model as one ONNX file.

    The inputs are the observations as the environment gives them (``observation``, or the keys of a Dict space), any number
    of rows; frozen statistics and those of a ``VecNormalize`` are part of the graph. The output ``action`` is in units of the
    environment. Without latents the graph does what ``predict(deterministic=True)`` does. With them it takes the
    standard normal draws of a random action as the input ``latents``, of shape ``(batch_size, *actor.latent_shape)``.

    One-step actors are small graphs; DiffusionQL's holds its whole chain, once per step of its sampler.

    :param model: DTQL, DiffusionQL, DiffSR or BellmanDiffusion
    :param path: file to write
    :param with_latents: make the latents an input
    :return: the path written
    :raises TypeError: for a model that plans and has no actor of single actions
    :raises ValueError: if the policy chooses among several candidates, which takes more than its actor
    :raises ImportError: without onnx or onnxscript; names the extra to install
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("Export needs onnx and onnxscript: pip install 'sb3-diffusion[onnx]'.") from error
    actor = getattr(model.policy, "actor", None)
    if not isinstance(actor, Actor) or callable(getattr(model, "plan", None)):
        raise TypeError(f"Only actors of single actions can be exported: {type(model).__name__} acts by plans.")
    n_action_samples = getattr(model.policy, "n_action_samples", 1)
    if n_action_samples != 1:
        raise ValueError(
            f"The policy chooses among {n_action_samples} candidates, which its actor alone does not: expected "
            "`n_action_samples=1`. Set model.policy.n_action_samples = 1 to export the actor."
        )
    model.policy.set_training_mode(False)
    graph = ActingGraph(actor, model.get_vec_normalize_env(), with_latents).eval().cpu()
    space = actor.observation_space
    parts = list(space.spaces.values()) if isinstance(space, spaces.Dict) else [space]
    examples = [th.as_tensor(np.stack([np.nan_to_num(part.sample()) for _ in range(2)])) for part in parts]
    examples = [example.float() if example.is_floating_point() else example for example in examples]
    if with_latents:
        examples.append(th.zeros(2, *actor.latent_shape))
    names = [*graph.keys, *([LATENTS] if with_latents else [])]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    device = model.device
    try:
        with th.no_grad(), _quiet_exporter():
            th.onnx.export(
                graph,
                tuple(examples),
                str(path),
                input_names=names,
                output_names=[ACTION],
                dynamic_shapes=(tuple({0: th.export.Dim.DYNAMIC} for _ in examples),),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    finally:
        graph.to(device)
    return path


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """torch's exporter warns of its own insides, and of packages that have nothing to do with actors."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
