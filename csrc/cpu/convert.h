// Between the rows of tensors, of any type and stride, and rows of the arithmetic type.
#pragma once

#include "../losses.h"
#include "vec.h"

namespace ban_fast::BAN_FAST_ISA {

struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

using HalfWords = std::uint16_t __attribute__((vector_size(32)));

// ---- 16 values at once -----------------------------------------------------------------------------------------

BAN_FAST_HD float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = std::uint32_t(half & 0x8000u) << 16;
  const std::uint32_t magnitude_bits = half & 0x7fffu;
  std::uint32_t bits;
  if (magnitude_bits >= 0x7c00u) {
    bits = 0x7f800000u | (magnitude_bits << 13);
  } else if (magnitude_bits >= 0x0400u) {
    bits = (magnitude_bits << 13) + 0x38000000u;
  } else {
    const float subnormal = float(magnitude_bits) * 0x1p-24f;
    std::memcpy(&bits, &subnormal, sizeof bits);
  }
  bits |= sign;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Round to nearest, ties to even, as the F16C instruction does.
BAN_FAST_HD std::uint16_t float_to_half(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const std::uint16_t sign = std::uint16_t((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return std::uint16_t(sign | 0x7e00u);
  if (bits >= 0x477ff000u) return std::uint16_t(sign | 0x7c00u);  // 65520 and more round to infinity
  if (bits < 0x38800000u) {
    // Below fp16's normal range its unit is 2^-24; adding 0.5 leaves a float whose unit is that.
    float shifted;
    std::memcpy(&shifted, &bits, sizeof shifted);
    shifted += 0.5f;
    std::uint32_t sum;
    std::memcpy(&sum, &shifted, sizeof sum);
    return std::uint16_t(sign | (sum - 0x3f000000u));
  }
  bits += 0xfffu + ((bits >> 13) & 1u);
  return std::uint16_t(sign | ((bits - 0x38000000u) >> 13));
}

BAN_FAST_HD Vec<float> widen(HalfWords words, Half) {
  Vec<float> x;
#if defined(__AVX512F__)
  x.part[0] = _mm512_cvtph_ps((__m256i)words);
#elif defined(__AVX2__)
  x.part[0] = _mm256_cvtph_ps(_mm256_castsi256_si128((__m256i)words));
  x.part[1] = _mm256_cvtph_ps(_mm256_extracti128_si256((__m256i)words, 1));
#else
  float values[16];
  for (int lane = 0; lane < 16; ++lane) values[lane] = half_to_float(words[lane]);
  x = load(values);
#endif
  return x;
}

BAN_FAST_HD Vec<float> widen(HalfWords words, BFloat16) {
  Words x;
#if defined(__AVX512F__)
  x.part[0] = (Words::Part)_mm512_cvtepu16_epi32((__m256i)words);
#elif defined(__AVX2__)
  x.part[0] = (Words::Part)_mm256_cvtepu16_epi32(_mm256_castsi256_si128((__m256i)words));
  x.part[1] = (Words::Part)_mm256_cvtepu16_epi32(_mm256_extracti128_si256((__m256i)words, 1));
#else
  std::uint32_t values[16];
  for (int lane = 0; lane < 16; ++lane) values[lane] = words[lane];
  x = load(values);
#endif
  return bits_as<float>(x << 16);
}

BAN_FAST_HD HalfWords narrow(Vec<float> x, Half) {
#if defined(__AVX512F__)
  return (HalfWords)_mm512_cvtps_ph(x.part[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (HalfWords)_mm256_set_m128i(_mm256_cvtps_ph(x.part[1], _MM_FROUND_TO_NEAREST_INT),
                                     _mm256_cvtps_ph(x.part[0], _MM_FROUND_TO_NEAREST_INT));
#else
  float values[16];
  store(values, x);
  HalfWords words;
  for (int lane = 0; lane < 16; ++lane) words[lane] = float_to_half(values[lane]);
  return words;
#endif
}

// Round to nearest, ties to even.
BAN_FAST_HD HalfWords narrow(Vec<float> x, BFloat16) {
  const Words bits = bits_as<std::uint32_t>(x);
  const Words rounded = (bits + Words(0x7fffu) + ((bits >> 16) & Words(1u))) >> 16;
  const Words kept = select(x == x, rounded, Words(0x7fc0u));  // a NaN's payload could carry into the sign
#if defined(__AVX512F__)
  return (HalfWords)_mm512_cvtepi32_epi16((__m512i)kept.part[0]);
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_packus_epi32((__m256i)kept.part[0], (__m256i)kept.part[1]);
  return (HalfWords)_mm256_permute4x64_epi64(pairs, 0xd8);
#else
  std::uint32_t values[16];
  store(values, kept);
  HalfWords words;
  for (int lane = 0; lane < 16; ++lane) words[lane] = std::uint16_t(values[lane]);
  return words;
#endif
}

// ---- Reading a row ---------------------------------------------------------------------------------------------

template <class T, class From>
BAN_FAST_HD T scalar_as(From x) {
  if constexpr (std::is_same_v<From, Half>) {
    return T(half_to_float(x.bits));
  } else if constexpr (std::is_same_v<From, BFloat16>) {
    const std::uint32_t bits = std::uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return T(value);
  } else {
    return T(x);
  }
}

template <class T, class From>
static void convert_row(const From* from, std::int64_t stride, std::int64_t classes, T* to) {
  std::int64_t i = 0;
  if constexpr (sizeof(From) == 2 && sizeof(T) == 4) {
    if (stride == 1) {
      for (; i + 16 <= classes; i += 16) {
        HalfWords words;
        std::memcpy(&words, from + i, sizeof words);
        store(to + i, widen(words, From{}));
      }
    }
  }
  for (; i < classes; ++i) to[i] = scalar_as<T>(from[i * stride]);
}

// Row `row` of a matrix as T: in place where it is T with unit stride, else converted into `buffer`.
template <class T>
static const T* fetch_row(const Matrix& matrix, std::int64_t row, std::int64_t classes, T* buffer) {
  const std::int64_t offset = row * matrix.row_stride, stride = matrix.column_stride;
  switch (matrix.dtype) {
    case DType::f32: {
      const float* from = static_cast<const float*>(matrix.data) + offset;
      if constexpr (std::is_same_v<T, float>) {
        if (stride == 1) return from;
      }
      convert_row(from, stride, classes, buffer);
      break;
    }
    case DType::f64: {
      const double* from = static_cast<const double*>(matrix.data) + offset;
      if constexpr (std::is_same_v<T, double>) {
        if (stride == 1) return from;
      }
      convert_row(from, stride, classes, buffer);
      break;
    }
    case DType::f16: convert_row(static_cast<const Half*>(matrix.data) + offset, stride, classes, buffer); break;
    case DType::bf16: convert_row(static_cast<const BFloat16*>(matrix.data) + offset, stride, classes, buffer); break;
  }
  return buffer;
}

// ---- A gradient's row, in its own type ---------------------------------------------------------------------------

template <class To>
using WordOf = std::conditional_t<sizeof(To) == 2, float, To>;

template <bool kTail, class To>
BAN_FAST_HD void write_some(To* to, Vec<WordOf<To>> x, std::int64_t left) {
  if constexpr (sizeof(To) == 2) {
    const HalfWords words = narrow(x, To{});
#if defined(__AVX512F__)
    if constexpr (kTail) return _mm256_mask_storeu_epi16(to, __mmask16(0xffffu >> (16 - left)), (__m256i)words);
#endif
    std::memcpy(to, &words, kTail ? std::size_t(left) * sizeof(To) : sizeof words);
  } else if constexpr (kTail) {
    store_first(to, x, int(left));
  } else {
    store(to, x);
  }
}

// The same past the cache, for a whole vector at an address that is aligned to one.
template <class To>
BAN_FAST_HD void stream_whole(To* to, Vec<WordOf<To>> x) {
  if constexpr (sizeof(To) == 2) {
    const HalfWords words = narrow(x, To{});
#if defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)words);
#else
    std::memcpy(to, &words, sizeof words);
#endif
  } else {
    stream(to, x);
  }
}

template <bool kTail, class To>
BAN_FAST_HD Vec<WordOf<To>> read_some(const To* from, std::int64_t left) {
  if constexpr (sizeof(To) == 2) {
    HalfWords words{};
#if defined(__AVX512F__)
    if constexpr (kTail) {
      words = (HalfWords)_mm256_maskz_loadu_epi16(__mmask16(0xffffu >> (16 - left)), from);
      return widen(words, To{});
    }
#endif
    std::memcpy(&words, from, kTail ? std::size_t(left) * sizeof(To) : sizeof words);
    return widen(words, To{});
  } else {
    return load_some<kTail>(from, left, To(0));
  }
}

}  // namespace ban_fast::BAN_FAST_ISA
