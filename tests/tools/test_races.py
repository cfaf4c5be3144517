"""What of ThreadSanitizer's reports counts as a race in the compiled kernels."""

from tools.races import found

KERNEL = "    #0 Pool::meet() /src/kernels/cpu/compiled/pool.h:89 (races.so+0x13385)"
TORCH = (
    "    #0 memcpy ../sanitizer_common_interceptors.inc:827 (libtsan.so+0x5dda6)\n    #1 <null> (libtorch_cpu.so+0x197)"
)
LINE = "=================="


def report(first: str, second: str, what: str = "data race") -> str:
    stacks = f"  Write of size 4 by main thread:\n{first}\n\n  Previous read of size 4 by thread T2:\n{second}\n\n"
    created = f"  Thread T2 created by main thread at:\n{KERNEL}\n"
    return f"{LINE}\nWARNING: ThreadSanitizer: {what} (pid=1)\n{stacks}{created}{LINE}\n"


def test_a_race_is_one_between_two_threads_in_the_kernels() -> None:
    others = report(KERNEL, TORCH) + report(TORCH, KERNEL) + report(KERNEL, KERNEL, "unlock of an unlocked mutex")
    assert found(others) == []
    [race] = found(others + report(KERNEL, KERNEL))
    assert race.startswith("WARNING: ThreadSanitizer: data race")
    assert "pool.h:89" in race
