"""Official files, dict in and dict out: pytest tests/models/test_addp_files.py"""

import pytest
import torch
from golden_addp import close, heads, is_addp, masks, official, rows

from diffrep.errors import UserError
from diffrep.models.addp_files import ALIAS, KINDS, PLACES, Part, join, layout_of, released_name, split
from diffrep.models.addp_vit import LARGE, ADDPVitConfig
from diffrep.models.masked_vit import TokenPredictorConfig
from diffrep.models.vqgan import VQGANConfig

TINY = {"embed_dim": 12, "depth": 2, "num_heads": 2, "decoder_depth": 1, "decoder_num_heads": 4, "num_codes": 7}
CONFIGS = {
    "tokenizer": VQGANConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=0, z_channels=4, num_codes=7),
    "token_predictor": TokenPredictorConfig(**TINY, num_tokens=9),
    "addp": ADDPVitConfig(**TINY, image_size=12, patch_size=4),
}
HEADS = {"addp": (2, 4), "token_predictor": (2, 4)}


def parts_of(configs, device="meta"):
    """Networks with no values, or with values that are all different."""
    with torch.device("meta"):
        states = {kind: KINDS[kind][0](config).state_dict() for kind, config in configs.items()}
    if device != "meta":
        rng = torch.Generator().manual_seed(0)
        states = {k: {n: torch.randn(v.shape, generator=rng) for n, v in s.items()} for k, s in states.items()}
    return {kind: Part(config, states[kind]) for kind, config in configs.items()}


@pytest.fixture
def release():
    """A tiny ADDP file as official code would write it."""
    return join(parts_of(CONFIGS, "cpu"), "tiny")[1]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


# The official numbers


@pytest.mark.golden(of=is_addp)
@torch.no_grad()
def test_golden_release_is_split_into_networks_that_give_the_official_numbers(golden_case):
    state, given = official(golden_case), {k: tuple(heads(golden_case.meta[k]).values()) for k in HEADS}
    found = split(state, "golden", given)
    assert found.layout == "addp" and found.aliases == sum(n.startswith("vqgan.") for n in state)
    networks = {}
    for kind, part in found.parts.items():
        networks[kind] = KINDS[kind][0](part.config).eval()
        networks[kind].load_state_dict(part.state)  # strictly
    ids, (mask, _) = networks["tokenizer"].encode(golden_case.get("inputs/image")), masks(golden_case)
    assert torch.equal(ids, golden_case.get("outputs/vq.indices"))
    prob = golden_case.get("outputs/tp.prob_mask_t")
    close(networks["token_predictor"].probabilities(ids, mask), rows(prob, tuple(prob.shape[-2:])))
    pixels = golden_case.get("outputs/train.x_t")
    close(networks["addp"].encode(pixels), golden_case.get("outputs/train.latent"))
    logits = networks["addp"].decode(networks["addp"].encode(pixels), ids, mask)
    close(logits.logsumexp(2), golden_case.get("outputs/train.logits.logsumexp"))


@pytest.mark.golden(of=is_addp)
def test_golden_release_comes_back_byte_for_byte(golden_case):
    state, given = official(golden_case), {k: tuple(heads(golden_case.meta[k]).values()) for k in HEADS}
    layout, again, filled = join(split(state, "golden", given).parts, "golden")
    assert layout == "addp" and not filled and same(again, state)


@pytest.mark.parametrize(
    ("size", "entries", "values", "nbytes", "name"),
    [({}, 868, 348_056_406, 1_392_226_652, "base"), (LARGE, 1156, 875_088_470, 3_500_354_908, "large")],
)
def test_entries_of_the_released_files(size, entries, values, nbytes, name):
    configs = {
        "tokenizer": VQGANConfig(),
        "token_predictor": TokenPredictorConfig(**size),
        "addp": ADDPVitConfig(**size),
    }
    _, state, filled = join(parts_of(configs), "paper")
    own = {n: v for n, v in state.items() if not n.startswith(("vqgan.", "token_predictor."))}
    predictor = {n: v for n, v in state.items() if n.startswith("token_predictor.") and not n.startswith(ALIAS)}
    assert len(state) == entries and len(filled) == 5 + 9
    if name == "base":
        assert (len(own), len(predictor)) == (267, 265)
    places = state["token_predictor.token_emb.position_ids"]
    assert places.shape == (1, 257) and places.dtype == torch.int64
    once = [v for n, v in state.items() if not n.startswith(ALIAS)]
    assert sum(v.numel() for v in once) == values
    assert sum(v.nbytes for v in once) == nbytes
    back = split(state, "paper")
    assert {kind: part.config for kind, part in back.parts.items()} == configs
    assert released_name("addp", back.parts["addp"].config) == f"addp_vit_{name}_patch16"
    assert released_name("token_predictor", back.parts["token_predictor"].config) == f"mage_vit_{name}_patch16"


# Layouts


def test_a_release_comes_back_as_it_was(release):
    release["pos_token_embed"] = torch.full_like(release["pos_token_embed"], 3)
    found = split(release, "tiny", HEADS)
    assert {kind: part.config for kind, part in found.parts.items()} == CONFIGS
    assert found.parts["token_predictor"].state[PLACES].shape == (10, 12)
    assert found.parts["token_predictor"].unused[PLACES].shape == (247, 12)
    assert same(join(found.parts, "tiny")[1], release)
    whole = {n for part in found.parts.values() for n in part.state}
    assert not whole & {"pos_token_embed", "decoder_pred.weight", "position_ids"}


def test_a_mage_file_with_and_without_its_tokenizer(release):
    cut = {n.removeprefix("token_predictor."): v for n, v in release.items() if n.startswith("token_predictor.")}
    found = split(cut, "mage", HEADS)
    assert found.layout == "mage" and found.parts.keys() == {"tokenizer", "token_predictor"} and not found.aliases
    assert same(join(found.parts, "mage")[1], cut)
    alone = {n: v for n, v in cut.items() if not n.startswith("vqgan.")}
    found = split(alone, "mage", HEADS)
    assert found.parts.keys() == {"token_predictor"} and same(join(found.parts, "mage")[1], alone)


def test_a_tokenizer_file(release):
    cut = {n.removeprefix("vqgan."): v for n, v in release.items() if n.startswith("vqgan.")}
    found = split(cut, "vq")
    assert found.layout == "tokenizer" and found.parts["tokenizer"].config == CONFIGS["tokenizer"]
    assert same(join(found.parts, "vq")[1], cut)
    with pytest.raises(UserError, match=r"left over.*loss\.discriminator\.weight"):
        split(cut | {"loss.discriminator.weight": torch.zeros(3)}, "vq")


def test_tables_that_nothing_reads_may_be_missing(release):
    unread = ("pos_token_embed", "token_predictor.cls_token", "token_predictor.token_emb.position_ids")
    found = split({n: v for n, v in release.items() if n not in unread}, "tiny", HEADS)
    _, again, filled = join(found.parts, "tiny")
    assert set(filled) == set(unread) and again.keys() == release.keys()


# Refusals


def without(*names):
    return lambda state: {n: v for n, v in state.items() if n not in names}


def changed(name, make):
    return lambda state: state | {name: make(state.get(name))}


def cut(prefix):
    return lambda state: {n: v for n, v in state.items() if not n.startswith(prefix)}


def fewer_codes(state):
    return state | {
        "token_emb.weight": state["token_emb.weight"][2:],
        "mlm_layer.bias": state["mlm_layer.bias"][..., 2:],
    }


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without("norm.weight"), "ADDP network .*1 missing .norm.weight"),
        (without("decoder_embed.weight"), "ADDP network lacks decoder_embed.weight"),
        (without("vqgan.quantize.embedding.weight", ALIAS + "quantize.embedding.weight"), "lacks quantize.embedding"),
        (without("vqgan.norm_out.weight", "vqgan.decoder.norm_out.bias"), "repeats a tensor that is not there"),
        (without(ALIAS + "encoder.conv_in.weight"), "repeats the tokenizer but for vqgan.encoder.conv_in.weight"),
        (changed(ALIAS + "encoder.conv_in.weight", lambda v: v + 1), "should repeat vqgan.encoder.conv_in.weight"),
        (changed(ALIAS + "more", lambda v: torch.ones(1)), "not there .vqgan.more"),
        (changed("more", lambda v: torch.ones(1)), "1 left over .more"),
        (changed("blocks.99999999999.norm1.weight", lambda v: torch.ones(12)), "unexplained tensor blocks.999"),
        (changed("token_predictor.more", lambda v: torch.ones(1)), "token predictor .*1 left over .more"),
        (changed("norm.weight", lambda v: v[:5]), r"norm.weight \(5,\) instead of \(12,\)"),
        (changed("pos_embed", lambda v: torch.ones(())), "shapes that no such network has"),
        (changed("token_emb.weight", lambda v: torch.ones(())), "shapes that no such network has"),
        (fewer_codes, "codes differ: its tokenizer has 7, its token predictor has 7, its ADDP network has 5; these"),
        (changed("norm.weight", lambda v: v.bool()), "norm.weight cannot be weights"),
        (changed("norm.weight", lambda v: v.to_sparse()), "norm.weight cannot be weights"),
        (cut(("vqgan.", ALIAS)), "holds no tokenizer .vqgan"),
        (cut("token_predictor."), "holds no token predictor"),
        (cut(("vqgan.decoder.", ALIAS + "decoder.")), "its tokenizer has no decoder"),
        (lambda state: {"layer.weight": torch.ones(1)}, "none of the official files .layer.weight.; valid: an ADDP"),
    ],
)
def test_what_is_not_explained_is_refused(release, spoil, words):
    with pytest.raises(UserError, match=words) as error:
        split(spoil(release), "FILE", HEADS)
    assert str(error.value).startswith("FILE") and "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {},
            "width 12, and the released ones have 256 or 768 or 1024; heads .*--heads N --decoder-heads N",
        ),
        ({"token_predictor": (5, 4)}, "embed_dim 12 is not divisible by num_heads 5"),
    ],
)
def test_heads_of_another_width_have_to_be_said(release, given, words):
    with pytest.raises(UserError, match=words):
        split(release, "FILE", given)


@pytest.mark.parametrize(
    ("kinds", "update", "words"),
    [
        (("addp", "tokenizer"), {}, "no token predictor"),
        (("addp",), {}, "no tokenizer and no token predictor"),
        (tuple(CONFIGS), {"num_codes": 9}, "codes differ"),
        (tuple(CONFIGS), {"image_size": 16}, "tokens differ"),
        (tuple(CONFIGS), {"image_size": 6, "patch_size": 2}, "pixels per token differ"),
    ],
)
def test_networks_that_do_not_belong_together_make_no_file(kinds, update, words):
    configs = CONFIGS | {"addp": CONFIGS["addp"].model_copy(update=update)}
    with pytest.raises(UserError, match=words):
        join(parts_of({kind: configs[kind] for kind in kinds}), "FOLDER")


def test_layouts_are_told_by_names_alone():
    assert layout_of({}) is None and layout_of({"encoder.layers.0.weight": 0}) == "tokenizer"
