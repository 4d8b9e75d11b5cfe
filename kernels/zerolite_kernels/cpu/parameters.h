// The kinds of parameter: each loads and stores W elements at i of a block, in fp32 (or fp64).

enum Stream { GRADIENT, PARAMETER, MASTER, EXP_AVG, EXP_AVG_SQ, NUM_STREAMS };

// Where a region's element 0 lies, and its scales. Written once a command and passed on with the index of a block: the
// address of a block, stored anew for each, would be read back only after all older stores have left for the caches.
struct Region {
  char* streams[NUM_STREAMS];
  float *exp_avg_scale, *exp_avg_sq_scale;
  uint32_t draw;  // counter of element 0's noise

  template <class T>
  T* at(Stream stream, uint64_t element) const {
    return reinterpret_cast<T*>(streams[stream]) + element;
  }
  Words draw_of(uint64_t element) const { return draw + uint32_t(element) + count_up(); }
};

template <class V, class T>
struct InPlace {
  typedef V Vector;
  typedef T Scalar;
  T* parameter;
  InPlace(const Region& region, uint64_t start) : parameter(region.at<T>(PARAMETER, start)) {}
  V load(uint64_t i) const { return read<V>(parameter + i); }
  void store(uint64_t i, V x) const { write(parameter + i, x); }
};

// The nearest bf16, ties away from zero, is what makes the 16 missing bits a signed number that can be added back.
struct Split {
  typedef Floats Vector;
  typedef float Scalar;
  uint16_t* high;
  uint16_t* low;
  Split(const Region& region, uint64_t start)
      : high(region.at<uint16_t>(PARAMETER, start)), low(region.at<uint16_t>(MASTER, start)) {}
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
  Master(const Region& region, uint64_t start)
      : master(region.at<float>(MASTER, start)), copy(region.at<uint16_t>(PARAMETER, start)) {}
  Floats load(uint64_t i) const { return read<Floats>(master + i); }
  void store(uint64_t i, Floats x) const {
    write(master + i, x);
    write_16(copy + i, NARROW(x));
  }
};
