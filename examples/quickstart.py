"""
Learn from the embedded dataset, look at the result, go on in the environment.

    python examples/quickstart.py
"""

from sb3_diffusion import DTQL, load_dataset
from sb3_diffusion.datasets import DEFAULT_DATASET_ID
from sb3_diffusion.evaluation import evaluate


def main(n_offline: int = 4_000, n_online: int = 1_000) -> None:
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
    main()
