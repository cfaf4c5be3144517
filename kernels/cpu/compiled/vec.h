// Vectors of float: as many lanes as one register of the target has, in GCC's and Clang's vector extension, so that one
// source serves AVX2, AVX-512, NEON and plain SSE.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
// The same, at any address.
typedef float VecAt __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t BitsAt __attribute__((vector_size(LANES * 4), aligned(2), may_alias));

inline Vec load(const float* from) { return *(const VecAt*)from; }
inline void store(float* to, Vec value) { *(VecAt*)to = value; }

inline Vec splat(float value) {
#if defined(__AVX512F__)
  return (Vec)_mm512_set1_ps(value);
#elif defined(__AVX2__)
  return (Vec)_mm256_set1_ps(value);
#else
  return Vec{value, value, value, value};
#endif
}

inline Vec spread_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return splat(value);
}

// a * b + c, always rounded once where the target can, so that every kernel gives a row the same bits.
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

inline Vec to_float(Ints v) { return __builtin_convertvector(v, Vec); }

inline Ints load_bytes(const int8_t* from) {
  typedef int8_t Bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
  return __builtin_convertvector(*(const Bytes*)from, Ints);
}

inline float sum(Vec v) {
  float total = 0;
  for (int lane = 0; lane < LANES; ++lane) total += v[lane];
  return total;
}

// exp(x) for x <= 88, within 2 units in the last place; 0 below -87.
// exp(x) = 2^n · exp(r) with |r| <= ln(2) / 2; the polynomial is Cephes's expf.
inline Vec exponential(Vec x) {
  const Vec shift = splat(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer in the low bits
  Vec clamped = maximum(x, splat(-87.3f));
  Vec shifted = fma(clamped, splat(1.44269504088896341f), shift);
  Vec n = shifted - shift;
  Vec r = fma(n, splat(-0.693359375f), clamped);
  r = fma(n, splat(2.12194440e-4f), r);
  Vec p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + splat(1.0f);
  Ints exponent = ((Ints)shifted << 23);
  Vec result = (Vec)((Ints)p + exponent) + (x - x);  // NaN stays NaN
  return x < splat(-87.3f) ? splat(0.0f) : result;
}

// cap · tanh(x / cap), to a few units in the last place of cap.
inline Vec soft_capped(Vec x, float cap) {
  Vec twice = x * splat(2.0f / cap);
  twice = twice > splat(80.0f) ? splat(80.0f) : twice;
  return splat(cap) - splat(2.0f * cap) / (exponential(twice) + splat(1.0f));
}

inline float widen_bfloat16(uint16_t bits) {
  uint32_t wide = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

// To nearest even; NaN stays NaN.
inline uint16_t round_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (value != value) return (uint16_t)((bits >> 16) | 0x40);
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Exact for every float16, by integer operations: no target lacks them.
inline float widen_float16(uint16_t bits) {
#if defined(__F16C__)
  return _cvtsh_ss(bits);
#else
  uint32_t sign = (uint32_t)(bits & 0x8000) << 16, rest = bits & 0x7fff, wide;
  if (rest >= 0x7c00) {
    wide = sign | 0x7f800000u | (rest & 0x3ff) << 13;
  } else if (rest >= 0x400) {
    wide = sign | ((rest << 13) + (112u << 23));
  } else {
    float small = (float)rest * 5.9604644775390625e-8f;  // 2^-24
    memcpy(&wide, &small, 4);
    wide |= sign;
  }
  float value;
  memcpy(&value, &wide, 4);
  return value;
#endif
}
