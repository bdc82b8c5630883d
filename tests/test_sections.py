"A study is paired by the sections in use, from the manifest to the scores"

import pandas as pd
import pytest

from medvlp.data.prepare import DataOptions, count_pairs, load_sets, load_studies, prepare
from medvlp.data.tokens import load_tokenizer
from medvlp.methods.base import load_method
from medvlp.project.config import ConfigError
from medvlp.project.plan import check_corpus
from medvlp.project.stage import Stage
from medvlp.tasks.evaluate import EvaluateOptions, evaluate, study_set
from medvlp.training.pretrain import PretrainOptions, pretrain_stage
from small import BERT, RESNET, write_studies

AGA = dict(method="aga", options=dict(dim=16), image_encoder=RESNET, text_encoder=BERT, sections=["findings"])
AGA |= dict(vocab_size=100, epochs=1.0, batch_size=4, learning_rate=1e-3)


def prepared(folder, change):
    "48 studies, 32 of them in train and 8 in val and test each, with other reports"
    table = write_studies(folder / "data") / "metadata.csv"
    change(pd.read_csv(table)).to_csv(table, index=False)
    return prepare(DataOptions(folder=str(folder / "data"), image_size=40), folder / "prepared")


def test_aga_leaves_studies_without_findings_out(tmp_path, capsys):
    texts = dict(impression="Seen before, unchanged.")
    manifest = prepared(tmp_path, lambda t: t.assign(findings=t.findings.where(t.index % 4 > 0, ""), **texts))
    assert manifest["splits"]["train"] == dict(studies=32, patients=32, pairs=32)
    assert [count_pairs(manifest, split, ["findings"]) for split in ("train", "val", "test")] == [24, 6, 6]
    assert len(load_sets([tmp_path / "prepared"], "train", ["findings"])) == 24
    folders = {name: str(tmp_path / name) for name in ("model", "curves", "checkpoints")}
    inputs = dict(prepared=[str(tmp_path / "prepared")])
    compute = dict(device="cpu", precision="fp32", threads=1)
    stage = Stage(stage="pretrain", experiment="small", method="aga", options=AGA, inputs=inputs, outputs=folders)
    trainer = pretrain_stage(stage.model_copy(update=dict(compute=stage.compute.model_copy(update=compute))))
    assert "24 pairs to train on, 6 to validate (images with findings)" in capsys.readouterr().out
    assert trainer.state.global_step == 6
    model, tokenizer = load_method(folders["model"]), load_tokenizer(folders["model"])
    studies, options = load_studies(tmp_path / "prepared"), EvaluateOptions(n_resamples=20)
    results = evaluate(model, tokenizer, studies, options=options, sections=["findings"])
    assert len(study_set(studies, sections=["findings"]).pairs) == 6
    assert results["retrieval"].scores.set_index("metric").value["image to report R@1"] > 0


def test_no_text_in_the_section_is_an_error_before_training(tmp_path):
    manifest = prepared(tmp_path, lambda t: t.assign(findings="", impression="Seen before, unchanged."))
    options = PretrainOptions(**AGA).model_dump()
    with pytest.raises(ConfigError) as error:
        check_corpus([manifest], dict(aga=options))
    problem = "none of the 48 studies has text under findings to train on: change the option sections"
    assert error.value.problems == [f"params.yaml: methods.aga: {problem}"]
    check_corpus([manifest], dict(aga=dict(options, sections=["findings", "impression"])))
