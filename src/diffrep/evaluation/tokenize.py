"""What a tokenizer keeps of images: ids, reconstruction, error, and how much of its codebook is used.

Letters: N images, K codes, (h, w) the token grid.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from diffrep.config import validate
from diffrep.console import progress
from diffrep.data.datasets import DataConfig, ImageSet, Split, load_data
from diffrep.data.images import IMAGE_SUFFIXES, Part, Stream
from diffrep.errors import UserError, nearest
from diffrep.files import write_atomic
from diffrep.frozen.tokens import Tokenizer, load_tokenizer
from diffrep.models.vqgan import perplexity

BLOCK = 16  # images of a data set at once


@dataclass
class Tally:
    """What was seen so far. chosen: (K,) how often each code was named; errors: of each image."""

    chosen: Tensor
    errors: list[float] = field(default_factory=list)

    def add(self, ids: Tensor, images: Tensor, drawn: Tensor) -> None:
        self.chosen += torch.bincount(ids.flatten().cpu(), minlength=len(self.chosen))
        self.errors += (images - drawn).square().flatten(1).mean(1).tolist()

    def found(self) -> dict[str, Any]:
        """perplexity: exp of the entropy of the codes; mse: the mean over images, in [0, 1]; psnr: of that mean, dB."""
        mse, used = math.fsum(self.errors) / len(self.errors), int((self.chosen > 0).sum())
        return {
            "images": len(self.errors),
            "codes": len(self.chosen),
            "codes_used": used,
            "share_used": used / len(self.chosen),
            "perplexity": float(perplexity(self.chosen)),
            "mse": mse,
            "psnr": -10 * math.log10(mse) if mse else None,
        }


def tokenize(
    images: str | Path | Sequence[str],
    tokenizer: str | Tokenizer,
    out: str | Path | None = None,
    image_size: int | None = None,
    split: Split = "validation",
) -> dict[str, Any]:
    """Encode and decode images, on a GPU where there is one.

    Args:
        images: files and folders of them, or one data reference.
        tokenizer: a reference (see :mod:`diffrep.frozen.tokens`), or what was loaded from one.
        out: PNG file for the reconstruction of a single image, held in [0, 1].
        image_size: shorter side resized to it, centre crop; None: as stored.
        split: of a data reference.

    Returns:
        the numbers of :class:`Tally`, ``image_size`` and ``grid`` of the last image, and of a single one its ``ids``.

    Raises:
        UserError: no image, an unreadable one, a size that the stride does not divide, a tokenizer without decoder.
    """
    sources, target = [str(images)] if isinstance(images, str | Path) else list(images), Path(out) if out else None
    total, blocks = _opened(sources, image_size, split)
    _check_target(target, sources, total)
    loaded = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tally = Tally(torch.zeros(loaded.num_codes, dtype=torch.int64))
    with progress("images") as told:
        for block in blocks:
            pixels = block.to(device).float() / 255
            ids, drawn = copied(loaded, pixels)
            tally.add(ids, pixels, drawn)
            told(len(tally.errors), total)
    grid = loaded.grid(pixels)
    if target is not None:
        write_atomic(target, _png(drawn[0]))
    found = {"tokenizer": loaded.name, "licence": loaded.licence, **tally.found()}
    found |= {"image_size": list(pixels.shape[-2:]), "grid": list(grid), "out": str(target) if target else None}
    return found | ({"ids": ids[0].unflatten(0, grid).tolist()} if total == 1 else {})


def copied(tokenizer: Tokenizer, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Ids (B, L) of images (B, 3, H, W) in [0, 1], and what they give back, held there."""
    ids = tokenizer.encode(pixels)
    return ids, tokenizer.decode(tokenizer.lookup(ids), tokenizer.grid(pixels)).float().clamp(0, 1)


def reconstruction_scores(tokenizer: Tokenizer, test: ImageSet, device: torch.device) -> dict[str, Any]:
    """``psnr`` of the mean squared error in dB, ``test_codes_used`` in percent and ``test_perplexity``, of all images.

    Where the copies are perfect there is no ``psnr``.
    """
    tally = Tally(torch.zeros(tokenizer.num_codes, dtype=torch.int64))
    for block in _blocks(test):
        pixels = block.to(device).float() / 255
        ids, drawn = copied(tokenizer, pixels)
        tally.add(ids, pixels, drawn)
    found = tally.found()
    scores = {"test_codes_used": 100 * found["share_used"], "test_perplexity": found["perplexity"]}
    scores |= {"psnr": found["psnr"]} if found["psnr"] is not None else {}
    return {name: round(score, 3) for name, score in scores.items()} | {"test_images": found["images"]}


def _check_target(out: Path | None, sources: Sequence[str], total: int) -> None:
    if out is None:
        return
    if out.suffix.lower() != ".png" or out.is_dir():
        raise UserError(f"--out {out}: the reconstruction is written as a .png file")
    if total > 1:
        raise UserError(f"--out {out}: {total} images were given, and one reconstruction is written; give one image")
    if out.resolve() in [Path(source).resolve() for source in sources]:
        raise UserError(f"--out {out} is the image itself; choose another")


def _png(image: Tensor) -> bytes:
    """(3, H, W) in [0, 1], rounded."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray((image * 255).round().byte().movedim(0, 2).cpu().numpy()).save(file, "PNG")
    return file.getvalue()


# Where images come from


def _opened(sources: Sequence[str], image_size: int | None, split: Split) -> tuple[int, Iterator[Tensor]]:
    """How many images, and (B, 3, H, W) uint8 blocks of them; files one by one, for their sizes may differ."""
    if split not in get_args(Split):
        raise UserError(f"split '{split}'; {nearest(split, get_args(Split))}")
    if not sources:
        raise UserError("no image was given")
    if len(sources) == 1 and not Path(sources[0]).exists() and Path(sources[0]).suffix not in IMAGE_SUFFIXES:
        values = {"source": sources[0], "image_size": image_size}
        images = load_data(validate(DataConfig, values, "tokenize"), split)
        return len(images), _blocks(images)
    files = [file for source in sources for file in _files(Path(source))]
    part = Part([str(f) for f in files], lambda i: files[i].read_bytes(), None)
    return len(files), _singly(part, image_size)


def _blocks(images: ImageSet) -> Iterator[Tensor]:
    for rows in torch.arange(len(images)).split(BLOCK):
        yield images.gather(rows)


def _singly(part: Part, image_size: int | None) -> Iterator[Tensor]:
    for row in range(len(part)):
        yield Stream("tokenize", part, torch.tensor([row]), image_size).gather(torch.tensor([0]))


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = sorted(f for f in path.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES) if path.is_dir() else []
    if not found:
        why = "holds no image" if path.is_dir() else "does not exist"
        valid = f"image files ({', '.join(IMAGE_SUFFIXES[:4])}, ...), a folder of them, a data reference"
        raise UserError(f"{path} {why}; valid: {valid}")
    return found
