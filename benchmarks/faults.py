"""
Processes killed at random moments: what is left is always a whole file, from which training goes on exactly.

    python benchmarks/faults.py
    python benchmarks/faults.py --kills 100 --algos dtql

For each algorithm one run is left alone. Another one saves every few updates and is killed with SIGKILL again and again, in
training, loading and saving; each time the file must load, hold no fewer timesteps than before, and be that of one moment. At
the end both runs must have the same weights, bit for bit.
"""

import argparse
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from harness import RESULTS, write_table
from stable_baselines3.common.callbacks import BaseCallback

from sb3_diffusion import ALGORITHMS, OfflineDataset, load_dataset
from sb3_diffusion.datasets import DEFAULT_DATASET_ID

SETTINGS: dict[str, dict[str, Any]] = {
    "dtql": dict(policy_kwargs=dict(net_arch=[32, 32])),
    "diffusion_ql": dict(policy_kwargs=dict(net_arch=[32, 32])),
    "diffuser": dict(horizon=8, policy_kwargs=dict(net_kwargs=dict(base_width=32, multipliers=[1, 2]))),
    "bellman_diffusion": dict(n_diffusion_steps=5, n_sampling_steps=5, policy_kwargs=dict(net_arch=[32, 32])),
    "diffsr": dict(feature_dim=16, policy_kwargs=dict(net_arch=[32, 32])),
}
N_UPDATES, SAVE_EVERY = 240, 2


class Checkpoints(BaseCallback):
    """
    Save every few timesteps.

    :param path: of the file
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def _on_step(self) -> bool:
        if self.num_timesteps % SAVE_EVERY == 0:
            self.model.save(self.path)
        return True


def train(algo: str, dataset: OfflineDataset, path: Path) -> None:
    """
    Go on from the file, or begin.

    :param algo: name of the algorithm
    :param dataset: to learn from
    :param path: of the checkpoint
    """
    cls = ALGORITHMS[algo]
    if path.is_file():
        model = cls.load(path, dataset=dataset, device="cpu")
    else:
        model = cls("MlpPolicy", None, dataset=dataset, batch_size=16, seed=0, device="cpu", **SETTINGS[algo])  # type: ignore[call-arg]
    left = N_UPDATES - model.num_timesteps
    if left > 0:
        model.learn(left, callback=Checkpoints(path), reset_num_timesteps=False, log_interval=None)


def train_and_be_killed(algo: str, dataset: OfflineDataset, path: Path, seconds: float | None) -> bool:
    """
    :param algo: name of the algorithm
    :param dataset: to learn from
    :param path: of the checkpoint
    :param seconds: until the process is killed; None lets it end
    :return: whether it was killed, and had not ended before
    """
    process = os.fork()
    if process == 0:
        status = 1
        try:
            train(algo, dataset, path)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status) != 0:
        raise RuntimeError(f"{algo} failed by itself.")
    return False


def parameters(algo: str, path: Path) -> tuple[int, dict[str, th.Tensor]]:
    """
    :param algo: name of the algorithm
    :param path: of a file
    :return: timesteps and tensors of the model in it
    """
    model = ALGORITHMS[algo].load(path, device="cpu")
    return model.num_timesteps, model.policy.state_dict()


def survive(algo: str, dataset: OfflineDataset, n_kills: int, rng: np.random.Generator) -> list[str | float | int | None]:
    """
    :param algo: name of the algorithm
    :param dataset: to learn from
    :param n_kills: how often to kill
    :param rng: of the moments
    :return: row of the table
    :raises RuntimeError: if a file is broken or older than before, or the end is another one
    """
    with tempfile.TemporaryDirectory() as name:
        alone, killed = Path(name) / "alone" / "model.zip", Path(name) / "killed" / "model.zip"
        start = time.perf_counter()
        train_and_be_killed(algo, dataset, alone, None)
        longest = time.perf_counter() - start
        n_done, n_saving, n_runs, before = 0, 0, 0, 0
        while n_done < n_kills:
            n_done += train_and_be_killed(algo, dataset, killed, rng.uniform(0.0, longest))
            if not killed.is_file():
                continue
            left_behind = list(killed.parent.glob(".*.tmp"))  # of a save that was under way
            n_saving += bool(left_behind)
            for file in left_behind:
                file.unlink()
            timesteps, tensors = parameters(algo, killed)
            if timesteps < before or timesteps % SAVE_EVERY:
                raise RuntimeError(f"{algo}: the file holds {timesteps} timesteps, after {before}.")
            before = timesteps
            if timesteps >= N_UPDATES:
                n_runs += _ends_equally(algo, alone, tensors)
                before = 0
                killed.unlink()
        train_and_be_killed(algo, dataset, killed, None)
        n_runs += _ends_equally(algo, alone, parameters(algo, killed)[1])
    return [ALGORITHMS[algo].__name__, n_done, n_saving, 0, n_runs, 0]


def _ends_equally(algo: str, alone: Path, tensors: dict[str, th.Tensor]) -> int:
    expected = parameters(algo, alone)[1]
    different = [name for name, tensor in expected.items() if not th.equal(tensor, tensors[name])]
    if different:
        raise RuntimeError(f"{algo}: the run that was killed ends with other weights: {', '.join(different)}.")
    return 1


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Kill, look, write the table.

    :param arguments: of the command line; None for the process's
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algos", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--kills", type=int, default=40, help="of each algorithm")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args(arguments)
    th.set_num_threads(1)  # also because processes are forked
    dataset = load_dataset(DEFAULT_DATASET_ID)
    rng = np.random.default_rng(options.seed)
    rows = []
    for algo in options.algos:
        rows.append(survive(algo, dataset, options.kills, rng))
        print(*rows[-1], sep="\t", flush=True)
    write_table(
        RESULTS / "faults.json",
        "Processes killed at random moments",
        ["algorithm", "kills", "of these while saving", "broken files", "runs to the end", "other weights at the end"],
        rows,
        text=(
            f"Runs of {N_UPDATES} updates that save every {SAVE_EVERY}, killed with SIGKILL at random moments of loading, "
            "training and saving, and taken up again from the file that is there. *While saving*: a temporary file was left "
            "behind. The script ends with an error where a file does not load, is older than before, or where the run does "
            "not end with the weights of the run that nobody killed, bit for bit."
        ),
    )


if __name__ == "__main__":
    main()
