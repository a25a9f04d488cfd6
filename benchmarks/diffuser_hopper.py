"""
Diffuser on Hopper data of middling quality: what choosing among plans adds, and what guidance adds to that.

    python benchmarks/diffuser_hopper.py
    python benchmarks/diffuser_hopper.py --executed 1 --full --device cuda

Training goes on where it was stopped; rows that were measured are kept in ``benchmarks/work``.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch as th
from diffuser_walker2d import measured
from harness import RESULTS, WORK, describe, run, write_table

from sb3_diffusion import Diffuser, load_dataset

DATA, ENV_ID = "bench/hopper/medium-v0", "Hopper-v5"
N_CANDIDATES, GUIDANCE_SCALE = 64, 0.1
ROWS: dict[str, dict[str, Any]] = {
    f"guided, best of {N_CANDIDATES}": dict(n_candidates=N_CANDIDATES, guidance_scale=GUIDANCE_SCALE),
    f"best of {N_CANDIDATES}": dict(n_candidates=N_CANDIDATES, guidance_scale=0.0),
    "single plan": dict(n_candidates=1, guidance_scale=0.0),
}
EACH_STEP: dict[str, dict[str, Any]] = {
    "single plan, a new one each step": dict(n_candidates=1, guidance_scale=0.0, n_action_steps=1),
}
"""After the rows, as each sets what the others leave alone."""
SMALL: dict[str, Any] = dict(
    learning_rate=4e-4,
    batch_size=32,
    policy_kwargs=dict(net_kwargs=dict(base_width=16, multipliers=[1, 2, 4])),
)
"""In the place of the defaults: what one core trains, and plans with, in tens of minutes."""


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Train what is not trained, measure what is not measured, then write the table.

    :param arguments: of the command line; None for the process's
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=100_000, help="of planner and value")
    parser.add_argument("--full", action="store_true", help="networks, batch and learning rate of the defaults")
    parser.add_argument("--horizon", type=int, default=32)
    parser.add_argument("--executed", type=int, default=4, help="actions executed per plan")
    parser.add_argument("--evaluations", type=int, default=5, help="on the way, with a single plan")
    parser.add_argument("--episodes", type=int, default=50, help="of each row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    th.set_num_threads(options.threads)
    dataset = load_dataset(DATA)
    name = f"Diffuser{'' if options.full else ', small'}, horizon {options.horizon}, {options.executed} executed"
    curves = RESULTS / "diffuser_hopper_training.json"
    describe(curves, f"Diffuser: {dataset.name}", "Single plans without guidance, deterministic.")

    def load(path: Path) -> Diffuser:
        return Diffuser.load(path, env=ENV_ID, dataset=dataset, device=options.device)

    run(
        name,
        options.seed,
        lambda: Diffuser(
            "MlpPolicy",
            ENV_ID,
            dataset=dataset,
            horizon=options.horizon,
            n_action_steps=options.executed,
            train_value=True,
            seed=options.seed,
            device=options.device,
            **ROWS["single plan"],
            **({} if options.full else SMALL),
        ),
        load,
        options.updates,
        ENV_ID,
        curves,
        n_evaluations=options.evaluations,
        dataset=dataset,
    )
    folder = WORK / curves.stem / f"{name}-seed{options.seed}".replace(" ", "_")
    model = load(folder / "checkpoint.zip")
    rows: list[list[str | float]] = []
    for label, settings in (ROWS | EACH_STEP).items():
        file_name = label.replace(",", "").replace(" ", "_")
        numbers = measured(folder / "points", file_name, model, dataset, settings, options.episodes, options.seed)
        rows.append(
            [
                label,
                f"{numbers['return']:.0f} [{numbers['low']:.0f}, {numbers['high']:.0f}]",
                numbers["d4rl_score"],
                numbers["percent_of_data"],
                f"{100 * numbers['fall_rate']:.0f} %",
                numbers["seconds"],
            ]
        )
        print(*rows[-1], flush=True)
    data_return = float(dataset.episode_returns.mean())
    rows.append(["the data", f"{data_return:.0f}", float(dataset.normalized_score(data_return)), 100.0, "", ""])
    write_table(
        RESULTS / f"diffuser_hopper{'_full' if options.full else ''}.json",
        "Diffuser: guidance and choice among plans",
        ["plans", "return", "D4RL score", "% of the data's mean return", "falls", "seconds"],
        rows,
        text=(
            f"{dataset.name}, horizon {options.horizon}, {options.executed} executed actions per plan unless a row says "
            f"otherwise, {options.updates:,} updates of planner and value, batch {model.batch_size}, learning rate "
            f"{model.learning_rate:g}, one run; {options.episodes} episodes a row, the mean with its 95 % bootstrap interval "
            f"over episodes. `guidance_scale` {GUIDANCE_SCALE}, two gradient steps before each denoising step. *Falls*: "
            "episodes that ended before 1,000 steps."
        ),
        device=options.device,
    )


if __name__ == "__main__":
    main()
