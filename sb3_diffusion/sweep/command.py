"""The command ``sb3-diffusion sweep``."""

from __future__ import annotations

from pathlib import Path

from sb3_diffusion.sweep.arguments import read_values
from sb3_diffusion.sweep.results import RESULTS_FILE, TABLE_FILE
from sb3_diffusion.sweep.running import resume_sweep, run_sweep
from sb3_diffusion.sweep.settings import SweepSettings

SUCCESS, TRIALS_FAILED, INTERRUPTED = 0, 1, 130


def sweep(
    out: Path,
    /,
    *,
    algo: list[str] | None = None,
    dataset: list[str] | None = None,
    env: str | None = None,
    seeds: int = 3,
    steps: int = 100_000,
    params: list[str] | None = None,
    samples: int = 0,
    evaluations: int = 10,
    episodes: int = 10,
    early_stopping: bool = False,
    workers: int | None = None,
    cpus: float = 1.0,
    gpus: float = 0.0,
    retries: int = 2,
    device: str = "auto",
    storage: str | None = None,
    address: str | None = None,
    resume: bool = False,
) -> int:
    """
    Run algorithms on datasets with several seeds and hyperparameters, many at once, on this machine or a Ray cluster.

    Examples:

        sb3-diffusion sweep runs/compare --algo dtql diffusion_ql --dataset sb3-diffusion/pendulum/mixed-v0 --steps 20000
        sb3-diffusion sweep runs/grid --dataset sb3-diffusion/pendulum/mixed-v0 --steps 20000 --params q_coef=0.5,1.0
        sb3-diffusion sweep runs/search --dataset sb3-diffusion/pendulum/mixed-v0 --steps 20000 --samples 20 --early-stopping
        sb3-diffusion sweep runs/search --resume

    :param out: folder for the results
    :param algo: algorithms, such as dtql or diffusion_ql; dtql by default
    :param dataset: Minari ids, D4RL names, or paths of .hdf5 (D4RL's layout), .npz or .mmap; without one, training is online
    :param env: Gymnasium id, also as module:id; by default the environment of each dataset
    :param seeds: number of seeds, from 0 on
    :param steps: timesteps of each run; gradient steps offline, env steps online
    :param params: hyperparameters as name=value,value,...; values are Python literals, such as policy_kwargs.net_arch=[64,64]
    :param samples: let Optuna choose this many settings for each algorithm and dataset, instead of a grid
    :param evaluations: evaluations during a run, each of which keeps a checkpoint
    :param episodes: episodes per evaluation
    :param early_stopping: stop runs that are behind others of the same algorithm and dataset (ASHA)
    :param workers: runs at once; by default as many as the CPUs allow
    :param cpus: CPUs per run
    :param gpus: GPUs per run; may be a share of one
    :param retries: how often a run that died goes on from its last checkpoint
    :param device: cpu, cuda, ... or auto
    :param storage: folder or URI for checkpoints that all machines of a cluster see; by default the results' folder
    :param address: address of a Ray cluster, such as auto; without one, Ray is started on this machine
    :param resume: go on with the sweep in the folder, with the options that it was started with; only --address counts
    :return: exit status
    """
    if resume:
        results = resume_sweep(out, address=address, verbose=1)
    else:
        settings = SweepSettings(
            algos=algo or ["dtql"],
            datasets=dataset or [None],
            env=env,
            seeds=range(seeds),
            steps=steps,
            params=read_values(params or []),
            samples=samples,
            evaluations=evaluations,
            episodes=episodes,
            early_stopping=early_stopping,
            retries=retries,
            workers=workers,
            cpus=cpus,
            gpus=gpus,
            device=device,
            storage=storage,
        )
        results = run_sweep(settings, out, address=address, verbose=1)
    results.print()
    print(f"Results: {out / TABLE_FILE}, {out / RESULTS_FILE}, {out / 'curves.png'}")
    statuses = {row["status"] for row in results.trials}
    if "unfinished" in statuses:
        print(f"Interrupted. To go on:\n  sb3-diffusion sweep {out} --resume")
        return INTERRUPTED
    return TRIALS_FAILED if "failed" in statuses else SUCCESS
