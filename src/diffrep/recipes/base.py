"""A recipe is a value: data, method, optimiser, training, evaluation, and the published number it aims at.

A study is a recipe of recipes. How a name, a file or an override becomes such a value: recipes/loading.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from diffrep.config import Config
from diffrep.data.datasets import DataConfig
from diffrep.data.sources import DENSE_TASKS, parse
from diffrep.diffusion.masking import AlternationConfig
from diffrep.errors import nearest
from diffrep.evaluation.classify import EvaluateConfig
from diffrep.evaluation.generation import ScoreConfig
from diffrep.evaluation.sweep import SweepConfig
from diffrep.files import short_hash
from diffrep.frozen.answers import AnswerConfig
from diffrep.frozen.classifier import ClassifierConfig
from diffrep.frozen.features import FeatureConfig
from diffrep.methods.addp import ADDPConfig
from diffrep.methods.clean_input import CleanInputConfig
from diffrep.methods.contrastive import ContrastiveConfig
from diffrep.methods.denoiser import DenoiserConfig
from diffrep.methods.detect import DetectConfig
from diffrep.methods.dmkd import DMKDConfig
from diffrep.methods.finetune import FinetuneConfig
from diffrep.methods.landmark import LandmarkConfig
from diffrep.methods.mae import MAEConfig
from diffrep.methods.mixing import MixingConfig
from diffrep.methods.repfusion import RepFusionConfig
from diffrep.methods.segment import SegmentConfig
from diffrep.methods.synthesis import SynthesisConfig
from diffrep.methods.token_predictor import TokenPredictorMethodConfig
from diffrep.methods.tokenizer import TokenizerConfig
from diffrep.training.config import TrainConfig
from diffrep.training.optim import OptimConfig

TASKS = ("segment", "landmark", "detect")  # kinds of methods that learn from masks, points or objects
FORMAT = 1  # of recipe files; a file of another format is refused
NAME = r"^[a-z][a-z0-9_]{0,79}$"

MethodConfig = Annotated[
    RepFusionConfig
    | FinetuneConfig
    | ContrastiveConfig
    | DenoiserConfig
    | DMKDConfig
    | TokenizerConfig
    | TokenPredictorMethodConfig
    | ADDPConfig
    | CleanInputConfig
    | MAEConfig
    | MixingConfig
    | SegmentConfig
    | LandmarkConfig
    | DetectConfig,
    Field(discriminator="kind"),
]


class Rival(Config):
    """What another method is said to reach in the same place; quoted, not shipped."""

    method: str  # its name, with what differs: amount of data, teacher, epochs
    value: float
    source: str  # paper, table, row


class Published(Config):
    """A number in a paper, with its source; ``value`` None means looked for and not found."""

    value: float | None
    metric: str  # e.g. "top-1 %, CIFAR-10 test"
    source: str  # paper, table, row; or where it was looked for
    rivals: tuple[Rival, ...] = ()  # by the same metric


class Ours(Config):
    """A number this recipe gave, with the command and seeds that made it."""

    value: float
    spread: float  # standard deviation over the seeds
    seeds: int
    metric: str
    command: str


class Task(Config):
    """What all stages share."""

    kind: str
    format: int = FORMAT
    name: str = Field(pattern=NAME)  # <road>_<data>_<student>
    about: str = ""  # one sentence for `diffrep recipes`
    seed: int = Field(0, ge=0)  # of everything that is drawn

    @field_validator("format")
    @classmethod
    def _readable(cls, value: int) -> int:
        if value != FORMAT:
            raise ValueError(f"the recipe is of format {value}; this diffrep reads format {FORMAT}")
        return value


class Listed(Task):
    """What the ledger says of a recipe or study."""

    published: Published | None = None
    ours: Ours | None = None
    assumed: tuple[str, ...] = ()  # settings that the source does not state
    needs: tuple[str, ...] = ()  # "weights: ..." or "data: ..." that do not come with the package


class Recipe(Listed):
    """One training run, complete."""

    kind: Literal["recipe"] = "recipe"
    data: DataConfig
    method: MethodConfig
    optim: OptimConfig
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        self._source_has_truth()
        labels, readers = self.data.labels, self.method.label_readers()
        few = [n for n in self.evaluate.probe_labels if labels and readers and n < labels]
        if few:
            seen = f"training reads {labels} labels (data.labels)"
            raise ValueError(f"{seen}, so a probe with {few[0]} (evaluate.probe_labels) would not be a few-label score")
        if readers and any(word in self.data.augment for word in ("mixup", "cutmix")):
            raise ValueError(
                f"data.augment '{self.data.augment}' mixes images, so they have no label of their own: only a method "
                "that reads none (dmkd with loss.label_weight 0) can learn from them"
            )
        share = self.data.labelled_share
        if share and not round(share * self.train.batch_size):
            raise ValueError(
                f"data.labelled_share {share} of batch_size {self.train.batch_size} is less than one image"
            )
        if (
            self.method.kind == "repfusion"
            and self.method.features
            and self.method.timestep.select in ("range", "ranges")
        ):
            raise ValueError(
                "method.features replays a list of timesteps; "
                f"timestep.select '{self.method.timestep.select}' needs the teacher itself"
            )
        self._compares_images()
        return self

    def _source_has_truth(self) -> None:
        """Masks, points and objects come from their own sources, whole images from others."""
        kind, task = self.data.source.partition(":")[0], self.method.kind
        if task in TASKS and task not in DENSE_TASKS.get(kind, ()):
            fitting = ", ".join(name for name, tasks in DENSE_TASKS.items() if task in tasks)
            raise ValueError(f"data.source '{self.data.source}' has no truth for '{task}'; those that have: {fitting}")
        if task not in TASKS:
            parse(self.data.source)  # refuses sources of masks, points and objects

    def _compares_images(self) -> None:
        """A method that holds images of a batch against each other needs them together."""
        found = self.method.compares_images()
        together = min(self.train.batch_size, self.train.micro_batch_size or self.train.batch_size)
        if found is not None and not found[1] <= self.train.batch_size == together:
            raise ValueError(
                f"{found[0]} compares all images of a batch: train.batch_size is at least {found[1]}, and "
                "train.micro_batch_size null"
            )


class FeatureTask(Task):
    """Write a teacher's features to a folder (`diffrep features`)."""

    kind: Literal["features"] = "features"
    teacher: str
    data: DataConfig
    split: Literal["train", "validation", "test"] = "train"
    features: FeatureConfig


class SweepTask(Task):
    """Probe a teacher at many taps and timesteps (`diffrep probe`)."""

    kind: Literal["probe"] = "probe"
    teacher: str
    data: DataConfig
    sweep: SweepConfig


class SynthesisTask(Task):
    """Draw a labelled set of images (`diffrep synthesize`)."""

    kind: Literal["synthesis"] = "synthesis"
    generator: str
    synthesis: SynthesisConfig


class AnswerTask(Task):
    """Write a classifier's answers to every view of every image, for students to learn from."""

    kind: Literal["answers"] = "answers"
    teacher: ClassifierConfig
    data: DataConfig
    split: Literal["train", "validation", "test"] = "train"
    answers: AnswerConfig = AnswerConfig()


class GenerationTask(Task):
    """Make images with a token model, one per seed, and score them (`diffrep generate`, `diffrep score`)."""

    kind: Literal["generation"] = "generation"
    model: str  # folder with addp/ or token_predictor/, and tokenizer/
    by: Literal["addp", "predictor"] = "addp"  # predictor: MAGE's generation, tokens alone
    alternation: AlternationConfig = AlternationConfig()
    rounding: Literal["truncate", "nearest"] = "truncate"
    block_size: int | None = Field(None, ge=1)  # images computed together; None: 1 on a CPU
    images: int = Field(50_000, ge=1)
    reference: str | None = None  # data reference that they are scored against
    score: ScoreConfig = ScoreConfig()
    hole: tuple[int, int, int, int] | None = None  # X0, Y0, X1, Y1: also mend this box of the reference's test images

    @model_validator(mode="after")
    def _fits(self) -> GenerationTask:
        if self.hole is not None and (self.by != "addp" or self.reference is None):
            raise ValueError("hole mends test images of the reference with ADDP: give reference, and by 'addp'")
        return self


Stage = Annotated[
    Recipe | FeatureTask | SweepTask | SynthesisTask | AnswerTask | GenerationTask, Field(discriminator="kind")
]


class Study(Listed):
    """A recipe of recipes: named stages that refer to each other's outputs as ``stage:NAME``."""

    kind: Literal["study"] = "study"
    seeds: tuple[int, ...] = Field((0,), min_length=1)  # every stage runs once per seed
    # In order: a stage refers to earlier ones only. The names become folders, so they are plain words.
    stages: dict[Annotated[str, Field(pattern=NAME)], Stage] = Field(min_length=1)
    arms: dict[str, str] = {}  # what the stages compared in the table are called there, in order
    headline: str | None = None  # the score the table is about
    next_commands: tuple[str, ...] = ()  # what a reader may try next

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if min(seeds) < 0 or len(set(seeds)) != len(seeds):
            raise ValueError("seeds are different numbers from 0 up")
        return seeds

    @model_validator(mode="after")
    def _fits(self) -> Study:
        earlier: set[str] = set()
        for name, stage in self.stages.items():
            for needed in references(stage):
                if needed not in earlier:
                    known = ", ".join(sorted(earlier)) or "none"
                    raise ValueError(f"stage '{name}' refers to 'stage:{needed}'; earlier stages: {known}")
            earlier.add(name)
        unknown = [arm for arm in self.arms if arm not in earlier]
        if unknown:
            raise ValueError(f"arms names '{unknown[0]}', which is no stage; {nearest(unknown[0], earlier)}")
        return self


STAGE = "stage:"
BEFORE_STAGE = ("random:", "classifier:", "synthetic:", "generated:")  # what may stand before a reference to a stage


def references(stage: Task) -> list[str]:
    """The stages that ``stage`` takes something from, each once."""
    found = [text.split(STAGE, 1)[1] for text in strings(stage.model_dump(mode="json")) if _refers(text)]
    return list(dict.fromkeys(found))


def _refers(text: str) -> bool:
    return text.partition(STAGE)[0] in ("", *BEFORE_STAGE) and STAGE in text


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from strings(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from strings(inner)


def replace_strings(value: Any, change: dict[str, str]) -> Any:
    """``value`` (plain JSON) with each ``stage:NAME`` of ``change`` replaced, also behind a word of BEFORE_STAGE."""
    if isinstance(value, str):
        head, mark, name = value.rpartition(STAGE)
        known = mark and mark + name in change and head in ("", *BEFORE_STAGE)
        return head + change[mark + name] if known else value
    if isinstance(value, Mapping):
        return {k: replace_strings(v, change) for k, v in value.items()}
    return [replace_strings(v, change) for v in value] if isinstance(value, list) else value


def recipe_hash(task: Task) -> str:
    """Eight hex digits over everything that can change a result: not the seed, the name or what is said about it.

    Settings at their default are left out, so a setting that a later version adds leaves older results valid.
    """
    silent = {
        "name",
        "about",
        "seed",
        "published",
        "ours",
        "assumed",
        "needs",
        "arms",
        "headline",
        "next_commands",
        "seeds",
    }
    return short_hash({k: v for k, v in _telling(task).items() if k not in silent})


def _telling(value: Any) -> Any:
    """Plain JSON of a config without what stands at its default; ``kind`` always stays."""
    if isinstance(value, Config):
        fields = type(value).model_fields
        kept = {k: v for k, v in value if k == "kind" or v != fields[k].get_default(call_default_factory=True)}
        return {k: _telling(v) for k, v in kept.items()}
    if isinstance(value, Mapping):
        return {k: _telling(v) for k, v in value.items()}
    return [_telling(v) for v in value] if isinstance(value, list | tuple) else value


def to_yaml(task: Task) -> str:
    """The resolved recipe, ready to be edited; loading it gives an equal value."""
    return yaml.safe_dump(task.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def is_same(task: Task, text: str) -> bool:
    """Whether ``text``, which a run wrote down, is ``task``; settings that were added since stand at their default."""
    try:
        found = type(task).model_validate(yaml.safe_load(text))
    except (ValueError, yaml.YAMLError):
        return False
    seeds = [(t.seed, getattr(t, "seeds", None), recipe_hash(t)) for t in (found, task)]
    return seeds[0] == seeds[1]
