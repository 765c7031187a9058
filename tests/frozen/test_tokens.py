"""Tokenizer, token predictor and ADDP from folders and official files: pytest tests/frozen/test_tokens.py"""

import argparse
import json
import os
import shutil

import commands
import pytest
import torch
from golden_addp import close, heads, is_addp, masks, official, rows
from PIL import Image

from diffrep.errors import UserError
from diffrep.frozen.token_files import UNUSED, convert
from diffrep.frozen.tokens import load_addp, load_predictor, load_tokenizer, write_network
from diffrep.models.addp_files import ALIAS, KINDS, Part, join
from diffrep.models.addp_vit import ADDPVitConfig
from diffrep.models.masked_vit import TokenPredictorConfig
from diffrep.models.vqgan import VQGAN, VQGANConfig

SIZE = {"embed_dim": 12, "depth": 2, "num_heads": 2, "decoder_depth": 1, "decoder_num_heads": 4, "num_codes": 7}
CONFIGS = {
    "tokenizer": VQGANConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=0, z_channels=4, num_codes=7),
    "token_predictor": TokenPredictorConfig(**SIZE, num_tokens=9),
    "addp": ADDPVitConfig(**SIZE, image_size=12, patch_size=4),
}


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return make().eval()


@pytest.fixture(scope="module")
def networks():
    return {kind: seeded(lambda k=kind: KINDS[k][0](CONFIGS[k])) for kind in CONFIGS}


@pytest.fixture(scope="module")
def state(networks):
    return join({kind: Part(CONFIGS[kind], n.state_dict()) for kind, n in networks.items()}, "tiny")[1]


@pytest.fixture
def file(state, tmp_path):
    """As official code writes it, with all that a training checkpoint has besides."""
    extra = {"epoch": 3, "args": argparse.Namespace(lr=0.1), "optimizer": {"state": {}, "param_groups": []}}
    torch.save({"model": state} | extra, tmp_path / "addp.pth")
    return tmp_path / "addp.pth"


@pytest.fixture
def folder(file, tmp_path):
    convert(str(file), tmp_path / "folder", [2], [4])
    return tmp_path / "folder"


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def everything(folder):
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*")}


# Official files


@pytest.mark.golden(of=is_addp)
@torch.no_grad()
def test_golden_file_gives_the_official_numbers(golden_case, tmp_path):
    torch.save({"model": official(golden_case)}, tmp_path / "addp.pth")
    by_kind = [tuple(heads(golden_case.meta[kind]).values()) for kind in ("addp", "token_predictor")]
    found = convert(str(tmp_path / "addp.pth"), tmp_path / "out", *zip(*by_kind, strict=True))
    assert set(found["parts"]) == set(CONFIGS) and len(found["unused"]) == 15 and not found["filled"]
    vq = load_tokenizer(str(tmp_path / "out"))
    teacher, network = load_predictor(str(tmp_path / "out"), vq), load_addp(str(tmp_path / "out"), vq)
    ids, (mask, _) = vq.encode(golden_case.get("inputs/image")), masks(golden_case)
    assert torch.equal(ids, golden_case.get("outputs/vq.indices"))
    drawn = golden_case.get("outputs/vq.reconstruction")
    close(vq.decode(vq.lookup(ids), vq.grid(drawn)), drawn)
    prob = golden_case.get("outputs/tp.prob_mask_t")
    close(teacher.probabilities(ids, mask), rows(prob, tuple(prob.shape[-2:])))
    close(network.module.encode(golden_case.get("outputs/train.x_t")), golden_case.get("outputs/train.latent"))


@pytest.mark.golden(of=is_addp)
def test_golden_file_comes_back_with_equal_tensors(golden_case, tmp_path):
    state = official(golden_case)
    torch.save({"model": state}, tmp_path / "addp.pth")
    by_kind = [tuple(heads(golden_case.meta[kind]).values()) for kind in ("addp", "token_predictor")]
    convert(str(tmp_path / "addp.pth"), tmp_path / "out", *zip(*by_kind, strict=True))
    found = convert(str(tmp_path / "out"), tmp_path / "again.pth")
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert again.keys() == {"model"} and same(again["model"], state)
    assert found["aliases"] == sum(n.startswith(ALIAS) for n in state) > 0


def test_a_tokenizer_is_read_from_any_official_file(file, state, networks, tmp_path):
    """Heads are no matter where there are none; the file with all three needs them, and says so."""
    with pytest.raises(UserError, match="--heads N --decoder-heads N"):
        load_tokenizer(str(file))
    own = {n.removeprefix("vqgan."): v for n, v in state.items() if n.startswith("vqgan.")}
    torch.save({"state_dict": own, "global_step": 7}, tmp_path / "vq.ckpt")
    vq, image = load_tokenizer(str(tmp_path / "vq.ckpt")), torch.rand(2, 3, 8, 12)
    assert torch.equal(vq.encode(image), networks["tokenizer"].encode(image))
    assert vq.name == "vq.ckpt" and "MAGE" in vq.licence
    with pytest.raises(UserError, match=r"vq.ckpt holds tokenizer and no ADDP network; valid: a folder with addp/"):
        load_addp(str(tmp_path / "vq.ckpt"), vq)


def test_official_widths_need_no_heads(tmp_path):
    """A file of width 1024 and of other depths is read as it is, and the licence of its authors is said with care."""
    size = {"embed_dim": 1024, "depth": 1, "num_heads": 16, "decoder_depth": 1, "mlp_ratio": 0.25, "num_codes": 7}
    configs = CONFIGS | {
        "token_predictor": TokenPredictorConfig(**size, num_tokens=9),
        "addp": ADDPVitConfig(**size, image_size=12, patch_size=4),
    }
    made = {kind: seeded(lambda k=kind: KINDS[k][0](configs[k])) for kind in configs}
    state = join({kind: Part(configs[kind], n.state_dict()) for kind, n in made.items()}, "wide")[1]
    torch.save({"model": state}, tmp_path / "wide.pth")
    vq = load_tokenizer(str(tmp_path / "wide.pth"))
    network, teacher = load_addp(str(tmp_path / "wide.pth"), vq), load_predictor(str(tmp_path / "wide.pth"), vq)
    assert network.config == configs["addp"] and teacher.module.config == configs["token_predictor"]
    assert same(dict(network.module.state_dict()), dict(made["addp"].state_dict()))
    assert all(word in network.licence for word in ("CC BY-NC 4.0", "Apache-2.0", "non-commercial"))


def test_what_convert_writes(file, folder, state):
    assert {p.name for p in folder.iterdir()} == {*CONFIGS, UNUSED}
    found = convert(str(folder), folder.parent / "again.pth")
    assert found["parts"]["addp"]["config"] == CONFIGS["addp"].model_dump(mode="json")
    again = torch.load(folder.parent / "again.pth", weights_only=True)["model"]
    assert same(again, state)
    values = sum(v.nbytes for n, v in again.items() if not n.startswith(ALIAS))
    assert values < (folder.parent / "again.pth").stat().st_size < values + 1000 * len(again)  # aliases cost nothing


def test_runs_of_ours_become_official_files(networks, tmp_path):
    for kind, network in networks.items():
        write_network(tmp_path / "run", kind, network, "mine", "MIT")
    found = convert(str(tmp_path / "run"), tmp_path / "mine.pth")
    assert found["licence"] == "MIT" and len(found["filled"]) == 15 and not found["unused"]
    state = torch.load(tmp_path / "mine.pth", weights_only=True)["model"]
    assert not state["decoder_pred.weight"].any()
    assert state["token_predictor.token_emb.position_ids"].tolist() == [list(range(257))]
    assert state["token_predictor.token_emb.position_embeddings.weight"].shape == (257, 12)


# What is refused


class Runs:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def truncated(path, state):
    torch.save({"model": state}, path)
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (truncated, "cannot be loaded: it is damaged"),
        (lambda path, state: torch.save({"model": state, "x": Runs()}, path), "wants to run code; nothing of it"),
        (lambda path, state: path.write_bytes(b""), "cannot be loaded"),
        (lambda path, state: torch.save({"model": state | {"x": torch.ones(1)}}, path), "1 left over .x"),
        (lambda path, state: torch.save([1], path), "holds a list and no weights by name"),
        (lambda path, state: torch.save({"model": {}}, path), "no weights"),
    ],
)
def test_hostile_files_leave_nothing_behind(state, tmp_path, monkeypatch, write, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "bad.pth", state)
    before = everything(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        convert("bad.pth", tmp_path / "out", [2], [4])
    assert everything(tmp_path) == before and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("heads", "decoder_heads"), [([2], []), ([2, 2, 2], [4, 4, 4]), ([2, 2], [4]), ([0], [4]), ([-2], [-4])]
)
def test_heads_come_in_pairs(file, tmp_path, heads, decoder_heads):
    with pytest.raises(UserError, match="belong together"):
        convert(str(file), tmp_path / "out", heads, decoder_heads)


def test_nothing_that_exists_is_replaced(file, folder):
    for source, out in ((file, folder), (folder, file)):
        with pytest.raises(UserError, match="exists already"):
            convert(str(source), out)
    with pytest.raises(UserError, match="official files are called"):
        convert(str(folder), folder.parent / "new")
    with pytest.raises(UserError, match="leave out the options"):
        convert(str(folder), folder.parent / "new.pth", [2], [4])
    with pytest.raises(UserError, match="nowhere does not exist"):
        convert("nowhere", folder.parent / "new.pth")
    with pytest.raises(UserError, match="holds none of our networks"):
        convert(str(folder / "addp" / ".." / ".."), folder.parent / "new.pth")


def test_a_folder_that_lost_a_part_says_what_it_holds(folder):
    vq = load_tokenizer(str(folder))
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(UserError, match=r"holds token predictor, ADDP network and no tokenizer; valid: a folder with"):
        load_tokenizer(str(folder))
    with pytest.raises(UserError, match="holds no tokenizer"):
        convert(str(folder), folder.parent / "new.pth")
    assert load_addp(str(folder), vq).config == CONFIGS["addp"]
    shutil.rmtree(folder / "addp")
    with pytest.raises(UserError, match="has tables of addp, which"):
        convert(str(folder), folder.parent / "new.pth")
    with pytest.raises(UserError, match="nowhere does not exist"):
        load_tokenizer("nowhere")


def test_networks_of_other_codebooks_and_patches_are_refused(folder):
    def other(**change):
        config = CONFIGS["tokenizer"].model_copy(update=change)
        write_network(folder.parent / "other", "tokenizer", seeded(lambda: VQGAN(config)), "other", "MIT")
        return load_tokenizer(str(folder.parent / "other"))

    for load, words in ((load_addp, "ADDP network .width 12"), (load_predictor, "token predictor .width 12")):
        with pytest.raises(UserError, match=rf"{words}.* knows 7 codes, the tokenizer other has 9"):
            load(str(folder), other(num_codes=9))
    with pytest.raises(UserError, match="patches of 4 pixels, the tokenizer other tokens of 2"):
        load_addp(str(folder), other(ch_mult=(1, 1)))


def test_weights_of_another_size_than_their_config_are_refused(folder):
    card = json.loads((folder / "addp/config.json").read_text())
    card["config"]["decoder_depth"] = 2
    (folder / "addp/config.json").write_text(json.dumps(card))
    with pytest.raises(
        UserError, match=r"no ADDP network as its config.json says \(width 12, depth 2 \+ 2.* 12 missing"
    ):
        load_addp(str(folder), load_tokenizer(str(folder)))


def test_a_tokenizer_without_decoder_draws_nothing(tmp_path):
    config = CONFIGS["tokenizer"].model_copy(update={"decoder": False})
    write_network(tmp_path, "tokenizer", seeded(lambda: VQGAN(config)), "half", "MIT")
    vq = load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="half has no decoder"):
        vq.decode(vq.lookup(vq.encode(torch.rand(1, 3, 8, 4))), (2, 1))


@pytest.mark.parametrize(("size", "valid"), [((9, 8), "8x8 or 12x8"), ((2, 3), "4x4"), ((13, 11), "12x8 or 16x12")])
def test_a_size_that_the_stride_does_not_divide_is_told_the_next_ones(folder, size, valid):
    with pytest.raises(UserError, match=f"one token of 4 pixels: .* is not divisible; valid near it: {valid}$"):
        load_tokenizer(str(folder)).encode(torch.rand(1, 3, *size))


# The command line


def test_the_two_verbs(file):
    here = file.parent
    Image.new("RGB", (12, 8), (9, 80, 200)).save(here / "photo.png")
    done = commands.run(here, "convert", "addp.pth", "--out", "parts", "--heads", "2", "--decoder-heads", "4")
    assert done.code == 0, done.err
    aliases = sum(n.startswith(ALIAS) for n in torch.load(file, weights_only=False)["model"])
    for word in (
        "another size",
        "width 12, depth 2 + 1",
        f"aliases: {aliases}",
        "addp.decoder_pred.weight",
        "CC BY-NC",
    ):
        assert word in done.out
    back = commands.run(here, "convert", "parts", "--out", "back.pth", "--json")
    assert back.code == 0 and json.loads(back.out)["direction"] == "join"
    done = commands.run(here, "tokenize", "photo.png", "--tokenizer", "parts", "--out", "again.png")
    assert done.code == 0 and "2x3 ids" in done.out and "PSNR" in done.out and (here / "again.png").exists()
    for arguments, words in (
        (["convert", "addp.pth", "--out", "new", "--heads", "two"], "--heads takes whole numbers"),
        (["tokenize", "photo.png", "--tokenizer", "parts", "--image-size", "9"], "valid near it: 8x8 or 12x12"),
    ):
        before = everything(here)
        done = commands.run(here, *arguments)
        assert done.code == 2 and words in done.line and everything(here) == before
