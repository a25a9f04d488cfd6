"""
DTQL from the log to the system: learn from logged data, save, go on in the environment.

    python examples/dtql_offline_to_online.py --offline-steps 20000 --online-steps 5000
"""

import argparse
import tempfile
from pathlib import Path

from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_diffusion import DTQL, make_env
from sb3_diffusion.datasets import DEFAULT_DATASET_ID


def main() -> None:
    """Print the mean return in the data, after learning from it, and after going on online."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default=DEFAULT_DATASET_ID, help="any Minari id; the default is recorded on first use")
    parser.add_argument("--offline-steps", type=int, default=20_000, help="gradient steps on the data")
    parser.add_argument("--online-steps", type=int, default=5_000, help="steps of the environment after that")
    parser.add_argument("--episodes", type=int, default=20, help="episodes of each evaluation")
    options = parser.parse_args()

    # The env in which the data was recorded brings it along, so that the model finds its dataset by itself
    env, test_env = make_env(options.dataset), Monitor(make_env(options.dataset))
    model = DTQL("MlpPolicy", env, offline_fraction=0.5, seed=0)
    print("behaviour in the data:", round(float(model.dataset.episode_returns.mean()), 1) if model.dataset else "unknown")

    model.learn(options.offline_steps, progress_bar=True)  # one timestep is one gradient step; the env stands still
    print("after offline learning: {:.1f} +- {:.1f}".format(*evaluate_policy(model, test_env, options.episodes)))

    # A model file holds neither data nor env: give both to go on, in another process or on another machine too
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "dtql")
        model = DTQL.load(Path(folder) / "dtql", env=make_env(options.dataset), dataset=options.dataset)

    # Half of each batch stays logged data. `model.set_dataset(None)` before this line would learn from new data alone
    model.learn(options.online_steps, offline=False, reset_num_timesteps=False, progress_bar=True)
    print("after fine-tuning: {:.1f} +- {:.1f}".format(*evaluate_policy(model, test_env, options.episodes)))


if __name__ == "__main__":
    main()
