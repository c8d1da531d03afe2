// What the runtime remembers between launches.
#pragma once

#include <cstddef>

#include "order.h"

namespace emulator::runtime {

// As set for the kernel by cudaFuncSetAttribute, else what every kernel may use.
size_t max_dynamic_bytes(const void* kernel);

void record_launch(const void* kernel);

// Turns of the order that emulator_set_order chose, from their beginning.
Turns new_turns();

}  // namespace emulator::runtime
