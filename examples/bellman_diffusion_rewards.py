"""
Bellman diffusion: learn where actions lead, then choose what is wanted.

    python examples/bellman_diffusion_rewards.py --steps 3000 --episodes 3
"""

import argparse
from collections.abc import Callable

import numpy as np
from stable_baselines3.common.env_util import make_vec_env

from sb3_diffusion import BellmanDiffusion, make_env
from sb3_diffusion.bellman_diffusion.policies import RewardFunction

N_STEPS = 200
"""Length of an episode of the pendulum."""


def spinning(direction: float) -> Callable[[np.ndarray], np.ndarray]:
    """Reward for turning at 4 rad/s: the state is (cosine, sine, angular velocity)."""
    return lambda states: -np.abs(states[:, 2] - 4.0 * direction) / 8.0


def main() -> None:
    """Train once on logged steps of the pendulum, then act for several rewards, one of which is in the log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="sb3-diffusion/pendulum/mixed-v0", help="of Pendulum-v1; recorded on first use")
    parser.add_argument("--steps", type=int, default=3_000, help="gradient steps on the data")
    parser.add_argument("--episodes", type=int, default=3, help="episodes of each evaluation, all at once")
    parser.add_argument("--candidates", type=int, default=8, help="actions to choose from")
    options = parser.parse_args()

    env = make_env(options.dataset)  # the env in which the data was recorded brings it along
    model = BellmanDiffusion("MlpPolicy", env, gamma=0.9, learning_rate=1e-3, seed=0, policy_kwargs=dict(net_arch=[128, 128]))
    model.learn(options.steps, progress_bar=True)  # one timestep is one gradient step; the env stands still

    assert model.dataset is not None and isinstance(model.dataset.observations, np.ndarray)
    observations, actions = model.dataset.observations[:1], model.dataset.actions[:1]
    futures = model.sample_future(observations, actions, n_samples=512, seed=0)[0]
    print("angular velocity now", np.round(observations[0, 2], 2), "and to come:", np.round(futures[:, 2].mean(), 2))

    wishes: dict[str, RewardFunction | None] = {
        "upright, as in the log": None,
        "spin one way": spinning(1.0),
        "spin the other way": spinning(-1.0),
    }
    test_env = make_vec_env(lambda: make_env(options.dataset), n_envs=options.episodes)
    for name, reward_fn in wishes.items():
        # The weights stay as they are: only the reward changes
        model.set_reward_fn(reward_fn, n_action_samples=options.candidates)
        test_env.seed(0)
        states, velocities, total = test_env.reset(), [], 0.0
        for _ in range(N_STEPS):
            assert isinstance(states, np.ndarray)
            velocities.append(states[:, 2].mean())
            states, rewards, _, _ = test_env.step(model.predict(states, deterministic=True)[0])
            total += float(rewards.mean())
        print(f"{name:>24}: mean angular velocity {np.mean(velocities):.2f}, return of the environment {total:.0f}")


if __name__ == "__main__":
    main()
