// From a command to loops over blocks.

constexpr uint64_t COLUMNS = 32;  // of a partial sum: element i of a region is added to column i mod COLUMNS

struct SquareSum {
  static constexpr uint64_t HALF = W / 2;
  Doubles columns[COLUMNS / HALF] = {};

  // i: the first element's place in its block.
  void add(uint64_t i, Doubles x) { columns[i % COLUMNS / HALF] += x * x; }
  void add(uint64_t i, Floats x) {
    add(i, lower(x));
    add(i + HALF, upper(x));
  }

  // By halves, so that a sum has one value on every path; leaves nothing behind.
  double take() {
    double sums[COLUMNS];
    memcpy(sums, columns, sizeof sums);
    for (uint64_t half = COLUMNS / 2; half; half /= 2)
      for (uint64_t i = 0; i < half; i++) sums[i] += sums[i + half];
    memset(columns, 0, sizeof columns);
    return sums[0];
  }
};

// --- what is done to a block ----------------------------------------------------------------------------------------

template <class Rule, class G, class Parameter, class States>
static void step(const Region& region, uint64_t start, const Constants<typename Parameter::Scalar>& constants) {
  typedef typename Parameter::Vector V;
  const G* gradient = region.at<G>(GRADIENT, start);
  const auto c = constants;  // a copy that no store can reach stays in registers
  Parameter parameter(region, start);
  Scratch scratch;
  States states(region, start, scratch);
  // A root and a division are long chains. With the parameter narrowed and stored in a loop of its own, and elements
  // unrolled, more of them are under way at once: with AVX2 a sixth less time where states have 16 or 8 bits.
  constexpr uint64_t LANES = sizeof(V) / sizeof(typename Parameter::Scalar);
  alignas(64) typename Parameter::Scalar stepped[BLOCK_NUMEL];
#pragma GCC unroll 4
  for (uint64_t i = 0; i < BLOCK_NUMEL; i += LANES) {
    V g = widen(gradient + i) * c.multiplier, p = parameter.load(i), m = {}, v = {};
    states.load(i, m, v);
    Rule::step(g, p, m, v, c);
    if (Rule::STORES_PARAMETER) write(stepped + i, p);
    if (Rule::STORES_STATES) states.store(i, m, v);
  }
  if (Rule::STORES_PARAMETER)
    for (uint64_t i = 0; i < BLOCK_NUMEL; i += LANES) parameter.store(i, read<V>(stepped + i));
  if (Rule::STORES_STATES) states.finish();
}

// LAMB's sums of squares of elements [begin, end) of a block, parameter and direction, from the moments as they are
// kept: what the scaled step will see.
template <class Parameter, class States>
static void add_norms(const Region& region, uint64_t start, const Constants<typename Parameter::Scalar>& c,
                      uint64_t begin, uint64_t end, SquareSum* sums) {
  typedef typename Parameter::Vector V;
  typedef typename Parameter::Scalar T;
  constexpr uint64_t LANES = sizeof(V) / sizeof(T);
  Parameter parameter(region, start);
  Scratch scratch;
  States states(region, start, scratch);
  T directions[BLOCK_NUMEL];
  for (uint64_t i = 0; i < BLOCK_NUMEL; i += LANES) {
    V p = parameter.load(i), m = {}, v = {};
    states.load(i, m, v);
    sums[0].add(i, p);
    write(directions + i, lamb_direction(p, m, v, c));
  }
  // Beyond a ragged block's elements the direction is 0 / eps, and eps may be 0.
  for (uint64_t i = 0; i < begin; i++) directions[i] = 0;
  for (uint64_t i = end; i < BLOCK_NUMEL; i++) directions[i] = 0;
  for (uint64_t i = 0; i < BLOCK_NUMEL; i += LANES) sums[1].add(i, read<V>(directions + i));
}

template <class G>
static void add_squares(const Region& region, uint64_t start, SquareSum& sum) {
  const G* gradient = region.at<G>(GRADIENT, start);
  SquareSum local = sum;  // stays in registers
  for (uint64_t i = 0; i < BLOCK_NUMEL; i += sizeof(widen(gradient)) / sizeof(widen(gradient)[0]))
    local.add(i, widen(gradient + i));
  sum = local;
}

template <class T, class G>
static void accumulate(const Region& region, uint64_t start, bool stores) {
  const G* from = region.at<G>(GRADIENT, start);
  T* to = region.at<T>(PARAMETER, start);
  typedef decltype(widen(from)) V;
  for (uint64_t i = 0; i < BLOCK_NUMEL; i += sizeof(V) / sizeof(T))
    write(to + i, stores ? widen(from + i) : read<V>(to + i) + widen(from + i));
}

// --- which types a command means ------------------------------------------------------------------------------------

template <class T>
struct Type {
  typedef T type;
};

template <class F>
static auto with_rule(const Command& c, F f) {
  if (c.op == PREPARE) return f(Type<LambMoments>());
  switch (c.rule) {
    case ADAM: return f(Type<AdamRule>());
    case LION: return f(Type<LionRule>());
    case LAMB: return f(Type<LambRule>());
    default: return f(Type<AdamWRule>());
  }
}

template <class F>
static auto with_gradient(const Command& c, F f) {
  switch (c.gradient_dtype) {
    case BF16: return f(Type<bf16>());
    case FP16: return f(Type<fp16>());
    default: return f(Type<float>());
  }
}

template <class F>
static auto with_parameter(const Command& c, F f) {
  switch (c.parameter_kind) {
    case SPLIT_BF16: return f(Type<Split>());
    case MASTER_BF16: return f(Type<Master<nearest_bf16>>());
    case MASTER_FP16: return f(Type<Master<nearest_fp16>>());
    default: return f(Type<InPlace<Floats, float>>());
  }
}

template <bool HAS_SQUARE, class F>
static auto with_states(const Command& c, F f) {
  switch (c.states) {
    case STATES_BF16: return f(Type<Bf16<HAS_SQUARE>>());
    case STATES_INT8: return f(Type<Int8<HAS_SQUARE>>());
    default: return f(Type<Plain<Floats, float, HAS_SQUARE>>());
  }
}

// What a step does to a block, and PREPARE after it.
template <class T>
struct Kernels {
  void (*step)(const Region&, uint64_t start, const Constants<T>&);
  void (*add_norms)(const Region&, uint64_t start, const Constants<T>&, uint64_t begin, uint64_t end, SquareSum*);
};

template <class Rule, class G, class Parameter, class States>
static Kernels<typename Parameter::Scalar> kernels() {
  if constexpr (Rule::STORES_PARAMETER) {
    return {step<Rule, G, Parameter, States>, nullptr};
  } else {
    return {step<Rule, G, Parameter, States>, add_norms<Parameter, States>};
  }
}

static Kernels<float> kernels_of(const Command& c) {
  return with_rule(c, [&](auto rule) {
    typedef typename decltype(rule)::type Rule;
    return with_parameter(c, [&](auto parameter) {
      typedef typename decltype(parameter)::type Parameter;
      return with_states<Rule::HAS_SQUARE>(c, [&](auto states) {
        typedef typename decltype(states)::type States;
        return with_gradient(c, [&](auto gradient) {
          typedef typename decltype(gradient)::type G;
          return kernels<Rule, G, Parameter, States>();
        });
      });
    });
  });
}

static Kernels<double> kernels_of_fp64(const Command& c) {
  return with_rule(c, [](auto rule) {
    typedef typename decltype(rule)::type Rule;
    return kernels<Rule, double, InPlace<Doubles, double>, Plain<Doubles, double, Rule::HAS_SQUARE>>();
  });
}

// --- walks over a range ---------------------------------------------------------------------------------------------

// Addresses wrap: a caller may name an element 0 that lies outside its memory, as long as the elements do not.
inline char* at(char* base, uint64_t offset) {
  return reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(base) + uintptr_t(offset));
}

// Call f as below on a region in which one block is a copy, zeros but for elements [begin, end), and copy these back.
template <class F>
static void ragged(const Region& region, const uint64_t* bytes, uint64_t start, uint64_t begin, uint64_t end, F f) {
  char copies[NUM_STREAMS][BLOCK_NUMEL * sizeof(double)] = {};
  Region copy = region;
  for (int i = 0; i < NUM_STREAMS; i++) {
    char* elements = region.streams[i] + (start + begin) * bytes[i];
    copy.streams[i] = copies[i] - start * bytes[i];
    if (bytes[i]) memcpy(copies[i] + begin * bytes[i], elements, (end - begin) * bytes[i]);
  }
  f(copy, start, begin, end);
  for (int i = PARAMETER; i < NUM_STREAMS; i++) {
    char* elements = region.streams[i] + (start + begin) * bytes[i];
    if (bytes[i]) memcpy(elements, copies[i] + begin * bytes[i], (end - begin) * bytes[i]);
  }
}

// Call f(region, start, begin, end) for each block that [first, last) touches: it starts at element `start` of the
// region, and its elements [begin, end) are in the range.
template <class F>
static void each_block(char* base, const Command& c, uint64_t first, uint64_t last, F f) {
  bool steps = c.op == STEP || c.op == PREPARE, is_fp64 = c.parameter_kind == IN_PLACE_FP64;
  static constexpr uint64_t GRADIENT_BYTES[] = {4, 2, 2, 8}, PARAMETER_BYTES[] = {4, 8, 2, 2, 2},
                            MASTER_BYTES[] = {0, 0, 2, 4, 4}, STATE_BYTES[] = {4, 2, 1};
  // Bytes of an element; 0: the operation leaves it alone.
  uint64_t bytes[NUM_STREAMS] = {GRADIENT_BYTES[c.gradient_dtype]};
  if (c.op == ACCUMULATE) bytes[PARAMETER] = is_fp64 ? 8 : 4;
  if (steps) {
    bytes[PARAMETER] = PARAMETER_BYTES[c.parameter_kind];
    bytes[MASTER] = MASTER_BYTES[c.parameter_kind];
    bytes[EXP_AVG] = is_fp64 ? 8 : STATE_BYTES[c.states];
    bytes[EXP_AVG_SQ] = c.rule == LION ? 0 : bytes[EXP_AVG];
  }
  if (c.op == STEP && c.rule == LAMB) bytes[GRADIENT] = 0;
  const Region region = {
      {at(base, c.gradient), at(base, c.parameter), at(base, c.master), at(base, c.exp_avg), at(base, c.exp_avg_sq)},
      (float*)at(base, c.exp_avg_scale),
      (float*)at(base, c.exp_avg_sq_scale),
      key_of(c.seed) + uint32_t(c.position)};
  for (uint64_t start = first / BLOCK_NUMEL * BLOCK_NUMEL; start < last; start += BLOCK_NUMEL) {
    uint64_t begin = first > start ? first - start : 0;
    uint64_t end = last - start < BLOCK_NUMEL ? last - start : BLOCK_NUMEL;
    if (end - begin == BLOCK_NUMEL) {
      f(region, start, begin, end);
    } else {
      ragged(region, bytes, start, begin, end, f);
    }
  }
}

// Write `sums` where a partial block, or the range, ends with element `end`.
static void write_sums(char* base, const Command& c, uint64_t end, uint64_t last, SquareSum* sums, uint64_t width) {
  if (end % PARTIAL_NUMEL && end != last) return;
  double* entry = (double*)at(base, c.result) + width * ((end - 1) / PARTIAL_NUMEL - c.first / PARTIAL_NUMEL);
  for (uint64_t i = 0; i < width; i++) entry[i] = sums[i].take();
}

template <class T>
static void walk(char* base, const Command& c, uint64_t first, uint64_t last, Kernels<T> kernels) {
  Constants<T> constants(c);
  SquareSum sums[2];
  each_block(base, c, first, last, [&](const Region& region, uint64_t start, uint64_t begin, uint64_t end) {
    kernels.step(region, start, constants);
    if (c.op == STEP) return;
    kernels.add_norms(region, start, constants, begin, end, sums);
    write_sums(base, c, start + end, last, sums, 2);
  });
}

template <class T, class G>
static void walk_gradient(char* base, const Command& c, uint64_t first, uint64_t last) {
  SquareSum sum;
  each_block(base, c, first, last, [&](const Region& region, uint64_t start, uint64_t, uint64_t end) {
    if (c.op == ACCUMULATE) return accumulate<T, G>(region, start, c.flags & STORE);
    add_squares<G>(region, start, sum);
    write_sums(base, c, start + end, last, &sum, 1);
  });
}

// The command has been checked.
static void execute(char* base, const Command& c, uint64_t first, uint64_t last) {
  bool is_fp64 = c.gradient_dtype == FP64;
  if (c.op == STEP || c.op == PREPARE)
    return is_fp64 ? walk(base, c, first, last, kernels_of_fp64(c)) : walk(base, c, first, last, kernels_of(c));
  if (is_fp64) return walk_gradient<double, double>(base, c, first, last);
  with_gradient(c, [&](auto gradient) {
    typedef typename decltype(gradient)::type G;
    walk_gradient<float, G>(base, c, first, last);
  });
}
