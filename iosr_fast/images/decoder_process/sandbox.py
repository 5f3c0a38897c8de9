"""What a decoder process may still ask of Linux: memory, threads, the time, and bytes through its open socket.

Two parts of the kernel refuse all else until the process ends, of root, too. Landlock (5.13) refuses every file and
program and, in later kernels, TCP and signals to others. seccomp refuses every system call but those listed here.
https://docs.kernel.org/userspace-api/landlock.html, https://docs.kernel.org/userspace-api/seccomp_filter.html
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column below, value in linux/audit.h
# Numbers of asm/unistd.h. AVIF and HEIC are decoded in threads, which need the last four, and `clone` below.
_ALLOWED = {
    "write": (1, 64),  # to its standard error
    "sendto": (44, 206),
    "recvfrom": (45, 207),
    "pread64": (17, 67),  # of its own statm
    "brk": (12, 214),
    "mmap": (9, 222),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "mprotect": (10, 226),
    "madvise": (28, 233),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115),
    "getrandom": (318, 278),
    "exit_group": (231, 94),
    "exit": (60, 93),
    "futex": (202, 98),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "set_robust_list": (273, 99),
    "rseq": (334, 293),
}
_CLONE, _CLONE3, _PRLIMIT = (56, 220), (435, 435), (302, 261)
_CLONE_THREAD = 0x10000
_LOAD, _IF_EQUAL, _IF_SET, _RETURN = 0x20, 0x15, 0x45, 0x06  # of linux/bpf_common.h; a jump skips instructions
_NUMBER, _MACHINE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
_ALLOW, _FAIL = 0x7FFF0000, 0x00050000  # _FAIL with an errno
_SET_SECCOMP, _FILTER = 22, 2  # of linux/prctl.h
_CREATE_RULESET, _RESTRICT_SELF = 444, 446  # system calls of Landlock, on every machine
# Bits of Landlock's rights to files, TCP ports, and what is outside of the process, from this version on.
_RIGHTS = ((1, (13, 0, 0)), (2, (14, 0, 0)), (3, (15, 0, 0)), (4, (15, 2, 0)), (5, (16, 2, 0)), (6, (16, 2, 2)))


def enter() -> str:
    """Give up all other rights, for good: nothing can be imported after it, and nothing gives privileges (confinement).

    Returns what the kernel lacks, "Landlock", "seccomp" or both; "" for nothing.
    """
    parts = {"Landlock": _landlock, "seccomp": _seccomp}
    return " and ".join(name for name, confine in parts.items() if sys.platform != "linux" or not confine())


def _landlock() -> bool:
    """A set of all rights without a rule that grants one; False where the kernel has none."""
    call = ctypes.CDLL(None).syscall
    version = call(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    counts = [counts for first, counts in _RIGHTS if first <= version][-1]
    rights = struct.pack("3Q", *((1 << count) - 1 for count in counts))
    rules = call(_CREATE_RULESET, rights, ctypes.c_size_t(len(rights)), 0)
    restricted = rules >= 0 and call(_RESTRICT_SELF, rules, 0) == 0
    if rules >= 0:
        os.close(rules)
    return restricted


def _seccomp() -> bool:
    """A program that allows what is listed; False where the kernel runs none, or on another processor."""
    if platform.machine() not in _MACHINES:
        return False
    column, machine = _MACHINES[platform.machine()]
    allow, refuse = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _FAIL | errno.EPERM)
    program = [(_LOAD, 0, 0, _MACHINE), (_IF_EQUAL, 1, 0, machine), refuse, (_LOAD, 0, 0, _NUMBER)]
    for numbers in _ALLOWED.values():
        program += [(_IF_EQUAL, 0, 1, numbers[column]), allow]
    # The flags of clone3 can't be seen from here; without it the C library takes clone.
    program += [(_IF_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _FAIL | errno.ENOSYS)]
    for numbers, condition in (
        (_CLONE, (_IF_SET, 0, 1, _CLONE_THREAD)),  # no process
        (_PRLIMIT, (_IF_EQUAL, 0, 1, 0)),  # not of another process
    ):
        program += [(_IF_EQUAL, 0, 4, numbers[column]), (_LOAD, 0, 0, _FIRST_ARGUMENT), condition, allow, refuse]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in [*program, refuse]))
    pointer = struct.pack("HP", len(program) + 1, ctypes.addressof(code))
    return bool(ctypes.CDLL(None).prctl(_SET_SECCOMP, _FILTER, pointer, 0, 0) == 0)
