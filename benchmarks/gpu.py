"""What only a GPU can tell, the most important first, within nine minutes.

    python benchmarks/gpu.py                                      # one GPU; without one nothing is measured
    python benchmarks/gpu.py --items lora "trl lora" --lengths hh --save benchmarks/results/gpu_hh

    device      the rate of a bf16 matrix product, and what common.py's attention finds in this torch
    tests       pytest -m gpu
    resume      dgpo.py on the toy, killed and resumed: how far its weights are from those of undisturbed runs
    lora, full  training steps of Mistral-7B's shape with random weights; full at two depths, the larger one that fits
    trl ...     the same steps by TRL's DPOTrainer under sdpa with stored log-probs; collating is not in its time
    memory      the peak that memory.py simulates beside the measured one

LoRA (rank 16, base in bf16) and full fine-tuning (float32 weights, gradient checkpointing), for four objectives: DPO
with stored reference log-probs (hdpo.py); DGPO, which has no reference; DPO with the reference run at every step (a
frozen copy, or the model with its adapters off); and stored DPO as trainers without packing take it (sdpa, each
response with a prompt of its own, padded to the longest). What is timed is the whole step: collating, forward, loss,
backward, clipping, AdamW. The goal is an MFU of 45%; DGPO's Fig. 3 has 25% less time and 13.6% less memory than DPO
with a live reference.

Each item runs in a process of its own, which is ended when its time is up. A row is in the report as soon as it is
measured, errors as well, so that a run that is stopped keeps what it has.
"""

import contextlib
import gc
import inspect
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
import tyro
from lengths import DISTRIBUTIONS, describe
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from sides import BETA, LORA, make_mistral, make_pairs, peak_bytes, stored_dpo_losses, wait_for_device
from speed import Failed, Side
from torch.nn.functional import logsigmoid
from torch.utils.benchmark import Timer

import common
import dgpo
import eps_dpo

ROOT = Path(__file__).parents[1]
DEVICE, SHAPE, LAYERS = "cuda", {}, 32  # SHAPE: what is not as in MistralConfig, whose own shape is Mistral-7B's
OBJECTIVES = ("dpo stored", "dgpo", "dpo live", "padded")
RATIOS = ("dgpo", "dpo live"), ("dgpo", "dpo stored"), ("padded", "dpo stored")
# Dense bf16 operations a second, as the vendor states them; the PCIe and NVL parts are slower.
PEAK = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-80GB": 312e12}
TOKENS = {"lora": 4096, "full": 8192}  # in a micro-batch; LoRA keeps all activations
WARMUP = 2  # steps that allocate
TOY = ["--model", "toy/model", "--dataset", "toy/train.jsonl", "--lr", "1e-5", "--steps", "60", "--save-every", "10"]
KILLED = 35  # steps after which the toy's run is killed
SHORTEST = 30  # seconds that must be left for an item to be started
BUDGET = {"device": 90, "tests": 120, "resume": 100, "lora": 150, "full": 150}  # seconds that an item may take
BUDGET |= {"trl lora": 120, "trl full": 120, "memory": 90}


@dataclass
class Args:
    items: tuple[Literal[tuple(BUDGET)], ...] = tuple(BUDGET)
    """What to run"""
    minutes: float = 9
    """Time for all of it"""
    lengths: Literal[tuple(DISTRIBUTIONS)] = "ultrafeedback"
    """Length distribution of the pairs (lengths.py)"""
    pairs: int = 16
    """Pairs per optimizer step, as the scripts' --batch-size"""
    steps: int = 4
    """Timed steps, after two that are not"""
    trl_batches: tuple[int, ...] = (2, 4, 8)
    """TRL's per-device batches, ascending divisors of --pairs, to which they accumulate; it ends where one fails"""
    trl_python: str = sys.executable
    """A Python with TRL"""
    save: str = "benchmarks/results/gpu"
    """Write the report to SAVE.md, and each row at once to SAVE.jsonl"""


def fit_attention() -> str:
    """Make packed attention run under a torch older than the pinned one; a line on what that one lacks."""
    attend = common.varlen_attn
    lacks = [n for n in ("scale", "window_size", "enable_gqa") if n not in inspect.signature(attend).parameters]
    if lacks == ["enable_gqa"]:  # as 2.11, whose kernel shares keys and values between heads without being told
        common.varlen_attn = lambda *args, enable_gqa, **options: attend(*args, **options)
        return "varlen_attn lacks enable_gqa and is called without it"
    if lacks:
        common.flash_takes = lambda *_: False
        return f"varlen_attn lacks {', '.join(lacks)}: attention goes segment by segment"
    return "varlen_attn has all that common.py asks for"


FITTED = fit_attention()  # here, for the tests that import this file too


def matmul_rate(size: int = 8192) -> float:
    """bf16 operations a second of a square matrix product, the median of a second."""
    a, b = torch.randn(2, size, size, device=DEVICE, dtype=torch.bfloat16)
    timer = Timer("a @ b", globals={"a": a, "b": b})  # which waits for the device
    return 2 * size**3 / timer.blocked_autorange(min_run_time=1).median


def device(_args: Args) -> Iterator[tuple[str, dict]]:
    name, rate = torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE, matmul_rate()
    text = f"{name}, torch {torch.__version__}, {rate / 1e12:.0f} TFLOP/s measured; {FITTED}"
    yield "device", {"rate": rate, "peak": PEAK.get(name), "text": text}


def tests(_args: Args) -> Iterator[tuple[str, dict]]:
    command = ["-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "gpu", "tests/test_gpu.py"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    *lines, last = (done.stdout or done.stderr).splitlines()
    text = "; ".join([line for line in lines if line.startswith(("FAILED", "ERROR"))] + [last])
    yield "tests", {"failed" if done.returncode else "text": text}


def resume(_args: Args) -> Iterator[tuple[str, dict]]:
    """Three runs at once, one of which is killed and then resumed."""
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / run for run in ("killed", "whole", "again")]

        def start(folder: Path, *flags: str) -> subprocess.Popen:
            command = [sys.executable, __file__, "dgpo.py", *TOY, "--output-dir", str(folder), *flags]
            return subprocess.Popen(command, cwd=ROOT, stdout=sys.stderr)

        runs, metrics = [start(folder) for folder in folders], folders[0] / "metrics.jsonl"
        while runs[0].poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > KILLED):
            time.sleep(0.01)
        runs[0].kill()
        runs[0].wait()
        ends = [run.wait() for run in [*runs, start(folders[0], "--resume")]]
        if ends != [-signal.SIGKILL, 0, 0, 0]:
            raise Failed(f"the runs ended with exit codes {ends}")
        models = [load_file(folder / "model" / "model.safetensors") for folder in folders]
        models.append(load_file(ROOT / TOY[1] / "model.safetensors"))
    _, whole, *_ = models
    off, _, again, moved = (max((one[n] - whole[n]).abs().max().item() for n in whole) for one in models)
    text = f"weights of the killed and resumed run are off by {off:.1e} from an undisturbed one's, a second one's by "
    text += f"{again:.1e}; training moved them by {moved:.1e}"
    yield "resume", {"off": off, "again": again, "moved": moved, "text": text}


def layers_that_fit() -> int:
    """Of full fine-tuning: 16 bytes a weight and, for autocast and a live reference, two copies in bf16; 218M weights a
    layer and 262M beside them; the rest for activations and logits.
    """
    return min(LAYERS, int((torch.cuda.get_device_properties(0).total_memory - 10e9) / 4.8e9))


def make_model(tuning: str, layers: int):
    """The policy with random weights, in the types that the scripts give it."""
    model = make_mistral(SHAPE | {"num_hidden_layers": layers}, tuning == "lora", DEVICE).train()
    if tuning == "lora":
        return get_peft_model(model, LoraConfig(**LORA))
    model.activation_checkpointing_enable()
    return model


def frozen_copy(model):
    """The live reference, as eps_dpo.py has it: under LoRA the model itself, else a second one."""
    if isinstance(model, PeftModel):
        return model
    copy = make_mistral(SHAPE | {"num_hidden_layers": model.config.num_hidden_layers}, False, DEVICE)
    copy.set_attn_implementation(common.ATTENTION)
    return eps_dpo.freeze(copy, torch.bfloat16 if DEVICE == "cuda" else torch.float32)


def step_flops(model, tuning: str, rows: list[dict]) -> float:
    """Operations of a step in which every token runs once, checkpointing not counted.

    Forward 2, backward to the activations 2 and to the weights 2 (not under LoRA) operations for each weight of the
    body and token, and of the head and response token; attention 12 (LoRA too) for each layer, hidden unit and visible
    pair of tokens. Adapters are left out, as is the last token of a response, which predicts nothing.
    """
    config = model.config
    head = config.vocab_size * config.hidden_size
    body = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name) - 2 * head
    factor, total = 4 if tuning == "lora" else 6, 0
    for row in rows:
        prompt, *responses = (len(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        seen = prompt * (prompt + 1) / 2 + sum((r - 1) * prompt + (r - 1) * r / 2 for r in responses)
        total += factor * (body * (prompt + sum(responses) - 2) + head * sum(responses))
        total += 12 * config.num_hidden_layers * config.hidden_size * seen
    return total


def sequences(rows: list[dict]) -> list[tuple[list[int], list[int]]]:
    """Prompt and response, of all chosen and then of all rejected responses."""
    return [(row["prompt_ids"], row[f"{part}_ids"]) for part in ("chosen", "rejected") for row in rows]


def plain_logps(model, pairs: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """(sequences,): summed log-probs of the responses to prompts, from one batch that is padded to the longest."""
    ids, mask = torch.zeros(2, len(pairs), max(len(prompt + response) for prompt, response in pairs), dtype=torch.long)
    for i, (prompt, response) in enumerate(pairs):
        ids[i, : len(prompt + response)], mask[i, : len(prompt + response)] = torch.tensor(prompt + response), 1
    with torch.autocast(DEVICE, torch.bfloat16, DEVICE == "cuda" or torch.is_autocast_enabled(DEVICE)):
        logits = model(input_ids=ids.to(DEVICE), attention_mask=mask.to(DEVICE), use_cache=False).logits
    sums = []
    for own, (prompt, response) in zip(logits, pairs):
        logps = own[len(prompt) - 1 : len(prompt + response) - 1].float().log_softmax(-1)
        sums.append(logps.gather(1, torch.tensor(response, device=DEVICE)[:, None]).sum())
    return torch.stack(sums)


@torch.no_grad()
def noise(model, rows: list[dict]) -> dict:
    """Largest difference of a response's summed log-prob to a plain forward of it alone: packed, and padded.

    Both change nothing in exact arithmetic; the second is what any trainer that pads accepts.
    """
    model.set_attn_implementation("sdpa")
    alone = torch.cat([plain_logps(model, [one]) for one in sequences(rows)])
    padded = plain_logps(model, sequences(rows))
    model.set_attn_implementation(common.ATTENTION)
    packed = torch.cat(common.response_logps(model, common.collate(rows).to(DEVICE)))
    off, off_padded = ((one - alone).abs().max().item() for one in (packed, padded))
    text = f"of a response off by {off:.1e} packed, by {off_padded:.1e} padded, from a forward of its own"
    return {"off": off, "off_padded": off_padded, "logps": alone.tolist(), "text": text}


def pair_losses(model, reference, objective: str, rows: list[dict]) -> torch.Tensor:
    """(pairs,)"""
    if objective == "padded":
        return stored_dpo_losses(*plain_logps(model, sequences(rows)).chunk(2))
    batch = common.collate(rows).to(DEVICE)
    if objective == "dgpo":
        return dgpo.forward(model, batch, dgpo.Args())[0]
    if objective == "dpo stored":
        return stored_dpo_losses(*common.response_logps(model, batch))
    with torch.no_grad(), model.disable_adapter() if reference is model else contextlib.nullcontext():
        a0, b0 = common.response_logps(reference, batch)
    a, b = common.response_logps(model, batch)
    return -logsigmoid(BETA * ((a - a0) - (b - b0)))


def split(rows: list[dict], most: int, padded: bool) -> list[list[dict]]:
    """Micro-batches of at most so many tokens, or one pair each; padded ones in the order in which the pairs come."""
    if not padded:
        lengths = [sum(map(len, row.values())) for row in rows]
        return [[rows[i] for i in own] for own in common.micro_batches([*range(len(rows))], lengths, most, 1)[0]]
    batches = [[]]
    for row in rows:
        both = [*batches[-1], row]
        fits = 2 * len(both) * max(len(prompt + response) for prompt, response in sequences(both)) <= most
        batches[-1:] = [both] if fits or len(both) == 1 else [batches[-1], [row]]
    return batches


def rates(seconds: list[float], peak: int, layers: int, rows: list[dict], operations: float) -> dict:
    """What the table says of timed steps over these rows."""
    return {
        "seconds": seconds,
        "peak": peak,
        "layers": layers,
        "pairs_per_second": len(rows) / len(seconds) / median(seconds),
        "tokens_per_second": sum(len(ids) for row in rows for ids in row.values()) / sum(seconds),
        "flops": operations / sum(seconds),
    }


def measure(model, tuning: str, objective: str, rows: list[dict], pairs: int) -> dict:
    """Steps of so many pairs, through all rows."""
    model.zero_grad()
    model.set_attn_implementation("sdpa" if objective == "padded" else common.ATTENTION)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    reference = frozen_copy(model) if objective == "dpo live" else None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, seconds = torch.optim.AdamW(trained, lr=1e-7, weight_decay=0.0, fused=True), []
    for begin in range(0, len(rows), pairs):
        wait_for_device()
        started = time.perf_counter()
        for own in split(rows[begin : begin + pairs], TOKENS[tuning], objective == "padded"):
            (pair_losses(model, reference, objective, own).sum() / pairs).backward()
        assert torch.nn.utils.clip_grad_norm_(trained, 1.0).isfinite(), "the gradient is not finite"
        optimizer.step()
        optimizer.zero_grad()
        wait_for_device()
        seconds.append(time.perf_counter() - started)
    timed, layers = rows[WARMUP * pairs :], model.config.num_hidden_layers
    return rates(seconds[WARMUP:], peak_bytes(), layers, timed, step_flops(model, tuning, timed))


def attempt(function, *args) -> dict:
    """What it finds, or how it failed; the memory that it held is free again."""
    try:
        return function(*args)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def train(tuning: str, args: Args) -> Iterator[tuple[str, dict]]:
    """All objectives, one after the other, with one model; of full fine-tuning at half the depth first."""
    rows = make_pairs(args.lengths, args.pairs * (WARMUP + args.steps))
    for layers in (LAYERS,) if tuning == "lora" else (layers_that_fit() // 2, layers_that_fit()):
        title, model = f"{args.lengths}, {tuning}, {layers} layers", make_model(tuning, layers)
        yield f"{title}, log-probs", attempt(noise, model, rows[:4])
        for objective in OBJECTIVES:
            yield f"{title}, {objective}", attempt(measure, model, tuning, objective, rows, args.pairs)
        del model
        gc.collect()


def trl(tuning: str, args: Args) -> Iterator[tuple[str, dict]]:
    layers = LAYERS if tuning == "lora" else layers_that_fit()
    spec = {"name": args.lengths, "batch_size": args.pairs, "steps": WARMUP + args.steps, "tuning": tuning}
    spec |= {"config": SHAPE | {"num_hidden_layers": layers}, "device": DEVICE}
    rows = make_pairs(args.lengths, args.pairs * spec["steps"])[args.pairs * WARMUP :]
    operations = step_flops(make_mistral(spec["config"], False, "meta"), tuning, rows)
    for device_batch in args.trl_batches:
        side = Side(args.trl_python, "trl_side.py", device_batch=device_batch, **spec)
        steps = [side.step() for _ in range(spec["steps"])]
        side.end()
        found = rates([step["seconds"] for step in steps[WARMUP:]], steps[-1]["peak"], layers, rows, operations)
        title = f"{args.lengths}, {tuning}, {layers} layers, TRL with {device_batch} pairs at a time"
        yield title, found | {"logps": side.ready["logps"]}


def memory(args: Args) -> Iterator[tuple[str, dict]]:
    """Steps of equal pairs under LoRA, which memory.py simulates when it is asked for them."""
    row = {"prompt_ids": [5] * 300, "chosen_ids": [6] * 300, "rejected_ids": [7] * 300}
    model = make_model("lora", LAYERS)
    rows, pairs = [row] * args.pairs * (WARMUP + 1), args.pairs
    yield "memory, measured", attempt(measure, model, "lora", "dgpo", rows, pairs)
    command = "benchmarks/memory.py --model Mistral-7B --lora-rank 16 --prompt 300 --response 300 "
    command += f"--pairs {pairs} --tokens-per-device {TOKENS['lora']}"
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    head, _, row = done.stdout.strip().splitlines()[-3:]
    yield "memory, simulated", {"text": f"`python {command}`: {head} {row}"}


ITEMS = {"device": device, "tests": tests, "resume": resume, "memory": memory}
ITEMS |= {tuning: lambda args, tuning=tuning: train(tuning, args) for tuning in TOKENS}
ITEMS |= {f"trl {tuning}": lambda args, tuning=tuning: trl(tuning, args) for tuning in TOKENS}


def launch(item: str, args: Args, seconds: float) -> Iterator[tuple[str, dict]]:
    """The rows of an item from a process of its own, which is ended after so many seconds with all that it started."""
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    settings = {"env": {"CUDA_VISIBLE_DEVICES": "0"} | os.environ | offline}  # TRL refuses to see several GPUs
    settings |= {"text": True, "start_new_session": True, "stdout": subprocess.PIPE}
    with tempfile.TemporaryFile("w+") as errors:
        spec = json.dumps([item, asdict(args)])
        process = subprocess.Popen([sys.executable, __file__, spec], stderr=errors, **settings)
        timer = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        yield from map(json.loads, process.stdout)
        code = process.wait()
        timer.cancel()
        errors.seek(0)
        said = errors.read()
    if code == -signal.SIGKILL:
        raise Failed(f"ended after {seconds:.0f} s")
    if code:
        print(said[-2000:], file=sys.stderr)
        raise Failed((said.strip().splitlines() or [f"exit code {code}"])[-1])


def comparisons(results: dict[str, dict]) -> list[str]:
    """Ratios of objectives with the same model, and full fine-tuning as a line in the number of layers."""
    models, lines = {}, []
    for title, one in results.items():
        if "seconds" in one:
            model, _, objective = title.rpartition(", ")
            models.setdefault(model, {})[objective] = median(one["seconds"]), one["peak"] / 1e9, one["layers"]
    for model, found in models.items():
        for ours, base in RATIOS:
            if ours in found and base in found:
                seconds, peak, _ = (a / b for a, b in zip(found[ours], found[base]))
                lines.append(f"- {model}, {ours} / {base}: time {seconds:.2f}, memory {peak:.2f}")
    half, whole = [*(found for model, found in models.items() if "full" in model), {}, {}][:2]
    for objective in [one for one in OBJECTIVES if one in half and one in whole]:
        (s, peak, few), (s_more, peak_more, many) = half[objective], whole[objective]
        per, per_peak = (s_more - s) / (many - few), (peak_more - peak) / (many - few)
        text = f"- full, {objective}: {per:.3f} s a step and {per_peak:.2f} GB a layer; on this line {LAYERS} layers "
        lines.append(f"{text}take {s + (LAYERS - few) * per:.2f} s and {peak + (LAYERS - few) * per_peak:.0f} GB")
    return lines


def report(results: dict[str, dict], args: Args) -> str:
    """Markdown: a sentence for each row without a time, a line for each with one, and how these compare."""
    head = ["# Training steps of a 7B model on a GPU\n"]
    head += [
        f"{args.pairs} pairs a step, {args.steps} timed steps, rates by their median. Every token is counted once;"
    ]
    head += [
        "recomputation, padding and a reference's forward are not. MFU is against the vendor's rate of dense bf16,"
    ]
    head += [f"then against the measured one.\n\n- lengths: {describe(args.lengths)}"]
    table = ["\n| lengths, tuning, layers, objective | pairs/s | tokens/s | peak memory | MFU | of measured |"]
    table += ["|---" * 6 + "|"]
    for title, one in results.items():
        if "seconds" not in one:
            head.append(f"- {title}: {one.get('text') or one['failed']}")
            continue
        limits = (results.get("device", {}).get(name) for name in ("peak", "rate"))
        shares = (f"{one['flops'] / limit:.0%}" if limit else "-" for limit in limits)
        cells = f"{one['pairs_per_second']:.1f}", f"{one['tokens_per_second']:.0f}", f"{one['peak'] / 1e9:.1f} GB"
        table.append(f"| {' | '.join((title, *cells, *shares))} |")
    return "\n".join([*head, *table, "", *comparisons(results), ""])


def main(args: Args) -> None:
    ends, results, rows = time.monotonic() + 60 * args.minutes, {}, Path(f"{args.save}.jsonl")
    rows.unlink(missing_ok=True)

    def record(item: str, title: str, found: dict) -> None:
        results[title] = found
        with rows.open("a") as file:
            print(json.dumps({"item": item, "title": title} | found), file=file)
        Path(f"{args.save}.md").write_text(report(results, args))
        print(f"{title}: {found.get('text') or found.get('failed') or found['seconds']}", flush=True)

    for item in args.items:
        left = ends - time.monotonic()
        try:
            if left < SHORTEST:
                raise Failed("not run: time")
            for title, found in launch(item, args, min(left, BUDGET[item])):
                record(item, title, found)
        except Exception as error:
            record(item, item, {"failed": str(error) or type(error).__name__})
    print(f"\n{report(results, args)}")


def child(script_or_spec: str) -> None:
    """A script of the repo, with attention made to fit, or one item, whose rows are the lines on stdout."""
    if script_or_spec.endswith(".py"):
        del sys.argv[0]
        runpy.run_path(str(ROOT / script_or_spec), run_name="__main__")
        return
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is no row
    item, args = json.loads(script_or_spec)
    for row in ITEMS[item](Args(**args)):
        print(json.dumps(row), file=out, flush=True)


if __name__ == "__main__":
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        child(sys.argv[1])
    else:
        given = tyro.cli(Args, description=__doc__)
        main(given) if torch.cuda.is_available() else print("no GPU here: nothing was measured")
