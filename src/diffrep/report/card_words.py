"""What a data card says in sentences, for its page and for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffrep.report.numbers import listed

Found = Mapping[str, Any]  # of diffrep.evaluation.card
FAR_MORE = "far more than chance"


def findings(found: Found) -> list[tuple[str, str]]:
    """(question, answer) each."""
    return [*labels_found(found), *repeats_found(found), *memory_found(found), *distance_found(found)]


def labels_found(found: Found) -> Iterator[tuple[str, str]]:
    opinion = found["opinion"]
    if not opinion:
        return
    teacher, ours, real = found["teacher"]["name"], opinion["all"]["agreement"], opinion["real"]
    if ours is None:
        yield "Confidence", f"{opinion['confidence']:.1f} % on average, the probability {teacher} gives its own answer."
        return
    beside = f"; of held-out real images it gets {real['agreement']:.1f} % right" if real and real["images"] else ""
    yield "Labels", f"{teacher} sees the class that was asked for in {ours:.1f} % of the images{beside}."


def repeats_found(found: Found) -> Iterator[tuple[str, str]]:
    yield "Repeats within the set", f"{equal_within(found)} {_near(found, 'within', 'to another')}".strip()


def memory_found(found: Found) -> Iterator[tuple[str, str]]:
    if found["real"]:
        yield "Memorisation", f"{equal_to_training(found)} {_near(found, 'against', 'to a training image')}"


def alarms(found: Found) -> list[str]:
    """What no reader may overlook."""
    near = [space["against"] for space in found["spaces"] if "against" in space]
    said = []
    if found["repeats"]["copies"] or any(verdict(n) == FAR_MORE for n in near):
        said.append("Training images of the real set, or near copies of them, stand in this set.")
    if found["repeats"]["repeated"] or any(verdict(s["within"]["equal"]) == FAR_MORE for s in found["spaces"] if near):
        said.append("This set repeats itself far more than real images do.")
    return said


def equal_within(found: Found) -> str:
    count, most = found["repeats"]["repeated"], found["repeats"]["most"]
    if not count:
        return "No two images are equal."
    return f"{count:,} images equal an earlier one pixel for pixel; one occurs {most:,} times."


def equal_to_training(found: Found) -> str:
    copies = found["repeats"]["copies"]
    return (
        f"{copies:,} images equal a training image pixel for pixel." if copies else "No image equals a training image."
    )


def _near(found: Found, side: str, what: str) -> str:
    """One sentence for all spaces."""
    near = {s["name"]: s[side].get("equal") if side == "within" else s[side] for s in found["spaces"]}
    shares = [f"{n['share']:.1f} % in {space} ({verdict(n)})" for space, n in near.items() if n]
    return f"Suspiciously near {what}: {listed(shares)}; of real images it is 1 %." if shares else ""


def verdict(near: Mapping[str, Any]) -> str:
    """What a share of images that are too near allows one to say; two standard errors decide."""
    if near["share"] <= near["expected"] + 2 * near["noise"]:
        return "no more than chance"
    return "more than chance" if near["share"] < 10 * near["expected"] else FAR_MORE


def distance_found(found: Found) -> Iterator[tuple[str, str]]:
    frechet = found["frechet"]
    if not frechet or not frechet["rows"]:
        return
    whole, *rest = frechet["rows"]
    words = f"{whole['value']:.3g} (N = {whole['images']:,} of each)"
    if len(rest) > 1:
        words += (
            f"; at N = {rest[0]['images']:,} {rest[0]['value']:.3g}, where two real halves have {rest[1]['value']:.3g}"
        )
    yield frechet["name"], f"{words}. {' '.join(doubts(frechet))}".strip()


def doubts(frechet: Mapping[str, Any]) -> list[str]:
    said = []
    if not frechet["is_matched"]:
        said.append("Not reliable: labels could not be matched, and the distance reacts to class proportions.")
    if not all(row["is_reliable"] for row in frechet["rows"]):
        fewest = min(row["images"] for row in frechet["rows"])
        said.append(f"Not reliable: {fewest:,} images for {frechet['width']:,} features; twice as many are needed.")
    if frechet["left_out"]:
        shown = frechet["left_out"][:5]
        more = f" and {len(frechet['left_out']) - 5} more" if len(frechet["left_out"]) > 5 else ""
        said.append(f"Without classes that one side lacks: {', '.join(shown)}{more}.")
    return said


def lines(found: Found, out: Path) -> list[str]:
    """The same for a terminal."""
    about = found["set"]
    head = f"{about['reference']}: {about['images']:,} images, {len(about['classes'])} classes; {about['licence']}"
    return [head, *found["said"], *(f"{name}: {text}" for name, text in findings(found)), f"page: {out}"]


def far(distance: float, space: Mapping[str, Any]) -> str:
    """``16.4 grey levels``, ``cosine distance 0.0019``."""
    return f"{distance:.1f} grey levels" if space["unit"] == "grey levels" else f"{space['unit']} {distance:.2g}"
