// What threads do together, as language.h spells it out: values travel in registers, so that device code's variables
// need no address.

#pragma once

#include "runtime.h"

namespace pykern::emulator {

enum class Shuffle { index, up, down, bits };
enum class Vote { all, any, ballot };
enum class Match { any, all };
enum class Reduce { add, min, max, min_signed, max_signed, bit_and, bit_or, bit_xor };
enum class BlockVote { none, count, all, any };

// The bits of the source lane's value.
uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, unsigned source, unsigned width, Place place);
unsigned vote(Vote kind, unsigned mask, bool predicate, Place place);
unsigned match(Match kind, unsigned mask, uint64_t value, Place place);
unsigned reduce(Reduce kind, unsigned mask, unsigned value, Place place);

// These order memory.
void sync_warp(unsigned mask, Place place);
int sync_block(BlockVote kind, bool predicate, Place place);
void named_barrier(int id, int threads, bool wait, Place place);

}  // namespace pykern::emulator
