"""Losses that compare images do not depend on how many processes share a batch."""

import pytest
import torch
from torch import multiprocessing

from diffrep.models.comparison import Comparison
from diffrep.randomness import Rows, seeded, stream

IMAGES = 8


def comparison(loss):
    with seeded(0, "comparison"):
        made = Comparison(loss, (4, 6), 1, "linear", 1, negatives=3)
        made.remember(2 * IMAGES)
    return made


def trained(loss, rows, rank=0, world=1):
    """The gradients and the memory after two steps of these rows."""
    made, grads = comparison(loss), []
    network = torch.randn(4, 4, generator=stream(0, "network")).requires_grad_()
    learned = [network, *made.parameters()]
    for step in range(2):
        features = torch.randn(IMAGES, 10, 2, 2, generator=stream(0, "features", step))[rows]
        index = (torch.arange(IMAGES) + 4 * step)[rows]
        rng = Rows(stream(0, "step", step), IMAGES, rows)
        student, code = features[:, :4], features[:, 4:].mean((2, 3), keepdim=True)
        student = torch.einsum("bchw,cd->bdhw", student, network)
        loss_ = made.distance(made.imitation(student, code.shape[-2:]), code, index, rng)
        grads += torch.autograd.grad(loss_, learned)
        made.after_step()
    memory = [] if made.memory is None else [made.memory.memory_s, made.memory.memory_t, made.memory.z_s]
    return grads, memory


def shared(rank, place, loss):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=2)
    torch.save(trained(loss, list(range(rank, IMAGES, 2))), f"{place}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("loss", ["rkd", "info_nce", "crd"])
def test_two_processes_learn_what_one_does(loss, tmp_path):
    multiprocessing.start_processes(shared, (str(tmp_path), loss), nprocs=2, start_method="fork")
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    grads, memory = trained(loss, list(range(IMAGES)))
    assert all(grad.any() for grad in grads)
    for alone, first, second in zip(grads, both[0][0], both[1][0], strict=True):
        torch.testing.assert_close((first + second) / 2, alone, rtol=1e-4, atol=1e-6)
    for alone, first, second in zip(memory, both[0][1], both[1][1], strict=True):
        torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-6)
        assert torch.equal(first, second)
