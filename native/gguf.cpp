#include "gguf.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <iterator>
#include <optional>
#include <string_view>

#include "disk_file.h"
#include "error.h"
#include "gguf_part.h"

namespace edgert {
namespace {

constexpr size_t kDequantizeChunk = size_t{1} << 20;  // bytes read at once

// "<prefix>-00002-of-00003.gguf"
struct PartName {
  std::string prefix;
  uint64_t number = 0, count = 0;  // number counts from 1; 0: the name has another form

  explicit PartName(const std::string& path) {
    constexpr std::string_view kForm = "-#####-of-#####.gguf";
    if (path.size() < kForm.size()) return;
    const std::string end = path.substr(path.size() - kForm.size());
    for (size_t i = 0; i < end.size(); ++i)
      if (kForm[i] == '#' ? end[i] < '0' || end[i] > '9' : end[i] != kForm[i]) return;
    prefix = path.substr(0, path.size() - kForm.size());
    number = std::stoull(end.substr(1, 5));
    count = std::stoull(end.substr(10, 5));
  }

  static std::string tail(uint64_t number, uint64_t count) {
    char text[64];
    std::snprintf(text, sizeof text, "-%05llu-of-%05llu.gguf", static_cast<unsigned long long>(number),
                  static_cast<unsigned long long>(count));
    return text;
  }
};

[[noreturn]] void fail(const std::string& path, const std::string& field, const std::string& what) {
  throw ModelFileError(path, -1, field, path + ": " + what + " (" + field + ")");
}

// A non-negative integer of the metadata; without a default the key must be there.
uint64_t split_number(const DiskFile& file, const GgufPart& part, const std::string& key,
                      std::optional<uint64_t> absent = std::nullopt) {
  const auto it = part.keys.find(key);
  if (it == part.keys.end()) {
    if (absent) return *absent;
    fail(file.path(), key, "expected this key in a part of a split model; fetch all parts again");
  }
  const auto& v = part.metadata[it->second].second.v;
  if (const auto* u = std::get_if<uint64_t>(&v)) return *u;
  if (const auto* i = std::get_if<int64_t>(&v); i && *i >= 0) return static_cast<uint64_t>(*i);
  fail(file.path(), key, "expected an integer that is not negative");
}

}  // namespace

uint64_t TensorInfo::rows() const {
  uint64_t n = 1;
  for (size_t i = 1; i < dims.size(); ++i) n *= dims[i];
  return n;
}

struct GgufFile::Impl {
  std::string path;
  std::vector<std::unique_ptr<DiskFile>> files;
  GgufPart head;  // of the first part; its tensors are those of all parts
  std::unordered_map<std::string, size_t> names;

  void open();
  void open_parts(const PartName& name, std::unique_ptr<DiskFile> file, GgufPart part);
  void add_part(uint64_t number, uint64_t count, std::unique_ptr<DiskFile> file, GgufPart part);
};

void GgufFile::Impl::open() {
  auto file = std::make_unique<DiskFile>(path);
  GgufPart part = parse_gguf(*file);
  const uint64_t count = split_number(*file, part, "split.count", 1);
  if (count > 1) {
    const PartName name(path);
    if (name.number == 0 || name.number > count || name.count != count)
      fail(path, "split.count",
           "this is one of " + std::to_string(count) + " parts of a model; expected a name that ends like " +
               PartName::tail(1, count) + "; keep the names the parts were published with");
    open_parts(name, std::move(file), std::move(part));
  } else {
    head = std::move(part);
    files.push_back(std::move(file));
  }
  for (const TensorInfo& t : head.tensors)
    if (!names.emplace(t.name, names.size()).second)
      fail(files[t.shard]->path(), "tensor '" + printable(t.name) + "'", "an earlier part has a tensor of this name");
}

void GgufFile::Impl::open_parts(const PartName& name, std::unique_ptr<DiskFile> file, GgufPart part) {
  for (uint64_t i = 1; i <= name.count; ++i) {
    if (i == name.number) {
      add_part(i, name.count, std::move(file), std::move(part));
      continue;
    }
    const std::string other = name.prefix + PartName::tail(i, name.count);
    if (::access(other.c_str(), F_OK) != 0)
      fail(path, "split.count",
           "part " + std::to_string(i) + " of " + std::to_string(name.count) + " is missing: expected " + other +
               "; fetch all parts into one directory");
    auto next = std::make_unique<DiskFile>(other);
    GgufPart parsed = parse_gguf(*next);
    add_part(i, name.count, std::move(next), std::move(parsed));
  }
}

void GgufFile::Impl::add_part(uint64_t number, uint64_t count, std::unique_ptr<DiskFile> file, GgufPart part) {
  const auto check = [&](const char* key, uint64_t expected) {
    const uint64_t found = split_number(*file, part, key);
    if (found != expected)
      fail(file->path(), key,
           "expected " + std::to_string(expected) + ", found " + std::to_string(found) +
               ": the file was renamed or belongs to another model");
  };
  check("split.count", count);
  check("split.no", number - 1);
  for (TensorInfo& t : part.tensors) t.shard = static_cast<uint32_t>(files.size());
  if (number == 1)
    head = std::move(part);
  else
    std::move(part.tensors.begin(), part.tensors.end(), std::back_inserter(head.tensors));
  files.push_back(std::move(file));
  if (number < count) return;
  const uint64_t total = split_number(*files[0], head, "split.tensors.count");
  if (total != head.tensors.size())
    fail(files[0]->path(), "split.tensors.count",
         "expected " + std::to_string(total) + " tensors in all parts, found " + std::to_string(head.tensors.size()));
}

GgufFile::GgufFile(const std::string& path) : impl_(std::make_unique<Impl>()) {
  impl_->path = path;
  impl_->open();
}

GgufFile::~GgufFile() = default;

const std::string& GgufFile::path() const { return impl_->path; }
uint32_t GgufFile::version() const { return impl_->head.version; }
const std::vector<std::pair<std::string, MetaValue>>& GgufFile::metadata() const { return impl_->head.metadata; }
const std::vector<TensorInfo>& GgufFile::tensors() const { return impl_->head.tensors; }

const TensorInfo* GgufFile::find(const std::string& name) const {
  const auto it = impl_->names.find(name);
  return it == impl_->names.end() ? nullptr : &impl_->head.tensors[it->second];
}

const MetaValue* GgufFile::get(const std::string& key) const {
  const auto it = impl_->head.keys.find(key);
  return it == impl_->head.keys.end() ? nullptr : &impl_->head.metadata[it->second].second;
}

uint64_t GgufFile::file_bytes() const {
  uint64_t bytes = 0;
  for (const auto& file : impl_->files) bytes += file->size();
  return bytes;
}

void GgufFile::read(const TensorInfo& t, uint64_t offset, void* dst, size_t n) const {
  if (t.shard >= impl_->files.size() || offset > t.nbytes || n > t.nbytes - offset)
    throw EngineError("read of " + std::to_string(n) + " bytes at " + std::to_string(offset) + " is outside tensor '" +
                      t.name + "' of " + std::to_string(t.nbytes) + " bytes");
  impl_->files[t.shard]->read(t.offset + offset, dst, n, "tensor '" + printable(t.name) + "'");
}

void GgufFile::dequantize(const TensorInfo& t, float* dst) const {
  const DTypeInfo& type = dtype_info(t.type);
  const size_t blocks = t.nbytes / type.bytes, most = kDequantizeChunk / type.bytes;
  std::vector<uint8_t> raw(std::min(blocks, most) * type.bytes);
  for (size_t at = 0; at < blocks;) {
    const size_t n = std::min(most, blocks - at);
    read(t, uint64_t{at} * type.bytes, raw.data(), n * type.bytes);
    edgert::dequantize(t.type, raw.data(), dst + at * type.block, n * type.block);
    at += n;
  }
}

void GgufFile::prefetch(const TensorInfo& t) const { impl_->files[t.shard]->prefetch(t.offset, t.nbytes); }

}  // namespace edgert
