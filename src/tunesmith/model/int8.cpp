// The two passes around an int8 matmul, each of which reads and writes a tensor once. Compiled when first used, by model/int8.py.
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// A row times the Hadamard matrix of `block` rows, a power of four that divides columns, so that numbers columns / block apart are mixed.
// Its norm, the root of block, is left in.
void rotate(float* row, int64_t columns, int64_t block) {
  for (int64_t half = columns / block; half < columns; half *= 2)
    for (int64_t start = 0; start < columns; start += 2 * half) {
      float* __restrict low = row + start;
      float* __restrict high = low + half;
      for (int64_t i = 0; i < half; i++) {
        const float one = low[i], other = high[i];
        low[i] = one + other;
        high[i] = one - other;
      }
    }
}

}  // namespace

// q = round(rotated(x) * by / scale) row by row, scale = the row's largest magnitude / 127. by [columns] may be null: 1. norm: 1 / the root
// of block.
extern "C" void quantise(const float* x, const float* by, int8_t* q, float* scale, int64_t rows, int64_t columns, int64_t block,
                         float norm) {
#pragma omp parallel
  {
    std::vector<float> values(columns);
    float* __restrict value = values.data();
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
      for (int64_t i = 0; i < columns; i++) value[i] = x[row * columns + i] * norm;
      rotate(value, columns, block);
      if (by)
        for (int64_t i = 0; i < columns; i++) value[i] *= by[i];
      // Magnitudes compare like their bits, and what is not a number is the largest of all: it comes out again in the scale.
      int32_t most = 0;
      for (int64_t i = 0; i < columns; i++) {
        int32_t bits;
        std::memcpy(&bits, value + i, 4);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
      }
      float largest;
      std::memcpy(&largest, &most, 4);
      scale[row] = largest / 127;
      const float inverse = most ? 127 / largest : 0;
      int8_t* to = q + row * columns;
      for (int64_t i = 0; i < columns; i++) {
        // 1.5 x 2^23 added rounds to a whole number, halves to even, and leaves it in the lowest bits.
        const float rounded = value[i] * inverse + 12582912.0f;
        int32_t bits;
        std::memcpy(&bits, &rounded, 4);
        to[i] = static_cast<int8_t>(bits);
      }
    }
  }
}

// out = rotated(sums * row_scale * column_scale) + bias. column_scale and bias [columns] may be null: 1 and 0.
extern "C" void dequantise(const int32_t* sums, const float* row_scale, const float* column_scale, const float* bias, float* out,
                           int64_t rows, int64_t columns, int64_t block, float norm) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const int32_t* from = sums + row * columns;
    float* to = out + row * columns;  // may be where `from` is
    const float scale = row_scale[row] * norm;
    for (int64_t i = 0; i < columns; i++) to[i] = static_cast<float>(from[i]) * (column_scale ? scale * column_scale[i] : scale);
    rotate(to, columns, block);
    if (bias)
      for (int64_t i = 0; i < columns; i++) to[i] += bias[i];
  }
}
