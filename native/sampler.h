// From logits to a token.
//
// Order of the steps: repetition penalty, frequency and presence penalty, bias; then, unless the
// temperature is 0 (arg max, ties to the lowest id), temperature, top-k, top-p, min-p and one
// Gumbel-max draw among what is left.
//
// The draw. Id i scores  logit[i] / temperature + g,  g = -log(-log1p(-v)),  and the highest score
// wins. v in (0, 1) comes from the top 52 bits of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) at
// index i of a stream whose state is a mix of seed and position. So a draw is a function of seed,
// position and logits alone: not of threads, of the order of evaluation or of how ids are skipped.
//
// Each filter keeps a prefix of one total order (logit descending, then id ascending), so all of
// them together are one cut-off. Blocks of 256 logits whose maximum is below it are skipped.
//
// Logits come for the whole vocabulary in the order of ids, or for some ids in any order: the others
// then do not exist. Their order changes the token only where top-p's sum over them rounds otherwise.
#pragma once
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

namespace edgert {

struct SamplerOptions {
  double temperature = 0.0;  // 0: greedy
  uint32_t top_k = 0;        // ids kept (0: all)
  double top_p = 1.0;        // mass of the softmax (tempered, after top-k) that is kept
  double min_p = 0.0;        // ids below this share of the best id's probability go
  double repetition_penalty = 1.0;  // ids of the prompt and of the reply: l > 0 ? l / r : l * r
  double presence_penalty = 0.0;    // subtracted once from ids of the reply
  double frequency_penalty = 0.0;   // subtracted for each time the id stands in the reply
  uint64_t seed = 0;
  std::vector<std::pair<uint32_t, float>> bias;  // added last; -inf bans an id
};

// Logits of n tokens: of id i for each i when `ids` is nullptr (n is the vocabulary's size then), else of
// ids[i]; each id at most once, and kNoToken where the logit is -inf.
struct LogitsView {
  const float* logits;
  const uint32_t* ids;
  uint32_t n;
};
inline constexpr uint32_t kNoToken = 0xffffffff;

struct Logprob {
  uint32_t id;
  double value;
};

class Sampler {
 public:
  // Throws EngineError for options out of range. Allocates what logits of a whole vocabulary need.
  Sampler(uint32_t vocab_size, SamplerOptions options);

  uint32_t vocab_size() const { return n_; }
  // sample() is the arg max of the logits as they are.
  bool plain_greedy() const { return opt_.temperature == 0.0 && !adjusts(); }
  // The order of the logits cannot change the token.
  bool order_free() const { return opt_.temperature == 0.0 || opt_.top_p == 1.0; }

  // Tokens of the prompt, for the repetition penalty.
  void observe(const uint32_t* tokens, size_t n);
  // A token of the reply, for all penalties.
  void accept(uint32_t token);
  // Takes back the last accept() not yet taken back. Throws EngineError when there is none.
  void retract();

  // The token at `position` (tokens before it in the sequence). Throws EngineError when a logit is NaN
  // or +inf, or all are -inf. Changes no state.
  uint32_t sample(const LogitsView& view, uint64_t position);

  // Log probabilities of the whole softmax of `logits` as they are: temperature 1, no penalty, no
  // filter. Returns that of `token`; `best()` then holds the `top` highest, best first.
  double logprobs(const float* logits, uint32_t token, uint32_t top);
  const std::vector<Logprob>& best() const { return best_; }

 private:
  struct Candidate {
    float logit;
    uint32_t id;
  };
  // Keeps logits above `logit`, and equal ones up to `id`.
  struct Cutoff {
    float logit = -std::numeric_limits<float>::infinity();
    uint32_t id = std::numeric_limits<uint32_t>::max();
  };
  static bool better(const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
  }

  bool adjusts() const { return penalties_ || !opt_.bias.empty(); }
  void penalise(float& logit, uint32_t id) const;
  LogitsView adjust(const LogitsView& view);
  void scan(const LogitsView& v);
  uint32_t argmax(const LogitsView& v) const;
  double mass(const LogitsView& v, double temperature) const;
  void collect_top(const LogitsView& v, uint32_t k);
  void collect_above(const LogitsView& v, double floor);
  Cutoff nucleus(double total);
  Cutoff filter(const LogitsView& v);
  uint32_t draw(const LogitsView& v, const Cutoff& cut, uint64_t position) const;

  uint32_t n_;
  SamplerOptions opt_;
  bool penalties_;
  std::vector<float> scratch_;      // [n] logits with penalties and bias
  std::vector<float> bias_;         // [n] by id, if there is any
  std::vector<uint8_t> known_;      // [n] 1: in touched_
  std::vector<uint32_t> count_;     // [n] times in the reply
  std::vector<uint32_t> touched_;   // ids of prompt and reply, each once
  std::vector<std::pair<uint32_t, bool>> accepted_;  // the reply, and whether an id was new in touched_
  std::vector<float> block_max_;    // by 256 of the logits last scanned
  float max_ = 0;                   // of the logits last scanned
  std::vector<Candidate> candidates_;  // what a filter looks at
  std::vector<Logprob> best_;
};

}  // namespace edgert
