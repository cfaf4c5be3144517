// Threads that run the operations of a program together, one after another.
//
// An operation is a number of tasks; each thread claims the next one until none is left, so that a thread that the
// system holds up delays one task and not its share. After an operation all threads meet. Who waits spins for a short
// time and then sleeps: on a core that other processes want, spinning would take it from the very thread waited for.
//
// Still, all wait for a thread that has to share its core, for a time slice at each turn. So while that
// takes more time than the thread saves, programs run without one: two threads of which one has half a core are slower
// than one that has a whole core. Which threads compute changes no bit of any result.
#pragma once

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

using Clock = std::chrono::steady_clock;
using namespace std::chrono_literals;

// Returns once `value` is no longer `old`.
inline void await_change(const std::atomic<uint32_t>& value, uint32_t old, Clock::duration spin) {
  for (int i = 0; i < 64; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    relax();
  }
  for (auto now = Clock::now(), end = now + spin; now < end; now = Clock::now()) {
    for (int i = 0; i < 32; ++i) {
      if (value.load(std::memory_order_acquire) != old) return;
      relax();
    }
    std::this_thread::yield();
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

// Stores what others await, and wakes those that sleep. In sequential order: `notify_all` wakes nobody unless it sees a
// waiter, and a processor may look for one before a store that is only released has left it. A thread that goes to sleep
// between the two never wakes up, and all wait for it (python -m tools.wakeups).
inline void announce(std::atomic<uint32_t>& value, uint32_t next) {
  value.store(next, std::memory_order_seq_cst);
  value.notify_all();
}

class Pool {
 public:
  // A wake-up takes about half of `spin` on a virtual machine. `between` two steps, a core that fell asleep takes up to
  // 3 ms to come back where a hypervisor gave it away.
  explicit Pool(int threads, Clock::duration spin = 100us, Clock::duration between = 3ms)
      : threads_(threads), active_(threads), spin_(spin), between_(between) {
    for (int thread = 1; thread < threads; ++thread) workers_.emplace_back([this, thread] { work(thread); });
  }

  ~Pool() {
    stopping_ = true;
    start();
    for (std::thread& worker : workers_) worker.join();
  }

  int threads() const { return active_; }

  // Runs `body(thread, context)` on the active threads, this one included; returns when all have returned.
  void run(void (*body)(int thread, void* context), void* context) {
    choose_threads();
    body_ = body;
    context_ = context;
    first_ = true;
    start();
    body(0, context);
  }

  // The next task of the current operation, from 0 on.
  int claim() { return next_.fetch_add(1, std::memory_order_relaxed); }

  // A claimed task has been done. Only operations whose later tasks await earlier ones count.
  void finish() {
    finished_.fetch_add(1, std::memory_order_seq_cst);  // as `announce` does
    if (active_ > 1) finished_.notify_all();
  }

  // Returns once so many tasks of the operation have finished; they must have been claimed before.
  void await_finished(uint32_t tasks) {
    for (uint32_t done; (done = finished_.load(std::memory_order_acquire)) < tasks;)
      await_change(finished_, done, spin_);
  }

  // Every thread calls it after its last task of an operation; returns when all have, and the tasks begin at 0 again.
  void meet() {
    const int active = active_;  // once this thread has arrived, the run may end, and the next one may have fewer
    const uint32_t meeting = met_.load(std::memory_order_acquire);
    if (active > 1) {
      if (!arrived_.load(std::memory_order_relaxed)) waiting_since_.store(Clock::now().time_since_epoch());
      if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < active) {
        await_change(met_, meeting, spin_);
        return;
      }
      note_wait();
    }
    arrived_.store(0, std::memory_order_relaxed);
    next_.store(0, std::memory_order_relaxed);
    finished_.store(0, std::memory_order_relaxed);
    announce(met_, meeting + 1);
  }

 private:
  static constexpr Clock::duration LONG = 1ms;      // no task of a decode step takes so long
  static constexpr Clock::duration WINDOW = 300ms;  // of computing, after which the long waits in it are judged
  static constexpr Clock::duration CALM = 300ms, MOST_CALM = 2s;

  // The last thread came. If the first one waited for most of the operation, the last one had been held up.
  void note_wait() {
    const Clock::time_point now = Clock::now();
    const auto waited = now.time_since_epoch() - waiting_since_.load(std::memory_order_relaxed);
    if (!first_) {  // to wake up for the first one takes its time
      if (waited > LONG && 2 * waited > now - begun_) waited_ += waited;
      computed_ += now - begun_;
    }
    begun_ = now;
    first_ = false;
  }

  // One thread fewer if the others have clearly waited for longer than its work takes them; after a calm time, at first
  // a short one, one more.
  void choose_threads() {
    const Clock::time_point now = Clock::now();
    if (computed_ > WINDOW) {
      if (5 * active_ * waited_ > 6 * computed_) {
        calm_ = now - changed_ < 2 * calm_ ? (2 * calm_ < MOST_CALM ? 2 * calm_ : MOST_CALM) : CALM;
        --active_;
        changed_ = now;
      }
      waited_ = computed_ = Clock::duration::zero();
    }
    if (active_ < threads_ && now - changed_ > calm_) {
      ++active_;
      changed_ = now;
      waited_ = computed_ = Clock::duration::zero();
    }
  }

  // The number of the run and how many threads it has are one value, or a thread that comes late might mix up two runs.
  void start() {
    const uint32_t run = (started_.load(std::memory_order_relaxed) >> 16) + 1;
    announce(started_, run << 16 | (uint32_t)active_);
  }

  void work(int thread) {
    for (uint32_t seen = 0;;) {
      await_change(started_, seen, between_);
      seen = started_.load(std::memory_order_acquire);
      if (stopping_) return;
      if (thread < (int)(seen & 0xffff)) body_(thread, context_);
    }
  }

  const int threads_;
  int active_;  // changes between runs
  const Clock::duration spin_, between_;
  std::vector<std::thread> workers_;
  std::atomic<bool> stopping_{false};
  void (*body_)(int, void*) = nullptr;
  void* context_ = nullptr;
  // Of the waits: written by the last thread of a meeting, and read between runs.
  Clock::time_point begun_, changed_;
  Clock::duration calm_ = CALM, waited_{}, computed_{};
  bool first_ = true;
  alignas(64) std::atomic<uint32_t> started_{0};
  alignas(64) std::atomic<uint32_t> met_{0};
  alignas(64) std::atomic<int> arrived_{0};
  std::atomic<Clock::duration> waiting_since_{};
  alignas(64) std::atomic<int> next_{0};
  alignas(64) std::atomic<uint32_t> finished_{0};
};
