"""The gap, the spread, the map's basis, the snapshots."""

from pathlib import Path

import numpy
import pytest
import torch
from torch.nn import functional as F

from oner_fast.evaluation.modality_gap import Snapshot, fit_basis, load_snapshots, modality_gap, spread


def test_gap_is_the_distance_of_centroids_of_normalised_rows() -> None:
    image, text = torch.randn(40, 8), torch.randn(30, 8) + 2
    plain = (F.normalize(image.double(), dim=1).mean(0) - F.normalize(text.double(), dim=1).mean(0)).norm()
    assert modality_gap(image, text) == pytest.approx(float(plain), abs=1e-12)
    assert modality_gap(image * 7, text) == pytest.approx(float(plain), abs=1e-6)
    assert modality_gap(image, image) == 0.0
    assert modality_gap(torch.tensor([[1.0, 0.0]]), torch.tensor([[-3.0, 0.0]])) == 2.0


def test_spread() -> None:
    assert spread(torch.ones(5, 3)) == pytest.approx(0.0, abs=1e-9)
    assert spread(torch.eye(4)) == pytest.approx(0.75**0.5, abs=1e-12)
    with pytest.raises(ValueError, match="N > 0"):
        spread(torch.empty(0, 3))


def snapshots() -> list[Snapshot]:
    return [Snapshot(step, torch.randn(50, 12) + step / 100, torch.randn(50, 12) - step / 100) for step in (0, 50, 100)]


def test_the_basis_equals_a_singular_value_decomposition() -> None:
    shots = snapshots()
    basis = fit_basis(shots)
    rows = torch.cat([F.normalize(part.double(), dim=1) for shot in shots for part in (shot.image, shot.text)])
    centred = rows - rows.mean(0)
    _, values, vectors = torch.linalg.svd(centred, full_matrices=False)
    for axis, vector in zip(basis.axes, vectors[:2], strict=True):
        assert abs(float(axis @ vector)) == pytest.approx(1.0, abs=1e-9)
        assert float(axis[axis.abs().argmax()]) > 0
    shares = values.square() / values.square().sum()
    assert basis.explained == pytest.approx(tuple(shares[:2].tolist()), abs=1e-9)
    torch.testing.assert_close(basis.axes @ basis.axes.T, torch.eye(2, dtype=torch.float64), atol=1e-9, rtol=0)


def test_all_projections_use_the_same_basis() -> None:
    shots = snapshots()
    basis = fit_basis(shots)
    expected = (F.normalize(shots[1].image.double(), dim=1) - basis.mean) @ basis.axes.T
    torch.testing.assert_close(basis.project(shots[1].image), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(basis.project(shots[1].image[:3] * 5), expected[:3], atol=1e-6, rtol=0)


def test_a_collapsed_snapshot_has_a_map_too() -> None:
    one = Snapshot(0, torch.ones(5, 4), torch.ones(5, 4))
    assert torch.isfinite(fit_basis([one]).project(one.image)).all()


def test_snapshots_are_read_in_the_order_of_steps(tmp_path: Path) -> None:
    for step in (200, 0, 100):
        rows = numpy.full((3, 2), step, dtype=numpy.float16)
        numpy.savez(tmp_path / f"step-{step:08d}.npz", image=rows, text=rows, step=step)
    found = load_snapshots(tmp_path)
    assert [one.step for one in found] == [0, 100, 200]
    assert found[2].image.dtype == torch.float32
    assert float(found[2].text[0, 0]) == 200.0
    assert load_snapshots(tmp_path / "none") == []
    (tmp_path / "step-00000300.npz").write_bytes(b"cut short")
    with pytest.raises(ValueError, match=r"step-00000300\.npz"):
        load_snapshots(tmp_path)


@pytest.mark.parametrize(
    ("image", "text"),
    [((3, 2), (3, 3)), ((3, 5), (3, 5)), ((3,), (3,)), ((0, 2), (0, 2)), ((2, 3, 2), (3, 2)), ((3, 2), None)],
)
def test_snapshots_that_hold_no_embeddings_are_named(
    image: tuple[int, ...], text: tuple[int, ...] | None, tmp_path: Path
) -> None:
    numpy.savez(tmp_path / "step-00000000.npz", image=numpy.ones((3, 2)), text=numpy.ones((3, 2)), step=0)
    path = tmp_path / "step-00000001.npz"
    numpy.savez(path, image=numpy.ones(image), text=numpy.full(text or (3, 2), 1 if text else numpy.nan), step=1)
    with pytest.raises(ValueError, match=r"step-00000001\.npz is not a snapshot .*remove it"):
        load_snapshots(tmp_path)


def test_a_damaged_archive_is_no_snapshot(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.npz"
    numpy.savez(path, image=numpy.ones((3, 2)), text=numpy.ones((3, 2)), step=1)
    whole = path.read_bytes()
    for place in range(0, len(whole), 41):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            load_snapshots(tmp_path)
        except ValueError as error:
            assert str(path) in str(error)
