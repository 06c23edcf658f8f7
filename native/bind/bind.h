// One function a binding file; module.cpp calls them all.
#pragma once
#include <nanobind/nanobind.h>

void bind_errors(nanobind::module_& m);
void bind_gguf(nanobind::module_& m);
void bind_sampler(nanobind::module_& m);
void bind_engine(nanobind::module_& m);
void bind_probe(nanobind::module_& m);
