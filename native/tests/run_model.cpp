// run_model MODEL.gguf SPEC THREADS TOKEN...: writes the logits after each token to standard output
// as raw floats, [tokens][vocab]. SPEC is a text file, "field value" a line, with one line
// "layer kind n_kv_heads window rope_base rope_scale" for each layer: models/spec.py's fields.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "decoder.h"
#include "gguf.h"
#include "kv.h"

using namespace edgert;

namespace {

ModelSpec read_spec(const std::string& path) {
  std::ifstream in(path);
  if (!in) throw std::runtime_error("cannot read " + path);
  ModelSpec s;
  const std::map<std::string, std::function<void()>> fields = {
      {"dim", [&] { in >> s.dim; }},
      {"n_heads", [&] { in >> s.n_heads; }},
      {"head_dim", [&] { in >> s.head_dim; }},
      {"ffn_dim", [&] { in >> s.ffn_dim; }},
      {"vocab_size", [&] { in >> s.vocab_size; }},
      {"context_length", [&] { in >> s.context_length; }},
      {"norm_eps", [&] { in >> s.norm_eps; }},
      {"rope_dims", [&] { in >> s.rope_dims; }},
      {"attn_scale", [&] { in >> s.attn_scale; }},
      {"embed_scale", [&] { in >> s.embed_scale; }},
      {"qk_norm", [&] { in >> s.qk_norm; }},
      {"qkv_bias", [&] { in >> s.qkv_bias; }},
      {"post_norms", [&] { in >> s.post_norms; }},
      {"rope_factors", [&] { in >> s.rope_factors; }},
      {"tied_head", [&] { in >> s.tied_head; }},
      {"conv_kernel", [&] { in >> s.conv_kernel; }},
      {"output_norm", [&] { in >> s.output_norm; }},
      {"rope_style", [&] { std::string v; in >> v; s.rope_interleaved = v == "interleaved"; }},
      {"activation", [&] { std::string v; in >> v; s.gelu = v == "gelu_tanh"; }},
      {"layer", [&] {
         std::string kind;
         LayerSpec l;
         in >> kind >> l.n_kv_heads >> l.window >> l.rope_base >> l.rope_scale;
         l.conv = kind == "conv";
         s.layers.push_back(l);
       }},
  };
  for (std::string name; in >> name;) {
    const auto field = fields.find(name);
    if (field == fields.end()) throw std::runtime_error(path + ": unknown field " + name);
    field->second();
    if (!in) throw std::runtime_error(path + ": bad value of " + name);
  }
  return s;
}

void run(int argc, char** argv) {
  if (argc < 5) throw std::runtime_error("usage: run_model MODEL.gguf SPEC THREADS TOKEN...");
  const GgufFile file(argv[1]);
  Decoder decoder(file, read_spec(argv[2]), uint32_t(std::atoi(argv[3])));
  std::vector<int32_t> tokens;
  for (int i = 4; i < argc; ++i) tokens.push_back(std::atoi(argv[i]));
  KvCache cache(decoder.spec(), uint32_t(tokens.size()));
  const size_t vocab = decoder.spec().vocab_size;
  std::vector<float> logits(tokens.size() * vocab);
  // The first half at once, the rest one by one: prefill and decode both run.
  const uint32_t half = uint32_t(tokens.size() / 2);
  decoder.forward(cache, tokens.data(), half, Decoder::Want::All, logits.data());
  for (uint32_t i = half; i < tokens.size(); ++i)
    decoder.forward(cache, &tokens[i], 1, Decoder::Want::Last, &logits[i * vocab]);
  std::fwrite(logits.data(), sizeof(float), logits.size(), stdout);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(argc, argv);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
  return 0;
}
