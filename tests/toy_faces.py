"""Faces of five points, made up, and WFLW's folders: what tests of landmarks share."""

import json

import torch
from PIL import Image

from diffrep.data.dense import DensePart, DenseRead, DenseSet
from diffrep.data.wflw import Face

EYES = (0, 1)
PAIRS = ((0, 1), (3, 4))  # eyes and corners of the mouth; 2 is the nose
SHAPE = torch.tensor([[-1.0, -0.8], [1, -0.8], [0, 0], [-0.7, 0.9], [0.7, 0.9]], dtype=torch.float64)


def face(x=60.0, y=50.0, half=20.0, visible=None):
    """Five points around (x, y), ``half`` pixels to each side."""
    points = SHAPE * half + torch.tensor([x, y], dtype=torch.float64)
    seen = torch.ones(5, dtype=torch.bool) if visible is None else torch.tensor(visible, dtype=torch.bool)
    return Face(points, seen, torch.tensor([x, y], dtype=torch.float64), half / 100)


def face_set(faces, images=None, normaliser=EYES, subsets=None, size=(100, 120)):
    """A split of these faces, on black (or the given (H, W, 3) uint8 pictures)."""
    images = [torch.zeros(*size, 3, dtype=torch.uint8).numpy()] * len(faces) if images is None else images
    part = DensePart(
        [f"face {k}" for k in range(len(faces))], images.__getitem__, faces.__getitem__, subsets=subsets or {}
    )
    names = tuple(f"point {k}" for k in range(len(faces[0].points)))
    read = DenseRead(names, {"train": part}, PAIRS, {"normaliser": normaliser})
    return DenseSet("wflw:toy", "train", read, part, torch.arange(len(faces)), "none")


def wflw_entries(folder):
    """(annotation, its image's file) of the four faces of the fixture."""
    content = json.loads((folder / "annotations/face_landmarks_wflw_test.json").read_text())
    files = {image["id"]: image["file_name"] for image in content["images"]}
    return [(entry, files[entry["image_id"]]) for entry in content["annotations"]]


def text_line(entry, file, flags=(0, 0, 0, 0, 0, 0)):
    """The entry as a line of the official text list."""
    numbers = [v for k, v in enumerate(entry["keypoints"]) if k % 3 < 2]
    x, y, width, height = (round(v) for v in entry["bbox"])
    return " ".join(map(str, [*numbers, x, y, x + width, y + height, *flags, file]))


def blank(path, size):
    """A grey picture of (width, height) in the place of a photograph."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 90, 90)).save(path)
