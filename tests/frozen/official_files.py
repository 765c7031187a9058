"""Tiny networks in the files that OpenAI and DiT's authors publish: what tests and the debug recipes load."""

import torch

from diffrep.models.dit import DiT, DiTConfig
from diffrep.models.guided_unet import GuidedUNet, GuidedUNetConfig

SAID = "image_size=8&head_width=16&attention_order=new&noise_schedule=cosine"


def guided_unet(**changed):
    """Two levels, heads of 16 channels, seven classes and learned variance; no weight is zero."""
    fields = {
        "image_size": 8, "out_channels": 6, "model_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 2),
        "attention_factors": (2,), "num_classes": 7, "num_head_channels": 16, "scale_shift_norm": True,
        "resblock_updown": True, "attention_order": "new",
    }  # fmt: skip
    return stirred(lambda: GuidedUNet(GuidedUNetConfig(**fields | changed)))


def tiny_dit(**changed):
    """Two blocks over 4x4 tokens of 8-pixel images."""
    fields = {
        "input_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 24, "depth": 2, "num_heads": 2,
        "num_classes": 7,
    }  # fmt: skip
    return stirred(lambda: DiT(DiTConfig(**fields | changed)))


def stirred(made):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = made()
        for name, parameter in network.named_parameters():
            if name != "pos_embed":
                parameter.data += 0.1 * torch.randn_like(parameter)
    return network.eval()


def saved(network, path, wrap=lambda state: state):
    torch.save(wrap(network.state_dict()), path)
    return path
