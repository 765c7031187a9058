"""The chart of a study's arms, and the words around it: the idea, what its rows are, how sure a score is."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from diffrep.report import made, pictures
from diffrep.report.numbers import binomial_se, listed
from diffrep.report.page import Block, Notes, Picture, Text
from diffrep.report.scores import MEANING, axis_words, measure, printed, score_words, unit_words
from diffrep.report.values import Entry, Study, role

PROBE = (
    "The score is a linear probe: the trained network is frozen, the simplest classifier there is learns from its "
    "output with the labelled images, and what counts is the share of test images it then names correctly. "
)
TOP1 = "The score is top-1: the share of real test images that the network's own last layer names correctly. "
IDEAS = {
    "repfusion": (
        "The idea: a diffusion model, trained without any label, is the teacher. A small network, the student, learns "
        "to produce the same inner features for the same image. This is called distillation. Then one asks how good "
        "the student's own features are. "
    ),
    "dmkd": (
        "The idea: a classifier is the teacher, and a diffusion model draws the images. A small network, the student, "
        "sees only drawn images and learns to answer as the teacher does (knowledge distillation, KD). What other "
        "images teach it stands beside. "
    ),
    "generation": (
        "The idea: a tokenizer cuts an image into a few tokens, each one of a fixed list of codes, and turns tokens "
        "back into an image. ADDP goes to and fro between the two: it looks at the pixels so far, guesses every open "
        "token, keeps the guesses it is surest of, turns all of it into pixels again, and looks once more. A token "
        "predictor (MAGE) does the same on tokens alone and sees pixels only at the end. "
    ),
    "segment": "The task: to name the class of every pixel. ",
    "landmark": "The task: to find certain points of a picture. ",
    "detect": "The task: to find every object of a picture, with its class, its box and its mask. ",
}
ROLES = {
    "untrained": "as it was initialised; nothing was learned",
    "random": "imitates a teacher that was never trained: what imitating alone brings",
    "fixed": "always the same timestep of the diffusion model, named in the recipe",
    "uniform": "a timestep drawn evenly from the list for each image",
    "uniform_each": "the same, with the features of each timestep brought to one scale first",
    "policy": "a small network chooses the timestep for each image, and learns to choose",
    "probed": "the timestep that a linear probe of the labelled images found best",
    "clean": "imitates a copy of the diffusion model that reads images without noise, at no timestep",
    "mixed": "imitates a mix of several places and timesteps, in shares learned from the labelled images",
    "supervised": "imitates the features of a classifier that learned from labelled images",
    "contrastive": "no teacher; learns which two views belong to one image (SimCLR)",
    "mae": "no teacher; learns to give back hidden patches of pixels (MAE)",
    "token_predictor": "no teacher; learns to name hidden tokens (MAGE)",
    "addp": "learns what a token predictor says, by looking at pixels made of tokens (ADDP)",
    "teacher": "the teacher itself; learned from labelled real images",
    "drawn": "learns what the teacher answers to images that a diffusion model drew; no real image is shown to it",
    "encoder": "imitates the features of ADDP's encoder, which knows no timestep and saw no label",
    "continued": "imitates features first, then learns what the teacher answers to images that nobody took",
    "of_tokens": "learns what the teacher answers to images made of tokens; no real image is shown to it",
    "real": "learns what the teacher answers to real images",
    "photographs": "learns what the teacher answers to pieces of photographs that have nothing to do with the task",
    "one_image": "learns what the teacher answers to pieces of one photograph, turned, mirrored and mixed",
    "noise": "learns what the teacher answers to pure noise",
    "drawn_labels": "no teacher; learns from the drawn images and what the generator was asked to draw, their labels",
    "scratch": "no teacher; learns from the labelled images alone",
    "tuned": "starts from a network that was trained before, then learns from the labelled images",
    "alternation": "step by step; after each step the tokens are decoded, and the network looks at those pixels",
    "predictor": "step by step on tokens alone; the network sees no pixels on the way",
    "at_once": "one step: every token is drawn for itself, so none can depend on another",
    "ablated": "tokens and pixels in turn, by a network that learned otherwise than published",
}
HEROES = {
    "policy": "the learned policy",
    "drawn": "drawn images",
    "alternation": "tokens and pixels in turn",
}  # roles that a study is about: diamonds
NAMED = 4  # arms of one role that are named; of more only these


def is_hero(arm: Entry, study: Study) -> bool:
    """Whether the chart marks an arm; a chart of nothing else marks none."""
    return role(arm, study.entries) in HEROES and any(role(a, study.entries) not in HEROES for a in study.arms)


def arm_rows(study: Study) -> list[pictures.Dots]:
    """The rows of the arms chart."""
    name = study.metric() or ""
    digits = measure(name).digits
    return [
        pictures.Dots(a.student, a.short, list(a.score(name).values()), is_hero(a, study), digits) for a in study.arms
    ]


def arms_alt(study: Study) -> str:
    """The arms chart in words."""
    name = study.metric() or ""
    scores = "; ".join(f"{arm.label} {printed(name, list(arm.score(name).values()))}" for arm in study.arms)
    return f"Score of each arm{unit_words([name])} ({score_words(name)}). {scores}."


def arms_blocks(study: Study, chart: str) -> list[Block]:
    """The idea, the chart under a name of its own, and what its rows mean."""
    name = study.metric()
    if not name or not study.arms:
        return []
    idea = "".join(text for kind, text in IDEAS.items() if kind in _kinds(study))
    picture = Picture(arms_alt(study), _caption(study), pictures.arms_chart(arm_rows(study), axis_words(name), chart))
    way = "making images" if all(arm.kind == "generation" for arm in study.arms) else "training"
    said = f"{_score_explained(name)}Each row of the chart is one way of {way}, an arm."
    texts = [Text(idea.strip()), Text(said)] if idea and not measure(name).is_percent else [Text(f"{idea}{said}")]
    return [*texts, picture, *made.warnings(study.arms), *_rows_explained(study)]


def _kinds(study: Study) -> set[str]:
    """The ways of training among the arms; answers to real images alone are a control of another road, not one."""
    drawn = any(role(arm, study.entries) == "drawn" for arm in study.arms)
    return {arm.kind for arm in study.arms if arm.kind != "dmkd" or drawn}


def _score_explained(name: str) -> str:
    if name.startswith("linear_probe"):
        return PROBE
    if name == "top1":
        return TOP1
    if not measure(name).is_percent:
        told = MEANING.get(name, "").partition(":")[2]
        return f"The score is the {score_words(name)}{f':{told}' if told else '.'} "
    return f"The score is {score_words(name)}, in percent. {MEANING.get(name, '')} ".rstrip() + " "


def _rows_explained(study: Study) -> list[Block]:
    """What each role is, under the names its arms have here."""
    names: dict[str, list[str]] = {}
    for arm in study.arms:
        names.setdefault(role(arm, study.entries), []).append(arm.short)
    said = [(_named(names[key]), f"{text}.") for key, text in ROLES.items() if key in names]
    return [Text("What the rows mean:"), Notes(said)] if said else []


def _named(names: Sequence[str]) -> str:
    each = list(dict.fromkeys(names))
    more = f" and {len(each) - NAMED} more" if len(each) > NAMED else ""
    return " / ".join(each[:NAMED]) + more


def _caption(study: Study) -> str:
    several = "Small dots are seeds, bars one standard deviation. " if len(study.seeds) > 1 else "One seed. "
    marked = [words for key, words in HEROES.items() if any(role(a, study.entries) == key for a in study.arms)]
    diamonds = f"Orange diamonds: {listed(marked)}. " if any(is_hero(a, study) for a in study.arms) else ""
    noise = middle_noise(study)
    close = (
        f"With {study.test_images():,} test images a score near the middle ({noise[0]:.0f} %) is sure to about "
        f"± {noise[1]:.1f} points (standard error)."
        if noise
        else ""
    )
    judged = made.judged_in(study.arms, study.entries)
    return f"{several}{diamonds}The axis does not begin at zero. {judged}{close}".strip()


def middle_noise(study: Study) -> tuple[float, float] | None:
    """The middle one of the arms' scores, and its standard error from the number of test images alone."""
    name = study.metric() or ""
    means = [arm.mean(name) for arm in study.arms if arm.score(name)]
    if not means or not measure(name).is_share or not study.test_images():
        return None
    return median(means), binomial_se(median(means), study.test_images())
