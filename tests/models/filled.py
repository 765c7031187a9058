"""The weights of the golden classifiers: none are stored, a rule fills them (spec of the distillation, section 11)."""

import numpy as np
import torch

from diffrep.models import convert
from diffrep.models.students import create

# The official name of a golden case -> ours.
PADDED = {"shortcut": "pad"}
OURS = {
    **{f"resnet{d}": (f"resnet{d}_cifar", {}) for d in (8, 14, 20, 32, 44, 56, 110)},
    **{f"akamaster_resnet{d}": (f"resnet{d}_cifar", PADDED) for d in (20, 32, 44, 56, 110)},
    **{f"resnet{d}x4": (f"resnet{d}x4_cifar", {}) for d in (8, 32)},
    **{f"ResNet{d}": (f"resnet{d}_cifar", {}) for d in (18, 34, 50)},
    **{f"cifarresnet{d}": (f"resnet{d}_cifar", {"stem_relu": False}) for d in (18, 34)},
    **{f"wrn_{d}_{k}": (f"wrn_{d}_{k}_cifar", {}) for d in (16, 40) for k in (1, 2)},
    **{f"vgg{d}": (f"vgg{d}_cifar", {}) for d in (8, 11, 13, 16, 19)},
    "MobileNetV2": ("mobilenetv2_half_cifar", {}),
    "ShuffleV1": ("shufflenetv1_cifar", {}),
    "ShuffleV2": ("shufflenetv2_cifar", {}),
    "fast_resnet18": ("resnet18_cifar", {}),
    "fast_wrn16_1": ("wrn_16_1_cifar", {}),
}


def generator(seed):
    return np.random.Generator(np.random.PCG64(seed))


def fill(state_dict, seed, gain):
    """{official key: tensor} for a list of (key, shape) in the official order."""
    rng = generator(seed)
    return {key: torch.from_numpy(np.asarray(_drawn(rng, key, tuple(shape), gain))) for key, shape in state_dict}


def _drawn(rng, key, shape, gain):
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if key.endswith("running_var"):
        value = 0.5 + rng.random(shape)
    elif key.endswith("running_mean"):
        value = 0.1 * rng.standard_normal(shape)
    elif len(shape) >= 2:
        value = rng.standard_normal(shape) * np.sqrt(gain / np.prod(shape[1:]))
    elif key.endswith(".weight"):
        value = 1 + 0.1 * rng.standard_normal(shape)
    else:
        value = 0.1 * rng.standard_normal(shape)
    return np.asarray(value).astype(np.float32)


def drawn_images(seed, batch, px):
    return torch.from_numpy(generator(seed).standard_normal((batch, 3, px, px)).astype(np.float32))


def official(arch, num_classes, state_dict, seed, gain):
    """Our network in the place of the official ``arch``, filled with its weights under their official names."""
    name, options = OURS[arch]
    network = create(name, num_classes, **options)
    network.load_state_dict(convert.fitted(fill(state_dict, seed, gain), network.state_dict(), arch))
    return network
