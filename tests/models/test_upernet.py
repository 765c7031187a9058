"""UperNet against the official one: pytest tests/models/test_upernet.py"""

import pytest
import torch
from golden_segment import Given, is_upernet, relative

from diffrep.errors import UserError
from diffrep.models.fcn import FCNHead
from diffrep.models.upernet import Feature2Pyramid, UPerHead, UperNet


def official(case):
    """The case's network with its weights, on the case's maps."""
    maps = [case.get(f"inputs/feature{k}") for k in range(4)]
    told, side = case.meta["decode_head"], case.meta["auxiliary_head"]
    network = UperNet(Given(maps, (16,) * 4), told["num_classes"], told["channels"], side["channels"])
    network.decode_head = UPerHead(told["in_channels"], told["channels"], told["num_classes"], told["pool_scales"])
    network.load_state_dict(case.under("weights/"))
    return network.eval()


@pytest.mark.golden(of=is_upernet)
@torch.no_grad()
def test_golden_pyramid_and_logits(golden_case):
    network = official(golden_case)
    found = [*network.neck(network.backbone(None)), *network.all_logits(None)]
    for name, x in zip([*(f"pyramid{k}" for k in range(4)), "logits", "aux_logits"], found, strict=True):
        wanted = golden_case.get(f"outputs/{name}")
        assert x.shape == wanted.shape and relative(x, wanted) < 1e-4, name
    assert torch.equal(network(None), found[4])


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameters_of_the_published_size():
    with torch.device("meta"):
        parts = Feature2Pyramid(768), UPerHead([768] * 4, 768, 150), FCNHead(768, 256, 150)
    assert [count(part) for part in parts] == [7_081_728, 67_963_542, 1_808_534]


def maps(widths, sides, count=2):
    return [torch.rand(count, c, s, s + 1) for c, s in zip(widths, sides, strict=True)]


def test_stages_need_no_pyramid():
    network = UperNet(Given(maps((6, 8, 10), (12, 6, 3)), (1, 2, 4)), 5, width=4).eval()
    assert [tuple(x.shape) for x in network.all_logits(None)] == [(2, 5, 12, 13), (2, 5, 6, 7)]


@pytest.mark.parametrize("strides", [(4, 8, 16, 32), (16,) * 4])
def test_every_parameter_learns(strides):
    sides = (4,) * 4 if strides[0] == 16 else (16, 8, 4, 2)
    network = UperNet(Given(maps((8,) * 4, sides), strides), 5).train()
    sum(x.square().sum() for x in network.all_logits(None)).backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters() if p.dim() > 1)


def test_other_maps_are_refused():
    with pytest.raises(UserError, match="two or more maps; the backbone gives 1"):
        UperNet(Given(maps((6,), (4,)), (16,)), 5)
    with pytest.raises(UserError, match=r"a pyramid of four equal maps; there are 3"):
        UperNet(Given(maps((6,) * 3, (4,) * 3), (16,) * 3), 5)
