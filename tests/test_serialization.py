"""Files: what goes in comes back, exactly; what should not come in is refused and nothing of it runs."""

import base64
import copy
import errno
import io
import json
import math
import os
import pathlib
import pickle
import sys
import threading
import warnings
import zipfile
from collections import OrderedDict, deque
from enum import Enum
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_save
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.policies import BaseModel, BasePolicy
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.her import HerReplayBuffer
from stable_baselines3.sac.policies import MultiInputPolicy

from sb3_diffusion.buffers.storage import EpisodeReplayBuffer
from sb3_diffusion.common import allowlist, archive
from sb3_diffusion.common.serialization import (
    SCHEMA_VERSION,
    Decoder,
    Encoder,
    FileFormatError,
    MissingObjectError,
    PickleFreeModule,
    existing_path,
    load_replay_buffer,
    read_archive,
    register_function,
    register_value_class,
    save_replay_buffer,
    with_suffix,
    write_archive,
)

pytestmark = [
    pytest.mark.filterwarnings("error::ResourceWarning"),
    pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning"),
]


class OwnExtractor(BaseFeaturesExtractor):
    """A user's class: outside the allow-list."""

    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__(observation_space, features_dim=3)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return observations


class Unknown:
    pass


def round_trip(value: Any, slot: str = "value", custom_objects: dict[str, Any] | None = None) -> Any:
    """Through strict JSON and safetensors bytes, as in a file."""
    file = io.BytesIO()
    encoder = Encoder()
    write_archive(file, "test", {"data": {slot: encoder.encode(value, slot)}}, encoder.tensors)
    loaded = read_archive(file, "test")
    return Decoder(loaded.tensors, custom_objects).decode_all(loaded.config["data"])[slot]


def assert_same(a: Any, b: Any) -> None:
    """Equal in type and value, to the last bit, through all containers."""
    assert type(a) is type(b), (a, b)
    if isinstance(a, float):
        assert (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    elif isinstance(a, complex):
        assert_same((a.real, a.imag), (b.real, b.imag))
    elif isinstance(a, (dict, OrderedDict)):
        assert list(map(repr, a)) == list(map(repr, b))
        for x, y in zip(a.values(), b.values(), strict=True):
            assert_same(x, y)
    elif isinstance(a, (list, tuple, deque)):
        assert len(a) == len(b) and getattr(a, "maxlen", 0) == getattr(b, "maxlen", 0)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, (np.ndarray, np.generic)):
        assert a.dtype == b.dtype and a.shape == b.shape
        if a.dtype == object:
            assert_same(a.ravel().tolist(), b.ravel().tolist())
        else:
            assert a.tobytes() == b.tobytes()
    elif isinstance(a, th.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert th.equal(a.contiguous().reshape(-1).view(th.uint8), b.contiguous().reshape(-1).view(th.uint8))
    else:
        assert a == b


# ---- Values -------------------------------------------------------------------------------------------------------------

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=2**70, max_value=2**300),
    st.floats(),
    st.text(),
    st.binary(max_size=20),
    st.complex_numbers(),
    st.sampled_from([np.float32(0.1), np.int64(-3), np.bool_(True), np.str_("ab"), np.str_(""), np.float64("nan")]),
    st.sampled_from([th.float32, th.bfloat16, th.device("cuda:3"), th.Size([2, 3]), np.dtype("<f2"), np.float32]),
)
KEYS = st.one_of(st.text(max_size=6), st.integers(), st.none(), st.tuples(st.integers(), st.text(max_size=2)))
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(KEYS, inner, max_size=4),
        st.dictionaries(st.sampled_from(["a", "b", "$a", "c.d"]), inner, max_size=4).map(OrderedDict),
        st.lists(inner, max_size=4).map(lambda items: deque(items, maxlen=5)),
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(VALUES)
def test_nested_values_round_trip(value: Any) -> None:
    assert_same(round_trip(value), value)


@pytest.mark.parametrize(
    "value",
    [
        {1, 2, 3},
        frozenset({"a", "b"}),
        range(2, 10, 3),
        pathlib.Path("a/b"),
        bytearray(b"\x00\xff"),
        -0.0,
        10**5000,
        {"$missing": "looks like a tag", "slot": 1},
        {(1, "a"): {"$x": [1]}},
        TrainFreq(4, TrainFrequencyUnit.EPISODE),
        "\ud800 alone",
    ],
    ids=lambda value: type(value).__name__,
)
def test_special_values_round_trip(value: Any) -> None:
    assert_same(round_trip(value), value)


NUMPY_DTYPES = ["?", "b", "B", "h", "H", "i", "I", "q", "Q", "e", "f", "d", "g", "F", "D", ">f4", ">i8", "S3", "U2", "M8[ns]"]


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (40, 5), (2, 0, 3)])
def test_numpy_arrays_round_trip(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.asarray(np.arange(math.prod(shape)).reshape(shape).astype(dtype))
    back = round_trip(array)
    assert_same(back, array)
    assert back.flags.writeable and not np.shares_memory(back, array)


def test_arrays_of_any_layout_round_trip() -> None:
    base = np.arange(600, dtype=np.float64).reshape(20, 30)
    base.setflags(write=False)
    for array in (base, base.T, base[::-2, 3:9], np.asfortranarray(base)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_same(round_trip(array), np.ascontiguousarray(array))


def test_object_arrays_round_trip() -> None:
    assert_same(round_trip(np.array([[{}, {}], [{}, {}]])), np.array([[{}, {}], [{}, {}]]))
    array = np.empty((2, 2), dtype=object)
    array[0, 0], array[0, 1], array[1, 0], array[1, 1] = {"a": np.ones(3)}, None, [1, 2], "x"
    assert_same(round_trip(array), array)


TORCH_DTYPES = "bool uint8 int8 uint16 int16 uint32 int32 uint64 int64 float16 bfloat16 float32 float64 complex64 complex128"


@pytest.mark.parametrize("dtype", TORCH_DTYPES.split())
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 1), (2, 3)])
def test_tensors_round_trip(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = th.arange(math.prod(shape)).reshape(shape).to(getattr(th, dtype))
    back = round_trip(tensor)
    assert_same(back, tensor)
    assert back.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr() or tensor.numel() == 0


def test_tensors_that_share_memory_or_are_views_round_trip() -> None:
    base = th.arange(2000, dtype=th.float32).reshape(40, 50)
    value = {
        "a": base,
        "b": base,
        "c": base[3:7],
        "d": base.t(),
        "e": base[:, ::2],
        "f": base[0, 0],
        "g": base.expand(2, 40, 50),
    }
    value["h"] = th.randn(3, dtype=th.complex128)
    value["i"] = th.randn(3, dtype=th.complex64).conj()
    back = round_trip(value)
    for name, tensor in value.items():
        assert_same(back[name], tensor.resolve_conj().contiguous())
    back["a"].zero_()
    assert back["b"].any() and base.any()
    assert round_trip(th.nn.Parameter(th.ones(2))).requires_grad and not round_trip(th.ones(2)).requires_grad


def test_optimizer_and_module_states_round_trip() -> None:
    th.manual_seed(0)
    net = th.nn.Sequential(th.nn.Linear(3, 4), th.nn.BatchNorm1d(4), th.nn.Linear(4, 1))
    optimizer = th.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.8, 0.95))

    def step(net: th.nn.Module, optimizer: th.optim.Optimizer) -> None:
        optimizer.zero_grad()
        net(th.linspace(-1, 1, 15).reshape(5, 3)).square().sum().backward()
        optimizer.step()

    step(net, optimizer)
    encoded = round_trip({"net": net.state_dict(), "optimizer": optimizer.state_dict()})
    assert_same(encoded["optimizer"], optimizer.state_dict())
    twin = copy.deepcopy(net)
    with th.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(encoded["net"])
    twin_optimizer = th.optim.AdamW(twin.parameters())
    twin_optimizer.load_state_dict(encoded["optimizer"])
    for _ in range(3):
        step(net, optimizer)
        step(twin, twin_optimizer)
    assert_same(dict(twin.state_dict()), dict(net.state_dict()))


@pytest.mark.parametrize("name", ["PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"])
def test_numpy_generators_go_on_where_they_were(name: str) -> None:
    generator = np.random.Generator(getattr(np.random, name)(3))
    generator.normal(size=7), generator.integers(5, dtype=np.int32)
    back = round_trip(generator)
    assert_same(back.normal(size=9), generator.normal(size=9))


def test_torch_generators_go_on_where_they_were() -> None:
    generator = th.Generator().manual_seed(7)
    th.randn(3, generator=generator)
    before = th.get_rng_state()
    back = round_trip(generator)
    assert_same(th.randn(9, generator=back), th.randn(9, generator=generator))
    assert th.equal(before, th.get_rng_state()), "the generator of the process was touched"


def test_a_generator_of_a_device_that_is_not_here_starts_from_its_seed() -> None:
    encoded = {"$torch_generator": {"$tensor": "g"}, "device": "cuda:99", "seed": 5}
    with pytest.warns(UserWarning, match="starts anew"):
        back = Decoder({"g": th.zeros(16, dtype=th.uint8)}).decode(encoded)
    assert back.initial_seed() == 5


SPACES = [
    spaces.Box(-1.0, 2.0, (3,), np.float64),
    spaces.Box(np.array([-np.inf, 0, -1], np.float32), np.array([np.inf, np.inf, 1], np.float32)),
    spaces.Box(0, 255, (3, 8, 8), np.uint8),
    spaces.Box(-np.inf, np.inf, (2, 2), np.int64),
    spaces.Box(0, 1, (), np.float32),
    spaces.Discrete(5, start=-2),
    spaces.MultiDiscrete([[2, 3], [4, 5]], start=[[0, 1], [2, 3]]),
    spaces.MultiBinary([2, 3]),
    spaces.MultiBinary(4),
    spaces.Text(7, min_length=2, charset="zyxa"),
    spaces.Dict(OrderedDict(b=spaces.Discrete(3), a=spaces.Box(0, 1, (2,)))),
    spaces.Tuple([spaces.Discrete(2), spaces.Dict(x=spaces.Box(-1, 1, (1,)))]),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_spaces_round_trip_with_their_generators(space: spaces.Space) -> None:
    unseeded = copy.deepcopy(space)
    assert round_trip(unseeded) == unseeded and round_trip(unseeded)._np_random is None
    space.seed(11)
    space.sample()
    back = round_trip(space)
    assert type(back) is type(space) and back == space and back.dtype == space.dtype and back.shape == space.shape
    if isinstance(space, spaces.Dict):
        assert list(back) == list(space)
    for _ in range(3):
        assert_same(back.sample(), space.sample())


def test_a_space_of_a_subclass_becomes_the_gymnasium_space_that_it_is() -> None:
    class OwnBox(spaces.Box):
        pass

    back = round_trip(OwnBox(0, 1, (2,)))
    assert type(back) is spaces.Box and back == spaces.Box(0, 1, (2,))


def test_value_classes_of_sb3_round_trip() -> None:
    noise = OrnsteinUhlenbeckActionNoise(np.zeros(2), np.ones(2), initial_noise=np.ones(2))
    noise()
    vectorized = VectorizedActionNoise(noise, 2)
    vectorized()
    statistics = RunningMeanStd(shape=(2,))
    statistics.update(np.arange(6.0).reshape(3, 2))
    for value in (
        FloatSchedule(LinearSchedule(1.0, 0.1, 0.5)),
        ConstantSchedule(3e-4),
        NormalActionNoise(np.zeros(2), np.ones(2)),
        noise,
        vectorized,
        statistics,
    ):
        back = round_trip(value)
        assert type(back) is type(value) and vars(back).keys() == vars(value).keys()
    assert round_trip(FloatSchedule(LinearSchedule(1.0, 0.1, 0.5)))(0.75) == FloatSchedule(LinearSchedule(1.0, 0.1, 0.5))(0.75)
    back = round_trip(vectorized)
    np.random.seed(0)
    expected = vectorized()
    np.random.seed(0)
    assert_same(back(), expected)
    back = round_trip(statistics)
    assert_same((back.mean, back.var, back.count), (statistics.mean, statistics.var, statistics.count))


def test_registered_classes_and_functions_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowlist, "value_classes", allowlist.value_classes)

    @register_value_class
    class Decay:
        def __init__(self, rate: float) -> None:
            self.rate = rate

    @register_value_class
    class Colour(Enum):
        RED = 1

    @register_value_class
    class Pair(NamedTuple):
        first: int
        second: Any

    @register_function
    def halve(x: float) -> float:
        return x / 2

    try:
        assert vars(round_trip(Decay(0.5))) == {"rate": 0.5}
        assert round_trip(Colour.RED) is Colour.RED
        assert round_trip(Pair(1, Colour.RED)) == Pair(1, Colour.RED)
        assert round_trip(halve) is halve
    finally:
        paths = [allowlist.path_of(obj) for obj in (Decay, Colour, Pair, halve)]
        for path in paths:
            allowlist.value_classes.pop(path, None)
            allowlist.functions.pop(path, None)
    assert paths[0] not in allowlist.value_classes

    class Slotted:
        __slots__ = ("x",)

    with pytest.raises(TypeError, match="__slots__"):
        register_value_class(Slotted)
    with pytest.raises(TypeError, match="function was expected"):
        register_function(Unknown)


CLASSES = {
    "policy_class": MultiInputPolicy,
    "policy_kwargs.features_extractor_class": FlattenExtractor,
    "policy_kwargs.activation_fn": th.nn.Mish,
    "policy_kwargs.optimizer_class": th.optim.AdamW,
    "policy_kwargs.critic.optimizer_class": th.optim.Adafactor,  # lives in a private module, written by its public name
    "replay_buffer_class": HerReplayBuffer,
    "replay_buffer_kwargs.noise_class": NormalActionNoise,
    "policy_kwargs.activation_fn.1": th.nn.ReLU,
}


@pytest.mark.parametrize(("slot", "cls"), CLASSES.items(), ids=list(CLASSES))
def test_classes_of_the_libraries_round_trip_in_their_slots(slot: str, cls: type) -> None:
    encoder = Encoder()
    encoded = encoder.encode(cls, slot)
    assert encoder.missing == [] and list(encoded) == ["$class"]
    assert Decoder({}).decode(encoded, slot) is cls


def test_env_specs_keep_their_settings_and_bring_no_code() -> None:
    env = gym.make("Pendulum-v1", g=5.0, max_episode_steps=17)
    env = gym.wrappers.TransformReward(gym.wrappers.ClipAction(env), lambda reward: reward)
    clipped = gym.make("Pendulum-v1", g=5.0, max_episode_steps=17)
    back = round_trip(gym.wrappers.ClipAction(clipped).spec)
    assert back.id == "Pendulum-v1" and back.kwargs["g"] == 5.0 and back.max_episode_steps == 17
    made = gym.make(back)
    assert made.unwrapped.g == 5.0 and isinstance(made, gym.wrappers.ClipAction)
    for each in (env, clipped, made):
        each.close()
    with pytest.raises(MissingObjectError, match="lambda"):  # the function of TransformReward
        round_trip(env.spec)


def test_wrappers_of_one_kind_keep_their_arrays() -> None:
    env = gym.make("Hopper-v5")
    for bound in (1.0, 0.5):
        env = gym.wrappers.RescaleAction(env, np.full(3, -bound, np.float32), np.full(3, bound, np.float32))
    made = gym.make(round_trip(env.spec))
    assert made.action_space == env.action_space and isinstance(made.env, gym.wrappers.RescaleAction)
    for each in (env, made):
        each.close()


@pytest.mark.parametrize("entry_point", ["os:system", "subprocess:Popen", "gymnasium.wrappers:RecordVideo", "tests:Wrapper"])
def test_env_specs_from_files_bring_no_wrappers_of_other_modules(entry_point: str) -> None:
    spec = copy.deepcopy(gym.spec("Pendulum-v1"))
    spec.entry_point = "os:system"
    spec.additional_wrappers = (gym.envs.registration.WrapperSpec("Evil", entry_point, {"command": "true"}),)
    with pytest.warns(UserWarning, match="may not bring"):
        back = round_trip(spec)
    assert back.additional_wrappers == () and back.entry_point == gym.spec("Pendulum-v1").entry_point


def test_env_ids_from_files_import_nothing() -> None:
    assert round_trip(gym.envs.registration.EnvSpec("NotRegistered-v3", entry_point="os:system")).entry_point is None
    encoded = Encoder().encode(gym.spec("Pendulum-v1"))
    with pytest.raises(FileFormatError, match="import a module"):
        Decoder({}).decode({**encoded, "$env_spec": "antigravity:Pendulum-v1"})
    assert "antigravity" not in sys.modules


# ---- What is recorded by name -------------------------------------------------------------------------------------------


def unwritable() -> dict[str, Any]:
    class Local(BaseFeaturesExtractor):
        pass

    return {
        "policy_kwargs": {"features_extractor_class": Local, "hook": print, "activation_fn": Unknown},
        "learning_rate": lambda progress: progress,
        "anything": Unknown(),
        "misplaced": th.nn.ReLU,
        "net": th.nn.Linear(1, 1),
        "lock": threading.Lock(),
        "masked": np.ma.masked_array([1, 2], [True, False]),
        "sparse": th.eye(3).to_sparse(),
        "record": np.zeros(2, dtype=[("a", "i4")]),
        "module": os,
    }


def test_what_cannot_be_written_is_recorded_by_name_with_one_warning() -> None:
    encoder = Encoder()
    data = encoder.encode_all(unwritable())
    json.dumps(data, allow_nan=False)
    slots = {entry.slot for entry in encoder.missing}
    assert len(encoder.missing) == 12 and "policy_kwargs.features_extractor_class" in slots and "misplaced" in slots
    with pytest.warns(UserWarning) as record:
        encoder.warn_missing()
    assert len(record) == 1 and "<lambda>" in str(record[0].message) and record[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Encoder().warn_missing()


def test_loading_asks_for_everything_at_once_and_shows_how() -> None:
    encoder = Encoder()
    data = encoder.encode_all(unwritable())
    with pytest.raises(MissingObjectError) as failure:
        Decoder(encoder.tensors).decode_all(data)
    assert isinstance(failure.value, ValueError) and len(failure.value.missing) == 12
    for part in ("custom_objects={", "'policy_kwargs.features_extractor_class': Local", "<lambda>", "'anything': Unknown"):
        assert part in str(failure.value)


@pytest.mark.parametrize(
    "key", ["policy_kwargs.features_extractor_class", "features_extractor_class", f"{__name__}.OwnExtractor", "OwnExtractor"]
)
def test_custom_objects_by_slot_path_slot_or_name(key: str) -> None:
    value = {"features_extractor_class": OwnExtractor, "net_arch": [4]}
    assert round_trip(value, "policy_kwargs", {key: OwnExtractor}) == value
    with pytest.raises(TypeError, match=r"must be a subclass of .*BaseFeaturesExtractor"):
        round_trip(value, "policy_kwargs", {key: th.nn.ReLU})
    with pytest.raises(TypeError, match="must be a subclass"):
        round_trip(value, "policy_kwargs", {key: OwnExtractor.__init__})


def test_custom_objects_replace_entries_without_decoding_them() -> None:
    decoder = Decoder({}, {"learning_rate": 0.5, "unrelated": 1, "kwargs.inner": "new"})
    data = {"learning_rate": {"$nonsense": 1}, "kwargs": {"inner": {"$class": "os:system"}, "other": 2}}
    assert decoder.decode_all(data) == {"learning_rate": 0.5, "kwargs": {"inner": "new", "other": 2}}
    with pytest.raises(ValueError, match="must be a dict or None"):
        Decoder({}, [("a", 1)])  # type: ignore[arg-type]


def test_missing_parts_of_composite_values_are_asked_for() -> None:
    space = spaces.Dict(a=spaces.Sequence(spaces.Discrete(2)), b=spaces.Discrete(2))
    with pytest.raises(MissingObjectError, match="Sequence"):
        round_trip(space)


def test_values_that_contain_themselves_or_nest_too_deeply_are_recorded_by_name() -> None:
    loop: list[Any] = [1]
    loop += [loop, loop]
    deep: Any = 0
    for _ in range(5000):
        deep = [deep]
    for value in (loop, deep):
        encoder = Encoder()
        json.dumps(encoder.encode(value))
        assert encoder.missing
    for wrap in (lambda x: [x], lambda x: {"k": x}, lambda x: {1: x}, lambda x: (x,), lambda x: deque([x])):
        nested: Any = 0
        for _ in range(60):
            nested = wrap(nested)
        assert_same(round_trip(nested), nested)


# ---- Classes from hostile files -----------------------------------------------------------------------------------------

BAD_CLASSES = [
    "os:system",
    "subprocess:Popen",
    "builtins:eval",
    "antigravity:Module",
    "torch:nn.Module",
    "torch.nn:Module.__init__.__globals__",
    "torch.nn:Module.__class__",
    "torch.nn.modules.module:torch.nn.ReLU",
    "torch.nn:functional.relu",
    "torch.nn.._:x",
    "torch.nn",
    ":",
    "",
    "stable_baselines3.common.utils:os.system",
    "stable_baselines3.common.base_class:pathlib.Path",
    "stable_baselines3.common.save_util:pickle.Unpickler",
    "stable_baselines3.common.buffers:Any",
    "stable_baselines3/../os:system",
    "stable_baselines3.does_not_exist:X",
    "stable_baselines3x:X",
    "sb3_diffusion.cli:main",
    "sb3_diffusion.__main__:main",
    "sb3_contrib.tqc.policies:TQCPolicy",
    "torch.optim:Adam",
    "torch.nn:Parameter",
    5,
    None,
    ["os", "system"],
]


@pytest.mark.parametrize("path", BAD_CLASSES, ids=str)
def test_class_paths_outside_the_allow_list_are_refused(path: Any) -> None:
    before = set(sys.modules)
    for slot in ("policy_kwargs.activation_fn", "activation_fn"):
        with pytest.raises(FileFormatError):
            Decoder({}).decode({"$class": path}, slot)
    loaded = set(sys.modules) - before
    assert not any(name.split(".")[0] in ("antigravity", "sb3_contrib", "sb3_diffusion") for name in loaded)


def test_a_class_must_fit_its_slot_and_slots_must_be_known() -> None:
    with pytest.raises(FileFormatError, match=r"no subclass of .*Optimizer"):
        Decoder({}).decode({"$class": "torch.nn:ReLU"}, "optimizer_class")
    with pytest.raises(FileFormatError, match="none is expected"):
        Decoder({}).decode({"$class": "torch.nn:ReLU"}, "gamma")
    with pytest.raises(FileFormatError, match="only imported there"):
        allowlist.resolve_class("stable_baselines3.common.policies:ABC", object)


def test_modules_of_this_package_and_contrib_are_not_imported_for_a_file() -> None:
    for module in ("sb3_diffusion.cli", "sb3_contrib"):
        if module in sys.modules:
            continue
        with pytest.raises(FileFormatError, match="not one of"):
            Decoder({}).decode({"$class": f"{module}:Anything"}, "policy_class")
        assert module not in sys.modules


def test_a_refused_class_can_be_replaced_by_a_custom_object() -> None:
    obj = {"$class": "sb3_contrib.nets:OwnExtractor"}
    decoder = Decoder({}, {"OwnExtractor": OwnExtractor})
    assert decoder.decode({"features_extractor_class": obj}, "policy_kwargs") == {"features_extractor_class": OwnExtractor}


MALFORMED: list[Any] = [
    {"$unknown": 1},
    {"$int": "zz"},
    {"$int": 5},
    {"$float": "1e999"},
    {"$float": [1]},
    {"$bytes": "%%"},
    {"$tuple": {"a": 1}},
    {"$dict": [[[], 1]]},
    {"$dict": [[1]]},
    {"$dict": 5},
    {"$set": [[1]]},
    {"$deque": []},
    {"$deque": [], "maxlen": -1},
    {"$scalar": "O", "data": "AAAAAAAAAAA="},
    {"$scalar": "<f4", "data": "AA=="},
    {"$array": None, "dtype": "|O", "shape": [1], "data": "AAAAAAAAAAA="},
    {"$array": None, "dtype": "<f4", "shape": [2], "data": "AAAAAA=="},
    {"$array": None, "dtype": "<f4", "shape": [-1], "data": "AAAAAA=="},
    {"$array": "absent", "dtype": "<f4", "shape": [1]},
    {"$array": "t", "dtype": "<i4", "shape": [3]},
    {"$array": "t", "dtype": "<f4", "shape": [3], "rows": -1},
    {"$array": "t", "dtype": "<f4", "shape": [2], "rows": 3},
    {"$array": "t", "dtype": "<f4", "shape": [2**62], "rows": 3},
    {"$array": ["t"], "dtype": "<f4", "shape": [3]},
    {"$object_array": [2**60], "items": [], "rows": 0},
    {"$object_array": [2], "items": []},
    {"$object_array": 3, "items": []},
    {"$numpy_dtype": "f4,O"},
    {"$numpy_type": "__builtins__"},
    {"$numpy_type": "ndarray"},
    {"$numpy_generator": {"bit_generator": "Generator"}},
    {"$numpy_generator": 3},
    {"$tensor": "absent"},
    {"$tensor": {}},
    {"$dtype": "load"},
    {"$device": "nowhere:0"},
    {"$torch_generator": {"$tensor": "t"}, "device": "cpu", "seed": 1},
    {"$function": "os:system"},
    {"$enum": "os:system", "name": "x"},
    {"$enum": "stable_baselines3.common.type_aliases:TrainFrequencyUnit", "name": "absent"},
    {"$enum": "stable_baselines3.common.type_aliases:TrainFreq", "name": "_make"},
    {"$namedtuple": "stable_baselines3.common.type_aliases:TrainFrequencyUnit", "values": []},
    {"$namedtuple": "stable_baselines3.common.type_aliases:TrainFreq", "values": [1]},
    {"$object": "subprocess:Popen", "state": {}},
    {"$object": "stable_baselines3.common.type_aliases:TrainFreq", "state": {}},
    {"$object": "stable_baselines3.common.utils:ConstantSchedule", "state": {"__class__": 1}},
    {"$object": "stable_baselines3.common.noise:VectorizedActionNoise", "state": {"noises": []}},
    {"$object": "stable_baselines3.common.noise:NormalActionNoise", "state": {"reset": 1}},
    {"$object": "stable_baselines3.common.utils:ConstantSchedule", "state": []},
    {"$space": "Space", "state": {}},
    {"$space": "Box", "state": {"low": 0, "high": 1, "dtype": 3}},
    {"$space": "Discrete", "state": {"n": 3, "np_random": 5, "dtype": "int64", "start": 0}},
    {"$env_spec": "???", "state": {}, "wrappers": []},
    {"$missing": "os.system", "slot": "x"},
    {"$missing": {}},
]


@pytest.mark.parametrize("obj", MALFORMED, ids=lambda obj: json.dumps(obj)[:60])
def test_malformed_values_are_refused(obj: Any) -> None:
    with pytest.raises(FileFormatError):
        Decoder({"t": th.arange(3, dtype=th.float32)}).decode(obj, "value")


JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8), st.just("t")),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                ["$array", "$tensor", "$space", "$object", "$class", "$dict", "state", "dtype", "shape", "rows", "n"]
            ),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(JSON_VALUES)
def test_any_json_decodes_or_is_refused(obj: Any) -> None:
    try:
        Decoder({"t": th.ones(3)}).decode(obj, "activation_fn")
    except FileFormatError:
        pass


# ---- Archives -----------------------------------------------------------------------------------------------------------


def make_archive(path: Any, kind: str = "model") -> None:
    write_archive(path, kind, {"data": {"gamma": 0.99}}, {"w": th.arange(6.0).reshape(2, 3)})


def zip_bytes(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", compression) as zipped:
        warnings.simplefilter("ignore")
        for name, content in members.items():
            zipped.writestr(name, content)
    return file.getvalue()


def config_bytes(**changes: Any) -> bytes:
    content = {"format": "sb3_diffusion", "schema_version": SCHEMA_VERSION, "kind": "model", "versions": {}, "config": {}}
    return json.dumps({**content, **changes}).encode()


TENSORS = safetensors_save({"w": th.ones(2)})
GOOD = {"config.json": config_bytes(), "tensors.safetensors": TENSORS}


@pytest.mark.parametrize("as_string", [True, False])
def test_archives_round_trip_by_path(tmp_path: pathlib.Path, as_string: bool) -> None:
    path = tmp_path / "not" / "there" / "model.zip"
    make_archive(str(path) if as_string else path)
    assert os.listdir(path.parent) == ["model.zip"]
    loaded = read_archive(str(path) if as_string else path, "model")
    assert loaded.config == {"data": {"gamma": 0.99}} and th.equal(loaded.tensors["w"], th.arange(6.0).reshape(2, 3))
    assert loaded.versions["torch"].startswith("2") and "sb3_diffusion" in loaded.versions
    with zipfile.ZipFile(path) as zipped:
        assert sorted(zipped.namelist()) == ["config.json", "tensors.safetensors"] and zipped.testzip() is None
        assert zipped.getinfo("tensors.safetensors").compress_type == zipfile.ZIP_STORED
        assert json.loads(zipped.read("config.json"))["schema_version"] == SCHEMA_VERSION


def test_archives_round_trip_by_file_object(tmp_path: pathlib.Path) -> None:
    memory = io.BytesIO(b"before")
    memory.seek(6)
    make_archive(memory)
    assert not memory.closed and memory.getvalue().startswith(b"before")
    assert th.equal(read_archive(memory, "model").tensors["w"], th.arange(6.0).reshape(2, 3))
    with open(tmp_path / "model", "w+b") as file:
        make_archive(file)
        assert not file.closed
        file.seek(0)
        assert read_archive(file, "model").config == {"data": {"gamma": 0.99}}
        assert not file.closed
    assert (tmp_path / "model").read_bytes() == memory.getvalue()[6:], "equal contents give equal files"
    for wrong in (5, None, io.StringIO()):
        with pytest.raises(TypeError, match="binary file object"):
            make_archive(wrong)
        with pytest.raises(TypeError, match="binary file object"):
            read_archive(wrong, "model")  # type: ignore[arg-type]


def test_large_tensors_go_through_a_file(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_MEMORY_BYTES", 100)
    monkeypatch.setattr(archive, "MAX_CONFIG_BYTES", 100)
    tensors = {"w": th.randn(50, 3), "b": th.ones(3, dtype=th.bool), "e": th.empty(0, 2)}
    for path in (tmp_path / "a.zip", io.BytesIO()):
        write_archive(path, "model", {"text": "x" * 200}, tensors)
        loaded = read_archive(path, "model")
        assert loaded.config == {"text": "x" * 200}
        assert_same(dict(sorted(loaded.tensors.items())), dict(sorted(tensors.items())))
    assert os.listdir(tmp_path) == ["a.zip"]


def test_suffixes_follow_sb3(tmp_path: pathlib.Path) -> None:
    memory = io.BytesIO()
    assert with_suffix("a/model") == pathlib.Path("a/model.zip") and with_suffix(pathlib.Path("m.v1")) == pathlib.Path("m.v1")
    assert with_suffix(memory) is memory and existing_path(memory) is memory
    (tmp_path / "model.v1.zip").touch()
    (tmp_path / "both").touch()
    (tmp_path / "both.zip").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.zip").touch()
    assert existing_path(tmp_path / "model.v1") == tmp_path / "model.v1.zip"
    assert existing_path(str(tmp_path / "both")) == tmp_path / "both"
    assert existing_path(tmp_path / "folder") == tmp_path / "folder.zip"
    with pytest.raises(FileNotFoundError, match="absent"):
        existing_path(tmp_path / "absent")
    with pytest.raises(FileNotFoundError):
        read_archive(tmp_path / "absent", "model")


def test_configurations_and_tensors_that_no_file_can_hold() -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_archive(io.BytesIO(), "model", {"x": math.nan}, {})
    with pytest.raises(TypeError, match="dense tensor"):
        write_archive(io.BytesIO(), "model", {}, {"x": th.eye(2).to_sparse()})


# ---- Atomic writing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["replace", "fsync", "tensors", "interrupt"])
def test_a_failed_save_leaves_the_old_file_and_no_litter(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    path = tmp_path / "model.zip"
    make_archive(path)
    old = path.read_bytes()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt if where == "interrupt" else OSError(errno.ENOSPC, "No space left on device")

    if where == "tensors":
        monkeypatch.setattr(archive, "_write_tensors", fail)
    else:
        monkeypatch.setattr(os, "fsync" if where == "interrupt" else where, fail)
    with pytest.raises(KeyboardInterrupt if where == "interrupt" else OSError) as failure:
        write_archive(path, "model", {}, {"w": th.zeros(1)})
    if where != "interrupt":
        assert failure.value.errno == errno.ENOSPC and failure.value.filename == str(path)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["model.zip"]


def test_a_full_disk_while_large_tensors_are_written_is_an_os_error(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise archive.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(archive, "MAX_MEMORY_BYTES", 1)
    monkeypatch.setattr(archive, "safetensors_save_file", full)
    with pytest.raises(OSError, match="Cannot write") as failure:
        make_archive(tmp_path / "model.zip")
    assert failure.value.errno == errno.ENOSPC and os.listdir(tmp_path) == []


def test_places_that_cannot_be_written(tmp_path: pathlib.Path) -> None:
    with pytest.raises(IsADirectoryError, match="folder"):
        make_archive(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError) as failure:
        make_archive(tmp_path / "file" / "model.zip")
    assert failure.value.filename is not None
    if os.path.exists("/dev/full"):
        with pytest.raises(OSError) as failure:
            make_archive("/dev/full")
        assert failure.value.errno == errno.ENOSPC and not os.path.isfile("/dev/full")


def test_a_file_behind_a_link_and_its_rights_are_kept(tmp_path: pathlib.Path) -> None:
    (tmp_path / "real.zip").write_bytes(b"old")
    (tmp_path / "real.zip").chmod(0o640)
    (tmp_path / "link.zip").symlink_to(tmp_path / "real.zip")
    make_archive(tmp_path / "link.zip")
    assert (tmp_path / "link.zip").is_symlink() and read_archive(tmp_path / "real.zip", "model")
    assert (tmp_path / "real.zip").stat().st_mode & 0o777 == 0o640
    (tmp_path / "plain").touch()
    make_archive(tmp_path / "new.zip")
    assert (tmp_path / "new.zip").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_two_writers_leave_one_whole_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.zip"
    failures: list[BaseException] = []

    def write(number: int) -> None:
        try:
            for _ in range(10):
                write_archive(path, "model", {"writer": number}, {"w": th.full((2000,), float(number))})
                loaded = read_archive(path, "model")
                assert set(loaded.tensors["w"].tolist()) == {float(loaded.config["writer"])}
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and os.listdir(tmp_path) == ["model.zip"]


# ---- Foreign, damaged and hostile files ---------------------------------------------------------------------------------


class Bomb:
    """Runs when unpickled."""

    triggered = False

    def __reduce__(self) -> tuple:
        return setattr, (Bomb, "triggered", True)


def test_pickles_are_refused_by_name_and_do_not_run(tmp_path: pathlib.Path) -> None:
    evil = pickle.dumps(Bomb())
    th.save({"a": th.ones(1)}, tmp_path / "weights.pth")
    th.save({"a": th.ones(1)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    SAC("MlpPolicy", "Pendulum-v1", buffer_size=10).save(tmp_path / "sac.zip")
    cases = {
        "pickle file": evil,
        "th.save": (tmp_path / "weights.pth").read_bytes(),
        "a pickle": (tmp_path / "old.pth").read_bytes(),
        "Stable-Baselines3": (tmp_path / "sac.zip").read_bytes(),
        "is not a file written by": zip_bytes({"tensors.safetensors": TENSORS}),
        "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(100),
        "empty": b"",
        "not a file written": b"hello",
        "lacks tensors.safetensors": zip_bytes({"config.json": config_bytes()}),
    }
    for words, content in cases.items():
        for kind in ("model", "replay_buffer"):
            with pytest.raises(FileFormatError, match=words):
                read_archive(io.BytesIO(content), kind)
    for name in ("data", "config.json", "tensors.safetensors", "extra.pkl"):
        with pytest.raises(FileFormatError) if name != "extra.pkl" else warnings.catch_warnings():
            read_archive(io.BytesIO(zip_bytes({**({} if name == "data" else GOOD), name: evil})), "model")
    assert not Bomb.triggered
    pickle.loads(evil)
    assert Bomb.triggered, "the bomb of this test is a dud"
    Bomb.triggered = False


HOSTILE: dict[str, tuple[dict[str, bytes], str]] = {
    "newer schema": ({**GOOD, "config.json": config_bytes(schema_version=99)}, "upgrade"),
    "schema zero": ({**GOOD, "config.json": config_bytes(schema_version=0)}, "schema version"),
    "schema bool": ({**GOOD, "config.json": config_bytes(schema_version=True)}, "schema version"),
    "wrong kind": ({**GOOD, "config.json": config_bytes(kind="replay_buffer")}, "a 'model' was expected"),
    "other format": ({**GOOD, "config.json": config_bytes(format="x")}, "was not written by"),
    "config is a list": ({**GOOD, "config.json": b"[]"}, "was not written by"),
    "no data": ({**GOOD, "config.json": config_bytes(config=[])}, "without the dictionary"),
    "not json": ({**GOOD, "config.json": b"{"}, "not valid JSON"),
    "NaN": ({**GOOD, "config.json": b'{"a": NaN}'}, "NaN is not JSON"),
    "not text": ({**GOOD, "config.json": b"\xff\xfe"}, "not valid JSON"),
    "many digits": ({**GOOD, "config.json": b'{"a": ' + b"9" * 10000 + b"}"}, "not valid JSON"),
    "deep": ({**GOOD, "config.json": b"[" * 100_000}, "not valid JSON"),
    "deep dict": ({**GOOD, "config.json": b'{"a":' * 100_000}, "not valid JSON"),
    "tensors": ({**GOOD, "tensors.safetensors": b"junk"}, "not valid"),
    "tensor header": ({**GOOD, "tensors.safetensors": (2**62).to_bytes(8, "little") + b"{}"}, "not valid"),
    "tensor offsets": (
        {**GOOD, "tensors.safetensors": TENSORS.replace(b'"data_offsets":[0,8]', b'"data_offsets":[0,9]')},
        "not valid",
    ),
    "absolute": ({**GOOD, "/etc/cron.d/x": b""}, "points outside"),
    "parent": ({**GOOD, "../x": b""}, "points outside"),
    "backslash": ({**GOOD, "..\\x": b""}, "points outside"),
    "folder": ({**GOOD, "a/b": b""}, "points outside"),
    "many": ({**GOOD, **{f"m{i}": b"" for i in range(100)}}, "too many"),
}


@pytest.mark.parametrize(("members", "words"), HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_archives_are_refused(members: dict[str, bytes], words: str) -> None:
    with pytest.raises(FileFormatError, match=words):
        read_archive(io.BytesIO(zip_bytes(members)), "model")


def test_a_good_archive_with_an_unknown_member_is_read() -> None:
    assert read_archive(io.BytesIO(zip_bytes({**GOOD, "readme.txt": b"x"})), "model").tensors.keys() == {"w"}


def test_twins_of_a_member_are_refused() -> None:
    file = io.BytesIO()
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(file, "w") as zipped:
        for name in ("config.json", "config.json", "tensors.safetensors"):
            zipped.writestr(name, GOOD[name])
    with pytest.raises(FileFormatError, match="twice"):
        read_archive(file, "model")


def test_zip_bombs_are_refused_before_they_unpack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_CONFIG_BYTES", 2**20)
    bomb = zip_bytes({**GOOD, "config.json": b" " * 2**24}, zipfile.ZIP_DEFLATED)
    with pytest.raises(FileFormatError, match="unpacks to more"):
        read_archive(io.BytesIO(bomb), "model")
    lying = bytearray(bomb)  # claims a small size: the reader must not believe it
    at = lying.rindex((2**24).to_bytes(4, "little"))
    lying[at : at + 4] = (100).to_bytes(4, "little")
    with pytest.raises(FileFormatError):
        read_archive(io.BytesIO(bytes(lying)), "model")
    with pytest.raises(FileFormatError, match="compressed or larger"):
        read_archive(io.BytesIO(zip_bytes({**GOOD, "tensors.safetensors": bytes(2**20)}, zipfile.ZIP_DEFLATED)), "model")


def whole_file() -> bytes:
    file = io.BytesIO()
    encoder = Encoder()
    write_archive(file, "model", {"data": encoder.encode_all({"a": [1, 2.5], "b": np.arange(300.0)})}, encoder.tensors)
    return file.getvalue()


def test_truncated_files_are_refused_at_every_length() -> None:
    content = whole_file()
    for length in [*range(0, 100), *range(100, len(content), 37), *range(len(content) - 100, len(content))]:
        with pytest.raises(FileFormatError):
            read_archive(io.BytesIO(content[:length]), "model")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_flipped_bytes_are_refused_or_harmless(data: st.DataObject) -> None:
    content = bytearray(whole_file())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        loaded = read_archive(io.BytesIO(bytes(content)), "model")
    except FileFormatError:
        return
    value = Decoder(loaded.tensors).decode_all(loaded.config["data"])  # a date or an attribute of the zip was hit
    assert_same(value["b"], np.arange(300.0))


# ---- Policies and networks ----------------------------------------------------------------------------------------------


class Net(PickleFreeModule, BaseModel):
    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space, width: int = 4, **kwargs: Any) -> None:
        self.activation_fn = kwargs.pop("activation_fn", th.nn.ReLU)
        extra = kwargs.pop("extra", None)
        super().__init__(observation_space, action_space, **kwargs)
        self.extra = extra
        self.width = width
        self.net = th.nn.Sequential(th.nn.Linear(3, width), self.activation_fn(), th.nn.BatchNorm1d(width))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        own = dict(width=self.width, activation_fn=self.activation_fn)
        own.update({} if self.extra is None else {"extra": self.extra})
        own.update(features_extractor_class=self.features_extractor_class)
        return {**super()._get_constructor_parameters(), **own}


class WideNet(Net):
    pass


class Policy(PickleFreeModule, BasePolicy):
    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space, lr_schedule: Any) -> None:
        super().__init__(observation_space, action_space)
        self.net = th.nn.Linear(3, 1)
        self.optimizer = th.optim.Adam(self.net.parameters(), lr=lr_schedule(1))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.pop("normalize_images")
        return dict(data, lr_schedule=self._dummy_schedule)

    def _predict(self, observation: th.Tensor, deterministic: bool = False) -> th.Tensor:
        return self.net(observation)


BOXES = (spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (1,)))


def test_networks_and_policies_round_trip(tmp_path: pathlib.Path) -> None:
    net = Net(*BOXES, width=7, activation_fn=th.nn.Mish)
    net.net(th.randn(5, 3))
    for path in (tmp_path / "net", io.BytesIO()):
        net.save(path)
        back = Net.load(path, device="cpu")
        assert back.width == 7 and back.activation_fn is th.nn.Mish
        assert_same(dict(back.state_dict()), dict(net.state_dict()))
    policy = Policy(*BOXES, lr_schedule=lambda _: 0.1)
    policy.save(tmp_path / "policy")
    back_policy = Policy.load(str(tmp_path / "policy"))
    observation = np.ones(3, np.float32)
    assert_same(back_policy.predict(observation)[0], policy.predict(observation)[0])
    with pytest.raises(FileFormatError, match="'policy' was expected"):
        make_archive(tmp_path / "model.zip")
        Policy.load(tmp_path / "model.zip")


def test_a_file_of_another_class_is_refused_and_one_of_a_subclass_is_not(tmp_path: pathlib.Path) -> None:
    WideNet(*BOXES).save(tmp_path / "wide")
    assert type(Net.load(tmp_path / "wide")) is WideNet
    Net(*BOXES).save(tmp_path / "net")
    for cls in (WideNet, Policy):
        with pytest.raises(FileFormatError, match=r"Net' *, which is neither"):
            cls.load(tmp_path / "net")


def test_weights_or_arguments_that_do_not_fit_are_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "net"
    Net(*BOXES).save(path)
    loaded = read_archive(path, "policy")
    for arguments in ({**loaded.config["arguments"], "width": 9}, {**loaded.config["arguments"], "nonsense": 1}, {}):
        write_archive(path, "policy", {**loaded.config, "arguments": arguments}, loaded.tensors)
        with pytest.raises(FileFormatError, match="No Net can be made"):
            Net.load(path)


def test_networks_as_arguments_are_a_type_error_and_own_classes_are_asked_for(tmp_path: pathlib.Path) -> None:
    with pytest.raises(TypeError, match="'extra' is a network"):
        Net(*BOXES, extra=th.nn.Linear(1, 1)).save(tmp_path / "net")
    assert os.listdir(tmp_path) == []
    with pytest.warns(UserWarning, match="OwnExtractor"):
        Net(*BOXES, features_extractor_class=OwnExtractor).save(tmp_path / "net")
    with pytest.raises(MissingObjectError, match="features_extractor_class': OwnExtractor"):
        Net.load(tmp_path / "net")
    back = Net.load(tmp_path / "net", custom_objects={"OwnExtractor": OwnExtractor})
    assert back.features_extractor_class is OwnExtractor


# ---- Replay buffers -----------------------------------------------------------------------------------------------------


def fill(buffer: ReplayBuffer, n_steps: int) -> ReplayBuffer:
    rng = np.random.default_rng(0)
    n = buffer.n_envs
    for step in range(n_steps):
        observations = [
            {key: rng.normal(size=(n, *space.shape)) for key, space in buffer.observation_space.items()}
            if isinstance(buffer.observation_space, spaces.Dict)
            else rng.normal(size=(n, *buffer.obs_shape))
            for _ in range(2)
        ]
        done = np.full(n, step % 5 == 4)
        infos = [{"TimeLimit.truncated": step % 10 == 9, "x": rng.normal(size=2)} for _ in range(n)]
        buffer.add(*observations, rng.normal(size=(n, 2)), rng.normal(size=n), done, infos)
    return buffer


GOALS = spaces.Dict({key: spaces.Box(-1, 1, (2,)) for key in ("observation", "achieved_goal", "desired_goal")})
FLAT, ACTIONS = spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,))


class GoalEnv(gym.Env):
    observation_space = GOALS
    action_space = ACTIONS

    def reset(self, **kwargs: Any) -> tuple[Any, dict]:
        return GOALS.sample(), {}

    def step(self, action: Any) -> Any:
        return GOALS.sample(), 0.0, False, False, {}

    def compute_reward(self, achieved: np.ndarray, desired: np.ndarray, infos: Any) -> np.ndarray:
        return -np.linalg.norm(achieved - desired, axis=-1)


BUFFERS: dict[str, Any] = {
    "plain": lambda: ReplayBuffer(40, FLAT, ACTIONS, device="cpu", n_envs=2),
    "memory": lambda: ReplayBuffer(
        40, FLAT, ACTIONS, "cpu", n_envs=2, optimize_memory_usage=True, handle_timeout_termination=False
    ),
    "dict": lambda: DictReplayBuffer(40, GOALS, ACTIONS, device="cpu", n_envs=2),
    "n_step": lambda: NStepReplayBuffer(40, FLAT, ACTIONS, device="cpu", n_envs=2, n_steps=4, gamma=0.9),
    "her": lambda: HerReplayBuffer(40, GOALS, ACTIONS, DummyVecEnv([GoalEnv] * 2), device="cpu", n_envs=2),
    "her_infos": lambda: HerReplayBuffer(
        40, GOALS, ACTIONS, DummyVecEnv([GoalEnv] * 2), device="cpu", n_envs=2, copy_info_dict=True
    ),
}


def samples(buffer: ReplayBuffer) -> list[Any]:
    np.random.seed(5)
    return [dict(batch._asdict()) for batch in (buffer.sample(16), buffer.sample(3))]


@pytest.mark.parametrize("n_steps", [7, 20, 33])
@pytest.mark.parametrize("name", BUFFERS)
def test_replay_buffers_round_trip(name: str, n_steps: int, tmp_path: pathlib.Path) -> None:
    buffer = fill(BUFFERS[name](), n_steps)
    path = tmp_path / "replay_buffer.pkl"
    save_replay_buffer(buffer, path)
    assert os.listdir(tmp_path) == ["replay_buffer.pkl"]
    back = load_replay_buffer(path, device="cpu")
    assert type(back) is type(buffer)
    if name.startswith("her"):
        assert back.env is None
        back.set_env(buffer.env)
    ours, theirs = ({k: v for k, v in vars(b).items() if k != "env"} for b in (back, buffer))
    assert ours.keys() == theirs.keys() and ours["observation_space"] == theirs["observation_space"]
    for key in ours.keys() - {"observation_space", "action_space", "device"}:
        assert_same(ours[key], theirs[key])
    assert_same(samples(back), samples(buffer))
    fill(back, 9), fill(buffer, 9)
    assert_same(samples(back), samples(buffer))


def test_buffers_after_reset_and_empty_ones_round_trip(tmp_path: pathlib.Path) -> None:
    empty = ReplayBuffer(1, FLAT, ACTIONS, device="cpu")
    used = fill(ReplayBuffer(10, FLAT, ACTIONS, device="cpu"), 13)
    used.reset()
    for buffer in (empty, used):
        save_replay_buffer(buffer, tmp_path / "b")
        back = load_replay_buffer(tmp_path / "b")
        assert (back.pos, back.full) == (0, False)
        assert_same(back.observations, buffer.observations)


def test_rows_that_were_never_written_take_no_space(tmp_path: pathlib.Path) -> None:
    buffer = fill(ReplayBuffer(200_000, FLAT, ACTIONS, device="cpu"), 3)
    save_replay_buffer(buffer, tmp_path / "b")
    assert (tmp_path / "b").stat().st_size < 10_000
    assert_same(load_replay_buffer(tmp_path / "b").observations, buffer.observations)
    her = HerReplayBuffer(50_000, GOALS, ACTIONS, DummyVecEnv([GoalEnv]), device="cpu")
    save_replay_buffer(fill(her, 3), tmp_path / "h")
    assert (tmp_path / "h").stat().st_size < 20_000
    back = load_replay_buffer(tmp_path / "h")
    back.infos[0, 0]["x"] = 1
    assert back.infos[1, 0] == {}, "every element has its own dictionary"


@pytest.mark.parametrize("n_steps", [7, 33])
@pytest.mark.parametrize("space", [FLAT, GOALS], ids=["flat", "dict"])
def test_the_buffer_of_this_package_round_trips(space: spaces.Space, n_steps: int, tmp_path: pathlib.Path) -> None:
    buffer = fill(EpisodeReplayBuffer(40, space, ACTIONS, device="cpu", n_envs=2), n_steps)
    save_replay_buffer(buffer, tmp_path / "b")
    back = load_replay_buffer(tmp_path / "b", device="cpu")
    assert type(back) is EpisodeReplayBuffer and back.observation_space == space and back.pos == buffer.pos
    assert_same(samples(back), samples(buffer))
    fill(back, 9), fill(buffer, 9)
    assert_same(samples(back), samples(buffer))


class OwnBuffer(ReplayBuffer):
    pass


class StateBuffer(ReplayBuffer):
    """A buffer that describes itself."""

    def get_state(self) -> dict[str, Any]:
        return {"buffer_size": self.buffer_size, "rewards": self.rewards[: self.pos], "generator": np.random.default_rng(1)}

    def set_state(self, state: dict[str, Any]) -> None:
        if len(state["rewards"]) > state["buffer_size"]:
            raise ValueError("too many rewards")
        self.buffer_size, self.pos = state["buffer_size"], len(state["rewards"])
        self.rewards = np.zeros((self.buffer_size, 1), np.float32)
        self.rewards[: self.pos] = state["rewards"]


def test_own_buffers_and_buffers_with_a_state(tmp_path: pathlib.Path) -> None:
    with pytest.warns(UserWarning, match="OwnBuffer"):
        save_replay_buffer(fill(OwnBuffer(5, FLAT, ACTIONS, device="cpu"), 3), tmp_path / "own")
    with pytest.raises(MissingObjectError, match="'replay_buffer_class': OwnBuffer"):
        load_replay_buffer(tmp_path / "own")
    assert type(load_replay_buffer(tmp_path / "own", custom_objects={"replay_buffer_class": OwnBuffer})) is OwnBuffer
    with pytest.raises(TypeError, match="subclass"):
        load_replay_buffer(tmp_path / "own", custom_objects={"OwnBuffer": Net})

    buffer = fill(StateBuffer(9, FLAT, ACTIONS, device="cpu"), 4)
    with pytest.warns(UserWarning, match="StateBuffer"):
        save_replay_buffer(buffer, tmp_path / "state")
    custom = {"replay_buffer_class": StateBuffer}
    back = load_replay_buffer(tmp_path / "state", "cpu", custom)
    assert back.observation_space == FLAT and back.buffer_size == 9
    assert_same(back.rewards, buffer.rewards)
    loaded = read_archive(tmp_path / "state", "replay_buffer")
    loaded.config["state"]["buffer_size"] = 1
    write_archive(tmp_path / "bad", "replay_buffer", loaded.config, loaded.tensors)
    with pytest.raises(FileFormatError, match="too many rewards"):
        load_replay_buffer(tmp_path / "bad", "cpu", custom)
    with pytest.raises(FileFormatError, match="does not have"):
        load_replay_buffer(tmp_path / "state", "cpu", {"replay_buffer_class": ReplayBuffer})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pos": 99}, "sizes are inconsistent"),
        ({"n_envs": "x"}, "must be a int"),
        ({"observation_space": 3}, "must be a Space"),
        ({"actions": {"$array": None, "dtype": "<f4", "shape": [0], "data": ""}}, "must have the shape"),
        ({"next_observations": None}, "must have the shape"),
        ({"sample": 1}, "cannot have an attribute"),
        ({"__class__": 1}, "cannot have an attribute"),
    ],
    ids=str,
)
def test_buffers_whose_parts_do_not_fit_are_refused(change: dict[str, Any], words: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "b"
    save_replay_buffer(fill(ReplayBuffer(5, FLAT, ACTIONS, device="cpu"), 3), path)
    loaded = read_archive(path, "replay_buffer")
    loaded.config["values"].update(change)
    write_archive(path, "replay_buffer", loaded.config, loaded.tensors)
    with pytest.raises(FileFormatError, match=words):
        load_replay_buffer(path)


def test_a_replay_file_is_not_a_model_and_a_pickled_buffer_is_refused(tmp_path: pathlib.Path) -> None:
    save_replay_buffer(ReplayBuffer(5, FLAT, ACTIONS, device="cpu"), tmp_path / "b")
    with pytest.raises(FileFormatError, match="holds a 'replay_buffer'"):
        read_archive(tmp_path / "b", "model")
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(ReplayBuffer(5, FLAT, ACTIONS, device="cpu")))
    with pytest.raises(FileFormatError, match="pickle"):
        load_replay_buffer(tmp_path / "b.pkl")
    wrong = base64.b64encode(b"x").decode()
    write_archive(tmp_path / "c", "replay_buffer", {"replay_buffer_class": {"$class": f"os:{wrong}"}, "values": {}}, {})
    with pytest.raises(FileFormatError, match="refused"):
        load_replay_buffer(tmp_path / "c")
    for named in ({}, {"replay_buffer_class": 5}, {"replay_buffer_class": None}, {"replay_buffer_class": {"$tuple": []}}):
        write_archive(tmp_path / "d", "replay_buffer", {**named, "values": {}}, {})
        with pytest.raises(FileFormatError, match="does not name the class"):
            load_replay_buffer(tmp_path / "d")
