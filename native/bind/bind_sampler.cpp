#include "bind.h"

void bind_sampler(nanobind::module_&) {}
