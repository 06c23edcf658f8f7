// C++ errors of the core become the exceptions of edgert.errors, with their attributes.
#include "../error.h"
#include "bind.h"

namespace nb = nanobind;

namespace {

// Messages may quote a path, whose bytes need not be UTF-8.
nb::object text(const std::string& s) {
  return nb::steal(PyUnicode_DecodeUTF8(s.data(), static_cast<Py_ssize_t>(s.size()), "surrogateescape"));
}

nb::object error_class(const char* name) { return nb::module_::import_("edgert.errors").attr(name); }

void raise(const char* name, const std::exception& e) {
  const nb::object type = error_class(name);
  PyErr_SetObject(type.ptr(), type(text(e.what())).ptr());
}

}  // namespace

void bind_errors(nb::module_&) {
  nb::register_exception_translator([](const std::exception_ptr& p, void*) {
    try {
      std::rethrow_exception(p);
    } catch (const edgert::ModelFileError& e) {
      const nb::object type = error_class("ModelFileError");
      PyErr_SetObject(type.ptr(), type(text(e.what()), text(e.path), e.offset, text(e.field)).ptr());
    } catch (const edgert::UnsupportedModelError& e) {
      raise("UnsupportedModelError", e);
    } catch (const edgert::EngineError& e) {
      raise("EngineError", e);
    }
  });
}
