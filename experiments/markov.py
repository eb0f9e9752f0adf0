"""Likelihood displacement from log-probs like the papers': a small Markov language, made on the spot (claims 6, 7, 15)

    DGPO    https://openreview.net/forum?id=wmi6satsIu    Fig. 1, 2, Table 3: DPO lowers the chosen log-prob, DGPO
            raises it; Sec. 2.3, Fig. 8: irrelevant rejected responses "alleviate" what DPO does
    DPO-PG  https://arxiv.org/abs/2505.23761              Fig. 8, 9: chosen up, rejected not up, and DPO's loss falls

    python experiments/markov.py        (two CPU cores, about five minutes)

The toy of displacement.py is nearly sure of the chosen response, the papers' models give its tokens about e^-1. Here a
text is a walk over six letters, its topic, from one to the next with random probabilities; there are eight topics. The
prompt is its first 4 letters, the response the other 16. A Llama of two layers learns that by supervision. Pairs:

    near-duplicates    a response in which two letters are drawn anew, twice, each given its neighbours; the one later
                       in the alphabet goes to chosen, the other to rejected
    unrelated          rejected is another prompt's
    meaningless        rejected has its letters in a random order

So both responses of a near-duplicate are drawn from the language alike, and the preference is a rule that holds on new
texts, too. Each seed has a language, a model and pairs of its own; each run takes 200 steps of 16 pairs. Methods and
pairs differ in speed, so the chosen log-prob is compared twice: after as many steps, and where the margin (log-ratio of
chosen less that of rejected, on held-out pairs) has first grown by 3 nats a response. Between two evaluations, ten
steps apart, that is read off a straight line; with unrelated responses the margin can grow by more than 3 nats from one
to the next, and as the chosen log-prob falls ever faster, the line then has it too low.
"""

import json
import random
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean

import report
import torch
import tyro
from displacement import METHODS, change, claim_6, claim_7, course, draw_courses, rows_of, train
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

KINDS = ("unrelated", "meaningless")
ALL = (*METHODS, *(f"DPO, {kind}" for kind in KINDS))
# By pilot runs DPO displaces at both of its rates and gains the margin at the higher one within 200 steps.
RATES = dict.fromkeys(("DPO", "DGPO"), (1e-4, 3e-4)) | {"DPO-PG": (3e-5, 3e-4)} | dict.fromkeys(ALL[3:], (3e-4,))
HIGHEST = 3e-4
MARGIN = 3.0  # nats of a response

TOPICS, LETTERS = 8, 6
PROMPT, RESPONSE = 4, 16  # letters
PAIRS = {"train": 1600, "test": 64}
SUPERVISED_STEPS = 400

CLAIM_15 = (
    f"at lr {HIGHEST:g}, {{}}: DPO has lowered the chosen log-prob on near-duplicates, and less with the other "
    "rejected responses, each by more than two standard errors over seeds"
)


@dataclass
class Args:
    seeds: int = 3
    """Languages, each with its model, its pairs and a run of each kind"""
    steps: int = 200
    """Optimizer steps of a run"""
    runs: str = "runs/markov"
    """Where the models, the pairs and the runs go"""
    results: str = str(report.RESULTS)
    """Where the table and the figure go"""
    fast: bool = False
    """One rate and hardly any supervision, to see that it runs; its verdicts mean nothing"""


def language(topics: int, letters: int, generator: torch.Generator) -> Tensor:
    """Probabilities (letters of all topics, same) of the next letter; none leads out of its topic."""
    return torch.block_diag(*torch.randn(topics, letters, letters, generator=generator).softmax(-1))


def walk(chain: Tensor, first: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Texts (texts, length) that begin with the letters `first` (texts,)."""
    text = [first]
    while len(text) < length:
        text.append(torch.multinomial(chain[text[-1]], 1, generator=generator)[:, 0])
    return torch.stack(text, 1)


def near_duplicates(chain: Tensor, texts: Tensor, places: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Chosen and rejected (texts, length): at each of the places (texts, places), which are no neighbours, two letters
    are drawn given the ones beside; the later one goes to chosen. None is the first or the last of its text."""
    chosen, rejected, row = texts.clone(), texts.clone(), torch.arange(len(texts))
    for place in places.T:
        odds = chain[texts[row, place - 1]] * chain[:, texts[row, place + 1]].T  # (texts, letters)
        two = torch.multinomial(odds, 2, generator=generator)
        chosen[row, place], rejected[row, place] = two.max(1).values, two.min(1).values
    return chosen, rejected


def spell(texts: Tensor) -> list[str]:
    """A character for each letter."""
    return ["".join(chr(ord("A") + letter) for letter in text) for text in texts.tolist()]


def turns(text: str) -> list[dict]:
    return [{"role": "user", "content": text[:PROMPT]}, {"role": "assistant", "content": text[PROMPT:]}]


def supervise(tokenizer, chain: Tensor, steps: int, generator: torch.Generator) -> LlamaForCausalLM:
    """A model that has learned the responses from `steps` batches of fresh texts."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        first = torch.randint(len(chain), (64,), generator=generator)
        texts = map(turns, spell(walk(chain, first, PROMPT + RESPONSE, generator)))
        ids = torch.tensor(tokenizer.apply_chat_template(list(texts), return_dict=False))
        labels = ids.clone()
        labels[:, : -RESPONSE - 1] = -100  # the end token belongs to the response
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model


def write_pairs(path: Path, chain: Tensor, count: int, generator: torch.Generator) -> None:
    """A file of `count` near-duplicate pairs, in messages."""
    texts = walk(chain, torch.randint(len(chain), (count,), generator=generator), PROMPT + RESPONSE, generator)
    half = PROMPT + RESPONSE // 2
    places = [torch.randint(*span, (count,), generator=generator) for span in ((PROMPT, half - 1), (half, half + 7))]
    both = near_duplicates(chain, texts, torch.stack(places, 1), generator)
    with path.open("w") as file:
        for chosen, rejected in zip(*map(spell, both)):
            prompt, answer = turns(chosen)
            row = {"prompt": [prompt], "chosen": [answer], "rejected": turns(rejected)[1:]}
            file.write(json.dumps(row) + "\n")


def exchange(kind: str, source: Path, target: Path) -> Path:
    """The pairs of `source` with other rejected responses: of the next pair in a random order, or scrambled."""
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    rng = random.Random(0)
    texts = [row["rejected"][0]["content"] for row in rows]
    if kind == "unrelated":
        order = rng.sample(range(len(rows)), len(rows))
        others = {here: texts[there] for here, there in zip(order, order[1:] + order[:1])}
    else:
        others = {i: "".join(rng.sample(text, len(text))) for i, text in enumerate(texts)}
    with target.open("w") as file:
        for i, row in enumerate(rows):
            file.write(json.dumps(row | {"rejected": [{"role": "assistant", "content": others[i]}]}) + "\n")
    return target


def make(seed: int, args: Args) -> tuple[Path, dict[str, dict[str, Path]]]:
    """A language: the directory of its model, and its files of pairs for each of the methods."""
    folder = Path(args.runs, f"language-{seed}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    chain = language(TOPICS, LETTERS, generator)
    tokenizer = AutoTokenizer.from_pretrained(report.TOY / "model")  # a token for each character
    for part in (supervise(tokenizer, chain, 20 if args.fast else SUPERVISED_STEPS, generator), tokenizer):
        part.save_pretrained(folder / "model")
    near = {part: folder / f"near_{part}.jsonl" for part in PAIRS}
    for part, count in PAIRS.items():
        write_pairs(near[part], chain, 64 if args.fast else count, generator)
    data = dict.fromkeys(METHODS, near)
    for kind in KINDS:
        data[f"DPO, {kind}"] = {part: exchange(kind, near[part], folder / f"{kind}_{part}.jsonl") for part in near}
    return folder / "model", data


def against_margin(folder: Path) -> tuple[list[float], list[float]]:
    """At every evaluation: growth of the margin in nats a response, and change of the chosen log-prob per token."""
    chosen, rejected = (course(folder, f"logps/{name}")[1] for name in ("chosen", "rejected"))
    return [(RESPONSE + 1) * (a - b) for a, b in zip(chosen, rejected)], chosen


def at_margin(margins: list[float], changes: list[float], margin: float) -> float | None:
    """The change where the margin first reaches a value, interpolated between evaluations; None where it does not."""
    for i, after in enumerate(margins[1:], 1):
        if after >= margin:
            share = (margin - margins[i - 1]) / (after - margins[i - 1])
            return changes[i - 1] + share * (changes[i] - changes[i - 1])
    return None


def draw(folders: dict, shown: float, seeds: int):
    """Above, log-probs over the steps at the rate `shown`. Below, the chosen one against the margin."""
    figure, axes = report.axes(2, len(ALL), width=13, height=2.9)
    draw_courses(axes[0], folders, shown, seeds)
    for axis, method in zip(axes[1], ALL):
        axis.sharey(axes[1, 0])
        for seed in range(seeds):
            line = against_margin(folders[method, shown, seed])
            axis.plot(*line, color=report.COLOURS[method.split(",")[0]], alpha=0.8)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.axvline(MARGIN, color="black", linewidth=0.8, linestyle=":")
        axis.set(xlabel="margin, nats of a response", xlim=(0, 4 * MARGIN))
    axes[1, 0].set_ylabel("change of chosen")
    return figure


def main(args: Args) -> None:
    torch.set_num_threads(1)  # the order of sums, and with it the models, would depend on their number
    made = [make(seed, args) for seed in range(args.seeds)]
    runs = [(method, rate) for method in ALL for rate in RATES[method] if rate == HIGHEST or not args.fast]
    keys = [(*run, seed) for run in runs for seed in range(args.seeds)]

    def job(method, rate, seed):
        model, data = made[seed]
        return train(method, rate, seed, args, model, data[method], evaluations=20)

    folders = dict(zip(keys, report.side_by_side([lambda key=key: job(*key) for key in keys])))

    def ends(method, rate, name="logps/chosen"):
        return [change(folders[method, rate, seed], name) for seed in range(args.seeds)]

    def at_equal_margin(method, rate):
        found = [at_margin(*against_margin(folders[method, rate, seed]), MARGIN) for seed in range(args.seeds)]
        return None if None in found else found

    rows = rows_of(folders, args.seeds)
    for row, (method, rate) in zip(rows, runs):
        row.append(report.spread(found, 4) if (found := at_equal_margin(method, rate)) else "not reached")

    def start(method, name):
        every = (folders[method, HIGHEST, seed] for seed in range(args.seeds))
        return fmean(report.metrics(folder, f"eval/logps/{name}")[0][1] for folder in every)

    others = ", ".join(f"{start(method, 'rejected'):.2f}" for method in ("DPO", *ALL[3:]))
    text = (
        f"Change of the mean log-prob per token on held-out pairs after {args.steps} steps of 16 pairs, from "
        f"{start('DPO', 'chosen'):.2f} (chosen) and {others} (rejected: near-duplicates, unrelated, meaningless); mean "
        f"over {args.seeds} seeds (range). The loss is each method's own, for DPO-PG it is DPO's (beta 0.1). The last "
        "columns: the chosen change for each nat that the margin per token has gained, and where the margin has gained "
        f"{MARGIN:g} nats a response.\n\n"
        + report.table(
            ["method", "lr", "chosen", "rejected", "loss", "chosen / margin", f"chosen at {MARGIN:g} nats"], rows
        )
    )

    rates = [rate for method, rate in runs if method == "DPO"]
    lowest = min(rate for method, rate in runs if method == "DPO-PG")
    verdicts = [
        claim_6(ends, rates, "after as many steps"),
        claim_6(at_equal_margin, rates, f"at a margin of {MARGIN:g} nats"),
        claim_7(lambda name: ends("DPO-PG", lowest, name), lowest),
    ]
    for method, (when, changes) in product(
        ALL[3:], ((f"at a margin of {MARGIN:g} nats", at_equal_margin), ("after as many steps", ends))
    ):
        near, other = (changes(one, HIGHEST) for one in ("DPO", method))
        holds, numbers = None, "margin not reached"
        if near and other:
            less = [b - a for a, b in zip(near, other)]
            holds = report.all_hold(report.above_zero([-value for value in near]), report.above_zero(less))
            numbers = f"chosen {report.spread(other, 4)}, near-duplicates {report.spread(near, 4)}"
        kind = method.split(", ")[1]
        statement = f"DPO's displacement is alleviated by rejected responses that are {kind}; {when}."
        verdicts.append(report.Verdict(15, "DGPO Sec. 2.3, Fig. 8", statement, CLAIM_15.format(when), holds, numbers))
    report.save(args, "markov", verdicts, text, draw(folders, HIGHEST, args.seeds))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
