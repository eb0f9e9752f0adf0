"""Are two LaTeX answers equal, by math-verify; a process of its own, started by answers.py.

A question a line on standard input, as JSON: [expected, found] is answered by true or false, [answer] by a name that
equal answers share. It imports no other file of this repo. Nothing that a model wrote is evaluated as Python: sympy
reads numbers through `parse_expr`, which would be that, so it is replaced, and an audit hook refuses what is left.
"""

import json
import logging
import os
import resource
import signal
import sys
from fractions import Fraction

import sympy
import sympy.physics.units  # noqa: F401 (simplify imports it late, and it reads its own names through parse_expr)
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, grader, parse, verify
from sympy.parsing import sympy_parser

logging.disable()  # math-verify warns that the time limit is ours
# The list of units takes letters for units (2t is 2): answers.py takes away what stands in \text
READ = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")


def equal_numbers(a, b, *_):
    """In place of math-verify's comparison of values, which takes all that is smaller than 1e-15 for zero."""
    if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
        return a.shape == b.shape and all(grader.sympy_expr_eq(x, y, 9, 15) for x, y in zip(a.flat(), b.flat()))
    a, b = grader.safe_sympy_doit(a), grader.safe_sympy_doit(b)
    if a.free_symbols or b.free_symbols:
        return False
    if (a.is_Rational and b.is_Rational) or a.is_infinite or b.is_infinite:
        return a == b
    try:
        return bool(abs((a - b).evalf(30)) <= abs(b.evalf(30)) * sympy.Float("1e-11"))
    except TypeError:  # sets, relations
        return False


def read(answer):
    return parse(f"${answer}$", [LatexExtractionConfig(normalization_config=READ)], "no_fallback", parsing_timeout=None)


def equal(expected, found):
    expected, found = read(expected), read(found)
    return bool(expected and found and verify(expected, found, float_rounding=9, timeout_seconds=None))


def name(answer):
    """Numbers by their first 12 digits, all else in sympy's own order."""
    value = sympy.sympify(grader.safe_sympy_doit(grader.unwrap_eq(read(answer)[0])))
    return str(value.evalf(12) if getattr(value, "is_number", False) else value)


def refuse_eval(event, args):
    code = args[0].co_filename if event == "exec" else ""
    # sympy.polys.monomials alone may: it writes functions of the variables a0, a1, ... with no name from outside
    if code[:1] == "<" and code[:7] != "<frozen" and "monomials.py" not in sys._getframe(1).f_code.co_filename:
        raise RuntimeError("a text was about to be evaluated as Python")


def main():
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    sympy_parser.parse_expr = lambda text, *_, **__: sympy.Rational(Fraction(text))
    grader.sympy_numeric_eq = equal_numbers
    equal(r"\frac{\sqrt{3}}{2}+x^2", r"[1,2)\cup\{3\}")  # imports what sympy imports late, before the door is shut
    sys.addaudithook(refuse_eval)
    print("ready", flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # nobody reads the parser's complaints
    for line in sys.stdin:
        signal.alarm(5)  # without a handler it ends the process: no exception would stop 9^{9^{9^9}}
        question = json.loads(line)
        try:
            answer = equal(*question) if len(question) == 2 else name(*question)
        except BaseException:  # whatever sympy trips over is not an equal answer
            answer = False
        signal.alarm(0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
