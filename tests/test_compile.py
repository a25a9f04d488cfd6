"""Compiled losses: equal to those that run as written, absent from files, and given up where there is no compiler."""

import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from algos import ALGOS, VARIANTS, AlgoSpec
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from sb3_diffusion import DTQL, Diffuser, DiffusionQL, OfflineDataset
from sb3_diffusion.common import compilation

N_UPDATES = 3


def first_is_quick(specs: list[AlgoSpec]) -> list[Any]:
    """Compiling takes many seconds: one algorithm stands for all in the quick suite."""
    return [pytest.param(s, id=s.name, marks=[pytest.mark.expensive] if i > 0 else []) for i, s in enumerate(specs)]


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Each test compiles anew."""
    _forget()
    yield
    _forget()


def _forget() -> None:
    th.compiler.reset()
    counters.clear()
    compilation._compiled.cache_clear()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's graphs and derivatives, without the minutes that machine code takes."""
    monkeypatch.setattr(th, "compile", functools.partial(th.compile, backend="aot_eager"))


@pytest.fixture
def no_compiler() -> Iterator[None]:
    with inductor.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        yield


def assert_same_updates(spec: AlgoSpec, data: OfflineDataset) -> None:
    eager, compiled = (spec.make(dataset=data, compile=compile).learn(N_UPDATES) for compile in (False, True))
    assert counters["stats"]["unique_graphs"] > 0
    assert not compiled._compiler_failed
    assert not counters["graph_break"]
    expected, got = eager.policy.state_dict(), compiled.policy.state_dict()
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        th.testing.assert_close(got[name], value, rtol=1e-3, atol=2e-5, msg=lambda message, name=name: f"{name}: {message}")


@pytest.mark.parametrize("spec", first_is_quick(VARIANTS))
def test_updates_are_the_same(spec: AlgoSpec, box_dataset: OfflineDataset, traced: None) -> None:
    assert_same_updates(spec, box_dataset)


@pytest.mark.expensive
def test_updates_are_the_same_in_machine_code(spec: AlgoSpec, box_dataset: OfflineDataset) -> None:
    assert_same_updates(spec, box_dataset)


@pytest.mark.parametrize("algorithm", [DTQL, pytest.param(DiffusionQL, marks=pytest.mark.expensive)])
def test_actor_loss_asks_for_no_other_gradients(algorithm: Any, box_dataset: OfflineDataset, traced: None) -> None:
    arguments: dict[str, Any] = dict(dataset=box_dataset, n_imitation_steps=0, policy_kwargs=dict(net_arch=[8]))
    model = algorithm("MlpPolicy", None, compile=True, **arguments)
    wanted = {name for name, parameter in model.policy.named_parameters() if parameter.requires_grad}
    batch = model.sample_batch(8)
    if algorithm is DTQL:
        loss = model._actor_loss(batch, model._draw_action_noise(batch.observations), *model._draw_corruption(batch))
    else:
        loss, *_ = model._actor_loss(batch, *model._draw_corruption(batch), *model._draw_for_q_loss(batch))
    assert {name for name, parameter in model.policy.named_parameters() if parameter.requires_grad} == wanted
    learned = {name for name in wanted if name.startswith("actor.")}
    parameters = [model.policy.get_parameter(name) for name in wanted]
    gradients = zip(wanted, th.autograd.grad(loss, parameters, allow_unused=True), strict=True)
    assert {name for name, gradient in gradients if gradient is not None} == learned


@pytest.mark.parametrize("spec", first_is_quick(ALGOS))
def test_files(spec: AlgoSpec, box_dataset: OfflineDataset, traced: None, tmp_path: Path) -> None:
    model = spec.make(dataset=box_dataset, compile=True).learn(1)
    model.save(tmp_path / "model")
    loaded = spec.cls.load(tmp_path / "model", dataset=box_dataset)
    plain = spec.cls.load(tmp_path / "model", dataset=box_dataset, compile=False)
    assert (loaded.compile, plain.compile) == (True, False)
    plain.set_parameters(model.get_parameters())
    loaded.learn(1, reset_num_timesteps=False)
    plain.learn(1, reset_num_timesteps=False)
    for got, expected in zip(loaded.policy.parameters(), plain.policy.parameters(), strict=True):
        th.testing.assert_close(got, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("spec", first_is_quick(ALGOS))
def test_without_a_compiler(spec: AlgoSpec, box_dataset: OfflineDataset, no_compiler: None) -> None:
    model = spec.make(dataset=box_dataset, compile=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.learn(N_UPDATES)
    assert sum("cannot be compiled" in str(warning.message) for warning in caught) == 1
    eager = spec.make(dataset=box_dataset).learn(N_UPDATES)
    for got, expected in zip(model.policy.parameters(), eager.policy.parameters(), strict=True):
        assert th.equal(got, expected)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.expensive)])
def test_plans_are_the_same(backend: str, box_dataset: OfflineDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(th, "compile", functools.partial(th.compile, backend=backend))
    spec = next(spec for spec in ALGOS if spec.cls is Diffuser)
    eager, compiled = (spec.make(dataset=box_dataset, compile=compile, n_candidates=2) for compile in (False, True))
    compiled.set_parameters(eager.get_parameters())
    graphs = []
    for n in (3, 5, 2, 9, 4):
        expected, got = (model.plan(box_dataset.observations[:n], seed=0) for model in (eager, compiled))
        np.testing.assert_allclose(got.actions, expected.actions, atol=1e-4)
        np.testing.assert_allclose(got.values, expected.values, atol=1e-3)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and not counters["graph_break"]
    assert graphs[1:] == [graphs[1]] * 4  # the second size makes a graph for all sizes


def test_plans_without_a_compiler(box_dataset: OfflineDataset, no_compiler: None) -> None:
    spec = next(spec for spec in ALGOS if spec.cls is Diffuser)
    model = spec.make(dataset=box_dataset, compile=True)
    with pytest.warns(UserWarning, match="Plans cannot be compiled"):
        plan = model.plan(box_dataset.observations[:2], seed=0)
    again = model.plan(box_dataset.observations[:2], seed=0)
    np.testing.assert_array_equal(plan.actions, again.actions)


def test_choices(box_dataset: OfflineDataset) -> None:
    arguments: dict[str, Any] = dict(dataset=box_dataset, device="cpu", policy_kwargs=dict(net_arch=[8]))
    with pytest.raises(ValueError, match="compile"):
        DTQL("MlpPolicy", None, compile="fast", **arguments)
    with pytest.warns(UserWarning, match="no CUDA graphs on cpu"):
        model = DTQL("MlpPolicy", None, compile="cuda_graphs", **arguments)
    assert np.isfinite(model.predict(box_dataset.observations[:2])[0]).all()
