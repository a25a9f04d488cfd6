"""Products of bfloat16: other numbers than those of float32, but near them, in float32 tensors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from algos import AlgoSpec

from sb3_diffusion import DTQL, Diffuser, OfflineDataset

N_UPDATES = 5


def parameters(model: Any) -> th.Tensor:
    return th.cat([parameter.detach().flatten() for parameter in model.policy.parameters()])


def test_near_float32(variant: AlgoSpec, box_dataset: OfflineDataset) -> None:
    start = parameters(variant.make(dataset=box_dataset))
    full, half = (variant.make(dataset=box_dataset, precision=p).learn(N_UPDATES) for p in ("float32", "bfloat16"))
    assert parameters(half).dtype == th.float32
    difference = (parameters(full) - parameters(half)).norm() / (parameters(full) - start).norm()
    assert 0.0 < difference < 0.5
    assert all(state["exp_avg"].dtype == th.float32 for state in half.actor.optimizer.state.values())
    observations = box_dataset.observations[:16]
    half.policy.load_state_dict(full.policy.state_dict())
    span = box_dataset.action_space.high - box_dataset.action_space.low
    for model in (full, half):
        model.acting_generator.manual_seed(0)
    expected, got = (model.predict(observations, deterministic=True)[0] for model in (full, half))
    assert got.dtype == expected.dtype
    assert np.median(np.abs(got - expected) / span) < 0.02


def test_acts_and_plans_in_it(box_dataset: OfflineDataset) -> None:
    arguments: dict[str, Any] = dict(horizon=8, n_diffusion_steps=3, n_candidates=1, guidance_scale=0.0)
    model = Diffuser("MlpPolicy", None, dataset=box_dataset, **arguments)
    seen: list[th.dtype] = []
    for module in model.policy.modules():
        if isinstance(module, th.nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    for precision in ("float32", "bfloat16"):
        model.precision = precision
        model.predict(box_dataset.observations[:2])
        model.plan(box_dataset.observations[:2])
    half = len(seen) // 2
    assert half > 0
    assert set(seen[:half]) == {th.float32}
    assert set(seen[half:]) == {th.bfloat16}


def test_files_and_choices(box_dataset: OfflineDataset, tmp_path: Path) -> None:
    arguments: dict[str, Any] = dict(dataset=box_dataset, device="cpu", policy_kwargs=dict(net_arch=[8]))
    DTQL("MlpPolicy", None, precision="bfloat16", **arguments).save(tmp_path / "model")
    assert DTQL.load(tmp_path / "model").precision == "bfloat16"
    assert DTQL.load(tmp_path / "model", precision="float32").precision == "float32"
    with pytest.raises(ValueError, match="precision"):
        DTQL("MlpPolicy", None, precision="float16", **arguments)
