"""The tasks: where their problems come from, and what a model is asked.

read_problem turns a row of GSM8K, MATH, HumanEval or a local file into one form. A task may lack answers: the reference
of its problems is None, and nothing is graded. prompts/ holds what stands around a question: TASK-N.txt in plain text
with N examples (Wei et al. 2022, Table 20; DPL C.3), TASK-chat.txt in a chat.
"""

import hashlib
import json
import random
import re
from pathlib import Path

from grading.answers import boxes, read_number
from preferences import fail, read_rows

HUB = {
    "gsm8k": ("openai/gsm8k", "main"),
    "math": ("HuggingFaceH4/MATH-500", ""),
    "humaneval": ("openai/openai_humaneval", ""),
}
LEVELS = {"1": "easy (level 1)", "3": "medium (level 3)", "5": "hard (level 5)"}  # DPL 4.2
STOPS = {
    "gsm8k": ("\nQ:",),
    "math": ("\n###\n", "\nProblem:"),  # "### Step 1" is a heading
    "humaneval": ("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
}


def digest(*parts) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def read_problem(kind: str, row: dict, where: str) -> dict:
    """id (of the problem itself: models can be compared), question, reference (None: no answer), group, row."""

    def text(*names):
        found = [row[name] for name in names if isinstance(row.get(name), str) and row[name].strip()]
        return found[0] if found else fail(f'{where}: "{names[0]}" is missing, empty or no text')

    if not isinstance(row, dict):
        fail(f"{where}: no object with names and values")
    if kind == "math":
        question, reference = text("problem"), text("solution", "answer")
        if not any(content for _, content in boxes(reference)):
            reference = "" if row.get("answer") is None else str(row["answer"]).strip()
            reference or fail(f'{where}: "solution" has no \\boxed{{answer}}, and there is no "answer"')
    elif kind == "humaneval":
        question, reference, _ = text("prompt"), text("test"), text("entry_point")
    else:
        question = text("question", "prompt")
        reference = text("answer") if kind == "gsm8k" or row.get("answer") is not None else None
        if reference is not None and read_number(reference.rsplit("####", 1)[-1]) is None:
            fail(f'{where}: "answer" has no number')
    level = re.search(r"\d", str(row.get("level", "")))
    group = LEVELS.get(level[0]) if level else f"difficulty {row['difficulty']}" if "difficulty" in row else None
    return {"id": digest(question, reference), "question": question, "reference": reference, "group": group, "row": row}


def load_problems(task: str, path: str, wanted: int, seed: int) -> list[dict]:
    """The problems of a task, each once, as read_problem gives them; `wanted` of them, drawn at random, 0 for all.

    path  a file or data set in place of the hub's, or ""
    """
    source, config = (path, "") if path else HUB.get(task, (task, ""))
    rows, numbers = read_rows(source, "test", config)
    problems = [read_problem(task, rows[number - 1], f"{source} row {number}") for number in numbers]
    for number, problem in enumerate(problems, 1):
        if (problem["reference"] is None) != (problems[0]["reference"] is None):
            fail(f'{source} row {number}: all rows must have an "answer", or none')
    problems = list({problem["id"]: problem for problem in problems}.values())
    if 0 < wanted < len(problems):
        problems = [problems[i] for i in sorted(random.Random(seed).sample(range(len(problems)), wanted))]
    return problems


def prompt_texts(args, tokenizer, problems: list[dict]) -> tuple[list[str], tuple[str, ...]]:
    """The prompts as text, and the strings that end a completion."""
    chat = args.prompt == "chat" or (args.prompt == "auto" and tokenizer.chat_template is not None)
    if chat and tokenizer.chat_template is None:
        fail(f"{args.model} has no chat template; use --prompt text")
    form = "chat" if chat else min(args.shots, 2) if args.task == "math" else args.shots
    frame = Path(__file__).with_name("prompts") / f"{Path(args.task).name}-{form}.txt"
    frame = frame.read_text().removesuffix("\n") if frame.exists() else "{question}"
    code, questions = args.task == "humaneval", [problem["question"] for problem in problems]
    texts = [frame.replace("{question}", question) for question in questions]
    if chat:
        chats = [[{"role": "user", "content": text}] for text in texts]
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        # HumanEval's answer is begun for the model with the function's head: it writes the body
        texts = [text + f"```python\n{question}" * code for text, question in zip(texts, questions)]
    return texts, args.stop or (STOPS.get(args.task, ()) if not chat else ("\n```\n",) * code)
