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

# ---------------------------------------------------------------------------------------------------------------------
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
    if isinstance(value, float):
        return {"float": float.hex(float(value))}
    if isinstance(value, complex):
        return {"complex": (float.hex(value.real), float.hex(value.imag))}
    if isinstance(value, (list, tuple)):
        items = [pack(v, depth + 1) for v in (list.__iter__ if isinstance(value, list) else tuple.__iter__)(value)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {"dict": [(pack(k, depth + 1), pack(v, depth + 1)) for k, v in dict.items(value)]}
    if isinstance(value, (set, frozenset, type({}.keys()))):
        return {"set": [pack(v, depth + 1) for v in value]}
    module = type(value).__module__
    if module in ("fractions", "decimal"):
        return {module: str(value)}
    if module == "numpy" and hasattr(value, "item") and getattr(value, "shape", None) == ():
        return pack(value.item(), depth + 1)
    return {"opaque": type(value).__name__}  # equal to nothing, true in a condition


def unpack(value):
    if isinstance(value, (list, tuple)):
        return type(value)(map(unpack, value))
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag in ("fractions", "decimal"):
        import decimal
        import fractions

        return (fractions.Fraction if tag == "fractions" else decimal.Decimal)(content)
    read = {
        "int": lambda: int(content, 16),
        "float": lambda: float.fromhex(content),
        "complex": lambda: complex(*map(float.fromhex, content)),
        "dict": lambda: {unpack(k): unpack(v) for k, v in content},
        "set": lambda: set(map(unpack, content)),
    }
    return read.get(tag, object)()


# ---------------------------------------------------------------------------------------------------------------------
# the doors

libc = ctypes.CDLL(None, use_errno=True)


def call(function, *args):
    """A function of libc with integers and bytes as arguments; OSError where it fails."""
    result = getattr(libc, function)(*[ctypes.c_ulong(a) if isinstance(a, int) else a for a in args])
    if result == -1:
        raise OSError(ctypes.get_errno(), f"{function} {args[0]}: {os.strerror(ctypes.get_errno())}")
    return result


def set_limits(seconds):
    limits = {
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 32,
        resource.RLIMIT_NPROC: 64,  # threads, of ordinary users; for root the address space bounds them
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_STACK: 8 * MEGABYTE,
        resource.RLIMIT_MEMLOCK: 0,
    }
    for name, value in limits.items():
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


def drop_capabilities():
    """Root without the rights of root: no look into other processes, no limit raised again."""
    header, none = struct.pack("Ii", 0x20080522, 0), b"\0" * 24
    call("capset", header, none)


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


# The system calls that Python needs for computing, by machine; whatever is not here is refused: new processes and
# programs, sockets, signals to others, tracing, mounts, changes to files. Then those whose arguments count: clone may
# make threads only, socketpair streams only (asyncio has one), and files are opened for reading.
ALLOWED = {
    "x86_64": (
        0xC000003E,
        "read 0 write 1 close 3 stat 4 fstat 5 lstat 6 poll 7 lseek 8 mmap 9 mprotect 10 munmap 11 brk 12 "
        "rt_sigaction 13 rt_sigprocmask 14 rt_sigreturn 15 ioctl 16 pread64 17 readv 19 writev 20 access 21 pipe 22 "
        "select 23 sched_yield 24 mremap 25 mincore 27 madvise 28 dup 32 dup2 33 nanosleep 35 getitimer 36 alarm 37 "
        "setitimer 38 getpid 39 sendto 44 recvfrom 45 shutdown 48 getsockname 51 setsockopt 54 getsockopt 55 exit 60 "
        "uname 63 fcntl 72 getcwd 79 chdir 80 readlink 89 gettimeofday 96 getrlimit 97 getrusage 98 sysinfo 99 "
        "times 100 getuid 102 getgid 104 geteuid 107 getegid 108 getppid 110 sigaltstack 131 arch_prctl 158 "
        "gettid 186 time 201 futex 202 sched_getaffinity 204 epoll_create 213 getdents64 217 set_tid_address 218 "
        "clock_gettime 228 clock_getres 229 clock_nanosleep 230 exit_group 231 epoll_wait 232 epoll_ctl 233 "
        "get_mempolicy 239 newfstatat 262 readlinkat 267 faccessat 269 pselect6 270 ppoll 271 set_robust_list 273 "
        "epoll_pwait 281 eventfd2 290 epoll_create1 291 dup3 292 pipe2 293 getrandom 318 membarrier 324 statx 332 "
        "rseq 334 close_range 436 faccessat2 439",
        {"open": (2, 1), "openat": (257, 2)},
        {"clone": 56, "socketpair": 53},
    ),
    "aarch64": (
        0xC00000B7,
        "getcwd 17 eventfd2 19 epoll_create1 20 epoll_ctl 21 epoll_pwait 22 dup 23 dup3 24 fcntl 25 ioctl 29 "
        "faccessat 48 chdir 49 close 57 pipe2 59 getdents64 61 lseek 62 read 63 write 64 readv 65 writev 66 pread64 67 "
        "pselect6 72 ppoll 73 readlinkat 78 newfstatat 79 fstat 80 exit 93 exit_group 94 set_tid_address 96 futex 98 "
        "set_robust_list 99 nanosleep 101 getitimer 102 setitimer 103 clock_gettime 113 clock_getres 114 "
        "clock_nanosleep 115 sched_getaffinity 123 sched_yield 124 sigaltstack 132 rt_sigaction 134 "
        "rt_sigprocmask 135 rt_sigreturn 139 times 153 uname 160 getrlimit 163 getrusage 165 gettimeofday 169 "
        "getpid 172 getppid 173 getuid 174 geteuid 175 getgid 176 getegid 177 gettid 178 sysinfo 179 getsockname 204 "
        "sendto 206 recvfrom 207 setsockopt 208 getsockopt 209 shutdown 210 brk 214 munmap 215 mremap 216 mmap 222 "
        "mprotect 226 mincore 232 madvise 233 get_mempolicy 236 getrandom 278 membarrier 283 statx 291 rseq 293 "
        "close_range 436 faccessat2 439",
        {"openat": (56, 2)},
        {"clone": 220, "socketpair": 199},
    ),
}


def enter_seccomp():
    """A filter for good: what is not allowed fails with EPERM, and clone3 with ENOSYS, so that libc takes clone."""
    arch, allowed, opens, numbers = ALLOWED[os.uname().machine]
    load, equal, any_bit, mask, answer = 0x20, 0x15, 0x45, 0x54, 0x06
    allow, refuse, missing, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
    # struct seccomp_data: number at 0, arch at 4, arguments (64 bits each) from 16
    program = [(load, 0, 0, 4), (equal, 1, 0, arch), (answer, 0, 0, kill), (load, 0, 0, 0)]
    for number in map(int, allowed.split()[1::2]):
        program += [(equal, 0, 1, number), (answer, 0, 0, allow)]
    program += [(equal, 0, 1, 435), (answer, 0, 0, missing)]
    for number, argument in opens.values():  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC
        program += [(equal, 0, 4, number), (load, 0, 0, 16 + 8 * argument), (any_bit, 0, 1, 0o1103)]
        program += [(answer, 0, 0, refuse), (answer, 0, 0, allow)]
    program += [(equal, 0, 4, numbers["clone"]), (load, 0, 0, 16), (any_bit, 0, 1, 0x10000)]  # CLONE_THREAD
    program += [(answer, 0, 0, allow), (answer, 0, 0, refuse)]
    program += [(equal, 0, 5, numbers["socketpair"]), (load, 0, 0, 24), (mask, 0, 0, 15), (equal, 0, 1, 1)]
    program += [(answer, 0, 0, allow), (answer, 0, 0, refuse), (answer, 0, 0, refuse)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    block = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    call("prctl", 22, 2, ctypes.addressof(block), 0, 0)


# ---------------------------------------------------------------------------------------------------------------------


def main():
    """Shuts the doors, defines the function, then answers calls; every message is one line, a literal."""
    lines = os.fdopen(os.dup(0), "rb")
    replies = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    os.close(null)

    def send(*message, write=os.write):
        data = repr(message).encode() + b"\n"
        if len(data) > LONGEST:
            data = b"('raise', 'the result is longer than 1 MB')\n"
        while data:
            data = data[write(replies, data) :]

    try:
        call("prctl", 1, 9, 0, 0, 0)  # dies with the driver
        call("prctl", 38, 1, 0, 0, 0)  # no new privileges
        # the driver is to be trusted, and writes literals
        seconds, doors, packages, program, name = eval(lines.readline())
        sys.path += packages
        set_limits(seconds)
        drop_capabilities()
        if "landlock" in doors:
            enter_landlock(packages)
        if "seccomp" in doors:
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
