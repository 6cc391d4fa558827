import dataclasses
import os
import sys

import pytest
import torch

from oner_fast.train.engine.distributed import World, barrier, is_main, require_same, setup, shutdown, sum_over_ranks
from oner_fast.train.engine.nonfinite import NonFiniteError, NonFiniteGuard
from oner_fast.train.engine.signals import StopRequest
from oner_fast.train.engine.threads import settle_threads

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@pytest.fixture
def environment(monkeypatch):
    for name in (*VARIABLES, "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("given", [{}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, {"PMI_SIZE": "1"}])
def test_a_single_process_starts_no_process_group(environment, given):
    for name, value in given.items():
        environment.setenv(name, value)
    world = setup("cpu")
    assert world == World(0, 1, 0, torch.device("cpu")) and world.is_main and is_main()
    assert not torch.distributed.is_initialized()
    tensor = torch.arange(3.0, requires_grad=True)
    total = sum_over_ranks(tensor)
    assert torch.equal(total, tensor) and total.data_ptr() != tensor.data_ptr() and not total.requires_grad
    barrier()
    shutdown()
    with pytest.raises(dataclasses.FrozenInstanceError):
        world.rank = 1


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"RANK": "0"}, "RANK is set but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set but RANK is not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "needs 0 <= RANK < WORLD_SIZE, got RANK=2"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK must be an integer, got 'one'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "5"}, "LOCAL_RANK=5"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR and MASTER_PORT not set"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4 says that mpirun"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "srun started several"),
    ],
)
def test_a_wrong_environment_is_named(environment, given, text):
    for name, value in given.items():
        environment.setenv(name, value)
    with pytest.raises(ValueError, match=text):
        setup("cpu")
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("device", ["tpu", "meta", "cud"])
def test_a_wrong_device_is_named(environment, device):
    with pytest.raises(ValueError, match="must be auto, cpu or cuda"):
        setup(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_cuda_without_gpu(environment):
    with pytest.raises(ValueError, match="torch finds no GPU"):
        setup("cuda")


def rank_main(rank: int, size: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    world = setup("cpu", init_method=f"file://{folder}/meet", timeout_seconds=60)
    try:
        assert world == World(rank, size, rank, torch.device("cpu")) and is_main() == (rank == 0)

        mine = torch.tensor([[1, 10], [100, 1000]]).t() * (rank + 1)
        assert sum_over_ranks(mine).tolist() == [[3, 300], [30, 3000]]
        assert mine[0, 0] == rank + 1
        barrier()

        require_same(world, {"lr": 0.1, "samples": 12})
        named = r" \(lr 0.1 -> 0.5, samples 12 -> 14\); start" if rank == 1 else "; its own output names them"
        with pytest.raises(ValueError, match=f"rank 1 has other settings or data than rank 0{named}"):
            require_same(world, {"lr": 0.5, "samples": 14} if rank == 1 else {"lr": 0.1, "samples": 12})

        # Rank 0 decides, also where another rank would not time anything.
        threads = settle_threads(2 if rank == 0 else 1, world, workers=0, dtype=torch.float32)
        assert threads.used == torch.get_num_threads() == 2 and threads.milliseconds.keys() == {"1", "2"}

        request = StopRequest()
        assert request.agree(world) is None
        request.requested = "SIGTERM" if rank == 1 else None
        assert request.agree(world) == "SIGTERM" == request.requested
        request.requested = "SIGINT" if rank == 0 else "SIGTERM"
        assert request.agree(world) == "SIGINT"

        guard = NonFiniteGuard(limit=2)
        good, bad = torch.tensor(1.0), torch.tensor(float("nan"))
        votes = [guard.vote(good, good), guard.vote(bad if rank == 1 else good, good)]
        assert [float(vote) for vote in votes] == [0.0, 1.0]  # the same on both ranks
        guard.settle()
        assert (guard.skipped, guard.consecutive) == (1, 1)
        assert float(guard.vote(good, bad if rank == 0 else good)) == 1.0
        try:
            guard.settle()
        except NonFiniteError as error:
            assert "loss bad on 0 ranks, gradient on 1" in str(error)
        else:
            raise AssertionError("the second skipped step in a row did not raise")
    finally:
        shutdown()
    assert not torch.distributed.is_initialized()


def test_two_processes(environment, run_two_ranks, tmp_path):
    run_two_ranks(__file__, tmp_path)


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
