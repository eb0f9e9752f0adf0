"""Lengths of preference pairs, in tokens, as four kinds of data sets have them.

These are synthetic: samples of log-normal distributions with the medians and means below, drawn from a fixed seed. They
have the shape of the data they are named after (typical length, long tail), and are not counts of its rows: those
depend on the tokenizer and on the filtering. `python benchmarks/lengths.py` prints what was drawn.
"""

import math
import random
from statistics import mean, median

# name: (median, mean) of the prompt's and of a response's tokens; a larger mean is a longer tail
DISTRIBUTIONS = {
    "hh": ((90, 103), (33, 43)),  # HH-RLHF, harmless: short dialogues, short answers
    "ultrafeedback": ((120, 180), (270, 320)),  # responses longer than prompts
    "tldr": ((340, 350), (34, 37)),  # long posts, summaries of a sentence or two
    "worst": ((15, 16), (240, 260)),  # nearly nothing to share
}
LONGEST = 2048  # tokens of prompt and response together, as most recipes cut them


def draw(rng: random.Random, middle: float, average: float, shortest: int) -> int:
    """One length: a log-normal variable has the median e^mu and the mean e^(mu + sigma^2 / 2)."""
    sigma = math.sqrt(2 * math.log(average / middle))
    return min(LONGEST // 2, max(shortest, round(rng.lognormvariate(math.log(middle), sigma))))


def pair_lengths(name: str, count: int = 256) -> list[tuple[int, int, int]]:
    """Tokens of (prompt, chosen, rejected) for `count` pairs; the same ones at every call."""
    prompt, response = DISTRIBUTIONS[name]
    rng = random.Random(f"lengths of {name}")  # a string seeds in the same way in every process
    return [(draw(rng, *prompt, 4), draw(rng, *response, 2), draw(rng, *response, 2)) for _ in range(count)]


def describe(name: str) -> str:
    prompts, chosen, rejected = zip(*pair_lengths(name))
    responses = chosen + rejected
    return ", ".join(
        f"{what} median {median(values):.0f} mean {mean(values):.0f} longest {max(values)}"
        for what, values in (("prompt", prompts), ("response", responses))
    )


if __name__ == "__main__":
    for name in DISTRIBUTIONS:
        print(f"{name:<14}{describe(name)}")
