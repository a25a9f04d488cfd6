"""
Learn from the embedded dataset, look at the result, go on in the environment.

    python examples/quickstart.py --offline-steps 4000 --online-steps 1000
"""

import argparse

from sb3_diffusion import DTQL, load_dataset
from sb3_diffusion.datasets import DEFAULT_DATASET_ID
from sb3_diffusion.evaluation import evaluate


def main(n_offline: int, n_online: int) -> None:
    """
    :param n_offline: gradient steps on the data
    :param n_online: env steps of fine-tuning
    """
    dataset = load_dataset(DEFAULT_DATASET_ID)  # written on first use
    print(dataset)
    assert dataset.env_spec is not None
    env_id = dataset.env_spec.id
    behavior = dataset.episode_returns.mean()

    small = dict(net_arch=[128, 128])
    model = DTQL("MlpPolicy", env_id, dataset=dataset, normalize_observations=True, policy_kwargs=small, seed=0)
    model.learn(n_offline, progress_bar=True)
    offline = evaluate(model, env_id, n_episodes=20, seed=1)

    model.learn(n_online, offline=False, reset_num_timesteps=False, progress_bar=True)
    online = evaluate(model, env_id, n_episodes=20, seed=1)

    print(f"behaviour in the data       {behavior:10.1f}")
    print(f"after {n_offline:6d} gradient steps {offline.mean:10.1f}")
    print(f"after {n_online:6d} env steps more {online.mean:10.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--offline-steps", type=int, default=4_000, help="gradient steps on the data")
    parser.add_argument("--online-steps", type=int, default=1_000, help="steps of the environment after that")
    options = parser.parse_args()
    main(options.offline_steps, options.online_steps)
