// What -fsanitize=undefined calls when device code did what C++ leaves undefined: a fault at the source line, which
// comes first in what it hands over. Outside kernels it is an exception.

#include <cstring>

#include "runtime.h"

namespace {

struct Location {
  const char* file;
  uint32_t line, column;
};

struct Type {
  uint16_t kind;  // 0: integer, 1: float
  uint16_t info;  // of an integer: 1 if signed, and the width's logarithm times two
  char name[1];   // quoted
};

struct Overflow {
  Location location;
  const Type* type;
};
struct Shift {
  Location location;
  const Type *value, *amount;
};
struct Index {
  Location location;
  const Type *array, *index;
};
struct Conversion {
  Location location;
  const Type *from, *to;
};
struct Mismatch {
  Location location;
  const Type* type;
  unsigned char log_alignment, use;
};

using Value = uintptr_t;  // itself up to 64 bits, else its address

[[noreturn]] void fault(const Location& location, const std::string& what) {
  pykern::emulator::fault(what, pykern::emulator::Place{location.file, location.line});
}

std::string text(const Type* type, Value value) {
  if (type->kind != 0) return "a value";
  const unsigned bits = 1u << (type->info >> 1);
  if (bits > 64) return "a value";
  uint64_t wide = value;
  if (!(type->info & 1)) return std::to_string(bits < 64 ? wide & ((uint64_t{1} << bits) - 1) : wide);
  const unsigned unused = 64 - bits;
  return std::to_string(static_cast<int64_t>(wide << unused) >> unused);
}

[[noreturn]] void overflow(const Overflow* data, Value a, const char* op, Value b) {
  fault(
      data->location,
      "integer overflow: " + text(data->type, a) + op + text(data->type, b) + " does not fit " + data->type->name);
}

}  // namespace

// Compilers call either of the two, as -fsanitize-recover says.
#define PYKERN_HANDLER(name, parameters, ...)                                 \
  extern "C" [[noreturn]] void __ubsan_handle_##name parameters { __VA_ARGS__; } \
  extern "C" [[noreturn]] void __ubsan_handle_##name##_abort parameters { __VA_ARGS__; }

PYKERN_HANDLER(add_overflow, (const Overflow* data, Value a, Value b), overflow(data, a, " + ", b))
PYKERN_HANDLER(sub_overflow, (const Overflow* data, Value a, Value b), overflow(data, a, " - ", b))
PYKERN_HANDLER(mul_overflow, (const Overflow* data, Value a, Value b), overflow(data, a, " * ", b))
PYKERN_HANDLER(
    negate_overflow, (const Overflow* data, Value a),
    fault(data->location, "integer overflow: -(" + text(data->type, a) + ") does not fit " + data->type->name))
PYKERN_HANDLER(
    divrem_overflow, (const Overflow* data, Value a, Value b),
    fault(data->location, "division of " + text(data->type, a) + " by " + text(data->type, b)))
PYKERN_HANDLER(
    shift_out_of_bounds, (const Shift* data, Value value, Value amount),
    fault(
        data->location, "shift of " + text(data->value, value) + ", of type " + data->value->name + ", by " +
            text(data->amount, amount)))
PYKERN_HANDLER(
    out_of_bounds, (const Index* data, Value index),
    fault(data->location, "index " + text(data->index, index) + " is outside " + data->array->name))
PYKERN_HANDLER(
    pointer_overflow, (const Location* data, Value, Value), fault(*data, "pointer arithmetic that overflows"))
PYKERN_HANDLER(
    type_mismatch_v1, (const Mismatch* data, Value pointer),
    fault(
        data->location, (pointer ? pointer & ((uintptr_t{1} << data->log_alignment) - 1) ? "misaligned pointer to "
                                                                                        : "too small an object for "
                                 : "null pointer to ") +
            std::string(data->type->name)))
PYKERN_HANDLER(
    alignment_assumption, (const Mismatch* data, Value, Value, Value),
    fault(data->location, "a pointer is not aligned as assumed"))
PYKERN_HANDLER(
    load_invalid_value, (const Overflow* data, Value),
    fault(data->location, std::string("a value that is none of type ") + data->type->name))
PYKERN_HANDLER(
    float_cast_overflow, (const Conversion* data, Value),
    fault(data->location, std::string("a value of ") + data->from->name + " that does not fit " + data->to->name))
PYKERN_HANDLER(
    vla_bound_not_positive, (const Overflow* data, Value bound),
    fault(data->location, "an array of " + text(data->type, bound) + " elements"))
PYKERN_HANDLER(nonnull_arg, (const Location* data), fault(*data, "null pointer where there must be one"))
PYKERN_HANDLER(
    nonnull_return_v1, (const void*, const Location* location), fault(*location, "null pointer returned"))
PYKERN_HANDLER(invalid_builtin, (const Location* data), fault(*data, "__builtin_clz or _ctz of zero"))

extern "C" [[noreturn]] void __ubsan_handle_builtin_unreachable(const Location* data) {
  fault(*data, "reached what was said to be unreachable");
}
extern "C" [[noreturn]] void __ubsan_handle_missing_return(const Location* data) {
  fault(*data, "a function ends without returning a value");
}
