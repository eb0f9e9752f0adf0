"""pass@k, majority voting and diversity of a language model, from samples that are drawn once and kept.

Samples n completions per problem at each temperature, grades them and writes samples.jsonl (appended as they come),
results.json and passk.png. Run the same command again after a kill, or with a larger --n, and only what is missing is
drawn: each sample has a key (weights, prompt, settings, problem, index) and a seed of its own.

    pass@k = 1 - C(n-c, k) / C(n, k)        n samples, c of them right (Chen et al. 2021); best-of-N with a verifier

    python eval_passk.py --model toy/model --task toy/problems.jsonl --problems 100 --n 64 --max-new-tokens 80
    python eval_passk.py --model runs/dgpo/model --task gsm8k --n 200 --temperatures 0.2 0.5 1.0
    accelerate launch eval_passk.py --model mistralai/Mistral-7B-v0.1 --task math --shots 2 --n 128
    python eval_passk.py --model runs/dgpo/model --task humaneval --allow-code-execution
    python eval_passk.py --compare runs/eval/dpo/results.json runs/eval/dgpo/results.json --output-dir runs/compared
"""

import gzip
import hashlib
import json
import math
import os
import random
import re
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
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

from grading import sandbox
from grading.answers import cut, find_gsm8k, find_math, grade_gsm8k, grade_math, normal_math, read_number
from preferences import encode, fail


@dataclass
class Args:
    # What
    model: str = ""
    """Model to sample: a name on the hub or a directory; empty: only draw the files of --compare"""
    task: str = "gsm8k"
    """gsm8k, math, humaneval, or a .jsonl file with "question" and "answer" in GSM8K's form"""
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
    engine: Literal["hf", "vllm"] = "hf"
    """hf: a loop of ours over the model's cache, on CPU or GPU; vllm: where it is installed"""
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
FIELDS = {
    "math": ("problem", "solution"),
    "humaneval": ("prompt", "test", "entry_point"),
}  # any other: question, answer
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
STOPS = {
    "gsm8k": ("\nQ:",),
    "math": ("###", "\nProblem:"),
    "humaneval": ("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
}


def digest(*parts) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def read_rows(path: str) -> list[dict]:
    if not os.path.isfile(path):
        fail(f"{path}: no such file")
    rows = []
    with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(json.loads(line))
            except ValueError:
                fail(f"{path} line {number}: not JSON")
    return rows


def load_problems(args: Args) -> list[dict]:
    """One dict a problem: id (of the problem itself: models can be compared), question, reference, group, row."""
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
    problems = []
    for number, row in enumerate(rows, 1):
        fields = FIELDS.get(kind, ("question", "answer"))
        for field in fields:
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                fail(f'{path or HUB[kind][0]} row {number}: "{field}" is missing or no text')
        if kind in ("gsm8k", "jsonl") and read_number(row["answer"].rsplit("####", 1)[-1]) is None:
            fail(f'{path or HUB[kind][0]} row {number}: "answer" has no number')
        level = re.search(r"\d", str(row.get("level", "")))
        group = LEVELS.get(level[0]) if level else f"difficulty {row['difficulty']}" if "difficulty" in row else None
        problem = {
            "id": digest(row[fields[0]], row[fields[1]]),
            "question": row[fields[0]],
            "reference": row[fields[1]],
        }
        problems.append(problem | {"group": group, "row": row})
    if len({p["id"] for p in problems}) < len(problems):
        problems = list({p["id"]: p for p in problems}.values())
    if args.problems and args.problems < len(problems) and kind != "humaneval":
        chosen = sorted(random.Random(args.seed).sample(range(len(problems)), args.problems))
        problems = [problems[i] for i in chosen]
    return problems


def prompt_texts(args: Args, tokenizer, problems: list[dict]) -> tuple[list[str], tuple[str, ...]]:
    """The prompts as text, and the strings that end a completion."""
    chat = args.prompt == "chat" or (args.prompt == "auto" and tokenizer.chat_template is not None)
    if chat and tokenizer.chat_template is None:
        fail(f"{args.model} has no chat template; use --prompt text")
    texts = []
    for question in (p["question"] for p in problems):
        if chat:
            wish = {
                "gsm8k": f'{question}\n\nSolve this step by step and end with "#### " and the number.',
                "math": f"{question}\n\nSolve this step by step and put the final answer within \\boxed{{}}.",
                "humaneval": f"Complete this function. Answer with one code block.\n\n```python\n{question}```",
            }.get(args.task, question)
            messages = [{"role": "user", "content": wish}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            # the function's head is put into the model's mouth: what it writes next is the body
            texts.append(text + f"```python\n{question}" if args.task == "humaneval" else text)
        elif args.task == "gsm8k":
            texts.append(
                {8: SHOTS + "Q: {}\nA:", 2: SHOTS_DPL + "Q: {}\n\nA:", 0: "Q: {}\nA:"}[args.shots].replace(
                    "{}", question
                )
            )
        elif args.task == "math":
            texts.append((SHOTS_MATH if args.shots else "") + f"Problem: {question}\n\nAnswer:")
        else:
            texts.append(question)
    stops = args.stop or (STOPS.get(args.task, ()) if not chat else ("\n```",) if args.task == "humaneval" else ())
    return texts, stops


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
    total = hashlib.sha256()
    files = sorted(
        p for p in Path(directory).iterdir() if p.suffix in (".safetensors", ".bin") or p.name == "config.json"
    )
    if not any(p.suffix != ".json" for p in files):
        fail(f"{directory} holds no weights (*.safetensors)")
    for path in files:
        total.update(path.name.encode())
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    adapter = Path(directory) / "adapter_config.json"
    if adapter.exists():
        settings = json.loads(adapter.read_text())
        total.update(json.dumps({k: v for k, v in settings.items() if k != "base_model_name_or_path"}).encode())
        total.update(hash_weights(find_weights(settings["base_model_name_or_path"])).encode())
    return total.hexdigest()[:16]


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


def warpers(settings: dict) -> LogitsProcessorList:
    """transformers' own, in the order in which generate applies them."""
    steps = LogitsProcessorList()
    if settings["temperature"] > 0:
        steps.append(TemperatureLogitsWarper(float(settings["temperature"])))
    if settings["top_k"]:
        steps.append(TopKLogitsWarper(settings["top_k"]))
    if settings["top_p"] < 1:
        steps.append(TopPLogitsWarper(settings["top_p"]))
    if settings["min_p"]:
        steps.append(MinPLogitsWarper(settings["min_p"]))
    return steps


@torch.no_grad()
def sample_batch(
    model, tokenizer, prompts: list[list[int]], counts: list[int], seeds: list[int], settings: dict, stopper=None
):
    """Draws counts[i] completions of prompts[i]: (token ids, log-prob, why it ended) in the order of the seeds.

    A completion depends on its own seed alone: token t is where the cumulative distribution passes its t-th number.
    """
    device, limit = model.device, settings["max_new_tokens"]
    warp, eos = warpers(settings), torch.tensor(settings["eos"], device=device)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)  # (prompts, longest)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    out = model(
        ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
    )
    # the prompt's forward ran once; its cache now serves all samples of the problem
    owner = torch.tensor([i for i, count in enumerate(counts) for _ in range(count)], device=device)  # (rows,)
    cache.batch_select_indices(owner)
    logits, mask, position = out.logits[owner, -1], mask[owner], positions[owner, -1]
    numbers = [torch.rand(limit, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
    numbers = torch.stack(numbers).to(device)  # (rows, limit)
    tokens = torch.zeros(len(seeds), limit, dtype=torch.long, device=device)
    logps = torch.zeros(len(seeds), dtype=torch.float64, device=device)
    lengths = torch.zeros(len(seeds), dtype=torch.long, device=device)
    ending = torch.zeros(len(seeds), dtype=torch.long, device=device)  # 0 length, 1 eos, 2 stop string
    rows = torch.arange(len(seeds), device=device)  # rows still in the forward; some may have ended
    alive = torch.ones_like(rows, dtype=torch.bool)
    for step in range(limit):
        logits = logits.float()  # (alive, vocab)
        if settings["temperature"] > 0:
            mass = warp(None, logits).double().softmax(-1).cumsum(-1)
            token = torch.searchsorted(mass, numbers[rows, step, None] * mass[:, -1:], right=True)[:, 0]
            token = token.clamp(max=logits.shape[-1] - 1)
        else:
            token = logits.argmax(-1)
        tokens[rows, step] = token
        logp = (
            logits.log_softmax(-1).gather(1, token[:, None])[:, 0].double()
        )  # the model's own: no temperature, no cut
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
        out = model(
            token[:, None], attention_mask=mask, position_ids=position[:, None], past_key_values=cache, use_cache=True
        )
        logits = out.logits[:, -1]
    if torch.isnan(logps).any():
        fail("the model's logits are not numbers (NaN)")
    names = ["length", "eos", "stop"]
    columns = zip(tokens.tolist(), lengths.tolist(), logps.tolist(), ending.tolist())
    return [(row[:length], logp, names[end]) for row, length, logp, end in columns]


def vllm_sampler(directory: str, dtype: str):
    """The same through vLLM: one request a sample, each with its seed; its prefix cache shares the prompt."""
    try:
        from vllm import LLM, SamplingParams
    except ImportError:
        fail("--engine vllm: it is not installed; pip install vllm")

    engine = LLM(directory, dtype=dtype, enable_prefix_caching=True, generation_config="vllm")

    def sample(prompts, counts, seeds, settings):
        requests = [{"prompt_token_ids": p} for p, count in zip(prompts, counts) for _ in range(count)]
        knobs = {key: settings[key] for key in ("temperature", "top_p", "top_k", "min_p")}
        knobs |= {"max_tokens": settings["max_new_tokens"], "stop": settings["stop"] or None, "logprobs": 0}
        knobs |= {"stop_token_ids": settings["eos"]}
        outputs = engine.generate(requests, [SamplingParams(seed=s % 2**31, **knobs) for s in seeds], use_tqdm=False)
        if len(outputs) != len(requests):
            fail(f"vLLM returned {len(outputs)} of {len(requests)} completions")
        for output in (o.outputs[0] for o in outputs):
            end = (
                "length"
                if output.finish_reason == "length"
                else "stop"
                if isinstance(output.stop_reason, str)
                else "eos"
            )
            yield list(output.token_ids), output.cumulative_logprob, end

    return sample


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


class SampleFile:
    """One process's file, opened when first needed. A line is one write, so that a kill tears at most the last one."""

    def __init__(self, path: Path):
        self.path, self.file, self.known = path, None, set()

    def append(self, row: dict) -> None:
        if self.file is None:
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            size = os.fstat(self.file).st_size
            if size and os.pread(self.file, 1, size - 1) != b"\n":
                os.write(self.file, b"\n")
        data = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        while data:
            data = data[os.write(self.file, data) :]

    def describe(self, config: str, settings: dict) -> None:
        if config not in self.known:
            self.known.add(config)
            self.append({"config": config, "settings": settings})


def sample_all(args, accelerator, directory, problems, prompts, runs, tokenizer, weights_directory, dtype) -> None:
    """Draws what is missing. `runs` lists (config, settings); this process takes every num_processes-th batch."""
    have, torn = read_samples(directory)
    if torn and accelerator.is_main_process:
        print(f"{torn} torn line(s) of a killed run skipped")
    hashes = [digest(p) for p in prompts]
    lengths = [len(p) for p in prompts]
    budget = args.tokens_per_device
    plan = make_plan(problems, lengths, args.n, args.max_new_tokens, budget)

    def key(config, i, index):
        return (config, problems[i]["id"], hashes[i], index)

    todo = [
        (config, settings, batch)
        for config, settings in runs
        for batch in plan
        if any(key(config, i, index) not in have for i, index in batch)
    ]
    if not todo:  # on all processes alike: nobody waits for anybody
        return
    accelerator.wait_for_everyone()  # everyone has read the files before anyone writes
    todo = todo[accelerator.process_index :: accelerator.num_processes]
    if args.engine == "vllm":
        sampler, model = vllm_sampler(weights_directory, dtype), None
    else:
        try:
            model = AutoModelForCausalLM.from_pretrained(weights_directory, dtype=getattr(torch, dtype))
        except (OSError, ValueError) as error:
            fail(f"{args.model} cannot be loaded: {str(error).splitlines()[0]}")
        model = model.to(accelerator.device).eval()
        stops = runs[0][1]["stop"]
        stopper = StopStringCriteria(tokenizer, stops) if stops else None

        def sampler(*batch):
            return sample_batch(model, tokenizer, *batch, stopper)

    name = "samples.jsonl" if accelerator.process_index == 0 else f"samples.{accelerator.process_index}.jsonl"
    file, drawn, start = SampleFile(directory / name), 0, time.monotonic()
    total = sum(len(batch) for _, _, batch in todo)
    with tqdm(total=total, desc="samples", unit="", disable=not accelerator.is_main_process) as bar:
        for config, settings, batch in todo:
            counts = Counter(i for i, _ in batch)  # in the order of the batch
            seeds = [sample_seed(args.seed, problems[i]["id"], index) for i, index in batch]
            rows = sampler([prompts[i] for i in counts], list(counts.values()), seeds, settings)
            file.describe(config, settings)
            for (i, index), (tokens, logp, end) in zip(batch, rows):
                drawn += len(tokens)
                if key(config, i, index) in have:
                    continue
                text = cut(tokenizer.decode(tokens, skip_special_tokens=True), settings["stop"])
                row = dict(zip(("config", "problem", "prompt", "index"), key(config, i, index)))
                file.append(row | {"text": text, "tokens": len(tokens), "logp": logp, "end": end})
            bar.update(len(batch))
            bar.set_postfix_str(f"{drawn / (time.monotonic() - start):,.0f} tokens/s, T={settings['temperature']:g}")


# ---------------------------------------------------------------------------------------------------------------------
# grading: how answers are read and compared is in grading/answers.py, how programs are run in grading/sandbox.py

_sandboxes = threading.local()


def run_humaneval(problem: dict, completion: str, timeout: float = 3.0) -> bool:
    """True where the prompt with this completion passes the problem's check. It is run: see grading/sandbox.py.

    A sandbox that fails says nothing about the sample: it is tried again, then SandboxError is raised.
    """
    if not hasattr(_sandboxes, "box"):
        _sandboxes.box = sandbox.Sandbox()
    for _ in range(3):
        verdict, reason = _sandboxes.box.check(problem, completion, timeout)
        if verdict != "error":
            return verdict == "pass"
    raise sandbox.SandboxError(reason)


def grade(task: str, problem: dict, text: str) -> tuple[bool, str | None, str]:
    """(right, final answer in one spelling, how it was found) for a task with answers."""
    if task == "math":
        answer, how = find_math(text)
        return grade_math(text, problem["reference"]), answer and normal_math(answer), how
    answer, how = find_gsm8k(text)
    return grade_gsm8k(text, problem["reference"]), None if answer is None else str(answer), how


def grade_all(args: Args, problems: list[dict], texts: list[list[str]]) -> list[list[tuple]]:
    """Grades of all samples, each different text of a problem once."""
    jobs = list({(i, text) for i, row in enumerate(texts) for text in row})
    if args.task != "humaneval":
        done = {(i, text): grade(args.task, problems[i], text) for i, text in tqdm(jobs, desc="grading", leave=False)}
    else:
        with ThreadPoolExecutor(os.cpu_count()) as pool:

            def work(job):
                return run_humaneval(problems[job[0]]["row"], job[1], args.timeout)

            try:
                verdicts = list(tqdm(pool.map(work, jobs), total=len(jobs), desc="running programs", leave=False))
            except sandbox.SandboxError as error:
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


def maj_at_k(answers: list[str | None], right: list[bool], k: int, seed: int = 0, draws: int = 200) -> float:
    """Chance that the most frequent answer among k samples is right; ties are drawn by lot, no answer has no vote.

    Right answers vote together, however spelled. Exact for k = n, else the mean over `draws` random subsets.
    """
    if not 1 <= k <= len(answers):
        raise ValueError(f"maj@k needs 1 <= k <= n, got n={len(answers)}, k={k}")
    labels = ["" if ok else answer for answer, ok in zip(answers, right)]  # no wrong answer is the empty text
    names = {label: i for i, label in enumerate(dict.fromkeys(["", *(x for x in labels if x is not None)]))}
    votes = np.zeros((len(labels), len(names)), dtype=np.int64)  # (n, labels)
    for row, label in enumerate(labels):
        if label is not None:
            votes[row, names[label]] = 1
    if k == len(labels):
        totals = votes.sum(0)[None]
    else:
        rng = np.random.default_rng(seed)
        order = rng.random((draws, len(labels))).argpartition(k - 1, axis=1)[:, :k]
        totals = votes[order].sum(1)  # (draws, labels)
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


def diversity(args: Args, settings: dict, rows: list[list[dict]], answers: list[list[str | None]], embed=None) -> dict:
    """Diversity of the first samples of each problem, averaged over problems."""
    rows = [row[: args.diversity_samples] for row in rows]
    tokens = [[words(r["text"]) for r in row] for row in rows]
    nll = float(np.mean([np.mean([-r["logp"] / max(1, r["tokens"]) for r in row]) for row in rows]))
    plain = settings["temperature"] == 1 and settings["top_p"] >= 1 and not settings["top_k"] and not settings["min_p"]
    result = {
        "samples_per_problem": len(rows[0]),
        "tokeniser": r"\w+|[^\w\s]",
        "self_bleu_order": 4,
        "entropy": nll if plain else None,  # only where samples come from the very distribution that scores them
        "nll_per_token": nll,
        "self_bleu": float(np.mean([self_bleu(t) for t in tokens])) if len(rows[0]) > 1 else None,
        "distinct_1": float(np.mean([distinct(t, 1) for t in tokens])),
        "distinct_2": float(np.mean([distinct(t, 2) for t in tokens])),
        "mean_words": float(np.mean([len(t) for row in tokens for t in row])),
        "mean_tokens": float(np.mean([r["tokens"] for row in rows for r in row])),
        "distinct_answers": float(np.mean([len(set(a) - {None}) / len(a) for a in answers])),
    }
    if embed:
        result["embedding_distance"] = float(
            np.mean([embedding_distance(embed([r["text"] for r in row])) for row in rows])
        )
    return result


def measure(args: Args, settings: dict, ks: list[int], problems, rows, grades, embed=None) -> dict:
    """Everything about one temperature. rows[i][j] is sample j of problem i, grades[i][j] its (right, answer, how)."""
    n = args.n
    right = [sum(ok for ok, _, _ in row) for row in grades]
    groups = defaultdict(list)
    for i, problem in enumerate(problems):
        if problem["group"] is not None:
            groups[problem["group"]].append(i)
    passes = {k: [pass_at_k(n, c, k) for c in right] for k in ks}
    answers = [[answer for _, answer, _ in row] for row in grades]
    result = {"settings": settings, "n": n}
    result["pass@k"] = {k: mean_with_interval(passes[k], args.seed) for k in ks}
    if args.task != "humaneval":
        votes = {
            k: [maj_at_k([a for _, a, _ in row], [ok for ok, _, _ in row], k, args.seed) for row in grades] for k in ks
        }
        result["maj@k"] = {k: mean_with_interval(votes[k], args.seed) for k in ks}
    result["splits"] = {
        group: {"problems": len(members)}
        | {"pass@k": {k: mean_with_interval([passes[k][i] for i in members], args.seed) for k in ks}}
        for group, members in sorted(groups.items())
    }
    result["found_by"] = dict(Counter(how for row in grades for _, _, how in row))
    result["ended_by"] = dict(Counter(r["end"] for row in rows for r in row))  # length: cut off
    result["diversity"] = diversity(args, settings, rows, answers, embed)
    result["problems"] = [{"id": p["id"], "n": n, "c": c, "group": p["group"]} for p, c in zip(problems, right)]
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
    results = read_results(path)
    first = next(iter(results["temperatures"].values()))
    groups = {}
    for p in first["problems"]:
        expected = p["n"] / p["c"] if p["c"] else math.inf
        groups[p["id"]] = "easy (<= 4)" if expected <= 4 else "medium (to 64)" if expected <= 64 else "hard (> 64)"
    return groups


# ---------------------------------------------------------------------------------------------------------------------
# figures


def read_results(path: str) -> dict:
    try:
        results = json.loads(Path(path).read_text())
        assert results["temperatures"] and results["name"] and results["task"]
        return results
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        fail(f"{path}: no results.json of this script")


def figure(path: Path, results: list[dict]) -> None:
    """pass@k against k, and against temperature (H-DPO's Figures 3 and 4), one colour a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullLocator

    temperatures = sorted({float(t) for r in results for t in r["temperatures"]})
    at = [{float(t): value for t, value in r["temperatures"].items()} for r in results]
    shared = sorted(set.intersection(*({int(k) for k in next(iter(a.values()))["pass@k"]} for a in at)))
    chosen = sorted({shared[0], shared[len(shared) // 2], shared[-1]}) if shared else []

    def draw(axis, xs, cells, **style):
        mean, low, high = ([100 * cell[key] for cell in cells] for key in ("mean", "low", "high"))
        (line,) = axis.plot(xs, mean, marker="o", markersize=3.5, linewidth=1.6, **style)
        axis.fill_between(xs, low, high, color=line.get_color(), alpha=0.15, linewidth=0)

    if len(results) == 1:
        panels = [("against k", None), ("against temperature", None)][: 1 + (len(temperatures) > 1)]
    else:
        panels = [(f"temperature {t:g}", t) for t in temperatures]
        panels += [(f"pass@{k}", k) for k in chosen] if len(temperatures) > 1 else []
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    size = (max(6.0, 4.6 * columns), 3.9 * lines + 0.8)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, sharey="row", layout="constrained")

    def by_k(cells):
        return ([int(k) for k in cells], list(cells.values()))

    for number, axis in enumerate(axes.flat):
        if number >= len(panels):
            axis.axis("off")
            continue
        title, what = panels[number]
        over_k = title.startswith("temperature") or title == "against k"
        if title == "against k":
            shades = plt.cm.viridis(np.linspace(0.0, 0.85, len(temperatures)))
            for t, shade in zip(temperatures, shades):
                draw(axis, *by_k(at[0][t]["pass@k"]), color=shade, label=f"temperature {t:g}")
        elif title == "against temperature":
            for k, shade in zip(chosen, plt.cm.plasma(np.linspace(0.1, 0.75, len(chosen)))):
                draw(
                    axis,
                    temperatures,
                    [at[0][t]["pass@k"][str(k)] for t in temperatures],
                    color=shade,
                    label=f"pass@{k}",
                )
        else:
            for i, (result, temps) in enumerate(zip(results, at)):
                style = {"color": f"C{i % 10}", "label": result["name"]}
                if over_k and what in temps:
                    draw(axis, *by_k(temps[what]["pass@k"]), **style)
                elif not over_k:
                    own = [t for t in temperatures if t in temps]
                    draw(axis, own, [temps[t]["pass@k"][str(what)] for t in own], **style)
        if over_k:
            ticks = sorted({int(line) for curve in axis.get_lines() for line in curve.get_xdata()})
            axis.set_xscale("log", base=2)
            axis.set_xticks(ticks)
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel("k, number of samples" if over_k else "sampling temperature")
        axis.set_ylabel("problems solved, %" if title.startswith(("temperature", "against")) else f"{title}, %")
        axis.set_title("pass@k " + title if title.startswith("against") else title, fontsize=11)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=9)
    task, first = Path(results[0]["task"]).name, at[0][min(at[0])]
    heading = results[0]["name"] + ", " if len(results) == 1 else ""
    figure.suptitle(
        f"{heading}{task}: {len(first['problems'])} problems, {first['n']} samples, 95% intervals", fontsize=11
    )
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)
    os.replace(temporary, path)


def table(results: dict) -> str:
    """The numbers of one result file for the terminal: a line a temperature."""

    def cell(c):
        return f"{100 * c['mean']:5.1f} [{100 * c['low']:.1f}, {100 * c['high']:.1f}]"

    first = next(iter(results["temperatures"].values()))
    ks = list(first["pass@k"])
    ks = ks if len(ks) <= 4 else [ks[0], ks[len(ks) // 3], ks[2 * len(ks) // 3], ks[-1]]
    rows = [
        [
            "T",
            *(f"pass@{k}" for k in ks),
            f"maj@{ks[-1]}",
            "entropy",
            "self-BLEU",
            "dist-1",
            "dist-2",
            "answers",
            "cut off",
        ]
    ]
    for t, value in results["temperatures"].items():
        d = value["diversity"]

        def number(x):
            return "-" if x is None else f"{x:.3f}"

        total = sum(value["ended_by"].values())
        row = [t, *(cell(value["pass@k"][k]) for k in ks), cell(value["maj@k"][ks[-1]]) if "maj@k" in value else "-"]
        row += [number(d[key]) for key in ("entropy", "self_bleu", "distinct_1", "distinct_2", "distinct_answers")]
        rows.append([*row, f"{100 * value['ended_by'].get('length', 0) / total:.1f}%"])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths)) for row in rows]
    for t, value in results["temperatures"].items():
        for group, split in value["splits"].items():
            cells = ", ".join(f"pass@{k} {cell(split['pass@k'][k]).strip()}" for k in (ks[0], ks[-1]))
            lines.append(f"T={t} {group}: {split['problems']} problems, {cells}")
        found = ", ".join(f"{how} {times}" for how, times in sorted(value["found_by"].items()))
        lines.append(f"T={t} answers found by: {found}; ended by: {json.dumps(value['ended_by'])[1:-1]}")
    d = first["diversity"]
    lines.append(
        f"diversity: first {d['samples_per_problem']} samples a problem, words {d['tokeniser']}, Self-BLEU of order 4, "
        f"smoothing 1, {d['mean_words']:.1f} words a sample at T={next(iter(results['temperatures']))}"
    )
    return "\n".join(lines)


def print_comparison(results: list[dict]) -> None:
    """Paired differences of each result file to the first one of the list, in points of pass@k."""
    for other in results[:-1]:
        for t, mine in results[-1]["temperatures"].items():
            theirs = other["temperatures"].get(t)
            ks = [int(k) for k in mine["pass@k"] if theirs and k in theirs["pass@k"]]
            for k in sorted({ks[0], ks[len(ks) // 2], ks[-1]}) if ks else []:
                if d := paired_difference(theirs, mine, k):
                    mean, low, high = (100 * d[key] for key in ("mean", "low", "high"))
                    print(
                        f"T={t} pass@{k}: {results[-1]['name']} - {other['name']} = {mean:+.1f} "
                        f"[{low:+.1f}, {high:+.1f}] points on {d['problems']} shared problems"
                        + " *"
                        * (not low <= 0 <= high)
                    )


# ---------------------------------------------------------------------------------------------------------------------
# main


def write_results(path: Path, results: dict) -> dict:
    """Written beside and renamed into place; returned as a reader sees it, with text for keys."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(results, indent=1, ensure_ascii=False))
    os.replace(temporary, path)
    return json.loads(path.read_text())


def check_args(args: Args) -> list[int]:
    """Refuses what cannot work before anything is loaded; returns the ks."""
    if args.task == "humaneval" and not args.allow_code_execution:
        fail(
            "humaneval runs programs that a model wrote, in processes without files, network or environment "
            "(grading/sandbox.py), on this machine; say --allow-code-execution if that is what you want"
        )
    if args.task not in HUB and not args.task.endswith((".jsonl", ".jsonl.gz")):
        fail(f"--task {args.task}: not gsm8k, math or humaneval, nor a .jsonl file")
    if args.n < 1 or args.max_new_tokens < 1 or args.diversity_samples < 1:
        fail("--n, --max-new-tokens and --diversity-samples must be at least 1")
    if not args.temperatures or min(args.temperatures) < 0:
        fail("--temperatures needs numbers that are 0 or more")
    if not 0 < args.top_p <= 1 or not 0 <= args.min_p < 1 or args.top_k < 0:
        fail("--top-p must be in (0, 1], --min-p in [0, 1), --top-k 0 or more")
    ks = sorted(set(args.ks)) or sorted({2**i for i in range(args.n.bit_length())} | {args.n})
    if ks[0] < 1 or ks[-1] > args.n:
        fail(f"pass@{ks[-1]} cannot be estimated from --n {args.n} samples; every k must be from 1 to n")
    return ks


def end_tokens(tokenizer, directory: str) -> list[int]:
    """Every token that the model's files call an end; chat models name their end of turn in generation_config.json."""
    ids = [tokenizer.eos_token_id]
    for name in ("config.json", "generation_config.json"):
        path = Path(directory) / name
        value = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        ids += value if isinstance(value, list) else [value]
    return sorted({i for i in ids if i is not None})


def main(args: Args) -> None:
    others = [read_results(path) for path in args.compare]
    tasks = {Path(task).name for task in [result["task"] for result in others] + [args.task] * bool(args.model)}
    if len(tasks) > 1:
        fail(f"--compare: these are results on different tasks, {', '.join(sorted(tasks))}")
    if not args.model:
        if len(others) < 2:
            fail("give a --model, or two or more results.json files to --compare")
        directory = Path(args.output_dir or "runs/compared")
        directory.mkdir(parents=True, exist_ok=True)
        for result in others:
            print(f"{result['name']}\n{table(result)}\n")
        print_comparison(others)
        figure(directory / "passk.png", others)
        return print(f"figure in {directory / 'passk.png'}")
    ks = check_args(args)
    problems = load_problems(args)
    # Without cpu=True two processes on a machine without a GPU would each believe to be alone.
    wait = InitProcessGroupKwargs(timeout=timedelta(days=7))
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[wait])
    if args.engine == "vllm" and accelerator.num_processes > 1:
        fail("--engine vllm runs in one process; start it with python, not with accelerate launch")
    tail = Path(args.model)
    name = args.name or (
        tail.parent.name if tail.name == "model" and tail.parent.name else tail.name
    )  # runs/dgpo/model
    directory = Path(args.output_dir or f"runs/eval/{name}-{Path(args.task).stem}")
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
    fixed = {"weights": fixed[0], "engine": args.engine, "dtype": dtype, "top_p": args.top_p, "top_k": args.top_k}
    fixed |= {"min_p": args.min_p, "max_new_tokens": args.max_new_tokens, "stop": list(stops), "seed": args.seed}
    fixed |= {"eos": end_tokens(tokenizer, weights)}
    runs = [fixed | {"temperature": float(t)} for t in dict.fromkeys(args.temperatures)]
    runs = [(digest(sorted(settings.items())), settings) for settings in runs]
    form = encode(tokenizer, prompt_texts(args, tokenizer, [{"question": "?"}])[0])  # the prompt around the question
    subject = {"weights": fixed["weights"], "task": args.task, "prompt": digest(form)}
    path = directory / "results.json"
    if path.exists() and not args.overwrite:
        old = read_results(str(path))
        if old["subject"] != subject:
            differ = ", ".join(key for key in subject if old["subject"].get(key) != subject[key])
            fail(f"{path} holds results of {old['name']} with other {differ}; choose an --output-dir, or --overwrite")
    directory.mkdir(parents=True, exist_ok=True)
    accelerator.print(
        f"{name}: {len(problems)} problems of {args.task}, {args.n} samples at each of {len(runs)} temperatures"
    )
    accelerator.print(
        f"first prompt as the model sees it: {tokenizer.decode(prompts[0])!r}; ends at {stops or 'its end token'}"
    )

    # What can fail does so before the sampling.
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
    layers = list(sandbox.layers()) if args.task == "humaneval" else []
    if args.task == "humaneval":
        accelerator.print(f"sandbox layers: {', '.join(layers) or 'none'}")

    sample_all(args, accelerator, directory, problems, prompts, runs, tokenizer, weights, dtype)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    samples, _ = read_samples(directory)
    results = {"name": name, "model": args.model, "task": args.task, "subject": subject, "temperatures": {}}
    if args.task == "humaneval":
        results["sandbox"] = layers
    for config, settings in runs:
        keys = [[(config, p["id"], digest(ids), j) for j in range(args.n)] for p, ids in zip(problems, prompts)]
        rows = [[samples[key] for key in row] for row in keys]
        grades = grade_all(args, problems, [[r["text"] for r in row] for row in rows])
        value = measure(args, settings, ks, problems, rows, grades, embed)
        results["temperatures"][f"{settings['temperature']:g}"] = value
    results = write_results(path, results)
    print(table(results))
    print_comparison([*others, results])
    figure(directory / "passk.png", [*others, results])
    print(f"numbers in {path}, figure in {directory / 'passk.png'}")


if __name__ == "__main__":
    main(tyro.cli(Args))
