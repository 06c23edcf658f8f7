#include "bind.h"

void bind_engine(nanobind::module_&) {}
