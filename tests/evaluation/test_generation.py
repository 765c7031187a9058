"""Scores of generated images, and that none goes without its protocol: pytest tests/evaluation/test_generation.py

Inception's weights are on few machines. What surrounds them is tested with a tiny network in Inception's place, the
network itself with random weights (slow), and with the real ones where they are.
"""

import dataclasses
import io
import json
import pickle
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffrep import api, cli
from diffrep.config import validate
from diffrep.data.datasets import DataConfig, load_data
from diffrep.data.reference import prepare_reference
from diffrep.data.shards import Sample, write_manifest, write_shard
from diffrep.errors import UserError
from diffrep.evaluation import generation, inception
from diffrep.evaluation.distances import frechet_distance, gaussian, kernel_distance, subset_size
from diffrep.evaluation.generation import ScoreConfig, score_images
from diffrep.evaluation.protocols import ABSENT, Protocol, Score
from diffrep.files import sha256_of
from diffrep.frozen.classifier import ClassifierConfig, ClassifierTeacher, load_classifier

CPU = torch.device("cpu")
needs_torch_fidelity = pytest.mark.skipif(find_spec("torch_fidelity") is None, reason="needs diffrep[scores]")


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def write_pngs(folder, count, seed=0, size=16, spread=60, ending="png"):
    """Smooth pictures; a larger ``spread`` makes them more different from grey."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for k in range(count):
        small = (128 + spread * rng.standard_normal((4, 4, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{k:05d}.{ending}")
    return folder


def pixels_of(folder):
    files = sorted(f for f in folder.iterdir() if f.suffix == ".png")
    return torch.stack([torch.from_numpy(np.array(Image.open(f))).permute(2, 0, 1) for f in files])


class Tiny(nn.Module):
    def __init__(self, width=6, classes=5):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.fixture
def tiny():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return ClassifierTeacher(Tiny(), "tiny", 5, (0.5,) * 3, (0.25,) * 3)


@pytest.fixture
def named(tiny, monkeypatch):
    """named(images, reference, ...) scores in the features of ``tiny``."""
    monkeypatch.setattr(generation, "load_classifier", lambda config, allow_code: tiny)

    def score(images, reference, **settings):
        settings["features"] = {"reference": "tiny"}
        return score_images(str(images), str(reference), validate(ScoreConfig, settings, "score"))

    return score


@pytest.fixture
def stand_in(tiny, monkeypatch, tmp_path):
    """stand_in(images, reference, ...) scores with ``tiny`` in Inception's place."""
    if find_spec("torch_fidelity") is None:
        pytest.skip("needs diffrep[scores]")
    monkeypatch.setattr(inception, "find_weights", lambda path: tmp_path)
    monkeypatch.setattr(inception, "inception", lambda weights, device: generation.pooled_features(tiny, (16, 16)))
    monkeypatch.setattr(inception, "WIDTH", 6)
    return lambda images, reference, **s: score_images(str(images), str(reference), validate(ScoreConfig, s, "score"))


def by_name(found):
    return {score.name: score for score in found.scores}


def as_dataset(pixels):
    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return len(pixels)

        def __getitem__(self, k):
            return pixels[k]

    return Images()


def official(first, second, **more):
    """What torch-fidelity itself says of two uint8 tensors."""
    inception.need_torch_fidelity()
    from torch_fidelity import calculate_metrics

    quiet = {"cuda": False, "cache": False, "save_cpu_ram": True, "verbose": False}
    return calculate_metrics(input1=as_dataset(first), input2=as_dataset(second), **quiet, **more)


# No bare number


PROTOCOL = Protocol("inception-val", 50_000, "folder:val", "1a" * 32, 50_000, "Inception", "to 299")


def test_a_score_cannot_be_printed_without_protocol_and_n():
    fid, is_ = Score("FID", 8.9, PROTOCOL), Score("IS", 95.3, PROTOCOL, 1.5, "10 splits")
    assert str(fid) == "FID 8.9 [inception-val, N = 50,000 against 50,000, reference 1a1a1a1a1a1a]"
    assert str(is_).startswith("IS 95.3 ± 1.5 (10 splits) [inception-val, N = 50,000 ")
    spoken = io.StringIO()
    print(fid, [fid], {"FID": fid}, f"{fid}", f"{fid!r}", "%s" % fid, "{}".format(fid), file=spoken)  # noqa: UP031, UP032
    assert spoken.getvalue().count("8.9") == spoken.getvalue().count("inception-val, N = 50,000") == 7
    for bare in (
        lambda: f"{fid:.2f}", lambda: f"{fid:.3}", lambda: float(fid), lambda: round(fid, 2),
        lambda: json.dumps({"FID": fid}), lambda: fid + 0, lambda: sorted([fid, is_]),
    ):  # fmt: skip
        with pytest.raises(TypeError):
            bare()
    assert fid.to_json()["protocol"] == dataclasses.asdict(PROTOCOL)


def test_a_score_cannot_be_made_without_protocol_and_n():
    for wrong in (None, "inception-val", {"name": "inception-val"}):
        with pytest.raises(TypeError, match="needs its Protocol"):
            Score("FID", 8.9, wrong)
        with pytest.raises(TypeError, match="needs its Protocol"):
            dataclasses.replace(Score("FID", 8.9, PROTOCOL), protocol=wrong)
    with pytest.raises(TypeError):
        Score("FID", 8.9)
    for change in ({"name": ""}, {"images": 1}, {"reference_hash": ""}):
        with pytest.raises(ValueError, match="a protocol has a name"):
            dataclasses.replace(PROTOCOL, **change)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Score("FID", 8.9, PROTOCOL).protocol = None
    with pytest.raises(dataclasses.FrozenInstanceError):
        PROTOCOL.images = 50_000


@pytest.mark.parametrize("name", ["FID", "IS", "KID", "FID on tiny's pooled features"])
def test_other_features_never_bear_inceptions_names(name):
    with pytest.raises(ValueError, match="names of Inception's features alone"):
        Score(name, 1.0, dataclasses.replace(PROTOCOL, name="named features"))


# The distances


@pytest.mark.parametrize("width", [3, 64])
def test_frechet_of_known_gaussians(width):
    """Covariances with common axes: |m - n|^2 + sum of (s - t)^2 over the standard deviations along them, to 1e-6."""
    axes, _ = torch.linalg.qr(numbers(width, width))
    s, t = numbers(width, seed=1).abs(), numbers(width, seed=2).abs()
    mean, other = numbers(width, seed=3), numbers(width, seed=4)
    first, second = (mean, axes * s.square() @ axes.T), (other, axes * t.square() @ axes.T)
    wanted = float((mean - other).square().sum() + (s - t).square().sum())
    assert frechet_distance(first, second) == pytest.approx(wanted, rel=0, abs=1e-6)
    if find_spec("torch_fidelity"):
        inception.need_torch_fidelity()
        found = inception.fid(*((m.numpy(), c.numpy()) for m, c in (first, second)))
        assert found == pytest.approx(wanted, rel=0, abs=1e-6)


def test_kernel_distance_is_the_sum_over_pairs():
    x, y = numbers(5, 3), numbers(5, 3, seed=1) + 0.5

    def k(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    within = sum(k(s[i], s[j]) for s in (x, y) for i in range(5) for j in range(5) if i != j) / 20
    wanted = within - 2 * sum(k(a, b) for a in x for b in y) / 25
    assert kernel_distance(x, y, 5, subsets=2) == (pytest.approx(wanted), pytest.approx(0, abs=1e-12))


@needs_torch_fidelity
def test_kernel_distance_is_torch_fidelitys():
    inception.need_torch_fidelity()
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = numbers(40, 7), 1.3 * numbers(40, 7, seed=1) + 0.2
    found = kid_features_to_metric(x, y, kid_subset_size=40, kid_subsets=1, verbose=False)
    assert kernel_distance(x, y, 40, 1)[0] == pytest.approx(found["kernel_inception_distance_mean"], rel=1e-10)


def test_kernel_distance_has_no_bias_where_the_frechet_distance_has_one():
    few, more = ((numbers(n, 8, seed=n), numbers(n, 8, seed=n + 1)) for n in (40, 640))
    values = [frechet_distance(gaussian(a), gaussian(b)) for a, b in (few, more)]
    assert values[0] > 5 * values[1]
    for a, b in (few, more):
        mean, spread = kernel_distance(a, b, subset_size(len(a), len(b)))
        assert abs(mean) < 2 * spread


def test_subsets_are_a_thousand_or_half_of_what_is_there():
    assert [subset_size(*n) for n in [(50_000, 10_000), (2000, 9999), (900, 50_000), (3, 2)]] == [1000, 1000, 450, 2]


# A named space


def test_a_named_space_has_its_own_names(named, tmp_path):
    found = named(write_pngs(tmp_path / "a", 30), write_pngs(tmp_path / "b", 40, seed=1, spread=20))
    frechet, kernel = found.scores
    assert frechet.name == "Frechet distance on tiny's pooled features" and frechet.protocol.name == "named features"
    assert kernel.name == "kernel distance on tiny's pooled features" and "subsets of 15" in kernel.detail
    assert frechet.protocol.images == 30 and frechet.protocol.reference_images == 40
    text = "\n".join(found.lines())
    assert "FID" not in text.replace("not FID", "") and "png" in text and frechet.protocol.reference_hash in text


def test_frechet_in_a_named_space_is_of_the_layer_before_the_last(named, tiny, tmp_path):
    a, b = write_pngs(tmp_path / "a", 30), write_pngs(tmp_path / "b", 40, seed=1, spread=20)
    pooled = [tiny.module.body((pixels_of(f).float() / 255 - 0.5) / 0.25) for f in (a, b)]
    wanted = frechet_distance(*map(gaussian, pooled))
    assert named(a, b).scores[0].value == pytest.approx(wanted, rel=1e-6) and wanted > 1e-3


@needs_torch_fidelity
def test_our_extractor_runs_through_torch_fidelity(named, tiny, tmp_path):
    a, b = write_pngs(tmp_path / "a", 30), write_pngs(tmp_path / "b", 40, seed=1, spread=20)
    name = inception.known_to_torch_fidelity(tiny)
    assert inception.known_to_torch_fidelity(tiny) == name  # twice is no error
    theirs = official(pixels_of(a), pixels_of(b), feature_extractor=name, fid=True, prc=True, isc=True)
    found = by_name(named(a, b, precision_recall=True))
    ours = found["Frechet distance on tiny's pooled features"].value
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert (found["precision"].value, found["recall"].value) == (theirs["precision"], theirs["recall"])
    assert found["recall"].protocol.name == "named features" and "tiny's" in str(found["recall"])


@needs_torch_fidelity
def test_resnet20_on_cifar10(shared, tmp_path):
    """Real images are near to others, their negatives are not; torch-fidelity agrees."""
    weights, data = shared / "weights" / "resnet20_cifar10.safetensors", shared / "data" / "cifar10"
    look = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    pixels = load_data(DataConfig(source=f"cifar10:{data}"), "test").gather(torch.arange(400))
    for name, block in {"a": pixels[:200], "b": pixels[200:], "c": 255 - pixels[:200]}.items():
        (tmp_path / name).mkdir()
        for k, image in enumerate(block):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{k}.png")
    settings = {"features": {"reference": str(weights), **look}}
    near, far = (api.score(str(tmp_path / name), str(tmp_path / "b"), settings) for name in "ac")
    assert "on resnet20_cifar10" in near.scores[0].name
    assert 2 * near.scores[0].value < far.scores[0].value
    teacher = load_classifier(ClassifierConfig(reference=str(weights), **look))
    extractor = inception.known_to_torch_fidelity(teacher)
    theirs = official(*(pixels_of(tmp_path / name) for name in "cb"), feature_extractor=extractor, fid=True)
    assert far.scores[0].value == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)


# Inception, by a stand-in


def test_fid_is_kid_precision_and_recall_are_torch_fidelitys(stand_in, tiny, tmp_path):
    a, b = write_pngs(tmp_path / "a", 30), write_pngs(tmp_path / "b", 40, seed=1, spread=20)
    found = by_name(stand_in(a, b, precision_recall=True))
    extractor = inception.known_to_torch_fidelity(tiny)
    theirs = official(
        pixels_of(a), pixels_of(b), feature_extractor=extractor, fid=True, isc=True, kid=True, prc=True,
        kid_subset_size=15,
    )  # fmt: skip
    ours = {"FID": "frechet_inception_distance", "IS": "inception_score_mean", "KID": "kernel_inception_distance_mean"}
    ours |= {"precision": "precision", "recall": "recall"}
    assert list(found) == list(ours)
    for name, key in ours.items():
        assert found[name].value == pytest.approx(theirs[key], rel=1e-5), name
        assert found[name].protocol.name == "inception" and found[name].protocol.images == 30
    assert found["IS"].spread == pytest.approx(theirs["inception_score_std"], rel=1e-5)
    assert found["KID"].spread == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-4)


def test_statistics_in_a_file_stand_for_their_images(stand_in, tiny, tmp_path):
    a, b = write_pngs(tmp_path / "a", 30), write_pngs(tmp_path / "b", 40, seed=1, spread=20)
    pooled = generation.pooled_features(tiny, (16, 16))(pixels_of(b))[0].numpy()
    moments = {"mu": pooled.mean(0), "sigma": np.cov(pooled, rowvar=False)}
    np.savez(tmp_path / "known.npz", **moments)
    torch.save(moments, tmp_path / "known-stat-fid-2048.pt")
    wanted = by_name(stand_in(a, b))["FID"]
    for file in ("known.npz", "known-stat-fid-2048.pt"):
        found = by_name(stand_in(a, tmp_path / file))
        assert found["FID"].value == pytest.approx(wanted.value, rel=1e-5) and list(found) == ["FID", "IS"]
        assert found["FID"].protocol.reference_hash == sha256_of(tmp_path / file)
        assert "against statistics" in str(found["FID"])


def test_images_beside_adms_statistics_serve_precision_and_recall_alone(stand_in, tiny, tmp_path):
    a, b = write_pngs(tmp_path / "a", 30), write_pngs(tmp_path / "b", 40, seed=1, spread=20)
    mean, covariance = np.zeros(6), np.eye(6)
    pixels = pixels_of(b).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "adm.npz", mu=mean, sigma=covariance, mu_s=mean, sigma_s=covariance, arr_0=pixels)
    found = stand_in(a, tmp_path / "adm.npz", protocol="inception-adm", precision_recall=True)
    scores, beside = by_name(found), by_name(stand_in(a, b, precision_recall=True))
    drawn = generation.pooled_features(tiny, (16, 16))(pixels_of(a))[0]
    wanted = frechet_distance(gaussian(drawn), (torch.zeros(6).double(), torch.eye(6).double()))
    assert scores["FID"].value == pytest.approx(wanted, rel=1e-6) and "KID" not in scores
    assert scores["precision"].value == beside["precision"].value
    assert scores["precision"].protocol.reference_images == 40 and scores["FID"].protocol.reference_images is None
    assert any("inception-adm means 50,000 images" in line for line in found.said)
    np.savez(tmp_path / "bare.npz", mu=mean, sigma=covariance)
    assert any("left out" in line for line in stand_in(a, tmp_path / "bare.npz", precision_recall=True).said)


def test_files_without_statistics_are_refused(stand_in, named, tmp_path):
    a = write_pngs(tmp_path / "a", 3)
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((3, 16, 16, 3), np.uint8))
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(4), sigma=np.eye(4))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "narrow.npz").read_bytes()[:100])
    torch.save(torch.zeros(3, 6), tmp_path / "features.pt")
    for file, words in [
        ("samples.npz", "no mu and sigma"),
        ("narrow.npz", "are not those of Inception"),
        ("cut.npz", "no mu and sigma"),
        ("features.pt", "stat-fid-2048"),
    ]:
        with pytest.raises(UserError, match=words):
            stand_in(a, tmp_path / file)
    with pytest.raises(UserError, match="does not say of which features"):
        named(a, tmp_path / "narrow.npz")


class Bomb:
    def __reduce__(self):
        return (print, ("a pickle ran code",))


def test_a_pickle_that_wants_to_run_code_does_not(stand_in, tmp_path, capsys):
    a = write_pngs(tmp_path / "a", 3)
    torch.save({"mu": Bomb(), "sigma": np.eye(6)}, tmp_path / "bomb.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"mu": Bomb()}, protocol=2))
    for file in ("bomb.pt", "plain.pt"):
        with pytest.raises(UserError, match="no mu and sigma"):
            stand_in(a, tmp_path / file)
    assert "ran code" not in capsys.readouterr().out


# Protocols


def test_the_prepared_reference_makes_inception_val(stand_in, tmp_path, monkeypatch):
    source, drawn = write_pngs(tmp_path / "val", 4, size=300), write_pngs(tmp_path / "drawn", 5, seed=1, size=256)
    prepared = prepare_reference(source, tmp_path / "val256")
    found = stand_in(drawn, tmp_path / "val256")
    assert found.scores[0].protocol.name == "inception-val"
    assert found.scores[0].protocol.reference_hash == prepared.content_hash
    assert "5 images, a reference of 4: not comparable" in found.said[-1]
    monkeypatch.setattr(generation, "EXPECTED", 4)
    (drawn / "00000.png").unlink()
    assert not any("means" in line for line in stand_in(drawn, tmp_path / "val256").said)


def test_the_hash_of_a_reference_is_of_its_pixels_alone(named, tmp_path):
    a, b = write_pngs(tmp_path / "a", 6), write_pngs(tmp_path / "b", 5, seed=1)
    plain = named(a, b).scores[0].protocol.reference_hash
    for k, file in enumerate(sorted(b.iterdir(), reverse=True)):
        target = tmp_path / "c" / f"class{k % 2}" / f"x{k}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).save(target, compress_level=1)
    assert named(a, f"folder:{tmp_path / 'c'}").scores[0].protocol.reference_hash == plain
    assert named(a, a).scores[0].protocol.reference_hash != plain


@pytest.mark.parametrize(
    ("sampling", "wanted"),
    [
        ({"sampler": "ddim", "num_sampling_steps": "50", "guidance_scale": 1.5}, ("ddim", "50", "1.5")),
        ({"sampler": "heun", "num_sampling_steps": "18", "guidance_scale": 2.0, "guidance_interval": [0.2, 5.0]},
         ("heun", "18", "2.0 where sigma is in (0.2, 5.0]")),
        ({"schedule": "cosine", "steps": 20}, ("cosine", "20", "unknown")),
    ],
)  # fmt: skip
def test_a_set_says_how_it_was_made(sampling, wanted, named, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    pixels = pixels_of(write_pngs(tmp_path / "a", 6)).numpy()
    note = write_shard(folder, 0, [Sample(f"{k:08d}", p, k % 2, {}) for k, p in enumerate(pixels)], "png", {})
    about = {"generator": {"name": "g", "licence": "none"}, "classes": ["x", "y"]}
    write_manifest(folder, {"seed": 0, "synthesis": {"sampling": sampling}}, [note], about)
    for name in (folder, f"synthetic:{folder}"):
        protocol = named(name, tmp_path / "a").scores[0].protocol
        assert (protocol.sampler, protocol.steps, protocol.guidance) == wanted and protocol.files == "png"
    other = named(tmp_path / "a", folder).scores[0].protocol
    assert (other.sampler, other.steps, other.guidance) == ("unknown",) * 3


def test_few_images_are_a_warning_that_offers_the_kernel_distance(stand_in, named, tmp_path, monkeypatch):
    a, b = write_pngs(tmp_path / "a", 20), write_pngs(tmp_path / "b", 30, seed=1)
    assert any("20 images are fewer than 10,000" in line and "KID" in line for line in stand_in(a, b).said)
    assert any("20 images are fewer" in line and "kernel distance" in line for line in named(b, a).said)
    monkeypatch.setattr(generation, "ENOUGH_FOR_FID", 20)
    assert not stand_in(a, b).said and not named(b, a).said


def test_jpegs_are_said_aloud(named, tmp_path):
    a, b = write_pngs(tmp_path / "a", 6), write_pngs(tmp_path / "b", 5, seed=1, ending="jpg")
    (said,) = [line for line in named(a, b).said if "JPEG" in line]
    assert str(b) in said and "use PNG" in said
    assert any(str(b) in line and "JPEG" in line for line in named(b, a).said)
    assert not any("JPEG files" in line for line in named(a, a).said)
    Image.open(a / "00000.png").save(b / "more.png")
    assert named(b, a).scores[0].protocol.files == "jpeg (5), png (1)"


# What cannot be used


def test_refusals_say_what_would_do(named, stand_in, tmp_path):
    a, one = write_pngs(tmp_path / "a", 6), write_pngs(tmp_path / "one", 1)
    large = write_pngs(tmp_path / "large", 3, size=20)
    for score in (named, stand_in):
        for images, reference in [(one, a), (a, one)]:
            with pytest.raises(UserError, match="holds 1 of them: a score needs 2 images at least"):
                score(images, reference)
        with pytest.raises(UserError, match="set --image-size 16 to bring both"):
            score(a, large)
        with pytest.raises(UserError, match="need 4 images at least"):
            score(a, write_pngs(tmp_path / score.__name__, 3), precision_recall=True)
        with pytest.raises(UserError, match="no such set"):
            score(a, tmp_path / "nowhere")
        with pytest.raises(UserError, match="is a file"):
            score(a / "00000.png", a)
    assert named(a, large, image_size=8).scores[0].protocol.resize == (
        "shorter side to 8 (bilinear, antialiased), centre crop"
    )
    with pytest.raises(UserError, match="inception-adm compares with ADM's stored statistics"):
        stand_in(a, a, protocol="inception-adm")


@pytest.mark.parametrize("name", [*ABSENT, "fid"])
def test_protocols_that_are_not_there_are_not_pretended(name):
    with pytest.raises(UserError, match="valid: inception, inception-val, inception-adm") as told:
        validate(ScoreConfig, {"protocol": name}, "score")
    assert ABSENT.get(name, "") in str(told.value)


def test_absent_weights_are_a_line_that_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(UserError) as told:
        inception.find_weights()
    for word in (inception.WEIGHTS, str(tmp_path / "hub" / "checkpoints"), "--inception", "--features", "https://"):
        assert word in str(told.value)
    with pytest.raises(UserError, match="no elsewhere"):
        inception.find_weights("elsewhere")
    foreign = tmp_path / inception.WEIGHTS
    foreign.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=r"not torch-fidelity's Inception: SHA-256 .*, not 6726825d"):
        inception.find_weights(str(foreign))
    right = tmp_path / "hub" / "checkpoints" / f"weights-{sha256_of(foreign)[:8]}.pth"
    right.parent.mkdir(parents=True)
    right.write_bytes(foreign.read_bytes())
    monkeypatch.setattr(inception, "WEIGHTS", right.name)
    assert inception.find_weights() == inception.find_weights(str(right.parent)) == right


def test_without_torch_fidelity_there_is_a_line_too(named, tmp_path, monkeypatch):
    monkeypatch.setattr(inception, "find_spec", lambda name: None)
    a = write_pngs(tmp_path / "a", 6)
    assert named(a, a).scores[0].value == pytest.approx(0, abs=1e-6)
    for call in (lambda: api.score(str(a), str(a)), lambda: named(a, a, precision_recall=True)):
        with pytest.raises(UserError, match=r"diffrep\[scores\]"):
            call()


def test_a_classifier_without_a_linear_layer_or_of_another_size_is_refused(tiny, monkeypatch):
    convolutions = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    teacher = ClassifierTeacher(convolutions, "flat", 4, (0, 0, 0), (1, 1, 1))
    with pytest.raises(UserError, match="no linear classifier on top"):
        generation.pooled_features(teacher, (8, 8))
    with pytest.raises(UserError, match="needs square images"):
        generation.pooled_features(tiny, (8, 9))
    with pytest.raises(UserError, match="set --image-size to what it was trained at"):
        generation.pooled_features(tiny, (2, 2))


# The verb


def test_the_verb_prints_lines_or_json(tmp_path, monkeypatch, capsys, factory, tiny):
    a, b = write_pngs(tmp_path / "a", 20), write_pngs(tmp_path / "b", 30, seed=1)
    command = ["diffrep", "score", str(a), "--reference", str(b), "--features", factory(lambda: tiny), "--allow-code"]
    for more in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        assert ended.value.code == 0, said.err
        if more:
            score = json.loads(said.out)["scores"][0]
            assert score["protocol"]["images"] == 20 and score["protocol"]["reference_images"] == 30
        else:
            assert "N = 20 against 30" in said.out and "note: 20 images are fewer" in said.out


@needs_torch_fidelity
@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--protocol", "dinov2"], "not available here"),
        (["--mean", "0.5,0.5,0.5"], "name it with --features"),
        (["--features", "nothing_here"], "nothing_here"),
        (["--features", "timm:resnet18", "--protocol", "inception"], "leave protocol and inception out"),
        (["--inception", "no_file.pth"], "no no_file.pth"),
    ],
)
def test_the_verb_refuses_in_one_line(more, words, tmp_path, monkeypatch, capsys):
    a = write_pngs(tmp_path / "a", 3)
    monkeypatch.setattr(sys, "argv", ["diffrep", "score", str(a), "--reference", str(a), *more])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and words in said and "\n" not in said


# Inception itself


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    """A file of untrained Inception weights under the name that their hash gives them."""
    inception.need_torch_fidelity()
    from torch_fidelity import feature_extractor_inceptionv3 as module

    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], verbose=False)
    folder = tmp_path_factory.mktemp("weights")
    torch.save(network.state_dict(), folder / "x.pth")
    return (folder / "x.pth").rename(folder / f"weights-{sha256_of(folder / 'x.pth')[:8]}.pth")


def compare_with_torch_fidelity(folder, weights):
    """Two sets of twelve images: our FID, IS and KID are those of ``torch_fidelity.calculate_metrics``."""
    a, b = write_pngs(folder / "a", 12, size=64), write_pngs(folder / "b", 12, seed=1, size=64, spread=20)
    found = by_name(api.score(str(a), str(b), {"inception": str(weights)}))
    more = {"feature_extractor_weights_path": str(weights), "kid_subset_size": 6}
    theirs = official(pixels_of(a), pixels_of(b), fid=True, isc=True, kid=True, **more)
    assert found["FID"].value == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert found["IS"].value == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    assert found["KID"].value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)


@pytest.mark.slow
@needs_torch_fidelity
def test_untrained_inception_through_the_whole_road(random_weights, tmp_path, monkeypatch):
    monkeypatch.setattr(inception, "WEIGHTS", random_weights.name)
    compare_with_torch_fidelity(tmp_path, random_weights)


@needs_torch_fidelity
def test_inception_where_its_weights_are(tmp_path):
    try:
        weights = inception.find_weights()
    except UserError as error:
        pytest.skip(str(error))
    compare_with_torch_fidelity(tmp_path, weights)
