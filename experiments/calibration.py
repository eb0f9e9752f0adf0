"""Does the calibration error fall as alpha/beta rises, with the accuracy kept (DPL 4.3, Fig. 4)?
And a multiple-choice calibration tool for any causal model, on a local file.

    python experiments/calibration.py                                     (two CPU cores, about five minutes)
    python experiments/calibration.py --model mistralai/Mistral-7B-Instruct-v0.2 --data mmlu.jsonl
    python experiments/calibration.py --model runs/dpl/model --data truthfulqa_mc.json

MMLU from the hub: load_dataset("cais/mmlu", "all", split="test").to_json("mmlu.jsonl"), with load_dataset of datasets.

The tool asks with the prompt of DPL's appendix D, reads the probabilities of the tokens A to D, and prints

    accuracy   how often the top choice is right
    ECE        over 15 equal bins of the top choice's probability: sum of share of questions * |accuracy - probability|
    Brier      mean over questions of sum over choices (probability - 1[right])^2; uniform over four is 0.75

of the four probabilities normalised, and their sum before that. ECE is never 0 at finite n, so beside it stands what a
perfectly calibrated model with the same confidences would show.

The experiment. Races of four runners out of 48, each with a hidden speed; the winner is drawn with odds exp(speed), so
the best possible answer to "Who won?" is uncertain, more in some races than in others.

    base    a 0.1M-parameter Llama, supervised on winners of races that it sees once: it knows the runners in part,
            and roughly how much it knows. Nothing can be gained over it, so a second one is supervised on 1,000 races
            over and over, until it takes who happened to win for certain; that many by a pilot that looked at this
            base alone (ECE 0.254, accuracy 0.503)
    pairs   other races: the winner's letter is chosen, a wrong one drawn at random is rejected, so a population with
            odds q prefers y to y' with q(y) / (q(y) + q(y')), and the optimum of Eq. 5 is (Prop. A.2, 3.2)

                pi(y) ~ ref(y)^(beta/alpha) q(y)^(1/alpha)

            With beta 0.1 and ref near q that is q to the power 11 under DPO, and 11, 9.2, 7.3, 5.5, 2.8 and 1 for the
            alpha/beta swept here: training to the end must give this order, and overconfidence up to the last.
    test    races that none has seen

What differs from the paper: it trains a 7B model on one epoch of UltraFeedback (App. C.3) and asks about facts; here
the pairs are questions of the same kind, since nothing carries over to them in a model this small. LoRA and its dropout
are as in App. C.3 with rank 16 for 64 and a larger learning rate, as matrices are 64 wide and runs 300 steps long.
The learning rate was chosen by DPO's loss on held-out pairs before any calibration error was looked at: 0.630, 0.605
and 0.600 at 3e-4, 1e-3 and 3e-3, so 1e-3.
"""

import gzip
import itertools
import json
import os
import random
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # CPU threads that spin while they wait slow each other down

import numpy as np
import torch
import tyro
from jinja2 import TemplateError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_scheduler,
)

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import report  # noqa: E402

from preferences import common_prefix, encode, fail, failing  # noqa: E402

# Written before the numbers. The text to Fig. 4 gives none: higher alpha/beta "consistently" has lower error and
# "similar accuracy"; DPO is "less calibrated than the base model", larger alpha/beta "quickly" better than it.
RATIOS = (1, 1.2, 1.5, 2, 4, 11)  # alpha / beta; 1 is DPO. From the sweep of App. B.3
ACCURACY_KEPT = 0.02
THRESHOLD_FALLS = (
    "mean ECE falls at every step of the sweep; the worst seed at the largest alpha/beta is below the best seed at 1; "
    f"mean accuracy at every alpha/beta is at least DPO's - {ACCURACY_KEPT}"
)
# The second threshold first asked for a mean merely below the base's. 0.025 met that against 0.028, which is noise at
# this number of questions; since then it asks for two standard errors, which is harder to meet.
THRESHOLD_BASE = (
    "DPO's ECE is above the base model's in every seed; at some alpha/beta the mean ECE is below the base's by two "
    "standard errors of the difference (bootstrap over the questions)"
)

LETTERS = "ABCD"
BINS = 15
BATCH_TOKENS = 8192
# DPL App. D
PROMPT = """\
Please answer the following multiple choice question. Start your answer with the capital letter corresponding to your \
choice:

{question}

Answer choices:

{choices}

Your answer:"""


@dataclass
class Args:
    model: str = ""
    """Model to measure, a name on the hub or a directory; empty: run the experiment"""
    data: str = ""
    """Questions for --model: .jsonl of MMLU's kind or .json of TruthfulQA's MC1, also .gz"""
    seed: int = 0
    """Seed of TruthfulQA's wrong choices and their order"""
    results: str = str(report.RESULTS)
    """Where the experiment's table and figure go"""
    runs: str = "runs/calibration"
    """Where the experiment's data and models go"""
    fast: bool = False
    """A few steps and one seed, to see that everything runs; says nothing about the claim"""


# ---------------------------------------------------------------------------------------------------------------------
# The tool: questions


@dataclass
class Question:
    question: str
    options: list[str]
    answer: int
    """Index of the right option"""


def read_questions(path: str, seed: int) -> list[Question]:
    """The questions of a .jsonl (MMLU) or .json (TruthfulQA) file; SystemExit names the row at fault."""
    kind = Path(path.removesuffix(".gz")).suffix
    if kind not in (".json", ".jsonl"):
        fail(f"{path}: expected a .jsonl or .json file, or one of them with .gz")
    if not os.path.isfile(path):
        fail(f"{path}: no such file")
    with failing(path), (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        text = file.read()
    rows = []
    for number, line in enumerate(text.strip().split("\n") if kind == ".jsonl" else [text], 1):
        with failing(f"{path}{f' row {number}' if kind == '.jsonl' else ''}: not JSON"):
            rows.append(json.loads(line))
    if kind == ".json":
        rows = rows[0] if isinstance(rows[0], list) else fail(f"{path}: expected a list of questions")
    if not rows:
        fail(f"{path}: it is empty")
    rng = random.Random(seed)
    questions = []
    for number, row in enumerate(rows, 1):
        where = f"{path} row {number}"
        if not isinstance(row, dict) or not isinstance(row.get("question"), str):
            fail(f'{where}: expected an object with "question" as text')
        questions.append((mmlu if kind == ".jsonl" else truthfulqa)(row, where, rng))
    few = sum(len(q.options) < len(LETTERS) for q in questions)
    print(f"{path}: {len(questions)} questions" + (f", {few} of them with fewer than four choices" if few else ""))
    return questions


def mmlu(row: dict, where: str, rng: random.Random) -> Question:
    """{"question", "options": [text, ...], "answer": "B"}, or as on the hub {"question", "choices", "answer": 1}"""
    name = "choices" if "choices" in row else "options"
    options, answer = row.get(name), row.get("answer")
    if isinstance(options, list):  # copies of MMLU that went through pandas have NaN where the choice reads "None"
        options = ["None" if option != option else option for option in options]
    if not (isinstance(options, list) and 2 <= len(options) <= 4 and all(isinstance(o, str) for o in options)):
        fail(f'{where}: expected "{name}" as a list of two to four texts')
    last = len(options) - 1
    if name == "choices" and type(answer) is int and 0 <= answer <= last:
        return Question(row["question"], options, answer)
    if not isinstance(answer, str) or answer not in tuple(LETTERS[: last + 1]):
        number = f" or a number from 0 to {last}" * (name == "choices")
        fail(f'{where}: "answer" is {answer!r}, expected a letter from A to {LETTERS[last]}{number}')
    return Question(row["question"], options, LETTERS.index(answer))


def truthfulqa(row: dict, where: str, rng: random.Random) -> Question:
    """{"question", "mc1_targets": {text: 1 or 0, ...}}. The right one comes first and there are up to thirteen, so
    three wrong ones are drawn and all are shuffled; two or three choices stay two or three."""
    targets = row.get("mc1_targets")
    marks = list(targets.values()) if isinstance(targets, dict) else []
    if len(marks) < 2 or any(mark not in (0, 1) for mark in marks) or sum(marks) != 1:
        fail(f'{where}: expected "mc1_targets" as an object with one choice of value 1 and the others 0')
    right = max(targets, key=targets.get)
    wrong = [text for text in targets if text != right]
    options = [right, *rng.sample(wrong, min(3, len(wrong)))]
    rng.shuffle(options)
    return Question(row["question"], options, options.index(right))


# ---------------------------------------------------------------------------------------------------------------------
# The tool: probabilities


def prompt_text(question: Question) -> str:
    choices = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, question.options))
    return PROMPT.format(question=question.question, choices=choices)


def tokenize(tokenizer, question: Question) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, and the one id with which each letter goes on.

    " A" and "A" are different tokens, and which of them follows depends on prompt, template and tokenizer: so prompt
    and letter are encoded together, and what all letters share is the prompt (with a space, where that is a token).
    """
    letters = LETTERS[: len(question.options)]
    if tokenizer.chat_template:
        user = {"role": "user", "content": prompt_text(question)}
        try:
            turns = [[user, {"role": "assistant", "content": letter}] for letter in letters]
            before = os.path.commonprefix([tokenizer.apply_chat_template(one, tokenize=False) for one in turns])
        except TemplateError as error:
            fail(f"the model's chat template refuses a question and its answer: {error}")
    else:
        before = prompt_text(question) + " "
    rows = encode(tokenizer, [before + letter for letter in letters])
    shared = common_prefix(*rows)
    ends = [row[shared:] for row in rows]
    if len({tuple(end) for end in ends}) < len(letters) or any(len(end) != 1 for end in ends):
        fail(
            f"the letters {', '.join(letters)} are not one token each, and different ones, behind "
            f"{before[-20:]!r}: this tokenizer makes {ends} of them, so their probabilities cannot be compared"
        )
    return rows[0][:shared], [end[0] for end in ends]


@torch.no_grad()
def letter_probabilities(model, prompts: list[list[int]], letters: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of the letters, normalised, 0 for those that a question has not, (questions, 4); and their sum
    before normalising, (questions,).

    Padding is on the right, where a causal model never sees it. So it needs no mask; with one, padding that a sliding
    window cuts off from every real token would see nothing at all, and be NaN.
    """
    longest = max(map(len, prompts))
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and longest > limit:
        fail(f"a prompt has {longest} tokens, and the model takes {limit} at most")
    batches, room = [[]], BATCH_TOKENS
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        if batches[-1] and (len(batches[-1]) + 1) * len(prompts[i]) > room:
            batches.append([])
        batches[-1].append(i)
    probabilities, mass = np.zeros((len(prompts), len(LETTERS))), np.zeros(len(prompts))
    for batch in batches:
        lengths = torch.tensor([len(prompts[i]) for i in batch])  # (rows,)
        ids = torch.zeros(len(batch), lengths.max(), dtype=torch.long)  # (rows, tokens)
        for row, i in enumerate(batch):
            ids[row, : lengths[row]] = torch.tensor(prompts[i])
        # Logits of all tokens would be the largest tensor by far; only where some row ends are they needed.
        ends, end_of_row = (lengths - 1).unique(return_inverse=True)
        logits = model(
            input_ids=ids.to(model.device),
            use_cache=False,
            logits_to_keep=ends.to(model.device),
        ).logits.cpu()  # (rows, ends, vocab)
        logps = logits[torch.arange(len(batch)), end_of_row].double().log_softmax(-1)  # (rows, vocab)
        for row, i in enumerate(batch):
            chosen = logps[row, letters[i]]  # (choices,)
            mass[i] = chosen.exp().sum()
            probabilities[i, : len(chosen)] = chosen.softmax(0)
    if not np.isfinite(probabilities).all():
        fail("the model's logits are no numbers (nan or inf)")
    return probabilities, mass


# ---------------------------------------------------------------------------------------------------------------------
# The tool: metrics


def bin_of(confidence: np.ndarray) -> np.ndarray:
    """Which of the 15 bins ((0, 1/15], ..., (14/15, 1]) each confidence falls into."""
    return (np.ceil(confidence * BINS).astype(int) - 1).clip(0, BINS - 1)


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """ECE. A bin's share * |accuracy - mean confidence| is |its sum of (right - confidence)| / n."""
    return np.abs(np.bincount(bin_of(confidence), right - confidence, BINS)).sum() / len(confidence)


def calibrated_error(confidence: np.ndarray, draws: int = 1000) -> float:
    """The mean ECE if every confidence were the true chance to be right."""
    rng, confidence = np.random.default_rng(0), np.sort(confidence)  # sorted, so that their order changes nothing
    return float(
        np.mean([calibration_error(confidence, rng.random(len(confidence)) < confidence) for _ in range(draws)])
    )


@dataclass
class Calibration:
    accuracy: float
    ece: float
    floor: float
    """ECE of a calibrated model with the same confidences"""
    brier: float
    mass: float
    """Mean probability of all letters together, before normalising"""
    confidence: np.ndarray
    """Of the top choice, (questions,)"""
    right: np.ndarray
    """Whether the top choice is right, (questions,)"""


def metrics(probabilities: np.ndarray, answers: np.ndarray, mass: np.ndarray) -> Calibration:
    """probabilities (questions, 4) and the index of each right answer, (questions,)"""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == answers
    return Calibration(
        accuracy=right.mean(),
        ece=calibration_error(confidence, right),
        floor=calibrated_error(confidence),
        brier=((probabilities - np.eye(len(LETTERS))[answers]) ** 2).sum(1).mean(),
        mass=mass.mean(),
        confidence=confidence,
        right=right,
    )


def measure(name: str, questions: list[Question]) -> Calibration:
    """Load a model and ask it all questions."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with failing(f"cannot load {name!r}"):
        tokenizer = AutoTokenizer.from_pretrained(name)
    prompts, letters = zip(*(tokenize(tokenizer, question) for question in questions))
    with failing(f"cannot load {name!r}"):
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    probabilities, mass = letter_probabilities(model.to(device).eval(), prompts, letters)
    return metrics(probabilities, np.array([question.answer for question in questions]), mass)


def show(name: str, result: Calibration) -> None:
    print(
        f"{name}, n = {len(result.right)}\n"
        f"  accuracy           {result.accuracy:.4f}\n"
        f"  ECE, {BINS} bins       {result.ece:.4f}   ({result.floor:.4f} if it were perfectly calibrated)\n"
        f"  Brier              {result.brier:.4f}   (uniform over four choices 0.75)\n"
        f"  probability of A-D {result.mass:.4f}   (before normalising)"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The toy


RUNNERS, FIELD = 48, 4
SPEED_SPREAD = 1.5  # odds between two runners: e^(1.5 * sqrt 2), or 8 to 1, within one standard deviation
TEST_RACES = 4000
BASE_STEPS, BASE_BATCH, BASE_LR = 300, 64, 3e-3
FEW_RACES = 1000  # of the overconfident base
BASE, OVERCONFIDENT = "base", "overconfident base"
BETA = 0.1
STEPS, BATCH, LR = 300, 8, 1e-3
SEEDS = 3
NOTE = """

The first base is nearly calibrated by its making, so there is hardly anything to gain over it. As the pairs are about
the very questions asked, Prop. 3.2 sharpens the answers at every alpha/beta below 11; pairs about other things, as the
paper's, need not. That the probability of A-D falls is likelihood displacement: the loss compares two letters, and does
not mind if all four lose to other words.
"""


def make_runners() -> dict[str, float]:
    """Name -> hidden speed."""
    rng = random.Random(0)
    names = ["".join(name) for name in itertools.product("bdkmnprt", "aeiou", "lnrst")]
    return {name: rng.gauss(0, SPEED_SPREAD) for name in rng.sample(names, RUNNERS)}


def odds(runners: dict[str, float], names: list[str]) -> np.ndarray:
    weights = np.exp([runners[name] for name in names])
    return weights / weights.sum()


def make_races(runners: dict[str, float], count: int, rng: random.Random) -> list[Question]:
    races = []
    for _ in range(count):
        names = rng.sample(list(runners), FIELD)
        races.append(Question("Who won the race?", names, rng.choices(range(FIELD), odds(runners, names))[0]))
    return races


def make_tokenizer(runners: dict[str, float]) -> PreTrainedTokenizerFast:
    """One token a word with the space before it: so " A" and "A" differ, as in large models."""
    split = Regex(r" ?[A-Za-z]+|\s|[^\sA-Za-z]")
    words = pre_tokenizers.Split(split, "isolated").pre_tokenize_str(
        prompt_text(Question("Who won the race?", list(LETTERS), 0))
        + "".join(f" {word}" for word in (*LETTERS, *runners))
    )
    vocabulary = ["</s>", *sorted({word for word, _ in words})]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="</s>"))
    core.pre_tokenizer = pre_tokenizers.Split(split, "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")


def make_base(runners: dict[str, float], steps: int, folder: Path, few: int = 0) -> None:
    """A Llama supervised on the letter of the winner, and the end token behind it, of races.

    few  so many races, over and over; 0: new ones at every step
    """
    torch.manual_seed(0)
    rng = random.Random(1)
    tokenizer = make_tokenizer(runners)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, initializer_range=0.1, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_LR, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_scheduler("linear", optimizer, steps // 10, steps)
    again = make_races(runners, few, rng)
    for _ in range(steps):
        races = rng.sample(again, BASE_BATCH) if few else make_races(runners, BASE_BATCH, rng)
        rows = encode(tokenizer, [f"{prompt_text(race)} {LETTERS[race.answer]}</s>" for race in races])
        ids = torch.tensor(rows)  # (races, tokens): all are equally long
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=3).logits[:, :2]  # of the letter and the end
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, -2:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_pairs(path: Path, races: list[Question], rng: random.Random) -> Path:
    """The winner's letter against one of the others, drawn at random."""
    rows = []
    for race in races:
        loser = rng.choice([i for i in range(FIELD) if i != race.answer])
        letters = {"chosen": f" {LETTERS[race.answer]}", "rejected": f" {LETTERS[loser]}"}
        rows.append({"prompt": prompt_text(race), **letters})
    return write_rows(path, rows)


# ---------------------------------------------------------------------------------------------------------------------
# The experiment


def train(base: Path, pairs: Path, ratio: float, seed: int, steps: int, out: Path) -> Path:
    """One run of dpl.py; returns its model."""
    report.launch(
        "dpl.py", "--model", base, "--dataset", pairs, "--alpha", ratio * BETA, "--beta", BETA, "--steps", steps,
        "--batch-size", BATCH, "--lr", LR, "--warmup", 0.1, "--seed", seed, "--output-dir", out, "--overwrite",
    )  # fmt: skip
    return out / "model"


def ece_noise(base: Calibration, seeds: list[Calibration], draws: int = 500) -> float:
    """Standard error of (mean ECE over the seeds - ECE of the base), from questions drawn again with replacement."""
    rng, count, differences = np.random.default_rng(0), len(base.right), []
    for _ in range(draws):
        drawn = rng.integers(0, count, count)
        ece = [calibration_error(run.confidence[drawn], run.right[drawn]) for run in (base, *seeds)]
        differences.append(np.mean(ece[1:]) - ece[0])
    return float(np.std(differences))


def judge(base: Calibration, runs: dict[float, list[Calibration]], kind: str) -> report.Verdict:
    """DPO and larger alpha/beta beside the base that they started from."""
    first, lowest = min(runs), min(runs, key=lambda ratio: np.mean([run.ece for run in runs[ratio]]))
    ece = {ratio: [run.ece for run in runs[ratio]] for ratio in (first, lowest)}
    noise = ece_noise(base, runs[lowest])
    return report.Verdict(
        claim=11,
        paper="DPL Fig. 4",
        statement=f"DPO is calibrated worse than {kind}, a larger alpha/beta better.",
        threshold=THRESHOLD_BASE,
        holds=bool(min(ece[first]) > base.ece and np.mean(ece[lowest]) < base.ece - 2 * noise),
        numbers=f"ECE of the base {base.ece:.3f}, of DPO {report.spread(ece[first])}, lowest at {lowest} "
        f"with {report.spread(ece[lowest])}; standard error of the difference {noise:.3f}",
    )


def judge_sweep(runs: dict[float, list[Calibration]]) -> report.Verdict:
    ece = {ratio: [run.ece for run in seeds] for ratio, seeds in runs.items()}
    accuracy = {ratio: [run.accuracy for run in seeds] for ratio, seeds in runs.items()}
    first, last = min(runs), max(runs)
    least = min(accuracy, key=lambda ratio: np.mean(accuracy[ratio]))
    falls = all(np.mean(after) < np.mean(before) for before, after in itertools.pairwise(ece.values()))
    kept = np.mean(accuracy[least]) >= np.mean(accuracy[first]) - ACCURACY_KEPT
    return report.Verdict(
        claim=11,
        paper="DPL Fig. 4",
        statement="The calibration error falls as alpha/beta rises, and the accuracy is kept.",
        threshold=THRESHOLD_FALLS,
        holds=bool(falls and max(ece[last]) < min(ece[first]) and kept),
        numbers=f"ECE {report.spread(ece[first])} at alpha/beta 1, {report.spread(ece[last])} at {last}, "
        f"{'falling' if falls else 'not falling'} at every step; accuracy {report.spread(accuracy[first])} at 1, "
        f"lowest at {least} with {report.spread(accuracy[least])}",
    )


def write_table(best: Calibration, bases: dict[str, Calibration], runs: dict[str, dict[float, list]]) -> str:
    names = {"true odds": [best]}
    for kind, base in bases.items():
        names |= {kind: [base]} | {f"{ratio:g}, from the {kind}": seeds for ratio, seeds in runs[kind].items()}
    fields = ("accuracy", "ece", "floor", "brier", "mass")
    rows = []
    for name, results in names.items():
        confidence = report.spread([result.confidence.mean() for result in results])
        rows.append([name, *(report.spread([getattr(r, field) for r in results]) for field in fields), confidence])
    header = ("alpha/beta", "accuracy", "ECE", "ECE if calibrated", "Brier", "probability of A-D", "mean confidence")
    return report.table(header, rows)


def draw(best: Calibration, bases: dict[str, Calibration], every: dict[str, dict[float, list]]):
    base, runs = bases[BASE], every[BASE]
    figure, axes = report.axes(2, 2)
    shades = report.shades(list(runs))
    panels = {"ece": "ECE", "brier": "Brier score", "accuracy": "accuracy"}
    for axis, (field, name) in zip(axes.flat, panels.items()):
        values = np.array([[getattr(run, field) for run in seeds] for seeds in runs.values()])  # (ratios, seeds)
        axis.axhline(getattr(base, field), color=report.COLOURS["reference"], linestyle="--", label="base model")
        axis.fill_between(list(runs), values.min(1), values.max(1), color=report.COLOURS["DPL"], alpha=0.2, linewidth=0)
        axis.plot(list(runs), values.mean(1), color=report.COLOURS["DPL"], label="DPL, mean and range of seeds")
        for ratio, row in zip(runs, values):
            axis.plot([ratio] * len(row), row, "o", markersize=3, color=shades[ratio])
        if field == "ece":
            floor = [np.mean([run.floor for run in seeds]) for seeds in runs.values()]
            axis.plot(list(runs), floor, ":", color="black", label="if calibrated, at this n")
            axis.axhline(bases[OVERCONFIDENT].ece, color="#c7c7c7", linestyle="--", label=OVERCONFIDENT)
            for ratio, seeds in every[OVERCONFIDENT].items():
                label = "DPL from it" if ratio == min(runs) else None
                axis.plot([ratio] * len(seeds), [run.ece for run in seeds], "kx", markersize=4, label=label)
        else:
            axis.axhline(getattr(best, field), color="black", linestyle=":", label="true odds")
        axis.set(xscale="log", xlabel="alpha / beta (1 is DPO)", ylabel=name)
        axis.set_xticks(list(runs), [f"{ratio:g}" for ratio in runs])
        axis.minorticks_off()
        axis.legend()
    axis = axes[1, 1]
    axis.plot([0, 1], [0, 1], ":", color="black", label="calibrated")
    shown = {"base model": [base]} | {f"alpha/beta {ratio:g}": runs[ratio] for ratio in runs if ratio in (1, 2, 4, 11)}
    colours = [report.COLOURS["reference"], *(shades[ratio] for ratio in runs if ratio in (1, 2, 4, 11))]
    for (name, results), colour in zip(shown.items(), colours):
        confidence = np.concatenate([result.confidence for result in results])
        right = np.concatenate([result.right for result in results])
        counts, *sums = (np.bincount(bin_of(confidence), weights, BINS) for weights in (None, confidence, right))
        many = counts >= 20 * len(results)  # the accuracy of fewer questions is mostly noise
        axis.plot(sums[0][many] / counts[many], sums[1][many] / counts[many], "o-", ms=3, color=colour, label=name)
    axis.set(xlabel="probability of the top choice", ylabel="share right", xlim=(0.2, 1.02), ylim=(0.2, 1.02))
    axis.legend()
    return figure


def experiment(args: Args) -> None:
    ratios, seeds, steps, base_steps, races = RATIOS, SEEDS, STEPS, BASE_STEPS, TEST_RACES
    if args.fast:
        ratios, seeds, steps, base_steps, races = (1, 4), 1, 4, 30, 200
    torch.set_num_threads(1)
    folder = ROOT / args.runs
    folder.mkdir(parents=True, exist_ok=True)
    runners = make_runners()
    sweeps = {BASE: ratios, OVERCONFIDENT: (ratios[0], ratios[-1])}
    make_base(runners, base_steps, folder / BASE)
    make_base(runners, base_steps, folder / OVERCONFIDENT, FEW_RACES)
    test = make_races(runners, races, random.Random(2))
    for seed in range(seeds):
        rng = random.Random(100 + seed)
        write_pairs(folder / f"pairs-{seed}.jsonl", make_races(runners, steps * BATCH, rng), rng)
    jobs = {
        (kind, ratio, seed): partial(
            train, folder / kind, folder / f"pairs-{seed}.jsonl", ratio, seed, steps, folder / f"{kind}-{ratio}-{seed}"
        )
        for kind, ratios in sweeps.items()
        for ratio in ratios
        for seed in range(seeds)
    }
    runs = {kind: {ratio: [] for ratio in ratios} for kind, ratios in sweeps.items()}
    for (kind, ratio, _), model in zip(jobs, report.side_by_side(list(jobs.values()))):
        runs[kind][ratio].append(measure(str(model), test))
    bases = {kind: measure(str(folder / kind), test) for kind in sweeps}
    chances = np.array([odds(runners, race.options) for race in test])  # (races, 4)
    best = metrics(chances, np.array([race.answer for race in test]), np.ones(races))
    text = write_table(best, bases, runs)
    text += f"\n{races} test races; {seeds} seeds of pairs and LoRA, mean (range); {steps} steps of {BATCH} pairs."
    verdicts = [judge_sweep(runs[BASE]), *(judge(bases[kind], runs[kind], f"the {kind}") for kind in sweeps)]
    report.save(args, "calibration", verdicts, text + NOTE, draw(best, bases, runs))


def main(args: Args) -> None:
    if bool(args.model) != bool(args.data):
        fail("--model and --data belong together; without both the experiment runs")
    if args.model:
        show(args.model, measure(args.model, read_questions(args.data, args.seed)))
    else:
        experiment(args)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
