"""The tasks: where their problems come from, and what a model is asked.

read_problem turns a row of GSM8K, MATH, HumanEval or a local file into one form. A task may lack answers: the reference
of its problems is None, and nothing is graded.
"""

import gzip
import hashlib
import json
import random
import re
import zlib

from grading.answers import boxes, read_number
from preferences import fail

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
    "math": ("\n###\n", "\nProblem:"),  # "### Step 1" is a heading
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

    path  a local file in place of the hub's, or ""
    """
    kind = task if task in HUB else "jsonl"
    path = path or ("" if kind in HUB else task)
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
    if 0 < wanted < len(problems):
        problems = [problems[i] for i in sorted(random.Random(seed).sample(range(len(problems)), wanted))]
    return problems


def prompt_texts(args, tokenizer, problems: list[dict]) -> tuple[list[str], tuple[str, ...]]:
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
