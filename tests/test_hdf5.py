"""HDF5 files that are damaged, or that say more than they hold."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sb3_diffusion import OfflineDataset, load_dataset
from sb3_diffusion.datasets import write_dataset

h5py = pytest.importorskip("h5py")


@pytest.fixture
def path(box_dataset: OfflineDataset, tmp_path: Path) -> Path:
    write_dataset(box_dataset, str(tmp_path / "data.hdf5"))
    return tmp_path / "data.hdf5"


def giant(file: "h5py.File", folder: Path) -> None:
    del file["rewards"]
    file.create_dataset("rewards", shape=(10**12,), dtype="f4", chunks=(1024,))


def external_link(file: "h5py.File", folder: Path) -> None:
    with h5py.File(folder / "other.hdf5", "w") as other:
        other["rewards"] = file["rewards"][()]
    del file["rewards"]
    file["rewards"] = h5py.ExternalLink(str(folder / "other.hdf5"), "/rewards")


def external_storage(file: "h5py.File", folder: Path) -> None:
    n = len(file["rewards"])
    (folder / "secret").write_bytes(bytes(4 * n))
    del file["rewards"]
    file.create_dataset("rewards", shape=(n,), dtype="f4", external=[(str(folder / "secret"), 0, 4 * n)])


def virtual(file: "h5py.File", folder: Path) -> None:
    external_link(file, folder)
    n = h5py.File(folder / "other.hdf5")["rewards"].shape[0]
    layout = h5py.VirtualLayout(shape=(n,), dtype="f4")
    layout[:] = h5py.VirtualSource(str(folder / "other.hdf5"), "rewards", shape=(n,))
    del file["rewards"]
    file.create_virtual_dataset("rewards", layout)


def endless(file: "h5py.File", folder: Path) -> None:
    del file["observations"]
    group = file.create_group("observations")
    group["again"] = group


def text(file: "h5py.File", folder: Path) -> None:
    del file["rewards"]
    file["rewards"] = np.array([b"one", b"two"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (giant, "claims 3725.3 GiB"),
        (external_link, "from another file: refused"),
        (external_storage, "in another file: refused"),
        (virtual, "in another file: refused"),
        (endless, "groups in groups"),
        (text, "must hold numbers"),
    ],
)
def test_refused(path: Path, change: Callable[["h5py.File", Path], None], message: str) -> None:
    with h5py.File(path, "a") as file:
        change(file, path.parent)
    with pytest.raises(ValueError, match=message):
        load_dataset(path)


def test_damaged_anywhere(path: Path) -> None:
    """Whatever bytes are wrong, and wherever h5py finds it, the error is the documented one."""
    good, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(150):
        bad = bytearray(good)
        for _ in range(4):
            bad[int(rng.integers(4_000))] = int(rng.integers(256))
        path.write_bytes(bad)
        try:
            load_dataset(path)
        except ValueError:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("key", ["actions", "rewards", "terminals", "timeouts"])
@pytest.mark.parametrize("described", [True, False])
def test_groups_in_the_place_of_arrays(path: Path, key: str, described: bool) -> None:
    with h5py.File(path, "a") as file:
        values = file[key][()]
        del file[key]
        file[f"{key}/inside"] = values
        if not described:
            del file["metadata"]
    with pytest.raises(ValueError, match=f"{key} are groups"):
        load_dataset(path)
