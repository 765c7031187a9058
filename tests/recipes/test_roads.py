"""The three roads combined: one student, one budget, and whose labels stand behind what.

pytest tests/recipes/test_roads.py
"""

import json

import commands
import pytest

from diffrep.recipes import RECIPES
from diffrep.recipes.repfusion import CONV
from diffrep.rehearsal import rehearse
from diffrep.report.arms import ROLES
from diffrep.report.values import Entry, role
from diffrep.stages import run_task
from diffrep.studies import instances

STUDY, DEBUG = RECIPES["roads_digits"](), RECIPES["roads_digits_debug"]()
OTHERS = ("addp_tuned", "classifier", "classifier_few")  # a ViT and two classifiers, called so in the table
FROZEN = ("conv_policy", "conv_best", "untrained_hint", "addp_hint", "addp")  # first stages
STUDENTS = [name for name in STUDY.arms if name not in OTHERS + FROZEN]


@pytest.mark.parametrize("name", STUDENTS)
def test_every_arm_has_one_network_and_one_budget(name):
    task = STUDY.stages[name]
    path = [task] + [STUDY.stages[name] for name in [(task.method.init or "").removeprefix("stage:")] if name]
    assert sum(stage.train.steps * stage.train.batch_size for stage in path) == 66_200
    assert all(stage.method.student == CONV for stage in path)


def test_only_one_stage_reads_more_than_the_same_50_labels():
    reading = {n: t for n, t in STUDY.stages.items() if t.kind == "recipe" and t.method.label_readers()}
    assert {n for n, t in reading.items() if t.data.labels is None} == {"classifier"}
    few = [task.data for name, task in reading.items() if name != "classifier"]
    assert {data.labels for data in few} == {50} and {data.label_seed for data in few} == {None}
    pupils = [t for t in STUDY.stages.values() if t.kind == "recipe" and t.method.kind == "dmkd"]
    assert len(pupils) == 10 and not any(task.method.label_readers() for task in pupils)


def test_what_other_studies_have_is_theirs_to_the_hash(tmp_path):
    """So that an arm measured there is not run again."""
    ours = {i.name: i.hash for i in instances(STUDY, tmp_path)}
    for study, names in {
        "quickstart": ("teacher", "hints", "conv_policy", "conv_best", "conv_finetune", "conv_finetune_best"),
        "addp_digits": ("tokenizer", "token_predictor", "addp"),
        "dmkd_digits": ("classifier",),
    }.items():
        theirs = {i.name: i.hash for i in instances(RECIPES[study](), tmp_path)}
        assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}


def test_the_report_says_what_each_arm_is_there_for():
    entries = [Entry(n, STUDY.arms.get(n, n), s.model_dump(mode="json")) for n, s in STUDY.stages.items()]
    roles = {entry.name: role(entry, entries) for entry in entries if entry.name in STUDY.arms}
    assert set(roles.values()) <= ROLES.keys()
    told = ("addp_hint", "untrained_hint", "few_addp", "few_addp_on", "few_drawn", "classifier_few")
    assert [roles[name] for name in told] == ["encoder", "random", "of_tokens", "continued", "drawn", "teacher"]


FEATURES = ("tokenizer", "token_predictor", "addp", "addp_hint", "addp_hint_tuned")
IMAGES = ("classifier_few", "made", "few_addp_answers", "few_addp")


def test_addps_encoder_and_images_teach(tmp_path):
    """Two steps of the stages that are of these roads together alone."""
    found = {}
    for instance in instances(DEBUG, tmp_path):
        if instance.name in FEATURES + IMAGES:
            assert all((tmp_path / needed).exists() for needed in instance.needs)
            found[instance.name] = run_task(instance.task, tmp_path / instance.key)
    assert found["addp_hint"]["labels_behind"] == {} == found["addp_hint"]["labels_seen"]
    assert found["addp_hint_tuned"]["labels_seen"] == {"student": 50}
    assert found["few_addp"]["labels_behind"] == {"teacher: student": 50} and not found["few_addp"]["labels_seen"]
    assert found["few_addp"]["data"]["train_images"] == 18  # two of twenty are held out
    assert "taught by" in found["few_addp"]["data"]["licence"]  # that of ADDP's networks
    assert found["few_addp"]["scores"]["test_images"] == 539  # real ones


def test_a_dry_run_counts_students_of_images_that_are_not_made_yet():
    stages = {name: DEBUG.stages[name] for name in DEBUG.stages if name in (*FEATURES[:3], *IMAGES)}
    found = rehearse(DEBUG.model_copy(update={"stages": stages, "arms": {}}))
    assert found["few_addp_answers"]["images"] == 18 * 9  # nine shifts
    assert found["few_addp"]["multiply_adds"] > 0


@pytest.mark.slow
def test_the_whole_study_by_command(tmp_path):
    done = commands.run(tmp_path, "run", "roads_digits_debug", "--jobs", "2", "--out", "study")
    assert done.code == 0
    result = json.loads((tmp_path / "study" / "result.json").read_text())
    assert all("top1" in scores["0"] for arm, scores in result["arms"].items() if arm not in FROZEN)
    one = json.loads((tmp_path / "study" / "few_drawn_on-s0" / "result.json").read_text())
    behind = one["labels_behind"]
    assert set(behind.values()) == {50} and {part.partition(":")[0] for part in behind} == {"teacher", "before"}
    assert "images made of tokens" in (tmp_path / "study" / "report.html").read_text()
