"""BiSeNet against the official one: pytest tests/models/test_bisenet.py"""

import pytest
import torch
from golden_segment import Given, TinyResNet, is_bisenet, relative, renamed

from diffrep.errors import UserError
from diffrep.models.bisenet import BiSeNet
from diffrep.models.fcn import FCNHead
from diffrep.models.maps import MapBackbone
from diffrep.models.segmenter import best_class
from diffrep.models.students import StudentConfig


def official(case):
    """The case's network with its weights."""
    told, heads = case.meta["backbone_cfg"], case.meta["heads"]
    backbone = TinyResNet(told["depth"], told["stem_channels"], told["base_channels"], told["strides"])
    assert backbone.widths[1:] == tuple(case.meta["context_channels"])
    network = BiSeNet(
        backbone, case.meta["num_classes"], case.meta["spatial_channels"], case.meta["out_channels"]
    )  # fmt: skip
    made = [FCNHead(h["in_channels"], h["channels"], h["num_classes"]) for h in heads.values()]
    network.decode_head, network.auxiliary_head = made[0], torch.nn.ModuleList(made[1:])
    network.load_state_dict(renamed(case.under("weights/")))
    return network.eval()


@pytest.mark.golden(of=is_bisenet)
@torch.no_grad()
def test_golden_maps_and_logits(golden_case):
    network, image = official(golden_case), golden_case.get("inputs/image")
    named = zip(("fuse", "context8", "context16"), network.features(image), strict=True)
    logits = zip(("decode_head", "aux0", "aux1"), network.all_logits(image), strict=True)
    for name, found in [*named, *((f"{name}/logits", each) for name, each in logits)]:
        wanted = golden_case.get(f"outputs/{name}")
        assert found.shape == wanted.shape and relative(found, wanted) < 1e-4, name
    logits = network(image)
    assert torch.equal(logits, network.all_logits(image)[0])
    classes = torch.stack([best_class(each, image.shape[2:])[::4, ::4] for each in logits])
    same = classes == golden_case.get("outputs/seg_pred_strided4")
    assert same.double().mean() > 0.99  # where two classes are equally likely the last bit decides


def whole(name, num_classes):
    with torch.device("meta"):
        return BiSeNet(MapBackbone(StudentConfig(name=name)), num_classes)


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "body", "main", "side", "everything"),
    [
        ("resnet18", 12_680_320, (594_962, 595_219), (75_026, 75_091), (13_425_334, 13_425_721)),
        ("resnet50", 47_414_592, (9_457_682, 9_458_707), (1_184_786, 1_185_043), (59_241_846, 59_243_385)),
    ],
)
def test_parameters_of_the_published_sizes(name, body, main, side, everything):
    for k, num_classes in enumerate((18, 19)):
        network = whole(name, num_classes)
        heads = [network.decode_head, *network.auxiliary_head]
        assert [count(head) for head in heads] == [main[k], side[k], side[k]]
        assert count(network) == everything[k] and count(network) - sum(map(count, heads)) == body


@pytest.mark.parametrize(("size", "eighth", "sixteenth"), [((64, 64), (8, 8), (4, 4)), ((72, 104), (9, 13), (5, 7))])
def test_sizes(size, eighth, sixteenth):
    network = BiSeNet(TinyResNet(18, 4, 4, (1, 2, 2, 2)), 5).eval()
    assert [tuple(x.shape) for x in network.all_logits(torch.rand(2, 3, *size))] == [
        (2, 5, *eighth), (2, 5, *eighth), (2, 5, *sixteenth),
    ]  # fmt: skip


def test_the_fusions_gate_never_closes_further_than_half():
    network = BiSeNet(TinyResNet(18, 4, 4, (1, 2, 2, 2)), 5).eval()
    spatial, context = torch.randn(1, 8, 4, 4), torch.randn(1, 8, 4, 4)
    open_by = network.ffm(spatial, context) / network.ffm.conv1(torch.cat([spatial, context], 1)).clamp(min=1e-30)
    seen = network.ffm.conv1(torch.cat([spatial, context], 1)) > 0
    assert seen.any() and (open_by[seen] >= 1.5 - 1e-5).all() and (open_by[seen] <= 2 + 1e-5).all()


def test_fresh_weights():
    network = BiSeNet(TinyResNet(18, 4, 64, (1, 2, 2, 2)), 19)
    last = network.decode_head.conv_seg
    assert not last.bias.any() and float(last.weight.detach().std()) == pytest.approx(0.01, rel=0.1)
    conv = network.context_path.arm32.conv_layer.conv.weight  # Kaiming by outputs: gain sqrt(2) over 9 x 128
    assert float(conv.detach().std()) == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.05)


def test_every_parameter_learns():
    network = BiSeNet(TinyResNet(18, 4, 4, (1, 2, 2, 2)), 5).train()
    sum(x.square().sum() for x in network.all_logits(torch.rand(2, 3, 64, 64))).backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters() if p.dim() > 1)


def test_other_maps_are_refused():
    maps = [torch.zeros(1, 8, 4, 4)] * 3
    with pytest.raises(UserError, match="four maps of strides 4, 8, 16, 32; the backbone gives 3 of strides 1, 2, 4"):
        BiSeNet(Given(maps, (1, 2, 4)), 5)
    with pytest.raises(UserError, match=r"method.spatial \[8, 8, 8, 0\]: give four widths"):
        BiSeNet(Given([torch.zeros(1, 8, 4, 4)] * 4, (4, 8, 16, 32)), 5)
