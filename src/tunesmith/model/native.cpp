// Passes over rows of fp32 numbers, each of which reads and writes a tensor once. Compiled when first used, by model/native.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../vectors.h"
#include "ragged.h"

namespace {

INLINE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// to = rotated(norm from) * by, which may be null: 1. The bits of the largest magnitude: they compare like it, and what is not a number is the
// largest of all.
INLINE int32_t turned_row(const float* __restrict from, int64_t columns, int64_t block, float norm, const float* by, float* __restrict to) {
  int32_t most = 0;
  if (block == 64) {
    Whole largest = {};
    for (int64_t i = 0; i < columns; i += 64) {
      Lanes x[4];
      for (int c = 0; c < 4; c++) x[c] = norm * loaded(from + i + 16 * c);
      rotate64(x);
      for (int c = 0; c < 4; c++) {
        if (by) x[c] *= loaded(by + i + 16 * c);
        store(to + i + 16 * c, x[c]);
        const Whole bits = (Whole)x[c] & 0x7fffffff;
        largest = bits > largest ? bits : largest;
      }
    }
    for (int i = 0; i < 16; i++) most = std::max(most, largest[i]);
    return most;
  }
  for (int64_t i = 0; i < columns; i++) to[i] = norm * from[i];
  rotate(to, columns, block);
  for (int64_t i = 0; i < columns; i++) {
    to[i] *= by ? by[i] : 1.0f;
    most = std::max(most, bits_of(to[i]) & 0x7fffffff);
  }
  return most;
}

}  // namespace

// q = round(rotated(x) * by / scale) row by row, scale = the row's largest magnitude / 127. A row is of several parts side by side, each of
// which is rotated for itself: x[part] has rows `step` apart. by [all columns] may be null: 1. norm: 1 / the root of block.
extern "C" void quantise(int64_t parts, const float* const* x, const int64_t* step, const int64_t* columns, const int64_t* block,
                         const float* norm, const float* by, int8_t* q, float* scale, int64_t rows) {
  int64_t width = 0;
  for (int64_t part = 0; part < parts; part++) width += columns[part];
#pragma omp parallel
  {
    std::vector<float> values(width);
    float* __restrict value = values.data();
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
      int32_t most = 0;
      for (int64_t part = 0, first = 0; part < parts; first += columns[part++])
        most = std::max(most, turned_row(x[part] + row * step[part], columns[part], block[part], norm[part], by ? by + first : nullptr, value + first));
      const float largest = float_of(most), inverse = most ? 127 / largest : 0;
      scale[row] = largest / 127;
      int8_t* __restrict to = q + row * width;
      for (int64_t i = 0; i < width; i++) to[i] = static_cast<int8_t>(bits_of(value[i] * inverse + ROUNDING));
    }
  }
}

// out[part] = rotated(sums * row_scale * column_scale) + bias[part], the columns of sums part by part. column_scale and any bias may be null:
// 1 and 0. The only part's out may be where sums are.
extern "C" void dequantise(int64_t parts, const int32_t* sums, const float* row_scale, const float* column_scale, const float* const* bias,
                           float* const* out, const int64_t* columns, const int64_t* block, const float* norm, int64_t rows) {
  int64_t width = 0;
  for (int64_t part = 0; part < parts; part++) width += columns[part];
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    int64_t first = 0;
    for (int64_t part = 0; part < parts; part++) {
      const int32_t* from = sums + row * width + first;
      float* to = out[part] + row * columns[part];
      const float scale = row_scale[row] * norm[part];
      const float* of_columns = column_scale ? column_scale + first : nullptr;
#pragma omp simd
      for (int64_t i = 0; i < columns[part]; i++) to[i] = static_cast<float>(from[i]) * (of_columns ? scale * of_columns[i] : scale);
      rotate(to, columns[part], block[part]);
      if (bias[part])
        for (int64_t i = 0; i < columns[part]; i++) to[i] += bias[part][i];
      first += columns[part];
    }
  }
}

// y = w x / rms(x), and root = 1 / rms(x), of rows of `width` numbers.
extern "C" void norm(const float* x, const float* w, float* y, float* root, int64_t rows, int64_t width, float eps) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const float* __restrict from = x + row * width;
    float* __restrict to = y + row * width;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; i++) sum += from[i] * from[i];
    const float by = 1.0f / __builtin_sqrtf(sum / width + eps);
    root[row] = by;
    for (int64_t i = 0; i < width; i++) to[i] = from[i] * by * w[i];
  }
}

// y of `norm` once more, from its root.
extern "C" void norm_again(const float* x, const float* w, float* y, const float* root, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const float* __restrict from = x + row * width;
    float* __restrict to = y + row * width;
    for (int64_t i = 0; i < width; i++) to[i] = from[i] * root[row] * w[i];
  }
}

// The gradient to x. With n = x / rms(x) and g = w * the gradient to y: (g - n mean(g n)) / rms(x).
extern "C" void norm_back(const float* of_y, const float* x, const float* w, const float* root, float* of_x, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const float* __restrict from = x + row * width;
    const float* __restrict given = of_y + row * width;
    float* __restrict to = of_x + row * width;
    const float by = root[row];
    float along = 0;
#pragma omp simd reduction(+ : along)
    for (int64_t i = 0; i < width; i++) along += given[i] * w[i] * from[i];
    along *= by * by / width;
    for (int64_t i = 0; i < width; i++) to[i] = (given[i] * w[i] - from[i] * along) * by;
  }
}

// y = silu(gate) * up, rows of gate and up `step` apart.
extern "C" void gated(const float* gate, const float* up, int64_t step, float* y, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const float* __restrict g = gate + row * step;
    const float* __restrict u = up + row * step;
    float* __restrict to = y + row * width;
    for (int64_t i = 0; i < width; i++) to[i] = g[i] * sigmoid(g[i]) * u[i];
  }
}

// The gradients to both of the gradient to y.
extern "C" void gated_back(const float* of_y, const float* gate, const float* up, int64_t step, float* of_gate, float* of_up, int64_t rows,
                           int64_t width) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const float* __restrict given = of_y + row * width;
    const float* __restrict g = gate + row * step;
    const float* __restrict u = up + row * step;
    float* __restrict to_gate = of_gate + row * width;
    float* __restrict to_up = of_up + row * width;
    for (int64_t i = 0; i < width; i++) {
      const float s = sigmoid(g[i]);
      to_up[i] = given[i] * g[i] * s;
      to_gate[i] = given[i] * u[i] * s * (1.0f + g[i] * (1.0f - s));
    }
  }
}

// Rotary embedding of x [tokens, heads, width], width even, by cos and sin [tokens, width]: with halves (a, b) of a head, (a cos - b sin,
// b cos + a sin), each half by its own angles. back: of a gradient, the transpose of that.
extern "C" void turned(const float* x, const float* cos, const float* sin, float* y, int64_t tokens, int64_t heads, int64_t width,
                       int64_t back) {
  const int64_t half = width / 2;
#pragma omp parallel for schedule(static)
  for (int64_t token = 0; token < tokens; token++) {
    const float* __restrict c = cos + token * width;
    const float* __restrict s = sin + token * width;
    for (int64_t head = 0; head < heads; head++) {
      const float* __restrict a = x + (token * heads + head) * width;
      const float* __restrict b = a + half;
      float* __restrict to_a = y + (token * heads + head) * width;
      float* __restrict to_b = to_a + half;
      if (back)
        for (int64_t i = 0; i < half; i++) {
          to_a[i] = a[i] * c[i] + b[i] * s[i + half];
          to_b[i] = b[i] * c[i + half] - a[i] * s[i];
        }
      else
        for (int64_t i = 0; i < half; i++) {
          to_a[i] = a[i] * c[i] - b[i] * s[i];
          to_b[i] = b[i] * c[i + half] + a[i] * s[i + half];
        }
    }
  }
}

// Scores of attention, rows of `width` keys, become their softmax, and sums [rows] get its logarithm: log sum exp.
extern "C" void softmax(float* scores, float* sums, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    float* __restrict at = scores + row * width;
    float most = at[0], sum = 0;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < width; i++) most = at[i] > most ? at[i] : most;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; i++) sum += at[i] = exponential(at[i] - most);
    const float by = 1.0f / sum;
    for (int64_t i = 0; i < width; i++) at[i] *= by;
    sums[row] = most + std::log(sum);
  }
}

// Scores become shares by their log sum exp, and the gradients to shares those to scores: share * (gradient - drift), where drift [rows] is
// the sum of both over all that a query sees.
extern "C" void softmax_back(float* scores, float* of_shares, const float* sums, const float* drift, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    float* __restrict at = scores + row * width;
    float* __restrict of = of_shares + row * width;
    for (int64_t i = 0; i < width; i++) {
      at[i] = exponential(at[i] - sums[row]);
      of[i] = at[i] * (of[i] - drift[row]);
    }
  }
}
