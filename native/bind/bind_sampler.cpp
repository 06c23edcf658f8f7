#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>

#include "bind.h"
#include "error.h"
#include "sampler.h"

namespace nb = nanobind;
using namespace nb::literals;
using edgert::Sampler;

namespace {

using LogitArray = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

const float* checked(const Sampler& s, const LogitArray& logits) {
  if (logits.shape(0) != s.vocab_size())
    throw edgert::EngineError("expected " + std::to_string(s.vocab_size()) + " logits, found " +
                              std::to_string(logits.shape(0)));
  return logits.data();
}

using IdArray = nb::ndarray<const uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

uint32_t sample(Sampler& s, const LogitArray& logits, uint64_t position, const std::optional<IdArray>& ids) {
  if (!ids) return s.sample({checked(s, logits), nullptr, s.vocab_size()}, position);
  if (ids->shape(0) != logits.shape(0)) throw edgert::EngineError("there must be as many ids as logits");
  for (size_t i = 0; i < ids->shape(0); i++)
    if (ids->data()[i] >= s.vocab_size() && ids->data()[i] != edgert::kNoToken)
      throw edgert::EngineError("token id " + std::to_string(ids->data()[i]) + " is outside the vocabulary");
  return s.sample({logits.data(), ids->data(), uint32_t(ids->shape(0))}, position);
}

}  // namespace

void bind_sampler(nb::module_& m) {
  nb::class_<Sampler>(m, "Sampler", "Logits to tokens; see native/sampler.h for the order of the steps.")
      .def(
          "__init__",
          [](Sampler* self, uint32_t vocab_size, double temperature, uint32_t top_k, double top_p, double min_p,
             double repetition_penalty, double presence_penalty, double frequency_penalty, uint64_t seed,
             std::vector<std::pair<uint32_t, float>> bias) {
            new (self) Sampler(vocab_size, {temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty,
                                            frequency_penalty, seed, std::move(bias)});
          },
          "vocab_size"_a, nb::kw_only(), "temperature"_a = 0.0, "top_k"_a = 0, "top_p"_a = 1.0, "min_p"_a = 0.0,
          "repetition_penalty"_a = 1.0, "presence_penalty"_a = 0.0, "frequency_penalty"_a = 0.0, "seed"_a = 0,
          "bias"_a = std::vector<std::pair<uint32_t, float>>{})
      .def_prop_ro("plain_greedy", &Sampler::plain_greedy, "sample() is the arg max of the logits as they are.")
      .def("observe", [](Sampler& s, const std::vector<uint32_t>& tokens) { s.observe(tokens.data(), tokens.size()); },
           "tokens"_a, "Tokens of the prompt, for the repetition penalty.")
      .def("accept", &Sampler::accept, "token"_a, "A token of the reply, for all penalties.")
      .def("retract", &Sampler::retract, "Takes back the last token accepted.")
      .def_prop_ro("order_free", &Sampler::order_free, "The order of the logits cannot change the token.")
      .def("sample", &sample, "logits"_a.noconvert(), "position"_a, "ids"_a.noconvert().none() = nb::none(),
           "The token at `position`; a function of seed, position, logits and the tokens observed and accepted.\n"
           "With `ids` logits[i] is that of token ids[i], and there is no other token.")
      .def("logprobs",
           [](Sampler& s, const LogitArray& logits, uint32_t token, uint32_t top) {
             const double own = s.logprobs(checked(s, logits), token, top);
             std::vector<std::pair<uint32_t, double>> best;
             for (const auto& b : s.best()) best.emplace_back(b.id, b.value);
             return std::make_pair(own, std::move(best));
           },
           "logits"_a.noconvert(), "token"_a, "top"_a = 0,
           "(log probability of `token`, the `top` best as (id, log probability)), of the plain softmax.");
}
