"What the rule labeller makes of single sentences, and how fast it is"

import os, subprocess, sys, time
import pytest
from medvlp.data.labeller import Labeller, TERMS, read_labeller, read_labels, read_mentions
from medvlp.data.reports import clean
from medvlp.phantom.reports import report_of

# a sentence: what it asserts (1) or calls uncertain (-1); the rest is 0. All are written for this test.
CHEST = {
    # negation
    "No pneumothorax, effusion or consolidation.": {},
    "No pneumothorax, no effusion, no consolidation.": {},
    "There is neither effusion nor pneumothorax.": {},
    "Lungs are clear without focal consolidation, effusion, or pneumothorax.": {},
    "Effusion and pneumothorax are absent.": {},
    "Pleural effusion: none. Pneumothorax: none.": {},
    "Effusions: No. Pneumothorax: No.": {},
    "The costophrenic angles are sharp, with no effusion.": {},
    "No evidence of pneumothorax or large pleural effusion is identified.": {},
    "Pneumothorax is not definitely seen.": {},
    "No pneumothorax is seen after removal of the chest tube.": {},
    "Negative for consolidation or effusion.": {},
    "The lungs are free of consolidation.": {},
    "There isn't any effusion.": {},
    "W/o effusion.": {},
    "Absence of pulmonary oedema.": {},
    "The heart is not enlarged.": {},
    "Cardiac silhouette is not significantly enlarged.": {},
    "Heart size normal, mediastinum normal, no effusions.": {},
    "Pulmonary edema has been ruled out.": {},
    "Previously described nodule is no longer visualized.": {},
    "No rib fractures, masses or nodules are appreciated.": {},
    "No acute fracture, dislocation, or pneumothorax. Lungs clear.": {},
    "Consolidation rather than effusion.": dict(consolidation=1),
    "Findings favor atelectasis instead of pneumonia.": dict(atelectasis=-1),
    "Lungs are clear.\nNo effusion.\nHeart is enlarged.": dict(cardiomegaly=1),
    "Pneumothorax: None.": {},
    "Pneumothorax:  None.": {},
    "Pneumothorax: No": {},
    "Pneumothorax: N/A": {},
    "Effusion - none": {},
    "Pneumothorax\tnil": {},
    "Effusion: No\nPneumothorax: None\nConsolidation: Yes": dict(consolidation=1),
    "PNEUMOTHORAX: NONE\nEFFUSION: SMALL": dict(effusion=1),
    "No  effusion or  pneumothorax.  Pulmonary   edema.": dict(oedema=1),
    "1. No focal consolidation\n2. Small left pleural effusion\n3. No pneumothorax": dict(effusion=1),
    "1) No focal consolidation\n2) Small left pleural effusion\n3) No pneumothorax": dict(effusion=1),
    "- No focal consolidation\n- Small left pleural effusion\n- No pneumothorax": dict(effusion=1),
    # double negation and what only looks like negation
    "No change in the large left effusion.": dict(effusion=1),
    "No significant interval change in moderate pulmonary edema.": dict(oedema=1),
    "Without interval change in the right apical pneumothorax.": dict(pneumothorax=1),
    "The effusion has not resolved.": dict(effusion=1),
    "The effusion has not changed.": dict(effusion=1),
    "There is not only an effusion but also a pneumothorax.": dict(effusion=1, pneumothorax=1),
    "A small left apical pneumothorax, not present on the previous film.": dict(pneumothorax=1),
    "No increase in the size of the nodule.": dict(nodule=1),
    "Without doubt a right effusion.": dict(effusion=1),
    "There is no doubt about the pneumothorax.": dict(pneumothorax=1),
    # scope
    "No effusion, but a small pneumothorax.": dict(pneumothorax=1),
    "No effusion; small pneumothorax.": dict(pneumothorax=1),
    "No effusion, a small pneumothorax.": dict(pneumothorax=1),
    "No pneumothorax, however there is a small effusion.": dict(effusion=1),
    "No effusion is seen, although there is mild cardiomegaly.": dict(cardiomegaly=1),
    "Small effusion, pneumothorax is absent.": dict(effusion=1),
    "Small effusion without pneumothorax.": dict(effusion=1),
    "The effusion has resolved without pneumothorax.": {},
    "The pneumothorax has resolved; the effusion persists.": dict(effusion=1),
    "No pneumothorax with persistent right effusion.": dict(effusion=1),
    "Cardiomegaly without edema, with small bilateral effusions.": dict(cardiomegaly=1, effusion=1),
    "No mass, nodule, or consolidation; stable emphysema.": dict(emphysema=1),
    "There is no pneumothorax. Effusion on the right.": dict(effusion=1),
    "No pneumothorax.Right effusion.": dict(effusion=1),
    "Apart from a small effusion no abnormality.": dict(effusion=1),
    "No abnormality except for cardiomegaly.": dict(cardiomegaly=1),
    "No fracture is seen and there is a moderate hiatal hernia.": dict(hernia=1),
    "The endotracheal tube ends 3.5 cm above the carina. No pneumothorax.": dict(tube=1),
    # uncertainty
    "Pneumonia cannot be excluded.": dict(consolidation=-1),
    "A small pneumothorax can't be entirely excluded.": dict(pneumothorax=-1),
    "Cannot exclude a small effusion.": dict(effusion=-1),
    "An underlying mass is not excluded.": dict(mass=-1),
    "Effusion not ruled out.": dict(effusion=-1),
    "Possible left effusion.": dict(effusion=-1),
    "Left effusion possible.": dict(effusion=-1),
    "Opacity may represent atelectasis or pneumonia.": dict(atelectasis=-1, consolidation=-1),
    "Atelectasis versus consolidation at the left base.": dict(atelectasis=-1, consolidation=-1),
    "Atelectasis vs. pneumonia.": dict(atelectasis=-1, consolidation=-1),
    "Suspicious for pneumonia.": dict(consolidation=-1),
    "Concern for pulmonary edema.": dict(oedema=-1),
    "Pneumonia is considered less likely.": dict(consolidation=-1),
    "Pneumonia is unlikely.": dict(consolidation=-1),
    "? nodule in the right apex.": dict(nodule=-1),
    "Nodule in the right apex?": dict(nodule=-1),
    "Likely small effusions.": dict(effusion=-1),
    "Blunting of the angle, likely a small effusion, no pneumothorax.": dict(effusion=-1),
    "No effusion, possible nodule.": dict(nodule=-1),
    "Possible nodule, no effusion.": dict(nodule=-1),
    "Evaluate for pneumothorax.": dict(pneumothorax=-1),
    "A fracture is suspected, but no pneumothorax.": dict(fracture=-1),
    "Definite effusion; possible pneumonia.": dict(effusion=1, consolidation=-1),
    "Question of cardiomegaly.": dict(cardiomegaly=-1),
    "Findings suggest heart failure with bilateral effusions.": dict(oedema=-1, effusion=-1),
    # time
    "The effusion has resolved.": {},
    "Interval resolution of the right pneumothorax.": {},
    "A left effusion, which has now resolved.": {},
    "The effusion has partially resolved.": dict(effusion=1),
    "The effusion has improved.": dict(effusion=1),
    "Improved pulmonary edema.": dict(oedema=1),
    "Unchanged small left effusion.": dict(effusion=1),
    "Stable cardiomegaly.": dict(cardiomegaly=1),
    "Decreased but persistent effusion.": dict(effusion=1),
    "Effusion is slightly smaller than before.": dict(effusion=1),
    "History of pneumonia.": {},
    "Family history of emphysema.": {},
    "History of COPD with new consolidation.": dict(consolidation=1),
    "Interval removal of the endotracheal tube.": {},
    "Endotracheal tube has been removed.": {},
    "The central line has been removed, with no pneumothorax.": {},
    "Worsening consolidation compared with the previous study.": dict(consolidation=1),
    "Resolved pneumonia.": {},
    "Improving, but not yet resolved, effusion.": dict(effusion=1),
    "Residual effusion after drainage.": dict(effusion=1),
    # words
    "Bilateral pleural effusions and basal atelectases.": dict(effusion=1, atelectasis=1),
    "Bilateral pneumothoraces.": dict(pneumothorax=1),
    "Haemothorax.": dict(effusion=1),
    "Hemothorax.": dict(effusion=1),
    "Hydropneumothorax.": dict(effusion=1, pneumothorax=1),
    "Interstitial oedema.": dict(oedema=1),
    "Interstitial edema.": dict(oedema=1),
    "Lung tumour.": dict(mass=1),
    "Lung tumor.": dict(mass=1),
    "Pericardial effusion.": {},
    "Subcutaneous emphysema.": {},
    "Soft tissue edema.": {},
    "Mass effect on the trachea.": {},
    "Calcified nodule.": dict(granuloma=1),
    "Calcified nodules.": dict(granuloma=1),
    "The heart size is mildly enlarged.": dict(cardiomegaly=1),
    "The cardiac silhouette remains moderately to severely enlarged.": dict(cardiomegaly=1),
    "Enlarged heart.": dict(cardiomegaly=1),
    "Heart normal. Thyroid enlarged.": {},
    "PTX on the left. ETT and PICC in place.": dict(pneumothorax=1, tube=1, line=1),
    "CARDIOMEGALY WITHOUT EDEMA": dict(cardiomegaly=1),
    "s/p sternotomy.": dict(wires=1),
    "Air-space disease in the left base.": dict(consolidation=1),
}

CHEXPERT = {
    "Lungs are clear. No effusion.": dict(no_finding=1),
    "Normal chest. Right PICC in place.": dict(no_finding=1, support_devices=1),
    "Possible pneumonia.": dict(pneumonia=-1),
    "No acute cardiopulmonary process.": dict(no_finding=1),
    "Patchy opacity in the right lower lobe, concerning for pneumonia.": dict(lung_opacity=1, pneumonia=-1),
    "Bibasilar opacities, likely atelectasis.": dict(lung_opacity=1, atelectasis=-1),
    "The mediastinum is widened.": dict(enlarged_cardiomediastinum=1),
    "Mediastinal contour is not widened.": dict(no_finding=1),
    "The cardiomediastinal silhouette is enlarged.": dict(enlarged_cardiomediastinum=1),
    "Enlarged cardiac silhouette.": dict(cardiomegaly=1),
    "5 mm nodule in the left upper lobe.": dict(lung_lesion=1),
    "Left hilar mass with metastases.": dict(lung_lesion=1),
    "Mild vascular congestion.": dict(edema=1),
    "No overt CHF.": dict(no_finding=1),
    "Focal consolidation compatible with pneumonia.": dict(consolidation=1, pneumonia=1),
    "Infiltrate in the lingula.": dict(lung_opacity=1),
    "Apical pleural thickening.": dict(pleural_other=1),
    "Calcified pleural plaques.": dict(pleural_other=1),
    "Left chest tube without pneumothorax.": dict(support_devices=1, no_finding=1),
    "Nasogastric tube ends in the stomach.": dict(support_devices=1, no_finding=1),
    "Port-A-Cath tip in the SVC.": dict(support_devices=1, no_finding=1),
    "Dual lead pacemaker.": dict(support_devices=1, no_finding=1),
    "Healed right rib fractures.": dict(fracture=1),
    "Compression fracture of T8. No effusion.": dict(fracture=1),
    "Interval removal of the chest tube.": dict(no_finding=1),
    "Ground-glass opacities bilaterally.": dict(lung_opacity=1),
    "Increased interstitial markings, consistent with edema.": dict(lung_opacity=1, edema=1),
    "Aortic valve replacement.": dict(support_devices=1, no_finding=1),
    "Infectious process cannot be excluded.": dict(pneumonia=-1),
    "Small left pleural effusion with overlying atelectasis.": dict(pleural_effusion=1, atelectasis=1),
}

# what the rules get wrong, so that it is known
WRONG = {
    "It is not true that there is no effusion.": dict(effusion=1),
    "No effusion, left pneumothorax.": dict(pneumothorax=1),
}


def asserted(labeller, text):
    return {name: value for name, value in labeller(text).items() if value}


@pytest.mark.parametrize("text", CHEST)
def test_a_sentence(text):
    assert asserted(read_labels, text) == CHEST[text]


@pytest.mark.parametrize("text", CHEXPERT)
def test_a_sentence_in_the_fourteen(text):
    assert asserted(read_labeller("chexpert"), text) == CHEXPERT[text]


@pytest.mark.parametrize("text", WRONG)
def test_a_known_mistake(text):
    assert asserted(read_labels, text) != WRONG[text], "mended: move it to CHEST"


@pytest.mark.parametrize(
    "text", ["", " ", ".", "\n\n", ", ; :", "?", "no", "İ effusion", "effusion" * 3, "No " * 500 + "effusion"]
)
def test_odd_texts(text):
    labels = read_labels(text)
    assert list(labels) == list(TERMS) and not set(labels.values()) - {0, 1}


def test_places_are_those_of_the_text():
    text = "No\nair-space  disease;\n\nSmall EFFUSION."
    found = [(name, value, text[i:j]) for name, value, i, j in read_labeller().mentions(text)]
    assert found == [("effusion", 1, "EFFUSION")] or found[-1] == ("effusion", 1, "EFFUSION")


def test_places_are_those_of_a_text_with_many_spaces():
    text = "No\nair-space   disease;\n\nSmall  EFFUSION and left\t atelectasis"
    found = [(name, value, text[i:j]) for name, value, i, j in read_mentions(text)]
    assert found == [
        ("consolidation", 0, "air-space   disease"),
        ("effusion", 1, "EFFUSION"),
        ("atelectasis", 1, "atelectasis"),
    ]


@pytest.mark.parametrize("end", ["", ".", "_x000D_"])
@pytest.mark.parametrize("number", ["{}. ", "{}) ", "({}) ", "- "])
def test_a_list_without_full_stops_is_read_item_by_item(number, end):
    items = ["No focal consolidation", "Small left pleural effusion", "No pneumothorax"]
    text = clean("\n".join(number.format(i + 1) + item + end for i, item in enumerate(items)))
    assert text == "No focal consolidation. Small left pleural effusion. No pneumothorax."
    assert asserted(read_labels, text) == dict(effusion=1)


def test_no_finding_is_for_whatever_has_words():
    labeller = Labeller(dict(normal=dict(nothing_but=[]), effusion=["effusion"]))
    assert labeller("Clear.") == dict(normal=1, effusion=0)
    assert labeller("Possible effusion.") == dict(normal=0, effusion=-1)
    assert labeller(" ") == dict(normal=0, effusion=0)


def test_a_thousand_reports_take_seconds():
    reports = [report_of(2, k) for k in range(1000)]
    read_labels("No effusion.")
    start = time.process_time()
    for r in reports:
        read_labels(f"{r.findings} {r.impression}")
    assert time.process_time() - start < 10  # 0.4 s on a quiet core


def test_the_module_does_without_spacy_until_it_reads():
    code = "import sys, medvlp.data.labeller; sys.exit('spacy' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0
