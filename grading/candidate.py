"""The process that runs a program which a model wrote; sandbox.py starts a fresh one for each program.

It gets the program, then arguments, on standard input, and answers on standard output; it never holds a test or an
expected value. Before the program runs it shuts its doors: resource limits, Landlock and seccomp, none of which needs a
privilege. Standard library only; few imports, because every program waits for them.
"""

import ctypes
import os
import resource
import struct
import sys

MEGABYTE = 1 << 20
LONGEST = MEGABYTE  # bytes of an argument list or a result
MEMORY = 1024 * MEGABYTE  # address space; numpy needs 0.3 GB of it

# values that cross: literals, with the few types that equal a literal in the official check turned into tags


def pack(value, depth=0):
    """A value as plain literals. Only dicts carry tags, so nothing is ambiguous."""
    if depth > 90:  # the parser of literals has its own limit not far above
        raise ValueError("nested too deeply")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        value = int.__new__(int, value)  # a subclass's own __eq__ or __repr__ stays behind
        return value if value.bit_length() < 10_000 else {"int": hex(value)}  # repr refuses more than 4,300 digits
    for kind in (str, bytes):
        if isinstance(value, kind):
            return kind.__new__(kind, value)
    for kind in (float, complex):  # as text: nan and inf are no literals
        if isinstance(value, kind):
            return {kind.__name__: kind.__repr__(value)}
    if isinstance(value, (list, tuple)):
        items = [pack(v, depth + 1) for v in (list.__iter__ if isinstance(value, list) else tuple.__iter__)(value)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {"dict": [(pack(k, depth + 1), pack(v, depth + 1)) for k, v in dict.items(value)]}
    if isinstance(value, (set, frozenset, type({}.keys()))):
        return {"set": [pack(v, depth + 1) for v in value]}
    if type(value).__module__ in ("fractions", "decimal"):
        return {"ratio": pack(value.as_integer_ratio(), depth + 1)}
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return pack(value.item(), depth + 1)
    return {"opaque": type(value).__name__}  # equal to nothing, true in a condition


UNPACK = {
    "int": lambda content: int(content, 16),
    "float": float,
    "complex": complex,
    "dict": lambda content: {unpack(k): unpack(v) for k, v in content},
    "set": lambda content: set(map(unpack, content)),
    "ratio": lambda content: __import__("fractions").Fraction(*unpack(content)),  # slow to import, seldom needed
    "opaque": lambda content: object(),
}


def unpack(value):
    if isinstance(value, (list, tuple)):
        return type(value)(map(unpack, value))
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    return UNPACK[tag](content)


# the doors

libc = ctypes.CDLL(None, use_errno=True)


def call(function, *args):
    """A function of libc with integers and bytes as arguments; OSError where it fails."""
    result = getattr(libc, function)(*[ctypes.c_ulong(a) if isinstance(a, int) else a for a in args])
    if result == -1:
        raise OSError(ctypes.get_errno(), f"{function} {args[0]}: {os.strerror(ctypes.get_errno())}")
    return result


def set_limits(seconds):
    limits = {"AS": MEMORY, "CPU": int(seconds) + 1, "FSIZE": 0, "NOFILE": 32, "CORE": 0, "STACK": 8 * MEGABYTE}
    limits["NPROC"] = 64  # threads, of ordinary users; for root the address space bounds them
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def enter_landlock(packages):
    """The interpreter's own files can be read, no others; /proc, with other processes' environments, is among these."""
    every_right = (1 << 13) - 1  # of the first version: to run, write, read, list, remove and make files
    ruleset = call("syscall", 444, struct.pack("Q", every_right), 8, 0)
    places = {*packages, sys.prefix, sys.base_prefix, os.path.dirname(os.__file__), "/lib", "/lib64", "/usr/lib"}
    places |= {"/usr/lib64", "/usr/share/zoneinfo", "/etc/localtime", "/etc/ld.so.cache"}
    for place in filter(os.path.exists, places | {"/dev/null", "/dev/zero", "/dev/urandom"}):
        handle = os.open(place, os.O_PATH | os.O_CLOEXEC)
        rights = 4 | 8 if os.path.isdir(place) else 4  # to read files, to list directories
        call("syscall", 445, ruleset, 1, struct.pack("=QI", rights, handle), 0)
        os.close(handle)
    call("syscall", 446, ruleset, 0)
    os.close(ruleset)


# The system calls of x86_64 that Python needs for computing; whatever is not here is refused: new processes and
# programs, sockets, signals to others, tracing, mounts, changes to files.
ALLOWED = (
    "read 0 write 1 close 3 stat 4 fstat 5 lstat 6 poll 7 lseek 8 mmap 9 mprotect 10 munmap 11 brk 12 rt_sigaction 13 "
    "rt_sigprocmask 14 rt_sigreturn 15 ioctl 16 pread64 17 readv 19 writev 20 access 21 pipe 22 select 23 "
    "sched_yield 24 mremap 25 mincore 27 madvise 28 dup 32 dup2 33 nanosleep 35 getitimer 36 alarm 37 setitimer 38 "
    "getpid 39 sendto 44 recvfrom 45 shutdown 48 getsockname 51 setsockopt 54 getsockopt 55 exit 60 uname 63 fcntl 72 "
    "getcwd 79 chdir 80 readlink 89 gettimeofday 96 getrlimit 97 getrusage 98 sysinfo 99 times 100 getuid 102 "
    "getgid 104 geteuid 107 getegid 108 getppid 110 sigaltstack 131 arch_prctl 158 gettid 186 time 201 futex 202 "
    "sched_getaffinity 204 epoll_create 213 getdents64 217 set_tid_address 218 clock_gettime 228 clock_getres 229 "
    "clock_nanosleep 230 exit_group 231 epoll_wait 232 epoll_ctl 233 get_mempolicy 239 newfstatat 262 readlinkat 267 "
    "faccessat 269 pselect6 270 ppoll 271 set_robust_list 273 epoll_pwait 281 eventfd2 290 epoll_create1 291 dup3 292 "
    "pipe2 293 getrandom 318 membarrier 324 statx 332 rseq 334 close_range 436 faccessat2 439"
)


def enter_seccomp():
    """A filter for good: what is not allowed fails with EPERM, and clone3 with ENOSYS, so that libc takes clone."""
    load, equal, any_bit, mask, answer = 0x20, 0x15, 0x45, 0x54, 0x06
    allow, refuse, missing, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
    # struct seccomp_data: number at 0, arch at 4, arguments (64 bits each) from 16
    program = [(load, 0, 0, 4), (equal, 1, 0, 0xC000003E), (answer, 0, 0, kill), (load, 0, 0, 0)]
    for number in map(int, ALLOWED.split()[1::2]):
        program += [(equal, 0, 1, number), (answer, 0, 0, allow)]
    program += [(equal, 0, 1, 435), (answer, 0, 0, missing)]
    for number, argument in ((2, 1), (257, 2)):  # open, openat: no O_WRONLY, O_RDWR, O_CREAT, O_TRUNC
        program += [(equal, 0, 4, number), (load, 0, 0, 16 + 8 * argument), (any_bit, 0, 1, 0o1103)]
        program += [(answer, 0, 0, refuse), (answer, 0, 0, allow)]
    program += [(equal, 0, 4, 56), (load, 0, 0, 16), (any_bit, 0, 1, 0x10000)]  # clone: threads (CLONE_THREAD)
    program += [(answer, 0, 0, allow), (answer, 0, 0, refuse)]
    program += [(equal, 0, 5, 53), (load, 0, 0, 24), (mask, 0, 0, 15), (equal, 0, 1, 1)]  # socketpair: asyncio's stream
    program += [(answer, 0, 0, allow), (answer, 0, 0, refuse), (answer, 0, 0, refuse)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    block = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    call("prctl", 22, 2, ctypes.addressof(block), 0, 0)


def main():
    """Shuts the doors, defines the function, then answers calls; every message is one line, a literal."""
    lines, replies, null = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", 0), os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    os.close(null)

    def send(*message):
        data = repr(message).encode() + b"\n"
        replies.write(data if len(data) <= LONGEST else b"('raise', 'the result is longer than 1 MB')\n")

    try:
        call("prctl", 1, 9, 0, 0, 0)  # dies with the driver
        call("prctl", 38, 1, 0, 0, 0)  # no new privileges
        # the driver is to be trusted, and writes literals
        seconds, doors, packages, program, name = unpack(eval(lines.readline()))
        sys.path += packages
        set_limits(seconds)
        # root without the rights of root: no look into other processes, no limit raised again
        call("capset", struct.pack("Ii", 0x20080522, 0), b"\0" * 24)
        if "landlock" in doors:
            enter_landlock(packages)
        enter_seccomp()
    except BaseException as error:
        send("setup", f"{type(error).__name__}: {error}")
        os._exit(1)
    send("ready")
    space = {"__name__": "candidate"}
    try:
        exec(compile(program, "<candidate>", "exec"), space)
        function = space[name]
    except BaseException as error:
        send("raise", type(error).__name__)
        os._exit(0)
    send("defined")
    for line in lines:
        try:
            args, kwargs = unpack(eval(line))
            result = ("return", pack(function(*args, **kwargs)))
        except BaseException as error:
            result = ("raise", type(error).__name__)
        send(*result)
    os._exit(0)
