// Vectors of W lanes, and the few operations on them that the instruction sets spell differently. Included once per
// instruction set; the rest is arithmetic on vectors as GCC and clang offer it in the language.

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

// --- narrow integers: W elements from memory, widened; W elements to memory, which must fit ----------------------------

#if defined(LANES_AVX512)

inline Words read_u16(const void* from) { return Words(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from))); }
inline Words read_s16(const void* from) { return Words(_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)from))); }
inline Words read_u8(const void* from) { return Words(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from))); }
inline Words read_s8(const void* from) { return Words(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from))); }
inline void write_16(void* to, Words x) { _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(__m512i(x))); }
inline void write_8(void* to, Words x) { _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(__m512i(x))); }
inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(__m512i(x)); }
inline Floats root(Floats x) { return _mm512_sqrt_ps(x); }
inline Ints max(Ints a, Ints b) { return Ints(_mm512_max_epi32(__m512i(a), __m512i(b))); }

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
inline void write_16(void* to, Words x) { _mm_storeu_si128((__m128i*)to, packed_16(x)); }
inline void write_8(void* to, Words x) { _mm_storel_epi64((__m128i*)to, _mm_packus_epi16(packed_16(x), packed_16(x))); }
inline Floats to_floats(Ints x) { return _mm256_cvtepi32_ps(__m256i(x)); }
inline Floats root(Floats x) { return _mm256_sqrt_ps(x); }
inline Ints max(Ints a, Ints b) { return Ints(_mm256_max_epi32(__m256i(a), __m256i(b))); }

#else

template <class T>
inline Words widened(const void* from) {
  typedef T Narrow __attribute__((vector_size(W * sizeof(T))));
  return Words(__builtin_convertvector(read<Narrow>((const T*)from), Ints));
}
inline Words read_u16(const void* from) { return widened<uint16_t>(from); }
inline Words read_s16(const void* from) { return widened<int16_t>(from); }
inline Words read_u8(const void* from) { return widened<uint8_t>(from); }
inline Words read_s8(const void* from) { return widened<int8_t>(from); }
inline void write_16(void* to, Words x) {
  for (int i = 0; i < W; i++) ((uint16_t*)to)[i] = uint16_t(x[i]);
}
inline void write_8(void* to, Words x) {
  for (int i = 0; i < W; i++) ((uint8_t*)to)[i] = uint8_t(x[i]);
}
inline Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }
inline Floats root(Floats x) {
  for (int i = 0; i < W; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
}
inline Ints max(Ints a, Ints b) { return a > b ? a : b; }

#endif

inline Doubles root(Doubles x) {
  for (int i = 0; i < W / 2; i++) x[i] = __builtin_sqrt(x[i]);
  return x;
}

inline uint32_t largest(Ints x) {
  int32_t most = x[0];
  for (int i = 1; i < W; i++) most = x[i] > most ? x[i] : most;
  return uint32_t(most);
}

inline Words count_up() {
  Words x;
  for (int i = 0; i < W; i++) x[i] = uint32_t(i);
  return x;
}
