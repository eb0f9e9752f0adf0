"""Reading and comparing final answers of GSM8K and MATH, without ever giving a model's text to Python to evaluate.

grade_gsm8k("... so it is 18.00 dollars.", "... #### 18")           True: numbers are compared as exact rationals
grade_math("... \\boxed{\\sqrt{12}}", "... \\boxed{2\\sqrt3}")      True: math-verify's algebra, in algebra.py
"""

import contextlib
import json
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

from preferences import fail

# what of a completion is the answer to its question

THOUGHT = re.compile(
    r"<(think|thinking|thought|reasoning)>.*?(?:</\1>|\Z)|"  # one that never ended has no answer behind it
    r"\A.*(?:</(?:think|thinking|thought|reasoning)>|\[/THINK\]|<\|channel\|>final<\|message\|>)",  # begun before it
    re.DOTALL,
)
NEXT = re.compile(r"\n *(?:Q:|Q\.\s|Human:|User:|#+ ?Instruction|\[INST\])|<\|(?!channel|message)[a-z_]{2,}\|>|</s>")
PERHAPS_NEXT = re.compile(r"\n *(?:(?:#+ *)?\**(?:Question|Problem)\**:|#+ *\n)")  # or the question, said again
PHRASE = re.compile(
    r"\banswer(?: to [^.\n:=]{1,60}?)?[*_]*\s*(?:\bis\b|\bwas\b|(?:would|will|should) be\b|:|=)[*_]*\s*:?"
    r"(?! *(?:in)?correct\b| *(?:right|wrong)\b)|"
    r"^[#*_ ]*(?:the )?(?:final )?answer[*_: ]*$",
    re.IGNORECASE | re.MULTILINE,
)
STATED = re.compile(rf"####\s*\S*\d|\\boxed|\\fbox|{PHRASE.pattern}", PHRASE.flags)


def own_part(completion: str) -> str:
    """The completion without its thinking and without a next question that the model went on to.

    "Question:" opens a next one behind an answer, or where no answer follows; else the model repeats its own.
    """
    text = THOUGHT.sub("", completion).lstrip()
    if match := NEXT.search(text, 1):
        text = text[: match.start()]
    said = STATED.search(text) or re.search(r"\d", text)
    following = said and PERHAPS_NEXT.search(text, said.start() + 1)
    return text[: following.start()] if following else text


def cut(text: str, stops=()) -> str:
    """The text before the first stop string."""
    for stop in stops:
        text = text.split(stop, 1)[0]
    return text


def boxes(text: str) -> Iterator[tuple[int, str]]:
    """(position, content) of each \\boxed{} or \\fbox{}, nested braces included, and of "\\boxed 5"."""
    for box in re.finditer(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*", text):
        start = end = box.end()
        if text[start : start + 1] != "{":
            yield box.start(), re.match(r"[^\s$]*", text[start:])[0].rstrip(".,;")
            continue
        depth = 0
        for brace in re.finditer(r"(?<!\\)[{}]", text[start:]):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                end = start + brace.start()
                break
        yield box.start(), text[start + 1 : end].strip()  # "" where the braces never close


def find_code(completion: str, name: str) -> str:
    """What of a completion goes behind the prompt: of prose and code blocks the last block that defines the function.

    The prompt stays in front of it, with its imports and helpers. Else all up to the first fence is the body.
    """
    pieces = re.split(r"^[ \t]*```.*$", THOUGHT.sub("", completion), flags=re.MULTILINE)
    whole = [p for p in pieces[1:] if re.search(rf"^[ \t]*(?:async )?def {re.escape(name)}\b", p, re.MULTILINE)]
    return "\n    pass\n\n" + textwrap.dedent(whole[-1]) if whole else pieces[0]


# GSM8K: numbers

SPACE = r"[ \u00a0\u2009\u202f]"
# A sign only where no digit or bracket stands before it ("10-3"), groups of three, mixed numbers, fractions, exponents
NUMBER = re.compile(
    r"(?<![\w.,^])(?<!\^\{)(?P<sign>(?:(?<![\d)])(?<![\d)]\s)[-+−–])?)\s?"
    r"(?:[$€£¥₹]|\\\$|USD\s?|Rs\.?\s?){0,3}\s?(?P<neg>[-−]?)"
    rf"(?P<number>(?:\d{{1,3}}(?:(?:,|\{{,\}}|\\,|\\!|{SPACE})+\d{{3}})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    rf"(?P<power>[eE][-+]?\d{{1,2}}(?![\w.]))?(?:(?:{SPACE}(?P<top>\d+))?\s?/\s?(?P<below>\d+)(?![\d/]))?"
)
FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))")
VULGAR = str.maketrans({"½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3", "⁄": "/"})


def read_number(text: str, last: bool = False) -> Fraction | None:
    """The first (or last) number in a text as an exact rational; None where there is none."""
    text = FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]}", text.translate(VULGAR))
    matches = list(NUMBER.finditer(text))
    for match in reversed(matches) if last else matches:
        digits, top, below = (re.sub(r"[^\d.]", "", match[name] or "") for name in ("number", "top", "below"))
        if len(digits + top + below) > 1000:  # int() refuses more than 4,300 digits, and no answer has 1,000
            continue
        value = Fraction(digits + (match["power"] or ""))
        if below and int(below):
            value = value + Fraction(int(top), int(below)) if top else value / int(below)
        return -value if (match["sign"] + match["neg"]) in ("-", "−", "–") else value
    return None


def result(text: str) -> Fraction | None:
    """The number that a line comes to: behind its last "=", or its first one."""
    value = read_number(text.rsplit("=", 1)[-1])
    return read_number(text) if value is None else value


def marked(line: str, ends: bool) -> Fraction | None:
    """The number behind ####, or None where it makes a heading ("#### Step 1: add", "#### 2. Multiply")."""
    line = re.sub(r"^(?:[\s*_`(\[{$=~≈]|\\[(\[$])+", "", line)
    if re.match(r"\d{1,2}[.)]\s+\W*[^\W\d]", line) and not ends:
        return None
    if re.match(r"[-+−–]?\s?(?:\\?\$|[€£¥₹]|USD|Rs|\\text|\\boxed|\\[dt]?frac|[-−\d.½¼¾⅓⅔])", line):
        return result(line)
    if match := re.search(r"\banswer\b", line, re.IGNORECASE):
        return result(line[match.end() :])
    heading = re.match(r"[A-Za-z][A-Za-z ]*\d+\s*[:.)–-]", line)
    return result(line) if ends or ("=" in line and not heading) else None


def find_gsm8k(completion: str) -> tuple[Fraction | None, str]:
    """The final answer and how it was found: the last #### or box, else the last "answer is", else the last number."""
    text = own_part(completion)
    values = [(at, result(content)) for at, content in boxes(text)]
    for match in re.finditer(r"####+\s*([^\n]*)", text):
        values.append((match.start(), marked(match[1], not text[match.end() :].strip())))
    if values := [pair for pair in values if pair[1] is not None]:
        return max(values)[1], "marker"
    for match in reversed(list(PHRASE.finditer(text))):
        sentence = re.split(r"\n|\.\s", text[match.end() :].lstrip(), maxsplit=1)[0]
        if (value := result(sentence)) is not None:
            return value, "phrase"
    value = read_number(text, last=True)
    return value, "none" if value is None else "last number"


def grade_gsm8k(completion: str, reference: str) -> bool:
    """True where the completion's final number equals that of the data set's answer text (after its ####)."""
    expected = read_number(reference.rsplit("####", 1)[-1])
    if expected is None:
        raise ValueError(f"the reference has no number: {reference[-80:]!r}")
    return find_gsm8k(completion)[0] == expected


# MATH: expressions

MATHS = re.compile(r"\$\$?((?:\\.|[^$\\])+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)


def find_math(completion: str) -> tuple[str | None, str]:
    """The final answer as LaTeX: the last box, else what "the answer is", else the last line's last mathematics."""
    text = own_part(completion)
    for _, content in reversed(list(boxes(text))):
        if content:
            return content, "marker"
    for match in reversed(list(PHRASE.finditer(text))):
        rest = text[match.end() :].strip().lstrip("*_ ")
        spans = re.match(rf"(?:(?:{MATHS.pattern})(?:\s*(?:,|and|or)\s*)*)+", rest, re.DOTALL)
        rest = MATHS.sub(lambda m: f" {m[1] or m[2] or m[3]} ", spans[0]) if spans else re.split(r"\n|\.\s", rest)[0]
        if rest := rest.strip(" *_\n").removesuffix("."):
            return rest.strip(" *_,"), "phrase"
    line = text.rstrip().rsplit("\n", 1)[-1]
    spans = list(re.finditer(rf"{MATHS.pattern}|\*\*(.+?)\*\*", line))
    answer = spans and next(filter(None, spans[-1].groups())).strip(" :.")
    return (answer, "last number") if answer else (None, "none")


# What keyboards and models write, in LaTeX, where math-verify does not read it
SIGNS = {"−": "-", "–": "-", "∞": r"\infty ", "·": r"\cdot ", "±": r"\pm ", "∈": r"\in ", "°": r"^\circ ", "²": "^2"}
SIGNS |= {"³": "^3", "½": r"\frac12 ", "\\varnothing": r"\emptyset ", "**": "^", "\n": " ", "~": " "}
SIGNS |= dict.fromkeys(("\\$", "$", "\\%", "%"), "")
SIGN = re.compile("|".join(map(re.escape, sorted(SIGNS, key=len, reverse=True))))
TEXT = r"\\(?:text|mbox|mathrm|textrm|textbf|textit|mathbf|textnormal|operatorname)\s*"
FACTOR = r"(?:hundred|thousand|million|billion|trillion|dozen|[apAP]\.?\s?[mM]\b)"  # no units: they change the value
UNIT = rf"(?!\s*{FACTOR})(?:{TEXT}\{{(?!\s*{FACTOR})[^{{}}]*\}}|(?:\\rm|\s)\s*[a-zA-Z]{{2,}}\.?(?:\s[a-zA-Z.]+)*)"


def spelling(answer: str) -> str:
    """An answer without what carries no value (dollars, percent, units, spaces, sizes), in LaTeX."""
    s = SIGN.sub(lambda m: SIGNS[m[0]], re.sub(r"(?<!\\)\\[()\[\]]", "", answer).strip("* "))
    s = re.sub(r"\\\\\s*\[[^\]]*\]", r"\\\\ ", s)  # the height of a matrix's row
    s = re.sub(r"(?:√|\\sqrt)\s*\(([^()]*)\)|√\s*(\d+|\w)", r"\\sqrt{\1\2}", s)
    s = re.sub(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|q?quad)(?![a-zA-Z])", " ", s)
    s = re.sub(r"(?<=\d)(?:\s*,?\\[!,]\s*|\{,\})(?=\d{3}(?!\d))", "", s)
    s = re.sub(r"(?<!\\)\\[!,;:> ]", " ", s).strip(" ,;").rstrip(".,; ")
    degree = r"(?:\s*\^\s*\{\s*\\circ\s*\}|\s*\^?\s*\\(?:circ|degree)(?![a-zA-Z]))"
    if re.search(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])", s):  # sin 32 degrees is no sin 32
        s = re.sub(rf"(\d+(?:\.\d+)?|\([^()]*\)){degree}", r"{(\\frac{\1 \\pi}{180})}", s)
    s = re.sub(degree, "", s)
    s = re.sub(rf"^{TEXT}\{{\s*([-.\d][^{{}}]*)\}}$", r"\1", s)  # the number with its unit in one \text
    s = re.sub(rf"^{TEXT}\{{[^{{}}]*\}}\s*(?=-?\s*(?:\d|\\[dt]?frac|\\sqrt))", "", s)  # "The answer is" in front of one
    s = re.sub(r"(?<![\w)}/.])(\d+)\s*/\s*(\d+)(?=\s*[a-z(])", r"\\frac{\1}{\2}", s)  # 1/2 x is half of x
    s = re.sub(rf",?\s*(?:{TEXT}\{{\s*(?:and|or)\s*\}}|\b(?:and|or)\b)\s*", ",", s)
    if re.match(r"[^a-zA-Z]*(?:\\(?:d|t|c)?frac|\\sqrt|\d)", s) or "=" in s:
        s = re.sub(rf"(?<=[\d}}\)a-z])\s*{UNIT}(?:\s*\^\s*\{{?\d\}}?)?\s*$", "", s)
    s = re.sub(rf"{TEXT}\{{([^{{}}]*)\}}", r" \1 ", s)
    if re.fullmatch(r"\s*-?\s*\d{1,3}([, ]\d{3})+(\.\d+)?\s*", s):
        s = re.sub(r"[, ]", "", s)
    return re.sub(r"\s+", " ", s).strip(" ,;")


_worker = None


@lru_cache(maxsize=100_000)
def algebra(*question: str) -> bool | str:
    """What algebra.py answers, a process of its own that the kernel ends after five seconds with one question."""
    global _worker
    for _ in range(2):  # again where the process ended otherwise, before the question or over it
        if _worker is None:
            command = [sys.executable, "-I", str(Path(__file__).with_name("algebra.py"))]
            _worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            if _worker.stdout.readline() != b"ready\n":
                reason = _worker.stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
                fail(f"grading MATH needs math-verify (pip install -r requirements.txt): {reason}")
        with contextlib.suppress(BrokenPipeError):
            _worker.stdin.write(json.dumps(question).encode() + b"\n")
            _worker.stdin.flush()
        if answer := _worker.stdout.readline():
            return json.loads(answer)
        late, _worker = _worker.wait() == -signal.SIGALRM, None
        if late:
            break
    return False


def in_words(answer: str, s: str) -> bool:
    """Whether an answer is no mathematics: "even", "A, D", "4:30 p.m."; s is its spelling."""
    quoted = re.fullmatch(rf"\W*(?:{TEXT}\{{[^{{}}]*\}}\W*)+", answer) and re.search("[a-zA-Z]", s)
    return bool(quoted or re.fullmatch(r"(?=.*[a-zA-Z]{3})[a-zA-Z.,:;'() -]+", s))


def parts(s: str) -> list[str]:
    return sorted(re.sub(r"[\s.()]", "", part).casefold() for part in s.split(","))


def equal_math(found: str, expected: str) -> bool:
    """Whether two LaTeX answers are the same; `found` may leave out a tuple's brackets or an "x =", as readers do."""
    f, e = spelling(found), spelling(expected)
    if not f or not e or max(len(f), len(e)) > 500:  # no answer of MATH is longer than 200 characters
        return False
    if in_words(found, f) or in_words(expected, e):
        return parts(f) == parts(e)
    if f == e:
        return True
    # a number in another base: where only one of the two names the base, the question did
    based = [re.fullmatch(r"(?:[a-zA-Z]\s*=\s*)?(\w+)_\{?(\d+)\}?", s) for s in (f, e)]
    if any(based):
        digits = [m[1] if m else s for m, s in zip(based, (f, e))]
        return digits[0] == digits[1] and (not all(based) or based[0][2] == based[1][2])
    if ("," in f) != ("," in e) and not re.search(r"\\pm|[<>≤≥]|\\[lg]eq?", f + e):  # a list is no number
        return False
    if "".join(s[0] for s in (f.lstrip("\\"), e.lstrip("\\"))) in ("{(", "({", "{[", "[{"):
        return False
    return algebra(e, f)


def grade_math(completion: str, reference: str) -> bool:
    """True where the final answer equals the reference's: a solution with \\boxed{}, or the bare answer."""
    expected = find_math(reference)[0] if re.search(r"\\(boxed|fbox)", reference) else reference
    found = find_math(completion)[0]
    return found is not None and bool(expected) and equal_math(found, expected)


def vote(answer: str) -> str:
    """A name that equal answers to a MATH problem share: 0.5 and \\frac12 vote together."""
    s = spelling(answer[:500])
    return ",".join(parts(s)) if in_words(answer, s) else algebra(s) or s
