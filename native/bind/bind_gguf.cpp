#include "bind.h"

void bind_gguf(nanobind::module_&) {}
