// How fast memory lets an optimizer step be: the streams that each step reads and writes in place, and next to no
// arithmetic. A block of elements at a time, each stream as words of 64 bits, so that no conversion costs anything.
// cpu_optimizer.py builds this with the system compiler and times it beside every sample.

#include <stddef.h>
#include <stdint.h>

enum { BLOCK = 32 };  // elements

typedef uint64_t word;

#define WORDS(bytes) (BLOCK * (bytes) / 8)

// Add the block's gradient, over and over, to a stream of `bytes` an element; read and written in place.
#define UPDATE(stream, bytes) \
  for (int w = 0; w < WORDS(bytes); w++) ((word*)(stream))[WORDS(bytes) * block + w] += g[w % WORDS(2)]
#define WRITE(stream, bytes) \
  for (int w = 0; w < WORDS(bytes); w++) ((word*)(stream))[WORDS(bytes) * block + w] = g[w % WORDS(2)]
#define READ(stream, bytes) \
  for (int w = 0; w < WORDS(bytes); w++) seen[w % WORDS(2)] += ((const word*)(stream))[WORDS(bytes) * block + w]

#define CEILING(name, ...)                                                                                           \
  void name(const word* restrict gradient, word* restrict parameter, word* restrict master, word* restrict exp_avg,  \
            word* restrict exp_avg_sq, size_t numel) {                                                               \
    for (size_t block = 0; block < numel / BLOCK; block++) {                                                         \
      const word* restrict g = gradient + WORDS(2) * block;                                                          \
      __VA_ARGS__;                                                                                                   \
    }                                                                                                                \
  }

// bf16 gradient, fp32 master, bf16 copy: 2 read, 12 read and written, 2 written
CEILING(master_fp32, UPDATE(master, 4); UPDATE(exp_avg, 4); UPDATE(exp_avg_sq, 4); WRITE(parameter, 2))
CEILING(split_fp32, UPDATE(parameter, 2); UPDATE(master, 2); UPDATE(exp_avg, 4); UPDATE(exp_avg_sq, 4))
CEILING(split_bf16, UPDATE(parameter, 2); UPDATE(master, 2); UPDATE(exp_avg, 2); UPDATE(exp_avg_sq, 2))
CEILING(split_int8, UPDATE(parameter, 2); UPDATE(master, 2); UPDATE(exp_avg, 1); UPDATE(exp_avg_sq, 1))
CEILING(lion_master_fp32, UPDATE(master, 4); UPDATE(exp_avg, 4); WRITE(parameter, 2))
CEILING(lion_split_fp32, UPDATE(parameter, 2); UPDATE(master, 2); UPDATE(exp_avg, 4))
CEILING(lion_split_int8, UPDATE(parameter, 2); UPDATE(master, 2); UPDATE(exp_avg, 1))
