"""The project's own file of zero-shot prompts serves the phantom, CheXpert and the COVID collection"""

import re
from itertools import chain
from pathlib import Path

import pytest

from medvlp.data.sources.covid_chestxray import COVID_GROUPS
from medvlp.phantom.signs import FINDINGS
from medvlp.tasks.zero_shot import read_prompts

CHEXPERT = """No Finding, Enlarged Cardiomediastinum, Cardiomegaly, Lung Opacity, Lung Lesion, Edema, Consolidation,
Pneumonia, Atelectasis, Pneumothorax, Pleural Effusion, Pleural Other, Fracture, Support Devices"""
PROMPTS = Path(__file__).parents[1] / "assets/prompts/chest.yaml"


@pytest.mark.parametrize("labels", [list(FINDINGS), list(COVID_GROUPS), re.split(r",\s+", CHEXPERT)])
def test_every_label_has_sentences_for_and_against(labels):
    prompts = read_prompts(PROMPTS, labels, limit=1000)
    assert list(prompts) == labels
    for label, (yes, no) in prompts.items():
        assert not set(yes) & set(no), label
        assert len(set(yes)) == len(yes) > 2 and len(no) >= 2 or label == "wires", label
        for sentence in chain(yes, no):
            assert sentence[0].isupper() and sentence.endswith("."), sentence
            assert not re.search(r"[{}]|  | \.", sentence), sentence
