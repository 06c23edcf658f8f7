// GgufFile and TensorInfo for Python. Metadata becomes Python objects only when it is asked for:
// a vocabulary of 262,144 tokens costs tens of milliseconds and many megabytes.
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <concepts>
#include <memory>

#include "../error.h"
#include "../gguf.h"
#include "bind.h"

namespace nb = nanobind;
using edgert::GgufFile;
using edgert::MetaValue;
using edgert::TensorInfo;

namespace {

// A new reference, or throws the Python error that is set.
nb::object owned(PyObject* p) {
  if (!p) throw nb::python_error();
  return nb::steal(p);
}

template <std::unsigned_integral T>
PyObject* raw(T v) {
  return PyLong_FromUnsignedLongLong(v);
}
template <std::signed_integral T>
PyObject* raw(T v) {
  return PyLong_FromLongLong(v);
}
PyObject* raw(double v) { return PyFloat_FromDouble(v); }
PyObject* raw(float v) { return PyFloat_FromDouble(double{v}); }
PyObject* raw(bool v) { return PyBool_FromLong(v); }
// Strings are UTF-8 by the specification; bytes that are not survive as lone surrogates.
PyObject* raw(const std::string& v) {
  return PyUnicode_DecodeUTF8(v.data(), static_cast<Py_ssize_t>(v.size()), "surrogateescape");
}
PyObject* raw(const MetaValue& v);

template <class T>
PyObject* raw(const std::vector<T>& items) {
  nb::object list = owned(PyList_New(static_cast<Py_ssize_t>(items.size())));
  for (size_t i = 0; i < items.size(); ++i)
    PyList_SetItem(list.ptr(), static_cast<Py_ssize_t>(i), owned(raw(items[i])).release().ptr());
  return list.release().ptr();
}

PyObject* raw(const MetaValue& value) {
  return std::visit([](const auto& v) { return raw(v); }, value.v);
}

// The dictionary of all metadata, made at the first call and kept in the Python object.
nb::object metadata(nb::handle self) {
  nb::object cached = nb::getattr(self, "_metadata", nb::none());
  if (!cached.is_none()) return cached;
  nb::dict all;
  for (const auto& [key, value] : nb::cast<const GgufFile&>(self).metadata()) all[owned(raw(key))] = owned(raw(value));
  nb::setattr(self, "_metadata", all);
  return all;
}

const TensorInfo& tensor(const GgufFile& file, const std::string& name) {
  const TensorInfo* t = file.find(name);
  if (!t)
    throw edgert::ModelFileError(file.path(), -1, name, file.path() + ": there is no tensor '" + name + "' in the file");
  return *t;
}

nb::object shape(const TensorInfo& t) {
  nb::list dims;
  for (auto d = t.dims.rbegin(); d != t.dims.rend(); ++d) dims.append(*d);
  return nb::tuple(dims);
}

nb::object read_tensor(const GgufFile& file, const std::string& name) {
  const TensorInfo& t = tensor(file, name);
  nb::object bytes = owned(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(t.nbytes)));
  char* data = PyBytes_AsString(bytes.ptr());
  nb::gil_scoped_release unlocked;  // nobody else has seen the object yet
  file.read(t, 0, data, t.nbytes);
  return bytes;
}

nb::object dequantize_tensor(const GgufFile& file, const std::string& name) {
  const TensorInfo& t = tensor(file, name);
  const std::vector<size_t> dims(t.dims.rbegin(), t.dims.rend());
  size_t n = 1;
  for (const size_t d : dims) n *= d;
  std::unique_ptr<float[]> data(new float[n]);
  {
    nb::gil_scoped_release unlocked;
    file.dequantize(t, data.get());
  }
  float* p = data.get();
  nb::capsule owner(data.release(), [](void* q) noexcept { delete[] static_cast<float*>(q); });
  return nb::cast(nb::ndarray<nb::numpy, float>(p, dims.size(), dims.data(), owner));
}

void construct(GgufFile* self, nb::object path) {
  PyObject* encoded = nullptr;  // bytes in the encoding of the file system
  if (!PyUnicode_FSConverter(path.ptr(), &encoded)) throw nb::python_error();
  const nb::object bytes = nb::steal(encoded);
  const std::string name(PyBytes_AsString(encoded), static_cast<size_t>(PyBytes_Size(encoded)));
  nb::gil_scoped_release unlocked;
  new (self) GgufFile(name);
}

nb::object path(const GgufFile& file) {
  const std::string& p = file.path();
  return owned(PyUnicode_DecodeFSDefaultAndSize(p.data(), static_cast<Py_ssize_t>(p.size())));
}

nb::list keys(const GgufFile& file) {
  nb::list all;
  for (const auto& entry : file.metadata()) all.append(owned(raw(entry.first)));
  return all;
}

nb::object get(const GgufFile& file, const std::string& key, nb::object fallback) {
  const MetaValue* v = file.get(key);
  return v ? owned(raw(*v)) : fallback;
}

nb::list tensors(const GgufFile& file) {
  nb::list all;
  for (const TensorInfo& t : file.tensors()) all.append(nb::cast(t));
  return all;
}

const char* type_name(const TensorInfo& t) { return edgert::dtype_info(t.type).name; }

nb::object repr(const TensorInfo& t) {
  return nb::str("TensorInfo({!r}, {}, {})").format(t.name, type_name(t), shape(t));
}

// Elements of a metadata array, 0 for anything else.
size_t count(const GgufFile& f, const std::string& key) {
  const MetaValue* value = f.get(key);
  if (!value) return 0;
  return std::visit(
      [](const auto& v) -> size_t {
        using V = std::decay_t<decltype(v)>;
        if constexpr (std::is_arithmetic_v<V> || std::is_same_v<V, std::string>)
          return 0;
        else
          return v.size();
      },
      value->v);
}

}  // namespace

void bind_gguf(nb::module_& m) {
  nb::class_<TensorInfo>(m, "TensorInfo", "Where a tensor lies in the file and how it is stored.")
      .def_ro("name", &TensorInfo::name)
      .def_prop_ro("type", type_name, nb::sig("def type(self) -> str"), "For example 'Q4_1'.")
      .def_prop_ro("shape", shape, nb::sig("def shape(self) -> tuple[int, ...]"), "Outermost dimension first.")
      .def_ro("nbytes", &TensorInfo::nbytes)
      .def_ro("offset", &TensorInfo::offset, "Byte where the data starts in the file `shard`.")
      .def_ro("shard", &TensorInfo::shard, "Part of a split model, from 0.")
      .def("__repr__", repr, nb::sig("def __repr__(self) -> str"));

  nb::class_<GgufFile>(m, "GgufFile", nb::dynamic_attr(), "An open GGUF model, single or split, version 2 or 3.")
      .def("__init__", construct, nb::arg("path"),
           nb::sig("def __init__(self, path: str | os.PathLike[str]) -> None"),
           "Raises ModelFileError, or UnsupportedModelError for a tensor type that is not implemented.")
      .def_prop_ro("path", path, nb::sig("def path(self) -> str"))
      .def_prop_ro("version", &GgufFile::version)
      .def_prop_ro("file_bytes", &GgufFile::file_bytes, "Size of the file, or of all parts together.")
      .def_prop_ro("metadata", metadata, nb::sig("def metadata(self) -> dict[str, typing.Any]"),
                   "All metadata in the order of the file; converted once, always the same dict.")
      .def_prop_ro("metadata_keys", keys, nb::sig("def metadata_keys(self) -> list[str]"))
      .def("get", get, nb::arg("key"), nb::arg("default") = nb::none(),
           nb::sig("def get(self, key: str, default: typing.Any = None) -> typing.Any"),
           "One metadata value; converts only that one.")
      .def("count", count, nb::arg("key"), nb::sig("def count(self, key: str) -> int"),
           "Elements of a metadata array, 0 for anything else; converts nothing.")
      .def_prop_ro("tensors", tensors, nb::sig("def tensors(self) -> list[TensorInfo]"), "In the order of the file.")
      .def("read", read_tensor, nb::arg("name"), nb::sig("def read(self, name: str) -> bytes"),
           "The stored bytes of a tensor. Raises ModelFileError if there is none of this name.")
      .def("dequantize", dequantize_tensor, nb::arg("name"),
           nb::sig("def dequantize(self, name: str) -> numpy.typing.NDArray[numpy.float32]"),
           "The tensor as float32 in its shape, bit for bit what gguf.quants.dequantize gives.");
}
