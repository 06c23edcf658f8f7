// What the programs that test kernels share: random numbers, and comparisons that exit 1 at the first
// difference that is too large.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace {

std::mt19937 rng(7);
const char* level = "";

float uniform(float lo, float hi) { return std::uniform_real_distribution<float>(lo, hi)(rng); }

std::vector<float> random_floats(size_t n, float limit) {
  std::vector<float> v(n);
  for (float& f : v) f = uniform(-limit, limit);
  return v;
}

[[noreturn]] void fail(const std::string& what, size_t at, double expected, double found) {
  std::fprintf(stderr, "%s: %s [%zu]: expected %.9g, found %.9g\n", level, what.c_str(), at, expected, found);
  std::exit(1);
}

void near(const std::string& what, size_t at, double expected, double found, double tolerance) {
  if (!(std::fabs(expected - found) <= tolerance)) fail(what, at, expected, found);
}

template <class T>
void same(const std::string& what, const std::vector<T>& expected, const std::vector<T>& found) {
  for (size_t i = 0; i < expected.size(); ++i)
    if (std::memcmp(&expected[i], &found[i], sizeof(T)) != 0) fail(what, i, double(expected[i]), double(found[i]));
}

}  // namespace
