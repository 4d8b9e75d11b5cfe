// From a command to loops over blocks. Included once per instruction set.

constexpr uint64_t LANES = 32;  // of a partial sum: element i of a region is added to lane i mod LANES

struct Lanes {
  static constexpr uint64_t HALF = W / 2;
  Doubles sum[LANES / HALF] = {};

  void add_squares(uint64_t i, Doubles x) { sum[i % LANES / HALF] += x * x; }

  void add_squares(uint64_t i, Floats x) {
    add_squares(i, lower(x));
    add_squares(i + HALF, upper(x));
  }

  // A fixed tree, so a sum has one value on every path; leaves the lanes empty.
  double take() {
    double lane[LANES];
    memcpy(lane, sum, sizeof lane);
    for (uint64_t half = LANES / 2; half; half /= 2)
      for (uint64_t i = 0; i < half; i++) lane[i] += lane[i + half];
    memset(sum, 0, sizeof sum);
    return lane[0];
  }
};

// --- what is done to a block ---------------------------------------------------------------------------------------------

template <class Rule, class G, class Parameter, class States>
static void step(const Block& block, const Constants<typename Parameter::Scalar>& constants) {
  typedef typename Parameter::Vector V;
  const G* gradient = block.at<G>(GRADIENT);
  const auto c = constants;  // a copy that no store can reach stays in registers
  Parameter parameter(block);
  Scratch scratch;
  States states(block, scratch);
  for (uint64_t i = 0; i < BLOCK_NUMEL; i += sizeof(V) / sizeof(typename Parameter::Scalar)) {
    V g = widen(gradient + i) * c.multiplier, p = parameter.load(i), m = {}, v = {};
    states.load(i, m, v);
    Rule::step(g, p, m, v, c);
    if (Rule::STORES_PARAMETER) parameter.store(i, p);
    if (Rule::STORES_STATES) states.store(i, m, v);
  }
  if (Rule::STORES_STATES) states.finish();
}

// LAMB's sums of squares of elements [begin, end) of a block, parameter and direction, from the moments as they are
// kept: what the scaled step will see.
template <class Parameter, class States>
static void add_norms(const Block& block, const Constants<typename Parameter::Scalar>& c, uint64_t begin, uint64_t end,
                      Lanes* sums) {
  typedef typename Parameter::Vector V;
  typedef typename Parameter::Scalar T;
  constexpr uint64_t LANES_OF_V = sizeof(V) / sizeof(T);
  Parameter parameter(block);
  Scratch scratch;
  States states(block, scratch);
  T directions[BLOCK_NUMEL];
  for (uint64_t i = 0; i < BLOCK_NUMEL; i += LANES_OF_V) {
    V p = parameter.load(i), m = {}, v = {};
    states.load(i, m, v);
    sums[0].add_squares(i, p);
    write(directions + i, lamb_direction(p, m, v, c));
  }
  // Beyond a ragged block's elements the direction is 0 / eps, and eps may be 0.
  for (uint64_t i = 0; i < begin; i++) directions[i] = 0;
  for (uint64_t i = end; i < BLOCK_NUMEL; i++) directions[i] = 0;
  for (uint64_t i = 0; i < BLOCK_NUMEL; i += LANES_OF_V) sums[1].add_squares(i, read<V>(directions + i));
}

template <class G>
static void add_squares(const Block& block, Lanes& sums) {
  const G* gradient = block.at<G>(GRADIENT);
  Lanes local = sums;  // stays in registers
  for (uint64_t i = 0; i < BLOCK_NUMEL; i += sizeof(widen(gradient)) / sizeof(widen(gradient)[0]))
    local.add_squares(i, widen(gradient + i));
  sums = local;
}

template <class T, class G>
static void accumulate(const Block& block, bool stores) {
  const G* from = block.at<G>(GRADIENT);
  T* to = block.at<T>(PARAMETER);
  typedef decltype(widen(from)) V;
  for (uint64_t i = 0; i < BLOCK_NUMEL; i += sizeof(V) / sizeof(T))
    write(to + i, stores ? widen(from + i) : read<V>(to + i) + widen(from + i));
}

// --- which types a command means -------------------------------------------------------------------------------------------

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

template <class T>
struct Kernels {
  void (*step)(const Block&, const Constants<T>&);
  void (*add_norms)(const Block&, const Constants<T>&, uint64_t, uint64_t, Lanes*);
};

static Kernels<float> kernels_of(const Command& c) {
  return with_rule(c, [&](auto rule) {
    typedef typename decltype(rule)::type Rule;
    return with_parameter(c, [&](auto parameter) {
      typedef typename decltype(parameter)::type Parameter;
      return with_states<Rule::HAS_SQUARE>(c, [&](auto states) {
        typedef typename decltype(states)::type States;
        return with_gradient(c, [&](auto gradient) {
          typedef typename decltype(gradient)::type G;
          return Kernels<float>{step<Rule, G, Parameter, States>, add_norms<Parameter, States>};
        });
      });
    });
  });
}

static Kernels<double> kernels_of_fp64(const Command& c) {
  return with_rule(c, [](auto rule) {
    typedef typename decltype(rule)::type Rule;
    typedef InPlace<Doubles, double> Parameter;
    typedef Plain<Doubles, double, Rule::HAS_SQUARE> States;
    return Kernels<double>{step<Rule, double, Parameter, States>, add_norms<Parameter, States>};
  });
}

// --- walks over a range --------------------------------------------------------------------------------------------------

// Addresses wrap: a caller may name an element 0 that lies outside its memory, as long as the elements do not.
inline char* at(char* base, uint64_t offset) {
  return reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(base) + uintptr_t(offset));
}

// Call f(block, begin, end) for each block that [first, last) touches; elements [begin, end) of the block are in the
// range. A ragged block is copied out among zeros, and back.
template <class F>
static void each_block(char* base, const Command& c, uint64_t first, uint64_t last, F f) {
  bool steps = c.op == STEP || c.op == PREPARE, is_fp64 = c.parameter_kind == IN_PLACE_FP64;
  static constexpr uint64_t GRADIENT_BYTES[] = {4, 2, 2, 8}, PARAMETER_BYTES[] = {4, 8, 2, 2, 2},
                            MASTER_BYTES[] = {0, 0, 2, 4, 4}, STATE_BYTES[] = {4, 2, 1};
  uint64_t state_bytes = is_fp64 ? 8 : STATE_BYTES[c.states];
  const uint64_t offsets[NUM_STREAMS] = {c.gradient, c.parameter, c.master, c.exp_avg, c.exp_avg_sq};
  const uint64_t bytes[NUM_STREAMS] = {  // an element; 0: the operation leaves it alone
      c.op == STEP && c.rule == LAMB ? 0 : GRADIENT_BYTES[c.gradient_dtype],
      steps ? PARAMETER_BYTES[c.parameter_kind] : c.op == NORM ? 0 : is_fp64 ? 8 : 4,
      steps ? MASTER_BYTES[c.parameter_kind] : 0,
      steps ? state_bytes : 0,
      steps && c.rule != LION ? state_bytes : 0,
  };
  uint32_t key = key_of(c.seed);
  for (uint64_t start = first / BLOCK_NUMEL * BLOCK_NUMEL; start < last; start += BLOCK_NUMEL) {
    uint64_t begin = first > start ? first - start : 0, end = last - start < BLOCK_NUMEL ? last - start : BLOCK_NUMEL;
    Block block;
    block.start = start;
    for (int i = 0; i < NUM_STREAMS; i++) block.streams[i] = at(base, offsets[i] + start * bytes[i]);
    block.exp_avg_scale = (float*)at(base, c.exp_avg_scale + start / BLOCK_NUMEL * sizeof(float));
    block.exp_avg_sq_scale = (float*)at(base, c.exp_avg_sq_scale + start / BLOCK_NUMEL * sizeof(float));
    block.draw = key + uint32_t(c.position + start);
    if (end - begin == BLOCK_NUMEL) {
      f(block, begin, end);
      continue;
    }
    char copies[NUM_STREAMS][BLOCK_NUMEL * sizeof(double)] = {};
    Block copy = block;
    for (int i = 0; i < NUM_STREAMS; i++) {
      copy.streams[i] = copies[i];
      if (bytes[i]) memcpy(copies[i] + begin * bytes[i], block.streams[i] + begin * bytes[i], (end - begin) * bytes[i]);
    }
    f(copy, begin, end);
    for (int i = PARAMETER; i < NUM_STREAMS; i++)
      if (bytes[i]) memcpy(block.streams[i] + begin * bytes[i], copies[i] + begin * bytes[i], (end - begin) * bytes[i]);
  }
}

// Write `sums` where a partial block, or the range, ends with element `end`.
static void write_sums(char* base, const Command& c, uint64_t end, uint64_t last, Lanes* sums, uint64_t width) {
  if (end % PARTIAL_NUMEL && end != last) return;
  double* entry = (double*)at(base, c.result) + width * ((end - 1) / PARTIAL_NUMEL - c.first / PARTIAL_NUMEL);
  for (uint64_t i = 0; i < width; i++) entry[i] = sums[i].take();
}

template <class T>
static void walk(char* base, const Command& c, uint64_t first, uint64_t last, Kernels<T> kernels) {
  Constants<T> constants(c);
  Lanes sums[2];
  each_block(base, c, first, last, [&](const Block& block, uint64_t begin, uint64_t end) {
    kernels.step(block, constants);
    if (c.op == STEP) return;
    kernels.add_norms(block, constants, begin, end, sums);
    write_sums(base, c, block.start + end, last, sums, 2);
  });
}

template <class T, class G>
static void walk_gradient(char* base, const Command& c, uint64_t first, uint64_t last) {
  Lanes sum;
  each_block(base, c, first, last, [&](const Block& block, uint64_t, uint64_t end) {
    if (c.op == ACCUMULATE) return accumulate<T, G>(block, c.flags & STORE);
    add_squares<G>(block, sum);
    write_sums(base, c, block.start + end, last, &sum, 1);
  });
}

// The command has been checked.
static void execute(char* base, const Command& c, uint64_t first, uint64_t last) {
  bool is_fp64 = c.gradient_dtype == FP64;
  if (c.op == STEP || c.op == PREPARE)
    return is_fp64 ? walk(base, c, first, last, kernels_of_fp64(c)) : walk(base, c, first, last, kernels_of(c));
  if (is_fp64) return walk_gradient<double, double>(base, c, first, last);
  with_gradient(c, [&](auto gradient) {
    walk_gradient<float, typename decltype(gradient)::type>(base, c, first, last);
  });
}
