"""Training speed and memory of this repo beside TRL's DPOTrainer: same model, same pairs, same run, in alternation.

    python benchmarks/speed.py                         # all four length distributions; about 14 minutes on two cores
    python benchmarks/speed.py --lengths hh --rounds 5
    python benchmarks/speed.py --save benchmarks/results/cpu

TRL is installed from PyPI into benchmarks/.trl-venv at the first call, unless --trl-python names a Python that has it.
Each side is a process of its own that takes one optimizer step when it is told to; the other waits. What is timed is
the whole step: forward, loss, backward, clipping, AdamW. TRL runs at the per-device batch that is fastest for it, with
stored reference log-probs, whose computation is not timed on either side, and without gradient checkpointing, logging
or saving. This repo's time includes collating its batches, TRL's does not.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import torch
import tyro
from lengths import DISTRIBUTIONS, describe, pair_lengths
from sides import make_model, make_pairs
from tqdm import tqdm

HERE = Path(__file__).parent
TRL = ["torch==2.13.0", "trl==1.16.0", "transformers==5.23.0", "accelerate==1.15.0", "datasets==5.2.0", "peft==0.21.2"]
CHOOSING = 3  # steps at each per-device batch of TRL: one to warm up, then the fastest counts, as noise only slows
SLOWER = 1.25  # a larger per-device batch is not tried when the last one was slower than the best by this much


@dataclass
class Args:
    lengths: tuple[Literal["hh", "ultrafeedback", "tldr", "worst"], ...] = tuple(DISTRIBUTIONS)
    """Length distributions (lengths.py)"""
    pairs: int = 8
    """Pairs per optimizer step"""
    steps: int = 1
    """Optimizer steps in a row before the other side has its turn"""
    rounds: int = 3
    """Turns of each side, after the steps that choose TRL's per-device batch"""
    tokens_per_device: int = 1024
    """This repo's bound on a micro-batch: longer rows gain little on a CPU (scaling.py) and take more memory"""
    trl_batches: tuple[int, ...] = (1, 2, 4, 8)
    """TRL's per-device batches to choose the fastest from, ascending divisors of --pairs, to which they accumulate"""
    trl_python: str = ""
    """A Python with TRL; empty: make a virtual environment with the pinned versions"""
    save: str = ""
    """Write the table to SAVE.md and all numbers to SAVE.json"""


class Failed(Exception):
    pass


class Side:
    """A process that takes an optimizer step whenever it is asked to."""

    def __init__(self, python: str, script: str, **spec):
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [python, str(HERE / script), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.ready = self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.errors.seek(0)
            raise Failed(f"exit code {code}: {self.errors.read()[-2000:]}")
        return json.loads(line)

    def step(self) -> dict:
        """{"seconds", "cpu_seconds", "peak"} of one optimizer step."""
        try:
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # answer() says why
        return self.answer()

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()


def trl_environment() -> str:
    """Path of a Python that has TRL at the pinned version, installed at the first call."""
    folder = HERE / ".trl-venv"
    python, complete = folder / "bin/python", folder / "complete"
    if not complete.exists():
        print(f"installing {' '.join(TRL)} into {folder}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *TRL], check=True)
        complete.touch()
    return str(python)


def matmul_rate(size: int = 2048, repeats: int = 5) -> float:
    """Float32 operations a second of a square matrix product; the fastest of a few, as the machine could do it."""
    a, b = torch.randn(2, size, size).unbind()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times)


def step_flops(model, lengths: list[tuple[int, int, int]]) -> float:
    """Operations of one training step in which every token is computed once: forward and twice that backward.

    6 * body parameters * tokens + 6 * head parameters * response tokens
    + 12 * layers * hidden size * (query, key) pairs that attention may see
    The last token of a response predicts nothing and is not run.
    """
    head = model.lm_head.weight.numel()
    body = sum(p.numel() for p in model.parameters()) - head  # the head is the embedding
    config, total = model.config, 0
    for prompt, *responses in lengths:
        seen = prompt * (prompt + 1) / 2 + sum((r - 1) * prompt + (r - 1) * r / 2 for r in responses)
        total += 6 * body * (prompt + sum(responses) - 2) + 6 * head * sum(responses)
        total += 12 * config.num_hidden_layers * config.hidden_size * seen
    return total


@torch.no_grad()
def plain_logps(model, pairs: list[dict]) -> list[float]:
    """What both sides must find: one plain forward per sequence, log-softmax, sum over the response."""
    sums = []
    for pair in pairs:
        for response in (pair["chosen_ids"], pair["rejected_ids"]):
            ids = torch.tensor([pair["prompt_ids"] + response])
            logps = model(ids).logits[0, -len(response) - 1 : -1].log_softmax(-1)
            sums.append(logps.gather(1, ids[0, -len(response) :, None]).sum().item())
    return sums


def out_of_memory(failure: Failed) -> bool:
    return any(words in str(failure) for words in ("out of memory", "can't allocate memory", "MemoryError"))


def fastest_trl(python: str, args: Args, spec: dict) -> tuple[Side, int, dict]:
    """TRL at its fastest per-device batch, CHOOSING steps in, that batch, and seconds a step at all that were tried."""
    first, tried = None, {}
    for device_batch in args.trl_batches:
        # The smallest is mostly the fastest and stays; the others are given no more pairs than choosing takes.
        own = spec | {"steps": CHOOSING} if first else spec
        try:
            side = Side(python, "trl_side.py", device_batch=device_batch, **own)
            steps = [side.step()["seconds"] for _ in range(CHOOSING - 1)]
            if steps[-1] < SLOWER * min(tried.values(), default=math.inf):
                steps.append(side.step()["seconds"])
            seconds = min(steps[1:])
        except Failed as failure:
            if not first or not out_of_memory(failure):
                raise
            tried[device_batch] = None
            break
        tried[device_batch] = seconds
        if first:
            side.end()
        first = first or side
        if seconds > SLOWER * min(tried.values()):
            break
    fastest = min(filter(tried.get, tried), key=tried.get)
    if fastest == args.trl_batches[0]:
        return first, fastest, tried
    first.end()
    side = Side(python, "trl_side.py", device_batch=fastest, **spec)
    for _ in range(CHOOSING):
        side.step()
    return side, fastest, tried


def measure(name: str, python: str, model, args: Args) -> dict:
    """All numbers of one length distribution."""
    timed = args.steps * args.rounds
    spec = {"name": name, "batch_size": args.pairs, "steps": CHOOSING + timed}
    ours = Side(sys.executable, "our_side.py", tokens_per_device=args.tokens_per_device, **spec)
    for _ in range(CHOOSING):  # so that both sides go on with the same pairs
        ours.step()
    trl, device_batch, tried = fastest_trl(python, args, spec)
    steps, rates = {"ours": [], "trl": []}, []
    for _ in tqdm(range(args.rounds), desc=name):
        rates.append(matmul_rate())
        for side_name, side in (("ours", ours), ("trl", trl)):
            steps[side_name] += [side.step() for _ in range(args.steps)]
    ours.end()
    trl.end()

    lengths = pair_lengths(name, args.pairs * (CHOOSING + timed))[args.pairs * CHOOSING :]
    plain = plain_logps(model, make_pairs(name, args.pairs))
    result = {
        "lengths": describe(name),
        "trl_device_batch": device_batch,
        "trl_seconds_by_device_batch": tried,
        "matmul_flops": median(rates),
        "ratios": [b["seconds"] / a["seconds"] for a, b in zip(steps["ours"], steps["trl"])],
        "cpu_ratio": sum(s["cpu_seconds"] for s in steps["trl"]) / sum(s["cpu_seconds"] for s in steps["ours"]),
        "versions": trl.ready["versions"],
    }
    for side_name, side in (("ours", ours), ("trl", trl)):
        seconds = [step["seconds"] for step in steps[side_name]]
        result[side_name] = {
            "seconds": seconds,
            "pairs_per_second": args.pairs / median(seconds),
            # Steps differ in their tokens, so these are totals: a median would not know of which step.
            "tokens_per_second": sum(map(sum, lengths)) / sum(seconds),
            "matmul_share": step_flops(model, lengths) / sum(seconds) / median(rates),
            "peak": steps[side_name][-1]["peak"],
            "before": side.ready["before"],
            "off": max(abs(a - b) for a, b in zip(side.ready["logps"], plain)),
        }
    result["off_each_other"] = max(abs(a - b) for a, b in zip(ours.ready["logps"], trl.ready["logps"]))
    return result


def table(results: dict[str, dict]) -> str:
    """Markdown: a row for each side and one for their ratio, for every distribution."""
    lines = [
        "| lengths | | pairs/s | tokens/s | peak memory | above start | of matmul rate | log-probs off by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        ours, trl, ratios = result["ours"], result["trl"], result["ratios"]
        titles = {f"{name} | this repo": ours, f" | TRL, {result['trl_device_batch']} a device": trl}
        for title, side in titles.items():
            grown = (side["peak"] - side["before"]) / 1e6
            lines.append(
                f"| {title} | {side['pairs_per_second']:.2f} | {side['tokens_per_second']:.0f} | "
                f"{side['peak'] / 1e6:.0f} MB | {grown:.0f} MB | {side['matmul_share']:.0%} | {side['off']:.1e} |"
            )
        grown = (ours["peak"] - ours["before"]) / (trl["peak"] - trl["before"])
        lines.append(
            f"| | **ratio** | **{median(ratios):.1f}** ({min(ratios):.1f} to {max(ratios):.1f}) | "
            f"{ours['tokens_per_second'] / trl['tokens_per_second']:.1f} | "
            f"**{ours['peak'] / trl['peak']:.2f}** | {grown:.2f} | | {result['off_each_other']:.1e} |"
        )
    return "\n".join(lines)


REPORT = """# Training speed and memory beside TRL on CPU

`python benchmarks/speed.py {options}`: {minutes:.0f} minutes on {cores} cores. {versions}.
Matrix product {slowest:.0f} to {fastest:.0f} GFLOP/s; load average {load_before:.1f} before and {load:.1f} after.

{table}

Llama with 34.2M random weights (hidden 512, 8 layers, vocabulary 32,000, tied embeddings), float32, {pairs} pairs a
step, DPO with stored reference log-probs, AdamW. This repo runs them with --tokens-per-device {tokens} (8192 is the
scripts' default, for GPUs). Medians of {timed} steps a side, in turns of {turn}. A ratio is the median over steps that
both sides took on the same pairs, with the smallest and the largest in brackets.

- tokens/s counts a pair's prompt and both responses once, for both sides.
- By processor time instead of the clock, which a busy machine disturbs less (most reliable with OMP_NUM_THREADS=1), the
  ratios are {cpu_ratios}.
- Peak memory is the process's largest resident size. Above start: less what it had held when libraries and weights were
  loaded; gradients and AdamW's state are 0.41 GB of it on both sides.
- Of matmul rate: operations of a step that computes every token once (6 x body parameters x tokens + 6 x head
  parameters x response tokens + 12 x layers x hidden size x visible positions), over its time, over the rate of a
  2048 x 2048 float32 product measured between the steps.
- Log-probs off by: largest difference of a response's summed log-prob from one plain forward per sequence, over
  {responses} responses; in the ratio's row, between the two sides.
- TRL's pairs/s by per-device batch, the faster of two steps, or one that was slow; larger ones are left out then:
{tried}
- The lengths are synthetic (log-normal, fixed seed, in the shape of the data sets they are named after):
{lengths}
"""


def report(results: dict[str, dict], args: Args, minutes: float, load_before: float) -> str:
    """The table and what one must know to read it."""
    versions = next(iter(results.values()))["versions"]
    rates = [result["matmul_flops"] / 1e9 for result in results.values()]
    tried = []
    for name, result in results.items():
        speeds = {
            batch: f"{args.pairs / seconds:.2f}" if seconds else "out of memory"
            for batch, seconds in result["trl_seconds_by_device_batch"].items()
        }
        tried.append(f"  - {name}: " + ", ".join(f"{batch}: {speed}" for batch, speed in speeds.items()))
    return REPORT.format(
        options=" ".join("PYTHON" if a == args.trl_python else a for a in sys.argv[1:]),
        minutes=minutes,
        cores=torch.get_num_threads(),
        versions=", ".join(f"{package} {version}" for package, version in versions.items()),
        slowest=min(rates),
        fastest=max(rates),
        load_before=load_before,
        load=os.getloadavg()[0],
        table=table(results),
        cpu_ratios=", ".join(f"{name} {result['cpu_ratio']:.1f}" for name, result in results.items()),
        pairs=args.pairs,
        tokens=args.tokens_per_device,
        timed=args.steps * args.rounds,
        turn=args.steps,
        responses=2 * args.pairs,
        tried="\n".join(tried),
        lengths="\n".join(f"  - {name}: {result['lengths']}" for name, result in results.items()),
    )


def main(args: Args) -> None:
    # For both sides, which inherit it.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    started, load_before = time.perf_counter(), os.getloadavg()[0]
    python, model = args.trl_python or trl_environment(), make_model().eval()
    results = {}
    for name in args.lengths:
        results[name] = measure(name, python, model, args)
        print(table({name: results[name]}), flush=True)
    text = report(results, args, (time.perf_counter() - started) / 60, load_before)
    print(f"\n{text}")
    if args.save:
        Path(f"{args.save}.md").write_text(text)
        Path(f"{args.save}.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
