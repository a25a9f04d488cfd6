"""
The Python of README.md and of the pages runs.

All blocks of a page share their names and a folder, as somebody who follows the page would have it. HTML comments, which
readers do not see, tell what a block needs:

- ``<!-- run: short -->`` before a block: it asks for minutes or hours, so that each ``learn`` ends after a few timesteps here;
- ``<!-- run: long -->``: slow even so; run with the tests that are marked ``expensive``, with ``learn`` cut short too;
- ``<!-- run: no, REASON -->``: not run;
- ``<!-- setup CODE -->``: runs there, for what the text takes for granted.

Data sets of the names that the pages use are small here, recorded in the real environments by the real writers.
"""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_diffusion import OfflineAlgorithm, OfflineDataset, load_dataset
from sb3_diffusion.datasets import write_dataset

ROOT = Path(__file__).parent.parent
PAGES = [
    path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if "```python" in path.read_text("utf-8")
]
SHORT = 3
"""Timesteps of a ``learn`` that is cut short."""
PART = re.compile(
    r"<!-- setup\n(?P<setup>.*?)\n-->|(?:<!-- run: (?P<mode>.*?) -->\n+)?^```python\n(?P<code>.*?)^```",
    re.DOTALL | re.MULTILINE,
)
MODES = ("short", "long", "no")


class Block(NamedTuple):
    """
    A piece of code.

    :ivar code: Python
    :ivar mode: as it stands, ``"short"``, ``"long"`` or ``"no"``
    :ivar line: of its first line in the page
    """

    code: str
    mode: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    found = []
    for part in PART.finditer(text):
        name = "setup" if part["setup"] is not None else "code"
        mode = re.split(r"[, ]", part["mode"])[0] if part["mode"] else ""
        assert mode in ("", *MODES), f"{page}: unknown mode {part['mode']!r}"
        assert mode != "no" or len(part["mode"]) > 8, f"{page}: say why a block is not run"
        found.append(Block(part[name], mode, text.count("\n", 0, part.start(name)) + 1))
    assert sum(block.code in text for block in found) >= text.count("```python"), f"{page}: a block was not found"
    return found


def random_episodes(env_id: str, n_episodes: int = 12) -> OfflineDataset:
    """Random actions in a real environment."""
    env = gym.make(env_id)
    env.action_space.seed(0)
    rows: list[tuple] = []
    for seed in range(n_episodes):
        observation, _ = env.reset(seed=seed)
        ended = False
        while not ended:
            action = env.action_space.sample()
            following, reward, terminated, truncated, _ = env.step(action)
            rows.append((observation, action, reward, following, terminated, truncated))
            observation, ended = following, terminated or truncated
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    arrays = dict(zip(names, (np.array(column) for column in zip(*rows, strict=True)), strict=True))
    return load_dataset(arrays, env_spec=env_id)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some episodes of random actions under the names of the pages."""
    pytest.importorskip("mujoco")
    pytest.importorskip("minari")
    folder = tmp_path_factory.mktemp("data")
    dataset = random_episodes("Hopper-v5")
    dataset.ref_min_score, dataset.ref_max_score = -20.0, 3234.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder / "minari"))
        write_dataset(dataset, "mujoco/hopper/medium-v0")
        load_dataset("sb3-diffusion/pendulum/mixed-v0")
        write_dataset(dataset, folder / "d4rl" / "hopper_medium-v2.hdf5")
        write_dataset(random_episodes("Walker2d-v5"), folder / "d4rl" / "walker2d_medium_expert-v2.hdf5")
    return folder


def cut_short(learn: Callable[..., Any]) -> Callable[..., Any]:
    def learn_a_little(self: Any, total_timesteps: int | None = None, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("progress_bar", None)
        return learn(self, min(SHORT, total_timesteps or SHORT), *args, **kwargs)

    return learn_a_little


def run_page(page: Path, modes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        if block.mode not in modes:
            continue
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")  # so that an error tells the line of the page
        with monkeypatch.context() as patch:
            if block.mode in ("short", "long"):
                for cls in (OfflineAlgorithm, OffPolicyAlgorithm):
                    patch.setattr(cls, "learn", cut_short(cls.learn))
            exec(code, names)


@pytest.fixture(autouse=True)
def surroundings(data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(data_folder / "minari"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(data_folder / "d4rl"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(page: Path, monkeypatch: pytest.MonkeyPatch):
    run_page(page, ("", "short"), monkeypatch)


LONG_PAGES = [page for page in PAGES if any(block.mode == "long" for block in blocks(page))]


@pytest.mark.expensive
@pytest.mark.parametrize("page", LONG_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_long_page(page: Path, monkeypatch: pytest.MonkeyPatch):
    run_page(page, ("", "short", "long"), monkeypatch)


SHELL = re.compile(r"(?:<!-- run: (?P<mode>no.*?) -->\n+)?^```bash\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)
SHELL_PAGES = (("command_line", "sharing"), ("sweeps",), ("zoo",))
"""Guides whose commands run one after the other in one folder."""


@pytest.mark.expensive
@pytest.mark.parametrize("pages", SHELL_PAGES, ids=" ".join)
def test_commands(pages: tuple[str, ...]) -> None:
    ran = 0
    for page in pages:
        for block in SHELL.finditer((ROOT / "docs" / "guide" / f"{page}.md").read_text("utf-8")):
            if block["mode"] is not None:
                continue
            lines = [line for line in block["code"].splitlines() if not line.startswith(("pip install", "#"))]
            done = subprocess.run(["bash", "-e", "-c", "\n".join(lines)], capture_output=True, text=True, timeout=3_600)
            assert done.returncode == 0, f"{page}:\n{block['code']}\n{done.stderr[-3000:]}"
            ran += 1
    assert ran > 0
