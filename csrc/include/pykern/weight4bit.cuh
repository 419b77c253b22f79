// How device code decodes a 4-bit weight: the values of codes, and the scales of blocks and groups.
//
// A chunk is 32 codes, 16 bytes, one load. Chunks begin at multiples of 32 elements, so no block of NF4 and FP4 ends
// within one, wherever rows begin. A lane that loads a chunk's codes also loads its one scale.
//
//   const Codes<kScaling> codes(weight);               // all lanes of a warp together
//   const Scales<kScaling, S> scales(weight);
//   const auto loaded = scales.load(row, column);       // what memory holds: may wait in registers as codes do
//   const Scale scale = scales.decode(loaded);
//   codes.value(word >> code_shift(i), scale) * scale.factor
//
// What a value costs in sm_90 instructions, beside the product with its scale: looked up by shuffle two (the lane's
// number is taken modulo 16, so the nibble is shifted but not masked), in 16 words of shared memory three, by
// arithmetic three for int4. A pair looked up by its byte (PairTable) costs two for both values, but a table of 64 KiB.

#pragma once

#include "device.cuh"

#include "vector.cuh"
#include "weight4bit.h"

namespace pykern {

constexpr int kChunk = 32;      // elements whose codes are 16 bytes
constexpr int kWordCodes = 8;  // in 32 bits

// The bit of a word at which its element i begins.
__host__ __device__ constexpr int code_shift(int i) { return 4 * (i ^ 1); }

// Codes are read once: they go first when the caches need room.
__device__ __forceinline__ uint4 load_chunk(const uint8_t* codes, int64_t chunk) {
  return __ldcs(reinterpret_cast<const uint4*>(codes) + chunk);
}

// The same for the last chunk, of which `bytes` are there.
__device__ __forceinline__ uint4 load_chunk_part(const uint8_t* codes, int64_t chunk, int bytes) {
  unsigned words[4] = {};
#pragma unroll
  for (int i = 0; i < 16; ++i)
    if (i < bytes) words[i / 4] |= static_cast<unsigned>(codes[16 * chunk + i]) << 8 * (i % 4);
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// What a code is decoded with: (value - zero) * factor.
struct Scale {
  float factor;
  float zero;  // int4's, else not used
};

// Scales as they lie in memory. S is their type for groups.
template <Scaling kScaling, class S = float>
class Scales;

// Those of blocks, and what the nested ones share: blocks are numbered over the flattened weight.
class BlockNumbers {
 public:
  __device__ __forceinline__ explicit BlockNumbers(const Weight4bit& w) : columns_(w.columns) {
    shift_ = __ffsll(w.blocksize) - 1;  // not in the list before: nvcc's host pass sees it, and knows no __ffsll
  }

  // What load_chunk takes of a row.
  __device__ __forceinline__ int64_t start_of(int64_t row) const { return row * columns_; }

 protected:
  __device__ __forceinline__ int64_t block_of(int64_t element) const { return element >> shift_; }
  __device__ __forceinline__ int64_t block_of(int64_t row, int64_t column) const {
    return block_of(row * columns_ + column);
  }

 private:
  int64_t columns_;
  int shift_;
};

template <>
class Scales<Scaling::blocks, float> : public BlockNumbers {
 public:
  using Loaded = float;

  __device__ __forceinline__ explicit Scales(const Weight4bit& w)
      : BlockNumbers(w), scales_(static_cast<const float*>(w.scales)) {}

  __device__ __forceinline__ Loaded load(int64_t element) const { return scales_[block_of(element)]; }
  __device__ __forceinline__ Loaded load(int64_t row, int64_t column) const { return scales_[block_of(row, column)]; }
  __device__ __forceinline__ Loaded load_chunk(int64_t start, int column) const { return load(start + column); }
  __device__ __forceinline__ Scale decode(Loaded loaded) const { return {loaded, 0}; }

 private:
  const float* scales_;
};

template <>
class Scales<Scaling::nested, float> : public BlockNumbers {
 public:
  struct Loaded {
    float outer;
    uint8_t code;
  };

  __device__ __forceinline__ explicit Scales(const Weight4bit& w)
      : BlockNumbers(w),
        codes_(static_cast<const uint8_t*>(w.scales)),
        outer_(w.nested_scales),
        table_(w.nested_code),
        offset_(*w.nested_offset) {}

  __device__ __forceinline__ Loaded load(int64_t element) const { return at(block_of(element)); }
  __device__ __forceinline__ Loaded load(int64_t row, int64_t column) const { return at(block_of(row, column)); }
  __device__ __forceinline__ Loaded load_chunk(int64_t start, int column) const { return load(start + column); }
  // Each operation rounds, as where bitsandbytes wrote these weights.
  __device__ __forceinline__ Scale decode(Loaded loaded) const {
    return {__fadd_rn(__fmul_rn(table_[loaded.code], loaded.outer), offset_), 0};
  }

 private:
  __device__ __forceinline__ Loaded at(int64_t block) const { return {outer_[block / kNestedBlock], codes_[block]}; }

  const uint8_t* codes_;
  const float* outer_;
  const float* table_;
  float offset_;
};

template <class S>
class Scales<Scaling::groups, S> {
 public:
  struct Loaded {
    S scale;
    uint8_t zero;
  };

  __device__ __forceinline__ explicit Scales(const Weight4bit& w)
      : scales_(static_cast<const S*>(w.scales)),
        zeros_(w.zero_points),
        columns_(w.columns),
        groups_(w.groups),
        size_(w.blocksize),
        magic_((0x80000000u + chunks() - 1) / chunks()) {}

  __device__ __forceinline__ Loaded load(int64_t element) const {
    return load(element / columns_, element % columns_);
  }
  __device__ __forceinline__ Loaded load(int64_t row, int64_t column) const {
    return at(row * groups_ + column / size_);
  }
  // What load_chunk takes of a row.
  __device__ __forceinline__ int64_t start_of(int64_t row) const { return row * groups_; }
  // Of groups of whole chunks, in rows of fewer than 2^20 elements: then twice the chunk's number times the rounded
  // reciprocal has the quotient in its upper half.
  __device__ __forceinline__ Loaded load_chunk(int64_t start, int column) const {
    return at(start + __umulhi(2 * (static_cast<unsigned>(column) / kChunk), magic_));
  }
  __device__ __forceinline__ Scale decode(Loaded loaded) const {
    return {Element<S>::widen(loaded.scale), static_cast<float>(loaded.zero)};
  }

 private:
  __device__ __forceinline__ Loaded at(int64_t group) const {
    return {scales_[group], zeros_ ? zeros_[group] : static_cast<uint8_t>(kInt4Zero)};
  }
  // Of a group; more than such rows have are as good as that many.
  __device__ __forceinline__ unsigned chunks() const {
    return static_cast<unsigned>(max(min(size_ / kChunk, int64_t{1} << 15), int64_t{1}));
  }

  const S* scales_;
  const uint8_t* zeros_;
  int64_t columns_, groups_, size_;
  unsigned magic_;
};

// The values of codes in registers. All lanes of a warp must ask together; of the bits the lowest four count.
template <Scaling kScaling>
class Codes {
 public:
  __device__ __forceinline__ explicit Codes(const Weight4bit& w) : own_(w.code[threadIdx.x % 16]) {}

  __device__ __forceinline__ float value(unsigned bits, const Scale&) const {
    return __shfl_sync(kFullWarp, own_, static_cast<int>(bits), 16);
  }

 private:
  float own_;  // one code's a lane
};

template <>
class Codes<Scaling::groups> {
 public:
  __device__ __forceinline__ explicit Codes(const Weight4bit&) {}

  // The bits become the last ones of 2^23, from which 2^23 + zero leaves the difference, exactly.
  __device__ __forceinline__ float value(unsigned bits, const Scale& scale) const {
    return __fsub_rn(__uint_as_float((bits & 15u) | 0x4b000000u), __fadd_rn(scale.zero, 8388608.f));
  }
};

// The elements of a word, two a register, each rounded once from fp32 to T.
template <class T, Scaling kScaling>
__device__ __forceinline__ void decode_pairs(
    unsigned word, const Codes<kScaling>& codes, const Scale& scale, unsigned (&pairs)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float low = codes.value(word >> code_shift(2 * j), scale);
    const float high = codes.value(word >> code_shift(2 * j + 1), scale);
    pairs[j] = Element<T>::narrow_pair(__fmul_rn(low, scale.factor), __fmul_rn(high, scale.factor));
  }
}

// Both values of a byte of codes in one look-up in shared memory: unsigned is a pair of 16-bit values, the first
// element in the lower half, float2 two in fp32. Every lane has a copy in banks of its own, so no two lanes meet in
// one, and a row of 256 bytes for each byte makes the byte the second of the address: one PRMT puts it there.
template <class Pair>
class PairTable {
 public:
  static constexpr int kBytes = 256 * 256;

  // All threads of the block fill it, and a __syncthreads() has to follow; value(high, low) is the Pair of two codes.
  template <class Value>
  static __device__ __forceinline__ void fill(void* memory, unsigned threads, const Value& value) {
    constexpr unsigned kStores = kWarp * sizeof(Pair) / 16;  // for a byte
    for (unsigned i = threadIdx.x; i < 256 * kStores; i += threads) {
      const unsigned byte = i / kStores;
      const Pair pair = value(byte >> 4, byte & 15);
      uint4 bits;
      if constexpr (sizeof(Pair) == 4) {
        bits = make_uint4(pair, pair, pair, pair);
      } else {
        const unsigned x = __float_as_uint(pair.x), y = __float_as_uint(pair.y);
        bits = make_uint4(x, y, x, y);
      }
      reinterpret_cast<uint4*>(static_cast<char*>(memory) + 256 * byte)[i % kStores] = bits;
    }
  }

  __device__ __forceinline__ explicit PairTable(const void* memory)
      : memory_(static_cast<const char*>(memory)), own_(threadIdx.x % kWarp * sizeof(Pair)) {}

  // Elements 2 kByte and 2 kByte + 1 of a word.
  template <int kByte>
  __device__ __forceinline__ Pair at(unsigned word) const {
    return *reinterpret_cast<const Pair*>(memory_ + __byte_perm(word, own_, 0x5504u | kByte << 4));
  }

 private:
  const char* memory_;
  unsigned own_;
};

}  // namespace pykern
