"""
Diffuser: train once, then choose how plans are made and how long each is followed.

    python examples/diffuser_planning.py --steps 1500 --episodes 5
"""

import argparse
import time
from typing import Any

from sb3_diffusion import Diffuser, PlanningWrapper, make_env
from sb3_diffusion.evaluation import evaluate

PLANNING: tuple[dict[str, Any], ...] = (
    dict(n_candidates=1, guidance_scale=0.0),  # what the data does
    dict(n_candidates=8, guidance_scale=0.0),  # the best of several windows
    dict(n_candidates=8, guidance_scale=0.03),  # drawn towards high values; the right scale depends on the rewards
    dict(n_candidates=8, guidance_scale=0.0, n_action_steps=4),  # a plan for every fourth step
    dict(n_candidates=8, guidance_scale=0.0, n_action_steps=4, warm_start=0.7),  # refined from the one before
)


def main() -> None:
    """Print the mean return in the data, then of several ways to plan, and how far the env strays from a plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="sb3-diffusion/pendulum/mixed-v0", help="any Minari id; recorded on first use")
    parser.add_argument("--steps", type=int, default=1_500, help="gradient steps on the data")
    parser.add_argument("--horizon", type=int, default=16, help="length of a plan")
    parser.add_argument("--episodes", type=int, default=5, help="episodes of each evaluation, all at once")
    options = parser.parse_args()

    model = Diffuser(
        "MlpPolicy",
        make_env(options.dataset),  # the env in which the data was recorded brings it along
        horizon=options.horizon,
        n_diffusion_steps=10,
        backbone="transformer",  # much cheaper than the published U-Net, for a small problem
        policy_kwargs=dict(net_kwargs=dict(width=32, n_layers=2, n_heads=4)),
        learning_rate=1e-3,
        tau=0.005,
        seed=0,
    )
    print("behaviour in the data:", round(float(model.dataset.episode_returns.mean()), 1) if model.dataset else "unknown")
    model.learn(options.steps, progress_bar=True)  # one timestep is one gradient step; the env stands still

    for settings in PLANNING:
        # The weights stay as they are: only the planning changes
        model.set_planning(**{"n_action_steps": 1, "warm_start": 0.0, **settings})
        model.set_random_seed(0)
        start = time.perf_counter()
        result = evaluate(model, lambda: make_env(options.dataset), options.episodes, deterministic=False, seed=0)
        milliseconds = 1_000.0 * (time.perf_counter() - start) / result.lengths.sum()
        text = ", ".join(f"{name} {value}" for name, value in settings.items())
        print(f"{result.mean:9.1f} +- {result.std:.1f}, {milliseconds:.1f} ms per step: {text}")

    # The wrapper tells what was planned, and how far the env is from it after so many steps of the same plan
    wrapped = PlanningWrapper(make_env(options.dataset), model, n_action_steps=options.horizon)
    wrapped.reset(seed=0)
    deviations = [wrapped.step()[-1]["plan_deviation"] for _ in range(options.horizon)]
    print("distance from the plan, step by step:", " ".join(f"{deviation:.2f}" for deviation in deviations))


if __name__ == "__main__":
    main()
