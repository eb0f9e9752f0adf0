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

import hashlib
import json
import math
import os
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas
import torch
import tyro
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LogitsProcessorList, StopStringCriteria
from transformers.generation import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from grading import sandbox
from grading.answers import cut, find_code, find_gsm8k, find_math, grade_gsm8k, grade_math, vote
from grading.metrics import measure, paired_difference, pass_at_k  # noqa: F401 (people import pass_at_k from here)
from grading.tasks import HUB, digest, load_problems, prompt_texts
from preferences import common_prefix, encode, fail, failing, read_rows


@dataclass
class Args:
    # What
    model: str = ""  # Model to sample: on the hub or a directory; empty: grade --samples, or only draw --compare
    samples: str = ""  # Completions made elsewhere, a .jsonl file, in place of --model (docs/eval_passk.md)
    task: str = "gsm8k"  # gsm8k, math, humaneval, or a .jsonl file in GSM8K's form, with answers or without
    data: str = ""  # The task's problems from a file instead of the hub
    problems: int = 200  # Problems drawn at random, 0 for all (H-DPO A.5, DPL 4.2; HumanEval is always whole)
    prompt: Literal["auto", "chat", "text"] = "auto"  # Chat template or text with examples; auto: what the model has
    shots: Literal[0, 2, 8] = 8  # Examples in GSM8K's text prompt: 8 (H-DPO A.5) or 2 (DPL C.3); MATH has 2 (DPL C.3)

    # Sampling
    n: int = 200  # Samples per problem and temperature (H-DPO A.5; DPL: 128)
    temperatures: tuple[float, ...] = (0.2, 0.5, 1.0)  # Sampling temperatures, 0 is greedy (H-DPO: 0.1 to 1.5)
    top_p: float = 1.0  # Nucleus sampling, 1 is off (H-DPO; DPL's baseline: 0.9)
    top_k: int = 0  # Only the k likeliest tokens, 0 is off (H-DPO; DPL's baseline: 180; transformers' own default: 50)
    min_p: float = 0.0  # Only tokens this likely against the likeliest, 0 is off (H-DPO; DPL's baseline: 0.1)
    max_new_tokens: int = 512  # Longest completion (H-DPO A.4)
    stop: tuple[str, ...] = ()  # Strings that end a completion; empty: the task's own for text prompts
    seed: int = 0  # Seed of the samples, the choice of problems and the bootstrap (ours)

    # Hardware
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on a GPU, float32 elsewhere
    tokens_per_device: int = 32768  # Tokens in the cache at once, at full length (4 GB for Mistral-7B in bfloat16)

    # Grading and metrics
    allow_code_execution: bool = False  # HumanEval only: run the model's programs, inside grading/sandbox.py (ours)
    timeout: float = 3.0  # Seconds for one program (human-eval)
    ks: tuple[int, ...] = ()  # k of pass@k and maj@k; empty: the powers of two up to n, and n (DPL Table 3)
    difficulty_from: str = ""  # results.json of a base model: splits by its expected samples, to 4, 64, more (DPL 4.2)
    diversity_samples: int = 25  # Samples per problem, the first ones, for the diversity metrics (H-DPO A.4)
    ref_model: str = ""  # Reference for the cross-entropy of these samples (DPL Fig. 2); empty: none
    embedder: str = ""  # sentence-transformers model for the embedding distance (DPL Eq. 44); empty: none

    # Output
    name: str = ""  # The model's name in tables and legends; empty: the end of --model
    compare: tuple[str, ...] = ()  # results.json of other models: in the same figure, with paired differences
    output_dir: str = ""  # Directory for the three files; empty: runs/eval/<name>-<task>
    overwrite: bool = False  # Replace a results.json of another model, prompt or task; samples are kept apart anyway


# sampling


def find_weights(model: str) -> str:
    """The directory that holds the model's files; a model on the hub is downloaded."""
    if os.path.isdir(model):
        return model
    from huggingface_hub import snapshot_download

    with failing(f"{model}: neither a directory nor a model that the hub gives out"):
        return snapshot_download(model, allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"])


def hash_weights(directory: str) -> str:
    """Hash of the contents of config and weights, wherever they lie; with an adapter, of its base too."""
    total, folder = hashlib.sha256(), Path(directory)
    weights = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
    for path in sorted([*weights, *folder.glob("config.json")]):
        with open(path, "rb") as file:
            total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    if (folder / "adapter_config.json").exists():
        settings = json.loads((folder / "adapter_config.json").read_text())
        base = settings.pop("base_model_name_or_path")
        total.update(json.dumps(settings).encode() + hash_weights(find_weights(base)).encode())
    return total.hexdigest()[:16] if weights else fail(f"{directory} holds no weights (*.safetensors)")


def choose_dtype(args: Args) -> str:
    return args.dtype if args.dtype != "auto" else "bfloat16" if torch.cuda.is_available() else "float32"


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
    """Adds rows; a kill tears at most the last line, and a torn one is ended before the next."""
    with open(path, "a+b") as file:
        file.seek(max(0, file.tell() - 1))
        file.write(b"\n" * (file.read() not in (b"", b"\n")))
        file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def sample_all(args, accelerator, directory: Path, problems, prompts, runs, tokenizer, weights: str) -> None:
    """Draws what is missing. `runs` lists (config, settings); this process takes every num_processes-th batch."""
    have, torn = read_samples(directory)
    if torn:
        accelerator.print(f"{torn} torn line(s) of a killed run skipped")
    keys = [(problem["id"], digest(ids)) for problem, ids in zip(problems, prompts)]
    plan = make_plan(problems, list(map(len, prompts)), args.n, args.max_new_tokens, args.tokens_per_device)
    todo = [(*run, batch) for run in runs for batch in plan if any((run[0], *keys[i], j) not in have for i, j in batch)]
    if not todo:  # on all processes alike: nobody waits for anybody
        return
    accelerator.wait_for_everyone()  # everyone has read the files before anyone writes
    todo = todo[accelerator.process_index :: accelerator.num_processes]
    with failing(f"{args.model} cannot be loaded"):
        model = AutoModelForCausalLM.from_pretrained(weights, dtype=getattr(torch, runs[0][1]["dtype"]))
    model, stops = model.to(accelerator.device).eval(), runs[0][1]["stop"]
    stopper = StopStringCriteria(tokenizer, stops) if stops else None
    path = directory / f"samples.{accelerator.process_index}.jsonl".replace(".0.", ".")
    drawn, start, described = 0, time.monotonic(), set()
    total = sum(len(batch) for *_, batch in todo)
    with tqdm(total=total, desc="samples", unit="", disable=not accelerator.is_main_process) as bar:
        for config, settings, batch in todo:
            counts = Counter(i for i, _ in batch)  # in the order of the batch
            seeds = [sample_seed(args.seed, problems[i]["id"], index) for i, index in batch]
            rows = [] if config in described else [{"config": config, "settings": settings}]
            described.add(config)
            shared = ([prompts[i] for i in counts], list(counts.values()))
            drawn_now = sample_batch(model, tokenizer, *shared, seeds, settings, stopper)
            for (i, index), (tokens, logp, end) in zip(batch, drawn_now):
                drawn += len(tokens)
                if (config, *keys[i], index) in have:
                    continue
                row = dict(zip(("config", "problem", "prompt", "index"), (config, *keys[i], index)))
                text = cut(completion_text(tokenizer, prompts[i], tokens), settings["stop"])
                rows.append(row | {"text": text, "tokens": len(tokens), "logp": logp, "end": end})
                rows[-1] |= {"ids": tokens} if index < args.diversity_samples else {}
            append(path, rows)
            bar.update(len(batch))
            bar.set_postfix_str(f"{drawn / (time.monotonic() - start):,.0f} tokens/s, T={settings['temperature']:g}")


def load_reference(args: Args) -> tuple:
    """The directory of --ref-model, and the tokenizer of the prompts: --model's, or where there is none its own."""
    paths = [find_weights(path) for path in (args.ref_model, args.model) if path]
    with failing("--ref-model, --model: a tokenizer cannot be loaded"):
        tokenizers = [AutoTokenizer.from_pretrained(path) for path in paths]
    if tokenizers[0].get_vocab() != tokenizers[-1].get_vocab():
        fail(f"--ref-model {args.ref_model} has other tokens than --model, so no log-probs of those that are drawn")
    return paths[0], tokenizers[-1]


@torch.no_grad()
def score(args: Args, directory: Path, problems: list[dict], runs: list, weights: str, tokenizer) -> None:
    """Adds ref_logp, the log-prob under --ref-model, and ref_tokens to the samples whose diversity is measured.

    Drawn samples are scored token by token as drawn, texts from elsewhere as the tokenizer reads them, without an end.
    """
    path, mark, known, jobs = directory / "reference.jsonl", (hash_weights(weights), choose_dtype(args)), {}, []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(ValueError):  # torn by a kill
            known |= json.loads(line)
    texts, _ = prompt_texts(replace(args, model=args.model or args.ref_model), tokenizer, problems)
    for _, rows in runs:
        for text, prompt, row in zip(texts, encode(tokenizer, texts), rows):
            for r in row[: args.diversity_samples]:
                ids = prompt + r["ids"] if "ids" in r else encode(tokenizer, [text + r["text"]])[0]
                start = max(1, common_prefix(prompt, ids))
                jobs.append((r, ids, start, digest(mark, start, ids)))
    if any(key not in known for *_, key in jobs):
        with failing(f"{args.ref_model} cannot be loaded"):
            model = AutoModelForCausalLM.from_pretrained(weights, dtype=getattr(torch, mark[1])).eval()
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    for r, ids, start, key in tqdm(jobs, desc="reference", unit="", leave=False):
        if key not in known:
            whole = torch.tensor(ids, device=model.device)
            logits = model(whole[None], use_cache=False, logits_to_keep=len(ids) - start + 1).logits[0, :-1].float()
            known[key] = -cross_entropy(logits, whole[start:], reduction="sum").item()
            append(path, [{key: known[key]}])
        r |= {"ref_logp": known[key], "ref_tokens": len(ids) - start}


# grading: how answers are read and compared is in grading/answers.py, how programs are run in grading/sandbox.py

_sandboxes = threading.local()


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
    raise sandbox.SandboxError(f"{problem['entry_point']}: {reason}")


def grade(task: str, problem: dict, text: str, timeout: float = 3.0) -> tuple[bool, str | None, str]:
    """(right, a name that equal answers share, how the answer was found) for a task with answers."""
    if task == "humaneval":
        return run_humaneval(problem["row"], text, timeout), None, "program"
    find, right = (find_math, grade_math) if task == "math" else (find_gsm8k, grade_gsm8k)
    answer, how = find(text)
    if answer is None or right(text, problem["reference"]):
        return answer is not None, None if answer is None else "right", how
    return False, vote(answer) if task == "math" else str(answer), how


def grade_all(args: Args, problems: list[dict], texts: list[list[str]]) -> list[list[tuple]]:
    """Grades of all samples, each different text of a problem once."""
    jobs = list({(i, text) for i, row in enumerate(texts) for text in row})

    def work(job):
        return grade(args.task, problems[job[0]], job[1], args.timeout)

    # one thread where answers are compared: they share a process
    with ThreadPoolExecutor(os.cpu_count() if args.task == "humaneval" else 1) as pool:
        try:
            done = dict(zip(jobs, tqdm(pool.map(work, jobs), total=len(jobs), desc="grading", leave=False)))
        except sandbox.SandboxError as error:
            pool.shutdown(cancel_futures=True)
            fail(f"the sandbox failed, and that is no wrong answer: {error}. The samples are kept; run again")
    return [[done[i, text] for text in row] for i, row in enumerate(texts)]


# figures and tables


def read_results(path: str) -> dict:
    with failing(f"{path}: no results.json of this script"):
        results = json.loads(Path(path).read_text())
        assert results["temperatures"] and results["name"] and results["task"]
        return results


def some_of(ks: list) -> list:
    """First, middle and last."""
    return [ks[i] for i in sorted({0, len(ks) // 2, len(ks) - 1})] if ks else []


def figure(path: Path, results: list[dict]) -> None:
    """pass@k against k and against temperature (H-DPO's Figures 3 and 4); one kind of line a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    points = []  # (model, temperature, k, cell)
    for model, result in enumerate(results):
        for t, value in result["temperatures"].items():
            points += [(model, float(t), int(k), cell) for k, cell in value["pass@k"].items()]
    temperatures, ks = (sorted({point[part] for point in points}) for part in (1, 2))
    panels = [(2, 1, temperatures, "k, number of samples", "temperature {:g}")]
    panels += [(1, 2, some_of(ks), "sampling temperature", "pass@{}")] * (len(temperatures) > 1)
    size = (5.2 * len(panels) + 0.8, 4.7)
    drawing, (axes,) = plt.subplots(1, len(panels), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis, (x, line, values, label, legend) in zip(axes, panels):
        for value, colour in zip(values, plt.cm.viridis(np.linspace(0.0, 0.8, len(values)))):
            for model, (result, style) in enumerate(zip(results, ["-", "--", ":", "-."] * len(results))):
                cells = sorted((point[x], point[3]) for point in points if (point[0], point[line]) == (model, value))
                at, cells = [at for at, _ in cells], [cell for _, cell in cells]
                mean, low, high = ([100 * cell[key] for cell in cells] for key in ("mean", "low", "high"))
                name = legend.format(value) + f", {result['name']}" * (len(results) > 1)
                axis.plot(at, mean, style, marker="o", markersize=3.5, color=colour, label=name)
                axis.fill_between(at, low, high, color=colour, alpha=0.12, linewidth=0)
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=9)
    axes[0].set_ylabel("pass@k: problems solved, %")
    axes[0].set_xscale("log", base=2)
    axes[0].set_xticks(ks, map(str, ks))
    first = next(iter(results[0]["temperatures"].values()))
    about = f"{len(first['problems'])} problems, {first['n']} samples, 95% intervals"
    names = ", ".join(result["name"] for result in results)
    drawing.suptitle(f"{names}; {Path(results[0]['task']).name}: {about}", fontsize=11)
    drawing.savefig(path, dpi=130)
    plt.close(drawing)
    print(f"figure in {path}")


def percent(cell: dict, sign: str = "") -> str:
    """A mean with its interval, in percent."""
    mean, low, high = (f"{100 * cell[key]:{sign}.1f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def table(results: dict) -> str:
    """The numbers of one result file for the terminal: a line a temperature, then what does not fit into it."""
    rows, notes = [], []
    for t, value in results["temperatures"].items():
        d, ks = value["diversity"], some_of(list(value.get("pass@k", {})))
        row = {"T": t} | {f"pass@{k}": percent(value["pass@k"][k]) for k in ks}
        row |= {f"maj@{k}": percent(value["maj@k"][k]) for k in ks[-1:] if "maj@k" in value}
        names = ["entropy", "cross_entropy", "cross_entropy_per_token", "self_bleu", "distinct_1", "distinct_2"]
        for name in [*names, "distinct_answers", "mean_words"]:
            row |= {name: "-" if d[name] is None else f"{d[name]:.3f}"} if name in d else {}
        rows.append(row)
        for group, split in value.get("splits", {}).items():
            cells = ", ".join(f"pass@{k} {percent(split['pass@k'][k])}" for k in ks)
            notes.append(f"T={t} {group}: {split['problems']} problems, {cells}")
        for name in ("found_by", "ended_by"):
            counts = ", ".join(f"{how} {times}" for how, times in sorted(value.get(name, {}).items()))
            notes += [f"T={t} {name}: {counts}"] if counts else []
    notes.append(f"diversity: first {d['samples_per_problem']} samples, words {d['tokeniser']}, Self-BLEU of order 4")
    if "ref_model" in d:
        notes.append(f"cross_entropy: mean -log-prob of a sample under {d['ref_model']}, in nats")
    return "\n".join([pandas.DataFrame(rows).fillna("-").to_string(index=False), *notes])


def compare(directory: Path, results: list[dict]) -> None:
    """Paired differences of the other result files to the last one, in points of pass@k, and one figure of all."""
    if not all("pass@k" in value for result in results for value in result["temperatures"].values()):
        return  # prompts without answers
    *others, last = results
    for other in others:
        for t, mine in last["temperatures"].items():
            theirs = other["temperatures"].get(t, {"pass@k": {}})
            for k in some_of([int(k) for k in mine["pass@k"] if k in theirs["pass@k"]]):
                if d := paired_difference(theirs, mine, k):
                    about = f"{percent(d, '+')} points on {d['problems']} shared problems"
                    sure = "" if d["low"] <= 0 <= d["high"] else " *"
                    print(f"T={t} pass@{k}: {last['name']} - {other['name']} = {about}{sure}")
    figure(directory / "passk.png", results)


def check_args(args: Args) -> None:
    """Refuses what cannot work before anything is loaded."""
    counts = (args.n, args.max_new_tokens, args.diversity_samples, args.tokens_per_device)
    task = args.task in HUB or args.task.endswith((".jsonl", ".jsonl.gz"))
    heat = args.temperatures and all(0 <= t < math.inf for t in args.temperatures)
    one = not args.samples or len(args.temperatures) == 1
    for right, message in (
        (task, "--task: gsm8k, math, humaneval or a .jsonl file"),
        (min(counts) > 0, "--n, --max-new-tokens, --diversity-samples and --tokens-per-device must be at least 1"),
        (args.problems >= 0 and args.seed >= 0, "--problems must be 0 (all) or more, --seed 0 or more"),
        (heat, "--temperatures must be 0 or more"),
        (0 < args.top_p <= 1, "--top-p must be above 0 and at most 1"),
        (0 <= args.min_p < 1 and args.top_k >= 0, "--min-p must be at least 0 and below 1, --top-k 0 or more"),
        (0 < args.timeout < math.inf, "--timeout must be a number of seconds above 0"),
        ("" not in args.stop, "--stop: the empty text would end every completion at its beginning"),
        (not args.samples or not args.model, "--samples takes the place of --model; give one of them"),
        (one, "--samples: say the one temperature they were drawn at, as in --temperatures 0.7"),
    ):
        right or fail(message)
    if args.task == "humaneval" and not args.allow_code_execution and (args.model or args.samples):
        fail(
            "humaneval runs programs that a model wrote, in processes without files, network or environment "
            "(grading/sandbox.py), on this machine; say --allow-code-execution if that is what you want"
        )


def load_task(args: Args) -> tuple[list[dict], list[str]]:
    """The problems, and the sandbox's layers for HumanEval. What cannot be graded is an error now, not after hours."""
    every = args.samples or args.task == "humaneval"
    problems = load_problems(args.task, args.data, 0 if every else args.problems, args.seed)
    if args.difficulty_from:
        first, groups = next(iter(read_results(args.difficulty_from)["temperatures"].values())), {}
        for p in first["problems"]:  # n/c is the expected number of samples of a base model (DPL 4.2)
            expected = p["n"] / p["c"] if p.get("c") else math.inf
            groups[p["id"]] = "easy (<= 4)" if expected <= 4 else "medium (to 64)" if expected <= 64 else "hard (> 64)"
        problems = [p | {"group": groups.get(p["id"])} for p in problems]
        if not any(p["group"] for p in problems):
            fail(f"--difficulty-from {args.difficulty_from}: none of its problems is among these")
    if args.task != "humaneval":
        return problems, []
    with failing("humaneval cannot be graded here"):
        layers = list(sandbox.layers())
        for problem in problems:
            run_humaneval(problem["row"], "    pass\n", args.timeout)
    return problems, layers


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
    with failing("--output-dir"):
        directory.mkdir(parents=True, exist_ok=True)
    return directory


def given_samples(args: Args, problems: list[dict]) -> tuple[list[dict], list[list[dict]]]:
    """The problems that --samples has completions of, and these, in the order of the file."""
    known = {p["question"]: p["id"] for p in problems} | {p["row"].get("task_id"): p["id"] for p in problems}
    rows = defaultdict(list)
    names = ("question", "problem", "prompt", "task_id")
    for number, row in enumerate(read_rows(args.samples, "", "")[0], 1):
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
    with failing(f"{args.model}: its tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(weights)
    texts, stops = prompt_texts(args, tokenizer, problems)
    prompts = encode(tokenizer, texts)
    fixed = [hash_weights(weights) if accelerator.is_main_process else None]
    broadcast_object_list(fixed)
    fixed = {"weights": fixed[0], "engine": "hf", "dtype": choose_dtype(args), "top_p": args.top_p, "top_k": args.top_k}
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
    accelerator.print(f"{name}: {len(problems)} problems of {args.task}, {args.n} samples, {len(runs)} temperatures")
    accelerator.print(f"first prompt: {tokenizer.decode(prompts[0])!r}; ends at {stops or 'its end token'}")
    sample_all(args, accelerator, directory, problems, prompts, runs, tokenizer, weights)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return None
    samples, _ = read_samples(directory)
    keys = [[(p["id"], digest(ids), j) for j in range(args.n)] for p, ids in zip(problems, prompts)]
    rows = [(settings, [[samples[config, *key] for key in row] for row in keys]) for config, settings in runs]
    return directory, subject, rows


def main(args: Args) -> None:
    check_args(args)
    others = [read_results(path) for path in args.compare]
    tasks = {Path(task).name for task in [r["task"] for r in others] + [args.task] * bool(args.model or args.samples)}
    if len(tasks) > 1:
        fail(f"--compare: these are results on different tasks, {', '.join(sorted(tasks))}")
    if not args.model and not args.samples:
        if len(others) < 2:
            fail("give a --model, or --samples, or two or more results.json files to --compare")
        directory = Path(args.output_dir or "runs/compared")
        directory.mkdir(parents=True, exist_ok=True)
        for result in others:
            print(f"{result['name']}\n{table(result)}\n")
        return compare(directory, others)

    # What can fail does so before the sampling.
    ks = [] if args.samples else choose_ks(args, args.n)
    problems, layers = load_task(args)
    embed = None
    if args.embedder:
        with failing("--embedder"):
            from sentence_transformers import SentenceTransformer

            embed = SentenceTransformer(args.embedder).encode
    reference = load_reference(args) if args.ref_model else None
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
    results = {"name": name, "model": args.model or args.samples, "task": args.task, "subject": subject}
    results |= {"sandbox": layers, "temperatures": {}}
    if reference:
        score(args, directory, problems, runs, *reference)
    for settings, rows in runs:
        graded = problems[0]["reference"] is not None
        grades = grade_all(args, problems, [[r["text"] for r in row] for row in rows]) if graded else None
        value = measure(args, settings, ks, problems, rows, grades, embed)
        results["temperatures"][f"{settings['temperature']:g}"] = value
    path = directory / "results.json"
    temporary = path.with_name(f".{path.name}")  # written beside and renamed into place
    temporary.write_text(json.dumps(results, indent=1, ensure_ascii=False))
    os.replace(temporary, path)
    results = json.loads(path.read_text())  # as a reader sees it, with text for keys
    print(f"{table(results)}\nnumbers in {path}")
    compare(directory, [*others, results])


if __name__ == "__main__":
    main(tyro.cli(Args))
