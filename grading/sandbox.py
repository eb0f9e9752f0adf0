"""Grade a Python function that a model wrote, without trusting it. Standard library only, Linux.

    verdict, reason = Sandbox().check(problem, completion, timeout=3.0)     # "pass", "fail" or "error"

`problem` is a HumanEval row (prompt, test, entry_point). Three processes take part, so that a verdict cannot be forged:

    caller      holds the model, the tokens, the environment. It only sends jobs and reads verdicts.
    driver      a fresh `python -I` with an empty environment. Runs the test's `check` on a proxy function.
    candidate   a fresh `python -I -S` for each program (candidate.py), behind resource limits, seccomp and Landlock. It
                never holds a test: arguments come in and results go out as literals, 1 MB at most.

No file is written and no directory made. "error" means that the sandbox itself failed, and is never a statement about
the sample.
"""

import ast
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from functools import lru_cache

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # the driver is this file, run alone
from candidate import ALLOWED, LONGEST, call, pack, unpack  # noqa: E402

sys.path.pop(0)


class SandboxError(Exception):
    """The sandbox itself failed; says nothing about the sample."""


class CandidateFailed(Exception):
    """What the check sees where the candidate raised, died or answered nonsense."""


class OutOfTime(BaseException):
    """Raised by the alarm; no `except Exception` of a test swallows it."""


# ---------------------------------------------------------------------------------------------------------------------
# driver: runs the official check on a proxy


def start_candidate():
    folder = os.path.dirname(os.path.abspath(__file__))
    code = f"import sys; sys.path.insert(0, {folder!r}); from candidate import main; sys.path.pop(0); main()"
    command = [sys.executable, "-I", "-S", "-c", code]
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, bufsize=0, cwd="/", start_new_session=True)


def read_reply(stream, buffer):
    while b"\n" not in buffer:
        chunk = os.read(stream.fileno(), 65536)
        if not chunk:
            raise CandidateFailed("ended without an answer")
        buffer += chunk
        if len(buffer) > LONGEST:
            raise CandidateFailed("answered more than 1 MB")
    line, _, rest = bytes(buffer).partition(b"\n")
    buffer[:] = rest
    try:
        reply = ast.literal_eval(line.decode())
        if not isinstance(reply, tuple) or reply[0] not in ("ready", "setup", "defined", "raise", "return"):
            raise ValueError
        return reply[0], *[unpack(part) for part in reply[1:]]
    except Exception:
        raise CandidateFailed("answered no literal") from None


def judge(job, process, phase):
    """Runs the test's `check` with a function that asks the candidate; `phase` tells the caller where it stopped."""
    buffer = bytearray()

    def ask(message, wanted):
        try:
            data = memoryview(repr(message).encode() + b"\n")
            while data:
                data = data[process.stdin.write(data) :]
        except BrokenPipeError:
            raise CandidateFailed("ended between two calls") from None
        return expect(wanted)

    def expect(wanted):
        kind, *content = read_reply(process.stdout, buffer)
        if kind == "setup" and wanted == "ready":
            raise SandboxError(content[0])
        if kind != wanted or len(content) != (kind == "return"):
            raise CandidateFailed(f"raised {content[0] if content else kind}")
        return content

    def proxy(*args, **kwargs):
        return ask(pack((args, kwargs)), "return")[0]

    space = {"__name__": "check"}
    exec(job["prompt"] + "\n    pass\n", space)  # the data set's own helpers (poly, encode_shift), never the model's
    if job["entry_point"] not in space:
        raise SandboxError(f"the prompt does not begin {job['entry_point']}")
    space[job["entry_point"]] = proxy
    exec(job["test"], space)
    if "check" not in space:
        raise SandboxError("the test defines no check")
    packages = [path for path in sys.path if path.endswith("-packages")]
    ask((job["timeout"], job["doors"], packages, job["program"], job["entry_point"]), "ready")
    signal.setitimer(signal.ITIMER_REAL, job["timeout"], 0.5)  # repeated: a test's bare `except` may eat one
    phase[0] = "define"
    expect("defined")
    phase[0] = "check"
    space["check"](proxy)


def run_job(job):
    """("pass" | "fail" | "error", reason) for one program."""

    def alarm(*_):
        raise OutOfTime

    phase, process = ["start"], None
    signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, 10.0, 0.5)  # a busy machine may be slow to start; the program's time is later
    try:
        process = start_candidate()
        judge(job, process, phase)
        verdict = ("pass", "")
    except OutOfTime:
        verdict = ("error", "no start in time")
        if phase[0] != "start":
            verdict = ("fail", f"time limit of {job['timeout']:g} s")
    except CandidateFailed as error:
        verdict = ("error" if phase[0] == "start" else "fail", str(error))
    except BaseException as error:
        verdict = ("fail" if phase[0] == "check" else "error", f"{type(error).__name__}: {error}"[:300])
    finally:
        while True:
            try:  # an alarm may still be under way
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, signal.SIG_IGN)
                break
            except OutOfTime:
                pass
        if process:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
    return verdict


def drive():
    """The driver's main loop: a job a line on standard input, a verdict a line on standard output."""
    call("prctl", 1, signal.SIGKILL, 0, 0, 0)  # dies with the caller
    call("prctl", 4, 0, 0, 0, 0)  # not dumpable: its memory, with the tests in it, cannot be read through /proc
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a test that prints disturbs nobody
    for line in sys.stdin.buffer:
        print(json.dumps(run_job(json.loads(line))), file=replies, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# caller


def end_driver(process):
    process.kill()  # the candidate follows: it dies with its parent
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        with contextlib.suppress(BrokenPipeError):  # a job that it never read
            stream.close()


class Sandbox:
    """One driver process, started when first needed and again after an error. Not for several threads at once."""

    def __init__(self, use=("landlock", "seccomp")):
        self.use, self.process, self.end = tuple(use), None, None

    def start(self):
        command = [sys.executable, "-I", os.path.abspath(__file__)]
        environment = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, start_new_session=True, cwd="/"
        )
        self.end = weakref.finalize(self, end_driver, self.process)  # at exit too, or with its thread

    def read_line(self, timeout):
        deadline, data = time.monotonic() + timeout, b""
        while not data.endswith(b"\n"):
            if not select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise SandboxError("the driver gave no verdict in time")
            chunk = os.read(self.process.stdout.fileno(), 65536)
            if not chunk:
                last = self.process.stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
                raise SandboxError(f"the driver ended: {last}" if last else "the driver ended")
            data += chunk
        return data

    def check(self, problem, completion, timeout=3.0):
        """("pass" | "fail" | "error", reason) for one completion of one HumanEval row."""
        job = {name: problem[name] for name in ("prompt", "test", "entry_point")}
        job |= {"program": problem["prompt"] + completion + "\n", "timeout": timeout, "doors": self.use}
        data = json.dumps(job).encode() + b"\n"
        if len(data) > LONGEST:
            return "fail", "the program is longer than 1 MB"
        try:
            if self.process is None or self.process.poll() is not None:
                self.close()
                self.start()
            with contextlib.suppress(BrokenPipeError):  # read_line says why it ended
                self.process.stdin.write(data)
                self.process.stdin.flush()
            verdict = json.loads(self.read_line(timeout + 20.0))
        except (OSError, SandboxError) as error:
            verdict = ("error", str(error))
        if verdict[0] == "error":
            self.close()
        return tuple(verdict)

    def close(self):
        if self.end is not None:
            self.end()
        self.process = self.end = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


TRIAL = {"prompt": "def f(x):\n", "test": "def check(f):\n    assert f([1, 2.5]) == 1\n", "entry_point": "f"}


@lru_cache
def layers():
    """The doors that this kernel can shut, found out once by grading a trivial program behind each.

    seccomp is one of them, or SandboxError says why it cannot be shut: no program runs without.
    """
    if os.uname().machine not in ALLOWED:
        raise SandboxError(f"no list of system calls for {os.uname().machine}, only for {', '.join(ALLOWED)}")
    found = []
    for use in (("seccomp",), ("landlock", "seccomp")):
        with Sandbox(use) as sandbox:
            verdict, reason = sandbox.check(TRIAL, "    return x[0]\n", 10.0)
        if verdict != "pass" and not found:
            raise SandboxError(reason)
        found = use if verdict == "pass" else found
    return tuple(found)


if __name__ == "__main__":
    drive()
