// Waiting for another thread to change a number: spin a while, then sleep.
#pragma once
#include <atomic>
#include <cstdint>

namespace edgert {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#endif
}

// True when `a` left `old` within `spins` looks.
inline bool spin_while(const std::atomic<uint32_t>& a, uint32_t old, uint32_t spins) {
  for (uint32_t i = 0; i < spins; ++i) {
    if (a.load(std::memory_order_acquire) != old) return true;
    relax();
  }
  return false;
}

inline void sleep_while(const std::atomic<uint32_t>& a, uint32_t old) {
  while (a.load(std::memory_order_acquire) == old) a.wait(old, std::memory_order_acquire);
}

// The store is seq_cst, not release: notify_all() looks whether anybody sleeps, and that load must not
// pass a store that still queues behind stores to slow memory, or the sleeper sleeps for good.
// native/tests/test_wake.cpp brings that about within a minute when the store is a release.
inline void wake(std::atomic<uint32_t>& a, uint32_t value) {
  a.store(value, std::memory_order_seq_cst);
  a.notify_all();
}

}  // namespace edgert
