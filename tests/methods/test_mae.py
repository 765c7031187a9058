"""Pixels behind hidden patches, against transformers' own MAE: pytest tests/methods/test_mae.py"""

import math
from dataclasses import dataclass

import pytest
import tiny
import torch
from safetensors.torch import load_file

from diffrep import _torchvision_compat, api
from diffrep.assemble import multiply_adds_per_image
from diffrep.counting import multiply_adds, on_meta
from diffrep.data.batch import Batch
from diffrep.errors import Interrupted, UserError
from diffrep.evaluation.classify import load_student
from diffrep.methods.finetune import FinetuneConfig
from diffrep.methods.mae import MAE, MAEConfig
from diffrep.models.addp_vit import MEAN, STD
from diffrep.models.mae_vit import MAEVitConfig, patchify, positions
from diffrep.randomness import Rows, seeded, stream
from diffrep.recipes.base import to_yaml
from diffrep.recipes.loading import load

SMALL = {"patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2, "decoder_depth": 2}
SMALL |= {"decoder_dim": 8, "decoder_num_heads": 4}


@dataclass(frozen=True)
class Size:
    """A network, its images, and how they are hidden."""

    image_size: int = 8
    mask_ratio: float = 0.75
    norm_pix_loss: bool = True
    network: tuple = ()

    def build(self) -> MAE:
        network = MAEVitConfig(**SMALL | dict(self.network))
        config = MAEConfig(network=network, mask_ratio=self.mask_ratio, norm_pix_loss=self.norm_pix_loss)
        with seeded(0, "test"):
            return MAE(config, 3, self.image_size).train()


SIZES = [
    Size(),
    Size(norm_pix_loss=False),
    Size(image_size=12, mask_ratio=0.5, network=(("depth", 3), ("decoder_depth", 1), ("mlp_ratio", 2.0))),
    Size(image_size=12, mask_ratio=0.6, norm_pix_loss=False, network=(("patch_size", 3), ("decoder_dim", 24))),
    Size(image_size=20, mask_ratio=0.9, network=(("patch_size", 4), ("embed_dim", 24), ("num_heads", 6))),
    Size(image_size=16, network=(("patch_size", 1), ("depth", 1), ("decoder_dim", 16), ("init_std", 0.5))),
]
EVERY_SIZE = pytest.mark.parametrize("size", SIZES, ids=str)


def images(count, side=8, seed=0):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def shown(count=4, side=8, labels=None, seed=0):
    return Batch(images(count, side, seed), labels, torch.arange(count))


def rows(total=4, chosen=None, seed=0, step=0):
    return Rows(stream(seed, "step", step), total, chosen)


def drawn(method, count=4, **options):
    """Which patches a step shows and hides."""
    return method.split(rows(count, **options).uniform(method.network.num_patches).argsort(dim=1, stable=True))


def normalised(batch):
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (batch.images - mean) / std


def gradients(network, loss):
    network.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


# The same numbers as transformers' MAE

THEIR_BLOCK = {
    "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj", "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}  # fmt: skip
THEIRS = {
    "cls_token": "vit.embeddings.cls_token", "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection", "norm": "vit.layernorm",
    "blocks": "vit.layers", "mask_token": "decoder.mask_token", "decoder_pos_embed": "decoder.decoder_pos_embed",
    "decoder_embed": "decoder.decoder_embed", "decoder_blocks": "decoder.decoder_layers",
    "decoder_norm": "decoder.decoder_norm", "decoder_pred": "decoder.decoder_pred",
}  # fmt: skip


def renamed(state):
    """Tensors of ours under transformers' names, which keeps queries, keys and values apart."""
    found = {}
    for name, value in state.items():
        if "blocks." in name:
            found |= of_a_block(*name.split(".", 2), value)
        else:
            part, _, kind = name.rpartition(".")
            found[f"{THEIRS[part]}.{kind}" if part else THEIRS[name]] = value
    return found


def of_a_block(stack, number, name, value):
    where, (module, kind) = f"{THEIRS[stack]}.{number}", name.rsplit(".", 1)
    if module != "attn.qkv":
        return {f"{where}.{THEIR_BLOCK[module]}.{kind}": value}
    thirds = zip("qkv", value.chunk(3), strict=True)
    return {f"{where}.attention.{letter}_proj.{kind}": third for letter, third in thirds}


def theirs(size, method):
    """transformers' network with our weights, but its own tables of positions."""
    _torchvision_compat.install()
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    c = method.config.network
    made = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=c.embed_dim, num_hidden_layers=c.depth, num_attention_heads=c.num_heads,
            intermediate_size=int(c.embed_dim * c.mlp_ratio), decoder_hidden_size=c.decoder_dim,
            decoder_num_hidden_layers=c.decoder_depth, decoder_num_attention_heads=c.decoder_num_heads,
            decoder_intermediate_size=int(c.decoder_dim * c.mlp_ratio), image_size=size.image_size,
            patch_size=c.patch_size, mask_ratio=size.mask_ratio, norm_pix_loss=size.norm_pix_loss, layer_norm_eps=1e-6,
            attn_implementation="eager",
        )
    )  # fmt: skip
    # Its constructor leaves both tables at 0, where its own initialisation, asked once more, fills them.
    made.vit.embeddings.patch_embeddings.projection._is_hf_initialized = False
    made.vit.embeddings.initialize_weights()
    made.decoder.initialize_weights(method.network.num_patches)
    tables = {name: value for name, value in made.state_dict().items() if "pos" in name}
    made.load_state_dict(renamed(method.network.state_dict()) | tables)
    return made.train()


@EVERY_SIZE
def test_loss_latent_pixels_and_gradients_are_those_of_transformers(size):
    method, batch = size.build(), shown(3, size.image_size)
    other, pixels = theirs(size, method), normalised(batch)
    noise = rows(3).uniform(method.network.num_patches)
    expected = other(pixels, noise=noise)
    loss = method(batch, rows(3), 0.0)["loss"]
    torch.testing.assert_close(loss, expected.loss)

    seen, hidden = drawn(method, 3)
    assert torch.equal(torch.zeros_like(noise).scatter(1, hidden, 1.0), expected.mask)
    assert 0 < expected.mask[0].sum() < method.network.num_patches
    with torch.no_grad():
        latent = other.vit(pixels, noise=noise).last_hidden_state
        torch.testing.assert_close(method.network.encode(pixels, seen), latent, atol=1e-5, rtol=1e-5)
        guess = method.network(pixels, seen, hidden)
        logits = expected.logits.gather(1, hidden[..., None].expand_as(guess))
        torch.testing.assert_close(guess, logits, atol=1e-5, rtol=1e-5)

    found, wanted = renamed(gradients(method.network, loss)), gradients(other, expected.loss)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@EVERY_SIZE
def test_positions_and_patches_are_those_of_transformers(size):
    method = size.build()
    other, pixels = theirs(size, method), images(2, size.image_size)
    tables = other.vit.embeddings.position_embeddings, other.decoder.decoder_pos_embed
    assert all(table.any() for table in tables)
    for own, table in zip((method.network.pos_embed, method.network.decoder_pos_embed), tables, strict=True):
        torch.testing.assert_close(own, table.detach(), atol=1e-6, rtol=0)
    assert torch.equal(patchify(pixels, method.config.network.patch_size), other.patchify(pixels))
    everything = torch.arange(method.network.num_patches).expand(2, -1)
    patches = patchify(method.network.normalise(pixels), method.config.network.patch_size)
    plain = size.norm_pix_loss
    expected = (patches - patches.mean(2, True)) / (patches.var(2, keepdim=True) + 1e-6).sqrt() if plain else patches
    torch.testing.assert_close(method.target(method.network.normalise(pixels), everything), expected)


def test_positions_by_hand():
    table = positions(3, 8)  # two frequencies, 1 and 1/100
    assert table.shape == (1, 10, 8) and not table[0, 0].any()
    row, column = 1, 2
    each = [f(place * step) for place in (column, row) for f in (math.sin, math.cos) for step in (1, 0.01)]
    torch.testing.assert_close(table[0, 1 + 3 * row + column], torch.tensor(each))


# What reads what


def changed_at(pixels, where, patch=2):
    """Other pixels at patches ``where`` (B, R), and nowhere else."""
    side = pixels.shape[-1] // patch
    touched = torch.zeros(len(pixels), side * side).scatter(1, where, 1.0).view(-1, 1, side, side)
    touched = touched.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    return pixels + touched * images(len(pixels), pixels.shape[-1], seed=9)


def test_the_encoder_never_sees_hidden_pixels():
    method, pixels = Size().build(), images(4)
    seen, hidden = drawn(method)
    latent, guess = method.network.encode(pixels, seen), method.network(pixels, seen, hidden)
    blind = changed_at(pixels, hidden)
    assert latent.shape == (4, 5, 16) and guess.shape == (4, 12, 12) and not torch.equal(blind, pixels)
    assert torch.equal(method.network.encode(blind, seen), latent)
    assert torch.equal(method.network(blind, seen, hidden), guess)
    for k in range(4):  # every patch in sight counts
        other = changed_at(pixels, seen[:, k : k + 1])
        assert ((method.network.encode(other, seen) - latent).abs().amax((1, 2)) > 1e-4).all()


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_the_loss_is_the_mean_square_at_hidden_patches_alone(norm_pix_loss, monkeypatch):
    """A network that always says the same ramp: what is left is the target, pixel by pixel in Python's floats."""
    method, batch, ramp = Size(norm_pix_loss=norm_pix_loss).build(), shown(), torch.linspace(-1, 1, 12)
    seen, hidden = drawn(method)
    monkeypatch.setattr(method.network, "forward", lambda pixels, shown, hidden: ramp.expand(4, 12, 12))
    squares = []
    for k in range(4):
        for patch in hidden[k].tolist():
            top, left = 2 * (patch // 4), 2 * (patch % 4)
            cut = normalised(batch)[k, :, top : top + 2, left : left + 2].permute(1, 2, 0).flatten().tolist()
            if norm_pix_loss:
                mean = sum(cut) / 12
                deviation = math.sqrt(sum((x - mean) ** 2 for x in cut) / 11 + 1e-6)
                cut = [(x - mean) / deviation for x in cut]
            squares += [(said - x) ** 2 for said, x in zip(ramp.tolist(), cut, strict=True)]
    expected = pytest.approx(sum(squares) / len(squares), rel=1e-5)
    assert len(squares) == 4 * 12 * 12 and float(method(batch, rows(), 0.0)["loss"]) == expected
    elsewhere = Batch(changed_at(batch.images, seen), None, batch.index)
    assert float(method(elsewhere, rows(), 0.0)["loss"]) == expected
    there = Batch(changed_at(batch.images, hidden[:, :1]), None, batch.index)
    assert float(method(there, rows(), 0.0)["loss"]) != expected


def test_a_patch_of_one_colour_is_no_error():
    method = Size().build()
    flat = Batch(torch.full((2, 3, 8, 8), 0.25), None, torch.arange(2))
    _, hidden = drawn(method, 2)
    channels = method.target(method.network.normalise(flat.images), hidden).view(2, 12, 4, 3)
    assert channels.isfinite().all() and torch.equal(channels[:, :, :1].expand_as(channels), channels)
    grey = torch.tensor(MEAN).view(1, 3, 1, 1).expand(2, 3, 8, 8)
    assert method.target(method.network.normalise(grey), hidden).abs().max() < 1e-3
    loss = method(flat, rows(2), 0.0)["loss"]
    loss.backward()
    assert all(p.grad.isfinite().all() for p in method.parameters())


def test_in_bf16_the_loss_itself_is_float32():
    method = Size().build()
    exact = float(method(shown(), rows(), 0.0)["loss"].detach())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = method(shown(), rows(), 0.0)["loss"]
    rounded.backward()
    assert rounded.dtype == torch.float32 and float(rounded.detach()) == pytest.approx(exact, rel=0.02)


# What is drawn


def test_patches_are_a_function_of_seed_step_and_row():
    method = Size().build()
    seen, hidden = drawn(method)
    assert torch.equal(torch.cat([seen, hidden], 1).sort(1).values, torch.arange(16).expand(4, -1))
    part = drawn(method, chosen=[2, 0])
    assert torch.equal(part[0], seen[[2, 0]]) and torch.equal(part[1], hidden[[2, 0]])
    assert len({tuple(sorted(row)) for row in seen.tolist()}) == 4  # each image its own
    for other in ({"seed": 1}, {"step": 1}):
        assert not torch.equal(drawn(method, **other)[0], seen)
    loss = method(shown(), rows(), 0.0)["loss"]
    assert torch.equal(method(shown(), rows(), 0.9)["loss"], loss)
    assert not torch.equal(method(shown(), rows(seed=1), 0.0)["loss"], loss)


def test_every_patch_is_hidden_equally_often():
    method, count = Size().build(), 4000
    _, hidden = drawn(method, count)
    often = torch.zeros(16).index_add(0, hidden.flatten(), torch.ones(hidden.numel())) / count
    assert (often - 0.75).abs().max() < 4.5 * math.sqrt(0.75 * 0.25 / count)


@pytest.mark.parametrize("halves", [[[0, 1], [2, 3]], [[3, 0], [1, 2]], [[0], [1], [2], [3]]])
def test_micro_batches_add_up_to_the_whole(halves):
    method, batch = Size().build(), shown()
    loss = method(batch, rows(), 0.0)["loss"]
    whole, total = gradients(method.network, loss), {}
    parts = []
    for half in halves:
        part = method(Batch(batch.images[half], None, batch.index[half]), rows(chosen=half), 0.0)["loss"]
        parts.append(float(part.detach()) * len(half) / 4)
        for name, value in gradients(method.network, part * len(half) / 4).items():
            total[name] = total.get(name, 0) + value
    assert sum(parts) == pytest.approx(float(loss.detach()), rel=1e-6) and total.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(total[name], value, atol=1e-6, rtol=1e-4)


def test_every_parameter_learns_and_no_table_does():
    method = Size().build()
    found = gradients(method.network, method(shown(), rows(), 0.0)["loss"])
    assert all(value.any() for value in found.values())
    assert {id(p) for p in method.parameters()} == {id(p) for p in method.parameter_groups()["mae"]}
    assert not any("pos_embed" in name for name in found) and "pos_embed" in method.network.state_dict()


# What is learnt


def test_it_learns_how_patches_hang_together():
    """Stripes of a random phase: one patch in sight tells all the others; the mean alone would leave 11/12."""
    method = Size(network=(("embed_dim", 32), ("decoder_dim", 32))).build()
    optimizer = torch.optim.AdamW(method.parameters(), 3e-3)
    losses = []
    for step in range(150):
        phase = torch.rand(32, 1, 1, 1, generator=stream(0, "phase", step))
        wave = (2 * math.pi * (phase + torch.arange(8) / 8)).sin().expand(-1, 3, 8, 8)
        loss = method(Batch(0.5 + 0.3 * wave, None, torch.arange(32)), rows(32, step=step), step / 150)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 0.8 and sum(losses[-5:]) / 5 < 0.5


def test_no_label_has_a_part():
    assert MAEConfig().label_readers() == () and Size().build().labels_behind == {}
    losses = [Size().build()(shown(labels=labels), rows(), 0.0)["loss"] for labels in (None, torch.arange(4))]
    assert torch.equal(*losses)


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path):
    def trainer(name):
        optim = tiny.ADAM.model_copy(update={"group_lr": {}})
        made = Size(image_size=4, network=(("depth", 1),)).build()
        return tiny.trainer(tmp_path / name, made, optim, "none", steps=4, checkpoint_every=2)

    whole, broken, again = trainer("whole"), trainer("broken"), trainer("broken")
    whole.fit()
    with pytest.raises(Interrupted, match="stopped at step 1 of 4"):
        broken.fit(stop=lambda: True)
    again.fit()
    assert not tiny.same(tiny.weights(broken.method), tiny.weights(whole.method))
    assert tiny.same(tiny.weights(again.method), tiny.weights(whole.method))


def test_micro_batches_of_the_loop_end_where_the_whole_batch_does(tmp_path):
    ends = []
    for name, micro in (("whole", None), ("parts", 3)):
        made = Size(image_size=4, network=(("depth", 1),)).build()
        plain = tiny.SGD.model_copy(update={"group_lr": {}})
        tiny.trainer(tmp_path / name, made, plain, "none", steps=3, micro_batch_size=micro).fit()
        ends.append(tiny.weights(made))
    assert not tiny.same(ends[0], tiny.weights(Size(image_size=4, network=(("depth", 1),)).build()))
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, atol=1e-6, rtol=1e-4)


# What is kept


@EVERY_SIZE
def test_the_exported_vit_is_the_encoder_with_nothing_hidden(size):
    method, batch = size.build().eval(), shown(2, size.image_size)
    everything = torch.arange(method.network.num_patches).expand(2, -1)
    student = method.student.eval()
    with torch.no_grad():
        before = student.backbone.forward_features(normalised(batch))  # no norm behind the blocks
        encoded = method.network.encode(normalised(batch), everything)
        torch.testing.assert_close(method.network.norm(before), encoded, atol=1e-5, rtol=1e-5)
        mean = before[:, 1:].mean(1)  # not of the class token
        expected = torch.nn.functional.layer_norm(mean, mean.shape[1:], eps=1e-6)
        torch.testing.assert_close(student.pooled(batch.images), expected, atol=1e-5, rtol=1e-5)


def test_a_run_is_scored_loaded_and_begins_a_finetuning(tmp_path):
    result = api.run("mae_debug", out=tmp_path / "run")
    assert result["labels_seen"] == {} and result["labels_behind"] == {} and "linear_probe_50" in result["scores"]
    student = load_student(str(tmp_path / "run"))
    kept = student.backbone.state_dict()
    method = FinetuneConfig(student=student.config, init=str(tmp_path / "run"))
    task = load("finetune_debug", ["train.steps=0"]).model_copy(update={"method": method, "name": "tuned"})
    (tmp_path / "tuned.yaml").write_text(to_yaml(task))
    tuned = api.run(str(tmp_path / "tuned.yaml"), out=tmp_path / "tuned")
    assert tuned["loaded"]["matched"] == len(kept) and not any("decoder" in name for name in kept)
    begun = load_file(tmp_path / "tuned" / "weights.safetensors")
    assert all(torch.equal(begun[name], value) for name, value in kept.items())


def test_the_network_has_the_official_names():
    """Of `models_mae.py`, with timm's names inside a block."""
    block = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    modules = ["patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred"]
    modules += [f"{stack}.{k}.{m}" for stack in ("blocks", "decoder_blocks") for k in (0, 1) for m in block]
    names = {"cls_token", "pos_embed", "mask_token", "decoder_pos_embed"}
    names |= {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    state = Size().build().network.state_dict()
    assert state.keys() == names
    assert state["decoder_pred.weight"].shape == (12, 8) and state["pos_embed"].shape == (1, 17, 16)


# What it costs


def block_products(rows, read, width):
    """Multiply-adds of a block over ``rows`` of which ``read`` are wanted."""
    keys_and_values, attention = 2 * rows * width**2, 2 * rows * read * width
    return keys_and_values + attention + read * width**2 * (1 + 1 + 2 * 4)


def test_the_encoder_pays_for_visible_patches_and_the_last_block_for_hidden_ones():
    """16 patches of 12 numbers, 4 in sight; both stacks of two blocks."""
    method = Size().build()
    seen, hidden = drawn(method, 1)
    forward = multiply_adds(on_meta(method.network, images(1), seen, hidden))
    encoder = 16 * 12 * 16 + 2 * block_products(5, 5, 16)
    decoder = 5 * 16 * 8 + block_products(17, 17, 8) + block_products(17, 12, 8) + 12 * 8 * 12
    assert forward == encoder + decoder
    both = multiply_adds_per_image(method, 8)
    assert 2.8 * forward < both <= 3 * forward and method.frozen_multiply_adds() == 0


# Refusals


@pytest.mark.parametrize(
    "size, words",
    [
        (Size(image_size=9), "images of 9 pixels do not divide into 2"),
        (Size(image_size=4, mask_ratio=0.8), "method.mask_ratio 0.8 of 4 patches (method.network.patch_size 2)"),
    ],
)
def test_what_does_not_fit_the_images_is_one_line(size, words):
    with pytest.raises(UserError) as caught:
        size.build()
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override, words",
    [
        ("method.mask_ratio=1", "method.mask_ratio"),
        ("method.mask_ratio=0", "method.mask_ratio"),
        ("method.network.decoder_num_heads=3", "decoder_dim 8 is not divisible by decoder_num_heads 3"),
        ("method.network.num_heads=5", "embed_dim 16 is not divisible by num_heads 5"),
        ("method.network.embed_dim=18", "embed_dim 18 is not divisible by 4"),
        ("method.norm_pix=false", "norm_pix_loss"),
    ],
)
def test_wrong_settings_are_one_line(override, words):
    with pytest.raises(UserError) as caught:
        load("mae_debug", [override])
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert load("mae_debug", ["method.mask_ratio=0.5"]).method.mask_ratio == 0.5
