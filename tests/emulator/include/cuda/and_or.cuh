// Host twin of and_or.cuh.
#pragma once

#include <cstdint>

namespace mistral_kernels::cuda {

inline uint32_t and_or(uint32_t word, uint32_t mask, uint32_t bits) { return (word & mask) | bits; }

}  // namespace mistral_kernels::cuda
