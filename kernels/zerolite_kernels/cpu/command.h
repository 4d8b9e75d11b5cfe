// One command to the host kernels; the mirror of command.py beside it, where every field is explained.
#pragma once

#include <cstdint>

enum Op : uint32_t { STEP = 1, PREPARE = 2, ACCUMULATE = 3, NORM = 4, FILL = 5 };
enum Rule : uint32_t { ADAM = 1, ADAMW = 2, LION = 3, LAMB = 4 };
enum States : uint32_t { STATES_FP32 = 0, STATES_BF16 = 1, STATES_INT8 = 2 };
enum Dtype : uint32_t { FP32 = 0, BF16 = 1, FP16 = 2, FP64 = 3 };
enum ParameterKind : uint32_t {
  IN_PLACE_FP32 = 0,
  IN_PLACE_FP64 = 1,
  SPLIT_BF16 = 2,
  MASTER_BF16 = 3,
  MASTER_FP16 = 4
};
enum Flag : uint32_t { STORE = 1 };

constexpr uint64_t BLOCK_NUMEL = 128;     // elements that share one scale in int8 states
constexpr uint64_t PARTIAL_NUMEL = 4096;  // elements that share one partial sum

struct Command {
  uint32_t op, rule, states, gradient_dtype, parameter_kind, flags;
  uint64_t numel, first, last;
  uint64_t gradient, parameter, master;
  uint64_t exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale;
  uint64_t result;
  uint64_t seed, position;
  double multiplier, lr, beta1, beta2, eps, weight_decay, bias_correction1, bias_correction2_sqrt, trust_ratio;
  uint64_t file;
};

static_assert(sizeof(Command) == 208, "command.py asserts the same size");
