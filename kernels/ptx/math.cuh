// Special functions. PTX ISA 9.7.3 "Floating Point Instructions".
#pragma once
#include "ptx/types.cuh"

// 2^x. ex2.approx: at most 2 ulp; -inf gives 0, NaN stays NaN. With .ftz it is one instruction, without it four; what is flushed is below 2^-126 of
// the largest probability of its row.
DEVICE float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x). lg2.approx; 0 gives -inf.
DEVICE float lg2(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x. rcp.approx: at most 1 ulp; infinity gives 0, NaN stays NaN.
DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The square root of x. sqrt.approx: a relative error of at most 2^-23.
DEVICE float square_root(float x) {
  float y;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x * y + z rounded towards minus infinity.
DEVICE float fma_rm(float x, float y, float z) {
  float w;
  asm("fma.rm.f32 %0, %1, %2, %3;" : "=f"(w) : "f"(x), "f"(y), "f"(z));
  return w;
}

// Gives -inf to `score` where `seen` is 0, in integers and on the FMA unit: a selection would take the ALU, which has maxima and conversions to do.
// The assembler must not know that `zero` is 0, since it would make a selection of it.
DEVICE void hide_on_fma(float& score, uint32 seen, int zero) {
  asm("{\n"
      "  .reg .pred hidden;\n"
      "  .reg .b32 bits;\n"
      "  setp.eq.u32 hidden, %1, 0;\n"
      "  mov.b32 bits, %0;\n"
      "  @hidden mad.lo.s32 bits, bits, %2, 0xff800000;\n"
      "  mov.b32 %0, bits;\n"
      "}"
      : "+f"(score)
      : "r"(seen), "r"(zero));
}

// min(x, y) that keeps NaN.
DEVICE float min_nan(float x, float y) {
#if __CUDA_ARCH__ >= 800
  float z;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
#else
  return x > y ? y : x;  // of y it keeps none, which is never NaN here
#endif
}

// max(x, y) that keeps NaN.
DEVICE float max_nan(float x, float y) {
#if __CUDA_ARCH__ >= 800
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
#else
  return x < y ? y : x;  // of y it keeps none, which is never NaN here
#endif
}
