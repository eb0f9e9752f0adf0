"""Reading and comparing final answers of GSM8K and MATH, without ever giving a model's text to Python to evaluate.

grade_gsm8k("... so it is 18.00 dollars.", "... #### 18")           True: numbers are compared as exact rationals
grade_math("... \\boxed{\\sqrt{12}}", "... \\boxed{2\\sqrt3}")      True: one spelling first, then math-verify's algebra
"""

import inspect
import json
import re
import select
import subprocess
import sys
from fractions import Fraction
from functools import lru_cache

RUN_ON = re.compile(r"\n\s*(?:Q:|Question:|Problem:|###\s|###$|<\|)|\nQ\.")  # the model went on to a next question
# A sign only where no digit or bracket stands before it ("10-3"), commas in groups of three, fractions, exponents
NUMBER = re.compile(
    r"(?<![\w.,])(?P<sign>(?:(?<![\d)])(?<![\d)]\s)[-+−–])?)\s?(?:[$€£¥]|\\\$|USD\s?|Rs\.?\s?)*\s?(?P<neg>[-−]?)"
    r"(?P<number>(?:\d{1,3}(?:(?:,|\{,\}|\\,|\\!)+\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?P<power>[eE][-+]?\d{1,2}(?![\w.]))?(?:\s?/\s?(?P<below>\d+)(?![\d/]))?"
)
PHRASE = re.compile(r"\b(?:final\s+)?answer\s*(?:is|:|=)\s*:?", re.IGNORECASE)


def read_number(text: str, last: bool = False) -> Fraction | None:
    """The first (or last) number in a text as an exact rational; None where there is none."""
    matches = list(NUMBER.finditer(text))
    for match in reversed(matches) if last else matches:
        digits = re.sub(r"[^\d.]", "", match["number"])
        if len(digits) > 1000:  # int() refuses more than 4,300 digits, and no answer has 1,000
            continue
        value = Fraction(digits + (match["power"] or ""))
        if match["below"] and int(match["below"][:1000]):
            value /= int(match["below"][:1000])
        return -value if (match["sign"] + match["neg"]) in ("-", "−", "–") else value
    return None


def cut(text: str, stops=()) -> str:
    """The text before the first stop string."""
    for stop in stops:
        text = text.split(stop, 1)[0]
    return text


def find_gsm8k(completion: str) -> tuple[Fraction | None, str]:
    """The final answer and how it was found: after the first ####, else after "The answer is", else the last number."""
    match = RUN_ON.search(completion, len(completion) - len(completion.lstrip()))
    text = completion[: match.start()] if match else completion
    marker = re.search(r"####", text)
    if marker and (value := read_number(text[marker.end() :])) is not None:
        return value, "marker"
    phrase = PHRASE.search(text)
    if phrase:
        rest = re.split(r"\n|(?<=[^\d])\.\s|(?<=\d)\.\s", text[phrase.end() :].lstrip(), maxsplit=1)[0]
        value = read_number(rest.rsplit("=", 1)[-1])  # "The answer is 3 + 4 = 7."
        if value is None:
            value = read_number(text[phrase.end() :])
        if value is not None:
            return value, "phrase"
    value = read_number(text, last=True)
    return value, "none" if value is None else "last number"


def grade_gsm8k(completion: str, reference: str) -> bool:
    """True where the completion's final number equals that of the data set's answer text (after its ####)."""
    expected = read_number(reference.rsplit("####", 1)[-1])
    if expected is None:
        raise ValueError(f"the reference has no number: {reference[-80:]!r}")
    return find_gsm8k(completion)[0] == expected


def braced(text: str, start: int) -> str | None:
    """The content of the braces that open at `start`, nested ones included; None where they never close."""
    depth = 0
    for i in range(start, len(text)):
        if text[i] in "{}" and (i == 0 or text[i - 1] != "\\"):
            depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return text[start + 1 : i]
    return None


def find_math(completion: str) -> tuple[str | None, str]:
    """The final answer as LaTeX: the last \\boxed{} or \\fbox{} ("\\boxed 5" too), else what "the answer is"."""
    match = RUN_ON.search(completion, len(completion) - len(completion.lstrip()))
    text = completion[: match.start()] if match else completion
    for box in reversed(list(re.finditer(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*", text))):
        if text[box.end() : box.end() + 1] == "{":
            content = braced(text, box.end())
        else:
            content = re.match(r"[^\s$]*", text[box.end() :])[0].rstrip(".,;")
        if content and content.strip():
            return content.strip(), "marker"
    phrases = list(PHRASE.finditer(text))
    if phrases:
        rest = text[phrases[-1].end() :].strip()
        math = re.match(r"(?:\$\$?|\\\(|\\\[)(.+?)(?:\$\$?|\\\)|\\\])", rest, re.DOTALL)
        rest = math[1] if math else re.split(r"\n|\.\s|\.$", rest, maxsplit=1)[0]
        if rest.strip():
            return rest.strip(), "phrase"
    return None, "none"


UNITS = (
    r"(?:square |cubic |sq\.? ?|cu\.? ?)?(?:centi|milli|kilo)?(?:degrees?|deg|cm|mm|km|m|meters?|metres?|inch(?:es)?|"
    r"in|feet|foot|ft|yards?|yd|miles?|mi|mph|miles per hour|hours?|hr|h|minutes?|min|seconds?|sec|s|days?|weeks?|"
    r"months?|years?|grams?|g|kg|pounds?|lbs?|ounces?|oz|liters?|litres?|gallons?|cents?|dollars?|units?|percent|points?|"
    r"people|students?|ways?|votes?|integers?|numbers?|pieces?|apples?|sides?|squares?|"
    r"(?:more )?cookies|books|cards?|coins|tickets?|games?|pages|bushels|feet per second|"
    r"per (?:hour|second|minute|day))"
)


def normal_math(answer: str) -> str:
    """One spelling for what a reader calls the same answer; what remains different is left to algebra."""
    s = re.sub(r",\s*\\!\s*", ",", answer.strip().replace("\n", " "))
    while (m := re.fullmatch(r"\$+(.*?)\$+|\\\((.*)\\\)|\\\[(.*)\\\]", s)) and (
        inner := next(filter(None, m.groups()), "")
    ):
        s = inner.strip()
    s = s.rstrip(". ").rstrip(",;")
    s = s.replace("\\$", "").replace("$", "").replace("−", "-").replace("–", "-").replace("\\%", "").replace("%", "")
    s = re.sub(r"\\[dt]frac", r"\\frac", s).replace("\\cfrac", "\\frac")
    s = re.sub(r"\\(?:left|right|big|Big|bigg|Bigg)[lr]?(?![a-zA-Z])\s*", "", s)
    s = re.sub(r"\\(?:displaystyle|textstyle|limits|mathstrut|hfill)(?![a-zA-Z])|\\[!,;:>] ?|\\ |~", " ", s)
    s = re.sub(r"\\q?quad(?![a-zA-Z])", " ", s)
    s = re.sub(
        r"\^\s*(?:\{\s*\\(?:circ|degree)\s*\}|\\circ(?![a-zA-Z])|\\degree(?![a-zA-Z]))|°|\\degree(?![a-zA-Z])", "", s
    )
    s = s.replace("\\{", "\\lbrace ").replace("\\}", "\\rbrace ")
    # a unit in \text after a number goes, with its power; text that is the whole answer stays
    s = re.sub(
        r"(?<=[\w})])\s*\\(?:text|mbox|mathrm|textrm|rm)\s*\{\s*" + UNITS + r"\.?\s*\}(?:\s*\^\s*\{?[23]\}?)?", "", s
    )
    s = re.sub(
        r"\\(?:text|mbox|textrm|textbf|textit|mathrm|mathbf|mathit|mathsf|operatorname)\s*\{([^{}]*)\}", r" \1 ", s
    )
    s = re.sub(r"(?<=[\d}])\s*" + UNITS + r"\s*(?:\^\s*\{?[23]\}?)?\s*$", "", s) if re.match(r"[-+\d.,\\{(]", s) else s
    s = (
        re.sub(r"(?<=\d)(?:,|\{,\}|(?<=\d) )(?=\d{3}(?!\d))", "", s)
        if re.fullmatch(r"\s*-?\d{1,3}((,|\{,\}| )\d{3})+(\.\d+)?\s*", s)
        else s
    )
    s = s.replace("{,}", "")
    # "x = 5" and "x \in [1,2]" name the unknown before the value
    s = re.sub(r"^\s*(?:[a-zA-Z](?:_\{?\w+\}?)?(?:\([a-zA-Z]\))?)\s*(?:=|\\in(?![a-zA-Z])|\\approx)\s*", "", s)
    s = re.sub(r"\\frac\s*([0-9a-zA-Z])\s*([0-9a-zA-Z])", r"\\frac{\1}{\2}", s)
    s = re.sub(r"\\frac\s*([0-9a-zA-Z])\s*\{", r"\\frac{\1}{", s)
    s = re.sub(r"(\\frac\s*\{[^{}]*\})\s*([0-9a-zA-Z])", r"\1{\2}", s)
    s = re.sub(r"\\sqrt\s*([0-9a-zA-Z])", r"\\sqrt{\1}", s)
    s = re.sub(r"(?<![\d.])(-?\d+)\s*/\s*(\d+)(?![\d.])", r"\\frac{\1}{\2}", s)
    s = re.sub(r"\\frac\s*\{\s*-([^{}]*)\}", r"-\\frac{\1}", s) if s.lstrip().startswith("\\frac{-") else s
    s = re.sub(r"\\(?:cdot|times|ast)(?![a-zA-Z])", r"*", s)
    s = s.replace("\\lbrace ", "\\{").replace("\\rbrace ", "\\}").replace("\\varnothing", "\\emptyset")
    s = re.sub(r"(?<=[\d})\]])\s*,?\s*\b(?:and|or)\b\s*(?=[-\d\\(\[])", ",", s)
    m = re.fullmatch(r"\s*\(\s*([A-Za-z])\s*\)\s*", s)  # a choice: (A) is A
    s = m[1] if m else s
    return re.sub(r"\s+", "", s) if "\\" in s or re.search(r"\d|[=+*/^]", s) else re.sub(r"\s+", " ", s).strip().lower()


def plain_value(s: str) -> Fraction | None:
    """The value of a plain number, fraction or mixed number; None for anything else."""
    m = re.fullmatch(r"(-?)\+?(?:(\d{0,200}(?:\.\d{0,200})?)|(\d{0,200})\\frac\{(\d{1,200})\}\{(\d{1,200})\})", s)
    if not m or not re.search(r"\d", s):
        return None
    if m[2]:
        value = Fraction("0" + m[2] if m[2].startswith(".") else m[2].rstrip(".") if m[2].endswith(".") else m[2])
    elif m[4] and int(m[5]):
        value = Fraction(int(m[3] or 0)) + Fraction(int(m[4]), int(m[5]))
    else:
        return None
    return -value if m[1] else value


def math_worker():
    """Runs in a process of its own, started from this source: are two LaTeX answers equal, pair after pair."""
    import json
    import resource
    import signal
    import sys
    from fractions import Fraction

    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    import sympy
    import sympy.physics.units  # simplify imports it late, and it reads its own names through parse_expr
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy.parsing import sympy_parser

    def number_only(text, *args, **kwargs):
        # latex2sympy reads each number through sympify, whose parse_expr calls eval: this reads it without
        return sympy.Rational(Fraction(text))

    sympy_parser.parse_expr = number_only

    def equal(a, b):
        read = [
            parse(f"${x}$", [LatexExtractionConfig()], parsing_timeout=None, fallback_mode="no_fallback")
            for x in (a, b)
        ]
        return bool(read[0] and read[1] and verify(read[0], read[1], timeout_seconds=None, float_rounding=9))

    equal(r"\frac{\sqrt{3}}{2}+x^2", r"[1,2)\cup\{3\}")  # imports what sympy imports late, before the door is shut

    def no_eval(event, args):
        code = args[0].co_filename if event == "exec" else ""
        # sympy.polys.monomials alone may: it writes functions of the variables a0, a1, ... with no name from outside
        if code[:1] == "<" and code[:7] != "<frozen" and "monomials.py" not in sys._getframe(1).f_code.co_filename:
            raise RuntimeError("a text was about to be evaluated as Python")

    sys.addaudithook(no_eval)
    print("ready", flush=True)
    for line in sys.stdin:
        signal.alarm(60)  # without a handler it ends the process, should nobody be left to do so
        try:
            answer = equal(*json.loads(line))
        except BaseException:  # whatever sympy trips over is not an equal answer
            answer = False
        print(json.dumps(answer), flush=True)


_worker = None


@lru_cache(maxsize=100_000)
def equal_by_algebra(a: str, b: str, timeout: float = 5.0) -> bool:
    """math-verify's verdict from a process that is killed after `timeout` seconds: no alarm interrupts 9^{9^{9^9}}."""
    global _worker
    for _ in range(2):  # a worker that died between two questions is started again
        if _worker is None or _worker.poll() is not None:
            source = inspect.getsource(math_worker) + "\nmath_worker()\n"
            pipe = subprocess.PIPE
            _worker = subprocess.Popen(
                [sys.executable, "-c", source], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL
            )
            if _worker.stdout.readline() != b"ready\n":
                raise SystemExit("error: grading MATH needs math-verify: pip install -r requirements.txt")
        try:
            _worker.stdin.write(json.dumps([a, b]).encode() + b"\n")
            _worker.stdin.flush()
            break
        except BrokenPipeError:
            _worker = None
    answer = b""
    if _worker is not None and select.select([_worker.stdout], [], [], timeout)[0]:
        answer = _worker.stdout.readline()
    if answer not in (b"true\n", b"false\n"):  # out of time or out of memory
        _worker.kill()
        _worker.wait()
        _worker = None
    return answer == b"true\n"


def equal_math(a: str, b: str) -> bool:
    a, b = normal_math(a), normal_math(b)
    if not a or not b:
        return False
    if a == b:
        return True
    # a number in another base: where only one of the two names the base, the question did
    based = [re.fullmatch(r"(\w+)_\{?(\d+)\}?", s) for s in (a, b)]
    if any(based):
        digits = [m[1] if m else s for m, s in zip(based, (a, b))]
        return digits[0] == digits[1] and (not all(based) or based[0][2] == based[1][2])
    values = plain_value(a), plain_value(b)
    if None not in values:
        return values[0] == values[1]
    if ("," in a) != ("," in b) and "\\pm" not in a + b:  # a pair, an interval or a list is no number
        return False
    if max(len(a), len(b)) > 500:  # no answer of MATH is longer than 200 characters
        return False
    return equal_by_algebra(a, b)


def grade_math(completion: str, reference: str) -> bool:
    """True where the final answer equals the reference's: a solution with \\boxed{}, or the bare answer."""
    expected = find_math(reference)[0] if re.search(r"\\(boxed|fbox)", reference) else reference
    found = find_math(completion)[0]
    return found is not None and bool(expected) and equal_math(found, expected)
