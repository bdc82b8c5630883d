"Everything that is wrong with an experiment is said at once, with a remedy"

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from medvlp.project.config import ConfigError, read_yaml
from medvlp.project.plan import plan, resolve

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def in_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def problems_of(tmp_path, change):
    "What `plan` says of the demo with a change"
    tree = read_yaml("experiments/demo.yaml")
    change(tree)
    file = tmp_path / "params.yaml"
    OmegaConf.save(OmegaConf.create(tree), file)
    with pytest.raises(ConfigError) as caught:
        resolve(file, need_data=True)
    return [problem.replace(str(file), "params.yaml") for problem in caught.value.problems]


def fourteen_mistakes(tree):
    tree["compute"]["threads"] = 0
    tree["data"]["hospital-a"]["sorce"] = "imagefolder"
    tree["data"]["hospital-c"] = dict(folder="no-such-folder")
    tree["data"]["hospital-b"]["fractions"] = [0.8, 0.2, 0.2]
    tree["pretrain"]["batch_size"] = 1
    tree["pretrain"]["data"] = ["hospital-d"]
    tree["runs"]["methods"].append("mcga")
    tree["methods"]["mgca"]["options"]["temprature"] = 0.1
    tree["figurs"] = dict(samples=3)
    tree["tasks"]["finetune"]["methods"] = ["convrit"]
    tree["tasks"]["finetune"]["learning_rate"] = "0.002"
    tree["tasks"]["detct"] = dict(data=[], methods=[])
    tree["tasks"]["evaluate"]["zero_shot"] = dict(prompts="no-such-prompts.yaml")
    tree["tasks"]["report"]["findings"] = ["efusion"]


def test_fourteen_mistakes_are_found_at_once(tmp_path):
    text = "\n".join(problems_of(tmp_path, fourteen_mistakes))
    for words in (
        "compute.threads: 0: input should be greater than 0 or input should be 'auto'",
        'data.hospital-a: there is no option "sorce": did you mean "source"?',
        "data.hospital-c.folder: no-such-folder: there is no such folder",
        "data.hospital-b.fractions",
        "pretrain.batch_size: 1: input should be greater than or equal to 2",
        'pretrain.data: there is no study set "hospital-d": did you mean "hospital-',
        'there is no method "mcga": did you mean "mgca"?',
        'methods.mgca.options: there is no option "temprature": did you mean "temperature"?',
        'tasks.finetune.methods: there is no method under runs.methods "convrit": did you mean "convirt"?',
        "tasks.finetune.learning_rate: '0.002': input should be a valid number",
        'tasks: there is no task "detct"',
        'there is no option "figurs": did you mean "figures"?',
        "no-such-prompts.yaml: cannot be read: No such file",
        'the labeller knows no finding "efusion": did you mean "effusion"?',
    ):
        assert words in text, f"{words}\n--- not in\n{text}"


def test_an_option_that_timm_does_not_have_is_found_by_building_the_method(tmp_path):
    def change(tree):
        tree["methods"]["mpma"]["image_encoder"]["options"]["embed_dims"] = 128

    (problem,) = problems_of(tmp_path, change)
    assert problem.startswith("params.yaml: methods.mpma") and "embed_dims" in problem


def test_a_network_that_timm_does_not_have_is_found_by_building_the_method(tmp_path):
    (problem,) = problems_of(tmp_path, lambda tree: tree["methods"]["aga"].update(image_encoder=dict(name="resnet19")))
    assert problem.startswith("params.yaml: methods.aga") and "resnet19" in problem


def test_a_column_of_the_scoreboard_that_no_task_measures_is_found(tmp_path):
    metrics = [["probe", "AUROC 50 %"], ["prob", "AUROC 1 %"], ["probe", "AUROC 1 %"]]
    assert problems_of(tmp_path, lambda tree: tree["scoreboard"].update(metrics=metrics)) == [
        'params.yaml: scoreboard.metrics: probe has no metric "AUROC 50 %": did you mean "AUROC 10 %"?',
        'params.yaml: scoreboard.metrics: there is no task "prob": did you mean "probe"?',
    ]


@pytest.mark.parametrize(
    "change, problem",
    [
        (
            lambda tree: tree["runs"]["fused"].append("convirt"),
            "runs.fused: method convirt has no second pre-training: leave convirt out",
        ),
        (
            lambda tree: tree["runs"].pop("fused"),
            'runs: "fused" is missing (fused: those of them that go through a second ',
        ),
        (
            lambda tree: tree["runs"].update(fused=["afm"]),
            'runs: fused: there is no "afm" under methods: did you mean "a',
        ),
        (
            lambda tree: tree["runs"]["methods"].append("amf-fused"),
            'runs: methods: "amf-fused": names that end in -fus',
        ),
        (
            lambda tree: tree["tasks"]["answer"]["methods"].append("amf"),
            "tasks.answer.methods: amf: fusion: pretrained, but method amf was trained without cross-attention",
        ),
        (
            lambda tree: tree["tasks"]["answer"]["methods"].append("convirt-fused"),
            'tasks.answer.methods: there is no method under runs.methods "convirt-fused"',
        ),
        (
            lambda tree: tree["methods"]["amf"]["options"].update(phase="fuse"),
            "methods.amf.options.phase: leave it out: the stages pretrain and fuse (runs.fused) set it",
        ),
    ],
)
def test_second_pretrainings(tmp_path, change, problem):
    assert any(found.startswith(f"params.yaml: {problem}") for found in problems_of(tmp_path, change))


def test_every_stage_of_dvc_has_a_file(tmp_path):
    "The names that dvc.yaml makes are those of the plan, and the lock file, which DVC writes after each, has no others"
    stages = {stage.name for stage in plan(resolve("params.yaml", need_data=False))}
    command = [Path(sys.executable).parent / "dvc", "stage", "list", "--name-only"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert set(listed.stdout.split()) - {"plan"} == stages
    assert set(read_yaml("dvc.lock")["stages"]) == stages | {"plan"}


def test_a_changed_option_changes_only_its_own_stages(tmp_path):
    def stages(change):
        tree = read_yaml("experiments/demo.yaml")
        change(tree)
        OmegaConf.save(OmegaConf.create(tree), tmp_path / "params.yaml")
        return {stage.name: stage for stage in plan(resolve(tmp_path / "params.yaml", need_data=False))}

    before = stages(lambda tree: None)
    after = stages(lambda tree: tree["methods"]["mgca"]["options"].update(n_prototypes=32))
    assert {name for name in before if before[name] != after[name]} == {"corpus", "pretrain@mgca-0"}


def test_the_command_line(tmp_path):
    def run(*words):
        command = [sys.executable, "-m", "medvlp.project.plan", "--check", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True)

    assert run("params.yaml").returncode == 0
    (tmp_path / "bad.yaml").write_text("experiment: bad\ndata: [1\n")
    done = run(tmp_path / "bad.yaml")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "bad.yaml:3" in done.stderr
