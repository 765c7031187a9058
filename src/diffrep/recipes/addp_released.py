"""ADDP as it was released: 50,000 images of 256 pixels by each official script, scored; MAGE alone as the rival.

Tian et al., ICLR 2024, arXiv 2306.05423. One stage each, `images`; `diffrep reproduce` does the same with progress, on
more than one process, and prints published numbers beside ours. There is no official script of 256 steps for base.
The rival needs no file of its own: a released ADDP file holds MAGE's predictor and tokenizer.
"""

from __future__ import annotations

from typing import Literal

from diffrep.assets import ASSETS
from diffrep.diffusion.masking import AlternationConfig
from diffrep.evaluation.generation import ScoreConfig
from diffrep.evaluation.inception import WEIGHTS, WEIGHTS_PAGE
from diffrep.recipes.base import GenerationTask, Published, Rival, Study
from diffrep.recipes.dmkd_rows import named

REFERENCE = "data/imagenet-val256"
BLOCK = 16  # images computed together: these sets are made on GPUs
COSINE = AlternationConfig(steps=20, schedule="cosine", choice_temperature=6.0)
LINEAR = AlternationConfig(steps=256, schedule="linear", choice_temperature=6.0)
SIZES = {
    "base": ("ViT-B", "addp-vit-base-16", "mage-vitb-1600"),
    "large": ("ViT-L", "addp-vit-large-16", "mage-vitl-1600"),
}
TABLES = {"addp": "ADDP README, table of unconditional generation", "predictor": "MAGE README, FID and IS of 20 steps"}
ASSUMED = {
    "addp": (
        "which schedule the published numbers are of, 20 or 256 steps, is not stated; cosine with 20 is called the "
        "default",
        "each image has its own seed; published: one generator for a whole batch",
    ),
    "predictor": ("each image has its own seed; published: the number of its batch",),
}
SCORED = (
    f"data: {REFERENCE} (diffrep data prepare imagenet-val256 data/imagenet {REFERENCE}; ImageNet's terms: "
    "non-commercial research)",
    f"weights: Inception's {WEIGHTS} ({WEIGHTS_PAGE}; docs/scores.md says where to put it)",
)

By = Literal["addp", "predictor"]


def made(name: str, size: str, by: By, alternation: AlternationConfig) -> Study:
    """Every step and setting of the script; only images differ, because seeds do."""
    words, key, mage = SIZES[size]
    method = f"ADDP {words}" if by == "addp" else f"MAGE {words}, the predictor alone"
    stage = GenerationTask(
        name=name, model=f"weights/{key}", by=by, alternation=alternation, block_size=BLOCK, images=50_000,
        reference=f"folder:{REFERENCE}", score=ScoreConfig(protocol="inception-val"),
    )  # fmt: skip
    return Study(
        name=name,
        about=f"{method}: 50,000 images in {alternation.steps} steps ({alternation.schedule}), and their FID and IS.",
        stages={"images": stage},
        published=published(words, key if by == "addp" else mage, by, mage),
        assumed=ASSUMED[by],
        needs=(_networks(key), *SCORED),
        next_commands=(f"diffrep reproduce addp-{size}",) if by == "addp" else (),
    )


def published(words: str, key: str, by: By, mage: str) -> Published:
    """FID, with IS in words: a ledger has one number a row."""
    found, other = ASSETS[key].scores, ASSETS[mage].scores
    rival = Rival(method=f"MAGE {words} (IS {other['IS']})", value=other["FID"], source="MAGE README")
    metric = f"FID of 50,000 images, inception-val, unconditional at 256 pixels (IS {found['IS']})"
    rivals = (rival,) if by == "addp" else ()
    return Published(value=found["FID"], metric=metric, source=f"{TABLES[by]}, {words}", rivals=rivals)


def _networks(key: str) -> str:
    asset = ASSETS[key]
    how = f"diffrep convert {key}.pth --out weights/{key}"
    return f"weights: {key}.pth of {asset.location} in weights/{key} ({how}); licence {asset.licence}"


RECIPES = (
    named("addp_generate_base_steps20", made, "base", "addp", COSINE),
    named("addp_generate_large_steps20", made, "large", "addp", COSINE),
    named("addp_generate_large_steps256_linear", made, "large", "addp", LINEAR),
    named("addp_mage_base_steps20", made, "base", "predictor", COSINE),
    named("addp_mage_large_steps20", made, "large", "predictor", COSINE),
)
