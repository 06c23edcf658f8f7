// Attention to records, their index and the choice from it, on every ISA level this CPU offers, against plain
// double arithmetic. Prints one line a level; exits 1 at the first difference that is too large.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "check.h"
#include "half.h"
#include "kernels.h"
#include "kv.h"
#include "sparse.h"

using namespace edgert;

namespace {

struct Records {
  std::vector<uint8_t> bytes;
  size_t stride;
  uint8_t* at(uint32_t i) { return bytes.data() + i * stride; }

  Records(const Kernels& k, KvType type, uint32_t dim, const std::vector<float>& keys, const std::vector<float>& values)
      : bytes(keys.size() / dim * kv_record_bytes(type, dim)), stride(kv_record_bytes(type, dim)) {
    for (uint32_t i = 0; i < keys.size() / dim; ++i)
      k.records[size_t(type)].append(&keys[size_t(i) * dim], &values[size_t(i) * dim], dim, at(i));
  }
};

double half(const uint8_t* p, size_t i) {
  uint16_t h;
  std::memcpy(&h, p + 2 * i, 2);
  return half_to_float(h);
}

// Key and value of a token as its record says.
void decode(KvType type, uint32_t dim, const uint8_t* record, std::vector<double>& key, std::vector<double>& value) {
  for (uint32_t c = 0; c < dim; ++c) {
    if (type == KvType::F16) {
      key.push_back(half(record, c));
      value.push_back(half(record, dim + c));
    } else {
      key.push_back(half(record, c / 32) * int8_t(record[dim / 8 + c]));
      value.push_back(half(record, dim / 32 + c / 32) * int8_t(record[dim / 8 + dim + c]));
    }
  }
}

void test_pages(const Kernels& k, KvType type, uint32_t dim) {
  const std::vector<float> keys = random_floats(kPageTokens * dim, 3), values = random_floats(keys.size(), 3);
  Records records(k, type, dim, keys, values);
  const size_t page = kv_page_bytes(type, dim);
  std::vector<uint8_t> expected(2 * page), found(2 * page, 0xee);
  for (uint32_t t = 0; t < kPageTokens; ++t)
    k.kv[size_t(type)].append(&keys[t * dim], &values[t * dim], dim, t, expected.data(), expected.data() + page);
  k.records[size_t(type)].to_page(records.at(0), dim, found.data(), found.data() + page);
  same("a page made of records, head size " + std::to_string(dim), expected, found);
}

// Standard deviation of the score of a key, for a query in codes of 16 bits with a scale for each 32 channels.
double query_deviation(const float* q, const double* key, uint32_t dim) {
  double variance = 0;
  for (uint32_t b = 0; b < dim; b += 32) {
    double most = 0, squares = 0;
    for (uint32_t c = b; c < b + 32; ++c) {
      most = std::max(most, std::fabs(double(q[c])));
      squares += key[c] * key[c];
    }
    variance += std::pow(most / 32512, 2) * squares / 12;
  }
  return std::sqrt(variance);
}

void test_attention(const Kernels& k, KvType type, uint32_t dim, uint32_t rows, uint32_t count) {
  const uint32_t tokens = 300;
  const std::string what = "attention to records, head size " + std::to_string(dim) + ", rows " + std::to_string(rows);
  Records records(k, type, dim, random_floats(size_t(tokens) * dim, 2), random_floats(size_t(tokens) * dim, 2));
  const std::vector<float> q = random_floats(size_t(rows) * dim, 0.6f);
  std::vector<float> acc(q.size(), NAN), scores(16 * kChunkTokens), max(rows), sum(rows);
  std::vector<const float*> qs(rows);
  std::vector<float*> accs(rows);
  std::vector<const uint8_t*> chosen(count);
  for (uint32_t r = 0; r < rows; ++r) qs[r] = &q[size_t(r) * dim], accs[r] = &acc[size_t(r) * dim];
  std::vector<double> key, value;
  for (const uint8_t*& c : chosen) {
    c = records.at(rng() % tokens);
    decode(type, dim, c, key, value);
  }
  k.records[size_t(type)].attend({qs.data(), chosen.data(), count, rows, dim, scores.data(), accs.data(), max.data(), sum.data()});
  for (uint32_t r = 0; r < rows; ++r) {
    // With int8 records queries and weights are codes of 16 bits: an even error of at most half a code in each, whose
    // sums stay within six standard deviations.
    std::vector<double> score(count, 0.0), deviation(count, 0.0), weight(count);
    for (uint32_t t = 0; t < count; ++t) {
      for (uint32_t c = 0; c < dim; ++c) score[t] += double(qs[r][c]) * key[t * dim + c];
      if (type == KvType::Q8) deviation[t] = query_deviation(qs[r], &key[t * dim], dim);
    }
    const auto best = std::max_element(score.begin(), score.end());
    near(what + ", maximum", r, *best, max[r], 1e-4 + 6 * deviation[size_t(best - score.begin())]);
    double total = 0;
    for (uint32_t t = 0; t < count; ++t) total += weight[t] = std::exp2(score[t] - *best);
    for (uint32_t c = 0; c < dim; ++c) {
      double out = 0, most = 0, codes = 0, of_queries = 0;
      for (uint32_t t = 0; t < count; ++t) out += weight[t] * value[t * dim + c] / total;
      for (uint32_t t = 0; t < count && type == KvType::Q8; ++t) {
        const double scale = half(chosen[t], dim / 32 + c / 32);
        most = std::max(most, weight[t] * scale);
        codes += std::pow(value[t * dim + c] / scale, 2);
        of_queries += std::pow(std::log(2) * deviation[t] * weight[t] / total * (value[t * dim + c] - out), 2);
      }
      const double of_weights = most / 32767 * std::sqrt(codes / 12) / total;
      near(what, r, out, accs[r][c] / sum[r], 2e-5 + 6 * (of_weights + std::sqrt(of_queries)));
    }
  }
}

// The worth of a token is what its coded key gives; and the code is the nearest of the channel's four levels.
void test_scan(const Kernels& k, KvType type, uint32_t dim, uint32_t rows) {
  const std::string what = "scan of an index, head size " + std::to_string(dim);
  std::vector<float> keys = random_floats(size_t(kIndexTokens) * dim, 2);
  for (uint32_t t = 0; t < kIndexTokens; ++t) keys[t * dim] += 40, keys[t * dim + 1] = 3;  // a bias, and no spread at all
  Records records(k, type, dim, keys, keys);
  std::vector<uint8_t> index(index_block_bytes(dim));
  const uint8_t* pages[kIndexTokens / kPageTokens];
  for (uint32_t p = 0; p < kIndexTokens / kPageTokens; ++p) pages[p] = records.at(p * kPageTokens);
  k.records[size_t(type)].make_index(pages, dim, index.data());

  std::vector<float> levels(2 * dim);
  std::memcpy(levels.data(), index.data(), 8 * size_t(dim));
  const uint8_t* codes = index.data() + 8 * size_t(dim);
  std::vector<double> key, value, coded(size_t(kIndexTokens) * dim);
  for (uint32_t t = 0; t < kIndexTokens; ++t) decode(type, dim, records.at(t), key, value);
  for (uint32_t c = 0; c < dim; ++c) {
    double mean = 0, square = 0;
    for (uint32_t t = 0; t < kIndexTokens; ++t) mean += key[t * dim + c] / kIndexTokens;
    for (uint32_t t = 0; t < kIndexTokens; ++t) square += std::pow(key[t * dim + c] - mean, 2) / kIndexTokens;
    near(what + ", step", c, std::sqrt(square), levels[dim + c], 1e-3);
    near(what + ", first level", c, mean - 1.5 * std::sqrt(square), levels[c], 2e-3);
    for (uint32_t t = 0; t < kIndexTokens; ++t) {
      const uint32_t in16 = c % 16;
      const uint8_t byte = codes[((t / 16 * (dim / 16) + c / 16) * 16 + t % 16) * 4 + in16 % 4];
      const int code = byte >> (in16 / 4 * 2) & 3;
      coded[t * dim + c] = levels[c] + code * double(levels[dim + c]);
      const double inside = std::clamp(key[t * dim + c], double(levels[c]), levels[c] + 3.0 * levels[dim + c]);
      near(what + ", code", t * dim + c, inside, coded[t * dim + c], 0.501 * levels[dim + c] + 1e-5);
    }
  }

  const std::vector<float> q = random_floats(size_t(rows) * dim, 0.5f), level = random_floats(rows, 3);
  std::vector<const float*> qs(rows);
  for (uint32_t r = 0; r < rows; ++r) qs[r] = &q[size_t(r) * dim];
  std::vector<int8_t> worth(kIndexTokens);
  k.scan({index.data(), index.data(), qs.data(), level.data(), rows, dim, worth.data()});
  for (uint32_t t = 0; t < kIndexTokens; ++t) {
    double best = -INFINITY, error = 0;
    for (uint32_t r = 0; r < rows; ++r) {
      double score = 0, largest = 0, sum = 0;
      for (uint32_t c = 0; c < dim; ++c) {
        score += qs[r][c] * coded[t * dim + c];
        largest = std::max(largest, std::fabs(double(qs[r][c]) * levels[dim + c]));
        sum += (coded[t * dim + c] - levels[c]) / std::max(1e-9, double(levels[dim + c]));
      }
      best = std::max(best, score - level[r]);
      error = std::max(error, sum * largest / 254);  // the query is coded in 8 bits
    }
    near(what, t, std::clamp(8 * best, -127.0, 127.0), worth[t], 8 * error + 0.51);
  }
}

void test_pick(const Kernels& k) {
  for (uint32_t round = 0; round < 300; ++round) {
    const uint32_t n = 64 * (1 + rng() % 20);
    std::vector<int8_t> worth(n);
    const int spread = 1 + int(rng() % 255);
    for (int8_t& w : worth) w = int8_t(std::max(-128, 127 - int(rng() % uint32_t(spread))));
    const uint32_t usable = uint32_t(n - std::count(worth.begin(), worth.end(), kNever));
    const uint32_t count = round % 7 == 0 ? usable : rng() % (usable + 1);
    std::vector<uint32_t> order(n), found(count, 0xffffffff);
    std::iota(order.begin(), order.end(), 0u);
    std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return worth[a] > worth[b]; });
    order.resize(count);
    std::sort(order.begin(), order.end());
    k.pick(worth.data(), n, count, found.data());
    same("the best of " + std::to_string(n), order, found);
  }
}

// The room that is reserved for partial results holds those of every step.
void test_cut() {
  ModelSpec spec{};
  spec.dim = spec.head_dim = 16;
  spec.n_heads = 1;
  spec.layers.resize(1);
  spec.layers[0].n_kv_heads = 1;
  for (uint32_t budget : {1u, 31u, 113u, 128u, 129u, 300u, 1024u, 100000u}) {
    const KvCache cache(spec, 4096, KvType::F16, {.budget = budget});
    for (uint32_t n = 1; n <= 4096; ++n) {
      const SparseCut cut(cache, n - 1);
      const uint32_t room = SparseCut::most_parts(cache.selection(), n);
      if (cut.parts() > room) fail("parts of a step", n, room, cut.parts());
      if (cut.chosen > std::min(budget, n)) fail("chosen tokens", n, std::min(budget, n), cut.chosen);
      const uint32_t read = cut.always + cut.chosen, between = cut.recent - cut.sinks;
      if (cut.always + between != n) fail("tokens always read", n, n - between, cut.always);
      if (read > n || (n > cache.selection().recent && read < cache.selection().recent)) fail("tokens read", n, n, read);
    }
  }
}

}  // namespace

int main() {
  test_cut();
  for (Isa isa : isa_available()) {
    const Kernels& k = kernels_for(isa);
    level = isa_name(isa);
    for (KvType type : {KvType::F16, KvType::Q8})
      for (uint32_t dim : {16u, 48u, 32u, 64u, 128u, 256u}) {
        if (type == KvType::Q8 && dim % 32 != 0) continue;
        test_pages(k, type, dim);
        for (uint32_t rows : {1u, 3u, 4u, 7u})
          for (uint32_t count : {1u, 5u, 32u, 128u}) test_attention(k, type, dim, rows, count);
        for (uint32_t rows : {1u, 3u, 7u}) test_scan(k, type, dim, rows);
      }
    test_pick(k);
    std::printf("%s: attention to records agrees\n", level);
  }
  return 0;
}
