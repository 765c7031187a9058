"""The sources of masks, points and objects by name, ``KIND:LOCATION`` as in :mod:`diffrep.data.sources`."""

from __future__ import annotations

from diffrep.data.ade20k import read_ade20k
from diffrep.data.celebamask import read_celebamask
from diffrep.data.coco import LICENCE as COCO_LICENCE
from diffrep.data.coco import read_coco
from diffrep.data.dense import DenseKind
from diffrep.data.placed import placed_licence, read_placed
from diffrep.data.wflw import LICENCE as WFLW_LICENCE
from diffrep.data.wflw import read_wflw

_CELEBAMASK = "CelebAMask-HQ's terms: non-commercial research; no image, nor data derived from one, may be passed on"

DENSE_KINDS: dict[str, DenseKind] = {
    "ade20k": DenseKind(read_ade20k, "pictures: non-commercial research and education, MIT CSAIL's terms"),
    "celebamask-hq": DenseKind(read_celebamask, _CELEBAMASK),
    "coco": DenseKind(read_coco, COCO_LICENCE),
    "placed": DenseKind(read_placed, placed_licence),
    "wflw": DenseKind(read_wflw, WFLW_LICENCE),
}
