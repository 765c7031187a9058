"""Which attention a training step takes: pytest tests/training/test_attention.py"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from diffrep.training import devices


def enabled():
    return torch._C._get_flash_sdp_enabled()


@pytest.mark.parametrize(
    ("device", "precision", "fused"), [("cpu", "bf16", False), ("cpu", "no", True), ("cuda", "bf16", True)]
)
def test_only_half_precision_on_a_cpu_goes_by_the_formula(device, precision, fused):
    step = SimpleNamespace(device=torch.device(device), mixed_precision=precision)
    with devices.attention(step):
        assert enabled() is fused
    assert enabled()


def test_it_is_the_same_attention_to_the_rounding_of_bfloat16():
    step = SimpleNamespace(device=torch.device("cpu"), mixed_precision="bf16")
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 65, 32, generator=rng).bfloat16().requires_grad_() for _ in range(3))
    found = []
    for context in (devices.attention(step), torch.nn.attention.sdpa_kernel(SDPBackend.FLASH_ATTENTION)):
        with context:
            out = F.scaled_dot_product_attention(q, k, v)
            found.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), atol=0.05, rtol=0.05)
