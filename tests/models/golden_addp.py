"""The official numbers of ADDP's three networks, and our networks with the weights of a golden case."""

import functools
import json

import torch
from safetensors import safe_open

from diffrep.models.addp_vit import ADDPVit, ADDPVitConfig, addp_fields
from diffrep.models.masked_vit import TokenPredictor, TokenPredictorConfig, predictor_fields
from diffrep.models.vqgan import VQGAN, VQGANConfig

CLOSE = {"atol": 2e-4, "rtol": 1e-4}  # of the file's own section on tolerances


def is_tokenizer(case):
    return "outputs/vq.indices" in case.keys


def is_addp(case):
    return is_tokenizer(case) and "outputs/train.loss" in case.keys


def has_vit(case):
    return "outputs/vit.features" in case.keys


@functools.cache
def _other(file, name):
    with safe_open(file, "pt") as tensors:
        prefix = f"case/{name}/weights/vqgan."
        assert name in json.loads(tensors.metadata()["cases"])
        return {k.removeprefix(prefix): tensors.get_tensor(k) for k in tensors.keys() if k.startswith(prefix)}  # noqa: SIM118


def tokenizer(case):
    """With the weights of the case, or of the one it says it shares them with."""
    owner = case.meta.get("vqgan_weights_from_case")
    state = _other(case.file, owner) if owner else case.under("weights/vqgan.")
    network = VQGAN(VQGANConfig.of(state))
    network.load_state_dict(state)
    return network.eval()


def heads(meta):
    return {"num_heads": meta["num_heads"], "decoder_num_heads": meta["decoder_num_heads"]}


def predictor(case):
    state = case.under("weights/token_predictor.")
    config = TokenPredictorConfig(**predictor_fields(state), **heads(case.meta["token_predictor"]))
    places = "token_emb.position_embeddings.weight"  # official tables have 257 rows whatever the number of tokens
    state[places] = state[places][: 1 + config.num_tokens]
    network = TokenPredictor(config)
    network.load_state_dict(state)
    return network.eval()


def addp(case):
    foreign = ("vqgan.", "token_predictor.", "vit.")
    state = {k: v for k, v in case.under("weights/").items() if not k.startswith(foreign)}
    network = ADDPVit(ADDPVitConfig(**addp_fields(state), **heads(case.meta["addp"])))
    network.load_state_dict(state)
    return network.eval()


def rows(tokens, grid):
    """(B, C, h, w) of the file -> (B, L, C) of ours."""
    assert tokens.shape[-2:] == grid
    return tokens.flatten(2).transpose(1, 2)


def masks(case):
    return case.get("inputs/token_mask_t").bool(), case.get("inputs/token_mask_t_next").bool()


def close(found, expected, **limits):
    torch.testing.assert_close(found, expected, **(CLOSE | limits), check_dtype=False)


def official(case):
    """The weights of a case as the released files have them: aliases, and tables of zeros that nothing reads."""
    state = {k: v for k, v in case.under("weights/").items() if not k.startswith("vit.")}
    state |= {f"vqgan.{k}": v for k, v in tokenizer(case).state_dict().items()}
    state |= {f"token_predictor.{k}": v for k, v in state.items() if k.startswith("vqgan.")}
    slots, width = state["pos_embed"].shape[1:]
    pixels, rows = state["patch_embed.proj.weight"][0].numel(), 257
    shapes = {
        "cls_token": (1, 1, width), "mask_token": (1, 1, width), "patch_embed.proj.bias": (width,),
        "patch_embed.proj.weight": state["patch_embed.proj.weight"].shape, "decoder_pred.bias": (pixels,),
        "decoder_pred.weight": (pixels, width),
    }  # fmt: skip
    for name in case.meta["omitted_weights"]:
        shape = shapes.get(name.removeprefix("token_predictor."), (1, slots, width))
        is_ids = name.endswith("position_ids")
        state[name] = torch.arange(rows)[None] if is_ids else torch.zeros(shape)
    return state
