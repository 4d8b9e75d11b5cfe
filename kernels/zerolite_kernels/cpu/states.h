// The kinds of states: each loads and stores W elements at i of a block as fp32 (or fp64), and finishes the block.
// Included once per instruction set.

template <class V, class T, bool HAS_SQUARE>
struct Plain {
  T *exp_avg, *exp_avg_sq;
  explicit Plain(const Block& block) : exp_avg(block.at<T>(EXP_AVG)), exp_avg_sq(block.at<T>(EXP_AVG_SQ)) {}
  void load(uint64_t i, V& m, V& v) const {
    m = read<V>(exp_avg + i);
    if (HAS_SQUARE) v = read<V>(exp_avg_sq + i);
  }
  void store(uint64_t i, V m, V v) const {
    write(exp_avg + i, m);
    if (HAS_SQUARE) write(exp_avg_sq + i, v);
  }
  void finish() const {}
};

template <bool HAS_SQUARE>
struct Bf16 {
  bf16 *exp_avg, *exp_avg_sq;
  Words counter;
  explicit Bf16(const Block& block)
      : exp_avg(block.at<bf16>(EXP_AVG)), exp_avg_sq(block.at<bf16>(EXP_AVG_SQ)), counter(block.draw + count_up()) {}
  void load(uint64_t i, Floats& m, Floats& v) const {
    m = widen(exp_avg + i);
    if (HAS_SQUARE) v = widen(exp_avg_sq + i);
  }
  void store(uint64_t i, Floats m, Floats v) const {
    Words noise = hash(counter + uint32_t(i));
    write_16(exp_avg + i, stochastic_bf16(m, noise & 0xFFFF));
    if (HAS_SQUARE) write_16(exp_avg_sq + i, stochastic_bf16(v, noise >> 16));
  }
  void finish() const {}
};

// [Note: int8 states]
// Momentum: code * step, codes -127 to 127. The step is the block's largest magnitude / 127, cut to 17 bits of mantissa:
// products with a code are exact then, so the largest, 127 * step, gives the same step back.
// Variance: step * (1 + code % 16 / 16) * 2^(code / 16), a minifloat of four bits each of exponent and mantissa below the
// block's largest (as in the OCP Microscaling formats, but with a scale per 128 and no zero). Code 0 stands for `step`
// and not for 0, since a variance of 0 would make a step endless. 16 octaves of the variance are 8 of its root.
// All zero bytes are a zero state. A block that holds Inf or NaN has a step of NaN, and reads as NaN.
// In both, what is read from codes gives the same codes and step back, so a checkpoint in fp32 keeps every bit.
// Rounding is stochastic while training: a variance moves by a thousandth a step, which nearest rounding would swallow.

// [Note: rounding by addition]
// 384 + code + noise, for a code of magnitude up to 127 and a noise in [0, 1), lies in [256, 512): the upper 8 bits of
// its mantissa are the rounded code + 128. Likewise noise below the kept bits of a minifloat carries into them.

inline Floats decode_exp_avg(const int8_t* codes, float step) { return to_floats(Ints(read_s8(codes))) * step; }

inline Floats decode_exp_avg_sq(const uint8_t* codes, float step) {
  return Floats((read_u8(codes) << 19) + to_bits(step));
}

inline Ints magnitude(Floats x) { return Ints(Words(x) & ~SIGN); }  // orders as |x| does, NaN above Inf

struct ExpAvgCode {
  float step, inverse;
  explicit ExpAvgCode(uint32_t largest) {
    step = largest < INFINITE ? from_bits(to_bits(from_bits(largest) / 127) & ~0x7Fu) : from_bits(NOT_A_NUMBER);
    if (step < 0x1p-107f) step = 0;  // its inverse would overflow; such a momentum moves nothing
    // A little too large, so that the largest element never falls short of 127.
    inverse = step > 0 ? (1 + 0x1p-20f) / step : 0;
  }
  void store(int8_t* codes, Floats x, Words noise) const {
    Floats code = x * inverse;
    code = code > -127 ? code : Floats{} - 127;
    code = code < 127 ? code : Floats{} + 127;
    Words rounded = Words(code + Floats((noise & 0x7FFF) | 0x43C00000));  // see [Note: rounding by addition]
    write_8(codes, (rounded >> 15 & 0xFF) ^ 0x80);
  }
};

struct ExpAvgSqCode {
  uint32_t base;
  int32_t limit = 255;
  explicit ExpAvgSqCode(uint32_t largest) {
    uint32_t exponent = largest >> 23;
    base = ((exponent > 16 ? exponent : 16) - 15) << 23;  // at least 2^-126, the smallest normal number
    if (largest == 0 || largest >= INFINITE) base = largest ? NOT_A_NUMBER : 0, limit = 0;
  }
  float step() const { return from_bits(base); }
  void store(uint8_t* codes, Floats x, Words noise) const {
    Words rounded = (Words(magnitude(x)) + (noise >> 16 << 3)) >> 19;
    Ints code = max(Ints(rounded) - int32_t(base >> 19), Ints{});
    write_8(codes, Words(code < limit ? code : Ints{} + limit));
  }
};

template <bool HAS_SQUARE>
struct Int8 {
  int8_t* exp_avg;
  uint8_t* exp_avg_sq;
  float *exp_avg_scale, *exp_avg_sq_scale;
  Words counter;
  Ints largest_exp_avg = {}, largest_exp_avg_sq = {};
  alignas(64) float exp_avgs[BLOCK_NUMEL];  // what is to be encoded once the block's largest is known
  alignas(64) float exp_avg_sqs[BLOCK_NUMEL];

  explicit Int8(const Block& block)
      : exp_avg(block.at<int8_t>(EXP_AVG)), exp_avg_sq(block.at<uint8_t>(EXP_AVG_SQ)), exp_avg_scale(block.exp_avg_scale),
        exp_avg_sq_scale(block.exp_avg_sq_scale), counter(block.draw + count_up()) {}

  void load(uint64_t i, Floats& m, Floats& v) const {
    m = decode_exp_avg(exp_avg + i, *exp_avg_scale);
    if (HAS_SQUARE) v = decode_exp_avg_sq(exp_avg_sq + i, *exp_avg_sq_scale);
  }

  void store(uint64_t i, Floats m, Floats v) {
    write(exp_avgs + i, m);
    largest_exp_avg = max(largest_exp_avg, magnitude(m));
    if (!HAS_SQUARE) return;
    write(exp_avg_sqs + i, v);
    largest_exp_avg_sq = max(largest_exp_avg_sq, magnitude(v));
  }

  void finish() const {
    ExpAvgCode exp_avg_code(largest(largest_exp_avg));
    ExpAvgSqCode exp_avg_sq_code(largest(largest_exp_avg_sq));
    *exp_avg_scale = exp_avg_code.step;
    if (HAS_SQUARE) *exp_avg_sq_scale = exp_avg_sq_code.step();
    for (uint64_t i = 0; i < BLOCK_NUMEL; i += W) {
      Words noise = hash(counter + uint32_t(i));
      exp_avg_code.store(exp_avg + i, read<Floats>(exp_avgs + i), noise);
      if (HAS_SQUARE) exp_avg_sq_code.store(exp_avg_sq + i, read<Floats>(exp_avg_sqs + i), noise);
    }
  }
};

// --- int8 states to and from fp32, for checkpoints; `numel` elements from the start of a block ---------------------------

constexpr uint32_t NEAREST = 0x80004000;  // noise that stands for one half, in either half

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
    Ints most = {};
    for (uint64_t i = 0; i < BLOCK_NUMEL; i += W) most = max(most, magnitude(read<Floats>(in + i)));
    ExpAvgCode exp_avg_code(largest(most));
    ExpAvgSqCode exp_avg_sq_code(largest(most));
    for (uint64_t i = 0; i < BLOCK_NUMEL; i += W) {
      Floats x = read<Floats>(in + i);
      is_square ? exp_avg_sq_code.store((uint8_t*)out + i, x, half) : exp_avg_code.store((int8_t*)out + i, x, half);
    }
    steps[begin / BLOCK_NUMEL] = is_square ? exp_avg_sq_code.step() : exp_avg_code.step;
    memcpy(codes + begin, out, count);
  }
}
