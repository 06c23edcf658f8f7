// What all probes share: threads that start together and repeat something until the time is over.
#pragma once

#include <atomic>
#include <chrono>
#include <exception>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "error.h"

namespace edgert {

inline void check_probe(const std::string& what, int threads, double seconds) {
  if (threads < 1 || threads > 1024)
    throw EngineError("the " + what + " probe takes 1 to 1024 threads, not " + std::to_string(threads));
  if (!(seconds > 0.0 && seconds <= 60.0))
    throw EngineError("the " + what + " probe takes a time above 0 and up to 60 seconds, not " +
                      std::to_string(seconds));
}

// The sum of the rates at which `threads` threads work. Each calls prepare(its index), which returns its
// step; when all have, each repeats its step, which returns how much it did. Throws what either throws.
template <class Prepare>
double work_rate(int threads, double seconds, const Prepare& prepare) {
  using Clock = std::chrono::steady_clock;
  std::atomic<int> ready{0};
  std::atomic<bool> stop{false};
  std::vector<double> rates(static_cast<size_t>(threads));
  std::mutex guard;
  std::exception_ptr error;
  const auto work = [&](int index) {
    try {
      auto step = prepare(index);
      ready.fetch_add(1);
      while (ready.load(std::memory_order_acquire) < threads && !stop.load()) std::this_thread::yield();
      double done = 0, elapsed = 0;
      const auto start = Clock::now();
      while (elapsed < seconds && !stop.load(std::memory_order_relaxed)) {
        done += step();
        elapsed = std::chrono::duration<double>(Clock::now() - start).count();
      }
      rates[static_cast<size_t>(index)] = done / elapsed;
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard);
      error = std::current_exception();
      stop = true;
    }
  };

  std::vector<std::thread> others;
  bool refused = false;
  try {
    for (int i = 1; i < threads; ++i) others.emplace_back(work, i);
  } catch (const std::system_error&) {
    stop = refused = true;  // lets those that did start end
  }
  if (!refused) work(0);
  for (std::thread& t : others) t.join();
  if (refused)
    throw EngineError("the operating system refused to start " + std::to_string(threads) +
                      " threads; ask for fewer");
  if (error) std::rethrow_exception(error);
  double total = 0;
  for (double rate : rates) total += rate;
  return total;
}

}  // namespace edgert
