"""The third road on CIFAR-10, at the size that two cores manage in about four hours: from raw images to a report.

64 tokens of 4x4 pixels and 256 codes, transformers of width 128. No checkpoint of anybody's is needed but the
classifier that scores generated images. Rates were chosen in runs of 300 steps of the predictor by its training loss:
tables that begin at a scale of 0.02 (official) learn faster here than at 0.1 or 0.5, which digits want. As on digits
ADDP's loss is over the codes alone and unsmoothed; the predictor learns as MAGE does, with half of the tokens dropped
and label smoothing 0.1. The arm of pixels (MAE) has the same encoder but the norm behind the embeddings, and sees twice
as many images, at a third of the arithmetic of ADDP.
"""

from __future__ import annotations

from typing import Literal

from diffrep.data.datasets import DataConfig
from diffrep.diffusion.masking import AlternationConfig
from diffrep.evaluation.classify import EvaluateConfig
from diffrep.evaluation.generation import ScoreConfig
from diffrep.methods.addp import ADDPConfig
from diffrep.methods.finetune import FinetuneConfig
from diffrep.methods.mae import MAEConfig
from diffrep.methods.token_predictor import TokenPredictorMethodConfig
from diffrep.methods.tokenizer import TokenizerConfig
from diffrep.models import mage_vit
from diffrep.models.mae_vit import MAEVitConfig
from diffrep.models.masked_vit import TokenPredictorConfig, TransformerConfig
from diffrep.models.students import StudentConfig
from diffrep.models.vit_students import vit_student
from diffrep.models.vqgan import VQGANConfig
from diffrep.recipes.base import GenerationTask, Recipe, Stage, Study
from diffrep.recipes.dmkd_cifar10 import IMAGES, REAL, TEACHER
from diffrep.training.config import TrainConfig
from diffrep.training.optim import LrScheduleConfig, OptimConfig

DATA = DataConfig(source=REAL, augment="flip")
NETWORK = TransformerConfig(embed_dim=128, depth=6, num_heads=4, decoder_depth=4, decoder_num_heads=4, dropout=0.0)
TOKENS = VQGANConfig(ch=32, ch_mult=(1, 2, 2), num_res_blocks=1, z_channels=32, num_codes=256)
WARM = LrScheduleConfig(warmup_steps=100)
LABELS, BATCH, TUNING = 1_000, 64, 750  # labelled images, images per step, steps of fine-tuning
OF_TOKENIZER, OF_PREDICTOR = (
    f"weights: runs/{name} (diffrep run {name} --out runs/{name})"
    for name in ("tokenizer_cifar10_small", "token_predictor_cifar10_small")
)


def tokenizer_cifar10_small() -> Recipe:
    """0.72 M parameters, 147,200 images; codes follow running means and are revived."""
    return Recipe(
        name="tokenizer_cifar10_small",
        about="A tokenizer of CIFAR-10: 64 tokens of 256 codes; 7.1e13 multiply-adds, about 20 minutes on two cores.",
        data=DATA,
        method=TokenizerConfig(network=TOKENS),
        optim=OptimConfig(lr=1e-3, lr_schedule=WARM),
        train=_trained(2_300),
        needs=(IMAGES,),
    )


def token_predictor_cifar10_small() -> Recipe:
    """2.2 M parameters, 192,000 images."""
    method = TokenPredictorMethodConfig(tokenizer="runs/tokenizer_cifar10_small", network=NETWORK, drop_ratio=0.5)
    return Recipe(
        name="token_predictor_cifar10_small",
        about="Names hidden tokens of CIFAR-10, as MAGE; 7.0e13 multiply-adds, about 20 minutes on two cores.",
        data=DATA,
        method=method,
        optim=_adamw(2e-3),
        train=_trained(3_000),
        evaluate=EvaluateConfig(probe_labels=(LABELS,)),
        needs=(IMAGES, OF_TOKENIZER),
    )


def addp_cifar10() -> Recipe:
    """2.2 M parameters, 204,800 images."""
    method = ADDPConfig(
        tokenizer="runs/tokenizer_cifar10_small", token_predictor="runs/token_predictor_cifar10_small",
        network=NETWORK, label_smoothing=0, codes_alone=True, keep_tokenizer_norm=True,
    )  # fmt: skip
    return Recipe(
        name="addp_cifar10",
        about="ADDP's own network on CIFAR-10; at most 1.8e14 multiply-adds, within an hour on two cores.",
        data=DATA,
        method=method,
        optim=_adamw(2e-3),
        train=_trained(3_200),
        evaluate=EvaluateConfig(probe_labels=(LABELS,)),
        needs=(IMAGES, OF_TOKENIZER, OF_PREDICTOR),
    )


def mae_cifar10_small() -> Recipe:
    """1.6 M parameters, 409,600 images, of each 16 patches of 64."""
    network = MAEVitConfig(
        patch_size=4, embed_dim=NETWORK.embed_dim, depth=NETWORK.depth, num_heads=NETWORK.num_heads,
        decoder_dim=NETWORK.embed_dim, decoder_depth=2, decoder_num_heads=NETWORK.decoder_num_heads,
    )  # fmt: skip
    return Recipe(
        name="mae_cifar10_small",
        about="Gives back hidden patches of CIFAR-10 (MAE): pixels alone; 5.6e13 multiply-adds.",
        data=DATA,
        method=MAEConfig(network=network),
        optim=_adamw(2e-3),
        train=_trained(6_400),
        evaluate=EvaluateConfig(probe_labels=(LABELS,)),
        needs=(IMAGES,),
    )


def _trained(steps: int) -> TrainConfig:
    return TrainConfig(
        steps=steps, batch_size=BATCH, precision="bf16", clip_norm=3.0, log_every=50, checkpoint_every=200
    )


def _adamw(lr: float) -> OptimConfig:
    """Betas and decay of ADDP's and MAGE's scripts, which spare biases and norms; here all weights decay."""
    return OptimConfig(lr=lr, betas=(0.9, 0.95), weight_decay=0.05, lr_schedule=WARM)


# The study

ENCODERS = {
    "scratch": "ViT from scratch, labels only",
    "untrained": "ADDP's network, untrained",
    "mae": "MAE's encoder",
    "mae_tuned": "MAE's encoder, then fine-tuned",
    "token_predictor": "MAGE's encoder",
    "token_predictor_tuned": "MAGE's encoder, then fine-tuned",
    "addp": "ADDP's encoder",
    "addp_tuned": "ADDP's encoder, then fine-tuned",
}
TRAINED = {"tokenizer": "tokenizer"}
DRAWN = {
    "alternation": "ADDP: tokens and pixels in turn",
    "predictor_alone": "MAGE: token predictor alone",
    "one_step": "ADDP: all tokens at once",
}
WALK = AlternationConfig(steps=16)


def addp_cifar10_small() -> Study:
    """The networks in turn; what the encoders are worth with 1,000 labels, and what the models draw."""
    return Study(
        name="addp_cifar10_small",
        about="Tokenizer, MAGE, ADDP and MAE on CIFAR-10; probe, fine-tuning, and generated images.",
        stages={**_joined(), **_labelled_arms(), **_drawn()},
        arms=ENCODERS | DRAWN | TRAINED,
        headline=f"linear_probe_{LABELS}",
        needs=(IMAGES, "weights: weights/resnet56_cifar10.safetensors (github.com/akamaster/pytorch_resnet_cifar10)"),
        next_commands=("diffrep generate runs/addp_cifar10_small/addp-s0 --images 16 --out runs/cifar10",),
    )


def _joined() -> dict[str, Stage]:
    """The three networks as stages, each reading those before it; the last as it began; and MAE."""
    predictor, network = token_predictor_cifar10_small(), addp_cifar10()
    first = predictor.method.model_copy(update={"tokenizer": "stage:tokenizer"})
    both = {"tokenizer": "stage:tokenizer", "token_predictor": "stage:token_predictor"}
    joined = network.model_copy(update={"method": network.method.model_copy(update=both), "needs": ()})
    return {
        "tokenizer": tokenizer_cifar10_small().model_copy(update={"needs": ()}),
        "token_predictor": predictor.model_copy(update={"method": first, "needs": ()}),
        "addp": joined,
        "untrained": joined.model_copy(update={"name": "addp_cifar10_untrained", "train": _trained(0)}),
        "mae": mae_cifar10_small().model_copy(update={"needs": ()}),
    }


def _labelled_arms() -> dict[str, Stage]:
    """Scratch sees the labelled images for twice as many steps; more of the same is no substitute for pretraining."""
    return {
        "mae_tuned": _labelled(TUNING, _vit(pre_norm=False), "stage:mae"),
        "token_predictor_tuned": _labelled(TUNING, _mage_vit(), "stage:token_predictor"),
        "addp_tuned": _labelled(TUNING, _vit(), "stage:addp"),
        "scratch": _labelled(2 * TUNING, _vit()),
    }


def _labelled(steps: int, student: StudentConfig, init: str | None = None) -> Recipe:
    return Recipe(
        name="cifar10_vit_labelled",
        data=DataConfig(source=REAL, augment="crop_flip:4", labels=LABELS, labelled_share=1.0),
        method=FinetuneConfig(student=student, init=init),
        optim=OptimConfig(lr=1e-3, weight_decay=0.05, lr_schedule=WARM),
        train=_trained(steps),
        evaluate=EvaluateConfig(probe_labels=(LABELS,)),
    )


def _vit(pre_norm: bool = True) -> StudentConfig:
    """ADDP's encoder as timm's ViT, norm behind the embeddings included."""
    return vit_student(32, 4, NETWORK, pre_norm)


def _mage_vit() -> StudentConfig:
    """The token predictor's encoder behind its tokenizer."""
    network = TokenPredictorConfig(**NETWORK.model_dump(), num_codes=TOKENS.num_codes, num_tokens=64)
    return StudentConfig(name=mage_vit.NAME, options=mage_vit.options_of(TOKENS, network), mean=(0.0,), std=(1.0,))


def _drawn() -> dict[str, Stage]:
    """Images by both models, and by ADDP without its alternation."""
    at_once = AlternationConfig(steps=1)
    return {
        "alternation": _made("cifar10_by_addp", "stage:addp", WALK, "addp"),
        "predictor_alone": _made("cifar10_by_mage", "stage:token_predictor", WALK, "predictor"),
        "one_step": _made("cifar10_at_once", "stage:addp", at_once, "addp"),
    }


def _made(name: str, model: str, alternation: AlternationConfig, by: Literal["addp", "predictor"]) -> GenerationTask:
    """2,000 images against real ones in the features of a ResNet-56, which is no FID."""
    return GenerationTask(
        name=name, model=model, by=by, alternation=alternation, block_size=100, images=2_000, reference=REAL,
        score=ScoreConfig(features=TEACHER),
    )  # fmt: skip


RECIPES = (
    tokenizer_cifar10_small, token_predictor_cifar10_small, addp_cifar10, mae_cifar10_small, addp_cifar10_small,
)  # fmt: skip
