"""The sandbox: the 164 references pass, empty bodies do not, no hostile program passes, hurts or outlives its limit."""

import contextlib
import ctypes
import gzip
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from grading import sandbox  # noqa: E402
from grading.candidate import pack, unpack  # noqa: E402
from grading.sandbox import Sandbox, SandboxError, layers  # noqa: E402

HUMANEVAL = Path(__file__).parents[2] / "shared" / "data" / "HumanEval.jsonl.gz"
SECRET = "hidden-expected-value"
LIMIT = 0.7

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the list of system calls is for x86_64")

PROBLEM = {
    "prompt": 'def answer(number, text):\n    """Tell what the check expects."""\n',
    "entry_point": "answer",
    "test": f"def check(candidate):\n    expected = '{SECRET}'\n    assert candidate(1, 'a') == expected\n"
    f"    assert candidate(2, 'b') == expected\n",
}

# Each is a whole body of `answer` (indented later) or, after a line "---", code of the module.
HOSTILE = {
    "equal to everything": """
        class Any:
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            def __hash__(self): return 0
            def __repr__(self): return repr('x')
        return Any()""",
    "string subclass equal to everything": """
        class Any(str):
            def __eq__(self, other): return True
            def __repr__(self): return "'x'"
        return Any('x')""",
    "int subclass with a forged repr": """
        class Any(int):
            def __eq__(self, other): return True
            def __repr__(self): return "__import__('os')._exit(0)"
        return Any(1)""",
    "frames": """
        import sys
        frame = sys._getframe()
        while frame:
            for value in [*frame.f_locals.values(), *frame.f_globals.values(), *frame.f_code.co_consts]:
                if 'hidden-' + 'expected' in str(value)[:100000] and len(str(value)) < 60: return value
            frame = frame.f_back""",
    "gc": """
        import gc
        for thing in gc.get_objects():
            for value in (thing.values() if type(thing) is dict else thing if type(thing) in (list, tuple) else ()):
                if type(value) is str and value.startswith('hidden-' + 'expected'): return value""",
    "own memory": """
        import re
        with open('/proc/self/mem', 'rb', 0) as memory:
            for line in open('/proc/self/maps'):
                low, high = (int(x, 16) for x in line.split()[0].split('-'))
                memory.seek(low)
                found = re.search(b'hidden[-]expected-value', memory.read(high - low))
                if found: return found[0].decode()""",
    "parent's memory": """
        import os, re
        with open('/proc/%d/mem' % (os.getppid() or 1), 'rb', 0) as memory:
            for line in open('/proc/%d/maps' % (os.getppid() or 1)):
                low, high = (int(x, 16) for x in line.split()[0].split('-'))
                memory.seek(low)
                found = re.search(b'hidden[-]expected-value', memory.read(high - low))
                if found: return found[0].decode()""",
    "driver's memory, wherever it is": """
        import os, re
        for name in os.listdir('/proc'):
            try:
                if '-I' not in open('/proc/%s/cmdline' % name).read().split('\\0'): continue
                with open('/proc/%s/mem' % name, 'rb', 0) as memory:
                    for line in open('/proc/%s/maps' % name):
                        low, high = (int(x, 16) for x in line.split()[0].split('-'))
                        memory.seek(low)
                        found = re.search(b'hidden[-]expected-value', memory.read(high - low))
                        if found: return found[0].decode()
            except (OSError, OverflowError): pass""",
    "ptrace": """
        import ctypes, os
        libc = ctypes.CDLL(None)
        return libc.ptrace(16, os.getppid() or 1, 0, 0)""",
    "fork bomb": """
        import os
        while True:
            try: os.fork()
            except OSError: pass""",
    "thread bomb": """
        import threading, time
        while True:
            try: threading.Thread(target=time.sleep, args=(60,)).start()
            except BaseException: pass""",
    "endless loop": """
        while True: pass""",
    "endless loop in C": """
        return 9 ** 9 ** 9 ** 9""",
    "loop deaf to signals": """
        import signal
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except Exception: pass
        while True: pass""",
    "sleep": """
        import time
        time.sleep(3600)""",
    "memory at once": """
        return bytearray(10 ** 11)[0]""",
    "memory by and by": """
        kept = []
        while True: kept.append(bytearray(10 ** 7))""",
    "disk": """
        number = 0
        while True:
            number += 1
            try:
                with open('filler%d' % number, 'wb') as file: file.write(b'x' * 10 ** 7)
            except OSError:
                if number > 3000: break""",
    "huge output": """
        import sys
        while True:
            sys.stdout.write('x' * 10 ** 6); sys.stderr.write('x' * 10 ** 6)""",
    "huge result": """
        return 'x' * 10 ** 8""",
    "endless reply": """
        import os
        while True: os.write(4, b'x' * 10 ** 6)""",
    "deep result": """
        result = []
        for _ in range(100000): result = [result]
        return result""",
    "deep forged literal": """
        import os
        os.write(4, b'(' * 200000 + b')' * 200000 + b'\\n'); os.write(4, b'-' * 300000 + b'1\\n')""",
    "os._exit": """
        import os
        os._exit(0)""",
    "sys.exit": """
        import sys
        sys.exit(0)""",
    "exit while defining": """
        pass
        ---
        import os
        os._exit(0)""",
    "printing the verdict": """
        import os
        for number in range(64):
            for line in (b'["pass", ""]', b'pass', b'passed', b'("return", True)', b'-', b'.', b'+'):
                try: os.write(number, line + b'\\n')
                except OSError: pass
        os._exit(0)""",
    "patching builtins": """
        import builtins
        builtins.AssertionError = type('Quiet', (BaseException,), {})
        builtins.isinstance = lambda *a: True
        builtins.all = builtins.any = builtins.bool = lambda *a: True
        builtins.repr = lambda value: "('return', True)"
        builtins.exec = builtins.compile = lambda *a, **k: None
        return True""",
    "patching the checker": """
        import sys
        for module in list(sys.modules.values()):
            for name in ('check', 'run_job', 'ask', 'prepare', 'unpack', 'pack', 'candidate', 'drive'):
                try: setattr(module, name, lambda *a, **k: ('pass', ''))
                except Exception: pass
        return ('pass', '')""",
    "patching unittest": """
        import unittest, unittest.mock
        unittest.TestCase.assertEqual = lambda *a, **k: None
        unittest.TestCase.failureException = type('Quiet', (BaseException,), {})
        return unittest.mock.ANY""",
    "killing the parent": """
        import os, signal
        for target in (os.getppid(), 0, -1, 1, os.getpid(), -os.getpgrp()):
            try: os.kill(target, signal.SIGKILL)
            except OSError: pass""",
    "killing everything by number": """
        import os
        for target in range(2, 70000):
            try: os.kill(target, 9)
            except OSError: pass""",
    "reading the environment": """
        import os
        if 'HF_TOKEN' in os.environ: return os.environ['HF_TOKEN']
        for name in os.listdir('/proc'):
            try: text = open('/proc/%s/environ' % name).read()
            except OSError: continue
            for entry in text.split('\\0'):
                if entry.startswith('HF_TOKEN='): return entry[9:]""",
    "reading a secret file": """
        return open('VICTIM/secret').read()""",
    "deleting outside": """
        import os, shutil
        for victim in ('VICTIM', os.path.dirname(os.getcwd()), os.getcwd()):
            shutil.rmtree(victim, ignore_errors=True)
        for change in (lambda: os.unlink('VICTIM/secret'), lambda: open('VICTIM/secret', 'w').write('gone'),
                       lambda: os.truncate('VICTIM/secret', 0), lambda: os.rename('VICTIM', '/tmp/elsewhere'),
                       lambda: os.chmod('VICTIM', 0), lambda: os.symlink('/', 'VICTIM/link'),
                       lambda: open('VICTIM/more', 'w').write('x')):
            try: change()
            except OSError: pass""",
    "socket": """
        import socket
        connection = socket.create_connection(('127.0.0.1', PORT), timeout=2)
        return connection.recv(100).decode()""",
    "datagrams to anyone": """
        import socket
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        return ours.sendto(b'x', '/dev/log')""",
    "descriptors that were left open": """
        import os
        for number in range(3, 64):
            try: text = os.read(number, 100000).decode(errors='replace')
            except OSError: continue
            if 'hidden-' + 'expected' in text: return text""",
    "vfork, clone and exec by number": """
        import ctypes
        libc = ctypes.CDLL(None)
        return [libc.syscall(n, 17, 0, 0, 0, 0) for n in (56, 57, 58, 59, 220, 221, 322, 281, 435)]""",
    "io_uring, memfd and open_by_handle": """
        import ctypes
        libc = ctypes.CDLL(None)
        return [libc.syscall(n, 0, 0, 0, 0) for n in (425, 426, 319, 279, 304, 265, 437, 257 + 0x40000000)]""",
    "children left behind": """
        import os, time
        for _ in range(2):
            try:
                if os.fork() == 0:
                    os.setsid()
                    if os.fork() == 0: time.sleep(3600)
                    os._exit(0)
            except OSError: pass
        return 0""",
    "another program": """
        import subprocess
        return subprocess.run(['/bin/sh', '-c', 'sleep 3600 & echo hello'], capture_output=True).stdout""",
    "raising its limits": """
        import resource
        for name in range(16):
            try: resource.setrlimit(name, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            except Exception: pass
        return len(bytearray(4 * 10 ** 9))""",
    "mount and unshare": """
        import ctypes
        libc = ctypes.CDLL(None)
        return [libc.umount2(b'/proc', 2), libc.unshare(0x10000000), libc.mount(b'none', b'/proc', b'proc', 0, 0)]""",
    "crash": """
        import ctypes
        ctypes.string_at(0)""",
    "stack": """
        import sys
        sys.setrecursionlimit(10 ** 9)
        f = lambda: f()
        f()""",
}


def body(source, **values):
    head, _, module = textwrap.dedent(source).strip("\n").partition("\n---\n")
    for name, value in values.items():
        head, module = head.replace(name, str(value)), module.replace(name, str(value))
    return textwrap.indent(head, "    ") + "\n" + module


@pytest.fixture(autouse=True)
def orphans_come_to_us():
    """What a killed driver or caller leaves becomes a child of this process (PR_SET_CHILD_SUBREAPER), not of process 1,
    so that it is told from what other tests run beside it.
    """
    assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0


def descendants(ancestor):
    """Processes that `ancestor` started, and those that they did; without the dead that nobody has waited for."""
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            state, parent = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[:2]
            parents |= {int(name): int(parent)} if state != "Z" else {}
    found = {ancestor}
    for _ in parents:
        found |= {pid for pid, parent in parents.items() if parent in found}
    return sorted(found - {ancestor})


def candidates():
    """Programs that run in a sandbox of this process, or did when their driver was killed."""
    found = []
    for pid in descendants(os.getpid()):
        with contextlib.suppress(OSError):
            if "from grading.candidate import main" in Path(f"/proc/{pid}/cmdline").read_text():
                found.append(pid)
    return found


def wait_until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.fixture
def victim(tmp_path):
    (tmp_path / "secret").write_text(SECRET)
    yield tmp_path
    assert sorted(p.name for p in tmp_path.iterdir()) == ["secret"]
    assert (tmp_path / "secret").read_text() == SECRET and tmp_path.stat().st_mode & 0o777 != 0


@pytest.fixture
def port():
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                server.accept()[0].send(SECRET.encode())
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()
    yield server.getsockname()[1]
    server.close()


@pytest.mark.parametrize("use", sorted({layers(), ("seccomp",)}), ids="+".join)
def test_hostile_programs_neither_pass_nor_hurt_nor_stay(use, victim, port, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    # the process whose environment /proc shows is the one that was started with it
    neighbour = subprocess.Popen(["sleep", "600"])
    problems = []
    assert len(HOSTILE) >= 20
    with Sandbox(use=use) as box:
        assert box.check(PROBLEM, f"    return '{SECRET}'\n", 5.0) == ("pass", "")
        driver, others = box.process.pid, set(candidates())
        mine = set(descendants(os.getpid())) - {driver}
        for name, source in HOSTILE.items():
            if len(use) == 1 and ("environment" in name or "secret file" in name):
                continue  # seccomp alone cannot see which file is opened; the docs say so
            before, start = box.process, time.monotonic()
            verdict, reason = box.check(PROBLEM, body(source, VICTIM=victim, PORT=port), LIMIT)
            seconds = time.monotonic() - start
            if verdict != "fail" or seconds > LIMIT + 5.0:
                problems.append((name, verdict, reason, round(seconds, 2)))
            if box.process is not (None if "time limit" in reason else before or box.process):
                problems.append((name, "the driver had to be started again"))
            driver = {box.process.pid} if box.process else set()  # it goes with a program that is late
            left = lambda: set(descendants(os.getpid())) - mine - driver | set(candidates()) - others  # noqa: B023, E731
            if not wait_until(lambda: not left(), 2.0):  # noqa: B023
                problems.append((name, "left behind", left()))
        assert not problems
        assert box.check(PROBLEM, f"    return '{SECRET}'\n", 5.0) == ("pass", "")
    assert neighbour.poll() is None
    neighbour.kill()
    neighbour.wait()
    assert set(descendants(os.getpid())) <= mine


def test_nothing_outlives_a_killed_driver_or_caller():
    others = set(candidates())
    with Sandbox() as box:
        assert box.check(PROBLEM, f"    return '{SECRET}'\n", 5.0)[0] == "pass"
        job = {**PROBLEM, "program": PROBLEM["prompt"] + "    while True: pass\n", "timeout": 60, "doors": box.use}
        box.process.stdin.write(json.dumps(job).encode() + b"\n")
        box.process.stdin.flush()
        assert wait_until(lambda: set(candidates()) - others)
        box.process.kill()
        box.process.wait()
        assert wait_until(lambda: not set(candidates()) - others)
        assert box.check(PROBLEM, f"    return '{SECRET}'\n", 5.0)[0] == "pass", "a new driver takes over"
    # the caller: SIGKILL while a program runs
    problem = {"prompt": "def f():\n", "entry_point": "f", "test": "def check(f): f()"}
    source = f"from grading.sandbox import *; print(flush=True); Sandbox().check({problem}, '    while True: pass', 60)"
    with subprocess.Popen(
        [sys.executable, "-c", source], cwd=Path(__file__).parents[1], stdout=subprocess.PIPE
    ) as caller:
        caller.stdout.readline()
        assert wait_until(lambda: set(candidates()) - others)
        left = descendants(caller.pid)
        caller.kill()
    assert len(left) == 2 and wait_until(lambda: not set(left) & set(descendants(os.getpid())))


def test_sandbox_error_is_its_own_verdict_and_says_why(monkeypatch, tmp_path):
    made = set(os.listdir(tempfile.gettempdir()))
    with Sandbox() as box:
        box.start()
        os.kill(box.process.pid, 9)
        box.process.wait()
        for path, data, reason in (("missing", None, "No such file"), ("python", "", "Permission denied")):
            if data is not None:
                (tmp_path / path).write_text(data)
            monkeypatch.setattr(sandbox.sys, "executable", str(tmp_path / path))
            verdict, why = box.check(PROBLEM, "    return 1\n", 1.0)
            assert verdict == "error" and reason in why and path in why
        (tmp_path / "broken").write_text("#!/bin/sh\necho no module named x >&2\n")
        (tmp_path / "broken").chmod(0o755)
        monkeypatch.setattr(sandbox.sys, "executable", str(tmp_path / "broken"))
        assert box.check(PROBLEM, "    return 1\n", 1.0) == ("error", "the driver ended: no module named x")
        layers.cache_clear()
        with pytest.raises(SandboxError, match="no module named x"):
            layers()
    monkeypatch.undo()
    layers.cache_clear()
    with Sandbox() as box:
        for test in ("def chek(candidate):\n    pass\n", "def check(candidate)\n", "import nothing_of_this_name\n"):
            assert box.check({**PROBLEM, "test": test}, "    return 1\n", 1.0)[0] == "error", test
    assert "seccomp" in layers()
    assert not {name for name in set(os.listdir(tempfile.gettempdir())) - made if "sandbox" in name}


RIGHT = {  # what honest programs do
    "asyncio": "    import asyncio\n    async def g():\n        await asyncio.sleep(0.01)\n        return x\n"
    "    return asyncio.run(g())\n",
    "threads": "    from concurrent.futures import ThreadPoolExecutor\n    with ThreadPoolExecutor(2) as pool:\n"
    "        return next(pool.map(lambda y: y, [x]))\n",
    "printing": "    print('x' * 100000)\n    return x\n",
    "the library": "    import hashlib, random, decimal, statistics, datetime, heapq, json, re, typing\n"
    "    datetime.datetime.now().astimezone()\n    return x\n",
    "an answer that is no literal": "    import numpy\n    return numpy.int64(x)\n",
}


@pytest.mark.parametrize("name", RIGHT)
def test_honest_programs_pass(name):
    problem = {
        "prompt": "def f(x):\n",
        "entry_point": "f",
        "test": "def check(f):\n    print(1)\n    assert f(2) == 2\n",
    }
    with Sandbox() as box:
        assert box.check(problem, RIGHT[name], 20.0) == ("pass", "")


def test_long_integers_cross():
    problem = {"prompt": "def f(x):\n", "entry_point": "f"}
    problem["test"] = "def check(f):\n    assert f(-10**5000) == 1 - 10**5000\n    assert f(3) == 4\n"
    with Sandbox() as box:
        assert box.check(problem, "    return x + 1\n", 5.0) == ("pass", "")
        assert box.check(problem, "    return x + 2\n", 5.0)[0] == "fail"


def test_what_equals_a_literal_officially_crosses():
    source = """
        import collections, decimal, fractions
        ordered, default = collections.OrderedDict(a=1), collections.defaultdict(int, {'b': 2})
        point = collections.namedtuple('Point', 'x y')(1, 2)
        return [collections.Counter('aab'), ordered, default, float('inf'), fractions.Fraction(1, 2), point,
                decimal.Decimal('1.5'), {1: 'x'}.keys(), frozenset({3}), -0.0, 1j, b'bytes', None, True, text,
                number]"""
    problem = {
        "prompt": PROBLEM["prompt"],
        "entry_point": "answer",
        "test": "from math import inf, nan, isnan\ndef check(candidate):\n"
        "    assert candidate(inf, {'k': [(1, 2), {3}, nan]})[:-2] == [{'a': 2, 'b': 1}, {'a': 1}, {'b': 2}, inf, 0.5,"
        " (1, 2), 1.5, {1}, {3}, 0, 1j, b'bytes', None, True]\n"
        "    assert candidate(inf, 'é\\n\\0')[-2:] == ['é\\n\\0', inf]\n",
    }
    with Sandbox() as box:
        assert box.check(problem, body(source), 5.0) == ("pass", "")
        numpy_source = "    import numpy\n    return [numpy.float64(0.5), numpy.int64(3), numpy.bool_(True)]\n"
        test = {**problem, "test": "def check(candidate):\n    assert candidate(1, 2) == [0.5, 3, True]\n"}
        assert box.check(test, numpy_source, 20.0) == ("pass", "")
    import ast

    value = [1, (2.5, {"a": {1, 2}}), float("-inf"), "x", None, {(1, 2): b"z"}, 7**9999]
    assert unpack(ast.literal_eval(repr(pack(value)))) == value


def load_humaneval():
    if not HUMANEVAL.exists():
        pytest.skip("HumanEval.jsonl.gz is not at hand")
    with gzip.open(HUMANEVAL, "rt") as file:
        return [json.loads(line) for line in file]


def test_references_pass_and_empty_bodies_fail():
    problems = load_humaneval()
    assert len(problems) == 164
    with Sandbox() as box:
        for problem in problems:
            assert box.check(problem, problem["canonical_solution"], 10.0) == ("pass", ""), problem["task_id"]
            for empty in ("    pass\n", "    raise ValueError\n"):
                assert box.check(problem, empty, 10.0)[0] == "fail", problem["task_id"]


def test_speed_of_trivial_programs():
    """164 x 200 samples within 10 minutes on two cores are 36 ms a sample on one, whatever else the core has to do."""
    problems = load_humaneval()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with Sandbox() as box:
        for i in range(200):
            box.check(problems[i % 164], f"    return {i}\n", 5.0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert 0.001 < seconds / 200 < 0.036
