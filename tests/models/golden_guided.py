"""The official numbers of guided-diffusion's U-Net, and our network with the weights of a golden case."""

import torch
from safetensors import safe_open

from diffrep.models.guided_unet import GuidedUNet, GuidedUNetConfig

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # of the file's own section on tolerances


def is_guided(case):
    return "unet_kwargs" in case.meta and "outputs/forward" in case.keys


def config_of(kwargs):
    """Official arguments as ours; a factor that no level has does nothing there."""
    factors = {2**level for level in range(len(kwargs["channel_mult"]))}
    return GuidedUNetConfig(
        image_size=kwargs["image_size"],
        in_channels=kwargs["in_channels"],
        out_channels=kwargs["out_channels"],
        model_channels=kwargs["model_channels"],
        num_res_blocks=kwargs["num_res_blocks"],
        channel_mult=tuple(kwargs["channel_mult"]),
        attention_factors=tuple(sorted(factors & set(kwargs["attention_resolutions"]))),
        num_classes=kwargs.get("num_classes"),
        num_heads=max(kwargs.get("num_heads", 1), 1),
        num_head_channels=_set(kwargs.get("num_head_channels", -1)),
        num_heads_upsample=_set(kwargs.get("num_heads_upsample", -1)),
        scale_shift_norm=kwargs.get("use_scale_shift_norm", False),
        resblock_updown=kwargs.get("resblock_updown", False),
        conv_resample=kwargs.get("conv_resample", True),
        attention_order="new" if kwargs.get("use_new_attention_order") else "legacy",
    )


def _set(number):
    return None if number == -1 else number


def weights_of(case):
    """Float32, of the case or of the one it says it shares them with."""
    prefix = f"case/{case.meta.get('weights_from', case.name)}/weights/"
    with safe_open(case.file, "pt") as tensors:
        keys = [key for key in tensors.keys() if key.startswith(prefix)]  # noqa: SIM118
        return {key.removeprefix(prefix): tensors.get_tensor(key).float() for key in keys}


def network_of(case, **changed):
    """Strictly loaded."""
    config = config_of(case.meta["unet_kwargs"])
    network = GuidedUNet(config.model_copy(update=changed))
    network.load_state_dict(weights_of(case))
    return network.eval()


def inputs_of(case, timesteps="inputs/timesteps"):
    return case.get("inputs/x"), case.get(timesteps), labels_of(case)


def labels_of(case):
    """None for an unconditional case."""
    return case.get("inputs/y") if "inputs/y" in case.keys else None


def close(found, expected):
    torch.testing.assert_close(found, expected, **CLOSE)
