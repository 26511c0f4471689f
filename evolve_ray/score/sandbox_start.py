"""The child process of `sandbox.py`: gives up its rights, then runs the program in its folder.

It imports nothing of this package, because it is started as a file by its path. Its arguments are the limits as JSON, the
program, and a file descriptor. That gets the token from standard input after the program has ended without an error, so that a
program which ends early does not pass.
"""

import ctypes
import json
import os
import resource
import runpy
import struct
import sys
import traceback

Numbers = tuple[int | None, int | None]
# System calls that fail, by number: (x86-64, arm64); None where the architecture does not have it.
FORBIDDEN: dict[str, Numbers] = {
    # processes
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    # network and devices
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "io_uring_setup": (425, 425), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    # other processes
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    # files
    "creat": (85, None), "truncate": (76, 45), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276),
    "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None), "unlink": (87, None), "unlinkat": (263, 35),
    "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36), "mknod": (133, None),
    "mknodat": (259, 33), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None),
    "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    # memory that no limit counts
    "memfd_create": (319, 279), "shmget": (29, 194), "mq_open": (240, 180), "memfd_secret": (447, 447),
    # the machine
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "reboot": (169, 142), "kexec_load": (246, 104), "init_module": (175, 105), "finit_module": (313, 273),
    "swapon": (167, 224), "open_by_handle_at": (304, 265), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "setrlimit": (160, 164), "add_key": (248, 217), "keyctl": (250, 219), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "sethostname": (170, 161),
}  # fmt: skip
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the numbers above, and the audit architecture
OPEN: Numbers = (2, None)
OPENAT, CLONE, PRLIMIT = (257, 56), (56, 220), (302, 261)
NOT_THERE: dict[str, Numbers] = {"clone3": (435, 435), "openat2": (437, 437)}  # libraries fall back to `clone` and `openat`
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CLONE_THREAD = 0x10000
LOAD, EQUAL, ANY_BIT, RETURN, SIZE = 0x20, 0x15, 0x45, 0x06, 8  # instructions of classic BPF
ALLOW, ERROR, KILL = 0x7FFF0000, 0x00050000, 0x80000000
EPERM, ENOSYS = 1, 38
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 1, 38, 22


def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def seccomp_filter(machine: str) -> bytes:
    """The filter: the calls above fail with EPERM, files open for reading only, `clone` makes threads only, limits stay."""
    column, architecture = MACHINES[machine]
    parts = [
        instruction(LOAD, 4), instruction(EQUAL, architecture, 1, 0), instruction(RETURN, KILL),
        instruction(LOAD, 0), instruction(0x35, 0x40000000, 0, 1), instruction(RETURN, KILL),  # the x32 calls
    ]  # fmt: skip
    for numbers in FORBIDDEN.values():
        parts += refuse(numbers[column], EPERM)
    for numbers in NOT_THERE.values():
        parts += refuse(numbers[column], ENOSYS)
    checks = ((OPEN, 1, WRITING, True), (OPENAT, 2, WRITING, True), (CLONE, 0, CLONE_THREAD, False))
    for numbers, argument, bits, forbidden in checks:
        test = instruction(ANY_BIT, bits, 0, 1) if forbidden else instruction(ANY_BIT, bits, 1, 0)
        parts += only_if(numbers[column], [instruction(LOAD, 16 + 8 * argument), test])
    # prlimit may read the limits, but not set them: the pointer to new ones, in two halves, must be null.
    null = [instruction(LOAD, 32), instruction(EQUAL, 0, 0, 2), instruction(LOAD, 36), instruction(EQUAL, 0, 1, 0)]
    parts += only_if(PRLIMIT[column], null)
    return b"".join([*parts, instruction(RETURN, ALLOW)])


def only_if(number: int | None, test: list[bytes]) -> list[bytes]:
    """Refuses a call if `test` ends at the instruction after it, and allows it if it skips that one."""
    if number is None:
        return []
    tail = [*test, instruction(RETURN, ERROR | EPERM), instruction(RETURN, ALLOW)]
    return [instruction(EQUAL, number, 0, len(tail)), *tail]


def refuse(number: int | None, error: int) -> list[bytes]:
    return [] if number is None else [instruction(EQUAL, number, 0, 1), instruction(RETURN, ERROR | error)]


def give_up_rights(limits: dict) -> None:
    """Sets the limits of this process and the filter. Raises OSError if the kernel refuses one of them."""
    seconds, memory = int(limits["seconds"]) + 1, limits["memory_mib"] << 20
    for kind, value in (
        (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, limits["output_mib"] << 20),
        (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_STACK, min(memory, 64 << 20)),
    ):  # fmt: skip
        resource.setrlimit(kind, (value, value))
    libc = ctypes.CDLL(None, use_errno=True)
    code = seccomp_filter(os.uname().machine)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxQ", len(code) // SIZE, ctypes.addressof(buffer))
    for arguments in ((PR_SET_PDEATHSIG, 9, 0, 0, 0), (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, 2, program, 0, 0)):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "the kernel refuses the sandbox")


def main() -> None:
    limits, program, answer = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    try:
        give_up_rights(limits)
    except (OSError, ValueError, KeyError) as error:
        print(f"no sandbox: {error!r}", flush=True)
        os._exit(99)
    token = sys.stdin.readline()
    try:
        runpy.run_path(program, run_name="__main__")
        sys.stdout.flush()
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename == program]
        if own:
            print("Traceback (most recent call last):\n" + "".join(traceback.format_list(own)), end="")
        print("".join(traceback.format_exception_only(error)), end="", flush=True)
        os._exit(1)
    os.write(answer, token.encode())
    os._exit(0)


if __name__ == "__main__":
    main()
