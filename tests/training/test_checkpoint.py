"""What is saved comes back bit for bit; what is damaged is named."""

import json

import pytest
import tiny
import torch

from diffrep.errors import UserError
from diffrep.training import checkpoint
from diffrep.training.optim import Ema


def parts(steps=3, **options):
    """A method, optimiser and running mean after some steps on invented gradients."""
    made = tiny.method(**options)
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=0.1)
    ema = Ema(made, 0.9)
    rng = torch.Generator().manual_seed(0)
    for step in range(steps):
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=rng)
        optimizer.step()
        ema.update(made, step)
        made.count += 1
    return made, optimizer, ema


def optimizer_state(made, optimizer):
    names = {p: n for n, p in made.named_parameters()}
    return {f"{names[p]}/{key}": v.clone() for p, state in optimizer.state.items() for key, v in state.items()}


def test_round_trip_bit_for_bit(tmp_path):
    saved = parts()
    path = checkpoint.save(tmp_path, 3, *saved, {"cpu_seconds": 1.5})
    fresh = parts(steps=0)
    assert not tiny.same(tiny.weights(fresh[0]), tiny.weights(saved[0]))
    note = checkpoint.load(path, *fresh)
    assert note == {"version": 1, "step": 3, "cpu_seconds": 1.5}
    assert tiny.same(tiny.weights(fresh[0]), tiny.weights(saved[0]))
    assert tiny.same(fresh[2].mean, saved[2].mean)
    restored, wanted = optimizer_state(*fresh[:2]), optimizer_state(*saved[:2])
    assert tiny.same(restored, wanted)
    assert {key.split("/")[1] for key in wanted} == {"step", "exp_avg", "exp_avg_sq"}


def test_both_go_on_to_the_same_bits(tmp_path):
    made, optimizer, ema = parts()
    checkpoint.save(tmp_path, 3, made, optimizer, ema, {})
    again, again_optimizer, again_ema = parts(steps=0)
    checkpoint.load(tmp_path / "step-00000003", again, again_optimizer, again_ema)
    for one, its in ((made, optimizer), (again, again_optimizer)):
        for parameter in one.parameters():
            parameter.grad = torch.full_like(parameter, 0.3) if parameter.requires_grad else None
        its.step()
    assert tiny.same(tiny.weights(made), tiny.weights(again))


def test_the_last_two_are_kept(tmp_path):
    saved = parts()
    for step in (1, 2, 10, 100):
        checkpoint.save(tmp_path, step, *saved, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]
    assert checkpoint.latest(tmp_path).name == "step-00000100"


def test_leftovers_of_a_killed_writer_are_not_looked_at_and_swept_by_the_next(tmp_path):
    saved = parts()
    checkpoint.save(tmp_path, 5, *saved, {})
    for name in (".step-00000007.123.part", ".step-00000005.123.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.safetensors").write_bytes(b"half")
    (tmp_path / "step-7").mkdir()  # not a name of ours
    assert checkpoint.latest(tmp_path).name == "step-00000005"
    checkpoint.save(tmp_path, 6, *saved, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000005", "step-00000006", "step-7"]


def test_nothing_there_is_no_checkpoint(tmp_path):
    assert checkpoint.latest(tmp_path / "nowhere") is None


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
    path = checkpoint.save(tmp_path, 3, *parts(), {})
    file = path / "state.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"step-00000003 is corrupt or truncated .* go on from the one before"):
        checkpoint.load(path, *parts(steps=0))


def test_a_corrupt_header_and_a_missing_file_are_named(tmp_path):
    path = checkpoint.save(tmp_path, 3, *parts(), {})
    file = path / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[8:40] = b"\xff" * 32
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"step-00000003 is corrupt"):
        checkpoint.load(path, *parts(steps=0))
    file.unlink()
    with pytest.raises(UserError, match=r"step-00000003 is corrupt or truncated \(No such file"):
        checkpoint.load(path, *parts(steps=0))


def test_a_damaged_note_and_another_version_are_named(tmp_path):
    path = checkpoint.save(tmp_path, 3, *parts(), {})
    (path / "state.json").write_text('{"version": 1, "st')
    with pytest.raises(UserError, match=r"step-00000003/state.json is not readable JSON"):
        checkpoint.load(path, *parts(steps=0))
    (path / "state.json").write_text(json.dumps({"version": 2, "step": 3}))
    with pytest.raises(UserError, match=r"checkpoint format 2; this diffrep reads 1"):
        checkpoint.load(path, *parts(steps=0))


def test_a_checkpoint_of_another_recipe_is_refused_and_changes_nothing(tmp_path):
    path = checkpoint.save(tmp_path, 3, *parts(), {})
    other, optimizer, ema = parts(steps=0)
    other.head = torch.nn.Linear(8, 3)
    with pytest.raises(UserError, match=r"step-00000003 does not fit this recipe \(.*head"):
        checkpoint.load(path, other, optimizer, ema)
    assert not optimizer.state


def test_no_file_is_a_pickle(tmp_path):
    path = checkpoint.save(tmp_path, 3, *parts(), {"scaler": None})
    assert sorted(p.name for p in path.iterdir()) == ["state.json", "state.safetensors"]
    json.loads((path / "state.json").read_text())
    content = (path / "state.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    names = json.loads(content[8 : 8 + length])
    assert {name.split("/")[0] for name in names if name != "__metadata__"} == {"method", "optim", "ema"}


def test_frozen_networks_stay_outside(tmp_path):
    saved = parts()
    saved[0].teacher = type("Frozen", (), {"module": torch.nn.Linear(2, 2)})()
    content = (checkpoint.save(tmp_path, 3, *saved, {}) / "state.safetensors").read_bytes()
    assert b"teacher" not in content
