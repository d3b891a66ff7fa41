// Elementary functions written once for scalars (host and device) and for the CPU's vectors.
//
// A function here is a template over F: float, double, or a vector of them (cpu/vec.h). Beside the operators, F needs
//   madd(a, b, c)          a * b + c, rounded once where kFused says so
//   select(mask, a, b)     mask ? a : b, for what F's comparisons return
//   larger(a, b)           the larger of a number and a limit b; NaN where a is NaN
//   magnitude(x)           |x|
//   bits_of(x), from_bits  its bits as unsigned integers, and back
// Everything sits in a namespace named after the instruction set that this file is compiled for: inline functions of
// one set must never be merged by the linker with those of another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define BAN_FAST_HD static __host__ __device__ __forceinline__
#else
#define BAN_FAST_HD static inline __attribute__((always_inline))
#endif

#ifndef BAN_FAST_ISA
#define BAN_FAST_ISA common
#endif

namespace ban_fast::BAN_FAST_ISA {

#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__aarch64__)
inline constexpr bool kFused = true;
#else
inline constexpr bool kFused = false;
#endif

template <class F>
struct ScalarOf {
  using type = F;
};
template <class F>
using Scalar = typename ScalarOf<F>::type;

BAN_FAST_HD float madd(float a, float b, float c) { return kFused ? __builtin_fmaf(a, b, c) : a * b + c; }
BAN_FAST_HD double madd(double a, double b, double c) { return kFused ? __builtin_fma(a, b, c) : a * b + c; }

BAN_FAST_HD float magnitude(float x) { return __builtin_fabsf(x); }
BAN_FAST_HD double magnitude(double x) { return __builtin_fabs(x); }

BAN_FAST_HD float larger(float a, float b) { return a < b ? b : a; }
BAN_FAST_HD double larger(double a, double b) { return a < b ? b : a; }

template <class T>
BAN_FAST_HD T select(bool mask, T a, T b) {
  return mask ? a : b;
}

BAN_FAST_HD std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
BAN_FAST_HD std::uint64_t bits_of(double x) {
  std::uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
BAN_FAST_HD float from_bits(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
BAN_FAST_HD double from_bits(std::uint64_t bits) {
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

template <class F>
using BitsOf = decltype(bits_of(F{}));

// 2^n from the sum n + ExpConstants::magic, whose low bits are the exponent's.
template <class F>
BAN_FAST_HD F power_of_two(F shifted) {
  return from_bits(bits_of(shifted) << (sizeof(Scalar<F>) == sizeof(float) ? 23 : 52));
}

// c0 + c1 x + c2 x^2 + ... by Horner's rule.
template <class F, class S>
BAN_FAST_HD F poly(F, S c0) {
  return F(c0);
}
template <class F, class S, class... Rest>
BAN_FAST_HD F poly(F x, S c0, Rest... rest) {
  return madd(x, poly(x, rest...), F(c0));
}

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float log2e = 0x1.715476p+0f;
  // 1.5 * 2^23 rounds what is added to it to an integer; the exponent's bias beside it makes the sum's low bits those
  // of 2^n.
  static constexpr float magic = 0x1.8p23f + 127.0f;
  static constexpr float ln2_hi = 0x1.62e4p-1f;  // 15 bits: n * ln2_hi is exact
  static constexpr float ln2_lo = 0x1.7f7d1cp-20f;
  static constexpr float floor = -0x1.601e68p+6f;  // -127 ln(2): n = -127, whose 2^n has no bit set, is 0
};

template <>
struct ExpConstants<double> {
  static constexpr double log2e = 0x1.71547652b82fep+0;
  static constexpr double magic = 0x1.8p52 + 1023.0;
  static constexpr double ln2_hi = 0x1.62e42feep-1;  // 32 bits
  static constexpr double ln2_lo = 0x1.a39ef35793c76p-33;
  static constexpr double floor = -0x1.628b76e3a7b61p+9;  // -1023 ln(2)
};

// (exp(r) - 1 - r) / r^2 for |r| <= ln(2) / 2: minimax, within 1.4e-8 of exp(r) - 1 in fp32 and 2.7e-19 in fp64.
template <class F>
BAN_FAST_HD F exp_tail(F r) {
  if constexpr (sizeof(Scalar<F>) == sizeof(float)) {
    return poly(r, 0x1.fffffep-2f, 0x1.5554b0p-3f, 0x1.555674p-5f, 0x1.1227b0p-7f, 0x1.6bec0cp-10f);
  } else {
    return poly(r, 0x1.0p-1, 0x1.5555555555559p-3, 0x1.555555555553fp-5, 0x1.111111110f6c5p-7, 0x1.6c16c16c1f0b5p-10,
                0x1.a01a01afdd546p-13, 0x1.a01a017bbfaedp-16, 0x1.71ddf86453aecp-19, 0x1.27e536219a2adp-22,
                0x1.af5ea73ba6cc8p-26, 0x1.1ee8bdc988675p-29);
  }
}

// A divisor of logits. Dividing is multiplying by 1 / T held in two parts: within 0.51 ulp, at a tenth of a division's
// price.
template <class T>
struct Temperature {
  static constexpr bool kUnit = false;
  T value, inverse_hi, inverse_lo;
  T log2e;  // log2(e) / T
  T floor;  // x / T below ExpConstants::floor

  explicit Temperature(double t)
      : value(T(t)),
        inverse_hi(T(1.0 / t)),
        inverse_lo(T(std::fma(-double(inverse_hi), t, 1.0) / t)),
        log2e(T(double(ExpConstants<T>::log2e) / t)),
        floor(T(ExpConstants<T>::floor * t)) {}
};

// Temperature 1, the usual one, at the price of nothing.
template <class T>
struct UnitTemperature {
  static constexpr bool kUnit = true;
  static constexpr T value = 1;
  static constexpr T floor = ExpConstants<T>::floor;
};

// x / T. Not for infinite x.
template <class F, class Divisor>
BAN_FAST_HD F divide(F x, const Divisor& t) {
  if constexpr (Divisor::kUnit) {
    return x;
  } else if constexpr (kFused) {
    return madd(x, F(t.inverse_hi), x * F(t.inverse_lo));
  } else {
    return x / F(t.value);
  }
}

// exp(x / T) for x / T <= 80: within 1 ulp; 0 where it is below 0.71 of the least normal number, for x = -inf too. NaN
// stays NaN.
template <class F, class Divisor>
BAN_FAST_HD F exp_quotient(F x, const Divisor& t) {
  using K = ExpConstants<Scalar<F>>;
  const F y = larger(x, F(t.floor));
  F shifted, n, r;
  if constexpr (Divisor::kUnit || !kFused) {
    const F quotient = divide(y, t);
    shifted = madd(quotient, F(K::log2e), F(K::magic));
    n = shifted - F(K::magic);
    r = madd(n, F(-K::ln2_hi), quotient);
  } else {
    // x / T is never rounded: its product is inside the fma that takes n ln(2) away.
    shifted = madd(y, F(t.log2e), F(K::magic));
    n = shifted - F(K::magic);
    r = madd(y, F(t.inverse_lo), madd(y, F(t.inverse_hi), n * F(-K::ln2_hi)));
  }
  r = madd(n, F(-K::ln2_lo), r);
  return madd(r, madd(r, exp_tail(r), F(Scalar<F>(1))), F(Scalar<F>(1))) * power_of_two(shifted);
}

// exp(x) - 1 for |x| <= 80, relative to its own size within 2 ulp. Beyond: any value.
template <class F>
BAN_FAST_HD F expm1(F x) {
  using K = ExpConstants<Scalar<F>>;
  const F shifted = madd(x, F(K::log2e), F(K::magic));
  const F n = shifted - F(K::magic);
  F r = madd(n, F(-K::ln2_hi), x);
  r = madd(n, F(-K::ln2_lo), r);
  const F expm1_r = madd(r * r, exp_tail(r), r);
  const F power = power_of_two(shifted);
  return madd(expm1_r, power, power - F(Scalar<F>(1)));
}

// exp(u) - 1 - u >= 0 by its series, for |u| < 0.1; the terms left out are below 3e-7 of it in fp32, 1e-16 in fp64.
template <class F>
BAN_FAST_HD F expm1_minus_argument(F u) {
  if constexpr (sizeof(Scalar<F>) == sizeof(float)) {
    return u * u * poly(u, 1.0f / 2, 1.0f / 6, 1.0f / 24, 1.0f / 120);
  } else {
    return u * u *
           poly(u, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040, 1.0 / 40320, 1.0 / 362880,
                1.0 / 3628800);
  }
}

// log(1 + x) for finite x > -1 in double, within 2 ulp; NaN stays NaN.
template <class F>
BAN_FAST_HD F log1p(F x) {
  static_assert(sizeof(Scalar<F>) == sizeof(double));
  using U = BitsOf<F>;
  constexpr std::uint64_t kSqrtHalf = 0x3fe6a09e667f3bcdu, kOne = 0x3ff0000000000000u, kMantissa = 0x000fffffffffffffu;
  // 1 + x = 2^k m with m in [sqrt(1/2), sqrt(2)); f = m - 1 takes back what rounding 1 + x lost.
  const F sum = F(1.0) + x;
  const U bits = bits_of(sum) + U(kOne - kSqrtHalf);
  const U biased_k = bits >> 52;
  const F m = from_bits((bits & U(kMantissa)) + U(kSqrtHalf));
  const F k = from_bits(biased_k | U(0x4330000000000000u)) - F(0x1p52 + 1023.0);
  const F down = from_bits((U(2046u) - biased_k) << 52);
  const F f = (m - F(1.0)) + (x - (sum - F(1.0))) * down;
  // log(1 + f) = 2 atanh(s), minimax within 1.3e-18.
  const F s = f / (F(2.0) + f), z = s * s;
  const F tail = poly(z, 0x1.5555555555593p-1, 0x1.999999997fb2dp-2, 0x1.2492494217d33p-2, 0x1.c71c51e7d57c2p-3,
                      0x1.74664632b5cadp-3, 0x1.39a0f46fefbffp-3, 0x1.2f0d940c74023p-3);
  const F log_m = madd(s * z, tail, s + s);
  return madd(k, F(ExpConstants<double>::ln2_hi), madd(k, F(ExpConstants<double>::ln2_lo), log_m));
}

// log(x) for finite x >= 1.
BAN_FAST_HD double log_of_sum(double x) { return log1p(x - 1.0); }

}  // namespace ban_fast::BAN_FAST_ISA
