// Quantising to 4 bits, a block or a group at a time: a pass over it finds its scale and brings it into cache, another
// one its codes. They are a byte each until some hundreds are packed at once, so that groups may begin at half a byte.

#include "../quantize_4bit.h"

#include "functions.h"

namespace pykern {
namespace {

constexpr float kSmallest = 1e-38f;  // below this a scale has no finite inverse
constexpr int kInt4Codes = 15;       // the highest of them
// How far ahead a first pass asks for elements: with second passes in between, the processor's own prefetching comes
// too late, and fp32 weights took half as long again.
constexpr int kAhead = 1024;

typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

PYKERN_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// All lanes in one by an operation whose order is of no account.
template <int width = kLanes / 2, class Lanes, class Operation>
PYKERN_INLINE auto fold(Lanes v, Operation operation) {
  Bits upper;
  for (int i = 0; i < kLanes; ++i) upper[i] = (i + width) % kLanes;
  v = operation(v, __builtin_shuffle(v, upper));
  if constexpr (width > 1) return fold<width / 2>(v, operation);
  else return v[0];
}

// The largest magnitude, NaN where there is one: as integers, magnitudes are in order and NaNs above all.
template <class T>
PYKERN_INLINE float magnitude(const T* x, int64_t n) {
  const auto larger = [](Ints a, Ints b) PYKERN_LAMBDA { return a > b ? a : b; };
  Ints largest = {};
  each(n, [&](int64_t i, int count) PYKERN_LAMBDA {
    __builtin_prefetch(x + i + kAhead);
    largest = larger(largest, (Ints)load(x + i, count) & 0x7fffffff);
  });
  const int32_t bits = fold(largest, larger);
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Finds codes in a codebook by halving it: `level` has the middles to compare with for all outcomes so far. The narrow
// vectors of the baseline, which have no lookup, compare with all of them.
class Search {
 public:
  explicit PYKERN_INLINE Search(const Codebook& book) : book_(book) {
    for (int step = 0; step < 4; ++step)
      for (int i = 0; i < kLanes && i < 1 << step; ++i) level_[step][i] = book.middle[(2 * i + 1) * (8 >> step) - 1];
    for (int i = 0; i < 16; ++i) code_[i / kLanes][i % kLanes] = book.code[i];
  }

  // A value in the middle takes the lower code, NaN the highest.
  PYKERN_INLINE Bits operator()(Vec value) const {
    Bits rank = {};
    if constexpr (kLanes == 4) {
      for (float middle : book_.middle) rank += 1 + (Bits)(splat(middle) >= value);
      for (int i = 0; i < kLanes; ++i) rank[i] = book_.code[rank[i]];
      return rank;
    }
    for (const Vec& level : level_) rank = rank + rank + 1 + (Bits)(__builtin_shuffle(level, rank) >= value);
    if constexpr (kLanes == 8) return __builtin_shuffle(code_[0], code_[1], rank);
    return __builtin_shuffle(code_[0], rank);
  }

 private:
  const Codebook& book_;
  Vec level_[4] = {};
  Bits code_[16 / kLanes];
};

// Codes on their way into memory, in the order of the weight.
class Packer {
 public:
  static constexpr int kBuffer = 1024;

  PYKERN_INLINE Packer(uint8_t (&buffer)[kBuffer], uint8_t* out) : buffer_(buffer), out_(out) {}

  PYKERN_INLINE void add(Bits codes, int count) {
    if (held_ >= kBuffer - kLanes) write();
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i*)(buffer_ + held_), _mm512_cvtepi32_epi8((__m512i)codes));
#else
    const Bytes bytes = __builtin_convertvector(codes, Bytes);
    memcpy(buffer_ + held_, &bytes, sizeof bytes);
#endif
    held_ += count;
  }

  // An odd end is filled up with `filler`.
  PYKERN_INLINE void finish(uint8_t filler) {
    buffer_[held_] = filler;
    held_ += held_ & 1;
    write();
  }

 private:
  PYKERN_INLINE void write() {
    const int pairs = held_ / 2;
    for (int i = 0; i < pairs; ++i) out_[i] = static_cast<uint8_t>(buffer_[2 * i] << 4 | buffer_[2 * i + 1]);
    buffer_[0] = buffer_[2 * pairs];
    out_ += pairs;
    held_ &= 1;
  }

  uint8_t* const buffer_;
  uint8_t* out_;
  int held_ = 0;
};

template <class T>
void quantize_blocks(const QuantizeBlocks& a, int64_t first_block, int64_t end_block) {
  const Search search(a.book);
  uint8_t buffer[Packer::kBuffer];
  Packer packer(buffer, a.codes + first_block * a.blocksize / 2);
  for (int64_t block = first_block; block < end_block; ++block) {
    const T* const x = static_cast<const T*>(a.weight) + block * a.blocksize;
    const int64_t count = least(a.blocksize, a.count - block * a.blocksize);
    const float largest = magnitude(x, count), scale = largest < kSmallest ? kSmallest : largest;
    if (count == a.blocksize) {
      a.absmax[block] = largest;
      const float inverse = 1 / scale;
      each(count, [&](int64_t i, int lanes) PYKERN_LAMBDA { packer.add(search(load(x + i, lanes) * inverse), lanes); });
    } else {
      a.absmax[block] = scale;
      each(count, [&](int64_t i, int lanes) PYKERN_LAMBDA { packer.add(search(load(x + i, lanes) / scale), lanes); });
    }
  }
  packer.finish(static_cast<uint8_t>(search(Vec{})[0]));
}

// Stores a scale and returns it as it was stored.
PYKERN_INLINE float store_scale(const QuantizeGroups& a, int64_t index, float scale) {
  const auto as = [&]<class T>(T* scales) PYKERN_LAMBDA {
    store(scales + index, splat(scale), 1);
    return rounded<T>(splat(scale))[0];
  };
  if (a.scale_type == DType::f16) return as(static_cast<f16*>(a.scales));
  if (a.scale_type == DType::bf16) return as(static_cast<bf16*>(a.scales));
  return as(static_cast<float*>(a.scales));
}

template <class T, bool symmetric>
PYKERN_INLINE void quantize_group(const QuantizeGroups& a, int64_t index, const T* x, int64_t count, Packer& packer) {
  const float largest = magnitude(x, count);
  float low = 0, scale = largest / 7.5f;
  if constexpr (!symmetric) {
    const auto lower = [](Vec a, Vec b) PYKERN_LAMBDA { return a < b ? a : b; };
    const auto higher = [](Vec a, Vec b) PYKERN_LAMBDA { return a > b ? a : b; };
    Vec lows = {}, highs = {};  // the range has zero in it
    each(count, [&](int64_t i, int lanes) PYKERN_LAMBDA {
      const Vec v = load(x + i, lanes);
      lows = lower(v, lows);
      highs = higher(v, highs);
    });
    // These comparisons pass over NaNs, the magnitude does not.
    low = largest == largest ? fold(lows, lower) : largest;
    scale = (fold(highs, higher) - low) / kInt4Codes;
  }
  const float stored = store_scale(a, index, scale), step = stored > 0 ? stored : 1;
  float zero = 8;
  if constexpr (!symmetric) {
    const float position = -low / step;
    zero = position == position ? round(splat(position < kInt4Codes ? position : kInt4Codes))[0] : 0;
  }
  a.zero_points[index] = static_cast<uint8_t>(zero);
  each(count, [&](int64_t i, int lanes) PYKERN_LAMBDA {
    const Vec steps = load(x + i, lanes) / step;
    const Vec code = round(steps == steps ? steps : Vec{}) + zero;
    const Vec positive = code > 0 ? code : Vec{};
    packer.add((Bits)__builtin_convertvector(positive < kInt4Codes ? positive : splat(kInt4Codes), Ints), lanes);
  });
}

template <class T, bool symmetric>
PYKERN_INLINE void quantize_rows(const QuantizeGroups& a, int64_t first_row, int64_t end_row) {
  uint8_t buffer[Packer::kBuffer];
  Packer packer(buffer, a.codes + first_row * a.columns / 2);
  const T* x = static_cast<const T*>(a.weight) + first_row * a.columns;
  int64_t index = first_row * ((a.columns + a.blocksize - 1) / a.blocksize);
  for (int64_t row = first_row; row < end_row; ++row, x += a.columns)
    for (int64_t begin = 0; begin < a.columns; begin += a.blocksize)
      quantize_group<T, symmetric>(a, index++, x + begin, least(a.blocksize, a.columns - begin), packer);
  packer.finish(0);
}

template <class T>
void quantize_groups(const QuantizeGroups& a, int64_t first_row, int64_t end_row) {
  if (a.symmetric) quantize_rows<T, true>(a, first_row, end_row);
  else quantize_rows<T, false>(a, first_row, end_row);
}

}  // namespace
}  // namespace pykern

extern "C" const pykern::Quantize4bitKernels PYKERN_TABLE(quantize_4bit) = {
    {pykern::quantize_blocks<float>, pykern::quantize_blocks<pykern::f16>, pykern::quantize_blocks<pykern::bf16>},
    {pykern::quantize_groups<float>, pykern::quantize_groups<pykern::f16>, pykern::quantize_groups<pykern::bf16>},
};
