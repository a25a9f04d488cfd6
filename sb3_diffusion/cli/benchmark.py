"""The command ``benchmark``: learning curves over seeds, and speed."""

from __future__ import annotations

import json as json_format
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch as th

from sb3_diffusion.cli.shared import (
    INTERRUPTED,
    SUCCESS,
    StopOnSignal,
    env_of,
    find_algorithm,
    id_of,
    load_data,
    make_model,
    policy_for,
    read_changes,
    require,
)
from sb3_diffusion.common.utils import check_range
from sb3_diffusion.evaluation.protocol import describe, environment, run, write_json
from sb3_diffusion.evaluation.timing import UNIT_OPERATIONS, count_operations, paired_timing

# Repetitions of what is timed, and those before that are not counted.
N_REPETITIONS, N_WARM_UP = 30, 5


def benchmark(
    what: Literal["curve", "speed"] = "curve",
    /,
    *,
    algo: str | None = None,
    dataset: str | None = None,
    env: str | None = None,
    steps: int = 50_000,
    seeds: tuple[int, ...] = (0, 1, 2),
    evaluations: int = 10,
    episodes: int = 10,
    policy: str | None = None,
    preset: str | None = None,
    set: tuple[str, ...] = (),
    stochastic: bool = False,
    device: str = "auto",
    out: Path = Path("sb3_diffusion_benchmark"),
    json: bool = False,
) -> int:
    """
    Measure an algorithm on a dataset or in an environment: learning curves over seeds, or the speed of updates and actions.

    A curve is resumed when it is started again (Ctrl-C loses nothing). More seeds or other settings on the same task add to
    the results: results.json (all numbers, hardware, versions, commands), summary.json, learning_curves.png, report.html.

    Examples:

        sb3-diffusion benchmark --algo dtql --dataset mujoco/hopper/medium-v0 --preset hopper-medium --steps 50000
        sb3-diffusion benchmark --algo diffusion_ql --dataset mujoco/hopper/medium-v0 --seeds 0 1 2 3 4 --out runs/hopper
        sb3-diffusion benchmark speed --algo dtql --dataset mujoco/hopper/medium-v0

    :param what: curve or speed
    :param algo: algorithm, such as dtql or diffusion_ql; dtql by default
    :param dataset: Minari id, D4RL name, or path of an .hdf5 (D4RL's layout), .npz or .mmap; without one, training is online
    :param env: Gymnasium id; by default the environment of the dataset
    :param steps: timesteps of each run
    :param seeds: seeds of the runs
    :param evaluations: evaluations per run, at equal distances, the last one at the end
    :param episodes: episodes per evaluation
    :param policy: MlpPolicy, CnnPolicy or MultiInputPolicy; by default the one that fits the observations
    :param preset: published settings of a task, such as hopper-medium, instead of the defaults
    :param set: further constructor arguments as name=value, such as policy_kwargs.net_arch=[64,64] or learning_rate=lin_3e-4
    :param stochastic: evaluate with sampled actions instead of the deterministic ones
    :param device: cpu, cuda, ... or auto
    :param out: folder for the results, all of them of one dataset or environment
    :param json: print the summary as one JSON object and nothing else
    :return: exit status
    """
    require("plots", "matplotlib", "scipy", "jinja2")
    check_range("--episodes", episodes, 1)
    if not seeds:
        raise ValueError("`--seeds` must hold at least one: got none.")
    algorithm = find_algorithm(algo)
    data = None if dataset is None else load_data(dataset, env)
    played = env_of(env, data)
    if data is None and played is None:
        raise ValueError("There is nothing to learn from: pass --dataset, --env or both.")
    settings = [*([] if preset is None else [f"preset {preset}"]), *set, *(["stochastic"] if stochastic else [])]
    name = ", ".join([algorithm.__name__, *settings])
    alias = policy or policy_for(data, env)

    def make(seed: int) -> Any:
        return make_model(algorithm, alias, env, preset, read_changes(set), dataset=data, seed=seed, device=device)

    task = env if data is None else data.name
    if what == "speed":
        model = make(seeds[0])
        report = {
            "kind": "speed",
            "name": name,
            "task": task,
            **_speed(model, not stochastic),
            "environment": environment(model.device),
        }
        write_json(out / "speed.json", report)
        print(json_format.dumps(report) if json else _speed_table(report, out / "speed.json"))
        return SUCCESS

    if played is None:
        raise ValueError(f"The dataset {task!r} does not say where to evaluate: pass --env.")
    env_id = id_of(played)
    results = out / "results.json"
    kind = "Online" if data is None else "Offline"
    text = f"{steps:,} timesteps; {evaluations} evaluations of {episodes} episodes in {env_id}."
    describe(results, f"{kind}: {task}", text, {"dataset": None if data is None else data.name, "env": env_id})
    for index, seed in enumerate(seeds, 1):
        stop = StopOnSignal()
        record = run(
            name,
            seed,
            lambda seed=seed: make(seed),  # type: ignore[misc]
            lambda path: algorithm.load(path, env=env, dataset=data, device=device),
            steps,
            played,
            results,
            n_evaluations=evaluations,
            n_eval_episodes=episodes,
            deterministic=not stochastic,
            replay_buffer=data is None,
            dataset=data,
            workdir=out / "work",
            callback=stop,
            progress_bar=not json,
            quiet=json,
        )
        if record is None or (stop.stopped and index < len(seeds)):  # also in the last evaluation of a run
            if not json:
                print("Interrupted. The same command goes on from here.")
            return INTERRUPTED
    summary = _show(results, out)
    write_json(out / "summary.json", summary)
    print(json_format.dumps(summary) if json else _curve_table(summary, out))
    return SUCCESS


# Curves -----------------------------------------------------------------------------------------------------------------


def _show(results: Path, out: Path) -> dict[str, Any]:
    """Draw and report all runs of the folder; returns their averages by name of the setting."""
    from sb3_diffusion.evaluation.plots import plot_learning_curves
    from sb3_diffusion.evaluation.report import write_report
    from sb3_diffusion.evaluation.results import behavior_score, curve, read_runs, summarize
    from sb3_diffusion.plotting import save_figure

    groups = read_runs(results)
    summary = {name: summarize(records) for name, records in groups.items()}
    first = next(iter(groups.values()))[0]
    references = {} if first["behavior"] is None else {"behaviour, mean of the data": behavior_score(first, "mean")}
    curves = {name: curve(records) for name, records in groups.items()}
    unit = next(iter(summary.values()))["unit"]
    save_figure(plot_learning_curves(curves, unit=unit, references=references), out / "learning_curves.png")
    write_report(results, out / "report.html")
    return summary


def _curve_table(summary: dict[str, Any], out: Path) -> str:
    from sb3_diffusion.evaluation.report import format_estimate

    rows = [
        [
            name,
            str(len(entry["seeds"])),
            format_estimate(entry["last"]["iqm"]),
            format_estimate(entry["best"]["iqm"]),
            f"{entry['timesteps_per_second']:.0f}",
        ]
        for name, entry in summary.items()
    ]
    unit = next(iter(summary.values()))["unit"]
    title = f"{unit}: interquartile mean over seeds [95 % interval]"
    return _table(title, ["", "seeds", "last", "best", "timesteps / s"], rows) + f"Report: {out / 'report.html'}"


# Speed ------------------------------------------------------------------------------------------------------------------


def _speed(model: Any, deterministic: bool) -> dict[str, Any]:
    """
    Medians of an update, of actions and of a batch, in milliseconds and in units of a matrix product that ran just before;
    what share of that product's operations per second they reach.
    """
    model.learn(1 if model.dataset is not None else model.learning_starts + 1)
    one, many = _observations(model, 1), _observations(model, 64)
    left, right = th.randn(1024, 1024, device=model.device), th.randn(1024, 1024, device=model.device)
    parts: dict[str, Callable[[], object]] = {
        "matrix_product": lambda: left @ right,
        "update": lambda: model.train(gradient_steps=1, batch_size=model.batch_size),
        "1_action": lambda: model.predict(one, deterministic=deterministic),
        "64_actions": lambda: model.predict(many, deterministic=deterministic),
        "batch": lambda: model.sample_batch(model.batch_size),
    }
    report: dict[str, Any] = {"batch_size": model.batch_size, "milliseconds": {}, "matrix_products": {}}
    for name, part in parts.items():
        timing = paired_timing(part, parts["matrix_product"], N_REPETITIONS, N_WARM_UP, model.device)
        report["milliseconds"][name], report["matrix_products"][name] = timing
    if not model.compile:  # compiled code hides its operations
        units = report["matrix_products"]
        work = {name: count_operations(part) / UNIT_OPERATIONS for name, part in parts.items()}
        report["share_of_ceiling"] = {name: work[name] / units[name] for name in parts}
    return report


def _observations(model: Any, n: int) -> Any:
    """Observations that the model learned from."""
    buffer = model.replay_buffer if model.dataset is None else model.dataset_buffer
    samples = buffer.sample(n).observations
    return {key: value.cpu().numpy() for key, value in samples.items()} if isinstance(samples, dict) else samples.cpu().numpy()


def _speed_table(report: dict[str, Any], path: Path) -> str:
    shares = report.get("share_of_ceiling", {})
    rows = [
        [
            part.replace("_", " "),
            f"{value:.3f}",
            f"{report['matrix_products'][part]:.2f}",
            f"{shares[part]:.2f}" if part in shares else "",
        ]
        for part, value in report["milliseconds"].items()
    ]
    title = f"{report['name']}, batch of {report['batch_size']}: medians of {N_REPETITIONS}"
    return _table(title, ["", "milliseconds", "1024 x 1024 matrix products", "share of their speed"], rows) + f"JSON: {path}"


def _table(title: str, heads: list[str], rows: list[list[str]]) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in heads:
        table.add_column(column, justify="left" if column == "" else "right")
    for row in rows:
        table.add_row(*row)
    console = Console()
    with console.capture() as capture:
        console.print(table)
    return capture.get()
