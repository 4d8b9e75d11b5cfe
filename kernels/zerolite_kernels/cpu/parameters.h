// The kinds of parameter: each loads and stores W elements at i of a block, in fp32 (or fp64).

enum Stream { GRADIENT, PARAMETER, MASTER, EXP_AVG, EXP_AVG_SQ, NUM_STREAMS };

// A block's elements in memory, and its scales.
struct Block {
  uint64_t start;  // its first element in the region
  char* streams[NUM_STREAMS];
  float *exp_avg_scale, *exp_avg_sq_scale;
  uint32_t draw;  // counter of the first element's noise

  template <class T>
  T* at(Stream stream) const {
    return reinterpret_cast<T*>(streams[stream]);
  }
};

template <class V, class T>
struct InPlace {
  typedef V Vector;
  typedef T Scalar;
  T* parameter;
  explicit InPlace(const Block& block) : parameter(block.at<T>(PARAMETER)) {}
  V load(uint64_t i) const { return read<V>(parameter + i); }
  void store(uint64_t i, V x) const { write(parameter + i, x); }
};

// The nearest bf16, ties away from zero, is what makes the 16 missing bits a signed number that can be added back.
struct Split {
  typedef Floats Vector;
  typedef float Scalar;
  uint16_t* high;
  uint16_t* low;
  explicit Split(const Block& block) : high(block.at<uint16_t>(PARAMETER)), low(block.at<uint16_t>(MASTER)) {}
  Floats load(uint64_t i) const { return Floats((read_u16(high + i) << 16) + read_s16(low + i)); }
  void store(uint64_t i, Floats x) const {
    Words bits = quiet(x);
    write_16(high + i, (bits + 0x8000) >> 16);
    write_16(low + i, bits);
  }
};

template <Words (*NARROW)(Floats)>
struct Master {
  typedef Floats Vector;
  typedef float Scalar;
  float* master;
  uint16_t* copy;
  explicit Master(const Block& block) : master(block.at<float>(MASTER)), copy(block.at<uint16_t>(PARAMETER)) {}
  Floats load(uint64_t i) const { return read<Floats>(master + i); }
  void store(uint64_t i, Floats x) const {
    write(master + i, x);
    write_16(copy + i, NARROW(x));
  }
};
