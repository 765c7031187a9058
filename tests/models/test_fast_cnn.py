"""The network of the speed run: what its first layer does to patches, where it starts, what of it is trained."""

import pytest
import torch
import torch.nn.functional as F

from diffrep.errors import UserError
from diffrep.models.fast_cnn import FastCNN
from diffrep.models.students import Student, StudentConfig


def images(count=20, side=16, seed=0):
    """Neighbours alike, channels alike, and not centred."""
    noise = torch.randn(count, 3, side + 2, side + 2, generator=torch.Generator().manual_seed(seed))
    return F.avg_pool2d(noise + 2 * noise.mean(1, keepdim=True), 3, 1) + 0.3


def answers(network, shown):
    """(24, patches): the first layer before its activation."""
    return F.conv2d(shown.double(), network.stem.weight.double()).transpose(0, 1).flatten(1)


def test_whitening_whitens():
    network, shown = FastCNN(10), images()
    network.whiten(shown)
    found = answers(network, shown)
    twelve = found[:12] @ found[:12].T / found.shape[1]
    patches = F.unfold(shown.double(), 2).transpose(0, 1).flatten(1)
    values = torch.linalg.eigvalsh(patches @ patches.T / patches.shape[1])
    assert values.max() / values.min() > 100  # they were far from white
    # The identity up to the 5e-4 that is added to each eigenvalue.
    torch.testing.assert_close(twelve, (values / (values + 5e-4)).diag(), atol=1e-5, rtol=0)
    assert (twelve.diagonal() > 0.9).all()
    torch.testing.assert_close(found[12:], -found[:12])


def test_more_images_than_a_block_are_all_seen(monkeypatch):
    from diffrep.models import fast_cnn

    whole, in_blocks = FastCNN(), FastCNN()
    whole.whiten(images())
    monkeypatch.setattr(fast_cnn, "BLOCK", 7)
    in_blocks.whiten(images())
    torch.testing.assert_close(answers(whole, images()).abs(), answers(in_blocks, images()).abs())


def test_grey_images_leave_directions_empty_and_nothing_blows_up():
    network, grey = FastCNN(), images().mean(1, keepdim=True).expand(-1, 3, -1, -1)
    network.whiten(grey)
    variance = answers(network, grey)[:12].square().mean(1)
    assert network.stem.weight.abs().max() <= 1 / 5e-4**0.5 + 1e-3
    assert (variance < 1e-6).sum() == 8 and (variance > 0.9).sum() == 4  # 12 numbers, 4 of them different


def test_first_filters_hand_their_inputs_on():
    network = FastCNN(widths=(64, 256, 256))
    for layer, inputs in ((network.layer1[0], 24), (network.layer2[0], 64), (network.layer3[4], 256)):
        x = torch.randn(2, inputs, 5, 5, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(layer(x)[:, :inputs], x)
    assert network.layer1[0].weight[24:].std() > 0.01  # those without an input are random


def test_what_is_trained_and_in_which_parts():
    network = FastCNN(10)
    sizes = {name: sum(p.numel() for p in part) for name, part in network.rate_parts().items()}
    convolutions = 9 * (24 * 64 + 64 * 64 + 64 * 256 + 3 * 256 * 256)
    assert sizes == {"student": convolutions, "biases": 24 + 2 * (64 + 256 + 256), "head": 2560}
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    assert frozen == {"stem.weight", *(f"layer{g}.{k}.weight" for g in (1, 2, 3) for k in (2, 5))}
    assert all(
        torch.equal(p, torch.ones_like(p)) for n, p in network.named_parameters() if n in frozen - {"stem.weight"}
    )


def test_timms_words_and_sizes():
    network, shown = FastCNN(10), images(2, 32)
    feature = network.forward_features(shown)
    assert feature.shape == (2, 256, 3, 3)
    vector = network.forward_head(feature, pre_logits=True)
    torch.testing.assert_close(vector, F.max_pool2d(feature, 3).flatten(1) / 256)
    torch.testing.assert_close(network(shown), network.get_classifier()(vector))
    network.reset_classifier(0)
    assert torch.equal(network(shown), network.forward_head(network.forward_features(shown)))


def test_a_stem_that_does_not_learn_gets_no_gradient_and_answers_alike():
    network, shown = FastCNN(10), images(4)
    before = network(shown)
    network.stem_learns = False
    torch.testing.assert_close(network(shown), before)
    network(shown).sum().backward()
    assert network.stem.bias.grad is None and network.layer1[0].weight.grad is not None


def test_it_is_a_student_by_name_and_refuses_images_too_small():
    student = Student(StudentConfig(name="fast_cnn", options={"widths": [8, 8, 8]}), 10)
    assert student.try_out(32)[0] == 8
    with pytest.raises(UserError, match=r"fast_cnn.*does not take 8-pixel images"):
        student.try_out(8)
