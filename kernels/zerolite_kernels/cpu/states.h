// The kinds of states: each loads and stores W elements at i of a block, in fp32 (or fp64), and finishes the block.

// Room for a block's states in fp32, where they cannot be stored as soon as they are known.
struct Scratch {
  alignas(64) float exp_avg[BLOCK_NUMEL];
  alignas(64) float exp_avg_sq[BLOCK_NUMEL];
};

template <class V, class T, bool HAS_SQUARE>
struct Plain {
  T *exp_avg, *exp_avg_sq;
  Plain(const Region& region, uint64_t start, Scratch&)
      : exp_avg(region.at<T>(EXP_AVG, start)), exp_avg_sq(region.at<T>(EXP_AVG_SQ, start)) {}
  INLINE void load(uint64_t i, V& m, V& v) const {
    m = read<V>(exp_avg + i);
    if (HAS_SQUARE) v = read<V>(exp_avg_sq + i);
  }
  INLINE void store(uint64_t i, V m, V v) const {
    write(exp_avg + i, m);
    if (HAS_SQUARE) write(exp_avg_sq + i, v);
  }
  INLINE void finish() const {}
};

template <bool HAS_SQUARE>
struct Bf16 {
  bf16 *exp_avg, *exp_avg_sq;
  Words counter;
  Bf16(const Region& region, uint64_t start, Scratch&)
      : exp_avg(region.at<bf16>(EXP_AVG, start)),
        exp_avg_sq(region.at<bf16>(EXP_AVG_SQ, start)),
        counter(region.draw_of(start)) {}
  INLINE void load(uint64_t i, Floats& m, Floats& v) const {
    m = widen(exp_avg + i);
    if (HAS_SQUARE) v = widen(exp_avg_sq + i);
  }
  INLINE void store(uint64_t i, Floats m, Floats v) const {
    Words noise = hash(counter + uint32_t(i));
    write_16(exp_avg + i, stochastic_bf16(m, noise & 0xFFFF));
    if (HAS_SQUARE) write_16(exp_avg_sq + i, stochastic_bf16(v, noise >> 16));
  }
  INLINE void finish() const {}
};

// [Note: int8 states]
// A block shares one step, a power of two (as in the OCP Microscaling formats), kept as fp32.
// Momentum: code * step, codes -127 to 127, the largest of a block at least 64.
// Variance: step * (1 + code % 16 / 16) * 2^(code / 16), a minifloat of four bits each of exponent and mantissa, the
// largest in its upper octave. Code 0 stands for `step` and not for 0, since a variance of 0 would make a step endless;
// 16 octaves of the variance are 8 of its root, and its relative precision is the same in all of them.
// All zero bytes are a zero state. A block that holds Inf or NaN has a step of NaN, and reads as NaN.
// In both, what is read from codes gives the same codes and step back, so a checkpoint in fp32 keeps every bit.
// Rounding is stochastic while training: a variance moves by a thousandth a step, which nearest rounding would swallow.

// [Note: rounding by addition]
// 1536 + code + noise, for a code of magnitude up to 127 and a noise in [0, 1), lies in [1024, 2048): the upper 10 bits
// of its mantissa are the rounded code + 512, the lowest 8 of those are the code. In the same way noise that is added
// below the bits that a minifloat keeps carries into them. The momentum takes 13 bits of a draw, the variance 19.

inline Floats decode_exp_avg(const int8_t* codes, float step) { return to_floats(Ints(read_s8(codes))) * step; }

inline Floats decode_exp_avg_sq(const uint8_t* codes, float step) {
  return Floats((read_u8(codes) << 19) + to_bits(step));
}

inline Words magnitude(Floats x) { return Words(x) & ~SIGN; }  // orders as |x| does, NaN above Inf

struct ExpAvgCode {
  float step = 0, limit;
  uint32_t shift;  // bits of 1536 steps
  explicit ExpAvgCode(uint32_t largest) {
    uint32_t exponent = largest >> 23;
    exponent = exponent < 240 ? exponent : 240;  // 1536 steps must be finite: what lies beyond 2^114 is cut
    if (exponent > 6 && largest < INFINITE) step = from_bits((exponent - 6) << 23);  // below 2^-120 is 0
    limit = 127 * step;
    shift = to_bits(1536 * (step > 0 ? step : 1));
    if (largest >= INFINITE) step = from_bits(NOT_A_NUMBER);
  }
  void store(int8_t* codes, Floats x, Words noise) const {
    x = min(max(x, Floats{} - limit), Floats{} + limit);
    write_8(codes, Words(x + Floats((noise & 0x1FFF) | shift)) >> 13);
  }
};

struct ExpAvgSqCode {
  float step;
  uint32_t zero;  // what code 0 has in place of a code
  explicit ExpAvgSqCode(uint32_t largest) {
    uint32_t exponent = largest >> 23;
    uint32_t base = ((exponent > 16 ? exponent : 16) - 15) << 23;  // at least 2^-126, the smallest normal number
    step = from_bits(largest ? base : 0);
    zero = to_bits(step) >> 19;
    if (largest >= INFINITE) step = from_bits(NOT_A_NUMBER), zero = 1 << 13;  // above all numbers: the codes are 0
  }
  void store(uint8_t* codes, Floats x, Words noise) const {
    write_8_capped(codes, max(Ints(((Words(x) + (noise >> 13)) >> 19) - zero), Ints{}));
  }
};

template <bool HAS_SQUARE>
struct Int8 {
  int8_t* exp_avg;
  uint8_t* exp_avg_sq;
  float *exp_avg_scale, *exp_avg_sq_scale;
  Words counter;
  Words largest_exp_avg = {}, largest_exp_avg_sq = {};
  float *exp_avgs, *exp_avg_sqs;  // what is to be encoded once the block's largest is known

  Int8(const Region& region, uint64_t start, Scratch& scratch)
      : exp_avg(region.at<int8_t>(EXP_AVG, start)),
        exp_avg_sq(region.at<uint8_t>(EXP_AVG_SQ, start)),
        exp_avg_scale(region.exp_avg_scale + start / BLOCK_NUMEL),
        exp_avg_sq_scale(region.exp_avg_sq_scale + start / BLOCK_NUMEL),
        counter(region.draw_of(start)),
        exp_avgs(scratch.exp_avg),
        exp_avg_sqs(scratch.exp_avg_sq) {}

  INLINE void load(uint64_t i, Floats& m, Floats& v) const {
    m = decode_exp_avg(exp_avg + i, *exp_avg_scale);
    if (HAS_SQUARE) v = decode_exp_avg_sq(exp_avg_sq + i, *exp_avg_sq_scale);
  }

  INLINE void store(uint64_t i, Floats m, Floats v) {
    write(exp_avgs + i, m);
    largest_exp_avg = max(largest_exp_avg, magnitude(m));
    if (!HAS_SQUARE) return;
    write(exp_avg_sqs + i, v);
    largest_exp_avg_sq = max(largest_exp_avg_sq, Words(v));
  }

  INLINE void finish() const {
    ExpAvgCode exp_avg_code(largest(largest_exp_avg));
    ExpAvgSqCode exp_avg_sq_code(largest(largest_exp_avg_sq));
    *exp_avg_scale = exp_avg_code.step;
    if (HAS_SQUARE) *exp_avg_sq_scale = exp_avg_sq_code.step;
    for (uint64_t i = 0; i < BLOCK_NUMEL; i += W) {
      Words noise = hash(counter + uint32_t(i));
      exp_avg_code.store(exp_avg + i, read<Floats>(exp_avgs + i), noise);
      if (HAS_SQUARE) exp_avg_sq_code.store(exp_avg_sq + i, read<Floats>(exp_avg_sqs + i), noise);
    }
  }
};

// --- int8 states to and from fp32, for checkpoints; `numel` elements from the start of a block ----------------------

// Noise that is one half in the variance's 19 bits and in the momentum's 13.
constexpr uint32_t NEAREST = 1u << 31 | 1u << 12;

static void decode_states(bool is_square, const char* codes, const float* steps, float* to, uint64_t numel) {
  for (uint64_t begin = 0; begin < numel; begin += BLOCK_NUMEL) {
    uint64_t count = numel - begin < BLOCK_NUMEL ? numel - begin : BLOCK_NUMEL;
    char in[BLOCK_NUMEL] = {};
    float out[BLOCK_NUMEL], step = steps[begin / BLOCK_NUMEL];
    memcpy(in, codes + begin, count);
    for (uint64_t i = 0; i < BLOCK_NUMEL; i += W)
      write(out + i, is_square ? decode_exp_avg_sq((uint8_t*)in + i, step) : decode_exp_avg((int8_t*)in + i, step));
    memcpy(to + begin, out, count * sizeof(float));
  }
}

static void encode_states(bool is_square, const float* from, char* codes, float* steps, uint64_t numel) {
  Words half = Words{} + NEAREST;
  for (uint64_t begin = 0; begin < numel; begin += BLOCK_NUMEL) {
    uint64_t count = numel - begin < BLOCK_NUMEL ? numel - begin : BLOCK_NUMEL;
    float in[BLOCK_NUMEL] = {};
    char out[BLOCK_NUMEL];
    memcpy(in, from + begin, count * sizeof(float));
    Words most = {};
    for (uint64_t i = 0; i < BLOCK_NUMEL; i += W) most = max(most, magnitude(read<Floats>(in + i)));
    ExpAvgCode exp_avg_code(largest(most));
    ExpAvgSqCode exp_avg_sq_code(largest(most));
    for (uint64_t i = 0; i < BLOCK_NUMEL; i += W) {
      Floats x = read<Floats>(in + i);
      is_square ? exp_avg_sq_code.store((uint8_t*)out + i, Floats(magnitude(x)), half)
                : exp_avg_code.store((int8_t*)out + i, x, half);
    }
    steps[begin / BLOCK_NUMEL] = is_square ? exp_avg_sq_code.step : exp_avg_code.step;
    memcpy(codes + begin, out, count);
  }
}
