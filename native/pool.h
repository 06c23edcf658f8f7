// A persistent pool of threads that run one job together, phase by phase.
//
// Inside a job every thread runs the same function. It takes items of a phase with claim() and
// meets the others at barrier(). A thread first works through its own share, then takes from the
// shares of others, so that a thread the OS has put aside delays a phase by one piece at most.
// Waiting spins for a few microseconds and then sleeps: a waiting thread must not keep the CPU from
// the one it waits for when there are more threads than CPUs.
//
// When another process takes a CPU, every barrier waits for the thread that shares it, and two
// threads are slower than one. A job whose threads wanted to run and had no CPU for much of its time
// therefore makes the next ones run on a thread fewer; after a while the full number is tried again.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace edgert {

class Pool {
 public:
  explicit Pool(uint32_t threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  uint32_t threads() const { return n_; }

  class Worker;
  // Runs `job` on every thread (the caller is thread 0) and returns when all have finished. One job
  // at a time: callers serialise.
  void run(const std::function<void(Worker&)>& job);

  class Worker {
   public:
    uint32_t index() const { return index_; }
    uint32_t threads() const { return pool_->active_; }  // that run this job

    // The next piece [begin, end) of this phase's `items`, at least `least` of them where a share has
    // so many left; false when there is none left.
    bool claim(uint32_t items, uint32_t& begin, uint32_t& end, uint32_t least = 1);
    // Ends the phase: returns when every thread has called it. A thread that waits asks memory
    // meanwhile for [next, next + bytes), which it will read in the following phase.
    void barrier(const void* next = nullptr, size_t bytes = 0);

   private:
    friend class Pool;
    Pool* pool_ = nullptr;
    uint32_t index_ = 0;
    uint32_t phase_ = 1;  // 0 marks a share never touched
    uint32_t victim_ = 0;  // shares looked through in this phase, the own one first
    uint64_t slept_ = 0;   // nanoseconds of this job
  };

 private:
  struct alignas(128) Share {
    std::atomic<uint64_t> next{0};  // phase << 32 | next item
  };

  void thread_main(uint32_t index);
  void work(Worker& worker);
  void start(uint32_t active);
  void judge(uint64_t begin, uint64_t end);

  uint32_t n_;
  uint32_t active_;        // threads of the present job
  double disturbed_ = 0;     // share of the time, smoothed
  uint64_t hold_until_ = 0;  // when a thread more is tried
  uint64_t patience_;        // the next hold, nanoseconds
  uint64_t calm_since_ = 0;  // the last disturbance
  std::unique_ptr<Share[]> shares_;
  std::vector<Worker> workers_;
  std::vector<std::thread> threads_;
  const std::function<void(Worker&)>* job_ = nullptr;
  alignas(128) std::atomic<uint32_t> generation_{0};  // number of the job << 8 | threads that run it
  alignas(128) std::atomic<uint32_t> arrived_{0};
  alignas(128) std::atomic<uint32_t> released_{0};    // one more for each barrier
  alignas(128) std::atomic<uint64_t> lost_{0};        // nanoseconds that threads of this job had no CPU
  std::atomic<bool> stop_{false};
};

}  // namespace edgert
