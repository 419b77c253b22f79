// Which instruction set the CPU kernels of this process use.
//
// Every file of cpu/simd is compiled once per instruction set and exports one constant table of functions, called
// FAMILY_ISA. A set that the compiler could not do is missing from the library: its weak reference is null.

#pragma once

#define PYKERN_HIDDEN __attribute__((visibility("hidden")))

// Declares the tables of a family; the same line serves who defines one and who chooses.
#define PYKERN_DECLARE_TABLES(Table, family)                                                               \
  extern "C" {                                                                                             \
  extern PYKERN_HIDDEN __attribute__((weak)) const Table family##_baseline, family##_avx2, family##_avx512; \
  }

// The name of the table that the file at hand defines; the build passes -DISA=….
#define PYKERN_TABLE_NAME_(family, isa) family##_##isa
#define PYKERN_TABLE_NAME(family, isa) PYKERN_TABLE_NAME_(family, isa)
#define PYKERN_TABLE(family) PYKERN_TABLE_NAME(family, ISA)

namespace pykern {

enum class Isa { baseline, avx2, avx512, none };

// The best set that the machine and this library both have, or the one that PYKERN_ISA names if they have that.
Isa chosen_isa();

}  // namespace pykern

#define PYKERN_CHOOSE(family)                                        \
  (::pykern::chosen_isa() == ::pykern::Isa::avx512 ? family##_avx512 \
       : ::pykern::chosen_isa() == ::pykern::Isa::avx2 ? family##_avx2 \
                                                       : family##_baseline)
