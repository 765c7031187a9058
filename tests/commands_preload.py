"""What the fork server of commands.py imports once."""

import torch

from diffrep import _torchvision_compat, api, words  # noqa: F401
from diffrep.evaluation import probe  # noqa: F401
from diffrep.models.students import _register

torch.set_num_threads(1)
_torchvision_compat.install()

import sklearn.datasets  # noqa: E402, F401
import timm  # noqa: E402, F401
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel  # noqa: E402, F401

_register()
