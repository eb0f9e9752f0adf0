"""pass@k against exact arithmetic, intervals against simulated problems, diversity against independent code."""

import itertools
import math
import random
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import eval_passk  # noqa: E402
from grading.metrics import (  # noqa: E402
    bootstrap,
    distinct,
    diversity,
    embedding_distance,
    maj_at_k,
    measure,
    paired_difference,
    pass_at_k,
    self_bleu,
    words,
)

TEXTS = [
    "The sum of 3 and 4 is 7, so the answer is 7.",
    "The sum of 3 and 4 is 8, so the answer is 8.",
    "the the the the the the",
    "Add 3 to 4. That makes 7.",
    "Seven",
    "",
    "The sum of 3 and 4 is 7, so the answer is 7.",
    "3 + 4 = 7\n#### 7",
    "zebra",
]


def exact(n, c, k):
    return 1 - Fraction(math.comb(n - c, k), math.comb(n, k))


def test_pass_at_k_equals_exact_arithmetic_for_all_n_up_to_50():
    """n = 2, c = 1, k = 1: 1 - C(1,1)/C(2,1) = 1/2. 44,000 cases."""
    assert pass_at_k(2, 1, 1) == 0.5
    for n in range(1, 51):
        for c in range(n + 1):
            for k in range(1, n + 1):
                assert abs(pass_at_k(n, c, k) - float(exact(n, c, k))) < 1e-14
            assert math.isclose(pass_at_k(n, c, 1), c / n, abs_tol=1e-15)


def test_pass_at_k_at_ten_thousand():
    for c, k in itertools.product((0, 1, 2, 17, 500, 5000, 9990, 10_000), (1, 2, 10, 100, 5000, 9999, 10_000)):
        assert abs(pass_at_k(10_000, c, k) - float(exact(10_000, c, k))) < 1e-12


def test_pass_at_k_refuses_k_above_n():
    for n, c, k in ((5, 0, 6), (5, 5, 6), (5, 6, 1), (5, -1, 1), (5, 1, 0)):
        with pytest.raises(ValueError):
            pass_at_k(n, c, k)


def test_intervals_cover():
    """80 problems with Beta(0.5, 1) chances, 16 samples: the interval holds the true pass@4 in 91 to 98% of 300 tries.

    E[1 - (1-p)^4] for Beta(a, b) is 1 - B(a, b+4)/B(a, b).
    """
    rng = np.random.default_rng(0)
    gamma = math.lgamma
    truth = 1 - math.exp(gamma(5) + gamma(1.5) - gamma(5.5) - gamma(1))
    table = np.array([pass_at_k(16, c, 4) for c in range(17)])
    hits = 0
    for trial in range(300):
        values = table[rng.binomial(16, rng.beta(0.5, 1.0, size=80))]
        cell = bootstrap(values, seed=trial, draws=600)
        hits += cell["low"] <= truth <= cell["high"]
    assert 0.91 <= hits / 300 <= 0.98


def test_intervals_of_paired_differences_cover_and_are_narrower():
    """b solves what a solves with 0.1 more of the rest: the true difference of pass@1 is 0.1 E[1-p] = 0.05."""
    rng = np.random.default_rng(1)
    hits, paired_width, alone_width = 0, 0.0, 0.0
    for trial in range(200):
        p = rng.beta(1, 1, size=80)
        sides = [rng.binomial(64, q) for q in (p, p + 0.1 * (1 - p))]
        a, b = ({"problems": [{"id": str(i), "n": 64, "c": int(c)} for i, c in enumerate(side)]} for side in sides)
        b["problems"] = b["problems"][::-1] + [{"id": "other", "n": 64, "c": 0}]
        d = paired_difference(a, b, 1, seed=trial)
        assert d["problems"] == 80 and math.isclose(d["mean"], (sides[1] - sides[0]).mean() / 64, abs_tol=1e-12)
        hits += d["low"] <= 0.05 <= d["high"]
        paired_width += d["high"] - d["low"]
        alone = bootstrap(sides[1] / 64 - rng.permutation(sides[0]) / 64, seed=trial, draws=400)
        alone_width += alone["high"] - alone["low"]
    assert 0.90 <= hits / 200 <= 0.985
    assert paired_width < 0.4 * alone_width
    assert paired_difference(a, {"problems": [{"id": "x", "n": 1, "c": 1}]}, 1) is None


def test_maj_at_k():
    """k = 1 and k = n are exact; between them it comes near the mean over all subsets."""
    answers = ["7", "7", "8", None, "8", "7.0"]
    right = [True, True, False, False, False, True]  # 7.0 is right as well: three votes for 7, two for 8
    assert maj_at_k(answers, right, 6) == 1.0
    assert maj_at_k(["8", "8", "7"], [False, False, True], 3) == 0.0
    assert maj_at_k(["8", "7"], [False, True], 2) == 0.5  # a tie is drawn by lot
    assert maj_at_k([None, None, None], [False] * 3, 3) == 0.0
    expected = []
    for subset in itertools.combinations(range(6), 3):
        sevens, eights = sum(right[i] for i in subset), sum(answers[i] == "8" for i in subset)
        expected.append(1.0 if sevens > eights else 0.5 if sevens == eights > 0 else 0.0)
    assert abs(maj_at_k(answers, right, 3) - np.mean(expected)) < 0.02
    assert maj_at_k(answers, right, 1) == 0.5, "one vote is pass@1, exactly"
    pairs = list(itertools.combinations(range(6), 2))
    two = np.mean([maj_at_k([answers[i] for i in pair], [right[i] for i in pair], 2) for pair in pairs])
    assert abs(maj_at_k(answers, right, 2) - two) < 0.015
    with pytest.raises(ValueError):
        maj_at_k(answers, right, 7)


def test_equal_wrong_answers_vote_together():
    """0.5 and 1/2 have two votes against one for 7 and one for 8, in GSM8K as in MATH."""
    for task, texts in (
        ("gsm8k", ["#### 0.5", "The answer is 1/2.", "#### 7", "#### 8"]),
        ("math", ["\\boxed{0.5}", "\\boxed{\\frac12}", "\\boxed{7}", "\\boxed{8}"]),
        ("math", ["\\boxed{x+1}", "\\boxed{1+x}", "\\boxed{7}", "\\boxed{8}"]),
        ("math", ["\\boxed{1,2}", "\\boxed{2 \\text{ and } 1}", "\\boxed{7}", "\\boxed{\\text{Even}}"]),
    ):
        grades = [eval_passk.grade(task, {"reference": "7"}, text) for text in texts]
        right, answers = [ok for ok, _, _ in grades], [answer for _, answer, _ in grades]
        assert right == [False, False, True, False] and answers[0] == answers[1] != answers[3]
        assert maj_at_k(answers, right, 4) == 0.0
    assert eval_passk.grade("math", {"reference": "\\boxed{\\text{even}}"}, "no answer") == (False, None, "none")


def test_self_bleu_equals_nltk():
    bleu = pytest.importorskip("nltk.translate.bleu_score")
    rng = random.Random(0)
    noise = [[rng.choice("abc") for _ in range(rng.randrange(0, 14))] for _ in range(20)]
    for responses in ([words(t) for t in TEXTS], noise, noise[:2], [words(TEXTS[0])] * 3):
        smooth = bleu.SmoothingFunction().method1
        values = [
            bleu.sentence_bleu(responses[:i] + responses[i + 1 :], response, smoothing_function=smooth)
            for i, response in enumerate(responses)
        ]
        assert math.isclose(self_bleu(responses), float(np.mean(values)), rel_tol=1e-12)


def test_distinct_equals_plain_counting():
    responses = [words(t) for t in TEXTS]
    for order in (1, 2):
        grams = [tuple(r[i : i + order]) for r in responses for i in range(len(r) - order + 1)]
        assert distinct(responses, order) == len(set(grams)) / len(grams)
    assert words("38*6=228. It's $5") == ["38", "*", "6", "=", "228", ".", "It", "'", "s", "$", "5"]
    assert distinct([[]], 1) == 0.0


def test_embedding_distance_equals_the_mean_over_all_pairs():
    vectors = np.random.default_rng(0).normal(size=(7, 5))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert math.isclose(embedding_distance(vectors), 1 - np.mean([a @ b for a in unit for b in unit]), rel_tol=1e-12)


def test_entropy_and_splits():
    """Entropy is the mean over responses of -log-prob / tokens: (6/3 + 4/2 + 1/1 + 3/1) / 4; only at temperature 1."""
    args = eval_passk.Args(task="x.jsonl", n=2)
    settings = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    rows = [
        [
            {"text": "#### 1", "tokens": 3, "logp": -6.0, "end": "eos"},
            {"text": "2", "tokens": 2, "logp": -4.0, "end": "eos"},
        ],
        [
            {"text": "no", "tokens": 1, "logp": -1.0, "end": "length"},
            {"text": "", "tokens": 1, "logp": -3.0, "end": "stop"},
        ],
    ]
    problems = [{"id": "a", "group": "easy"}, {"id": "b", "group": None}]
    grades = [[(True, "1", "marker"), (False, "2", "last number")], [(False, None, "none"), (False, None, "none")]]
    embed = lambda texts: np.eye(2)  # noqa: E731
    result = measure(args, settings, [1, 2], problems, rows, grades, embed)
    assert result["diversity"]["entropy"] == 2.0 and result["diversity"]["embedding_distance"] == 0.5
    assert result["diversity"]["distinct_answers"] == 0.5  # (2/2 + 0/2) / 2
    assert result["pass@k"][1]["mean"] == 0.25 and result["pass@k"][2]["mean"] == 0.5
    assert result["splits"]["easy"]["problems"] == 1 and result["splits"]["easy"]["pass@k"][2]["mean"] == 1.0
    assert result["found_by"] == {"marker": 1, "last number": 1, "none": 2}
    assert result["ended_by"] == {"eos": 2, "length": 1, "stop": 1}
    for change in ({"temperature": 0.5}, {"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.1}):
        assert diversity(args, settings | change, rows)["entropy"] is None
    without = measure(args, settings, [], problems, rows, None)  # a task without answers
    assert without["diversity"]["entropy"] == 2.0 and without["ended_by"] == result["ended_by"]
    assert not {"pass@k", "maj@k", "splits", "found_by"} & set(without)
