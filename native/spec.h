// The core's view of models/spec.py: the same fields, the same meaning.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace edgert {

struct LayerSpec {
  bool conv = false;       // gated short convolution instead of attention
  uint32_t n_kv_heads = 0;
  uint32_t window = 0;     // positions a query sees, itself included; 0: all
  float rope_base = 10000, rope_scale = 1;
};

struct ModelSpec {
  uint32_t dim = 0, n_heads = 0, head_dim = 0, ffn_dim = 0, vocab_size = 0, context_length = 0;
  float norm_eps = 1e-5f;
  std::vector<LayerSpec> layers;
  uint32_t rope_dims = 0;
  bool rope_interleaved = false;  // pairs (2i, 2i+1); else (i, i + rope_dims/2)
  bool gelu = false;              // gelu_tanh instead of silu
  float attn_scale = 1, embed_scale = 1;
  bool qk_norm = false, qkv_bias = false, post_norms = false, rope_factors = false, tied_head = true;
  uint32_t conv_kernel = 0;
  std::string output_norm;
};

}  // namespace edgert
