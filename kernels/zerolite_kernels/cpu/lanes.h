// Vectors of W lanes, and the few operations on them that every instruction set spells in its own way. All others are
// arithmetic on vectors, as GCC and clang have it in the language.

#if defined(LANES_AVX512)
constexpr int W = 16;
#elif defined(LANES_AVX2)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * W)));
typedef uint32_t Words __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef double Doubles __attribute__((vector_size(4 * W)));  // W / 2 lanes

template <class V, class T>
inline V read(const T* from) {
  V x;
  memcpy(&x, from, sizeof x);
  return x;
}

template <class T, class V>
inline void write(T* to, V x) {
  memcpy(to, &x, sizeof x);
}

// read_*: W narrow integers, widened. write_16, write_8: the low bits of each lane; write_8_capped: lanes from 0 up, at
// most 255. max, min: a > b ? a : b and its mirror, in NaNs too.

#if defined(LANES_AVX512)

inline __m256i read_half(const void* from) { return _mm256_loadu_si256((const __m256i*)from); }
inline Words read_u16(const void* from) { return Words(_mm512_cvtepu16_epi32(read_half(from))); }
inline Words read_s16(const void* from) { return Words(_mm512_cvtepi16_epi32(read_half(from))); }
inline Words read_u8(const void* from) { return Words(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from))); }
inline Words read_s8(const void* from) { return Words(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from))); }
inline void write_16(void* to, Words x) { _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(__m512i(x))); }
inline void write_8(void* to, Words x) { _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(__m512i(x))); }
inline void write_8_capped(void* to, Ints x) { _mm_storeu_si128((__m128i*)to, _mm512_cvtusepi32_epi8(__m512i(x))); }
inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(__m512i(x)); }
inline Floats root(Floats x) { return _mm512_sqrt_ps(x); }
inline Ints max(Ints a, Ints b) { return Ints(_mm512_max_epi32(__m512i(a), __m512i(b))); }
inline Words max(Words a, Words b) { return Words(_mm512_max_epu32(__m512i(a), __m512i(b))); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline uint32_t largest(Words x) { return _mm512_reduce_max_epu32(__m512i(x)); }
inline Doubles lower(Floats x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
inline Doubles upper(Floats x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }

#elif defined(LANES_AVX2)

inline Words read_u16(const void* from) { return Words(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from))); }
inline Words read_s16(const void* from) { return Words(_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)from))); }
inline Words read_u8(const void* from) { return Words(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from))); }
inline Words read_s8(const void* from) { return Words(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from))); }
// Packing works on each half; the permutation puts the halves side by side.
inline __m128i packed_16(Words x) {
  __m256i pairs = _mm256_packus_epi32(__m256i(x), __m256i(x));
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0xD8));
}
inline void write_16(void* to, Words x) { _mm_storeu_si128((__m128i*)to, packed_16(x & 0xFFFF)); }
inline void write_8_capped(void* to, Ints x) {
  __m128i packed = packed_16(Words(x));
  _mm_storel_epi64((__m128i*)to, _mm_packus_epi16(packed, packed));
}
inline void write_8(void* to, Words x) { write_8_capped(to, Ints(x & 0xFF)); }
inline Floats to_floats(Ints x) { return _mm256_cvtepi32_ps(__m256i(x)); }
inline Floats root(Floats x) { return _mm256_sqrt_ps(x); }
inline Ints max(Ints a, Ints b) { return Ints(_mm256_max_epi32(__m256i(a), __m256i(b))); }
inline Words max(Words a, Words b) { return Words(_mm256_max_epu32(__m256i(a), __m256i(b))); }
inline Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline uint32_t largest(Words x) {
  __m128i most = _mm_max_epu32(_mm256_castsi256_si128(__m256i(x)), _mm256_extracti128_si256(__m256i(x), 1));
  most = _mm_max_epu32(most, _mm_shuffle_epi32(most, 0x4E));
  return uint32_t(_mm_cvtsi128_si32(_mm_max_epu32(most, _mm_shuffle_epi32(most, 0xB1))));
}
inline Doubles lower(Floats x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
inline Doubles upper(Floats x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }

#else

template <class T>
inline Words widened(const void* from) {
  typedef T Narrow __attribute__((vector_size(W * sizeof(T))));
  return Words(__builtin_convertvector(read<Narrow>((const T*)from), Ints));
}
template <class T>
inline void write_narrow(void* to, Words x) {
  typedef T Narrow __attribute__((vector_size(W * sizeof(T))));
  write((T*)to, __builtin_convertvector(x, Narrow));
}
inline Words read_u16(const void* from) { return widened<uint16_t>(from); }
inline Words read_s16(const void* from) { return widened<int16_t>(from); }
inline Words read_u8(const void* from) { return widened<uint8_t>(from); }
inline Words read_s8(const void* from) { return widened<int8_t>(from); }
inline void write_16(void* to, Words x) { write_narrow<uint16_t>(to, x); }
inline void write_8(void* to, Words x) { write_narrow<uint8_t>(to, x); }
inline void write_8_capped(void* to, Ints x) { write_8(to, Words(x < 255 ? x : Ints{} + 255)); }
inline Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }
inline Floats root(Floats x) {
  float lane[W];
  memcpy(lane, &x, sizeof x);
  for (float& each : lane) each = __builtin_sqrtf(each);
  return read<Floats>(lane);
}
template <class V>
inline V max(V a, V b) {
  return a > b ? a : b;
}
inline Floats min(Floats a, Floats b) { return a < b ? a : b; }
inline uint32_t largest(Words x) {
  uint32_t most = x[0];
  for (int i = 1; i < W; i++) most = x[i] > most ? x[i] : most;
  return most;
}
inline Doubles lower(Floats x) { return Doubles{x[0], x[1]}; }
inline Doubles upper(Floats x) { return Doubles{x[2], x[3]}; }

#endif

inline Doubles root(Doubles x) {
  for (int i = 0; i < W / 2; i++) x[i] = __builtin_sqrt(x[i]);
  return x;
}

inline Words count_up() {
  Words x;
  for (int i = 0; i < W; i++) x[i] = uint32_t(i);
  return x;
}
