// test_wake [SECONDS]: two threads hand a number to and fro. One wakes the other just after stores to
// memory that no cache holds, at every delay around the moment the other falls asleep. Exits 1 when a
// wake-up was lost, that is when nothing has moved for some seconds.
#include "../wake.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

using namespace edgert;

int main(int argc, char** argv) {
  const int seconds = argc > 1 ? std::atoi(argv[1]) : 2;
  alignas(128) static std::atomic<uint32_t> ball{0}, back{0};
  static std::atomic<bool> stop{false}, done{false};
  std::thread catcher([] {
    std::minstd_rand random(1);
    for (uint32_t i = 0; !stop; ++i) {
      if (!spin_while(ball, i, random() % 256)) sleep_while(ball, i);
      back.store(i + 1, std::memory_order_release);
    }
    done = true;
  });
  std::thread thrower([] {
    std::vector<char> cold(size_t(1) << 29, 1);
    std::mt19937_64 random(2);
    for (uint32_t i = 0; !done; ++i) {
      for (uint64_t spins = random() % 1024; spins; --spins) relax();
      for (int store = 0; store < 48; ++store) cold[random() % cold.size()] = char(i);
      wake(ball, i + 1);
      while (back.load(std::memory_order_acquire) != i + 1 && !done) relax();
    }
  });
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  for (uint32_t last = 0; !done;) {
    for (int wait = 0; wait < 50 && !done; ++wait) std::this_thread::sleep_for(std::chrono::milliseconds(100));
    if (std::chrono::steady_clock::now() >= end) stop = true;
    const uint32_t now = back.load();
    if (!done && now == last) {
      std::fprintf(stderr, "a wake-up was lost: %u thrown, %u caught\n", ball.load(), now);
      std::_Exit(1);
    }
    last = now;
  }
  catcher.join();
  thrower.join();
  std::printf("%u wake-ups\n", back.load());
}
