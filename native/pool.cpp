#include "pool.h"

#include <algorithm>

namespace edgert {
namespace {

// A spin is about 20 ns (40 on Arm): 2,000 are longer than any phase is uneven when every thread has
// a CPU, and far shorter than a scheduler's time slice.
constexpr uint32_t kBarrierSpins = 2000;
// Between two decode steps the caller samples; workers stay awake for about a millisecond.
constexpr uint32_t kJobSpins = 40000;

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#endif
}

}  // namespace

Pool::Pool(uint32_t threads) : n_(std::max(1u, threads)), shares_(new Share[n_]), workers_(n_) {
  for (uint32_t i = 0; i < n_; ++i) {
    workers_[i].pool_ = this;
    workers_[i].index_ = i;
  }
  try {
    for (uint32_t i = 1; i < n_; ++i) threads_.emplace_back([this, i] { thread_main(i); });
  } catch (...) {  // the OS refused a thread: stop those that run
    stop_ = true;
    generation_.fetch_add(1);
    generation_.notify_all();
    for (auto& t : threads_) t.join();
    throw;
  }
}

Pool::~Pool() {
  stop_ = true;
  generation_.fetch_add(1);
  generation_.notify_all();
  for (auto& t : threads_) t.join();
}

void Pool::wait_while(std::atomic<uint32_t>& a, uint32_t old, uint32_t spins) {
  for (uint32_t i = 0; i < spins; ++i) {
    if (a.load(std::memory_order_acquire) != old) return;
    pause();
  }
  while (a.load(std::memory_order_acquire) == old) a.wait(old, std::memory_order_acquire);
}

void Pool::thread_main(uint32_t index) {
  uint32_t seen = 0;
  for (;;) {
    wait_while(generation_, seen, kJobSpins);
    ++seen;
    if (stop_) return;
    (*job_)(workers_[index]);
    workers_[index].barrier();
  }
}

void Pool::run(const std::function<void(Worker&)>& job) {
  job_ = &job;
  if (n_ > 1) {
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
  }
  job(workers_[0]);
  workers_[0].barrier();
}

bool Pool::Worker::claim(uint32_t items, uint32_t& begin, uint32_t& end) {
  const uint32_t n = pool_->n_;
  for (; victim_ < n; ++victim_) {
    const uint32_t owner = (index_ + victim_) % n;
    const uint32_t lo = uint32_t(uint64_t(items) * owner / n), hi = uint32_t(uint64_t(items) * (owner + 1) / n);
    const uint32_t piece = std::max(1u, (hi - lo) / 8);
    std::atomic<uint64_t>& next = pool_->shares_[owner].next;
    uint64_t cur = next.load(std::memory_order_relaxed);
    for (;;) {
      // A share still marked with an earlier phase has not been touched in this one.
      const uint32_t from = uint32_t(cur >> 32) == phase_ ? uint32_t(cur) : lo;
      if (from >= hi) break;
      const uint32_t to = std::min(hi, from + piece);
      if (next.compare_exchange_weak(cur, uint64_t(phase_) << 32 | to, std::memory_order_relaxed)) {
        begin = from;
        end = to;
        return true;
      }
    }
  }
  return false;
}

void Pool::Worker::barrier() {
  Pool& p = *pool_;
  ++phase_;
  victim_ = 0;
  if (p.n_ == 1) return;
  const uint32_t round = p.released_.load(std::memory_order_relaxed);
  if (p.arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == p.n_) {
    p.arrived_.store(0, std::memory_order_relaxed);
    p.released_.store(round + 1, std::memory_order_release);
    p.released_.notify_all();
  } else {
    wait_while(p.released_, round, kBarrierSpins);
  }
}

}  // namespace edgert
