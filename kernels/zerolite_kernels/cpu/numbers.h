// Number formats and noise, W elements at a time.

constexpr uint32_t SIGN = 0x80000000, INFINITE = 0x7F800000, NOT_A_NUMBER = 0x7FC00000;

inline uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// --- how a gradient lies in memory ----------------------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

inline Doubles widen(const double* from) { return read<Doubles>(from); }
inline Floats widen(const float* from) { return read<Floats>(from); }
inline Floats widen(const bf16* from) { return Floats(read_u16(from) << 16); }

// Shifted into place the exponent is 112 too small; the product mends that and is exact for subnormals too. What lies
// beyond fp16's numbers then is Inf or NaN and gets fp32's largest exponent.
inline Floats widen(const fp16* from) {
  Words x = read_u16(from);
  Words magnitude = Words(Floats((x & 0x7FFF) << 13) * 0x1p112f);
  return Floats(magnitude | (Ints(magnitude) >= 0x47800000 ? Words{} + INFINITE : Words{}) | (x & 0x8000) << 16);
}

// --- fp32 to 16 bits ------------------------------------------------------------------------------------------------

inline Words quiet(Floats x) { return x == x ? Words(x) : Words{} + NOT_A_NUMBER; }

// Ties to even. Rounding must not carry out of a NaN.
inline Words nearest_bf16(Floats x) {
  Words bits = quiet(x);
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

// Up or down with the chances that make the mean exact; `noise` is uniform in [0, 2^16).
inline Words stochastic_bf16(Floats x, Words noise) { return (quiet(x) + noise) >> 16; }

// Ties to even, overflow to Inf. Below fp16's normal range the sum with 0.5, whose last place is fp16's smallest
// subnormal, rounds; above, a carry out of the mantissa does.
inline Words nearest_fp16(Floats x) {
  Words bits = quiet(x), magnitude = bits & ~SIGN;
  Words subnormal = Words(Floats(magnitude) + 0.5f) - 0x3F000000;
  Words normal = (magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13;
  Words rounded = Ints(magnitude) < 0x38800000 ? subnormal : normal;
  rounded = Ints(magnitude) >= 0x47800000 ? Words{} + 0x7C00 : rounded;
  rounded = Ints(magnitude) > int32_t(INFINITE) ? Words{} + 0x7E00 : rounded;
  return (bits >> 16 & 0x8000) | rounded;
}

// --- noise ----------------------------------------------------------------------------------------------------------

// lowbias32 of Chris Wellons' hash prospector over a counter: what an element draws depends on its place and the step
// alone. The low 16 bits serve the momentum, the high 16 the variance.
inline Words hash(Words x) {
  x ^= x >> 16;
  x *= 0x7FEB352D;
  x ^= x >> 15;
  x *= 0x846CA68B;
  return x ^ x >> 16;
}

// splitmix64's finaliser (Steele et al. 2014): neighbouring seeds become unrelated offsets of the counter.
inline uint32_t key_of(uint64_t seed) {
  seed += 0x9E3779B97F4A7C15;
  seed = (seed ^ seed >> 30) * 0xBF58476D1CE4E5B9;
  seed = (seed ^ seed >> 27) * 0x94D049BB133111EB;
  return uint32_t(seed ^ seed >> 32);
}
