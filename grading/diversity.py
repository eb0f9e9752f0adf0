"""How different the samples of one prompt are: Self-BLEU, Distinct-n, embedding distance."""

import math
import re
from collections import Counter

import numpy as np


def words(text: str) -> list[str]:
    """The tokens of Self-BLEU and Distinct: runs of letters and digits, and each other sign alone."""
    return re.findall(r"\w+|[^\w\s]", text)


def ngrams(tokens: list[str], order: int) -> Counter:
    return Counter(zip(*(tokens[i:] for i in range(order))))


def self_bleu(responses: list[list[str]], order: int = 4) -> float:
    """Mean BLEU of each response against all others (Zhu et al. 2018), uniform weights, smoothing method 1 (0.1).

    BLEU clips each n-gram at its largest count in one reference. The two largest counts over all responses give that
    for each response: the largest, or where the response itself holds it, the second.
    """
    if len(responses) < 2:
        return math.nan
    logs = np.zeros(len(responses))
    silent = np.zeros(len(responses), dtype=bool)  # no word in common with any other: 0, as in nltk
    for size in range(1, order + 1):
        counts = [ngrams(response, size) for response in responses]
        first, second = {}, {}  # n-gram -> largest count and its owner, second largest count
        for owner, count in enumerate(counts):
            for gram, times in count.items():
                best = first.get(gram, (0, -1))
                if times > best[0]:
                    first[gram], second[gram] = (times, owner), best[0]
                elif times > second.get(gram, 0):
                    second[gram] = times
        for owner, count in enumerate(counts):
            hits = 0
            for gram, times in count.items():
                most, whose = first[gram]
                hits += min(times, second[gram] if whose == owner else most)
            silent[owner] |= size == 1 and hits == 0
            logs[owner] += math.log((hits or 0.1) / max(1, sum(count.values()))) / order
    lengths = [len(response) for response in responses]
    spread = Counter(lengths)
    for owner, length in enumerate(lengths):
        others = [other for other, times in spread.items() if times > (other == length)]
        closest = min(others, key=lambda other: (abs(other - length), other))
        if length <= closest and length:
            logs[owner] += min(0.0, 1 - closest / length)
    return float(np.where(silent, 0.0, np.exp(logs)).mean())


def distinct(responses: list[list[str]], order: int) -> float:
    """Share of different n-grams among all n-grams of a prompt's responses, pooled (Li et al. 2016)."""
    pooled = sum((ngrams(response, order) for response in responses), Counter())
    return len(pooled) / pooled.total() if pooled else 0.0


def embedding_distance(vectors) -> float:
    """1 - |mean of the unit vectors|^2: the mean cosine distance of all pairs, i = j included (DPL Eq. 44)."""
    vectors = np.asarray(vectors, dtype=float)
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return float(1 - np.square(vectors.mean(0)).sum())
