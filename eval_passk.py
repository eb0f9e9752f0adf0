"""pass@k, majority voting and diversity of a language model, from samples that are drawn once and kept.

Samples n completions per problem at each temperature, grades them and writes samples.jsonl (appended as they come),
results.json and passk.png. Run the same command again after a kill, or with a larger --n, and only what is missing is
drawn: each sample has a key (weights, prompt, settings, problem, index) and a seed of its own.

    pass@k = 1 - C(n-c, k) / C(n, k)        n samples, c of them right (Chen et al. 2021); best-of-N with a verifier

    python eval_passk.py --model toy/model --task toy/problems.jsonl --problems 100 --n 64 --max-new-tokens 80
    python eval_passk.py --model runs/dgpo/model --task gsm8k --n 200 --temperatures 0.2 0.5 1.0
    accelerate launch eval_passk.py --model mistralai/Mistral-7B-v0.1 --task math --shots 2 --n 128
    python eval_passk.py --model runs/dgpo/model --task humaneval --allow-code-execution
    python eval_passk.py --samples elsewhere.jsonl --task math --temperatures 0.7
    python eval_passk.py --compare runs/eval/dpo/results.json runs/eval/dgpo/results.json --output-dir runs/compared
"""

import gzip
import hashlib
import json
import math
import os
import random
import re
import textwrap
import threading
import time
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LogitsProcessorList,
    MinPLogitsWarper,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from preferences import encode, fail
from grading import sandbox
from grading.answers import (
    boxes,
    cut,
    find_gsm8k,
    find_math,
    grade_gsm8k,
    grade_math,
    read_number,
    vote,
    without_thought,
)
from grading.diversity import distinct, embedding_distance, self_bleu, words


@dataclass
class Args:
    # What
    model: str = ""
    """Model to sample: a name on the hub or a directory; empty: grade --samples, or only draw the files of --compare"""
    samples: str = ""
    """Completions made elsewhere, a .jsonl file, in place of --model (docs/eval_passk.md)"""
    task: str = "gsm8k"
    """gsm8k, math, humaneval, or a .jsonl file with "question" and "answer" in GSM8K's form, or without answers"""
    data: str = ""
    """The task's problems from a .jsonl or .jsonl.gz file instead of the hub"""
    problems: int = 200
    """Problems drawn at random, 0 for all (200 of GSM8K in H-DPO A.5, 200 in DPL 4.2; HumanEval is always whole)"""
    prompt: Literal["auto", "chat", "text"] = "auto"
    """The model's chat template, or plain text with examples; auto: the template where there is one (design)"""
    shots: Literal[0, 2, 8] = 8
    """Examples in GSM8K's text prompt: 8, "The answer is" (H-DPO A.5), or 2, "####" (DPL C.3); MATH has 2 (DPL C.3)"""

    # Sampling
    n: int = 200
    """Samples per problem and temperature (H-DPO A.5; DPL: 128)"""
    temperatures: tuple[float, ...] = (0.2, 0.5, 1.0)
    """Sampling temperatures, 0 is greedy (H-DPO: 0.1 to 1.5)"""
    top_p: float = 1.0
    """Nucleus sampling, 1 is off (H-DPO; DPL's baseline: 0.9)"""
    top_k: int = 0
    """Only the k likeliest tokens, 0 is off (H-DPO; DPL's baseline: 180). transformers' own default would be 50"""
    min_p: float = 0.0
    """Only tokens this likely against the likeliest, 0 is off (H-DPO; DPL's baseline: 0.1)"""
    max_new_tokens: int = 512
    """Longest completion (H-DPO A.4)"""
    stop: tuple[str, ...] = ()
    """Strings that end a completion; empty: the task's own for text prompts (lm-evaluation-harness, human-eval)"""
    seed: int = 0
    """Seed of the samples, the choice of problems and the bootstrap (ours)"""

    # Hardware
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights; auto: bfloat16 on a GPU, float32 elsewhere (design)"""
    tokens_per_device: int = 32768
    """Tokens in the cache at once, prompts and completions at full length (4 GB for Mistral-7B in bfloat16)"""

    # Grading and metrics
    allow_code_execution: bool = False
    """HumanEval only: run the programs that the model wrote, inside grading/sandbox.py (ours)"""
    timeout: float = 3.0
    """Seconds for one program (human-eval)"""
    ks: tuple[int, ...] = ()
    """k of pass@k and maj@k; empty: the powers of two up to n, and n (DPL Table 3)"""
    difficulty_from: str = ""
    """results.json of a base model: easy, medium, hard by its expected samples: to 4, to 64, more (DPL 4.2)"""
    diversity_samples: int = 25
    """Samples per problem, the first ones, for the diversity metrics (H-DPO A.4)"""
    embedder: str = ""
    """sentence-transformers model for the embedding distance (DPL Eq. 44); empty: leave it out"""

    # Output
    name: str = ""
    """The model's name in tables and legends; empty: the end of --model"""
    compare: tuple[str, ...] = ()
    """results.json files of other models: drawn into the same figure, with paired differences"""
    output_dir: str = ""
    """Directory for the three files; empty: runs/eval/<name>-<task>"""
    overwrite: bool = False
    """Replace a results.json of another model, prompt or task; samples are kept apart by key in any case"""


# ---------------------------------------------------------------------------------------------------------------------
# tasks

HUB = {
    "gsm8k": ("openai/gsm8k", "main"),
    "math": ("HuggingFaceH4/MATH-500", None),
    "humaneval": ("openai/openai_humaneval", None),
}
LEVELS = {"1": "easy (level 1)", "3": "medium (level 3)", "5": "hard (level 5)"}  # DPL 4.2

# Chain-of-thought examples of Wei et al. (2022), Table 20; the first two also in DPL C.3
SHOTS = """\
Q: There are 15 trees in the grove. Grove workers will plant trees in the grove today. After they are done, there will be 21 trees. How many trees did the grove workers plant today?
A: There are 15 trees originally. Then there were 21 trees after some more were planted. So there must have been 21 - 15 = 6. The answer is 6.

Q: If there are 3 cars in the parking lot and 2 more cars arrive, how many cars are in the parking lot?
A: There are originally 3 cars. 2 more cars arrive. 3 + 2 = 5. The answer is 5.

Q: Leah had 32 chocolates and her sister had 42. If they ate 35, how many pieces do they have left in total?
A: Originally, Leah had 32 chocolates. Her sister had 42. So in total they had 32 + 42 = 74. After eating 35, they had 74 - 35 = 39. The answer is 39.

Q: Jason had 20 lollipops. He gave Denny some lollipops. Now Jason has 12 lollipops. How many lollipops did Jason give to Denny?
A: Jason started with 20 lollipops. Then he had 12 after giving some to Denny. So he gave Denny 20 - 12 = 8. The answer is 8.

Q: Shawn has five toys. For Christmas, he got two toys each from his mom and dad. How many toys does he have now?
A: Shawn started with 5 toys. If he got 2 toys each from his mom and dad, then that is 4 more toys. 5 + 4 = 9. The answer is 9.

Q: There were nine computers in the server room. Five more computers were installed each day, from monday to thursday. How many computers are now in the server room?
A: There were originally 9 computers. For each of 4 days, 5 more computers were added. So 5 * 4 = 20 computers were added. 9 + 20 is 29. The answer is 29.

Q: Michael had 58 golf balls. On tuesday, he lost 23 golf balls. On wednesday, he lost 2 more. How many golf balls did he have at the end of wednesday?
A: Michael started with 58 golf balls. After losing 23 on tuesday, he had 58 - 23 = 35. After losing 2 more, he had 35 - 2 = 33 golf balls. The answer is 33.

Q: Olivia has $23. She bought five bagels for $3 each. How much money does she have left?
A: Olivia had 23 dollars. 5 bagels for 3 dollars each will be 5 x 3 = 15 dollars. So she has 23 - 15 dollars left. 23 - 15 is 8. The answer is 8.

"""  # noqa: E501
SHOTS_DPL = """\
As an expert problem solver solve step by step the following mathematical questions. Place your answer after the "####" symbol.

Q: There are 15 trees in the grove. Grove workers will plant trees in the grove today. After they are done, there will be 21 trees. How many trees did the grove workers plant today?

A: We start with 15 trees. Later we have 21 trees. The difference must be the number of trees they planted. So, they must have planted $21 - 15 = 6$ trees. The answer is 6. #### 6

Q: If there are 3 cars in the parking lot and 2 more cars arrive, how many cars are in the parking lot?

A: There are 3 cars in the parking lot already. 2 more arrive. Now there are $3 + 2 = 5$ cars. The answer is 5. #### 5

"""  # noqa: E501
SHOTS_MATH = r"""Given a mathematics problem, determine the answer. Simplify your answer as much as possible. Output your answer in the format Answer: $\boxed{\text{answer}}$

Problem: Let $f(x)=x^3+3$ and $g(x) = 2x^2 + 2x + 1$. What is $g(f(-2))$?

Answer: We note that $f(-2)=(-2)^3+3=-5$, so $g(f(-2))=g(-5)=2 \cdot (-5)^2 + 2 \cdot (-5) + 1 = 41$. So, $\boxed{41}$

###

Problem: What is the greatest possible value of $x+y$ such that $x^2 + y^2 = 90$ and $xy=27$?

Answer: We have $(x+y)^2 = x^2 + y^2 + 2xy = 90 + 2 \cdot 27 = 144$, so $x+y=12$ or $x+y=-12$. We want the larger value $x+y=\boxed{12}$

###

"""  # noqa: E501
# What stands around the question in a text prompt, by task and number of examples; the strings that end an answer
FORMS = {
    ("gsm8k", 8): (SHOTS + "Q: ", "\nA:"),
    ("gsm8k", 2): (SHOTS_DPL + "Q: ", "\n\nA:"),
    ("gsm8k", 0): ("Q: ", "\nA:"),
    ("math", 8): (SHOTS_MATH + "Problem: ", "\n\nAnswer:"),
    ("math", 2): (SHOTS_MATH + "Problem: ", "\n\nAnswer:"),
    ("math", 0): ("Problem: ", "\n\nAnswer:"),
}
STOPS = {
    "gsm8k": ("\nQ:",),
    "math": ("###", "\nProblem:"),
    "humaneval": ("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
}
# The same in a chat. HumanEval's answer is begun for the model with the function's head: it writes the body
WISHES = {
    "gsm8k": ("", '\n\nSolve this step by step and end with "#### " and the number.'),
    "math": ("", "\n\nSolve this step by step and put the final answer within \\boxed{}."),
    "humaneval": ("Complete this function. Answer with one code block.\n\n```python\n", "```"),
}


def digest(*parts) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def read_rows(path: str) -> list[dict]:
    """The rows of a .jsonl or .jsonl.gz file."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as file:
            lines = file.read().split("\n")
    except FileNotFoundError:
        fail(f"{path}: no such file")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        fail(f"{path} cannot be read: {error}")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError:
            fail(f"{path} line {number}: not JSON")
        if rows and not isinstance(rows[-1], dict):
            fail(f"{path} line {number}: no object with names and values")
    return rows or fail(f"{path} is empty")


def read_problem(kind: str, row: dict, where: str) -> dict:
    """id (of the problem itself: models can be compared), question, reference (None: no answer), group, row."""

    def text(*names):
        found = [row[name] for name in names if isinstance(row.get(name), str) and row[name].strip()]
        return found[0] if found else fail(f'{where}: "{names[0]}" is missing, empty or no text')

    if kind == "math":
        question, reference = text("problem"), text("solution", "answer")
        if not any(content for _, content in boxes(reference)):
            reference = row.get("answer") or fail(
                f'{where}: "solution" has no \\boxed{{answer}}, and no "answer" is there'
            )
    elif kind == "humaneval":
        question, reference, name = text("prompt"), text("test"), text("entry_point")
        if not re.search(rf"^def {re.escape(name)}\b", question, re.MULTILINE):
            fail(f'{where}: "prompt" does not begin {name}, its "entry_point"')
        try:
            compile(f"{question}\n    pass\n{reference}", where, "exec")
        except (SyntaxError, ValueError) as error:
            fail(f'{where}: "prompt" and "test" are no Python: {error}')
        if not re.search(r"^def check\(", reference, re.MULTILINE):
            fail(f'{where}: "test" defines no check(candidate)')
    else:
        question = text("question", "prompt")
        reference = text("answer") if kind == "gsm8k" or row.get("answer") is not None else None
        if reference is not None and read_number(reference.rsplit("####", 1)[-1]) is None:
            fail(f'{where}: "answer" has no number')
    level = re.search(r"\d", str(row.get("level", "")))
    group = LEVELS.get(level[0]) if level else f"difficulty {row['difficulty']}" if "difficulty" in row else None
    return {"id": digest(question, reference), "question": question, "reference": reference, "group": group, "row": row}


def load_problems(args: Args) -> list[dict]:
    """The task's problems, each once, as read_problem gives them; at most --problems where they are to be sampled."""
    kind = args.task if args.task in HUB else "jsonl"
    path = args.data or ("" if kind in HUB else args.task)
    if path:
        rows = read_rows(path)
    else:
        from datasets import load_dataset

        try:
            rows = list(load_dataset(*HUB[kind], split="test"))
        except Exception as error:
            fail(f"{HUB[kind][0]} cannot be loaded ({type(error).__name__}); give a local file with --data")
    problems = {}
    for number, row in enumerate(rows, 1):
        problem = read_problem(kind, row, f"{path or HUB[kind][0]} row {number}")
        if problems and (problem["reference"] is None) != (next(iter(problems.values()))["reference"] is None):
            fail(f'{path} row {number}: all rows must have an "answer", or none')
        problems[problem["id"]] = problem
    problems = list(problems.values())
    if args.problems and args.problems < len(problems) and kind != "humaneval" and not args.samples:
        chosen = sorted(random.Random(args.seed).sample(range(len(problems)), args.problems))
        problems = [problems[i] for i in chosen]
    return problems


def prompt_texts(args: Args, tokenizer, problems: list[dict]) -> tuple[list[str], tuple[str, ...]]:
    """The prompts as text, and the strings that end a completion."""
    chat = args.prompt == "chat" or (args.prompt == "auto" and tokenizer.chat_template is not None)
    if chat and tokenizer.chat_template is None:
        fail(f"{args.model} has no chat template; use --prompt text")
    code, texts = args.task == "humaneval", []
    before, behind = (WISHES if chat else FORMS).get(args.task if chat else (args.task, args.shots), ("", ""))
    for question in (p["question"] for p in problems):
        text = before + question + behind
        if chat:
            messages = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            text += f"```python\n{question}" if code else ""
        texts.append(text)
    return texts, args.stop or (STOPS.get(args.task, ()) if not chat else ("\n```\n",) if code else ())


# ---------------------------------------------------------------------------------------------------------------------
# sampling


def find_weights(model: str) -> str:
    """The directory that holds the model's files; a model on the hub is downloaded."""
    if os.path.isdir(model):
        return model
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(model, allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"])
    except Exception as error:
        fail(f"{model}: neither a directory nor a model that the hub gives out ({type(error).__name__})")


def hash_weights(directory: str) -> str:
    """Hash of the contents of config and weights, wherever they lie; with an adapter, of its base too."""
    total, folder = hashlib.sha256(), Path(directory)
    weights = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
    for path in sorted([*weights, *folder.glob("config.json")]):
        total.update(path.name.encode())
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    if (folder / "adapter_config.json").exists():
        settings = json.loads((folder / "adapter_config.json").read_text())
        base = settings.pop("base_model_name_or_path")
        total.update(json.dumps(settings).encode() + hash_weights(find_weights(base)).encode())
    return total.hexdigest()[:16] if weights else fail(f"{directory} holds no weights (*.safetensors)")


def end_tokens(tokenizer, directory: str) -> list[int]:
    """Every token that the model's files call an end; chat models name their end of turn in generation_config.json."""
    ids = [tokenizer.eos_token_id]
    for name in ("config.json", "generation_config.json"):
        path = Path(directory) / name
        value = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        ids += value if isinstance(value, list) else [value]
    return sorted({i for i in ids if i is not None})


def sample_seed(seed: int, problem: str, index: int) -> int:
    """The seed of one sample. Models and temperatures share it: their paired differences become less noisy."""
    return int(digest(seed, problem, index), 16) >> 1


def make_plan(
    problems: list[dict], lengths: list[int], n: int, max_new: int, budget: int
) -> list[list[tuple[int, int]]]:
    """All (problem, index) in batches: alike in length, at most `budget` tokens, longest first.

    It depends neither on what is done already nor on the number of processes, so a batch cut short by a kill is drawn
    again in the same company, bit for bit. Indices go in blocks of 64: with a larger n the old batches stay.
    """
    order = sorted(range(len(problems)), key=lambda i: (-lengths[i], problems[i]["id"]))
    plan = []
    for start in range(0, n, 64):
        cells = [(i, index) for i in order for index in range(start, min(n, start + 64))]
        while cells:
            rows = max(1, budget // (lengths[cells[0][0]] + max_new))
            plan.append(cells[:rows])
            cells = cells[rows:]
    return plan


def next_tokens(logits: torch.Tensor, numbers: torch.Tensor, settings: dict) -> torch.Tensor:
    """One token a row of logits (rows, vocab): where the cumulative distribution passes the row's number in [0, 1)."""
    if settings["temperature"] == 0:
        return logits.argmax(-1)
    # transformers' own, in the order in which generate applies them
    steps = LogitsProcessorList([TemperatureLogitsWarper(float(settings["temperature"]))])
    steps += [TopKLogitsWarper(settings["top_k"])] if settings["top_k"] else []
    steps += [TopPLogitsWarper(settings["top_p"])] if settings["top_p"] < 1 else []
    steps += [MinPLogitsWarper(settings["min_p"])] if settings["min_p"] else []
    mass = steps(None, logits).double().softmax(-1).cumsum(-1)
    token = torch.searchsorted(mass, numbers[:, None] * mass[:, -1:], right=True)[:, 0]
    return token.clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def sample_batch(
    model, tokenizer, prompts: list[list[int]], counts: list[int], seeds: list[int], settings: dict, stopper=None
) -> list[tuple[list[int], float, str]]:
    """Draws counts[i] completions of prompts[i]: (token ids, log-prob, why it ended) in the order of the seeds.

    A completion depends on its own seed alone. Its log-prob is the model's own, whatever the temperature and the cuts.
    """
    device, limit, eos = model.device, settings["max_new_tokens"], torch.tensor(settings["eos"], device=model.device)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)  # (prompts, longest)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    forward = partial(model, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits = forward(ids, attention_mask=mask, position_ids=position).logits
    # the prompt's forward ran once; its cache now serves all samples of the problem
    owner = torch.tensor([i for i, count in enumerate(counts) for _ in range(count)], device=device)  # (rows,)
    cache.batch_select_indices(owner)
    logits, mask, position = logits[owner, -1], mask[owner], position[owner, -1]
    numbers = [torch.rand(limit, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
    numbers = torch.stack(numbers).to(device)  # (rows, limit)
    tokens = torch.zeros(len(seeds), limit, dtype=torch.long, device=device)
    logps = torch.zeros(len(seeds), dtype=torch.float64, device=device)
    lengths, ending = torch.zeros_like(owner), torch.zeros_like(owner)  # ending: 0 length, 1 eos, 2 stop string
    rows = torch.arange(len(seeds), device=device)  # rows still in the forward; some may have ended
    alive = torch.ones_like(rows, dtype=torch.bool)
    for step in range(limit):
        logits = logits.float()  # (rows, vocab)
        token = tokens[rows, step] = next_tokens(logits, numbers[rows, step], settings)
        logp = logits.log_softmax(-1).gather(1, token[:, None])[:, 0].double()
        logps[rows] += torch.where(alive, logp, 0.0)
        lengths[rows] += alive
        at_eos = torch.isin(token, eos) & alive
        at_stop = stopper(tokens[rows, : step + 1], None) & alive & ~at_eos if stopper else torch.zeros_like(alive)
        ending[rows] += at_eos + 2 * at_stop
        alive &= ~(at_eos | at_stop)
        count = int(alive.sum())  # the one wait for the GPU in a step
        if count == 0 or step + 1 == limit:
            break
        if count <= 0.8 * len(rows):  # copying the cache costs about as much as one step
            keep = alive.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            rows, token, mask, position, alive = rows[keep], token[keep], mask[keep], position[keep], alive[keep]
        position = position + 1
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        logits = forward(token[:, None], attention_mask=mask, position_ids=position[:, None]).logits[:, -1]
    if torch.isnan(logps).any():
        fail("the model's logits are not numbers (NaN)")
    columns = zip(tokens.tolist(), lengths.tolist(), logps.tolist(), ending.tolist())
    return [(row[:length], logp, ("length", "eos", "stop")[end]) for row, length, logp, end in columns]


def completion_text(tokenizer, prompt: list[int], tokens: list[int]) -> str:
    """The text of tokens behind a prompt. Decoded alone, SentencePiece would drop its first space, and indentation."""
    before, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, prompt + tokens))
    return whole[len(os.path.commonprefix([before, whole])) :]


def read_samples(directory: Path) -> tuple[dict[tuple, dict], int]:
    """All samples by key, from the files of all processes, and the number of lines that a kill left torn."""
    samples, torn = {}, 0
    for path in sorted(directory.glob("samples*.jsonl")):
        for line in path.read_bytes().split(b"\n"):
            try:
                row = json.loads(line) if line else {}
                if "index" in row:
                    samples.setdefault((row["config"], row["problem"], row["prompt"], row["index"]), row)
            except (ValueError, KeyError, TypeError):
                torn += 1
    return samples, torn


def append(path: Path, rows: list[dict]) -> None:
    """A line is one write, so that a kill tears at most the last one; a torn one is ended before the next."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    size = os.fstat(file).st_size
    torn = size and os.pread(file, 1, size - 1) != b"\n"
    for data in [b"\n"] * bool(torn) + [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]:
        while data:
            data = data[os.write(file, data) :]
    os.close(file)


def sample_all(args, accelerator, directory: Path, problems, prompts, runs, tokenizer, weights: str) -> None:
    """Draws what is missing. `runs` lists (config, settings); this process takes every num_processes-th batch."""
    have, torn = read_samples(directory)
    if torn:
        accelerator.print(f"{torn} torn line(s) of a killed run skipped")
    hashes, lengths = [digest(p) for p in prompts], [len(p) for p in prompts]

    def key(config, i, index):
        return (config, problems[i]["id"], hashes[i], index)

    plan = make_plan(problems, lengths, args.n, args.max_new_tokens, args.tokens_per_device)
    todo = [(*run, batch) for run in runs for batch in plan if any(key(run[0], *cell) not in have for cell in batch)]
    if not todo:  # on all processes alike: nobody waits for anybody
        return
    accelerator.wait_for_everyone()  # everyone has read the files before anyone writes
    todo = todo[accelerator.process_index :: accelerator.num_processes]
    try:
        model = AutoModelForCausalLM.from_pretrained(weights, dtype=getattr(torch, runs[0][1]["dtype"]))
    except (OSError, ValueError) as error:
        fail(f"{args.model} cannot be loaded: {str(error).splitlines()[0]}")
    model, stops = model.to(accelerator.device).eval(), runs[0][1]["stop"]
    stopper = StopStringCriteria(tokenizer, stops) if stops else None
    path = directory / f"samples.{accelerator.process_index}.jsonl".replace(".0.", ".")
    drawn, start, described = 0, time.monotonic(), set()
    total = sum(len(batch) for *_, batch in todo)
    with tqdm(total=total, desc="samples", unit="", disable=not accelerator.is_main_process) as bar:
        for config, settings, batch in todo:
            counts = Counter(i for i, _ in batch)  # in the order of the batch
            seeds = [sample_seed(args.seed, problems[i]["id"], index) for i, index in batch]
            some = [prompts[i] for i in counts]
            rows = [] if config in described else [{"config": config, "settings": settings}]
            described.add(config)
            drawn_now = sample_batch(model, tokenizer, some, list(counts.values()), seeds, settings, stopper)
            for (i, index), (tokens, logp, end) in zip(batch, drawn_now):
                drawn += len(tokens)
                if key(config, i, index) in have:
                    continue
                row = dict(zip(("config", "problem", "prompt", "index"), key(config, i, index)))
                text = cut(completion_text(tokenizer, prompts[i], tokens), settings["stop"])
                rows.append(row | {"text": text, "tokens": len(tokens), "logp": logp, "end": end})
            append(path, rows)
            bar.update(len(batch))
            bar.set_postfix_str(f"{drawn / (time.monotonic() - start):,.0f} tokens/s, T={settings['temperature']:g}")


# ---------------------------------------------------------------------------------------------------------------------
# grading: how answers are read and compared is in grading/answers.py, how programs are run in grading/sandbox.py

_sandboxes = threading.local()


def find_code(completion: str, name: str) -> str:
    """What of a completion goes behind the prompt: of prose and code blocks the last block that defines the function.

    The prompt stays in front of it, with its imports and helpers. Else all up to the first fence is the body.
    """
    pieces = re.split(r"^[ \t]*```.*$", without_thought(completion), flags=re.MULTILINE)
    whole = [p for p in pieces[1:] if re.search(rf"^[ \t]*(?:async )?def {re.escape(name)}\b", p, re.MULTILINE)]
    return "\n    pass\n\n" + textwrap.dedent(whole[-1]) if whole else pieces[0]


def run_humaneval(problem: dict, completion: str, timeout: float = 3.0) -> bool:
    """True where the prompt with this completion passes the problem's check. It is run: see grading/sandbox.py.

    A sandbox that fails says nothing about the sample: it is tried again, then SandboxError is raised.
    """
    if not hasattr(_sandboxes, "box"):
        _sandboxes.box = sandbox.Sandbox(sandbox.layers())
    for _ in range(3):
        verdict, reason = _sandboxes.box.check(problem, find_code(completion, problem["entry_point"]), timeout)
        if verdict != "error":
            return verdict == "pass"
    raise sandbox.SandboxError(reason)


def grade(task: str, problem: dict, text: str) -> tuple[bool, str | None, str]:
    """(right, a name that equal answers share, how the answer was found) for a task with answers."""
    find, right = (find_math, grade_math) if task == "math" else (find_gsm8k, grade_gsm8k)
    answer, how = find(text)
    if answer is None or right(text, problem["reference"]):
        return answer is not None, None if answer is None else "right", how
    return False, vote(answer) if task == "math" else str(answer), how


def grade_all(args: Args, problems: list[dict], texts: list[list[str]]) -> list[list[tuple]]:
    """Grades of all samples, each different text of a problem once."""
    jobs = list({(i, text) for i, row in enumerate(texts) for text in row})
    if args.task != "humaneval":
        done = {(i, text): grade(args.task, problems[i], text) for i, text in tqdm(jobs, desc="grading", leave=False)}
        return [[done[i, text] for text in row] for i, row in enumerate(texts)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        verdicts = pool.map(lambda job: run_humaneval(problems[job[0]]["row"], job[1], args.timeout), jobs)
        try:
            verdicts = list(tqdm(verdicts, total=len(jobs), desc="running programs", leave=False))
        except sandbox.SandboxError as error:
            pool.shutdown(cancel_futures=True)
            fail(f"the sandbox failed, and that is no wrong answer: {error}. The samples are kept; run again")
    done = {job: (verdict, None, "program") for job, verdict in zip(jobs, verdicts)}
    return [[done[i, text] for text in row] for i, row in enumerate(texts)]


# ---------------------------------------------------------------------------------------------------------------------
# metrics


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


def bootstrap(values, seed: int = 0, draws: int = 4000) -> tuple[float, float]:
    """95% interval of the mean of one value per problem: percentiles over problems drawn again with replacement."""
    values = np.asarray(values, dtype=float)
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=(100, len(values)))].mean(1) for _ in range(draws // 100)]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def mean_with_interval(values, seed: int = 0) -> dict:
    low, high = bootstrap(values, seed)
    return {"mean": float(np.mean(values)), "low": low, "high": high}


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
    names = {label: i for i, label in enumerate(dict.fromkeys(["", *(x for x in labels if x is not None)]))}
    votes = np.zeros((len(labels), len(names)), dtype=np.int64)  # (n, labels)
    for row, label in enumerate(labels):
        if label is not None:
            votes[row, names[label]] = 1
    order = np.arange(k)[None]  # (subsets, k)
    if k < len(labels):
        draws = max(200, 20_000 // k)
        order = np.random.default_rng(seed).random((draws, len(labels))).argpartition(k - 1, axis=1)[:, :k]
    totals = votes[order].sum(1)  # (subsets, labels)
    top = totals.max(1, keepdims=True)
    winners = (totals == top) & (top > 0)
    return float((winners[:, 0] / winners.sum(1).clip(min=1)).mean())


def diversity(args: Args, settings: dict, rows: list[list[dict]], embed=None) -> dict:
    """Diversity of the first samples of each problem, averaged over problems; rows[i][j] is sample j of problem i."""
    rows = [row[: args.diversity_samples] for row in rows]
    tokens = [[words(r["text"]) for r in row] for row in rows]
    result = {"samples_per_problem": len(rows[0]), "tokeniser": r"\w+|[^\w\s]", "self_bleu_order": 4}
    result |= {"entropy": None, "nll_per_token": None}  # samples from elsewhere come without log-probs
    if "logp" in rows[0][0]:
        nll = float(np.mean([np.mean([-r["logp"] / max(1, r["tokens"]) for r in row]) for row in rows]))
        # an entropy only where samples come from the very distribution that scores them
        plain = all(
            settings[name] == off for name, off in (("temperature", 1), ("top_p", 1), ("top_k", 0), ("min_p", 0))
        )
        result |= {"entropy": nll if plain else None, "nll_per_token": nll}
        result["mean_tokens"] = float(np.mean([r["tokens"] for row in rows for r in row]))
    result |= {
        "self_bleu": float(np.mean([self_bleu(t) for t in tokens])) if len(rows[0]) > 1 else None,
        "distinct_1": float(np.mean([distinct(t, 1) for t in tokens])),
        "distinct_2": float(np.mean([distinct(t, 2) for t in tokens])),
        "mean_words": float(np.mean([len(t) for row in tokens for t in row])),
    }
    if embed:
        distances = [embedding_distance(embed([r["text"] for r in row])) for row in rows]
        result["embedding_distance"] = float(np.mean(distances))
    return result


def measure(args: Args, settings: dict, ks: list[int], problems, rows, grades, embed=None) -> dict:
    """Everything about one temperature. rows[i][j] is sample j of problem i, grades[i][j] its (right, answer, how).

    Without answers to grade by, grades is None, and what needs them is left out.
    """
    result = {"settings": settings, "n": len(rows[0])}
    result["ended_by"] = dict(Counter(r["end"] for row in rows for r in row))  # length: cut off
    result["diversity"] = diversity(args, settings, rows, embed)
    result["problems"] = [{"id": p["id"], "n": len(row), "group": p["group"]} for p, row in zip(problems, rows)]
    if grades is None:
        return result
    right = [[ok for ok, _, _ in row] for row in grades]
    answers = [[answer for _, answer, _ in row] for row in grades]
    groups = defaultdict(list)
    for i, problem in enumerate(problems):
        result["problems"][i]["c"] = sum(right[i])
        if problem["group"] is not None:
            groups[problem["group"]].append(i)
    passes = {k: [pass_at_k(len(row), sum(row), k) for row in right] for k in ks}
    result["pass@k"] = {k: mean_with_interval(passes[k], args.seed) for k in ks}
    if args.task != "humaneval":
        votes = {k: [maj_at_k(a, ok, k, args.seed) for a, ok in zip(answers, right)] for k in ks}
        result["maj@k"] = {k: mean_with_interval(votes[k], args.seed) for k in ks}
        different = [len(set(row) - {None}) / len(row) for row in answers]
        result["diversity"]["distinct_answers"] = float(np.mean(different))
    result["splits"] = {
        group: {"problems": len(members)}
        | {"pass@k": {k: mean_with_interval([passes[k][i] for i in members], args.seed) for k in ks}}
        for group, members in sorted(groups.items())
    }
    result["found_by"] = dict(Counter(how for row in grades for _, _, how in row))
    return result


def paired_difference(a: dict, b: dict, k: int, seed: int = 0) -> dict | None:
    """pass@k of b minus a over the problems of both, at one temperature, with the interval of the paired difference."""
    counts = [{p["id"]: (p["n"], p["c"]) for p in side["problems"]} for side in (a, b)]
    shared = sorted(counts[0].keys() & counts[1].keys())
    if not shared or any(side[i][0] < k for side in counts for i in shared):
        return None
    values = [pass_at_k(*counts[1][i], k) - pass_at_k(*counts[0][i], k) for i in shared]
    return {"problems": len(shared), "k": k} | mean_with_interval(values, seed)


def difficulty_groups(path: str) -> dict[str, str]:
    """problem id -> easy, medium or hard, by n/c: the expected number of samples of a base model (DPL 4.2)."""
    first, groups = next(iter(read_results(path)["temperatures"].values())), {}
    for p in first["problems"]:
        expected = p["n"] / p["c"] if p.get("c") else math.inf
        groups[p["id"]] = "easy (<= 4)" if expected <= 4 else "medium (to 64)" if expected <= 64 else "hard (> 64)"
    return groups


# ---------------------------------------------------------------------------------------------------------------------
# figures and tables


def read_results(path: str) -> dict:
    try:
        results = json.loads(Path(path).read_text())
        assert results["temperatures"] and results["name"] and results["task"]
        return results
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        fail(f"{path}: no results.json of this script")


def some_of(ks: list) -> list:
    """First, middle and last."""
    return [ks[i] for i in sorted({0, len(ks) // 2, len(ks) - 1})] if ks else []


def figure(path: Path, results: list[dict]) -> None:
    """pass@k against k and against temperature (H-DPO's Figures 3 and 4); one kind of line a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    at = [{float(t): value["pass@k"] for t, value in sorted(r["temperatures"].items())} for r in results]
    temperatures = sorted(set().union(*at))
    shared = set.intersection(*({int(k) for k in passes} for one in at for passes in one.values()))
    panels = [("k, number of samples", "temperature {:g}", temperatures, plt.cm.viridis)]
    if len(temperatures) > 1:
        panels.append(("sampling temperature", "pass@{:g}", some_of(sorted(shared)), plt.cm.plasma))
    drawing, axes = plt.subplots(
        1, len(panels), figsize=(5.2 * len(panels) + 0.8, 4.7), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, (label, legend, values, colours) in zip(axes[0], panels):
        for value, colour in zip(values, colours(np.linspace(0.0, 0.8, len(values)))):
            for one, result, style in zip(at, results, ["-", "--", ":", "-."] * len(results)):
                if label[0] == "k":
                    cells = {int(k): cell for k, cell in one.get(value, {}).items()}
                else:
                    cells = {t: passes[str(value)] for t, passes in sorted(one.items())}
                mean, low, high = ([100 * cell[key] for cell in cells.values()] for key in ("mean", "low", "high"))
                name = legend.format(value) + (f", {result['name']}" if len(results) > 1 else "")
                axis.plot(list(cells), mean, style, marker="o", markersize=3.5, color=colour, label=name)
                axis.fill_between(list(cells), low, high, color=colour, alpha=0.12, linewidth=0)
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=9)
    axes[0][0].set_ylabel("pass@k: problems solved, %")
    axes[0][0].set_xscale("log", base=2)
    ticks = sorted({int(k) for one in at for passes in one.values() for k in passes})
    axes[0][0].set_xticks(ticks, map(str, ticks))
    first = next(iter(results[0]["temperatures"].values()))
    heading = results[0]["name"] + ", " if len(results) == 1 else ""
    about = f"{len(first['problems'])} problems, {first['n']} samples, 95% intervals"
    drawing.suptitle(f"{heading}{Path(results[0]['task']).name}: {about}", fontsize=11)
    temporary = path.with_name(f".{path.name}")
    drawing.savefig(temporary, dpi=130, format="png")
    plt.close(drawing)
    os.replace(temporary, path)


def percent(cell: dict, sign: str = "") -> str:
    """A mean with its interval, in percent."""
    mean, low, high = (f"{100 * cell[key]:{sign}.1f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def table(results: dict) -> str:
    """The numbers of one result file for the terminal: a line a temperature, then what does not fit into it."""
    shown = ["entropy", "self_bleu", "distinct_1", "distinct_2", "distinct_answers"]
    rows, notes = [], []
    for t, value in results["temperatures"].items():
        row, d = {"T": t}, value["diversity"]
        ks = list(value.get("pass@k", {}))
        ks = ks if len(ks) <= 4 else [ks[0], ks[len(ks) // 3], ks[2 * len(ks) // 3], ks[-1]]
        row |= {f"pass@{k}": percent(value["pass@k"][k]) for k in ks}
        row |= {f"maj@{k}": percent(value["maj@k"][k]) for k in ks[-1:] if "maj@k" in value}
        row |= {name: "-" if d[name] is None else f"{d[name]:.3f}" for name in shown if name in d}
        row["cut off"] = f"{100 * value['ended_by'].get('length', 0) / sum(value['ended_by'].values()):.1f}%"
        rows.append(row)
        for group, split in value.get("splits", {}).items():
            cells = ", ".join(f"pass@{k} {percent(split['pass@k'][k])}" for k in {ks[0]: 0, ks[-1]: 0})
            notes.append(f"T={t} {group}: {split['problems']} problems, {cells}")
        for what, counts in (("answers found by", value.get("found_by")), ("ended by", value["ended_by"])):
            if counts:
                notes.append(f"T={t} {what}: {', '.join(f'{how} {times}' for how, times in sorted(counts.items()))}")
    notes.append(
        f"diversity: first {d['samples_per_problem']} samples a problem, words {d['tokeniser']}, Self-BLEU of order 4, "
        f"smoothing 1, {d['mean_words']:.1f} words a sample at T={t}"
    )
    lines = [list(rows[0]), *([row.get(name, "-") for name in rows[0]] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(["  ".join(text.rjust(width) for text, width in zip(line, widths)) for line in lines] + notes)


def print_comparison(results: list[dict]) -> None:
    """Paired differences of each result file to the last one of the list, in points of pass@k."""
    last = results[-1]
    for other in results[:-1]:
        for t, mine in last["temperatures"].items():
            theirs = other["temperatures"].get(t, {}).get("pass@k", {})
            for k in some_of([int(k) for k in mine.get("pass@k", {}) if k in theirs]):
                if d := paired_difference(other["temperatures"][t], mine, k):
                    print(
                        f"T={t} pass@{k}: {last['name']} - {other['name']} = {percent(d, '+')} points on "
                        f"{d['problems']} shared problems{'' if d['low'] <= 0 <= d['high'] else ' *'}"
                    )


# ---------------------------------------------------------------------------------------------------------------------
# main


def check_args(args: Args) -> None:
    """Refuses what cannot work before anything is loaded."""
    if args.task not in HUB and not args.task.endswith((".jsonl", ".jsonl.gz")):
        fail(f"--task {args.task}: not gsm8k, math or humaneval, nor a .jsonl file")
    if min(args.n, args.max_new_tokens, args.diversity_samples, args.tokens_per_device) < 1:
        fail("--n, --max-new-tokens, --diversity-samples and --tokens-per-device must be at least 1")
    if args.problems < 0 or args.seed < 0:
        fail("--problems must be 0 (all) or more, --seed 0 or more")
    if not args.temperatures or not all(0 <= t < math.inf for t in args.temperatures):
        fail("--temperatures needs numbers that are 0 or more")
    if not 0 < args.top_p <= 1 or not 0 <= args.min_p < 1 or args.top_k < 0:
        fail("--top-p must be in (0, 1], --min-p in [0, 1), --top-k 0 or more")
    if not 0 < args.timeout < math.inf:
        fail("--timeout must be a number of seconds above 0")
    if "" in args.stop:
        fail("--stop: the empty text would end every completion at its beginning")
    if args.samples and (args.model or len(args.temperatures) != 1):
        fail(
            "--samples takes the place of --model, and needs the one temperature they were drawn at: --temperatures 0.7"
        )
    if args.task == "humaneval" and not args.allow_code_execution and (args.model or args.samples):
        fail(
            "humaneval runs programs that a model wrote, in processes without files, network or environment "
            "(grading/sandbox.py), on this machine; say --allow-code-execution if that is what you want"
        )


def choose_ks(args: Args, n: int) -> list[int]:
    ks = sorted(set(args.ks)) or sorted({2**i for i in range(n.bit_length())} | {n})
    if ks[0] < 1 or ks[-1] > n:
        fail(f"pass@{ks[-1]} cannot be estimated from {n} samples a problem; every k must be from 1 to n")
    return ks


def claim(args: Args, name: str, subject: dict) -> Path:
    """The output directory, unless it holds results of something else."""
    directory = Path(args.output_dir or f"runs/eval/{name}-{Path(args.task).stem}")
    path = directory / "results.json"
    if path.exists() and not args.overwrite:
        old = read_results(str(path))
        differ = ", ".join(key for key in subject if old["subject"].get(key) != subject[key])
        if differ:
            fail(f"{path} holds results of {old['name']} with other {differ}; choose an --output-dir, or --overwrite")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--output-dir: {error}")
    return directory


def given_samples(args: Args, problems: list[dict]) -> tuple[list[dict], list[list[dict]]]:
    """The problems that --samples has completions of, and these, in the order of the file."""
    known = {}
    for problem in problems:
        known |= {problem["question"]: problem["id"], problem["row"].get("task_id"): problem["id"]}
    rows = defaultdict(list)
    for number, row in enumerate(read_rows(args.samples), 1):
        names = ("question", "problem", "prompt", "task_id")
        found = [known[row[name]] for name in names if isinstance(row.get(name), str) and row[name] in known]
        if not found:
            fail(f"{args.samples} row {number}: none of {', '.join(names)} is that of a problem of {args.task}")
        if not isinstance(row.get("completion"), str):
            fail(f'{args.samples} row {number}: "completion" is missing or no text')
        rows[found[0]].append({"text": cut(row["completion"], args.stop), "end": "unknown"})
    counts = sorted({len(samples) for samples in rows.values()})
    if len(counts) > 1:
        fail(f"{args.samples}: problems have from {counts[0]} to {counts[-1]} completions; give each the same number")
    print(f"{args.samples}: {counts[0]} completions of each of {len(rows)} of {len(problems)} problems of {args.task}")
    problems = [p for p in problems if p["id"] in rows]
    return problems, [rows[p["id"]] for p in problems]


def draw_samples(args: Args, name: str, problems: list[dict]) -> tuple[Path, dict, list] | None:
    """(directory, subject, [(settings, rows)]) on the main process, None on others; draws what is missing."""
    # Without cpu=True two processes on a machine without a GPU would each believe to be alone.
    wait = InitProcessGroupKwargs(timeout=timedelta(days=7))
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[wait])
    with accelerator.main_process_first():
        weights = find_weights(args.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(weights)
    except (OSError, ValueError) as error:
        fail(f"{args.model}: its tokenizer cannot be loaded: {str(error).splitlines()[0]}")
    texts, stops = prompt_texts(args, tokenizer, problems)
    prompts = encode(tokenizer, texts)
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if accelerator.device.type == "cuda" else "float32"
    fixed = [hash_weights(weights) if accelerator.is_main_process else None]
    broadcast_object_list(fixed)
    fixed = {"weights": fixed[0], "engine": "hf", "dtype": dtype, "top_p": args.top_p, "top_k": args.top_k}
    fixed |= {"min_p": args.min_p, "max_new_tokens": args.max_new_tokens, "stop": list(stops), "seed": args.seed}
    fixed |= {"eos": end_tokens(tokenizer, weights)}
    two = tokenizer("a b", add_special_tokens=False)["input_ids"]
    if len(tokenizer.decode(two + two)) != 2 * len(tokenizer.decode(two)):
        fixed["text"] = "behind the prompt"  # not the samples of a time when it was decoded alone, without first spaces
    runs = [fixed | {"temperature": float(t)} for t in dict.fromkeys(args.temperatures)]
    runs = [(digest(sorted(settings.items())), settings) for settings in runs]
    form = encode(tokenizer, prompt_texts(args, tokenizer, [{"question": "?"}])[0])  # the prompt around the question
    subject = {"weights": fixed["weights"], "task": args.task, "prompt": digest(form)}
    directory = claim(args, name, subject)
    accelerator.print(
        f"{name}: {len(problems)} problems of {args.task}, {args.n} samples at each of {len(runs)} temperatures"
    )
    first = tokenizer.decode(prompts[0])
    accelerator.print(f"first prompt as the model sees it: {first!r}; ends at {stops or 'its end token'}")
    sample_all(args, accelerator, directory, problems, prompts, runs, tokenizer, weights)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return None
    samples, _ = read_samples(directory)
    keys = [[(p["id"], digest(ids), j) for j in range(args.n)] for p, ids in zip(problems, prompts)]
    rows = [(settings, [[samples[config, *key] for key in row] for row in keys]) for config, settings in runs]
    return directory, subject, rows


def compare(args: Args, others: list[dict]) -> None:
    if len(others) < 2:
        fail("give a --model, or --samples, or two or more results.json files to --compare")
    directory = Path(args.output_dir or "runs/compared")
    directory.mkdir(parents=True, exist_ok=True)
    for result in others:
        print(f"{result['name']}\n{table(result)}\n")
    print_comparison(others)
    figure(directory / "passk.png", others)
    print(f"figure in {directory / 'passk.png'}")


def main(args: Args) -> None:
    check_args(args)
    others = [read_results(path) for path in args.compare]
    tasks = {Path(task).name for task in [r["task"] for r in others] + [args.task] * bool(args.model or args.samples)}
    if len(tasks) > 1:
        fail(f"--compare: these are results on different tasks, {', '.join(sorted(tasks))}")
    if not args.model and not args.samples:
        return compare(args, others)

    # What can fail does so before the sampling.
    ks = [] if args.samples else choose_ks(args, args.n)
    problems = load_problems(args)
    graded = problems[0]["reference"] is not None
    if args.difficulty_from:
        groups = difficulty_groups(args.difficulty_from)
        problems = [p | {"group": groups.get(p["id"])} for p in problems]
        if not any(p["group"] for p in problems):
            fail(f"--difficulty-from {args.difficulty_from}: none of its problems is among these")
    embed = None
    if args.embedder:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            fail("--embedder: it needs sentence-transformers; pip install sentence-transformers")
        embed = SentenceTransformer(args.embedder).encode
    results = {"model": args.model or args.samples, "task": args.task}
    if args.task == "humaneval":
        try:
            results["sandbox"] = list(sandbox.layers())
        except sandbox.SandboxError as error:
            fail(f"no program of a model can be run safely here: {error}")

    source = Path(args.model or Path(args.samples).with_suffix(""))  # runs/dgpo/model is called dgpo
    name = args.name or (source.parent.name if source.name == "model" and source.parent.name else source.name)
    if args.samples:
        problems, rows = given_samples(args, problems)
        ks = choose_ks(args, len(rows[0]))
        subject = {"samples": args.samples, "task": args.task}
        directory, runs = claim(args, name, subject), [({"temperature": args.temperatures[0]}, rows)]
    elif drawn := draw_samples(args, name, problems):
        directory, subject, runs = drawn
    else:
        return
    results |= {"name": name, "subject": subject, "temperatures": {}}
    for settings, rows in runs:
        grades = grade_all(args, problems, [[r["text"] for r in row] for row in rows]) if graded else None
        value = measure(args, settings, ks, problems, rows, grades, embed)
        results["temperatures"][f"{settings['temperature']:g}"] = value
    path = directory / "results.json"
    temporary = path.with_name(f".{path.name}")  # written beside and renamed into place
    temporary.write_text(json.dumps(results, indent=1, ensure_ascii=False))
    os.replace(temporary, path)
    results = json.loads(path.read_text())  # as a reader sees it, with text for keys
    print(table(results))
    print(f"numbers in {path}")
    if graded:
        print_comparison([*others, results])
        figure(directory / "passk.png", [*others, results])
        print(f"figure in {directory / 'passk.png'}")


if __name__ == "__main__":
    main(tyro.cli(Args))
