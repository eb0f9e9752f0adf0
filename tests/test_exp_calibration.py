"""experiments/calibration.py: metrics by hand and by slow code, letters, padding, files, and the whole run once."""

import gzip
import json
import random
from dataclasses import replace
from pathlib import Path

import calibration
import numpy as np
import pytest
import tiny
import torch
from calibration import Args, Question
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

DATA = Path(__file__).parents[2] / "shared" / "data"
QUESTIONS = [
    Question("What is 1 + 1?", ["1", "2", "3", "4"], 1),
    Question("Which of them is the longest, if one may ask?", ["a", "bb", "ccc and more", "d"], 2),
    Question("Yes?", ["yes", "no"], 0),
    Question("How many?", ["one", "two", "three"], 2),
    Question("Which is a letter?", ["1", "2", "x", "?"], 2),
]


def character_tokenizer(pieces, without=""):
    """Characters, and a few strings as one token each."""
    words = ["<unk>", "</s>", *(set(tiny.CHARACTERS) - set(without)), *pieces]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("|".join([*pieces, r"[\s\S]"])), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


# ---------------------------------------------------------------------------------------------------------------------
# metrics


def test_metrics_by_hand():
    """Four questions. Confidences .9, .5, .5, .7: bins 14, 8, 8, 11; right: yes, yes, no, no.

    accuracy 2/4; ECE = (|1 - .9| + |1 - .5 - .5| + |0 - .7|) / 4 = .8 / 4 = .2
    Brier, per question: .1^2 + .1^2; .5^2 + .5^2; .5^2 + .5^2 + 1; .7^2 + .1^2 + .8^2 + 0 = .02, .5, 1.5, 1.14
    """
    probabilities = np.array([[0.9, 0.1, 0, 0], [0.5, 0, 0.5, 0], [0.5, 0.5, 0, 0], [0.7, 0.1, 0.2, 0]])
    result = calibration.metrics(probabilities, np.array([0, 0, 2, 2]), np.array([1, 0.5, 0.5, 0]))
    assert result.accuracy == 0.5 and result.mass == 0.5
    assert result.ece == pytest.approx(0.2) and result.brier == pytest.approx(0.79)


def test_brier_of_a_uniform_guess_is_three_quarters():
    assert calibration.metrics(np.full((8, 4), 0.25), np.arange(8) % 4, np.ones(8)).brier == 0.75


def slow(probabilities, answers):
    """Accuracy, ECE and Brier score with loops, straight from their definitions."""
    bins, brier = [[] for _ in range(15)], 0
    for row, answer in zip(probabilities.tolist(), answers.tolist()):
        top = row.index(max(row))
        number = next(b for b in range(15) if b / 15 < row[top] <= (b + 1) / 15)
        bins[number].append((row[top], top == answer))
        brier += sum((p - (choice == answer)) ** 2 for choice, p in enumerate(row)) / len(answers)
    ece, count = 0, len(answers)
    for entries in filter(None, bins):
        confidence = sum(c for c, _ in entries) / len(entries)
        accuracy = sum(right for _, right in entries) / len(entries)
        ece += len(entries) / count * abs(accuracy - confidence)
    return sum(right for entries in bins for _, right in entries) / count, ece, brier


@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_slow_ones(seed):
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.full(4, 0.3 + seed), 500)
    answers = rng.integers(0, 4, 500)
    result = calibration.metrics(probabilities, answers, np.ones(500))
    assert (result.accuracy, result.ece, result.brier) == pytest.approx(slow(probabilities, answers), abs=1e-12)


@pytest.mark.parametrize("n", (200, 817, 20_000))
def test_calibrated_data_shows_the_floor(n):
    """Answers drawn from the probabilities themselves: ECE is the floor's, and of sharper ones far above."""
    rng = np.random.default_rng(n)
    errors, floors = [], []
    for _ in range(60):
        probabilities = rng.dirichlet(np.full(4, 0.7), n)
        answers = (probabilities.cumsum(1) < rng.random((n, 1))).sum(1)
        result = calibration.metrics(probabilities, answers, np.ones(n))
        errors.append(result.ece)
        floors.append(result.floor)
    assert np.mean(errors) == pytest.approx(np.mean(floors), rel=0.1)
    assert np.std(floors) < 0.05 * np.mean(floors)
    sharp = probabilities**3 / (probabilities**3).sum(1, keepdims=True)
    result = calibration.metrics(sharp, answers, np.ones(n))
    assert (
        result.ece > 0.1
        and result.ece > 2 * result.floor
        and result.accuracy == pytest.approx((probabilities.argmax(1) == answers).mean())
    )


def test_floor_shrinks_with_n():
    """As 1 / sqrt(n); 0.04 at 817 questions of middling confidence."""
    confidence = np.random.default_rng(0).uniform(0.3, 0.9, 20_000)
    assert 0.03 < calibration.calibrated_error(confidence[:817]) < 0.05
    ratio = calibration.calibrated_error(confidence[:1250]) / calibration.calibrated_error(confidence)
    assert ratio == pytest.approx(4, rel=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# letters


def test_letter_with_its_space_as_one_token():
    """Behind "Your answer:" the next token is " A", another one than the "A" of the list of choices."""
    tokens = character_tokenizer([f" {letter}" for letter in "ABCD"])
    prompt, letters = calibration.tokenize(tokens, QUESTIONS[0])
    assert tokens.convert_ids_to_tokens(letters) == [" A", " B", " C", " D"]
    assert tokens.decode(prompt).endswith("Your answer:")
    assert not set(letters) & {tokens.convert_tokens_to_ids(letter) for letter in "ABCD"}


def test_letter_behind_a_space_of_its_own():
    tokens = tiny.tokenizer()
    prompt, letters = calibration.tokenize(tokens, QUESTIONS[0])
    assert tokens.convert_ids_to_tokens(letters) == list("ABCD")
    assert tokens.decode(prompt).endswith("Your answer: ")
    assert tokens.convert_ids_to_tokens(prompt[0]) == "<s>" and prompt.count(1) == 1


def test_as_many_letters_as_choices():
    assert [len(calibration.tokenize(tiny.tokenizer(), question)[1]) for question in QUESTIONS] == [4, 4, 2, 3, 4]


@pytest.mark.parametrize(
    ("template", "before"),
    [
        ("llama3", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("mistral", " [/INST] "),
        ("qwen", "<|im_start|>assistant\n"),
        ("thinking", "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    ],
)
def test_chat_models_get_their_template(template, before):
    """The letter stands where the template writes the answer, with or without a space."""
    tokens = tiny.tokenizer(template)
    prompt, letters = calibration.tokenize(tokens, QUESTIONS[0])
    text = tokens.decode(prompt)
    assert text.endswith(before) and "Your answer:" in text
    assert tokens.convert_ids_to_tokens(letters) == list("ABCD")
    assert prompt.count(1) == 1


@pytest.mark.parametrize(
    "tokens",
    [
        character_tokenizer([": A"]),  # one token, and ": B" is three
        character_tokenizer([], without="ABCD"),  # all of them unknown
        character_tokenizer([], without="CD"),  # two of them unknown, so the same token
    ],
)
def test_letters_that_cannot_be_compared(tokens):
    with pytest.raises(SystemExit, match="^error: the letters A, B, C, D are not one token each[^\n]*$"):
        calibration.tokenize(tokens, QUESTIONS[0])


def test_a_template_that_refuses_the_question():
    tokens = tiny.tokenizer("{{ raise_exception('never') }}")
    with pytest.raises(SystemExit, match="^error: the model's chat template refuses[^\n]*never[^\n]*$"):
        calibration.tokenize(tokens, QUESTIONS[0])


# ---------------------------------------------------------------------------------------------------------------------
# probabilities


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_batch_equals_one_question_at_a_time(family, monkeypatch):
    """Prompts of unequal length, padded together, against a plain forward of each without mask, in float64."""
    tokens = tiny.tokenizer()
    model = tiny.model(family, vocab_size=len(tokens))
    prompts, letters = zip(*(calibration.tokenize(tokens, question) for question in QUESTIONS))
    together, mass = calibration.letter_probabilities(model, prompts, letters)
    for number, (prompt, some) in enumerate(zip(prompts, letters)):
        with torch.no_grad():
            whole = model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)[some]
        assert mass[number] == pytest.approx(whole.sum().item(), rel=1e-6)
        expected = np.zeros(4)
        expected[: len(some)] = (whole / whole.sum()).numpy()
        assert together[number] == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr(calibration, "BATCH_TOKENS", 1)
    assert np.allclose(calibration.letter_probabilities(model, prompts, letters)[0], together, atol=1e-12, rtol=1e-6)


def test_float64_leaves_no_more_than_rounding():
    tokens = tiny.tokenizer()
    model = tiny.model("llama", vocab_size=len(tokens))
    prompts, letters = zip(*(calibration.tokenize(tokens, question) for question in QUESTIONS))
    together = calibration.letter_probabilities(model, prompts, letters)
    alone = [calibration.letter_probabilities(model, [p], [some]) for p, some in zip(prompts, letters)]
    for number, values in enumerate(together):
        assert np.abs(values - np.concatenate([one[number] for one in alone])).max() < 1e-12


# ---------------------------------------------------------------------------------------------------------------------
# files


def write(path, text):
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.write(text)
    return str(path)


ROW = {"question": "2?", "options": ["1", "2", "3", "4"], "answer": "B"}
HUB = {"question": "2?", "choices": ["1", "2", "3", "4"], "answer": 1}
ONE_OF_SIX = {"question": "?", "mc1_targets": {"right": 1} | {f"wrong {i}": 0 for i in range(5)}}


@pytest.mark.parametrize("name", ("q.jsonl", "q.jsonl.gz"))
def test_mmlu(tmp_path, name, capsys):
    path = write(tmp_path / name, json.dumps(ROW) + "\n" + json.dumps(ROW | {"options": ["a", "b"]}) + "\n")
    assert calibration.read_questions(path, 0) == [
        Question("2?", ["1", "2", "3", "4"], 1),
        Question("2?", ["a", "b"], 1),
    ]
    assert "2 questions, 1 of them with fewer than four choices" in capsys.readouterr().out


def test_mmlu_as_the_hub_has_it(tmp_path):
    """Rows of cais/mmlu, which count the answer from 0, through datasets' own to_json; the same questions by letter."""
    hub = [{"question": "2?", "subject": "s", "choices": list("1234"), "answer": index} for index in range(4)]
    path = tmp_path / "q.jsonl"
    Dataset.from_list(hub).to_json(path)
    letters = "".join(json.dumps(ROW | {"answer": letter}) + "\n" for letter in "ABCD")
    expected = calibration.read_questions(write(tmp_path / "letters.jsonl", letters), 0)
    assert calibration.read_questions(str(path), 0) == expected and [q.answer for q in expected] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ("q.json", "q.json.gz"))
def test_truthfulqa(tmp_path, name, capsys):
    """Three wrong ones drawn, the right one's place uniform, the same for the same seed."""
    two = {"question": "?", "mc1_targets": {"yes": 1, "no": 0}}
    path = write(tmp_path / name, json.dumps([two] + [ONE_OF_SIX] * 2000))
    questions = calibration.read_questions(path, 0)
    assert "2001 questions, 1 of them with fewer than four choices" in capsys.readouterr().out
    assert sorted(questions[0].options) == ["no", "yes"] and questions[0].options[questions[0].answer] == "yes"
    places = np.zeros(4)
    for question in questions[1:]:
        assert len(set(question.options)) == 4 and question.options[question.answer] == "right"
        places[question.answer] += 1
    assert (abs(places - 500) < 100).all()
    drawn = [sum(f"wrong {i}" in question.options for question in questions) for i in range(5)]
    assert all(abs(count - 1200) < 120 for count in drawn)
    assert calibration.read_questions(path, 0) == questions != calibration.read_questions(path, 1)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("q.csv", "", "expected a .jsonl or .json file"),
        ("q.jsonl", "", "row 1: not JSON"),
        ("q.jsonl", json.dumps(ROW) + "\n{\n", "row 2: not JSON"),
        ("q.jsonl", "[]", 'row 1: expected an object with "question"'),
        ("q.jsonl", json.dumps(ROW | {"options": list("12345")}), 'row 1: expected "options"'),
        ("q.jsonl", json.dumps(ROW | {"answer": "E"}), "row 1: \"answer\" is 'E', expected a letter from A to D"),
        ("q.jsonl", json.dumps(ROW | {"options": ["1", "2"], "answer": "C"}), "expected a letter from A to B"),
        ("q.jsonl", json.dumps(ROW | {"answer": 1}), 'row 1: "answer" is 1'),
        (
            "q.jsonl",
            json.dumps(HUB | {"answer": 4}),
            'row 1: "answer" is 4, expected a letter from A to D or a number from 0 to 3',
        ),
        ("q.jsonl", json.dumps(HUB | {"answer": -1}), 'row 1: "answer" is -1'),
        ("q.jsonl", json.dumps(HUB | {"answer": True}), 'row 1: "answer" is True'),
        ("q.jsonl", json.dumps(HUB | {"choices": ["1"]}), 'row 1: expected "choices"'),
        ("q.jsonl", json.dumps(ONE_OF_SIX), 'row 1: expected "options"'),
        ("q.json", json.dumps(ROW), "expected a list of questions"),
        ("q.json", "[]", "it is empty"),
        ("q.json", json.dumps([ROW]), 'row 1: expected "mc1_targets"'),
        ("q.json", json.dumps([ONE_OF_SIX, {"question": "?", "mc1_targets": {"a": 1, "b": 1}}]), "row 2: expected"),
        ("q.json", json.dumps([{"question": "?", "mc1_targets": {"a": "1", "b": 0}}]), "row 1: expected"),
        ("q.jsonl.gz", None, "Not a gzipped file"),
    ],
)
def test_bad_files(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text("no gzip") if text is None else write(path, text)
    with pytest.raises(SystemExit) as error:
        calibration.read_questions(str(path), 0)
    assert message in str(error.value) and "\n" not in str(error.value) and str(error.value).startswith("error: ")


def test_bad_arguments(tmp_path):
    with pytest.raises(SystemExit, match="belong together"):
        calibration.main(Args(model="somewhere"))
    with pytest.raises(SystemExit, match="no such file"):
        calibration.main(Args(model="somewhere", data=str(tmp_path / "q.json")))
    path = write(tmp_path / "q.jsonl", json.dumps(ROW))
    with pytest.raises(SystemExit, match="cannot load"):
        calibration.main(Args(model=str(tmp_path), data=path))
    model = tiny.write_model(tmp_path / "model", max_position_embeddings=64)
    with pytest.raises(SystemExit, match=r"a prompt has \d+ tokens, and the model takes 64 at most"):
        calibration.main(Args(model=str(model), data=path))


@pytest.mark.parametrize(
    ("name", "count", "few"), [("mmlu_stem.jsonl.gz", 3018, 0), ("truthfulqa_mc.json.gz", 817, 127)]
)
def test_real_files(name, count, few):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no {name} at hand")
    questions = calibration.read_questions(str(path), 0)
    assert len(questions) == count and sum(len(question.options) < 4 for question in questions) == few
    if count == 817:  # uniform places: the right answer is no longer always the first
        share = np.bincount([question.answer for question in questions if len(question.options) == 4]) / (count - few)
        assert (abs(share - 0.25) < 0.06).all()


# ---------------------------------------------------------------------------------------------------------------------
# whole


def test_tool_as_a_user_runs_it(tmp_path):
    """All four numbers, and the same ones when the questions come in another order."""
    rows = [ROW | {"question": f"{i}" * (1 + i % 7), "answer": "ABCD"[i % 4]} for i in range(40)]
    model = tiny.write_model(tmp_path / "model", template="qwen")
    printed = []
    for name, some in (("q.jsonl", rows), ("r.jsonl.gz", rows[::-1])):
        path = write(tmp_path / name, "".join(json.dumps(row) + "\n" for row in some))
        done = tiny.run("experiments/calibration.py", "--model", model, "--data", path)
        printed.append(done.stdout[done.stdout.index(", n = 40") :])
        assert "Traceback" not in done.stderr
    assert printed[0] == printed[1]
    for text in ("accuracy", "ECE, 15 bins", "if it were perfectly calibrated", "Brier", "probability of A-D"):
        assert text in printed[0]


def test_races_are_calibrated_by_their_odds():
    runners = calibration.make_runners()
    races = calibration.make_races(runners, 5000, random.Random(5))
    chances = np.array([calibration.odds(runners, race.options) for race in races])
    result = calibration.metrics(chances, np.array([race.answer for race in races]), np.ones(5000))
    assert result.ece < 1.6 * result.floor and 0.5 < result.accuracy < 0.75


def test_fast_version(tmp_path, inside):
    calibration.main(Args(fast=True, results=str(tmp_path / "results"), runs=str(tmp_path / "runs")))
    verdicts = json.loads((tmp_path / "results/calibration.json").read_text())["verdicts"]
    assert [verdict["claim"] for verdict in verdicts] == [11, 11, 11]
    assert (tmp_path / "results/calibration.png").stat().st_size > 10_000
    text = (tmp_path / "results/calibration.md").read_text()
    assert "| base |" in text and "| true odds |" in text and "| 4, from the base |" in text
    assert "| overconfident base |" in text and "| 4, from the overconfident base |" in text
    assert json.loads((tmp_path / "runs/base-4-0/args.json").read_text())["alpha"] == pytest.approx(0.4)
    base = tmp_path / "runs/base"
    tokens, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    question = Question("Who won the race?", list(calibration.make_runners())[:4], 0)
    prompt, letters = calibration.tokenize(tokens, question)
    assert tokens.convert_ids_to_tokens(letters) == [" A", " B", " C", " D"] and 0 not in prompt
    assert calibration.letter_probabilities(model, [prompt], [letters])[1] > 0.5


def test_noise_of_a_difference_of_errors():
    """Against the scatter over fresh questions, for two models that agree on most; with itself a model has none."""
    rng = np.random.default_rng(0)
    some = calibration.metrics(np.full((1, 4), 0.25), np.zeros(1, int), np.ones(1))
    differences, noises = [], []
    for _ in range(100):
        confidence = rng.uniform(0.3, 1, 4000)
        right = rng.random(4000) < 0.95 * confidence
        base = replace(some, confidence=confidence, right=right)
        other = replace(
            base,
            confidence=(confidence + 0.03 * rng.normal(size=4000)).clip(0.25, 0.999),
            right=np.where(rng.random(4000) < 0.9, right, rng.random(4000) < 0.95 * confidence),
        )
        errors = [calibration.calibration_error(model.confidence, model.right) for model in (base, other)]
        differences.append(errors[1] - errors[0])
        noises.append(calibration.ece_noise(base, [other], draws=30))
    assert 0.8 < np.mean(noises) / np.std(differences) < 1.5  # errs on the large side, as ECE is never below zero
    assert calibration.ece_noise(base, [base, base], draws=5) == 0


@pytest.mark.parametrize(
    ("ece", "accuracy_at_4", "holds"),
    [
        ({1: 0.3, 2: 0.2, 4: 0.1}, 0.49, [True, True]),
        ({1: 0.3, 2: 0.2, 4: 0.1}, 0.47, [False, True]),  # accuracy lost
        ({1: 0.3, 2: 0.1, 4: 0.2}, 0.49, [False, True]),  # rises again
        ({1: 0.3, 2: 0.295, 4: 0.29}, 0.49, [False, False]),  # within the seeds, and never below the base
        ({1: 0.14, 2: 0.12, 4: 0.1}, 0.49, [True, False]),  # DPO not above the base
    ],
)
def test_verdicts(ece, accuracy_at_4, holds):
    """The base has 0.15; three seeds scatter over 0.02; DPO's accuracy is 0.5."""
    some = calibration.metrics(np.full((4, 4), 0.25), np.arange(4), np.ones(4))
    runs = {
        ratio: [replace(some, ece=value + d, accuracy=accuracy_at_4 if ratio == 4 else 0.5) for d in (-0.01, 0, 0.01)]
        for ratio, value in ece.items()
    }
    found = calibration.judge_sweep(runs), calibration.judge(replace(some, ece=0.15), runs, "the base")
    assert [verdict.holds for verdict in found] == holds
