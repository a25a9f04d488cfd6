"""
Diffusion-QL on a planar bandit with four good places: cloning, action values, chain lengths and samplers.

    python benchmarks/bandit.py

One state, actions near the corners of a square, a reward for each corner (arXiv 2208.06193, section 4, figures 1 and 2, and
its authors' toy scripts). Trained models are kept in ``benchmarks/work`` and not trained again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch as th
from gymnasium import spaces
from harness import RESULTS, ROOT, WORK, write_json, write_table
from torch import nn

from sb3_diffusion import DiffusionQL, OfflineDataset, load_dataset
from sb3_diffusion.common.denoisers import DiscreteDenoiser, append_dims
from sb3_diffusion.common.samplers import sample_ddpm
from sb3_diffusion.common.schedules import noise_schedule_betas

N_POINTS, N_SAMPLES = 10_000, 1_000
SIDE, STD, REWARD_STD = 0.8, 0.05, 0.5
CORNERS = {"upper left": 3.0, "lower left": 0.0, "upper right": 1.5, "lower right": 5.0}
"""Mean reward of each corner."""
CENTRES = np.array([(-SIDE, SIDE), (-SIDE, -SIDE), (SIDE, SIDE), (SIDE, -SIDE)])
RADIUS, GAP = 0.25, 0.6
"""A sample this close to a corner (five standard deviations) is in it; a coordinate below ``GAP`` is between two corners."""
CHAINS = (2, 5, 10, 50)
TIME_FEATURES = 16
ROWS = {"cloning": 0.0, "with action values": 2.5}
"""Weights of the action value; 2.5 is that of the authors' toy."""
FEW_FEATURES, FEW_FEATURES_CHAINS = "cloning, 4 time features", (10, 50)
"""
The authors' toy embeds the diffusion step in 4 features, which are sine and cosine of the step itself and of its ten
thousandth: steps that differ by about a multiple of 2 pi look alike. Their runs are ten times as long.
"""
SAMPLERS = {
    5: (("ddpm", 5), ("ddpm", 3), ("ddim", 5), ("ddim", 3), ("ddim", 2), ("ddim", 1), ("dpm_solver", 5), ("heun", 3)),
    50: (
        ("ddpm", 50),
        ("ddpm", 25),
        ("ddpm", 10),
        ("ddim", 50),
        ("ddim", 25),
        ("ddim", 10),
        ("dpm_solver", 25),
        ("dpm_solver", 10),
        ("heun", 25),
        ("heun", 5),
    ),
}
"""By length of the chain: samplers and their steps. The models were trained with all steps of the first."""


@dataclass(frozen=True)
class Panel:
    """
    Where samples come from.

    :param model: ``"data"``, ``"Gaussian"``, ``"exact denoiser"``, ``FEW_FEATURES`` or a key of ``ROWS``
    :param chain: number of steps of the diffusion model
    """

    model: str
    chain: int | None = None


def corner_actions(n: int, rng: np.random.Generator) -> np.ndarray:
    """:return: ``n`` actions in [-1, 1], equally many around each corner, in the order of ``CORNERS``"""
    return (np.repeat(CENTRES, n // 4, axis=0) + STD * rng.standard_normal((n, 2))).clip(-1.0, 1.0)


def make_dataset(actions: np.ndarray, rng: np.random.Generator) -> OfflineDataset:
    """
    Each transition ends its episode, so that the target of the critic is the reward alone.

    :param actions: of the data, in the order of ``CORNERS``
    :param rng: for the noise of the rewards
    :return: the bandit's data
    """
    rewards = np.repeat(list(CORNERS.values()), len(actions) // 4) + REWARD_STD * rng.standard_normal(len(actions))
    states = np.zeros((len(actions), 2), dtype=np.float32)
    return load_dataset(
        {
            "observations": states,
            "actions": actions.astype(np.float32),
            "rewards": rewards,
            "terminals": np.ones(len(actions), dtype=bool),
            "next_observations": states,
        },
        observation_space=spaces.Box(-1.0, 1.0, (2,)),
        action_space=spaces.Box(-1.0, 1.0, (2,)),
    )


class ExactNetwork(nn.Module):
    r"""
    What a perfectly trained network tells of the bandit's data, $(x - \alpha E[x_0 | x]) / \sigma$.

    Coordinates are independent, each a mixture of two normal laws.

    :param betas: variances of the steps of the chain
    """

    def __init__(self, betas: th.Tensor) -> None:
        super().__init__()
        alphas_bar = (1.0 - betas).cumprod(dim=0)
        self.alphas, self.sigmas = alphas_bar.sqrt().float(), (1.0 - alphas_bar).sqrt().float()

    def forward(self, x: th.Tensor, condition: th.Tensor, level: th.Tensor) -> th.Tensor:
        alpha, sigma = append_dims(self.alphas[level], x.dim()), append_dims(self.sigmas[level], x.dim())
        variance = (alpha * STD).square() + sigma.square()
        mode = SIDE * (SIDE * alpha * x / variance).tanh()
        clean = mode + alpha * STD**2 / variance * (x - alpha * mode)
        return (x - alpha * clean) / sigma


def exact_samples(n_diffusion_steps: int, seed: int) -> np.ndarray:
    """
    :param n_diffusion_steps: length of the chain
    :param seed: of its noise
    :return: what the chain gives with a perfectly trained network, ``(N_SAMPLES, 2)``
    """
    betas = noise_schedule_betas("vp", n_diffusion_steps)
    denoiser = DiscreteDenoiser(ExactNetwork(betas), betas, clip=1.0)
    noises = th.randn(n_diffusion_steps, N_SAMPLES, 2, generator=th.Generator().manual_seed(seed))
    levels = denoiser.sampling_levels(n_diffusion_steps)
    return sample_ddpm(denoiser, noises[0], levels, th.zeros(N_SAMPLES, 0), noises[1:]).clamp(-1.0, 1.0).numpy()


def train(dataset: OfflineDataset, name: str, n_diffusion_steps: int, n_steps: int, seed: int) -> DiffusionQL:
    """
    :param dataset: the bandit's data
    :param name: ``FEW_FEATURES`` or a key of ``ROWS``
    :param n_diffusion_steps: length of the chain
    :param n_steps: updates
    :param seed: of the run
    :return: trained model; what is not set here is the default
    """
    model = DiffusionQL(
        "MlpPolicy",
        None,
        learning_rate=3e-4,
        batch_size=100,
        dataset=dataset,
        q_coef=ROWS.get(name, 0.0),
        n_diffusion_steps=n_diffusion_steps,
        normalize_observations=False,
        policy_kwargs={"net_arch": [128] * 3, "time_embedding_dim": 4 if name == FEW_FEATURES else TIME_FEATURES},
        seed=seed,
        device="cpu",
    )
    return model.learn(n_steps, log_interval=None)


def trained(
    folder: Path, dataset: OfflineDataset, name: str, chain: int, n_steps: int, seed: int
) -> tuple[DiffusionQL, float]:
    """
    The model of a panel: from the folder, or trained now and put there.

    :param folder: of the models
    :param dataset: the bandit's data
    :param name: ``FEW_FEATURES`` or a key of ``ROWS``
    :param chain: length of the chain
    :param n_steps: updates
    :param seed: of the run
    :return: model and CPU seconds of its training
    """
    stem = folder / f"{name.replace(',', '').replace(' ', '_')}-{chain}"
    finished = stem.with_suffix(".json")
    if not finished.is_file():
        start = time.process_time()
        model = train(dataset, name, chain, n_steps, seed)
        seconds = time.process_time() - start
        model.save(stem)
        write_json(finished, {"cpu_seconds": seconds})
    return DiffusionQL.load(stem, device="cpu"), json.loads(finished.read_text(encoding="utf-8"))["cpu_seconds"]


def samples_of(model: DiffusionQL, seed: int, sampler: str = "ddpm", n_sampling_steps: int | None = None) -> np.ndarray:
    """
    :param model: trained model
    :param seed: of its draws
    :param sampler: how the chain is run
    :param n_sampling_steps: steps of the sampler; None for the whole chain
    :return: actions of the policy, ``(N_SAMPLES, 2)``
    """
    model.set_sampler(sampler, n_sampling_steps)
    model.set_random_seed(seed)
    return model.predict(np.zeros((N_SAMPLES, 2), dtype=np.float32), deterministic=False)[0]


def single_action(model: DiffusionQL) -> np.ndarray:
    """:return: the deterministic action of a trained model that runs its whole chain, ``(2,)``"""
    return model.predict(np.zeros(2, dtype=np.float32), deterministic=True)[0]


def measure(samples: np.ndarray) -> dict[str, float]:
    """
    :param samples: actions, ``(n, 2)``
    :return: shares of the samples, and their mean reward
    """
    distances = np.linalg.norm(samples[:, None] - CENTRES, axis=2)
    inside = distances < RADIUS  # circles do not touch: at most one per sample
    shares = inside.mean(axis=0)
    return {
        **dict(zip(CORNERS, map(float, shares), strict=True)),
        "outside": float(1.0 - shares.sum()),
        "gap": float((np.abs(samples) < GAP).mean()),
        "mean_reward": float(shares @ np.array(list(CORNERS.values()))),
    }


def critic_values(model: DiffusionQL, axis: np.ndarray) -> np.ndarray:
    """
    :param model: trained model
    :param axis: coordinates
    :return: the smaller of the two action values on the grid, shape ``(len(axis), len(axis))``, rows are ordinates
    """
    grid = th.as_tensor(np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2), dtype=th.float32)
    with th.no_grad():
        values = model.critic(th.zeros(len(grid), 2), grid).amin(dim=0)
    return values.reshape(len(axis), len(axis)).numpy()


def draw(samples: dict[Panel, np.ndarray], singles: dict[Panel, np.ndarray], rewards: np.ndarray, critic: DiffusionQL) -> None:
    """
    Draw the picture.

    :param samples: of all panels
    :param singles: deterministic actions of the trained models
    :param rewards: of the data
    :param critic: model whose action values are shown
    """
    from matplotlib.figure import Figure

    names = [*ROWS, "exact denoiser"]
    figure = Figure(figsize=(2.7 * (1 + len(CHAINS)), 2.95 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), 1 + len(CHAINS), squeeze=False)
    dots = dict(s=4, alpha=0.4, linewidths=0, rasterized=True)
    axes[0, 0].scatter(*samples[Panel("data")].T, c=rewards, cmap="viridis", **dots)
    axes[0, 0].set_title("data, coloured by reward")
    for (name, reward), centre in zip(CORNERS.items(), CENTRES, strict=True):
        axes[0, 0].annotate(f"{name}\n{reward:g}", 0.55 * centre, ha="center", va="center", fontsize=9)
    axis = np.linspace(-1.2, 1.2, 61)
    contours = axes[1, 0].contour(axis, axis, critic_values(critic, axis), levels=np.arange(-1.0, 6.0, 0.5), cmap="viridis")
    axes[1, 0].clabel(contours, levels=np.arange(0.0, 6.0, 1.0), fontsize=8, fmt="%g")
    axes[1, 0].set_title("smaller action value")
    axes[2, 0].scatter(*samples[Panel("Gaussian")].T, color="C3", **dots)
    axes[2, 0].set_title("Gaussian fit to the data")
    for row, name in zip(axes, names, strict=True):
        for ax, chain in zip(row[1:], CHAINS, strict=True):
            panel = Panel(name, chain)
            numbers = measure(samples[panel])
            ax.scatter(*samples[panel].T, color="0.45" if name == "exact denoiser" else "C3", **dots)
            if panel in singles:
                ax.plot(*singles[panel], "x", color="black", markersize=9, markeredgewidth=2)
            best = "lower right"
            ax.set_xlabel(f"{best} {100 * numbers[best]:.0f} %, outside {100 * numbers['outside']:.0f} %", fontsize=9)
            if row is axes[0]:
                ax.set_title(f"T = {chain}")
        row[1].set_ylabel(name, fontsize=11)
    for ax in axes.flat:
        ax.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal", xticks=[-0.8, 0.8], yticks=[-0.8, 0.8])
        ax.tick_params(labelsize=7)
    (ROOT / "docs" / "assets").mkdir(parents=True, exist_ok=True)
    figure.savefig(ROOT / "docs" / "assets" / "bandit.png", dpi=90)


def main() -> None:
    """Train the models that are missing, then write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000, help="updates of each model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args()
    th.set_num_threads(options.threads)
    folder = WORK / "bandit" / f"{options.steps}-{options.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    actions = corner_actions(N_POINTS, rng)
    dataset = make_dataset(actions, rng)

    gaussian = actions.mean(axis=0) + actions.std(axis=0) * rng.standard_normal((N_SAMPLES, 2))
    samples: dict[Panel, np.ndarray] = {Panel("data"): actions, Panel("Gaussian"): gaussian}
    seconds: dict[Panel, float] = {}
    singles: dict[Panel, np.ndarray] = {}
    by_sampler: dict[tuple[int, str, int], dict[str, dict[str, float]]] = defaultdict(dict)
    for chain in CHAINS:
        samples[Panel("exact denoiser", chain)] = exact_samples(chain, options.seed)
    for name, chains in {**dict.fromkeys(ROWS, CHAINS), FEW_FEATURES: FEW_FEATURES_CHAINS}.items():
        for chain in chains:
            panel = Panel(name, chain)
            model, seconds[panel] = trained(folder, dataset, name, chain, options.steps, options.seed)
            singles[panel] = single_action(model)
            samples[panel] = samples_of(model, options.seed)
            print(panel, measure(samples[panel]), singles[panel], f"{seconds[panel]:.0f} s", flush=True)
            for sampler, n_steps in SAMPLERS.get(chain, ()) if name in ROWS else ():
                numbers = measure(samples_of(model, options.seed, sampler, n_steps))
                by_sampler[chain, sampler, n_steps][name] = numbers
                print(f"  {sampler}, {n_steps} steps", numbers, flush=True)
            if panel == Panel("with action values", CHAINS[-1]):
                critic = model
    draw(samples, singles, dataset.rewards, critic)
    write_table(
        RESULTS / "bandit.json",
        "Toy: a bandit with four corners",
        [
            "model",
            "chain",
            *(f"{name} ({reward:g})" for name, reward in CORNERS.items()),
            "outside",
            "gap",
            "mean reward",
            "deterministic action",
            "CPU seconds",
        ],
        [
            [
                panel.model,
                panel.chain,
                *map(float, measure(samples[panel]).values()),
                "({:.2f}, {:.2f})".format(*singles[panel]) if panel in singles else None,
                round(seconds[panel], 1) if panel in seconds else None,
            ]
            for panel in samples
        ],
        text=(
            f"One state; {N_POINTS:,} actions around the corners (±{SIDE}, ±{SIDE}), standard deviation {STD}; the reward of "
            f"a corner, in brackets, has noise of standard deviation {REWARD_STD}. Columns of corners: share of {N_SAMPLES:,} "
            f"actions within {RADIUS} of it (of the data, all). *Outside*: in none. *Gap*: share of the coordinates between "
            f"-{GAP} and {GAP}, where there are no data. *Mean reward*: without noise, and 0 outside. {options.steps:,} "
            f"updates, batch 100, three hidden layers of 128, learning rate 3e-4, `q_coef` {ROWS['with action values']} or 0, "
            f"`time_embedding_dim` {TIME_FEATURES} or 4, otherwise the defaults, seed {options.seed}; stochastic actions, one "
            "candidate, all steps of `ddpm`. *Exact denoiser*: the same chain around what a perfectly trained network would "
            "tell. *Gaussian*: mean and standard deviations of the data."
        ),
        pictures=[
            (
                "assets/bandit.png",
                f"{N_SAMPLES:,} actions of each policy, by length T of the chain; the cross is its deterministic action. The "
                "grey ones are those of a perfectly trained network, sampled by the same chain.",
            )
        ],
    )
    best = "lower right"
    write_table(
        RESULTS / "bandit_samplers.json",
        "Toy: samplers on the bandit with four corners",
        [
            "chain and sampler",
            "passes",
            "cloning: outside",
            "cloning: gap",
            *(f"with action values: {column}" for column in (best, "outside", "mean reward")),
        ],
        [
            [
                f"{chain}, {sampler}, {n_steps} steps",
                2 * n_steps - 1 if sampler == "heun" else n_steps,
                numbers["cloning"]["outside"],
                numbers["cloning"]["gap"],
                *(numbers["with action values"][column] for column in (best, "outside", "mean_reward")),
            ]
            for (chain, sampler, n_steps), numbers in by_sampler.items()
        ],
        text=(
            f"The models with chains of {' and '.join(map(str, SAMPLERS))} steps from the table above, trained with all "
            f"steps of `ddpm`, acting with other samplers; {N_SAMPLES:,} actions each, columns as there. *Passes*: through "
            "the actor, per action."
        ),
    )


if __name__ == "__main__":
    main()
