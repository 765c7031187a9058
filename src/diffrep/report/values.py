"""What a report works with: runs, entries (one recipe over its seeds), studies. Plain values, read from run folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

STAGE = "stage:"
BEFORE_STAGE = ("random:", "classifier:", "synthetic:", "generated:")  # what may stand before a reference to a stage
CLASSIFIER = ("top1", "top1_six_views", "top5", "agreement", "ece", "best_top1")  # scores of a network's own last layer
SILENT = ("format", "name", "about", "seed", "published", "ours", "assumed", "needs")  # change no result
NO_SCORE = ("test_images", "best_step", "classes")  # stand among the scores and are none
# How scores begin that stand in tables of their own: of subsets, and of precision by size and recall.
DETAILS = ("nme_", "fr10_", "auc10_", "box_ap_", "mask_ap_", "box_ar", "mask_ar")
DENSE = ("segment", "landmark", "detect")  # kinds that learn masks, points or objects


@dataclass(frozen=True)
class Run:
    """One run folder. result: None while it is not finished."""

    path: Path
    recipe: dict[str, Any]
    result: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    environment: dict[str, Any]

    @property
    def seed(self) -> int:
        return int(self.recipe.get("seed", 0))

    @property
    def step(self) -> int:
        """The last step that was logged."""
        return int(self.metrics[-1].get("step", 0)) if self.metrics else 0

    def state(self) -> str:
        """``finished``, or how far it came."""
        if self.result is not None:
            return "finished"
        steps = self.recipe.get("train", {}).get("steps")
        return f"unfinished, step {self.step:,} of {steps:,}" if steps else "unfinished"


@dataclass(frozen=True)
class Entry:
    """What gets one row: the runs of one recipe over all its seeds.

    Attributes:
        label: what the row is called; the part before a colon names the student it is grouped under.
        recipe: settings, with references as ``stage:NAME`` inside a study.
        needs: names of the entries it builds on.
        scores: seed -> score name -> percent, or as scores.MEASURES says (and ``test_images``).
        num_seeds: how many runs there will be.
    """

    name: str
    label: str
    recipe: dict[str, Any]
    runs: tuple[Run, ...] = ()
    needs: tuple[str, ...] = ()
    scores: dict[int, dict[str, Any]] = field(default_factory=dict)
    num_seeds: int = 1

    @property
    def kind(self) -> str:
        """That of a recipe's method; of any other stage its own, like ``probe``, ``synthesis`` or ``generation``."""
        kind = str(self.recipe.get("kind", "recipe"))
        return str(self.recipe.get("method", {}).get("kind", kind)) if kind == "recipe" else kind

    @property
    def student(self) -> str:
        """Whom it belongs to; images belong to none, so that all ways of making them share one group."""
        if self.kind == "generation":
            return ""
        return self.label.partition(":")[0].strip() if ":" in self.label else ""

    @property
    def short(self) -> str:
        """The label without its student."""
        return self.label.partition(":")[2].strip() if self.student else self.label

    def results(self) -> list[dict[str, Any]]:
        return [run.result for run in self.runs if run.result is not None]

    def values(self, key: str) -> list[float]:
        """A number of ``result.json`` over the seeds, where it stands there."""
        return [r[key] for r in self.results() if isinstance(r.get(key), int | float)]

    def score(self, name: str) -> dict[int, float]:
        return {seed: s[name] for seed, s in self.scores.items() if isinstance(s.get(name), int | float)}

    def mean(self, name: str) -> float:
        """Of a score that it has, over the seeds."""
        return fmean(self.score(name).values())

    def state(self) -> str:
        """``finished``, or what is missing. Scores without a folder come from recorded evidence."""
        done = max(len(self.results()), len(self.scores))
        if done >= self.num_seeds:
            return "finished"
        if self.num_seeds > 1:
            return f"{done} of {self.num_seeds} seeds"
        return self.runs[0].state() if self.runs else "not started"


@dataclass(frozen=True)
class Study:
    """A study folder, every stage an entry; ``arms`` are those it compares."""

    path: Path
    recipe: dict[str, Any]
    result: dict[str, Any] | None
    environment: dict[str, Any]
    entries: tuple[Entry, ...]

    @property
    def name(self) -> str:
        return str(self.recipe.get("name", self.path.name))

    @property
    def arms(self) -> list[Entry]:
        found = {entry.name: entry for entry in self.entries}
        return [found[name] for name in self.recipe.get("arms", {}) if name in found]

    @property
    def seeds(self) -> list[int]:
        return [int(seed) for seed in self.recipe.get("seeds", [0])]

    @property
    def students(self) -> list[str]:
        """Whom the arms are grouped by, in order; an empty name for arms without one."""
        return list(dict.fromkeys(arm.student for arm in self.arms))

    def unfinished(self) -> list[Entry]:
        """What is still to come; nothing once the study has its result."""
        return [e for e in self.entries if e.state() != "finished"] if self.result is None else []

    def metric(self) -> str | None:
        """The score the study is about; without one named, the first that an arm has."""
        return self.recipe.get("headline") or next(iter(score_names(self.arms)), None)

    def judged_by(self, entry: Entry) -> str | None:
        """The score that ``entry`` is held against others by: the study's own, or the first it has instead."""
        wanted, names = self.metric(), score_names([entry])
        if names:
            return wanted if wanted in names else names[0]
        if entry.recipe.get("evaluate", {}).get("protocol") == "classifier":
            return wanted if wanted in CLASSIFIER else "top1"
        if entry.kind == "generation":
            return "frechet" if (entry.recipe.get("score") or {}).get("features") else "fid"
        return wanted

    def contests(self) -> list[Study]:
        """The study once for each score that arms are held against each other by, with those arms alone."""
        groups: dict[str | None, dict[str, str]] = {}
        for arm in self.arms:
            groups.setdefault(self.judged_by(arm), {})[arm.name] = arm.label
        order = sorted(groups, key=lambda name: name != self.metric())
        return [replace(self, recipe=self.recipe | {"headline": name, "arms": groups[name]}) for name in order]

    def by_role(self, student: str) -> dict[str, list[Entry]]:
        """One student's arms by what they are there for."""
        found: dict[str, list[Entry]] = {}
        for arm in (a for a in self.arms if a.student == student):
            found.setdefault(role(arm, self.entries), []).append(arm)
        return found

    def test_images(self) -> int:
        """How many images the scores are measured on; 0 when unknown."""
        counts = [s["test_images"] for arm in self.arms for s in arm.scores.values() if s.get("test_images")]
        return int(min(counts)) if counts else 0


def score_names(entries: Sequence[Entry]) -> list[str]:
    """Every score that one of them has, in order."""
    found = [n for entry in entries for scores in entry.scores.values() for n in scores if is_score(n)]
    return list(dict.fromkeys(found))


def is_score(name: str) -> bool:
    """Whether it stands beside others in a table of scores."""
    return name not in NO_SCORE and not name.startswith(DETAILS)


def entry_of(label: str, runs: Sequence[Run]) -> Entry:
    """Runs of one recipe, outside a study."""
    ordered = tuple(sorted(runs, key=lambda run: run.seed))
    scores = {run.seed: run.result.get("scores", {}) for run in ordered if run.result}
    return Entry(label, label, settings(ordered[0]), ordered, (), scores, len(ordered))


def settings(run: Run) -> dict[str, Any]:
    """A run's recipe with folders of other stages shortened to their name, without the seed at its end."""

    def short(value: Any) -> Any:
        if isinstance(value, str):
            return _shortened(value, run.seed)
        if isinstance(value, Mapping):
            return {str(k): short(v) for k, v in value.items()}
        return [short(v) for v in value] if isinstance(value, list) else value

    return short({k: v for k, v in run.recipe.items() if k != "seed"})


def _shortened(text: str, seed: int) -> str:
    head, colon, path = text.rpartition(":")
    if not path.startswith("/"):
        return text
    return f"{head}{colon}{Path(path).name.removesuffix(f'-s{seed}')}"


def flat(value: Any, prefix: str = "") -> dict[str, str]:
    """{dotted name: printed value}, without what cannot change a result."""
    if isinstance(value, Mapping) and value:
        items = {k: v for k, v in value.items() if prefix or k not in SILENT}
        return {k: v for key, inner in items.items() for k, v in flat(inner, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): _printed(value)}


def _printed(value: Any) -> str:
    if value is None or value == {} or value == []:
        return "none"
    return ", ".join(map(_printed, value)) if isinstance(value, list) else str(value)


def references(value: Any) -> list[str]:
    """The stages that a stage's settings name, each once."""
    if isinstance(value, str):
        before, mark, name = value.partition(STAGE)
        return [name] if mark and before in ("", *BEFORE_STAGE) else []
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return list(dict.fromkeys(name for v in inner for name in references(v)))


def builds_on(entry: Entry, entries: Sequence[Entry]) -> list[Entry]:
    """Everything ``entry`` needs, through all generations, in the order of ``entries``."""
    found, open_ = set[str](), list(entry.needs)
    by_name = {e.name: e for e in entries}
    while open_:
        if (name := open_.pop()) not in found and name in by_name:
            found.add(name)
            open_ += by_name[name].needs
    return [e for e in entries if e.name in found]


# What a student of a classifier learned from, by the kind of its data source; any other kind is real images.
SOURCES = {
    "synthetic": "drawn",
    "generated": "of_tokens",
    "photographs": "photographs",
    "one_image": "one_image",
    "noise": "noise",
}


def role(entry: Entry, entries: Sequence[Entry]) -> str:
    """What an arm is there for: a word that arms.ROLES explains, or ``other``."""
    method = entry.recipe.get("method", {})
    source = SOURCES.get(str(entry.recipe.get("data", {}).get("source")).partition(":")[0], "real")
    if entry.kind == "finetune":
        started = "tuned" if method.get("init") else "drawn_labels" if source == "drawn" else "scratch"
        return "teacher" if started == "scratch" and _teaches(entry, entries) else started
    if entry.kind == "generation":
        return "ablated" if _ablated(entry, entries) else _walking(entry.recipe)
    if entry.kind in DENSE:
        return "untrained" if _is_untrained(entry) else "tuned" if method.get("init") else "scratch"
    if entry.kind in ("contrastive", "mae", "addp", "token_predictor"):
        return "untrained" if _is_untrained(entry) else entry.kind
    if entry.kind not in ("repfusion", "dmkd"):
        return "other"
    if _is_untrained(entry):
        return "untrained"
    teachers = _teachers(method, entries)
    known = [e for e in entries if e.name in references(teachers)]
    if any(text.startswith("random:") for text in teachers) or any(map(_is_untrained, known)):
        return "random"
    if any(text.startswith("classifier:") for text in teachers):
        return "supervised"
    if entry.kind == "dmkd":
        return "continued" if method.get("init") else source
    return ([MADE[e.kind] for e in known if e.kind in MADE] or [_looking(method)])[0]


MADE = {"clean_input": "clean", "mixing": "mixed", "addp": "encoder"}  # teachers of features that know no timestep


def _is_untrained(entry: Entry) -> bool:
    return entry.recipe.get("train", {}).get("steps") == 0


def _ablated(entry: Entry, entries: Sequence[Entry]) -> bool:
    """Whether images are made by an ADDP that learned otherwise than published."""
    named = references(entry.recipe.get("model"))
    models = [e.recipe.get("method", {}) for e in entries if e.name in named]
    return any(m.get("unreliable") == "hard" or m.get("target") == "tokens" for m in models)


def _walking(recipe: Mapping[str, Any]) -> str:
    """How images are made of tokens."""
    if recipe.get("by") == "predictor":
        return "predictor"
    return "at_once" if (recipe.get("alternation") or {}).get("steps") == 1 else "alternation"


def _looking(method: Mapping[str, Any]) -> str:
    """How a student of a diffusion model is given its timesteps."""
    select = method.get("timestep", {}).get("select")
    spread = "uniform_each" if method.get("standardise") == "per_timestep" else "uniform"
    return {"policy": "policy", "fixed": "fixed", "probed": "probed"}.get(str(select), spread)


def _teachers(method: Mapping[str, Any], entries: Sequence[Entry]) -> list[str]:
    """References to whom a student learns from, also by way of stored features or answers."""
    stored = references([method.get("features"), method.get("answers")])
    found = [method.get("teacher"), *(e.recipe.get("teacher") for e in entries if e.name in stored)]
    return [str(t.get("reference") if isinstance(t, Mapping) else t) for t in found]


def _teaches(entry: Entry, entries: Sequence[Entry]) -> bool:
    """Whether another kind of student learns from what this classifier says."""
    own = entry.recipe["method"].get("student")
    taught = [e.recipe["method"] for e in entries if e.kind == "dmkd"]
    others = [method.get("teacher") for method in taught if method.get("student") != own]
    return entry.name in references(others)
