"""
Diffusion-QL: train once, then choose how the chain is run when acting.

    python examples/diffusion_ql_samplers.py --steps 3000 --episodes 5
"""

import argparse
import time

from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_diffusion import DiffusionQL, make_env
from sb3_diffusion.datasets import DEFAULT_DATASET_ID

SAMPLERS = (
    ("ddpm", None),  # all steps of the chain, as in training
    ("ddpm", 3),
    ("ddim", None),
    ("ddim", 3),
    ("ddim", 2),
    ("ddim", 1),
    ("dpm_solver", 3),
    ("heun", 2),  # 2 n - 1 network evaluations for n steps
)


def main() -> None:
    """Print the mean return in the data, then of the trained policy with several samplers, and what an action costs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default=DEFAULT_DATASET_ID, help="any Minari id; the default is recorded on first use")
    parser.add_argument("--steps", type=int, default=3_000, help="gradient steps on the data")
    parser.add_argument("--diffusion-steps", type=int, default=5, help="length of the chain")
    parser.add_argument("--episodes", type=int, default=5, help="episodes of each evaluation")
    options = parser.parse_args()

    # The env in which the data was recorded brings it along, so that the model finds its dataset by itself
    env, test_env = make_env(options.dataset), Monitor(make_env(options.dataset))
    model = DiffusionQL("MlpPolicy", env, n_diffusion_steps=options.diffusion_steps, seed=0)
    print("behaviour in the data:", round(float(model.dataset.episode_returns.mean()), 1) if model.dataset else "unknown")
    model.learn(options.steps, progress_bar=True)  # one timestep is one gradient step; the env stands still

    observation = test_env.observation_space.sample()
    for sampler, n_sampling_steps in SAMPLERS:
        if n_sampling_steps is not None and n_sampling_steps > options.diffusion_steps:
            continue
        # The weights stay as they are: only the way from noise to action changes
        model.set_sampler(sampler, n_sampling_steps)
        # The same noise and the same starts for each; `deterministic=True` would follow the chain from the noise 0
        model.set_random_seed(0)
        test_env.reset(seed=0)
        mean, std = evaluate_policy(model, test_env, options.episodes, deterministic=False)
        start = time.perf_counter()
        for _ in range(100):
            model.predict(observation, deterministic=False)
        milliseconds = 10.0 * (time.perf_counter() - start)
        steps = n_sampling_steps or options.diffusion_steps
        print(f"{sampler:>10}, {steps} steps: return {mean:.1f} +- {std:.1f}, {milliseconds:.2f} ms per action")


if __name__ == "__main__":
    main()
