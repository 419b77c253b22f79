// What 4-bit codes stand for, as in pykern/ops/_weight4bit.py, by value: quantising looks for the nearest one.
// Compiled for every instruction set: nothing here may be shared by the linker.

#pragma once

#include <cstdint>

namespace pykern {

// The values that 4 bits can have, in order: code[i] is that of the i-th, middle[i] halfway from there to the next.
struct Codebook {
  float middle[15];
  uint8_t code[16];
};

namespace code_tables {

struct Values {
  float value[16];
  uint8_t code[16];
};

static constexpr float twelfths(double value) { return static_cast<float>(value / 12); }

constexpr Values kNf4 = {
    {-1.f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
     -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.f,
     0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
     0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.f},
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}};

// Of FP4's zeros the positive one comes first.
constexpr Values kFp4 = {
    {-twelfths(12), -twelfths(8), -twelfths(6), -twelfths(4), -twelfths(3), -twelfths(2), -twelfths(0.0625), 0.f,
     -0.f, twelfths(0.0625), twelfths(2), twelfths(3), twelfths(4), twelfths(6), twelfths(8), twelfths(12)},
    {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3}};

}  // namespace code_tables

static constexpr Codebook codebook(bool nf4) {
  const code_tables::Values& values = nf4 ? code_tables::kNf4 : code_tables::kFp4;
  Codebook book = {};
  for (int i = 0; i < 16; ++i) book.code[i] = values.code[i];
  for (int i = 0; i < 15; ++i) book.middle[i] = (values.value[i] + values.value[i + 1]) / 2;
  return book;
}

}  // namespace pykern
