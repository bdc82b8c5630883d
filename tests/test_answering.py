"""Answering by a decoder: ranking against a loop, what cannot change an answer, and input that cannot be used."""

import datasets, numpy as np, pytest, torch
from PIL import Image
from transformers import BertConfig, BertForMaskedLM

from medvlp.data.prepare import png, study_features
from medvlp.data.tokens import encode, train_tokenizer
from medvlp.generation import answerer as module
from medvlp.generation.answerer import DECODINGS, Candidates, build_answerer
from medvlp.generation.reader import find_fusion
from medvlp.methods.base import build_method
from medvlp.project.config import ComputeOptions, ConfigError
from medvlp.tasks.answer import AnswerOptions, answer, build_answer_model
from medvlp.tasks.questions import read_answers

WORDS = "left right lung heart base apex large small yes no effusion mass of the in".split()
SIZES = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
IMAGE = dict(name="resnet10t", image_size=32, patch_stride=16, options=dict(channels=[8, 16, 24, 32], stem_width=8))
TOKENIZER = train_tokenizer(WORDS * 3 + ["Is it bright? What is it?"], 120)
QUESTIONS = ["Is it bright?", "What is it?", "Is it?", "What is it? Is it bright?"]


def phrases(n, seed=0):
    "Different answers of one to six words"
    rng, found = np.random.default_rng(seed), {}
    while len(found) < n:
        found[" ".join(rng.choice(WORDS, rng.integers(1, 7)))] = True
    return list(found)


@pytest.fixture(scope="module")
def method():
    torch.manual_seed(0)
    return build_method("convirt", IMAGE, dict(options=SIZES), len(TOKENIZER), dim=16).eval()


def toy(method, answers, **config):
    torch.manual_seed(0)
    return build_answerer(method, TOKENIZER, answers, dim=16, decoder_layers=2, **config).eval()


@torch.no_grad()
def remember(model, questions=QUESTIONS):
    torch.manual_seed(1)
    images = torch.rand(4, 1, 32, 32, dtype=model.dtype)[: len(questions)]
    return model.remember(*model.question_features(images, torch.arange(len(images)), **encode(TOKENIZER, questions)))


@torch.no_grad()
def loss(model, memory, mask, ids):
    "The loss of one answer to one question, summed over its tokens"
    context = dict(encoder_hidden_states=memory[mask][None], use_cache=False)
    logits = model.decoder(torch.tensor([ids[:-1]]), **context).logits[0].log_softmax(-1)
    return -logits[range(len(ids) - 1), ids[1:]].sum()


@pytest.mark.parametrize("pack", [1, 7, 64])
@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_candidates_in_packs_and_passes_are_scored_as_one_by_one(method, pack, rows, monkeypatch):
    monkeypatch.setattr(module, "_PACK", pack)
    answers = phrases(30)
    model = toy(method, answers).double()
    memory, mask = remember(model)
    candidates = model.candidates()
    ids = module.answer_tokens(TOKENIZER, answers)
    expected = torch.stack([torch.stack([loss(model, m, k, i) for i in ids]) for m, k in zip(memory, mask)])
    with torch.no_grad():
        chosen, losses = model.candidate_losses(memory, mask, candidates, 0, rows)
        assert torch.allclose(losses, expected, atol=1e-10) and (chosen == torch.arange(30)).all()
        for k in (1, 5, 29):
            chosen, losses = model.candidate_losses(memory, mask, candidates, k, rows)
            assert torch.allclose(losses, expected.gather(1, chosen), atol=1e-10) and chosen.shape[1] == k


def test_more_candidates_than_fit_in_one_pass_are_split(method):
    model = toy(method, phrases(400))
    memory, mask = remember(model)
    whole = model.answer_from(memory, mask, "rank", rows=10**6)
    assert model.answer_from(memory, mask, "rank", rows=2) == whole
    assert model.answer_from(memory, mask, "rank") == whole


@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize("vocabulary", ["gated", "ungated", "none"])
def test_neither_other_questions_nor_padded_words_change_an_answer(method, decoding, vocabulary):
    model = toy(method, phrases(12), vocabulary=vocabulary).double()
    memory, mask = remember(model)
    together = model.answer_from(memory, mask, decoding)
    assert [model.answer_from(memory[[i]], mask[[i]], decoding)[0] for i in range(4)] == together
    noise = memory.where(mask[..., None], torch.full_like(memory, 9.0))
    assert model.answer_from(noise, mask, decoding) == together


def test_the_order_of_candidates_decides_ties_alone(method):
    answers = phrases(20)
    model = toy(method, answers).double()
    memory, mask = remember(model)
    backwards = model.answer_from(memory, mask, "rank", model.candidates(answers[::-1]))
    assert backwards == model.answer_from(memory, mask, "rank")
    same = Candidates(TOKENIZER, ["left lung", "LEFT  lung"])  # the same tokens
    assert model.answer_from(memory, mask, "rank", same) == ["left lung"] * 4
    assert model.answer_from(memory, mask, "constrained", same) == ["left lung"] * 4


def test_a_candidate_without_tokens_is_ranked_too(method):
    model = toy(method, phrases(5)).double()
    memory, mask = remember(model)
    assert set(model.answer_from(memory, mask, "rank", Candidates(TOKENIZER, ["", "left lung"]))) <= {"", "left lung"}
    assert model.answer_from(memory, mask, "rank", Candidates(TOKENIZER, [""])) == [""] * 4


@pytest.mark.parametrize("beams", [1, 3])
def test_constrained_answers_are_candidates(method, beams):
    for seed in range(5):
        answers = phrases(6, seed)
        model = toy(method, answers)
        assert set(model.answer_from(*remember(model), "constrained", beams=beams)) <= set(answers)


def studies(texts=("no", "yes"), n=16):
    def study(i):
        picture = png(Image.fromarray(np.full((40, 40), 40 + 150 * (i % 2), np.uint8)))
        form = dict(answer_type="", question_type="ABN", split="", organ="")
        asked = [dict(question="Is it bright?", answer=texts[i % 2], **form), dict(question="", answer="no", **form)]
        row = dict(study_id=str(i), patient_id=str(i), view="PA", findings="", impression="", paired=False)
        split = "train" if i < n // 2 else "val" if i < 3 * n // 4 else "test"
        return row | dict(split=split, image=picture, mask=None, boxes=[], questions=asked)

    return datasets.Dataset.from_list([study(i) for i in range(n)], features=study_features([]))


def run(method, folder, rows, **options):
    budget = dict(epochs=1, min_steps=1, batch_size=4, dim=16, decoder_layers=1, n_resamples=10)
    place = dict(checkpoints=folder / "checkpoints", output=folder / "model")
    compute = ComputeOptions(device="cpu", precision="fp32")
    return answer(method, TOKENIZER, rows, AnswerOptions(**budget | options), compute=compute, **place)


@pytest.fixture
def untrained(monkeypatch):
    monkeypatch.setattr("medvlp.tasks.answer.fit", lambda *_, **__: pytest.fail("it was trained"))


@pytest.mark.parametrize("head", ["classifier", "decoder"])
def test_a_set_without_questions_is_a_reason(method, head, tmp_path, untrained):
    rows = studies()
    rows = rows.remove_columns("questions").add_column(
        "questions", [[]] * len(rows), feature=rows.features["questions"]
    )
    result = run(method, tmp_path, rows, head=head)
    assert result.reason.startswith("the set has no questions; give them as a column") and not len(result.scores)


@pytest.mark.parametrize("head", ["classifier", "decoder"])
def test_empty_questions_take_no_part(method, head, tmp_path):
    run(method, tmp_path, studies(), head=head)  # each study has one
    assert read_answers(tmp_path / "model").question.tolist() == ["Is it bright?"] * 4


@pytest.mark.parametrize("head", ["auto", "classifier", "decoder"])
def test_a_fusion_that_was_not_trained_is_refused(head, tmp_path, untrained):
    sizes = dict(dim=16, fusion_dim=16, heads=2, layers=1)
    first, second = (
        build_method("amf", IMAGE, dict(options=SIZES), len(TOKENIZER), phase=phase, **sizes)
        for phase in ("align", "fuse")
    )
    with pytest.raises(
        ConfigError, match="fusion: pretrained, but method amf was trained without .*; choose fresh, or"
    ):
        run(first, tmp_path, studies(), head=head, fusion="pretrained")
    assert find_fusion(first, "auto") is None and find_fusion(second, "pretrained") is second.fusion


@pytest.mark.parametrize("head", ["classifier", "decoder"])
def test_an_answer_vocabulary_of_one_is_a_reason(method, head, tmp_path, untrained):
    result = run(method, tmp_path, studies(("yes", "yes")), head=head)
    assert result.reason == "answers given at least min_count = 1 times in training: 1, but at least 2 are needed"


@pytest.mark.parametrize("build", [build_answerer, build_answer_model])
def test_an_empty_question_is_an_error_that_says_which(method, build):
    model, picture = build(method, TOKENIZER, ["yes", "no"], dim=16), Image.new("L", (40, 40))
    with pytest.raises(ValueError, match="question 1 of 2, counted from 0, is empty; write one or leave it out"):
        model.answer(picture, ["Is it?", "  "])


def test_an_answer_longer_than_the_decoder_takes_is_an_error_before_training(method, tmp_path, untrained):
    rows, message = studies(("yes", "mass of left lung")), "'mass of left lung' has 6 tokens .* takes 5; raise max"
    with pytest.raises(ConfigError, match=message):
        run(method, tmp_path, rows, head="decoder", max_answer_tokens=5)
    bert = BertConfig(**SIZES, vocab_size=len(TOKENIZER), max_position_embeddings=5)
    BertForMaskedLM(bert).save_pretrained(tmp_path / "bert")
    TOKENIZER.save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match=message):
        run(method, tmp_path, rows, head="decoder", decoder=str(tmp_path / "bert"), heads=2)
    test_answer = rows.map(lambda r, i: r if i < 14 else studies(("no", "mass of left lung"))[i], with_indices=True)
    with pytest.raises(ConfigError, match="takes 5"):  # one that only the test questions have
        run(method, tmp_path, test_answer, head="decoder", max_answer_tokens=5, candidates="test")


def test_scores_say_that_the_test_answers_were_candidates(method, tmp_path):
    honest, given_away = (run(method, tmp_path, studies(), head="decoder", candidates=c) for c in ("train", "test"))
    assert not honest.scores.note.str.contains("candidates").any()
    assert given_away.scores.note.str.contains("candidates are the answers of the test questions").all()
