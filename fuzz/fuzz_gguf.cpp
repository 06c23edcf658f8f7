// libFuzzer target: any bytes as a GGUF file. Opening may only succeed or throw one of the two errors
// of the reader; what it accepts must lie inside the file and be readable and decodable to the end.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "error.h"
#include "gguf.h"

using namespace edgert;

namespace {

void require(bool holds) {
  if (!holds) std::abort();
}

void read_everything(const std::string& path, uint64_t size) {
  const GgufFile file(path);
  require(file.file_bytes() == size);
  for (const auto& [key, value] : file.metadata()) require(file.get(key) == &value);
  std::vector<float> values;
  for (const TensorInfo& t : file.tensors()) {
    require(file.find(t.name) == &t);
    require(t.nbytes <= size && t.offset <= size - t.nbytes);
    values.resize(t.dims[0] * t.rows());
    require(values.size() / dtype_info(t.type).block * dtype_info(t.type).bytes == t.nbytes);
    file.dequantize(t, values.data());
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const int fd = memfd_create("gguf", 0);
  static const std::string path = "/proc/self/fd/" + std::to_string(fd);
  require(fd >= 0 && ftruncate(fd, 0) == 0);
  require(pwrite(fd, data, size, 0) == static_cast<ssize_t>(size));
  try {
    read_everything(path, size);
  } catch (const ModelFileError& e) {
    // The place is in the file, or -1 for what is no place.
    require(e.offset >= -1 && e.offset <= static_cast<int64_t>(size) && !e.field.empty());
  } catch (const UnsupportedModelError&) {
  }
  return 0;
}
