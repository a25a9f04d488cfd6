"""Training in two processes by torchrun: the steps of one process with the whole batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch as th
from algos import ALGOS, VARIANTS, AlgoSpec
from safetensors.torch import load_file
from train_together import train_offline

from sb3_diffusion import DTQL
from sb3_diffusion.common import distributed

# What is drawn or compared among the rows of a process: equal in law alone
EQUAL_IN_LAW = ("BellmanDiffusion",)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    script = str(Path(__file__).with_name("train_together.py"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, script, str(folder)], check=True, timeout=500)
    return folder


def difference(one: dict[str, th.Tensor], other: dict[str, th.Tensor]) -> dict[str, float]:
    assert one.keys() == other.keys()
    return {name: float((one[name].double() - other[name].double()).abs().max()) for name in one if one[name].numel()}


@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_two_processes_make_the_steps_of_one(spec: AlgoSpec, results: Path):
    first, second = (load_file(results / f"{spec.name}.{rank}") for rank in (0, 1))
    assert max(difference(first, second).values()) == 0.0
    alone = train_offline(spec)
    if spec.name.startswith(EQUAL_IN_LAW):
        assert first.keys() == alone.keys()
        return
    for name, apart in difference(first, alone).items():
        assert apart <= 1e-4 * max(1.0, float(alone[name].abs().max())), name


@pytest.mark.parametrize("spec", ALGOS, ids=lambda spec: spec.name)
def test_online_each_process_steps_environments_of_its_own(spec: AlgoSpec, results: Path):
    """What they learn is the same, statistics of the observations they meet included."""
    first, second = (load_file(results / f"online.{spec.name}.{rank}") for rank in (0, 1))
    met = first.pop("met"), second.pop("met")
    assert not th.equal(*met) and not th.equal(met[0][0], met[1][0])
    assert [name for name in first if not th.equal(first[name], second[name])] == []


def test_alone_nothing_is_shared():
    assert (distributed.n_processes(), distributed.process_rank(), distributed.own_share(7)) == (1, 0, 7)
    value = th.tensor([1.0, 3.0], requires_grad=True)
    assert distributed.average(value) is value
    assert distributed.standard_deviation(value.detach()).item() == 1.0


def test_batches_that_cannot_be_dealt_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distributed, "n_processes", lambda: 3)
    assert distributed.own_share(9) == 3
    with pytest.raises(ValueError, match="`batch_size` must be a multiple of the number of processes, 3: got 8"):
        distributed.own_share(8)


def test_rows_of_a_process_are_those_of_the_whole_draw(monkeypatch: pytest.MonkeyPatch):
    whole = th.randn(12, 2, generator=th.Generator().manual_seed(0))
    monkeypatch.setattr(distributed, "n_processes", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(distributed, "process_rank", lambda: rank)  # noqa: B023
        generator = th.Generator().manual_seed(0)
        assert th.equal(
            distributed.own_rows(lambda n: th.randn(n, 2, generator=generator), 4),  # noqa: B023
            whole[4 * rank : 4 * rank + 4],
        )


def test_train_freq_of_episodes_is_refused():
    model = DTQL("MlpPolicy", "Pendulum-v1", train_freq=(1, "episode"), device="cpu", policy_kwargs=dict(net_arch=[8]))
    with pytest.raises(ValueError, match="must count steps"):
        model._seed_apart()
