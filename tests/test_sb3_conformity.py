"""
SB3's own tests, called with the algorithms of this package.

SB3's ``tests`` folder is not part of any package: unpack the sources of the installed version and set ``SB3_TESTS_DIR``.
What these tests check on algorithms that are no off-policy algorithms for continuous actions stands in our own test files.
"""

import importlib
import inspect
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch as th
from algos import ALGOS, AlgoSpec

from sb3_diffusion import EpisodeReplayBuffer

FOLDER = os.environ.get("SB3_TESTS_DIR")
OFF_POLICY = ("TD3", "DDPG")  # our class takes their names, so that it is tested as they are
CLASS_ARGUMENTS = ("model_class", "algo")


class Upstream(NamedTuple):
    """
    A test of SB3.

    :ivar module: its file
    :ivar function: its name
    :ivar replace: names in the file that our class takes
    :ivar needs: features without which an algorithm is spared it
    :ivar leave_out: values of its parameters that are left out
    """

    module: str
    function: str
    replace: tuple[str, ...] = OFF_POLICY
    needs: tuple[str, ...] = ()
    leave_out: dict[str, tuple] = {}


SAC = ("SAC",)
UPSTREAM = [
    Upstream("test_run", "test_deterministic_pg"),
    Upstream("test_run", "test_offpolicy_multi_env", needs=("critics",)),
    Upstream("test_run", "test_train_freq", SAC, needs=("critics",)),
    Upstream("test_run", "test_train_freq_fail", SAC, needs=("critics",)),
    Upstream("test_run", "test_n_critics", SAC, needs=("critics",)),
    Upstream("test_save_load", "test_save_load"),
    Upstream("test_save_load", "test_set_env"),
    Upstream("test_save_load", "test_exclude_include_saved_params"),
    Upstream("test_save_load", "test_save_load_policy", needs=("images",), leave_out={"use_sde": (True,)}),
    Upstream("test_save_load", "test_save_load_replay_buffer"),
    Upstream("test_save_load", "test_warn_buffer"),
    Upstream("test_save_load", "test_save_load_env_cnn", needs=("images",)),
    Upstream("test_save_load", "test_no_resource_warning", SAC, needs=("critics",)),
    Upstream("test_predict", "test_auto_wrap"),
    Upstream("test_predict", "test_predict", leave_out={"env_id": ("CartPole-v1",)}),
    Upstream("test_predict", "test_subclassed_space_env"),
    Upstream("test_deterministic", "test_deterministic_training_common"),
    Upstream("test_callbacks", "test_callbacks"),
    Upstream("test_callbacks", "test_callbacks_can_cancel_runs"),
    Upstream("test_spaces", "test_identity_spaces", needs=("multi_discrete",)),
    Upstream("test_spaces", "test_action_spaces"),
    Upstream("test_spaces", "test_float64_action_space"),
    Upstream("test_custom_policy", "test_custom_offpolicy"),
    Upstream("test_custom_policy", "test_custom_optimizer"),
    Upstream("test_identity", "test_continuous", needs=("learns_online",)),
    Upstream("test_dict_env", "test_consistency"),
    Upstream("test_dict_env", "test_dict_spaces", needs=("images",)),
    Upstream("test_dict_env", "test_multiprocessing", needs=("images",)),
    Upstream("test_dict_env", "test_dict_vec_framestack", needs=("images",)),
    Upstream("test_dict_env", "test_vec_normalize", needs=("images",)),
    Upstream("test_cnn", "test_cnn", needs=("images",)),
    Upstream("test_cnn", "test_features_extractor_target_net", SAC, needs=("images",)),
    Upstream("test_cnn", "test_image_like_input", needs=("images",)),
    Upstream("test_her", "test_her", needs=("her", "images")),
    Upstream("test_her", "test_multiprocessing", needs=("her", "images")),
    Upstream("test_her", "test_save_load", needs=("her",)),
    Upstream("test_her", "test_save_load_replay_buffer", SAC, needs=("her",)),
    Upstream("test_her", "test_truncate_last_trajectory", SAC, needs=("her",)),
    Upstream("test_vec_normalize", "test_offpolicy_normalization"),
    Upstream("test_vec_normalize", "test_her_normalization", SAC, needs=("her",)),
    Upstream("test_train_eval_mode", "test_offpolicy_collect_rollout_batch_norm"),
    Upstream("test_train_eval_mode", "test_predict_with_dropout_batch_norm", leave_out={"env_id": ("CartPole-v1",)}),
    Upstream("test_n_step_replay", "test_run", needs=("n_steps",)),
    Upstream("test_tensorboard", "test_tensorboard", leave_out={"model_name": ("a2c", "ppo", "sac")}),
]


def upstream_module(name: str) -> ModuleType:
    """A file of SB3's tests, as part of the package that their folder is: sub-processes find it by that name."""
    assert FOLDER is not None
    folder = Path(FOLDER).resolve()
    if str(folder.parent) not in sys.path:
        sys.path.append(str(folder.parent))  # at the end: the sources beside it must not hide the installed SB3
    module = importlib.import_module(f"{folder.name}.{name}")
    if Path(str(module.__file__)).parent != folder:
        raise ImportError(f"SB3_TESTS_DIR must be the folder `tests` of SB3's sources, {folder}: got {module.__file__}.")
    return module


def argument_sets(function: Callable, leave_out: dict[str, tuple]) -> Iterator[dict[str, Any]]:
    """
    The parameter sets of an upstream test that one of the off-policy algorithms for continuous actions is tested with;
    the class is not in them.
    """
    axes = []
    for mark in getattr(function, "pytestmark", []):
        if mark.name != "parametrize":
            continue
        names, values = mark.args
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        rows = []
        for value in values:
            row = dict(zip(names, value if len(names) > 1 else (value,), strict=True))
            cls = next((row.pop(name) for name in CLASS_ARGUMENTS if name in row), None)
            stands_for_us = cls is None or cls.__name__ in ("TD3", "DDPG", "SAC")
            if stands_for_us and not any(row.get(name) in values for name, values in leave_out.items()):
                rows.append(row)
        axes.append([row for i, row in enumerate(rows) if not row or row not in rows[:i]])
        if all(not row for row in axes[-1]):  # the mark is about the class alone
            axes[-1] = axes[-1][:1]
    for combination in itertools.product(*axes):
        yield {name: value for row in combination for name, value in row.items()}


def cases() -> list[Any]:
    """One test for each algorithm, upstream function and set of parameters."""
    if FOLDER is None:
        return []
    found = []
    for upstream in UPSTREAM:
        function = getattr(upstream_module(upstream.module), upstream.function)
        for i, arguments in enumerate(argument_sets(function, upstream.leave_out)):
            found.append(pytest.param(upstream, arguments, id=f"{upstream.module[5:]}-{upstream.function[5:]}-{i}"))
    return found


def running_statistics(model: Any) -> list[th.Tensor]:
    """Copies of the running statistics and the biases of batch normalisation in all networks."""
    layers = [module for module in model.policy.modules() if isinstance(module, th.nn.BatchNorm1d)]
    assert layers
    return [tensor.clone() for layer in layers for tensor in (layer.bias, layer.running_mean)]


def with_one_learning_rate(cls: type) -> type:
    """The class with all its learning rates equal to ``learning_rate``, which is the one that SB3's tests set."""
    one_rate = {name: None for name in inspect.signature(cls).parameters if name.endswith("_learning_rate")}

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, *args, **{**one_rate, **kwargs})  # type: ignore[misc]

    return type(cls.__name__, (cls,), {"__init__": init, "__module__": cls.__module__})


def should_differ(parameters: Iterable[th.Tensor], others: Iterable[th.Tensor]) -> None:
    """Each tensor differs from the other, by however little."""
    assert not any(th.equal(*pair) for pair in zip(parameters, others, strict=False))


class RunName(str):
    """A name that upper() leaves alone: the folder of a TensorBoard run is named after the class."""

    def upper(self) -> str:
        return str(self)


@pytest.mark.skipif(FOLDER is None, reason="SB3_TESTS_DIR does not point to the folder `tests` of SB3's sources")
@pytest.mark.parametrize(("upstream", "arguments"), cases())
def test_upstream(
    upstream: Upstream,
    arguments: dict[str, Any],
    spec: AlgoSpec,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec.need(*upstream.needs)
    module = upstream_module(upstream.module)
    function = getattr(module, upstream.function)
    cls: type[Any] = spec.cls
    if upstream.function == "test_features_extractor_target_net":
        cls = with_one_learning_rate(cls)
        # A critic may hold more than its target, as DTQL's holds a state value, after what both have
        monkeypatch.setattr(module, "zip", lambda *iterables, strict: zip(*iterables, strict=False), raising=False)
        # A scale of layer normalisation is near 1, and the average of one moves by less than allclose() can tell from 0
        monkeypatch.setattr(module, "params_should_differ", should_differ)
    for name in upstream.replace:
        monkeypatch.setattr(module, name, cls, raising=False)
    if hasattr(module, "CLONE_HELPERS"):
        monkeypatch.setitem(module.CLONE_HELPERS, spec.cls, running_statistics)
    if hasattr(module, "MODEL_DICT"):
        arguments = {"model_name": RunName(spec.cls.__name__)}
        monkeypatch.setitem(module.MODEL_DICT, arguments["model_name"], (spec.cls, "Pendulum-v1"))
    if upstream.module == "test_n_step_replay":  # our one buffer class does both
        monkeypatch.setattr(module, "NStepReplayBuffer", EpisodeReplayBuffer)

    code = function.__code__
    arguments = dict(arguments)
    for name in code.co_varnames[: code.co_argcount]:
        if name in CLASS_ARGUMENTS:
            arguments[name] = cls
        elif name not in arguments:
            arguments[name] = request.getfixturevalue(name)
    np.random.seed(0)
    th.manual_seed(0)
    with warnings.catch_warnings():
        if any(mark.name == "filterwarnings" for mark in getattr(function, "pytestmark", [])):
            warnings.simplefilter("error")
        function(**arguments)


BUFFER_TESTS = [
    ("test_device_buffer", "ReplayBuffer", {"device": "cpu"}),
    ("test_device_buffer", "DictReplayBuffer", {"device": "cpu"}),
    ("test_device_buffer", "ReplayBuffer", {"device": "auto"}),
    ("test_replay_buffer_normalization", "ReplayBuffer", {}),
    ("test_replay_buffer_normalization", "DictReplayBuffer", {}),
]


@pytest.mark.skipif(FOLDER is None, reason="SB3_TESTS_DIR does not point to the folder `tests` of SB3's sources")
@pytest.mark.parametrize(("function", "replaced", "arguments"), BUFFER_TESTS)
def test_upstream_buffers(function: str, replaced: str, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    module = upstream_module("test_buffers")
    monkeypatch.setattr(module, replaced, EpisodeReplayBuffer)
    getattr(module, function)(replay_buffer_cls=EpisodeReplayBuffer, **arguments)


def test_the_list_names_each_algorithm_once() -> None:
    names = [spec.name for spec in ALGOS]
    assert len(set(names)) == len(names)
    assert len({(upstream.module, upstream.function) for upstream in UPSTREAM}) == len(UPSTREAM)
