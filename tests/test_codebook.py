"Codebooks: entities, matching in blocks, damaged files, sets that give too little, another method's weights"

import json
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

import medvlp.generation.codebooks as codebooks
from medvlp.data.labeller import Labeller
from medvlp.data.prepare import png, study_features
from medvlp.data.tokens import train_tokenizer
from medvlp.generation.codebooks import KeypatchCollector, PatchMoments, TextCodebook, VisualCodebook, word_maxima
from medvlp.generation.entities import GROUPS, Entity, Lexicon, Tagger, count_entities, load_recogniser
from medvlp.methods.base import build_method
from medvlp.project.config import ComputeOptions, ConfigError
from medvlp.tasks import codebook as task
from medvlp.tasks.codebook import CodebookOptions, build_codebooks, load_codebooks, read_hints, report_keypatches
from small import BERT, PVT, RESNET

CPU = ComputeOptions(device="cpu", precision="fp32")
TEXTS = ["Small left effusion.", "No effusion. The heart is normal.", "Nodule in the right lung, no fracture."]


# entities


def test_lexicon_has_every_phrase_once():
    table = task.load_recogniser("lexicon")._labeller.terms
    assert list(table) == GROUPS
    forms = {}
    for group, phrases in table.items():
        for phrase in np.hstack(phrases):
            assert phrase == phrase.lower() and "-" not in phrase, phrase
            assert forms.setdefault(phrase, group) == group, phrase
    assert len(forms) > 600


@pytest.mark.parametrize(
    "word, group",
    [
        ("haemothoraces", "disease_disorder"),
        ("hemothorax", "disease_disorder"),
        ("plate-like", "detailed_description"),
        ("rib fractures", "disease_disorder"),
        ("AORTIC KNOB", "biological_structure"),
        ("ground-glass opacities", "sign_symptom"),
    ],
)
def test_lexicon_finds_spellings_and_plurals(word, group):
    (found,) = Lexicon()([f"There are ({word})."])
    assert [(e.text, e.group) for e in found] == [(word.lower(), group)]


@pytest.mark.parametrize(
    "content, says",
    [
        ("disease: [flu]", 'no group "disease"'),
        ("- flu", "should hold a list"),
        ("sign_symptom: flu", "should hold a list"),
        ("", "should hold a list"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_bad_lexicon(tmp_path, content, says):
    (tmp_path / "own.yaml").write_text(content)
    with pytest.raises(ConfigError, match=says):
        load_recogniser(str(tmp_path / "own.yaml"))


def test_own_lexicon(tmp_path):
    (tmp_path / "own.yaml").write_text("sign_symptom: [[flu, cold]]")
    assert [e.text for e in load_recogniser(str(tmp_path / "own.yaml"))(["Colds, not flu."])[0]] == ["colds", "flu"]


def save_tagger(folder, labels):
    from transformers import BertConfig, BertForTokenClassification

    tokenizer = train_tokenizer(TEXTS, 60, min_frequency=1)
    size = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    names = dict(id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)})
    torch.manual_seed(0)
    model = BertForTokenClassification(
        BertConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **names, **size)
    )
    return tokenizer, model, folder


def test_tagger_joins_pieces_and_words(tmp_path):
    tokenizer, model, _ = save_tagger(tmp_path, ["O", "B-Sign_symptom", "I-Sign_symptom", "B-Age"])
    with torch.no_grad():  # whatever it reads is one entity
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 0.0, 5.0, 0.0]))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = Tagger(str(tmp_path))([TEXTS[0], "", "  "])
    assert [[e.text for e in entities] for entities in found] == [["small left effusion."], [], []]
    assert found[0][0].group == "sign_symptom" and found[0][0].score > 0.9
    long = Tagger(str(tmp_path))([" ".join(TEXTS) * 3])[0]  # longer than the model's context
    assert long and all(a.end <= b.start for a, b in zip(long, long[1:]))
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0]))
    model.save_pretrained(tmp_path)
    assert Tagger(str(tmp_path))([TEXTS[0]]) == [[]]  # too uncertain


def test_tagger_of_other_things(tmp_path):
    tokenizer, model, _ = save_tagger(tmp_path, ["O", "B-PER", "I-PER"])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="its labels are o, per; none is of"):
        Tagger(str(tmp_path))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        Tagger(str(tmp_path / "absent"))


def test_count_takes_the_usual_group_and_all_there_are():
    found = [[Entity(0, 4, "mass", "sign_symptom"), Entity(5, 9, "mass", "sign_symptom")]]
    found += [[Entity(0, 4, "mass", "disease_disorder"), Entity(5, 9, "left", "detailed_description")]]
    table = count_entities(found, 10_000)
    assert table.to_dict("list") == dict(
        text=["left", "mass"], group=["detailed_description", "sign_symptom"], count=[1, 2]
    )


# codebooks


def text_book(K=7, d=5, ranking="cosine", **options):
    g = torch.Generator().manual_seed(K)
    options = dict(kappa1=2, n_keywords=3, ranking=ranking) | options
    table = pd.DataFrame(dict(text=[f"w{i}" for i in range(K)], group="g", count=1))
    x = dict(features=F.normalize(torch.randn(K, d, generator=g), dim=-1), mean=torch.rand(K), std=torch.rand(K) + 0.5)
    return TextCodebook(table, dict(weights="w", options=options), **x)


def reference(tokens, features, mask, each, most):
    "The matches of one report, by loops"
    best = {}
    for t, x in enumerate(tokens):
        scores = {k: float(F.cosine_similarity(x, f, dim=0)) for k, f in enumerate(features)}
        for k in sorted(scores, key=scores.get, reverse=True)[:each] if mask[t] else []:
            best[k] = max(best.get(k, (-2, 0)), (scores[k], t))
    return sorted(((s, k, t) for k, (s, t) in best.items()), reverse=True)[:most]


@pytest.mark.parametrize("block", [1, 40, 2**24])
@pytest.mark.parametrize("each, most", [(1, 3), (2, 4), (99, 99)])
def test_matching_is_the_loop_in_blocks_of_any_size(monkeypatch, block, each, most):
    monkeypatch.setattr(codebooks, "BLOCK", block)
    g = torch.Generator().manual_seed(1)
    tokens, features = torch.randn(6, 4, 5, generator=g), F.normalize(torch.randn(9, 5, generator=g), dim=-1)
    mask = torch.rand(6, 4, generator=g) < 0.6
    mask[3] = False
    m = codebooks._match(tokens, features, mask, None, each, most)
    for i in range(6):
        expected = reference(tokens[i], features, mask[i], each, most)
        n = len(expected)
        assert m.numbers[i, :n].tolist() == [k for _, k, _ in expected]
        assert m.tokens[i, :n].tolist() == [t for _, _, t in expected]
        assert (m.numbers[i, n:] == -1).all() and (m.scores[i, n:] == -torch.inf).all()


def test_relative_is_the_standardised_cosine():
    book = text_book(ranking="relative", kappa1=99, n_keywords=1)
    patches = torch.randn(20, 3, 5, generator=torch.Generator().manual_seed(2))
    s = (F.normalize(patches, dim=-1) @ book.features.T - book.mean) / book.std
    assert book.match(patches).numbers[:, 0].tolist() == s.amax(1).argmax(1).tolist()
    assert book.keywords(patches * 7) == book.keywords(patches)


def test_moments_of_constant_patches_are_finite():
    moments = PatchMoments()
    moments.add(torch.ones(3, 4, 5))
    assert (moments.of(torch.eye(5))["std"] > 0).all()


@pytest.mark.parametrize("suffix", ["safetensors", "csv", "json"])
@pytest.mark.parametrize("damage", ["absent", "short", "other"])
def test_damaged_codebook(tmp_path, suffix, damage):
    text_book().save(tmp_path)
    assert len(TextCodebook.load(tmp_path)) == 7
    file = tmp_path / f"text.{suffix}"
    if damage == "absent":
        file.unlink()
    elif damage == "short":
        file.write_bytes(file.read_bytes()[:20])
    else:
        text_book(5).save(tmp_path / "other")
        file.write_bytes((tmp_path / "other" / file.name).read_bytes() if suffix != "json" else b"3")
    with pytest.raises(ConfigError, match="no whole text codebook.*run the codebook stage"):
        TextCodebook.load(tmp_path)


def pairs(B=12, N=5, L=4, d=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(L) < torch.randint(1, L + 1, (B, 1), generator=g)
    boxes = torch.rand(B, N, 4, generator=g).sort(-1).values[..., [0, 1, 2, 3]]
    images = torch.rand(B, 1, 16, 16, generator=g)
    ids, texts = [f"s{i}" for i in range(B)], [[f"w{i}{k}" for k in range(L)] for i in range(B)]
    return torch.randn(B, N, d, generator=g), boxes, torch.randn(B, L, d, generator=g), mask, images, ids, texts


def collect(batch, sizes, *options):
    c, start = KeypatchCollector(*options), 0
    for n in sizes:
        c.add(*(x[start : start + n] for x in batch))
        start += n
    return c.codebook(dict(weights="w", options=dict(kappa4=2, n_keypatches=3)))


def test_collector_keeps_the_best_pairs_whatever_the_batches():
    batch = pairs()
    books = [collect(batch, sizes, 4, 2, 8) for sizes in ([12], [1] * 12, [5, 7])]
    for book in books[1:]:
        pd.testing.assert_frame_equal(book.table, books[0].table)
        assert all(torch.equal(x, book.state_dict()[name]) for name, x in books[0].state_dict().items())
    score = word_maxima(*batch[:1], *batch[2:4])[0]
    assert list(books[0].table.study_id.unique()) == [f"s{i}" for i in score.topk(4).indices.tolist()]
    assert books[0].table.groupby("study_id").size().max() == 2


def test_more_keypatches_than_patches_and_a_pair_without_words():
    patches, boxes, words, mask, images, ids, texts = pairs()
    mask[3] = False
    book = collect((patches, boxes, words, mask, images, ids, texts), [12], 11, 500, 4)
    assert "s3" not in set(book.table.study_id)
    assert not book.table.duplicated(["study_id", "word", "score"]).any() and len(book) <= 11 * 4
    with pytest.raises(ConfigError, match="kappa2 = 12, but only 11 training pairs"):
        collect((patches, boxes, words, mask, images, ids, texts), [12], 12, 500, 4)


def test_crop_of_a_whole_image_and_of_nothing():
    image = torch.rand(1, 8, 8)
    whole, point = codebooks.crop(image, torch.tensor([[0.0, 0, 1, 1], [0.5, 0.5, 0.5, 0.5]]), 8)
    assert (whole.float() / 255 - image[0]).abs().max() < 0.01
    assert point.shape == (8, 8) and len(point.unique()) == 1


# the task


def make_set(reports, labels=("effusion", "nodule"), n=20, split=lambda i: "train" if i < 12 else "test"):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        image = png(PIL.Image.fromarray(rng.integers(0, 255, (32, 32)).astype(np.uint8)))
        text = reports[i % len(reports)]
        row = dict(study_id=f"s{i}", patient_id=f"p{i}", view="PA", findings=text, impression="", split=split(i))
        row |= dict(paired=bool(text), image=image, mask=None, boxes=[], questions=[])
        row |= dict(labels={k: (i + j) % 3 - 1 for j, k in enumerate(labels)}) if labels else {}
        rows.append(row)
    return datasets.Dataset.from_list(rows, features=study_features(list(labels)))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 90, min_frequency=1)


@pytest.fixture(scope="module")
def method(tokenizer):
    torch.manual_seed(0)
    return build_method("adamatch", PVT, BERT, len(tokenizer), dim=16).eval()


SMALL = dict(kappa2=4, kappa3=3, max_tokens=24, n_resamples=20, patch_pixels=8, batch_size=8)


def run(method, tokenizer, studies, folder, **options):
    return task.codebook(method, tokenizer, studies, CodebookOptions(**SMALL | options), compute=CPU, output=folder)


def test_no_entity_in_any_report(method, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="no entity in any of 12 training reports"):
        run(method, tokenizer, make_set(["Nothing to say."]), tmp_path)


def test_nothing_asserted(method, tokenizer, tmp_path):
    studies = make_set(["No effusion.", "No fracture."])
    with pytest.raises(ConfigError, match="assert none of the entities found: set features to alone"):
        run(method, tokenizer, studies, tmp_path)
    assert set(run(method, tokenizer, studies, tmp_path, features="alone").scores.n) <= {0, 8, 5, 6}


def test_too_few_pairs_before_work_starts(method, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(task, "load_recogniser", lambda *a: pytest.fail("work has started"))
    with pytest.raises(ConfigError, match="kappa2 = 13, but the training split has 12 pairs"):
        run(method, tokenizer, make_set(TEXTS), tmp_path, kappa2=13)
    with pytest.raises(ConfigError, match="the training split has 0 pairs"):
        run(method, tokenizer, make_set(TEXTS), tmp_path, sections=["impression"])


def test_more_than_there_is(method, tokenizer, tmp_path):
    much = dict(kappa0=9999, kappa1=9999, kappa3=9999, kappa4=9999, n_keywords=9999, n_keypatches=9999)
    run(method, tokenizer, make_set([*TEXTS, ""]), tmp_path, **much)
    hints = read_hints(tmp_path)
    text, visual = load_codebooks(tmp_path, method)
    assert set(hints.keywords.str.len()) == {len(text)}
    of_others = [len(visual) - (visual.table.study_id == study).sum() for study in hints.study_id]
    assert [n or 0 for n in hints.keypatches.str.len()] == [n * (i % 4 < 3) for i, n in enumerate(of_others)]
    assert hints.keypatches.str.len().eq(0).tolist() == [i % 4 == 3 for i in range(20)]
    assert all(len(h.keyword_boxes) == len(h.keywords) == len(h.keyword_scores) for h in hints.itertuples())


def test_another_adamatch(method, tokenizer, tmp_path):
    run(method, tokenizer, make_set(TEXTS), tmp_path)
    torch.manual_seed(1)
    other = build_method("adamatch", PVT, BERT, len(tokenizer), dim=16).eval()
    load_codebooks(tmp_path, method)
    with pytest.raises(ConfigError, match="the text codebook was made with a method of weights"):
        load_codebooks(tmp_path, other)


def test_methods_without_alignment(tokenizer):
    model = build_method("convirt", RESNET, BERT, len(tokenizer), dim=16).eval()
    with pytest.raises(ConfigError, match="method convirt does not place patches and words in one space"):
        build_codebooks(model, tokenizer, make_set(TEXTS), CodebookOptions(**SMALL))


@pytest.mark.parametrize("tokens", ["pieces", "words"])
def test_words_or_pieces_and_fixed_patches(tokenizer, tokens):
    fixed = {k: v for k, v in PVT.items() if k != "adapatch"}
    model = build_method("adamatch", fixed, BERT, len(tokenizer), dim=16, tokens=tokens).eval()
    text, visual = build_codebooks(model, tokenizer, make_set(TEXTS), CodebookOptions(**SMALL))
    assert set(visual.table.word) <= {w for t in TEXTS for w in t.lower().replace(".", " .").replace(",", " ,").split()}
    assert (visual.boxes[:, 2:] - visual.boxes[:, :2] == 0.5).all()
    assert (report_keypatches(model, tokenizer, visual, ["", "!", "effusion"])[0] == -1).all()


def test_empty_reports_only(method, tokenizer, tmp_path):
    run(method, tokenizer, make_set(TEXTS), tmp_path)
    _, visual = load_codebooks(tmp_path, method)
    assert (report_keypatches(method, tokenizer, visual, ["", ""]) == -1).all()
    assert report_keypatches(method, tokenizer, visual, ["zzz qqq"]).min() >= 0  # unknown words are words


def test_sets_without_labels_or_test_patients(method, tokenizer, tmp_path):
    result = run(method, tokenizer, make_set(TEXTS, labels=()), tmp_path)
    assert "keyword F1 effusion" in set(result.scores.metric)  # read from the test reports
    lone = make_set(TEXTS, n=13)
    result = run(method, tokenizer, lone, tmp_path)
    assert result.reason == "test patients: 1, but intervals need at least 2" and len(read_hints(tmp_path)) == 13


def test_unknown_labels_are_not_compared():
    truth = pd.DataFrame(dict(effusion=[1.0, np.nan, 0.0], nodule=[0.0, 1.0, np.nan]))
    named = dict(keywords=np.ones((3, 2), bool))
    named["random"] = np.zeros((3, 2), bool)
    table = task.keyword_table(truth, named, ["a", "b", "c"], 20).set_index(["system", "label", "measure"]).value
    assert table["keywords", "micro", "precision"] == 0.5 and table["keywords", "micro", "recall"] == 1
    assert table["keywords over random", "effusion", "recall"] == 1


def test_a_keyword_names_what_the_labeller_reads_in_it():
    labeller = Labeller(dict(effusion=["effusion"], mass=["mass"]))
    named = task.named_findings([["effusion", "clear"], ["masses"], []], labeller, ["effusion", "mass"])
    assert named.tolist() == [[True, False], [False, True], [False, False]]


def test_facts_are_kept(method, tokenizer, tmp_path):
    run(method, tokenizer, make_set(TEXTS), tmp_path)
    facts = json.loads(Path(tmp_path, "visual.json").read_text())
    assert facts["method"] == "adamatch" and facts["pairs"] == 12 and facts["options"]["kappa2"] == 4
    assert len(facts["weights"]) == 64
    assert VisualCodebook.load(tmp_path).pixels.shape[1:] == (8, 8)
