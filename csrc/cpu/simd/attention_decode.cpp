// Attention of a few tokens against a cache, which takes as long as reading the cache does.
//
// The rows of a task, the tokens of all query heads that share a key head, meet each block of keys together while it is
// in cache. Products run along the columns: a key is read and converted once for four rows, and so many sums are made
// at once that adding up their lanes fills a vector. Keys are found one by one, so that pages may be of any size. While
// a block is met, the next one, of the next key head or the next keys, is fetched: rows of one head lie apart, and the
// processor does not guess where they go on.

#include "../attention_decode.h"

#include "functions.h"

namespace pykern {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr int kBlockKeys = 64;
constexpr int kBatchRows = 16;  // with a block of keys these make a tile of scores
constexpr int kRowsAtOnce = 4;

PYKERN_INLINE int smaller_of(int a, int b) { return a < b ? a : b; }
PYKERN_INLINE int64_t whole_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Rows that are met one, two or four at a time; a third is padded with a fourth.
PYKERN_INLINE int padded(int rows) { return rows + (rows % kRowsAtOnce == 3); }
PYKERN_INLINE int rows_of(const DecodeCall& call) { return call.group * call.tokens; }

// What the rows of a key head have of the keys met so far: the largest score, the sum of the weights over e to the
// power of that, and the output so, in rows of whole vectors.
struct State {
  float *top, *sum, *out;
  int64_t out_stride;
};

PYKERN_INLINE int64_t row_floats(const DecodeCall& call) {
  return (rows_of(call) + kBatchRows - 1) / kBatchRows * kBatchRows;
}

PYKERN_INLINE State state_at(const DecodeCall& call, float* memory) {
  const int64_t rows = row_floats(call);
  return {memory, memory + rows, memory + 2 * rows, whole_vectors(call.value_size)};
}

int64_t state(const DecodeCall& call) {
  return 2 * row_floats(call) + padded(rows_of(call)) * whole_vectors(call.value_size);
}

int64_t query_floats(const DecodeCall& call) { return padded(rows_of(call)) * whole_vectors(call.size); }

// Where columns lie apart a block is copied.
int64_t copy_floats(const Strided& cache, int size) { return cache.column == 1 ? 0 : kBlockKeys * whole_vectors(size); }

int64_t scratch(const DecodeCall& call, int heads) {
  return heads * (state(call) + query_floats(call)) + copy_floats(call.key, call.size) +
      copy_floats(call.value, call.value_size);
}

template <class T>
PYKERN_INLINE float value_of(const T* p) {
  if constexpr (sizeof(T) == 4) return *p;
  else return load(p, 1)[0];
}

// Consecutive keys of a sequence: their offsets in the caches, without the head's. Those after the last are as its own.
struct Block {
  const DecodeTask* task;
  int first, count;
  int64_t key[kBlockKeys], value[kBlockKeys];
};

// The block that begins at a key of a task; if it has no more, that of the next task with any; else the block's task is
// `end_task`.
PYKERN_INLINE void find_block(
    const DecodeCall& call, const DecodeTask* task, int first, const DecodeTask* end_task, Block& block) {
  while (first >= task->keys.end) {
    block.task = ++task;
    if (task == end_task) return;
    first = task->keys.first;
  }
  block.task = task;
  block.first = first;
  block.count = smaller_of(task->keys.end - first, kBlockKeys);
  const Heads &key = call.key.heads, &value = call.value.heads;
  const Pages& pages = call.pages;
  for (int k = 0; k < block.count;) {
    // The keys of one page lie evenly.
    const int at = block.first + k;
    const int row = pages.table ? at - pages.by_size.divide(at) * pages.size : at;
    const int end = smaller_of(block.count, k + pages.size - row);
    const int64_t page = pages.block_of(task->sequence, at);
    int64_t key_at = page * key.batch + row * key.row, value_at = page * value.batch + row * value.row;
    for (; k < end; ++k, key_at += key.row, value_at += value.row) {
      block.key[k] = key_at;
      block.value[k] = value_at;
    }
  }
  for (int k = block.count; k < kBlockKeys; ++k) {
    block.key[k] = block.key[block.count - 1];
    block.value[k] = block.value[block.count - 1];
  }
}

// Rows of contiguous elements that begin anywhere, and those that will be read next.
template <class T>
struct Source {
  const T* data;
  const int64_t* at;
  const T* next;
  const int64_t* next_at;
};

template <class T>
PYKERN_INLINE void fetch(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

// One step of adding up lanes: lanes with the bit `step` clear get pairs of a's, the others pairs of b's.
template <int step>
PYKERN_INLINE Vec add_pairs(Vec a, Vec b) {
  Bits own, other;
  for (int i = 0; i < kLanes; ++i) {
    own[i] = i & step ? kLanes + i : i;
    other[i] = i & step ? kLanes + i - step : i + step;
  }
  return __builtin_shuffle(a, b, own) + __builtin_shuffle(a, b, other);
}

// Lane i of the result is the sum of vector i's lanes.
template <int step = kLanes / 2>
PYKERN_INLINE Vec add_lanes(Vec* vectors) {
  for (int i = 0; i < step; ++i) vectors[i] = add_pairs<step>(vectors[i], vectors[i + step]);
  if constexpr (step > 1) return add_lanes<step / 2>(vectors);
  else return vectors[0];
}

// tile (rows, keys) = query (rows, size) · keys.
template <int rows, class T>
__attribute__((noinline)) void multiply_keys(
    const float* query, int64_t stride, const Source<T>& keys, int count, int64_t size, float* tile) {
  constexpr int step = kLanes / rows;
  for (int k = 0; k < count; k += step) {
    const T *key[step], *next[step];
    for (int j = 0; j < step; ++j) {
      key[j] = keys.data + keys.at[k + j];
      next[j] = keys.next + keys.next_at[k + j];
    }
    Vec sum[kLanes] = {};
    each(size, [&](int64_t c, int lanes) PYKERN_LAMBDA {
      Vec row[rows];
      for (int r = 0; r < rows; ++r) row[r] = load(query + r * stride + c);
      for (int j = 0; j < step; ++j) {
        const Vec part = load(key[j] + c, lanes);
        fetch(next[j] + c);
        for (int r = 0; r < rows; ++r) sum[r * step + j] = fma(row[r], part, sum[r * step + j]);
      }
    });
    float products[kLanes];
    store(products, add_lanes(sum));
    for (int r = 0; r < rows; ++r) memcpy(tile + r * kBlockKeys + k, products + r * step, step * sizeof(float));
  }
}

// What the values of a block are added to: nothing, or the output so far times a factor of each row.
struct Sum {
  float* out;
  int64_t stride;
  const float* factor;  // null: nothing
};

// out (rows, some vectors from column c on) = sum + weights (rows, keys) · values.
template <int rows, int vectors, class T>
PYKERN_INLINE void multiply_columns(
    const float* weights, const Source<T>& values, int count, int64_t c, int lanes, const Sum& to) {
  // Sums of few vectors are made of several, since each addition waits for the one before.
  constexpr int chains = rows * vectors >= 8 ? 1 : rows * vectors >= 4 ? 2 : 4;
  Vec sum[chains][rows][vectors] = {};
  const auto add = [&](int k, int chain) PYKERN_LAMBDA {
    const T* const value = values.data + values.at[k] + c;
    const T* const next = values.next + values.next_at[k] + c;
    Vec part[vectors];
    for (int v = 0; v < vectors; ++v) {
      part[v] = load(value + v * kLanes, vectors == 1 ? lanes : kLanes);
      fetch(next + v * kLanes);
    }
    for (int r = 0; r < rows; ++r) {
      const Vec weight = splat(weights[r * kBlockKeys + k]);
      for (int v = 0; v < vectors; ++v) sum[chain][r][v] = fma(weight, part[v], sum[chain][r][v]);
    }
  };
  int k = 0;
  for (; k + chains <= count; k += chains)
    for (int chain = 0; chain < chains; ++chain) add(k + chain, chain);
  for (; k < count; ++k) add(k, 0);
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) {
      for (int chain = 1; chain < chains; ++chain) sum[0][r][v] += sum[chain][r][v];
      float* const out = to.out + r * to.stride + c + v * kLanes;
      store(out, to.factor ? fma(load(out), splat(to.factor[r]), sum[0][r][v]) : sum[0][r][v]);
    }
  }
}

// From column c on, `vectors` at a time and the rest in fewer.
template <int rows, int vectors, class T>
PYKERN_INLINE void multiply_strips(
    const float* weights, const Source<T>& values, int count, int64_t size, int64_t c, const Sum& to) {
  for (; c + vectors * kLanes <= size; c += vectors * kLanes)
    multiply_columns<rows, vectors>(weights, values, count, c, kLanes, to);
  if constexpr (vectors > 1) multiply_strips<rows, vectors / 2>(weights, values, count, size, c, to);
  else if (c < size) multiply_columns<rows, 1>(weights, values, count, c, static_cast<int>(size - c), to);
}

template <int rows, class T>
__attribute__((noinline)) void multiply_values(
    const float* weights, const Source<T>& values, int count, int64_t size, const Sum& to) {
  // With a row of the values and a weight these take most of AVX512's 32 registers, or of other's 16.
  constexpr int most = (kLanes == 16 ? 16 : 8) / rows;
  multiply_strips<rows, most < 8 ? most : 8>(weights, values, count, size, 0, to);
}

// body(first row, how many as a constant) for rows four at a time.
template <class Body>
PYKERN_INLINE void each_rows(int rows, Body body) {
  for (int r = 0; r < rows; r += kRowsAtOnce) {
    if (rows - r == 1) body.template operator()<1>(r);
    else if (rows - r == 2) body.template operator()<2>(r);
    else body.template operator()<kRowsAtOnce>(r);
  }
}

// After the first rows nothing is left to be fetched.
template <class T>
PYKERN_INLINE Source<T> source_of(const Source<T>& source, int row) {
  return row == 0 ? source : Source<T>{source.data, source.at, source.data, source.at};
}

template <int width>
PYKERN_INLINE Vec swapped(Vec v) {
  Bits index;
  for (int i = 0; i < kLanes; ++i) index[i] = i ^ width;
  return __builtin_shuffle(v, index);
}

PYKERN_INLINE Vec largest_of(Vec a, Vec b) { return a > b ? a : b; }

template <int width = kLanes / 2>
PYKERN_INLINE float largest(Vec v) {
  v = largest_of(v, swapped<width>(v));
  if constexpr (width > 1) return largest<width / 2>(v);
  else return v[0];
}

// The lanes' numbers.
PYKERN_INLINE Vec lane_numbers() {
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(i);
  return v;
}

// The products of a row and some keys become scores, -inf where the row does not see the key; gives the largest.
PYKERN_INLINE float score(const DecodeCall& call, const Block& block, int head, int token, float* scores) {
  const Band& band = block.task->band;
  // Counted from the first of the keys, so that fp32 holds every number that matters.
  const Range seen = band.keys_of(token);
  const Vec low = splat(static_cast<float>(seen.first - block.first));
  const Vec end = splat(static_cast<float>(smaller_of(seen.end - block.first, block.count)));
  const Vec place = splat(static_cast<float>(token + band.offset - block.first));
  const Vec slope = splat(call.slopes ? call.slopes[block.task->sequence * call.slopes_batch + head] : 0);
  const float scale = call.softcap > 0 ? static_cast<float>(double{call.scale} / call.softcap) : call.scale;
  Vec top = splat(-kInfinity);
  for (int k = 0; k < block.count; k += kLanes) {
    Vec x = load(scores + k) * splat(scale);
    if (call.softcap > 0) {
      Vec derivative;
      x = splat(call.softcap) * tanh(x, derivative);
    }
    const Vec key = lane_numbers() + splat(static_cast<float>(k));
    if (call.slopes) x -= slope * (place - key);
    x = key >= low ? x : splat(-kInfinity);
    x = key < end ? x : splat(-kInfinity);
    store(scores + k, x);
    top = largest_of(x, top);
  }
  return largest(top);
}

// Products of up to kBatchRows rows become weights over e^top; gives what earlier sums and outputs are to be multiplied
// by.
PYKERN_INLINE void weigh(
    const DecodeCall& call, const Block& block, int head, int first_row, int rows, const State& state, float* tile,
    float* factor) {
  float base[kBatchRows] = {}, sums[kBatchRows] = {};
  float* const tops = state.top + first_row;
  float* const totals = state.sum + first_row;
  for (int r = 0; r < rows; ++r) {
    const int row = first_row + r;
    const float top =
        score(call, block, head * call.group + row / call.tokens, row % call.tokens, tile + r * kBlockKeys);
    base[r] = tops[r] > top ? tops[r] : top;
  }
  for (int r = 0; r < rows; r += kLanes) {
    const Vec top = load(base + r);
    const Vec finite = top == splat(-kInfinity) ? Vec{} : top;
    store(base + r, finite);
    store(factor + r, exp(load(tops + r) - finite));
    store(tops + r, top);
  }
  for (int r = 0; r < rows; ++r) {
    Vec weights = {};
    for (int k = 0; k < block.count; k += kLanes) {
      const Vec weight = exp(load(tile + r * kBlockKeys + k) - splat(base[r]));
      store(tile + r * kBlockKeys + k, weight);
      weights += weight;
    }
    sums[r] = sum(weights);
  }
  for (int r = 0; r < rows; r += kLanes)
    store(totals + r, fma(load(totals + r), load(factor + r), load(sums + r)));
}

// What one key head's rows bring to a block.
struct Meeting {
  int head;
  const float* query;
  State state;
};

template <class Key, class Value>
PYKERN_INLINE void meet(
    const DecodeCall& call, const Block& block, const Meeting& m, const Source<Key>& keys,
    const Source<Value>& values) {
  const int64_t query_stride = whole_vectors(call.size);
  const bool is_first = block.first == block.task->keys.first;
  for (int first = 0; first < rows_of(call); first += kBatchRows) {
    const int rows = smaller_of(kBatchRows, rows_of(call) - first);
    alignas(64) float tile[kBatchRows * kBlockKeys], factor[kBatchRows];
    each_rows(rows, [&]<int count>(int r) PYKERN_LAMBDA {
      multiply_keys<count>(
          m.query + (first + r) * query_stride, query_stride, source_of(keys, first + r), block.count, call.size,
          tile + r * kBlockKeys);
    });
    weigh(call, block, m.head, first, rows, m.state, tile, factor);
    each_rows(rows, [&]<int count>(int r) PYKERN_LAMBDA {
      const Sum to = {
          m.state.out + (first + r) * m.state.out_stride, m.state.out_stride, is_first ? nullptr : factor + r};
      multiply_values<count>(
          tile + r * kBlockKeys, source_of(values, first + r), block.count, call.value_size, to);
    });
  }
}

// A copy of a block's rows where their columns lie apart.
template <class T>
__attribute__((noinline)) Source<float> copied(
    const T* data, const int64_t* at, int count, int64_t column, int64_t size, int64_t* own_at, float* own) {
  const int64_t stride = whole_vectors(size);
  for (int k = 0; k < kBlockKeys; ++k) {
    own_at[k] = smaller_of(k, count - 1) * stride;
    if (k < count)
      for (int64_t c = 0; c < size; ++c) own[k * stride + c] = value_of(data + at[k] + c * column);
  }
  return {own, own_at, own, own_at};
}

// body(source of the rows that a head has in a cache).
template <class T, class Body>
PYKERN_INLINE void with_rows(
    const Strided& cache, const int64_t* at, const int64_t* next_at, int head, int next_head, int count, int64_t size,
    float* own, Body body) {
  const T* const data = static_cast<const T*>(cache.heads.data);
  const T* const rows = data + head * cache.heads.head;
  if (cache.column == 1) return body(Source<T>{rows, at, data + next_head * cache.heads.head, next_at});
  int64_t own_at[kBlockKeys];
  body(copied(rows, at, count, cache.column, size, own_at, own));
}

// The queries of some key heads as rows of fp32.
template <class T>
void load_query(const DecodeCall& call, const DecodeTask& task, float* to) {
  const Heads& query = call.query.heads;
  const int64_t stride = whole_vectors(call.size), column = call.query.column;
  const T* const data = static_cast<const T*>(query.data) + task.sequence * query.batch;
  for (int head = task.heads.first; head < task.heads.end; ++head, to += query_floats(call)) {
    for (int r = 0; r < padded(rows_of(call)); ++r) {
      const bool exists = r < rows_of(call);
      const T* const row =
          data + r % call.tokens * query.row + (head * call.group + r / call.tokens) * query.head;
      each(call.size, [&](int64_t c, int lanes) PYKERN_LAMBDA {
        Vec part = {};
        if (exists && column == 1) part = load(row + c, lanes);
        else if (exists)
          for (int i = 0; i < lanes; ++i) part[i] = value_of(row + (c + i) * column);
        store(to + r * stride + c, part);
      });
    }
  }
}

void start(const DecodeCall& call, const State& state, bool is_empty) {
  for (int r = 0; r < row_floats(call); ++r) {
    state.top[r] = -kInfinity;
    state.sum[r] = 0;
  }
  // Else the first block of keys gives the first output.
  if (is_empty) memset(state.out, 0, padded(rows_of(call)) * state.out_stride * sizeof(float));
}

PYKERN_INLINE float scalar_exp(float x) { return exp(splat(x))[0]; }

template <class T>
void combine(const DecodeCall& call, int sequence, int head, const float* states, int64_t stride, int64_t parts) {
  for (int r = 0; r < rows_of(call); ++r) {
    const int query_head = head * call.group + r / call.tokens, token = r % call.tokens;
    const auto part = [&](int64_t p) { return state_at(call, const_cast<float*>(states) + p * stride); };
    // A sink is a key without a value.
    const float sink = call.sinks ? call.sinks[query_head] : -kInfinity;
    float top = sink;
    for (int64_t p = 0; p < parts; ++p) top = part(p).top[r] > top ? part(p).top[r] : top;
    const float base = top == -kInfinity ? 0 : top;
    float sum = call.sinks ? scalar_exp(sink - base) : 0;
    for (int64_t p = 0; p < parts; ++p) sum += part(p).sum[r] * scalar_exp(part(p).top[r] - base);
    const float inverse = sum == 0 ? 0 : 1 / sum;
    // Rounded once: what is computed from lse has no more digits than it.
    call.lse[(static_cast<int64_t>(sequence) * call.heads + query_head) * call.tokens + token] =
        sum == 0 ? -kInfinity : static_cast<float>(top + __builtin_log(double{sum}));
    T* const out = static_cast<T*>(call.out) +
        ((static_cast<int64_t>(sequence) * call.tokens + token) * call.heads + query_head) * call.value_size;
    each(call.value_size, [&](int64_t c, int lanes) PYKERN_LAMBDA {
      Vec total = {};
      for (int64_t p = 0; p < parts; ++p) {
        const State state = part(p);
        const Vec factor = exp(splat(state.top[r] - base));
        total = fma(load(state.out + r * state.out_stride + c), factor, total);
      }
      store(out + c, total * splat(inverse), lanes);
    });
  }
}

template <class T>
void run(const DecodeCall& call, const DecodeTask* task, const DecodeTask* end, float* memory) {
  float* const own_key = memory;
  float* const own_value = own_key + copy_floats(call.key, call.size);
  float* const own_states = own_value + copy_floats(call.value, call.value_size);
  Block blocks[2];
  Block *now = &blocks[0], *next = &blocks[1];  // the next that is to be met, and the one after it
  if (task < end) find_block(call, task, task->keys.first, end, *now);
  for (; task < end; ++task) {
    const int heads = task->heads.end - task->heads.first;
    float* const states = task->states ? task->states : own_states;
    float* const query = own_states + heads * state(call);
    load_query<T>(call, *task, query);
    for (int h = 0; h < heads; ++h)
      start(call, state_at(call, states + h * state(call)), task->keys.first >= task->keys.end);
    while (now->task == task) {
      find_block(call, task, now->first + now->count, end, *next);
      for (int h = 0; h < heads; ++h) {
        const int head = task->heads.first + h;
        const bool is_last = h + 1 == heads && next->task != end;
        const Block& following = is_last ? *next : *now;
        const int next_head = is_last ? next->task->heads.first : h + 1 < heads ? head + 1 : head;
        const Meeting m = {head, query + h * query_floats(call), state_at(call, states + h * state(call))};
        with_rows<T>(
            call.key, now->key, following.key, head, next_head, now->count, call.size, own_key,
            [&](const auto& keys) PYKERN_LAMBDA {
              with_rows<T>(
                  call.value, now->value, following.value, head, next_head, now->count, call.value_size, own_value,
                  [&](const auto& values) PYKERN_LAMBDA { meet(call, *now, m, keys, values); });
            });
      }
      Block* const met = now;
      now = next;
      next = met;
    }
    if (!task->states)
      for (int h = 0; h < heads; ++h)
        combine<T>(call, task->sequence, task->heads.first + h, states + h * state(call), 0, 1);
  }
}

template <class Body>
PYKERN_INLINE void with_type(DType dtype, Body body) {
  if (dtype == DType::f32) body(float{});
  else if (dtype == DType::f16) body(f16{});
  else body(bf16{});
}

void run_any(const DecodeCall& call, const DecodeTask* first, const DecodeTask* end, float* memory) {
  with_type(call.dtype, [&](auto type) PYKERN_LAMBDA { run<decltype(type)>(call, first, end, memory); });
}

void combine_any(
    const DecodeCall& call, int sequence, int head, const float* states, int64_t stride, int64_t parts) {
  with_type(call.dtype, [&](auto type) PYKERN_LAMBDA {
    combine<decltype(type)>(call, sequence, head, states, stride, parts);
  });
}

}  // namespace
}  // namespace pykern

extern "C" const pykern::DecodeKernels PYKERN_TABLE(attention_decode) = {
    pykern::state, pykern::scratch, pykern::run_any, pykern::combine_any};
