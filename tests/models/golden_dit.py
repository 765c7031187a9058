"""Our DiT with the weights of a golden case, and tiny DiTs in which every weight has a value."""

import torch

from diffrep.models.dit import DiT, DiTConfig

FIELDS = (
    "input_size",
    "patch_size",
    "in_channels",
    "hidden_size",
    "depth",
    "num_heads",
    "mlp_ratio",
    "num_classes",
    "learn_sigma",
)


def is_dit(case):
    return "hidden_size" in case.meta and "outputs/forward" in case.keys


def config_of(case):
    fields = {name: case.meta[name] for name in FIELDS}
    return DiTConfig(**fields, has_null_class=case.meta["class_dropout_prob"] > 0)


def dit_of(case):
    network = DiT(config_of(case))
    network.load_state_dict(case.under("weights/"))  # strictly
    return network.eval()


TINY = {"input_size": 8, "hidden_size": 16, "depth": 3, "num_heads": 2, "num_classes": 5}


def tiny(seed=0, std=0.3, **changes):
    """A DiT that was not left at zero, as training would leave it; positions are the table."""
    network = DiT(DiTConfig(**(TINY | changes)))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.named_parameters():
            if name != "pos_embed":
                value.copy_(torch.randn(value.shape, generator=rng) * std)
    return network.eval()


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
