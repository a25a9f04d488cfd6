"""Other people's loggers on a run: what SB3's logger writes, read back, and Weights & Biases without a network."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from algos import ALGOS, AlgoSpec
from stable_baselines3.common.callbacks import LogEveryNTimesteps
from stable_baselines3.common.logger import configure

from sb3_diffusion import OfflineDataset


def test_formats_agree(spec: AlgoSpec, box_dataset: OfflineDataset, tmp_path: Path):
    """CSV, JSON and TensorBoard hold the same numbers at the same timesteps."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = spec.make(dataset=box_dataset)
    model.set_logger(configure(str(tmp_path), ["csv", "json", "tensorboard"]))
    model.learn(6, callback=LogEveryNTimesteps(2))
    with open(tmp_path / "progress.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    events = EventAccumulator(str(tmp_path)).Reload()
    names = [name for name in lines[0] if name.endswith("_loss")]
    assert names and len(rows) == len(lines) == 3
    for name in names:
        values = [line[name] for line in lines]
        assert all(isinstance(value, float) and np.isfinite(value) for value in values)
        assert [float(row[name]) for row in rows] == pytest.approx(values)
        scalars = events.Scalars(name)
        assert [event.step for event in scalars] == [2, 4, 6]
        assert [event.value for event in scalars] == pytest.approx(values, rel=1e-5)


def test_weights_and_biases_offline(box_dataset: OfflineDataset, tmp_path: Path, monkeypatch):
    """Its callback takes the settings of the model, its synchronisation of TensorBoard the losses."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed (it is large, and no dependency)")
    pytest.importorskip("tensorboard")
    from wandb.integration.sb3 import WandbCallback

    monkeypatch.setenv("WANDB_SILENT", "true")
    spec = ALGOS[0]
    with wandb.init(mode="offline", dir=str(tmp_path), project="tests", sync_tensorboard=True) as run:
        model = spec.make(dataset=box_dataset, tensorboard_log=str(tmp_path / "tb"))
        model.learn(4, callback=[LogEveryNTimesteps(2), WandbCallback(model_save_path=str(tmp_path / "models"))])
        config, folder = dict(run.config), Path(run.dir).parent
    wandb.tensorboard.unpatch()
    assert config["algo"] == spec.cls.__name__ and config["batch_size"] == 8
    assert spec.cls.load(tmp_path / "models" / "model.zip").num_timesteps == 4
    (record,) = folder.glob("*.wandb")
    assert b"train/n_updates" in record.read_bytes() or b"_loss" in record.read_bytes()
