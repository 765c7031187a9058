"""A frozen diffusion model asked for features, and how it is loaded: pytest tests/frozen/test_diffusion.py"""

import io
import json
import os
import pickle
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diffrep.diffusion.schedules import NoiseSchedule
from diffrep.errors import UserError
from diffrep.frozen.diffusion import DiffusionTeacher
from diffrep.frozen.teachers import load_teacher, untrained
from diffrep.randomness import Rows, stream

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def teacher(tiny_denoiser):
    return DiffusionTeacher(tiny_denoiser(), "tiny", 8)


@pytest.fixture
def copy(pipeline, tmp_path):
    """A diffusers folder that a test may damage."""
    return shutil.copytree(pipeline(), tmp_path / "teacher")


def refused(reference, **options):
    with pytest.raises(UserError) as caught:
        load_teacher(str(reference), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def images(count=2, seed=0, size=8):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


# Features


def entering(teacher):
    """What the network itself is given, call by call."""
    seen = []
    teacher.module.register_forward_pre_hook(lambda _m, args: seen.append(args))
    return seen


def test_black_and_white_enter_as_exactly_minus_one_and_one(teacher):
    """uint8 0 and 255 go through the door as the feed sends them: divided by 255."""
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    teacher.taps()
    seen = entering(teacher)
    teacher.features(pixels.to(torch.float32) / 255, 5, ["stem"])
    x = seen[0][0]
    assert bool((x[0] == -1).all()) and bool((x[1] == 1).all()) and x.dtype == torch.float32


def test_a_grey_network_sees_the_mean_of_the_channels(tiny_denoiser):
    teacher = DiffusionTeacher(tiny_denoiser(channels=1), "grey", 8, in_channels=1)
    teacher.taps()
    seen = entering(teacher)
    teacher.features(images(), 0, ["mid"])
    torch.testing.assert_close(seen[0][0], images().mean(1, keepdim=True) * 2 - 1)


def test_features_equal_the_full_pass_bit_for_bit(teacher):
    steps = torch.tensor([0, 999])
    whole = {}
    handles = [
        module.register_forward_hook(lambda _m, _i, out, n=name: whole.__setitem__(n, out))
        for name, module in teacher.module.named_modules()
    ]
    with torch.no_grad():
        teacher.module(images() * 2 - 1, steps)
    for handle in handles:
        handle.remove()
    for tap in teacher.taps():
        read = teacher.features(images(), steps, [tap.name])[tap.name]
        assert torch.equal(read, whole[tap.name]) and read.shape[1:] == tap.shape and not read.requires_grad


def test_real_unet_features_are_exact_and_stop_at_the_tap(pipeline):
    clean, poisoned = load_teacher(str(pipeline())), load_teacher(str(pipeline()))
    for name, parameter in poisoned.module.named_parameters():
        if name.startswith(("up_blocks", "conv_norm_out", "conv_out")):
            nn.init.constant_(parameter, float("nan"))
    whole = {}
    clean.module.mid_block.register_forward_hook(lambda _m, _i, out: whole.update(mid=out))
    with torch.no_grad():
        clean.module(images() * 2 - 1, torch.tensor([7, 7]))
    expected = whole["mid"]
    for network in (clean, poisoned):
        assert torch.equal(network.features(images(), 7, ["mid_block"])["mid_block"], expected)
    assert not torch.isfinite(poisoned.predict(images(), torch.tensor([7, 7]))).any()


def test_one_number_means_the_same_timestep_for_all(teacher):
    a, b, c = (teacher.features(images(), t, ["mid"])["mid"] for t in (40, torch.tensor([40, 40]), 41))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("timestep", [-1, 1000, torch.tensor([0, 1000]), torch.tensor([5, -7])])
def test_timesteps_out_of_range_are_refused(teacher, timestep):
    with pytest.raises(UserError, match=r"timestep -?\d+ is outside 0..999 of tiny"):
        teacher.features(images(), timestep, ["mid"])


def test_the_last_timestep_of_a_shorter_schedule(tiny_denoiser):
    teacher = DiffusionTeacher(tiny_denoiser(), "short", 8, schedule=NoiseSchedule.named("linear", 10))
    teacher.features(images(), 9, ["mid"])
    with pytest.raises(UserError, match=r"0..9 of short"):
        teacher.features(images(), 10, ["mid"])


@pytest.mark.parametrize("height, width", [(16, 16), (8, 16), (16, 8)])
def test_images_of_another_size_are_refused(teacher, height, width):
    with pytest.raises(UserError, match=f"reads 8-pixel images, not {height}x{width}"):
        teacher.features(torch.zeros(1, 3, height, width), 0, ["mid"])


def test_unknown_taps_are_refused_with_the_nearest_names(teacher):
    with pytest.raises(UserError, match=r"tap 'midd' does not exist in TinyDenoiser; did you mean 'mid'\?"):
        teacher.features(images(), 0, ["midd"])


def test_forward_noise_is_the_schedules_and_the_rngs(teacher):
    teacher.taps()
    seen = entering(teacher)
    steps = torch.tensor([10, 900])
    teacher.features(images(), steps, ["stem"], noise="forward", rng=Rows(stream(0, "x"), 2))
    noise = Rows(stream(0, "x"), 2).normal(3, 8, 8)
    torch.testing.assert_close(seen[0][0], teacher.schedule.noised(images() * 2 - 1, noise, steps))
    with pytest.raises(ValueError, match="pass rng"):
        teacher.features(images(), 0, ["stem"], noise="forward")


def test_a_teacher_stays_in_eval_without_gradients_and_unchanged(tiny_denoiser):
    network = tiny_denoiser().train()
    teacher = DiffusionTeacher(network, "tiny", 8)
    before = teacher.sha256
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert torch.equal(*(teacher.features(images(), 3, ["mid"])["mid"] for _ in range(2)))  # its dropout is off
    assert DiffusionTeacher(network, "other name", 8).sha256 == before
    with torch.no_grad():
        network.out.bias[0] += 1e-6
    assert DiffusionTeacher(network, "tiny", 8).sha256 != before


def test_without_a_label_a_conditional_network_gets_its_null_class(tiny_denoiser):
    teacher = DiffusionTeacher(tiny_denoiser(num_classes=4), "conditional", 8, num_classes=4)
    bare = teacher.features(images(), 9, ["mid"])["mid"]
    null, three = (teacher.features(images(), 9, ["mid"], labels=torch.full((2,), k))["mid"] for k in (4, 3))
    assert torch.equal(bare, null) and not torch.equal(bare, three)


def test_multiply_adds_grow_along_the_pass_and_end_at_the_whole(teacher):
    counts = [teacher.multiply_adds(tap.name) for tap in teacher.taps()]
    assert counts == sorted(counts) and counts[-1] == teacher.multiply_adds() > counts[0]
    assert teacher.multiply_adds("stem") == 4 * 8 + 64 * 8 * 27  # the time layer stands before the stem


# Loading


def test_a_run_and_a_folder_and_an_inner_folder_are_one_teacher(pipeline, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(pipeline(), run / "pipeline")
    (run / "recipe.yaml").write_text("name: x")
    (run / "result.json").write_text(json.dumps({"name": "my_run", "licence": "CC0"}))
    teachers = [load_teacher(str(path)) for path in (run, pipeline(), pipeline() / "unet")]
    assert len({t.sha256 for t in teachers}) == 1
    assert (teachers[0].name, teachers[0].licence) == ("my_run", "CC0") and teachers[1].licence == "unknown"
    assert teachers[0].image_size == 8 and teachers[0].num_classes is None


def test_loading_keeps_classes_channels_and_prediction(pipeline):
    folder = pipeline(conditional=True, in_channels=1, prediction="v_prediction", noise_schedule="cosine")
    teacher = load_teacher(str(folder))
    assert (teacher.num_classes, teacher.in_channels, teacher.prediction) == (4, 1, "v_prediction")
    expected = NoiseSchedule.named("cosine").alphas_cumprod
    assert abs(teacher.schedule.alphas_cumprod - expected).max() < 1e-9


def test_the_published_small_model_gives_its_published_numbers(shared):
    folder = shared / "weights" / "ddpm_cifar10_small"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    teacher = load_teacher(str(folder))
    output = teacher.predict(torch.zeros(1, 3, 32, 32), torch.tensor([100]))
    assert output.flatten()[:4].tolist() == pytest.approx([0.14579, 0.14079, 0.12401, 0.09956], abs=2e-5)
    assert float(output.norm()) == pytest.approx(4.23899, abs=2e-4)
    assert teacher.num_parameters == 2646659
    attention = 2 * 16 * 16 * 128 / 1e6  # the two products of 16 places, which a count on the CPU leaves out
    assert teacher.multiply_adds() / 1e6 == pytest.approx(184.24 + attention, abs=0.005)


def test_nothing_there(tmp_path):
    assert "neither a folder here nor a Hub id" in refused(tmp_path / "nowhere")
    (tmp_path / "file.txt").write_text("x")
    assert "is no weights file; valid: .ckpt, .pt" in refused(tmp_path / "file.txt")
    (tmp_path / "empty").mkdir()
    assert "no unet/config.json and no config.json" in refused(tmp_path / "empty")


def test_an_unfinished_run_is_refused(pipeline, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(pipeline(), run / "pipeline")
    assert "has not finished (no result.json)" in refused(run)


def test_a_run_of_a_student_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: x")
    (tmp_path / "result.json").write_text("{}")
    assert "not one of a diffusion model" in refused(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_truncated_safetensors_are_named(copy, keep):
    file = copy / WEIGHTS
    content = file.read_bytes()
    file.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    assert "diffusion_pytorch_model.safetensors is corrupt or truncated" in refused(copy)


def test_missing_weights_are_said(copy):
    (copy / WEIGHTS).unlink()
    assert "weights cannot be loaded" in refused(copy)


def change_weights(folder, change):
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def drop(state):
    del state["conv_out.bias"]


def add(state):
    state["extra.weight"] = torch.zeros(3)


def reshape(state):
    state["conv_in.weight"] = torch.zeros(8, 4, 3, 3)


@pytest.mark.parametrize("change, named", [(drop, "conv_out.bias"), (add, "extra.weight"), (reshape, "")])
def test_weights_that_do_not_fit_are_refused(copy, change, named):
    change_weights(copy, change)
    message = refused(copy)
    assert named in message and ("do not belong together" in message or "cannot be loaded" in message)


@pytest.mark.parametrize(
    "config, words",
    [
        ("[]", "valid: UNet2DModel"),
        ("{", "not readable JSON"),
        ('{"_class_name": "AutoencoderKL"}', "holds a AutoencoderKL; valid: UNet2DModel"),
        (
            '{"_class_name": "UNet2DModel", "down_block_types": ["Nope"], "up_block_types": ["Nope"]}',
            "cannot be loaded",
        ),
    ],
)
def test_a_config_that_is_none_is_refused(copy, config, words):
    (copy / "unet" / "config.json").write_text(config)
    assert words in refused(copy)


@pytest.mark.parametrize("size", [None, [8, 8]])
def test_a_config_without_one_image_size_is_refused(copy, size):
    file = copy / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": size}))
    assert "sample_size" in refused(copy)


class Trap:
    """Unpickling this runs a shell command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def trapped(path, kind):
    if kind == "raw pickle":
        return pickle.dumps(Trap(path))
    if kind == "torch.save":
        buffer = io.BytesIO()
        torch.save({"conv_in.weight": Trap(path)}, buffer)
        return buffer.getvalue()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Trap(path)))
        archive.writestr("archive/version", "3")
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["raw pickle", "torch.save", "zip"])
def test_a_pickle_that_wants_to_run_code_does_not(copy, tmp_path, kind):
    sprung = tmp_path / "sprung"
    (copy / WEIGHTS).unlink()
    (copy / "unet" / "diffusion_pytorch_model.bin").write_bytes(trapped(sprung, kind))
    assert "weights cannot be loaded" in refused(copy)
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()  # the trap itself works


def test_an_honest_bin_is_read(copy, pipeline):
    state = load_file(copy / WEIGHTS)
    (copy / WEIGHTS).unlink()
    torch.save(state, copy / "unet" / "diffusion_pytorch_model.bin")
    assert load_teacher(str(copy)).sha256 == load_teacher(str(pipeline())).sha256


def test_foreign_code_needs_to_be_allowed(factory, tiny_denoiser):
    ran = []
    reference = factory(lambda: ran.append(1) or tiny_denoiser())
    assert "runs foreign code; if you trust it, say --allow-code" in refused(reference)
    assert "runs foreign code" in refused(f"random:{reference}") and not ran
    teacher = load_teacher(reference, allow_code=True)
    assert ran and teacher.image_size == 8 and teacher.num_train_timesteps == 1000
    own = DiffusionTeacher(tiny_denoiser(), "own", 8)
    assert load_teacher(factory(lambda: own), allow_code=True) is own


def test_a_factory_that_cannot_be_used_is_refused(factory):
    reference = factory(lambda: nn.Linear(2, 2))
    module = reference.split(":")[1]
    assert "did you mean 'make'?" in refused(f"python:{module}:mak", allow_code=True)
    assert "cannot import 'no_such_module_of_ours'" in refused("python:no_such_module_of_ours:make", allow_code=True)
    for empty in ("python:", "python::make", "python:.relative:make"):
        assert "cannot import" in refused(empty, allow_code=True)
    assert "attribute image_size" in refused(reference, allow_code=True)
    assert "returned a int" in refused(factory(lambda: 3), allow_code=True)


def test_untrained_keeps_the_architecture_and_nothing_of_the_training(pipeline):
    trained = load_teacher(str(pipeline()))
    fresh = load_teacher(f"random:{pipeline()}")
    assert fresh.name == f"untrained {trained.name}"
    mine, theirs = trained.module.state_dict(), fresh.module.state_dict()
    assert {n: v.shape for n, v in mine.items()} == {n: v.shape for n, v in theirs.items()}
    for name, value in mine.items():
        assert "norm" in name or not torch.equal(value, theirs[name]), name
    assert fresh.sha256 == load_teacher(f"random:{pipeline()}").sha256 != trained.sha256


def test_untrained_says_what_it_cannot_reset_and_forgets_the_old_hash(tiny_denoiser):
    teacher = DiffusionTeacher(tiny_denoiser(), "tiny", 8)
    before = teacher.sha256
    assert untrained(teacher).sha256 != before

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    with pytest.raises(UserError, match="a Scaled of mine has no reset_parameters"):
        untrained(DiffusionTeacher(nn.Sequential(Scaled()), "mine", 8))


def test_without_a_network_the_hub_is_one_line(monkeypatch):
    """What huggingface_hub raises offline, for an id that is nowhere on this disk."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_args, **_named):
        raise LocalEntryNotFoundError("no connection\nand a long text")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert "cannot fetch nobody/nothing from the Hub" in refused("nobody/nothing")
