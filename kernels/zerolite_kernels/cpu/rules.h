// The rules, on vectors V of T: gradient g, parameter p, momentum m, variance v.

// Scalars of a rule, computed in fp64 and then rounded, as torch does.
template <class T>
struct Constants {
  T multiplier, beta1, beta2, complement1, complement2, eps;
  T weight_decay, keep, lr, step_size, correction1, root_factor;
  explicit Constants(const Command& c)
      : multiplier(T(c.multiplier)),
        beta1(T(c.beta1)),
        beta2(T(c.beta2)),
        complement1(T(1 - c.beta1)),
        complement2(T(1 - c.beta2)),
        eps(T(c.eps)),
        weight_decay(T(c.weight_decay)),
        keep(T(1 - c.lr * c.weight_decay)),
        lr(T(c.rule == LAMB ? c.lr * c.trust_ratio : c.lr)),
        step_size(T(c.lr / c.bias_correction1)),
        correction1(T(1 / c.bias_correction1)),
        root_factor(T(1 / c.bias_correction2_sqrt)) {}
};

template <class V, class T>
inline void update_moments(V g, V& m, V& v, const Constants<T>& c) {
  m = c.beta1 * m + c.complement1 * g;
  v = c.beta2 * v + c.complement2 * g * g;
}

// Adam (Kingma & Ba 2015, algorithm 1), weight decay in the gradient (L2).
struct AdamRule {
  static constexpr bool HAS_SQUARE = true, STORES_PARAMETER = true, STORES_STATES = true;
  template <class V, class T>
  static void step(V g, V& p, V& m, V& v, const Constants<T>& c) {
    update_moments(g + c.weight_decay * p, m, v, c);
    p -= c.step_size * m / (root(v) * c.root_factor + c.eps);
  }
};

// AdamW (Loshchilov & Hutter 2019, algorithm 2), weight decay decoupled and first, as in torch.
struct AdamWRule {
  static constexpr bool HAS_SQUARE = true, STORES_PARAMETER = true, STORES_STATES = true;
  template <class V, class T>
  static void step(V g, V& p, V& m, V& v, const Constants<T>& c) {
    update_moments(g, m, v, c);
    p = p * c.keep - c.step_size * m / (root(v) * c.root_factor + c.eps);
  }
};

// Lion (Chen et al. 2023, algorithm 2).
struct LionRule {
  static constexpr bool HAS_SQUARE = false, STORES_PARAMETER = true, STORES_STATES = true;
  template <class V, class T>
  static void step(V g, V& p, V& m, V&, const Constants<T>& c) {
    V blend = c.beta1 * m + c.complement1 * g;
    V up = V{} + T(1), down = V{} - T(1);
    p = p * c.keep - c.lr * (blend > 0 ? up : (blend < 0 ? down : V{}));
    m = c.beta2 * m + c.complement2 * g;
  }
};

// LAMB (You et al. 2020, algorithm 2), in two passes: the moments and the norms of parameter and direction, then the
// direction, computed anew, scaled by the trust ratio.
struct LambMoments {
  static constexpr bool HAS_SQUARE = true, STORES_PARAMETER = false, STORES_STATES = true;
  template <class V, class T>
  static void step(V g, V&, V& m, V& v, const Constants<T>& c) {
    update_moments(g, m, v, c);
  }
};

template <class V, class T>
inline V lamb_direction(V p, V m, V v, const Constants<T>& c) {
  return c.correction1 * m / (root(v) * c.root_factor + c.eps) + c.weight_decay * p;
}

struct LambRule {
  static constexpr bool HAS_SQUARE = true, STORES_PARAMETER = true, STORES_STATES = false;
  template <class V, class T>
  static void step(V, V& p, V& m, V& v, const Constants<T>& c) {
    p -= c.lr * lamb_direction(p, m, v, c);
  }
};
