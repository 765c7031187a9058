"""The third road on digits: a tokenizer, a token predictor, and ADDP, which alternates between tokens and pixels.

What decides over success at this size: a rate of 5e-3 (at 1e-3 the networks learn what each place looks like, and not
how places depend on each other), position and token tables that begin at a scale of 0.5 (official 0.02), a loss over
the codes alone, no label smoothing, no shifted images, and tokens that look at few pixels. No gain in recognition is
to be expected of 8-pixel digits.
"""

from __future__ import annotations

from typing import Literal

from diffrep.data.datasets import DataConfig
from diffrep.diffusion.masking import AlternationConfig
from diffrep.evaluation.classify import EvaluateConfig
from diffrep.evaluation.generation import ScoreConfig
from diffrep.frozen.classifier import ClassifierConfig
from diffrep.methods.addp import ADDPConfig
from diffrep.methods.token_predictor import TokenPredictorMethodConfig
from diffrep.methods.tokenizer import TokenizerConfig
from diffrep.models.masked_vit import TransformerConfig
from diffrep.models.vqgan import VQGANConfig
from diffrep.recipes import dmkd
from diffrep.recipes.base import GenerationTask, Ours, Recipe, Stage, Study
from diffrep.training.config import TrainConfig
from diffrep.training.optim import LrScheduleConfig, OptimConfig

DIGITS = DataConfig(source="digits")
SMALL = {"embed_dim": 64, "num_heads": 4, "decoder_num_heads": 4, "dropout": 0.0, "init_std": 0.5}
ENCODER = TransformerConfig(**SMALL, depth=4, decoder_depth=2)
WARM = LrScheduleConfig(warmup_steps=40)


def tokenizer_digits() -> Recipe:
    """16 tokens of 2x2 pixels, 32 codes."""
    network = VQGANConfig(ch=32, ch_mult=(1, 1), num_res_blocks=0, z_channels=16, num_codes=32)
    return Recipe(
        name="tokenizer_digits",
        about="A tokenizer of digits: 16 tokens of 32 codes.",
        data=DIGITS,
        method=TokenizerConfig(network=network),
        optim=OptimConfig(lr=2e-3, lr_schedule=WARM),
        train=TrainConfig(steps=600, batch_size=64),
    )


def token_predictor_digits() -> Recipe:
    """MAGE's predictor, small: half of its blocks in the encoder."""
    network = TransformerConfig(**SMALL, depth=2, decoder_depth=2)
    return Recipe(
        name="token_predictor_digits",
        about="Names the hidden tokens of digits.",
        data=DIGITS,
        method=TokenPredictorMethodConfig(tokenizer="runs/tokenizer_digits", network=network, label_smoothing=0),
        optim=OptimConfig(lr=5e-3, betas=(0.9, 0.95), weight_decay=0.05, lr_schedule=WARM),
        train=TrainConfig(steps=800, batch_size=64),
        needs=("weights: runs/tokenizer_digits (diffrep run tokenizer_digits --out runs/tokenizer_digits)",),
    )


def addp_digits_network() -> Recipe:
    """Four encoder and two decoder blocks."""
    return Recipe(
        name="addp_digits_network",
        about="ADDP's own network on digits.",
        data=DIGITS,
        method=ADDPConfig(
            tokenizer="runs/tokenizer_digits", token_predictor="runs/token_predictor_digits", network=ENCODER,
            label_smoothing=0, codes_alone=True, keep_tokenizer_norm=True,
        ),
        optim=OptimConfig(lr=5e-3, betas=(0.9, 0.95), weight_decay=0.05, lr_schedule=WARM),
        train=TrainConfig(steps=800, batch_size=64),
        evaluate=EvaluateConfig(probe_labels=(50,)),
        needs=(
            "weights: runs/tokenizer_digits (diffrep run tokenizer_digits --out runs/tokenizer_digits)",
            "weights: runs/token_predictor_digits "
            "(diffrep run token_predictor_digits --out runs/token_predictor_digits)",
        ),
    )  # fmt: skip


def _joined(tokenizer: Recipe, predictor: Recipe, network: Recipe) -> dict[str, Recipe]:
    """The three as stages, each reading those before it."""
    before = {"tokenizer": "stage:tokenizer", "token_predictor": "stage:token_predictor"}
    first = predictor.method.model_copy(update={"tokenizer": before["tokenizer"]})
    second = network.method.model_copy(update=before)
    return {
        "tokenizer": tokenizer,
        "token_predictor": predictor.model_copy(update={"method": first, "needs": ()}),
        "addp": network.model_copy(update={"method": second, "needs": ()}),
    }


WALK = AlternationConfig(steps=8, choice_temperature=4.0)
HOLE = (2, 2, 6, 6)  # the middle of a digit, in pixels
ONE_STEP = AlternationConfig(steps=1)  # every token drawn at once, from what is known of its place alone


def _made(name: str, model: str, alternation: AlternationConfig, by: Literal["addp", "predictor"]) -> GenerationTask:
    """Images by the thousand against real digits, in the features of a classifier: no FID, which 8 pixels have not."""
    features = ClassifierConfig(reference="stage:classifier")
    return GenerationTask(
        name=name, model=model, by=by, alternation=alternation, block_size=100, images=1000, reference="digits",
        score=ScoreConfig(features=features),
    )  # fmt: skip


ARMS = {
    "alternation": "ADDP: tokens and pixels in turn",
    "predictor_alone": "MAGE: token predictor alone",
    "one_step": "ADDP: all tokens at once",
}
ABLATIONS = {  # name of the network's stage: what differs in its training, and in its walk
    "hard": ({"unreliable": "hard"}, {"unreliable": "hard"}),
    "own_target": ({"target": "tokens"}, {}),
}
ABLATED = {
    "walk_hard": "ADDP: unreliable tokens hard",
    "walk_own_target": "ADDP: target without the predictor",
    "addp": "encoder of ADDP",
    "hard": "encoder, unreliable tokens hard",
    "own_target": "encoder, target without the predictor",
}


def stages() -> dict[str, Stage]:
    """The three networks, the classifier that judges, and images made in three ways."""
    drawn = _made("digits_by_addp", "stage:addp", WALK, "addp").model_copy(update={"hole": HOLE})
    return {
        **_joined(tokenizer_digits(), token_predictor_digits(), addp_digits_network()),
        "classifier": dmkd.classifier(),
        "alternation": drawn,
        "predictor_alone": _made("digits_by_mage", "stage:token_predictor", WALK, "predictor"),
        "one_step": _made("digits_at_once", "stage:addp", ONE_STEP, "addp"),
    }


def ablations() -> dict[str, Stage]:
    """ADDP learnt otherwise, the images that it makes then, and its encoder."""
    found: dict[str, Stage] = {}
    network = addp_digits_network()
    joined = {"tokenizer": "stage:tokenizer", "token_predictor": "stage:token_predictor"}
    for name, (learnt, walked) in ABLATIONS.items():
        method = network.method.model_copy(update=joined | learnt)
        walk = WALK.model_copy(update=walked)
        found[name] = network.model_copy(update={"name": f"addp_digits_{name}", "method": method, "needs": ()})
        found[f"walk_{name}"] = _made(f"digits_by_addp_{name}", f"stage:{name}", walk, "addp")
    return found


def addp_digits() -> Study:
    """The three networks; images of ADDP, of its rivals and of its ablations, judged in one feature space; probes."""
    return Study(
        name="addp_digits",
        about="Tokens and pixels in turn: tokenizer, token predictor and ADDP on digits, and the images they make.",
        stages={**stages(), **ablations()},
        arms=ARMS | ABLATED,
        headline="frechet",
        ours=Ours(
            value=8.5,
            spread=1.2,
            seeds=5,
            metric="Frechet distance in a classifier's features, no FID (token predictor alone: 7.9 ± 1.3)",
            command="make evidence-addp; table in docs/results/addp.md",
        ),
        next_commands=("diffrep generate runs/addp_digits/addp-s0 --images 16 --out runs/digits",),
    )


def addp_debug() -> Study:
    """Two steps of each."""
    two = TrainConfig(steps=2, batch_size=8)
    tokenizer, predictor, network = tokenizer_digits(), token_predictor_digits(), addp_digits_network()
    small = TransformerConfig(**SMALL | {"embed_dim": 16}, depth=1, decoder_depth=1)
    tokenizer = tokenizer.model_copy(update={"train": two})
    predictor = predictor.model_copy(
        update={"train": two, "method": predictor.method.model_copy(update={"network": small})}
    )
    network = network.model_copy(update={"train": two, "method": network.method.model_copy(update={"network": small})})
    return Study(
        name="addp_debug",
        about="Two steps of tokenizer, token predictor and ADDP, then two images.",
        stages={
            **_joined(tokenizer, predictor, network),
            "alternation": GenerationTask(name="debug_images", model="stage:addp", alternation=ONE_STEP, images=2),
        },
        arms={"addp": "ADDP: pretrained encoder"},
        headline="linear_probe_50",
    )


RECIPES = (tokenizer_digits, token_predictor_digits, addp_digits_network, addp_digits, addp_debug)
