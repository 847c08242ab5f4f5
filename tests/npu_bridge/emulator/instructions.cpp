// Small kernels that show what each instruction computes: `kernel JOB NAME`.
//
// All take two inputs, a shape (int32) and an output. Vector kernels work on AIV 0 alone.
#include <map>
#include <string>

#include "kernel_operator.h"
#include "main.h"

using namespace AscendC;

namespace {

constexpr int kCount = 256;

template <class T>
GlobalTensor<T> global(GM_ADDR address) {
  GlobalTensor<T> tensor;
  tensor.SetGlobalBuffer((__gm__ T*)address);
  return tensor;
}

template <class T>
LocalTensor<T> local(int address, int count) {
  return LocalTensor<T>(TPosition::VECCALC, address, count);
}

// Loads both inputs to UB, runs `work(a, b, c)` and stores c.
template <class A, class B, class C, class F>
void vector(GM_ADDR a, GM_ADDR b, GM_ADDR out, int in, int results, F work) {
  if (ASCEND_IS_AIC || GetBlockIdx() != 0) return;
  InitSocState();
  LocalTensor<A> x = local<A>(0, in);
  LocalTensor<B> y = local<B>(32768, in);
  LocalTensor<C> z = local<C>(65536, results);
  DataCopy(x, global<A>(a), in);
  DataCopy(y, global<B>(b), in);
  SetFlag<HardEvent::MTE2_V>(0);
  WaitFlag<HardEvent::MTE2_V>(0);
  work(x, y, z);
  SetFlag<HardEvent::V_MTE3>(0);
  WaitFlag<HardEvent::V_MTE3>(0);
  DataCopy(global<C>(out), z, results);
  PipeBarrier<PIPE_ALL>();
}

template <class T>
void arithmetic(GM_ADDR a, GM_ADDR b, GM_ADDR, GM_ADDR out) {
  constexpr int n = kCount;
  vector<T, T, T>(a, b, out, n, 17 * n, [](auto x, auto y, auto z) {
    int i = 0;
    auto next = [&] { return z[n * i++]; };
    Exp(next(), x, n);
    Ln(next(), y, n);
    Abs(next(), x, n);
    Sqrt(next(), y, n);
    Rsqrt(next(), y, n);
    Reciprocal(next(), y, n);
    Relu(next(), x, n);
    Add(next(), x, y, n);
    Sub(next(), x, y, n);
    Mul(next(), x, y, n);
    Div(next(), x, y, n);
    Max(next(), x, y, n);
    Min(next(), x, y, n);
    Muls(next(), x, T(0.9375), n);
    Adds(next(), x, T(0.9375), n);
    Maxs(next(), x, T(0.5), n);
    Mins(next(), x, T(0.5), n);
  });
}

void integers(GM_ADDR a, GM_ADDR b, GM_ADDR, GM_ADDR out) {
  constexpr int n = kCount;
  vector<int16_t, int16_t, int16_t>(a, b, out, n, 4 * n, [](auto x, auto y, auto z) {
    Not(z, x, n);
    And(z[n], x, y, n);
    Or(z[2 * n], x, y, n);
    Add(z[3 * n], x, y, n);
  });
}

// Masks by count and by bits, repeats, and the broadcast of one number to each row.
void strides(GM_ADDR a, GM_ADDR b, GM_ADDR, GM_ADDR out) {
  vector<float, float, float>(a, b, out, 8 * 128, 4 * 1024, [](auto x, auto y, auto z) {
    LocalTensor<float> wide = local<float>(131072, 8 * 8);
    Duplicate(z, 0.f, 4 * 1024);
    Brcb(wide, y, 1, BrcbRepeatParams(1, 8));
    PipeBarrier<PIPE_V>();
    for (int slab = 0; slab < 2; ++slab)  // row i of 8 × 128 minus y[i]
      Sub(z[64 * slab], x[64 * slab], wide, 64, 8, BinaryRepeatParams(1, 1, 0, 16, 16, 1));
    Muls(z[1024], x, 2.f, 40, 8, UnaryRepeatParams(1, 1, 16, 16));
    uint64_t odd[2] = {0xaaaaaaaaaaaaaaaa, 0};
    Adds(z[2048], x, 1.f, odd, 4, UnaryRepeatParams(1, 1, 8, 8));
    Duplicate(z[3072], 3.f, 64, 2, 2, 16);
    Axpy(z[3584], x, 2.f, 64);
    PipeBarrier<PIPE_V>();
    Add(z[3840], x, z[3840], 64, 4, BinaryRepeatParams(1, 1, 1, 0, 8, 0));  // adds four repeats up
    Brcb(z[3904], y, 2, BrcbRepeatParams(1, 9));  // 8 blocks, one free, 8 blocks
  });
}

template <class T>
void reductions(GM_ADDR a, GM_ADDR b, GM_ADDR, GM_ADDR out) {
  constexpr int lanes = 256 / sizeof(T), rows = 8;
  vector<T, T, T>(a, b, out, rows * lanes, 16 * lanes, [](auto x, auto, auto z) {
    Duplicate(z, T(0), 16 * lanes);
    PipeBarrier<PIPE_V>();
    int i = 0;
    auto next = [&] { return z[lanes * i++]; };
    WholeReduceMax<T>(next(), x, lanes, rows, 1, 1, 8, ReduceOrder::ORDER_ONLY_VALUE);
    WholeReduceMin<T>(next(), x, lanes, rows, 1, 1, 8, ReduceOrder::ORDER_ONLY_VALUE);
    WholeReduceSum<T>(next(), x, lanes, rows, 1, 1, 8);
    WholeReduceSum<T>(next(), x, lanes - 5, rows, 2, 1, 8);
    WholeReduceMax<T>(next(), x, lanes, rows, 1, 1, 8);
    BlockReduceMax<T>(next(), x, rows, lanes, 1, 1, 8);
    BlockReduceMin<T>(next(), x, rows, lanes, 1, 1, 8);
    BlockReduceSum<T>(next(), x, rows, lanes, 1, 1, 8);
    PairReduceSum<T>(next(), x, rows, lanes, 1, 1, 8);
  });
}

template <class D, class S, bool with_odd = false>
void casts(GM_ADDR a, GM_ADDR b, GM_ADDR, GM_ADDR out) {
  constexpr int n = kCount, modes = with_odd ? 6 : 5;
  vector<S, S, D>(a, b, out, n, 6 * n, [](auto x, auto, auto z) {
    for (int i = 0; i < modes; ++i) Cast(z[i * n], x, RoundMode(int(RoundMode::CAST_RINT) + i), n);
    for (int i = modes; i < 6; ++i) Cast(z[i * n], x, RoundMode::CAST_RINT, n);
  });
}

template <class D, class S>
void exact_cast(GM_ADDR a, GM_ADDR b, GM_ADDR, GM_ADDR out) {
  vector<S, S, D>(a, b, out, kCount, kCount, [](auto x, auto, auto z) {
    constexpr int lanes = 64;  // by repeats: of 64 elements where the wider type has 4 bytes
    Cast(z, x, RoundMode::CAST_NONE, lanes, kCount / lanes,
         UnaryRepeatParams(1, 1, lanes * sizeof(D) / 32, lanes * sizeof(S) / 32));
  });
}

template <class T>
void compare_select(GM_ADDR a, GM_ADDR b, GM_ADDR, GM_ADDR out) {
  constexpr int n = kCount;
  vector<T, T, T>(a, b, out, n, 9 * n, [](auto x, auto y, auto z) {
    LocalTensor<uint8_t> bits = local<uint8_t>(131072, 1024);
    CMPMODE modes[] = {CMPMODE::LT, CMPMODE::GT, CMPMODE::EQ,
                       CMPMODE::LE, CMPMODE::GE, CMPMODE::NE};
    for (int i = 0; i < 6; ++i) Compare(bits[128 * i], x, y, modes[i], n);
    CompareScalar(bits[768], x, T(0.5), CMPMODE::GT, n);
    PipeBarrier<PIPE_V>();
    for (int i = 0; i < 6; ++i)
      Select(z[i * n], bits[128 * i], x, y, SELMODE::VSEL_TENSOR_TENSOR_MODE, n);
    Select(z[6 * n], bits[768], x, T(-1), SELMODE::VSEL_TENSOR_SCALAR_MODE, n);
    constexpr int lanes = 256 / sizeof(T);
    Select(z[7 * n], bits[768], x, y, SELMODE::VSEL_TENSOR_TENSOR_MODE, lanes, n / lanes,
           BinaryRepeatParams());
    Select(z[8 * n], bits[768], x, y, SELMODE::VSEL_CMPMASK_SPR, lanes, n / lanes,
           BinaryRepeatParams());
  });
}

// Rows of 10 numbers padded to 16 on the way in, and stored again without the padding.
void padded_copy(GM_ADDR a, GM_ADDR, GM_ADDR, GM_ADDR out) {
  if (ASCEND_IS_AIC || GetBlockIdx() != 0) return;
  InitSocState();
  LocalTensor<half> x = local<half>(0, 4 * 32);
  DataCopyPad(x, global<half>(a), DataCopyExtParams(4, 20, 4, 1, 0),
              DataCopyPadExtParams<half>(true, 0, 6, half(-1)));
  SetFlag<HardEvent::MTE2_MTE3>(0);
  WaitFlag<HardEvent::MTE2_MTE3>(0);
  DataCopyPad(global<half>(out), x, DataCopyExtParams(4, 20, 1, 0, 0));
  DataCopy(global<half>(out)[48], x, DataCopyParams(4, 1, 1, 0));
  PipeBarrier<PIPE_ALL>();
}

// out [m][n] = a [m][k] · b; b is [n][k], or [k][n] where `transpose`.
template <class T, class Out, bool transpose>
void matmul(GM_ADDR a, GM_ADDR b, GM_ADDR shape, GM_ADDR out) {
  if (ASCEND_IS_AIV || GetBlockIdx() != 0) return;
  InitSocState();
  constexpr int c0 = 32 / sizeof(T), fractal = 512 / sizeof(T);
  GlobalTensor<int32_t> sizes = global<int32_t>(shape);
  int m = sizes.GetValue(0), n = sizes.GetValue(1), k = sizes.GetValue(2);
  auto up = [](int x, int y) { return (x + y - 1) / y * y; };
  int rows = up(m, 16), columns = up(n, 16), depth = up(k, transpose ? 16 : c0);
  LocalTensor<T> a1(TPosition::A1, 0, rows * depth), b1(TPosition::B1, 131072, columns * depth);
  LocalTensor<T> a2(TPosition::A2, 0, rows * depth), b2(TPosition::B2, 0, columns * depth);
  LocalTensor<float> c(TPosition::CO1, 0, rows * columns);
  DataCopy(a1, global<T>(a), Nd2NzParams(1, m, k, 0, k, rows, 1, 0));
  if (transpose)
    DataCopy(b1, global<T>(b), Nd2NzParams(1, k, n, 0, n, depth, 1, 0));
  else
    DataCopy(b1, global<T>(b), Nd2NzParams(1, n, k, 0, k, columns, 1, 0));
  SetFlag<HardEvent::MTE2_MTE1>(0);
  WaitFlag<HardEvent::MTE2_MTE1>(0);
  for (int i = 0; i < rows / 16; ++i)
    LoadData(a2[i * depth * 16], a1[i * fractal],
             LoadData2DParams(0, depth / c0, rows / 16, 0, 0, false, 0));
  for (int i = 0; i < depth / c0; ++i)
    LoadData(b2[i * columns * c0], transpose ? b1[i * fractal] : b1[i * columns * c0],
             LoadData2DParams(0, columns / 16, transpose ? depth / 16 : 1, 0, 0, transpose, 0));
  SetFlag<HardEvent::MTE1_M>(0);
  WaitFlag<HardEvent::MTE1_M>(0);
  Mmad(c, a2, b2, MmadParams(m, n, k, 0, false, true));
  PipeBarrier<PIPE_M>();
  Mmad(c, a2, b2, MmadParams(m, n, k, 0, false, false));  // once more on top
  SetFlag<HardEvent::M_FIX>(0);
  WaitFlag<HardEvent::M_FIX>(0);
  FixpipeParamsV220 fix;
  fix.nSize = n, fix.mSize = m, fix.srcStride = rows, fix.dstStride = n;
  fix.quantPre = sizeof(Out) == 4 ? NoQuant : std::is_same_v<Out, half> ? F322F16 : F322BF16;
  Fixpipe<Out, float, CFG_ROW_MAJOR>(global<Out>(out), c, fix);
  PipeBarrier<PIPE_ALL>();
}

// Every core writes its own part, then reads its neighbour's: SyncAll joins them all.
template <bool vectors_only>
void sync_all(GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR out) {
  if (vectors_only && ASCEND_IS_AIC) return;
  InitSocState();
  int index = GetBlockIdx(), cores = 2 * GetBlockNum();
  LocalTensor<float> x = local<float>(0, 8);
  if (ASCEND_IS_AIV) {
    Duplicate(x, float(index), 8);
    SetFlag<HardEvent::V_MTE3>(0);
    WaitFlag<HardEvent::V_MTE3>(0);
    DataCopy(global<float>(out)[8 * index], x, 8);
  }
  SyncAll<vectors_only>();
  if (ASCEND_IS_AIV) {
    DataCopy(x, global<float>(out)[8 * ((index + 1) % cores)], 8);
    SetFlag<HardEvent::MTE2_MTE3>(0);
    WaitFlag<HardEvent::MTE2_MTE3>(0);
    DataCopy(global<float>(out)[8 * (cores + index)], x, 8);
  }
  PipeBarrier<PIPE_ALL>();
}

using Kernel = void (*)(GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR);
const std::map<std::string, Kernel> kKernels = {
    {"arithmetic_half", arithmetic<half>},
    {"arithmetic_float", arithmetic<float>},
    {"integers", integers},
    {"strides", strides},
    {"reductions_half", reductions<half>},
    {"reductions_float", reductions<float>},
    {"float_to_half", casts<half, float, true>},
    {"float_to_bfloat16", casts<bfloat16_t, float>},
    {"float_to_int32", casts<int32_t, float>},
    {"float_to_float", casts<float, float>},
    {"half_to_int8", casts<int8_t, half>},
    {"half_to_float", exact_cast<float, half>},
    {"bfloat16_to_float", exact_cast<float, bfloat16_t>},
    {"int32_to_float", exact_cast<float, int32_t>},
    {"compare_select_half", compare_select<half>},
    {"compare_select_float", compare_select<float>},
    {"padded_copy", padded_copy},
    {"matmul_half", matmul<half, float, false>},
    {"matmul_half_transposed", matmul<half, half, true>},
    {"matmul_bfloat16", matmul<bfloat16_t, bfloat16_t, true>},
    {"matmul_float", matmul<float, float, false>},
    {"sync_vectors", sync_all<true>},
    {"sync_everyone", sync_all<false>},
};

}  // namespace

int main(int argc, char** argv) { return argc < 3 ? 2 : emulate(argc, argv, kKernels.at(argv[2])); }
