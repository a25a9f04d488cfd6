"""
Trains every algorithm in each process of a group and writes its weights: what `test_distributed.py` starts by torchrun.

    torchrun --nproc-per-node 2 tests/train_together.py FOLDER
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from algos import ALGOS, VARIANTS, AlgoSpec
from gymnasium import spaces
from safetensors.torch import save_file
from stable_baselines3.common.callbacks import BaseCallback

from sb3_diffusion import OfflineDataset
from sb3_diffusion.common.distributed import process_rank

N_UPDATES = 3
# Logged beside the losses that are minimised: of the rows of a process
OF_EACH_PROCESS = {
    "target_size",
    "effective_sample_size",
    "bc_loss",
    "q_loss",
    "score_loss",
    "reward_loss",
    "exploration_bonus",
    "ent_coef",
}


def make_data() -> OfflineDataset:
    """Random episodes of 10 steps."""
    rng, n = np.random.default_rng(0), 200
    observations = rng.normal(size=(n + 1, 3)).astype(np.float32)
    ends = np.arange(n) % 10 == 9
    return OfflineDataset(
        observations[:-1],
        rng.uniform(-1.0, 1.0, (n, 2)),
        rng.normal(size=n),
        observations[1:],
        ends & (np.arange(n) % 20 == 9),
        ends & (np.arange(n) % 20 == 19),
        observation_space=spaces.Box(-np.inf, np.inf, (3,)),
        action_space=spaces.Box(-1.0, 1.0, (2,)),
    )


class LossesSeen(BaseCallback):
    """Keeps the means of the losses that the logger would show."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: dict[str, float] = {}

    def _on_step(self) -> bool:
        self.losses = self.model._mean_losses()  # type: ignore[attr-defined]
        return True


def train_offline(spec: AlgoSpec) -> dict[str, th.Tensor]:
    """
    :param spec: of the registry
    :return: weights after some steps of plain gradient descent, which is as smooth as the gradients, and mean losses
    """
    plain: dict[str, Any] = dict(optimizer_class=th.optim.SGD, optimizer_kwargs={})
    # The penalty compares rows with each other: within a process alone
    whole = {"decorrelation_coef": 0.0} if "decorrelation_coef" in spec.kwargs else {}
    model = spec.make(dataset=make_data(), learning_rate=1e-3, policy_kwargs=plain, **whole)
    seen = LossesSeen()
    model.learn(N_UPDATES, callback=seen)
    assert model._n_updates == N_UPDATES
    losses = {f"loss.{name}": th.tensor(loss) for name, loss in seen.losses.items() if name not in OF_EACH_PROCESS}
    return {**{name: value.clone() for name, value in model.policy.state_dict().items()}, **losses}


def train_online(spec: AlgoSpec) -> dict[str, th.Tensor]:
    """
    :param spec: of the registry
    :return: weights and statistics after some steps in an environment of its own, and the observations that were met
    """
    model = spec.make("Pendulum-v1", seed=process_rank())  # even so all begin with the weights of the first one
    model.learn(30)
    met = th.from_numpy(np.asarray(model.replay_buffer.observations)[:30].copy())
    return {**{name: value.clone() for name, value in model.policy.state_dict().items()}, "met": met}


def main(folder: Path) -> None:
    """:param folder: for one file per algorithm and process"""
    th.set_num_threads(1)
    th.distributed.init_process_group("gloo")
    for spec in VARIANTS:
        save_file(train_offline(spec), folder / f"{spec.name}.{process_rank()}")
    for spec in ALGOS:
        save_file(train_online(spec), folder / f"online.{spec.name}.{process_rank()}")
    th.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
