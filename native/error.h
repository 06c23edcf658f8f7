// Errors of the core. The core throws these and never aborts or prints; the binding turns each
// into the Python exception of the same name.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace edgert {

// A model file that cannot be used. `offset` is the byte in the file where reading stopped
// (-1: not tied to a place), `field` what was being read.
class ModelFileError : public std::runtime_error {
 public:
  ModelFileError(std::string path, int64_t offset, std::string field, const std::string& what)
      : std::runtime_error(what), path(std::move(path)), offset(offset), field(std::move(field)) {}
  std::string path;
  int64_t offset;
  std::string field;
};

// The model is well formed but the core has no implementation of something in it.
class UnsupportedModelError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The engine was asked for something it cannot do (a position past the cache, a bad option).
class EngineError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace edgert
