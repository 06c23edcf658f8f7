// Reader for GGUF v2 and v3 files, single or split. Everything a file says is checked against the
// file's size before it is believed; nothing is allocated that the file's size does not justify.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <variant>
#include <vector>

#include "dtype.h"

namespace edgert {

struct TensorInfo {
  std::string name;
  DType type;
  std::vector<uint64_t> dims;  // GGUF order: dims[0] is contiguous in memory
  uint32_t shard;              // which file of a split model
  uint64_t offset;             // absolute byte offset in that file
  uint64_t nbytes;

  uint64_t rows() const;       // product of dims[1..]
};

struct MetaValue;
using MetaArray = std::vector<MetaValue>;
// Scalars keep their width class: unsigned, signed, float, bool, string. Arrays keep their element
// type, so that what a header takes in memory stays near what it takes in the file.
struct MetaValue {
  std::variant<uint64_t, int64_t, double, bool, std::string, std::vector<uint8_t>, std::vector<int8_t>,
               std::vector<uint16_t>, std::vector<int16_t>, std::vector<uint32_t>, std::vector<int32_t>,
               std::vector<uint64_t>, std::vector<int64_t>, std::vector<float>, std::vector<double>,
               std::vector<bool>, std::vector<std::string>, MetaArray>
      v;
};

class GgufFile {
 public:
  // Opens `path` and, if it is part of a split model, every other part; the metadata is then that
  // of the first part. Throws ModelFileError, or UnsupportedModelError for an unknown tensor type.
  explicit GgufFile(const std::string& path);
  ~GgufFile();
  GgufFile(const GgufFile&) = delete;
  GgufFile& operator=(const GgufFile&) = delete;

  const std::string& path() const;
  uint32_t version() const;
  const std::vector<std::pair<std::string, MetaValue>>& metadata() const;  // file order
  const std::vector<TensorInfo>& tensors() const;                           // file order
  const TensorInfo* find(const std::string& name) const;                    // nullptr if absent
  const MetaValue* get(const std::string& key) const;                       // nullptr if absent
  uint64_t file_bytes() const;                                              // all parts together

  // Reads `n` bytes of a tensor starting `offset` bytes into it. Throws ModelFileError when the
  // file became shorter since it was opened or the disk fails. Safe from several threads.
  void read(const TensorInfo& t, uint64_t offset, void* dst, size_t n) const;
  // The whole tensor as float32, `dims` product many.
  void dequantize(const TensorInfo& t, float* dst) const;
  // Tells the OS that the file's cached pages of a tensor are needed soon (no-op where absent).
  void prefetch(const TensorInfo& t) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace edgert
