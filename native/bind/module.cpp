// edgert._native: the thin Python face of the core.
#include "bind.h"

namespace nb = nanobind;

NB_MODULE(_native, m) {
  m.doc() = "edgert's native core";
  bind_errors(m);
  bind_gguf(m);
  bind_sampler(m);
  bind_engine(m);
  bind_probe(m);
  bind_store(m);
  bind_slots(m);
}
