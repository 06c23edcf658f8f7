// Parser for the header of one GGUF file: metadata, tensor table, layout of the data.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "disk_file.h"
#include "gguf.h"

namespace edgert {

struct GgufPart {
  uint32_t version;
  std::vector<std::pair<std::string, MetaValue>> metadata;
  std::unordered_map<std::string, size_t> keys;  // index into metadata
  std::vector<TensorInfo> tensors;               // shard is 0
};

// Throws ModelFileError, or UnsupportedModelError for a tensor type the core does not know.
GgufPart parse_gguf(const DiskFile& file);

// Text from a file made fit for a message: bytes outside printable ASCII escaped, cut at 80.
std::string printable(std::string_view text);

}  // namespace edgert
