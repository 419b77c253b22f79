// The values of a 4-bit weight.
//
// Bound by memory: 32 elements are read as 16 bytes and written as 64 or 128. A lane loads the codes of 32 elements and
// their scale, nested or not; then the warp hands both out through shared memory, so that lanes beside each other store
// 16 bytes beside each other.

#pragma once

#include "weight4bit.cuh"

namespace pykern {

constexpr int kDequantizeThreads = 256;
constexpr int kDequantizeElements = kWarp * kChunk;  // of a warp

// In a weight whose chunks have one scale each and, for groups, of fewer than 2^32 chunks.
template <Scaling kScaling, class S>
__device__ __forceinline__ Scale scale_of_chunk(
    const Weight4bit& w, const Scales<kScaling, S>& scales, int64_t chunk) {
  if constexpr (kScaling == Scaling::groups) {
    const unsigned in_row = static_cast<unsigned>(w.columns) / kChunk, number = static_cast<unsigned>(chunk);
    const int64_t start = scales.start_of(number / in_row);
    return scales.decode(scales.load_chunk(start, static_cast<int>(number % in_row) * kChunk));
  } else {
    return scales.decode(scales.load(chunk * kChunk));
  }
}

// What a warp's lanes hand to each other.
struct DequantizeTile {
  uint4 codes[kWarp];
  Scale scales[kWarp];
};

// Decodes the tile from element `first` on. kWhole: all of it is there. kOneScale: every chunk has one scale, which the
// tile holds; else each element looks its own up.
template <class T, Scaling kScaling, class S, bool kOneScale, bool kWhole>
__device__ __forceinline__ void decode_tile(
    const Weight4bit& w, const Scales<kScaling, S>& scales, const Codes<kScaling>& codes, const DequantizeTile& tile,
    int64_t first, T* out) {
  constexpr unsigned kRun = kFullWidth<T>;  // elements of a store
  using Bits = std::conditional_t<kRun == 8, unsigned, uint16_t>;
  const unsigned lane = threadIdx.x % kWarp;
#pragma unroll
  for (unsigned step = 0; step < kChunk / kRun; ++step) {
    const unsigned run = step * kWarp + lane;
    const int64_t element = first + run * kRun;
    const int64_t left = w.count - element;
    // Lanes beyond the end look codes up with the others.
    const unsigned bits = kWhole || left > 0 ? reinterpret_cast<const Bits*>(tile.codes)[run] : 0;
    Scale scale = {};
    if (kOneScale && (kWhole || left > 0)) scale = tile.scales[run * kRun / kChunk];
    float values[kRun];
#pragma unroll
    for (unsigned i = 0; i < kRun; ++i) {
      if (!kOneScale && (kWhole || i < left)) scale = scales.decode(scales.load(element + i));
      values[i] = __fmul_rn(codes.value(bits >> code_shift(i), scale), scale.factor);
    }
    if constexpr (kWhole) {
      store_floats(out + element, values);
    } else {
#pragma unroll
      for (unsigned i = 0; i < kRun; ++i)
        if (i < left) out[element + i] = Element<T>::narrow(values[i]);
    }
  }
}

// Grid: a warp for each kDequantizeElements.
template <class T, Scaling kScaling, class S, bool kOneScale>
__global__ void __launch_bounds__(kDequantizeThreads) dequantize_4bit(const Weight4bit w, T* out) {
  PYKERN_SHARED(tiles, DequantizeTile[kDequantizeThreads / kWarp]);
  const unsigned warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t first = (int64_t{blockIdx.x} * (kDequantizeThreads / kWarp) + warp) * kDequantizeElements;
  if (first >= w.count) return;
  const Codes<kScaling> codes(w);
  const Scales<kScaling, S> scales(w);
  DequantizeTile& tile = tiles[warp];

  const int64_t chunk = first / kChunk + lane, left = w.count - chunk * kChunk;
  if (left > 0) {
    tile.codes[lane] = left >= kChunk ? load_chunk(w.codes, chunk)
                                      : load_chunk_part(w.codes, chunk, static_cast<int>(left + 1) / 2);
    if constexpr (kOneScale) tile.scales[lane] = scale_of_chunk(w, scales, chunk);
  }
  __syncwarp();
  if (first + kDequantizeElements <= w.count)
    decode_tile<T, kScaling, S, kOneScale, true>(w, scales, codes, tile, first, out);
  else
    decode_tile<T, kScaling, S, kOneScale, false>(w, scales, codes, tile, first, out);
}

}  // namespace pykern
