"""
Diff-SR: learn in an environment, then fit rewards that it was not trained for on its features.

    python examples/diffsr_features.py --steps 5000
"""

import argparse

import numpy as np
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_diffusion import DiffSR


def main() -> None:
    """Print the return before and after training, and how well two rewards are linear in the features."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Pendulum-v1", help="environment to learn in")
    parser.add_argument("--steps", type=int, default=5_000, help="env steps")
    parser.add_argument("--actor", default="td3", choices=("td3", "sac"), help="which algorithm stands on the features")
    parser.add_argument("--episodes", type=int, default=5, help="episodes of each evaluation")
    options = parser.parse_args()

    model = DiffSR.from_preset("small", options.env, actor_type=options.actor, seed=0)
    env = model.get_env()
    assert env is not None
    before, _ = evaluate_policy(model, env, options.episodes)
    model.learn(options.steps, progress_bar=True)
    after, _ = evaluate_policy(model, env, options.episodes)
    print(f"return before {before:.1f}, after {after:.1f}")

    # Features are asked for in env units, as `predict` is
    batch = model.sample_batch(2_000)
    assert not isinstance(batch.observations, dict) and not isinstance(batch.next_observations, dict)
    observations = batch.observations.cpu().numpy()
    actions = model.policy.unscale_action(batch.actions.cpu().numpy())
    following = batch.next_observations[:, 0].cpu().numpy()
    targets = {
        "reward of the environment": batch.rewards.cpu().numpy(),
        "first entry of the next state": following,
        "its square": np.square(following),
    }
    for name, target in targets.items():
        plain = model.fit_linear(observations, actions, target)
        fourier = model.fit_linear(observations, actions, target, n_frequencies=256)
        print(f"{name}: R2 {plain.r2:.3f} on the features, {fourier.r2:.3f} on 512 Fourier features of them")


if __name__ == "__main__":
    main()
