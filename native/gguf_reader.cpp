#include "gguf_reader.h"

#include "error.h"

namespace edgert {
namespace {

// No known model has a header above 30 MiB. The bound matters for sparse files, which can claim
// any size at no cost: an array of empty strings takes 4 times its bytes in the file.
constexpr uint64_t kMaxHeader = uint64_t{256} << 20;

}  // namespace

GgufReader::GgufReader(const DiskFile& file)
    : file_(file), limit_(std::min(file.size(), kMaxHeader)), buf_(std::min<uint64_t>(kChunk, limit_)) {}

void GgufReader::refill(size_t n) {
  if (remaining() < n) fail_short(n, false);
  std::memmove(buf_.data(), buf_.data() + pos_, len_ - pos_);
  base_ += pos_;
  len_ -= pos_;
  pos_ = 0;
  const size_t more = static_cast<size_t>(std::min<uint64_t>(buf_.size(), limit_ - base_)) - len_;
  file_.read(base_ + len_, buf_.data() + len_, more, "the header");
  len_ += more;
}

std::string GgufReader::string() {
  const auto n = number<uint64_t>();
  if (remaining() < n) fail_short(n, false);
  if (n <= kChunk) return {reinterpret_cast<const char*>(take(n)), static_cast<size_t>(n)};
  std::string s(static_cast<size_t>(n), '\0');
  for (size_t at = 0; at < s.size();) {
    const size_t step = std::min(kChunk, s.size() - at);
    std::memcpy(s.data() + at, take(step), step);
    at += step;
  }
  return s;
}

void GgufReader::expect(uint64_t count, uint64_t size) {
  if (count > remaining() / size)
    fail_short(count > std::numeric_limits<uint64_t>::max() / size ? std::numeric_limits<uint64_t>::max()
                                                                   : count * size,
               true);
}

void GgufReader::fail_short(uint64_t needed, bool at_least) const {
  const std::string needs = field() + std::string(" needs ") + (at_least ? "at least " : "") + std::to_string(needed) + " bytes";
  if (limit_ < file_.size())
    fail(needs + ", but a header may not be larger than " + std::to_string(kMaxHeader) +
         " bytes: the file is damaged");
  fail(needs + ", but the file ends at byte " + std::to_string(file_.size()) +
       ": the download is incomplete or the file is damaged; fetch it again");
}

std::string GgufReader::field() const {
  std::string f = subject;
  if (index != kNoIndex) f.append("[").append(std::to_string(index)).append("]");
  if (*part) f.append(" ").append(part);
  return f;
}

void GgufReader::fail_at(uint64_t offset, const std::string& what) const {
  throw ModelFileError(file_.path(), static_cast<int64_t>(offset), field(),
                       file_.path() + ": " + what + " (byte " + std::to_string(offset) + ", " + field() + ")");
}

}  // namespace edgert
