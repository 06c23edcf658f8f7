#include "gguf_part.h"

#include <bit>
#include <limits>
#include <unordered_set>

#include "error.h"
#include "gguf_reader.h"

namespace edgert {
namespace {

constexpr uint32_t kMaxDims = 4;
constexpr int kMaxDepth = 8;            // of arrays in arrays
constexpr uint64_t kMaxKey = 65535;     // bytes, from the specification
constexpr uint64_t kMaxAlignment = uint64_t{64} << 10;
constexpr uint64_t kDefaultAlignment = 32;

enum ValueType : uint32_t { kU8, kI8, kU16, kI16, kU32, kI32, kF32, kBool, kString, kArray, kU64, kI64, kF64 };

// Fewest bytes a value can take: the size of a scalar, an empty string, an empty array. 0: no such type.
uint64_t least_size(uint32_t type) {
  switch (type) {
    case kU8: case kI8: case kBool: return 1;
    case kU16: case kI16: return 2;
    case kU32: case kI32: case kF32: return 4;
    case kString: case kU64: case kI64: case kF64: return 8;
    case kArray: return 12;
  }
  return 0;
}

bool is_utf8(std::string_view s) {
  const auto* p = reinterpret_cast<const uint8_t*>(s.data());
  const uint8_t* end = p + s.size();
  while (p < end) {
    const uint8_t c = *p++;
    if (c < 0x80) continue;
    const int more = c >= 0xF0 ? 3 : c >= 0xE0 ? 2 : 1;
    if (c < 0xC2 || c > 0xF4 || end - p < more) return false;
    // The first continuation byte excludes overlong forms, surrogates and values above 10FFFF.
    const uint8_t low = c == 0xE0 ? 0xA0 : c == 0xF0 ? 0x90 : 0x80;
    const uint8_t high = c == 0xED ? 0x9F : c == 0xF4 ? 0x8F : 0xBF;
    if (*p < low || *p > high) return false;
    for (int i = 1; i < more; ++i)
      if ((p[i] & 0xC0) != 0x80) return false;
    p += more;
  }
  return true;
}

// Types of GGUF that the core has no code for, so that a message can name them.
std::string foreign_type(uint32_t id) {
  switch (id) {
    case 9: return "Q8_1"; case 15: return "Q8_K"; case 16: return "IQ2_XXS"; case 17: return "IQ2_XS";
    case 18: return "IQ3_XXS"; case 19: return "IQ1_S"; case 21: return "IQ3_S"; case 22: return "IQ2_S";
    case 24: return "I8"; case 25: return "I16"; case 26: return "I32"; case 27: return "I64";
    case 28: return "F64"; case 29: return "IQ1_M"; case 34: return "TQ1_0"; case 35: return "TQ2_0";
    case 40: return "NVFP4"; case 41: return "Q1_0";
  }
  return "unknown";
}

template <class T>
MetaValue numbers(GgufReader& r, uint64_t count) {
  std::vector<T> out(static_cast<size_t>(count));  // expect() has shown that the file holds them
  for (size_t at = 0; at < out.size();) {
    const size_t n = std::min(out.size() - at, r.kChunk / sizeof(T));
    std::memcpy(out.data() + at, r.take(n * sizeof(T)), n * sizeof(T));
    at += n;
  }
  return {std::move(out)};
}

bool boolean(GgufReader& r) {
  const auto v = r.number<uint8_t>();
  if (v > 1) r.fail_at(r.offset() - 1, "expected a boolean, 0 or 1, found " + std::to_string(v));
  return v != 0;
}

uint32_t value_type(GgufReader& r) {
  const auto type = r.number<uint32_t>();
  if (least_size(type) == 0)
    r.fail_at(r.offset() - 4, "expected a value type from 0 to 12, found " + std::to_string(type));
  return type;
}

MetaValue array(GgufReader& r, int depth);

MetaValue value(GgufReader& r, uint32_t type, int depth) {
  switch (type) {
    case kU8: return {uint64_t{r.number<uint8_t>()}};
    case kU16: return {uint64_t{r.number<uint16_t>()}};
    case kU32: return {uint64_t{r.number<uint32_t>()}};
    case kU64: return {r.number<uint64_t>()};
    case kI8: return {int64_t{r.number<int8_t>()}};
    case kI16: return {int64_t{r.number<int16_t>()}};
    case kI32: return {int64_t{r.number<int32_t>()}};
    case kI64: return {r.number<int64_t>()};
    case kF32: return {double{r.number<float>()}};
    case kF64: return {r.number<double>()};
    case kBool: return {boolean(r)};
    case kString: return {r.string()};
    default: return array(r, depth);
  }
}

MetaValue array(GgufReader& r, int depth) {
  if (depth == kMaxDepth) r.fail("arrays are nested more than " + std::to_string(kMaxDepth) + " deep");
  r.part = "(array)";
  const uint32_t type = value_type(r);
  const auto count = r.number<uint64_t>();
  r.expect(count, least_size(type));
  switch (type) {
    case kU8: return numbers<uint8_t>(r, count);
    case kU16: return numbers<uint16_t>(r, count);
    case kU32: return numbers<uint32_t>(r, count);
    case kU64: return numbers<uint64_t>(r, count);
    case kI8: return numbers<int8_t>(r, count);
    case kI16: return numbers<int16_t>(r, count);
    case kI32: return numbers<int32_t>(r, count);
    case kI64: return numbers<int64_t>(r, count);
    case kF32: return numbers<float>(r, count);
    case kF64: return numbers<double>(r, count);
    default: break;
  }
  const auto each = [&](auto out, auto read) -> MetaValue {
    out.reserve(static_cast<size_t>(count));
    for (uint64_t i = 0; i < count; ++i) {
      r.index = i;
      out.push_back(read());
    }
    r.index = GgufReader::kNoIndex;
    return {std::move(out)};
  };
  r.part = "";
  if (type == kBool) return each(std::vector<bool>(), [&] { return boolean(r); });
  if (type == kString) return each(std::vector<std::string>(), [&] { return r.string(); });
  return each(MetaArray(), [&] { return array(r, depth + 1); });
}

// A key or tensor name: UTF-8, so that it can be shown and looked up from Python.
std::string name(GgufReader& r) {
  const uint64_t start = r.offset();
  std::string s = r.string();
  if (!is_utf8(s)) r.fail_at(start, "expected UTF-8 text, found '" + printable(s) + "'");
  return s;
}

void read_version(GgufReader& r, GgufPart& part) {
  r.subject = "magic";
  if (r.remaining() == 0) r.fail("the file is empty; fetch it again");
  char magic[4] = {};
  const size_t n = std::min<uint64_t>(4, r.remaining());
  std::memcpy(magic, r.take(n), n);
  const std::string_view start(magic, n);
  if (start != "GGUF") {
    std::string hint = "expected a model in GGUF format";
    if (start == "vers") hint = "this may be a Git LFS pointer: fetch the file itself, for example with `git lfs pull`";
    if (start == "<!DO" || start == "<!do" || start == "<htm") hint = "this is a web page: fetch the file itself";
    if (start.substr(0, 2) == "PK") hint = "this is a zip archive or a PyTorch checkpoint: convert it to GGUF";
    if (start == "tjgg" || start == "lmgg" || start == "fmgg") hint = "this is a format older than GGUF: convert it";
    r.fail_at(0, "not a GGUF file: starts with '" + printable(start) + "'; " + hint);
  }
  r.subject = "version";
  part.version = r.number<uint32_t>();
  if (part.version == 2 || part.version == 3) return;
  if ((part.version & 0xFFFF) == 0 && part.version != 0)
    r.fail_at(4, "the file is big endian; edgert reads little endian: fetch or convert that variant of the model");
  r.fail_at(4, "expected GGUF version 2 or 3, found " + std::to_string(part.version) +
                   (part.version < 2 ? ": convert the model again with current tools" : ""));
}

void read_metadata(GgufReader& r, GgufPart& part, uint64_t count) {
  for (uint64_t i = 0; i < count; ++i) {
    r.subject = "metadata", r.index = i, r.part = "key";
    const uint64_t start = r.offset();
    std::string key = name(r);
    if (key.size() > kMaxKey)
      r.fail_at(start, "expected at most 65535 bytes, found " + std::to_string(key.size()));
    if (!part.keys.emplace(key, part.metadata.size()).second)
      r.fail_at(start, "the key '" + printable(key) + "' occurs twice");
    r.subject = key.empty() ? "''" : printable(key), r.index = GgufReader::kNoIndex, r.part = "(type)";
    const uint32_t type = value_type(r);
    r.part = "";
    part.metadata.emplace_back(std::move(key), value(r, type, 0));
  }
}

// Bytes of a tensor from its dimensions; every product is checked.
uint64_t tensor_bytes(const GgufReader& r, const TensorInfo& t, uint64_t at) {
  const DTypeInfo& type = dtype_info(t.type);
  if (t.dims[0] % type.block != 0)
    r.fail_at(at, "expected a first dimension that is a multiple of " + std::to_string(type.block) + ", the block of " +
                      type.name + ", found " + std::to_string(t.dims[0]));
  constexpr uint64_t kMost = std::numeric_limits<int64_t>::max();
  uint64_t bytes = t.dims[0] / type.block;
  const auto times = [&](uint64_t factor) {
    if (bytes > kMost / factor) r.fail_at(at, "the tensor is larger than any file can be");
    bytes *= factor;
  };
  times(type.bytes);
  for (size_t i = 1; i < t.dims.size(); ++i) times(t.dims[i]);
  // Four bytes an element must fit too: a dequantised copy is addressed with 64 bits.
  uint64_t elements = t.dims[0];
  for (size_t i = 1; i < t.dims.size(); ++i) elements = elements > kMost / t.dims[i] ? kMost : elements * t.dims[i];
  if (elements > kMost / sizeof(float)) r.fail_at(at, "the tensor has more elements than memory can address");
  return bytes;
}

TensorInfo read_tensor(GgufReader& r, uint64_t number) {
  TensorInfo t;
  r.subject = "tensor", r.index = number, r.part = "name";
  t.name = name(r);
  r.subject = "tensor '" + printable(t.name) + "'", r.index = GgufReader::kNoIndex, r.part = "dimensions";
  const uint64_t at = r.offset();
  const auto n_dims = r.number<uint32_t>();
  if (n_dims < 1 || n_dims > kMaxDims)
    r.fail_at(at, "expected 1 to 4 dimensions, found " + std::to_string(n_dims));
  t.dims.resize(n_dims);
  for (uint64_t& d : t.dims) {
    d = r.number<uint64_t>();
    if (d == 0) r.fail_at(r.offset() - 8, "a dimension is zero");
  }
  r.part = "type";
  const auto type = r.number<uint32_t>();
  if (!dtype_info(type))
    throw UnsupportedModelError(r.path() + ": tensor '" + printable(t.name) + "' has type " + foreign_type(type) + " (id " +
                                std::to_string(type) + "), which the native core cannot read; it reads " +
                                dtype_names() + ". Choose a file with another quantisation");
  t.type = static_cast<DType>(type);
  r.part = "dimensions";
  t.nbytes = tensor_bytes(r, t, at);
  r.part = "offset";
  t.offset = r.number<uint64_t>();
  t.shard = 0;
  return t;
}

uint64_t alignment(const GgufReader& r, const GgufPart& part) {
  const auto it = part.keys.find("general.alignment");
  if (it == part.keys.end()) return kDefaultAlignment;
  const auto* v = std::get_if<uint64_t>(&part.metadata[it->second].second.v);
  if (!v || !std::has_single_bit(*v) || *v > kMaxAlignment)
    r.fail("expected an unsigned power of two up to 65536, found " + (v ? std::to_string(*v) : "another type of value"));
  return *v;
}

// Makes offsets absolute and checks that each tensor lies in the file, aligned and alone.
void place_tensors(GgufReader& r, GgufPart& part, uint64_t file_size) {
  const uint64_t header_end = r.offset();
  r.subject = "general.alignment", r.part = "";
  const uint64_t align = alignment(r, part);
  const uint64_t data = (header_end + align - 1) / align * align;
  for (TensorInfo& t : part.tensors) {
    r.subject = "tensor '" + printable(t.name) + "'", r.part = "offset";
    if (t.offset % align != 0)
      r.fail_at(header_end, "expected a multiple of the alignment " + std::to_string(align) + ", found " +
                                std::to_string(t.offset));
    if (data > file_size || t.offset > file_size - data || t.nbytes > file_size - data - t.offset) {
      r.part = "data";
      const uint64_t most = std::numeric_limits<int64_t>::max();
      const bool sane = t.offset < most - data && t.nbytes < most - data - t.offset;
      r.fail_at(file_size, "the file ends at byte " + std::to_string(file_size) + " but " + r.subject + " needs " +
                               (sane ? std::to_string(data + t.offset + t.nbytes) : "more than any file can hold") +
                               ": the download is incomplete or the file is damaged; fetch it again");
    }
    t.offset += data;
  }
  std::vector<const TensorInfo*> order;
  for (const TensorInfo& t : part.tensors) order.push_back(&t);
  std::sort(order.begin(), order.end(), [](auto* a, auto* b) { return a->offset < b->offset; });
  for (size_t i = 1; i < order.size(); ++i) {
    const TensorInfo &a = *order[i - 1], &b = *order[i];
    if (a.offset + a.nbytes > b.offset) {
      r.subject = "tensor '" + printable(b.name) + "'", r.part = "offset";
      r.fail_at(b.offset, "it starts inside tensor '" + printable(a.name) + "', which ends at byte " +
                              std::to_string(a.offset + a.nbytes));
    }
  }
}

}  // namespace

std::string printable(std::string_view text) {
  constexpr size_t kMost = 80;
  constexpr char kHex[] = "0123456789abcdef";
  std::string out;
  for (const char c : text.substr(0, kMost)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7F)
      out += c;
    else
      out += {'\\', 'x', kHex[byte >> 4], kHex[byte & 15]};
  }
  return text.size() > kMost ? out + "..." : out;
}

GgufPart parse_gguf(const DiskFile& file) {
  GgufReader r(file);
  GgufPart part;
  read_version(r, part);
  r.subject = "tensor count";
  const auto n_tensors = r.number<uint64_t>();
  r.expect(n_tensors, 32);  // empty name, one dimension, type, offset
  r.subject = "metadata count";
  const auto n_keys = r.number<uint64_t>();
  r.expect(n_keys, 13);  // empty key, type, one byte
  read_metadata(r, part, n_keys);
  std::unordered_set<std::string> names;
  for (uint64_t i = 0; i < n_tensors; ++i) {
    const uint64_t start = r.offset();
    part.tensors.push_back(read_tensor(r, i));
    if (!names.insert(part.tensors.back().name).second) {
      r.part = "name";
      r.fail_at(start, "two tensors have this name");
    }
  }
  place_tensors(r, part, file.size());
  return part;
}

}  // namespace edgert
