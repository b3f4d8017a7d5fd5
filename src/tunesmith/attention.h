// Attention to keys that all queries see, and causal attention, by the products of tiles.h.
#pragma once
#include <omp.h>

#include <cmath>
#include <vector>

#include "tiles.h"

namespace {

// A block of scores at a time, 128 KB, which never leaves a core's own cache: queries by keys.
constexpr int64_t QUERIES = 64, KEYS = 512;

// out = beta out + alpha left right, of packed operands; the right one may have been packed with more depths, of which the first are taken.
void multiply_packed(const char* left, const char* right, float* out, int64_t step, int64_t m, int64_t n, int64_t depth, float alpha, float beta,
                     int64_t packed = 0) {
  alignas(64) float sums[2 * LANES * WIDE];
  const int64_t steps = steps_of(depth), next = steps * 2 * TILE;
  for (int64_t j = 0; j < n; j += WIDE, right += steps_of(packed ? packed : depth) * 4 * TILE)
    for (int64_t i = 0; i < m; i += 2 * LANES) {
      const Run run = {right, steps};
      if (i + LANES < m)
        multiply<2>(left + i / LANES * next, next, &run, 1, sums);
      else
        multiply<1>(left + i / LANES * next, next, &run, 1, sums);
      put(sums, out + i * step + j, step, std::min(2 * LANES, m - i), std::min(WIDE, n - j), alpha, beta);
    }
}

// e^x to two units in the last place, by 2^n e^r with |r| <= ln 2 / 2 and a polynomial of degree 7 (Cephes' expf).
inline __m512 exponential(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 sum = _mm512_set1_ps(1.9875691500e-4f);
  for (const float term : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(term));
  sum = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(sum, r), r, r), _mm512_set1_ps(1));
  return _mm512_scalef_ps(sum, n);
}

// A key head's part: queries and what belongs to them [rows, d], keys and values [keys, d], each with d numbers side by side. Row i sees keys
// up to i % period, as several heads' queries of the same tokens lie one behind the other; period 0: all keys.
struct Head {
  const float *q, *k, *v;
  int64_t rows, keys, d, period;
  float factor;

  // Of the rows [i, to) so many are taken together.
  int64_t rows_at(int64_t i, int64_t to) const { return std::min(QUERIES, period ? std::min(to - i, period - i % period) : to - i); }
  // Of `here` keys from j on row i sees so many.
  int64_t seen(int64_t i, int64_t j, int64_t here) const { return period ? std::clamp<int64_t>(i % period + 1 - j, 0, here) : here; }
};

// Softmax so far of one more block of scores [1, keys]: they become shares of the largest yet, by which `sum` and out [d] are kept up too.
void take_up(float* scores, int64_t keys, float factor, float& most, float& sum, float* out, int64_t d) {
  const __m512 by = _mm512_set1_ps(factor);
  __m512 largest = _mm512_set1_ps(most), total = _mm512_setzero_ps();
  for (int64_t i = 0; i < keys; i += 16) {
    const __mmask16 there = first(keys - i);
    const __m512 x = _mm512_mul_ps(by, _mm512_maskz_loadu_ps(there, scores + i));
    largest = _mm512_mask_max_ps(largest, there, largest, x);
  }
  const float now = _mm512_reduce_max_ps(largest);
  const __m512 minus = _mm512_set1_ps(-now);
  for (int64_t i = 0; i < keys; i += 16) {
    const __mmask16 there = first(keys - i);
    const __m512 x = _mm512_maskz_mov_ps(there, exponential(_mm512_fmadd_ps(by, _mm512_maskz_loadu_ps(there, scores + i), minus)));
    total = _mm512_add_ps(total, x);
    _mm512_mask_storeu_ps(scores + i, there, x);
  }
  const float shrunk = std::exp(most - now);
  most = now;
  sum = sum * shrunk + _mm512_reduce_add_ps(total);
  if (shrunk != 1)
    for (int64_t i = 0; i < d; i++) out[i] *= shrunk;
}

// out [rows, d] and the log sum exp of each row's scores, for rows `from` to `to`.
void attend(const Head& head, int64_t from, int64_t to, float* out, float* sums) {
  const int64_t d = head.d, wide = rounded_up(d, WIDE);
  char* const keys = room.of((2 * KEYS * wide + QUERIES * wide + QUERIES * KEYS + QUERIES * KEYS) * 4);
  char *const values = keys + KEYS * wide * 4, *const queries = values + KEYS * wide * 4, *const shares = queries + QUERIES * wide * 4;
  float* const scores = reinterpret_cast<float*>(shares + QUERIES * KEYS * 4);
  std::vector<float> most(to - from, -1e30f), sum(to - from, 0.0f);
  std::fill(out + from * d, out + to * d, 0.0f);
  for (int64_t j = 0; j < head.keys; j += KEYS) {
    const int64_t here = std::min(KEYS, head.keys - j);
    pack_right({head.k + j * d, 1, d}, d, here, keys);
    pack_right({head.v + j * d, d, 1}, here, d, values);
    for (int64_t i = from, rows; i < to; i += rows) {
      rows = head.rows_at(i, to);
      const int64_t most_seen = head.seen(i + rows - 1, j, here);
      if (!most_seen) continue;
      pack_left({head.q + i * d, d, 1}, rows, d, queries);
      multiply_packed(queries, keys, scores, KEYS, rows, most_seen, d, 1, 0);
      for (int64_t r = 0; r < rows; r++) {
        const int64_t seen = head.seen(i + r, j, here);
        take_up(scores + r * KEYS, seen, head.factor, most[i - from + r], sum[i - from + r], out + (i + r) * d, d);
        std::fill(scores + r * KEYS + seen, scores + r * KEYS + most_seen, 0.0f);
      }
      pack_left({scores, KEYS, 1}, rows, most_seen, shares);
      multiply_packed(shares, values, out + i * d, d, rows, d, most_seen, 1, 1, here);
    }
  }
  for (int64_t i = from; i < to; i++) {
    for (int64_t c = 0; c < d; c++) out[i * d + c] /= sum[i - from];
    sums[i] = most[i - from] + std::log(sum[i - from]);
  }
}

// Scores become shares by the log sum exp, and the gradients to shares those to scores.
void back_up(float* scores, float* of_shares, int64_t keys, float factor, float sum, float drift) {
  const __m512 by = _mm512_set1_ps(factor), minus = _mm512_set1_ps(-sum), less = _mm512_set1_ps(drift);
  for (int64_t i = 0; i < keys; i += 16) {
    const __mmask16 there = first(keys - i);
    const __m512 share = exponential(_mm512_fmadd_ps(by, _mm512_maskz_loadu_ps(there, scores + i), minus));
    _mm512_mask_storeu_ps(scores + i, there, share);
    _mm512_mask_storeu_ps(of_shares + i, there, _mm512_mul_ps(share, _mm512_sub_ps(_mm512_maskz_loadu_ps(there, of_shares + i), less)));
  }
}

// The gradients to queries [rows, d], and of these rows those to keys and values [keys, d] where of_k is given.
void attend_back(const Head& head, int64_t from, int64_t to, const float* of_out, const float* sums, const float* drift, float* of_q, float* of_k,
                 float* of_v) {
  const int64_t d = head.d, wide = rounded_up(d, WIDE);
  char* const keys = room.of((3 * KEYS * wide + 4 * QUERIES * wide + 4 * QUERIES * KEYS) * 4);
  char *const values = keys + KEYS * wide * 4, *const across = values + KEYS * wide * 4, *const queries = across + KEYS * wide * 4;
  char *const given = queries + QUERIES * wide * 4, *const queries_too = given + QUERIES * wide * 4, *const given_too = queries_too + QUERIES * wide * 4;
  char *const packed = given_too + QUERIES * wide * 4, *const turned = packed + QUERIES * KEYS * 4;
  float* const scores = reinterpret_cast<float*>(turned + QUERIES * KEYS * 4);
  float* const of_scores = scores + QUERIES * KEYS;
  for (int64_t j = 0; j < head.keys; j += KEYS) {
    const int64_t here = std::min(KEYS, head.keys - j);
    pack_right({head.k + j * d, 1, d}, d, here, keys);
    pack_right({head.v + j * d, 1, d}, d, here, values);
    pack_right({head.k + j * d, d, 1}, here, d, across);
    if (of_k && head.period) {  // not all of its keys are seen by the first rows
      std::fill(of_k + j * d, of_k + (j + here) * d, 0.0f);
      std::fill(of_v + j * d, of_v + (j + here) * d, 0.0f);
    }
    for (int64_t i = from, rows; i < to; i += rows) {
      rows = head.rows_at(i, to);
      const int64_t most_seen = head.seen(i + rows - 1, j, here);
      if (!most_seen) continue;
      const float more = head.period || i > from;
      const Matrix q = {head.q + i * d, d, 1}, of = {of_out + i * d, d, 1};
      pack_left(q, rows, d, queries);
      pack_left(of, rows, d, given);
      multiply_packed(queries, keys, scores, KEYS, rows, most_seen, d, 1, 0);
      multiply_packed(given, values, of_scores, KEYS, rows, most_seen, d, 1, 0);
      for (int64_t r = 0; r < rows; r++) {
        const int64_t seen = head.seen(i + r, j, here);
        back_up(scores + r * KEYS, of_scores + r * KEYS, seen, head.factor, sums[i + r], drift[i + r]);
        std::fill(scores + r * KEYS + seen, scores + r * KEYS + most_seen, 0.0f);
        std::fill(of_scores + r * KEYS + seen, of_scores + r * KEYS + most_seen, 0.0f);
      }
      pack_left({of_scores, KEYS, 1}, rows, most_seen, packed);
      multiply_packed(packed, across, of_q + i * d, d, rows, d, most_seen, head.factor, j ? 1 : 0, here);
      if (of_k) {
        pack_right(of, rows, d, given_too);
        pack_left({scores, 1, KEYS}, most_seen, rows, turned);
        multiply_packed(turned, given_too, of_v + j * d, d, most_seen, d, rows, 1, more);
        pack_right(q, rows, d, queries_too);
        pack_left({of_scores, 1, KEYS}, most_seen, rows, turned);
        multiply_packed(turned, queries_too, of_k + j * d, d, most_seen, d, rows, head.factor, more);
      }
    }
  }
}

}  // namespace

// Attention: q and out [heads, rows, d], k and v [heads, keys, d], sums [heads, rows] of natural log sum exps; row i sees all keys, or with a
// period those up to i % period. Each head's rows are cut into `cuts` shares, of which a thread takes one at a time.
extern "C" void attention(const float* q, const float* k, const float* v, float* out, float* sums, int64_t heads, int64_t rows, int64_t keys,
                          int64_t d, int64_t period, int64_t cuts, float factor) {
#pragma omp parallel
  {
    _tile_loadconfig(&CONFIGURATION);
#pragma omp for schedule(dynamic)
    for (int64_t part = 0; part < heads * cuts; part++) {
      const int64_t head = part / cuts, cut = part % cuts, from = rows * cut / cuts, to = rows * (cut + 1) / cuts;
      const Head here = {q + head * rows * d, k + head * keys * d, v + head * keys * d, rows, keys, d, period, factor};
      if (from < to) attend(here, from, to, out + head * rows * d, sums + head * rows);
    }
    _tile_release();
  }
}

// Its gradients: of_out as out, drift [heads, rows] what softmax takes off every score's gradient, of_q as q; of_k and of_v [cuts, heads, keys, d],
// to be added up, or null. rows >= cuts.
extern "C" void attention_back(const float* of_out, const float* q, const float* k, const float* v, const float* sums, const float* drift,
                               float* of_q, float* of_k, float* of_v, int64_t heads, int64_t rows, int64_t keys, int64_t d, int64_t period,
                               int64_t cuts, float factor) {
#pragma omp parallel
  {
    _tile_loadconfig(&CONFIGURATION);
#pragma omp for schedule(dynamic)
    for (int64_t part = 0; part < heads * cuts; part++) {
      const int64_t head = part / cuts, cut = part % cuts, from = rows * cut / cuts, to = rows * (cut + 1) / cuts;
      const int64_t of_head = head * rows * d, of_keys = (cut * heads + head) * keys * d;
      const Head here = {q + of_head, k + head * keys * d, v + head * keys * d, rows, keys, d, period, factor};
      attend_back(here, from, to, of_out + of_head, sums + head * rows, drift + head * rows, of_q + of_head, of_k ? of_k + of_keys : nullptr,
                  of_v ? of_v + of_keys : nullptr);
    }
    _tile_release();
  }
}
