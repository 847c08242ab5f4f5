// Numbers of the device: float16, bfloat16 and the rounding modes of Cast.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

using half = _Float16;

struct bfloat16_t {
  uint16_t bits;
};

namespace AscendC {

enum class RoundMode {
  CAST_NONE,
  CAST_RINT,
  CAST_FLOOR,
  CAST_CEIL,
  CAST_ROUND,
  CAST_TRUNC,
  CAST_ODD
};

enum class CMPMODE : uint8_t { LT, GT, EQ, LE, GE, NE };

// How L0C is converted on its way out; the first three are emulated.
enum QuantMode_t {
  NoQuant,
  F322F16,
  F322BF16,
  DEQF16,
  VDEQF16,
  QF322B8_PRE,
  VQF322B8_PRE,
  REQ8,
  VREQ8
};

namespace emulator {

// What a value beyond the range of a floating type becomes: infinity, or the largest finite number
// (the device has a control register for it).
constexpr bool kSaturate = false;

template <class T>
T load(const uint8_t* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof(T));
  return value;
}

template <class T>
void store(uint8_t* bytes, T value) {
  std::memcpy(bytes, &value, sizeof(T));
}

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  return load<To>(reinterpret_cast<const uint8_t*>(&from));
}

template <class T, class... Types>
constexpr bool one_of = (std::is_same_v<T, Types> || ...);

template <class T>
constexpr bool is_floating = one_of<T, half, bfloat16_t, float>;

inline double widen(bfloat16_t x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

template <class T>
double widen(T x) {
  return double(x);
}

inline double round_to_integer(double x, RoundMode mode) {
  switch (mode) {
    case RoundMode::CAST_FLOOR:
      return std::floor(x);
    case RoundMode::CAST_CEIL:
      return std::ceil(x);
    case RoundMode::CAST_ROUND:
      return std::round(x);
    case RoundMode::CAST_TRUNC:
      return std::trunc(x);
    case RoundMode::CAST_ODD: {
      double low = std::floor(x);
      return low == x || std::fmod(low, 2) != 0 ? low : low + 1;
    }
    default:
      return std::nearbyint(x);  // the host rounds to nearest even
  }
}

// Digits, smallest exponent and largest finite number of a floating type.
template <class T>
struct Format {
  static constexpr int digits = std::is_same_v<T, half> ? 11 : std::is_same_v<T, float> ? 24 : 8;
  static constexpr int lowest = std::is_same_v<T, half> ? -14 : -126;
  static double largest() {
    return std::is_same_v<T, half>    ? 65504.0
           : std::is_same_v<T, float> ? double(std::numeric_limits<float>::max())
                                      : std::ldexp(255.0, 120);
  }
};

// Directed modes stop at the largest finite number, as IEEE 754 has it.
template <class T>
double overflow(double x, RoundMode mode) {
  bool towards_zero = mode == RoundMode::CAST_TRUNC || mode == RoundMode::CAST_ODD ||
                      (mode == RoundMode::CAST_FLOOR && x > 0) ||
                      (mode == RoundMode::CAST_CEIL && x < 0);
  double bound =
      kSaturate || towards_zero ? Format<T>::largest() : std::numeric_limits<double>::infinity();
  return std::copysign(bound, x);
}

// The multiple of one unit in the last place that the mode chooses; exact in double.
template <class T>
double round_to_format(double x, RoundMode mode) {
  if (x == 0 || !std::isfinite(x)) return x;
  int exponent = std::max(std::ilogb(x), Format<T>::lowest) - (Format<T>::digits - 1);
  double rounded = std::ldexp(round_to_integer(std::ldexp(x, -exponent), mode), exponent);
  if (std::fabs(rounded) > Format<T>::largest()) return overflow<T>(x, mode);
  return std::copysign(rounded, x);
}

template <class T>
T saturate(double x) {
  if (std::isnan(x)) return 0;
  if (x >= double(std::numeric_limits<T>::max())) return std::numeric_limits<T>::max();
  if (x <= double(std::numeric_limits<T>::min())) return std::numeric_limits<T>::min();
  return T(x);
}

// `x` as a T; integers saturate.
template <class T>
T narrow(double x, RoundMode mode = RoundMode::CAST_RINT) {
  if constexpr (std::is_same_v<T, bfloat16_t>) {
    if (std::isnan(x)) return {0x7fc0};
    float rounded = float(round_to_format<bfloat16_t>(x, mode));
    return {uint16_t(bit_cast<uint32_t>(rounded) >> 16)};
  } else if constexpr (one_of<T, half, float>) {
    // The host's conversion is the same in the common mode, and quick.
    bool nearest = mode == RoundMode::CAST_RINT || mode == RoundMode::CAST_NONE;
    return nearest && !kSaturate ? T(x) : T(round_to_format<T>(x, mode));
  } else {
    return saturate<T>(round_to_integer(x, mode));
  }
}

}  // namespace emulator

inline float ToFloat(bfloat16_t x) { return float(emulator::widen(x)); }
inline bfloat16_t ToBfloat16(float x) { return emulator::narrow<bfloat16_t>(x); }

}  // namespace AscendC
