"""HumanEval's own solutions as token ids, through tokenizers and the sandbox; every one should pass.

    python benchmarks/references.py HumanEval.jsonl.gz TOKENIZER_DIRECTORY...

A solution is tokenized with its prompt in front; where its first token would begin in the prompt, behind the prompt.
The last line is the time of a program: of the solutions, and of as many that return at once.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

import eval_passk  # noqa: E402
from preferences import encode, read_rows  # noqa: E402


@dataclass
class Args:
    problems: tyro.conf.Positional[Path]
    """HumanEval's rows"""
    tokenizers: tyro.conf.Positional[tuple[str, ...]]
    """Directories or names on the hub"""


def main(args: Args) -> None:
    rows = read_rows(str(args.problems), "", "")[0]
    for name in args.tokenizers:
        tokenizer, passed, alone = AutoTokenizer.from_pretrained(name), 0, 0
        for row in rows:
            prompt, whole = encode(tokenizer, [row["prompt"], row["prompt"] + row["canonical_solution"]])
            tokens = whole[len(prompt) :]
            if whole[: len(prompt)] != prompt:
                tokens = tokenizer(row["canonical_solution"], add_special_tokens=False)["input_ids"]
            passed += eval_passk.run_humaneval(row, eval_passk.completion_text(tokenizer, prompt, tokens), 10.0)
            alone += eval_passk.run_humaneval(row, tokenizer.decode(tokens, skip_special_tokens=True), 10.0)
        print(f"{name}: {passed} of {len(rows)} pass; decoded without their prompts: {alone}")
    for what, text in (("of a solution", None), ("that returns at once", "    return 0\n")):
        start = time.monotonic()
        for row in rows:
            eval_passk.run_humaneval(row, text or row["canonical_solution"], 10.0)
        print(f"{1000 * (time.monotonic() - start) / len(rows):.1f} ms a program {what}")


if __name__ == "__main__":
    main(tyro.cli(Args))
