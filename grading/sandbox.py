"""Grade a Python function that a model wrote, without trusting it. Standard library only, Linux.

    verdict, reason = Sandbox().check(problem, completion, timeout=3.0)     # "pass", "fail" or "error"

`problem` is a HumanEval row (prompt, test, entry_point). Three processes take part, so that a verdict cannot be forged:

    caller      holds the model, the tokens, the environment. It only sends jobs and reads verdicts.
    driver      a fresh `python -I` with an empty environment. Runs the test's `check` on a proxy function.
    candidate   a fresh `python -I -S` for each program (candidate.py), behind resource limits, seccomp and Landlock. It
                never holds a test: arguments come in and results go out as literals, 1 MB at most.

A driver whose program is over its time is killed, the candidate dies with it, and the next program gets a new one. No
file is written and no directory made. "error" means that the sandbox itself failed, and never speaks of the sample.
"""

import ast
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

from grading.candidate import LONGEST, call, pack, unpack


class SandboxError(Exception):
    """The sandbox itself failed; says nothing about the sample."""


class CandidateFailed(Exception):
    """What the check sees where the candidate raised, died or answered nonsense."""


def fresh_python(module, function, *flags):
    """The command of a new interpreter that runs a function of this package, whose folder it then forgets."""
    path = f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})"
    code = f"import sys; {path}; from grading.{module} import {function}; sys.path.pop(0); {function}()"
    return [sys.executable, "-I", *flags, "-c", code]


# driver: runs the official check on a proxy


def ask(process, wanted, *message):
    """Sends the candidate a message, if there is one; the content of its next answer, which must be as wanted."""
    try:
        if message:
            process.stdin.write(repr(pack(message)).encode() + b"\n")
            process.stdin.flush()
        kind, *content = unpack(ast.literal_eval(process.stdout.readline(LONGEST).decode()))
    except Exception:
        raise CandidateFailed("ended, or answered no literal of at most 1 MB") from None
    if kind != wanted or len(content) != (kind == "return"):
        raise CandidateFailed(" ".join(map(str, (kind, *content))))
    return content


def prepare(job, process):
    """The test's check and the proxy that it is to call; the candidate's doors are shut, its program begins."""

    def proxy(*args, **kwargs):
        return ask(process, "return", args, kwargs)[0]

    space = {"__name__": "check"}
    exec(job["prompt"] + "\n    pass\n", space)  # the data set's own helpers (poly, encode_shift), never the model's
    if job["entry_point"] not in space:
        raise SandboxError(f"the prompt does not begin {job['entry_point']}")
    space[job["entry_point"]] = proxy
    exec(job["test"], space)
    if "check" not in space:
        raise SandboxError("the test defines no check")
    packages = [path for path in sys.path if path.endswith("-packages")]
    ask(process, "ready", job["timeout"], job["doors"], packages, job["program"], job["entry_point"])
    return space["check"], proxy


def run_job(job):
    """Yields "started" when the program's time begins, then ("pass" | "fail" | "error", reason)."""
    pipe, null, process = subprocess.PIPE, subprocess.DEVNULL, None
    verdict = "error"
    try:
        command = fresh_python("candidate", "main", "-S")
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, cwd="/", start_new_session=True)
        check, proxy = prepare(job, process)
        verdict = "fail"
        yield "started"
        ask(process, "defined")
        check(proxy)
        result = ("pass", "")
    except BaseException as error:
        result = (verdict, f"{type(error).__name__}: {error}"[:300])
    if process:
        process.kill()
        process.communicate()
    yield result


def drive():
    """The driver's main loop: a job a line on standard input, what run_job yields as lines on standard output."""
    call("prctl", 1, signal.SIGKILL, 0, 0, 0)  # dies with the caller's thread
    call("prctl", 4, 0, 0, 0, 0)  # not dumpable: its memory, with the tests in it, cannot be read through /proc
    replies, null = os.fdopen(os.dup(1), "w"), os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):  # a test that prints disturbs nobody
        os.dup2(null, number)
    for line in sys.stdin.buffer:
        for reply in run_job(json.loads(line)):
            print(json.dumps(reply), file=replies, flush=True)


# caller


class Sandbox:
    """One driver process, started when first needed and again after an error. Not for several threads at once."""

    def __init__(self, use=("landlock", "seccomp")):
        self.use, self.process = tuple(use), None

    def start(self):
        environment = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        options = {"env": environment, "bufsize": 0, "cwd": "/", "start_new_session": True}
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.process = subprocess.Popen(fresh_python("sandbox", "drive"), **pipes, **options)

    def read(self, seconds):
        """The driver's next line; None where it does not come in time."""
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            return None
        if line := self.process.stdout.readline():
            return json.loads(line)
        last = self.process.stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
        raise SandboxError(f"the driver ended: {last}")

    def check(self, problem, completion, timeout=3.0):
        """("pass" | "fail" | "error", reason) for one completion of one HumanEval row."""
        job = {name: problem[name] for name in ("prompt", "test", "entry_point")}
        job |= {"program": problem["prompt"] + completion + "\n", "timeout": timeout, "doors": self.use}
        data = json.dumps(job).encode() + b"\n"
        if len(data) > LONGEST:
            return "fail", "the program is longer than 1 MB"
        late = ("fail", f"time limit of {timeout:g} s")
        try:
            if self.process is None or self.process.poll() is not None:
                self.close()
                self.start()
            with contextlib.suppress(BrokenPipeError):  # read says why it ended
                self.process.stdin.write(data)
            verdict = self.read(20.0) or ("error", "no start in time")  # the machine may be busy
            if verdict == "started":
                verdict = self.read(timeout) or late
        except (OSError, SandboxError) as error:
            verdict = ("error", str(error))
        if verdict[0] == "error" or verdict == late:
            self.close()
        return tuple(verdict)

    def close(self):
        if self.process:
            self.process.kill()  # the candidate follows: it dies with its parent
            self.process.communicate()
        self.process = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


TRIAL = {"prompt": "def f(x):\n", "test": "def check(f):\n    assert f([1, 2.5]) == 1\n", "entry_point": "f"}


@lru_cache
def layers():
    """The doors that this kernel can shut, found out once by grading a trivial program behind them.

    seccomp is one of them, or SandboxError says why it cannot be shut: no program runs without.
    """
    if os.uname().machine != "x86_64":
        raise SandboxError(f"the list of system calls is for x86_64, and this is {os.uname().machine}")
    for use in (("landlock", "seccomp"), ("seccomp",)):
        with Sandbox(use) as sandbox:
            verdict, reason = sandbox.check(TRIAL, "    return x[0]\n", 10.0)
        if verdict == "pass":
            return use
    raise SandboxError(reason)
