// One function a binding file; module.cpp calls them all.
#pragma once
#include <nanobind/nanobind.h>

#include <optional>
#include <string>

#include "kernels.h"
#include "kv.h"
#include "page_store.h"
#include "spec.h"

// The type named "f16" or "q8". Throws EngineError.
edgert::KvType to_kv_type(const std::string& name);

// ModelSpec.as_dict().
edgert::ModelSpec to_spec(nanobind::dict d);

nanobind::dict store_stats(const edgert::PageStore& s);
std::optional<nanobind::dict> tier_stats(const edgert::KvCache& c);  // nothing without a tier

void bind_errors(nanobind::module_& m);
void bind_gguf(nanobind::module_& m);
void bind_sampler(nanobind::module_& m);
void bind_engine(nanobind::module_& m);
void bind_probe(nanobind::module_& m);
void bind_store(nanobind::module_& m);
void bind_slots(nanobind::module_& m);
