// One function a binding file; module.cpp calls them all.
#pragma once
#include <nanobind/nanobind.h>

#include <string>

#include "kernels.h"
#include "page_store.h"

// The type named "f16" or "q8". Throws EngineError.
edgert::KvType to_kv_type(const std::string& name);

nanobind::dict store_stats(const edgert::PageStore& s);

void bind_errors(nanobind::module_& m);
void bind_gguf(nanobind::module_& m);
void bind_sampler(nanobind::module_& m);
void bind_engine(nanobind::module_& m);
void bind_probe(nanobind::module_& m);
void bind_store(nanobind::module_& m);
