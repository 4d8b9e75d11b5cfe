// Entry points of the host kernels: check a command, send it down the best path that this CPU has. See command.py.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#define HAS_X86 1
#include <immintrin.h>
#endif

#include "command.h"

#define INLINE inline __attribute__((always_inline))

namespace {

namespace plain {
#include "path.h"
}

#if defined(HAS_X86)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
#define LANES_AVX2
namespace avx2 {
#include "path.h"
}
#undef LANES_AVX2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define LANES_AVX512
namespace avx512 {
#include "path.h"
}
#undef LANES_AVX512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

struct Path {
  const char* name;
  bool (*is_supported)();
  void (*execute)(char*, const Command&, uint64_t, uint64_t);
  void (*decode)(bool, const char*, const float*, float*, uint64_t);
  void (*encode)(bool, const float*, char*, float*, uint64_t);
};

const Path paths[] = {
#if defined(HAS_X86)
    {"avx512",
     [] {
       __builtin_cpu_init();
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     },
     avx512::execute, avx512::decode_states, avx512::encode_states},
    {"avx2",
     [] {
       __builtin_cpu_init();
       return bool(__builtin_cpu_supports("avx2"));
     },
     avx2::execute, avx2::decode_states, avx2::encode_states},
#endif
    {"plain", [] { return true; }, plain::execute, plain::decode_states, plain::encode_states},
};

const Path* best_path() {
  const Path* path = paths;
  while (!path->is_supported()) path++;
  return path;
}

std::atomic<const Path*> path{best_path()};

bool is_fp64(const Command& c) { return c.parameter_kind == IN_PLACE_FP64; }

// Ranges of int8 states are whole blocks, but for where the command ends.
bool cuts_a_block(const Command& c, uint64_t first, uint64_t last) {
  return c.states == STATES_INT8 && (first % BLOCK_NUMEL || (last % BLOCK_NUMEL && last != c.last));
}

bool is_known(const Command& c) {
  switch (c.op) {
    case FILL: return true;
    case NORM: return c.gradient_dtype <= FP64;
    case ACCUMULATE: return c.gradient_dtype <= FP64 && is_fp64(c) == (c.gradient_dtype == FP64);
    case STEP:
    case PREPARE:
      if (c.rule < ADAM || c.rule > LAMB || (c.op == PREPARE && c.rule != LAMB)) return false;
      if (c.parameter_kind > MASTER_FP16 || c.states > STATES_INT8 || c.gradient_dtype > FP64) return false;
      return is_fp64(c) == (c.gradient_dtype == FP64) && !(is_fp64(c) && c.states != STATES_FP32);
  }
  return false;
}

}  // namespace

extern "C" {

size_t zl_command_bytes() { return sizeof(Command); }

const char* zl_path() { return path.load()->name; }

// 0, or 1 where this CPU lacks the path.
int zl_use(const char* name) {
  for (const Path& each : paths) {
    if (strcmp(each.name, name) == 0 && each.is_supported()) {
      path = &each;
      return 0;
    }
  }
  return 1;
}

// 0; 1: no such operation; 2: the states lie in a file; 3: a range that cuts a block of int8 states. Nothing is
// written unless the answer is 0.
int zl_execute(char* base, const Command* command, uint64_t first, uint64_t last) {
  const Command& c = *command;
  if (!is_known(c)) return 1;
  if (first < c.first) first = c.first;
  if (last > c.last) last = c.last;
  if (first >= last) return 0;
  if (c.op == FILL) {
    memset(base + c.gradient + first, 0, last - first);
    return 0;
  }
  if (c.op == STEP || c.op == PREPARE) {
    if (c.file) return 2;
    if (cuts_a_block(c, first, last)) return 3;
  }
  path.load()->execute(base, c, first, last);
  return 0;
}

// int8 states to and from fp32, `numel` elements from a block's start; encoding rounds to nearest.
void zl_decode_exp_avg(const char* codes, const float* scales, float* to, uint64_t numel) {
  path.load()->decode(false, codes, scales, to, numel);
}

void zl_decode_exp_avg_sq(const char* codes, const float* scales, float* to, uint64_t numel) {
  path.load()->decode(true, codes, scales, to, numel);
}

void zl_encode_exp_avg(const float* from, char* codes, float* scales, uint64_t numel) {
  path.load()->encode(false, from, codes, scales, numel);
}

void zl_encode_exp_avg_sq(const float* from, char* codes, float* scales, uint64_t numel) {
  path.load()->encode(true, from, codes, scales, numel);
}
}
