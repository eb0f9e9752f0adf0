"""Reading and comparing final answers: the data sets read themselves, and a table written from the rules."""

import gzip
import json
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from eval_passk import find_gsm8k, find_math, grade_gsm8k, grade_math  # noqa: E402
from grading import answers  # noqa: E402

DATA = Path(__file__).parents[2] / "shared" / "data"

# (completion, reference, right?, how it was found)
GSM8K = [
    ("so 9 * 2 = 18.\n#### 18", "18", True, "marker"),
    ("####18", "18", True, "marker"),
    ("#### $18.", "18", True, "marker"),
    ("#### 18.", "18", True, "marker"),
    ("#### 18.00", "18", True, "marker"),
    ("#### 18.0 dollars", "18", True, "marker"),
    ("#### 018", "18", True, "marker"),
    ("#### $ 18", "18", True, "marker"),
    ("#### 18$", "18", True, "marker"),
    ("#### \\$18", "18", True, "marker"),
    ("#### €18", "18", True, "marker"),
    ("#### £18", "18", True, "marker"),
    ("#### **18**", "18", True, "marker"),
    ("#### (18)", "18", True, "marker"),
    ("#### [18]", "18", True, "marker"),
    ("#### \\boxed{18}", "18", True, "marker"),
    ("#### $18$", "18", True, "marker"),
    ("#### `18`", "18", True, "marker"),
    ("#### +18", "18", True, "marker"),
    ("#### = 18", "18", True, "marker"),
    ("#### x = 18", "18", True, "marker"),
    ("####\n18", "18", True, "marker"),
    ("#### The answer is 18", "18", True, "marker"),
    ("#### 18 apples and 3 pears", "18", True, "marker"),
    ("#### 18\n#### 19", "18", False, "marker"),
    ("#### 19\n#### 18", "18", True, "marker"),
    ("#### 19. The answer is 18", "18", False, "marker"),
    ("##### 18", "18", True, "marker"),
    ("#### 1,234", "1234", True, "marker"),
    ("#### 1234", "1,234", True, "marker"),
    ("#### $1,234,567.00", "1234567", True, "marker"),
    ("#### 1{,}234", "1234", True, "marker"),
    ("#### 1,234.5", "1234.50", True, "marker"),
    ("#### 12,34", "1234", False, "marker"),
    ("#### 50%", "50", True, "marker"),
    ("#### 50 %", "50", True, "marker"),
    ("#### 50\\%", "50", True, "marker"),
    ("#### 50 percent", "50", True, "marker"),
    ("#### 0.5", "1/2", True, "marker"),
    ("#### 1/2", "0.5", True, "marker"),
    ("#### .5", "0.5", True, "marker"),
    ("#### 0.50", ".5", True, "marker"),
    ("#### 2/4", "0.5", True, "marker"),
    ("#### 0.333", "1/3", False, "marker"),
    ("#### 1/0", "1", True, "marker"),
    ("#### -5", "-5", True, "marker"),
    ("#### -5", "5", False, "marker"),
    ("#### −5", "-5", True, "marker"),
    ("#### -$5", "-5", True, "marker"),
    ("#### $-5", "-5", True, "marker"),
    ("#### - 5", "-5", True, "marker"),
    ("#### 5-", "5", True, "marker"),
    ("#### 1e3", "1000", True, "marker"),
    ("#### 1.5e2", "150", True, "marker"),
    ("#### 18km", "18", True, "marker"),
    ("#### 18 km/h", "18", True, "marker"),
    ("#### 180", "18", False, "marker"),
    ("#### 1.8", "18", False, "marker"),
    ("#### 18.5", "18", False, "marker"),
    ("#### 10000000000000000000001", "10000000000000000000000", False, "marker"),
    ("#### 0", "0.0", True, "marker"),
    ("#### -0", "0", True, "marker"),
    ("The answer is 18", "18", True, "phrase"),
    ("The answer is 18.", "18", True, "phrase"),
    ("The answer is 18.00.", "18", True, "phrase"),
    ("The answer is: 18", "18", True, "phrase"),
    ("the answer is $18.", "18", True, "phrase"),
    ("The final answer is 18 dollars.", "18", True, "phrase"),
    ("The answer is **18**.", "18", True, "phrase"),
    ("The answer is \\boxed{18}.", "18", True, "marker"),
    ("The answer is\n18", "18", True, "phrase"),
    ("The answer is 3 + 15 = 18.", "18", True, "phrase"),
    ("The answer is 2*9=18 eggs.", "18", True, "phrase"),
    ("THE ANSWER IS 18", "18", True, "phrase"),
    ("Answer: 18", "18", True, "phrase"),
    ("The answer is 1,800.", "1800", True, "phrase"),
    ("The answer is 18. That took 3 steps.", "18", True, "phrase"),
    ("The answer is 18%", "18", True, "phrase"),
    ("The answer is -18.", "-18", True, "phrase"),
    ("We need 7. The answer is eighteen, so 18", "18", True, "phrase"),
    ("The answer is 1", "18", False, "phrase"),
    ("9 * 2 = 18", "18", True, "last number"),
    ("She makes $18 every day.", "18", True, "last number"),
    ("She makes 18.", "18", True, "last number"),
    ("First 3, then 4, so 18!", "18", True, "last number"),
    ("10-3=7", "7", True, "last number"),
    ("10-3", "-3", False, "last number"),
    ("that is 10 - 3", "3", True, "last number"),
    ("18 is what remains of 20", "18", False, "last number"),
    ("She earned $1,450,000.", "1450000", True, "last number"),
    ("it costs 18¢", "18", True, "last number"),
    ("in all (18)", "18", True, "last number"),
    ("#### none, so 18", "18", True, "marker"),
    ("#### \nno idea", "18", False, "none"),
    ("", "18", False, "none"),
    ("eighteen", "18", False, "none"),
    ("I do not know.", "0", False, "none"),
    ("...", "0", False, "none"),
    ("$", "0", False, "none"),
    # the model ran on into a next question
    (" 9 * 2 = 18. The answer is 18.\n\nQ: Tom has 5 apples. How many?\nA: The answer is 5.", "18", True, "phrase"),
    (" 9 * 2 = 18.\n\nQ: Tom has 5 apples.", "18", True, "last number"),
    ("#### 18\n\nQ: Tom has 5.\nA: #### 5", "18", True, "marker"),
    ("That makes 18\n\nQuestion: 5 apples", "18", True, "last number"),
    ("That makes 18\nQ: 5 apples #### 5", "18", True, "last number"),
    # headings are neither markers nor next questions, and the model may say its question again
    ("First we add.\n\n### Step 1: Add\n2+3=5\n\n#### 5", "5", True, "marker"),
    ("We start from 5 eggs.\n\n### Step 1\n5+3=8\n\n#### 8", "5", False, "marker"),
    ("#### Step 1: add\n2+3\n\nSo \\boxed{5}", "5", True, "marker"),
    ("#### Step 1: 2 + 3 = 5\n\n#### Step 2: 5 + 3 = 8\n\nShe has 9 - 1 = 8 eggs.", "8", True, "last number"),
    ("#### 1. Find the eggs\n16-7 = 9\n\n#### 2. Sell them\n9*2 = 18\n\nShe makes $18.", "18", True, "last number"),
    ("#### Day 1: 5 eggs\n#### Day 2: 7 eggs\nTotal 12", "12", True, "last number"),
    ("#### Step 1\n5\n#### Answer\n18", "18", True, "phrase"),
    ("### Final Answer\n\n18 dollars in 7 days", "18", True, "phrase"),
    ("First.\n\n**Problem:** Tom has 5 apples and gets 3.\n\nSo 5+3=8.\n#### 8", "8", True, "marker"),
    ("Sure.\n\nProblem: Tom has 5.\n\nSolution: 5+3 = 8\nThe answer is 8.", "8", True, "phrase"),
    ("Question: Tom has 5 apples.\nAnswer: 8", "8", True, "phrase"),
    ("The answer is 8.\n\nProblem: Tom has 9.\n\nAnswer: 7", "8", True, "phrase"),
    ("#### 18\n\n### Instruction:\nCount 3.\n#### 4", "18", True, "marker"),
    ("#### 18<|im_end|>\n<|im_start|>user\n#### 5", "18", True, "marker"),
    # boxes, equations, phrases: the last one counts
    ("She earns $\\boxed{7425}$ dollars in 1 week.", "7425", True, "marker"),
    ("So, \\(\\boxed{18\\text{ eggs}}\\) in 7 days.", "18", True, "marker"),
    ("\\boxed{5} is wrong, \\boxed{x = 7} is it", "7", True, "marker"),
    ("#### 5\n\nNo: \\boxed{7}", "7", True, "marker"),
    ("\\boxed{\\text{seven}}, or 7", "7", True, "last number"),
    ("#### 2 + 8 + 6 = 16", "16", True, "marker"),
    ("#### 16 - 3 - 4 = <<16-3-4=9>>9", "9", True, "marker"),
    ("#### 2 + 3 = $5 per day", "5", True, "marker"),
    ("I think the answer: 5 is wrong. Answer: 10", "10", True, "phrase"),
    ("The answer is 5.\nWait. The answer is 7.", "7", True, "phrase"),
    ("The answer is 5.\nWait. The answer is 7.", "5", False, "phrase"),
    ("**Answer:** $18", "18", True, "phrase"),
    ("The answer would be 42 apples in 7 bags.", "42", True, "phrase"),
    ("Therefore the answer is: \\[ 18 \\]", "18", True, "phrase"),
    # what was thought is no answer
    ("<think>Like the example, #### 6.</think>\n9*2=18\n#### 18", "18", True, "marker"),
    ("Like the example, #### 6.</think>\n9*2=18", "18", True, "last number"),
    ("<think>The answer is 5", "5", False, "none"),
    # spellings of numbers
    ("#### $118 000", "118000", True, "marker"),
    ("#### 118\u202f000", "118000", True, "marker"),
    ("$\\boxed{1\\,118\\,000}$", "1118000", True, "marker"),
    ("#### 3 1/2", "7/2", True, "marker"),
    ("#### 3\\frac{1}{2}", "3.5", True, "marker"),
    ("#### 3½", "3.5", True, "marker"),
    ("\\boxed{-\\dfrac{7}{2}}", "-3.5", True, "marker"),
    ("#### \\frac72", "3.5", True, "marker"),
    ("The answer is 2 1/2 cups.", "2.5", True, "phrase"),
    ("The area is 36 cm^2", "36", True, "last number"),
    # longer than int() reads, and no bomb
    ("#### " + "9" * 5000, "18", False, "none"),
    ("#### 1e999999999", "18", False, "marker"),
]

EQUAL = [
    ("5\\text{cm}", "5"), ("5\\text{ cm}^2", "5"), ("5 \\text{ meters}", "5"), ("5 meters", "5"),
    ("5\\,\\text{cm}", "5"), ("12\\mbox{ inches}", "12"), ("15\\mathrm{~mph}", "15"), ("\\$5", "5"),
    ("\\$32,348", "32348"), ("5\\text{ units}", "5"), ("1,000", "1000"), ("1{,}000", "1000"), ("1\\,000", "1000"),
    ("1,\\!000", "1000"), ("11,\\! 111,\\! 100", "11111100"), ("10\\%", "10"), ("10%", "10"), ("25\\%", "25"),
    ("30^\\circ", "30"), ("90^{\\circ}", "90"), ("45°", "45"), ("30\\text{ degrees}", "30"), ("\\text{(A)}", "A"),
    ("(A)", "A"), ("\\textbf{(C)}", "C"), ("\\mathrm{B}", "B"), ("\\text{Monday}", "Monday"),
    ("\\text{even}", "Even"), ("\\text{ Yes }", "yes"), ("\\text{June 20}", "\\text{June 20}"),
    ("0.75", "\\frac{3}{4}"), (".5", "\\frac12"), ("5.0", "5"), ("0", "0.0"), ("1/2", "\\frac{1}{2}"),
    ("-1/2", "-\\frac12"), ("\\frac{-1}{2}", "-\\frac{1}{2}"), ("-0.5", "-\\frac12"), ("\\frac{2}{4}", "\\frac12"),
    ("\\dfrac{1}{2}", "\\tfrac12"), ("\\cfrac{1}{2}", "\\frac 1 2"), ("\\frac1{2}", "\\frac{1}2"),
    ("3\\frac{1}{2}", "\\frac72"), ("2\\frac{3}{4}", "2.75"), ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt3}"),
    ("\\frac{\\sqrt{2+\\sqrt{3}}}{2}", "\\frac{1}{2}\\sqrt{2+\\sqrt3}"), ("2\\sqrt3", "\\sqrt{12}"),
    ("\\sqrt{50}", "5\\sqrt{2}"), ("-\\frac{\\sqrt{2}}{2}", "\\frac{-\\sqrt2}{2}"), ("10^{3}", "1000"),
    ("2^{10}", "1024"), ("e^{2}", "e^2"), ("6!", "720"), ("\\binom{5}{2}", "10"), ("\\log_2 8", "3"),
    ("2\\pi", "\\pi \\cdot 2"), ("\\frac{\\pi}{6}", "\\pi/6"), ("i\\sqrt2", "\\sqrt2 i"), ("3+4i", "4i+3"),
    ("x=5", "5"), ("x = \\frac12", "0.5"), ("f(x) = x+1", "x+1"), ("y=2x+1", "2x+1"), ("x \\in [1,2]", "[1,2]"),
    ("(x+1)^2", "x^2+2x+1"), ("2x+3y", "3y+2x"), ("x^2-y^2", "(x-y)(x+y)"), ("\\frac{x}{2}", "x/2"),
    ("\\tfrac{1}{2}x", "\\frac{x}{2}"), ("\\cos^2 x+\\sin^2 x", "1"), ("p-q", "-q+p"), ("x^3+3x-6", "x^3 + 3x - 6"),
    ("\\left(1,2\\right)", "(1,2)"), ("\\left[0,1\\right)", "[0,1)"), ("(1,\\frac12)", "(1,0.5)"),
    ("( 1 , 2 )", "(1,2)"), ("(-\\infty,2]\\cup[3,\\infty)", "[3,\\infty)\\cup(-\\infty,2]"),
    ("\\left(-\\infty, 0\\right]", "(-\\infty,0]"), ("\\{1,2\\}", "\\{2,1\\}"), ("1,2", "2,1"),
    ("3 \\text{ and } 5", "3,5"), ("\\text{3 and 5}", "5,3"), ("2\\pm\\sqrt3", "2-\\sqrt3,2+\\sqrt3"),
    ("(2,3),(4,5)", "(4,5),(2,3)"), ("\\emptyset", "\\varnothing"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{bmatrix}1\\\\2\\end{bmatrix}"),
    ("\\begin{pmatrix}\\frac12\\\\2\\end{pmatrix}", "\\begin{pmatrix}0.5\\\\2\\end{pmatrix}"), ("52_8", "52_{8}"),
    ("52_8", "52"), ("x<5", "5>x"), ("x\\le 3", "x\\leq 3"), ("\\displaystyle 7", "7"), ("$7$", "7"), ("7.", "7"),
    # any text behind a number is a unit
    ("81", "81\\text{ teachers}"), ("90\\text{ square\nunits}", "90"), ("2\\sqrt{3}\\text { sq inches}", "2\\sqrt3"),
    ("\\frac{270}7\\text{ degrees}", "\\frac{270}{7}"), ("5 \\operatorname{cm}^2", "5"), ("x = 5\\text{ cm}", "5"),
    ("5 \\rm cm", "5"), ("5\\,", "5"), ("1920\\text{ ways.}", "1920"), ("\\text{4:30 p.m.}", "4:30 \\text{ PM}"),
    ("\\text{12 ways}", "12"), ("2**3", "8"),
    ("\\begin{pmatrix}1\\\\[4pt]2\\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
    ("\\text{The answer is } 5", "5"), ("1/2 x", "\\frac{x}{2}"),
    # lists and equations
    ("x = 1 \\text{ or } x = 2", "1,2"), ("7, -2, \\text{ and } -5", "-5,-2,7"), ("1 \\text{ or } 2", "2, 1"),
    ("a_n = 2n", "2n"), ("y = x + 3", "y=x+3"), ("\\text{B, A}", "A, B"),
    # trigonometry in degrees, and what keyboards write
    ("\\sin 32^\\circ", "\\cos 58^\\circ"), ("2\\cos{50°}", "2\\sin(40^{\\circ})"), ("\\tan 60^\\circ", "\\sqrt3"),
    ("(-∞, 3]", "(-\\infty,3]"), ("x≥3", "x\\ge 3"), ("2√(3)", "\\sqrt{12}"), ("√12π", "2\\sqrt3\\pi"), ("½", "0.5"),
    ("x²−1", "(x+1)(x-1)"), ("(−∞,0)∪(1,∞)", "(-\\infty,0)\\cup(1,\\infty)"), ("x = 204_5", "204_5"),
]  # fmt: skip
# (found, reference): what a reader would take, but not for the other way round
ONE_WAY = [
    ("64 + 37 + 11 = 112", "112"),
    ("x+3", "y = x + 3"),
    ("3,1", "(3,1)"),
    ("-5", "x=-5"),
    ("x = 5", "5"),
    ("a + b = 5", "5"),
]
DIFFERENT = [
    ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), ("(1,2)", "(1,2]"), ("(1,2,3)", "(1,2)"), ("[3,3]", "3"), ("(5,1)", "5"),
    ("0.333", "\\frac13"), ("\\frac13", "0.3"), ("3.14", "\\pi"), ("6.28", "2\\pi"), ("5", "-5"), ("5", "5.01"),
    ("50", "5"), ("\\sqrt2", "2"), ("\\frac12", "\\frac21"), ("2", "2x"), ("i", "1"), ("\\infty", "-\\infty"),
    ("x+1", "x-1"), ("x", "y"), ("1,2", "1"), ("12", "1,2"), ("\\{1,2\\}", "\\{1\\}"), ("1000", "1,00"),
    ("1,000", "1"), ("2,3", "23"), ("10^3", "103"), ("A", "B"), ("(A)", "(B)"), ("Monday", "Tuesday"),
    ("\\text{no}", "\\text{not}"), ("\\text{yes}", "5"), ("52_8", "52_9"), ("x<5", "x>5"), ("x<5", "x\\le5"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}2\\\\1\\end{pmatrix}"), ("", "5"), ("", ""),
    ("\\text{}", "\\text{}"), ("(", ")"), ("\\frac", "\\sqrt"),
    ("3", "y = x + 3"), ("x=5", "y=5"), ("\\{1,2\\}", "(1,2)"),
    ("\\frac{1}{2006!}", "\\frac{1}{2004!}"), ("10^{-20}", "10^{-21}"), ("10^{-30}", "0"), ("10^{50}+1", "10^{50}"),
    ("\\{10^{-20}\\}", "\\{10^{-21}\\}"), ("1.5\\times10^{-9}", "2.5\\times10^{-9}"), ("2t", "2"), ("3m", "3"),
    ("\\sin 32", "\\sin 32^\\circ"), ("60^\\circ", "\\frac{\\pi}{3}"), ("\\text{seat}", "\\text{east}"),
    ("5\\text{ million}", "5"), ("9\\text{ a.m.}", "9\\text{ p.m.}"), ("\\text{Five}", "5"), ("1 \\text{ or } 2", "1"),
]  # fmt: skip


def load(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not at hand")
    with gzip.open(path, "rt") if name.endswith("gz") else open(path) as file:
        return [json.loads(line) for line in file]


def test_every_gsm8k_reference_is_read_as_itself():
    rows = load("gsm8k_test.jsonl")
    assert len(rows) == 1319
    for row in rows:
        answer = row["answer"].split("#### ")[1]
        assert find_gsm8k(row["answer"]) == (Fraction(answer.replace(",", "")), "marker")
        assert grade_gsm8k(row["answer"], row["answer"]) and grade_gsm8k(f"The answer is ${answer}.", row["answer"])
        assert grade_gsm8k(f"So it is {answer}", row["answer"])
        assert not grade_gsm8k(f"#### {answer}1", row["answer"])


def test_every_math_reference_equals_itself():
    rows = load("math_test.jsonl.gz")
    assert len(rows) == 5000
    for row in rows:
        assert grade_math(row["solution"], row["solution"]), row["solution"]
        assert find_math(row["solution"])[1] == "marker"


@pytest.mark.parametrize("completion, reference, right, how", GSM8K)
def test_gsm8k_spellings(completion, reference, right, how):
    assert (grade_gsm8k(completion, reference), find_gsm8k(completion)[1]) == (right, how)
    assert grade_gsm8k(completion, f"Some steps with <<2*9=18>> 7.\n#### {reference}") == right


def test_there_are_a_hundred_spellings():
    assert len(GSM8K) >= 100 and len(EQUAL) + len(DIFFERENT) >= 100


@pytest.mark.parametrize("a, b", EQUAL)
def test_math_equal(a, b):
    assert grade_math(f"We get $\\boxed{{{a}}}$.", b)
    assert grade_math(f"We get $\\boxed{{{b}}}$.", f"Thus $x = \\boxed{{{a}}}$.")


@pytest.mark.parametrize("a, b", DIFFERENT)
def test_math_different(a, b):
    assert not grade_math(f"We get $\\boxed{{{a}}}$.", b)
    assert not grade_math(f"We get $\\boxed{{{b}}}$.", a)


@pytest.mark.parametrize("found, reference", ONE_WAY)
def test_math_one_way(found, reference):
    assert grade_math(f"We get $\\boxed{{{found}}}$.", reference)


@pytest.mark.parametrize("found, reference", [("1,3", "(3,1)"), ("0", "x - 3z = 0"), ("5", "2x = 5"), ("5", "[5,5]")])
def test_math_not_one_way(found, reference):
    assert not grade_math(f"We get $\\boxed{{{found}}}$.", reference)


def test_where_the_math_answer_is_found():
    table = [
        ("\\boxed{1} no, \\boxed{\\frac{\\sqrt{2}}{\\sqrt{3}}}", "\\frac{\\sqrt{2}}{\\sqrt{3}}", "marker"),
        ("\\fbox{5}", "5", "marker"),
        ("\\boxed 5", "5", "marker"),
        ("it is $\\boxed 5$.", "5", "marker"),
        ("\\boxed {5}", "5", "marker"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}", "marker"),
        ("\\boxed{\\text{a {b} c}}", "\\text{a {b} c}", "marker"),
        ("\\boxed{5} and then \\boxed{6", "5", "marker"),
        ("\\boxed{}", None, "none"),
        ("The answer is $\\frac{1}{2}$.", "\\frac{1}{2}", "phrase"),
        ("The answer is $\\$40$.", "\\$40", "phrase"),
        ("The final answer is 7. I hope it is correct.", "7", "phrase"),
        ("The answer is **5**.", "5", "phrase"),
        ("The answer is $x=1$ or $x=2$.", "x=1  or  x=2", "phrase"),
        ("# Answer\n\n\\frac{1}{2}", "\\frac{1}{2}", "phrase"),
        ("The answer is 7. I checked: this answer is correct.", "7", "phrase"),
        ("We have $y=3$.\nSo $x$ is $5$.", "5", "last number"),
        ("So we get **5**.", "5", "last number"),
        ("7", None, "none"),
        ("", None, "none"),
        ("We count.\n\n### Step 1: one digit\n2, 3\n\n### Step 2\nSo \\(\\boxed{10}\\).", "10", "marker"),
        ("<think>\\boxed{3}</think> \\boxed{4}", "4", "marker"),
        ("\\boxed{41}\n\n###\n\nProblem: next\n\nAnswer: \\boxed{7}", "41", "marker"),
    ]
    for text, answer, how in table:
        assert find_math(text) == (answer, how), text
    assert not grade_math("nothing", "nothing \\boxed{}")


def test_no_text_of_a_model_is_evaluated_and_none_takes_long(tmp_path):
    """Code in an answer leaves no trace, and what would take for ever is cut off by killing the process."""
    trace = tmp_path / "trace"
    for code in (
        f"__import__('os').system('touch {trace}')",
        f"open('{trace}','w')",
        f"\\text{{__import__('os').mkdir('{trace}')}}+1",
        f"sympify(\"open('{trace}','w')\")",
        "exit()",
    ):
        assert not grade_math(f"\\boxed{{{code}}}", "5") and not grade_math("\\boxed{5+x}", code)
    assert not trace.exists()
    start = time.monotonic()
    assert not grade_math("\\boxed{9^{9^{9^{9}}}}", "x+3")
    assert not grade_math("\\boxed{(x+y+z)^{99999}}", "x+3")
    assert time.monotonic() - start < 45
    assert grade_math("\\boxed{\\sqrt{20}}", "2\\sqrt5"), "the next question is answered again"
    answers._worker.kill()
    assert grade_math("\\boxed{\\sqrt{18}}", "3\\sqrt2"), "and by another worker, should this one end"
    start = time.monotonic()
    for text in ("\n" * 20_000, "#### \n" * 5_000, "\\boxed{" * 2_000, "$" * 9_999, "\\text{a} " * 3_000, "1 " * 9_999):
        assert not grade_math(text, "5") and not grade_gsm8k(text, "5")
    assert time.monotonic() - start < 10


def test_the_worker_refuses_eval():
    """The door itself: were a library to evaluate a text, the worker would refuse."""
    source = Path(answers.__file__).with_name("algebra.py").read_text()
    assert "equal(*question)" in source
    source = source.replace("equal(*question)", "bool(eval(question[0]))")
    run = subprocess.run([sys.executable, "-c", source], input=b'["1+1", ""]\n', capture_output=True, timeout=60)
    assert run.stdout.split() == [b"ready", b"false"]


def test_agreement_is_counted(tmp_path):
    rows = [{"task": "gsm8k", "completion": "#### 5", "reference": "5", "right": right} for right in (True, False)]
    rows += [{"task": "math", "completion": "\\boxed{6}", "reference": "5", "right": right} for right in (True, False)]
    rows += [{"question": "q", "answer": "so\n#### 5"}, {"problem": "p", "solution": "so \\boxed{5}"}]
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "benchmarks/agreement.py", str(tmp_path / "f.jsonl"), "--show", "1"]
    run = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120)
    assert "gsm8k: 2 of 3 agree (66.67%), 0 right ones failed, 1 wrong ones passed" in run.stdout, run.stderr
    assert "math: 2 of 3 agree (66.67%), 1 right ones failed, 0 wrong ones passed" in run.stdout
    assert "label True: expected '5', found 6" in run.stdout
