"""Has two threads of the compiled kernels sleep and wake each other; ends with status 1 if one never wakes up.

usage: python -m tools.wakeups [SECONDS]      needs g++

A pool is run whose threads sleep as soon as they wait, after stores that miss the cache: they delay the moment at which
the other thread sees what the pool stores. When those stores were only released, a thread never woke up in 2 of 8 runs
of about a minute, each of up to 10 million wake-ups, and an engine hung after minutes of mixed traffic.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from kernels.cpu.compiled import build

SECONDS = 60.0
SILENT_SECONDS = 5  # without a thousand runs: they take less than a second
PROGRAM = """
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <csignal>
#include <unistd.h>
#include "pool.h"

struct Work {
  Pool& pool;
  unsigned length;
  bool sleeps;  // one task takes some tenths of a second: on a busy machine too, the other thread is asleep by then
};

static void body(int, void* context) {
  Work& work = *static_cast<Work*>(context);
  for (int operation = 0; operation < 2; ++operation) {
    volatile unsigned sum = 0;
    for (unsigned task; (task = work.pool.claim()) < 2;)
      for (unsigned i = work.sleeps ? task * 100000000 : work.length * (task + 1) % 900; i; --i) sum = sum + i;
    work.pool.meet();
  }
}

static void hangs(int) {
  const char words[] = "a thread never woke up\\n";
  if (write(1, words, sizeof words - 1)) _exit(1);
}

int main(int, char** arguments) {
  signal(SIGALRM, hangs);
  Pool pool(2, 0us, 0us);
  Work work{pool, 1, true};
  constexpr uint64_t LINES = 1 << 24;
  char* lines = static_cast<char*>(calloc(LINES, 64));
  uint64_t number = 1;
  const auto end = Clock::now() + std::chrono::duration<double>(atof(arguments[1]));
  unsigned long runs = 0;
  for (; Clock::now() < end; ++runs) {
    if (runs % 1000 == 0) alarm(SILENT_SECONDS);
    for (int i = 0; i < 48; ++i) {
      number = number * 6364136223846793005u + 1442695040888963407u;
      lines[(number >> 40) * 64] = 1;
    }
    work.length = work.length * 1103515245u + 12345u;
    work.sleeps = runs % 100000 == 0;
    pool.run(body, &work);
  }
  alarm(0);
  printf("%lu runs, and every thread woke up\\n", runs);
}
"""


def main(seconds: float, headers: Path = build.HERE) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        source, program = Path(scratch, "wakeups.cpp"), Path(scratch, "wakeups")
        source.write_text(PROGRAM)
        flags = ["-std=c++20", "-O3", "-pthread", f"-DSILENT_SECONDS={SILENT_SECONDS}", f"-I{headers}"]
        subprocess.run(["g++", *flags, str(source), "-o", str(program)], check=True)
        ended = subprocess.run([program, str(seconds)], timeout=seconds + 10 * SILENT_SECONDS, capture_output=True)
    print(ended.stdout.decode().strip(), flush=True)
    return ended.returncode


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else SECONDS))
