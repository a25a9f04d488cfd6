"""ONNX graphs against the policies they come from, run by onnxruntime."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from envs import POINT_ENV, POINT_GOAL_ENV
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_diffusion import DTQL, BellmanDiffusion, DiffSR, Diffuser, DiffusionQL, OfflineAlgorithm
from sb3_diffusion.export import export_onnx

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


def normalized_env() -> VecNormalize:
    env = VecNormalize(make_vec_env(POINT_ENV, 1, seed=0), clip_obs=1.5)
    env.reset()
    env.action_space.seed(0)
    for _ in range(20):
        env.step(np.stack([env.action_space.sample()]))
    return env


CASES: dict[str, tuple[type[OfflineAlgorithm], Any, str, dict[str, Any], bool]] = {
    "DTQL": (DTQL, lambda: POINT_ENV, "MlpPolicy", {}, False),
    "DTQL-implicit-Dict": (DTQL, lambda: POINT_GOAL_ENV, "MultiInputPolicy", dict(actor_type="implicit"), True),
    "DiffSR": (DiffSR, lambda: POINT_ENV, "MlpPolicy", dict(feature_dim=8, score_net_width=8, n_frequencies=8), False),
    "BellmanDiffusion-VecNormalize": (BellmanDiffusion, normalized_env, "MlpPolicy", dict(normalize_observations=False), True),
    "DiffusionQL-chain": (DiffusionQL, lambda: POINT_ENV, "MlpPolicy", dict(n_diffusion_steps=3), True),
}


@pytest.mark.parametrize("case", CASES)
def test_graph_acts_as_the_policy(case: str, tmp_path: Path):
    cls, make, policy, kwargs, with_latents = CASES[case]
    model = cls(policy, make(), seed=0, buffer_size=10, device="cpu", policy_kwargs=dict(net_arch=[16]), **kwargs)
    actor = model.policy.actor
    with th.no_grad():  # not the nearly constant actions of a fresh network
        for parameter in actor.parameters():
            parameter.add_(0.3 * th.randn(parameter.shape, generator=th.Generator().manual_seed(0)))
    session = onnxruntime.InferenceSession(str(export_onnx(model, tmp_path / "new" / "actor.onnx", with_latents=with_latents)))
    names = [entry.name for entry in session.get_inputs()]
    normalize = model.get_vec_normalize_env()
    env = normalize.venv if normalize is not None else model.get_env()
    env.observation_space.seed(0)
    for n in (1, 5):
        raw = [env.observation_space.sample() for _ in range(n)]
        if isinstance(env.observation_space, spaces.Dict):
            batch: Any = {key: np.stack([sample[key] for sample in raw]) for key in raw[0]}
            feed = dict(batch)
        else:
            batch = 3.0 * np.stack(raw)
            feed = {"observation": batch}
        seen = batch if normalize is None else normalize.normalize_obs(batch)
        if with_latents:
            latents = actor.latents(n)
            feed["latents"] = latents.numpy()
            with th.no_grad():
                scaled = actor.act(model.policy.obs_to_tensor(seen)[0], latents).numpy()
            expected = model.policy.unscale_action(scaled)
        else:
            expected = model.predict(seen, deterministic=True)[0]
        assert set(feed) == set(names)
        (actions,) = session.run(["action"], feed)
        assert actions.shape == (n, 2)
        np.testing.assert_allclose(actions, expected, atol=2e-5)
        if n > 1:
            assert actions.std(axis=0).min() > 1e-3  # it looks at its input
    low, high = model.action_space.low, model.action_space.high
    assert ((actions >= low) & (actions <= high)).all()
    model.predict(seen)  # the model is as it was


def test_what_cannot_be_exported(tmp_path: Path):
    planner = Diffuser(
        "MlpPolicy", POINT_ENV, horizon=4, n_diffusion_steps=2, buffer_size=10, device="cpu",
        policy_kwargs=dict(net_kwargs=dict(base_width=32, multipliers=[1, 2])),
    )  # fmt: skip
    with pytest.raises(TypeError, match="acts by plans"):
        export_onnx(planner, tmp_path / "x.onnx")
    model = DTQL("MlpPolicy", gym.make(POINT_ENV), n_action_samples=4, buffer_size=10, device="cpu")
    with pytest.raises(ValueError, match="chooses among 4 candidates"):
        export_onnx(model, tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()
