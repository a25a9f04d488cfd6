"""
What trained Diffusion-QL policies score, and what an action costs: by sampler and number of steps, and by candidates.

    python benchmarks/learning_curves.py hopper-medium --algo diffusion_ql --preset locomotion \\
        --set n_sampling_steps=5 --seeds 0 1 2   # trains them
    python benchmarks/samplers.py

The weights stay as they are: only the way to act changes. Scores that were measured are kept in ``benchmarks/work``; times are
measured at each call.
"""

import argparse
import json

import numpy as np
import torch as th
from harness import RESULTS, WORK, write_json, write_table

from sb3_diffusion import DiffusionQL, OfflineDataset, load_dataset
from sb3_diffusion.evaluation import bootstrap_interval, evaluate, interquartile_mean
from sb3_diffusion.evaluation.timing import median_milliseconds

DATASET, ENV = "bench/hopper/medium-v0", "Hopper-v5"
RUNS = [f"DiffusionQL,_preset_locomotion,_n_sampling_steps=5-seed{seed}" for seed in range(3)]
CHAINS = [
    ("ddpm", 5),
    ("ddpm", 3),
    ("ddpm", 2),
    ("ddpm", 1),
    ("ddim", 5),
    ("ddim", 3),
    ("ddim", 2),
    ("dpm_solver", 5),
    ("dpm_solver", 3),
    ("heun", 5),
    ("heun", 3),
]
"""Of one step, all samplers are the same: the denoised action."""
CHOICES = [(1, "softmax"), (4, "softmax"), (10, "softmax"), (50, "softmax"), (10, "argmax"), (50, "argmax")]
"""Candidates and how one of them is chosen; 50 and softmax are the authors'."""


def pull(model: DiffusionQL, batch_size: int = 4_096) -> float:
    """
    :param model: trained model
    :param batch_size: transitions to average over
    :return: norm of the gradient of the actor's action value, as its loss has it, over that of the denoising loss
    """
    model.set_random_seed(0)
    batch = model.sample_batch(batch_size)
    features = model.actor.features(batch.observations)
    parameters = list(model.actor.denoiser.parameters())
    norms = []
    q_loss = model._q_loss(batch, features, *model._draw_for_q_loss(batch))
    bc_loss = model._bc_loss(features, batch.actions, *model._draw_corruption(batch))
    for loss in (q_loss, bc_loss):
        gradients = th.autograd.grad(loss, parameters, retain_graph=True)
        norms.append(float(th.stack([gradient.norm() for gradient in gradients]).norm()))
    return norms[0] / norms[1]


def costs(model: DiffusionQL, dataset: OfflineDataset) -> list[float]:
    """
    :param model: trained model
    :param dataset: of observations
    :return: milliseconds for 1 and for 64 observations
    """
    assert isinstance(dataset.observations, np.ndarray)
    one, many = dataset.observations[0], dataset.observations[:64]
    times = median_milliseconds({"one": lambda: model.predict(one), "many": lambda: model.predict(many)}, n_repetitions=200)
    return [round(value, 3) for value in times.values()]


def score(models: dict[str, DiffusionQL], dataset: OfflineDataset, way: str, n_episodes: int, deterministic: bool) -> str:
    """
    :param models: trained with different seeds, by run
    :param dataset: with reference scores
    :param way: to act, as a file name
    :param n_episodes: per model
    :param deterministic: draw nothing
    :return: interquartile mean over the episodes of all models with its interval, in percent
    """
    returns: list[float] = []
    for run, model in models.items():
        file = WORK / "samplers" / run / f"{way}-{'still' if deterministic else 'drawn'}-{n_episodes}.json"
        if not file.is_file():
            model.set_random_seed(1)
            result = evaluate(model, ENV, n_episodes, seed=1, deterministic=deterministic, dataset=dataset)
            write_json(file, result.to_dict())
        returns += json.loads(file.read_text(encoding="utf-8"))["returns"]
    scores = dataset.normalized_score(np.array(returns))
    low, high = bootstrap_interval(scores)
    return f"{interquartile_mean(scores):.1f} [{low:.1f}, {high:.1f}]"


def main() -> None:
    """Measure, and write ``samplers.json`` and ``candidates.json`` in ``benchmarks/results``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=RUNS, help="folders of the runs below benchmarks/work/hopper_medium")
    parser.add_argument("--episodes", type=int, default=10, help="per run and row")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args()
    th.set_num_threads(options.threads)
    dataset = load_dataset(DATASET)
    models = {
        run: DiffusionQL.load(WORK / "hopper_medium" / run / "checkpoint.zip", env=ENV, dataset=dataset, device="cpu")
        for run in options.runs
    }
    first = models[options.runs[0]]
    about = (
        f"{len(models)} models, trained with the whole chain of 5 steps (`ddpm`) on {DATASET} for {first.num_timesteps:,} "
        f"updates (`{'`, `'.join(options.runs)}`); {options.episodes} episodes of each, the interquartile mean of the "
        f"normalised scores with its 95 % bootstrap interval over episodes. {th.get_num_threads()} thread."
    )
    chain_rows: list[list[str | float | int | None]] = []
    for sampler, n_steps in CHAINS:
        for model in models.values():
            model.set_sampler(sampler, n_steps)
        calls = 2 * n_steps - 1 if sampler == "heun" else n_steps
        scores = [score(models, dataset, f"{sampler}-{n_steps}", options.episodes, still) for still in (True, False)]
        chain_rows.append([sampler, n_steps, calls, *scores, pull(first), *costs(first, dataset)])
        print(*chain_rows[-1], sep="\t", flush=True)
    write_table(
        RESULTS / "samplers.json",
        "Diffusion-QL: samplers when acting",
        [
            "sampler",
            "steps",
            "network passes",
            "score, deterministic",
            "score, drawn",
            "pull of the action value",
            "ms per action, 1 observation",
            "ms, 64 observations",
        ],
        chain_rows,
        text=(
            f"{about} *Deterministic*: latents of 0. *Pull*: norm of the gradient of the actor's action value over that of "
            "its denoising loss, if training went on so; of the first model."
        ),
    )
    candidate_rows: list[list[str | float | int | None]] = []
    for n, choice in CHOICES:
        for model in models.values():
            model.set_sampler("ddpm")
            model.policy.n_action_samples, model.policy.candidate_choice = n, choice
        drawn = score(models, dataset, f"{n}-{choice}", options.episodes, False)
        candidate_rows.append([n, choice if n > 1 else "none", drawn, *costs(first, dataset)])
        print(*candidate_rows[-1], sep="\t", flush=True)
    write_table(
        RESULTS / "candidates.json",
        "Diffusion-QL: candidates when acting",
        ["candidates", "choice", "score, drawn", "ms per action, 1 observation", "ms, 64 observations"],
        candidate_rows,
        text=f"{about} *Choice*: by the target's action value; `softmax` draws, `argmax` takes the best.",
    )


if __name__ == "__main__":
    main()
