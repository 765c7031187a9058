"""A study of the third road, written by hand: three networks, and images that two of them make."""

import json
from pathlib import Path

from folders import write_folder
from PIL import Image
from second_road import training

LICENCE = "Apache-2.0 (weights trained here)"
ARMS = {
    "alternation": "ADDP: tokens and pixels in turn",
    "predictor_alone": "MAGE: token predictor alone",
    "one_step": "ADDP: all tokens at once",
}
FRECHET = {"alternation": (5.0, 5.5, 5.25), "predictor_alone": (4.0, 4.25, 4.5), "one_step": (10.5, 11.0, 11.5)}
FEATURES = "judge-s0's pooled features, D = 128, weights 0123456789ab"
SAID = "1,000 images are fewer than 10,000: a Frechet distance then comes out too large."
MADE, SIDE = 24, 8


def generation(model: str, by: str, steps: int) -> dict:
    return {
        "name": "made",
        "kind": "generation",
        "model": f"stage:{model}",
        "by": by,
        "alternation": {"steps": steps},
        "reference": "digits",
        "score": {"features": {"reference": "stage:classifier"}},
    }


def stages(source: str = "digits") -> dict[str, dict]:
    shared = {"tokenizer": "stage:tokenizer"}
    three = {
        "tokenizer": {"kind": "tokenizer", "network": {"num_codes": 32}},
        "token_predictor": {"kind": "token_predictor", **shared},
        "addp": {"kind": "addp", "token_predictor": "stage:token_predictor", **shared},
    }
    return {
        **{name: training(name, source, method, "features") for name, method in three.items()},
        "classifier": training("classifier", "digits", {"kind": "finetune", "init": None}),
        "alternation": generation("addp", "addp", 8),
        "predictor_alone": generation("token_predictor", "predictor", 8),
        "one_step": generation("addp", "addp", 1),
    }


def result(name: str, stage: dict, seed: int) -> dict:
    base = {"name": stage["name"], "kind": stage["kind"], "seed": seed, "licence": LICENCE, "cpu_seconds": 2.0}
    base |= {"multiply_adds": 1_000_000_000, "images_seen": 640}
    if name in ARMS:
        return base | made_result(FRECHET[name][seed])
    scores = {"classifier": {"top1": 98.5, "test_images": 400}, "addp": {"linear_probe_50": 79.4, "test_images": 400}}
    seen = {"student": 1000} if name == "classifier" else {}
    used = {"codes_used": 0.75} if name == "tokenizer" else {}
    found = {"labels_seen": seen, "labels_behind": {}, "steps": 20, "parameters": 100}
    return base | found | used | {"scores": scores.get(name, {})}


def made_result(frechet: float) -> dict:
    protocol = {"name": "named features", "images": 1000, "reference": "digits", "reference_images": 1797}
    score = {"name": "Frechet distance on judge", "value": frechet, "protocol": protocol | {"features": FEATURES}}
    scores = {"frechet": frechet, "kernel": frechet / 100}
    return {"images": MADE, "scores": scores, "protocol": {"scores": [score], "said": [SAID]}}


LOGGED = {"tokenizer": {"mse": 0.5}, "token_predictor": {"masked_top1": 0.25}, "addp": {"loss": 3.0}}


def metrics(name: str) -> list[dict]:
    """Each number at step 10, and half of it at step 20."""
    own = LOGGED.get(name, {})
    return [{"step": s, **{k: v * 10 / s for k, v in own.items()}} for s in (10, 20)] if own else []


def colour(arm: str, number: int) -> tuple[int, int, int]:
    """Of the ``number``-th image of an arm: tells the place in a contact sheet."""
    return (50 + 50 * list(ARMS).index(arm), 5 * number, 200)


def write_images(folder: Path, arm: str, seed: int) -> Path:
    """What ``diffrep generate`` leaves in a folder: plain squares, grid, film, and the facts."""
    seeds = list(range(seed * MADE, (seed + 1) * MADE))
    (folder / "images").mkdir(parents=True)
    for number, one in enumerate(seeds):
        Image.new("RGB", (SIDE, SIDE), colour(arm, number)).save(folder / "images" / f"seed-{one:06d}.png")
    Image.new("RGB", (64, 32), "red").save(folder / "grid.png")
    Image.new("RGB", (96, 48), "blue").save(folder / "film.png")
    found = {
        "images": MADE, "seeds": seeds, "by": stages()[arm]["by"], "image_size": [SIDE, SIDE], "tokens": 16,
        "masked": [16, 9, 1], "repair": None, "filmed": seeds[:4],
    }  # fmt: skip
    (folder / "generated.json").write_text(json.dumps(found))
    return folder


def recipe_of(every: dict[str, dict], seeds: list[int], arms: dict[str, str]) -> dict:
    return {
        "name": "tokens_little",
        "about": "Tokens and pixels in turn.",
        "kind": "study",
        "seeds": seeds,
        "stages": every,
        "arms": arms,
        "headline": "frechet",
    }


def write_stages(folder: Path, every: dict[str, dict], seeds: list[int]) -> None:
    for seed in seeds:
        for name, stage in every.items():
            own = folder / f"{name}-s{seed}"
            if name in ARMS:
                write_images(own, name, seed)
            write_folder(own, stage | {"seed": seed}, result(name, stage, seed), metrics(name))


def write_third_road(folder: Path, seeds: list[int], source: str = "digits") -> Path:
    """The whole study, finished."""
    every = stages(source)
    write_stages(folder, every, seeds)
    whole = {"recipe_hash": "abcd1234", "arms": {}, "cpu_seconds": 40.0}
    return write_folder(folder, recipe_of(every, seeds, ARMS), whole)
