"""Statistics of runs against slow ones, pictures, and the page of a benchmark in a real browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from sb3_diffusion.evaluation import (
    estimate,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
)
from sb3_diffusion.evaluation.plots import (
    Curve,
    plot_comparison,
    plot_improvement,
    plot_learning_curves,
    plot_performance_profiles,
)
from sb3_diffusion.evaluation.report import write_report
from sb3_diffusion.evaluation.results import read_runs, summarize
from sb3_diffusion.plotting import save_figure

BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)


@pytest.fixture
def scores() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    first = rng.normal(60.0, 20.0, (7, 3)) + np.array([0.0, 30.0, 60.0])
    second = rng.normal(50.0, 20.0, (5, 3)) + np.array([0.0, 30.0, 60.0])
    second[0] = first[0]  # ties
    return first, second


def resampled(*tables: np.ndarray, n: int = 2_000) -> list[list[np.ndarray]]:
    """Tables with the runs of each task drawn again, task by task."""
    rng = np.random.default_rng(1)

    def draw(table: np.ndarray) -> np.ndarray:
        columns = [table[rng.integers(len(table), size=len(table)), task] for task in range(table.shape[1])]
        return np.stack(columns, axis=1)

    return [[draw(table) for table in tables] for _ in range(n)]


def slow_improvement(first: np.ndarray, second: np.ndarray) -> float:
    shares = []
    for task in range(first.shape[1]):
        wins = 0.0
        for x in first[:, task]:
            for y in second[:, task]:
                wins += 1.0 if x > y else 0.5 if x == y else 0.0
        shares.append(wins / (len(first) * len(second)))
    return float(np.mean(shares))


def test_probability_of_improvement(scores):
    first, second = scores
    found = probability_of_improvement(first, second)
    assert found.value == pytest.approx(slow_improvement(first, second))
    assert probability_of_improvement(second, first).value == pytest.approx(1.0 - found.value)
    values = [slow_improvement(*tables) for tables in resampled(first, second, n=500)]
    np.testing.assert_allclose(found[1:], np.percentile(values, [2.5, 97.5]), atol=0.04)
    assert probability_of_improvement([1.0, 2.0], [0.0, 0.5]) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="same tasks: got 3 and 2"):
        probability_of_improvement(first, second[:, :2])


def test_performance_profile(scores):
    table, _ = scores
    thresholds = np.array([-1e6, 40.0, table[2, 1], 120.0, 1e6])  # a score itself is not above itself

    def slow(values: np.ndarray) -> list[float]:
        return [np.mean([(values[:, task] > tau).mean() for task in range(3)]) for tau in thresholds]

    share, low, high = performance_profile(table, thresholds)
    np.testing.assert_allclose(share, slow(table))
    assert share[0] == 1.0 and share[-1] == 0.0
    ends = np.percentile([slow(values) for (values,) in resampled(table)], [2.5, 97.5], axis=0)
    np.testing.assert_allclose([low, high], ends, atol=0.05)
    with pytest.raises(ValueError, match="`thresholds`"):
        performance_profile(table, [])


def test_optimality_gap(scores):
    table, _ = scores

    def slow(values: np.ndarray) -> float:
        return float(np.mean([100.0 - min(score, 100.0) for score in values.ravel()]))

    assert optimality_gap(table) == pytest.approx(slow(table))
    assert optimality_gap([150.0, 200.0]) == 0.0
    found = estimate(table, statistic="optimality_gap")
    assert found.value == pytest.approx(slow(table))
    ends = np.percentile([slow(values) for (values,) in resampled(table)], [2.5, 97.5])
    np.testing.assert_allclose(found[1:], ends, atol=0.6)
    assert optimality_gap(table, target=50.0) < found.value


def test_pictures(scores, tmp_path: Path):
    pytest.importorskip("matplotlib")
    first, second = scores
    curves = {"a": Curve(np.array([1, 2, 3]), first), "b": Curve(np.array([1, 2, 3]), second[:1])}
    methods = {"a": first, "b": second}
    figures = [
        plot_learning_curves(curves, references={"data": 40.0}),
        plot_comparison(methods),
        plot_performance_profiles(methods),
        plot_improvement(methods),
    ]
    for i, figure in enumerate(figures):
        assert save_figure(figure, tmp_path / "new" / f"{i}.png").read_bytes().startswith(b"\x89PNG")
    drawn = figures[0].axes[0].lines[0].get_ydata()
    np.testing.assert_allclose(drawn, [np.sort(column)[1:-1].mean() for column in first.T])
    bars = [bar.get_width() for bar in figures[1].axes[1].patches]  # the panel of the means
    np.testing.assert_allclose(bars, [first.mean(), second.mean()])
    with pytest.raises(ValueError, match="at least two methods"):
        plot_improvement({"a": first})


def record(name: str, seed: int, means: list[float]) -> dict:
    evaluations = [
        {"timestep": 10 * (i + 1), "returns": [0.0, 0.0], "normalized_scores": [mean - 1, mean + 1]}
        for i, mean in enumerate(means)
    ]
    environment = {"commit": None, "processor": "P", "cpu_count": 2, "torch_threads": 1, "device": "cpu", "python": "3"}
    behavior = {"mean": 0.0, "best": 0.0, "normalized_mean": 33.3, "normalized_best": 50.0}
    return {
        "name": name,
        "seed": seed,
        "total_timesteps": 10 * len(means),
        "n_evaluations": len(means),
        "n_eval_episodes": 2,
        "evaluations": evaluations,
        "behavior": behavior,
        "train_seconds": 60.0,
        "wall_seconds": 90.0,
        "timesteps_per_second": 5.0,
        "environment": {**environment, "libraries": {"torch": "2"}},
        "commands": ["sb3-diffusion benchmark --algo <b>dtql</b>"],
    }


@pytest.fixture
def result_file(tmp_path: Path) -> Path:
    records = [record("A & B", 1, [10.0, 60.0, 20.0]), record("A & B", 0, [0.0, 0.0, 40.0]), record("C", 0, [1.0, 2.0, 3.0])]
    path = tmp_path / "runs.json"
    runs = {f"{r['name']}/{r['seed']}": r for r in records}
    path.write_text(json.dumps({"kind": "runs", "title": "Title", "text": "Text.", "runs": runs}))
    return path


def test_summary(result_file: Path):
    groups = read_runs(result_file)
    summary = summarize(groups["A & B"])
    assert summary["seeds"] == [0, 1] and summary["unit"].startswith("normalised")
    assert summary["last"]["scores"] == [40.0, 20.0] and summary["best"]["scores"] == [40.0, 60.0]
    assert summary["last"]["iqm"] == {"value": 30.0, "low": 20.0, "high": 40.0}
    assert summary["last"]["optimality_gap"]["value"] == 70.0
    assert summarize(groups["C"])["last"]["iqm"] == {"value": 3.0, "low": None, "high": None}
    json.dumps(summary, allow_nan=False)
    (result_file.parent / "none.json").write_text('{"runs": {}}')
    with pytest.raises(ValueError, match="no finished runs"):
        read_runs(result_file.parent / "none.json")


def test_report_names_all_protocols(result_file: Path, tmp_path: Path):
    content = json.loads(result_file.read_text())
    content["runs"]["C/0"] |= {"n_evaluations": 1, "evaluations": content["runs"]["C/0"]["evaluations"][:1]}
    result_file.write_text(json.dumps(content))
    page = write_report(result_file, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<li>1 evaluations of 2 episodes" in page and "<li>3 evaluations of 2 episodes" in page


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine (Debian: apt install chromium)")
def test_report_in_a_browser(result_file: Path, tmp_path: Path):
    """What the browser made of the page: tables as text, every picture decoded, nothing asked of the network."""
    page = write_report(result_file, tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!data:)""", page) and "url(" not in page
    probe = """<script>addEventListener("load", () => {
      const all = [...document.images].map(image => image.complete ? image.naturalWidth : 0);
      document.body.dataset.pictures = JSON.stringify(all);
      const asked = performance.getEntriesByType("resource").filter(entry => !entry.name.startsWith("data:"));
      document.body.dataset.requests = asked.length;
      document.body.dataset.overflow = document.documentElement.scrollWidth - innerWidth;
    })</script></body>"""
    probed = tmp_path / "probed.html"
    probed.write_text(page.replace("</body>", probe), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += ["--virtual-time-budget=5000", "--dump-dom", probed.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    dom = done.stdout
    widths = json.loads(re.search(r'data-pictures="([^"]*)"', dom)[1])
    assert len(widths) == 4 and min(widths) > 500  # curves, averages, profile, improvement
    assert 'data-requests="0"' in dom
    assert int(re.search(r'data-overflow="(-?\d+)"', dom)[1]) <= 0
    table = re.search(r'<table id="scores">(.*?)</table>', dom, re.DOTALL)[1]
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in table.split("</tr>")][1]
    assert cells[:6] == ["A &amp; B", "2", "30", "33.3", "30.0 [20.0, 40.0]", "50.0 [40.0, 60.0]"]
    assert "&lt;b&gt;dtql&lt;/b&gt;" in dom  # text from the file stays text
