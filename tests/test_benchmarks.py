"""The benchmark protocol: interrupted runs end as whole ones, results merge, tables are made from them."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import baselines
import bellman_actor_weights
import gymnasium as gym
import harness
import make_tables
import numpy as np
import pytest
import speed
import torch as th

from sb3_diffusion import DTQL, BellmanDiffusion, OfflineDataset
from sb3_diffusion.evaluation import protocol
from sb3_diffusion.evaluation.timing import count_operations, paired_timing

ENV_ID = "Pendulum-v1"


@pytest.fixture(scope="module")
def dataset() -> OfflineDataset:
    env = gym.make(ENV_ID)
    rng = np.random.default_rng(0)
    n = 60
    observations = rng.normal(size=(n + 1, 3)).astype(np.float32)
    ends = np.arange(n) % 20 == 19
    return OfflineDataset(
        observations[:-1],
        rng.uniform(-1, 1, (n, 1)).astype(np.float32),
        rng.normal(size=n).astype(np.float32),
        observations[1:],
        np.zeros(n, bool),
        ends,
        observation_space=gym.spaces.Box(-np.inf, np.inf, (3,)),
        action_space=env.action_space,
        env_spec=env.spec,
        ref_min_score=-1600.0,
        ref_max_score=0.0,
        name="random",
    )


def make_model(dataset: OfflineDataset, seed: int) -> DTQL:
    return DTQL("MlpPolicy", ENV_ID, dataset=dataset, seed=seed, batch_size=8, policy_kwargs=dict(net_arch=[8]), device="cpu")


def start(dataset: OfflineDataset, folder: Path, /, name: str = "DTQL", seed: int = 0, **kwargs) -> dict:
    defaults: dict = dict(env=ENV_ID, n_evaluations=3, n_eval_episodes=2, total_timesteps=12, workdir=folder / "work")
    return harness.run(
        name,
        seed,
        lambda: make_model(dataset, seed),
        lambda path: DTQL.load(path, env=ENV_ID, dataset=dataset, device="cpu"),
        result_file=folder / "results" / "pendulum.json",
        **defaults | kwargs,
    )


def curve(record: dict) -> list[tuple[int, list[float]]]:
    return [(evaluation["timestep"], evaluation["returns"]) for evaluation in record["evaluations"]]


@pytest.mark.parametrize("when", ["before evaluation", "between the files"])
def test_interrupted_run_ends_as_a_whole_one(dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str):
    whole = start(dataset, tmp_path / "whole")
    assert [timestep for timestep, _ in curve(whole)] == [4, 8, 12]
    assert len({returns[0] for _, returns in curve(whole)}) == 3

    calls = 0
    original = protocol.evaluate if when == "before evaluation" else protocol.write_json

    def interrupt(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(protocol, original.__name__, interrupt)
        with pytest.raises(KeyboardInterrupt):
            start(dataset, tmp_path / "parts")
    assert not (tmp_path / "parts" / "results" / "pendulum.json").exists()
    assert curve(start(dataset, tmp_path / "parts")) == curve(whole)


def test_finished_run_is_not_repeated(dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = start(dataset, tmp_path)
    monkeypatch.setattr(DTQL, "learn", lambda *args, **kwargs: pytest.fail("trained again"))
    (tmp_path / "results" / "pendulum.json").unlink()
    assert start(dataset, tmp_path) == json.loads(json.dumps(first))
    assert (tmp_path / "results" / "pendulum.json").is_file()
    with pytest.raises(ValueError, match=r"belongs to a run with n_evaluations 3 \(here 2\): choose another folder"):
        start(dataset, tmp_path, n_evaluations=2)


@pytest.mark.parametrize("other", [dict(n_evaluations=2), dict(n_eval_episodes=1), dict(total_timesteps=15)])
def test_seeds_of_one_name_are_equally_long(dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict):
    """Refused before training, and before anything is written; another name may differ."""
    start(dataset, tmp_path)
    file = tmp_path / "results" / "pendulum.json"
    content = file.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(DTQL, "learn", lambda *args, **kwargs: pytest.fail("trained"))
        ((key, value),) = other.items()
        with pytest.raises(ValueError, match=rf"'DTQL' with seed 0 and {key} \d+ \(here {value}\).* another name or another"):
            start(dataset, tmp_path, seed=1, **other)
    assert file.read_text() == content and len(list((tmp_path / "work").glob("*/*"))) == 1
    start(dataset, tmp_path, seed=1)
    start(dataset, tmp_path, name="other", **other)
    assert len(json.loads(file.read_text())["runs"]) == 3


def test_run_of_another_task_is_refused(dataset, tmp_path: Path):
    """Data and environment are part of the protocol; what an older file does not say is not asked of it."""
    record = start(dataset, tmp_path, dataset=dataset)
    assert (record["dataset"], record["env"], record["deterministic"]) == ("random", ENV_ID, True)
    expert = copy.copy(dataset)
    expert.name = "expert"
    with pytest.raises(ValueError, match=r"dataset random \(here expert\)"):
        start(dataset, tmp_path, dataset=expert)
    with pytest.raises(ValueError, match=rf"env {ENV_ID} \(here Other-v0\)"):
        start(dataset, tmp_path, dataset=dataset, env=gym.envs.registration.EnvSpec("Other-v0"))
    with pytest.raises(ValueError, match=r"deterministic True \(here False\)"):
        start(dataset, tmp_path, dataset=dataset, deterministic=False)
    (file,) = tmp_path.glob("work/*/*/progress.json")
    progress = json.loads(file.read_text())
    for key in ("dataset", "env", "deterministic"):
        del progress["protocol"][key], progress["record"][key]
    file.write_text(json.dumps(progress))
    assert start(dataset, tmp_path, dataset=dataset) == progress["record"]


def test_result_file_of_another_task_is_refused(dataset, tmp_path: Path):
    file = tmp_path / "results" / "pendulum.json"
    task = {"dataset": "random", "env": ENV_ID}
    protocol.describe(file, "Nothing yet", task=task)
    with pytest.raises(ValueError, match=r"dataset random \(here expert\)"):
        protocol.describe(file, "Other", task={**task, "dataset": "expert"})
    start(dataset, tmp_path)
    protocol.describe(file, "Title", task=task)
    content = json.loads(file.read_text())
    assert (content["title"], content["task"], len(content["runs"])) == ("Title", task, 1)
    protocol.write_json(file, {key: value for key, value in content.items() if key != "task"})
    protocol.describe(file, "Of several tasks, for all it knows")
    with pytest.raises(ValueError, match=r"dataset random \(here None\)"):
        protocol.describe(file, "Other", task={**task, "dataset": None})


def test_online_run_continues_the_count(dataset, tmp_path: Path):
    model = make_model(dataset, 0).learn(3)
    record = harness.run(
        "fine-tuned",
        0,
        lambda: model,
        lambda path: pytest.fail("nothing to load"),
        4,
        ENV_ID,
        tmp_path / "results" / "online.json",
        n_evaluations=2,
        n_eval_episodes=1,
        evaluate_first=True,
        learn_kwargs=dict(offline=False),
        replay_buffer=True,
        workdir=tmp_path,
    )
    assert [timestep for timestep, _ in curve(record)] == [3, 5, 7]
    assert (tmp_path / "online" / "fine-tuned-seed0" / "replay_buffer.zip").is_file()


def test_record_says_where_it_comes_from(dataset, tmp_path: Path):
    record = start(dataset, tmp_path, about=lambda model: {"note": "a note"})
    assert record["environment"]["libraries"]["torch"]
    assert record["environment"]["cpu_count"] >= 1
    assert (record["note"], record["dataset"]) == ("a note", "random")
    assert 0 < record["train_seconds"] < record["wall_seconds"]
    assert record["behavior"]["mean"] == pytest.approx(dataset.episode_returns.mean())
    expected = 100 * (np.array(curve(record)[0][1]) + 1600) / 1600
    assert record["evaluations"][0]["normalized_scores"] == pytest.approx(expected)


def make_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    arguments = ["make_tables.py", "--results", str(folder / "results"), "--docs", str(folder / "docs")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert make_tables.main() == 0
    return (folder / "docs" / "benchmarks.md").read_text()


def test_tables(dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    for seed in range(2):
        start(dataset, tmp_path, seed=seed)
    start(dataset, tmp_path, name="other")
    result_file = tmp_path / "results" / "pendulum.json"
    harness.describe(result_file, "Pendulum", "Random data.")
    # Known numbers in place of the measured ones: last 20 and 40, best 60 and 40.
    content = json.loads(result_file.read_text())
    for seed, means in enumerate([(60.0, 0.0, 20.0), (10.0, 0.0, 40.0)]):
        for evaluation, mean in zip(content["runs"][f"DTQL/{seed}"]["evaluations"], means, strict=True):
            evaluation["normalized_scores"] = [mean - 1, mean + 1]
    harness.write_json(result_file, content)
    (tmp_path / "docs" / "assets").mkdir(parents=True)
    (tmp_path / "docs" / "assets" / "toy.png").write_bytes(b"")
    harness.write_table(
        tmp_path / "results" / "speed.json",
        "Speed",
        ["", "ratio"],
        [["update", 2.34567], ["nothing", None]],
        pictures=[("assets/toy.png", "A toy"), ("assets/gone.png", "Gone")],
    )
    (tmp_path / "results" / "other.json").write_text('{"kind": "unknown"}')
    (tmp_path / "results" / "broken.json").write_text("{")

    page = make_page(tmp_path, monkeypatch)
    cells = [cell.strip() for cell in next(line for line in page.splitlines() if line.startswith("| DTQL |")).split("|")[1:-1]]
    assert cells[1] == "2" and cells[4] == "30.0 [20.0, 40.0]" and cells[5] == "50.0 [40.0, 60.0]" and cells[6] == "30.0"
    other = next(line for line in page.splitlines() if line.startswith("| other |"))
    assert "[" not in other  # no interval from one run
    assert "| update | 2.346 |" in page and "| nothing |  |" in page
    assert "![A toy](assets/toy.png)" in page and "gone.png" not in page
    notes = capsys.readouterr().err
    assert "skipped other.json" in notes and "skipped broken.json" in notes and "gone.png" in notes

    picture = (tmp_path / "docs" / "assets" / "pendulum.svg").read_bytes()
    assert make_page(tmp_path, monkeypatch) == page
    assert (tmp_path / "docs" / "assets" / "pendulum.svg").read_bytes() == picture


def test_profiles_over_tasks(dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """
    Methods that have two runs in each of the normalised tasks are compared; others and growing tables are not. A table
    that lacks only a second setting of a method is whole.
    """
    record = start(dataset, tmp_path)
    (tmp_path / "results" / "pendulum.json").unlink()
    rows = [("a", 0, 20.0), ("a", 1, 40.0), ("b", 0, 50.0), ("b", 1, 70.0), ("b", 2, 0.0), ("c", 0, 99.0)]
    tuned = [("b, tuned", 0, 1.0), ("b, tuned", 1, 1.0)]
    for task, shift, settings in (("one", 0.0, tuned), ("two", 10.0, tuned), ("three", 5.0, [])):
        for name, seed, last in (*rows, *settings):
            evaluations = [{**each, "normalized_scores": [last + shift] * 2} for each in record["evaluations"]]
            copy = {**record, "name": name, "seed": seed, "evaluations": evaluations}
            harness.merge(tmp_path / "results" / f"comparison_{task}.json", name, seed, copy)
    for name, seed in (("a", 0), ("a", 1), ("b", 0)):
        harness.merge(tmp_path / "results" / "comparison_grows.json", name, seed, {**record, "name": name, "seed": seed})
    lines = make_page(tmp_path, monkeypatch).splitlines()
    table = lines[lines.index("### All methods over the tasks { #comparison }") :][:12]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table if line.startswith(("| a", "| b", "| c"))]
    # The middle five of nine scores, the middle four of six
    assert [row[0] for row in cells] == ["b", "a"]
    assert cells[0][2].startswith("49.0 [") and cells[1][2].startswith("35.0 [")
    assert cells[0][1] == "3" and cells[1][1] == "2"
    assert (tmp_path / "docs" / "assets" / "comparison_profiles.svg").is_file()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (2.34567, "2.346"), (-49.31, "-49.3"), (3234.3, "3234"), (0.01234, "0.01234"), (2e7, "2e+07")],
)
def test_numbers(value: float, text: str):
    assert make_tables.number(value) == text


def test_uneven_rows_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="Each row must have 2 values"):
        harness.write_table(tmp_path / "x.json", "x", ["a", "b"], [["only one"]])


@pytest.mark.parametrize(("cls", "loss"), [(baselines.BehaviorCloning, "_actor_loss"), (baselines.TD3BC, "_critic_loss")])
def test_baselines_learn_and_come_back(cls: Any, loss: str, dataset: OfflineDataset, tmp_path: Path) -> None:
    model = cls("MlpPolicy", None, dataset=dataset, gamma=0.5, batch_size=32, learning_rate=3e-3, seed=0, device="cpu")
    before = getattr(model, loss)(model.sample_batch(60)).item()
    model.learn(200)
    assert getattr(model, loss)(model.sample_batch(60)).item() < 0.8 * before
    with pytest.warns(UserWarning, match="by name only"):
        model.save(tmp_path / "model")
    loaded = cls.load(tmp_path / "model", custom_objects={"policy_class": baselines.TD3BCPolicy})
    observations = dataset.observations[:5]
    assert np.array_equal(loaded.predict(observations)[0], model.predict(observations)[0])


def test_actors_of_one_training_are_those_of_trainings_of_their_own(dataset: OfflineDataset, tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(
        env=ENV_ID,
        dataset=dataset,
        batch_size=8,
        seed=0,
        device="cpu",
        policy_kwargs=dict(net_arch=[16], time_embedding_dim=8),
    )
    policy_class = bellman_actor_weights.SeveralActorsPolicy
    first = bellman_actor_weights.WEIGHTINGS[0]
    together = bellman_actor_weights.SeveralActors(policy_class, **first._asdict(), **settings).learn(5)
    with pytest.warns(UserWarning, match="by name only"):
        together.save(tmp_path / "model")
    custom: dict[str, Any] = {"policy_class": policy_class}
    together = together.load(tmp_path / "model", env=ENV_ID, dataset=dataset, custom_objects=custom)
    together.learn(5, reset_num_timesteps=False)
    assert [*together.policy.actors] == bellman_actor_weights.WEIGHTINGS
    distinct = set()
    for weighting, actor in together.policy.actors.items():
        alone = BellmanDiffusion("MlpPolicy", **weighting._asdict(), **settings).learn(10)
        assert all(map(th.equal, actor.parameters(), alone.actor.parameters())), weighting
        distinct.add(th.nn.utils.parameters_to_vector(actor.parameters()).detach().numpy().tobytes())
    temperatures = {weighting.temperature for weighting in bellman_actor_weights.WEIGHTINGS}
    assert len(distinct) > len(temperatures), "temperatures make a difference, and so does the smallest bound"


def test_operations_are_counted_from_sizes() -> None:
    left, right = th.zeros(3, 5), th.zeros(5, 7)
    assert count_operations(lambda: left @ right) == 2 * 3 * 5 * 7
    assert count_operations(lambda: th.zeros(3, 7).addmm_(left, right)) == 2 * 3 * 5 * 7


def test_timing_is_relative_to_the_reference_just_before() -> None:
    """A machine that grows slower changes both."""
    seconds = iter([1.0, 3.0, 10.0, 30.0, 100.0, 300.0])
    now = [0.0]

    def part() -> None:
        now[0] += next(seconds)

    timing = paired_timing(part, part, n_repetitions=2, n_warm_up=1, clock=lambda: now[0])
    assert timing == pytest.approx((165_000.0, 3.0))


def test_speed_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []
    for again in (False, False, True):
        table = speed.Table(tmp_path / "speed.json", again, repetitions=1)
        if table.lacks("method", "eager", "part"):
            table.measure(("method", "eager", "part"), lambda: calls.append(1), operations=speed.UNIT_OPERATIONS)
        if table.lacks("machine", "eager", "part"):
            table.measure(("machine", "eager", "part"), lambda: None, operations=0)
    assert len(calls) == 2 * 4  # one repetition and three before it
    content = json.loads((tmp_path / "speed.json").read_text())
    assert [row[:3] for row in content["rows"]] == [["method", "eager", "part"], ["machine", "eager", "part"]]
    assert content["rows"][0][5] == 1.0 and content["rows"][1][5:] == [None, None]
    assert content["rows"][0][2] in make_tables.table_section("speed", content, tmp_path)


def test_data_scale_writes_loads_and_learns(tmp_path: Path) -> None:
    script, result = Path("benchmarks/data_scale.py").resolve(), tmp_path / "scale.json"
    options = ["--steps", "2000", "4000", "--updates", "2", "--folder", str(tmp_path), "--out", str(result)]
    subprocess.run([sys.executable, str(script), *options], check=True, cwd=tmp_path)
    rows = json.loads(result.read_text())["rows"]
    assert [row[0] for row in rows] == [2000, 4000] and rows[0][1] * 2 == pytest.approx(rows[1][1], abs=1)
    assert list(tmp_path.iterdir()) == [result]
