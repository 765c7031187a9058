"""A study of the second road, written by hand: a classifier teaches students on drawn and on other images."""

import io
import json
import tarfile
from pathlib import Path

from folders import write_folder
from PIL import Image

GENERATOR = {"diffusion model (as its condition)": 800}
LICENCE = "Apache-2.0 (weights trained here)"
ARMS = {
    "classifier": "teacher: real labels",
    "real_pupil": "student: real images + KD",
    "real_labels": "student: real images, labels",
    "set_pupil": "student: drawn images + KD",
    "set_labels": "student: drawn images, labels",
    "photographs_pupil": "student: unrelated photographs + KD",
    "one_image_pupil": "student: one photograph + KD",
    "noise_pupil": "student: noise + KD",
}
SOURCES = {
    "classifier": "digits",
    "real_pupil": "digits",
    "real_labels": "digits",
    "set_pupil": "synthetic:stage:set",
    "set_labels": "synthetic:stage:set",
    "photographs_pupil": "photographs:60x8",
    "one_image_pupil": "one_image:60x8",
    "noise_pupil": "noise:60x8",
}
TOP1 = {  # per seed
    "classifier": (98.0, 97.5, 98.25),
    "real_pupil": (97.5, 97.0, 97.25),
    "real_labels": (96.0, 95.5, 96.25),
    "set_pupil": (97.0, 97.5, 96.75),
    "set_labels": (94.0, 94.25, 93.5),
    "photographs_pupil": (30.0, 31.0, 29.0),
    "one_image_pupil": (25.0, 26.0, 24.0),
    "noise_pupil": (20.0, 21.0, 19.0),
}
SAMPLING = {"sampler": "ddim", "num_sampling_steps": "20", "guidance_scale": 1.5}
CLASSES = ["zero", "one", "two"]


def training(name: str, source: str, method: dict, protocol: str = "classifier") -> dict:
    return {
        "name": name,
        "kind": "recipe",
        "data": {"source": source},
        "method": method,
        "train": {"steps": 20},
        "evaluate": {"protocol": protocol},
    }


def pupil(source: str, answers: str | None = None) -> dict:
    teacher, student = {"reference": "stage:classifier"}, {"name": "s"}  # smaller than its teacher
    return training("pupil", source, {"kind": "dmkd", "teacher": teacher, "answers": answers, "student": student})


def drawn(**sampling: object) -> dict:
    synthesis = {"sampling": {**SAMPLING, **sampling}, "images": 60}
    return {"name": "drawn", "kind": "synthesis", "generator": "stage:generator", "synthesis": synthesis}


def stages() -> dict[str, dict]:
    found = {"generator": training("generator", "digits", {"kind": "denoiser"}, "features"), "set": drawn()}
    found["set_answers"] = {
        "name": "answers",
        "kind": "answers",
        "teacher": {"reference": "stage:classifier"},
        "data": {"source": "synthetic:stage:set"},
    }
    for name, source in SOURCES.items():
        labelled = training(name, source, {"kind": "finetune", "init": None})
        stored = "stage:set_answers" if name == "set_pupil" else None
        found[name] = pupil(source, stored) if name.endswith("_pupil") else labelled
    return found


def scores(name: str, seed: int) -> dict:
    found = {"top1": TOP1[name][seed], "top5": 99.5, "ece": 1.25, "test_images": 400}
    return found | ({"agreement": 98.5, "best_top1": 96.5} if name.endswith("_pupil") else {})


def result(name: str, stage: dict, seed: int) -> dict:
    """What a finished stage writes down."""
    base = {"name": stage["name"], "kind": stage["kind"], "seed": seed, "licence": LICENCE, "cpu_seconds": 2.0}
    base |= {"multiply_adds": 1_000_000_000, "images_seen": 640, "labels_seen": {}, "labels_behind": {}}
    if name == "generator":
        base["labels_seen"] = GENERATOR
    if name in TOP1:
        base |= {"scores": scores(name, seed), "steps": 20, "parameters": 100}
    if name.endswith("_pupil"):
        base["labels_behind"] = {"teacher: student": 1000}
    elif name in TOP1:
        base["labels_seen"] = {"student": 1000 if SOURCES[name] == "digits" else 54}
    if SOURCES.get(name, "").startswith("synthetic:"):
        base["labels_behind"] |= {f"generator: {part}": count for part, count in GENERATOR.items()}
    return base


def metrics(name: str) -> list[dict]:
    shares = {"agreement": 0.5, "kd_loss": 4.0} if name.endswith("_pupil") else {}
    return [{"step": s, "loss": 2 / s, **{k: v if s == 10 else v / 2 for k, v in shares.items()}} for s in (10, 20)]


def recipe_of(arms: dict[str, str], all_stages: dict[str, dict], seeds: list[int]) -> dict:
    return {
        "name": "drawn_little",
        "about": "A student that sees nothing real.",
        "kind": "study",
        "seeds": seeds,
        "stages": all_stages,
        "arms": arms,
        "headline": "top1",
    }


def write_second_road(folder: Path, seeds: list[int]) -> Path:
    """The whole study, finished."""
    every = stages()
    for seed in seeds:
        for name, stage in every.items():
            own = folder / f"{name}-s{seed}"
            write_folder(own, stage | {"seed": seed}, result(name, stage, seed), metrics(name) if name in TOP1 else [])
        write_set(folder / f"set-s{seed}")
    found = {name: {str(seed): scores(name, seed) for seed in seeds} for name in TOP1}
    whole = {"recipe_hash": "abcd1234", "arms": found, "cpu_seconds": 40.0}
    return write_folder(folder, recipe_of(ARMS, every, seeds), whole)


def colour(label: int, number: int) -> tuple[int, int, int]:
    """Of the ``number``-th image of a class: tells the place in a contact sheet."""
    return (50 * label + 20, 10 * number + 5, 200)


def write_set(folder: Path, per_class: int = 20, has_labels: bool = True, size: int = 8, suffix: str = "png") -> Path:
    """Two shards of plain coloured squares, classes in turn, and the manifest over them."""
    folder.mkdir(parents=True, exist_ok=True)
    order = [(label, number) for number in range(per_class) for label in range(len(CLASSES))]
    half = len(order) // 2
    for shard, part in enumerate((order[:half], order[half:])):
        with tarfile.open(folder / f"shard-{shard:06d}.tar", "w") as tar:
            for index, (label, number) in enumerate(part):
                key = f"{shard * half + index:08d}"
                if has_labels:
                    _add(tar, f"{key}.cls", str(label).encode())
                _add(tar, f"{key}.json", b"{}")
                _add(tar, f"{key}.{suffix}", _square(colour(label, number), size, suffix))
    counts = {str(k): per_class for k in range(len(CLASSES))} if has_labels else {"-1": len(order)}
    manifest = {
        "content_hash": "0123456789abcdef" * 4,
        "images": len(order),
        "counts": counts,
        "classes": CLASSES if has_labels else [],
        "calls_per_image": 40,
        "generator": {"licence": "OpenRAIL-M"},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "cost.json").write_text(json.dumps({"cpu_seconds": 12.34}))
    return folder


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _square(fill: tuple[int, int, int], size: int, suffix: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), fill).save(file, suffix.upper(), **({"lossless": True} if suffix == "webp" else {}))
    return file.getvalue()
