// Sixteen numbers at a time, by whatever vectors a CPU has; and rows rotated by Hadamard matrices (model/int8.py).
#pragma once
#include <cstdint>
#include <cstring>

// Left to itself a compiler stops putting functions where they are called as a file grows, and a loop that calls one is no vector's.
#define INLINE inline __attribute__((always_inline))

namespace {

constexpr float ROUNDING = 12582912.0f;  // 1.5 x 2^23: added, it rounds to a whole number, halves to even, and leaves it in the lowest bits

INLINE int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

INLINE float float_of(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

typedef float Lanes __attribute__((vector_size(64)));  // of the compiler, which makes two or four of them where a CPU's are shorter
typedef int32_t Whole __attribute__((vector_size(64)));

INLINE Lanes loaded(const float* from) {
  Lanes x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

INLINE void store(float* to, Lanes x) { std::memcpy(to, &x, sizeof x); }

#if defined(__clang__)
#define SWAPPED(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
#define SWAPPED(x, ...) __builtin_shuffle(x, Whole{__VA_ARGS__})
#endif

// Sixteen numbers times the Hadamard matrix of 16 rows: at distance 1, 2, 4 and 8 a sum and a difference.
INLINE Lanes mixed(Lanes x) {
  x = SWAPPED(x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14) + x * Lanes{1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1};
  x = SWAPPED(x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13) + x * Lanes{1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1};
  x = SWAPPED(x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11) + x * Lanes{1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1};
  return SWAPPED(x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7) +
         x * Lanes{1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1};
}

// Sixty-four numbers times the Hadamard matrix of as many rows.
INLINE void rotate64(Lanes* x) {
  for (int c = 0; c < 4; c++) x[c] = mixed(x[c]);
  const Lanes ab = x[0] + x[1], a_b = x[0] - x[1], cd = x[2] + x[3], c_d = x[2] - x[3];
  x[0] = ab + cd;
  x[1] = a_b + c_d;
  x[2] = ab - cd;
  x[3] = a_b - c_d;
}

// Each `block` numbers of a row times the Hadamard matrix of so many rows, a power of four. Its norm, the root of block, is left in.
void rotate(float* row, int64_t columns, int64_t block) {
  if (block == 64) {
    for (float* at = row; at < row + columns; at += 64) {
      Lanes x[4] = {loaded(at), loaded(at + 16), loaded(at + 32), loaded(at + 48)};
      rotate64(x);
      for (int c = 0; c < 4; c++) store(at + 16 * c, x[c]);
    }
    return;
  }
  for (int64_t half = 1; half < block; half *= 2)
    for (int64_t start = 0; start < columns; start += 2 * half)
      for (int64_t i = start; i < start + half; i++) {
        const float one = row[i], other = row[i + half];
        row[i] = one + other;
        row[i + half] = one - other;
      }
}

// e^x to two units in the last place, by 2^n e^r with |r| <= ln 2 / 2 and a polynomial of degree 7 (Cephes' expf); written so that compilers
// make vectors of it, which they do not of the library's. Beyond 88 it is e^88.
INLINE float exponential(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + ROUNDING, n = shifted - ROUNDING;
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float sum = 1.9875691500e-4f;
  sum = sum * r + 1.3981999507e-3f;
  sum = sum * r + 8.3334519073e-3f;
  sum = sum * r + 4.1665795894e-2f;
  sum = sum * r + 1.6666665459e-1f;
  sum = sum * r + 5.0000001201e-1f;
  sum = sum * r * r + r + 1.0f;
  return sum * float_of((bits_of(shifted) - bits_of(ROUNDING) + 127) << 23);
}

}  // namespace
