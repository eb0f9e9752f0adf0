"""Numbers from samples: pass@k, majority votes and their intervals; how different the samples of one prompt are."""

import math
import re
from collections import Counter, defaultdict

import numpy as np


def pass_at_k(n: int, c: int, k: int) -> float:
    """The unbiased estimate of the chance that k samples hold a right one, from n samples with c right ones.

    1 - C(n-c, k) / C(n, k) as a product of the fewer factors: k of (1 - c/i), or c of (1 - k/i).
    """
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= c <= n, got n={n}, c={c}, k={k}")
    if c + k > n:
        return 1.0
    few, other = (k, c) if k < c else (c, k)
    return 1.0 - math.prod(1.0 - other / i for i in range(n - few + 1, n + 1))


def bootstrap(values, seed: int = 0, draws: int = 4000) -> dict:
    """The mean of one value per problem, and its 95% interval: percentiles over problems drawn with replacement."""
    values, rng = np.asarray(values, dtype=float), np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=(100, len(values)))].mean(1) for _ in range(draws // 100)]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def maj_at_k(answers: list[str | None], right: list[bool], k: int, seed: int = 0) -> float:
    """Chance that the most frequent answer among k samples is right; ties are drawn by lot, no answer has no vote.

    Right answers vote together, however spelled. Exact for k = 1 and k = n, else the mean over random subsets: 200 of
    them, more where k is small.
    """
    if not 1 <= k <= len(answers):
        raise ValueError(f"maj@k needs 1 <= k <= n, got n={len(answers)}, k={k}")
    if k == 1:
        return sum(right) / len(right)
    labels = ["" if ok else answer for answer, ok in zip(answers, right)]  # no wrong answer is the empty text
    names = ["", *sorted({*labels} - {"", None})]
    numbers = np.array([-1 if label is None else names.index(label) for label in labels])
    votes = numbers[:, None] == np.arange(len(names))  # (n, names)
    order = np.arange(k)[None]  # (subsets, k)
    if k < len(labels):
        draws = max(200, 20_000 // k)
        order = np.random.default_rng(seed).random((draws, len(labels))).argpartition(k - 1, axis=1)[:, :k]
    totals = votes[order].sum(1)  # (subsets, names)
    top = totals.max(1, keepdims=True)
    winners = (totals == top) & (top > 0)
    return float((winners[:, 0] / winners.sum(1).clip(min=1)).mean())


def words(text: str) -> list[str]:
    """The tokens of Self-BLEU and Distinct: runs of letters and digits, and each other sign alone."""
    return re.findall(r"\w+|[^\w\s]", text)


def ngrams(tokens: list[str], order: int) -> Counter:
    return Counter(zip(*(tokens[i:] for i in range(order))))


def self_bleu(responses: list[list[str]], order: int = 4) -> float:
    """Mean BLEU of each response against all others (Zhu et al. 2018), uniform weights, smoothing method 1 (0.1).

    BLEU clips each n-gram at its largest count in one other response. That, or the own count where it is smaller, is
    min(own count, second largest count of all responses).
    """
    if len(responses) < 2:
        return math.nan
    scores, lengths = [0.0] * len(responses), [len(response) for response in responses]
    for size in range(1, order + 1):
        counts, top = [ngrams(response, size) for response in responses], defaultdict(lambda: [0, 0])
        for gram, times in (item for count in counts for item in count.items()):
            top[gram] = sorted([*top[gram], times])[1:]  # the two largest
        for i, count in enumerate(counts):
            hits = sum(min(times, top[gram][0]) for gram, times in count.items())
            none = size == 1 and hits == 0  # no word in common with any other: 0, as in nltk
            scores[i] += -math.inf if none else math.log((hits or 0.1) / max(1, sum(count.values()))) / order
    for i, length in enumerate(lengths):
        closest = min(lengths[:i] + lengths[i + 1 :], key=lambda other: (abs(other - length), other))
        scores[i] += min(0.0, 1 - closest / length) if length else 0.0
    return float(np.exp(scores).mean())


def distinct(responses: list[list[str]], order: int) -> float:
    """Share of different n-grams among all n-grams of a prompt's responses, pooled (Li et al. 2016)."""
    pooled = sum((ngrams(response, order) for response in responses), Counter())
    return len(pooled) / pooled.total() if pooled else 0.0


def embedding_distance(vectors) -> float:
    """1 - |mean of the unit vectors|^2: the mean cosine distance of all pairs, i = j included (DPL Eq. 44)."""
    vectors = np.asarray(vectors, dtype=float)
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return float(1 - np.square(vectors.mean(0)).sum())


def diversity(args, settings: dict, rows: list[list[dict]], embed=None) -> dict:
    """Diversity of the first samples of each problem, averaged over problems; rows[i][j] is sample j of problem i."""
    rows = [row[: args.diversity_samples] for row in rows]
    tokens = [[words(r["text"]) for r in row] for row in rows]
    result = {"samples_per_problem": len(rows[0]), "tokeniser": r"\w+|[^\w\s]", "self_bleu_order": 4}
    result |= {"entropy": None, "nll_per_token": None}  # samples from elsewhere come without log-probs
    if "logp" in rows[0][0]:
        nll = np.mean([[-r["logp"] / max(1, r["tokens"]) for r in row] for row in rows])
        # an entropy only where samples come from the very distribution that scores them
        plain = [settings[name] for name in ("temperature", "top_p", "top_k", "min_p")] == [1, 1, 0, 0]
        result |= {"entropy": nll if plain else None, "nll_per_token": nll}
        result["mean_tokens"] = np.mean([[r["tokens"] for r in row] for row in rows])
    if args.ref_model:
        result["ref_model"] = args.ref_model
        result["cross_entropy"] = np.mean([[-r["ref_logp"] for r in row] for row in rows])  # H(pi, ref), DPL Eq. 4
        each_token = [[-r["ref_logp"] / max(1, r["ref_tokens"]) for r in row] for row in rows]
        result["cross_entropy_per_token"] = np.mean(each_token)
    result["self_bleu"] = np.mean([self_bleu(t) for t in tokens]) if len(rows[0]) > 1 else None
    result |= {f"distinct_{order}": np.mean([distinct(t, order) for t in tokens]) for order in (1, 2)}
    result["mean_words"] = np.mean([[len(t) for t in row] for row in tokens])
    if embed:
        result["embedding_distance"] = np.mean([embedding_distance(embed([r["text"] for r in row])) for row in rows])
    return {name: float(value) if isinstance(value, np.floating) else value for name, value in result.items()}


def measure(args, settings: dict, ks: list[int], problems, rows, grades, embed=None) -> dict:
    """Everything about one temperature. rows[i][j] is sample j of problem i, grades[i][j] its (right, answer, how).

    Without answers to grade by, grades is None, and what needs them is left out.
    """
    result = {"settings": settings, "n": len(rows[0])}
    result["ended_by"] = dict(Counter(r["end"] for row in rows for r in row))  # length: cut off
    result["diversity"] = diversity(args, settings, rows, embed)
    result["problems"] = [{"id": p["id"], "n": len(row), "group": p["group"]} for p, row in zip(problems, rows)]
    if grades is None:
        return result
    right, answers, how = ([[grade[part] for grade in row] for row in grades] for part in range(3))
    for problem, row in zip(result["problems"], right):
        problem["c"] = sum(row)
    passes = {k: [pass_at_k(len(row), sum(row), k) for row in right] for k in ks}
    result["pass@k"] = {k: bootstrap(passes[k], args.seed) for k in ks}
    if args.task != "humaneval":
        votes = {k: [maj_at_k(a, ok, k, args.seed) for a, ok in zip(answers, right)] for k in ks}
        result["maj@k"] = {k: bootstrap(votes[k], args.seed) for k in ks}
        different = [len(set(row) - {None}) / len(row) for row in answers]
        result["diversity"]["distinct_answers"] = float(np.mean(different))
    result["splits"] = {}
    for group in sorted({problem["group"] for problem in problems} - {None}):
        members = [i for i, problem in enumerate(problems) if problem["group"] == group]
        cells = {k: bootstrap([passes[k][i] for i in members], args.seed) for k in ks}
        result["splits"][group] = {"problems": len(members), "pass@k": cells}
    result["found_by"] = dict(Counter(name for row in how for name in row))
    return result


def paired_difference(a: dict, b: dict, k: int, seed: int = 0) -> dict | None:
    """pass@k of b minus a over the problems of both, at one temperature, with the interval of the paired difference."""
    counts = [{p["id"]: (p["n"], p["c"]) for p in side["problems"]} for side in (a, b)]
    shared = sorted(counts[0].keys() & counts[1].keys())
    if not shared or any(side[i][0] < k for side in counts for i in shared):
        return None
    values = [pass_at_k(*counts[1][i], k) - pass_at_k(*counts[0][i], k) for i in shared]
    return {"problems": len(shared), "k": k} | bootstrap(values, seed)
