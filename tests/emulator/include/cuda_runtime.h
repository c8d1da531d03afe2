// Host twin of CUDA's cuda_runtime.h: .cu files compiled by g++ find this one first.
//
// Types and the runtime's declarations are the toolkit's own; launches, built-in variables,
// barriers and shuffles go to the fibers of emulator.h.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <algorithm>
#include <cmath>

#include "emulator.h"

// One address for all blocks, in a section that the linker gathers (shared_memory.ld): the emulator
// swaps its contents with the block. GCC's `noinit` names the section even within templates, which
// `section` does not. `extern __shared__` has no such form: see cuda/dynamic_shared.cuh.
#undef __shared__
#define __shared__ static __attribute__((noinit))
#undef __launch_bounds__
#define __launch_bounds__(...)

// Built-in variables of the thread that runs.
using emulator::blockDim;
using emulator::blockIdx;
using emulator::gridDim;
using emulator::threadIdx;

inline void __syncthreads() { emulator::sync_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::sync_warp(mask); }

// Every lane of `mask` calls a shuffle together; lanes stay within groups of `width`.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return emulator::exchange(mask, value, emulator::lane() / width * width + source % width);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int source = emulator::lane() ^ lane_mask;
  const bool inside = source / width <= emulator::lane() / width;
  return emulator::exchange(mask, value, inside ? source : emulator::lane());
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int source = emulator::lane() + static_cast<int>(delta);
  const bool inside = source / width == emulator::lane() / width;
  return emulator::exchange(mask, value, inside ? source : emulator::lane());
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int source = emulator::lane() - static_cast<int>(delta);
  const bool inside = source >= emulator::lane() / width * width;
  return emulator::exchange(mask, value, inside ? source : emulator::lane());
}

// The lanes of `mask` whose `predicate` is not 0.
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned votes = 0;
  emulator::collective(mask, &predicate, &votes, [](const emulator::Lane* lanes, unsigned members) {
    unsigned found = 0;
    for (int lane = 0; lane < 32; ++lane) {
      const auto* vote = static_cast<const int*>(lanes[lane].input);
      if (vote && *vote) found |= 1u << lane;
    }
    for (int lane = 0; lane < 32; ++lane) {
      if (members >> lane & 1u) *static_cast<unsigned*>(lanes[lane].output) = found;
    }
  });
  return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}

// Atomics are atomic as they are: threads switch only in `yield` and at barriers.
template <typename T>
T atomicAdd(T* address, T value) {
  emulator::yield();
  const T before = *address;
  *address = before + value;
  return before;
}

template <typename T>
T atomicMax(T* address, T value) {
  emulator::yield();
  const T before = *address;
  *address = before < value ? value : before;
  return before;
}

inline unsigned atomicInc(unsigned* address, unsigned limit) {
  emulator::yield();
  const unsigned before = *address;
  *address = before >= limit ? 0 : before + 1;
  return before;
}

inline void __threadfence() { emulator::yield(); }

// Loads by way of one cache or another: memory has none here.
template <typename T>
T __ldcg(const T* from) {
  emulator::yield();
  return *from;
}
template <typename T>
T __ldg(const T* from) {
  return *from;
}

using std::max;
using std::min;

// Four of the eight bytes of x and y: each digit of `selector` names one, 0 to 3 are those of x.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned byte = bytes >> 8 * (selector >> 4 * i & 7u) & 0xffu;
    result |= byte << 8 * i;
  }
  return result;
}

// The position of the lowest bit that is set, counted from 1; 0 for none.
inline int __ffs(int value) { return __builtin_ffs(value); }

inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  return emulator::run_grid(*config, reinterpret_cast<const void*>(kernel),
                            [&] { kernel(static_cast<Params>(args)...); });
}

template <typename... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute name, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), name, value);
}
