// Calls that this chip does not have: every line that says `refused` must be a compile error.
#include "kernel_operator.h"

using namespace AscendC;

template <class T>
LocalTensor<T> at(TPosition position = TPosition::VECCALC) {
  return LocalTensor<T>(position, 0, 256);
}

void calls() {
  Muls(at<bfloat16_t>(), at<bfloat16_t>(), bfloat16_t{}, 128);  // refused: Muls
  Exp(at<bfloat16_t>(), at<bfloat16_t>(), 128);  // refused: Exp
  Duplicate(at<int8_t>(), int8_t(0), 128);  // refused: Duplicate
  Cast(at<half>(), at<bfloat16_t>(), RoundMode::CAST_NONE, 128);  // refused: Cast
  And(at<int32_t>(), at<int32_t>(), at<int32_t>(), 64);  // refused: And
  Div(at<int32_t>(), at<int32_t>(), at<int32_t>(), 64);  // refused: Div
  CompareScalar(at<int8_t>(), at<float>(), 0.f, CMPMODE::LT, 64);  // refused: CompareScalar
  Select(at<int32_t>(), at<uint8_t>(), at<int32_t>(), 0,  // refused: Select
         SELMODE::VSEL_TENSOR_SCALAR_MODE, 64);
  BlockReduceMax<int32_t>(at<int32_t>(), at<int32_t>(), 1, 64, 1, 1, 8);  // refused: BlockReduceMax
  WholeReduceSum<float>(at<float>(), at<float>(), 64, 1, 1, 1, 8,  // refused: WholeReduceSum
                        ReduceOrder::ORDER_ONLY_VALUE);
  Brcb(at<int64_t>(), at<int64_t>(), 1, {1, 8});  // refused: Brcb
  LoadData(at<double>(TPosition::A2), at<double>(TPosition::A1), LoadData2DParams());  // refused: LoadData
  Mmad(at<half>(TPosition::CO1), at<half>(TPosition::A2), at<half>(TPosition::B2),  // refused: Mmad
       MmadParams(16, 16, 16, 0, false, true));
  SetFlag<HardEvent::S_FIX>(0);  // refused: SetFlag
}
