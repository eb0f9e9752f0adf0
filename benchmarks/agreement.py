"""How often the graders of eval_passk.py agree with labels: python benchmarks/agreement.py FILE... [--show 5]

A line of a .jsonl or .jsonl.gz file is {"task": "gsm8k" or "math", "completion", "reference", "right": true or false}.
A row of GSM8K (question, answer) or MATH (problem, solution) stands for its own solution, which is right.
"""

import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

import eval_passk  # noqa: E402
from preferences import read_rows  # noqa: E402


@dataclass
class Args:
    files: tyro.conf.Positional[tuple[Path, ...]]
    """Labelled completions, or rows of GSM8K or MATH"""
    show: int = 0
    """Print so many disagreements of each kind"""


def labelled(row: dict) -> tuple[str, str, str, bool]:
    """(task, completion, reference, label) of a line."""
    if "completion" in row:
        return row["task"], row["completion"], row["reference"], row["right"]
    text = row["answer" if "question" in row else "solution"]
    return "gsm8k" if "question" in row else "math", text, text, True


def main(args: Args) -> None:
    graders = {"gsm8k": eval_passk.grade_gsm8k, "math": eval_passk.grade_math}
    for path in args.files:
        counts, shown = Counter(), []
        for task, completion, reference, right in map(labelled, read_rows(str(path), "", "")[0]):
            verdict = graders[task](completion, reference)
            counts[task, right, verdict] += 1
            if verdict != right and counts[task, right, verdict] <= args.show:
                found = (eval_passk.find_math if task == "math" else eval_passk.find_gsm8k)(completion)[0]
                end = textwrap.indent(completion[-300:], "      ")
                shown.append(f"    label {right}: expected {reference[-60:]!r}, found {found}\n{end}")
        for task in sorted({task for task, *_ in counts}):
            wrongly = {right: counts[task, right, not right] for right in (True, False)}
            total = sum(times for (name, *_), times in counts.items() if name == task)
            print(
                f"{path.name} {task}: {total - sum(wrongly.values())} of {total} agree "
                f"({100 - 100 * sum(wrongly.values()) / total:.2f}%), {wrongly[True]} right ones failed, "
                f"{wrongly[False]} wrong ones passed"
            )
        print(*shown, sep="\n", end="\n" * bool(shown))


if __name__ == "__main__":
    main(tyro.cli(Args))
