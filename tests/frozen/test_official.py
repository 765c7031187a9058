"""Official files through the door that users open: pytest tests/frozen/test_official.py"""

import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from official_files import SAID, guided_unet, saved, tiny_dit

from diffrep import _torchvision_compat, api
from diffrep.assets import ASSETS
from diffrep.errors import UserError
from diffrep.frozen.conversion import convert
from diffrep.frozen.files import CARD
from diffrep.frozen.generator import DiffusionGenerator, SamplingConfig
from diffrep.frozen.passes import PassConfig
from diffrep.frozen.pipelines import load_generator
from diffrep.frozen.references import split_reference
from diffrep.frozen.teachers import load_teacher
from diffrep.models.guided_files import PRESETS
from diffrep.wordnet import labels_among, official_ids

TAP = "middle_block.2.out_layers.3"


@pytest.fixture(scope="module")
def adm(tmp_path_factory):
    return saved(guided_unet(), tmp_path_factory.mktemp("adm") / "mine.pt")


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    network = tiny_dit()
    wrap = lambda state: {"model": {n: v * 0 for n, v in state.items()}, "ema": state, "opt": {}, "args": None}  # noqa: E731
    return saved(network, tmp_path_factory.mktemp("dit") / "0400000.pt", wrap)


def images(count=3, size=8):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def refused(reference):
    with pytest.raises(UserError) as error:
        load_teacher(str(reference))
    assert "\n" not in str(error.value)
    return str(error.value)


# guided-diffusion


def test_a_guided_diffusion_file_is_a_teacher(adm):
    teacher, network = load_teacher(f"{adm}?{SAID}"), guided_unet()
    assert (teacher.image_size, teacher.num_classes, teacher.null_class) == (8, 7, False)
    assert teacher.schedule.alpha_bar_at(500) == pytest.approx(0.494, abs=2e-3)  # cosine; linear has 0.078
    seen = {}
    network.get_submodule(TAP).register_forward_hook(lambda _m, _i, out: seen.update(tap=out))
    with torch.no_grad():
        network(images() * 2 - 1, torch.full((3,), 90))  # no class is told
    assert torch.equal(teacher.features(images(), 90, [TAP])[TAP], seen["tap"])


def test_the_condition_is_nobodys_secret(adm):
    """Null, one class for all, or labels: and only who gives labels lets the feature depend on them."""
    null, third = load_teacher(f"{adm}?{SAID}"), load_teacher(f"{adm}?{SAID}&label=3")
    said = null.features(images(), 90, [TAP], labels=torch.full((3,), 3))[TAP]
    assert torch.equal(third.features(images(), 90, [TAP])[TAP], said)
    assert not torch.equal(null.features(images(), 90, [TAP])[TAP], said)
    assert "class '7' is outside 0..6" in refused(f"{adm}?{SAID}&label=7")


def test_wordnet_ids_and_not_positions():
    """Class 0 of Tiny-ImageNet is class 1 of ImageNet, the goldfish."""
    assert labels_among(("n01443537", "n02099601"), 1000) == (1, official_ids().index("n02099601")) == (1, 207)
    backwards = official_ids()[::-1]
    assert labels_among(backwards, 1000) == tuple(range(999, -1, -1))  # as many classes in another order
    for classes, count in ((("0", "1"), 1000), (("n01443537",), 200)):
        with pytest.raises(UserError, match="both must be WordNet ids"):
            labels_among(classes, count)
    with pytest.raises(UserError, match=r"not among the network's 1,000 .first: n00000000"):
        labels_among(("n01443537", "n00000000"), 1000)


def test_the_decoder_is_neither_needed_nor_kept(adm, tmp_path):
    state = torch.load(adm)
    for name, value in state.items():
        if name.startswith(("output_blocks", "out.")):
            value.fill_(float("nan"))
    torch.save(state, tmp_path / "poisoned.pt")
    poisoned, whole = load_teacher(f"{tmp_path}/poisoned.pt?{SAID}"), load_teacher(f"{adm}?{SAID}")
    whole.keep_only([TAP])
    assert torch.equal(*(t.features(images(), 5, [TAP])[TAP] for t in (poisoned, whole)))
    assert not {n for n, _ in whole.module.named_parameters() if n.startswith(("output_blocks", "out."))}


def test_attention_order_decides(adm):
    new, legacy = (load_teacher(f"{adm}?{SAID.replace('new', order)}") for order in ("new", "legacy"))
    a, b = (t.features(images(), 90, ["middle_block"])["middle_block"] for t in (new, legacy))
    assert float((a - b).norm() / a.norm()) > 0.01


def test_what_a_file_cannot_tell_has_to_be_said(adm):
    told = refused(adm)
    assert "image_size, attention_order, noise_schedule, num_heads or head_width cannot be seen" in told
    assert "?like=adm-64" in told
    assert "attention_order cannot be seen" in refused(f"{adm}?image_size=8&head_width=16&noise_schedule=linear")
    assert "like=adm-65 is no published" in refused(f"{adm}?like=adm-65")
    assert load_teacher(f"{adm}?like=adm-64").image_size == 64
    assert load_teacher(f"{adm}?like=adm-64&image_size=8").image_size == 8  # what is said wins
    assert "num_head_channels 48 does not divide the width 64" in refused(f"{adm}?like=adm-64&head_width=48")


def test_a_known_name_says_it_all(tmp_path):
    """The presets, by the official names of the files."""
    network = guided_unet(num_head_channels=64, model_channels=64, image_size=64, channel_mult=(1, 2))
    for key in ("adm-64", "adm-256-uncond"):
        saved(network, tmp_path / ASSETS[key].file)
        teacher = load_teacher(str(tmp_path / ASSETS[key].file))
        config = PRESETS[key].config
        assert teacher.module.config.attention_order == config.attention_order
        assert teacher.image_size == config.image_size
        assert teacher.licence == ASSETS[key].licence
    assert PRESETS["adm-64"].config.attention_order == "new" and PRESETS["adm-64"].noise_schedule == "cosine"


def test_random_builds_a_published_architecture_untrained(monkeypatch):
    tiny = PRESETS["adm-64"].config.model_copy(update={"model_channels": 64, "num_res_blocks": 1})
    monkeypatch.setitem(PRESETS, "adm-64", type(PRESETS["adm-64"])("64x64_diffusion.pt", tiny, "cosine"))
    teacher = load_teacher("random:adm-64")
    assert (teacher.image_size, teacher.num_classes, teacher.name) == (64, 1000, "untrained adm-64")
    assert teacher.sha256 == load_teacher("random:adm-64").sha256


# DiT


def test_a_training_checkpoint_is_read_at_its_average(dit):
    teacher, network = load_teacher(f"{dit}?num_heads=2"), tiny_dit()
    x, t = images() * 2 - 1, torch.full((3,), 7)
    with torch.no_grad():
        assert torch.equal(teacher.predict(x, t), network(x, t, torch.full((3,), 7)))  # K = 7 is the null class
    assert teacher.features(images(), 7, ["blocks.0", "blocks.1@raw"])["blocks.0"].shape == (3, 24, 4, 4)
    assert "say num_heads" in refused(dit)


def test_the_sinusoid_of_diffusers_only_by_name(dit):
    official, other = (load_teacher(f"{dit}?num_heads=2{more}") for more in ("", "&sinusoid=diffusers"))
    assert not torch.equal(*(t.predict(images() * 2 - 1, torch.full((3,), 700)) for t in (official, other)))


def test_both_draw_images(adm, dit):
    walk = SamplingConfig(num_sampling_steps="3")
    for reference in (f"{adm}?{SAID}", f"{dit}?num_heads=2"):
        generator = load_generator(reference)
        assert type(generator) is DiffusionGenerator
        drawn = generator.sample(torch.tensor([1, 6]), [3, 4], walk)
        assert drawn.shape == (2, 3, 8, 8)
        torch.testing.assert_close(drawn[1:], generator.sample(torch.tensor([6]), [4], walk), rtol=1e-3, atol=1e-3)
    load_generator(f"{dit}?num_heads=2").sample(torch.tensor([0]), [0], walk.model_copy(update={"guidance_scale": 2.0}))


def test_a_grey_dit_draws_pixels(tmp_path):
    file = saved(tiny_dit(in_channels=1), tmp_path / "grey.pt")
    assert type(load_generator(f"{file}?num_heads=2")) is DiffusionGenerator
    four = saved(tiny_dit(in_channels=4), tmp_path / "four.pt")
    with pytest.raises(UserError, match="draws latents: name its VAE"):
        load_generator(f"{four}?num_heads=2")


def test_guidance_needs_a_null_class(adm):
    generator, labels = load_generator(f"{adm}?{SAID}"), torch.tensor([1])
    for asked in ({"labels": None}, {"labels": labels, "guidance_scale": 2.0}):
        with pytest.raises(UserError, match="has no null class: it draws given classes only, and without guidance"):
            generator.sample(asked.pop("labels"), [0], SamplingConfig(num_sampling_steps="3", **asked))


def test_options_do_not_change_what_is_computed(adm, dit):
    for reference, tap in ((f"{adm}?{SAID}", TAP), (f"{dit}?num_heads=2", "blocks.1")):
        plain, other = load_teacher(reference), load_teacher(reference)
        expected = plain.features(images(), 90, [tap])[tap]
        for how in ({"channels_last": True}, {"attention": "plain"}, {"memory_mb": 1}):
            other.run_as(PassConfig(**how))
            torch.testing.assert_close(other.features(images(), 90, [tap])[tap], expected, rtol=1e-4, atol=1e-4)


# Conversion


@pytest.mark.parametrize("changed", [{}, {"num_classes": None, "attention_order": "legacy", "out_channels": 3}])
def test_guided_diffusion_to_diffusers_and_back(tmp_path, changed):
    network = guided_unet(**changed)
    file, order = saved(network, tmp_path / "a.pt"), changed.get("attention_order", "new")
    said = SAID.replace("new", order)
    convert(f"{file}?{said}", tmp_path / "folder")
    _torchvision_compat.install()
    from diffusers import DDPMPipeline, UNet2DModel

    unet = UNet2DModel.from_pretrained(tmp_path / "folder" / "unet")
    x, t = images() * 2 - 1, torch.tensor([0, 400, 999])
    labels = None if "num_classes" in changed else torch.tensor([0, 3, 6])
    with torch.no_grad():
        torch.testing.assert_close(unet(x, t, labels).sample, network(x, t, labels), rtol=1e-4, atol=1e-4)
    ours, theirs = load_teacher(f"{file}?{said}"), load_teacher(str(tmp_path / "folder"))
    assert (theirs.num_classes, theirs.null_class) == (ours.num_classes, False)
    torch.testing.assert_close(theirs.schedule.alphas_cumprod, ours.schedule.alphas_cumprod, atol=1e-9, rtol=0)
    convert(str(tmp_path / "folder"), tmp_path / "b.pt")
    again = torch.load(tmp_path / "b.pt")
    assert list(again) == list(network.state_dict())
    assert all(torch.equal(again[name], value) for name, value in network.state_dict().items())
    if labels is None:
        assert DDPMPipeline.from_pretrained(tmp_path / "folder")(num_inference_steps=2, output_type="np").images.any()


def test_a_converted_class_conditional_unet_has_no_null_class(adm, tmp_path):
    convert(f"{adm}?{SAID}", tmp_path / "folder")
    assert json.loads((tmp_path / "folder" / CARD).read_text())["null_class"] is False
    teacher = load_teacher(str(tmp_path / "folder"))
    assert teacher.num_classes == 7 and not teacher.null_class
    expected = load_teacher(f"{adm}?{SAID}").features(images(), 90, [TAP])[TAP]  # without a label, as the file
    assert torch.equal(teacher.features(images(), 90, [TAP])[TAP], expected)


def test_the_untrained_control_of_a_file_is_of_that_file_and_not_blank(tmp_path):
    """Official networks begin with last convolutions of zero: a tap there would be a constant."""
    file = saved(guided_unet(num_head_channels=64, model_channels=64, image_size=64), tmp_path / ASSETS["adm-64"].file)
    teacher = load_teacher(f"random:{file}")
    assert teacher.module.config.model_channels == 64  # not the published width
    assert float(teacher.features(images(size=64), 9, [TAP])[TAP].std()) > 1e-3


def test_dit_to_diffusers_and_back(dit, tmp_path):
    found = convert(f"{dit}?num_heads=2", tmp_path / "folder")
    assert "another sinusoid" in found["note"]
    _torchvision_compat.install()
    from diffusers import DiTTransformer2DModel

    transformer = DiTTransformer2DModel.from_pretrained(tmp_path / "folder" / "transformer")
    mimicked, ours = (load_teacher(f"{dit}?num_heads=2{more}") for more in ("&sinusoid=diffusers", ""))
    x, t, labels = images() * 2 - 1, torch.tensor([3, 500, 999]), torch.tensor([0, 5, 7])
    with torch.no_grad():
        found = transformer(x, timestep=t, class_labels=labels).sample
    torch.testing.assert_close(found, mimicked.predict(x, t, labels), rtol=1e-3, atol=1e-3)
    again = load_teacher(str(tmp_path / "folder"))
    assert torch.equal(again.predict(x, t, labels), ours.predict(x, t, labels))
    convert(str(tmp_path / "folder"), tmp_path / "b.pt")
    network = tiny_dit().state_dict()
    assert {n: v.shape for n, v in torch.load(tmp_path / "b.pt").items()} == {n: v.shape for n, v in network.items()}
    assert all(torch.equal(v, network[n]) for n, v in torch.load(tmp_path / "b.pt").items())


def test_conversion_writes_whole_or_not_at_all(adm, tmp_path):
    with pytest.raises(UserError, match="exists already"):
        convert(f"{adm}?{SAID}", tmp_path)
    with pytest.raises(UserError, match="cannot be seen"):
        convert(str(adm), tmp_path / "x")
    with pytest.raises(UserError, match="leave out label=5"):
        convert(f"{adm}?{SAID}&label=5", tmp_path / "x")
    shutil.copy(adm, tmp_path / "mine.pt")
    saved(guided_unet(num_head_channels=None, num_heads=2, attention_factors=(1, 2)), tmp_path / "heads.pt")
    told = "image_size=8&num_heads=2&attention_order=new&noise_schedule=linear"
    with pytest.raises(UserError, match="heads"):
        convert(f"{tmp_path}/heads.pt?{told}", tmp_path / "x")
    assert {p.name for p in tmp_path.iterdir()} == {"mine.pt", "heads.pt"}


# Files that are none


def test_references():
    place, options = split_reference("a/b.pt?like=adm-64&label=n01443537")
    assert (place, options.like, options.label) == ("a/b.pt", "adm-64", "n01443537")
    assert split_reference("sd?prompt=a photo of a dog")[1].prompt == "a photo of a dog"
    assert split_reference("a.pt?vae=w/a+b")[1].vae == "w/a+b"
    for bad, told in (
        ("a.pt?heads=3", "unknown key 'heads'; did you mean 'num_heads'"),
        ("a.pt?num_heads", "behind '?' stand name=value"),
        ("a.pt?num_heads=0", "num_heads = '0'"),
        ("a.pt?attention_order=old", "attention_order = 'old'"),
    ):
        with pytest.raises(UserError, match=r"name=value|key|num_heads|attention_order") as error:
            split_reference(bad)
        assert told in str(error.value)


def test_an_option_that_a_family_does_not_take(adm, dit, pipeline):
    assert "takes no option 'vae'" in refused(f"{adm}?{SAID}&vae=x")
    assert "takes no option 'prompt'" in refused(f"{dit}?num_heads=2&prompt=x")
    assert "takes no option 'num_heads'" in refused(f"{pipeline()}?num_heads=2")
    assert "knows no classes" in refused(f"{pipeline()}?label=2")


@pytest.mark.parametrize(
    ("names", "looks"),
    [
        (("down_blocks.0.resnets.0.conv1.weight",), "diffusers U-Net without its config"),
        (("model.diffusion_model.input_blocks.0.0.weight",), "Stable Diffusion checkpoint"),
        (("layer1.0.conv1.weight",), "ResNet classifier"),
        (("strange.weight",), "its first tensor is strange.weight"),
    ],
)
def test_another_architecture_is_named(tmp_path, names, looks):
    torch.save({name: torch.zeros(2, 2) for name in names}, tmp_path / "x.pt")
    assert looks in refused(tmp_path / "x.pt")


def test_missing_keys_are_counted_and_the_first_five_named(adm, tmp_path):
    state = torch.load(adm)
    gone = [name for name in state if name.startswith("middle_block.2.")]
    torch.save({name: value for name, value in state.items() if name not in gone}, tmp_path / "x.pt")
    told = refused(f"{tmp_path}/x.pt?{SAID}")
    assert f"{len(gone)} missing" in told and all(name in told for name in gone[:5]) and gone[5] not in told


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_half_a_file(adm, tmp_path, share):
    content = adm.read_bytes()
    (tmp_path / "x.pt").write_bytes(content[: int(share * len(content))])
    assert "is damaged" in refused(f"{tmp_path}/x.pt?{SAID}")


class Trap:
    def __reduce__(self):
        return exec, ("raise SystemExit('the trap was sprung')",)


def test_a_pickle_that_wants_to_run_code(tmp_path):
    (tmp_path / "x.pt").write_bytes(pickle.dumps({"time_embed.0.weight": Trap()}))
    assert "a pickle that wants to run code; nothing of it was run" in refused(tmp_path / "x.pt")
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(Trap()))
        archive.writestr("x/version", "3")
    (tmp_path / "y.pt").write_bytes(content.getvalue())
    assert "wants to run code" in refused(tmp_path / "y.pt")


def test_timesteps_and_sizes(adm):
    teacher = load_teacher(f"{adm}?{SAID}")
    with pytest.raises(UserError, match=r"timestep 1000 is outside 0..999 of mine.pt"):
        teacher.features(images(), 1000, [TAP])
    with pytest.raises(UserError, match="reads 8-pixel images, not 16x16"):
        teacher.features(images(size=16), 0, [TAP])


def test_a_file_is_mapped_and_not_read(adm):
    teacher = load_teacher(f"{adm}?{SAID}")
    assert str(adm) in Path("/proc/self/maps").read_text() and teacher.num_parameters


# Through a recipe (whole runs: tests/test_debug_recipes.py)


@pytest.mark.parametrize("kind", ["adm", "dit"])
def test_it_can_be_probed_and_its_features_kept(kind, adm, dit, tmp_path):
    reference, tap = {"adm": (f"{adm}?{SAID}", TAP), "dit": (f"{dit}?num_heads=2", "blocks.0")}[kind]
    settings = {"taps": [tap], "timesteps": [0]}
    probed = api.probe(reference, {"source": "digits"}, settings | {"labels": 50}, tmp_path / "p")
    assert probed["rows"][1]["tap"] == tap
    kept = api.features(reference, {"source": "digits"}, settings | {"pool": 1}, tmp_path / "f", "validation")
    assert kept["shapes"] == {tap: [64 if kind == "adm" else 24, 1, 1]}


def test_a_teacher_that_is_told_the_labels_says_so(adm, tmp_path):
    """Seven classes are not the ten of digits, and ten are."""
    settings = {"taps": [TAP], "timesteps": [0], "pool": 1, "condition": "labels", "dtype": "float32"}
    with pytest.raises(UserError, match=r"10 classes .* cannot be mapped onto the network's 7"):
        api.features(f"{adm}?{SAID}", {"source": "digits"}, settings, tmp_path / "x", "validation")
    ten = saved(guided_unet(num_classes=10), tmp_path / "ten.pt")
    told = api.features(f"{ten}?{SAID}", {"source": "digits"}, settings, tmp_path / "told", "validation")
    manifest = json.loads((tmp_path / "told" / "manifest.json").read_text())
    assert manifest["teacher_labels_seen"] == {"told to the teacher": manifest["num_images"]} and told
    digits, teacher = api.load_data("digits", "validation"), load_teacher(f"{ten}?{SAID}")
    found = np.load(tmp_path / "told" / f"{TAP}.npy")[0, 0, :5, :, 0, 0]
    first = digits.gather(torch.arange(5)) / 255
    expected = teacher.features(first, 0, [TAP], labels=digits.labels[:5])[TAP].mean((2, 3))
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
