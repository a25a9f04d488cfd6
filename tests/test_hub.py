"""A model packed for a hub comes back equal, and its card tells what was measured."""

import json
from pathlib import Path

import numpy as np
import pytest
from envs import POINT_ENV

from sb3_diffusion import DiffusionQL, OfflineDataset
from sb3_diffusion.cli import main
from sb3_diffusion.evaluation import evaluate
from sb3_diffusion.hub import load_package, write_package

huggingface_hub = pytest.importorskip("huggingface_hub")


def make_model(dataset: OfflineDataset) -> DiffusionQL:
    policy_kwargs = dict(net_arch=[8])
    return DiffusionQL(
        "MlpPolicy", POINT_ENV, dataset=dataset, batch_size=4, seed=0, device="cpu", policy_kwargs=policy_kwargs
    )


def test_package(box_dataset: OfflineDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("scipy")
    model = make_model(box_dataset).learn(3)
    result = evaluate(model, POINT_ENV, 4, seed=0)
    film = tmp_path / "film.gif"
    film.write_bytes(b"GIF")
    folder = write_package(
        model, tmp_path / "hub" / "dql-point", env_id=POINT_ENV, result=result, commands=["train it"], license="cc-by-4.0",
        files=[film],
    )  # fmt: skip
    assert {path.name for path in folder.iterdir()} == {"README.md", "model.zip", "results.json", "film.gif"}

    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.license == "cc-by-4.0" and card.data.model_name == "dql-point"
    (metric,) = card.data.eval_results
    assert metric.metric_value == f"{result.mean:.2f} +/- {result.std:.2f}" and metric.dataset_name == POINT_ENV
    assert "`train it`" in card.text and f"`{box_dataset.name}`" in card.text and "3 timesteps" in card.text
    report = json.loads((folder / "results.json").read_text())
    assert report["evaluation"]["returns"] == pytest.approx(result.returns.tolist())
    assert report["environment"]["libraries"]["torch"]

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    with monkeypatch.context() as patch:
        for module in ("pickle", "cloudpickle"):
            for name in ("load", "loads"):
                patch.setattr(f"{module}.{name}", refuse)
        loaded = load_package(folder, env=POINT_ENV, device="cpu")
    assert type(loaded) is DiffusionQL
    observations = box_dataset.observations[:5]
    expected = model.predict(observations, deterministic=True)[0]
    np.testing.assert_array_equal(loaded.predict(observations, deterministic=True)[0], expected)

    with pytest.raises(FileExistsError, match="not empty"):
        write_package(model, folder, env_id=POINT_ENV, result=result)
    with pytest.raises(FileNotFoundError, match=r"no model\.zip"):
        load_package(tmp_path)


def test_package_command(box_dataset: OfflineDataset, tmp_path: Path, capsys: pytest.CaptureFixture):
    make_model(box_dataset).learn(1).save(tmp_path / "model")
    settings = {"algo": None, "dataset": None, "env": POINT_ENV, "seed": 0, "commands": ["sb3-diffusion train --steps 1"]}
    (tmp_path / "train.json").write_text(json.dumps(settings))
    assert main(["package", str(tmp_path / "model.zip"), str(tmp_path / "out"), "--episodes", "2"]) == 0
    assert "README.md, model.zip, results.json" in " ".join(capsys.readouterr().out.split())
    assert "`sb3-diffusion train --steps 1`" in (tmp_path / "out" / "README.md").read_text()
    assert load_package(tmp_path / "out").num_timesteps == 1
    card, out = tmp_path / "out" / "README.md", tmp_path / "sampled"
    assert "2 episodes of this one model, deterministic actions" in card.read_text()
    assert main(["package", str(tmp_path / "model.zip"), str(out), "--episodes", "2", "--stochastic"]) == 0
    assert "2 episodes of this one model, sampled actions" in (out / "README.md").read_text()
    results = [json.loads((card.parent / "results.json").read_text()), json.loads((out / "results.json").read_text())]
    assert [each["deterministic"] for each in results] == [True, False]
    assert results[0]["evaluation"]["returns"] != results[1]["evaluation"]["returns"]
