"""
Long runs: memory and open files while learning for an hour, over a thousand savings and loadings, and with 16 processes.

    python benchmarks/soak.py online --minutes 60
    python benchmarks/soak.py offline --minutes 60
    python benchmarks/soak.py files --cycles 1000
    python benchmarks/soak.py environments --steps 20000

Each adds its row to ``benchmarks/results/soak.json``. Linux alone.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from data_scale import anonymous_megabytes
from harness import RESULTS, write_table
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv

from sb3_diffusion import DTQL

COLUMNS = ["what", "minutes", "how much", "MB at first", "MB at the end", "MB per hour", "open files at first", "at the end"]
DATASET = "sb3-diffusion/pendulum/mixed-v0"
SMALL: dict[str, Any] = dict(seed=0, device="cpu", policy_kwargs=dict(net_arch=[64, 64]))
WARM_UP = 0.1  # share of a run after which memory is looked at: caches and buffers have their size


class Watch:
    """Memory and open files of this process over time."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float, int]] = []
        self.start = time.monotonic()

    @property
    def minutes(self) -> float:
        """Since the start."""
        return (time.monotonic() - self.start) / 60.0

    def look(self) -> None:
        """Note what is in use."""
        self.rows.append((self.minutes, anonymous_megabytes(), len(os.listdir("/proc/self/fd"))))

    def row(self, what: str, how_much: str) -> list[Any]:
        """
        :param what: that was run
        :param how_much: of it
        :return: of the table; the slope is a least-squares line after the warm-up
        """
        minutes, megabytes, files = (np.array(column) for column in zip(*self.rows, strict=True))
        late = minutes >= WARM_UP * minutes[-1]
        slope = 60.0 * np.polyfit(minutes[late], megabytes[late], 1)[0]
        sizes = megabytes[late]
        numbers = [round(float(value), 1) for value in (sizes[0], sizes[-1], slope)]
        return [what, round(minutes[-1], 1), how_much, *numbers, int(files[late][0]), int(files[-1])]


class UntilTimeIsUp(BaseCallback):
    """
    Looks at the process every few seconds and ends the run.

    :param watch: to look with
    :param minutes: length of the run
    """

    def __init__(self, watch: Watch, minutes: float) -> None:
        super().__init__()
        self.watch, self.minutes = watch, minutes
        self._next = 0.0

    def _on_step(self) -> bool:
        if self.watch.minutes >= self._next:
            self.watch.look()
            self._next = self.watch.minutes + self.minutes / 400.0
        return self.watch.minutes < self.minutes


def online(options: argparse.Namespace) -> list[Any]:
    """:return: row of a run that steps Pendulum, its replay buffer full and overwritten"""
    model = DTQL("MlpPolicy", "Pendulum-v1", buffer_size=5_000, **SMALL)
    watch = Watch()
    model.learn(10**9, callback=UntilTimeIsUp(watch, options.minutes))
    return watch.row("DTQL online", f"{model.num_timesteps} steps")


def offline(options: argparse.Namespace) -> list[Any]:
    """:return: row of a run on logged data"""
    model = DTQL("MlpPolicy", None, dataset=DATASET, **SMALL)
    watch = Watch()
    model.learn(10**9, callback=UntilTimeIsUp(watch, options.minutes))
    return watch.row("DTQL offline", f"{model.num_timesteps} updates")


def files(options: argparse.Namespace) -> list[Any]:
    """:return: row of cycles of saving and loading a model and its replay buffer; what comes back is equal at the end"""
    model = DTQL("MlpPolicy", "Pendulum-v1", buffer_size=2_000, **SMALL).learn(300)
    expected = {name: value.clone() for name, value in model.policy.state_dict().items()}
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.cycles):
            model.save(f"{folder}/model")
            model.save_replay_buffer(f"{folder}/buffer")
            model = DTQL.load(f"{folder}/model", env="Pendulum-v1", device="cpu")
            model.load_replay_buffer(f"{folder}/buffer")
            watch.look()
    found = model.policy.state_dict()
    assert all(th.equal(found[name], value) for name, value in expected.items())
    assert model.replay_buffer is not None and model.replay_buffer.size() == 300
    return watch.row("saved and loaded, with replay buffer", f"{options.cycles} cycles")


def environments(options: argparse.Namespace) -> list[Any]:
    """:return: row of a run with 16 environments in processes of their own"""
    env: Any = make_vec_env("Pendulum-v1", n_envs=16, vec_env_cls=SubprocVecEnv, seed=0)
    model = DTQL("MlpPolicy", env, buffer_size=10_000, gradient_steps=4, **SMALL)
    watch = Watch()
    model.learn(options.steps, callback=UntilTimeIsUp(watch, options.minutes))
    processes = env.processes
    env.close()
    assert not any(process.is_alive() for process in processes)
    return watch.row("DTQL online, 16 environments in SubprocVecEnv", f"{model.num_timesteps} steps")


RUNS: dict[str, Callable[[argparse.Namespace], list[Any]]] = {
    "online": online,
    "offline": offline,
    "files": files,
    "environments": environments,
}


def main(arguments: list[str] | None = None) -> None:
    """
    Run what is asked for.

    :param arguments: of the command line; None for the process's
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=list(RUNS))
    parser.add_argument("--minutes", type=float, default=60.0, help="of a run that learns")
    parser.add_argument("--cycles", type=int, default=1_000)
    parser.add_argument("--steps", type=int, default=20_000, help="with 16 environments")
    parser.add_argument("--out", type=Path, default=RESULTS / "soak.json")
    options = parser.parse_args(arguments)
    th.set_num_threads(1)
    row = RUNS[options.run](options)
    print(*row, sep=" | ", flush=True)
    before = json.loads(options.out.read_text(encoding="utf-8"))["rows"] if options.out.is_file() else []
    rows = [*(old for old in before if old[0] != row[0]), row]
    write_table(
        options.out,
        "Long runs",
        COLUMNS,
        sorted(rows, key=lambda line: str(line[0])),
        text=(
            "Small networks, one thread. Memory is anonymous memory of the process, looked at 400 times in a run; the first "
            f"look that counts is after {WARM_UP:.0%} of it, and the slope is a least-squares line through these."
        ),
    )


if __name__ == "__main__":
    main()
