"Trees of a few studies in the official layouts of public sets"

import json

import numpy as np
import pandas as pd
from PIL import Image

FINDINGS = {
    "Atelectasis": "There is mild atelectasis at the left base.",
    "Cardiomegaly": "The heart is enlarged.",
    "Consolidation": "Consolidation in the right lower lobe.",
    "Edema": "Mild pulmonary edema.",
    "Pleural Effusion": "Small left pleural effusion.",
}


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_mimic_cxr(folder):
    "Five patients a split, with a study of one finding each; that of edema has two views and no findings section"
    images, labels = [], []
    for i, (name, sentence) in enumerate([*FINDINGS.items()] * 3):
        patient, study, split = f"10{i:06}", f"50{i:06}", ["train", "validate", "test"][i // 5]
        report = folder / f"files/p10/p{patient}/s{study}.txt"
        findings = f" FINDINGS:\n {sentence} No pneumothorax.\n\n" if name != "Edema" else ""
        write(report, f" FINAL REPORT\n INDICATION: ___ with cough.\n\n{findings} IMPRESSION:  {name} is seen today.\n")
        for view in ["PA", "LATERAL"] if name == "Edema" else ["AP"]:
            dicom = f"{i:04}-{view.lower()}"
            pixels = np.random.default_rng(i).integers(0, 99, (72, 80)) + 30 * (i % 5)
            report.with_suffix("").mkdir(exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(report.with_suffix("") / f"{dicom}.jpg")
            images.append(dict(dicom_id=dicom, study_id=study, subject_id=patient, split=split, ViewPosition=view))
        cells = {other: "" for other in FINDINGS} | {name: "1.0", "Pneumothorax": "0.0"}
        labels.append(dict(subject_id=patient, study_id=study) | cells)
    images = pd.DataFrame(images)
    images.drop(columns="ViewPosition").to_csv(folder / "mimic-cxr-2.0.0-split.csv", index=False)
    images[["dicom_id", "ViewPosition"]].to_csv(folder / "mimic-cxr-2.0.0-metadata.csv", index=False)
    pd.DataFrame(labels).to_csv(folder / "mimic-cxr-2.0.0-chexpert.csv.gz", index=False)


ASKED = [("Is the heart large?", ["Yes", "No"], "CLOSED"), ("Where is it?", ["left lung", "right lung"], "OPEN")]


def questions(i, **form):
    "Questions about an image, an open one and a closed one"
    return [dict(question=q, answer=answers[i % 2], answer_type=kind) | form for q, answers, kind in ASKED]


def picture(path, i):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (72, 80), np.uint8)).save(path)


def write_vqa_rad(folder):
    "Six images with training questions, and three with test questions"
    for part, numbers in dict(trainset=range(6), testset=range(6, 9)).items():
        names = {i: f"synpic{i}.jpg" for i in numbers}
        form = dict(question_type="PRES", image_organ="CHEST")
        rows = [row for i, name in names.items() for row in questions(i, image_name=name, **form)]
        write(folder / f"{part}.json", json.dumps(rows))
        for i, name in names.items():
            picture(folder / "images" / name, i)


def write_slake(folder):
    "Five images a split, each with a box, and with a question in Chinese beside those in English"
    form = dict(content_type="Abnormality", location="Lung", modality="X-Ray")
    for start, part in enumerate(("train", "validate", "test")):
        rows = []
        for i in range(5 * start, 5 * start + 5):
            about = dict(form, img_name=f"xmlab{i}/source.jpg")
            rows += [*questions(i, q_lang="en", **about), *questions(i, q_lang="zh", **about)[:1]]
            picture(folder / "imgs" / f"xmlab{i}" / "source.jpg", i)
            write(folder / "imgs" / f"xmlab{i}" / "detection.json", json.dumps([{"Left Lung": [5, 5, 30, 40]}]))
        write(folder / f"{part}.json", json.dumps(rows))


DIAGNOSES = {
    "Pneumonia/Viral/COVID-19": "Bilateral opacities.",
    "Pneumonia/Bacterial/Streptococcus": "Consolidation in the right lower lobe.",
    "No Finding": "The lungs are clear.",
}
NAMES = (
    "patientid,offset,sex,age,finding,view,modality,date,location,folder,filename,license,clinical_notes,other_notes"
)


def write_covid_chestxray(folder):
    "Twenty patients with a radiograph each, whose split is drawn; the first has a CT too, all but the last a lung mask"
    rows = []
    for i in range(20):
        finding, notes = [*DIAGNOSES.items()][i % 3]
        name = f"{i}.jpeg"
        form = dict(patientid=i, finding=finding, modality="X-ray", folder="images", license="CC BY-NC-SA")
        rows.append(dict(form, view="PA", filename=name, clinical_notes=notes))
        picture(folder / "images" / name, i)
    rows.append(rows[0] | dict(view="Axial", modality="CT", folder="volumes", filename="ct.nii.gz"))
    pd.DataFrame(rows, columns=NAMES.split(",")).to_csv(folder / "metadata.csv", index=False)
    masks = "".join(f"{i}.jpeg,{i}.png\n" for i in range(19))
    write(folder / "splits.csv", f"filename,lung_mask\n{masks}")
    lungs = np.repeat(np.array([0, 127, 255, 0], np.uint8), 20)
    for i in range(19):
        (folder / "lung_masks").mkdir(exist_ok=True)
        Image.fromarray(np.tile(np.roll(lungs, i), (72, 1))).save(folder / "lung_masks" / f"{i}.png")


def write_hannover_covid(folder):
    "Four patients with an image each, the first two with a stay in intensive care, which the first did not survive"
    names = "patient_id,image_id,sex,icu_admission_offset,death_offset,modality,projection,crp_val"
    rows = ["p0,i0,m,-2.0,7.0,CR,ap,-inf", "p1,i1,f,0.0,,CR,ap,5.0", "p2,i2,m,,,DX,pa,", "p3,i3,f,,,DX,pa,11.0"]
    write(folder / "data.csv", "\n".join([names, *rows]))
    for i in range(4):
        picture(folder / f"png/i{i}.png", i)


def write_pathvqa(folder):
    "Two pictures a split, with an open question and a closed one each"
    for start, split in enumerate(("train", "val", "test")):
        rows = []
        for i in (2 * start, 2 * start + 1):
            name = f"{split}/{split}_{i:04}.jpg"
            rows += questions(i, image_name=name, question_type="what")
            picture(folder / "images" / name, i)
        kinds = dict(CLOSED="yes/no", OPEN="other")
        rows = [row | dict(qid=n, answer_type=kinds[row["answer_type"]]) for n, row in enumerate(rows)]
        write(folder / f"pathvqa_{split}.json", json.dumps(rows))


def write_vqa_med_2019(folder):
    "Two images for training and two for validation, with four questions each, and two for testing with one each"
    parts = dict(Training=("Train_images", "train"), Validation=("Val_images", "val"))
    categories = dict(C1_Modality="xr - plain film", C2_Plane="ap", C3_Organ="spine and contents", C4_Abnormality="yes")
    for part, (images, split) in parts.items():
        for category, answer in categories.items():
            lines = [f"synpic-{split}-{i}|what is it?|{answer}\n" for i in range(2)]
            write(folder / f"ImageClef-2019-VQA-Med-{part}/QAPairsByCategory/{category}_{split}.txt", "".join(lines))
        for i in range(2):
            picture(folder / f"ImageClef-2019-VQA-Med-{part}/{images}/synpic-{split}-{i}.jpg", i)
    lines = ["synpic-test-0|modality|what is it?|cta#ct", "synpic-test-1|plane|which plane?|axial"]
    write(folder / "VQAMed2019Test/VQAMed2019_Test_Questions_w_Ref_Answers.txt", "\n".join(lines))
    for i in range(2):
        picture(folder / f"VQAMed2019Test/VQAMed2019_Test_Images/synpic-test-{i}.jpg", i)


WRITERS = dict(
    mimic_cxr=write_mimic_cxr,
    covid_chestxray=write_covid_chestxray,
    vqa_rad=write_vqa_rad,
    slake=write_slake,
    hannover_covid=write_hannover_covid,
    pathvqa=write_pathvqa,
    vqa_med_2019=write_vqa_med_2019,
)
