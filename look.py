"""What a run leaves for people to look at: figure, sample answers, model card, a line on its speed and memory.

Nothing here changes a number. Take the lines with `look.` out of a copied script, and it runs without this file.
"""

import json
import os
import re
import sys
from datetime import timedelta
from pathlib import Path

import torch
from datasets import Dataset

from common import load_model


def plot_curves(path: Path, title: str, history: list[dict], panels: dict[str, str]) -> None:
    """A panel over "step" for each key of `panels`, names of metrics; its value is the unit. Evaluation is a line with
    dots; training is smoothed, with its own values behind.
    """
    import matplotlib.pyplot as plt  # here, as it is slow to import
    import pandas

    plt.switch_backend("Agg")
    frame = pandas.DataFrame(history).set_index("step")
    lines = [[key for name in names.split() for key in (name, f"eval/{name}") if key in frame] for names in panels]
    shown = [(keys, unit) for keys, unit in zip(lines, panels.values()) if keys]
    figure, axes = plt.subplots(len(shown), figsize=(7, 2.5 * len(shown)), layout="tight", squeeze=False)
    for axis, (keys, unit) in zip(axes[:, 0], shown):
        for number, key in enumerate(keys):
            line, color = frame[key].dropna(), f"C{number}"
            if not key.startswith("eval/"):
                axis.plot(line, color=color, alpha=0.25)
                line = line.ewm(span=1 + len(line) / 10).mean()
            axis.plot(line, ".-" if key.startswith("eval/") else "-", color=color, label=key)
        axis.set(xlabel="optimizer step", ylabel=unit)
        axis.legend()
    axes[0, 0].set_title(title.encode(errors="replace").decode(), parse_math=False)  # paths may hold anything
    figure.savefig(path)
    plt.close(figure)


@torch.no_grad()
def answers(model, tokenizer, dataset: Dataset, most: int = 64) -> dict[str, str]:
    """The first three prompts that differ, and behind each of them the likeliest token at most `most` times."""
    prompts = [list(ids) for ids in dict.fromkeys(map(tuple, dataset[:64]["prompt_ids"]))][:3]
    width, ends = max(map(len, prompts)), [tokenizer.eos_token_id, model.generation_config.eos_token_id]
    ends = [end for value in ends for end in (value if isinstance(value, list) else [value]) if end is not None]
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])  # (prompts, width)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"max_new_tokens": most, "do_sample": False, "pad_token_id": 0, "eos_token_id": ends}
    try:
        found = model.generate(ids, attention_mask=mask, repetition_penalty=1.0, **options)[:, width:]
    except Exception as error:  # some models generate in a way of their own, and no run is lost for samples
        return dict.fromkeys(tokenizer.batch_decode(prompts), f"({type(error).__name__}: {error})")
    return dict(zip(tokenizer.batch_decode(prompts), tokenizer.batch_decode(found, skip_special_tokens=True)))


def write_samples(path: Path, base: str, trained: Path, tokenizer, dataset: Dataset) -> None:
    """Answers of two models, one loaded after the other, to prompts of dataset, as markdown."""
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)  # the other processes are done, and launchers leave each one thread
    before, after = (answers(load_model(str(model), "auto"), tokenizer, dataset) for model in (base, trained))
    torch.set_num_threads(threads)
    parts = [(("Prompt", p), ("Before training", before[p]), ("After training", after[p])) for p in after]
    fence = "~" * 10
    text = "\n".join(f"# {name}\n\n{fence}\n{text}\n{fence}\n" for part in parts for name, text in part)
    path.write_text(text, encoding="utf-8", errors="replace")


def write_card(folder: Path, title: str, about: str, settings: dict, left_out: set[str], numbers: dict) -> None:
    """README.md of a saved model, as the hub shows it. about: name and address of the paper, a line each; settings: all
    flags, shown but for those left out; of `numbers` those of the evaluation.
    """
    paper, address = about.splitlines()[:2]
    known = {"base_model": settings["model"], "datasets": settings["dataset"]}
    head = [f"{key}: {name}" for key, name in known.items() if not Path(name).exists()]  # a path means nothing there
    rows = [f"| {name[5:]} | {value:.4f} |" for name, value in numbers.items() if name.startswith("eval/")]
    library = "peft" if (folder / "adapter_config.json").exists() else "transformers"
    lines = ["---", *head, f"library_name: {library}", "pipeline_tag: text-generation", "---", ""]
    lines += [f"# {title}", "", f"[{paper}]({address})", ""]
    lines += ["| evaluation pairs | |", "|---|---|", *rows, ""] * bool(rows)
    flags = json.dumps({name: value for name, value in settings.items() if name not in left_out}, indent=2)
    text = "\n".join([*lines, "```json", flags, "```", ""])
    (folder / "README.md").write_text(text, encoding="utf-8", errors="replace")


def summary(history: list[dict], names: tuple[str, ...], batch_size: int) -> str:
    """What became of metrics from the first to the last row, the run's time in steps, its speed and its memory."""
    steps, evaluated = history[1:], "eval/loss" in history[0]
    lines = ["evaluation pairs: start -> end"]
    if not evaluated:
        lines = ["two training batches, first and last (--eval-dataset or --eval-split give pairs for evaluation)"]
    for name in names:
        first, last = (row[f"eval/{name}" if evaluated else name] for row in (history[not evaluated], history[-1]))
        lines.append(f"  {name:<18}{first:9.4f} -> {last:9.4f}")
    seconds = sum(row["seconds"] for row in steps)
    tokens = sum(row["seconds"] * row["tokens_per_second"] for row in steps)
    pairs, most = batch_size * len(steps), max(row["memory_gb"] for row in steps)
    lines.append(
        f"time    {timedelta(seconds=round(seconds))}, {pairs / seconds:.1f} pairs/s, {tokens / seconds:,.0f} tokens/s"
    )
    return "\n".join([*lines, f"memory  {most:.1f} GB at its peak"])


def peak_memory(device) -> float:
    """The most memory that this process has had so far, in GB: of the GPU, without one of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9
    if (status := Path("/proc/self/status")).exists():  # getrusage there counts what a parent held before this process
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) * 1024 / 1e9
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
