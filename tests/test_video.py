"""Films of policies that plan: the plan is in the frames, and the policy acts by it."""

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from envs import PointGoalEnv
from gymnasium.envs.registration import EnvSpec

from sb3_diffusion import Diffuser, PlanningWrapper
from sb3_diffusion.evaluation import video
from sb3_diffusion.evaluation.video import record_video

iio = pytest.importorskip("imageio.v3")
pytest.importorskip("imageio_ffmpeg")


class LargeEnv(PointGoalEnv):
    """Black frames, large enough for the inset; more of them per second than a film shows."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 120}

    def __init__(self) -> None:
        super().__init__(as_dict=False, render_mode="rgb_array")

    def render(self) -> np.ndarray:
        return np.zeros((400, 401, 3), np.uint8)


def make() -> gym.Env:
    return gym.wrappers.TimeLimit(LargeEnv(), 8)


@pytest.fixture(scope="module")
def planner() -> Diffuser:
    policy_kwargs = dict(net_kwargs=dict(base_width=32, multipliers=[1, 2]))
    arguments = dict(horizon=4, n_diffusion_steps=2, n_candidates=1, guidance_scale=0.0, n_action_steps=2, buffer_size=10)
    return Diffuser("MlpPolicy", make(), seed=0, device="cpu", policy_kwargs=policy_kwargs, **arguments)


def test_plan_is_drawn_and_followed(planner: Diffuser, tmp_path: Path):
    film = record_video(planner, make, tmp_path / "a.mp4", tmp_path / "a.gif", seed=3, max_steps=8)
    frames, stills = iio.imread(tmp_path / "a.mp4"), iio.imread(tmp_path / "a.gif")
    assert len(frames) == 4 and len(stills) == 2  # every second at 120 per second, every sixth
    # An odd width: one column is lost in H.264; the GIF is half as large.
    assert frames.shape[1] == 400 and frames.shape[2] in (400, 402) and stills.shape[1:] == (200, 200, 3)
    corner = frames[1:, :160, -160:].mean(), stills[1:, :80, -80:].mean()
    assert frames[0].mean() < 3.0  # nothing is planned yet
    assert min(corner) > 150.0 and frames[:, 200:].mean() < 3.0

    env = PlanningWrapper(make(), planner, n_action_steps=2)
    env.reset(seed=3)
    total, ended = 0.0, False
    planner_runs = 0
    while not ended and planner_runs < 8:
        _, reward, terminated, truncated, _ = env.step()
        total, ended, planner_runs = total + float(reward), terminated or truncated, planner_runs + 1
    assert film.n_steps == planner_runs and film.returns[0] == pytest.approx(total, rel=1e-4)


def test_without_the_plan(planner: Diffuser, tmp_path: Path):
    record_video(planner, make, tmp_path / "a.gif", seed=0, max_steps=8, render_dims=None)
    assert iio.imread(tmp_path / "a.gif").max() == 0


def test_only_episodes_that_were_begun_have_returns(planner: Diffuser, tmp_path: Path):
    lengths = {
        max_steps: record_video(planner, make, tmp_path / "a.gif", n_episodes=3, max_steps=max_steps, seed=0)
        for max_steps in (8, 9, 16, 30)
    }
    assert [(len(film.returns), film.n_steps) for film in lengths.values()] == [(1, 8), (2, 9), (2, 16), (3, 24)]


def test_robotics_environments_are_registered(planner: Diffuser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec = EnvSpec("Late-v0", entry_point=lambda render_mode: make())
    monkeypatch.setattr(video, "register_robotics", lambda env_id: gym.registry.update({env_id: spec}))
    try:
        assert record_video(planner, "Late-v0", tmp_path / "a.gif", max_steps=2, seed=0).n_steps == 2
    finally:
        gym.registry.pop("Late-v0", None)


def test_a_film_that_fails_leaves_nothing(tmp_path: Path):
    class Broken:
        def predict(self, *args, **kwargs):
            raise RuntimeError("out of order")

    with pytest.raises(RuntimeError, match="out of order"):
        record_video(Broken(), make, tmp_path / "a.gif")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="must be at least 1"):
        record_video(Broken(), make, tmp_path / "a.gif", n_episodes=0)
