#include "bind.h"

void bind_probe(nanobind::module_&) {}
