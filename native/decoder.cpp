#include "decoder.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <thread>

#include "error.h"
#include "scratch.h"

namespace edgert {
namespace {

uint32_t usable_cpus() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return uint32_t(std::max(1, CPU_COUNT(&set)));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace

void check_head_dim(const ModelSpec& spec) {
  if (spec.head_dim == 0 || spec.head_dim % 16 != 0 || spec.head_dim > kMaxHeadDim)
    throw UnsupportedModelError("attention heads of " + std::to_string(spec.head_dim) +
                                " channels: the native engine takes multiples of 16 up to 256");
}

Decoder::Decoder(const GgufFile& file, const ModelSpec& spec, uint32_t threads, const Sidecars& sidecars)
    : spec_(spec), kernels_(kernels_for(isa_select())), pool_(threads ? threads : usable_cpus()) {
  check_head_dim(spec);
  weights_ = load_weights(file, spec, sidecars, kernels_, pool_);

  scratch_ = std::make_unique<Scratch>(spec, weights_, pool_.threads());
  scratch_->allocate(spec, weights_);
  for (const LayerSpec& l : scratch_->ropes) {
    std::vector<float>& f = scratch_->inv_freq.emplace_back();
    for (uint32_t p = 0; p < spec.rope_dims / 2; ++p) {
      const float base = std::pow(l.rope_base, float(2 * p) / float(spec.rope_dims));
      f.push_back(l.rope_scale / base / (weights_.rope_factors ? weights_.rope_factors[p] : 1.0f));
    }
  }
}

Decoder::~Decoder() = default;

size_t Decoder::activation_bytes() const {
  return scratch_->bytes() + row_norms_.capacity() * sizeof(float);
}

size_t Weights::flash_units(uint32_t probes, uint32_t keep) const {
  const FlashHead& f = flash;
  const size_t units = f.token.size() / FlashHead::kUnit;
  const size_t most = f.low.rows ? keep : size_t(probes) * (f.cluster_size / FlashHead::kUnit);
  return std::min(units, std::min(units, most) + f.special.size());
}

size_t Weights::flash_bytes(uint32_t probes, uint32_t keep) const {
  const FlashHead& f = flash;
  const size_t low = f.low.rows ? size_t(f.low.tiles()) * f.low.stride : 0;
  const size_t units = f.token.size() / FlashHead::kUnit;
  size_t read = f.bytes - low, sieved = units;
  if (f.routers.rows) sieved = std::min<size_t>(units, size_t(probes) * (f.cluster_size / FlashHead::kUnit));
  if (f.low.rows) read += low / units * sieved;
  const size_t tiles = flash_units(probes, keep) * (FlashHead::kUnit / head.tile_rows);
  return read + tiles * packed_tile_bytes(head.type, head.cols, head.tile_rows);
}

}  // namespace edgert
