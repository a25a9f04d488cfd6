"""Training and evaluation mode: batch normalisation and dropout where they belong."""

from typing import Any

import numpy as np
import pytest
import torch as th
from algos import AlgoSpec
from envs import POINT_ENV
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

from sb3_diffusion import OfflineDataset


class NormDropoutExtractor(BaseFeaturesExtractor):
    """Batch normalisation and dropout, which behave differently in the two modes."""

    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__(observation_space, get_flattened_obs_dim(observation_space))
        self.batch_norm, self.dropout = th.nn.BatchNorm1d(self.features_dim), th.nn.Dropout(0.5)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.dropout(self.batch_norm(observations.flatten(1)))


def make(spec: AlgoSpec, **kwargs: Any) -> Any:
    spec.need("extractors")
    return spec.make(**kwargs, policy_kwargs=dict(features_extractor_class=NormDropoutExtractor))


def statistics(module: th.nn.Module) -> dict[str, th.Tensor]:
    found = {name: buffer.clone() for name, buffer in module.named_buffers() if "running_" in name}
    assert found
    return found


def assert_same(a: dict[str, th.Tensor], b: dict[str, th.Tensor]) -> None:
    for name, tensor in a.items():
        assert th.equal(tensor, b[name]), name


def test_collecting_and_acting_change_no_statistics(spec: AlgoSpec) -> None:
    model = make(spec, env=POINT_ENV, gradient_steps=0)
    before = statistics(model.policy)
    model.learn(30)
    observation = model.get_env().reset()
    first = model.predict(observation, deterministic=True)[0]
    for _ in range(3):
        np.testing.assert_array_equal(model.predict(observation, deterministic=True)[0], first)
        model.predict(observation)
    assert_same(statistics(model.policy), before)


@pytest.mark.parametrize("pretraining", [False, True])
def test_training_changes_the_statistics_of_each_trained_network(
    spec: AlgoSpec, pretraining: bool, box_dataset: OfflineDataset
) -> None:
    model = make(spec, dataset=box_dataset, n_pretrain_steps=4 if pretraining else 0)
    before = statistics(model.policy)
    model.learn(4)
    after = statistics(model.policy)
    for name in before:
        if name.split(".")[0] not in model.policy.target_names:
            assert not th.equal(before[name], after[name]), name


def test_targets_get_the_statistics_as_they_are(spec: AlgoSpec, box_dataset: OfflineDataset) -> None:
    """Copied, not averaged, also where the weights do not move; their weights are averaged."""
    model = make(spec, dataset=box_dataset, tau=0.0)
    weights = {n: p.clone() for n, p in model.policy.named_parameters() if n.split(".")[0] in model.policy.target_names}
    model.learn(4)
    for name in model.policy.target_names:
        target, source = getattr(model.policy, name), getattr(model.policy, name.removesuffix("_target"))
        online = statistics(source)
        assert_same(statistics(target), {key: online[key] for key in statistics(target)})
    for name, parameter in model.policy.named_parameters():
        if name in weights:
            assert th.equal(parameter, weights[name]), name


def test_modes(spec: AlgoSpec, box_dataset: OfflineDataset) -> None:
    """While it trains, all but the targets are in training mode; afterwards acting turns it off."""
    model = make(spec, dataset=box_dataset)
    names = [name for name, _ in model.policy.named_children() if name != "features_extractor"]
    model.learn(2)
    for name in names:
        assert getattr(model.policy, name).training is (name not in model.policy.target_names), name
    model.predict(box_dataset.observations[:2])
    assert not any(module.training for module in model.policy.modules())
    model.policy.set_training_mode(True)
    for name in model.policy.target_names:
        assert not any(module.training for module in getattr(model.policy, name).modules())


def test_optimizers_leave_the_targets_alone(variant: AlgoSpec, box_dataset: OfflineDataset) -> None:
    model = variant.make(dataset=box_dataset)
    frozen = {id(p) for name in model.policy.target_names for p in getattr(model.policy, name).parameters()}
    optimized = [
        id(parameter)
        for _, module in model.policy.named_children()
        if hasattr(module, "optimizer")
        for group in module.optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
    ]
    assert bool(frozen) is bool(model.policy.target_names) and not frozen & set(optimized)
    assert len(set(optimized)) == len(optimized)
