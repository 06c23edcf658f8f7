#include "pool.h"

#include <time.h>

#include <algorithm>
#include <chrono>

#include "wake.h"

namespace edgert {
namespace {

// A spin is about 20 ns (40 on Arm): 2,000 are longer than any phase is uneven when every thread has
// a CPU, and far shorter than a scheduler's time slice.
constexpr uint32_t kBarrierSpins = 2000;
// Between two decode steps the caller samples; workers stay awake for about a millisecond.
constexpr uint32_t kJobSpins = 40000;
constexpr uint32_t kMostThreads = 255;
// A job is disturbed when its threads had no CPU for more than this share of it though they did not
// sleep: under 1 % on a quiet machine, 20 to 40 % with one busy process on two CPUs.
constexpr double kDisturbed = 0.08, kMemory = 2e7;  // the memory in nanoseconds
// How long the pool then goes without a thread, and how long without a disturbance ends the suspicion.
constexpr uint64_t kFirstHold = 50'000'000, kLongestHold = 1'000'000'000, kCalm = 500'000'000;  // ns

uint64_t now() {
  return uint64_t(std::chrono::duration_cast<std::chrono::nanoseconds>(
                      std::chrono::steady_clock::now().time_since_epoch()).count());
}

// CPU time of the calling thread.
uint64_t cpu_now() {
  timespec t{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return uint64_t(t.tv_sec) * 1'000'000'000 + uint64_t(t.tv_nsec);
}

// Returns the nanoseconds slept.
uint64_t wait_while(const std::atomic<uint32_t>& a, uint32_t old, uint32_t spins) {
  if (spin_while(a, old, spins)) return 0;
  const uint64_t begin = now();
  sleep_while(a, old);
  return now() - begin;
}

}  // namespace

Pool::Pool(uint32_t threads)
    : n_(std::clamp(threads, 1u, kMostThreads)), active_(n_), patience_(kFirstHold), shares_(new Share[n_]), workers_(n_) {
  for (uint32_t i = 0; i < n_; ++i) {
    workers_[i].pool_ = this;
    workers_[i].index_ = i;
  }
  try {
    for (uint32_t i = 1; i < n_; ++i) threads_.emplace_back([this, i] { thread_main(i); });
  } catch (...) {  // the OS refused a thread: stop those that run
    stop_ = true;
    start(0);
    for (auto& t : threads_) t.join();
    throw;
  }
}

Pool::~Pool() {
  stop_ = true;
  start(0);
  for (auto& t : threads_) t.join();
}

void Pool::start(uint32_t active) {
  const uint32_t job = (generation_.load(std::memory_order_relaxed) >> 8) + 1;
  wake(generation_, job << 8 | active);
}

void Pool::thread_main(uint32_t index) {
  uint32_t seen = 0;
  for (;;) {
    wait_while(generation_, seen, kJobSpins);
    seen = generation_.load(std::memory_order_acquire);
    if (stop_) return;
    if (index >= (seen & 255)) continue;  // not this job
    work(workers_[index]);
  }
}

void Pool::work(Worker& worker) {
  const uint64_t cpu = cpu_now(), begin = now();
  worker.slept_ = 0;
  (*job_)(worker);
  const uint64_t used = cpu_now() - cpu + worker.slept_, took = now() - begin;
  if (took > used) lost_.fetch_add(took - used, std::memory_order_relaxed);
  worker.barrier();
}

void Pool::run(const std::function<void(Worker&)>& job) {
  job_ = &job;
  lost_.store(0, std::memory_order_relaxed);
  for (uint32_t i = 1; i < active_; ++i) workers_[i].phase_ = workers_[0].phase_;
  const uint64_t begin = now();
  if (active_ > 1) start(active_);
  work(workers_[0]);
  if (n_ > 1) judge(begin, now());
}

void Pool::judge(uint64_t begin, uint64_t end) {
  const double share = double(lost_.load(std::memory_order_relaxed)) / (double(end - begin) * active_);
  // Over the last kMemory or so: one interrupt in a step of a few milliseconds is no reason.
  disturbed_ += (share - disturbed_) * std::min(1.0, double(end - begin) / kMemory);
  if (active_ > 1 && disturbed_ > kDisturbed) {
    --active_;
    disturbed_ = 0;
    calm_since_ = end;
    hold_until_ = end + patience_;
    patience_ = std::min(2 * patience_, kLongestHold);
  } else if (end < hold_until_) {
    return;
  } else if (active_ < n_) {
    ++active_;
  } else if (end - calm_since_ > kCalm) {
    patience_ = kFirstHold;
  }
}

bool Pool::Worker::claim(uint32_t items, uint32_t& begin, uint32_t& end, uint32_t least) {
  const uint32_t n = pool_->active_;
  for (; victim_ < n; ++victim_) {
    const uint32_t owner = (index_ + victim_) % n;
    const uint32_t lo = uint32_t(uint64_t(items) * owner / n), hi = uint32_t(uint64_t(items) * (owner + 1) / n);
    std::atomic<uint64_t>& next = pool_->shares_[owner].next;
    uint64_t cur = next.load(std::memory_order_relaxed);
    for (;;) {
      // A share still marked with an earlier phase has not been touched in this one.
      const uint32_t from = uint32_t(cur >> 32) == phase_ ? uint32_t(cur) : lo;
      if (from >= hi) break;
      // Large pieces first: few claims, and at the end small ones that even out the threads.
      const uint32_t to = std::min(hi, from + std::max(least, (hi - from) * 5 / 8));
      if (next.compare_exchange_weak(cur, uint64_t(phase_) << 32 | to, std::memory_order_relaxed)) {
        begin = from;
        end = to;
        return true;
      }
    }
  }
  return false;
}

void Pool::Worker::barrier(const void* next, size_t bytes) {
  Pool& p = *pool_;
  ++phase_;
  victim_ = 0;
  const uint32_t n = p.active_;  // before arriving: the caller may change it once all have
  if (n == 1) return;
  const uint32_t round = p.released_.load(std::memory_order_relaxed);
  if (p.arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == n) {
    p.arrived_.store(0, std::memory_order_relaxed);
    wake(p.released_, round + 1);
  } else {
    const char* at = static_cast<const char*>(next);
    for (const char* end = at + bytes; at < end && p.released_.load(std::memory_order_acquire) == round; at += 64)
      __builtin_prefetch(at, 0, 2);
    slept_ += wait_while(p.released_, round, kBarrierSpins);
  }
}

}  // namespace edgert
