"""Lets timm, diffusers and torchvision be imported beside a CPU-only torch.

torchvision's Linux wheel is compiled against the CUDA build of torch. Beside a CPU-only torch its operators do not
load, and importing it fails because it registers Python kernels for operators that nobody has declared. Declaring
the two signatures is enough for everything used here (transforms, timm models, diffusers pipelines), which is pure
Python. Where the compiled operators exist, nothing is done.
"""

from __future__ import annotations

import importlib.util

_SIGNATURES = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_libraries: list[object] = []  # torch drops a library's declarations when the object dies


def install() -> bool:
    """Declare the missing torchvision operators; call it before importing torchvision, timm or diffusers.

    Returns:
        True where a declaration was needed, False where the compiled operators load (or torchvision is absent).
    """
    if _libraries or importlib.util.find_spec("torchvision") is None or compiled_operators_load():
        return bool(_libraries)
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for signature in _SIGNATURES.values():
        library.define(signature)
    _libraries.append(library)
    return True


def compiled_operators_load() -> bool:
    """Whether torchvision's compiled library loads into this torch."""
    import torch

    if all(torch._C._dispatch_has_kernel(f"torchvision::{name}") for name in _SIGNATURES):
        return True
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return False
    from pathlib import Path

    # _C.so until torchvision 0.28, _C_stable.so after it.
    for library in sorted(Path(spec.submodule_search_locations[0]).glob("_C*.*")):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
        return True
    return False
