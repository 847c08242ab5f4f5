// The cube unit: L1 to L0A and L0B (PIPE_MTE1), the product (PIPE_M), L0C to GM (PIPE_FIX).
//
// Matrices lie in fractals of 512 bytes: 16 rows of C0 = 32 bytes. L1 holds Nz (columns of
// fractals), L0A holds Zz (rows of fractals), L0B Zn (rows of fractals, each stored by columns),
// L0C Nz with 16 float32 in a row.
#pragma once

#include "copy.h"

namespace AscendC {

// startIndex, srcStride and dstGap in fractals; srcStride from start to start, dstGap from end to
// start.
struct LoadData2DParams {
  Field<uint16_t> startIndex = 0;
  Field<uint8_t> repeatTimes = 0;
  Field<uint16_t> srcStride = 0;
  Field<uint8_t> sid = 0;
  Field<uint16_t> dstGap = 0;
  bool ifTranspose = false;
  Field<uint8_t> addrMode = 0;
  LoadData2DParams() = default;
  LoadData2DParams(Field<uint16_t> start, Field<uint8_t> repeat, Field<uint16_t> src,
                   Field<uint8_t> sid, Field<uint16_t> dst, bool transpose, Field<uint8_t> mode)
      : startIndex(start),
        repeatTimes(repeat),
        srcStride(src),
        sid(sid),
        dstGap(dst),
        ifTranspose(transpose),
        addrMode(mode) {}
};

struct MmadParams {
  Field<uint16_t> m = 0, n = 0, k = 0;
  Field<uint8_t> unitFlag = 0;
  bool cmatrixSource = false, cmatrixInitVal = true;
  MmadParams() = default;
  MmadParams(Field<uint16_t> m, Field<uint16_t> n, Field<uint16_t> k, Field<uint8_t> unit_flag,
             bool source, bool init)
      : m(m), n(n), k(k), unitFlag(unit_flag), cmatrixSource(source), cmatrixInitVal(init) {}
};

// srcStride in rows of 16 float32 (64 bytes), dstStride in elements.
struct FixpipeParamsV220 {
  Field<uint16_t> nSize = 0, mSize = 0, srcStride = 0;
  Field<uint32_t> dstStride = 0;
  bool reluEn = false;
  QuantMode_t quantPre = NoQuant;
  int64_t deqScalar = 0;
  Field<uint16_t> ndNum = 1, srcNdStride = 0, dstNdStride = 0;
  Field<uint8_t> unitFlag = 0;
  FixpipeParamsV220() = default;
  FixpipeParamsV220(Field<uint16_t> n, Field<uint16_t> m, Field<uint16_t> src, Field<uint32_t> dst,
                    bool relu)
      : nSize(n), mSize(m), srcStride(src), dstStride(dst), reluEn(relu) {}
  FixpipeParamsV220(Field<uint16_t> n, Field<uint16_t> m, Field<uint16_t> src, Field<uint32_t> dst,
                    bool relu, QuantMode_t quant, int64_t scalar, Field<uint16_t> matrices,
                    Field<uint16_t> src_matrix, Field<uint16_t> dst_matrix,
                    Field<uint8_t> unit_flag)
      : nSize(n),
        mSize(m),
        srcStride(src),
        dstStride(dst),
        reluEn(relu),
        quantPre(quant),
        deqScalar(scalar),
        ndNum(matrices),
        srcNdStride(src_matrix),
        dstNdStride(dst_matrix),
        unitFlag(unit_flag) {}
};

enum class CO2Layout : uint8_t { NZ, ROW_MAJOR };
struct FixpipeConfig {
  CO2Layout format;
};
constexpr FixpipeConfig CFG_ROW_MAJOR = {CO2Layout::ROW_MAJOR};
constexpr FixpipeConfig CFG_NZ = {CO2Layout::NZ};

namespace emulator {

constexpr uint64_t kFractal = 512, kRows = 16, kStrip = 16 * sizeof(float);

inline uint64_t ceil_div(uint64_t x, uint64_t y) { return (x + y - 1) / y; }

// Copies one fractal with the flags of what was written: rows past a matrix's end may be empty.
template <class T>
void copy_fractal(const Span& dst, uint64_t to, const Span& src, uint64_t from, bool transpose) {
  uint8_t *target = bytes(dst, to), *flags = dst.memory->written.get() + dst.begin + to;
  const uint8_t *source = bytes(src, from),
                *source_flags = src.memory->written.get() + src.begin + from;
  for (uint64_t i = 0; i < kFractal / sizeof(T); ++i) {
    uint64_t j = transpose ? i % kRows * kRows + i / kRows : i;
    std::memcpy(target + i * sizeof(T), source + j * sizeof(T), sizeof(T));
    std::memcpy(flags + i * sizeof(T), source_flags + j * sizeof(T), sizeof(T));
  }
}

}  // namespace emulator

template <class T>
void LoadData(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LoadData2DParams& p,
              Where where = {}) {
  using emulator::Place;
  emulator::Call call(PIPE_MTE1, "LoadData", where);
  emulator::Span to = dst.span(), from = src.span();
  call.operand("dst", to, {Place::L0A, Place::L0B}).operand("src", from, {Place::L1});
  namespace limits = emulator::facts::LoadData2DParams;
  static_assert(emulator::facts::LoadData<T>, "LoadData has no such type on this chip");
  call.field("startIndex", p.startIndex, limits::startIndex);
  call.field("repeatTimes", p.repeatTimes, limits::repeatTimes);
  call.field("srcStride", p.srcStride, limits::srcStride);
  call.field("dstGap", p.dstGap, limits::dstGap);
  call.field("sid", p.sid, 0, 0).field("addrMode", p.addrMode, 0, 0);  // nothing else is emulated
  call.require(!p.ifTranspose || sizeof(T) == 2, "field",
               "only elements of 2 bytes can be transposed");
  uint64_t count = p.repeatTimes, start = p.startIndex * emulator::kFractal;
  uint64_t from_step = p.srcStride * emulator::kFractal,
           to_step = (1 + uint64_t(p.dstGap)) * emulator::kFractal;
  call.read(from, start, emulator::kFractal, count, from_step, true, false);
  call.write(to, 0, emulator::kFractal, count, to_step, true, false);
  call.run([=, transpose = p.ifTranspose] {
    for (uint64_t i = 0; i < count; ++i)
      emulator::copy_fractal<T>(to, i * to_step, from, start + i * from_step, transpose);
  });
}

namespace emulator {

// Fractals of L0A (outer, inner = row, k) or of L0B (outer, inner = k, column): in both, a fractal
// has 16 lines of C0 numbers along k.
template <class T>
struct Fractals {
  static constexpr uint64_t c0 = kBlock / sizeof(T);
  Span span;
  uint64_t lines, k;  // rows of A or columns of B, and the inner dimension
  bool k_outer;

  uint64_t line_blocks() const { return ceil_div(lines, kRows); }
  uint64_t k_blocks() const { return ceil_div(k, c0); }
  uint64_t fractal(uint64_t line_block, uint64_t k_block) const {
    return (k_outer ? k_block * line_blocks() + line_block : line_block * k_blocks() + k_block) *
           kFractal;
  }

  void read(Call& call) const {
    call.read(span, 0, line_blocks() * k_blocks() * kFractal, 1, 0, true, false);
    for (uint64_t i = 0; i < line_blocks(); ++i)
      for (uint64_t j = 0; j < k_blocks(); ++j)
        call.read(span, fractal(i, j), std::min(c0, k - j * c0) * sizeof(T),
                  std::min(kRows, lines - i * kRows), kBlock, false);
  }

  std::vector<float> values() const {  // [lines][k]
    std::vector<float> result(lines * k);
    for (uint64_t line = 0; line < lines; ++line)
      for (uint64_t i = 0; i < k; ++i) {
        uint64_t offset =
            fractal(line / kRows, i / c0) + line % kRows * kBlock + i % c0 * sizeof(T);
        result[line * k + i] = float(widen(load<T>(bytes(span, offset))));
      }
    return result;
  }
};

// Calls f(offset, rows, bytes of a row) for each strip of 16 columns of L0C.
template <class F>
void strips(uint64_t m, uint64_t n, uint64_t stride, F f) {
  for (uint64_t j = 0; j < ceil_div(n, kRows); ++j)
    f(j * stride * kStrip, m, std::min(kRows, n - j * kRows) * sizeof(float));
}

}  // namespace emulator

// C = A·B, or C += A·B, in float32. Rows and columns past m, n and k take no part.
template <class C, class A, class B>
void Mmad(const LocalTensor<C>& c, const LocalTensor<A>& a, const LocalTensor<B>& b,
          const MmadParams& p, Where where = {}) {
  static_assert(emulator::facts::Mmad<C, A, B>, "Mmad has no such types on this chip");
  static_assert(std::is_same_v<C, float>, "Mmad is emulated to float");
  using emulator::Place;
  emulator::Call call(PIPE_M, "Mmad", where);
  emulator::Span to = c.span();
  call.operand("c", to, {Place::L0C}, 1024)
      .operand("a", a.span(), {Place::L0A})
      .operand("b", b.span(), {Place::L0B});
  namespace limits = emulator::facts::MmadParams;
  call.field("m", p.m, limits::m).field("n", p.n, limits::n).field("k", p.k, limits::k);
  call.require(p.unitFlag.given == 0 && !p.cmatrixSource, "field",
               "unitFlag and cmatrixSource are not emulated");
  if (!call.ok()) return call.run(nullptr);
  uint64_t m = p.m, n = p.n, k = p.k, stride = emulator::ceil_div(m, 16) * 16;
  bool add = !p.cmatrixInitVal;
  emulator::Fractals<A> left{a.span(), m, k, false};
  emulator::Fractals<B> right{b.span(), n, k, true};
  left.read(call), right.read(call);
  emulator::strips(m, n, stride, [&](uint64_t at, uint64_t rows, uint64_t bytes) {
    if (add) call.read(to, at, bytes, rows, emulator::kStrip, false);
    if (add) call.read(to, at, stride * emulator::kStrip, 1, 0, true, false);
    call.write(to, at, bytes, rows, emulator::kStrip, false);
    call.write(to, at, stride * emulator::kStrip, 1, 0, true, false);
  });
  call.run([=] {
    std::vector<float> x = left.values(), y = right.values();
    for (uint64_t j = 0; j < n; ++j)
      for (uint64_t i = 0; i < m; ++i) {
        uint8_t* at =
            emulator::bytes(to, (j / 16 * stride + i) * emulator::kStrip + j % 16 * sizeof(float));
        float sum = add ? emulator::load<float>(at) : 0;
        const float *row = &x[i * k], *column = &y[j * k];
        for (uint64_t l = 0; l < k; ++l) sum += row[l] * column[l];
        emulator::store<float>(at, sum);
      }
  });
}

// Writes L0C to rows in GM, rounded to T to nearest even; beyond the range see kSaturate.
template <class T, class U, const FixpipeConfig& config = CFG_ROW_MAJOR>
void Fixpipe(const GlobalTensor<T>& dst, const LocalTensor<U>& src, const FixpipeParamsV220& p,
             Where where = {}) {
  constexpr uint32_t modes = emulator::facts::Fixpipe<T, U>;
  static_assert(modes != 0, "Fixpipe has no such types on this chip");
  static_assert(std::is_same_v<U, float> && emulator::is_floating<T>,
                "Fixpipe is emulated between floating types");
  static_assert(config.format == CO2Layout::ROW_MAJOR, "Fixpipe is emulated to rows only");
  using emulator::Place;
  emulator::Call call(PIPE_FIX, "Fixpipe", where);
  emulator::Span to = dst.span(), from = src.span();
  call.operand("dst", to, {Place::GM}, sizeof(T)).operand("src", from, {Place::L0C});
  namespace limits = emulator::facts::FixpipeParamsV220;
  call.field("nSize", p.nSize, limits::nSize).field("mSize", p.mSize, limits::mSize);
  call.field("srcStride", p.srcStride, limits::srcStride);
  call.field("dstStride", p.dstStride, limits::dstStride).field("ndNum", p.ndNum, limits::ndNum);
  if (p.ndNum.given > 1)
    call.field("srcNdStride", p.srcNdStride, limits::srcNdStride)
        .field("dstNdStride", p.dstNdStride, limits::dstNdStride);
  call.field("unitFlag", p.unitFlag, 0, 0);  // nothing else is emulated
  call.require(modes >> int(p.quantPre) & 1, "field", "quantPre does not fit the types");
  if (!call.ok()) return call.run(nullptr);
  uint64_t m = p.mSize, n = p.nSize, matrices = p.ndNum, stride = p.srcStride,
           row = p.dstStride.given * sizeof(T);
  uint64_t src_matrix = p.srcNdStride * 16 * emulator::kStrip,
           dst_matrix = p.dstNdStride * sizeof(T);
  call.require(n <= 16 || stride >= m, "overlap", "srcStride is less than the rows of a strip");
  call.disjoint("dst", n * sizeof(T), m, row);
  for (uint64_t matrix = 0; matrix < matrices; ++matrix) {
    emulator::strips(m, n, stride, [&](uint64_t at, uint64_t rows, uint64_t bytes) {
      call.read(from, matrix * src_matrix + at, bytes, rows, emulator::kStrip);
    });
    call.write(to, matrix * dst_matrix, n * sizeof(T), m, row);
  }
  call.run([=, relu = p.reluEn] {
    for (uint64_t matrix = 0; matrix < matrices; ++matrix)
      for (uint64_t i = 0; i < m; ++i)
        for (uint64_t j = 0; j < n; ++j) {
          uint64_t at = matrix * src_matrix + (j / 16 * stride + i) * emulator::kStrip +
                        j % 16 * sizeof(float);
          double x = emulator::load<float>(emulator::bytes(from, at));
          emulator::store<T>(emulator::bytes(to, matrix * dst_matrix + i * row + j * sizeof(T)),
                             emulator::narrow<T>(relu ? emulator::larger(x, 0) : x));
        }
  });
}

}  // namespace AscendC
