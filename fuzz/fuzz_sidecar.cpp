// libFuzzer target: any bytes as the sidecar of a small good model (seeds.py: base_model). Opening and
// loading may only succeed or throw the errors of a file. With what loads, each way through the head must
// run and give what the model gives without a sidecar.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "decoder.h"
#include "error.h"

using namespace edgert;

// Buffers from the heap in place of memory.cpp's: AddressSanitizer sees their ends, and the limit of an
// allocation counts them.
namespace edgert {

Buffer::Buffer(size_t bytes, const char*) : bytes_(bytes) {
  void* p = nullptr;
  if (bytes && posix_memalign(&p, 4096, bytes) != 0) std::abort();
  if (p) std::memset(p, 0, bytes);
  data_ = static_cast<uint8_t*>(p);
}

Buffer::~Buffer() { std::free(data_); }

}  // namespace edgert

namespace {

void require(bool holds) {
  if (!holds) std::abort();
}

// What base_model writes. No layers: only the head has to do with a sidecar.
ModelSpec base_spec() {
  ModelSpec s;
  s.dim = 256;
  s.n_heads = 1;
  s.head_dim = 16;
  s.vocab_size = 101;
  s.context_length = 16;
  s.output_norm = "output_norm.weight";
  return s;
}

struct Base {
  const ModelSpec spec = base_spec();
  const GgufFile file{BASE_MODEL};
  std::vector<float> hidden, logits;
  uint32_t best = 0;

  Base() : hidden(spec.dim), logits(spec.vocab_size) {
    uint32_t state = 1;
    for (float& x : hidden) x = float((state = state * 1664525 + 1013904223) >> 16) / 32768 - 1;
    Decoder plain(file, spec, 1);
    plain.dense(hidden.data(), 1, logits.data());
    best = uint32_t(std::max_element(logits.begin(), logits.end()) - logits.begin());
  }
};

uint32_t budget(const GgufFile& sidecar, const char* key) {
  const MetaValue* value = sidecar.get(key);
  const auto* n = value ? std::get_if<uint64_t>(&value->v) : nullptr;
  return n ? uint32_t(std::clamp<uint64_t>(*n, 1, uint64_t(1) << 31)) : 1;
}

void run(Decoder& d, const GgufFile& sidecar, const Base& base) {
  const uint32_t vocab = base.spec.vocab_size;
  const float* hidden = base.hidden.data();
  // The tokens `wanted` are among those scored, nothing is there twice, and every logit is the dense head's.
  const auto check = [&](const Decoder::Scored& s, const std::vector<uint32_t>& wanted) {
    std::vector<bool> seen(vocab);
    require(s.ids.size() == s.logits.size());
    for (size_t i = 0; i < s.ids.size(); ++i) {
      require(s.ids[i] < vocab && !seen[s.ids[i]] && s.logits[i] == base.logits[s.ids[i]]);
      seen[s.ids[i]] = true;
    }
    for (uint32_t id : wanted) require(seen[id]);
  };

  std::vector<float> logits(vocab);
  d.dense(hidden, 1, logits.data());
  require(logits == base.logits);
  std::vector<float> rows(d.row_tokens().size());
  d.dense_rows(hidden, 1, rows.data());
  for (size_t i = 0; i < rows.size(); ++i)
    if (const uint32_t id = d.row_tokens()[i]; id != FlashHead::kPadding) require(rows[i] == base.logits[id]);
  uint32_t best = vocab;
  d.best(hidden, 1, &best);
  require(best == base.best);

  Decoder::Scored scored;
  const std::vector<uint32_t> more = {3, vocab - 1};
  const uint32_t probes = budget(sidecar, "edgert.head.probes"), keep = budget(sidecar, "edgert.head.keep");
  for (const auto& [p, k] : {std::pair(probes, keep), std::pair(1u, 1u), std::pair(1u, vocab), std::pair(vocab, 1u)}) {
    d.flash(hidden, p, k, more, scored);
    check(scored, more);
    require(d.flash_bytes(p, k) > 0);
  }
  const uint32_t all = uint32_t(d.row_tokens().size());
  d.flash(hidden, all, all, {}, scored);
  check(scored, {});
  require(scored.ids.size() == vocab);
  const std::vector<uint32_t> ids = {7, 0, 7, vocab - 1};
  d.among(hidden, ids, scored);
  check(scored, ids);
  require(scored.ids.size() == 3);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Base base;
  static const int fd = memfd_create("sidecar", 0);
  static const std::string path = "/proc/self/fd/" + std::to_string(fd);
  require(fd >= 0 && ftruncate(fd, 0) == 0);
  require(pwrite(fd, data, size, 0) == static_cast<ssize_t>(size));
  try {
    const GgufFile sidecar(path);
    Decoder decoder(base.file, base.spec, 1, &sidecar);
    // What has loaded runs: no error of any type from here on.
    [&]() noexcept { run(decoder, sidecar, base); }();
  } catch (const ModelFileError& e) {
    require(e.path == path && e.offset >= -1 && e.offset <= static_cast<int64_t>(size) && !e.field.empty());
  } catch (const UnsupportedModelError&) {
  }
  return 0;
}
