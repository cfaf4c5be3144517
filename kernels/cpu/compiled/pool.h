// Threads that run the operations of a program together, one after another.
//
// An operation is a number of tasks; each thread claims the next one until none is left, so that a thread that the
// system holds up delays one task and not its share. After an operation all threads meet. Who waits spins for a short
// time and then sleeps: on a core that other processes want, spinning would take it from the very thread waited for.
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

// Returns once `value` is no longer `old`.
inline void await_change(const std::atomic<uint32_t>& value, uint32_t old, std::chrono::microseconds spin) {
  for (int i = 0; i < 64; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    relax();
  }
  const auto end = std::chrono::steady_clock::now() + spin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (value.load(std::memory_order_acquire) != old) return;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

class Pool {
 public:
  explicit Pool(int threads) : threads_(threads) {
    for (int thread = 1; thread < threads; ++thread) workers_.emplace_back([this, thread] { work(thread); });
  }

  ~Pool() {
    stopping_ = true;
    started_.fetch_add(1, std::memory_order_release);
    started_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  int threads() const { return threads_; }

  // Runs `body(thread, context)` on all threads, this one included; returns when all have returned.
  void run(void (*body)(int thread, void* context), void* context) {
    body_ = body;
    context_ = context;
    started_.fetch_add(1, std::memory_order_release);
    if (threads_ > 1) started_.notify_all();
    body(0, context);
  }

  // The next task of the current operation, from 0 on.
  int claim() { return next_.fetch_add(1, std::memory_order_relaxed); }

  // A claimed task has been done. Only operations whose later tasks await earlier ones count.
  void finish() {
    finished_.fetch_add(1, std::memory_order_release);
    if (threads_ > 1) finished_.notify_all();
  }

  // Returns once so many tasks of the operation have finished; they must have been claimed before.
  void await_finished(uint32_t tasks) {
    for (uint32_t done; (done = finished_.load(std::memory_order_acquire)) < tasks;)
      await_change(finished_, done, std::chrono::microseconds(SPIN));
  }

  // Every thread calls it after its last task of an operation; returns when all have, and the tasks begin at 0 again.
  void meet() {
    const uint32_t meeting = met_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < threads_) {
      await_change(met_, meeting, std::chrono::microseconds(SPIN));
      return;
    }
    arrived_.store(0, std::memory_order_relaxed);
    next_.store(0, std::memory_order_relaxed);
    finished_.store(0, std::memory_order_relaxed);
    met_.store(meeting + 1, std::memory_order_release);
    if (threads_ > 1) met_.notify_all();
  }

 private:
  static constexpr int SPIN = 100;  // microseconds; a wake-up takes about half of that on a virtual machine

  void work(int thread) {
    uint32_t seen = 0;
    for (;;) {
      await_change(started_, seen, std::chrono::microseconds(SPIN));
      ++seen;
      if (stopping_) return;
      body_(thread, context_);
    }
  }

  const int threads_;
  std::vector<std::thread> workers_;
  std::atomic<bool> stopping_{false};
  void (*body_)(int, void*) = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<uint32_t> started_{0};
  alignas(64) std::atomic<uint32_t> met_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> next_{0};
  alignas(64) std::atomic<uint32_t> finished_{0};
};
