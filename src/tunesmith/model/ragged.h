// Attention of segments to what they continue and, causally, to themselves, in fp32: a block of scores at a time that never leaves a core's cache
// (FlashAttention, arXiv 2205.14135). Nothing is padded, moved or kept but the log sum exp of each query's scores; what torch's kernels would want
// is one call for each group of equal segments, with their tokens moved there and back, and a merge of two parts.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../vectors.h"

namespace {

// Keys of a block; keys whose scores are made together; queries of a thread's part, those whose scores stay for the gradients to keys, and those
// whose scores are made together.
constexpr int64_t KEYS = 256, PANEL = 32, PART = 144, QUERIES = 48, STRIP = 12;

// Tokens [start, stop), and the [start, stop) of what they continue: `contexts` pairs of numbers from `at` on.
struct Segment {
  int64_t start, stop, contexts, at;
  int64_t parts() const { return (stop - start + PART - 1) / PART; }
};

// Keys [key, key + count), each of which is seen by all queries of a segment, or by those from it on.
struct Block {
  int64_t key, count;
  bool is_causal;
  int64_t seen(int64_t query) const { return is_causal ? std::clamp<int64_t>(query + 1 - key, 0, count) : count; }
  int64_t first_to_see(int64_t place, int64_t query) const { return is_causal ? std::max(query, key + place) : query; }
};

// A micro-batch: queries and outputs [tokens, heads, D], keys and values [keys, groups, D], each group of heads with the same ones. Where segments
// are not causal they see what they continue alone.
struct Batch {
  const Segment* segments;
  const int64_t* ranges;
  int64_t count, tokens, keys, heads, groups;
  bool is_causal;
  float factor;
  int64_t shared() const { return heads / groups; }
  // Whether nobody sees keys of another segment.
  bool are_alone() const {
    return is_causal && std::all_of(segments, segments + count, [](const Segment& s) { return !s.contexts; });
  }
  // What queries before `to` see, block by block.
  template <class Visit>
  void each_block(const Segment& s, int64_t to, Visit visit) const {
    for (int64_t i = 0; i < s.contexts; i++)
      for (int64_t key = ranges[s.at + 2 * i], end = ranges[s.at + 2 * i + 1]; key < end; key += KEYS)
        visit(Block{key, std::min(KEYS, end - key), false});
    for (int64_t key = s.start; is_causal && key < to; key += KEYS) visit(Block{key, std::min(KEYS, to - key), true});
  }
};

// c [ROWS, 16 WIDTH] += a b, or = : a's rows lie `row` apart and its columns `column`, b's rows `step` apart and c's `to`. Sums stay in registers.
template <int ROWS, int WIDTH>
INLINE void multiply(const float* a, int64_t row, int64_t column, const float* b, int64_t step, int64_t depth, float* c, int64_t to, bool adds) {
  Lanes sums[ROWS][WIDTH];
  for (int r = 0; r < ROWS; r++)
    for (int w = 0; w < WIDTH; w++) sums[r][w] = adds ? loaded(c + r * to + 16 * w) : Lanes{};
  for (int64_t t = 0; t < depth; t++, a += column, b += step) {
    Lanes of[WIDTH];
    for (int w = 0; w < WIDTH; w++) of[w] = loaded(b + 16 * w);
    for (int r = 0; r < ROWS; r++)
      for (int w = 0; w < WIDTH; w++) sums[r][w] += a[r * row] * of[w];
  }
  for (int r = 0; r < ROWS; r++)
    for (int w = 0; w < WIDTH; w++) store(c + r * to + 16 * w, sums[r][w]);
}

// The same of any number of rows, of which ROWS at a time fill the registers.
template <int ROWS, int WIDTH>
inline void multiply_rows(int64_t rows, const float* a, int64_t row, int64_t column, const float* b, int64_t step, int64_t depth, float* c, int64_t to,
                          bool adds) {
  int64_t i = 0;
  for (; i + ROWS <= rows; i += ROWS) multiply<ROWS, WIDTH>(a + i * row, row, column, b, step, depth, c + i * to, to, adds);
  for (; i + 4 <= rows; i += 4) multiply<4, WIDTH>(a + i * row, row, column, b, step, depth, c + i * to, to, adds);
  for (; i < rows; i++) multiply<1, WIDTH>(a + i * row, row, column, b, step, depth, c + i * to, to, adds);
}

// c [rows, D] += a [rows, depth] b [depth, D].
template <int D>
inline void add_heads(int64_t rows, const float* a, int64_t row, int64_t column, const float* b, int64_t step, int64_t depth, float* c, int64_t to) {
  constexpr int WIDTH = D > 64 ? 4 : D / 16;
  for (int at = 0; at < D; at += 16 * WIDTH) multiply_rows<(WIDTH > 2 ? 6 : 12), WIDTH>(rows, a, row, column, b + at, step, depth, c + at, to, true);
}

// Sixteen rows of sixteen numbers become columns.
INLINE void transpose(Lanes* x) {
#if defined(__clang__)
#define OF_BOTH(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define OF_BOTH(a, b, ...) __builtin_shuffle(a, b, Whole{__VA_ARGS__})
#endif
#define SWAP(distance, FIRST, SECOND)                  \
  for (int i = 0; i < 16; i++)                         \
    if (!(i & distance)) {                             \
      const Lanes a = x[i], b = x[i + distance];       \
      x[i] = OF_BOTH(a, b, FIRST);                     \
      x[i + distance] = OF_BOTH(a, b, SECOND);         \
    }
#define LIST(...) __VA_ARGS__
  SWAP(1, LIST(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30), LIST(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
  SWAP(2, LIST(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29), LIST(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
  SWAP(4, LIST(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27), LIST(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
  SWAP(8, LIST(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23), LIST(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#undef LIST
#undef SWAP
#undef OF_BOTH
}

// x [keys, D], rows `step` apart, as panels of PANEL columns: [any, D, PANEL], with 0 where there is no key.
template <int D>
void in_panels(const float* x, int64_t step, int64_t keys, float* to) {
  for (int64_t key = 0; key < keys; key += 16) {
    float* const panel = to + key / PANEL * D * PANEL + key % PANEL;
    for (int t = 0; t < D; t += 16) {
      Lanes square[16];
      for (int64_t i = 0; i < 16; i++) square[i] = key + i < keys ? loaded(x + (key + i) * step + t) : Lanes{};
      transpose(square);
      for (int64_t i = 0; i < 16; i++) store(panel + (t + i) * PANEL, square[i]);
    }
  }
}

// to [rows, KEYS] = x [rows, D] times so many keys, and those behind them up to a multiple of 16.
template <int D>
void by_panels(int64_t rows, const float* x, int64_t step, const float* panels, int64_t keys, float* to) {
  for (int64_t j = 0; j < keys; j += PANEL)
    if (keys - j > 16)
      multiply_rows<STRIP, 2>(rows, x, step, 1, panels + j * D, PANEL, D, to + j, KEYS, false);
    else
      multiply_rows<STRIP, 1>(rows, x, step, 1, panels + j * D, PANEL, D, to + j, KEYS, false);
}

// Softmax so far of one more block of scores [keys]: they become shares of the largest yet, by which `sum` and out [d] are kept up too.
INLINE void take_up(float* __restrict scores, int64_t keys, float factor, float& most, float& sum, float* __restrict out, int64_t d) {
  float largest = scores[0] * factor, total = 0;
  for (int64_t j = 0; j < keys; j++) scores[j] *= factor;
#pragma omp simd reduction(max : largest)
  for (int64_t j = 0; j < keys; j++) largest = scores[j] > largest ? scores[j] : largest;
  const float now = std::max(most, largest);
  for (int64_t j = 0; j < keys; j++) scores[j] = exponential(scores[j] - now);
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < keys; j++) total += scores[j];
  const float shrunk = std::exp(most - now);
  most = now;
  sum = sum * shrunk + total;
  if (shrunk != 1)
    for (int64_t c = 0; c < d; c++) out[c] *= shrunk;
}

// A thread's own memory, for one part after the other: blocks of keys and values in panels and of scores, and two numbers of each query.
struct Room {
  std::vector<float> keys, values, shares, of_scores, some, others;
  Room(int64_t d, int64_t rows, int64_t queries, bool is_back)
      : keys(KEYS * d), values(is_back ? KEYS * d : 0), shares(rows * KEYS), of_scores(is_back ? rows * KEYS : 0), some(queries), others(queries) {}
};

// Of a segment the queries [from, to), of one group of heads.
template <int D>
void attend(const Batch& batch, const Segment& s, int64_t from, int64_t to, int64_t group, const float* q, const float* k, const float* v,
            const float* outer, const float* outer_sums, float* out, float* sums, Room& room) {
  const int64_t step = batch.heads * D, key_step = batch.groups * D, first = group * batch.shared(), last = first + batch.shared(), n = to - from;
  float *const panels = room.keys.data(), *const scores = room.shares.data(), *const most = room.some.data(), *const sum = room.others.data();
  for (int64_t head = first; head < last; head++)
    for (int64_t i = from; i < to; i++) {
      const int64_t place = head * batch.tokens + i, mine = (head - first) * n + i - from;
      float* const y = out + i * step + head * D;
      // Another part begins where softmax over that one has ended.
      most[mine] = outer ? outer_sums[place] : -1e30f;
      sum[mine] = outer ? 1.0f : 0.0f;
      for (int c = 0; c < D; c++) y[c] = outer ? outer[i * step + head * D + c] : 0.0f;
    }
  batch.each_block(s, to, [&](const Block& block) {
    const float* const values = v + block.key * key_step + group * D;
    in_panels<D>(k + block.key * key_step + group * D, key_step, block.count, panels);
    for (int64_t head = first; head < last; head++)
      for (int64_t i = from; i < to; i += STRIP) {
        const int64_t rows = std::min(STRIP, to - i), most_seen = block.seen(i + rows - 1), mine = (head - first) * n + i - from;
        float* const y = out + i * step + head * D;
        by_panels<D>(rows, q + i * step + head * D, step, panels, most_seen, scores);
        for (int64_t r = 0; r < rows; r++) {
          float* const row = scores + r * KEYS;
          const int64_t seen = block.seen(i + r);
          if (seen) take_up(row, seen, batch.factor, most[mine + r], sum[mine + r], y + r * step, D);
          std::fill(row + seen, row + most_seen, 0.0f);
        }
        add_heads<D>(rows, scores, KEYS, 1, values, key_step, most_seen, y, step);
      }
  });
  for (int64_t head = first; head < last; head++)
    for (int64_t i = from; i < to; i++) {
      const int64_t mine = (head - first) * n + i - from;
      float* const y = out + i * step + head * D;
      for (int c = 0; c < D; c++) y[c] /= sum[mine];
      sums[head * batch.tokens + i] = most[mine] + std::log(sum[mine]);
    }
}

// The gradients to those queries, and what is added by them to those to keys and values, where these are wanted.
template <int D>
void attend_back(const Batch& batch, const Segment& s, int64_t from, int64_t to, int64_t group, const float* of_out, const float* q, const float* k,
                 const float* v, const float* out, const float* sums, float* of_q, float* of_k, float* of_v, Room& room) {
  const int64_t step = batch.heads * D, key_step = batch.groups * D, first = group * batch.shared(), last = first + batch.shared(), n = to - from;
  float *const panels_k = room.keys.data(), *const panels_v = room.values.data(), *const shares = room.shares.data();
  float *const of_scores = room.of_scores.data(), *const drift = room.some.data();
  for (int64_t head = first; head < last; head++)
    for (int64_t i = from; i < to; i++) {
      const float *const of = of_out + i * step + head * D, *const y = out + i * step + head * D;
      float sum = 0;  // what softmax takes off every gradient
#pragma omp simd reduction(+ : sum)
      for (int c = 0; c < D; c++) sum += of[c] * y[c];
      drift[(head - first) * n + i - from] = sum;
      std::fill_n(of_q + i * step + head * D, D, 0.0f);
    }
  batch.each_block(s, to, [&](const Block& block) {
    const int64_t begin = block.key * key_step + group * D;
    in_panels<D>(k + begin, key_step, block.count, panels_k);
    in_panels<D>(v + begin, key_step, block.count, panels_v);
    for (int64_t head = first; head < last; head++)
      for (int64_t i = from; i < to; i += QUERIES) {
        const int64_t rows = std::min(QUERIES, to - i), most_seen = block.seen(i + rows - 1);
        for (int64_t top = 0; top < rows; top += STRIP) {
          const int64_t tall = std::min(STRIP, rows - top), at = (i + top) * step + head * D, seen_here = block.seen(i + top + tall - 1);
          float *const p = shares + top * KEYS, *const g = of_scores + top * KEYS;
          by_panels<D>(tall, q + at, step, panels_k, seen_here, p);
          by_panels<D>(tall, of_out + at, step, panels_v, seen_here, g);
          for (int64_t r = 0; r < tall; r++) {
            float *const __restrict share = p + r * KEYS, *const __restrict gradient = g + r * KEYS;
            const int64_t query = i + top + r, seen = block.seen(query);
            const float total = sums[head * batch.tokens + query], less = drift[(head - first) * n + query - from], factor = batch.factor;
            for (int64_t j = 0; j < seen; j++) share[j] = exponential(share[j] * factor - total);
            for (int64_t j = 0; j < seen; j++) gradient[j] = share[j] * (gradient[j] - less) * factor;
            std::fill(share + seen, share + most_seen, 0.0f);
            std::fill(gradient + seen, gradient + most_seen, 0.0f);
          }
          add_heads<D>(tall, g, KEYS, 1, k + begin, key_step, seen_here, of_q + at, step);
        }
        for (int64_t key = 0; of_k && key < most_seen; key += STRIP) {
          const int64_t keys = std::min(STRIP, most_seen - key), query = block.first_to_see(key, i), deep = i + rows - query;
          const int64_t scores = (query - i) * KEYS + key, row = query * step + head * D, place = begin + key * key_step;
          add_heads<D>(keys, shares + scores, 1, KEYS, of_out + row, step, deep, of_v + place, key_step);
          add_heads<D>(keys, of_scores + scores, 1, KEYS, q + row, step, deep, of_k + place, key_step);
        }
      }
  });
}

// All parts: of which segment, which queries.
struct Part {
  const Segment* segment;
  int64_t from, to;
};

std::vector<Part> parts_of(const Batch& batch) {
  std::vector<Part> parts;
  for (const Segment* s = batch.segments; s < batch.segments + batch.count; s++)
    for (int64_t i = 0, all = s->parts(), n = s->stop - s->start; i < all; i++) parts.push_back({s, s->start + n * i / all, s->start + n * (i + 1) / all});
  return parts;
}

template <int D>
void attend_all(const Batch& batch, const float* q, const float* k, const float* v, const float* outer, const float* outer_sums, float* out, float* sums) {
  const std::vector<Part> parts = parts_of(batch);
  const int64_t all = parts.size() * batch.groups;
#pragma omp parallel
  {
    Room room(D, STRIP, PART * batch.shared(), false);
#pragma omp for schedule(dynamic)
    for (int64_t i = all - 1; i >= 0; i--) {  // those that see most first
      const Part& part = parts[i / batch.groups];
      attend<D>(batch, *part.segment, part.from, part.to, i % batch.groups, q, k, v, outer, outer_sums, out, sums, room);
    }
  }
}

// Each copy of the gradients to keys and values is added up by one thread a group of heads. Segments that are alone need no second one: each is a
// thread's, and so are its keys.
template <int D>
void attend_all_back(const Batch& batch, int64_t copies, const float* of_out, const float* q, const float* k, const float* v, const float* out,
                     const float* sums, float* of_q, float* of_k, float* of_v) {
  const std::vector<Part> parts = parts_of(batch);
  const bool by_segment = batch.are_alone() && copies == 1;
  const int64_t size = batch.keys * batch.groups * D, shares = by_segment ? batch.count : copies;
#pragma omp parallel
  {
    Room room(D, QUERIES, PART * batch.shared(), true);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < (of_k ? copies * batch.keys * batch.groups : 0); row++) {
      std::fill_n(of_k + row * D, D, 0.0f);
      std::fill_n(of_v + row * D, D, 0.0f);
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < shares * batch.groups; i++) {
      const int64_t share = i / batch.groups, group = i % batch.groups, copy = by_segment ? 0 : share;
      for (size_t number = 0; number < parts.size(); number++) {
        const Part& part = parts[number];
        if (by_segment ? part.segment != batch.segments + share : int64_t(number) % copies != copy) continue;
        attend_back<D>(batch, *part.segment, part.from, part.to, group, of_out, q, k, v, out, sums, of_q, of_k ? of_k + copy * size : nullptr,
                       of_k ? of_v + copy * size : nullptr, room);
      }
    }
  }
}

}  // namespace

// out [tokens, heads, d], and sums [heads, tokens], the natural log sum exp of each query's scores. outer and outer_sums are those of what every
// token sees besides, or null. d is 16, 32, 64 or 128.
extern "C" void ragged(const Segment* segments, const int64_t* ranges, int64_t count, int64_t tokens, int64_t keys, int64_t heads, int64_t groups,
                       int64_t d, int64_t is_causal, float factor, const float* q, const float* k, const float* v, const float* outer,
                       const float* outer_sums, float* out, float* sums) {
  const Batch batch = {segments, ranges, count, tokens, keys, heads, groups, is_causal != 0, factor};
  const auto attending = d == 16 ? attend_all<16> : d == 32 ? attend_all<32> : d == 64 ? attend_all<64> : attend_all<128>;
  attending(batch, q, k, v, outer, outer_sums, out, sums);
}

// The gradients to q, k and v; of_k and of_v [copies, keys, groups, d], to be added up, or null.
extern "C" void ragged_back(const Segment* segments, const int64_t* ranges, int64_t count, int64_t tokens, int64_t keys, int64_t heads,
                            int64_t groups, int64_t d, int64_t is_causal, float factor, int64_t copies, const float* of_out, const float* q,
                            const float* k, const float* v, const float* out, const float* sums, float* of_q, float* of_k, float* of_v) {
  const Batch batch = {segments, ranges, count, tokens, keys, heads, groups, is_causal != 0, factor};
  const auto attending = d == 16 ? attend_all_back<16> : d == 32 ? attend_all_back<32> : d == 64 ? attend_all_back<64> : attend_all_back<128>;
  attending(batch, copies, of_out, q, k, v, out, sums, of_q, of_k, of_v);
}
