// Attention of segments to the segments that they continue and, causally, to themselves, where all of them are short: what torch's kernels
// would want is one call for each group of equal segments, with their tokens moved there and back, and a merge of two parts.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../vectors.h"

namespace {

// Tokens [start, stop), and the [start, stop) of what they continue: `contexts` pairs of numbers from `at` on.
struct Segment {
  int64_t start, stop, contexts, at;
  int64_t length() const { return stop - start; }
};

// A micro-batch's tokens: queries and outputs [tokens, heads, D], keys and values [tokens, groups, D], each group of heads with the same keys.
struct Batch {
  const Segment* segments;
  const int64_t* ranges;
  int64_t count, tokens, heads, groups;
  float factor;
  int64_t shared() const { return heads / groups; }
  int64_t before(const Segment& s) const {
    int64_t sum = 0;
    for (int64_t i = 0; i < s.contexts; i++) sum += ranges[s.at + 2 * i + 1] - ranges[s.at + 2 * i];
    return sum;
  }
  // Scores of a row lie so far apart: a multiple of the keys that are multiplied at a time.
  int64_t width(const Segment& s) const { return (before(s) + s.length() + 31) / 32 * 32; }
  // Where a segment's scores begin, all heads together.
  int64_t scores(int64_t number) const {
    int64_t sum = 0;
    for (int64_t i = 0; i < number; i++) sum += segments[i].length() * heads * width(segments[i]);
    return sum;
  }
};

// A group's keys or values that a segment sees: [keys, D], and turned [D, width], with 0 where there is none.
template <int D>
void gather(const Batch& batch, const Segment& s, int64_t group, const float* x, float* rows, float* turned) {
  const int64_t width = batch.width(s);
  int64_t key = 0;
  for (int64_t i = 0; i <= s.contexts; i++) {
    const int64_t from = i < s.contexts ? batch.ranges[s.at + 2 * i] : s.start, to = i < s.contexts ? batch.ranges[s.at + 2 * i + 1] : s.stop;
    for (int64_t token = from; token < to; token++, key++) {
      const float* at = x + (token * batch.groups + group) * D;
      for (int c = 0; c < D; c += 16) store(rows + key * D + c, loaded(at + c));
      for (int c = 0; c < D; c++) turned[c * width + key] = at[c];
    }
  }
  for (int c = 0; c < D; c++)
    for (int64_t empty = key; empty < width; empty++) turned[c * width + empty] = 0;
}

// to [ROWS, width] = the products of ROWS rows of x with `keys` turned ones.
template <int D, int ROWS>
void rows_by_turned(const float* const* x, const float* turned, int64_t width, int64_t keys, float* to) {
  for (int64_t j = 0; j < keys; j += 32) {
    Lanes sums[ROWS][2] = {};
    for (int t = 0; t < D; t++) {
      const Lanes a = loaded(turned + t * width + j), b = loaded(turned + t * width + j + 16);
      for (int r = 0; r < ROWS; r++) {
        sums[r][0] += x[r][t] * a;
        sums[r][1] += x[r][t] * b;
      }
    }
    for (int r = 0; r < ROWS; r++) {
      store(to + r * width + j, sums[r][0]);
      store(to + r * width + j + 16, sums[r][1]);
    }
  }
}

// sums [ROWS, D] += the sum over `count` numbers of each row's share times a row of x, which lie `step` apart.
template <int D, int ROWS>
void add_rows(const float* shares, int64_t row, int64_t next, int64_t count, const float* x, int64_t step, Lanes (*sums)[D / 16]) {
  for (int64_t j = 0; j < count; j++, x += step, shares += next) {
    Lanes of[D / 16];
    for (int c = 0; c < D / 16; c++) of[c] = loaded(x + 16 * c);
    for (int r = 0; r < ROWS; r++)
      for (int c = 0; c < D / 16; c++) sums[r][c] += shares[r * row] * of[c];
  }
}

// Rows [i, i + ROWS) of a segment and a head. shares has room for ROWS rows of scores.
template <int D, int ROWS>
void see(const Batch& batch, const Segment& s, int64_t head, int64_t i, const float* q, const float* turned_k, const float* v, const float* outer,
         const float* outer_sums, float* shares, float* out, float* sums) {
  const int64_t width = batch.width(s), before = batch.before(s), step = batch.heads * D;
  const float* x[ROWS];
  for (int r = 0; r < ROWS; r++) x[r] = q + (s.start + i + r) * step + head * D;
  rows_by_turned<D, ROWS>(x, turned_k, width, before + i + ROWS, shares);
  float by[ROWS], keeps[ROWS];
  for (int r = 0; r < ROWS; r++) {
    float* const mine = shares + r * width;
    const int64_t seen = before + i + r + 1, place = head * batch.tokens + s.start + i + r;
    float most = mine[0] * batch.factor, sum = 0;
    for (int64_t j = 0; j < seen; j++) mine[j] *= batch.factor;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < seen; j++) most = mine[j] > most ? mine[j] : most;
    for (int64_t j = 0; j < seen; j++) mine[j] = exponential(mine[j] - most);
    for (int64_t j = seen; j < before + i + ROWS; j++) mine[j] = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < seen; j++) sum += mine[j];
    float total = most + std::log(sum);
    by[r] = 1 / sum;
    if (outer) {  // two parts, each weighted by its share of all exponentials
      const float own = total, other = outer_sums[place], larger = std::max(own, other);
      total = larger + std::log(std::exp(own - larger) + std::exp(other - larger));
      by[r] *= std::exp(own - total);
      keeps[r] = std::exp(other - total);
    }
    sums[place] = total;
  }
  Lanes made[ROWS][D / 16] = {};
  add_rows<D, ROWS>(shares, width, 1, before + i + ROWS, v, D, made);
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < D / 16; c++) {
      Lanes y = by[r] * made[r][c];
      if (outer) y += keeps[r] * loaded(outer + (head * batch.tokens + s.start + i + r) * D + 16 * c);
      store(out + (s.start + i + r) * step + head * D + 16 * c, y);
    }
}

// The same rows backward: their shares and the gradients to their scores, which stay for the keys' gradients, and the gradient to q.
template <int D, int ROWS>
void see_back(const Batch& batch, const Segment& s, int64_t head, int64_t i, const float* of_out, const float* q, const float* k,
              const float* turned_k, const float* turned_v, const float* out, const float* sums, float* shares, float* of_scores, float* of_q) {
  const int64_t width = batch.width(s), before = batch.before(s), step = batch.heads * D, all = before + s.length();
  const float *x[ROWS], *of[ROWS];
  for (int r = 0; r < ROWS; r++) {
    x[r] = q + (s.start + i + r) * step + head * D;
    of[r] = of_out + (s.start + i + r) * step + head * D;
  }
  rows_by_turned<D, ROWS>(x, turned_k, width, before + i + ROWS, shares);
  rows_by_turned<D, ROWS>(of, turned_v, width, before + i + ROWS, of_scores);
  for (int r = 0; r < ROWS; r++) {
    float *const mine = shares + r * width, *const gradient = of_scores + r * width;
    const float* const y = out + (s.start + i + r) * step + head * D;
    const float total = sums[head * batch.tokens + s.start + i + r];
    const int64_t seen = before + i + r + 1;
    float drift = 0;  // what softmax takes off every gradient
#pragma omp simd reduction(+ : drift)
    for (int c = 0; c < D; c++) drift += of[r][c] * y[c];
    for (int64_t j = 0; j < seen; j++) mine[j] = exponential(mine[j] * batch.factor - total);
    for (int64_t j = 0; j < seen; j++) gradient[j] = mine[j] * (gradient[j] - drift) * batch.factor;
    for (int64_t j = seen; j < all; j++) mine[j] = gradient[j] = 0;
  }
  Lanes made[ROWS][D / 16] = {};
  add_rows<D, ROWS>(of_scores, width, 1, before + i + ROWS, k, D, made);
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < D / 16; c++) store(of_q + (s.start + i + r) * step + head * D + 16 * c, made[r][c]);
}

// Keys [j, j + ROWS) of a segment and group: the gradients to them and to their values, from all segments that see them.
template <int D, int ROWS>
void be_seen_back(const Batch& batch, int64_t number, int64_t group, int64_t j, const float* of_out, const float* q, const float* shares,
                  const float* of_scores, float* of_k, float* of_v) {
  const Segment& mine = batch.segments[number];
  const int64_t step = batch.heads * D, shared = batch.shared();
  Lanes to_k[ROWS][D / 16] = {}, to_v[ROWS][D / 16] = {};
  int64_t begin = 0;
  for (int64_t other = 0; other < batch.count; other++) {
    const Segment& s = batch.segments[other];
    const int64_t width = batch.width(s);
    int64_t place = 0, i = 0;
    bool sees = other == number;
    if (sees) {
      place = batch.before(s);
      i = j;  // earlier ones do not see it
    } else {
      for (int64_t one = 0; one < s.contexts && !sees; one++) {
        sees = batch.ranges[s.at + 2 * one] == mine.start;
        place += sees ? 0 : batch.ranges[s.at + 2 * one + 1] - batch.ranges[s.at + 2 * one];
      }
    }
    for (int64_t head = group * shared; sees && head < (group + 1) * shared; head++) {
      const int64_t from = begin + (head * s.length() + i) * width + place + j, row = (s.start + i) * step + head * D;
      add_rows<D, ROWS>(of_scores + from, 1, width, s.length() - i, q + row, step, to_k);
      add_rows<D, ROWS>(shares + from, 1, width, s.length() - i, of_out + row, step, to_v);
    }
    begin += s.length() * batch.heads * width;
  }
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < D / 16; c++) {
      const int64_t at = ((mine.start + j + r) * batch.groups + group) * D + 16 * c;
      store(of_k + at, to_k[r][c]);
      store(of_v + at, to_v[r][c]);
    }
}

// Rows that are taken together: their sums of D numbers each stay in registers.
template <int D>
constexpr int TOGETHER = D > 64 ? 2 : 4;

template <int D>
void attend(const Batch& batch, const float* q, const float* k, const float* v, const float* outer, const float* outer_sums, float* out, float* sums) {
#pragma omp parallel
  {
    std::vector<float> keys, values, turned, scores;
#pragma omp for schedule(dynamic)
    for (int64_t part = 0; part < batch.count * batch.groups; part++) {
      const Segment& s = batch.segments[part / batch.groups];
      const int64_t group = part % batch.groups, width = batch.width(s);
      keys.resize(width * D);
      values.resize(width * D);
      turned.resize(width * D);
      scores.resize(TOGETHER<D> * width);
      gather<D>(batch, s, group, v, values.data(), turned.data());
      gather<D>(batch, s, group, k, keys.data(), turned.data());
      for (int64_t head = group * batch.shared(); head < (group + 1) * batch.shared(); head++) {
        int64_t i = 0;
        for (constexpr int N = TOGETHER<D>; i + N <= s.length(); i += N) see<D, N>(batch, s, head, i, q, turned.data(), values.data(), outer, outer_sums, scores.data(), out, sums);
        for (; i < s.length(); i++) see<D, 1>(batch, s, head, i, q, turned.data(), values.data(), outer, outer_sums, scores.data(), out, sums);
      }
    }
  }
}

template <int D>
void attend_back(const Batch& batch, const float* of_out, const float* q, const float* k, const float* v, const float* out, const float* sums,
                 float* shares, float* of_scores, float* of_q, float* of_k, float* of_v) {
#pragma omp parallel
  {
    std::vector<float> keys, values, turned_k, turned_v;
#pragma omp for schedule(dynamic)
    for (int64_t part = 0; part < batch.count * batch.groups; part++) {
      const Segment& s = batch.segments[part / batch.groups];
      const int64_t group = part % batch.groups, width = batch.width(s), begin = batch.scores(part / batch.groups);
      for (auto* room : {&keys, &values, &turned_k, &turned_v}) room->resize(width * D);
      gather<D>(batch, s, group, k, keys.data(), turned_k.data());
      gather<D>(batch, s, group, v, values.data(), turned_v.data());
      for (int64_t head = group * batch.shared(); head < (group + 1) * batch.shared(); head++) {
        float *const p = shares + begin + head * s.length() * width, *const g = of_scores + begin + head * s.length() * width;
        int64_t i = 0;
        for (constexpr int N = TOGETHER<D>; i + N <= s.length(); i += N)
          see_back<D, N>(batch, s, head, i, of_out, q, keys.data(), turned_k.data(), turned_v.data(), out, sums, p + i * width, g + i * width, of_q);
        for (; i < s.length(); i++)
          see_back<D, 1>(batch, s, head, i, of_out, q, keys.data(), turned_k.data(), turned_v.data(), out, sums, p + i * width, g + i * width, of_q);
      }
    }
    // What all threads have made above is read here. Each key's gradient is added up by one of them, in the same order whatever their number.
#pragma omp for schedule(dynamic)
    for (int64_t part = 0; part < batch.count * batch.groups; part++) {
      const int64_t number = part / batch.groups, group = part % batch.groups, length = batch.segments[number].length();
      int64_t j = 0;
      for (constexpr int N = TOGETHER<D>; j + N <= length; j += N) be_seen_back<D, N>(batch, number, group, j, of_out, q, shares, of_scores, of_k, of_v);
      for (; j < length; j++) be_seen_back<D, 1>(batch, number, group, j, of_out, q, shares, of_scores, of_k, of_v);
    }
  }
}

}  // namespace

// out [tokens, heads, d], and sums [heads, tokens], the natural log sum exp of each query's scores. outer [heads, tokens, d] and outer_sums are
// those of what every token sees besides, or null. d is 16, 32, 64 or 128.
extern "C" void ragged(const Segment* segments, const int64_t* ranges, int64_t count, int64_t tokens, int64_t heads, int64_t groups, int64_t d,
                       float factor, const float* q, const float* k, const float* v, const float* outer, const float* outer_sums, float* out,
                       float* sums) {
  const Batch batch = {segments, ranges, count, tokens, heads, groups, factor};
  const auto attending = d == 16 ? attend<16> : d == 32 ? attend<32> : d == 64 ? attend<64> : attend<128>;
  attending(batch, q, k, v, outer, outer_sums, out, sums);
}

// The gradients to q, k and v; shares and of_scores are room for all scores, Batch.scores(count) numbers each.
extern "C" void ragged_back(const Segment* segments, const int64_t* ranges, int64_t count, int64_t tokens, int64_t heads, int64_t groups,
                            int64_t d, float factor, const float* of_out, const float* q, const float* k, const float* v, const float* out,
                            const float* sums, float* shares, float* of_scores, float* of_q, float* of_k, float* of_v) {
  const Batch batch = {segments, ranges, count, tokens, heads, groups, factor};
  const auto attending = d == 16 ? attend_back<16> : d == 32 ? attend_back<32> : d == 64 ? attend_back<64> : attend_back<128>;
  attending(batch, of_out, q, k, v, out, sums, shares, of_scores, of_q, of_k, of_v);
}
